"""Learning rates of a running training, changed for good."""

from collections.abc import Callable, Iterator
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

__all__ = ["scale_learning_rates"]

GROUP_KEYS = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Where optimizers and schedulers keep rates in a parameter group: OneCycleLR all but the last."""

SCHEDULER_KEYS = (
    "base_lrs",  # most schedulers
    "max_lrs",  # CyclicLR
    "max_lr",
    "base_max_lr",  # CosineAnnealingWarmupRestarts
    "base_values",  # timm
)
"""Where schedulers keep the rates from which they compute."""


def scale_learning_rates(trainer: Trainer, factor: float, minimum: float = 0.0) -> list[float]:
    """Multiply every optimizer's learning rates, and what its scheduler starts from, by a factor.

    Schedulers go on as if they had been made with the smaller rates: those with base rates, those
    with rates of their own (OneCycleLR, CyclicLR, SWALR) and those that change the present rate
    (ReduceLROnPlateau). A rate that is below the minimum already stays as it is. Optimizers and
    schedulers save what changes here, so a resumed run has it too.

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
        for scheduler in _parts(config.scheduler):
            _scale(vars(scheduler), SCHEDULER_KEYS, scaled)
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    for group in groups:
        _scale(group, GROUP_KEYS, scaled)
    return [float(group["lr"]) for group in groups]


def _scale(values: dict[str, Any], keys: tuple[str, ...], scaled: Callable) -> None:
    """Scale numbers, tensors (in place, as capturable optimizers need it) and lists of them."""

    def change(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.fill_(scaled(value.item())) if value.ndim == 0 else value
        if isinstance(value, (list, tuple)):
            return type(value)(map(change, value))
        return scaled(value) if isinstance(value, (int, float)) else value

    for key in keys:
        if key in values:
            values[key] = change(values[key])


def _parts(scheduler: Any) -> Iterator[Any]:
    """Yield a scheduler, or those that it is made of."""
    parts = getattr(scheduler, "_schedulers", None)
    if parts is None:
        yield scheduler
        return
    for part in parts:  # ChainedScheduler, SequentialLR
        yield from _parts(part)
