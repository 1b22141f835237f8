"""What a generator is called with: latents, alone or with labels beside them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Inputs", "Latents", "as_inputs", "select"]

Inputs = Tensor | tuple[Tensor, ...]
"""A tensor of n rows, or a tuple of such tensors: latents or samples, then labels."""


def as_inputs(values: Any) -> tuple[Tensor, ...]:
    """Return a tensor, or a tuple or list of tensors, as a tuple."""
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


def select(inputs: tuple[Tensor, ...], index: Any) -> tuple[Tensor, ...]:
    """Return the rows that an index selects, of every tensor."""
    return tuple(tensor[index] for tensor in inputs)


class Latents:
    """Draws what a generator is called with, from torch's global random state.

    A draw for n samples is a tensor with n rows, or a tuple of such tensors. The generator is
    called ``generator(*draw)``: latents first, labels after them. The critic then sees the labels
    too, ``critic(samples, *labels)``, and real samples come with the labels of their batch. Where
    the draw is a tensor alone, labels of the data are ignored.

    For draws of your own, hand in a function, or derive a class and override :meth:`draw`.

    Args:
        source: Length of a standard normal latent vector, >= 1, or a callable from a number n to
            a draw for n samples.

    Raises:
        ValueError: If the length is not positive.
        TypeError: If ``source`` is neither.

    Examples:
        >>> draw = Latents(3)
        >>> [z.shape for z in draw(5)]
        [torch.Size([5, 3])]
        >>> labelled = Latents(lambda n: (torch.randn(n, 3), torch.randint(10, (n,))))
        >>> [z.dtype for z in labelled(5, dtype=torch.float64)]
        [torch.float64, torch.int64]
    """

    def __init__(self, source: int | Callable[[int], Any]) -> None:
        if isinstance(source, bool) or not (isinstance(source, int) or callable(source)):
            raise TypeError(
                "latents must be the length of a standard normal vector, or a callable from a "
                f"number n to latents for n samples, got {source!r}."
            )
        if isinstance(source, int) and not 0 < source < math.inf:
            raise ValueError(f"latents must have a positive length, got {source}.")
        self.source = source

    @classmethod
    def of(cls, source: "int | Latents | Callable[[int], Any]") -> "Latents":
        """Return latents from a length or a callable; latents as they are."""
        return source if isinstance(source, Latents) else cls(source)

    @property
    def dim(self) -> int | None:
        """Length of the standard normal vector, None for draws of another kind."""
        return self.source if isinstance(self.source, int) else None

    def draw(self, num: int) -> Inputs:
        """Return a draw for ``num`` samples; override it for draws of your own."""
        if isinstance(self.source, int):
            return torch.randn(num, self.source)
        return self.source(num)

    def __call__(
        self, num: int, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> tuple[Tensor, ...]:
        """Draw, check, and move to a device.

        Args:
            num: How many samples.
            dtype: Of floating-point parts; default: torch's.
            device: Default: the CPU.

        Returns:
            Tensors with ``num`` rows each, the latents first. They are equal on every device.

        Raises:
            TypeError: If a part is no tensor.
            ValueError: If a part has another number of rows.
        """
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if isinstance(self.source, int) and type(self).draw is Latents.draw:
            return (torch.randn(num, self.source, dtype=dtype).to(device),)
        parts = as_inputs(self.draw(num))
        for part in parts:
            if not isinstance(part, Tensor):
                raise TypeError(
                    f"latents for {num} samples must be a tensor, or a tuple of tensors (latents, "
                    f"labels), got {type(part).__name__}. Convert it: torch.as_tensor(...)."
                )
            if part.ndim == 0 or len(part) != num:
                raise ValueError(
                    f"latents for {num} samples must have {num} rows, got shape "
                    f"{tuple(part.shape)}. Let the function use its argument."
                )
        return tuple(
            part.to(device, dtype) if part.is_floating_point() else part.to(device)
            for part in parts
        )
