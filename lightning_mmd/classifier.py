"""A small classifier, to judge generated images by features that need no download."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_mmd.networks import ConvClassifier

__all__ = ["ImageClassifier"]


class ImageClassifier(LightningModule):
    """Trains a `ConvClassifier` by cross-entropy; its last hidden layer gives features.

    Its features judge generated images without a download, see `ClassifierFeatures`. They know what
    tells the classes apart and little else, so scores in them can be compared with each other only.
    Logs ``train/loss``, ``val/accuracy`` and ``test/accuracy``.

    Args:
        sample_shape: Shape (c, h, w) of an image.
        num_classes: Number of classes, >= 2.
        num_features: Length of the feature vector, >= 1.
        channels: Channels of the convolutions; each halves the image.
        lr: Learning rate of AdamW, > 0.

    Raises:
        ValueError: If a number is out of range; in training, if batches are not pairs of images and
            classes.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        num_classes: int = 10,
        num_features: int = 128,
        channels: Sequence[int] = (32, 64),
        lr: float = 2e-3,
    ) -> None:
        super().__init__()
        if num_classes < 2 or num_features < 1 or not lr > 0:
            raise ValueError(
                "ImageClassifier needs num_classes >= 2, num_features >= 1 and lr > 0, got "
                f"{num_classes}, {num_features} and {lr}."
            )
        self.save_hyperparameters()
        self.lr = lr
        self.network = ConvClassifier(sample_shape, num_classes, num_features, channels)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (n, c, h, w) to logits (n, num_classes)."""
        return self.network(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch."""
        images, labels = self._pair(batch)
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the share of images that are classified right."""
        self._log_accuracy(batch, "val/accuracy")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the share of images that are classified right."""
        self._log_accuracy(batch, "test/accuracy")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), self.lr)

    def _log_accuracy(self, batch: Any, name: str) -> None:
        images, labels = self._pair(batch)
        right = (self(images).argmax(1) == labels).double().mean()
        self.log(name, right, prog_bar=True, sync_dist=True, batch_size=len(images))

    @staticmethod
    def _pair(batch: Any) -> tuple[Tensor, Tensor]:
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise ValueError(
                f"ImageClassifier needs batches (images, classes), got {type(batch).__name__}. "
                "Set `labels: true` in the data module."
            )
        return batch[0], batch[1]
