"""The parametric-gradient penalty for a GAN that we did not write."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mmd.callbacks.foreign import (
    find_network,
    holds,
    optimizers_of,
    require_whole_networks,
)
from lightning_mmd.estimators import Batch, Estimator, Lagged
from lightning_mmd.latents import Latents
from lightning_mmd.module import MMDGAN
from lightning_mmd.parameters import refuse_shared_parameters, trainable_parameters
from lightning_mmd.passes import full_precision, undisturbed
from lightning_mmd.penalties import penalised_critic, warn_of_kinks
from lightning_mmd.processes import mean_over_processes
from lightning_mmd.pushforward import check_samples

__all__ = ["ParametricGradientPenalty"]


class ParametricGradientPenalty(Callback):
    r"""Adds the parametric-gradient penalty to the critic's update of any GAN, as it is.

    .. math:: \frac\alpha2 \Big\| \nabla_\theta \frac1n \sum_i f(G_\theta(z_i)) \Big\|^2

    is added to the loss that the critic's optimizer minimises, whatever that loss is: its gradient
    joins the others' just before each step of that optimizer, and before clipping by Lightning
    (``gradient_clip_val``, or ``self.clip_gradients`` in a module that optimises by hand; a bare
    ``torch.nn.utils.clip_grad_norm_`` comes earlier). Automatic and manual optimization, one device
    and DDP, where v = L f and the result are averaged over processes; under ``bf16-mixed`` the
    penalty is computed in float32. Buffers, the generator's gradients and the random state are left
    as they were.

    The latents are those with which the module last called its generator in training; with
    ``accumulate_grad_batches``, the last ones of every micro-batch together, so that the penalty is
    that of the whole batch. With ``latents`` they are drawn afresh, a function of (seed, rank,
    critic step).

    f is what the critic module returns: values (n,) or (n, 1), or maps (n, 1, h, w), which are
    averaged over their places. For a critic that ends in a sigmoid give
    ``critic_values=torch.logit``: the theory is about the raw score.

    Logged: ``penalty/parametric``, :math:`\|L f\|^2`, and ``penalty/share``, the norm of the added
    gradient as a part of the sum of its own and the other gradient's norm.

    Args:
        alpha: Weight, >= 0.
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

    Raises:
        ValueError: If an argument is out of range; when fitting begins, if the attributes, their
            optimizers, or latents, generator and critic do not fit.
        TypeError: Before the first step, if generator or critic take several inputs or do not
            return a tensor.
        RuntimeError: If the critic's optimizer steps without Lightning's knowledge.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402, regularised discrepancy MMD_{alpha,beta}.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> penalty = ParametricGradientPenalty(alpha=1.0, generator="netG", critic="netD")
        >>> trainer = Trainer(callbacks=[penalty], logger=False)
    """

    def __init__(
        self,
        alpha: float = 1.0,
        generator: str = "generator",
        critic: str = "critic",
        latents: int | Latents | Callable[[int], Any] | None = None,
        critic_values: Callable[[Any], Tensor] | None = None,
        estimator: Estimator | None = None,
        interval: int = 1,
        seed: int = 0,
    ) -> None:
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must be a finite number >= 0, got {alpha}.")
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
        self._handles: list[Any] = []
        self._latents: dict[int, Tensor | int] = {}  # by batch, since the critic's last step

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
        self._optimizer = self._find_optimizer(trainer, pl_module)
        # Which parameters count is settled now: a toggled module hides some of them later.
        self._generator_parameters = trainable_parameters(generator)
        self._seen = False
        self._stale = True
        self._penalising = False
        self._batch_idx: int | None = None
        self._latents = {}
        warn_of_kinks(critic)
        if self._draws:
            self._check_networks(pl_module.device)
        else:
            outer = pl_module.get_submodule(self.generator)  # a compiled one hides the inner hooks
            hook = outer.register_forward_pre_hook(self._record, with_kwargs=True)
            self._handles.append(hook)
        outer = pl_module.get_submodule(self.critic)
        self._first_call = outer.register_forward_hook(self._check_call, with_kwargs=True)
        self._handles += [
            self._first_call,
            self._optimizer.register_step_post_hook(self._check_step),
        ]
        if not pl_module.automatic_optimization:
            self._clip = pl_module.clip_gradients
            pl_module.clip_gradients = self._clip_gradients  # pyright: ignore

    def _find_optimizer(self, trainer: Trainer, pl_module: LightningModule) -> Optimizer:
        critic, generator = self._networks
        optimizers = optimizers_of(trainer, critic)
        name = type(self).__name__
        if len(optimizers) != 1:
            raise ValueError(
                f"{name} adds to the one optimizer of the critic {self.critic!r}, but "
                f"{len(optimizers)} of the {len(trainer.optimizers)} optimizers of "
                f"{type(pl_module).__name__} hold its parameters. Let configure_optimizers return "
                "one for it."
            )
        if holds(optimizers[0], generator):
            raise ValueError(
                f"{name} needs an optimizer for the critic alone, but a "
                f"{type(optimizers[0]).__name__} holds parameters of both {self.critic!r} and "
                f"{self.generator!r}. Let configure_optimizers return one for each network."
            )
        if any(group.get("maximize") for group in optimizers[0].param_groups):
            raise ValueError(
                f"{name} adds to a loss that is minimised, but the critic's optimizer has "
                "maximize=True. Minimise the negative loss."
            )
        return optimizers[0]

    def _check_networks(self, device: torch.device) -> None:
        """Run two fresh latents through both networks."""
        critic, generator = self._networks
        with undisturbed(self._networks, device, self.seed), torch.no_grad():
            z = self._draw(2, device)
            try:
                x = generator(z)
            except Exception as error:
                raise ValueError(
                    f"the generator {self.generator!r} ({type(generator).__name__}) does not take "
                    f"latents of shape {tuple(z.shape)}: {str(error).rstrip('.')}. Set latents "
                    "to what it takes, or leave it out."
                ) from error
            check_samples(generator, x, len(z))
            try:
                output = critic(x)
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
        _require_one_input("critic", self.critic, args, kwargs)
        self._read(output, len(args[0]))

    def _check_step(self, *_: Any) -> None:
        if not self._seen:
            raise RuntimeError(
                f"the optimizer of the critic {self.critic!r} stepped without Lightning's "
                "knowledge, so that no penalty could be added. Take it from self.optimizers(), "
                "which wraps it, and call its step()."
            )
        self._seen = False

    # Latents

    @property
    def _draws(self) -> bool:
        return self.latents is not None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch_idx = batch_idx
        self._keeps = pl_module.automatic_optimization
        if self._draws:
            self._note(extract_batch_size(batch))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch_idx = None

    def _record(self, generator: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._batch_idx is None or self._penalising or not generator.training:
            return  # not the module's own training
        _require_one_input("generator", self.generator, args, kwargs)
        self._note(args[0].detach())

    def _note(self, latents: Tensor | int) -> None:
        """Keep latents, or how many to draw, of this batch and of those accumulated with it."""
        if self._stale:
            self._latents.clear()
            self._stale = not self._keeps
        self._latents[self._batch_idx or 0] = latents

    def _draw(self, num: int, device: torch.device) -> Tensor:
        dtype = next(iter(self._generator_parameters.values())).dtype
        return (self.latents or Latents(1))(num, dtype, device)[0]

    def _gather_latents(self, device: torch.device) -> Tensor:
        if not self._latents:
            raise RuntimeError(
                f"the critic {self.critic!r} steps, but the generator {self.generator!r} has not "
                "been called in training mode yet, so there are no latents to penalise at. Give "
                "latents."
            )
        seen = self._latents.values()
        z = torch.cat([z if isinstance(z, Tensor) else self._draw(z, device) for z in seen])
        dtype = next(iter(self._generator_parameters.values())).dtype
        return z.to(dtype) if z.is_floating_point() else z

    # The penalty

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if optimizer is self._optimizer:
            if not self._seen:
                self._add(trainer, pl_module)
            self._seen = True

    def _clip_gradients(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Add the penalty before a module that optimises by hand clips the critic's gradient."""
        if getattr(optimizer, "_optimizer", optimizer) is self._optimizer and not self._seen:
            module = self._clip.__self__  # pyright: ignore[reportFunctionMemberAccess]
            self._add(module.trainer, module)
            self._seen = True
        self._clip(optimizer, *args, **kwargs)

    def _add(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = {id(p) for p in self._networks[0].parameters()}
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        parameters = [p for p in held if id(p) in own and p.requires_grad]
        if all(p.grad is None for p in parameters):  # the module skipped this step
            return
        self.critic_step += 1
        if (self.critic_step - 1) % self.interval == 0:
            self._penalising = True
            metrics = self._add_gradient(trainer, parameters)
            self._penalising = False
            pl_module.log_dict({f"penalty/{name}": value for name, value in metrics.items()})
        self._stale = True

    def _add_gradient(self, trainer: Trainer, parameters: list[nn.Parameter]) -> dict[str, Tensor]:
        critic, generator = self._networks
        device = parameters[0].device
        counters = (self.seed, trainer.global_rank, self.critic_step)
        with undisturbed(self._networks, device, *counters), torch.enable_grad():
            z = self._gather_latents(device)
            penalty = penalised_critic(
                lambda x: self._read(critic(x), len(x)),
                generator,
                [(z[group],) for group in self.estimator.groups(len(z))],
                "forward",
                estimator=self.estimator,
                parameters=self._generator_parameters,
                mean=functools.partial(mean_over_processes, trainer),
            ).penalty
            with full_precision(device):
                gradients = torch.autograd.grad(
                    penalty, parameters, allow_unused=True, materialize_grads=True
                )
        flat = torch.cat([penalty.detach().reshape(1), *(g.reshape(-1) for g in gradients)])
        value, added = mean_over_processes(trainer, flat).split([1, len(flat) - 1])
        added = self.alpha / 2 * self.interval * added
        others = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        for p, g in zip(parameters, added.split([p.numel() for p in parameters]), strict=True):
            g = g.view_as(p).to(p.dtype)
            p.grad = g if p.grad is None else p.grad.add_(g)
        size = added.norm()
        share = size / (size + others).clamp_min(torch.finfo(size.dtype).tiny)
        return {"parametric": value.squeeze(0).float(), "share": share.float()}

    def _read(self, output: Any, num: int) -> Tensor:
        """Return the critic's values, of shape (n,)."""
        values = output if self.critic_values is None else self.critic_values(output)
        if not isinstance(values, Tensor):
            source = "returns" if self.critic_values is None else "gives, through critic_values,"
            raise TypeError(
                f"the critic {self.critic!r} {source} no tensor but {type(values).__name__}. Give "
                "critic_values, a callable from what it returns to values of shape (n,)."
            )
        if values.ndim > 2 and values.shape[:2] == (num, 1):  # a map of scores of patches
            values = values.flatten(1).mean(1)
        if values.shape not in ((num,), (num, 1)):
            raise ValueError(
                f"the critic {self.critic!r} returns shape {tuple(values.shape)} for {num} samples "
                f"where ({num},), ({num}, 1) or maps ({num}, 1, h, w) are expected. Give "
                "critic_values, a callable from what it returns to values of shape (n,)."
            )
        return values.reshape(num)

    # The end

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if vars(pl_module).get("clip_gradients") == self._clip_gradients:
            del pl_module.clip_gradients

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.on_fit_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"critic_step": self.critic_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.critic_step = state_dict["critic_step"]


def _require_one_input(role: str, path: str, args: tuple, kwargs: dict) -> None:
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        return
    raise TypeError(
        f"the {role} {path!r} is called with {len(args) + len(kwargs)} inputs, where one tensor "
        "is expected. For a conditional GAN add parametric_gradient_penalty to the critic's loss, "
        "with functions that hold the other inputs."
    )
