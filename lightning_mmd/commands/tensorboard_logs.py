"""TensorBoard's HParams view: hyperparameters beside the final scores."""

import math
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_mmd.internals import leave_hp_metric_out

__all__ = ["send_final_scores", "without_hp_metric"]


def without_hp_metric(trainer: Trainer) -> None:
    """Let TensorBoard loggers that have not started not write ``hp_metric = -1``.

    Args:
        trainer: Their trainer.
    """
    for logger in _loggers(trainer):
        leave_hp_metric_out(logger)


def send_final_scores(trainer: Trainer) -> None:
    """Write the hyperparameters with the final scores, as ``final/val/kid`` and so on.

    Args:
        trainer: A trainer that has fitted; what it measured on validation data and is finite.
    """
    found = {n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")}
    scores = {f"final/{name}": v for name, v in found.items() if math.isfinite(v)}
    if scores and trainer.is_global_zero:
        for logger in _loggers(trainer):
            logger.log_hyperparams(
                cast(dict[str, Any], logger.hparams), scores, step=trainer.global_step
            )


def _loggers(trainer: Trainer) -> list[TensorBoardLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
