"""What an update rule plays with: two players, a batch, latents, and other processes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lightning_mmd.latents import Inputs, as_inputs
from lightning_mmd.parameters import (
    flatten,
    plain_name,
    refuse_shared_parameters,
    trainable_parameters,
    unflatten,
)
from lightning_mmd.passes import full_precision

__all__ = [
    "DivergedError",
    "FlowDescent",
    "Game",
    "GradientHook",
    "Player",
    "Processes",
    "UpdateRule",
    "check_weights",
]

GradientHook = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor | None]
"""From samples x, and the gradient that samples follow as a function of samples, to the gradients
to follow instead; None to leave a step alone."""


class DivergedError(RuntimeError):
    """Training has diverged: a value is not finite. The first argument names the value."""


class Stepper(Protocol):
    """An optimizer, or what Lightning wraps it in."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def step(self) -> Any: ...
    def zero_grad(self) -> Any: ...


class FlowDescent(torch.optim.SGD):
    """Gradient descent whose learning rate is a time of the flow.

    Its unit is alpha + beta / lambda_max(J J^T). It is the own optimizer of `ClosedForm`, which
    multiplies its steps by that.
    """


@dataclass
class Player:
    """A network, the parameters of it that move, and how they move.

    A gradient is one flat vector of shape (P,), in the order of ``parameters``.

    Args:
        name: ``generator`` or ``critic``; errors and logs use it.
        network: The network.
        parameters: The parameters that move, by name.
        optimizer: Optimizer of these parameters; None where there are none.
        schedulers: Learning-rate schedulers, stepped after each update.
        clip_norm: Largest norm of the gradient, > 0; None for no clipping.

    Attributes:
        cumulative_lr: Sum of the learning rates of all steps so far, scaled like the steps.
    """

    name: str
    network: nn.Module
    parameters: dict[str, nn.Parameter]
    optimizer: Stepper | None
    schedulers: Sequence[LRScheduler] = ()
    clip_norm: float | None = None
    cumulative_lr: float = 0.0

    @property
    def learning_rate(self) -> float:
        """The learning rate of the optimizer's first group; 0 without an optimizer."""
        return 0.0 if self.optimizer is None else float(self.optimizer.param_groups[0]["lr"])

    @property
    def moves_in_flow_time(self) -> bool:
        """Whether the learning rate is a time of the flow, see `FlowDescent`."""
        return isinstance(getattr(self.optimizer, "optimizer", self.optimizer), FlowDescent)

    @property
    def is_gradient_descent(self) -> bool:
        """Whether a step is lr times the gradient and nothing else: plain SGD, no clipping."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        plain = type(optimizer) is torch.optim.SGD or self.moves_in_flow_time
        if not plain or self.clip_norm is not None:
            return False
        first, *others = optimizer.param_groups
        changed = ("momentum", "weight_decay", "maximize", "nesterov", "dampening")
        return not others and not any(first[name] for name in changed)

    def gradient(
        self, loss: Tensor, retain_graph: bool = False, onto: Tensor | None = None
    ) -> Tensor:
        """Return the gradient of a loss in the parameters, (P,); zero where it does not depend.

        Args:
            loss: A scalar.
            retain_graph: Whether its graph is needed again.
            onto: A gradient to add it to, in place.
        """
        values = list(self.parameters.values())
        if not (values and loss.requires_grad):
            zero = loss.new_zeros(sum(p.numel() for p in values))
            return zero if onto is None else onto
        with full_precision(loss.device):  # the reverse pass of a penalty obeys autocast too
            parts = torch.autograd.grad(
                loss,
                values,
                retain_graph=retain_graph,
                materialize_grads=onto is None,
                allow_unused=True,
            )
        if onto is None:
            return flatten(parts)
        for total, part in zip(onto.split([p.numel() for p in values]), parts, strict=True):
            if part is not None:
                total.add_(part.reshape(-1))
        return onto

    def step(self, gradient: Tensor, scale: float = 1.0) -> Tensor:
        """Clip, scale and follow a gradient downwards; step the schedulers.

        Args:
            gradient: Vector of shape (P,), the same on all processes.
            scale: Factor on the gradient, after clipping.

        Returns:
            The gradient's norm before clipping and scaling.

        Raises:
            DivergedError: If it is not finite; then nothing moves.
        """
        norm = gradient.norm()
        if not norm.isfinite():
            raise DivergedError(f"the gradient of the {self.name}")
        if self.optimizer is None:
            return norm
        if self.clip_norm is not None:
            gradient = gradient * (self.clip_norm / norm).clamp(max=1.0)
        if scale != 1:
            gradient = gradient * scale
        for name, part in unflatten(gradient, self.parameters).items():
            self.parameters[name].grad = part
        self.cumulative_lr += scale * self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        for scheduler in self.schedulers:
            scheduler.step()
        return norm

    def copies(self) -> list[Tensor]:
        """Return copies of the parameters' values."""
        return [p.detach().clone() for p in self.parameters.values()]

    @torch.no_grad()
    def put_back(self, copies: Iterable[Tensor]) -> None:
        """Give the parameters earlier values."""
        for p, value in zip(self.parameters.values(), copies, strict=True):
            p.copy_(value)


class Processes:
    """What the processes that train one model do together; this one is alone."""

    rank = 0
    size = 1

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over processes."""
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, of shape (size, ...), without a graph."""
        return tensor.detach()[None]


@dataclass
class Game:
    """One batch, and everything that an update rule needs to play it.

    A plain loop makes one a batch::

        players = Player("generator", ...), Player("critic", ...)
        for step, real in enumerate(batches):
            metrics = rule.update(Game(*players, real, draw, step=step))

    Args:
        generator: The generator.
        critic: The critic.
        real: Real samples (n, ...) of this process, or a tuple of them and their labels.
        draw: Callable from n to latents for n samples, see :class:`~lightning_mmd.latents.Latents`.
        step: Number of batches before this one.
        moves_generator: Whether the generator moves too.
        micro_batches: Parts that the batch is evaluated in, one at a time in memory, >= 1.
        processes: Those that train together; a batch is a share of theirs.
        hooks: What may change the gradients that generated samples follow, see
            :data:`GradientHook`.
        pairs: Whether the i-th generated sample gets the label of the i-th real one. Default: as
            ``draw.paired`` says, see `LabelledLatents`.
    """

    generator: Player
    critic: Player
    real: Inputs
    draw: Callable[[int], Any]
    _: KW_ONLY
    step: int = 0
    moves_generator: bool = True
    micro_batches: int = 1
    processes: Processes = field(default_factory=Processes)
    hooks: Sequence[GradientHook] = ()
    pairs: bool | None = None

    @property
    def paired(self) -> bool:
        """Whether the i-th generated sample has the label of the i-th real one."""
        return bool(getattr(self.draw, "paired", False) if self.pairs is None else self.pairs)

    @property
    def images(self) -> Tensor:
        """The real samples, without labels."""
        return as_inputs(self.real)[0]

    @property
    def batch_size(self) -> int:
        """Number n of real samples on this process."""
        return len(self.images)

    def latents(self) -> tuple[Tensor, ...]:
        """Draw what the generator is called with, for as many samples as are real."""
        z = as_inputs(self.draw(self.batch_size))
        return (z[0], *self.target(z)[1:]) if self.paired else z

    def target(self, latents: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the real samples, with labels where the latents carry them.

        Raises:
            ValueError: If the batch has fewer labels than the latents.
        """
        real, labels = as_inputs(self.real), len(latents) - 1
        if len(real) <= labels:
            raise ValueError(
                f"the latents carry {labels} label tensor(s), but a batch has {len(real) - 1}. Let "
                "the data give (images, labels), or draw latents without labels."
            )
        return real[: 1 + labels]

    def moved(self, samples: Tensor, gradient_at: Callable[[Tensor], Tensor]) -> Tensor | None:
        """Ask the hooks for gradients to follow in place of ``gradient_at(samples)``.

        Each hook sees, as the function of samples, what the ones before it made of it.

        Returns:
            Gradients of the samples' shape, or None where all hooks leave the step alone.
        """
        changed: Tensor | None = None
        for hook in self.hooks:
            result = hook(samples.detach(), gradient_at)
            changed = changed if result is None else result
        return changed

    def check_samples(self, fake: Tensor) -> None:
        """Check that generated samples are of the data's dtype and shape.

        Raises:
            ValueError: If they are not.
        """
        real = self.images
        if real.dtype != fake.dtype:
            raise ValueError(
                f"the data are {real.dtype}, but the generator makes {fake.dtype}. Convert the "
                "data, or set the trainer's precision (for example '64-true')."
            )
        if real.shape[1:] != fake.shape[1:]:
            raise ValueError(
                f"the data have samples of shape {tuple(real.shape[1:])}, but the generator makes "
                f"{tuple(fake.shape[1:])}. Give the generator that shape, or resize the data."
            )


class UpdateRule(ABC):
    """How generator and critic move, given a batch: a training algorithm without its loop.

    A rule is a dataclass of its own arguments; what it carries from one batch to the next is its
    state. It needs torch only: `MMDGAN` and a plain loop call the same :meth:`update`. To write
    one, derive from this class in a file of your own, implement :meth:`update` and :meth:`gap`,
    and name it by its dotted path on the command line.
    """

    @abstractmethod
    def update(self, game: Game) -> dict[str, Any]:
        """Play one batch: move the critic and, where the game says so, the generator.

        Args:
            game: Players, batch, latents and processes.

        Returns:
            Scalars to log, by name; ``critic/gap`` among them.

        Raises:
            DivergedError: On all processes, if a value that all of them share is not finite.
        """

    @abstractmethod
    def gap(self, critic: nn.Module, real: tuple[Tensor, ...], fake: tuple[Tensor, ...]) -> Tensor:
        """Return how far the critic tells real from generated samples, a scalar.

        Args:
            critic: The critic.
            real: Real samples (n, ...), and labels where the latents carry them.
            fake: Generated ones, likewise.

        Returns:
            The difference of the critic's mean values, or what stands for it.
        """

    def witness(
        self, critic: nn.Module, real: tuple[Tensor, ...], fake: tuple[Tensor, ...]
    ) -> Callable[..., Tensor]:
        """Return the function whose gradient generated samples follow, from samples to (n,).

        It is the critic itself, where that returns one value a sample.
        """
        return critic

    def check(self, generator: nn.Module, critic: nn.Module) -> None:
        """Refuse networks that the rule cannot train; call it in overrides.

        Args:
            generator: The generator.
            critic: The critic.

        Raises:
            ValueError: If they share a parameter, or one has nothing to train.
        """
        refuse_shared_parameters(critic, generator)
        for name, network in (("generator", generator), ("critic", critic)):
            if not any(p.requires_grad for p in network.parameters()):
                raise ValueError(
                    f"the {name} {type(network).__name__} has no parameter with "
                    "requires_grad=True, so there is nothing to train. Unfreeze some."
                )

    def check_players(self, generator: Player, critic: Player) -> None:
        """Refuse optimizers that do not suit the rule, before the first update."""

    def critic_parameters(self, critic: nn.Module) -> dict[str, nn.Parameter]:
        """Return the critic's parameters that its optimizer moves, by name."""
        return {n: p for n, p in critic.named_parameters() if p.requires_grad}

    def generator_parameters(self, generator: nn.Module) -> dict[str, nn.Parameter]:
        """Return the generator's parameters that its optimizer moves, by name."""
        return trainable_parameters(generator)

    def generator_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Return the optimizer of a generator for which none was chosen."""
        return torch.optim.Adam(parameters, lr=5e-4, betas=(0.0, 0.9))

    def critic_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Return the optimizer of a critic for which none was chosen."""
        return torch.optim.Adam(parameters, lr=5e-4, betas=(0.0, 0.9))

    @property
    def adapts_steps(self) -> str | None:
        """The argument, if there is one, by which the rule chooses the length of its steps."""
        return None

    def needs_equal_calls(self, micro_batches: int) -> str | None:
        """Say why calls of the critic must not get noise of their own; None where they may.

        Args:
            micro_batches: Parts that a batch is evaluated in.

        Returns:
            A clause that completes "InstanceNoise changes each call of the critic, but ...".
        """
        return None

    def plain(self) -> "UpdateRule":
        """Return a rule of the same gradients whose steps nothing adapts, for comparisons."""
        return self

    def state_dict(self) -> dict[str, Any]:
        """Return what is carried from batch to batch: tensors and plain data."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""


def check_weights(**weights: float) -> None:
    """Raise a ValueError unless weights of penalties are finite numbers >= 0."""
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {weight}.")


def without(parameters: dict[str, nn.Parameter], name: str) -> dict[str, nn.Parameter]:
    """Return parameters but one, whatever torch.compile has put into names."""
    return {n: p for n, p in parameters.items() if plain_name(n) != name}
