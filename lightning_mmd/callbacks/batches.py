"""What a batch of the training is, for callbacks."""

from typing import Any

from lightning.pytorch import Callback, LightningModule

from lightning_mmd.batches import BatchParts

__all__ = ["batch_size", "parts_of"]


def parts_of(pl_module: LightningModule, given: BatchParts | None) -> BatchParts:
    """Return where samples stand: as given, else as the module itself says in ``batch``."""
    if given is not None:
        return given
    own = getattr(pl_module, "batch", None)
    return own if isinstance(own, BatchParts) else BatchParts()


def batch_size(
    callback: Callback, pl_module: LightningModule, batch: Any, given: BatchParts | None
) -> int:
    """Return the number of samples in a batch.

    Args:
        callback: Who asks; errors name it.
        pl_module: The module.
        batch: What its ``training_step`` gets.
        given: Where samples stand.

    Raises:
        TypeError: If no samples stand there.
    """
    try:
        return len(parts_of(pl_module, given).find(batch))
    except TypeError as error:
        raise TypeError(f"{type(callback).__name__}: {error}") from error
