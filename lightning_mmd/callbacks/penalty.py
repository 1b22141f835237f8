"""The parametric-gradient penalty for a GAN that we did not write."""

import copy
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mmd.auto_alpha import AutoAlpha, as_weight
from lightning_mmd.batches import BatchParts
from lightning_mmd.callbacks.batches import batch_size
from lightning_mmd.callbacks.calls import CriticCall, LatentLog, first_tensor
from lightning_mmd.callbacks.clock import Clocked
from lightning_mmd.callbacks.foreign import (
    critics_optimizer,
    find_network,
    own_optimizer,
    read_values,
    require_whole_networks,
    takes,
)
from lightning_mmd.callbacks.loggers import Log
from lightning_mmd.callbacks.recorded_penalty import RecordedPenalty
from lightning_mmd.critic_warnings import warn_of_kinks
from lightning_mmd.estimators import Batch, Estimator, Lagged
from lightning_mmd.internals import callbacks_of
from lightning_mmd.latents import Latents
from lightning_mmd.module import MMDGAN
from lightning_mmd.parameters import refuse_shared_parameters, trainable_parameters
from lightning_mmd.passes import full_precision, undisturbed
from lightning_mmd.processes import mean_over_processes, together
from lightning_mmd.pushforward import check_samples

__all__ = ["ParametricGradientPenalty"]


class ParametricGradientPenalty(Clocked):
    r"""Adds the parametric-gradient penalty to the critic's update of any GAN, as it is.

    .. math:: \frac\alpha2 \Big\| \nabla_\theta \frac1n \sum_i f(G_\theta(z_i)) \Big\|^2

    is added to the loss that the critic's optimizer minimises, whatever that loss is: its gradient
    joins the others' just before each step of that optimizer, and before clipping by Lightning
    (``gradient_clip_val``, or ``self.clip_gradients`` in a module that optimises by hand; a bare
    ``torch.nn.utils.clip_grad_norm_`` comes earlier). Automatic and manual optimization, one device
    and DDP, where v = L f and the result are averaged over processes; under ``bf16-mixed`` the
    penalty is computed in float32. Buffers, the generator's gradients and the random state are left
    as they were.

    The samples are those that the critic was trained on since its last step, all of them: outputs
    of the generator that it saw alone, in one batch with real samples, or beside its input (pairs),
    in several calls and accumulated batches. Both networks are called again as the module called
    them, by position or keyword, with lists and labels. Where the critic saw no output as it was
    (augmentations, buffers of older samples), nothing is guessed: an error says so. A critic step
    before which the generator was not called (a lazy R1 step) gets no penalty. With
    ``latents`` the samples are drawn afresh, a function of (seed, rank, critic step), and labels
    beside the latents are handed to both networks.

    f is what the critic module returns: values (n,) or (n, 1), or maps (n, 1, h, w), which are
    averaged over their places. For a critic that ends in a sigmoid give
    ``critic_values=torch.logit``: the theory is about the raw score.

    Logged on the axis of the generator's updates: ``penalty/parametric``, :math:`\|L f\|^2`,
    ``penalty/alpha``, and ``penalty/share``, the norm of the added gradient as a part of the sum of
    its own and the other gradient's norm; ``penalty/<generator>/<critic>/...`` where there are two
    such callbacks.

    Args:
        alpha: Weight, >= 0, or ``"auto"`` for `AutoAlpha`, which holds the penalty's gradient at a
            tenth of the other. A number has no meaning by itself: its natural size goes with the
            square of the generator's Jacobian. One that leaves nothing but the penalty is warned
            of.
        generator: Attribute of the LightningModule that holds the generator; dots lead further
            down (``"gan.netG"``).
        critic: Likewise, the critic.
        latents: Length of fresh standard normal latents, or a callable from a number n to latents
            for n samples, drawn from torch's global random state (it is seeded for each call).
            Default: those that the module uses itself.
        critic_values: Callable from what the critic returns to values (n,) or (n, 1).
        estimator: ``Batch()`` (default), ``Split()`` or one of your own.
        interval: The penalty is added at every ``interval``-th critic step, with ``interval`` times
            its weight, >= 1.
        seed: Of fresh latents and of dropout within the penalty.
        generator_output: Callable from what the generator returns to a tensor of samples; needed
            with ``latents`` only, since otherwise it shows what the critic is given.
        batch: With ``latents``, where samples stand in a batch, to draw as many. Default: the
            module's own ``batch``, else first.

    Raises:
        ValueError: If an argument is out of range; when fitting begins, if the attributes, their
            optimizers, or latents, generator and critic do not fit.
        TypeError: Before the first step, if the critic does not return a tensor.
        RuntimeError: If the critic's optimizer steps without Lightning's knowledge, or the critic
            has seen no output of the generator; if a layer of it is differentiable once only.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402, regularised discrepancy MMD_{alpha,beta}.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> penalty = ParametricGradientPenalty(alpha=1.0, generator="netG", critic="netD")
        >>> trainer = Trainer(callbacks=[penalty], logger=False)
    """

    def __init__(
        self,
        alpha: float | Literal["auto"] | AutoAlpha = "auto",
        generator: str = "generator",
        critic: str = "critic",
        latents: int | Latents | Callable[[int], Any] | None = None,
        critic_values: Callable | None = None,
        estimator: Estimator | None = None,
        interval: int = 1,
        seed: int = 0,
        generator_output: Callable | None = None,
        batch: BatchParts | None = None,
    ) -> None:
        self._weight = as_weight(alpha)
        if interval < 1:
            raise ValueError(f"interval must be at least 1, got {interval}.")
        estimator = Batch() if estimator is None else copy.deepcopy(estimator)
        if not isinstance(estimator, Estimator) or isinstance(estimator, Lagged):
            raise ValueError(
                "estimator must be Batch(), Split() or one of your own, got "
                f"{estimator!r}. (Lagged needs the generator's mean gradients, which only MMDGAN "
                "hands on.)"
            )
        self.alpha = alpha
        self.generator = generator
        self.critic = critic
        self.latents = None if latents is None else Latents.of(latents)
        self.critic_values = critic_values
        self.estimator = estimator
        self.interval = interval
        self.seed = seed
        self.critic_step = 0
        self.generator_output = generator_output
        self.batch = batch
        self._handles: list[Any] = []
        self._clip: Callable | None = None
        self._clipping: Callable | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(generator=self.generator, critic=self.critic)

    # What is there

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, MMDGAN):
            raise ValueError(
                "MMDGAN has the parametric-gradient penalty itself: set its alpha, and remove "
                "ParametricGradientPenalty."
            )
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
        self._optimizer = critics_optimizer(self, trainer, self._networks)
        super().on_fit_start(trainer, pl_module)
        self._trainer, self._log = trainer, Log()
        # Which parameters count is settled now: a toggled module hides some of them later.
        self._generator_parameters = trainable_parameters(generator)
        self._seen = False
        self._fresh: list[int] = []  # numbers of latents to draw
        self._evaluation = RecordedPenalty(
            self._networks,
            self._generator_parameters,
            self.estimator,
            self._read,
            self.generator_output,
            functools.partial(mean_over_processes, trainer),
        )
        warn_of_kinks(critic)
        if self.latents is not None:
            self._check_networks(pl_module)
        # A compiled network hides the hooks of the one within.
        outer = pl_module.get_submodule(self.critic)
        self._calls = LatentLog(pl_module.get_submodule(self.generator), outer, generator)
        self._first_call = outer.register_forward_hook(self._check_call, with_kwargs=True)
        self._handles = [
            *self._calls.handles,
            self._first_call,
            self._optimizer.register_step_post_hook(self._check_step),
        ]
        moving = own_optimizer(trainer, generator)
        if moving is not None:
            hook = moving.register_step_post_hook(self._calls.end_generator_step)
            self._handles.append(hook)
        self._clip = self._clipping = None
        if not pl_module.automatic_optimization:
            self._clip = pl_module.clip_gradients
            self._clip_was_own = "clip_gradients" in vars(pl_module)
            self._clipping = functools.partial(self._clip_gradients, pl_module)
            pl_module.clip_gradients = self._clipping  # pyright: ignore[reportAttributeAccessIssue]

    def _check_networks(self, pl_module: LightningModule) -> None:
        """Run two fresh draws through both networks."""
        critic, generator = self._networks
        device = pl_module.device
        with undisturbed(self._networks, device, self.seed), torch.no_grad():
            inputs = self._draw(2, device)
            shapes = " and ".join(str(tuple(part.shape)) for part in inputs)
            try:
                x = generator(*inputs)
            except Exception as error:
                raise ValueError(
                    f"the generator {self.generator!r} ({type(generator).__name__}) does not take "
                    f"latents of shape {shapes}: {str(error).rstrip('.')}. Set latents "
                    "to what it takes, or leave it out."
                ) from error
            x = x if self.generator_output is None else self.generator_output(x)
            check_samples(generator, x, 2)
            try:
                output = critic(x, *inputs[1:] if takes(critic, len(inputs)) else ())
            except Exception as error:
                raise ValueError(
                    f"the critic {self.critic!r} ({type(critic).__name__}) does not take samples "
                    f"of shape {tuple(x.shape)}: {str(error).rstrip('.')}. Is {self.generator!r} "
                    "the generator?"
                ) from error
            self._read(output, len(x))

    def _check_call(self, critic: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Check the module's own first call of its critic, which precedes every step."""
        self._first_call.remove()
        place = first_tensor(args, kwargs, lambda tensor: tensor.ndim > 0)
        if place is not None:
            self._read(output, len(place.tensor))

    def _check_step(self, *_: Any) -> None:
        if not self._seen:
            raise RuntimeError(
                f"the optimizer of the critic {self.critic!r} stepped without Lightning's "
                "knowledge, so that no penalty could be added. Take it from self.optimizers(), "
                "which wraps it, and call its step()."
            )
        self._seen = False

    # Batches

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.latents is None:
            self._calls.begin_batch()
            return
        if not pl_module.automatic_optimization:
            self._fresh.clear()
        self._fresh.append(batch_size(self, pl_module, batch, self.batch))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._calls.end_batch()
        self._log.send(trainer, self.updates)

    def _draw(self, num: int, device: torch.device) -> tuple[Tensor, ...]:
        dtype = next(iter(self._generator_parameters.values())).dtype
        return (self.latents or Latents(1))(num, dtype, device)

    # The penalty

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if optimizer is self._optimizer:
            if not self._seen:
                self._add(trainer, pl_module)
            self._seen = True

    def _clip_gradients(
        self, pl_module: LightningModule, optimizer: Optimizer, *args: Any, **kwargs: Any
    ) -> None:
        """Add the penalty before a module that optimises by hand clips the critic's gradient."""
        if getattr(optimizer, "_optimizer", optimizer) is self._optimizer and not self._seen:
            self._add(pl_module.trainer, pl_module)
            self._seen = True
        if self._clip is not None:
            self._clip(optimizer, *args, **kwargs)

    def _add(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = {id(p) for p in self._networks[0].parameters()}
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        parameters = [p for p in held if id(p) in own and p.requires_grad]
        if all(p.grad is None for p in parameters):  # the module skipped this step
            return
        with together(trainer):
            calls, fresh = self._take_calls(), sum(self._fresh)
        self._fresh.clear()
        if self.latents is None and not calls:  # a step of its own for another penalty, as lazy R1
            return
        self.critic_step += 1
        if (self.critic_step - 1) % self.interval == 0:
            metrics = self._add_gradient(trainer, parameters, calls, fresh)
            names = {self.log_name(name): value for name, value in metrics.items()}
            self._log.note(pl_module, names)

    def log_name(self, name: str) -> str:
        """Return the name of a number in the log: with the networks' where there are several."""
        callbacks = callbacks_of(self._trainer)
        alone = sum(isinstance(c, ParametricGradientPenalty) for c in callbacks) == 1
        return f"penalty/{name}" if alone else f"penalty/{self.generator}/{self.critic}/{name}"

    def _penalty(self, calls: list[CriticCall], fresh: int, device: torch.device) -> Tensor:
        if self.latents is not None:
            return self._evaluation.at(self._draw(fresh, device))
        return self._evaluation.of(calls, self._calls)

    def _take_calls(self) -> list[CriticCall]:
        """Return what the critic was trained on since its last step; refuse to guess."""
        called = self._calls.generator_called_since
        calls = self._calls.take()
        if calls or self.latents is not None:
            return calls
        if not self._calls.generator_was_called:
            raise RuntimeError(
                f"the critic {self.critic!r} steps, but the generator {self.generator!r} has not "
                "been called in training yet, so there are no latents to penalise at. The module "
                f"must call self.{self.generator}(...) itself; or set latents to their length."
            )
        if not called:
            return []
        raise RuntimeError(
            f"the critic {self.critic!r} steps, but it has seen no output of the generator "
            f"{self.generator!r} since its last step: what it saw was changed on the way (an "
            "augmentation, noise), or older than this batch (a buffer of images), or a method or a "
            "part of it was called. Let the module call "
            f"self.{self.critic}(self.{self.generator}(...)), detached or not; or give latents, "
            "and the penalty is taken at fresh samples."
        )

    def _add_gradient(
        self, trainer: Trainer, parameters: list[nn.Parameter], calls: list[CriticCall], fresh: int
    ) -> dict[str, Tensor]:
        device = parameters[0].device
        counters = (self.seed, trainer.global_rank, self.critic_step)
        with (
            undisturbed(self._networks, device, *counters),
            self._calls.paused(),
            torch.enable_grad(),
        ):
            penalty = self._penalty(calls, fresh, device)
            with full_precision(device):
                gradients = torch.autograd.grad(
                    penalty, parameters, allow_unused=True, materialize_grads=True
                )
        flat = torch.cat([penalty.detach().reshape(1), *(g.reshape(-1) for g in gradients)])
        value, added = mean_over_processes(trainer, flat).split([1, len(flat) - 1])
        others = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        alpha = self._weight.update(self.interval / 2 * float(added.norm()), float(others))
        added = alpha / 2 * self.interval * added
        for p, g in zip(parameters, added.split([p.numel() for p in parameters]), strict=True):
            g = g.view_as(p).to(p.dtype)
            p.grad = g if p.grad is None else p.grad.add_(g)
        size = added.norm()
        share = size / (size + others).clamp_min(torch.finfo(size.dtype).tiny)
        return {
            "parametric": value.squeeze(0).float(),
            "share": share.float(),
            "alpha": size.new_tensor(alpha).float(),
        }

    def _read(self, output: Any, num: int) -> Tensor:
        return read_values(self, self.critic, output, num, self.critic_values)

    # The end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log.send(trainer, self.updates, last=True)
        super().on_fit_end(trainer, pl_module)
        self._release(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._clip is not None and vars(pl_module).get("clip_gradients") is self._clipping:
            vars(pl_module).pop("clip_gradients")
            if self._clip_was_own:
                pl_module.clip_gradients = self._clip

    def state_dict(self) -> dict[str, Any]:
        weight = self._weight.state_dict()
        return {**super().state_dict(), "critic_step": self.critic_step, "alpha": weight}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.critic_step = state_dict["critic_step"]
        self._weight.load_state_dict(state_dict["alpha"])
