"""Numbers of float64, also beside devices that have none (Apple's MPS)."""

import torch
from torch import Tensor

__all__ = ["has_float64", "to_like", "wide_sum", "widen", "widen_on_device"]


def has_float64(device: torch.device) -> bool:
    """Return whether a device can convert to float64; Apple's MPS cannot."""
    try:
        torch.zeros(1, dtype=torch.float32, device=device).double()
    except (TypeError, RuntimeError):
        return False
    return True


def widen_on_device(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, or in float32 where its device has no float64."""
    wide = tensor.dtype == torch.float64 or has_float64(tensor.device)
    return tensor.to(torch.float64 if wide else torch.float32)


def widen(tensor: Tensor) -> Tensor:
    """Return a tensor in float64: on its device, or on the CPU where the device has no float64.

    Args:
        tensor: Any tensor; its graph goes on.
    """
    if tensor.dtype == torch.float64:
        return tensor
    for source in (tensor, tensor.cpu()):
        try:
            return source.double()
        except TypeError:  # MPS: "Cannot convert a MPS Tensor to float64 dtype"
            pass
    return torch.from_numpy(tensor.detach().float().cpu().numpy().astype("float64"))


def wide_sum(tensor: Tensor, dim: int | None = None) -> Tensor:
    """Return a sum in float64: on the device, else on the CPU; in float32 where neither has it.

    Args:
        tensor: Any tensor; its graph goes on.
        dim: Along which to add; default: all.
    """
    for source in (tensor, tensor.cpu()):
        try:
            return source.sum(dim, dtype=torch.float64)
        except TypeError:
            pass
    return tensor.sum(dim)  # pairwise summation loses about 1e-7 of the size


def to_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a tensor in the dtype and on the device of another one, also out of float64."""
    return tensor.to(other.dtype).to(other.device)  # the dtype first: the device may lack float64
