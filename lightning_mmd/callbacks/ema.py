"""An exponential moving average of the generator's weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_mmd.callbacks.foreign import find_network
from lightning_mmd.internals import callbacks_of, set_callbacks
from lightning_mmd.module import MMDGAN

__all__ = ["GeneratorEMA", "averaged_weights"]


class GeneratorEMA(Callback):
    r"""Exponential moving average of the generator, on the clock of its own updates.

    .. math:: \bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta, \qquad
        d = 2^{-\Delta / \min(h,\, \rho t)}

    after each update of the generator, with :math:`\Delta` the updates (or images) since the last
    average, h the half-life, t the updates (or images) so far and :math:`\rho` the ramp, which
    keeps the start out of the average of a run that is not much longer than h. Batches on which
    only the critic moved change nothing. Parameters are averaged, buffers copied; the critic is
    left alone.

    The average is used wherever samples are looked at: in `MMDGAN.sample`, and so in validation, by
    `SampleGrid`, by `MMDTracker`, and after training; in another LightningModule, whose generator
    has its weights swapped meanwhile, in validation and test and by these callbacks. Before the
    first update there is no average, and the live weights are used. The live weights are what
    training ends with and what ``state_dict`` of a checkpoint holds; the average is beside it,
    under ``averaged_generator``, and `MMDGAN.load_from_checkpoint(path).sample(n)` and
    ``lightning-mmd sample`` use it. A resumed run goes on exactly.

    The callback puts itself before the others, so that they see the average of the same update.

    Args:
        half_life: Generator updates after which a weight counts half, > 0.
        half_life_images: The same in images (of the training batches, all processes), > 0, instead
            of ``half_life``.
        ramp: Largest ratio of the half-life to the run so far, > 0; ``None`` for no such limit.
        generator: Attribute of the LightningModule that holds the generator.

    Raises:
        ValueError: If a number is not positive; at set-up, if the module has no such attribute.

    Source:
        Karras et al. 2018, arXiv 1710.10196 (averaged generators); Karras et al. 2022, arXiv
        2206.00364 (half-life in images, ramp).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=400, callbacks=[GeneratorEMA(half_life=50)], logger=False)
    """

    def __init__(
        self,
        half_life: float = 100.0,
        half_life_images: float | None = None,
        ramp: float | None = 0.1,
        generator: str = "generator",
    ) -> None:
        for name, value in (
            ("half_life", half_life),
            ("half_life_images", half_life_images),
            ("ramp", ramp),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"GeneratorEMA needs {name} > 0, got {value}.")
        self.half_life = half_life
        self.half_life_images = half_life_images
        self.ramp = ramp
        self.generator = generator
        self._average: AveragedModel | None = None
        self._clock = self._averaged_at = 0.0  # in updates or images
        self._version = 0
        self._swapped = False

    def stretch(self, factor: int) -> None:
        """Let the average of shorter steps reach as far back in learning rates."""
        self.half_life *= factor
        if self.half_life_images is not None:
            self.half_life_images *= factor

    @property
    def averaged_generator(self) -> nn.Module | None:
        """The averaged generator, None before its first update."""
        if self._average is None or not self._average.n_averaged:
            return None
        return self._average.module

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        generator = self._live(pl_module)
        others = [callback for callback in callbacks_of(trainer) if callback is not self]
        set_callbacks(trainer, [self, *others])
        if stage == "fit" or self._average is None:
            self._average = AveragedModel(generator, multi_avg_fn=self._lerp)
            self._clock = self._averaged_at = 0.0
        self._swapped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._average is not None:
            self._average.to(pl_module.device)
        self._version = _version(self._live(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        generator = self._live(pl_module)
        version = _version(generator)
        moved = version != self._version
        if self.half_life_images is not None:
            self._clock += extract_batch_size(batch) * trainer.world_size
        elif moved:
            self._clock += 1
        if not moved or self._average is None:
            return
        self._average.update_parameters(generator)
        self._averaged_at = self._clock
        self._version = version
        self._hand_over(pl_module)

    @property
    def decay(self) -> float:
        """The factor d of the next average."""
        half_life = self.half_life if self.half_life_images is None else self.half_life_images
        if self.ramp is not None:
            half_life = min(half_life, self.ramp * self._clock)
        return 0.5 ** ((self._clock - self._averaged_at) / half_life)

    def _lerp(self, averaged: Any, live: Any, num_averaged: Tensor | int) -> None:
        for a, b in zip(averaged, live, strict=True):
            a.lerp_(b, 1.0 - self.decay)

    # Where the average is used

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module, True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module, False)

    on_test_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_validation_epoch_end

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._swap(pl_module, False)  # a checkpoint of the exception is saved after this

    @contextmanager
    def averaged(self, pl_module: LightningModule) -> Iterator[None]:
        """Let a module that is not `MMDGAN` generate with the averaged weights meanwhile."""
        before = self._swapped
        self._swap(pl_module, True)
        try:
            yield
        finally:
            self._swap(pl_module, before)

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule, averaged: bool) -> None:
        average = self.averaged_generator
        if average is None or averaged == self._swapped or isinstance(pl_module, MMDGAN):
            return
        live = self._live(pl_module)
        for a, b in zip(_tensors(average.to(pl_module.device)), _tensors(live), strict=True):
            a.data, b.data = b.data, a.data
        self._swapped = averaged

    def _hand_over(self, pl_module: LightningModule) -> None:
        if isinstance(pl_module, MMDGAN):
            pl_module.sample_with(self.averaged_generator)

    def _live(self, pl_module: LightningModule) -> nn.Module:
        find_network(self, pl_module, "generator", self.generator)
        return pl_module.get_submodule(self.generator)

    # State

    def state_dict(self) -> dict[str, Any]:
        return {"clock": self._clock, "averaged_at": self._averaged_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._clock = state_dict["clock"]
        self._averaged_at = state_dict["averaged_at"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.averaged_generator is not None and self._average is not None:
            checkpoint["averaged_generator"] = self.averaged_generator.state_dict()
            checkpoint["num_averaged"] = int(self._average.n_averaged)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._average is not None and "averaged_generator" in checkpoint:
            self._average.module.load_state_dict(checkpoint["averaged_generator"])
            self._average.n_averaged.fill_(checkpoint["num_averaged"])
            self._hand_over(pl_module)


@contextmanager
def averaged_weights(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Look at a module through the average of its generator, if the trainer keeps one."""
    averages = [c for c in callbacks_of(trainer) if isinstance(c, GeneratorEMA)]
    if not averages:
        yield
        return
    with averages[0].averaged(pl_module):
        yield


def _version(generator: nn.Module) -> int:
    """Return how often parameters were written to: it rises when an optimizer moves them."""
    return sum(p._version for p in generator.parameters())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
