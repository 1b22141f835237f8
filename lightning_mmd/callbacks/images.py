"""Images that a callback compares samples with, read from the training data by index."""

from collections.abc import Sized
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

__all__ = ["dataset_of", "read_samples", "training_images"]


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
    loader = trainer.train_dataloader
    dataset = dataset_of(callback, loader)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    if len(order[:num]) < 3:
        raise ValueError(
            f"{type(callback).__name__} needs at least 3 training images, got {len(order[:num])}. "
            "Add data."
        )
    return read_samples(callback, dataset, order[:num])


def dataset_of(callback: Callback, loader: Any) -> Any:
    """Return the dataset of a loader, to be read by index.

    Args:
        callback: Who asks; errors name it.
        loader: What the trainer was given.

    Raises:
        TypeError: If it is no DataLoader of a dataset with a length.
    """
    if not (isinstance(loader, DataLoader) and isinstance(loader.dataset, Sized)):
        raise TypeError(
            f"{type(callback).__name__} reads images by index from the dataset of a DataLoader, "
            f"got {loader!r}. Put the images into a map-style dataset."
        )
    return loader.dataset


def read_samples(callback: Callback, dataset: Any, indices: Tensor) -> Tensor:
    """Read items of a dataset by index.

    Args:
        callback: Who asks; errors name it.
        dataset: Its items are tensors, or tuples that begin with one.
        indices: Integers of shape (n,), n >= 1.

    Returns:
        Tensor of shape (n, ...).

    Raises:
        TypeError: If an item does not begin with a tensor.
        ValueError: If a value is not finite.
    """
    name = type(callback).__name__
    items = [dataset[i] for i in indices.tolist()]
    images = [item[0] if isinstance(item, (tuple, list)) else item for item in items]
    for image in images:
        if not isinstance(image, Tensor):
            raise TypeError(
                f"{name} needs dataset items that are tensors, or tuples that begin with one, got "
                f"{type(image).__name__}. Add a transform to tensors in [-1, 1]."
            )
    stacked = torch.stack(images)
    if not stacked.isfinite().all():
        raise ValueError(
            f"{name} needs finite images, got NaN or infinity in the dataset "
            f"{type(dataset).__name__}. Clean the data, or its transform."
        )
    return stacked
