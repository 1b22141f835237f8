"""Samples in memory, the map from bytes to numbers, and the split into three parts."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["TensorSamples", "pixels_to_unit", "split_indices"]


def pixels_to_unit(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Map bytes to floats, x = pixel / 127.5 - 1, so that 0 becomes -1 and 255 becomes 1 exactly.

    Args:
        pixels: uint8 tensor of any shape.
        dtype: floating-point type of the result; below float32 the map is computed in float32.

    Returns:
        Tensor of the same shape in [-1, 1], on the same device.

    Examples:
        >>> pixels_to_unit(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-1.,  1.])
    """
    wide = torch.promote_types(dtype, torch.float32)
    return pixels.to(wide).div_(127.5).sub_(1.0).to(dtype)


def split_indices(
    num_samples: int, val_fraction: float, test_fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Split range(num_samples) at random into training, validation and test indices.

    Args:
        num_samples: size of the whole set.
        val_fraction: share for validation, in (0, 1); the count is rounded, and at least 1.
        test_fraction: share for the test, in (0, 1); the count is rounded, and at least 1.
        generator: source of the randomness.

    Returns:
        Training, validation and test indices: disjoint, and together every index once.

    Raises:
        ValueError: a share is not in (0, 1), or none is left for training.

    Examples:
        >>> generator = torch.Generator().manual_seed(0)
        >>> [len(part) for part in split_indices(10, 0.2, 0.1, generator)]
        [7, 2, 1]
    """
    fractions = (val_fraction, test_fraction)
    valid = all(0.0 < fraction < 1.0 for fraction in fractions)
    num_val, num_test = (max(1, round(f * num_samples)) if valid else 0 for f in fractions)
    if not valid or num_val + num_test >= num_samples:
        raise ValueError(
            f"Expected val_fraction and test_fraction in (0, 1) that leave samples for training, "
            f"validation and test, got val_fraction={val_fraction} and "
            f"test_fraction={test_fraction} of {num_samples} samples. Change them, or add data."
        )
    order = torch.randperm(num_samples, generator=generator)
    return order[num_test + num_val :], order[num_test : num_test + num_val], order[:num_test]


class TensorSamples(Dataset[Any]):
    """Samples held in one tensor, or in a part of it.

    One index reads one sample as a model takes it: bytes are converted to float32 in [-1, 1]. A
    list of indices reads a batch as it is stored, in one go, so that a loader moves bytes and the
    device converts them.

    Args:
        data: uint8 pixels or floating-point samples, shape (N, ...); it may be mapped from a file.
        labels: class of each sample, int64 of shape (N); samples are then read with their class.
        indices: the part of `data` that this set holds, int64 of shape (n); all of it without.
    """

    def __init__(
        self, data: Tensor, labels: Tensor | None = None, indices: Tensor | None = None
    ) -> None:
        self.data = data
        self.labels = labels
        self.indices = indices

    def __len__(self) -> int:
        return len(self.data if self.indices is None else self.indices)

    def __getitem__(self, index: int | list[int]) -> Any:
        if isinstance(index, list):
            return self.__getitems__(index)
        batch = self.__getitems__([index])
        samples = batch[0] if isinstance(batch, tuple) else batch
        if samples.dtype == torch.uint8:
            samples = pixels_to_unit(samples)
        return (samples[0], batch[1][0]) if isinstance(batch, tuple) else samples[0]

    def __getitems__(self, indices: list[int]) -> Any:
        rows = torch.tensor(indices) if self.indices is None else self.indices[indices]
        batch = self.data[rows]
        return batch if self.labels is None else (batch, self.labels[rows])
