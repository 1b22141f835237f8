r"""A weight of a penalty that follows the sizes of gradients, so that no unit has to be known."""

import copy
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

__all__ = ["AutoAlpha", "FixedAlpha", "as_weight"]


@dataclass
class AutoAlpha:
    r"""Holds the ratio of a penalty's gradient to the other gradient at a level.

    With norms p of the penalty's gradient at alpha = 1 and q of the other gradient in the same
    parameters, alpha p / q is the ratio. The geometric mean of ``level`` q / p over about
    ``horizon`` steps, with newest weight :math:`\max(1/t, 1/horizon)`, is alpha, once a ramp of
    ``horizon`` steps has let it grow from a hundredth of that. In a single step the ratio is never
    above twice the level. Scaling the generator's Jacobian by c scales p by c^2 and alpha by
    c^{-2}: the training stays as it is.

    Args:
        level: The ratio to hold, in (0, 1].
        horizon: Steps of the mean and of the ramp, >= 1.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        This package; adaptive augmentation (Karras et al. 2020, arXiv 2006.06676) holds a signal at
        a level likewise.
    """

    level: float = 0.1
    horizon: int = 100
    _mean: float = field(default=0.0, init=False, repr=False, compare=False)
    _steps: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.level <= 1 or self.horizon < 1:
            raise ValueError(
                "AutoAlpha needs a level in (0, 1] and a horizon >= 1, got "
                f"{self.level} and {self.horizon}."
            )

    def update(self, penalty: float, other: float) -> float:
        """Return alpha for a step.

        Args:
            penalty: Norm p >= 0 of the penalty's gradient at alpha = 1.
            other: Norm q >= 0 of the other gradient.

        Returns:
            alpha >= 0; 0 where one of the norms is 0 or not finite: such a step teaches nothing.
        """
        if not (0 < penalty < math.inf and 0 < other < math.inf):
            return 0.0
        natural = math.log(self.level) + math.log(other) - math.log(penalty)
        self._steps += 1
        self._mean += (natural - self._mean) * max(1 / self._steps, 1 / self.horizon)
        ramp = max(0.01, min(1.0, self._steps / self.horizon))
        return min(ramp * math.exp(self._mean), 2 * math.exp(natural))

    def state_dict(self) -> dict[str, Any]:
        """Return what the mean knows."""
        return {"mean": self._mean, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._mean, self._steps = state["mean"], state["steps"]


class FixedAlpha:
    """A fixed weight, which warns once where it leaves a critic nothing but its penalty.

    Args:
        alpha: The weight, >= 0.
        share: Mean share of the penalty's gradient in the sum of both norms that is warned of.
        patience: Steps of that mean, and least number of steps before a warning.
    """

    def __init__(self, alpha: float, share: float = 0.8, patience: int = 50) -> None:
        self.alpha = alpha
        self._share, self._patience = share, patience
        self._mean, self._steps, self._said = 0.0, 0, False

    def update(self, penalty: float, other: float) -> float:
        """Return the weight; see :meth:`AutoAlpha.update`."""
        weighted = self.alpha * penalty
        if not 0 < weighted + other < math.inf:
            return self.alpha
        share = weighted / (weighted + other)
        self._steps += 1
        self._mean += (share - self._mean) * max(1 / self._steps, 1 / self._patience)
        if self._steps >= self._patience and self._mean > self._share and not self._said:
            self._said = True
            warnings.warn(
                f"alpha={self.alpha:g} has made the parametric-gradient penalty {self._mean:.0%} "
                f"of the critic's gradient over {self._patience} steps: the critic is held flat "
                "along the generator, which then cannot learn. Use alpha='auto', or at most about "
                f"alpha={0.1 * other / penalty:.1g} with this generator.",
                stacklevel=2,
            )
        return self.alpha

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a warning may be said again."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing."""


def as_weight(alpha: "float | str | AutoAlpha") -> "AutoAlpha | FixedAlpha":
    """Return what gives alpha at each step.

    Args:
        alpha: A number >= 0, ``"auto"`` or an `AutoAlpha`, which is copied.

    Raises:
        ValueError: If it is anything else.
    """
    if alpha == "auto":
        return AutoAlpha()
    if isinstance(alpha, AutoAlpha):
        return copy.deepcopy(alpha)
    if isinstance(alpha, (str, bool)) or alpha is None or not 0 <= alpha < math.inf:
        raise ValueError(
            f"alpha must be 'auto', an AutoAlpha or a finite number >= 0, got {alpha!r}."
        )
    return FixedAlpha(alpha)
