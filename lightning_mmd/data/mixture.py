"""Points of a mixture of Gaussians in the plane."""

import math

import torch
from torch import Tensor

from lightning_mmd.data.base import SampleDataModule
from lightning_mmd.data.dataset import TensorSamples, split_indices

__all__ = ["GaussianMixtureDataModule"]


class GaussianMixtureDataModule(SampleDataModule):
    r"""Points in the plane from an equal mixture of Gaussians, p = mean_k N(modes_k, std^2 I).

    The modes lie on a ring, at radius (cos 2 pi k / K, sin 2 pi k / K), or on a square grid about
    the origin.

    Args:
        num_modes: number K of Gaussians, at least 1; a square number for a grid.
        radius: distance of the ring's modes from the origin.
        std: standard deviation of each Gaussian in each direction, at least 0.
        grid_spacing: distance between neighbours of a grid, which then replaces the ring.
        num_samples: points drawn in all, once, by `seed`.
        batch_size: points in a batch of one process, or a schedule {points seen: batch size}.
        val_fraction: share of the points held out for validation, in (0, 1).
        test_fraction: share of the points held out for the test, in (0, 1).
        labels: serve pairs of points and the number of their Gaussian.
        num_workers: loader processes; 0 loads in the training process.
        seed: fixes the points, the split and the order.

    Attributes:
        modes: the centres, float32 of shape (num_modes, 2), to count the modes a model covers.

    Raises:
        ValueError: num_modes is below 1 or, for a grid, no square; std is negative; one part of
            the split is empty.

    Examples:
        >>> GaussianMixtureDataModule(num_modes=4, grid_spacing=3.0).modes
        tensor([[-1.5000, -1.5000],
                [-1.5000,  1.5000],
                [ 1.5000, -1.5000],
                [ 1.5000,  1.5000]])
    """

    def __init__(
        self,
        num_modes: int = 8,
        radius: float = 2.0,
        std: float = 0.05,
        grid_spacing: float | None = None,
        num_samples: int = 10_000,
        batch_size: int | dict[int, int] = 256,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        labels: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, labels)
        if num_modes < 1:
            raise ValueError(f"Expected num_modes of at least 1, got {num_modes}.")
        if std < 0.0:
            raise ValueError(f"Expected std of at least 0, got {std}.")
        self.sample_shape = (2,)
        self.modes = (
            _ring(num_modes, radius) if grid_spacing is None else _grid(num_modes, grid_spacing)
        )
        self.num_classes = num_modes
        self.std = std
        self.num_samples = num_samples
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def load(self) -> tuple[TensorSamples, TensorSamples, TensorSamples]:
        """Draw the points and split them."""
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randint(len(self.modes), (self.num_samples,), generator=generator)
        noise = torch.randn(self.num_samples, 2, generator=generator, dtype=torch.float32)
        points = self.modes[chosen] + self.std * noise
        train, val, test = (
            TensorSamples(points[part], chosen[part])
            for part in split_indices(
                self.num_samples, self.val_fraction, self.test_fraction, generator
            )
        )
        return train, val, test


def _ring(num_modes: int, radius: float) -> Tensor:
    """Place (num_modes, 2) centres evenly on a circle, the first on the positive x axis."""
    angles = 2.0 * math.pi * torch.arange(num_modes, dtype=torch.float32) / num_modes
    return radius * torch.stack([angles.cos(), angles.sin()], dim=1)


def _grid(num_modes: int, spacing: float) -> Tensor:
    """Place (num_modes, 2) centres on a square grid about the origin, row by row."""
    side = math.isqrt(num_modes)
    if side**2 != num_modes:
        raise ValueError(
            f"Expected a square num_modes for a grid, got {num_modes}. Take {side**2} or "
            f"{(side + 1) ** 2}, or leave grid_spacing out for a ring."
        )
    ticks = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    return spacing * torch.cartesian_prod(ticks, ticks)
