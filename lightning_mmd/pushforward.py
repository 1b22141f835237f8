r"""Derivatives through a generator: :math:`Lf`, its adjoint, and tangents of samples.

A generator :math:`G_\theta` pushes latents :math:`z \sim \nu` forward to samples
:math:`x = G_\theta(z)`. The theory needs two linear maps of this pushforward, and nothing else in
the package differentiates through a generator:

* cotangents to parameters (one reverse pass), :math:`c \mapsto \sum_i J_\theta G(z_i)^T c_i`;
* parameters to tangents (one forward-mode pass), :math:`v \mapsto (J_\theta G(z_i) v)_i`.
"""

import warnings
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from weakref import WeakKeyDictionary, WeakSet

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call

from lightning_mmd.critic_values import evaluate_critic, refuse_once_differentiable
from lightning_mmd.latents import Inputs, as_inputs
from lightning_mmd.parameters import flatten, trainable_parameters, unflatten
from lightning_mmd.passes import (
    Replay,
    frozen_power_iterations,
    full_precision,
    spectral_norms,
    unfused_attention,
)
from lightning_mmd.points import require_tensors
from lightning_mmd.reach import unreached

__all__ = [
    "DerivativeFallbackWarning",
    "Pushforward",
    "check_samples",
    "parametric_gradient",
    "parametric_tangent",
]


class DerivativeFallbackWarning(UserWarning):
    """A generator's tangents need a slower or less exact route than plain forward mode."""


class Pushforward:
    r"""The samples :math:`x_i = G_\theta(z_i)` and their derivative in :math:`\theta`.

    One forward pass runs on construction. It advances buffers (batch-norm statistics, power
    iterations) and the random state exactly as a plain call does; whatever is asked for afterwards
    leaves both alone and sees the same dropout masks. The generator's ``.grad`` is never written,
    and its parameters may have ``requires_grad=False``. Autocast is switched off.

    Vectors of the parameter space are flat, of shape (P,), in the order of ``parameters``.

    Args:
        generator: Any module from latents to samples.
        z: Latents of shape (n, ...), or a tuple of what the generator is called with.
        parameters: The parameters to differentiate in, by name. Default: those of
            :func:`trainable_parameters`.
        reuse: Prepare for many tangents: the transposed graph of the reverse pass is kept. Each
            tangent then costs about half of a fresh forward-mode pass, and the memory is that of a
            double backward.
        record: A pass to repeat, the ``record`` of another pushforward: its buffers and random
            numbers are used again, and the present ones are left alone.

    Attributes:
        record: Buffers and random state that the pass began with.
        inputs: What the generator was called with, a tuple.

    Raises:
        TypeError: If the generator is no module, or a latent or what it returns is no tensor.
        ValueError: If there are no latents, or it does not return one row for each latent, has no
            parameter of a name, or uses a parameter by another way than as an attribute of a
            module: in a plain list, a closure or a partial function.

    Examples:
        >>> push = Pushforward(torch.nn.Linear(2, 3), torch.randn(5, 2))
        >>> push.tangent(push.cotangent(torch.ones(5, 3))).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        generator: nn.Module,
        z: Inputs,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        reuse: bool = False,
        record: Replay | None = None,
    ) -> None:
        if not isinstance(generator, nn.Module):
            raise TypeError(
                f"the generator must be a torch.nn.Module, got {type(generator).__name__}. Hand in "
                "the module itself; labels go beside latents, z=(latents, labels)."
            )
        parameters = trainable_parameters(generator) if parameters is None else parameters
        self.generator = generator
        for part in as_inputs(z):
            require_tensors("a generator", z=part)
        self.inputs = tuple(part.detach() for part in as_inputs(z))
        if len(self.inputs[0]) == 0:
            raise ValueError(
                f"the generator {type(generator).__name__} got an empty batch, of shape "
                f"{tuple(self.inputs[0].shape)}: a mean over it does not exist. Give at least one "
                "latent, or leave such batches out (drop_last=True)."
            )
        device = self.inputs[0].device
        self.reuse = reuse
        own = dict(generator.named_parameters(remove_duplicate=False))
        if unknown := sorted(parameters.keys() - own.keys()):
            raise ValueError(
                f"the generator {type(generator).__name__} has no parameters {unknown}. Take the "
                "names from generator.named_parameters()."
            )
        self._leaves = {n: p.detach().requires_grad_() for n, p in parameters.items()}
        taken = {id(own[n]) for n in parameters}
        held = {n: p.detach() for n, p in generator.named_parameters() if id(p) not in taken}
        values = {**held, **self._leaves}
        self.record = Replay(generator, device) if record is None else record
        with torch.enable_grad(), full_precision(device):
            self._samples = (
                functional_call(generator, values, self.inputs)
                if record is None
                else record(*self.inputs, replacements=values)
            )
        check_samples(generator, self._samples, len(self.inputs[0]))
        live = all(p.data_ptr() == own[n].data_ptr() for n, p in parameters.items())
        if record is None and live and parameters and generator not in _reached:
            self._check_reach({n: own[n] for n in parameters})
        self._power_iterations = {
            key: buffer.clone()
            for name, module in spectral_norms(generator)
            for key, buffer in module.named_buffers(name, recurse=False)
        }

    def _check_reach(self, own: Mapping[str, Tensor]) -> None:
        """Compare with a gradient of the generator as it is called, once for each generator."""
        _reached.add(self.generator)
        toggled = [p for p in own.values() if not p.requires_grad]
        for p in toggled:
            p.requires_grad_()
        try:
            with torch.enable_grad(), full_precision(self._samples.device):
                plain, again = (self.record(*self.inputs) for _ in range(2))
            missed = unreached((plain, again), own, (self._samples, [*self._leaves.values()]))
        finally:
            for p in toggled:
                p.requires_grad_(False)
        if missed:
            _reached.discard(self.generator)
            raise ValueError(
                f"the generator {type(self.generator).__name__} uses the parameters {missed} by "
                "another way than as attributes of a module (a plain Python list, a closure, "
                "functools.partial), where no derivative reaches them: they would pass for unused. "
                "Keep them in a torch.nn.ParameterList or ModuleList, or look them up by self.name "
                "in forward."
            )

    @property
    def samples(self) -> Tensor:
        """The samples x of shape (n, ...), without a graph."""
        return self._samples.detach()

    @property
    def num_parameters(self) -> int:
        """The dimension P of the parameter space."""
        return sum(leaf.numel() for leaf in self._leaves.values())

    def cotangent(self, c: Tensor) -> Tensor:
        r"""Pull sample cotangents back to the parameters: :math:`\sum_i J_\theta G(z_i)^T c_i`.

        Args:
            c: Cotangents, of the samples' shape.

        Returns:
            Vector of shape (P,).
        """
        with full_precision(self._samples.device):  # a reverse pass obeys autocast too
            return flatten(
                torch.autograd.grad(
                    self._samples,
                    list(self._leaves.values()),
                    c,
                    retain_graph=True,
                    materialize_grads=True,
                )
            )

    def tangent(self, v: Tensor) -> Tensor:
        r"""Push a parameter vector forward to the samples: :math:`(J_\theta G(z_i) v)_i`.

        By forward-mode differentiation with dual tensors or, with ``reuse``, by the transpose of
        the reverse pass; both are exact. Where a layer supports neither, the next exact route is
        taken, and the last resort is a central difference. Leaving the first route is announced
        once a generator by a :class:`DerivativeFallbackWarning`.

        Args:
            v: Vector of shape (P,).

        Returns:
            Tangents of the samples' shape, without a graph.

        Raises:
            ValueError: If v is not of shape (P,).
            RuntimeError: If no route works.
        """
        if v.shape != (self.num_parameters,):
            raise ValueError(
                f"a tangent needs a vector of shape ({self.num_parameters},), one entry for each "
                f"generator parameter, got {tuple(v.shape)}."
            )
        known = _failed_routes.setdefault(self.generator, set())
        routes = _REPEATED_ROUTES if self.reuse else _SINGLE_ROUTES
        failed, reasons = set(), []
        for route in (route for route in routes if route not in known):
            try:
                with full_precision(self._samples.device):
                    dx = route(self, v.detach())
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:  # torch's way to say that a layer lacks a derivative
                failed.add(route)
                reasons.append(f"{route.__name__.strip('_')}: {str(error).strip().splitlines()[0]}")
                continue
            known |= failed
            if reasons:
                warnings.warn(
                    f"tangents of {type(self.generator).__name__} are computed by "
                    f"{_ROUTE_NOTES[route]}. Tried before: {'; '.join(reasons)}",
                    DerivativeFallbackWarning,
                    stacklevel=2,
                )
            return dx
        raise RuntimeError(
            f"no derivative of {type(self.generator).__name__} in its parameters could be had: "
            f"{'; '.join(reasons)}. Replace the layer that is named, or freeze its parameters."
        )

    def differentiate(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return f on the samples, and the gradient of its mean in the parameters, with graphs.

        The plain route of double backward, for comparison: everything else here avoids it.

        Args:
            f: Critic, n samples to (n,).

        Returns:
            Values of shape (n,) and a vector of shape (P,).
        """
        values = f(self._samples)
        weights = torch.full_like(values, 1 / len(values), requires_grad=True)
        gradients = torch.autograd.grad(  # weights: see penalties._mean_gradients
            values,
            list(self._leaves.values()),
            weights,
            create_graph=True,
            materialize_grads=True,
        )
        return values, flatten(gradients)

    def replay(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the samples of the same latents, buffers and random numbers at other parameters.

        Args:
            parameters: Values, by name.

        Returns:
            Samples of shape (n, ...).
        """
        with full_precision(self._samples.device):
            return self.record(*self.inputs, replacements=parameters)

    def neighbours(self, v: Tensor) -> tuple[float, tuple[Tensor, Tensor]]:
        r"""Return a step h and the samples at :math:`\theta + h v` and :math:`\theta - h v`.

        Args:
            v: Vector of shape (P,). The step is :math:`h = \epsilon^{1/3} \|\theta\| / \|v\|`,
                with the norm of the parameters taken as at least 1: it balances truncation and
                rounding.

        Returns:
            The step and two tensors of the samples' shape, without graphs.
        """
        size = max(1.0, float(flatten(self.leaves.values()).norm()))
        length = float(v.norm())
        step = torch.finfo(self._samples.dtype).eps ** (1 / 3) * size / length if length else 1.0
        tangents = self.unflatten(v.detach())
        with (
            torch.no_grad(),
            full_precision(self._samples.device),
            frozen_power_iterations(self.generator),
        ):
            ahead, behind = (
                self.record(
                    *self.inputs,
                    replacements=self._power_iterations
                    | {n: p + h * tangents[n] for n, p in self.leaves.items()},
                )
                for h in (step, -step)
            )
        return step, (ahead, behind)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Split a vector of shape (P,) into tensors of the parameters' shapes, by name."""
        return unflatten(v, self._leaves)

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The values of the parameters at which the derivative is taken, by name."""
        return {name: leaf.detach() for name, leaf in self._leaves.items()}

    @cached_property
    def _transposed_graph(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The reverse pass as a graph that is linear in its cotangent u: (u, J^T u)."""
        u = torch.zeros_like(self._samples, requires_grad=True)
        with torch.enable_grad():
            reverse = torch.autograd.grad(
                self._samples,
                list(self._leaves.values()),
                u,
                create_graph=True,
                materialize_grads=True,
            )
        refuse_once_differentiable(reverse)
        return u, reverse


def _transpose(push: Pushforward, v: Tensor) -> Tensor:
    u, reverse = push._transposed_graph
    pairs = [
        (g, t) for g, t in zip(reverse, push.unflatten(v).values(), strict=True) if g.requires_grad
    ]
    if not pairs:
        return torch.zeros_like(u)
    outputs, vectors = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, u, vectors, retain_graph=True)[0]


def _forward_mode(
    push: Pushforward, v: Tensor, buffers: Mapping[str, Tensor] | None = None
) -> Tensor:
    _load_forward_mode()
    tangents = push.unflatten(v)
    with torch.no_grad(), forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(p, tangents[n]) for n, p in push.leaves.items()}
        replaced = {**(buffers or {}), **duals}
        x, dx = forward_ad.unpack_dual(push.record(*push.inputs, replacements=replaced))
    error, size = (x - push.samples).abs().max(), push.samples.abs().max()
    if error > torch.finfo(x.dtype).eps ** 0.5 * size:  # a state that is no buffer, two iterations
        raise RuntimeError("a second pass from the same buffers and random state differs")
    return torch.zeros_like(x) if dx is None else dx


@cache
def _load_forward_mode() -> None:
    """Load torch's forward-mode formulas, which it compiles by a tool that it deprecates itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script`")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _forward_mode_by_substitutes(push: Pushforward, v: Tensor) -> Tensor:
    with unfused_attention(), frozen_power_iterations(push.generator):
        return _forward_mode(push, v, push._power_iterations)


def _central_difference(push: Pushforward, v: Tensor) -> Tensor:
    step, (ahead, behind) = push.neighbours(v)
    return (ahead - behind) / (2 * step)


_SINGLE_ROUTES = (_forward_mode, _forward_mode_by_substitutes, _transpose, _central_difference)
_REPEATED_ROUTES = (_transpose, _forward_mode, _forward_mode_by_substitutes, _central_difference)
_ROUTE_NOTES = {
    _forward_mode: "forward mode, anew each time (exact, slower)",
    _forward_mode_by_substitutes: "forward mode with unfused attention and held power iterations "
    "(exact)",
    _transpose: "two reverse passes (exact, with the memory of a double backward)",
    _central_difference: "a central difference (APPROXIMATE: relative error 1e-3 to 1e-5 for "
    "smooth networks in float32, useless for ReLU-like ones)",
}
_reached: WeakSet[nn.Module] = WeakSet()
_failed_routes: WeakKeyDictionary[nn.Module, set[Callable]] = WeakKeyDictionary()


def parametric_gradient(
    f: Callable[..., Tensor],
    generator: nn.Module,
    z: Inputs,
    parameters: Mapping[str, Tensor] | None = None,
) -> Tensor:
    r"""Gradient of the mean critic value in the generator's parameters.

    .. math:: L f = \nabla_\theta \frac1n \sum_i f(G_\theta(z_i)) \in R^P

    One generator forward, one critic forward, one reverse pass. It is the mean gradient; its
    squared norm is what :func:`~lightning_mmd.parametric_gradient_penalty` penalises.

    Args:
        f: Critic or witness function, n samples (and labels) to (n,) or (n, 1).
        generator: Module from latents to samples.
        z: Latents of shape (n, ...), or a tuple (latents, labels): both networks get the labels.
        parameters: See :class:`Pushforward`.

    Returns:
        Vector of shape (P,), without a graph.

    Raises:
        ValueError: If ``f`` or ``generator`` return something of another shape.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402, the operator L_theta.

    Examples:
        >>> generator = torch.nn.Linear(2, 3, bias=False)
        >>> parametric_gradient(lambda x: x.sum(1), generator, torch.ones(4, 2)).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    push = Pushforward(generator, z, parameters)
    x = push.samples.requires_grad_()
    with torch.enable_grad(), full_precision(x.device):
        mean = evaluate_critic(f, x, *push.inputs[1:]).mean()
        (c,) = torch.autograd.grad(mean, x, materialize_grads=True)
    return push.cotangent(c)


def parametric_tangent(
    generator: nn.Module,
    z: Inputs,
    v: Tensor,
    parameters: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Samples and their velocity when the parameters move along v.

    .. math:: x_i = G_\theta(z_i), \qquad dx_i = J_\theta G(z_i) v

    The adjoint of :func:`parametric_gradient`:
    :math:`\langle L f, v\rangle = \frac1n\sum_i \langle \nabla f(x_i), dx_i\rangle`.

    Args:
        generator: Module from latents to samples.
        z: Latents of shape (n, ...).
        v: Vector of shape (P,).
        parameters: See :class:`Pushforward`.

    Returns:
        Samples and tangents, both of shape (n, ...), without a graph.

    Raises:
        ValueError: If v is not of shape (P,).

    Examples:
        >>> generator = torch.nn.Linear(2, 1, bias=False)
        >>> x, dx = parametric_tangent(generator, torch.eye(2), torch.ones(2))
        >>> dx.tolist()
        [[1.0], [1.0]]
    """
    push = Pushforward(generator, z, parameters)
    if v.shape != (push.num_parameters,):
        raise ValueError(
            f"parametric_tangent needs a vector of shape ({push.num_parameters},), one entry for "
            f"each generator parameter, got {tuple(v.shape)}."
        )
    return push.samples, push.tangent(v)


def check_samples(generator: nn.Module, samples: Tensor, num: int) -> None:
    """Check what a generator returned.

    Args:
        generator: The generator.
        samples: What it returned.
        num: How many latents it was given.

    Raises:
        TypeError: If that is no tensor.
        ValueError: If there is not one row for each latent.
    """
    name = type(generator).__name__
    if not isinstance(samples, Tensor):
        raise TypeError(
            f"the generator {name} must return a tensor of samples, got {type(samples).__name__}. "
            "Wrap it so that it returns the samples alone."
        )
    if samples.ndim == 0 or len(samples) != num:
        raise ValueError(
            f"the generator {name} must return one sample for each of the {num} latents, got "
            f"shape {tuple(samples.shape)}."
        )
