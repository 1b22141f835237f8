"""The configuration of a run: a file of its own beside its checkpoints, and in W&B's config."""

from importlib import metadata
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from lightning_mmd.callbacks.held_out import HeldOutTracker
from lightning_mmd.callbacks.samples import run_directory
from lightning_mmd.internals import callbacks_of
from lightning_mmd.masking import masked

__all__ = ["SaveMaskedConfig", "configure_wandb"]

_OF_KID = {"kid": "min", "fid": "min", "precision": "max", "recall": "max"}


class SaveMaskedConfig(SaveConfigCallback):
    """Saves a run's configuration in the run's own folder, without what looks like a secret.

    W&B's runs share one logging folder, where a later run would replace an earlier one's file: it
    lies beside the run's checkpoints instead, ``SAVE_DIR/PROJECT/RUN_ID/config.yaml``. Their
    ``wandb.config`` holds it too, see `configure_wandb`.
    """

    def __init__(self, parser: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(parser, masked(config), *args, **{**kwargs, "save_to_log_dir": False})

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file, in one process alone."""
        text = self.parser.dump(self.config, skip_none=False)
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        for logger in loggers:
            configure_wandb(logger, trainer, yaml.safe_load(text))
        folder = run_directory(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.config_filename).write_text(text, encoding="utf-8")


def configure_wandb(logger: WandbLogger, trainer: Trainer, config: dict[str, Any]) -> None:
    """Start a W&B run with the whole configuration, and let its summary keep best values.

    ``wandb.config`` gets what the configuration says of model, data and trainer (with callbacks),
    ``seed_everything`` and the version of this package. The summary of each score of a tracker has
    its last value and its best: the smallest MMD^2, KID and FID, the largest precision and recall.

    Args:
        logger: The logger, whose run is started.
        trainer: Its trainer.
        config: Plain data, without secrets.
    """
    run = logger.experiment
    version = metadata.version("lightning-mmd")
    run.config.update({**config, "lightning_mmd": version}, allow_val_change=True)
    for callback in callbacks_of(trainer):
        if not isinstance(callback, HeldOutTracker):
            continue
        scores = _OF_KID if callback.main == "kid" else {callback.main: "min"}
        for name, best in scores.items():
            run.define_metric(
                callback.key("val", name),
                step_metric="trainer/global_step",
                step_sync=True,
                summary=f"{best},last",
            )
