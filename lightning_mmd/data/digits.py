"""Handwritten digits that come with scikit-learn."""

import torch
from torch.nn import functional as F

from lightning_mmd.data.base import ImageDataModule
from lightning_mmd.data.dataset import TensorSamples, split_indices

__all__ = ["DigitsDataModule"]


class DigitsDataModule(ImageDataModule):
    """Scikit-learn's bundled handwritten digits: 1,797 grey 8x8 images, no download.

    Grey levels 0..16 become level / 8 - 1. By default 1,258 digits train, 180 validate and 359
    test.

    Args:
        image_size: side in pixels; 8 is the data's own, larger ones are bilinear enlargements.
        batch_size: images in a batch of one process, or a schedule {images seen: batch size}.
        val_fraction: share held out for validation, in (0, 1).
        test_fraction: share held out for the test, in (0, 1).
        labels: serve pairs of images and digits, 0 to 9.
        flip: mirror each training image left to right with probability 1/2.
        num_workers: loader processes; 0 loads in the training process.
        seed: fixes the split, the order and what is mirrored.

    Raises:
        ValueError: image_size is below 8, or one part of the split is empty.

    Source:
        E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.

    Examples:
        >>> digits = DigitsDataModule(batch_size=64)
        >>> digits.setup()
        >>> batch = next(iter(digits.train_dataloader()))
        >>> batch.shape, batch.min().item(), batch.max().item()
        (torch.Size([64, 1, 8, 8]), -1.0, 1.0)
    """

    num_classes = 10

    def __init__(
        self,
        image_size: int = 8,
        batch_size: int | dict[int, int] = 256,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        labels: bool = False,
        flip: bool = False,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, labels, flip)
        if image_size < 8:
            raise ValueError(
                f"Expected image_size of at least 8, the data's own, got {image_size}."
            )
        self.sample_shape = (1, image_size, image_size)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    def load(self) -> tuple[TensorSamples, TensorSamples, TensorSamples]:
        """Return the training, validation and test digits."""
        from sklearn.datasets import load_digits

        levels, digits = load_digits(return_X_y=True)
        images = torch.tensor(levels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8.0 - 1.0
        images = F.interpolate(images, self.sample_shape[1:], mode="bilinear")
        labels = torch.tensor(digits, dtype=torch.int64)
        generator = torch.Generator().manual_seed(self.seed)
        train, val, test = (
            TensorSamples(images[part], labels[part])
            for part in split_indices(len(images), self.val_fraction, self.test_fraction, generator)
        )
        return train, val, test
