"""Images that a callback compares samples with, read from the training data by index."""

from collections.abc import Sized

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = ["training_images"]


def training_images(callback: Callback, trainer: Trainer, num: int, seed: int) -> Tensor:
    """Read a random subset of the training data, item by item and not through its loader.

    Args:
        callback: Who asks; errors name it.
        trainer: A trainer in ``fit``.
        num: Images; where there are fewer, all of them.
        seed: Of the subset.

    Returns:
        Images (num, ...), on the CPU.

    Raises:
        TypeError: If the data cannot be read by index, or an item does not begin with a tensor.
        ValueError: If there are fewer than 3 images, or one is not finite.
    """
    name, loader = type(callback).__name__, trainer.train_dataloader
    if not (isinstance(loader, DataLoader) and isinstance(loader.dataset, Sized)):
        raise TypeError(
            f"{name} reads images by index from the dataset of a DataLoader, got {loader!r}. Put "
            "the training data into a map-style dataset."
        )
    dataset = loader.dataset
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    items = [dataset[i] for i in order[:num].tolist()]
    images = [item[0] if isinstance(item, (tuple, list)) else item for item in items]
    if len(images) < 3:
        raise ValueError(f"{name} needs at least 3 training images, got {len(images)}. Add data.")
    if not all(isinstance(image, Tensor) for image in images):
        raise TypeError(
            f"{name} needs dataset items that are tensors, or tuples that begin with one, got "
            f"{type(images[0]).__name__}. Add a transform to tensors in [-1, 1]."
        )
    stacked = torch.stack(images)
    if not stacked.isfinite().all():
        raise ValueError(f"{name} needs finite images, got NaN or infinity. Clean the data.")
    return stacked
