r"""What a trained critic f ascends and what the generator follows: the MMD and its relatives.

Each is a sum of two means, :math:`E\,a(f(x)) + E\,b(f(G(z)))`, with :math:`a'(0) = -b'(0) = s`:
under a penalty :math:`\frac\beta2\|f\|_H^2` the best critic of each tends to that of the MMD,
:math:`f \to s\,(\mu_p - \mu_q) / \beta`, as beta grows.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

__all__ = ["KALE", "Hinge", "Linear", "Logistic", "Objective"]


class Objective(ABC):
    """An objective over functions f, in terms of their values on real and generated samples."""

    @abstractmethod
    def on_real(self, values: Tensor) -> Tensor:
        """Return a(f(x)), of the shape of the values; the critic raises its mean."""

    @abstractmethod
    def on_fake(self, values: Tensor) -> Tensor:
        """Return b(f(G(z))), likewise."""

    def on_generated(self, values: Tensor) -> Tensor:
        """Return what the generator raises the mean of; by default f itself."""
        return values

    def critic(self, real_values: Tensor, fake_values: Tensor) -> Tensor:
        """Return what the critic ascends.

        Args:
            real_values: f on real samples, of shape (n,).
            fake_values: f on generated samples, of shape (m,).

        Returns:
            A scalar.
        """
        return self.on_real(real_values).mean() + self.on_fake(fake_values).mean()

    def generator(self, fake_values: Tensor) -> Tensor:
        """Return what the generator ascends, a scalar, given f on generated samples (m,)."""
        return self.on_generated(fake_values).mean()


@dataclass
class Linear(Objective):
    r"""The difference of means, :math:`E f(x) - E f(G(z))`: the maximum mean discrepancy.

    With beta > 0 its maximum is MMD^2 / (2 beta), and s = 1.

    Source:
        Gretton et al. 2012, A kernel two-sample test; Mroueh & Nguyen, arXiv 2011.02402.
    """

    def on_real(self, values: Tensor) -> Tensor:
        """Return f(x)."""
        return values

    def on_fake(self, values: Tensor) -> Tensor:
        """Return -f(G(z))."""
        return -values


@dataclass
class Logistic(Objective):
    r"""Logistic regression, :math:`E\log\sigma(f(x)) + E\log(1 - \sigma(f(G(z))))`, s = 1/2.

    Without penalties the best f is :math:`\log p/q`, and the maximum is twice the Jensen-Shannon
    divergence minus 2 log 2. The generator raises :math:`E\log\sigma(f)` (non-saturating).

    Source:
        Goodfellow et al. 2014, arXiv 1406.2661.
    """

    def on_real(self, values: Tensor) -> Tensor:
        """Return log sigma(f)."""
        return F.logsigmoid(values)

    def on_fake(self, values: Tensor) -> Tensor:
        """Return log(1 - sigma(f))."""
        return F.logsigmoid(-values)

    def on_generated(self, values: Tensor) -> Tensor:
        """Return log sigma(f)."""
        return F.logsigmoid(values)


@dataclass
class Hinge(Objective):
    r"""The hinge, :math:`-E\max(0, 1 - f(x)) - E\max(0, 1 + f(G(z)))`, s = 1.

    Where :math:`|f| < 1` on all samples it is the MMD's objective exactly, minus 2.

    Source:
        Lim & Ye 2017, arXiv 1705.02894; Miyato et al. 2018, arXiv 1802.05957.
    """

    def on_real(self, values: Tensor) -> Tensor:
        """Return -max(0, 1 - f)."""
        return -F.relu(1 - values)

    def on_fake(self, values: Tensor) -> Tensor:
        """Return -max(0, 1 + f)."""
        return -F.relu(1 + values)


@dataclass
class KALE(Objective):
    r"""A KL divergence relaxed by the RKHS norm, :math:`E(1 - e^{-f(x)}) - E f(G(z))`, s = 1.

    With model q and target p its maximum under :math:`\frac\beta2\|f\|_H^2` is
    :math:`KALE(q \| p) / (1 + \beta)`. KALE tends to :math:`KL(q \| p)`, with f = log p/q, as beta
    falls, and to MMD^2 / 2 as beta grows. The generator raises E f: the gradient flow of KALE.

    Source:
        Glaser, Arbel & Gretton 2021, arXiv 2106.08929, equation 2, with h = -f.
    """

    def on_real(self, values: Tensor) -> Tensor:
        """Return 1 - exp(-f)."""
        return -(-values).expm1()

    def on_fake(self, values: Tensor) -> Tensor:
        """Return -f."""
        return -values
