r"""Noise levels of noise-injected flows.

Noise injection evaluates the witness's gradient at :math:`y + \beta_t u`, u ~ N(0, I), in place of
y; the witness itself sees the samples without noise. A schedule says how :math:`\beta_t` develops.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning_mmd.kernels import Kernel

__all__ = [
    "AdaptiveNoise",
    "ConstantNoise",
    "GeometricNoise",
    "HalvingNoise",
    "Moment",
    "Noise",
    "NoiseSchedule",
    "PlateauNoise",
    "hessian_constant",
]


@dataclass(frozen=True)
class Moment:
    """What a noise level may depend on, before a step of a flow.

    Attributes:
        step: Number of steps made before.
        memory: What the noise remembers, see :meth:`Noise.begin`.
        energy: F = 1/2 MMD^2 now.
        constant: Returns lambda^2 times the mean ||u||^2 of the step's draw u.
        dissipation: From a level to the mean squared norm of the witness's gradient at noisy
            samples.
    """

    step: int
    memory: Any
    energy: float
    constant: Callable[[], float]
    dissipation: Callable[[float], float]


class Noise(ABC):
    """A noise level that develops along a flow; its memory is plain data in the flow's states."""

    def begin(self, mmd2: float) -> Any:
        """Return the memory before the first step; None for noise that remembers nothing."""
        return None

    @abstractmethod
    def at(self, moment: Moment) -> float:
        """Return the level of a step."""

    def advance(self, memory: Any, step: int, mmd2: float) -> Any:
        """Return the memory after a step."""
        return None


class NoiseSchedule(Noise):
    """A noise level that depends on the step alone."""

    def at(self, moment: Moment) -> float:
        """Return the level at the moment's step."""
        return self.level(moment.step)

    @abstractmethod
    def level(self, step: int) -> float:
        """Return the standard deviation of the noise at a step, counted from 0."""


@dataclass(frozen=True)
class ConstantNoise(NoiseSchedule):
    """The same level for a number of steps, then none.

    Args:
        initial: Level, >= 0, in the units of the samples.
        until: Step from which there is no noise; never when not given.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Arbel et al. 2019, arXiv 1906.04370, section 5 (noise up to a given step).

    Examples:
        >>> [ConstantNoise(0.5, until=2).level(step) for step in range(4)]
        [0.5, 0.5, 0.0, 0.0]
    """

    initial: float
    until: int | None = None

    def __post_init__(self) -> None:
        _check_level(self, self.initial, self.until)

    def level(self, step: int) -> float:
        """Return the level, or 0 from the last step on."""
        return 0.0 if self.until is not None and step >= self.until else self.initial


@dataclass(frozen=True)
class GeometricNoise(NoiseSchedule):
    r"""The level falls by a factor each step, :math:`\beta_t = \beta_0\, r^t`.

    Args:
        initial: Level at step 0, >= 0, in the units of the samples.
        ratio: Factor r of each step, in (0, 1].
        until: Step from which there is no noise; never when not given.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> [GeometricNoise(1.0, ratio=0.5).level(step) for step in range(3)]
        [1.0, 0.5, 0.25]
    """

    initial: float
    ratio: float
    until: int | None = None

    def __post_init__(self) -> None:
        _check_level(self, self.initial, self.until)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"GeometricNoise needs a ratio in (0, 1], got {self.ratio}.")

    def level(self, step: int) -> float:
        """Return initial * ratio^step, or 0 from the last step on."""
        over = self.until is not None and step >= self.until
        return 0.0 if over else self.initial * self.ratio**step


@dataclass(frozen=True)
class HalvingNoise(NoiseSchedule):
    r"""The level is halved at regular steps, :math:`\beta_t = \beta_0\, 2^{-\lfloor t / e\rfloor}`.

    Args:
        initial: Level at step 0, >= 0, in the units of the samples.
        every: Number of steps e between two halvings, >= 1.
        until: Step from which there is no noise; never when not given.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Arbel et al. 2019, arXiv 1906.04370: the schedule of the authors' student-teacher code.

    Examples:
        >>> [HalvingNoise(1.0, every=2, until=5).level(step) for step in range(6)]
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.0]
    """

    initial: float
    every: int
    until: int | None = None

    def __post_init__(self) -> None:
        _check_level(self, self.initial, self.until)
        if self.every < 1:
            raise ValueError(f"HalvingNoise needs every >= 1 steps, got {self.every}.")

    def level(self, step: int) -> float:
        """Return initial * 2^-(step // every), or 0 from the last step on."""
        over = self.until is not None and step >= self.until
        return 0.0 if over else self.initial * 0.5 ** (step // self.every)


@dataclass(frozen=True)
class AdaptiveNoise(Noise):
    r"""The largest level at which noise provably keeps the step a direction of descent.

    .. math:: 8 \lambda^2 \beta^2 F \, \overline{\|u\|^2} \le D_\beta
              = \frac1m\sum_j \|\nabla f(y_j + \beta u_j)\|^2,
              \qquad F = \tfrac12 MMD^2

    Derivation: with :math:`v_j = \nabla f(y_j + \beta u_j)` a small step of size s changes F by
    :math:`-s\,\overline{\langle \nabla f(y_j), v_j\rangle}`. The Hessian of f obeys
    :math:`\|Hf\| \le \lambda\|f\|_H = \lambda\sqrt{2F}` with lambda from `hessian_constant`,
    so :math:`\|v_j - \nabla f(y_j)\| \le \beta\lambda\sqrt{2F}\,\|u_j\|`, and the inequality makes
    the change at most :math:`-\frac s2 D_\beta`. It holds on the very draw u of the step, not only
    on average; the paper's :math:`\lambda^2` is ours times :math:`E\|u\|^2 = d`.

    D is measured on a falling geometric grid of levels, and the first level that fits is refined by
    bisection towards the next larger one: one gradient evaluation each. As
    :math:`D_\beta \le 2F \kappa^2` with the kernel's gradient constant kappa (1 / bandwidth for the
    Gaussian), no level above :math:`\kappa / (2 \lambda \overline{\|u\|^2}^{1/2})` ever fits. For
    many particles the mean is close to d, which makes that bandwidth / sqrt(12 d); for a few it is
    that of the draw, and one particle whose u happens to be small may get any level.

    Args:
        largest: Largest level tried, > 0, in the units of the samples.
        ratio: Factor between levels of the grid, in (0, 1).
        num_levels: Number of levels tried, >= 1; below them the level is 0.
        num_bisections: Number of refinements, >= 0.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Arbel et al. 2019, arXiv 1906.04370, the decreasing-direction condition of the theorem on
        noise injection.

    Examples:
        >>> noise = AdaptiveNoise(largest=1.0, num_bisections=40)
        >>> round(noise.level(energy=0.5, constant=1.0, dissipation=lambda beta: 0.25), 6)
        0.25
    """

    largest: float
    ratio: float = 0.5
    num_levels: int = 12
    num_bisections: int = 4

    def __post_init__(self) -> None:
        if not (
            0 < self.largest < math.inf
            and 0 < self.ratio < 1
            and self.num_levels >= 1
            and self.num_bisections >= 0
        ):
            raise ValueError(
                "AdaptiveNoise needs a finite largest > 0, ratio in (0, 1), num_levels >= 1 and "
                f"num_bisections >= 0, got {self}."
            )

    def level(
        self, *, energy: float, constant: float, dissipation: Callable[[float], float]
    ) -> float:
        r"""Return the largest level found at which the inequality holds, or 0.

        Args:
            energy: F, half of the biased MMD^2.
            constant: lambda^2 times the mean of ||u||^2.
            dissipation: Maps a level beta to D_beta.

        Returns:
            A level in [0, largest].
        """
        return self.search(lambda beta: 8 * constant * beta**2 * energy <= dissipation(beta))

    def at(self, moment: Moment) -> float:
        """Return the largest level that the descent guarantee allows at a moment."""
        return self.level(
            energy=moment.energy, constant=moment.constant(), dissipation=moment.dissipation
        )

    def search(self, fits: Callable[[float], bool]) -> float:
        """Return the largest level found at which a condition holds, or 0.

        Args:
            fits: Whether the condition holds at a level.

        Returns:
            A level in [0, largest].
        """
        levels = (self.largest * self.ratio**i for i in range(self.num_levels))
        low = next((beta for beta in levels if fits(beta)), 0.0)
        if low in (0.0, self.largest):
            return low
        high = low / self.ratio
        for _ in range(self.num_bisections):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


@dataclass(frozen=True)
class PlateauNoise(Noise):
    r"""A level that falls whenever the flow has come to rest at it.

    Noise of level beta lets particles follow a witness that is smoothed over the distance beta: it
    sees far, and rests where the smoothed gradient vanishes. So the level starts at the size of the
    data and is lowered by a factor each time that MMD^2 of the particles without noise, averaged
    over a window of steps, has fallen by less than a share since the window before. A schedule
    fixed beforehand must guess how long a level is of use; this one measures it. It is no bound:
    at a large level MMD^2 may rise. Where the length of the run is known, the level stays under the
    line that ends there, so that the last steps are without noise. For a level with a guarantee
    see `AdaptiveNoise`, which is far smaller and does not leave a place where the gradient
    vanishes.

    Args:
        initial: Level at step 0, > 0, in the units of the samples: about the spread of the target,
            the root-mean-square distance of its points from their mean.
        window: Steps over which MMD^2 is averaged, >= 1.
        tolerance: Least relative decrease of that average at which the level is kept, in (0, 1).
        ratio: Factor on the level otherwise, in (0, 1).
        smallest: Level below which there is no noise, in [0, initial]. Noise of level beta smooths
            a Gaussian kernel of bandwidth b to (b^2 + beta^2)^1/2, so levels below b change little
            but the jitter: b is a good choice.
        until: Step at which a line from the initial level comes to 0 that the level stays under,
            >= 1: the number of steps of the run. No line when not given.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Ours; noise injection is that of Arbel et al. 2019, arXiv 1906.04370.

    Examples:
        >>> noise = PlateauNoise(initial=1.0, window=2, ratio=0.5)
        >>> memory = noise.begin(mmd2=8.0)
        >>> for step, mmd2 in enumerate([8.0, 4.0, 4.0, 2.0, 3.0, 3.0], start=1):
        ...     memory = noise.advance(memory, step, mmd2)
        >>> noise.level(memory, step=6)  # window averages 6, 3 and 3: the last brought nothing
        0.5
    """

    initial: float
    window: int = 50
    tolerance: float = 0.05
    ratio: float = 0.8
    smallest: float = 0.0
    until: int | None = None

    def __post_init__(self) -> None:
        if not (
            0 < self.initial < math.inf
            and self.window >= 1
            and 0 < self.tolerance < 1
            and 0 < self.ratio < 1
            and 0 <= self.smallest <= self.initial
            and (self.until is None or self.until >= 1)
        ):
            raise ValueError(
                "PlateauNoise needs a finite initial level > 0, window >= 1, tolerance and ratio "
                "in (0, 1), smallest in [0, initial] and until >= 1 or None, got "
                f"{self}."
            )

    def begin(self, mmd2: float) -> tuple[float, float, float]:
        """Return the memory before the first step: level, last average and sum of this window.

        Args:
            mmd2: MMD^2 at the start.
        """
        return self.initial, mmd2, 0.0

    def advance(
        self, memory: tuple[float, float, float], step: int, mmd2: float
    ) -> tuple[float, float, float]:
        """Return the memory after a step.

        Args:
            memory: That before the step.
            step: Number of steps made, this one included.
            mmd2: MMD^2 after the step.
        """
        level, reference, total = memory
        total += mmd2
        if step % self.window:
            return level, reference, total
        average = total / self.window
        if average > (1 - self.tolerance) * reference:
            level *= self.ratio
        return level, average, 0.0

    def at(self, moment: Moment) -> float:
        """Return the level that the memory holds."""
        return self.level(moment.memory, moment.step)

    def level(self, memory: tuple[float, float, float], step: int) -> float:
        """Return the level of a step.

        Args:
            memory: That before the step.
            step: Number of steps made before.
        """
        line = math.inf if self.until is None else self.initial * (1 - step / self.until)
        level = min(memory[0], line)
        return level if level >= self.smallest else 0.0  # the line goes on below 0


def hessian_constant(kernel: Kernel) -> float:
    r"""Bound the second derivatives of functions in a kernel's RKHS.

    .. math:: \|\nabla^2 f(x)\| \le \lambda \|f\|_H, \qquad
        \lambda^2 = \sup_{e, e'} \|\partial_e\partial_{e'} k(x, \cdot)\|_H^2
                  = E\,\langle\omega, e\rangle^4

    for spectral norm, unit vectors e and e', and frequencies omega of the spectral measure: the
    fourth derivative of the kernel's profile at 0. The bound is attained. With bandwidth b it is

    * 3 / b^4 for the Gaussian, the fourth moment of N(0, 1 / b^2);
    * 3 (1 + 1 / alpha) / b^4 for the rational quadratic, a gamma mixture of Gaussians;
    * 9 / b^4 for the inverse multiquadric, its case alpha = 1/2;
    * the weighted sum for a sum of kernels.

    Args:
        kernel: A smooth stationary kernel.

    Returns:
        lambda > 0, per squared unit of the samples.

    Raises:
        TypeError: If the kernel is not one of those above: others are not smooth at distance 0, or
            have no bound.

    Source:
        Arbel et al. 2019, arXiv 1906.04370, assumption on the kernel's second derivatives.

    Examples:
        >>> from lightning_mmd.kernels import Gaussian
        >>> hessian_constant(Gaussian(bandwidth=1.0)) ** 2
        2.9999999999999996
    """
    return math.sqrt(kernel.fourth_moment())


def _check_level(schedule: NoiseSchedule, initial: float, until: int | None) -> None:
    if not (0 <= initial < math.inf and (until is None or until >= 0)):
        raise ValueError(
            f"{type(schedule).__name__} needs a finite initial level >= 0 and until >= 0 or None, "
            f"got initial = {initial}, until = {until}."
        )
