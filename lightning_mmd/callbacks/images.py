"""Images that a callback compares samples with, read from the data by index."""

import warnings
from collections.abc import Mapping, Sized
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mmd.batches import BatchParts
from lightning_mmd.callbacks.batches import parts_of
from lightning_mmd.callbacks.foreign import is_a
from lightning_mmd.data.loader import SampleLoader
from lightning_mmd.internals import as_trained

__all__ = ["ImageReader", "RangeCheck", "training_images"]

CHUNK = 500  # items collated at a time
MOST_OUTSIDE = 2.0  # of the real range's length, that generated values may lie outside of it
LEAST_SHARE = 0.02  # of the real range's length, that generated values must cover
ONE_SIDED = 0.25  # of the greatest value, that one side is negative by where the other is not


def training_images(
    callback: Callback, trainer: Trainer, num: int, seed: int, batch: BatchParts | None = None
) -> tuple[Tensor, ...]:
    """Read a random subset of the training data, item by item and not through its loader.

    Args:
        callback: Who asks; errors name it.
        trainer: A trainer in ``fit``.
        num: Images; where there are fewer, all of them.
        seed: Of the subset.
        batch: Where images stand in a batch.

    Returns:
        Images (num, ...), and labels where there are any, on the module's device.

    Raises:
        TypeError: If the data cannot be read by index, or a batch does not hold a tensor.
        ValueError: If there are fewer than 3 images, or one is not finite.
    """
    reader = ImageReader(
        callback, trainer, trainer.lightning_module, trainer.train_dataloader, batch
    )
    order = torch.randperm(reader.num, generator=torch.Generator().manual_seed(seed))
    if len(order[:num]) < 3:
        raise ValueError(
            f"{type(callback).__name__} needs at least 3 training images, got {len(order[:num])}. "
            "Add data."
        )
    return reader.read_parts(order[:num])


class ImageReader:
    """Reads the dataset of a loader by index, as the module gets it.

    Items are put together by the loader's ``collate_fn`` and finished by the module's (or data
    module's) ``on_before_batch_transfer`` and ``on_after_batch_transfer``, so that images have the
    range that training sees. What ``training_step`` does with them is not known here.

    Args:
        callback: Who reads; errors name it.
        trainer: The trainer.
        pl_module: The module.
        loader: A DataLoader; of several, in a list or dictionary, the first counts.
        batch: Where images stand in a batch. Default: the module's own ``batch``, else first.
        cure: How the error begins its advice where the data cannot be read by index.

    Attributes:
        num: Length of the dataset.

    Raises:
        TypeError: If the loader is no DataLoader of a dataset with a length.
    """

    def __init__(
        self,
        callback: Callback,
        trainer: Trainer,
        pl_module: LightningModule,
        loader: Any,
        batch: BatchParts | None = None,
        cure: str = "Put the images",
    ) -> None:
        loader = _first(loader)
        if not (isinstance(loader, DataLoader) and isinstance(loader.dataset, Sized)):
            raise TypeError(
                f"{type(callback).__name__} reads images by index from the dataset of a "
                f"DataLoader, got {loader!r}. {cure} into a map-style dataset."
            )
        self._name = type(callback).__name__
        self._trainer, self._loader = trainer, loader
        self._parts = parts_of(pl_module, batch)
        self._device = pl_module.device
        self.num = len(loader.dataset)

    def read(self, indices: Tensor) -> Tensor:
        """Read images alone, see :meth:`read_parts`."""
        return self.read_parts(indices)[0]

    def read_parts(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Read images, and labels where there are any.

        Args:
            indices: Integers of shape (n,), n >= 1.

        Returns:
            Floating-point tensor of shape (n, ...), and labels, on the module's device.

        Raises:
            TypeError: If a batch of items does not hold such a tensor.
            ValueError: If a value is not finite.
        """
        chunks = [self._read(part.tolist()) for part in indices.split(CHUNK)]
        images, *labels = (torch.cat(parts) for parts in zip(*chunks, strict=True))
        if not images.isfinite().all():
            raise ValueError(
                f"{self._name} needs finite images, got NaN or infinity in the dataset "
                f"{type(self._loader.dataset).__name__}. Clean the data, or its transform."
            )
        return images, *labels

    def _read(self, indices: list[int]) -> tuple[Tensor, ...]:
        items = [self._loader.dataset[i] for i in indices]
        collate = self._loader.collate_fn
        ours = isinstance(self._loader, SampleLoader)  # its items are finished, one by one
        if ours or self._loader.batch_size is None:
            collate = torch.utils.data.default_collate
        try:
            batch = collate(items)
        except TypeError as error:
            raise TypeError(
                f"{self._name} cannot put items of the dataset "
                f"{type(self._loader.dataset).__name__} together: {str(error).rstrip('.')}. Add a "
                "transform to tensors in [-1, 1], or a collate_fn to the loader."
            ) from error
        if not ours:
            batch = as_trained(self._trainer, batch)
        try:
            return tuple(part.detach().to(self._device) for part in self._parts.read(batch))
        except TypeError as error:
            raise TypeError(f"{self._name}: {error}") from error


def _first(loader: Any) -> Any:
    """Return the first of several loaders."""
    if is_a(loader, "CombinedLoader"):
        return _first(loader.iterables)
    if isinstance(loader, Mapping):
        return _first(next(iter(loader.values()), None))
    if isinstance(loader, (list, tuple)):
        return _first(next(iter(loader), None))
    return loader


class RangeCheck:
    """Warns once when the ranges of real and generated images cannot belong together.

    That is how it looks where ``training_step`` scales images: a perfect generator is then compared
    with unscaled data. Generated values may lie outside of the real range by twice its length, and
    must cover a fiftieth of it; not one side alone may be negative. Other samples than images,
    (n, c, h, w), have no fixed range.

    Args:
        callback: Who compares; the warning names it.
    """

    def __init__(self, callback: Callback) -> None:
        self._name = type(callback).__name__
        self._real: tuple[float, float] | None = None
        self._told = False

    def real(self, images: Tensor) -> None:
        """Note the real range."""
        if images.ndim == 4 and len(images):
            self._real = images.min().item(), images.max().item()

    def generated(self, samples: Tensor) -> Tensor:
        """Compare with the range of some generated samples; return them as they are."""
        if self._told or self._real is None or not len(samples):
            return samples
        low, high = self._real
        least, most = samples.min().item(), samples.max().item()
        length = max(high - low, 1e-12)
        if (
            max(most - high, low - least) > MOST_OUTSIDE * length
            or most - least < LEAST_SHARE * length
            or (low >= 0 and least < -ONE_SIDED * high)
            or (least >= 0 and low < -ONE_SIDED * high and samples.numel() >= 1000)
        ):
            self._told = True
            warnings.warn(
                f"{self._name}: real images range from {low:.3g} to {high:.3g}, generated ones "
                f"from {least:.3g} to {most:.3g}. If training_step scales images, scale them in "
                "the dataset, in a collate_fn or in on_after_batch_transfer instead: what is "
                "compared here has the range that these leave.",
                stacklevel=2,
            )
        return samples
