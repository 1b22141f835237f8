"""A penalty on the critic of any GAN, at the samples that the GAN trains it on."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mmd.callbacks.added_gradient import AddedGradient
from lightning_mmd.callbacks.calls import CriticCall, LatentLog, first_tensor
from lightning_mmd.callbacks.foreign import (
    critics_optimizer,
    find_network,
    own_optimizer,
    read_values,
    require_whole_networks,
)
from lightning_mmd.parameters import refuse_shared_parameters
from lightning_mmd.passes import Watch, full_precision, undisturbed
from lightning_mmd.processes import mean_over_processes, together

__all__ = ["CriticPenalty"]


class CriticPenalty(AddedGradient):
    """Adds a penalty's gradient to that of the critic, and knows what the critic was trained on.

    Attributes:
        critic_values: Callable from what the critic returns to its values, or None.
        seed: Of random numbers within the penalty.
        critic_step: Critic steps so far that trained on samples of the generator.
    """

    critic_values: Callable | None = None
    seed = 0
    critic_step = 0

    @property
    def state_key(self) -> str:
        return self._generate_state_key(generator=self.generator, critic=self.critic)

    def find_networks(self, trainer: Trainer, pl_module: LightningModule) -> Optimizer:
        """Find critic and generator, ``self._networks``; return the critic's optimizer."""
        require_whole_networks(self, trainer)
        self._networks = critic, generator = (
            find_network(self, pl_module, "critic", self.critic),
            find_network(self, pl_module, "generator", self.generator),
        )
        refuse_shared_parameters(critic, generator)
        if not any(p.requires_grad for p in critic.parameters()):
            raise ValueError(
                f"the critic {self.critic!r} ({type(critic).__name__}) has no parameter with "
                "requires_grad=True, so there is nothing to penalise. Unfreeze some."
            )
        return critics_optimizer(self, trainer, self._networks)

    def record(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        optimizer: Optimizer,
        others: bool = False,
    ) -> None:
        """Record calls of both networks from now on, and add at each step of the optimizer.

        Args:
            trainer: The trainer.
            pl_module: The module.
            optimizer: The critic's.
            others: Whether to record samples that are not the generator's too.
        """
        # A compiled network hides the hooks of the one within.
        outer, generator = pl_module.get_submodule(self.critic), self._networks[1]
        made = pl_module.get_submodule(self.generator)
        self._calls = LatentLog(made, outer, generator, others)
        self._first_call = outer.register_forward_hook(Watch(self._check_call), with_kwargs=True)
        handles = [*self._calls.handles, self._first_call]
        moving = own_optimizer(trainer, generator)
        if moving is not None:
            handles.append(moving.register_step_post_hook(self._calls.end_generator_step))
        self.attach(trainer, pl_module, optimizer, handles)

    def _check_call(self, critic: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Check the module's own first call of its critic, which precedes every step."""
        self._first_call.remove()
        place = first_tensor(args, kwargs, lambda tensor: tensor.ndim > 0)
        if place is not None:
            self._read(output, len(place.tensor))

    def _read(self, output: Any, num: int) -> Tensor:
        return read_values(self, self.critic, output, num, self.critic_values)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._calls.begin_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._calls.end_batch()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def take_calls(self, trainer: Trainer) -> list[CriticCall]:
        """Return what the critic was trained on since its last step; refuse to guess.

        Nothing where the generator was not called: a step of its own for another penalty, as lazy
        R1. All processes raise where one does.
        """
        with together(trainer):
            called, was_called = (
                self._calls.generator_called_since,
                self._calls.generator_was_called,
            )
            calls = self._calls.take()
            if calls or (was_called and not called):
                return calls
            if not was_called:
                raise RuntimeError(
                    f"the critic {self.critic!r} steps, but the generator {self.generator!r} has "
                    "not been called in training yet, so there are no latents to penalise at. The "
                    f"module must call self.{self.generator}(...) itself{self._instead_uncalled}."
                )
            raise RuntimeError(
                f"the critic {self.critic!r} steps, but it has seen no output of the generator "
                f"{self.generator!r} since its last step: what it saw was changed on the way (an "
                "augmentation, noise), or older than this batch (a buffer of images), or a method "
                "or a part of it was called. Let the module call "
                f"self.{self.critic}(self.{self.generator}(...)), detached or not"
                f"{self._instead_unseen}."
            )

    _instead_uncalled = ""
    _instead_unseen = ""

    def gradient(
        self, trainer: Trainer, parameters: list[nn.Parameter], penalty: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return a penalty and its flat gradient, means over processes; disturb nothing.

        Args:
            trainer: The trainer.
            parameters: The critic's.
            penalty: Evaluates it, with a graph.
        """
        device = parameters[0].device
        counters = (self.seed, trainer.global_rank, self.critic_step)
        with (
            undisturbed(self._networks, device, *counters),
            self._calls.paused(),
            torch.enable_grad(),
        ):
            value = penalty()
            with full_precision(device):
                gradients = torch.autograd.grad(
                    value, parameters, allow_unused=True, materialize_grads=True
                )
        flat = torch.cat([value.detach().reshape(1), *(g.reshape(-1) for g in gradients)])
        mean, added = mean_over_processes(trainer, flat).split([1, len(flat) - 1])
        return mean.squeeze(0).float(), added

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "critic_step": self.critic_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.critic_step = state_dict["critic_step"]
