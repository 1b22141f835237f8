r"""Points: what a sample must be, and the distances within and between samples.

Squared distances come from one matrix product, ||x||^2 + ||y||^2 - 2 <x, y>, around the common mean
of both samples. It cancels: the result has an absolute error of about 1e-15 R^2, R the largest
distance from that mean, for it is formed in float64 whatever the samples' precision. So distances
above 1e-4 R keep the digits of float32; neighbours in float32, 1e-7 R apart, are told to a tenth.
Where the result is within the error, below about 3e-8 R, it counts as zero. Devices without float64
(Apple's MPS) form distances in float32, with an error of 1e-6 R^2: convert far modes to the CPU.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lightning_mmd.wide import widen_on_device

__all__ = [
    "check_points",
    "gram_dtype",
    "inner_products",
    "power",
    "require_positive",
    "require_steps",
    "require_tensors",
    "squared_distances",
    "wide_squared_distances",
]


def require_tensors(name: str, **values: Any) -> None:
    """Refuse what is no tensor, such as a NumPy array or a list.

    Args:
        name: Who asks; the error begins with it.
        **values: What should be tensors, by the names of the arguments.

    Raises:
        TypeError: If a value is no tensor.
    """
    for argument, value in values.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} expects a tensor {argument}, got {type(value).__name__}. "
                f"Convert it: torch.as_tensor({argument})."
            )


def require_positive(name: str, **values: float) -> None:
    """Raise a ValueError unless numbers are finite and > 0."""
    for argument, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} needs a finite {argument} > 0, got {value}.")


def require_steps(name: str, num_steps: int) -> None:
    """Raise a ValueError unless a number of steps is >= 0."""
    if num_steps < 0:
        raise ValueError(f"{name} needs num_steps >= 0, got {num_steps}.")


def gram_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of kernel values of a sample: its own, but float32 for half precision."""
    return torch.promote_types(x.dtype, torch.float32)


def check_points(x: Tensor, y: Tensor) -> None:
    """Refuse samples whose points cannot be compared.

    Raises:
        TypeError: If one is no tensor.
        ValueError: If they are not of shapes (n, d) and (m, d), or not of one floating dtype.
    """
    require_tensors("A kernel", x=x, y=y)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(
            f"A kernel expects points of shapes (n, d) and (m, d), got {tuple(x.shape)} and "
            f"{tuple(y.shape)}. Flatten images first: x.flatten(1)."
        )
    if x.dtype != y.dtype or not x.is_floating_point():
        raise ValueError(
            f"A kernel expects points of one floating dtype, got {x.dtype} and {y.dtype}. "
            f"Convert one: y.to(x.dtype)."
        )


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """Return <x_i, y_j> of shape (n, m), in the dtype of kernel values."""
    check_points(x, y)
    dtype = gram_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return x.to(dtype) @ y.to(dtype).T


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return ||x_i - y_j||^2 of shape (n, m), with all derivatives, exactly 0 at coincidence.

    Args:
        x: Points of shape (n, d).
        y: Points of shape (m, d), of the same floating dtype.

    Returns:
        Squared distances in the dtype of kernel values, infinite beyond its range.

    Raises:
        ValueError: See :func:`check_points`.
    """
    return wide_squared_distances(x, y).to(gram_dtype(x))


def wide_squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return :func:`squared_distances` in the precision that they are formed in."""
    check_points(x, y)
    x, y = widen_on_device(x), widen_on_device(y)
    centre = (x.detach().sum(0) + y.detach().sum(0)) / (len(x) + len(y))
    x, y = x - centre, y - centre
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    with torch.autocast(x.device.type, enabled=False):
        squared = torch.addmm(norms, x, y.T, alpha=-2.0)
    # Rounding of coincident points: at most half of this for d up to 12288, float32 and float64.
    rounding = squared <= norms * ((2.0 + math.sqrt(x.shape[1])) * torch.finfo(x.dtype).eps)
    # Subtracting a constant corrects the value and keeps the derivatives of the polynomial.
    return squared - squared.detach().where(rounding, 0.0)


def power(squared: Tensor, exponent: float) -> Tensor:
    """Return squared ** exponent, with derivative 0 where squared is 0."""
    zero = squared == 0
    return squared.masked_fill(zero, 1.0).pow(exponent).masked_fill(zero, 0.0)
