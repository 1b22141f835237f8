"""Learning rates of a running training, changed for good."""

from collections.abc import Iterator

from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import ChainedScheduler, LRScheduler, SequentialLR

__all__ = ["scale_learning_rates"]


def scale_learning_rates(trainer: Trainer, factor: float, minimum: float = 0.0) -> list[float]:
    """Multiply every optimizer's learning rates, and what its scheduler starts from, by a factor.

    A rate that is below the minimum already stays as it is. Optimizers and schedulers save what
    changes here, so a resumed run has it too.

    Args:
        trainer: A trainer in ``fit``.
        factor: The factor, > 0.
        minimum: Rates do not fall below this.

    Returns:
        The new rates, one a parameter group, in the order of the optimizers.
    """

    def scaled(rate: float) -> float:
        return max(rate * factor, min(rate, minimum))

    for config in trainer.lr_scheduler_configs:
        for scheduler in _parts(config.scheduler):  # pyright: ignore[reportArgumentType]
            rates = [scaled(float(rate)) for rate in scheduler.base_lrs]
            scheduler.base_lrs = rates  # pyright: ignore[reportAttributeAccessIssue]
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = scaled(group["lr"])
    return [float(group["lr"]) for group in groups]


def _parts(scheduler: LRScheduler) -> Iterator[LRScheduler]:
    """Yield the schedulers that hold base rates."""
    if isinstance(scheduler, (ChainedScheduler, SequentialLR)):
        for part in scheduler._schedulers:
            yield from _parts(part)
    else:
        yield scheduler
