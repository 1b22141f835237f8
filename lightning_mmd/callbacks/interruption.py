"""A training that is told to stop: it saves what it has, at the end of a step, on all processes."""

import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mmd.heartbeat import Heartbeat, shared_store
from lightning_mmd.internals import is_fast_dev_run

__all__ = ["GracefulStop", "StoppedError"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PATIENCE = 6.0  # seconds to find out who has died, where a collective fails


class StoppedError(Exception):
    """A training was stopped by a signal, and has saved its state.

    Attributes:
        signal: Number of the signal.
        checkpoint: What it saved; None where nothing is to be written.
        step: Generator updates that were made.
    """

    def __init__(self, number: int, checkpoint: Path | None, step: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} after {step} generator updates; "
            + (f"checkpoint: {checkpoint}" if checkpoint else "nothing was saved")
        )
        self.signal = number
        self.checkpoint = checkpoint
        self.step = step


class GracefulStop(Callback):
    """Ctrl-C and SIGTERM end a training after the step that is being made, with a checkpoint.

    All processes agree on the stop at the end of a step, whichever got the signal, so that no
    collective waits for one that has left. The checkpoint is ``last.ckpt`` beside the others. A
    second Ctrl-C ends the process at once. On several processes each one watches the others: a
    rank that failed, or does not answer for `limit` seconds, is named, and the rest ends.

    The state after the last update of ``max_steps`` is saved there too, before Lightning counts the
    epoch that it cuts as a whole one: what goes on from it is what one long training would be.

    It must be the last callback of a Trainer, so that a checkpoint holds what others have done
    after the step; the command line adds it.

    Args:
        limit: Seconds without a sign of life after which a process counts as dead, > 0.

    Attributes:
        saved: The checkpoint of the last update, None before.

    Raises:
        ValueError: If the limit is not positive.
        StoppedError: From ``trainer.fit``, once the checkpoint is written.
    """

    onlooker = True
    """Training is the same without the callback."""

    def __init__(self, limit: float = 30.0) -> None:
        if not isinstance(limit, (int, float)) or not limit > 0:
            raise ValueError(f"limit must be a positive number of seconds, got {limit!r}.")
        self.limit = limit
        self.saved: Path | None = None
        self._received = 0
        self._before: dict[int, Any] = {}
        self._heart: Heartbeat | None = None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._received, self.saved = 0, None
        self._listen()
        if trainer.world_size > 1 and torch.distributed.is_initialized():
            store = shared_store(self.limit)
            if store is not None:
                self._heart = Heartbeat(store, trainer.global_rank, trainer.world_size, self.limit)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        number = self._received
        if trainer.world_size > 1:
            told = torch.tensor(float(number), device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(told, reduce_op="max"))
        saves = isinstance(trainer.checkpoint_callback, ModelCheckpoint)
        if number or (saves and trainer.global_step == trainer.max_steps):
            path = self.saved = _place(trainer)
            if path is not None:
                trainer.save_checkpoint(path, weights_only=False)
        if number:
            raise StoppedError(number, self.saved, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._heart is not None:
            self._heart.stop()
            self._heart = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        heart, self._heart = self._heart, None
        if heart is None:
            return
        if isinstance(exception, StoppedError):
            heart.stop()
            return
        found = heart.silent(_PATIENCE) if _is_of_a_collective(exception) else None
        if found is not None:
            exception.args = (f"rank {trainer.global_rank}: {found}. ({_first_line(exception)})",)
            heart.stop()
        else:
            heart.fail(f"{type(exception).__name__}: {_first_line(exception)}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _listen(self) -> None:
        """Take the signals; Lightning's own handler would communicate inside of it."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if signal.getsignal(number) != self._take:
                self._before.setdefault(number, signal.getsignal(number))
                signal.signal(number, self._take)

    def _take(self, number: int, frame: Any) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number


def _place(trainer: Trainer) -> Path | None:
    """Return where to save: beside the other checkpoints."""
    if is_fast_dev_run(trainer):
        return None
    callback = trainer.checkpoint_callback
    if isinstance(callback, ModelCheckpoint) and callback.dirpath:
        return Path(callback.dirpath) / "last.ckpt"
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "last.ckpt"


def _is_of_a_collective(error: BaseException) -> bool:
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in words for word in ("connection", "gloo", "nccl", "peer", "socket", "timed out")
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
