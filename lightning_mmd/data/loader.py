"""Loaders that serve finished samples by hand and stored ones to a Trainer."""

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

from torch.utils.data import DataLoader

from lightning_mmd.data.order import Order

__all__ = ["ResumableLoader", "SampleLoader"]


class SampleLoader(DataLoader[Any]):
    """A loader whose batches are finished as they leave it, unless a Trainer finishes them.

    Attributes:
        finish: makes a batch as a model takes it from one as it is stored and from the position of
            its first sample, None where the batch is not one of training; None leaves batches
            alone. (Lightning makes a loader anew for evaluation on several processes, without it.)
    """

    finish: Callable[[Any, int | None], Any] | None = None

    def __iter__(self) -> Any:
        batches = super().__iter__()
        if self.finish is None:
            return batches
        firsts = repeat(None)
        if isinstance(self.sampler, Order):
            firsts = (first for first, _ in self.sampler.spans())
        return self._finished(self.finish, batches, firsts)

    def _finished(
        self, finish: Callable[[Any, int | None], Any], batches: Iterator[Any], firsts: Iterator
    ) -> Iterator[Any]:
        for batch, first in zip(batches, firsts, strict=False):
            yield finish(batch, first)


class ResumableLoader(SampleLoader):
    """A loader that a resumed training continues in mid-epoch.

    The position is saved by the data module, which counts what was trained on and not what workers
    have fetched; these two methods tell Lightning that nothing is lost.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module saves the position."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the data module has loaded the position.

        Args:
            state_dict: ignored.
        """
