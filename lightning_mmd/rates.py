r"""Local convergence rates of kernel critics, exactly, and the hyperparameters they recommend.

Near a target point, the game of `kernel_gan_flow` is a linear recursion. With target mass p, N
points of mass :math:`\tilde p`, mass surplus :math:`\Delta = p - N\tilde p` and a Gaussian kernel
the critic is :math:`\nabla f(y) = -A y + b`, its curvature A tends to
:math:`A^* = \Delta / (\lambda\sigma^2)`, and the points' mean e and the slope b obey

.. math:: \binom{b}{e} \leftarrow
    \begin{pmatrix} 1 - \eta_d\lambda & -\eta_d N\tilde p / \sigma^2 \\
    \eta_g\tilde p (1 - \eta_d\lambda)
    & 1 - \eta_g\tilde p A^* - \eta_g\eta_d N\tilde p^2 / \sigma^2 \end{pmatrix} \binom{b}{e},

while differences of points shrink by :math:`1 - \eta_g\tilde p A^*` a step.
"""

import cmath
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_mmd.points import require_positive

__all__ = [
    "ConvergenceRates",
    "Hyperparameters",
    "SecondMoments",
    "convergence_rates",
    "max_stable_critic_lr",
    "second_moment_dynamics",
    "suggest_hyperparameters",
]


@dataclass(frozen=True)
class ConvergenceRates:
    """Factors per step by which small deviations from the target shrink.

    Args:
        mean_mode: The two eigenvalues of the points' mean and the critic's slope, larger modulus
            first; a conjugate pair where the game oscillates.
        difference_mode: The eigenvalue of the points' differences; None for a single point.
        critic_mode: 1 - critic_lr * norm_weight, at which the critic's curvature settles. It moves
            the points in second order only, so it does not count in the spectral radius.
    """

    mean_mode: tuple[complex, complex]
    difference_mode: float | None
    critic_mode: float

    @property
    def eigenvalues(self) -> tuple[complex, ...]:
        """All eigenvalues of the points' dynamics."""
        other = () if self.difference_mode is None else (complex(self.difference_mode),)
        return (*self.mean_mode, *other)

    @property
    def spectral_radius(self) -> float:
        """The largest modulus of the eigenvalues: the points' asymptotic contraction a step."""
        return max(map(abs, self.eigenvalues))

    @property
    def stable(self) -> bool:
        """Whether every small deviation dies out."""
        return self.spectral_radius < 1 and abs(self.critic_mode) < 1

    @property
    def regime(self) -> Literal["monotone", "oscillating", "unstable"]:
        """How deviations develop; "unstable" includes those that do not decay in first order."""
        if not self.stable:
            return "unstable"
        real = all(value.imag == 0 and value.real >= 0 for value in self.eigenvalues)
        return "monotone" if real else "oscillating"


def convergence_rates(
    *,
    bandwidth: float,
    norm_weight: float,
    critic_lr: float,
    generator_lr: float,
    real_mass: float = 1.0,
    generated_mass: float = 1.0,
    num_generated: int = 1,
) -> ConvergenceRates:
    r"""Return the exact linearised rates of `kernel_gan_flow` around one target point.

    The determinant of the mean mode is :math:`(1 - \eta_d\lambda)(1 - \eta_g\tilde p A^*)`, so in
    the oscillating regime its modulus is the root of the two damping factors. Points that share a
    target point (N >= 2) stay together only for :math:`\Delta > 0`; at :math:`\Delta = 0` their
    differences are neutral.

    Args:
        bandwidth: Bandwidth of the Gaussian kernel, > 0. Other smooth kernels behave like the
            Gaussian of equal curvature k''(0) = -1 / bandwidth^2.
        norm_weight: lambda > 0, weight of the critic's RKHS norm.
        critic_lr: eta_d > 0.
        generator_lr: eta_g > 0.
        real_mass: p > 0, mass of the target point.
        generated_mass: p~ > 0, mass of each generated point.
        num_generated: N >= 1, number of generated points around the target point.

    Returns:
        The rates.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Becker et al. 2022, arXiv 2305.08277, local convergence; here for alternating steps of any
        size, from the exact recursion.

    Examples:
        >>> rates = convergence_rates(
        ...     bandwidth=1.0, norm_weight=0.1, critic_lr=0.1, generator_lr=0.01
        ... )
        >>> rates.regime, round(rates.spectral_radius, 5)
        ('oscillating', 0.99499)
    """
    require_positive(
        "convergence_rates",
        bandwidth=bandwidth,
        norm_weight=norm_weight,
        critic_lr=critic_lr,
        generator_lr=generator_lr,
        real_mass=real_mass,
        generated_mass=generated_mass,
        num_generated=num_generated,
    )
    surplus = real_mass - num_generated * generated_mass
    critic_mode = 1 - critic_lr * norm_weight
    pull = 1 - generator_lr * generated_mass * surplus / (norm_weight * bandwidth**2)
    coupling = generator_lr * critic_lr * num_generated * generated_mass**2 / bandwidth**2
    # Half the trace, and the discriminant written so that equal damping factors cancel exactly.
    half = 0.5 * (critic_mode + pull - coupling)
    discriminant = 0.25 * (critic_mode - pull + coupling) ** 2 - coupling * critic_mode
    root = cmath.sqrt(discriminant)
    low, high = sorted((half - root, half + root), key=abs)
    return ConvergenceRates((high, low), pull if num_generated > 1 else None, critic_mode)


@dataclass(frozen=True)
class Hyperparameters:
    """What `suggest_hyperparameters` recommends.

    Args:
        norm_weight: Weight of the critic's RKHS norm.
        critic_lr: The critic's learning rate.
        generator_lr: The generator's, that of the points.
        rates: The local rates that these bring.
    """

    norm_weight: float
    critic_lr: float
    generator_lr: float
    rates: ConvergenceRates


def suggest_hyperparameters(
    bandwidth: float,
    *,
    max_critic_lr: float,
    max_generator_lr: float,
    real_mass: float = 1.0,
    generated_mass: float = 1.0,
    num_generated: int = 1,
) -> Hyperparameters:
    r"""Return the hyperparameters of the fastest local rate within bounds on the learning rates.

    A single point of the target's mass (:math:`\Delta = 0`, N = 1) has a closed form. With
    :math:`q = \eta_g\eta_d\,\tilde p\,p / \sigma^2` the least spectral radius over lambda is
    :math:`1 - \sqrt q`, at critical damping

    .. math:: \lambda = \frac{2\sqrt q - q}{\eta_d} \approx
        \frac{2}{\sigma}\sqrt{\frac{\eta_g}{\eta_d}\,\tilde p\, p} \quad (q \ll 1),

    so the largest rates are best until q = 1, where the deviation is gone after two steps. With a
    surplus :math:`\Delta > 0`, of any number of points, q = 1 with :math:`\eta_d\lambda = \Delta /
    p` brings the least radius there is, 0, where the bounds allow it. In all other cases the
    spectral radius is minimised numerically, on a grid of lambda and both rates that is refined
    around its best point. The published :math:`\lambda^* = \sqrt{\mu\tilde p\Delta} / \sigma,
    \mu = \eta_g / \eta_d` makes the points' factor equal to the critic's own, :math:`1 -
    \eta_d\lambda`; the latter is of second order for the points and is not counted here, so the
    minimum may lie elsewhere.

    The rate is local: it says nothing of the basin of attraction, which grows with the bandwidth.

    Args:
        bandwidth: See `convergence_rates`.
        max_critic_lr: Largest critic learning rate allowed, > 0.
        max_generator_lr: Largest generator learning rate allowed, > 0.
        real_mass: See `convergence_rates`.
        generated_mass: See `convergence_rates`.
        num_generated: See `convergence_rates`.

    Returns:
        The hyperparameters and their rates.

    Raises:
        ValueError: If an argument is out of range, or no setting is stable: several points with a
            mass surplus <= 0, where one within 1e-12 of the masses is rounding and counts as 0.

    Source:
        Becker et al. 2022, arXiv 2305.08277, for the choice of lambda; the closed form is derived
        from the eigenvalues in `convergence_rates`.

    Examples:
        >>> best = suggest_hyperparameters(1.0, max_critic_lr=0.1, max_generator_lr=0.1)
        >>> round(best.norm_weight, 6), round(best.rates.spectral_radius, 6)
        (1.9, 0.9)
    """
    require_positive(
        "suggest_hyperparameters",
        bandwidth=bandwidth,
        max_critic_lr=max_critic_lr,
        max_generator_lr=max_generator_lr,
        real_mass=real_mass,
        generated_mass=generated_mass,
        num_generated=num_generated,
    )
    surplus = real_mass - num_generated * generated_mass
    if abs(surplus) <= 1e-12 * real_mass:
        surplus = 0.0  # such as 1 - 49 * (1 / 49)
    if num_generated > 1 and surplus <= 0:
        raise ValueError(
            f"no setting pulls {num_generated} points of mass {generated_mass} together at a "
            f"target point of mass {real_mass}: its mass must be larger than theirs together. "
            "Lower generated_mass or num_generated."
        )

    def evaluate(damping: float, critic_lr: float, generator_lr: float) -> Hyperparameters:
        rates = convergence_rates(
            bandwidth=bandwidth,
            norm_weight=damping / critic_lr,
            critic_lr=critic_lr,
            generator_lr=generator_lr,
            real_mass=real_mass,
            generated_mass=generated_mass,
            num_generated=num_generated,
        )
        return Hyperparameters(damping / critic_lr, critic_lr, generator_lr, rates)

    deadbeat_lr = bandwidth**2 / (max_critic_lr * generated_mass * real_mass)
    if surplus > 0 and deadbeat_lr <= max_generator_lr:
        return evaluate(surplus / real_mass, max_critic_lr, deadbeat_lr)
    if surplus == 0:
        generator_lr = min(max_generator_lr, deadbeat_lr)
        q = min(generator_lr / deadbeat_lr, 1.0)
        return evaluate(2 * math.sqrt(q) - q, max_critic_lr, generator_lr)

    best = _search(evaluate, (1.0, max_critic_lr, max_generator_lr))
    if not best.rates.stable:
        raise ValueError(
            f"no setting is stable for a generated mass of {generated_mass} at a target point of "
            f"mass {real_mass} with these learning rates. Lower generated_mass."
        )
    return best


def _search(
    evaluate: Callable[[float, float, float], "Hyperparameters"],
    largest: tuple[float, float, float],
) -> "Hyperparameters":
    """Refine a grid over (critic_lr * norm_weight, critic_lr, generator_lr) below their largest."""

    def at(exponents: tuple[float, ...]) -> Hyperparameters:
        damping, critic_lr, generator_lr = (
            top * math.exp(-e) for top, e in zip(largest, exponents, strict=True)
        )
        return evaluate(damping, critic_lr, generator_lr)

    centre: tuple[float, ...] = (10.0, 10.0, 10.0)
    reach, best = 10.0, at(centre)
    while reach > 1e-9:
        axes = [[max(c + reach * i / 6, 0.0) for i in range(-6, 7)] for c in centre]
        for exponents in itertools.product(*axes):
            candidate = at(exponents)
            if candidate.rates.spectral_radius < best.rates.spectral_radius:
                best, centre = candidate, exponents
        reach *= 0.5
    return best


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """A moment of `second_moment_dynamics`.

    Args:
        step: Number of steps made.
        mean: Mean e of the points, relative to the target point, (d,).
        covariance: Covariance Sigma of the points, (d, d).
        slope: The critic's gradient at the target point, (d,).
        curvature: Minus the critic's Hessian there, (d, d).
    """

    step: int
    mean: Tensor
    covariance: Tensor
    slope: Tensor
    curvature: Tensor


def second_moment_dynamics(
    mean: Tensor,
    covariance: Tensor,
    *,
    bandwidth: float,
    norm_weight: float,
    critic_lr: float,
    generator_lr: float,
    num_steps: int,
    real_mass: float = 1.0,
    generated_mass: float = 1.0,
    num_generated: int = 1,
) -> Iterator[SecondMoments]:
    r"""Follow mean and covariance of a cloud of points around one target point at the origin.

    With :math:`\gamma = 1 / \sigma^2, M = N\tilde p, \Delta = p - M` and
    :math:`S = \Sigma + e e^T`, expanding the Gaussian kernel of `kernel_gan_flow` to second order
    in the points and the critic's gradient to first order, -C y + b, gives

    .. math::
        b &\leftarrow (1 - \eta_d\lambda)\, b - \eta_d\gamma M e \\
        C &\leftarrow (1 - \eta_d\lambda)\, C + \eta_d\gamma\Delta I
            + \tfrac12 \eta_d\gamma^2 M (\mathrm{tr}(S) I + 2 S) \\
        e &\leftarrow e - \eta_g\tilde p\,(C e - b), \qquad
        \Sigma \leftarrow (I - \eta_g\tilde p C)\, \Sigma\, (I - \eta_g\tilde p C)

    The spread of the points thus pulls them together even where masses balance. The change of
    Sigma is right to leading order in tr(S) / bandwidth^2 where the mass surplus is not zero or the
    points are centred, e = 0; else a term of the critic's gradient of second order in y, which the
    model leaves out, is as large as C.

    Args:
        mean: e of the points, (d,).
        covariance: Sigma of the points, (d, d).
        bandwidth: Bandwidth of the Gaussian kernel, > 0.
        norm_weight: lambda >= 0.
        critic_lr: eta_d > 0.
        generator_lr: eta_g > 0.
        num_steps: Number of steps, >= 0.
        real_mass: p > 0, mass of the target point.
        generated_mass: p~ > 0, mass of each point.
        num_generated: N >= 1, number of points.

    Yields:
        num_steps + 1 moments, the start first.

    Raises:
        ValueError: If an argument is out of range or a shape does not fit.

    Source:
        Becker et al. 2022, arXiv 2305.08277, second-moment model; masses and the mean's part in
        the second moment are derived here.

    Examples:
        >>> *_, last = second_moment_dynamics(
        ...     torch.zeros(1), torch.tensor([[0.01]]),
        ...     bandwidth=1.0, norm_weight=0.1, critic_lr=0.1, generator_lr=0.1, num_steps=100,
        ... )
        >>> round(float(last.covariance), 4)
        0.004
    """
    require_positive(
        "second_moment_dynamics",
        bandwidth=bandwidth,
        critic_lr=critic_lr,
        generator_lr=generator_lr,
        real_mass=real_mass,
        generated_mass=generated_mass,
        num_generated=num_generated,
    )
    if norm_weight < 0 or num_steps < 0:
        raise ValueError(
            "second_moment_dynamics needs norm_weight >= 0 and num_steps >= 0, got "
            f"{norm_weight} and {num_steps}."
        )
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(
            "second_moment_dynamics expects a mean of shape (d,) and a covariance of shape (d, d), "
            f"got {tuple(mean.shape)} and {tuple(covariance.shape)}."
        )
    mass, gamma = num_generated * generated_mass, bandwidth**-2
    identity = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)

    def dynamics() -> Iterator[SecondMoments]:
        e, sigma, b, c = mean, covariance, torch.zeros_like(mean), torch.zeros_like(covariance)
        yield SecondMoments(0, e, sigma, b, c)
        decay = 1 - critic_lr * norm_weight
        for step in range(1, num_steps + 1):
            second = sigma + torch.outer(e, e)
            spread = 0.5 * gamma * mass * (second.trace() * identity + 2 * second)
            b = decay * b - critic_lr * gamma * mass * e
            c = decay * c + critic_lr * gamma * ((real_mass - mass) * identity + spread)
            e = e - generator_lr * generated_mass * (c @ e - b)
            shrink = identity - generator_lr * generated_mass * c
            sigma = shrink @ sigma @ shrink.T
            yield SecondMoments(step, e, sigma, b, c)

    return dynamics()


def max_stable_critic_lr(alpha: float, beta: float, largest_eigenvalue: float) -> float:
    r"""Return the critic learning rate at which gradient ascent on the critic becomes unstable.

    .. math:: w \leftarrow w + \eta_d\,(\delta - \alpha JJ^T w - \beta w), \qquad
        \eta_d < \frac{2}{\alpha\lambda_{\max}(JJ^T) + \beta}

    for a generator that rests. With alpha > 0 or beta > 0, J^T w, which the generator follows,
    converges for every gap delta iff the rate is below the bound; so does w where beta > 0 or delta
    is in the range of J. Elsewhere (beta = 0 and more features than parameters, say) w grows
    linearly at every rate, along directions that the generator does not see; and with alpha = beta
    = 0 nothing holds back either. Half of the bound damps the stiffest direction in one step.

    Args:
        alpha: Weight of the parametric-gradient penalty, >= 0.
        beta: Weight of the RKHS norm, >= 0.
        largest_eigenvalue: Of the parametric Gramian J J^T, >= 0; `largest_gramian_eigenvalue`.

    Returns:
        The bound; infinite where nothing is damped, so that no rate overshoots.

    Raises:
        ValueError: If an argument is negative.

    Source:
        Gradient ascent on the concave problem of arXiv 2011.02402; standard.

    Examples:
        >>> max_stable_critic_lr(alpha=100.0, beta=0.0, largest_eigenvalue=2.0)
        0.01
    """
    if min(alpha, beta, largest_eigenvalue) < 0:
        raise ValueError(
            "max_stable_critic_lr needs arguments >= 0, got "
            f"alpha = {alpha}, beta = {beta}, largest_eigenvalue = {largest_eigenvalue}."
        )
    stiffness = alpha * largest_eigenvalue + beta
    return 2 / stiffness if stiffness > 0 else math.inf
