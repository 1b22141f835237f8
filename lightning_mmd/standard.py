"""The rule that a model has where none is named."""

from torch import nn

from lightning_mmd.critics import LearnedKernelCritic
from lightning_mmd.gradient_ascent import GradientAscent
from lightning_mmd.kernel_objectives import SlopePenalty
from lightning_mmd.matching import FeatureMatching
from lightning_mmd.objectives import Logistic

__all__ = ["standard_rule"]


def standard_rule(critic: nn.Module) -> GradientAscent:
    """Return the rule that draws best by independent features; `MMDGAN` has it by default.

    A non-saturating GAN under R1 whose generator also descends MMD^2 in the critic's features. It
    is the rule of ``configs/mnist.yaml``; ``benchmarks/README.md`` compares it with others.

    Args:
        critic: What it trains. The features of a `LearnedKernelCritic` are matched; other critics
            show none.

    Source:
        Goodfellow et al. 2014, arXiv 1406.2661; Mescheder et al. 2018, arXiv 1801.04406 (R1); see
        `FeatureMatching` for the rest.

    Example:
        >>> standard_rule(LearnedKernelCritic(nn.Linear(2, 8), 8)).matching.weight
        20.0
    """
    plain = getattr(critic, "_orig_mod", critic)
    return GradientAscent(
        alpha=0.0,
        beta=0.0,
        objective=Logistic(),
        slope=SlopePenalty(1.0, at="real"),
        matching=FeatureMatching(20.0) if isinstance(plain, LearnedKernelCritic) else None,
    )
