"""When a callback looks at the model: counted in generator updates."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_mmd.callbacks.clock import Clocked, called_networks, usual_name
from lightning_mmd.callbacks.ema import averaged_weights
from lightning_mmd.callbacks.foreign import find_network
from lightning_mmd.callbacks.observing import observing
from lightning_mmd.latents import Inputs, as_inputs, select

__all__ = ["GeneratorCadence", "Samples", "Sampling", "require_samples"]


@runtime_checkable
class Samples(Protocol):
    """A module that can be sampled: `MMDGAN`, or any LightningModule with these three members."""

    @property
    def device(self) -> torch.device:
        """Device of the samples."""
        ...

    def sample(self, num: int, latents: Any = None) -> Tensor:
        """Return `num` samples, shape (num, ...), without gradient, in evaluation mode."""
        ...

    def fixed_latents(self, num: int, seed: int) -> Inputs:
        """Return `num` latents that depend on `seed` only, alone or in a tuple with labels."""
        ...


class Sampling:
    """How a callback samples from a module.

    Args:
        callback: Who samples; errors name it.
        module: A LightningModule with `Samples`' members.
        sampler: The method that samples.
        output: From what the method returns to a tensor of samples; None where it returns one.

    Attributes:
        device: Device of the samples.
        num_classes: Number of classes that the module's latents ask for; None where they do not.
    """

    def __init__(
        self,
        callback: Callback,
        module: LightningModule,
        sampler: str = "sample",
        output: Callable | None = None,
    ) -> None:
        self._callback, self._output = callback, output
        self._sample: Any = getattr(module, sampler)
        self._fixed_latents: Any = cast_samples(module).fixed_latents
        self.device = module.device
        latents = getattr(module, "latents", None)
        self.num_classes: int | None = getattr(latents, "num_classes", None)

    def fixed_latents(self, num: int, seed: int) -> tuple[Tensor, ...]:
        """Return what `num` samples are made of, a function of the seed: latents, and labels."""
        return as_inputs(self._fixed_latents(num, seed))

    @torch.no_grad()
    def sample(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return samples.

        Args:
            inputs: Latents of n rows, and labels.

        Returns:
            Tensor of shape (n, ...).

        Raises:
            TypeError: If the module's method does not return a tensor of n rows.
        """
        latents, *labels = inputs
        num = len(latents)
        samples = self._sample(num, inputs if labels else latents)
        samples = samples if self._output is None else self._output(samples)
        if not isinstance(samples, Tensor) or samples.ndim == 0 or len(samples) != num:
            got = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
            raise TypeError(
                f"{type(self._callback).__name__} needs a tensor of {num} samples from the "
                f"module's sample(), got {got}. Set generator_output to a function that takes the "
                "samples out of it."
            )
        return samples

    def in_parts(self, inputs: tuple[Tensor, ...], size: int) -> Iterator[Tensor]:
        """Yield samples, at most `size` at a time."""
        for start in range(0, len(inputs[0]), size):
            yield self.sample(select(inputs, slice(start, start + size)))


class GeneratorCadence(Clocked, ABC):
    """A callback that observes samples before the first generator update, every N, and at the end.

    Updates are those of the named generator, in any module (`GeneratorClock`): ``global_step`` in
    `MMDGAN`, the steps of the generator's optimizer elsewhere. A batch on which only the critic
    stepped changes nothing. Each update is observed at most once, in a resumed run too. Observing
    leaves the random number generators of torch, numpy and Python as they were, and nothing draws
    noise meanwhile, so training is the same with and without the callback. Samples are of the
    averaged weights where `GeneratorEMA` keeps some.

    Args:
        every_n_steps: Generator updates between observations, at least 1.
        generator: Attribute of the LightningModule that holds the generator. Default: the usual
            names, else the network that the module's ``sample`` calls.
        generator_output: Callable from what the module's ``sample`` returns to a tensor of samples.
        sampler: Name of the module's method that samples, to tell several generators apart.

    Raises:
        ValueError: If `every_n_steps` is less than 1.
        TypeError: At set-up, if the module cannot be sampled.
    """

    waits_for_updates = True
    onlooker = True
    """Whether training is the same without the callback."""

    def __init__(
        self,
        every_n_steps: int,
        generator: str | None = None,
        generator_output: Callable | None = None,
        sampler: str = "sample",
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"{type(self).__name__} needs every_n_steps of at least 1, got {every_n_steps}. It "
                "counts generator updates; remove the callback to observe none."
            )
        self.every_n_steps = every_n_steps
        self.generator = generator
        self.generator_output = generator_output
        self.sampler = sampler
        self.last_step: int | None = None
        self._seen = 0  # updates at the end of the last batch
        self.stride = 1  # updates that the last batch that made any made

    @property
    def state_key(self) -> str:
        return self._generate_state_key(generator=self.generator, sampler=self.sampler)

    @abstractmethod
    def observe(self, trainer: Trainer, model: Sampling) -> None:
        """Look at the model after ``self.updates`` generator updates; called on every rank."""

    def reset(self) -> None:
        """Forget an earlier run; called when a new one begins, not a resumed one."""
        self.last_step = None

    def stretch(self, factor: int) -> None:
        """Let a run with steps of 1 / factor of their length be observed at the same times."""
        self.every_n_steps *= factor

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.sampling(pl_module)

    def sampling(self, pl_module: LightningModule) -> Sampling:
        """Return how this callback samples from the module; raise a TypeError where it cannot."""
        require_samples(self, pl_module, self.sampler)
        return Sampling(self, pl_module, self.sampler, self.generator_output)

    def find_generator(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        name = self.generator or usual_name(pl_module)
        if name is not None:
            return find_network(self, pl_module, "generator", name)
        with observing(pl_module.device), called_networks(pl_module) as called:
            model = self.sampling(pl_module)
            model.sample(model.fixed_latents(2, 0))
        if not called and len(trainer.optimizers) == 1:
            return pl_module  # whatever it is that is trained
        if not called:
            find_network(self, pl_module, "generator", "generator")  # raises, with all names
        return called[0] if len(called) == 1 else nn.ModuleList(called)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if trainer.global_step == 0:  # a new run, not a resumed one
            self.reset()
        self._seen = self.updates
        if self.updates % self.every_n_steps == 0:
            self._observe_once(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        before, self._seen = self._seen, self.updates
        self.stride = max(self._seen - before, 1) if self._seen != before else self.stride
        passed = self._seen // self.every_n_steps > before // self.every_n_steps
        if passed or _is_last_update(trainer):
            self._observe_once(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._observe_once(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.last_step = state_dict["last_step"]

    def _observe_once(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.updates == self.last_step:
            return
        with self._looking(trainer, pl_module) as model:
            self.observe(trainer, model)
        self.last_step = self.updates

    @contextmanager
    def _looking(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[Sampling]:
        """Look at the averaged model, and leave no trace."""
        with observing(pl_module.device), averaged_weights(trainer, pl_module):
            yield self.sampling(pl_module)


def cast_samples(module: Any) -> Samples:
    """Return a module as what can be sampled."""
    return module


def require_samples(
    callback: Callback, pl_module: LightningModule, sampler: str = "sample"
) -> Samples:
    """Return the module as one that can be sampled, or raise a TypeError that names the gap."""
    if not (callable(getattr(pl_module, sampler, None)) and hasattr(pl_module, "fixed_latents")):
        raise TypeError(
            f"{type(callback).__name__} needs a module with the methods {sampler}(num, latents) "
            f"and fixed_latents(num, seed), got {type(pl_module).__name__}. Use MMDGAN, or add "
            "them."
        )
    return cast_samples(pl_module)


def _is_last_update(trainer: Trainer) -> bool:
    """Whether ``max_epochs`` ends training here: then checkpoints still see the last observation.

    What is observed where ``max_steps`` ends it, between two multiples of N, is in no checkpoint: a
    training that goes on from there observes at the updates of one long training.
    """
    last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    return last_epoch and trainer.is_last_batch
