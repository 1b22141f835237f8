"""Samples as rows of a table in Weights & Biases, by update and by class."""

from typing import Any, cast
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_mmd.callbacks.foreign import is_a
from lightning_mmd.callbacks.loggers import attempt

__all__ = ["send_rows"]

_tables: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()  # by run


def send_rows(
    trainer: Trainer, name: str, rows: list[tuple[int | None, Tensor]], step: int
) -> None:
    """Add rows to a table of each W&B logger: update, class and picture.

    The table ``NAME_table`` grows by these rows at each call; a run that resumes goes on with it.

    Args:
        trainer: The trainer.
        name: Name of the pictures in the log.
        rows: Of each row its class, None without labels, and its picture, uint8 (3, height, width).
        step: Generator updates so far.
    """
    for logger in trainer.loggers:
        if is_a(logger, "WandbLogger"):
            attempt(logger, lambda logger: _send(logger, f"{name}_table", rows, step))


def _send(logger: Any, name: str, rows: list[tuple[int | None, Tensor]], step: int) -> None:
    import wandb

    run = cast(Any, logger).experiment
    tables = _tables.setdefault(run, {})
    if name not in tables:
        columns: list[Any] = ["update", "class", "samples"]
        tables[name] = wandb.Table(columns=columns, log_mode="INCREMENTAL")
    for label, picture in rows:
        image = wandb.Image(picture.permute(1, 2, 0).numpy())
        tables[name].add_data(step, "" if label is None else str(label), image)
    run.log({name: tables[name], "trainer/global_step": step})
