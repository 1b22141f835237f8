"""An exponential moving average of the generator's weights."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_mmd.batches import BatchParts
from lightning_mmd.callbacks.batches import batch_size
from lightning_mmd.callbacks.clock import Clocked
from lightning_mmd.callbacks.foreign import find_network
from lightning_mmd.internals import callbacks_of, set_callbacks
from lightning_mmd.module import MMDGAN
from lightning_mmd.passes import copy_network

__all__ = ["GeneratorEMA", "averaged_weights"]


class Average:
    """An average of a network's weights, in a network of its own.

    Weights of 16 bits are averaged in float32 beside it: the steps of a long average are smaller
    than their rounding.

    Attributes:
        network: The averaged network, in the dtypes of the live one.
        num: Averages taken so far.
    """

    def __init__(self, live: nn.Module) -> None:
        self.network = copy_network(live)
        self.num = 0
        self._wide: dict[str, Tensor] = {}

    @torch.no_grad()
    def suit(self, live: nn.Module) -> None:
        """Take the device and the dtypes that the trainer has given to the live network."""
        for own, other in zip(_tensors(self.network), _tensors(live), strict=True):
            own.data = own.data.to(other)

    @torch.no_grad()
    def update(self, live: nn.Module, weight: float) -> None:
        """Average parameters with the live ones, of some weight, and copy buffers.

        The first average is a copy.
        """
        parameters = zip(self.network.named_parameters(), live.parameters(), strict=True)
        for (name, own), other in parameters:
            if self.num == 0:
                own.copy_(other)
            elif own.is_floating_point() and own.element_size() < 4:
                wide = self._wide.setdefault(name, own.float()).to(own.device)
                self._wide[name] = wide.lerp_(other.float(), weight)
                own.copy_(wide)
            else:
                own.lerp_(other, weight)
        for own, other in zip(self.network.buffers(), live.buffers(), strict=True):
            own.copy_(other)
        self.num += 1

    def state_dict(self, weights: bool) -> dict[str, Any]:
        """Return the state, with the network's own weights or without."""
        state = {"num": self.num, "wide": {n: w.cpu() for n, w in self._wide.items()}}
        return {**state, "weights": self.network.state_dict()} if weights else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state that holds weights."""
        self.num, self._wide = state["num"], dict(state["wide"])
        self.network.load_state_dict(state["weights"])


class GeneratorEMA(Clocked):
    r"""Exponential moving average of the generator, on the clock of its own updates.

    .. math:: \bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta, \qquad
        d = 2^{-\Delta / \min(h,\, \rho t)}

    after each update of the generator, with :math:`\Delta` the updates (or images) since the last
    average, h the half-life, t the updates (or images) so far and :math:`\rho` the ramp, which
    keeps the start out of the average of a run that is not much longer than h. Updates are steps of
    the generator's optimizer, of any kind; batches on which only the critic moved change nothing.
    Parameters are averaged (in float32 at least), buffers copied; the critic is left alone. A
    second ``trainer.fit`` of the same trainer goes on.

    The average is used wherever samples are looked at: in `MMDGAN.sample`, and so in validation, by
    `SampleGrid`, by `MMDTracker`, and after training; in another LightningModule, whose generator
    has its weights swapped meanwhile, in validation and test and by these callbacks. Before the
    first update there is no average, and the live weights are used. The live weights are what
    training ends with and what ``state_dict`` of a checkpoint holds. `MMDGAN` saves the average
    beside it, and `MMDGAN.load_from_checkpoint(path).sample(n)` and ``lightning-mmd sample`` use
    it; for other modules it is in this callback's state. A resumed run goes on exactly. A module
    with two generators takes two callbacks.

    The callback puts itself before the others, so that they see the average of the same update.

    Args:
        half_life: Generator updates after which a weight counts half, > 0.
        half_life_images: The same in images (of the training batches, all processes), > 0, instead
            of ``half_life``.
        ramp: Largest ratio of the half-life to the run so far, > 0; ``None`` for no such limit.
        generator: Attribute of the LightningModule that holds the generator.
        batch: Where samples stand in a batch, to count images. Default: the module's own
            ``batch``, else first.

    Raises:
        ValueError: If a number is not positive; at set-up, if the module has no such attribute.

    Source:
        Karras et al. 2018, arXiv 1710.10196 (averaged generators); Karras et al. 2022, arXiv
        2206.00364 (half-life in images, ramp).

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_steps=400, callbacks=[GeneratorEMA(half_life=50)], logger=False)
    """

    waits_for_updates = True

    def __init__(
        self,
        half_life: float = 100.0,
        half_life_images: float | None = None,
        ramp: float | None = 0.1,
        generator: str = "generator",
        batch: BatchParts | None = None,
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
        self.batch = batch
        self._average: Average | None = None
        self._clock = self._averaged_at = 0.0  # in updates or images
        self._seen = 0  # updates at the last average
        self._swapped = False
        self._is_ours = False

    @property
    def state_key(self) -> str:
        return self._generate_state_key(generator=self.generator)

    def stretch(self, factor: int) -> None:
        """Let the average of shorter steps reach as far back in learning rates."""
        self.half_life *= factor
        if self.half_life_images is not None:
            self.half_life_images *= factor

    @property
    def averaged_generator(self) -> nn.Module | None:
        """The averaged generator, None before its first update."""
        if self._average is None or not self._average.num:
            return None
        return self._average.network

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        generator = self._live(pl_module)
        self._is_ours = isinstance(pl_module, MMDGAN)
        others = [callback for callback in callbacks_of(trainer) if callback is not self]
        set_callbacks(trainer, [self, *others])
        if self._average is None or (stage == "fit" and trainer.global_step == 0):
            self._forget(generator)
        self._swapped = False

    def _forget(self, generator: nn.Module) -> None:
        self._average = Average(generator)
        self._clock = self._averaged_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._average is not None:
            self._average.suit(self._live(pl_module))
        self._seen = self.updates
        self._hand_over(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        moved = self.updates - self._seen
        if self.half_life_images is not None:
            self._clock += batch_size(self, pl_module, batch, self.batch) * trainer.world_size
        else:
            self._clock += moved
        if not moved or self._average is None:
            return
        self._average.update(self._live(pl_module), 1.0 - self.decay)
        self._averaged_at = self._clock
        self._seen = self.updates
        self._hand_over(pl_module)

    @property
    def decay(self) -> float:
        """The factor d of the next average."""
        half_life = self.half_life if self.half_life_images is None else self.half_life_images
        if self.ramp is not None:
            half_life = min(half_life, self.ramp * self._clock)
        return 0.5 ** ((self._clock - self._averaged_at) / half_life) if half_life else 0.0

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
        super().on_exception(trainer, pl_module, exception)
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
        if isinstance(pl_module, MMDGAN) and self.averaged_generator is not None:
            pl_module.sample_with(self.averaged_generator)

    def _live(self, pl_module: LightningModule) -> nn.Module:
        find_network(self, pl_module, "generator", self.generator)
        return pl_module.get_submodule(self.generator)

    # State

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "clock": self._clock, "averaged_at": self._averaged_at}
        if self._average is not None and self._average.num:
            state["average"] = self._average.state_dict(weights=not self._is_ours)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._clock = state_dict["clock"]
        self._averaged_at = state_dict["averaged_at"]

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._forget(self._live(pl_module))
        state = checkpoint["callbacks"].get(self.state_key, {}).get("average")
        if state is None or self._average is None:
            return
        if isinstance(pl_module, MMDGAN):  # which saves and loads its averaged generator itself
            state = {**state, "weights": pl_module.saved_average}
        self._average.load_state_dict(state)
        self._hand_over(pl_module)


@contextmanager
def averaged_weights(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Look at a module through the averages of its generators, of which the trainer keeps some."""
    with ExitStack() as stack:
        for callback in callbacks_of(trainer):
            if isinstance(callback, GeneratorEMA):
                stack.enter_context(callback.averaged(pl_module))
        yield


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
