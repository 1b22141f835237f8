"""The LightningModule that trains a generator against a regularised kernel critic."""

import copy
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any, Literal, cast, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.compile import to_uncompiled
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_mmd.critics import LearnedKernelCritic
from lightning_mmd.damping import AutomaticDamping
from lightning_mmd.data import SampleDataModule
from lightning_mmd.penalties import (
    Method,
    PenalisedCritic,
    penalised_critic,
    rkhs_norm_penalty,
    warn_of_kinks,
)
from lightning_mmd.pushforward import (
    check_samples,
    evaluate_critic,
    full_precision,
    parametric_gradient,
    refuse_shared_parameters,
    trainable_parameters,
)
from lightning_mmd.witness import (
    MeanEmbedding,
    MicroBatchEmbedding,
    WitnessSolution,
    solve_embedding,
)

__all__ = ["MMDGAN", "DivergedError", "MovedGradient"]

MovedGradient = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]
"""From samples x, and the witness's gradient as a function of samples, to gradients to follow."""


class DivergedError(RuntimeError):
    """Training has diverged: a value is not finite."""


class MMDGAN(LightningModule):
    r"""A generator trained against a kernel critic with the parametric-gradient and RKHS penalties.

    .. math:: \min_\theta \max_f \; E f(x) - E f(G_\theta(z))
        - \frac\alpha2 \| E_z \nabla_\theta f(G_\theta(z)) \|^2 - \frac\beta2 \|f\|_H^2

    ``critic_mode="closed_form"`` solves the inner problem for the weights w of
    :math:`f = \langle w, \phi_\omega\rangle` by a few conjugate-gradient iterations an update,
    started from the last weights. The features take one ascent step with w held, and the generator
    moves along L f: a gradient flow of MMD^2 in the current features. ``"adversarial"`` trains w
    and the features by gradient ascent.

    One batch is one critic step, and every ``critic_steps``-th batch moves the generator too.
    ``trainer.global_step`` counts generator updates only, so ``max_steps``, checkpoints, loggers
    and averages are all on that clock. Latents and dropout masks are functions of (seed, rank,
    critic step), so that processes differ and a resumed run draws what it would have drawn (the
    order of the data is the loader's own affair).

    W processes, on plain ``strategy="ddp"`` and one or several nodes, follow the gradients of one
    process on the concatenated batch, the penalty's and the witness' included, where no layer has
    batch statistics; a checkpoint is refused when their parameters are no longer equal bit for bit.
    Under ``bf16-mixed`` penalty and witness stay in float32. Networks may be compiled
    (``model.generator.compile()``): passes that need no second derivative then run compiled.

    Args:
        generator: Any module from latents to samples.
        critic: ``LearnedKernelCritic``; in adversarial mode any module from samples to values (n,)
            or (n, 1).
        latent_dim: Length of a standard normal latent vector. Not needed with ``sample_latents``.
        alpha: Weight of the parametric-gradient penalty, >= 0.
        beta: Weight of the RKHS norm, >= 0; in closed form beta / alpha damps the step.
        critic_mode: ``closed_form`` or ``adversarial``.
        critic_steps: Critic steps, each on a batch of its own, for one generator update, >= 1.
        eta: Closed form without a ``generator_optimizer``: the generator moves by plain gradient
            descent with learning rate eta * alpha (eta * beta if alpha is 0), in (0, 1] for a
            descent. The natural time of the flow is eta a step.
        automatic_damping: Closed form: adapt eta and beta, which are then starting values, to the
            gain ratio of each update (eta up to 0.5), and undo an update that raised the MMD^2 of
            its own batch, see ``AutomaticDamping``. It needs the default ``generator_optimizer``.
        witness_iterations: Closed form: most conjugate-gradient iterations an update, >= 1.
        witness_tolerance: Closed form: relative residual at which the iterations stop, > 0.
        witness_overhead: Closed form: stop the iterations as soon as one was not worth its cost,
            where this is the cost of an update without them in units of one (about 2.3), >= 0.
            Default: go on to the tolerance or to ``witness_iterations``.
        penalty_method: Adversarial: ``forward``, ``double_backward`` or ``finite_difference``, see
            ``parametric_gradient_penalty``.
        penalty_estimator: Adversarial: ``batch``, ``split``, or ``lagged``, which penalises L f
            along the mean gradient of the last generator update alone.
        penalty_interval: Adversarial: critic steps from one evaluation of the penalty to the next,
            >= 1; its weight is multiplied by it. The first step has one. An interval of 4 has cost
            quality where ``penalty_fraction=0.25``, which is as cheap, has not.
        penalty_fraction: Adversarial: part of the generated batch that the penalty is evaluated on,
            in (0, 1]. The estimate's variance, and the bias of ``batch``, grow by its inverse.
        generator_optimizer: Callable from parameters to an optimizer. Default: closed form, SGD as
            under ``eta``; adversarial, Adam(lr=5e-4, betas=(0, 0.9)).
        critic_optimizer: Likewise, for the critic (in closed form: its features). Default:
            Adam(lr=5e-4, betas=(0, 0.9)), in adversarial mode lr=1e-3.
        generator_scheduler: Callable from an optimizer to a learning-rate scheduler, stepped after
            each generator update.
        critic_scheduler: Likewise, stepped after each critic step.
        generator_clip_norm: Largest norm of the generator's gradient, > 0; default: no clipping.
        critic_clip_norm: Likewise for the critic.
        accumulate: Micro-batches that a batch is evaluated in, >= 1, one at a time in memory. The
            gradients are those of the whole batch (but for layers with batch statistics), the
            penalty's and the witness' included. Networks are evaluated anew where the whole batch
            would be kept: the penalty costs one more forward and reverse pass, the witness one
            more forward pass for each product in its conjugate gradients.
        sample_latents: Callable from a number n to latents for n samples, drawn from torch's global
            random state (it is seeded for each batch). Default: standard normal (n, latent_dim).
        seed: Seed of latents and dropout.

    Raises:
        ValueError: If a number is out of its range, or neither ``latent_dim`` nor
            ``sample_latents`` is given.
        TypeError: If the critic does not suit the mode or has no RKHS norm though beta > 0.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402.
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        latent_dim: int | None = None,
        alpha: float = 1.0,
        beta: float = 1e-2,
        critic_mode: Literal["closed_form", "adversarial"] = "closed_form",
        critic_steps: int = 1,
        eta: float = 0.4,
        automatic_damping: bool = False,
        witness_iterations: int = 3,
        witness_tolerance: float = 1e-3,
        witness_overhead: float | None = None,
        penalty_method: Method = "forward",
        penalty_estimator: Literal["batch", "split", "lagged"] = "batch",
        penalty_interval: int = 1,
        penalty_fraction: float = 1.0,
        generator_optimizer: OptimizerCallable | None = None,
        critic_optimizer: OptimizerCallable | None = None,
        generator_scheduler: LRSchedulerCallable | None = None,
        critic_scheduler: LRSchedulerCallable | None = None,
        generator_clip_norm: float | None = None,
        critic_clip_norm: float | None = None,
        accumulate: int = 1,
        sample_latents: Callable[[int], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_positive(
            eta=eta,
            witness_tolerance=witness_tolerance,
            witness_iterations=witness_iterations,
            critic_steps=critic_steps,
            generator_clip_norm=generator_clip_norm,
            critic_clip_norm=critic_clip_norm,
            latent_dim=latent_dim,
            penalty_interval=penalty_interval,
            accumulate=accumulate,
        )
        if not 0 < penalty_fraction <= 1:
            raise ValueError(f"penalty_fraction must be in (0, 1], got {penalty_fraction}.")
        _check_one_of("penalty_method", penalty_method, get_args(Method))
        _check_one_of("penalty_estimator", penalty_estimator, ("batch", "split", "lagged"))
        _check_networks(generator, critic, critic_mode, alpha, beta)
        if latent_dim is None and sample_latents is None:
            raise ValueError(
                "MMDGAN needs to know what the generator takes: give latent_dim, the length of a "
                "standard normal latent vector, or sample_latents, a callable from n to latents."
            )
        # Built by a command line, all arguments are recorded as class paths and a checkpoint loads
        # by its path alone. Modules that were built in Python cannot be recorded so.
        by_command_line = _given_hyperparameters.get() is not None
        self.save_hyperparameters(ignore=[] if by_command_line else _NOT_RECORDED)
        if not by_command_line:
            self._forget_unrecordable_hyperparameters()
        self.automatic_optimization = False
        self.generator = generator
        self.critic = critic
        self.latent_dim = latent_dim
        self.alpha = alpha
        self.beta = beta
        self.critic_mode = critic_mode
        self.critic_steps = critic_steps
        self.eta = eta
        self.damping = None
        if automatic_damping:
            _check_dampable(critic_mode, generator_optimizer, generator_clip_norm)
            self.damping = AutomaticDamping(largest_trust=_LARGEST_ETA / eta)
        self.witness_iterations = witness_iterations
        self.witness_tolerance = witness_tolerance
        self.witness_overhead = witness_overhead
        self.penalty_method: Method = penalty_method
        self.penalty_estimator = penalty_estimator
        self.penalty_interval = penalty_interval
        self.penalty_fraction = penalty_fraction
        self.generator_optimizer = generator_optimizer
        self.critic_optimizer = critic_optimizer
        self.generator_scheduler = generator_scheduler
        self.critic_scheduler = critic_scheduler
        self.generator_clip_norm = generator_clip_norm
        self.critic_clip_norm = critic_clip_norm
        self.accumulate = accumulate
        self.seed = seed
        self._draw_latents = sample_latents
        self.critic_step = 0
        self.images_seen = 0
        self.cumulative_lr = 0.0
        self.path_length = 0.0
        self.move_gradient: MovedGradient | None = None
        self._lagged_direction: Tensor | None = None
        self._averaged: tuple[nn.Module, ...] = ()  # a tuple hides it from parameters()
        self._generator_metrics: dict[str, Any] = {}
        self._last_penalty = torch.zeros(())

    # Sampling

    def forward(self, z: Tensor) -> Tensor:
        """Return the generator's samples for latents z."""
        return self.generator(z)

    def sample_latents(self, num: int) -> Tensor:
        """Draw latents from torch's global random state; equal on every device.

        Args:
            num: How many.

        Returns:
            Latents for ``num`` samples, on the model's device; floating-point ones in its dtype.
        """
        if self._draw_latents is not None:
            latents = self._draw_latents(num)
            if len(latents) != num:
                raise ValueError(
                    f"sample_latents({num}) must return latents for {num} samples, got "
                    f"{len(latents)}. Let it use its argument."
                )
            dtype = self._latent_dtype if latents.is_floating_point() else latents.dtype
            return latents.to(self.device, dtype)
        return torch.randn(num, self.latent_dim or 0, dtype=self._latent_dtype).to(self.device)

    def fixed_latents(self, num: int, seed: int = 0) -> Tensor:
        """Return latents that depend on the seed alone; torch's random state is left as it is.

        Args:
            num: How many.
            seed: Which.

        Returns:
            Latents for ``num`` samples, on the model's device.
        """
        with self._seeded(seed):
            return self.sample_latents(num)

    @torch.no_grad()
    def sample(self, num: int, latents: Tensor | None = None) -> Tensor:
        """Generate samples in eval mode, with averaged weights where there are any.

        Args:
            num: How many, >= 1; the length of ``latents`` if these are given.
            latents: Latents to use; default: fresh ones from torch's global random state.

        Returns:
            Samples of shape (num, ...), on the model's device.

        Raises:
            ValueError: If ``num`` does not fit.
        """
        if num < 1 or (latents is not None and len(latents) != num):
            length = "none" if latents is None else len(latents)
            raise ValueError(f"sample needs num >= 1 and as many latents, got {num} and {length}.")
        latents = self.sample_latents(num) if latents is None else latents
        generator = self._averaged[0].to(self.device) if self._averaged else self.generator
        with evaluating(generator):
            return generator(latents)

    @property
    def averaged_generator(self) -> nn.Module | None:
        """What ``sample`` uses in place of the generator: of `GeneratorEMA`, or a checkpoint."""
        return self._averaged[0] if self._averaged else None

    def sample_with(self, generator: nn.Module | None) -> None:
        """Let ``sample`` use another generator from now on, which is not trained or saved.

        Args:
            generator: For example an average of weights; None for the generator itself.
        """
        self._averaged = () if generator is None else (generator,)

    # Training

    def setup(self, stage: str) -> None:
        """Refuse strategies that shard, leave the step uncompiled, forget an old average.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            ValueError: If the strategy shards parameters.
        """
        if stage == "fit" and isinstance(self.trainer.strategy, _SHARDING):
            raise ValueError(
                f"{type(self.trainer.strategy).__name__} shards parameters among processes, but "
                "the penalty and the witness differentiate in the generator's whole parameter "
                "vector on each. Use strategy='ddp', with accumulate > 1 where memory is short."
            )
        if stage == "fit":
            self.sample_with(None)
        if self._compiler_ctx is not None:
            to_uncompiled(self)
            rank_zero_warn(
                "torch.compile(model) is undone: a training step here takes second derivatives, "
                "which compiled code does not have. Compile the networks instead, "
                "model.generator.compile() and model.critic.compile(): whatever needs no second "
                "derivative then runs compiled."
            )

    def on_fit_start(self) -> None:
        """Check precision, activations and that latents, generator and critic fit."""
        if self.trainer.precision == "16-mixed":
            raise ValueError(
                "precision='16-mixed' is not supported: gradients of penalties under a loss scale "
                "overflow. Use 'bf16-mixed' or '32-true'."
            )
        if self.alpha > 0:
            warn_of_kinks(self.critic)
        self.check_networks()

    def check_networks(self) -> None:
        """Run two latents through generator and critic in eval mode.

        Raises:
            ValueError: If the generator does not take the latents, the critic does not take its
                samples, or its samples do not have the shape of the trainer's data.
        """
        z = self.fixed_latents(2)
        with torch.no_grad(), evaluating(self.generator), evaluating(self.critic):
            try:
                x = self.generator(z)
            except Exception as error:
                raise ValueError(
                    f"the generator {type(self.generator).__name__} does not take latents of shape "
                    f"{tuple(z.shape)}: {str(error).rstrip('.')}. Set latent_dim (now "
                    f"{self.latent_dim}) to what it takes, or give sample_latents."
                ) from error
            check_samples(self.generator, x, z)
            data = getattr(self._trainer, "datamodule", None)
            if isinstance(data, SampleDataModule):
                self._check_shapes(torch.empty(0, *data.sample_shape, dtype=x.dtype), x)
            try:
                values = self.critic(x)
            except Exception as error:
                raise ValueError(
                    f"the critic {type(self.critic).__name__} does not take the generator's "
                    f"samples of shape {tuple(x.shape[1:])}: {str(error).rstrip('.')}. Give both "
                    "networks the shape of the data."
                ) from error
            evaluate_critic(lambda _: values, x)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Make one critic step and, every ``critic_steps``-th time, one generator update.

        Args:
            batch: Real samples (n, ...), alone or first in a tuple or list.
            batch_idx: Not used.

        Raises:
            ValueError: If the data hold NaN or do not have the generator's shape.
            RuntimeError: If training has diverged.
        """
        real = _samples_of(batch)
        moves_generator = (self.critic_step + 1) % self.critic_steps == 0
        update = {"closed_form": self._closed_form_step, "adversarial": self._adversarial_step}
        with self._seeded(self.seed, self.global_rank, self.critic_step):
            metrics = update[self.critic_mode](real, moves_generator)
        self._generator_metrics = metrics if moves_generator else self._generator_metrics
        metrics = self._generator_metrics | metrics  # of the last update, on batches without one
        self.critic_step += 1
        self.images_seen += len(real) * self.trainer.world_size
        metrics |= {
            "critic_step": self.critic_step,
            "images_seen": self.images_seen,
            "cumulative_lr": self.cumulative_lr,
            "step": self.trainer.global_step,  # the axis that loggers use
        }
        self.log("gap", metrics["critic/gap"], prog_bar=True, logger=False)
        self.log_dict({name: torch.as_tensor(value).float() for name, value in metrics.items()})

    def _closed_form_step(self, real: Tensor, moves_generator: bool) -> dict[str, Any]:
        critic = cast(LearnedKernelCritic, self.critic)
        z = self.sample_latents(len(real))
        parameters = self._generator_parameters
        embedding = self._mean_embedding(self.generator, z, parameters)
        self._check_shapes(real, embedding.samples)
        target = self._mean_embedding(nn.Identity(), real, {})
        gap = target.mean - embedding.mean
        self._check_finite(gap, real)
        solution = solve_embedding(
            embedding,
            gap,
            alpha=self.alpha,
            beta=self.beta if self.damping is None else self.beta * self.damping.damping,
            tolerance=self.witness_tolerance,
            max_iterations=self.witness_iterations,
            initial=critic.weights.detach() if self.critic_step else None,
            overhead=self.witness_overhead,
        )
        w = solution.weights
        metrics = self._metrics(
            gap=gap @ w,
            parametric_penalty=solution.parametric_gradient.square().sum(),
            rkhs_penalty=w.square().sum(),
        )
        metrics |= {
            "witness/mmd2": solution.mmd2,
            "witness/regularised_mmd2": solution.regularised_mmd2,
            "witness/residual": solution.residual,
            "witness/iterations": solution.num_iterations,
        }
        features = self._critic_parameters

        # The features ascend <w, delta> - alpha/2 ||L f||^2, whose gradient holds w (envelope).
        def descent_on_fake(fake: MeanEmbedding, part: slice) -> Tensor:
            slope = (fake.witness_gradient(w) * solution.tangents[part]).sum()
            descent = w @ fake.local_mean + self.alpha * slope
            return _flat(_filled(self._gradient(descent, features), features.values()))

        def descent_on_real(real: MeanEmbedding, _: slice) -> Tensor:
            descent = -w @ real.local_mean
            return _flat(_filled(self._gradient(descent, features), features.values()))

        features_gradient = w.new_zeros(0)
        if features:
            features_gradient = embedding.average(descent_on_fake) + target.average(descent_on_real)
        if not features_gradient.isfinite().all():
            raise self._diverged("the gradient of the critic")
        if moves_generator:  # before the features: the certificate is about those of the solution
            metrics |= self._descend(solution, embedding, target.mean)
        critic.weights.data.copy_(w)
        if features:
            gradient = _parts(features_gradient, features.values())
            metrics["critic/gradient_norm"] = self._move(1, features.values(), gradient)
        return metrics

    def _descent_direction(
        self, solution: WitnessSolution, embedding: MeanEmbedding | MicroBatchEmbedding
    ) -> Tensor:
        """L f, or with ``move_gradient`` J^T of the witness's gradients that it returns."""
        move = self.move_gradient
        if move is None:
            return solution.parametric_gradient

        def moved(part: MeanEmbedding, _: slice) -> Tensor:
            gradients = move(
                part.samples.detach(), lambda x: part.witness_gradient_at(solution.weights, x)
            )
            return part.pushforward.cotangent(gradients)

        return self._mean_over_processes(embedding.average(moved))

    def _mean_embedding(
        self, generator: nn.Module, z: Tensor, parameters: Mapping[str, Tensor]
    ) -> MeanEmbedding | MicroBatchEmbedding:
        features = cast(LearnedKernelCritic, self.critic).feature_map()
        reduce = self._mean_over_processes
        if self.accumulate == 1:
            return MeanEmbedding(features, generator, z, parameters, reduce=reduce)
        return MicroBatchEmbedding(
            features, generator, z, parameters, num_parts=self.accumulate, reduce=reduce
        )

    @torch.no_grad()
    def _descend(
        self,
        solution: WitnessSolution,
        embedding: MeanEmbedding | MicroBatchEmbedding,
        target_mean: Tensor,
    ) -> dict[str, Any]:
        """Move the generator along L f, and compare what came of it with what was predicted."""
        parameters = list(self._generator_parameters.values())
        trust = 1.0 if self.damping is None else self.damping.trust
        step_size = trust * self._optimizer(0).param_groups[0]["lr"]
        before = [p.clone() for p in parameters] if self.damping else []
        direction = self._descent_direction(solution, embedding)
        norm = self._move(0, parameters, _parts(-direction, parameters), trust)
        model_mean = self._mean_over_processes(embedding.mean_at(self._generator_parameters))
        energy = solution.mmd2 / 2
        realised = (target_mean - model_mean).square().sum() / 2 - energy
        speed = solution.speed2.clamp_min(0).sqrt()
        metrics: dict[str, Any] = {"objective": energy, "realised": realised, "speed": speed}
        if self._follows_the_flow:
            predicted = -step_size * solution.descent_rate
            metrics |= {"predicted": predicted, "ratio": realised / predicted}
            if self.alpha > 0:
                metrics["theorem"] = -step_size * solution.theorem_rate
        if self.damping is not None and self.move_gradient is None:
            modelled = float(solution.model_decrease(step_size))
            kept = self.damping.judge(-float(realised), modelled)
            metrics |= {"trust": trust, "damping": solution.beta, "undone": float(not kept)}
            if not kept:
                self.cumulative_lr -= step_size
                step_size = 0.0
                for p, value in zip(parameters, before, strict=True):
                    p.copy_(value)
        self.path_length += step_size * float(speed)
        metrics["length"] = self.path_length
        metrics = {f"certificate/{name}": value for name, value in metrics.items()}
        return {"generator/gradient_norm": norm} | metrics

    def _adversarial_step(self, real: Tensor, moves_generator: bool) -> dict[str, Any]:
        num = len(real)
        z = self.sample_latents(num)
        if self.critic_step == 0:
            with torch.no_grad(), full_precision(self.device), evaluating(self.generator):
                self._check_shapes(real, self.generator(z[:1]))
        penalised, plain = z.tensor_split([self._num_penalised(num)])
        reduce = self._penalty_reduction(penalised, num)

        def on_penalised(part: Tensor) -> tuple[Tensor, ...]:
            result = self._penalised_critic(penalised[part], reduce)
            return result.values.mean(), result.penalty

        def on_plain(part: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                fake = self.generator(plain[part])
            return (evaluate_critic(self.critic, fake).mean(),)

        def on_real(part: Tensor) -> tuple[Tensor, ...]:
            return (evaluate_critic(self.critic, real[part]).mean(),)

        critic = self._critic_parameters
        share, strength = len(penalised) / num, self.alpha * self.penalty_interval / 2
        terms = [
            self._in_micro_batches(on_penalised, (share, strength), len(penalised), num, critic),
            self._in_micro_batches(on_plain, (1 - share,), len(plain), num, critic),
            self._in_micro_batches(on_real, (-1.0,), num, num, critic),
        ]
        ((fake_mean, penalty), (plain_mean,), (real_mean,)), gradients = zip(*terms, strict=True)
        gap = real_mean - share * fake_mean - (1 - share) * plain_mean
        rkhs = rkhs_norm_penalty(self.critic) if self.beta else gap.new_zeros(())
        self._check_finite(gap - strength * penalty - self.beta / 2 * rkhs, real)
        gradients += (self._gradient(self.beta / 2 * rkhs, critic),)
        if len(penalised):
            self._last_penalty = penalty
        metrics = self._metrics(gap, self._last_penalty.to(gap.device), rkhs)
        metrics["critic/gradient_norm"] = self._move(1, critic.values(), _sum(gradients))
        if moves_generator:
            fresh = self.sample_latents(num)

            def on_fake(part: Tensor) -> tuple[Tensor, ...]:
                return (evaluate_critic(self.critic, self.generator(fresh[part])).mean(),)

            generator = self._generator_parameters
            _, gradient = self._in_micro_batches(on_fake, (-1.0,), num, num, generator)
            metrics["generator/gradient_norm"] = self._move(0, generator.values(), gradient)
        return metrics

    def _num_penalised(self, num: int) -> int:
        """How many of ``num`` latents this critic step's penalty is evaluated on."""
        if self.alpha == 0 or self.critic_step % self.penalty_interval:
            return 0
        part = math.ceil(self.penalty_fraction * num)
        odd = self.penalty_estimator == "split" and part % 2 == 1
        return min(part + odd, num)

    def _micro_batches(self, num: int, batch_size: int) -> list[Tensor]:
        """Split ``num`` samples into index sets of at most batch_size / accumulate.

        Each has its share of the first and of the second half, so that the split estimator's
        halves are those of the whole batch.
        """
        num_parts = math.ceil(num / math.ceil(batch_size / self.accumulate))
        halves = [torch.arange(num, device=self.device)]
        if self.penalty_estimator == "split" and num_parts > 1:
            halves = halves[0].tensor_split(2)
            num_parts = min(num_parts, len(halves[1]))
        return [torch.cat([half[j::num_parts] for half in halves]) for j in range(num_parts)]

    def _in_micro_batches(
        self,
        evaluate: Callable[[Tensor], tuple[Tensor, ...]],
        weights: tuple[float, ...],
        num: int,
        batch_size: int,
        parameters: Mapping[str, Tensor],
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Average terms over micro-batches, one in memory, and the gradient of their weighted sum.

        Returns the terms and the gradient in each parameter, of this process, without a graph.
        """
        terms = next(iter(parameters.values())).new_zeros(len(weights))
        gradient: list[Tensor | None] = [None] * len(parameters)
        for part in self._micro_batches(num, batch_size):
            values = torch.stack(evaluate(part)).to(terms.dtype) * (len(part) / num)
            loss = values @ values.new_tensor(weights)
            gradient = _sum([gradient, self._gradient(loss, parameters)])
            terms += values.detach()
            del values, loss  # and their graph, before the next is made
        return terms, gradient

    def _penalised_critic(self, z: Tensor, reduce: Callable[[Tensor], Tensor]) -> PenalisedCritic:
        lagged = self._lagged_direction if self.penalty_estimator == "lagged" else None
        return penalised_critic(
            self.critic,
            self.generator,
            z,
            self.penalty_method,
            estimator="split" if self.penalty_estimator == "split" else "batch",
            direction=None if lagged is None else lagged.to(z),
            parameters=self._generator_parameters,
            reduce=reduce,
        )

    def _penalty_reduction(self, z: Tensor, batch_size: int) -> Callable[[Tensor], Tensor]:
        """What makes a micro-batch's L f (or its slope along the lagged direction) the global one.

        The penalty is no mean over samples: before the gradient of any micro-batch its vector L f
        must be known, averaged over all of them and over processes. So one pass goes before.
        """
        parts = self._micro_batches(len(z), batch_size)
        if len(parts) <= 1:
            return self._mean_over_processes
        mean = z.new_zeros(())
        with self._random_state_kept(), _buffers_kept(self.generator, self.critic):
            for part in parts:
                if self.penalty_estimator == "split":
                    part = part[: len(part) // 2]
                gradient = parametric_gradient(
                    self.critic, self.generator, z[part], self._generator_parameters
                )
                mean = mean + gradient * (len(part) / len(z))
        if self.penalty_estimator == "split":
            mean = 2 * mean
        elif self.penalty_estimator == "lagged" and self._lagged_direction is not None:
            mean = (mean @ self._lagged_direction.to(mean)).reshape(1)
        known = self._mean_over_processes(mean)
        return lambda _: known

    def _metrics(self, gap: Tensor, parametric_penalty: Tensor, rkhs_penalty: Tensor) -> dict:
        """The critic's objective by terms; a share is a term's part of their absolute sum."""
        weighted = {
            "parametric": self.alpha / 2 * parametric_penalty.detach(),
            "rkhs": self.beta / 2 * rkhs_penalty.detach(),
        }
        total = gap.detach().abs() + sum(term.abs() for term in weighted.values())
        return {
            "critic/gap": gap.detach(),
            "critic/parametric_penalty": parametric_penalty.detach(),
            "critic/parametric_gradient_norm": parametric_penalty.detach().clamp_min(0).sqrt(),
            "critic/rkhs_penalty": rkhs_penalty.detach(),
        } | {f"critic/{name}_share": term / total for name, term in weighted.items()}

    def _gradient(self, loss: Tensor, parameters: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Return the gradient in each parameter, None where the loss does not depend on it."""
        if not (parameters and loss.requires_grad):
            return [None] * len(parameters)
        with full_precision(self.device):  # the reverse pass of a penalty obeys autocast too
            return list(torch.autograd.grad(loss, list(parameters.values()), allow_unused=True))

    def _move(
        self,
        index: int,
        parameters: Iterable[Tensor],
        gradient: Sequence[Tensor | None],
        scale: float = 1.0,
    ) -> Tensor:
        """Average a gradient over processes, clip, scale, and step one optimizer and its scheduler.

        Gradients come from ``torch.autograd.grad`` and are averaged here by one collective, never
        by a reducer's hooks: that is what makes plain ``strategy="ddp"`` work with two networks.
        Returns the gradient's norm before clipping and scaling.
        """
        parameters = list(parameters)
        parts = _own(_filled(gradient, parameters))
        local = index == 1 or self.critic_mode == "adversarial"  # L f in closed form is global
        if local and self.trainer.world_size > 1:
            parts = _parts(self._mean_over_processes(_flat(parts)), parameters)
        if index == 0 and self.penalty_estimator == "lagged":
            self._lagged_direction = -_flat(parts)
        norm = torch.stack([part.norm() for part in parts]).norm()
        if not norm.isfinite():
            raise self._diverged(f"the gradient of the {('generator', 'critic')[index]}")
        limit = (self.generator_clip_norm, self.critic_clip_norm)[index]
        if limit is not None or scale != 1:
            factor = scale * (1.0 if limit is None else (limit / norm).clamp(max=1.0))
            parts = [part * factor for part in parts]
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part
        optimizer = self._optimizer(index)
        if index == 0:
            self.cumulative_lr += scale * optimizer.param_groups[0]["lr"]
        else:  # Lightning counts a step of any optimizer in global_step: the critic's are not to be
            optimizer._on_before_step = optimizer._on_after_step = _no_op
        optimizer.step()
        optimizer.zero_grad()
        for scheduler in self._schedulers(optimizer.optimizer):
            scheduler.step()
        return norm

    def _optimizer(self, index: int) -> LightningOptimizer:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        return cast(LightningOptimizer, optimizers[index])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the critic's gap between held-out data and fresh samples, as ``val/gap``."""
        self._log_gap("val", batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the critic's gap between test data and fresh samples, as ``test/gap``."""
        self._log_gap("test", batch, batch_idx)

    def _log_gap(self, stage: str, batch: Any, batch_idx: int) -> None:
        real = _samples_of(batch)
        self._check_finite(real, real)
        latents = self.fixed_latents(len(real), _counter_seed(self.global_rank, batch_idx))
        with full_precision(self.device):
            fake = self.sample(len(real), latents)
            self._check_shapes(real, fake)
            on_real, on_fake = (evaluate_critic(self.critic, x).mean() for x in (real, fake))
        gap = on_real - on_fake
        self.log(f"{stage}/gap", gap, batch_size=len(real), sync_dist=True)
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.log("step", float(self.trainer.global_step))

    # Optimizers

    def configure_optimizers(self) -> tuple[list, list]:
        """Build the optimizers of generator and critic, in this order, and their schedulers.

        Returns:
            Optimizers and schedulers.

        Raises:
            ValueError: If a scheduler needs a metric.
        """
        closed_form = self.critic_mode == "closed_form"
        generator_optimizer = self.generator_optimizer or (self._sgd if closed_form else _adam)
        critic_optimizer = self.critic_optimizer or (_adam if closed_form else _fast_adam)
        optimizers = [generator_optimizer(self._generator_parameters.values())]
        if self._critic_parameters:  # fixed features leave nothing to train in closed form
            optimizers.append(critic_optimizer(self._critic_parameters.values()))
        builders = (self.generator_scheduler, self.critic_scheduler)
        schedulers = [
            build(optimizer)
            for build, optimizer in zip(builders, optimizers, strict=False)
            if build is not None
        ]
        if any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in schedulers):
            raise ValueError(
                "schedulers are stepped after each update without a metric, so ReduceLROnPlateau "
                "cannot be used here. Use a schedule of the number of updates."
            )
        return optimizers, schedulers

    def _sgd(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.eta * (self.alpha or self.beta))

    @property
    def _follows_the_flow(self) -> bool:
        """Whether an update is an Euler step of the flow, so that its decrease is predicted."""
        changed = (self.generator_optimizer, self.generator_clip_norm, self.move_gradient)
        return all(change is None for change in changed)

    def _schedulers(self, optimizer: torch.optim.Optimizer) -> list[LRScheduler]:
        schedulers = self.lr_schedulers() or []
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
        return [scheduler for scheduler in schedulers if scheduler.optimizer is optimizer]

    @property
    def _generator_parameters(self) -> dict[str, nn.Parameter]:
        return trainable_parameters(self.generator)

    @property
    def _critic_parameters(self) -> dict[str, nn.Parameter]:
        solved = {"weights"} if self.critic_mode == "closed_form" else set()
        named = self.critic.named_parameters()
        return {n: p for n, p in named if p.requires_grad and _plain_name(n) not in solved}

    # State

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the counters, the lagged direction and the damping; compare processes' parameters.

        Parameters have the names that they have uncompiled.

        Raises:
            RuntimeError: If processes hold different parameters.
        """
        trainer = self._trainer
        if trainer is not None and trainer.state.status == TrainerStatus.RUNNING:
            self._refuse_different_parameters()  # while interrupted, a process may be alone here
        state_dict = checkpoint["state_dict"]
        checkpoint["state_dict"] = {_plain_name(name): p for name, p in state_dict.items()}
        checkpoint["mmdgan"] = {
            "critic_step": self.critic_step,
            "images_seen": self.images_seen,
            "cumulative_lr": self.cumulative_lr,
            "path_length": self.path_length,
            "lagged_direction": self._lagged_direction,
            "last_penalty": self._last_penalty,
            "generator_metrics": {n: float(v) for n, v in self._generator_metrics.items()},
            "damping": self.damping and asdict(self.damping),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters, the lagged direction, the damping and averaged weights."""
        present = {_plain_name(name): name for name in self.state_dict()}
        checkpoint["state_dict"] = {
            present.get(_plain_name(name), name): p for name, p in checkpoint["state_dict"].items()
        }
        state = checkpoint["mmdgan"]
        self.critic_step = state["critic_step"]
        self.images_seen = state["images_seen"]
        self.cumulative_lr = state["cumulative_lr"]
        self.path_length = state["path_length"]
        self._lagged_direction = state["lagged_direction"]
        self._last_penalty = state["last_penalty"]
        self._generator_metrics = dict(state["generator_metrics"])
        if self.damping is not None and state["damping"] is not None:
            self.damping = AutomaticDamping(**state["damping"])
        trains = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if "averaged_generator" in checkpoint and not trains:  # in training the callback's affair
            average = copy.deepcopy(self.generator)
            average.load_state_dict(checkpoint["averaged_generator"])
            self.sample_with(average)

    # Pieces

    @property
    def _latent_dtype(self) -> torch.dtype:
        return next(p for p in self.generator.parameters() if p.is_floating_point()).dtype

    def _mean_over_processes(self, tensor: Tensor) -> Tensor:
        return mean_over_processes(self.trainer, tensor)

    def _refuse_different_parameters(self) -> None:
        if self.trainer.world_size == 1:
            return
        names, parameters = zip(*self.named_parameters(), strict=True)
        own = torch.stack([_fingerprint(p) for p in parameters])
        reduce = self.trainer.strategy.reduce
        least, most = (reduce(own.clone(), reduce_op=extreme) for extreme in ("min", "max"))
        differing = [n for n, same in zip(names, least == most, strict=True) if not same]
        if differing:
            raise RuntimeError(
                f"the {self.trainer.world_size} processes hold different parameters "
                f"({len(differing)} of {len(names)}, the first is {differing[0]}), so they no "
                "longer train one model. Something moves parameters on some of them alone, such "
                "as a callback that draws random numbers or acts on rank zero. Go on from an "
                "older checkpoint without it."
            )

    def _random_state_kept(self) -> AbstractContextManager:
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    @contextmanager
    def _seeded(self, *counters: int) -> Iterator[None]:
        """Run with random numbers that are a function of the counters; restore the state after."""
        with self._random_state_kept():
            torch.manual_seed(_counter_seed(*counters))
            yield

    def _forget_unrecordable_hyperparameters(self) -> None:
        """Drop what a checkpoint could not be read with: networks and callables of subclasses."""
        for hparams in (self.hparams, cast(dict, self._hparams_initial)):
            for name, value in list(hparams.items()):
                if callable(value):
                    del hparams[name]

    def _check_shapes(self, real: Tensor, fake: Tensor) -> None:
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

    def _check_finite(self, value: Tensor, real: Tensor) -> None:
        if torch.isfinite(value).all():
            return
        if not torch.isfinite(real).all():
            raise ValueError(
                "a batch of real data holds NaN or infinite values. Clean the data set; nothing "
                f"was updated with this batch (generator update {self.trainer.global_step})."
            )
        raise self._diverged("the critic's objective")

    def _diverged(self, quantity: str) -> DivergedError:
        return DivergedError(
            f"training has diverged: {quantity} is not finite at generator update "
            f"{self.trainer.global_step}. Lower the learning rates (or eta), or raise alpha or "
            "beta, and go on from a checkpoint of well before this update."
        )


_LARGEST_ETA = 0.5  # of automatic damping: longer steps follow the noise of a batch
_SHARDING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
_NOT_RECORDED = [
    "generator",
    "critic",
    "generator_optimizer",
    "critic_optimizer",
    "generator_scheduler",
    "critic_scheduler",
    "sample_latents",
]


def _adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=5e-4, betas=(0.0, 0.9))


def _fast_adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.0, 0.9))


def _no_op() -> None:
    pass


def mean_over_processes(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over processes."""
    if trainer.world_size == 1:
        return tensor
    return trainer.strategy.reduce(tensor.clone(), reduce_op="mean")


def _flat(gradient: Sequence[Tensor]) -> Tensor:
    """Return a gradient's parts as one vector."""
    return torch.cat([part.reshape(-1) for part in gradient])


def _parts(vector: Tensor, parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return a vector's parts in the shapes of parameters."""
    parameters = list(parameters)
    parts = vector.split([p.numel() for p in parameters])
    return [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]


def _sum(gradients: Iterable[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Add gradients part by part; None is zero."""
    present = (
        [part for part in parts if part is not None] for parts in zip(*gradients, strict=True)
    )
    return [functools.reduce(torch.add, parts) if parts else None for parts in present]


def _filled(gradient: Iterable[Tensor | None], parameters: Iterable[Tensor]) -> list[Tensor]:
    """Replace None by zeros."""
    pairs = zip(gradient, parameters, strict=True)
    return [torch.zeros_like(p) if part is None else part for part, p in pairs]


def _own(gradient: Iterable[Tensor]) -> list[Tensor]:
    """Give each part memory of its own: autograd may return one tensor for two parameters."""
    own: dict[int, Tensor] = {}
    parts = []
    for part in gradient:
        shared = part.data_ptr() in own or not part.is_contiguous()
        parts.append(part.clone(memory_format=torch.contiguous_format) if shared else part)
        own[part.data_ptr()] = part
    return parts


def _plain_name(name: str) -> str:
    """Return a parameter's name without what torch.compile puts into it."""
    return name.replace("_orig_mod.", "")


def _fingerprint(tensor: Tensor) -> Tensor:
    """Hash a tensor's bits to an integer: equal for equal bits, and hardly ever otherwise."""
    words = torch.int32 if tensor.element_size() % 4 == 0 else torch.int16
    bits = tensor.detach().reshape(-1).view(words).long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()


def _counter_seed(*counters: int) -> int:
    """Hash counters to a seed: neighbouring counters give unrelated streams."""
    digest = hashlib.sha256(repr(counters).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def _samples_of(batch: Any) -> Tensor:
    samples = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(samples, Tensor) or not samples.is_floating_point():
        kind = samples.dtype if isinstance(samples, Tensor) else type(samples).__name__
        raise TypeError(
            "a batch must be a floating-point tensor of real samples, alone or first in a tuple, "
            f"got {kind}. Convert the data in the data module, images to [-1, 1]."
        )
    return samples


@contextmanager
def _buffers_kept(*modules: nn.Module) -> Iterator[None]:
    """Put buffers back, such as power iterations, that forward passes within have moved."""
    kept = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a network in eval mode for a while, and every part back into the mode that it had."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _check_positive(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} must be a positive number, got {number}.")


def _check_one_of(name: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise ValueError(f"{name} must be one of {', '.join(values)}, got {value!r}.")


def _check_dampable(critic_mode: str, generator_optimizer: Any, clip_norm: float | None) -> None:
    if critic_mode != "closed_form" or generator_optimizer is not None or clip_norm is not None:
        raise ValueError(
            "automatic_damping adapts the steps of critic_mode='closed_form' along the flow: leave "
            "generator_optimizer and generator_clip_norm unset (eta is where it starts), or set "
            "automatic_damping to False."
        )


def _check_networks(
    generator: nn.Module, critic: nn.Module, critic_mode: str, alpha: float, beta: float
) -> None:
    _check_one_of("critic_mode", critic_mode, ("closed_form", "adversarial"))
    refuse_shared_parameters(critic, generator)
    for name, network in (("generator", generator), ("critic", critic)):
        if not any(p.requires_grad for p in network.parameters()):
            raise ValueError(
                f"the {name} {type(network).__name__} has no parameter with requires_grad=True, so "
                "there is nothing to train. Unfreeze some."
            )
    for name, weight in (("alpha", alpha), ("beta", beta)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {weight}.")
    if critic_mode == "adversarial":
        if beta > 0:
            rkhs_norm_penalty(critic)
    elif not isinstance(getattr(critic, "_orig_mod", critic), LearnedKernelCritic):
        raise TypeError(
            "critic_mode='closed_form' solves for the weights of a LearnedKernelCritic, got "
            f"{type(critic).__name__}. Wrap your network: LearnedKernelCritic(features, "
            "num_features), or use critic_mode='adversarial'."
        )
    elif alpha + beta == 0:
        raise ValueError("critic_mode='closed_form' needs alpha > 0 or beta > 0, got both zero.")
