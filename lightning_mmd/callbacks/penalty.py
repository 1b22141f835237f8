"""The parametric-gradient penalty for a GAN that we did not write."""

import copy
import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_mmd.auto_alpha import AutoAlpha, as_weight
from lightning_mmd.batches import BatchParts
from lightning_mmd.callbacks.batches import batch_size
from lightning_mmd.callbacks.calls import CriticCall
from lightning_mmd.callbacks.critic_penalty import CriticPenalty
from lightning_mmd.callbacks.foreign import (
    takes,
)
from lightning_mmd.callbacks.recorded_penalty import RecordedPenalty
from lightning_mmd.critic_warnings import warn_of_kinks
from lightning_mmd.estimators import Batch, Estimator, Lagged
from lightning_mmd.latents import Latents
from lightning_mmd.module import MMDGAN
from lightning_mmd.parameters import trainable_parameters
from lightning_mmd.passes import undisturbed
from lightning_mmd.processes import mean_over_processes
from lightning_mmd.pushforward import check_samples

__all__ = ["ParametricGradientPenalty"]


class ParametricGradientPenalty(CriticPenalty):
    r"""Adds the parametric-gradient penalty to the critic's update of any GAN, as it is.

    .. math:: \frac\alpha2 \Big\| \nabla_\theta \frac1n \sum_i f(G_\theta(z_i)) \Big\|^2

    is added to the loss that the critic's optimizer minimises, whatever that loss is: its gradient
    joins the others' just before each step of that optimizer, and before clipping by Lightning
    (``gradient_clip_val``, or ``self.clip_gradients`` in a module that optimises by hand; a bare
    ``torch.nn.utils.clip_grad_norm_`` comes earlier). Automatic and manual optimization, one device
    and DDP, where v = L f and the result are averaged over processes; under ``bf16-mixed`` the
    penalty is computed in float32. Buffers, the generator's gradients and the random state are left
    as they were. An update takes about twice the time. Measured on MNIST at equal updates it helps
    a GAN without another penalty and leaves GANs that have one as they are (``docs/evidence.md``).

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

    Examples:
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

    # What is there

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, MMDGAN):
            raise ValueError(
                "MMDGAN has the parametric-gradient penalty itself: set its alpha, and remove "
                "ParametricGradientPenalty."
            )
        optimizer = self.find_networks(trainer, pl_module)
        critic, generator = self._networks
        super().on_fit_start(trainer, pl_module)
        # Which parameters count is settled now: a toggled module hides some of them later.
        self._generator_parameters = trainable_parameters(generator)
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
        self.record(trainer, pl_module, optimizer)

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

    # Batches

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.latents is None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            return
        if not pl_module.automatic_optimization:
            self._fresh.clear()
        self._fresh.append(batch_size(self, pl_module, batch, self.batch))

    def _draw(self, num: int, device: torch.device) -> tuple[Tensor, ...]:
        dtype = next(iter(self._generator_parameters.values())).dtype
        return (self.latents or Latents(1))(num, dtype, device)

    # The penalty

    _instead_uncalled = "; or set latents to their length"
    _instead_unseen = "; or give latents, and the penalty is taken at fresh samples"

    def _add(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = self.moving(self._networks[0])
        if all(p.grad is None for p in parameters):  # the module skipped this step
            return
        calls, fresh = [], sum(self._fresh)
        self._fresh.clear()
        if self.latents is None and not (calls := self.take_calls(trainer)):
            return
        self.critic_step += 1
        if (self.critic_step - 1) % self.interval == 0:
            self.note(pl_module, self._add_gradient(trainer, parameters, calls, fresh))

    def _add_gradient(
        self, trainer: Trainer, parameters: list[nn.Parameter], calls: list[CriticCall], fresh: int
    ) -> dict[str, Tensor]:
        def penalty() -> Tensor:
            if self.latents is not None:
                return self._evaluation.at(self._draw(fresh, parameters[0].device))
            return self._evaluation.of(calls, self._calls)

        value, added = self.gradient(trainer, parameters, penalty)
        others = self.norm(parameters)
        alpha = self._weight.update(self.interval / 2 * float(added.norm()), float(others))
        share = self.join(parameters, alpha / 2 * self.interval * added, others)
        return {"parametric": value, "share": share, "alpha": share.new_tensor(alpha)}

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "alpha": self._weight.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._weight.load_state_dict(state_dict["alpha"])
