r"""Penalties of a trained critic: parametric gradient, RKHS norm, input gradient."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_mmd.critic_values import evaluate_critic, refuse_once_differentiable
from lightning_mmd.critic_warnings import warn_of_kinks, warn_of_sigmoid
from lightning_mmd.estimators import Batch, Estimator
from lightning_mmd.latents import Inputs, as_inputs, select
from lightning_mmd.parameters import refuse_shared_parameters
from lightning_mmd.passes import (
    Replay,
    buffers_kept,
    full_precision,
    random_state_kept,
    unfused_attention,
)
from lightning_mmd.points import require_tensors
from lightning_mmd.pushforward import Pushforward, parametric_gradient

__all__ = [
    "Held",
    "Method",
    "PenalisedCritic",
    "critic_terms",
    "hold",
    "input_gradient_penalty",
    "joint_penalty",
    "parametric_gradient_penalty",
    "penalised_critic",
    "rkhs_norm_penalty",
]

Method = Literal["forward", "double_backward", "finite_difference"]


class PenalisedCritic(NamedTuple):
    """What one evaluation of the penalty yields.

    Attributes:
        penalty: ||L f||^2, or its part along a given direction, a scalar with the gradient in the
            critic's parameters.
        values: Critic values on the generated samples, of shape (n,), with their graph.
        direction: The held vector v of shape (P,), without a graph.
    """

    penalty: Tensor
    values: Tensor
    direction: Tensor


@dataclass(frozen=True)
class Held:
    """What is known before a part of a batch is penalised: it belongs to the whole batch.

    Attributes:
        direction: The held vector v of shape (P,).
        slope: <v, L f> of the whole batch and all processes, a scalar; None where the estimator
            does not use it.
    """

    direction: Tensor
    slope: Tensor | None = None


def parametric_gradient_penalty(
    critic: Callable[..., Tensor],
    generator: nn.Module,
    z: Inputs,
    method: Method = "forward",
    *,
    estimator: Estimator | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
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

    Args:
        critic: Module (or any callable) from samples, and labels if there are any, to values (n,)
            or (n, 1).
        generator: Module from latents to samples.
        z: Latents of shape (n, ...), or a tuple (latents, labels): both networks get the labels.
        method: See above.
        estimator: How a batch stands for the expectation: `Batch` (default), which is biased
            upwards, `Split`, which is unbiased, or `Lagged`.
        parameters: The generator's parameters to differentiate in, by name; default: the trainable.
        mean: Averages a tensor over processes, so that W processes see one global L f; default:
            this process is alone. The value returned is this process's share, whose mean over
            processes is the penalty.

    Returns:
        Scalar, >= 0 on one process except for `Split`.

    Raises:
        ValueError: If critic and generator share a parameter, an argument is unknown or a shape
            does not fit.

    Warns:
        KinkedCriticWarning: If the critic holds ReLU-like layers.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402, regularised discrepancy MMD_{alpha,beta}.

    Examples:
        >>> critic, generator = torch.nn.Linear(3, 1, bias=False), torch.nn.Linear(2, 3, bias=False)
        >>> penalty = parametric_gradient_penalty(critic, generator, torch.eye(2))
        >>> expected = critic.weight.square().sum() / 2
        >>> torch.testing.assert_close(penalty, expected)
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {sorted(_METHODS)}, got {method!r}.")
    estimator = Batch() if estimator is None else estimator
    if not isinstance(estimator, Estimator):
        raise TypeError(
            f"estimator must be an Estimator such as Batch() or Split(), got {estimator!r}."
        )
    if isinstance(critic, nn.Module):
        refuse_shared_parameters(critic, generator)
        warn_of_kinks(critic)
    inputs = as_inputs(z)
    for part in inputs:
        require_tensors("parametric_gradient_penalty", z=part)
    groups = [select(inputs, group) for group in estimator.groups(len(inputs[0]))]
    return penalised_critic(
        critic, generator, groups, method, estimator=estimator, parameters=parameters, mean=mean
    ).penalty


def penalised_critic(
    critic: Callable[..., Tensor],
    generator: nn.Module,
    groups: Sequence[tuple[Tensor, ...]],
    method: Method,
    *,
    estimator: Estimator,
    held: Held | None = None,
    parameters: Mapping[str, Tensor] | None = None,
    mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> PenalisedCritic:
    """Evaluate the penalty and, from the same passes, the critic on the generated samples.

    A critic's loss needs both, and one forward pass of each network serves. Arguments are those of
    :func:`parametric_gradient_penalty`, which checks them.

    Args:
        critic: See there.
        generator: See there.
        groups: Latents (and labels) of the estimator's groups.
        method: See there.
        estimator: See there.
        held: What is known of the whole batch, where the groups are a part of it.
        parameters: See there.
        mean: See there.

    Returns:
        Penalty, critic values in the order of the groups, and direction.

    Raises:
        ValueError: If a shape does not fit.
    """
    device = groups[0][0].device
    direction = estimator.direction if held is None else held.direction
    # Fused attention has no second derivative: the critic, and for method="double_backward" the
    # generator, run unfused. The other methods ask of a generator what Pushforward finds a way to.
    generator_context = unfused_attention if method == "double_backward" else nullcontext
    with torch.enable_grad(), full_precision(device):
        with generator_context():
            pushes = [Pushforward(generator, group, parameters) for group in groups]
        with unfused_attention():
            *independent, push = pushes
            other_values = []
            for first in independent:
                x = first.samples.requires_grad_()
                other_values.append(evaluate_critic(critic, x, *first.inputs[1:]))
                if direction is None:
                    direction = mean(first.cotangent(_mean_gradient(other_values[-1], x)))
            direction = _check_direction(direction, push)
            slope, values, v = _METHODS[method](critic, push, direction, mean)

        def mean_slope() -> Tensor:
            if held is not None and held.slope is not None:
                return held.slope
            return mean(slope.detach().reshape(1)).reshape(())

        penalty = estimator.value(slope, v, mean_slope)
        return PenalisedCritic(penalty, torch.cat([*other_values, values]), v)


def joint_penalty(
    groups: Sequence[Sequence[Pushforward]],
    values: Callable[[int, Sequence[Tensor]], Tensor],
    *,
    estimator: Estimator,
    mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    r"""Penalty of a critic that sees the outputs of several calls of a generator.

    .. math:: \Big\| \nabla_\theta \frac1N \sum_i f_i(x_1, x_2, \ldots) \Big\|^2, \qquad
        x_k = G_\theta(z_k)

    where each value may depend on all outputs and on whatever else the critic is given. With one
    call and values f(x_i) it is `parametric_gradient_penalty`.

    Args:
        groups: For each of the estimator's groups, the pushforwards of the generator's calls.
        values: From the number of a group, and samples of its calls, to values of shape (N,).
        estimator: See `parametric_gradient_penalty`.
        mean: See there.

    Returns:
        Scalar, with the gradient in the critic's parameters.

    Raises:
        RuntimeError: If a layer of the critic has no second derivative.
    """
    direction = estimator.direction
    with torch.enable_grad(), full_precision(groups[0][0].samples.device), unfused_attention():
        for number, pushes in enumerate(groups[:-1]):
            if direction is None:
                cs = _slopes(values, number, [push.samples for push in pushes])
                direction = mean(_pull_back(pushes, cs))
        pushes = groups[-1]
        cs = _slopes(values, len(groups) - 1, [push.samples for push in pushes], create_graph=True)
        refuse_once_differentiable(cs)
        v = mean(_pull_back(pushes, cs)) if direction is None else direction
        slope = torch.stack(
            [(c * push.tangent(v)).sum() for c, push in zip(cs, pushes, strict=True)]
        ).sum()
        return estimator.value(slope, v, lambda: mean(slope.detach().reshape(1)).reshape(()))


def _slopes(
    values: Callable[[int, Sequence[Tensor]], Tensor],
    number: int,
    samples: list[Tensor],
    create_graph: bool = False,
) -> tuple[Tensor, ...]:
    xs = [x.requires_grad_() for x in samples]
    f = values(number, xs)
    return _mean_gradients(f, xs, create_graph=create_graph)


def _pull_back(pushes: Sequence[Pushforward], cs: Sequence[Tensor]) -> Tensor:
    parts = [push.cotangent(c.detach()) for push, c in zip(pushes, cs, strict=True)]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


_Slope = tuple[Tensor, Tensor, Tensor]
"""<v, L f> with v held, critic values, and v."""


def _forward(
    critic: Callable[..., Tensor],
    push: Pushforward,
    direction: Tensor | None,
    mean: Callable[[Tensor], Tensor],
) -> _Slope:
    x = push.samples.requires_grad_()
    values = evaluate_critic(critic, x, *push.inputs[1:])
    c = _mean_gradient(values, x, create_graph=True)
    refuse_once_differentiable([c])
    v = mean(push.cotangent(c.detach())) if direction is None else direction
    return (c * push.tangent(v)).sum(), values, v


def _double_backward(
    critic: Callable[..., Tensor],
    push: Pushforward,
    direction: Tensor | None,
    mean: Callable[[Tensor], Tensor],
) -> _Slope:
    values, gradient = push.differentiate(lambda x: evaluate_critic(critic, x, *push.inputs[1:]))
    refuse_once_differentiable([gradient])
    v = mean(gradient.detach()) if direction is None else direction
    return v @ gradient, values, v


def _finite_difference(
    critic: Callable[..., Tensor],
    push: Pushforward,
    direction: Tensor | None,
    mean: Callable[[Tensor], Tensor],
) -> _Slope:
    x, labels = push.samples.requires_grad_(), push.inputs[1:]
    replay = Replay(critic, x.device)  # one power iteration, one dropout mask for all three passes
    values = evaluate_critic(critic, x, *labels)
    v = mean(push.cotangent(_mean_gradient(values, x))) if direction is None else direction
    step, (ahead, behind) = push.neighbours(v)
    on_ahead, on_behind = (evaluate_critic(replay, x, *labels) for x in (ahead, behind))
    slope = (on_ahead - on_behind).mean() / (2 * step)
    return slope, values, v


_METHODS = {
    "forward": _forward,
    "double_backward": _double_backward,
    "finite_difference": _finite_difference,
}


def _mean_gradient(values: Tensor, x: Tensor, *, create_graph: bool = False) -> Tensor:
    return _mean_gradients(values, [x], create_graph=create_graph)[0]


def _mean_gradients(
    values: Tensor, xs: Sequence[Tensor], *, create_graph: bool = False
) -> tuple[Tensor, ...]:
    """Return the gradients of the mean of values, as functions of the critic's parameters.

    The weights 1 / n require a gradient, so that a last layer that is differentiable once only does
    not pass for a constant.
    """
    weights = torch.full_like(values, 1 / len(values), requires_grad=create_graph)
    if create_graph:
        warn_of_sigmoid(values)
    return torch.autograd.grad(
        values, xs, weights, create_graph=create_graph, retain_graph=True, materialize_grads=True
    )


def _check_direction(direction: Tensor | None, push: Pushforward) -> Tensor | None:
    if direction is None:
        return None
    if direction.shape != (push.num_parameters,):
        raise ValueError(
            f"direction must have shape ({push.num_parameters},), one entry for each generator "
            f"parameter, got {tuple(direction.shape)}."
        )
    return direction.detach()


def critic_terms(
    gap: Tensor, parametric_penalty: Tensor, rkhs_penalty: Tensor, *, alpha: float, beta: float
) -> dict[str, Tensor]:
    """Return a critic's objective by terms, to be logged.

    Args:
        gap: Difference of the critic's means.
        parametric_penalty: ||L f||^2, unweighted.
        rkhs_penalty: ||f||_H^2, unweighted.
        alpha: Weight of the first.
        beta: Weight of the second.

    Returns:
        The terms by name; a share is a weighted term's part of the sum of absolute values.
    """
    gap, parametric_penalty = gap.detach(), parametric_penalty.detach()
    rkhs_penalty = rkhs_penalty.detach()
    weighted = {
        "parametric": alpha / 2 * parametric_penalty,
        "rkhs": beta / 2 * rkhs_penalty,
    }
    total = gap.abs() + sum(term.abs() for term in weighted.values())
    return {
        "critic/gap": gap,
        "critic/parametric_penalty": parametric_penalty,
        "critic/parametric_gradient_norm": parametric_penalty.clamp_min(0).sqrt(),
        "critic/rkhs_penalty": rkhs_penalty,
    } | {f"critic/{name}_share": term / total for name, term in weighted.items()}


def hold(
    critic: Callable[..., Tensor],
    generator: nn.Module,
    parts: Sequence[Sequence[tuple[Tensor, ...]]],
    estimator: Estimator,
    *,
    parameters: Mapping[str, Tensor] | None = None,
    mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Held:
    """Find what a penalty holds, for a batch that is evaluated in parts.

    The penalty is no mean over samples: before the gradient of any part its vector L f (or the
    slope along the known direction) must be there, averaged over all parts and processes. So one
    pass goes before, whose random numbers and buffers are put back.

    Args:
        critic: See :func:`parametric_gradient_penalty`.
        generator: See there.
        parts: Latents, by part and by the estimator's group.
        estimator: See there.
        parameters: See there.
        mean: See there.

    Returns:
        Direction and slope of the whole batch.
    """
    known = estimator.direction
    groups = [part[0 if known is None else -1] for part in parts]
    num = sum(len(group[0]) for group in groups)
    networks = [m for m in (critic, generator) if isinstance(m, nn.Module)]
    with random_state_kept(groups[0][0].device), buffers_kept(*networks):
        total = torch.zeros((), device=groups[0][0].device)
        for group in groups:
            gradient = parametric_gradient(critic, generator, group, parameters)
            total = total + gradient * (len(group[0]) / num)
    if known is None:
        return Held(mean(total))
    known = known.to(total)
    return Held(known, mean((total @ known).reshape(1)).reshape(()))


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
        TypeError: If a sample is no tensor.
        ValueError: If the shapes differ or ``target`` is negative.
        RuntimeError: If a layer of the critic has no second derivative.

    Source:
        Gulrajani et al., arXiv 1704.00028, equation 3; Mescheder et al., arXiv 1801.04406 (R1).
    """
    if not 0 <= target < math.inf:
        raise ValueError(f"target must be a finite number >= 0, got {target}.")
    given = {"real": real} if fake is None else {"real": real, "fake": fake}
    require_tensors("input_gradient_penalty", **given)
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
        ones = torch.ones_like(values, requires_grad=True)  # see _mean_gradients
        (slopes,) = torch.autograd.grad(values, x, ones, create_graph=True, materialize_grads=True)
        refuse_once_differentiable([slopes])
        squared = slopes.flatten(1).square().sum(1)
        if target == 0:
            return squared.mean()
        return (squared.clamp_min(torch.finfo(x.dtype).tiny).sqrt() - target).square().mean()
