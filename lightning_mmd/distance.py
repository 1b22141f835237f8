r"""The distance of generators whose gradient flow the regularised MMD GAN is, on fixed features.

Mroueh & Nguyen's definition 1 measures a path :math:`\theta_t` that follows witnesses,
:math:`\dot\theta = J^T w`, by :math:`\int (\alpha\|D f\|^2 + \beta\langle f, D f\rangle)\,dt`. As
D = J J^T that is

.. math:: \int \alpha\|J\dot\theta\|^2 + \beta\|\dot\theta\|^2\,dt:

the metric :math:`G = \alpha J^T J + \beta I` on velocities in the range of J^T. Where J has a
kernel, these do not reach every parameter: the distance of the definition is infinite between
generators that no such path joins. The relaxation to all velocities is Riemannian and finite, and
never above the definition's. Its metric is that of the graph :math:`\theta \mapsto (\sqrt\alpha\,
m(\theta), \sqrt\beta\,\theta)` in Euclidean space, whence a lower bound, the chord.
"""

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_mmd.parameters import flatten, trainable_parameters, unflatten
from lightning_mmd.points import require_tensors

__all__ = ["FlowDistance", "flow_distance"]


@dataclass(frozen=True, eq=False)
class FlowDistance:
    r"""Result of `flow_distance`: bounds on the relaxed distance, and the shortest path found.

    Args:
        lower: :math:`(\alpha\|\Delta m\|^2 + \beta\|\Delta\theta\|^2)^{1/2}`, a lower bound; of
            the definition's distance too.
        upper: Length of the shortest path found, an upper bound up to its quadrature.
        straight: Length of the straight line of parameters, where the search started.
        path: Parameters along the shortest path, (num_segments + 1, P).
    """

    lower: float
    upper: float
    straight: float
    path: Tensor

    def straightness(self, length: float) -> tuple[float, float]:
        """Return bounds on distance / length of a training between the same generators.

        Args:
            length: Its Riemannian length on the same features, latents and weights: the last
                `GeneratorState.length`, or ``certificate/length`` of `ClosedForm` where features
                and batch are fixed. With learned features there is no distance to compare with.

        Returns:
            The least and the largest value, 1 for a training along a geodesic.

        Raises:
            ValueError: If the length is not positive.
        """
        if not 0 < length < math.inf:
            raise ValueError(f"straightness needs a finite length > 0, got {length}.")
        return self.lower / length, min(self.upper / length, 1.0)


def flow_distance(
    generator: nn.Module,
    z: Tensor,
    features: Callable[[Tensor], Tensor],
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    *,
    alpha: float,
    beta: float,
    num_segments: int = 8,
    num_iterations: int = 50,
) -> FlowDistance:
    r"""Bound the Riemannian distance :math:`d_{\alpha,\beta}` of two parameters of a generator.

    The path is a polygon of parameters; its discrete energy, the sum over its sides of
    :math:`\alpha\|\Delta m\|^2 + \beta\|\Delta\theta\|^2`, is minimised by L-BFGS from the straight
    line. That finds a path that is shortest near by, not surely the shortest of all: the upper
    bound holds all the same.
    Layers that draw random numbers or move buffers belong in eval mode.

    Args:
        generator: Module from latents to samples.
        z: Latents of shape (n, ...).
        features: Fixed feature map from samples to (n, r).
        start: Trainable parameters by name, such as `GeneratorState.parameters`.
        end: Likewise.
        alpha: Weight of the parametric-gradient penalty, >= 0.
        beta: Weight of the RKHS norm, >= 0 and not zero together with alpha.
        num_segments: Sides of the polygon, >= 1; 1 gives the straight line.
        num_iterations: Most iterations of L-BFGS, >= 0.

    Returns:
        The bounds and the path.

    Raises:
        ValueError: If an argument is out of range, or parameters do not fit the generator.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402, definition 1; the relaxation and its bounds are ours.

    Examples:
        >>> generator = nn.Linear(1, 1, bias=False)
        >>> ends = ({"weight": torch.tensor([[w]])} for w in (0.0, 3.0))
        >>> found = flow_distance(
        ...     generator, torch.ones(2, 1), lambda x: x, *ends, alpha=1.0, beta=0.0
        ... )
        >>> round(found.lower, 5), round(found.upper, 5)  # a linear embedding: a straight line
        (3.0, 3.0)
    """
    if not (0 <= alpha < math.inf and 0 <= beta < math.inf and alpha + beta > 0):
        raise ValueError(
            "flow_distance needs finite alpha, beta >= 0 that are not both zero, got "
            f"{alpha} and {beta}."
        )
    if num_segments < 1 or num_iterations < 0:
        raise ValueError(
            "flow_distance needs num_segments >= 1 and num_iterations >= 0, got "
            f"{num_segments} and {num_iterations}."
        )
    names = trainable_parameters(generator)
    for which, given in (("start", start), ("end", end)):
        require_tensors("flow_distance", **{f"{which}[{name!r}]": v for name, v in given.items()})
        if {n: p.shape for n, p in given.items()} != {n: p.shape for n, p in names.items()}:
            raise ValueError(
                f"{which} must hold the generator's trainable parameters {sorted(names)} in their "
                f"shapes, got {sorted(given)}. Take GeneratorState.parameters."
            )
    first, last = (flatten([given[n].detach() for n in names]) for given in (start, end))
    network = copy.deepcopy(generator)

    def graph(theta: Tensor) -> Tensor:
        samples = functional_call(network, unflatten(theta, names), (z,))
        return torch.cat([alpha**0.5 * features(samples).mean(0), beta**0.5 * theta])

    def steps(path: Tensor) -> Tensor:
        return torch.stack([graph(theta) for theta in path]).diff(dim=0)

    weights = torch.linspace(0, 1, num_segments + 1, dtype=first.dtype, device=first.device)
    straight = torch.lerp(first, last, weights[:, None])
    path = _shortest(straight, steps, num_iterations)
    with torch.no_grad():
        lower = float((graph(last) - graph(first)).norm())
        lengths = [_length(candidate, steps) for candidate in (straight, path)]
    if lengths[1] > lengths[0]:  # a coarse polygon may cut corners
        path = straight
    return FlowDistance(lower, max(min(lengths), lower), lengths[0], path)


def _shortest(path: Tensor, steps: Callable[[Tensor], Tensor], num_iterations: int) -> Tensor:
    """Minimise the energy of a polygon with its ends held."""
    if len(path) <= 2 or num_iterations == 0:
        return path
    inner = path[1:-1].clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [inner],
        max_iter=num_iterations,
        history_size=20,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def energy() -> Tensor:
        with torch.enable_grad():
            whole = torch.cat([path[:1], inner, path[-1:]])
            value = (len(path) - 1) * steps(whole).square().sum()
        (inner.grad,) = torch.autograd.grad(value, inner)
        return value

    optimizer.step(energy)  # pyright: ignore[reportArgumentType]
    return torch.cat([path[:1], inner.detach(), path[-1:]])


def _length(path: Tensor, steps: Callable[[Tensor], Tensor]) -> float:
    """Length of the graph over a polygon: chords of quarters and eighths of its sides.

    Chords of a smooth curve fall short of it by a term of second order, which the two cancel.
    """

    def chords(parts: int) -> float:
        inside = torch.arange(parts, dtype=path.dtype, device=path.device)[:, None] / parts
        refined = [torch.lerp(a, b, inside) for a, b in itertools.pairwise(path)]
        return float(steps(torch.cat([*refined, path[-1:]])).norm(dim=1).sum())

    return (4 * chords(8) - chords(4)) / 3
