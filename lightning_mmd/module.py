"""The LightningModule that lets an update rule train a generator against a critic."""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.hooks import RemovableHandle

from lightning_mmd.batches import BatchParts
from lightning_mmd.checkpoints import (
    read_checkpoint,
    use_whole_checkpoints,
    warn_of_inexact_order,
)
from lightning_mmd.critic_warnings import warn_of_kinks
from lightning_mmd.data import SampleDataModule
from lightning_mmd.finite import refuse_not_finite, refuse_to_save
from lightning_mmd.game import DivergedError, Game, GradientHook, Player, UpdateRule
from lightning_mmd.internals import (
    attached_trainer,
    built_by_command_line,
    callbacks_of,
    change_logged_hyperparameters,
    keep_hyperparameters,
    uncompile,
    uncounted,
)
from lightning_mmd.latents import Inputs, Latents, as_inputs, with_labels
from lightning_mmd.masking import masked
from lightning_mmd.parameters import plain_name
from lightning_mmd.passes import copy_network, counter_seed, evaluating, full_precision, seeded
from lightning_mmd.points import require_tensors
from lightning_mmd.pretrained import Pretrained
from lightning_mmd.processes import SHARDING, TrainerProcesses, refuse_different_parameters
from lightning_mmd.pushforward import check_samples
from lightning_mmd.safety import opened
from lightning_mmd.standard import standard_rule

__all__ = ["MMDGAN"]

_PLAIN = (bool, int, float, str, type(None))


class MMDGAN(Pretrained):
    r"""A generator trained against a kernel critic, by an update rule.

    The rule is the algorithm: `GradientAscent` trains the critic, `ClosedForm` solves for it and
    descends the MMD, `DeepKernel` trains a kernel. This class samples, keeps the
    clocks, shares work among processes, saves and logs.

    One batch is one critic step, and every ``critic_steps``-th batch moves the generator too.
    ``trainer.global_step`` counts generator updates only, so ``max_steps``, checkpoints, loggers
    and averages are all on that clock. Latents and dropout masks are functions of (seed, rank,
    critic step), so that processes differ and a resumed run draws what it would have drawn.

    W processes, on plain ``strategy="ddp"`` and one or several nodes, follow the gradients of one
    process on the concatenated batch, the penalties' and the witness' included, where no layer has
    batch statistics; a checkpoint is refused when their parameters are no longer equal bit for bit.
    Under ``bf16-mixed`` penalties and witness stay in float32. Networks may be compiled
    (``model.generator.compile()``): passes that need no second derivative then run compiled.

    Args:
        generator: Any module from latents to samples.
        critic: What the rule trains: a ``LearnedKernelCritic``, any module from samples to values
            (n,) or (n, 1), or a module from samples to embeddings.
        rule: How the two move. Default: `standard_rule`, the one that draws best.
        latents: Length of a standard normal latent vector, or a callable from a number n to
            latents for n samples, alone or in a tuple with labels, see `Latents`.
        critic_steps: Critic steps, each on a batch of its own, for one generator update, >= 1.
        micro_batches: Parts that a batch is evaluated in, >= 1, one at a time in memory. The
            gradients are those of the whole batch (but for layers with batch statistics).
            Networks are evaluated anew where the whole batch would be kept.
        generator_optimizer: Callable from parameters to an optimizer. Default: the rule's own.
        critic_optimizer: Likewise, for the critic.
        generator_scheduler: Callable from an optimizer to a learning-rate scheduler, stepped after
            each generator update.
        critic_scheduler: Likewise, stepped after each critic step.
        generator_clip_norm: Largest norm of the generator's gradient, > 0; default: no clipping.
        critic_clip_norm: Likewise for the critic.
        batch: Where samples and labels stand in a batch. Default: a tensor, or first and second in
            a tuple.
        seed: Seed of latents and dropout.

    Raises:
        ValueError: If a number is out of its range, or the networks do not suit each other.
        TypeError: If the critic does not suit the rule.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402.

    Examples:
        >>> from lightning_mmd import ClosedForm, LearnedKernelCritic
        >>> critic = LearnedKernelCritic(nn.Linear(2, 8), 8)
        >>> model = MMDGAN(nn.Linear(3, 2), critic, ClosedForm(beta=0.1), latents=3)
        >>> model.sample(5).shape
        torch.Size([5, 2])
    """

    saved_average: dict[str, Any] | None = None
    """Averaged weights of the checkpoint that was loaded last; None where it has none."""

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        rule: UpdateRule | None = None,
        latents: int | Latents | Callable[[int], Any] = 32,
        critic_steps: int = 1,
        micro_batches: int = 1,
        generator_optimizer: OptimizerCallable | None = None,
        critic_optimizer: OptimizerCallable | None = None,
        generator_scheduler: LRSchedulerCallable | None = None,
        critic_scheduler: LRSchedulerCallable | None = None,
        generator_clip_norm: float | None = None,
        critic_clip_norm: float | None = None,
        batch: BatchParts | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_integers(critic_steps=critic_steps, micro_batches=micro_batches, seed=seed)
        _check_builders(
            generator_optimizer, critic_optimizer, generator_scheduler, critic_scheduler
        )
        _check_parts(rule, batch, generator=generator, critic=critic)
        _check_positive(
            critic_steps=critic_steps,
            micro_batches=micro_batches,
            generator_clip_norm=generator_clip_norm,
            critic_clip_norm=critic_clip_norm,
        )
        # The rule keeps state, which two models must not share.
        self.rule = standard_rule(critic) if rule is None else copy.deepcopy(rule)
        self.rule.check(generator, critic)
        self._rule_as_given = repr(self.rule)
        # Built by a command line, all arguments are recorded as class paths and a checkpoint loads
        # by its path alone. Modules that were built in Python cannot be recorded so.
        self.save_hyperparameters(ignore=[] if built_by_command_line() else ["generator", "critic"])
        if not built_by_command_line():
            named = {n for n, value in self.hparams.items() if isinstance(value, _PLAIN)}
            keep_hyperparameters(self, named)
        self.automatic_optimization = False
        self.generator = generator
        self.critic = critic
        self.latents = Latents.of(latents)
        self.critic_steps = critic_steps
        self.micro_batches = micro_batches
        self.generator_optimizer = generator_optimizer
        self.critic_optimizer = critic_optimizer
        self.generator_scheduler = generator_scheduler
        self.critic_scheduler = critic_scheduler
        self.generator_clip_norm = generator_clip_norm
        self.critic_clip_norm = critic_clip_norm
        self.batch = BatchParts() if batch is None else batch
        self.seed = seed
        self.critic_step = 0
        self.images_seen = 0
        self.cumulative_lr = 0.0
        self._gradient_hooks: OrderedDict[int, GradientHook] = OrderedDict()
        self._averaged: tuple[nn.Module, ...] = ()  # a tuple hides it from parameters()
        self._generator_metrics: dict[str, Any] = {}
        self._last_latents: tuple[Tensor, ...] = (torch.zeros(()),)

    # Sampling

    def forward(self, *latents: Tensor) -> Tensor:
        """Return the generator's samples for latents, and labels where it takes any."""
        return self.generator(*latents)

    def sample_latents(self, num: int) -> Inputs:
        """Draw latents from torch's global random state; equal on every device.

        Args:
            num: How many.

        Returns:
            Latents for ``num`` samples, on the model's device; floating-point ones in its dtype.
            A tuple, where they carry labels.
        """
        dtype = next(p for p in self.generator.parameters() if p.is_floating_point()).dtype
        latents, *labels = self.latents(num, dtype, self.device)
        return (latents, *labels) if labels else latents

    def fixed_latents(self, num: int, seed: int = 0) -> Inputs:
        """Return latents that depend on the seed alone; torch's random state is left as it is.

        Args:
            num: How many.
            seed: Which.

        Returns:
            Latents for ``num`` samples, as :meth:`sample_latents` returns them.
        """
        with seeded(self.device, seed):
            return self.sample_latents(num)

    @torch.no_grad()
    def sample(self, num: int, latents: Inputs | None = None, labels: Any = None) -> Tensor:
        """Generate samples in eval mode, with averaged weights where there are any.

        Args:
            num: How many, >= 1; the length of ``latents`` if these are given.
            latents: Latents to use, in a tuple with labels where the generator takes any; default:
                fresh ones from torch's global random state.
            labels: Classes to generate, where the generator takes any: one for all, or ``num``.
                Default: those that the latents carry.

        Returns:
            Samples of shape (num, ...), on the model's device.

        Raises:
            ValueError: If ``num`` or the labels do not fit.
        """
        _check_integers(num=num)
        inputs = as_inputs(self.sample_latents(num) if latents is None and num >= 1 else latents)
        for part in inputs if latents is not None else ():
            require_tensors("sample", latents=part)
        if num < 1 or len(inputs[0]) != num:
            length = "none" if latents is None else len(inputs[0])
            raise ValueError(f"sample needs num >= 1 and as many latents, got {num} and {length}.")
        if labels is not None:
            inputs = with_labels(inputs, labels, getattr(self.latents, "num_classes", None))
        average = self.averaged_generator
        generator = self.generator if average is None else average.to(self.device)
        with evaluating(generator):
            return generator(*inputs)

    @property
    def averaged_generator(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> nn.Module | None:
        """What ``sample`` uses in place of the generator: of `GeneratorEMA`, or a checkpoint."""
        return next(iter(self._averaged), None)

    def sample_with(self, generator: nn.Module | None) -> None:
        """Let ``sample`` use another generator from now on, which is not trained or saved.

        Args:
            generator: For example an average of weights; None for the generator itself.
        """
        self._averaged = () if generator is None else (generator,)

    def register_gradient_hook(self, hook: GradientHook) -> RemovableHandle:
        """Let a function change the gradients that generated samples follow in a generator update.

        Args:
            hook: Function of samples x, and of the gradient as a function of samples, to gradients
                of x's shape that the generator follows instead; None to leave the step alone. The
                critic's own step is not changed.

        Returns:
            A handle whose ``remove()`` takes the hook away.
        """
        handle = RemovableHandle(self._gradient_hooks)
        self._gradient_hooks[handle.id] = hook
        return handle

    # Training

    def configure_callbacks(self) -> list[Any]:
        """Refuse arguments of the Trainer that the model has its own of.

        Raises:
            ValueError: If the trainer accumulates or clips gradients.
        """
        trainer = self.trainer
        if trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches}) is not for "
                "MMDGAN, whose penalties and witness are those of the whole batch. Take the large "
                "batch in the data, and evaluate it in parts: "
                f"MMDGAN(micro_batches={trainer.accumulate_grad_batches})."
            )
        if trainer.gradient_clip_val:
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) is not for MMDGAN, which "
                "moves two networks. Clip each one's gradient: "
                f"MMDGAN(generator_clip_norm={trainer.gradient_clip_val}, "
                f"critic_clip_norm={trainer.gradient_clip_val})."
            )
        return []

    def setup(self, stage: str) -> None:
        """Refuse strategies that shard, leave the step uncompiled, write checkpoints whole.

        Args:
            stage: ``fit``, ``validate``, ``test`` or ``predict``.

        Raises:
            ValueError: If the strategy shards parameters.
        """
        if stage == "fit" and isinstance(self.trainer.strategy, SHARDING):
            raise ValueError(
                f"{type(self.trainer.strategy).__name__} shards parameters among processes, but "
                "penalties and witness differentiate in the generator's whole parameter "
                "vector on each. Use strategy='ddp', with micro_batches > 1 where memory is short."
            )
        if stage == "fit":
            self.sample_with(None)
        use_whole_checkpoints(self.trainer)
        change_logged_hyperparameters(self, masked)
        if uncompile(self):
            rank_zero_warn(
                "torch.compile(model) is undone: a training step here takes second derivatives, "
                "which compiled code does not have. Compile the networks instead, "
                "model.generator.compile() and model.critic.compile(): whatever needs no second "
                "derivative then runs compiled."
            )

    def on_fit_start(self) -> None:
        """Check precision, activations, optimizers, and that latents, generator and critic fit."""
        if self.trainer.precision == "16-mixed":
            raise ValueError(
                "precision='16-mixed' is not supported: gradients of penalties under a loss scale "
                "overflow. Use 'bf16-mixed' or '32-true'."
            )
        if getattr(self.rule, "alpha", 0) > 0:
            warn_of_kinks(self.critic)
        self.rule.check_players(*self._players())
        self.check_networks()

    def on_train_start(self) -> None:
        """Say what is not exact in a training that resumes."""
        warn_of_inexact_order(self.trainer)

    def check_networks(self) -> None:
        """Run two latents through generator and critic in eval mode.

        Raises:
            ValueError: If the generator does not take the latents, the critic does not take its
                samples, or its samples do not have the shape of the trainer's data.
        """
        z = as_inputs(self.fixed_latents(2))
        shapes = " and ".join(str(tuple(part.shape)) for part in z)
        with torch.no_grad(), evaluating(self.generator), evaluating(self.critic):
            try:
                x = self.generator(*z)
            except Exception as error:
                raise ValueError(
                    f"the generator {type(self.generator).__name__} does not take latents of shape "
                    f"{shapes}: {str(error).rstrip('.')}. Set latents (now "
                    f"{self.latents.dim or 'a callable'}) to what it takes."
                ) from error
            check_samples(self.generator, x, 2)
            data = getattr(attached_trainer(self), "datamodule", None)
            if isinstance(data, SampleDataModule):
                like = torch.empty(0, *data.sample_shape, dtype=x.dtype)
                self._game((like,)).check_samples(x)
                self.latents.check_data(data.labels, data.num_classes)
            try:
                self.rule.gap(self.critic, (x, *z[1:]), (x, *z[1:]))
            except (TypeError, ValueError):
                raise
            except Exception as error:
                raise ValueError(
                    f"the critic {type(self.critic).__name__} does not take the generator's "
                    f"samples of shape {tuple(x.shape[1:])}: {str(error).rstrip('.')}. Give both "
                    "networks the shape of the data."
                ) from error

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """Make one critic step and, every ``critic_steps``-th time, one generator update.

        Args:
            batch: Real samples (n, ...), alone or with labels, see ``batch``.
            batch_idx: Not used.

        Raises:
            ValueError: If the data hold NaN or do not have the generator's shape.
            DivergedError: If training has diverged.
        """
        game = self._game(self.batch.read(batch))
        with seeded(self.device, self.seed, self.global_rank, self.critic_step):
            try:
                refuse_not_finite((game.generator, game.critic), self.rule)
                metrics = self.rule.update(game)
            except DivergedError as error:
                told = self._explained(error, game)
                if not self._rescued(told):
                    raise told from error
                return
        self.cumulative_lr = game.generator.cumulative_lr
        if game.moves_generator:
            self._generator_metrics = metrics
        metrics = self._generator_metrics | metrics  # of the last update, on batches without one
        self.critic_step += 1
        self.images_seen += game.batch_size * self.trainer.world_size
        metrics |= {
            "critic_step": self.critic_step,
            "images_seen": self.images_seen,
            "cumulative_lr": self.cumulative_lr,
            "step": self.trainer.global_step,  # the axis that loggers use
        }
        size = game.batch_size  # given, so that Lightning does not look for it in the batch
        self.log("gap", metrics["critic/gap"], prog_bar=True, logger=False, batch_size=size)
        self.log_dict(
            {name: torch.as_tensor(value).float() for name, value in metrics.items()},
            batch_size=size,
        )

    def _game(self, real: tuple[Tensor, ...]) -> Game:
        trainer = attached_trainer(self)
        training = trainer is not None and trainer.training
        return Game(
            *(self._players() if training else self._bare_players()),
            real,
            self._draw,
            step=self.critic_step,
            moves_generator=(self.critic_step + 1) % self.critic_steps == 0,
            micro_batches=self.micro_batches,
            **({"processes": TrainerProcesses(trainer)} if trainer is not None else {}),
            hooks=tuple(self._gradient_hooks.values()),
            pairs=self.latents.paired,
        )

    def _draw(self, num: int) -> Inputs:
        latents = self.sample_latents(num)
        self._last_latents = as_inputs(latents)  # whose fault it was, where numbers diverge
        return latents

    def _bare_players(self) -> tuple[Player, Player]:
        """Players that cannot move."""
        return (
            Player(
                "generator",
                self.generator,
                self.rule.generator_parameters(self.generator),
                None,
                clip_norm=self.generator_clip_norm,
                cumulative_lr=self.cumulative_lr,
            ),
            Player(
                "critic",
                self.critic,
                self.rule.critic_parameters(self.critic),
                None,
                clip_norm=self.critic_clip_norm,
            ),
        )

    def _players(self) -> tuple[Player, Player]:
        """Generator and critic with the trainer's optimizers; only the generator's steps count."""
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        schedulers = self.lr_schedulers() or []
        schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
        players = self._bare_players()
        for player, optimizer in zip(players, optimizers, strict=False):
            optimizer = cast(Any, optimizer)
            counts = player.name == "generator"
            player.optimizer = cast(Any, optimizer if counts else uncounted(optimizer))
            player.schedulers = [
                cast(LRScheduler, s) for s in schedulers if s.optimizer is optimizer.optimizer
            ]
        return players

    def _explained(self, error: DivergedError, game: Game) -> Exception:
        """Say whether the data or the training is to blame; all processes say the same."""
        clean = torch.stack([part.isfinite().all() for part in as_inputs(game.real)]).all()
        if game.processes.mean(clean.double()) < 1:
            return ValueError(
                "a batch of real data holds NaN or infinite values. Clean the data set; nothing "
                f"was updated with this batch (generator update {self.trainer.global_step})."
            )
        latents = torch.stack([part.isfinite().all() for part in self._last_latents]).all()
        if game.processes.mean(latents.double()) < 1:
            return ValueError(
                "the latents hold NaN or infinite values. Look at the callable that draws them; "
                f"nothing was updated with them (generator update {self.trainer.global_step})."
            )
        return DivergedError(
            f"training has diverged: {error} is not finite at generator update "
            f"{self.trainer.global_step}. Lower the learning rates (or eta), or raise alpha or "
            "beta, and go on from a checkpoint of well before this update; the callback "
            "OnDivergence keeps one."
        )

    def _rescued(self, error: Exception) -> bool:
        """Ask the callbacks whether training goes on; all processes get the same answer."""
        rescuers = (getattr(c, "on_divergence", None) for c in callbacks_of(self.trainer))
        return isinstance(error, DivergedError) and any(
            rescue(self.trainer, self, error) for rescue in rescuers if rescue is not None
        )

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the critic's gap between held-out data and fresh samples, as ``val/gap``.

        Of several loaders each has its own: ``val/gap/dataloader_idx_1``.
        """
        self._log_gap("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the critic's gap between test data and fresh samples, as ``test/gap``."""
        self._log_gap("test", batch, batch_idx, dataloader_idx)

    def _log_gap(self, stage: str, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        real = self.batch.read(batch)
        game = self._game(real)
        num = game.batch_size
        if game.processes.mean(game.images.isfinite().all().float()) < 1:  # all stop, or none
            raise ValueError(
                f"a batch of {stage} data holds NaN or infinite values. Clean the data set."
            )
        z = as_inputs(self.fixed_latents(num, counter_seed(self.global_rank, batch_idx)))
        with full_precision(self.device):
            fake = self.sample(num, z)
            game.check_samples(fake)
            gap = self.rule.gap(self.critic, game.target(z), (fake, *z[1:]))
        self.log(f"{stage}/gap", gap, batch_size=num, sync_dist=True)
        if self.trainer.state.fn == TrainerFn.FITTING and dataloader_idx == 0:
            step = float(self.trainer.global_step)
            self.log("step", step, batch_size=num, add_dataloader_idx=False)

    # Optimizers

    def configure_optimizers(self) -> tuple[list, list]:
        """Build the optimizers of generator and critic, in this order, and their schedulers.

        Returns:
            Optimizers and schedulers.

        Raises:
            ValueError: If a scheduler needs a metric.
        """
        build_generator = self.generator_optimizer or self.rule.generator_optimizer
        build_critic = self.critic_optimizer or self.rule.critic_optimizer
        generator, critic = self._bare_players()
        optimizers = [build_generator(generator.parameters.values())]
        if critic.parameters:  # fixed features leave nothing to train in closed form
            optimizers.append(build_critic(critic.parameters.values()))
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

    # State

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: str | Path | IO[bytes],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        trust: Sequence[str] = (),
        **kwargs: Any,
    ) -> "MMDGAN":
        """Build a model from a checkpoint, which may run no code of a stranger.

        The file is read as plain data. What it names is checked before anything is built: classes
        of torch.nn, torch.optim, torchvision.models and this package, and of modules that the
        running program has imported.

        Args:
            checkpoint_path: The file.
            map_location: Device to load to; default: where it was saved.
            hparams_file: Must be None: give arguments by their names instead.
            strict: Whether all weights must fit.
            weights_only: False reads the file as a pickle, which may run any code; default: True.
            trust: Names of further modules whose classes and functions the checkpoint may name.
            kwargs: Arguments of the class, in place of the checkpoint's.

        Returns:
            The model, with averaged weights where the checkpoint has them.

        Raises:
            UntrustedError: If the checkpoint asks for what it may not ask for.
            ValueError: If the file is damaged or no checkpoint of this class.
        """
        if hparams_file is not None:
            raise ValueError("hparams_file is not read. Give arguments by name: beta=0.1, ...")
        weights_only = weights_only is not False
        saved = read_checkpoint(checkpoint_path, weights_only=weights_only)
        recorded = saved.get("hyper_parameters") or {}
        with opened(cls, recorded, kwargs, trust):
            model = super().load_from_checkpoint(
                checkpoint_path, map_location, None, strict, weights_only, **kwargs
            )
        if "_instantiator" in recorded and all(isinstance(v, _PLAIN) for v in kwargs.values()):
            model.save_hyperparameters(recorded | kwargs)  # class paths, for the next file
        return model

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the counters and the rule's state; compare processes' parameters.

        Parameters have the names that they have uncompiled.

        Raises:
            RuntimeError: If processes hold different parameters.
            DivergedError: If a parameter or an optimizer's state is not finite.
        """
        trainer = attached_trainer(self)
        if trainer is not None and trainer.state.status == TrainerStatus.RUNNING:
            # while interrupted, a process may be alone here
            refuse_different_parameters(trainer, self)
        refuse_to_save(self, checkpoint.get("optimizer_states"))
        state_dict = checkpoint["state_dict"]
        checkpoint["state_dict"] = {plain_name(name): p for name, p in state_dict.items()}
        checkpoint["mmdgan"] = {
            "critic_step": self.critic_step,
            "images_seen": self.images_seen,
            "cumulative_lr": self.cumulative_lr,
            "generator_metrics": {n: float(v) for n, v in self._generator_metrics.items()},
            "rule": self._rule_as_given,
            "rule_state": self.rule.state_dict(),
        }
        if self.averaged_generator is not None:
            checkpoint["mmdgan"]["average"] = self.averaged_generator.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters, the rule's state and averaged weights.

        Raises:
            ValueError: If the checkpoint is of another package, or was trained by another rule.
        """
        if "mmdgan" not in checkpoint:
            raise ValueError(
                "the checkpoint is not one of MMDGAN. Load its weights into a network yourself: "
                "model.generator.load_state_dict(...)."
            )
        state = checkpoint["mmdgan"]
        self._check_rule(state["rule"])
        present = {plain_name(name): name for name in self.state_dict()}
        checkpoint["state_dict"] = {
            present.get(plain_name(name), name): p for name, p in checkpoint["state_dict"].items()
        }
        self.critic_step = state["critic_step"]
        self.images_seen = state["images_seen"]
        self.cumulative_lr = state["cumulative_lr"]
        self._generator_metrics = dict(state["generator_metrics"])
        pretrained = state.get("pretrained")
        if pretrained is None:
            self.rule.load_state_dict(state["rule_state"])
        elif pretrained["without_critic"]:
            fresh = {n: p for n, p in self.state_dict().items() if n.startswith("critic.")}
            checkpoint["state_dict"] |= fresh
        self.saved_average = state.get("average")
        trainer = attached_trainer(self)
        trains = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if self.saved_average is not None and not trains:  # in training it is for who averages
            average = copy_network(self.generator)
            average.load_state_dict(self.saved_average)
            self.sample_with(average)

    def _check_rule(self, trained_by: str) -> None:
        """Compare this model's rule with the one that a checkpoint was trained by."""
        own = self._rule_as_given
        if own.split("(")[0] != trained_by.split("(")[0]:
            raise ValueError(
                f"the checkpoint was trained by {trained_by}, but this model has {own}. Give the "
                "model that rule, MMDGAN(generator, critic, rule=...)."
            )
        if own != trained_by:
            rank_zero_warn(
                f"the checkpoint was trained by {trained_by}; this model goes on with {own}."
            )


def _check_positive(**numbers: float | None) -> None:
    for name, number in numbers.items():
        if not isinstance(number, (int, float, type(None))):
            raise TypeError(f"{name} must be a number, got {number!r}.")
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} must be a positive number, got {number}.")


def _check_parts(rule: Any, batch: Any, **networks: Any) -> None:
    for name, network in networks.items():
        if isinstance(network, type):
            raise TypeError(
                f"{name} must be a network, got the class {network.__name__}: call it, "
                f"{network.__name__}(...)."
            )
        if not isinstance(network, nn.Module):
            raise TypeError(f"{name} must be a torch.nn.Module, got {network!r}.")
    if not isinstance(rule, (UpdateRule, type(None))):
        raise TypeError(
            f"rule must be an UpdateRule such as ClosedForm() or GradientAscent(), got {rule!r}."
        )
    if not isinstance(batch, (BatchParts, type(None))):
        raise TypeError(f"batch must be a BatchParts, got {batch!r}.")


def _check_integers(**numbers: Any) -> None:
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"{name} must be an integer, got {number!r}.")


def _check_builders(*builders: Any) -> None:
    """Refuse an optimizer in place of what makes one."""
    names = [f"{player}_{kind}" for kind in _BUILDS for player in ("generator", "critic")]
    for name, builder in zip(names, builders, strict=True):
        if builder is not None and not callable(builder):
            raise TypeError(
                f"{name} must be {_BUILDS[name.partition('_')[2]]}, got {type(builder).__name__}."
            )


_BUILDS = {
    "optimizer": "a callable from parameters to an optimizer, such as torch.optim.Adam",
    "scheduler": "a callable from an optimizer to a scheduler, such as "
    "lambda optimizer: ExponentialLR(optimizer, 0.9)",
}
