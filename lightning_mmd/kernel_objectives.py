r"""What the embedding of a deep kernel ascends: MMD^2, or the repulsive loss; its slope."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_mmd.kernels import Kernel
from lightning_mmd.passes import full_precision, unfused_attention
from lightning_mmd.points import squared_distances

__all__ = [
    "Attractive",
    "KernelObjective",
    "Repulsive",
    "SlopePenalty",
    "cross_mean",
    "deep_mmd2",
    "off_diagonal_mean",
]

Inputs = tuple[Tensor, ...]


def off_diagonal_mean(gram: Tensor) -> Tensor:
    """Return the mean of a Gram matrix (n, n) over pairs of two different samples, n >= 2."""
    return (gram.sum() - gram.trace()) / (len(gram) * (len(gram) - 1))


def cross_mean(gram: Tensor, paired: bool) -> Tensor:
    """Return the mean of a matrix (n, m) of kernel values between real and generated samples.

    Args:
        gram: The matrix.
        paired: Whether samples of one index share a label: then n = m, and they are left out.
    """
    return off_diagonal_mean(gram) if paired else gram.mean()


def deep_mmd2(kernel: Kernel, real: Tensor, fake: Tensor, paired: bool = False) -> Tensor:
    """Return the unbiased MMD^2 of embeddings (n, d) and (m, d), with a graph.

    `mmd2_unbiased` is the same number, evaluated in blocks and float64.

    Args:
        kernel: The kernel.
        real: Embeddings of real samples, n >= 2.
        fake: Embeddings of generated samples, m >= 2.
        paired: Whether the i-th real and the i-th generated sample share a label, n = m: then the
            two are not compared, as no sample is with itself.

    Returns:
        A scalar, of either sign.

    Source:
        Gretton et al. 2012, A kernel two-sample test, lemma 6 and, paired, equation 4.
    """
    within = off_diagonal_mean(kernel(real, real)) + off_diagonal_mean(kernel(fake, fake))
    return within - 2 * cross_mean(kernel(real, fake), paired)


class KernelObjective(ABC):
    """What an embedding ascends, given the embeddings of real and generated samples."""

    @abstractmethod
    def critic(self, kernel: Kernel, real: Tensor, fake: Tensor, paired: bool = False) -> Tensor:
        """Return what the critic ascends.

        Args:
            kernel: Kernel on embeddings.
            real: Embeddings of real samples, (n, d), n >= 2.
            fake: Embeddings of generated samples, (m, d), m >= 2.
            paired: Whether samples of one index share a label, see `deep_mmd2`.

        Returns:
            A scalar.
        """


@dataclass
class Attractive(KernelObjective):
    r"""The unbiased MMD^2, :math:`E k(x, x') + E k(y, y') - 2 E k(x, y)`, in embeddings x, y.

    Source:
        Li et al. 2017, arXiv 1705.08584; Binkowski et al. 2018, arXiv 1801.01401.
    """

    def critic(self, kernel: Kernel, real: Tensor, fake: Tensor, paired: bool = False) -> Tensor:
        """Return MMD^2."""
        return deep_mmd2(kernel, real, fake, paired)


@dataclass
class Repulsive(KernelObjective):
    r"""Lets real samples repel and generated ones attract each other: E k(y, y') - E k(x, x').

    The squared distances of real pairs count up to ``upper``, those of generated pairs from
    ``lower`` on. These bounds belong to this objective alone: they make no kernel, and the
    generator descends MMD^2 with the kernel as it is. The kernel must be one of the distance.

    Args:
        lower: Smallest squared distance of generated pairs that counts, >= 0; 0 for no bound.
        upper: Largest squared distance of real pairs that counts, > 0; infinity for no bound.

    Raises:
        ValueError: If a bound is out of range.

    Source:
        Wang, Sun & Halgamuge 2019, arXiv 1812.09916, equations 4, 8 and 9.
    """

    lower: float = 0.25
    upper: float = 4.0

    def __post_init__(self) -> None:
        if not (0 <= self.lower < math.inf and 0 < self.upper):
            raise ValueError(
                "Repulsive needs a finite lower >= 0 and upper > 0, got "
                f"{self.lower} and {self.upper}."
            )

    def critic(self, kernel: Kernel, real: Tensor, fake: Tensor, paired: bool = False) -> Tensor:
        """Return the mean kernel of generated pairs minus that of real pairs."""
        of_real = kernel.of_squared_distances(squared_distances(real, real).clamp(max=self.upper))
        of_fake = kernel.of_squared_distances(squared_distances(fake, fake).clamp(min=self.lower))
        return off_diagonal_mean(of_fake) - off_diagonal_mean(of_real)


@dataclass
class SlopePenalty:
    r"""Penalty on the slope of the witness, :math:`E (\|\nabla f(\hat x)\| - t)^2`.

    Args:
        weight: Half of its weight in the critic's loss is this, > 0.
        at: Where: at ``interpolated`` points between pairs, at ``real`` or at ``generated`` ones.
        target: Norm t aimed at, >= 0: 0 for a flat witness, 1 for a Lipschitz one.
        interval: Critic steps from one evaluation to the next, >= 1; the weight is multiplied by
            it. The first step has one.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Binkowski et al. 2018, arXiv 1801.01401, section 3 (of the witness, between pairs, t = 1).
    """

    weight: float = 0.03
    at: Literal["interpolated", "real", "generated"] = "interpolated"
    target: float = 0.0
    interval: int = 1

    def __post_init__(self) -> None:
        if not (0 < self.weight < math.inf and 0 <= self.target < math.inf and self.interval >= 1):
            raise ValueError(
                "SlopePenalty needs weight > 0, target >= 0 and interval >= 1, got "
                f"{self.weight}, {self.target} and {self.interval}."
            )
        if self.at not in ("interpolated", "real", "generated"):
            raise ValueError(f"at must be interpolated, real or generated, got {self.at!r}.")

    def points(self, real: Inputs, fake: Inputs) -> Inputs:
        """Return the samples, with labels, at which the slope is penalised."""
        if self.at == "real":
            return real
        if self.at == "generated":
            return fake
        x, y = real[0], fake[0]
        u = torch.rand(len(x), dtype=x.dtype).to(x.device).reshape(-1, *[1] * (x.ndim - 1))
        return (torch.lerp(y, x, u), *real[1:])

    def due(self, step: int) -> bool:
        """Whether the critic's step of this number has a penalty."""
        return step % self.interval == 0

    def value(self, witness: Callable[..., Tensor], points: Inputs) -> Tensor:
        """Return the mean squared distance of the slope from its target, with a graph."""
        return self.with_values(witness, points)[1]

    def with_values(self, witness: Callable[..., Tensor], points: Inputs) -> tuple[Tensor, Tensor]:
        """Return the witness at the points, (n,), and the penalty, both with a graph."""
        x = points[0].detach().requires_grad_()
        with torch.enable_grad(), full_precision(x.device), unfused_attention():
            values = witness(x, *points[1:])
            (slope,) = torch.autograd.grad(values.sum(), x, create_graph=True)
            squared = slope.flatten(1).square().sum(1)
            if self.target == 0:
                return values, squared.mean()
            norms = squared.clamp_min(torch.finfo(x.dtype).tiny).sqrt()
            return values, (norms - self.target).square().mean()
