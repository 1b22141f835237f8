"""When a callback looks at the model: counted in generator updates."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_mmd.callbacks.ema import averaged_weights

__all__ = ["GeneratorCadence", "Samples", "keep_random_state", "require_samples"]


@runtime_checkable
class Samples(Protocol):
    """A module that can be sampled: `MMDGAN`, or any LightningModule with these three members."""

    @property
    def device(self) -> torch.device:
        """Device of the samples."""
        ...

    def sample(self, num: int, latents: Tensor | None = None) -> Tensor:
        """Return `num` samples, shape (num, ...), without gradient, in evaluation mode."""
        ...

    def fixed_latents(self, num: int, seed: int) -> Tensor:
        """Return `num` latents that depend on `seed` only, shape (num, latent_dim)."""
        ...


class GeneratorCadence(Callback, ABC):
    """A callback that observes samples before the first generator update, every N, and at the end.

    Lightning's ``trainer.global_step`` counts generator updates in `MMDGAN`; a batch on which only
    the critic stepped leaves it unchanged. Each value of it is observed at most once, in a resumed
    run too. Observing leaves the random number generators of torch, numpy and Python as they were,
    so training is the same with and without the callback. Samples are of the averaged weights where
    `GeneratorEMA` keeps some.

    Args:
        every_n_steps: Generator updates between observations, at least 1.

    Raises:
        ValueError: If `every_n_steps` is less than 1.
        TypeError: At set-up, if the module cannot be sampled.
    """

    onlooker = True
    """Whether training is the same without the callback."""

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"{type(self).__name__} needs every_n_steps of at least 1, got {every_n_steps}. It "
                "counts generator updates; remove the callback to observe none."
            )
        self.every_n_steps = every_n_steps
        self.last_step: int | None = None

    @abstractmethod
    def observe(self, trainer: Trainer, model: Samples) -> None:
        """Look at the model at generator update ``trainer.global_step``; called on every rank."""

    def reset(self) -> None:
        """Forget an earlier run; called when a new one begins, not a resumed one."""
        self.last_step = None

    def stretch(self, factor: int) -> None:
        """Let a run with steps of 1 / factor of their length be observed at the same times."""
        self.every_n_steps *= factor

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        require_samples(self, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:  # a new run, not a resumed one
            self.reset()
        if trainer.global_step % self.every_n_steps == 0:
            self._observe_once(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0 or _is_last_update(trainer):
            self._observe_once(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._observe_once(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step = state_dict["last_step"]

    def _observe_once(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == self.last_step:
            return
        with keep_random_state(pl_module.device), averaged_weights(trainer, pl_module):
            self.observe(trainer, require_samples(self, pl_module))
        self.last_step = trainer.global_step


@contextmanager
def keep_random_state(device: torch.device) -> Iterator[None]:
    """Put the random states of torch (CPU and `device`), numpy and Python back on exit."""
    devices = [device] if device.type == "cuda" else []
    with isolate_rng(include_cuda=False), torch.random.fork_rng(devices=devices):
        yield


def require_samples(callback: Callback, pl_module: LightningModule) -> Samples:
    """Return the module as one that can be sampled, or raise a TypeError that names the gap."""
    if not isinstance(pl_module, Samples):
        raise TypeError(
            f"{type(callback).__name__} needs a module with the methods sample(num, latents) and "
            f"fixed_latents(num, seed), got {type(pl_module).__name__}. Use MMDGAN, or add them."
        )
    return pl_module


def _is_last_update(trainer: Trainer) -> bool:
    """Whether ``max_epochs`` ends training here: then checkpoints still see the last observation.

    What is observed where ``max_steps`` ends it, between two multiples of N, is in no checkpoint: a
    training that goes on from there observes at the updates of one long training.
    """
    last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    return last_epoch and trainer.is_last_batch
