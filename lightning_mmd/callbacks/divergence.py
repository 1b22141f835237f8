"""What to do where a training diverges: keep a good state aside, and go back to it or stop."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mmd.callbacks.ema import GeneratorEMA
from lightning_mmd.callbacks.learning_rates import scale_learning_rates
from lightning_mmd.checkpoints import read_checkpoint
from lightning_mmd.finite import refuse_not_finite
from lightning_mmd.game import DivergedError
from lightning_mmd.internals import callbacks_of, is_fast_dev_run, saves_after_batch
from lightning_mmd.module import MMDGAN

__all__ = ["OnDivergence"]


class OnDivergence(Callback):
    """Keeps a good state of `MMDGAN` aside, and goes back to it where training diverges.

    Every `every_n_steps` generator updates the state becomes ``good.ckpt``, and what was there
    before ``good_before.ckpt``. So one of the two was saved at least that many updates before
    whatever happens, also where numbers explode for a while before one is infinite; a checkpoint
    that is written at each update would hold the explosion.

    Where a number is no longer finite, ``"raise"`` names that file in the error. ``"restore"`` puts
    weights, optimizers and the rule's state back, multiplies all learning rates by `factor` and
    goes on with the next batch; clocks, data and schedules are not turned back. Each time is logged
    as ``divergence/restores``. After `max_tries` times it raises.

    Args:
        action: ``"raise"`` or ``"restore"``.
        every_n_steps: Generator updates between states that are kept, >= 1.
        factor: On the learning rates after a return, in (0, 1].
        max_tries: Returns in one training, >= 1.

    Attributes:
        restores: Returns so far; a resumed training goes on counting.

    Raises:
        ValueError: If an argument is out of its range.
        TypeError: At the start, if the module is no `MMDGAN`.
    """

    def __init__(
        self,
        action: Literal["raise", "restore"] = "raise",
        every_n_steps: int = 100,
        factor: float = 0.5,
        max_tries: int = 3,
    ) -> None:
        if action not in ("raise", "restore"):
            raise ValueError(f"action must be 'raise' or 'restore', got {action!r}.")
        if any(not isinstance(n, int) or n < 1 for n in (every_n_steps, max_tries)):
            raise ValueError(
                "OnDivergence needs every_n_steps and max_tries, integers of at least 1, got "
                f"{every_n_steps} and {max_tries}."
            )
        if not 0 < factor <= 1:
            raise ValueError(f"factor must be in (0, 1], got {factor}.")
        self.action = action
        self.every_n_steps = every_n_steps
        self.factor = factor
        self.max_tries = max_tries
        self.restores = 0
        self._folder: Path | None = None
        self._kept: int | None = None

    def stretch(self, factor: int) -> None:
        """Let shorter steps be kept at the same times."""
        self.every_n_steps *= factor

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not isinstance(pl_module, MMDGAN):
            raise TypeError(
                f"OnDivergence needs an MMDGAN, got {type(pl_module).__name__}: it restores the "
                "state of the rule too."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_fast_dev_run(trainer):
            return
        callback = trainer.checkpoint_callback
        folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
        self._folder = Path(folder or Path(trainer.log_dir or trainer.default_root_dir) / "kept")
        self._folder = Path(trainer.strategy.broadcast(str(self._folder)))
        self._kept = None
        if trainer.global_step == 0:
            self.restores = 0
        self._keep(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        keeps = trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._kept
        if keeps or saves_after_batch(trainer):  # otherwise the next update looks
            healthy = self._look(trainer, pl_module)
            if keeps and healthy:
                self._keep(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Look at the state before ModelCheckpoint refuses to save it; whether it was good."""
        assert isinstance(pl_module, MMDGAN)
        try:
            refuse_not_finite(pl_module._players(), pl_module.rule)
        except DivergedError as error:
            told = DivergedError(f"training has diverged: {error} is not finite.")
            if not self.on_divergence(trainer, pl_module, told):
                raise told from error
            return False
        return True

    def on_divergence(self, trainer: Trainer, pl_module: MMDGAN, error: DivergedError) -> bool:
        """Go back to the good state, if that is to be done; called on every rank.

        Args:
            trainer: The trainer.
            pl_module: What it trains.
            error: What has happened; the file to go on from is added to its text.

        Returns:
            Whether training goes on.
        """
        good = self._good()
        if good is None:
            return False
        if self.action == "raise" or self.restores >= self.max_tries:
            tried = f" {self.restores} returns to a good state did not help." * bool(self.restores)
            error.args = (f"{error}{tried} A state of well before is {good}.",)
            return False
        self._restore(trainer, pl_module, good)
        self.restores += 1
        rates = scale_learning_rates(trainer, self.factor)
        rank_zero_warn(
            f"{error} Went back to {good} and goes on with learning rates of "
            f"{', '.join(f'{rate:.3g}' for rate in rates)} ({self.restores} of {self.max_tries})."
        )
        for logger in trainer.loggers:
            logger.log_metrics({"divergence/restores": self.restores}, step=trainer.global_step)
        return True

    def _keep(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if self._folder is None or step == self._kept:
            return
        good = self._folder / "good.ckpt"
        if trainer.is_global_zero and good.exists():
            good.replace(self._folder / "good_before.ckpt")
        trainer.save_checkpoint(good, weights_only=False)  # all ranks wait for it
        self._kept = step

    def _good(self) -> Path | None:
        for name in ("good_before.ckpt", "good.ckpt"):
            if self._folder is not None and (self._folder / name).is_file():
                return self._folder / name
        return None

    @staticmethod
    def _restore(trainer: Trainer, pl_module: MMDGAN, path: Path) -> None:
        """Put weights, optimizers, averages and the rule's state back, and leave clocks alone."""
        checkpoint = read_checkpoint(path)
        clocks = {name: getattr(pl_module, name) for name in _CLOCKS}
        pl_module.on_load_checkpoint(checkpoint)
        pl_module.load_state_dict(checkpoint["state_dict"])
        for name, value in clocks.items():
            setattr(pl_module, name, value)
        for optimizer, state in zip(
            trainer.optimizers, checkpoint["optimizer_states"], strict=True
        ):
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        for callback in callbacks_of(trainer):
            if isinstance(callback, GeneratorEMA):
                callback.on_load_checkpoint(trainer, pl_module, checkpoint)
                callback.on_train_start(trainer, pl_module)  # what was loaded is no update
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def state_dict(self) -> dict[str, Any]:
        return {"restores": self.restores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restores = state_dict["restores"]


_CLOCKS = ("critic_step", "images_seen", "cumulative_lr")
