"""The rule that trains the critic by gradient ascent, under both penalties."""

import copy
import dataclasses
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from lightning_mmd.critic_values import evaluate_critic
from lightning_mmd.critics import LearnedKernelCritic
from lightning_mmd.estimators import Estimator, Lagged, num_penalised
from lightning_mmd.game import DivergedError, Game, UpdateRule, check_weights
from lightning_mmd.kernel_objectives import SlopePenalty
from lightning_mmd.latents import select
from lightning_mmd.matching import EmbeddingStep, Embeds, FeatureMatching
from lightning_mmd.objectives import Linear, Objective
from lightning_mmd.parted import (
    PartedPass,
    Terms,
    generate,
    interleaved_parts,
    moved_gradient,
    slope_alone,
    summed,
)
from lightning_mmd.passes import Replay, evaluating, full_precision
from lightning_mmd.penalties import (
    Held,
    Method,
    critic_terms,
    hold,
    penalised_critic,
    rkhs_norm_penalty,
)

__all__ = ["GradientAscent"]

Inputs = tuple[Tensor, ...]


@dataclass
class GradientAscent(UpdateRule):
    r"""Trains weights and features of the critic by gradient ascent on a penalised objective.

    .. math:: \max_f \; E\,a(f(x)) + E\,b(f(G_\theta(z)))
        - \frac\alpha2 \| E_z \nabla_\theta f(G_\theta(z)) \|^2 - \frac\beta2 \|f\|_H^2

    The objective is the MMD's by default; with `Logistic`, `Hinge` or `KALE` the same two penalties
    act on a critic as other GANs have it, and alpha = beta = 0 is a plain GAN. ``Logistic()`` with
    ``slope=SlopePenalty(1.0, at="real")`` is the non-saturating GAN with R1.

    Args:
        alpha: Weight of the parametric-gradient penalty, >= 0.
        beta: Weight of the RKHS norm, >= 0; the critic must have one where beta > 0.
        objective: What critic and generator ascend. Default: ``Linear()``, the MMD.
        estimator: How a batch stands for the penalty's expectation. Default: ``Lagged()``.
        fraction: Part of the generated batch that the penalty is evaluated on, in (0, 1]. The
            estimate's variance grows by its inverse.
        method: ``forward``, ``double_backward`` or ``finite_difference``, see
            `parametric_gradient_penalty`.
        slope: Penalty on the slope of the witness, which is f; at real points (R1) it shares the
            pass that the objective makes there.
        share_samples: Whether both steps of an update see the same generated samples: the part of
            them that has no parametric penalty is generated once. The generator then follows a
            critic that has just been trained on these very samples.
        matching: What the generator descends beside: MMD^2 in the critic's features. The critic
            must be a `LearnedKernelCritic`.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If objective, estimator or slope are of another kind.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402.
    """

    alpha: float = 1.0
    beta: float = 1e-2
    objective: Objective | None = None
    estimator: Estimator | None = None
    fraction: float = 1.0
    method: Method = "forward"
    slope: SlopePenalty | None = None
    share_samples: bool = True
    matching: FeatureMatching | None = None
    _last_penalty: Tensor = field(
        default_factory=lambda: torch.zeros(()), init=False, repr=False, compare=False
    )
    _last_slope: Tensor = field(
        default_factory=lambda: torch.zeros(()), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        check_weights(alpha=self.alpha, beta=self.beta)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}.")
        if self.method not in get_args(Method):
            raise ValueError(
                f"method must be one of {', '.join(get_args(Method))}, got {self.method!r}."
            )
        self.objective = self._objective = self.objective or Linear()
        self.estimator = self._estimator = self.estimator or Lagged()
        for name, kind in (("objective", Objective), ("estimator", Estimator)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(
                    f"{name} must be an {kind.__name__} such as {kind.__subclasses__()[0].__name__}"
                    f"(), got {getattr(self, name)!r}."
                )
        for name, kind in (("slope", SlopePenalty), ("matching", FeatureMatching)):
            if not isinstance(value := getattr(self, name), kind | None):
                raise TypeError(f"{name} must be a {kind.__name__} or None, got {value!r}.")

    def check(self, generator: nn.Module, critic: nn.Module) -> None:
        """Refuse a critic without an RKHS norm where beta > 0, or without features to match."""
        super().check(generator, critic)
        if self.beta > 0:
            rkhs_norm_penalty(critic)
        plain = getattr(critic, "_orig_mod", critic)
        if self.matching is not None and not isinstance(plain, LearnedKernelCritic):
            raise ValueError(
                "matching compares features of the critic, which only a LearnedKernelCritic "
                f"shows, got {type(plain).__name__}. Wrap its features in one, or leave matching "
                "out."
            )

    def critic_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Return an optimizer twice as fast as the generator's."""
        return torch.optim.Adam(parameters, lr=1e-3, betas=(0.0, 0.9))

    def plain(self) -> "GradientAscent":
        """Return the rule with its slope penalised at real samples: other points are random."""
        slope = self.slope and dataclasses.replace(self.slope, at="real")
        return dataclasses.replace(self, slope=slope, estimator=copy.deepcopy(self.estimator))

    def gap(self, critic: nn.Module, real: Inputs, fake: Inputs) -> Tensor:
        """Return the difference of the critic's mean values."""
        return evaluate_critic(critic, *real).mean() - evaluate_critic(critic, *fake).mean()

    def update(self, game: Game) -> dict[str, Any]:
        """Move the critic up its penalised objective, and the generator up its own."""
        z = game.latents()
        generator = game.generator.network
        if game.step == 0:
            with torch.no_grad(), full_precision(z[0].device), evaluating(generator):
                game.check_samples(generator(*select(z, slice(0, 1))))
        shares = self.share_samples and game.moves_generator
        generated = None
        if shares and self._num_penalised(game) < game.batch_size:
            generated = generate(game, z)
        metrics = self._critic_step(game, z, None if generated is None else generated.whole)
        if game.moves_generator:
            if not self.share_samples:
                z = game.latents()
            move = self._generator_step if self.matching is None else self._matched_step
            metrics["generator/gradient_norm"] = move(game, z, generated)
        return metrics

    def _num_penalised(self, game: Game) -> int:
        """Number of generated samples that have the parametric penalty."""
        return num_penalised(self._estimator, self.fraction, game.batch_size) if self.alpha else 0

    def _critic_step(self, game: Game, z: Inputs, fake: Tensor | None) -> dict[str, Any]:
        num, objective, slope = game.batch_size, self._objective, self.slope
        num_first = self._num_penalised(game)
        share, strength = num_first / num, self.alpha / 2
        penalised, plain = select(z, slice(0, num_first)), select(z, slice(num_first, None))
        if slope is not None and not slope.due(game.step):
            slope = None
        of_slope = 0.0 if slope is None else slope.weight * slope.interval / 2
        (fake_term, fake_mean, penalty), total = self._on_penalised(
            game, penalised, (-share, 0.0, strength)
        )
        (plain_term, plain_mean), total = self._on_plain(
            game,
            plain,
            (share - 1, 0.0),
            total,
            None if fake is None else fake[num_first:].detach(),
        )
        real = game.target(z)
        at_real = slope if slope is not None and slope.at == "real" else None
        (real_term, real_mean, steepness), total = self._on_real(
            game, real, (-1.0, 0.0, of_slope), total, at_real
        )
        if slope is not None and at_real is None:
            samples = generate(game, z, False).whole if fake is None else fake
            points = slope.points(real, (samples.to(real[0].dtype), *z[1:]))
            steepness, total = slope_alone(game, slope, points, of_slope, total)
        gap = real_mean - share * fake_mean - (1 - share) * plain_mean
        value = real_term + share * fake_term + (1 - share) * plain_term
        rkhs = rkhs_norm_penalty(game.critic.network) if self.beta else gap.new_zeros(())
        loss = strength * penalty + self.beta / 2 * rkhs.detach() + of_slope * steepness - value
        gradient = game.critic.gradient(self.beta / 2 * rkhs, onto=total)
        if game.processes.size > 1:
            # One collective for both: then every process knows whether all values are finite.
            both = game.processes.mean(torch.cat([gradient, loss.to(gradient)[None]]))
            gradient, loss = both[:-1], both[-1]
        if not loss.isfinite():
            raise DivergedError("the critic's objective")
        if num_first:
            self._last_penalty = penalty
        metrics: dict[str, Any] = critic_terms(
            gap, self._last_penalty.to(gap.device), rkhs, alpha=self.alpha, beta=self.beta
        )
        if not isinstance(objective, Linear):
            metrics["critic/objective"] = value
        if self.slope is not None:
            self._last_slope = self._last_slope.to(gap.device) if slope is None else steepness
            metrics["critic/slope_penalty"] = self._last_slope
        metrics["critic/gradient_norm"] = game.critic.step(gradient)
        return metrics

    def _on_penalised(
        self, game: Game, z: Inputs, weights: tuple[float, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Objective, value of f and penalty on generated samples, and their weighted gradient."""
        num = len(z[0])
        parts = interleaved_parts(game, self._estimator.groups(num) if num else ())
        held = self._hold(game, z, parts)
        live = sum(len(part[-1]) for part in parts)

        def evaluate(part: Sequence[Tensor]) -> Terms:
            result = penalised_critic(
                game.critic.network,
                game.generator.network,
                [select(z, index) for index in part],
                self.method,
                estimator=self._estimator,
                held=held,
                parameters=game.generator.parameters,
                mean=game.processes.mean,
            )
            of_all, of_live = sum(map(len, part)) / num, len(part[-1]) / live
            terms = self._objective.on_fake(result.values).mean(), result.values.detach().mean()
            return (*(term * of_all for term in terms), result.penalty * of_live)

        return summed(evaluate, weights, parts, game.critic)

    def _on_plain(
        self,
        game: Game,
        z: Inputs,
        weights: tuple[float, ...],
        total: Tensor | None,
        samples: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Objective and value of f on generated samples without a penalty."""
        num = len(z[0])

        def evaluate(part: Sequence[Tensor]) -> Terms:
            inputs = select(z, part[0])
            with torch.no_grad():
                fake = game.generator.network(*inputs) if samples is None else samples[part[0]]
            values = evaluate_critic(game.critic.network, fake, *inputs[1:])
            share = len(part[0]) / num
            return self._objective.on_fake(values).mean() * share, values.detach().mean() * share

        parts = interleaved_parts(game, (slice(0, num),))
        return summed(evaluate, weights, parts, game.critic, total)

    def _on_real(
        self,
        game: Game,
        real: Inputs,
        weights: tuple[float, ...],
        total: Tensor | None,
        slope: SlopePenalty | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Objective, value and slope of f on real samples."""
        num = len(real[0])
        critic = functools.partial(evaluate_critic, game.critic.network)

        def evaluate(part: Sequence[Tensor]) -> Terms:
            inputs = select(real, part[0])
            if slope is None:
                values = critic(*inputs)
                steepness = values.new_zeros(())
            else:
                values, steepness = slope.with_values(critic, inputs)
            terms = self._objective.on_real(values).mean(), values.detach().mean(), steepness
            return tuple(term * (len(part[0]) / num) for term in terms)

        parts = interleaved_parts(game, (slice(0, num),))
        return summed(evaluate, weights, parts, game.critic, total)

    def _hold(self, game: Game, z: Inputs, parts: list[list[Tensor]]) -> Held | None:
        """What the penalty holds, where a batch is evaluated in several parts."""
        if len(parts) <= 1:
            return None
        return hold(
            game.critic.network,
            game.generator.network,
            [[select(z, index) for index in part] for part in parts],
            self._estimator,
            parameters=game.generator.parameters,
            mean=game.processes.mean,
        )

    def _generator_step(self, game: Game, z: Inputs, generated: PartedPass | None) -> Tensor:
        critic, generator = game.critic.network, game.generator
        objective, num = self._objective, game.batch_size
        noisy: list[Tensor] = []

        def on_fake(part: Sequence[Any]) -> Terms:
            if generated is None:
                inputs = select(z, part[0])
                fake = generator.network(*inputs)
            else:
                inputs = select(z, generated.parts[part[0]])
                fake = generated.part(part[0])
            share = len(inputs[0]) / num
            replay = Replay(critic, fake.device) if game.hooks else None
            values = evaluate_critic(critic, fake, *inputs[1:])
            term = objective.on_generated(values).mean() * share
            if replay is not None:
                moved = moved_gradient(game, fake, inputs[1:], values, term, replay)
                noisy.extend([] if moved is None else [moved])
            return (term,)

        parts: Sequence[Sequence[Any]] = interleaved_parts(game, (slice(0, num),))
        if generated is not None:
            parts = [(k,) for k in range(len(generated.parts))]
        terms, total = summed(on_fake, (-1.0,), parts, generator)
        gradient = terms.new_zeros(0) if total is None else total
        if noisy:
            both = torch.stack([gradient, -torch.stack(noisy).sum(0)])
            clean, gradient = game.processes.mean(both)
        else:
            clean = gradient = game.processes.mean(gradient)
        self._estimator.observe(-clean)
        return generator.step(gradient)

    def _matched_step(self, game: Game, z: Inputs, generated: PartedPass | None) -> Tensor:
        """Move the generator up its objective and down MMD^2 of the critic's features."""
        objective, read = self._objective, cast(LearnedKernelCritic, game.critic.network).read
        matching = cast(FeatureMatching, self.matching)
        generated = generated or generate(game, z)
        step = EmbeddingStep(game, z, generated, Embeds(game.critic.network))
        everyone = step.of_fake.everyone.detach()

        def loss(real: Tensor, fake: Tensor) -> Tensor:
            value = objective.on_generated(read(fake)).mean()
            return matching.loss(real, fake, game.paired) - value

        def ascent(e: Tensor, itself: Tensor) -> Tensor:
            value = objective.on_generated(read(e)).sum() / game.batch_size
            own = game.batch_size, e, step.of_real, everyone, itself, game.paired
            return value + matching.ascent(*own)

        moved = step.moved_gradient(ascent) if game.hooks else None  # it keeps the graph
        gradient = step.gradient(loss)
        self._estimator.observe(-gradient)
        return game.generator.step(gradient if moved is None else moved)

    def needs_equal_calls(self, micro_batches: int) -> str | None:
        """Name finite differences, and a penalty that is found in two passes."""
        if self.alpha and self.method == "finite_difference":
            return "method='finite_difference' compares calls. Use 'forward'"
        if self.alpha and micro_batches > 1:
            return (
                "the penalty of a batch in parts compares two passes. Use micro_batches=1, or "
                "alpha=0"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the estimator's state and the penalties that were logged last."""
        return {
            "estimator": self._estimator.state_dict(),
            "last_penalty": self._last_penalty,
            "last_slope": self._last_slope,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._estimator.load_state_dict(state["estimator"])
        self._last_penalty = state["last_penalty"]
        self._last_slope = state["last_slope"]
