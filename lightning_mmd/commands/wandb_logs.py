"""Weights & Biases must not stop a training: without a login or a server, runs are kept offline."""

import os

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mmd.internals import offline, switch_offline

__all__ = ["start_or_go_offline"]


def start_or_go_offline(trainer: Trainer) -> None:
    """Start W&B loggers, in offline mode, with a warning, where no login or server is to be had.

    ``WANDB_MODE=online`` is a wish and no reason to lose a training. ``offline``, ``disabled`` and
    ``dryrun`` are left as they are.

    Args:
        trainer: The trainer whose loggers are about to start.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    if os.environ.get("WANDB_MODE", "online") != "online" or all(map(offline, loggers)):
        return
    import wandb

    try:
        reason = None if wandb.login(prompt=False) else "no login is configured"
    except wandb.Error as error:  # a key that is refused, or no network
        reason = f"the login failed ({error})"
    if reason is None and trainer.is_global_zero:
        try:
            for logger in loggers:
                _ = logger.experiment  # wandb.init, which asks the server
        except (wandb.Error, OSError) as error:
            reason = f"the server does not answer ({error})"
    if reason:
        for logger in loggers:
            switch_offline(logger)
        rank_zero_warn(
            f"Weights & Biases: {reason}, so the run is logged offline. Run 'wandb login' once, or "
            "set WANDB_API_KEY; 'wandb sync' uploads the folder later."
        )
