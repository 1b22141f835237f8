"""Vectors of the parameter space of a network: one flat tensor of shape (P,)."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

__all__ = [
    "flatten",
    "plain_name",
    "refuse_shared_parameters",
    "trainable_parameters",
    "unflatten",
]


def trainable_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that span the parameter space of a network, by name.

    These are the ones with ``requires_grad=True``, tied weights once. Where no parameter requires a
    gradient, all floating-point ones are taken: that is how a whole generator looks while another
    optimizer is toggled. A generator that is partly frozen *and* toggled off must therefore be
    described by the caller (see ``parameters`` of :class:`~lightning_mmd.pushforward.Pushforward`).

    Args:
        network: The module.

    Returns:
        Name to parameter, in the order of ``network.named_parameters()``.

    Raises:
        ValueError: If the network has no floating-point parameter.
    """
    floating = {n: p for n, p in network.named_parameters() if p.is_floating_point()}
    if not floating:
        raise ValueError(
            f"the generator {type(network).__name__} has no floating-point parameters, so there "
            "is no parameter space to differentiate in. Pass a generator with weights."
        )
    return {n: p for n, p in floating.items() if p.requires_grad} or floating


def flatten(tensors: Iterable[Tensor]) -> Tensor:
    """Return tensors as one vector, in their order; of no tensors, an empty one."""
    parts = [t.reshape(-1) for t in tensors]
    return torch.cat(parts) if parts else torch.zeros(0)


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split a vector of shape (P,) into tensors of the shapes and dtypes of others, by name.

    Args:
        vector: A vector of the parameter space.
        like: The parameters, by name, in the vector's order.

    Returns:
        Views of the vector, where dtypes agree.
    """
    parts = vector.split([p.numel() for p in like.values()])
    return {
        name: part.view_as(p).to(p.dtype)
        for (name, p), part in zip(like.items(), parts, strict=True)
    }


def plain_name(name: str) -> str:
    """Return a parameter's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def refuse_shared_parameters(critic: nn.Module, generator: nn.Module) -> None:
    """Refuse a layer that belongs to critic (or features) and generator.

    One network is differentiated while the other is held fixed, so they must not share parameters.

    Args:
        critic: Critic or feature map.
        generator: Generator.

    Raises:
        ValueError: If they share a parameter.
    """
    owned = {id(p) for p in critic.parameters()}
    shared = [name for name, p in generator.named_parameters() if id(p) in owned]
    if shared:
        raise ValueError(
            f"critic and generator share the parameters {shared}; the theory differentiates in the "
            "one and holds the other, so no layer can belong to both. Copy the shared layers."
        )
