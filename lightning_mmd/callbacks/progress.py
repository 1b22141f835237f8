"""A progress bar on the clock of generator updates."""

import sys
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

__all__ = ["GeneratorProgressBar"]


class GeneratorProgressBar(TQDMProgressBar):
    """One bar for the whole training, in generator updates out of ``max_steps``.

    Lightning's own bar starts anew with each pass over the data, which for a small data set is a
    handful of updates. Without ``max_steps`` this one counts updates and shows no total.
    """

    def init_train_tqdm(self) -> Tqdm:
        max_steps = self.trainer.max_steps
        return Tqdm(
            desc=self.train_description,
            total=max_steps if max_steps > 0 else None,
            initial=self.trainer.global_step,
            unit="update",
            position=2 * self.process_position,
            disable=self.is_disabled,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,
            bar_format=self.BAR_FORMAT,
        )

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Let the bar go on: it counts updates, not batches of an epoch."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._show(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the bar go on."""

    def on_train_end(self, *_: Any) -> None:
        self._show(self.trainer, self.trainer.lightning_module)
        self.train_progress_bar.refresh()
        super().on_train_end()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics shown, without the run's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        bar = self.train_progress_bar
        if not bar.disable:
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.update(trainer.global_step - bar.n)
