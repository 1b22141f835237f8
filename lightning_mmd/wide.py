"""Numbers of float64, also beside devices that have none (Apple's MPS)."""

import torch
from torch import Tensor

__all__ = ["at_least_float32", "to_like", "wide_sum", "widen"]


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor in float64: on its device, or on the CPU where the device has no float64.

    Args:
        tensor: Any tensor; its graph goes on.
    """
    if tensor.dtype == torch.float64:
        return tensor
    try:
        return tensor.double()
    except TypeError:  # MPS: "Cannot convert a MPS Tensor to float64 dtype"
        pass
    if tensor.requires_grad and torch.is_grad_enabled():
        return tensor.cpu().double()
    return torch.from_numpy(tensor.detach().float().cpu().numpy().astype("float64"))


def wide_sum(tensor: Tensor, dim: int | None = None) -> Tensor:
    """Return a sum in float64; in float32 where nothing has float64.

    Args:
        tensor: Any tensor; its graph goes on.
        dim: Along which to add; default: all.
    """
    try:
        return tensor.sum(dim, dtype=torch.float64)
    except TypeError:
        pass
    try:
        return widen(tensor).sum(dim)
    except TypeError:  # neither the device nor the CPU: pairwise summation loses 1e-7 of the size
        return tensor.sum(dim)


def to_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor in the dtype and on the device of another one, also out of float64."""
    return tensor.to(other.dtype).to(other.device)  # the dtype first: the device may lack float64


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a floating-point tensor in float32 where it has fewer bits, else as it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
