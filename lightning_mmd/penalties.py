r"""Penalties of a trained critic: parametric gradient, RKHS norm, input gradient."""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Literal, NamedTuple, Protocol, runtime_checkable
from weakref import WeakSet

import torch
from torch import Tensor, nn

from lightning_mmd.pushforward import (
    Pushforward,
    Replay,
    evaluate_critic,
    full_precision,
    refuse_once_differentiable,
    refuse_shared_parameters,
    unfused_attention,
)

__all__ = [
    "KinkedCriticWarning",
    "PenalisedCritic",
    "input_gradient_penalty",
    "parametric_gradient_penalty",
    "penalised_critic",
    "rkhs_norm_penalty",
    "warn_of_kinks",
]

Method = Literal["forward", "double_backward", "finite_difference"]
Estimator = Literal["batch", "split"]
_KINKED = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.Hardtanh, nn.Threshold)


class KinkedCriticWarning(UserWarning):
    """Automatic differentiation loses the kinks' part of a gradient penalty's gradient."""


class PenalisedCritic(NamedTuple):
    """What one evaluation of the penalty yields.

    Attributes:
        penalty: ||L f||^2, or its part along a given direction, a scalar with the gradient in the
            critic's parameters.
        values: Critic values on the generated samples, of shape (n,), with their graph.
        direction: L f of shape (P,) (the given one, where one was given), without a graph.
    """

    penalty: Tensor
    values: Tensor
    direction: Tensor


def parametric_gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    generator: nn.Module,
    z: Tensor,
    method: Method = "forward",
    *,
    estimator: Estimator = "batch",
    direction: Tensor | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    r"""Squared norm, in the generator's parameter space, of the mean gradient of a critic.

    .. math:: \|L f\|^2 = \Big\| \nabla_\theta \frac1n \sum_i f(G_\theta(z_i)) \Big\|^2

    Weight it by alpha / 2 in a critic's loss. It is differentiable in the critic's parameters
    only: the generator's ``.grad``, buffers and the random state are left as one forward pass
    leaves them.

    The methods agree in value and gradient to rounding, except for the last:

    * ``"forward"``: one reverse pass gives v = L f, one forward-mode pass the samples' tangents
      dx = J_theta G v, and the gradient is that of sum <grad f, dx>. No double backward through the
      generator; about 2.5 times the cost of an unpenalised critic step.
    * ``"double_backward"``: automatic differentiation of the formula. More memory and time.
    * ``"finite_difference"``: a central difference of f along v. First-order operations only; good
      to 1e-3 to 1e-5 with smooth networks in float32, useless with ReLU-like ones.

    Bias: the squared norm of a batch mean overestimates by Var / n,
    :math:`E\|g_n\|^2 = \|g\|^2 + \mathrm{tr\,Cov}(g) / n`, 1.2- to 2.5-fold near convergence.
    ``estimator="split"`` takes :math:`\langle g_A, g_B\rangle` of two halves of the batch, which
    is unbiased (and may be negative). A ``direction`` v, such as the mean gradient of the last
    generator step, gives :math:`\langle v, L f\rangle^2 / \|v\|^2`, the part of the penalty along
    v, for one reverse pass less: noise across v is not punished, and it never exceeds the penalty
    of the batch. (:math:`\langle v, L f\rangle` itself would be unbiased too, but it is linear in
    f: a critic lowers it without bound, and training diverges.)

    Args:
        critic: Module (or any callable) from samples to values (n,) or (n, 1).
        generator: Module from latents to samples.
        z: Latents of shape (n, ...).
        method: See above.
        estimator: ``"batch"`` or ``"split"``, see above; ``"split"`` needs an even n.
        direction: A vector v of shape (P,) along which alone the gradient is penalised.
        parameters: The generator's parameters to differentiate in, by name; default: the trainable.
        reduce: Averages a vector over processes, so that W processes see one global L f; default:
            this process is alone. The value returned is this process's share, whose mean over
            processes is the penalty.

    Returns:
        Scalar, >= 0 on one process except for the split estimator.

    Raises:
        ValueError: If critic and generator share a parameter, an argument is unknown or a shape
            does not fit.

    Warns:
        KinkedCriticWarning: If the critic holds ReLU-like layers.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402, regularised discrepancy MMD_{alpha,beta}.

    Example:
        >>> critic, generator = torch.nn.Linear(3, 1, bias=False), torch.nn.Linear(2, 3, bias=False)
        >>> penalty = parametric_gradient_penalty(critic, generator, torch.eye(2))
        >>> expected = critic.weight.square().sum() / 2
        >>> torch.testing.assert_close(penalty, expected)
    """
    return penalised_critic(
        critic,
        generator,
        z,
        method,
        estimator=estimator,
        direction=direction,
        parameters=parameters,
        reduce=reduce,
    ).penalty


def penalised_critic(
    critic: Callable[[Tensor], Tensor],
    generator: nn.Module,
    z: Tensor,
    method: Method = "forward",
    *,
    estimator: Estimator = "batch",
    direction: Tensor | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> PenalisedCritic:
    """Evaluate the penalty and, from the same passes, the critic on the generated samples.

    A critic's loss needs both, and one forward pass of each network serves. Arguments and errors
    are those of :func:`parametric_gradient_penalty`.

    Args:
        critic: See there.
        generator: See there.
        z: See there.
        method: See there.
        estimator: See there.
        direction: See there.
        parameters: See there.
        reduce: See there.

    Returns:
        Penalty, critic values and direction.

    Raises:
        ValueError: If critic and generator share a parameter, an argument is unknown or a shape
            does not fit.
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {sorted(_METHODS)}, got {method!r}.")
    if estimator not in ("batch", "split"):
        raise ValueError(f"estimator must be 'batch' or 'split', got {estimator!r}.")
    if isinstance(critic, nn.Module):
        refuse_shared_parameters(critic, generator)
        warn_of_kinks(critic)
    evaluate = _METHODS[method]
    # Fused attention has no second derivative: the critic, and for method="double_backward" the
    # generator, run unfused. The other methods ask of a generator what Pushforward finds a way to.
    generator_context = unfused_attention if method == "double_backward" else nullcontext
    with torch.enable_grad(), full_precision(z.device):
        with generator_context():
            if direction is not None or estimator == "batch":
                pushes = [Pushforward(generator, z, parameters)]
            elif len(z) % 2:
                raise ValueError(
                    f"estimator='split' needs an even number of latents, got {len(z)}. Use an even "
                    "batch size, or estimator='batch'."
                )
            else:
                pushes = [Pushforward(generator, half, parameters) for half in z.chunk(2)]
        with unfused_attention():
            *independent, push = pushes
            other_values = []
            for first in independent:
                x = first.samples.requires_grad_()
                other_values.append(evaluate_critic(critic, x))
                direction = reduce(first.cotangent(_mean_gradient(other_values[-1], x)))
            slope, values, v = evaluate(critic, push, _check_direction(direction, push), reduce)
        if direction is None or independent:
            penalty = 2 * slope - slope.detach()  # v is held in <v, L f>: half of the gradient
        else:
            length2 = v.square().sum()
            mean_slope = reduce(slope.detach().reshape(1)).reshape(())
            along = mean_slope / length2.clamp_min(torch.finfo(v.dtype).tiny)
            penalty = along * (2 * slope - along * length2)
        return PenalisedCritic(penalty, torch.cat([*other_values, values]), v)


_Slope = tuple[Tensor, Tensor, Tensor]
"""<v, L f> with v held, critic values, and v."""


def _forward(
    critic: Callable[[Tensor], Tensor],
    push: Pushforward,
    direction: Tensor | None,
    reduce: Callable[[Tensor], Tensor],
) -> _Slope:
    x = push.samples.requires_grad_()
    values = evaluate_critic(critic, x)
    c = _mean_gradient(values, x, create_graph=True)
    refuse_once_differentiable([c])
    v = reduce(push.cotangent(c.detach())) if direction is None else direction
    return (c * push.tangent(v)).sum(), values, v


def _double_backward(
    critic: Callable[[Tensor], Tensor],
    push: Pushforward,
    direction: Tensor | None,
    reduce: Callable[[Tensor], Tensor],
) -> _Slope:
    values, gradient = push.differentiate(lambda x: evaluate_critic(critic, x))
    refuse_once_differentiable([gradient])
    v = reduce(gradient.detach()) if direction is None else direction
    return v @ gradient, values, v


def _finite_difference(
    critic: Callable[[Tensor], Tensor],
    push: Pushforward,
    direction: Tensor | None,
    reduce: Callable[[Tensor], Tensor],
) -> _Slope:
    x = push.samples.requires_grad_()
    replay = Replay(critic, x.device)  # one power iteration, one dropout mask for all three passes
    values = evaluate_critic(critic, x)
    v = reduce(push.cotangent(_mean_gradient(values, x))) if direction is None else direction
    step, (ahead, behind) = push.neighbours(v)
    slope = (evaluate_critic(replay, ahead) - evaluate_critic(replay, behind)).mean() / (2 * step)
    return slope, values, v


_METHODS = {
    "forward": _forward,
    "double_backward": _double_backward,
    "finite_difference": _finite_difference,
}


def _mean_gradient(values: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    return torch.autograd.grad(
        values.mean(), x, create_graph=create_graph, retain_graph=True, materialize_grads=True
    )[0]


def _check_direction(direction: Tensor | None, push: Pushforward) -> Tensor | None:
    if direction is None:
        return None
    if direction.shape != (push.num_parameters,):
        raise ValueError(
            f"direction must have shape ({push.num_parameters},), one entry for each generator "
            f"parameter, got {tuple(direction.shape)}."
        )
    return direction.detach()


def warn_of_kinks(critic: nn.Module) -> None:
    """Warn once a critic that its ReLU-like layers make gradient penalties inconsistent.

    The gradient of a penalty on grad f contains the jumps of grad f at the kinks, which automatic
    differentiation does not see: biases get exactly zero, and the error in the whole gradient is
    around 60 % (0.1 % for SiLU).

    Args:
        critic: The module.

    Warns:
        KinkedCriticWarning: If it holds ReLU, LeakyReLU or another piecewise-linear activation.
    """
    if critic in _warned:
        return
    _warned.add(critic)
    kinked = sorted({type(m).__name__ for m in critic.modules() if isinstance(m, _KINKED)})
    if kinked:
        warnings.warn(
            f"the critic {type(critic).__name__} holds {', '.join(kinked)}: automatic "
            "differentiation misses the kinks' part of a gradient penalty's gradient (about 60 %). "
            "Use SiLU, GELU or Softplus.",
            KinkedCriticWarning,
            stacklevel=2,
        )


_warned: WeakSet[nn.Module] = WeakSet()


@runtime_checkable
class _RKHSFunction(Protocol):
    def rkhs_norm2(self) -> Tensor: ...


def rkhs_norm_penalty(critic: Callable[[Tensor], Tensor]) -> Tensor:
    r"""Squared RKHS norm of a critic, :math:`\|f\|_H^2`.

    Weight it by beta / 2 in a critic's loss. For :class:`~lightning_mmd.LearnedKernelCritic` it is
    ||w||^2.

    Args:
        critic: A critic with a method ``rkhs_norm2()``.

    Returns:
        Scalar, >= 0, differentiable in the critic's parameters.

    Raises:
        TypeError: If the critic has no RKHS norm.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402, regularised discrepancy MMD_{alpha,beta}.
    """
    if not isinstance(critic, _RKHSFunction):
        raise TypeError(
            f"the critic {type(critic).__name__} has no RKHS norm: a method rkhs_norm2() is "
            "needed. Use LearnedKernelCritic, or beta = 0."
        )
    return critic.rkhs_norm2()


def input_gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor | None = None,
    *,
    target: float = 1.0,
    rng: torch.Generator | None = None,
) -> Tensor:
    r"""Gradient penalty in the input space, the baseline that everyone knows.

    .. math:: E\,(\|\nabla_x f(\hat x)\| - \text{target})^2

    at :math:`\hat x = u x + (1 - u) y` with u uniform in [0, 1] for each pair of a real and a
    generated sample (WGAN-GP), or at the real samples where none are generated (R1 with
    ``target=0``). The norm is over all entries of a sample.

    Args:
        critic: Module from samples to values (n,) or (n, 1).
        real: Real samples of shape (n, ...).
        fake: Generated samples of the same shape, or None.
        target: Norm aimed at, >= 0.
        rng: Source of u; default: torch's global one.

    Returns:
        Scalar, >= 0, differentiable in the critic's parameters.

    Raises:
        ValueError: If the shapes differ or ``target`` is negative.

    Source:
        Gulrajani et al., arXiv 1704.00028, equation 3; Mescheder et al., arXiv 1801.04406 (R1).
    """
    if not 0 <= target < math.inf:
        raise ValueError(f"target must be a finite number >= 0, got {target}.")
    x = real.detach()
    if fake is not None:
        if fake.shape != real.shape:
            raise ValueError(
                "input_gradient_penalty interpolates pairs, so real and fake need one shape, got "
                f"{tuple(real.shape)} and {tuple(fake.shape)}."
            )
        u = torch.rand(len(x), generator=rng, dtype=x.dtype, device=x.device)
        x = torch.lerp(fake.detach(), x, u.reshape(-1, *[1] * (x.ndim - 1)))
    x.requires_grad_()
    with torch.enable_grad(), full_precision(x.device), unfused_attention():
        values = evaluate_critic(critic, x)
        (slopes,) = torch.autograd.grad(values.sum(), x, create_graph=True, materialize_grads=True)
        squared = slopes.flatten(1).square().sum(1)
        if target == 0:
            return squared.mean()
        return (squared.clamp_min(torch.finfo(x.dtype).tiny).sqrt() - target).square().mean()
