"""Whether the game converges: watched while it is played, told in one sentence."""

import dataclasses
import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_mmd.batches import BatchParts
from lightning_mmd.callbacks.cadence import GeneratorCadence, Sampling
from lightning_mmd.callbacks.foreign import find_network, read_values, takes
from lightning_mmd.callbacks.images import RangeCheck, training_images
from lightning_mmd.callbacks.learning_rates import scale_learning_rates
from lightning_mmd.callbacks.loggers import describe, send_scalars
from lightning_mmd.callbacks.observing import observing
from lightning_mmd.critic_values import evaluate_critic
from lightning_mmd.game import DivergedError
from lightning_mmd.kernels import Gaussian, Kernel, median_bandwidth
from lightning_mmd.mmd import mmd2_unbiased, two_sample_test
from lightning_mmd.module import MMDGAN
from lightning_mmd.passes import evaluating
from lightning_mmd.points import gram_dtype
from lightning_mmd.processes import together
from lightning_mmd.verdicts import VERDICTS, Traces, Verdict, judge
from lightning_mmd.wide import widen

__all__ = ["ConvergenceMonitor"]


class Before(NamedTuple):
    """What an update is compared with."""

    inputs: tuple[Tensor, ...]
    points: Tensor
    values: Tensor | None
    mmd2: float


class ConvergenceMonitor(GeneratorCadence):
    """Tell whether the game converges, cycles or has collapsed, and what to do.

    Every ``every_n_steps`` generator updates it compares samples with training images and the
    critic with itself one step ago: MMD^2, whether this update lowered it on the same latents (the
    sampled stand-in of the descent certificate), the diversity of samples, the norm of L f, how
    much one step changes the critic, a random projection of the generator's parameters and, where
    the rule is `ClosedForm`, the efficiency of the flow. `judge` makes one verdict of the traces:
    converging, converged, cycling, collapsed, critic too weak, critic too strong, rising, stalled,
    or undecided, with the advice that the papers give. A verdict that changes is told, and the last
    one at the end of training, also where it diverged.

    Logged on the axis of generator updates, as ``convergence/...``: the traces, and the verdict by
    its number in `VERDICTS`. A resumed run goes on exactly. With several processes the first one
    observes. The verdict is about the training data: `MMDTracker` measures on held-out data.

    Args:
        every_n_steps: Generator updates between observations, at least 1. A cycle must last a few
            of them to be seen.
        kernel: Kernel on flattened images; default: Gaussian with the median distance of the data.
        num_samples: Samples and images compared, at least 10.
        critic: Attribute of the LightningModule that holds the critic, a module from samples, and
            labels where ``fixed_latents`` returns some, to values (n,) or (n, 1); None to leave the
            critic alone.
        generator: Attribute that holds the generator.
        act: Whether to halve all learning rates when a collapse is found, and again every 20
            observations for which it lasts. It helps where the step was too long. Under a kernel
            that is narrow beside the distance of the modes a collapse is a limit of the dynamics:
            the same at every step size (`step_halving` says "converged" there), so no rate leaves
            it; a wider kernel or noise does. No experiment of ours shows a network's collapse left
            by the rate alone.
        seed: Of images, latents and projection.
        critic_values: Callable from what the critic returns (a list, a tuple of features) to values
            (n,) or (n, 1); default: maps (n, 1, h, w) are averaged over their places.
        generator_output: Callable from what the module's ``sample`` returns to a tensor of samples.
        batch: Where images stand in a batch. Default: the module's own ``batch``, else first.
        sampler: Name of the module's method that samples.

    Attributes:
        traces: What was observed.
        verdict: The newest verdict, None before the first.
        floor: What MMD^2 between two halves of the images hardly exceeds (1 % of permutations do),
            scaled to the whole number.

    Raises:
        ValueError: If a number is out of range; at set-up, if the module has no such critic or
            generator; at the start, if there are fewer than 10 images.
        TypeError: If the training data cannot be read by index.

    Source:
        See `lightning_mmd.verdicts.judge`; Turinici, arXiv 2012.10410, for acting on a collapse.

    Examples:
        >>> monitor = ConvergenceMonitor(every_n_steps=10)
        >>> trainer = Trainer(max_steps=400, callbacks=[monitor], logger=False)
    """

    def __init__(
        self,
        every_n_steps: int = 5,
        kernel: Kernel | None = None,
        num_samples: int = 256,
        critic: str | None = "critic",
        generator: str | None = "generator",
        act: bool = False,
        seed: int = 0,
        critic_values: Callable | None = None,
        generator_output: Callable | None = None,
        batch: BatchParts | None = None,
        sampler: str = "sample",
    ) -> None:
        super().__init__(every_n_steps, generator, generator_output, sampler)
        if num_samples < 10:
            raise ValueError(
                f"ConvergenceMonitor needs num_samples of at least 10, got {num_samples}."
            )
        self.kernel = kernel
        self.num_samples = num_samples
        self.critic = critic
        self.critic_values = critic_values
        self.batch = batch
        self.act = act
        self.seed = seed
        self.traces = Traces()
        self.verdict: Verdict | None = None
        self.floor = math.nan
        self._acted_at: int | None = None  # number of observations
        self._before: Before | None = None
        self._direction: Tensor | None = None
        self._range = RangeCheck(self)
        self._module: LightningModule | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self.generator is not None:
            find_network(self, pl_module, "generator", self.generator)
        if self.critic is not None:
            find_network(self, pl_module, "critic", self.critic)

    def reset(self) -> None:
        """Forget an earlier run."""
        super().reset()
        self.traces, self.verdict, self._acted_at = Traces(), None, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._module, self._before = pl_module, None
        self._network = self.find_generator(trainer, pl_module)
        with together(trainer):
            if trainer.is_global_zero:
                with observing(pl_module.device):
                    torch.manual_seed(self.seed)  # of random transforms
                    images, *self._labels = training_images(
                        self, trainer, self.num_samples, self.seed, self.batch
                    )
                    self._prepare(images)
                describe(trainer, "convergence", {"split": "training", "num_real": len(self._real)})
        super().on_train_start(trainer, pl_module)

    def _prepare(self, images: Tensor) -> None:
        if len(images) < 10:
            raise ValueError(
                f"ConvergenceMonitor needs at least 10 training images, got {len(images)}."
            )
        module = self._watched()
        self._real = images.to(gram_dtype(images)).to(module.device)
        self._range.real(self._real)
        flat = self._real.flatten(1)
        self._kernel = self.kernel or Gaussian(median_bandwidth(flat))
        test = two_sample_test(flat[::2], flat[1::2], self._kernel, num_permutations=200)
        # The null distribution of the U-statistic scales like 1 / n.
        self.floor = max(test.null_statistics.quantile(0.99).item() / 2, 1e-12)
        self._spread = _mean_distance(self._real)
        num = sum(p.numel() for p in self._network.parameters())
        seeded = torch.Generator().manual_seed(self.seed)
        direction = torch.randn(num, generator=seeded, dtype=torch.float64)
        self._direction = direction / direction.norm()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        ahead = self.updates + self.stride  # where this batch leads to, if it moves the generator
        passes = ahead // self.every_n_steps > self.updates // self.every_n_steps
        if not passes:
            return
        with together(trainer), self._looking(trainer, pl_module) as model:
            if trainer.is_global_zero:
                self._before = self._look(self.updates, model)

    def observe(self, trainer: Trainer, model: Sampling) -> None:
        with together(trainer):
            if trainer.is_global_zero:
                self._record(trainer, model)
        if self.act:
            self._leave_a_collapse(trainer)

    @torch.no_grad()
    def _look(self, step: int, model: Sampling) -> Before:
        seed = random.Random(f"convergence {self.seed} {step}").getrandbits(32)
        inputs = model.fixed_latents(self.num_samples, seed)
        fake = self._range.generated(model.sample(inputs))
        self._dtype = fake.dtype  # what the critic takes
        points = torch.cat([self._real, fake.to(self._real.dtype)])
        values = self._evaluate(points, inputs[1:])
        return Before(inputs, points, values, self._mmd2(fake))

    @torch.no_grad()
    def _record(self, trainer: Trainer, model: Sampling) -> None:
        before, self._before = self._before, None
        look = self._look(self.updates, model)
        descent = change = math.nan
        if before is not None:
            descent = self._mmd2(model.sample(before.inputs)) - before.mmd2
            after = self._evaluate(before.points, before.inputs[1:])
            if after is not None and before.values is not None:
                sizes = float(after.std() + before.values.std())
                change = float((after - before.values).std()) / max(sizes, 1e-30)
        gradient = trainer.callback_metrics.get("generator/gradient_norm")
        efficiency = trainer.callback_metrics.get("certificate/efficiency")
        parameters = self._network.parameters()
        theta = torch.cat([widen(p.detach().flatten()).cpu() for p in parameters])
        entry = {
            "mmd2": look.mmd2,
            "descent": descent,
            "diversity": _mean_distance(look.points[len(self._real) :]) / self._spread,
            "critic_scale": math.nan if look.values is None else float(look.values.std()),
            "critic_change": change,
            "gradient_norm": math.nan if gradient is None else float(gradient),
            "efficiency": math.nan if efficiency is None else float(efficiency),
            "projection": math.nan if self._direction is None else float(theta @ self._direction),
        }
        self.traces.steps.append(self.updates)
        for name, value in entry.items():
            getattr(self.traces, name).append(value)
        verdict = judge(self.traces, self.floor)
        if self.verdict is not None and verdict.name != self.verdict.name:
            rank_zero_info(f"ConvergenceMonitor, update {self.updates}: {verdict}")
        self.verdict = verdict
        scalars = {f"convergence/{k}": v for k, v in entry.items() if math.isfinite(v)}
        scalars["convergence/verdict"] = VERDICTS.index(verdict.name)
        send_scalars(trainer, scalars, self.updates)

    def _leave_a_collapse(self, trainer: Trainer) -> None:
        observed = len(self.traces.steps)
        rested = self._acted_at is None or observed >= self._acted_at + 20
        collapsed = self.verdict is not None and self.verdict.name == "collapsed"
        if trainer.strategy.broadcast(collapsed and rested):
            rates = scale_learning_rates(trainer, 0.5)
            self._acted_at = observed
            shown = ", ".join(f"{rate:.3g}" for rate in rates)
            rank_zero_info(f"ConvergenceMonitor: collapsed; learning rates are now {shown}.")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if self.verdict is not None:
            rank_zero_info(f"ConvergenceMonitor: {self.verdict}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, DivergedError) and trainer.is_global_zero:
            self.verdict = judge(self.traces, self.floor, diverged=True)
            rank_zero_info(f"ConvergenceMonitor: {self.verdict}")

    def _evaluate(self, points: Tensor, labels: tuple[Tensor, ...]) -> Tensor | None:
        """Return the critic's values at real and generated points; labels are of the generated."""
        if self.critic is None:
            return None
        module = self._watched()
        points = points.to(self._dtype)
        critic, num = module.get_submodule(self.critic), len(self._real)
        halves = slice(0, num), slice(num, None)
        labels = labels if takes(critic, 1 + len(labels)) else ()  # some are the generator's alone
        with evaluating(critic):
            ours = self._labels if len(self._labels) == len(labels) else ()
            if labels and len(ours) == len(labels):
                labels = tuple(torch.cat(pair) for pair in zip(ours, labels, strict=True))
            elif labels:  # no labels of real images: the generated alone are looked at
                points = points[num:]
            if isinstance(module, MMDGAN):  # its critic may return embeddings
                real, fake = ((points[part], *(y[part] for y in labels)) for part in halves)
                values = module.rule.witness(critic, real, fake)
                return widen(evaluate_critic(values, points, *labels))
            try:
                output = critic(points, *labels)
            except Exception as error:
                raise ValueError(
                    f"ConvergenceMonitor calls the critic {self.critic!r} with samples of shape "
                    f"{tuple(points.shape)}"
                    f"{' and labels' if labels else ''}: {type(error).__name__}: "
                    f"{str(error).rstrip('.')}. Let fixed_latents return (latents, *labels) as the "
                    "critic takes them after the samples, or set critic=None."
                ) from error
            return widen(read_values(self, self.critic, output, len(points), self.critic_values))

    def _mmd2(self, fake: Tensor) -> float:
        flat = self._real.flatten(1)
        return mmd2_unbiased(flat, fake.flatten(1).to(flat), self._kernel).item()

    def _watched(self) -> LightningModule:
        if self._module is None:
            raise RuntimeError("ConvergenceMonitor observes in training only. Call trainer.fit.")
        return self._module

    def state_dict(self) -> dict[str, Any]:
        traces = {name: list(values) for name, values in dataclasses.asdict(self.traces).items()}
        return {**super().state_dict(), "traces": traces, "acted_at": self._acted_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.traces = Traces(**{k: list(v) for k, v in state_dict["traces"].items()})
        self._acted_at = state_dict["acted_at"]


def _mean_distance(points: Tensor) -> float:
    return float(torch.pdist(widen(points.flatten(1))).mean())
