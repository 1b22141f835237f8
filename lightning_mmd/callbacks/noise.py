"""Noise in the gradient that moves the generator."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mmd.callbacks.foreign import (
    find_network,
    optimizers_of,
    require_whole_networks,
)
from lightning_mmd.module import MMDGAN
from lightning_mmd.noise import AdaptiveNoise, NoiseSchedule
from lightning_mmd.parameters import refuse_shared_parameters
from lightning_mmd.passes import Replay, counter_seed
from lightning_mmd.processes import mean_over_processes

__all__ = ["NoiseInjection", "ScheduledNoise"]


class ScheduledNoise(Callback, ABC):
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
        self.updates = 0
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
        optimizers = optimizers_of(trainer, generator)
        if len(optimizers) != 1:
            raise ValueError(
                f"{type(self).__name__} counts the steps of the generator's one optimizer, but "
                f"{len(optimizers)} of the {len(trainer.optimizers)} optimizers of "
                f"{type(pl_module).__name__} hold parameters of {self.generator!r}. Let "
                "configure_optimizers return one for it."
            )
        self._parameters = {id(p) for p in generator.parameters()}
        self._trainer = trainer
        self._rank = trainer.global_rank
        self._in_batch = False
        self._draws = 0
        self._level = 0.0
        self._handles = [
            optimizers[0].register_step_post_hook(self._count),
            *self.begin(pl_module, pl_module.get_submodule(self.critic)),
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:  # a new run, not a resumed one
            self.updates = 0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = True
        if isinstance(pl_module, MMDGAN):
            self.updates = trainer.global_step
        if self._scheduled_level() == 0:
            self._level = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._in_batch = False
        pl_module.log("noise/level", self._level)

    def _count(self, optimizer: Optimizer, *_: Any) -> None:
        if self._scheduled_level() > 0 and self._draws == 0:
            raise RuntimeError(
                f"{type(self).__name__} saw no call of the critic {self.critic!r} on samples of "
                f"the generator {self.generator!r} before update {self.updates} of the generator. "
                f"The module must call self.{self.critic}(...) itself, not a method or a part of "
                "it, on samples that are not detached."
            )
        self.updates += 1
        self._draws = 0

    def _scheduled_level(self) -> float:
        """Return the level now; of an adaptive schedule, the largest that it may take."""
        if isinstance(self.schedule, AdaptiveNoise):
            return self.schedule.largest
        return self.schedule.level(self.updates)

    def _draw(self, x: Tensor) -> Tensor:
        """Draw u ~ N(0, I), a function of seed, rank, update and the number of the draw in it."""
        counters = (self.seed, self._rank, self.updates, self._draws)
        self._draws += 1
        rng = torch.Generator().manual_seed(counter_seed(*counters))
        return torch.randn(x.shape, generator=rng, dtype=x.dtype).to(x.device)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]


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

    Updates of the generator are counted by steps of its optimizer (``trainer.global_step`` in
    ``MMDGAN``), saved and resumed. u is a function of (seed, rank, update). Logged:
    ``noise/level``, that of the last update.

    Args:
        schedule: Level beta_t by generator updates.
        generator: Attribute of the LightningModule that holds the generator, maybe dotted.
        critic: Likewise, the critic.
        seed: Of the noise.

    Raises:
        ValueError: When fitting begins, if the attributes or the generator's optimizer are not
            found.
        TypeError: In the first step, if the critic does not return a tensor.
        RuntimeError: If the generator is updated without a gradient through the critic.

    Source:
        Arbel et al. 2019, arXiv 1906.04370, noise injection.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_mmd.noise import HalvingNoise
        >>> noise = NoiseInjection(HalvingNoise(0.1, every=500, until=2000))
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
            return [pl_module.register_gradient_hook(self._noisy_gradient)]
        return [
            critic.register_forward_pre_hook(self._before_critic, with_kwargs=True),
            critic.register_forward_hook(self._after_critic),
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
        if not (self._in_batch and args and isinstance(args[0], Tensor)):
            return None
        if not (torch.is_grad_enabled() and self._hangs_on_generator(args[0])):
            return None
        if self._scheduled_level() == 0:
            return None
        call = self._call = _CriticCall(self._critic, args, kwargs)
        x = args[0].clone()

        def replace(gradient: Tensor) -> Tensor | None:
            if torch.is_grad_enabled():  # create_graph=True: a penalty of the critic's gradient
                return None
            noisy = self._noisy_gradient(args[0].detach(), call.gradient_at)
            return None if noisy is None else noisy.to(gradient.dtype)

        x.register_hook(replace)
        return (x, *args[1:]), kwargs

    def _after_critic(self, critic: nn.Module, args: tuple, output: Any) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        if not isinstance(output, Tensor):
            raise TypeError(
                f"NoiseInjection needs a critic that returns a tensor, but {self.critic!r} returns "
                f"{type(output).__name__}. Name the part of it that does, if there is one."
            )
        output.register_hook(call.note_cotangent)

    def _hangs_on_generator(self, x: Tensor) -> bool:
        """Whether the graph of x leads to a parameter of the generator."""
        waiting = [] if x.grad_fn is None else [x.grad_fn]
        visited = set(waiting)
        while waiting:
            node = waiting.pop()
            if id(getattr(node, "variable", None)) in self._parameters:
                return True
            following = {n for n, _ in node.next_functions if n is not None} - visited
            visited |= following
            waiting += following
        return False


class _CriticCall:
    """One call of a critic: its inputs and circumstances, to be repeated at other samples."""

    def __init__(self, critic: nn.Module, args: tuple, kwargs: dict) -> None:
        device = args[0].device
        self._values = {n: p.detach() for n, p in critic.named_parameters()}
        self._others, self._kwargs = args[1:], kwargs
        self._replay = Replay(critic, device)
        self._autocast = torch.autocast(
            device.type,
            dtype=torch.get_autocast_dtype(device.type),
            enabled=torch.is_autocast_enabled(device.type),
        )

    def note_cotangent(self, gradient: Tensor) -> None:
        """Keep the loss's gradient in the critic's values."""
        self._cotangent = gradient

    def gradient_at(self, samples: Tensor) -> Tensor:
        """Return J_f(x)^T c at other samples x, with the buffers and dropout masks of this call."""
        x = samples.detach().requires_grad_()
        with torch.enable_grad(), self._autocast:
            output = self._replay(x, *self._others, replacements=self._values, **self._kwargs)
            return torch.autograd.grad(output, x, self._cotangent)[0]
