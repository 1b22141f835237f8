"""Random changes of everything that the critic sees, for sets of few images."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_mmd.callbacks.instance_noise import InstanceNoise
from lightning_mmd.data import SampleDataModule
from lightning_mmd.noise import ConstantNoise

__all__ = ["Change", "DiffAugment", "augmented"]

Change = Literal["colour", "translation", "cutout"]


class DiffAugment(InstanceNoise):
    r"""Lets the critic see images only after a random change T: :math:`f(T(x))` for f(x).

    A critic learns a few thousand images by heart, and then tells the generator nothing. With
    changes of real and generated images alike it cannot, and as T is differentiable the generator
    follows the critic through it: its own images stay unchanged.

    | change | what it does |
    |---|---|
    | colour | brightness by up to 0.5 either way, saturation by 0 to 2, contrast by 0.5 to 1.5 |
    | translation | moves an image by up to 1/8 of its sides; what comes in is grey |
    | cutout | a grey square of half the sides, anywhere |

    Every call of the critic in training draws anew, a function of (seed, rank, update), penalties
    included. Calls by callbacks that only observe see images as they are.

    Args:
        changes: Which of them, in this order.
        max_images: Leave the training alone where the data module has more training images.
            Default: change always.
        generator: Attribute of the LightningModule that holds the generator, maybe dotted.
        critic: Likewise, the critic.
        seed: Of the changes.

    Raises:
        ValueError: If a change has another name; when fitting begins, see `InstanceNoise`.

    Source:
        Zhao et al. 2020, arXiv 2006.10738.

    Examples:
        >>> DiffAugment(["translation"], max_images=10_000).changes
        ['translation']
    """

    def __init__(
        self,
        changes: Sequence[Change] = ("colour", "translation", "cutout"),
        max_images: int | None = None,
        generator: str = "generator",
        critic: str = "critic",
        seed: int = 0,
    ) -> None:
        super().__init__(ConstantNoise(1.0), generator, critic, seed)
        if unknown := [change for change in changes if change not in get_args(Change)]:
            raise ValueError(
                f"DiffAugment knows the changes {', '.join(get_args(Change))}, got {unknown}."
            )
        self.changes = list(changes)
        self.max_images = max_images

    def begin(self, pl_module: LightningModule, critic: nn.Module) -> list[Any]:
        self.schedule = ConstantNoise(1.0)  # an earlier training may have had more images
        data = getattr(pl_module.trainer, "datamodule", None)
        if self.max_images is not None and isinstance(data, SampleDataModule):
            num = data.num_train
            if num > self.max_images:
                self.schedule = ConstantNoise(0.0)
                return []
            rank_zero_info(
                f"DiffAugment: {num} training images are few, and the critic would learn them by "
                "heart. It sees them, and generated ones, randomly changed: "
                f"{', '.join(self.changes)}."
            )
        return super().begin(pl_module, critic)

    def log_name(self, name: str) -> str:
        """Return the name of a number in the log."""
        return f"augment/{name}" if self.critic == "critic" else f"augment/{self.critic}/{name}"

    def _changed(self, x: Tensor) -> Tensor:
        return augmented(x, self.changes, self._next_source())


def augmented(images: Tensor, changes: Sequence[Change], source: torch.Generator) -> Tensor:
    """Change each image at random, differentiably.

    Args:
        images: Images (n, c, h, w) in [-1, 1].
        changes: What to do, in this order, see `DiffAugment`.
        source: Random numbers, on the CPU: they are equal on every device.

    Returns:
        Images of the same shape, which may leave [-1, 1].

    Raises:
        ValueError: If they are no images.
    """
    if images.ndim != 4:
        raise ValueError(
            f"DiffAugment changes images (n, c, h, w), got shape {tuple(images.shape)}. Leave it "
            "out for other data."
        )
    for change in changes:
        images = _CHANGES[change](images, source)
    return images


def _uniform(images: Tensor, source: torch.Generator) -> Tensor:
    drawn = torch.rand(len(images), 1, 1, 1, generator=source, dtype=torch.float64)
    return drawn.to(images.device, images.dtype)


def _colour(x: Tensor, source: torch.Generator) -> Tensor:
    x = x + _uniform(x, source) - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * _uniform(x, source) * (x - grey)
    level = x.mean((1, 2, 3), keepdim=True)
    return level + (0.5 + _uniform(x, source)) * (x - level)


def _places(num: int, most: int, low: int, source: torch.Generator) -> Tensor:
    return torch.randint(low, most + 1, (num, 1), generator=source)


def _translation(x: Tensor, source: torch.Generator) -> Tensor:
    num, _, height, width = x.shape
    dy, dx = round(height / 8), round(width / 8)
    rows = torch.arange(height) + _places(num, dy, -dy, source) + dy
    columns = torch.arange(width) + _places(num, dx, -dx, source) + dx
    padded = F.pad(x, (dx, dx, dy, dy))
    n, rows, columns = (t.to(x.device) for t in (torch.arange(num), rows, columns))
    moved = padded.permute(0, 2, 3, 1)[n[:, None, None], rows[:, :, None], columns[:, None]]
    return moved.permute(0, 3, 1, 2)


def _cutout(x: Tensor, source: torch.Generator) -> Tensor:
    num, _, height, width = x.shape
    kept = []
    for size in (height, width):
        half = size // 2
        start = _places(num, size - half % 2, 0, source) - half // 2
        place = torch.arange(size)
        kept.append((place < start) | (place >= start + half))
    keep = (kept[0][:, :, None] | kept[1][:, None]).to(x.device, x.dtype)
    return x * keep[:, None]


_CHANGES = {"colour": _colour, "translation": _translation, "cutout": _cutout}
