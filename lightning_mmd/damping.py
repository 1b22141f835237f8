r"""Automatic damping and step size of the closed-form update, by the gain ratio.

An update solves :math:`(\alpha JJ^T + \beta I) w = \delta` and steps the generator along
:math:`J^T w`: a Levenberg-Marquardt step on the embedding residual delta. Such steps are trusted as
far as the linear model of the embedding that they come from.
"""

import math
from dataclasses import dataclass

__all__ = ["AutomaticDamping"]


@dataclass
class AutomaticDamping:
    r"""Levenberg-Marquardt control: trust grows or shrinks with realised over modelled decrease.

    With t the step and m the embedding, the model of the decrease of F = 1/2 ||delta||^2 is that of
    an m linear in theta, :math:`t \langle\delta, Dw\rangle - \frac{t^2}2 \|Dw\|^2`; the gain ratio
    rho is the realised decrease over it, on the same latents and features. Then

    * rho < 0: F rose; the step is to be undone, and trust is halved;
    * rho < 1/4: trust shrinks by 0.7 and beta grows by 1.5;
    * rho > 3/4: trust grows by 1.2, and beta shrinks by 1.5.

    Args:
        largest_trust: Largest factor on the step size from the second step on, > 0.
        trust: Factor on the step size, > 0.
        damping: Factor on beta, in [1e-3, 1e3].

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Marquardt 1963; the thresholds and factors are those of Martens 2010, Deep learning via
        Hessian-free optimization, section 4.1, for beta.

    Example:
        >>> control = AutomaticDamping(largest_trust=1.0)
        >>> control.judge(realised=-0.1, modelled=1.0), control.trust
        (False, 0.5)
        >>> control.judge(realised=0.9, modelled=1.0), control.trust
        (True, 0.6)
    """

    largest_trust: float
    trust: float = 1.0
    damping: float = 1.0

    def __post_init__(self) -> None:
        if not (0 < self.largest_trust < math.inf and 0 < self.trust < math.inf) or not (
            1e-3 <= self.damping <= 1e3
        ):
            raise ValueError(
                "AutomaticDamping needs largest_trust > 0, trust > 0 and damping in [1e-3, 1e3], "
                f"got {self}."
            )

    def judge(self, realised: float, modelled: float) -> bool:
        """Adapt to the outcome of a step, and return whether the step is to be kept.

        Args:
            realised: Decrease of F that happened; NaN and infinity count as a step too long.
            modelled: Decrease of F by the model; a step without one was too long.
        """
        kept = 0 <= realised < math.inf  # False for NaN
        gain_ratio = realised / modelled if kept and modelled > 0 else 0.0
        if gain_ratio > 0.75:
            self.damping = max(1e-3, self.damping / 1.5)
            self.trust *= 1.2
        elif gain_ratio < 0.25:
            self.damping = min(1e3, self.damping * 1.5)
            self.trust *= 0.7 if kept else 0.5
        self.trust = min(self.trust, self.largest_trust)
        return kept
