"""What a generator is called with: latents, alone or with labels beside them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Inputs", "LabelledLatents", "Latents", "as_inputs", "select", "with_labels"]

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

    paired = False
    """Whether a training puts the labels of its batch in place of those that were drawn."""

    def draw(self, num: int) -> Inputs:
        """Return a draw for ``num`` samples; override it for draws of your own."""
        if isinstance(self.source, int):
            return torch.randn(num, self.source)
        return self.source(num)

    def check_data(self, labels: bool, num_classes: int | None) -> None:
        """Refuse a data module whose labels do not suit; here all do.

        Args:
            labels: Whether it serves any.
            num_classes: Number of its classes, None where it does not know.
        """

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


class LabelledLatents(Latents):
    """Standard normal latents, and beside each the class that the generator is asked for.

    In a training the classes are those of the batch of data: generated and real samples then have
    each class equally often, and only what is within the classes tells them apart. Elsewhere, and
    with ``paired=False`` in a training too, the classes are drawn: all alike, or with given
    frequencies. Counts of drawn classes differ from those of the batch by chance; a critic that is
    linear in an offset of each class follows that noise (``benchmarks/README.md``, Labels).

    Args:
        dim: Length of a standard normal latent vector, >= 1.
        num_classes: Number C of classes, >= 2; the labels are 0 to C - 1.
        frequencies: Probability of each class, C numbers >= 0 that are divided by their sum, for
            example the counts in the data. Default: all classes alike.
        paired: Whether a training takes the classes of its batch. Between the i-th real and the
            i-th generated sample, which have one class, no kernel value is counted then, so that
            the estimates of MMD^2 stay unbiased.

    Raises:
        ValueError: If a number is out of range, or there are not C frequencies.

    Examples:
        >>> z, labels = LabelledLatents(3, 10)(5)
        >>> z.shape, labels.shape
        (torch.Size([5, 3]), torch.Size([5]))
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        frequencies: Sequence[float] | None = None,
        paired: bool = True,
    ) -> None:
        super().__init__(dim)
        self.paired = paired
        if num_classes < 2:
            raise ValueError(f"LabelledLatents needs num_classes of at least 2, got {num_classes}.")
        weights = torch.ones(num_classes) if frequencies is None else torch.tensor(frequencies)
        weights = weights.double()
        if weights.shape != (num_classes,) or not (weights >= 0).all() or not weights.sum() > 0:
            raise ValueError(
                f"LabelledLatents needs {num_classes} frequencies >= 0, not all of them 0, got "
                f"{frequencies}. Leave them out to draw all classes alike."
            )
        if not weights.isfinite().all():
            raise ValueError(f"LabelledLatents needs finite frequencies, got {frequencies}.")
        self.num_classes = num_classes
        self.frequencies = (weights / weights.sum()).tolist()

    def draw(self, num: int) -> Inputs:
        """Return ``num`` latents, and labels of shape (num,) in int64."""
        z = torch.randn(num, self.dim or 1)
        weights = torch.tensor(self.frequencies, dtype=torch.float64)
        # multinomial refuses no draws at all
        labels = torch.multinomial(weights, max(num, 1), replacement=True)[:num]
        return z, labels

    def check_data(self, labels: bool, num_classes: int | None) -> None:
        """Refuse data without labels, or with another number of classes.

        Raises:
            ValueError: If the data have none, or another number.
        """
        if not labels:
            raise ValueError(
                "LabelledLatents ask for classes, but the data serve no labels. Set labels=True in "
                "the data module (on the command line: --data.labels true)."
            )
        if num_classes not in (None, self.num_classes):
            raise ValueError(
                f"LabelledLatents draw {self.num_classes} classes, but the data have "
                f"{num_classes}. Set num_classes to {num_classes}, in the networks too."
            )


def with_labels(
    inputs: tuple[Tensor, ...], labels: Any, num_classes: int | None = None
) -> tuple[Tensor, ...]:
    """Put labels in place of those that were drawn.

    Args:
        inputs: Latents of n rows, and one tensor of labels; alone where the number of classes is
            known.
        labels: One class for all, or n of them.
        num_classes: Number of classes, where it is known.

    Returns:
        The latents, and the labels.

    Raises:
        ValueError: If the latents carry no labels, or the labels do not fit.
    """
    if len(inputs) == 1 and num_classes is not None:
        inputs = *inputs, torch.zeros(len(inputs[0]), dtype=torch.int64, device=inputs[0].device)
    if len(inputs) != 2:
        raise ValueError(
            "labels were asked for, but this generator takes none: its latents carry "
            f"{len(inputs) - 1} label tensors. Leave labels out, or train with LabelledLatents."
        )
    z, drawn = inputs
    found = torch.as_tensor(labels, device=drawn.device)
    if found.is_floating_point() or found.dtype == torch.bool:
        raise ValueError(f"labels must be whole numbers, got {labels!r}.")
    found = found.expand(len(z)) if found.ndim == 0 else found
    if found.shape != drawn.shape:
        raise ValueError(
            f"labels must be one class or {len(z)} of them, one a sample, got shape "
            f"{tuple(found.shape)}."
        )
    if num_classes is not None and len(found) and not 0 <= found.min() <= found.max() < num_classes:
        raise ValueError(
            f"labels must be 0 to {num_classes - 1}, got {int(found.min())} to {int(found.max())}."
        )
    return z, found.to(drawn.dtype)
