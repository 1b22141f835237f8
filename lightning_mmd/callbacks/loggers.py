"""What callbacks hand to loggers: numbers, pictures and descriptions, on one axis."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from weakref import WeakSet

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_mmd.callbacks.foreign import is_a

__all__ = ["Log", "attempt", "describe", "send_picture", "send_scalars"]

_told: WeakSet[Logger] = WeakSet()  # which take no pictures


def send_scalars(trainer: Trainer, scalars: dict[str, float], step: int) -> None:
    """Hand numbers to all loggers.

    A logger that fails (a server that does not answer) is told of in a warning; the others get
    theirs, and training goes on.

    Args:
        trainer: The trainer.
        scalars: Numbers by name.
        step: Generator updates so far.
    """
    for logger in trainer.loggers:
        attempt(logger, lambda logger: logger.log_metrics(scalars, step=step))


def send_picture(trainer: Trainer, name: str, picture: Tensor, path: Path, step: int) -> None:
    """Hand a picture to all loggers that take pictures; name once those that do not.

    W&B, TensorBoard, Comet, MLflow and Neptune take pictures, and every logger that has a method
    ``log_image(key, images, step)`` as W&B's has it.

    Args:
        trainer: The trainer.
        name: Name in the log.
        picture: uint8 tensor (3, height, width).
        path: The same as a PNG file.
        step: Generator updates so far.
    """
    for logger in trainer.loggers:
        attempt(logger, lambda logger: _send_picture(logger, name, picture, path, step))


def _send_picture(logger: Logger, name: str, picture: Tensor, path: Path, step: int) -> None:
    experiment = lambda: cast(Any, logger).experiment  # noqa: E731 - not all loggers have one
    if is_a(logger, "TensorBoardLogger"):
        experiment().add_image(name, picture, global_step=step)
    elif is_a(logger, "CometLogger"):
        experiment().log_image(str(path), name=name, step=step)
    elif is_a(logger, "MLFlowLogger"):
        experiment().log_artifact(cast(Any, logger).run_id, str(path), artifact_path=name)
    elif is_a(logger, "NeptuneLogger"):
        experiment()[f"{name}/{path.stem}"].upload(str(path))
    elif hasattr(logger, "log_image"):
        cast(Any, logger).log_image(key=name, images=[str(path)], step=step)
    elif logger not in _told:
        _told.add(logger)
        rank_zero_info(f"{type(logger).__name__} takes no pictures; they are in {path.parent}.")


def describe(trainer: Trainer, name: str, facts: dict[str, Any]) -> None:
    """Hand a description to all loggers: text in TensorBoard, hyperparameters elsewhere.

    Args:
        trainer: The trainer.
        name: Of what is described.
        facts: Plain values by name.
    """
    for logger in trainer.loggers:
        attempt(logger, lambda logger: _describe(logger, name, facts))


def _describe(logger: Logger, name: str, facts: dict[str, Any]) -> None:
    if is_a(logger, "TensorBoardLogger"):  # a second set of hparams hides the first
        rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
        cast(Any, logger).experiment.add_text(name, f"| | |\n|---|---|\n{rows}", 0)
    else:
        logger.log_hyperparams({name: facts})


_failed: WeakSet[Logger] = WeakSet()


def attempt(logger: Logger, send: Callable[[Logger], None]) -> None:
    """Hand something to a logger; where that fails, say so once and go on.

    Args:
        logger: The logger.
        send: What hands it over.
    """
    try:
        send(logger)
    except Exception as error:
        if logger not in _failed:
            _failed.add(logger)
            rank_zero_warn(
                f"{type(logger).__name__} failed: {type(error).__name__}: {error}. Training goes "
                "on; this is said once, and what callbacks hand to the logger may be missing."
            )


class Log:
    """The numbers that a callback logs at every step, on the axis of generator updates.

    They go to loggers at every ``log_every_n_steps``-th update and at the end, and at once to where
    ModelCheckpoint and progress bars look.
    """

    def __init__(self) -> None:
        self._newest: dict[str, Tensor] = {}
        self._sent_at: int | None = None

    def note(self, pl_module: LightningModule, scalars: dict[str, Any]) -> None:
        """Keep the newest numbers."""
        pl_module.log_dict(scalars, logger=False)
        self._newest |= {name: torch.as_tensor(value) for name, value in scalars.items()}

    def send(self, trainer: Trainer, step: int, *, last: bool = False) -> None:
        """Hand the newest numbers to loggers where it is time to.

        Args:
            trainer: The trainer.
            step: Generator updates so far.
            last: Whether no more will come.
        """
        every = getattr(trainer, "log_every_n_steps", 0) or math.inf
        before = -1 if self._sent_at is None else self._sent_at // every
        due = last if step == 0 else last or step // every > before
        if not self._newest or step == self._sent_at or not due:
            return
        send_scalars(trainer, {n: float(v) for n, v in self._newest.items()}, step)
        self._sent_at = step
