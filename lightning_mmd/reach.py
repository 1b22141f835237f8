"""Whether a derivative reaches every parameter that a network uses."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["unreached"]


def unreached(
    plain: tuple[Tensor, Tensor],
    parameters: Mapping[str, Tensor],
    replaced: tuple[Tensor, Sequence[Tensor]],
) -> list[str]:
    """Name the parameters whose gradient another route misses.

    ``torch.func.functional_call`` replaces parameters where modules hold them as attributes. One
    that is used through a plain list, a closure or a partial function keeps its old value there,
    and its gradient would be taken as zero, or as a part of what it is.

    Args:
        plain: Outputs of the network as it is called, twice from the same random state. Where they
            differ, only parameters that are missing altogether can be told.
        parameters: The network's own parameters, by name.
        replaced: Output of the other route, and what stands for the parameters there.

    Returns:
        Names.
    """
    output, again = plain
    if not output.requires_grad:
        return []
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    weights = weights.to(output.dtype).to(output.device)
    expected = _gradients(output, list(parameters.values()), weights)
    found = _gradients(replaced[0], list(replaced[1]), weights)
    repeatable = torch.equal(output, again)
    return [
        name
        for name, e, f in zip(parameters, expected, found, strict=True)
        if e is not None and bool(e.any()) and (f is None or (repeatable and _differ(e, f)))
    ]


def _gradients(output: Tensor, leaves: list[Tensor], weights: Tensor) -> Sequence[Tensor | None]:
    if not output.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(output, leaves, weights, retain_graph=True, allow_unused=True)


def _differ(expected: Tensor, found: Tensor) -> bool:
    """Whether two gradients differ by more than rounding."""
    return bool((expected - found).norm() > torch.finfo(found.dtype).eps ** 0.25 * expected.norm())
