r"""The classical MMD GAN: a characteristic kernel on a learned embedding, MMD^2 of the batch."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mmd.estimators import Estimator, Lagged
from lightning_mmd.game import DivergedError, Game, UpdateRule, check_weights
from lightning_mmd.kernel_objectives import (
    Attractive,
    KernelObjective,
    Repulsive,
    SlopePenalty,
    cross_mean,
    deep_mmd2,
    off_diagonal_mean,
)
from lightning_mmd.kernels import Gaussian, Kernel
from lightning_mmd.latents import select
from lightning_mmd.matching import EmbeddingStep, ascent_of_mmd2
from lightning_mmd.parted import (
    PartedPass,
    SharedEmbedding,
    contiguous_parts,
    generate,
    interleaved_parts,
    pull_back,
)
from lightning_mmd.passes import (
    buffers_kept,
    evaluating,
    frozen_power_iterations,
    full_precision,
)
from lightning_mmd.penalties import Held, hold, penalised_critic

__all__ = ["Attractive", "DeepKernel", "Repulsive", "SlopePenalty"]

Inputs = tuple[Tensor, ...]


@dataclass
class DeepKernel(UpdateRule):
    r"""Trains an embedding e; the generator descends MMD^2 under the kernel k(e(x), e(y)).

    .. math:: MMD^2 = E\,k(e(x), e(x')) + E\,k(e(y), e(y')) - 2 E\,k(e(x), e(y))

    The critic is any module from samples to embeddings (n, d), for example `EmbeddingCritic`; d of
    16 to 128 is usual. Expectations are unbiased means over the pairs of the batch, of all
    processes: each process embeds its share, embeddings are gathered (n d numbers sent a process,
    three times an update), and each process evaluates the Gram matrices of the whole, O(W^2 n^2 d).
    Where a batch is evaluated in parts, these are embedded one after the other, and then once more
    with a graph, which costs a forward pass.

    What callbacks see of a critic that returns embeddings:

    ============================= ==========================================================
    ``NoiseInjection``            gradients of the witness at noisy samples
    ``InstanceNoise``             noise on every sample that the critic embeds
    ``ConvergenceMonitor``        values of the witness of the batches that it looks at
    ``BandwidthSchedule``         ``target="rule.kernel"``: the width of the kernel
    ``val/gap``, ``critic/gap``   the unbiased MMD^2 of the embeddings
    ``ParametricGradientPenalty`` refused by name: ``alpha`` is here
    ============================= ==========================================================

    There is no penalty on the RKHS norm of the witness: its square is MMD^2 itself, so that it
    would only rescale the objective.

    Args:
        kernel: Characteristic kernel on embeddings. Default: ``Gaussian(1.0)``.
        objective: What the embedding ascends. Default: ``Repulsive()``.
        slope: Penalty on the slope of the witness. A critic with spectral normalisation needs none.
        alpha: Weight of the parametric-gradient penalty of the witness, >= 0.
        estimator: How a batch stands for that penalty's expectation. Default: ``Lagged()``.
        share_samples: Whether both steps of an update see the same generated samples: one pass of
            the generator less. The generator then follows a critic that has just been trained on
            these very samples.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If an argument is of another kind.

    Source:
        Li et al. 2017, arXiv 1705.08584; Binkowski et al. 2018, arXiv 1801.01401; Wang, Sun &
        Halgamuge 2019, arXiv 1812.09916.
    """

    kernel: Kernel | None = None
    objective: KernelObjective | None = None
    slope: SlopePenalty | None = None
    alpha: float = 0.0
    estimator: Estimator | None = None
    share_samples: bool = True
    _last_penalties: dict[str, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_weights(alpha=self.alpha)
        self.kernel = self.kernel or Gaussian(1.0)
        self.objective = self._objective = self.objective or Repulsive()
        self.estimator = self._estimator = self.estimator or Lagged()
        for name, kind, example in (
            ("kernel", Kernel, "Gaussian(1.0)"),
            ("objective", KernelObjective, "Repulsive()"),
            ("estimator", Estimator, "Lagged()"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"{name} must be a {kind.__name__} such as {example}, got "
                    f"{getattr(self, name)!r}."
                )
        if isinstance(self._objective, Repulsive):  # refuses other kernels by name
            self._kernel.of_squared_distances(torch.zeros(1))

    @property
    def _kernel(self) -> Kernel:
        """The kernel now: a callback may have changed its bandwidth."""
        return self.kernel or Gaussian(1.0)

    def generator_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Return Adam without momentum, as MMD GANs are trained."""
        return torch.optim.Adam(parameters, lr=1e-3, betas=(0.0, 0.99))

    def critic_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Return the same for the critic."""
        return self.generator_optimizer(parameters)

    def needs_equal_calls(self, micro_batches: int) -> str | None:
        """Name parts of a batch, which are embedded twice."""
        if micro_batches > 1:
            return "parts of a batch are embedded twice. Use micro_batches=1"
        return None

    def plain(self) -> "DeepKernel":
        """Return the rule with its slope penalised at real samples: other points are random."""
        slope = self.slope and dataclasses.replace(self.slope, at="real")
        return dataclasses.replace(self, slope=slope, estimator=copy.deepcopy(self.estimator))

    def gap(self, critic: nn.Module, real: Inputs, fake: Inputs) -> Tensor:
        """Return the unbiased MMD^2 of the embeddings."""
        return deep_mmd2(self._kernel, _embed(critic, *real), _embed(critic, *fake))

    def witness(self, critic: nn.Module, real: Inputs, fake: Inputs) -> Callable[..., Tensor]:
        """Return x -> mean k(e(x), e(real)) - mean k(e(x), e(fake)), of shape (n,)."""
        with torch.no_grad():
            references = _embed(critic, *real), _embed(critic, *fake)
        return self._witness(critic, *references)

    def _witness(self, critic: nn.Module, real: Tensor, fake: Tensor) -> Callable[..., Tensor]:
        def witness(*inputs: Tensor) -> Tensor:
            e = _embed(critic, *inputs)
            return self._kernel(e, real).mean(1) - self._kernel(e, fake).mean(1)

        return witness

    def update(self, game: Game) -> dict[str, Any]:
        """Move the embedding up its objective, and the generator down MMD^2."""
        z = game.latents()
        generated = generate(game, z, game.moves_generator and self.share_samples)
        if game.step == 0:
            network = game.generator.network
            with torch.no_grad(), full_precision(z[0].device), evaluating(network):
                game.check_samples(network(*select(z, slice(0, 1))))
        metrics = self._critic_step(game, z, generated)
        if game.moves_generator:
            if not self.share_samples:
                z = game.latents()
                generated = generate(game, z)
            metrics["generator/gradient_norm"] = self._generator_step(game, z, generated)
        return metrics

    def _critic_step(self, game: Game, z: Inputs, generated: PartedPass) -> dict[str, Any]:
        processes, critic = game.processes, game.critic
        real = game.target(z)
        fake = (generated.whole.to(real[0].dtype), *z[1:])
        of_real, of_fake = (
            SharedEmbedding(
                PartedPass(
                    critic.network,
                    lambda k, _, inputs=inputs: select(inputs, generated.parts[k]),
                    generated.parts,
                ),
                processes,
            )
            for inputs in (real, fake)
        )
        references = [of_real.everyone, of_fake.everyone]
        objective = self._objective.critic(self._kernel, *references, paired=game.paired)
        cotangents = list(torch.autograd.grad(-objective, references))
        penalties = self._penalty_terms(game, z, real, fake, references)
        direct = references[0].new_zeros(())
        for weight, evaluate in penalties:
            gradient, on_references = _gradients(weight * evaluate(), critic, references)
            direct = direct + gradient
            # The batch's embeddings are the witness: what hangs on them is shared by all processes.
            cotangents = [
                c + processes.mean(g) for c, g in zip(cotangents, on_references, strict=True)
            ]
        terms = [(of_real, cotangents[0]), (of_fake, cotangents[1])]
        gradient = processes.mean(direct + pull_back(critic, terms, processes))
        with torch.no_grad():
            mmd2 = deep_mmd2(self._kernel, *references, paired=game.paired)
        if not objective.isfinite():  # the same on all processes
            raise DivergedError("the critic's objective")
        metrics: dict[str, Any] = {"critic/gap": mmd2, "critic/objective": objective.detach()}
        metrics |= self._last_penalties
        metrics["critic/gradient_norm"] = critic.step(gradient)
        return metrics

    def _penalty_terms(
        self, game: Game, z: Inputs, real: Inputs, fake: Inputs, references: list[Tensor]
    ) -> list[tuple[float, Callable[[], Tensor]]]:
        """Weights of the penalties' parts, and what evaluates one; each is this process's share."""
        network = game.critic.network
        witness = self._witness(network, *references)
        terms: list[tuple[float, Callable[[], Tensor]]] = []
        if self.slope is not None and self.slope.due(game.step):
            points = self.slope.points(real, fake)
            value = functools.partial(self._slope_of, self.slope, network, witness, points)
            note = _Sum(self._last_penalties, "critic/slope_penalty")
            for part in contiguous_parts(game.batch_size, game.micro_batches):
                share = (part.stop - part.start) / game.batch_size
                evaluate = functools.partial(note, share, functools.partial(value, part))
                terms.append((self.slope.weight * self.slope.interval / 2, evaluate))
        if self.alpha > 0:
            terms += self._parametric_terms(game, z, witness)
        return terms

    @staticmethod
    def _slope_of(
        slope: SlopePenalty,
        network: nn.Module,
        witness: Callable[..., Tensor],
        points: Inputs,
        part: slice,
    ) -> Tensor:
        with frozen_power_iterations(network):
            return slope.value(witness, select(points, part))

    def _parametric_terms(
        self, game: Game, z: Inputs, witness: Callable[..., Tensor]
    ) -> list[tuple[float, Callable[[], Tensor]]]:
        """Likewise, of the parametric-gradient penalty."""
        network, estimator = game.critic.network, self._estimator
        indices = interleaved_parts(game, estimator.groups(game.batch_size))
        groups = [[select(z, index) for index in part] for part in indices]
        num_live = sum(len(group[-1][0]) for group in groups)
        generator, parameters = game.generator.network, game.generator.parameters
        mean = game.processes.mean
        held: Held | None = None
        if len(groups) > 1:
            with buffers_kept(network), frozen_power_iterations(network):
                held = hold(witness, generator, groups, estimator, parameters=parameters, mean=mean)
        note = _Sum(self._last_penalties, "critic/parametric_penalty")

        def value(group: list[Inputs]) -> Tensor:
            with frozen_power_iterations(network):
                return penalised_critic(
                    witness,
                    generator,
                    group,
                    "forward",
                    estimator=estimator,
                    held=held,
                    parameters=parameters,
                    mean=mean,
                ).penalty

        return [
            (
                self.alpha / 2,
                functools.partial(
                    note, len(group[-1][0]) / num_live, functools.partial(value, group)
                ),
            )
            for group in groups
        ]

    def _generator_step(self, game: Game, z: Inputs, generated: PartedPass) -> Tensor:
        step, kernel = EmbeddingStep(game, z, generated, game.critic.network), self._kernel
        noisy = None
        if game.hooks:
            everyone = step.of_fake.everyone.detach()
            noisy = step.moved_gradient(
                lambda e, itself: ascent_of_mmd2(
                    kernel, game.batch_size, e, step.of_real, everyone, itself, game.paired
                )
            )

        def loss(real: Tensor, fake: Tensor) -> Tensor:
            across = cross_mean(kernel(real, fake), game.paired)
            return off_diagonal_mean(kernel(fake, fake)) - 2 * across

        gradient = step.gradient(loss)
        self._estimator.observe(-gradient)
        return game.generator.step(gradient if noisy is None else noisy)

    def state_dict(self) -> dict[str, Any]:
        """Return the estimator's state and the penalties that were logged last."""
        penalties = dict(self._last_penalties)
        return {"estimator": self._estimator.state_dict(), "last_penalties": penalties}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._estimator.load_state_dict(state["estimator"])
        self._last_penalties = dict(state["last_penalties"])


class _Sum:
    """Adds up the shares of a penalty's value under a name, to be logged."""

    def __init__(self, values: dict[str, Tensor], name: str) -> None:
        self._values, self._name = values, name
        self._shares: list[Tensor] = []

    def __call__(self, share: float, evaluate: Callable[[], Tensor]) -> Tensor:
        value = share * evaluate()
        self._shares.append(value.detach())
        self._values[self._name] = torch.stack(self._shares).sum()
        return value


def _embed(critic: nn.Module, *inputs: Tensor) -> Tensor:
    """Return embeddings of shape (n, d), in float32 at least."""
    e = critic(*inputs)
    if not isinstance(e, Tensor) or e.ndim != 2 or len(e) != len(inputs[0]):
        got = tuple(e.shape) if isinstance(e, Tensor) else type(e).__name__
        raise ValueError(
            f"DeepKernel needs a critic from {len(inputs[0])} samples to embeddings of shape "
            f"({len(inputs[0])}, d), got {got}. Use EmbeddingCritic(features, num_features), or "
            "flatten its output."
        )
    return e.float() if e.dtype in (torch.bfloat16, torch.float16) else e


def _gradients(
    loss: Tensor, critic: Any, references: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the gradient of a loss in the critic's parameters, flat, and in the references."""
    values = list(critic.parameters.values())
    gradients = torch.autograd.grad(loss, [*values, *references], materialize_grads=True)
    flat = torch.cat([g.reshape(-1) for g in gradients[: len(values)]])
    return flat, gradients[len(values) :]
