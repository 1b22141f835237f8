r"""The rule that solves for the witness and lets the generator follow it: a flow of MMD^2.

An update solves :math:`(\alpha JJ^T + \beta I) w = \delta` and steps the generator along
:math:`J^T w`: a Levenberg-Marquardt step on the embedding residual delta.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_mmd.critic_values import evaluate_critic
from lightning_mmd.critics import LearnedKernelCritic
from lightning_mmd.embedding import EmbeddingPart, MeanEmbedding
from lightning_mmd.game import (
    DivergedError,
    FlowDescent,
    Game,
    Player,
    UpdateRule,
    check_weights,
    without,
)
from lightning_mmd.gramian import largest_gramian_eigenvalue, natural_scale
from lightning_mmd.penalties import critic_terms
from lightning_mmd.witness import System, WitnessSolution, solve_embedding

__all__ = ["ClosedForm", "TrustRegion"]


@dataclass
class TrustRegion:
    r"""Levenberg-Marquardt control of step and damping by realised over modelled decrease.

    With t the step and m the embedding, the model of the decrease of F = 1/2 ||delta||^2 is that of
    an m linear in theta, :math:`t \langle\delta, Dw\rangle - \frac{t^2}2 \|Dw\|^2`; the gain ratio
    rho is the realised decrease over it, on the same latents and features. Then

    * rho < 0: F rose; the step is undone, trust is halved and beta grows by 1.5;
    * rho < 1/4: trust shrinks by 0.7 and beta grows by 1.5;
    * rho > 3/4: trust grows by 1.2, and beta shrinks by 1.5.

    Args:
        largest_eta: Largest eta from the second step on, > 0. Longer steps follow the noise of a
            batch.

    Attributes:
        trust: Factor on the step size, > 0.
        damping: Factor on beta, in [1e-3, 1e3].

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Marquardt 1963; the thresholds and factors are those of Martens 2010, Deep learning via
        Hessian-free optimization, section 4.1, for beta.

    Examples:
        >>> region = TrustRegion()
        >>> region.judge(realised=-0.1, modelled=1.0, largest_trust=1.0), region.trust
        (False, 0.5)
        >>> region.judge(realised=0.9, modelled=1.0, largest_trust=1.0), region.trust
        (True, 0.6)
    """

    largest_eta: float = 0.5
    trust: float = field(default=1.0, init=False, repr=False, compare=False)
    damping: float = field(default=1.0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.largest_eta < math.inf:
            raise ValueError(f"TrustRegion needs largest_eta > 0, got {self.largest_eta}.")

    def judge(self, realised: float, modelled: float, largest_trust: float) -> bool:
        """Adapt to the outcome of a step, and return whether the step is to be kept.

        Args:
            realised: Decrease of F that happened; NaN and infinity count as a step too long.
            modelled: Decrease of F by the model; a step without one was too long.
            largest_trust: Largest factor on the step size.
        """
        kept = 0 <= realised < math.inf  # False for NaN
        gain_ratio = realised / modelled if kept and modelled > 0 else 0.0
        if gain_ratio > 0.75:
            self.damping = max(1e-3, self.damping / 1.5)
            self.trust *= 1.2
        elif gain_ratio < 0.25:
            self.damping = min(1e3, self.damping * 1.5)
            self.trust *= 0.7 if kept else 0.5
        self.trust = min(self.trust, largest_trust)
        return kept


@dataclass
class ClosedForm(UpdateRule):
    r"""Solves for the regularised witness at every update; MMD^2 descends in the current features.

    .. math:: (\alpha J J^T + \beta I)\, w = \delta, \qquad
        \delta = E\,\phi(x) - E\,\phi(G_\theta(z)), \quad J = \nabla_\theta E\,\phi(G_\theta(z))

    by a few conjugate-gradient iterations, started from the last weights. The generator moves along
    :math:`J^T w = L f`, and the features take one ascent step with w held. Each update logs the
    decrease of F = 1/2 ||delta||^2 that the theorem predicts beside the one that happened, on the
    same batch and latents. F and ``witness/mmd2`` are V-statistics of one batch: for n samples of
    each kind they are too large by :math:`(\mathrm{tr\,Cov}\,\phi(x) +
    \mathrm{tr\,Cov}\,\phi(G(z))) / n` on average (F by half of it), a floor that no generator
    passes; :math:`JJ^T` of a batch is too large likewise, which damps a little.

    The step is implicit, a minimising movement. With tau the learning rate,
    :math:`u = \tau\,(\alpha J^T J + \beta I)^{-1} J^T\delta` minimises

    .. math:: \tfrac12\|\delta - J u\|^2
        + \tfrac1{2\tau}\, u^T \big((\alpha - \tau) J^T J + \beta I\big) u,

    Turinici's scheme for F, the mean embedding linearised in theta, in the metric with alpha - tau
    in place of alpha. That is a metric as long as :math:`\tau < \alpha + \beta /
    \lambda_{\max}(JJ^T)`, so for eta <= 1 whatever J is, and the step of the linear model
    contracts until twice that. The generator's optimizer is by default gradient descent with
    :math:`\tau = \eta\,(\alpha + \beta / \lambda_{\max}(JJ^T))`, where lambda_max is estimated at
    the first update and then kept: the two bounds are eta < 1 and eta < 2, at alpha = 0 too, and
    nothing jumps there. Its learning rate is eta; ``cumulative_lr`` is the sum of tau. With an
    optimizer of your own tau is its learning rate. Predictions are logged for plain gradient
    descent only.

    Args:
        alpha: Weight of the parametric-gradient penalty, >= 0.
        beta: Weight of the RKHS norm, >= 0; beta / alpha damps the step.
        eta: Step in units of alpha + beta / lambda_max, > 0: in (0, 1] for a descent.
        max_iterations: Most conjugate-gradient iterations an update, >= 1.
        tolerance: Relative residual at which the iterations stop, > 0.
        overhead: Stop the iterations as soon as one was not worth its cost, where this is the cost
            of an update without them in units of one (about 2.3), >= 0. Default: go on to the
            tolerance or to ``max_iterations``.
        trust_region: Adapts eta and beta, which are then starting values, to the gain ratio of each
            update, and undoes an update that raised F on its own batch. It needs the default
            optimizer. Default: none.
        system: Operator A in A w = delta; default: the one above.

    Raises:
        ValueError: If an argument is out of range, or alpha and beta are both zero.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402, theorem 1. Turinici, arXiv 2012.10410, the scheme.
    """

    alpha: float = 1.0
    beta: float = 1e-2
    eta: float = 0.4
    max_iterations: int = 3
    tolerance: float = 1e-3
    overhead: float | None = None
    trust_region: TrustRegion | None = None
    system: System | None = None
    path_length: float = field(default=0.0, init=False, repr=False, compare=False)
    _scale: float | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_weights(alpha=self.alpha, beta=self.beta)
        if self.alpha + self.beta == 0:
            raise ValueError("ClosedForm needs alpha > 0 or beta > 0, got both zero.")
        for name in ("eta", "max_iterations", "tolerance"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}.")
        if self.overhead is not None and not 0 <= self.overhead < math.inf:
            raise ValueError(f"overhead must be a finite number >= 0, got {self.overhead}.")

    def check(self, generator: nn.Module, critic: nn.Module) -> None:
        """Refuse a critic that is no `LearnedKernelCritic`."""
        super().check(generator, critic)
        if not isinstance(getattr(critic, "_orig_mod", critic), LearnedKernelCritic):
            raise TypeError(
                "ClosedForm solves for the weights of a LearnedKernelCritic, got "
                f"{type(critic).__name__}. Wrap your network: LearnedKernelCritic(features, "
                "num_features), or use the rule GradientAscent."
            )

    def check_players(self, generator: Player, critic: Player) -> None:
        """Refuse a trust region whose steps another optimizer changes."""
        if self.trust_region is not None and not generator.is_gradient_descent:
            raise ValueError(
                "trust_region adapts steps along the flow, but the generator's optimizer changes "
                "them. Leave generator_optimizer and generator_clip_norm unset (eta is where it "
                "starts), or set trust_region to None."
            )

    def critic_parameters(self, critic: nn.Module) -> dict[str, nn.Parameter]:
        """Return the features' parameters: the weights are solved for."""
        return without(super().critic_parameters(critic), "weights")

    def generator_optimizer(self, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        """Return gradient descent whose steps are Euler steps of the flow, of natural length."""
        return FlowDescent(parameters, lr=self.eta)

    def gap(self, critic: nn.Module, real: tuple[Tensor, ...], fake: tuple[Tensor, ...]) -> Tensor:
        """Return the difference of the critic's mean values."""
        return evaluate_critic(critic, *real).mean() - evaluate_critic(critic, *fake).mean()

    @property
    def adapts_steps(self) -> str | None:
        """``trust_region``, if there is one."""
        return None if self.trust_region is None else "trust_region"

    def needs_equal_calls(self, micro_batches: int) -> str | None:
        """Name the witness, which is solved for on clean samples."""
        return (
            "ClosedForm solves for the witness of clean samples. Use NoiseInjection, or the rule "
            "GradientAscent"
        )

    def plain(self) -> "ClosedForm":
        """Return the rule with few iterations, which amplify rounding, and without control."""
        iterations = min(self.max_iterations, 3)
        return ClosedForm(
            self.alpha, self.beta, self.eta, iterations, self.tolerance, system=self.system
        )

    def update(self, game: Game) -> dict[str, Any]:
        """Solve for the witness, move the generator along L f, and the features up."""
        critic = cast(
            LearnedKernelCritic, getattr(game.critic.network, "_orig_mod", game.critic.network)
        )
        model, target = self._embed(game, critic)
        gap = target.mean - model.mean
        if not gap.isfinite().all():
            raise DivergedError("the embedding of the samples")
        if self._scale is None:
            eigenvalue = largest_gramian_eigenvalue(model, 20) if self.beta else 0.0
            self._scale = natural_scale(self.alpha, self.beta, eigenvalue)
        solution = solve_embedding(
            model,
            gap,
            alpha=self.alpha,
            beta=self.beta if self.trust_region is None else self.beta * self.trust_region.damping,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            system=self.system,
            initial=critic.weights.detach() if game.step else None,
            overhead=self.overhead,
        )
        w = solution.weights
        lf = solution.parametric_gradient
        metrics = critic_terms(
            gap @ w, lf.square().sum(), w.square().sum(), alpha=self.alpha, beta=self.beta
        )
        metrics |= {
            "witness/mmd2": solution.mmd2,
            "witness/regularised_mmd2": solution.regularised_mmd2,
            "witness/residual": solution.residual,
            "witness/iterations": solution.num_iterations,
        }
        descent = self._features_descent(game, model, target, solution)
        if not descent.norm().isfinite():  # as the critic's step will ask: then nothing moves
            raise DivergedError("the gradient of the critic")
        if game.moves_generator:  # before the features: the certificate is about those of w
            metrics |= self._descend(game, solution, model, target.mean)
        critic.weights.data.copy_(w)
        if game.critic.parameters:
            metrics["critic/gradient_norm"] = game.critic.step(descent)
        return metrics

    def _embed(
        self, game: Game, critic: LearnedKernelCritic
    ) -> tuple[MeanEmbedding, MeanEmbedding]:
        """Return the mean embeddings of generated and of real samples."""
        z = game.latents()
        parts = {"num_parts": game.micro_batches, "mean": game.processes.mean}
        phi, generator = critic.feature_map, game.generator
        model = MeanEmbedding(phi, z, generator.network, generator.parameters, **parts)
        game.check_samples(model.samples)
        return model, MeanEmbedding(phi, game.target(z), **parts)

    def _features_descent(
        self, game: Game, model: MeanEmbedding, target: MeanEmbedding, solution: WitnessSolution
    ) -> Tensor:
        """Gradient of <w, A w> / 2 - <w, delta> in the features, w held (envelope theorem)."""
        w, system = solution.weights, solution.system
        if not game.critic.parameters:
            return w.new_zeros(0)

        def on_model(part: EmbeddingPart, index: slice) -> Tensor:
            slope = system.slope(part, w, solution.tangents[index], self.alpha, solution.beta)
            return game.critic.gradient(w @ part.mean + slope)

        def on_target(part: EmbeddingPart, _: slice) -> Tensor:
            return game.critic.gradient(-w @ part.mean)

        return game.processes.mean(model.average(on_model) + target.average(on_target))

    @torch.no_grad()
    def _descend(
        self, game: Game, solution: WitnessSolution, model: MeanEmbedding, target_mean: Tensor
    ) -> dict[str, Any]:
        """Move the generator along L f, and compare what came of it with what was predicted."""
        generator, region = game.generator, self.trust_region
        trust = 1.0 if region is None else region.trust
        scale = trust * (self._scale or 1.0) if generator.moves_in_flow_time else trust
        step_size = scale * generator.learning_rate
        before = generator.copies()
        noisy = self._noisy_direction(game, solution, model)
        direction = solution.parametric_gradient if noisy is None else noisy
        norm = generator.step(-direction, scale)
        moved_mean = model.mean_at(generator.parameters)
        energy = solution.mmd2 / 2
        realised = (target_mean - moved_mean).square().sum() / 2 - energy
        metrics: dict[str, Any] = {"objective": energy, "realised": realised, "step": step_size}
        if solution.efficiency is not None:
            metrics["efficiency"] = solution.efficiency
        if generator.is_gradient_descent and noisy is None:
            predicted = -step_size * solution.descent_rate
            metrics |= {"predicted": predicted, "ratio": realised / predicted}
            metrics["speed"] = solution.speed2.clamp_min(0).sqrt()
            if self.alpha > 0:
                metrics["theorem"] = -step_size * solution.theorem_rate
        kept = True
        if region is not None and noisy is None:
            largest = region.largest_eta / self.eta
            kept = region.judge(
                -float(realised), float(solution.model_decrease(step_size)), largest
            )
            metrics |= {"trust": trust, "damping": solution.beta, "undone": float(not kept)}
            if not kept:
                generator.cumulative_lr -= step_size
                generator.put_back(before)
        if kept:
            shift = torch.cat(
                [
                    (p - q).reshape(-1)
                    for p, q in zip(generator.parameters.values(), before, strict=True)
                ]
            )
            step = self.alpha * (moved_mean - model.mean).square().sum()
            step = (step + solution.beta * shift.square().sum()).sqrt()
            self.path_length += float(step)
        metrics["length"] = self.path_length
        return {"generator/gradient_norm": norm} | {
            f"certificate/{name}": value for name, value in metrics.items()
        }

    def _noisy_direction(
        self, game: Game, solution: WitnessSolution, model: MeanEmbedding
    ) -> Tensor | None:
        """J^T of the gradients that hooks put in place of the witness's; None without any."""
        if not game.hooks:
            return None
        left_alone = False

        def moved(part: EmbeddingPart, _: slice) -> Tensor:
            nonlocal left_alone
            gradients = game.moved(
                part.samples, lambda x: part.witness_gradient_at(solution.weights, x)
            )
            if gradients is None:
                left_alone = True
                return solution.parametric_gradient
            return part.pushforward.cotangent(gradients)

        direction = game.processes.mean(model.average(moved))
        return None if left_alone else direction

    def state_dict(self) -> dict[str, Any]:
        """Return the length of the path, the unit of steps, and trust and damping."""
        region = self.trust_region
        state: dict[str, Any] = {"path_length": self.path_length, "scale": self._scale}
        return state | (
            {} if region is None else {"trust": region.trust, "damping": region.damping}
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.path_length, self._scale = state["path_length"], state["scale"]
        if self.trust_region is not None and "trust" in state:
            self.trust_region.trust = state["trust"]
            self.trust_region.damping = state["damping"]
