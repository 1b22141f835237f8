"""Noise in the gradient that moves the generator."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_mmd.callbacks.calls import Place, first_tensor, hangs_on, replace_tensor
from lightning_mmd.callbacks.clock import Clocked
from lightning_mmd.callbacks.foreign import (
    find_network,
    holds,
    optimizers_of,
    own_optimizer,
    require_whole_networks,
)
from lightning_mmd.callbacks.loggers import Log
from lightning_mmd.callbacks.observing import is_observed
from lightning_mmd.internals import callbacks_of
from lightning_mmd.module import MMDGAN
from lightning_mmd.noise import AdaptiveNoise, NoiseSchedule
from lightning_mmd.parameters import refuse_shared_parameters
from lightning_mmd.passes import Replay, Watch, counter_seed
from lightning_mmd.processes import mean_over_processes

__all__ = ["NoiseInjection", "ScheduledNoise"]


class ScheduledNoise(Clocked, ABC):
    """Noise whose level follows a schedule of generator updates."""

    def __init__(
        self, schedule: NoiseSchedule | AdaptiveNoise, generator: str, critic: str, seed: int
    ) -> None:
        if not isinstance(schedule, NoiseSchedule | AdaptiveNoise):
            raise TypeError(
                f"{type(self).__name__} needs a NoiseSchedule, such as HalvingNoise, or "
                f"AdaptiveNoise, got {type(schedule).__name__}. (PlateauNoise is for point_flow, "
                "which measures MMD^2 at every step.)"
            )
        self.schedule = schedule
        self.generator = generator
        self.critic = critic
        self.seed = seed
        self._handles: list[Any] = []

    @property
    def state_key(self) -> str:
        return self._generate_state_key(generator=self.generator, critic=self.critic)

    @abstractmethod
    def begin(self, pl_module: LightningModule, critic: nn.Module) -> list[Any]:
        """Hook onto the critic; return the hooks' handles."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_whole_networks(self, trainer)
        self._critic = find_network(self, pl_module, "critic", self.critic)
        generator = find_network(self, pl_module, "generator", self.generator)
        refuse_shared_parameters(self._critic, generator)
        if own_optimizer(trainer, generator) is None:
            raise ValueError(
                f"{type(self).__name__} counts the steps of the generator's optimizer, but 0 of "
                f"the {len(trainer.optimizers)} optimizers of {type(pl_module).__name__} hold "
                f"parameters of {self.generator!r}. Let configure_optimizers return one for it."
            )
        super().on_fit_start(trainer, pl_module)
        self._parameters = {id(p) for p in generator.parameters()}
        self._trainer = trainer
        self._rank = trainer.global_rank
        self._in_batch = False
        self._drawn_at, self._draws = -1, 0
        self._noise_seen = self._critic_moved = False  # since the generator's last update
        self._level = 0.0
        self._log = Log()
        self._handles = [
            *self.begin(pl_module, pl_module.get_submodule(self.critic)),
            *(
                optimizer.register_step_post_hook(self._note_critic_step)
                for optimizer in optimizers_of(trainer, self._critic)
                if not holds(optimizer, generator)
            ),
        ]

    def _note_critic_step(self, *_: Any) -> None:
        self._critic_moved = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = True
        self._updates_before = self.updates
        if self._scheduled_level() == 0:
            self._level = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = False
        if self.updates > self._updates_before:
            if self._critic_moved and not self._noise_seen and self._scheduled_level() > 0:
                self._refuse_a_hidden_call()
            self._noise_seen = self._critic_moved = False
        self._log.note(pl_module, {self.log_name("level"): self._level})
        self._log.send(trainer, self.updates)

    def log_name(self, name: str) -> str:
        """Return the name of a number in the log: with the critic's where there are several."""
        return f"noise/{name}" if self._is_alone else f"noise/{self.critic}/{name}"

    @property
    def _is_alone(self) -> bool:
        others = [c for c in callbacks_of(self._trainer) if isinstance(c, ScheduledNoise)]
        return len(others) == 1

    def _refuse_a_hidden_call(self) -> None:
        """Raise where critic and generator have moved, but no call of the critic took noise."""
        raise RuntimeError(
            f"{type(self).__name__} saw no call of the critic {self.critic!r} on samples of the "
            f"generator {self.generator!r} before update {self.updates} of the generator. The "
            f"module must call self.{self.critic}(...) itself, not a method or a part of it, on "
            "samples that are not detached."
        )

    def _scheduled_level(self) -> float:
        """Return the level now; of an adaptive schedule, the largest that it may take."""
        if isinstance(self.schedule, AdaptiveNoise):
            return self.schedule.largest
        return self.schedule.level(self.updates)

    def _draw(self, x: Tensor) -> Tensor:
        """Draw u ~ N(0, I) from :meth:`_next_source`."""
        return torch.randn(x.shape, generator=self._next_source(), dtype=x.dtype).to(x.device)

    def _next_source(self) -> torch.Generator:
        """Return random numbers that depend on seed, rank, update and the number of the draw."""
        if self._drawn_at != self.updates:
            self._drawn_at, self._draws = self.updates, 0
        counters = (self.seed, self._rank, self.updates, self._draws)
        self._draws += 1
        self._noise_seen = True
        return torch.Generator().manual_seed(counter_seed(*counters))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log.send(trainer, self.updates, last=True)
        super().on_fit_end(trainer, pl_module)
        self._release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class NoiseInjection(ScheduledNoise):
    r"""Evaluates the critic's gradient that moves the generator at noisy samples.

    .. math:: \theta \mathrel{+}= \eta\, \frac1n \sum_i J_\theta G(z_i)^T
        \nabla f\big(G_\theta(z_i) + \beta_t u_i\big), \qquad u_i \sim N(0, I)

    and nothing else changes: the critic's values, losses, its own updates, penalties of its
    gradients and, in ``MMDGAN``, the closed-form witness see clean samples. It helps a flow out of
    places where the clean gradient vanishes. The gradient of any other loss of f gets
    :math:`\nabla f` likewise, with the loss's own weights at the clean values.

    How: where a module calls its critic on samples that hang on the generator's parameters, the
    gradient that comes back through the critic is replaced on its way to the generator. That costs
    one more forward and backward pass of the critic. ``MMDGAN`` follows :math:`J^T` of the
    gradients of the rule's witness at noisy samples; while there is noise, the closed form's
    certificate logs no prediction and its trust region rests.

    With ``AdaptiveNoise`` the level is the largest at which, for the very draw of the step and the
    samples of all processes,

    .. math:: 4 \sum_j \|\nabla f(y_j + \beta u_j) - \nabla f(y_j)\|^2
        \le \sum_j \|\nabla f(y_j + \beta u_j)\|^2,

    which is what that schedule's bound is there to imply: the noisy direction then makes at least
    half of its squared length in descent, :math:`\langle\nabla f, v\rangle \ge \|v\|^2 / 2`, were
    the samples free to move. Measured, it needs no constant of a kernel; one evaluation a level.
    The generator's parametrisation weighs samples by its own tangent kernel, so it is no guarantee
    for the parameters.

    The critic's inputs may be given by position or by keyword, with others beside them, or be made
    of several (pairs): noise is on the first tensor that hangs on the generator's parameters. It
    may return several tensors. Updates in which it has no part, such as pretraining, stay clean.

    Updates of the generator are counted by steps of its optimizer (``trainer.global_step`` in
    ``MMDGAN``), saved and resumed. u is a function of (seed, rank, update). Logged on that axis:
    ``noise/level``, that of the last update; ``noise/<critic>/level`` where there are two such
    callbacks.

    Args:
        schedule: Level beta_t by generator updates.
        generator: Attribute of the LightningModule that holds the generator, maybe dotted.
        critic: Likewise, the critic.
        seed: Of the noise.

    Raises:
        ValueError: When fitting begins, if the attributes or the generator's optimizer are not
            found.
        RuntimeError: If critic and generator move and no call of the critic took noise.

    Source:
        Arbel et al. 2019, arXiv 1906.04370, noise injection.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_mmd.noise import HalvingNoise
        >>> noise = NoiseInjection(HalvingNoise(0.03, every=500, until=2000))
        >>> trainer = Trainer(callbacks=[noise], logger=False)
    """

    def __init__(
        self,
        schedule: NoiseSchedule | AdaptiveNoise,
        generator: str = "generator",
        critic: str = "critic",
        seed: int = 0,
    ) -> None:
        super().__init__(schedule, generator, critic, seed)

    def begin(self, pl_module: LightningModule, critic: nn.Module) -> list[Any]:
        self._call: _CriticCall | None = None
        if isinstance(pl_module, MMDGAN):
            return [pl_module.register_gradient_hook(Watch(self._noisy_gradient))]
        return [
            critic.register_forward_pre_hook(Watch(self._before_critic), with_kwargs=True),
            critic.register_forward_hook(Watch(self._after_critic)),
        ]

    def _noisy_gradient(self, x: Tensor, gradient_at: Callable[[Tensor], Tensor]) -> Tensor | None:
        if self._scheduled_level() == 0:
            return None
        u = self._draw(x)
        if isinstance(self.schedule, AdaptiveNoise):
            clean = gradient_at(x)

            def fits(level: float) -> bool:
                noisy = gradient_at(x + level * u)
                sums = [(noisy - clean).square().sum(), noisy.square().sum()]
                changed, whole = mean_over_processes(self._trainer, torch.stack(sums))
                return bool(4 * changed <= whole)

            self._level = self.schedule.search(fits)
        else:
            self._level = self.schedule.level(self.updates)
        return gradient_at(x + self._level * u)

    def _before_critic(
        self, critic: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        self._call = None
        if not (self._in_batch and torch.is_grad_enabled()) or is_observed():
            return None
        if self._scheduled_level() == 0:
            return None
        place = first_tensor(args, kwargs, lambda x: hangs_on(x, self._parameters))
        if place is None:
            return None
        call = self._call = _CriticCall(self._critic, args, kwargs, place)
        clean = place.tensor
        x = clean.clone()

        def replace(gradient: Tensor) -> Tensor | None:
            if torch.is_grad_enabled() or not call.cotangents:
                return None  # create_graph=True: a penalty of the critic's gradient
            noisy = self._noisy_gradient(clean.detach(), call.gradient_at)
            return None if noisy is None else noisy.to(gradient.dtype)

        x.register_hook(replace)
        return replace_tensor(args, kwargs, place, x)

    def _after_critic(self, critic: nn.Module, args: tuple, output: Any) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.watch(output)


class _CriticCall:
    """One call of a critic: its inputs and circumstances, to be repeated at other samples."""

    def __init__(self, critic: nn.Module, args: tuple, kwargs: dict, place: Place) -> None:
        device = place.tensor.device
        self._values = {n: p.detach() for n, p in critic.named_parameters()}
        self._args, self._kwargs, self._place = args, kwargs, place
        self._replay = Replay(critic, device)
        self._autocast = torch.autocast(
            device.type,
            dtype=torch.get_autocast_dtype(device.type),
            enabled=torch.is_autocast_enabled(device.type),
        )
        self.cotangents: dict[int, Tensor] = {}

    def watch(self, output: Any) -> None:
        """Keep the loss's gradients in what the critic returned: a tensor, or several of them."""
        for index, part in enumerate(tree_flatten(output)[0]):
            if isinstance(part, Tensor) and part.requires_grad:
                part.register_hook(functools.partial(self._note, index))

    def _note(self, index: int, gradient: Tensor) -> None:
        self.cotangents[index] = gradient

    def gradient_at(self, samples: Tensor) -> Tensor:
        """Return J_f(x)^T c at other samples x, with the buffers and dropout masks of this call."""
        x = samples.detach().requires_grad_()
        args, kwargs = replace_tensor(self._args, self._kwargs, self._place, x)
        with torch.enable_grad(), self._autocast:
            output = self._replay(*args, replacements=self._values, **kwargs)
            parts = tree_flatten(output)[0]
            return torch.autograd.grad(
                [parts[index] for index in self.cotangents], x, list(self.cotangents.values())
            )[0]
