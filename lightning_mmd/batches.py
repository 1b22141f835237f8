"""What a batch of data holds: samples, alone or with labels, by position or by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["BatchParts"]


@dataclass(frozen=True)
class BatchParts:
    """Where samples and labels stand in a batch.

    A batch is a tensor of samples, a tuple or list that begins with one, or a dictionary.

    Args:
        samples: Position or key of the samples.
        labels: Position or key of the labels; None for none. A batch may lack them.

    Examples:
        >>> import torch
        >>> BatchParts("image", "digit").read({"image": torch.zeros(4, 1, 8, 8)})[0].shape
        torch.Size([4, 1, 8, 8])
    """

    samples: int | str = 0
    labels: int | str | None = 1

    def read(self, batch: Any) -> tuple[Tensor, ...]:
        """Return the samples and, where there are any, the labels.

        Args:
            batch: What a loader yields.

        Returns:
            Tensors with n rows each; the samples are of a floating dtype.

        Raises:
            TypeError: If the samples are not such a tensor, or a dictionary lacks the key.
        """
        samples, labels = self._take(batch)
        if not isinstance(samples, Tensor) or not samples.is_floating_point():
            kind = samples.dtype if isinstance(samples, Tensor) else type(samples).__name__
            raise TypeError(
                "a batch must be a floating-point tensor of real samples, alone, in a tuple or in "
                f"a dictionary, got {kind}. Convert the data in the data module, images to "
                "[-1, 1]; or say where the samples stand: batch=BatchParts(samples=...)."
            )
        return (samples, labels) if isinstance(labels, Tensor) else (samples,)

    def find(self, batch: Any) -> Tensor:
        """Return what stands where the samples are, of any dtype.

        Args:
            batch: What a loader yields.

        Raises:
            TypeError: If that is no tensor, or a dictionary lacks the key.
        """
        samples, _ = self._take(batch)
        if not isinstance(samples, Tensor):
            raise TypeError(
                f"a batch holds {type(samples).__name__} where its samples should be. Say where "
                "they stand: batch=BatchParts(samples=...)."
            )
        return samples

    def _take(self, batch: Any) -> tuple[Any, Any]:
        if isinstance(batch, Mapping):
            if self.samples not in batch:
                raise TypeError(
                    f"a batch is a dictionary with the keys {sorted(map(str, batch))}, and none of "
                    f"them is {self.samples!r}. Name the one that holds the samples: "
                    "batch=BatchParts(samples='...')."
                )
            return batch[self.samples], batch.get(self.labels)
        if isinstance(batch, (tuple, list)):
            return _at(batch, self.samples), _at(batch, self.labels)
        return batch, None


def _at(batch: Any, position: int | str | None) -> Any:
    return batch[position] if isinstance(position, int) and position < len(batch) else None
