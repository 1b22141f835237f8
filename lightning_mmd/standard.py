"""The rule that a model has where none is named."""

from torch import nn

from lightning_mmd.critics import LearnedKernelCritic
from lightning_mmd.gradient_ascent import GradientAscent
from lightning_mmd.kernel_objectives import SlopePenalty
from lightning_mmd.matching import FeatureMatching
from lightning_mmd.objectives import Linear

__all__ = ["standard_rule"]


def standard_rule(critic: nn.Module) -> GradientAscent:
    r"""Return the rule that draws best by independent features; `MMDGAN` has it by default.

    The critic f ascends :math:`E f(x) - E f(G_\theta(z)) - 10\,E (\|\nabla f(x)\| - 1)^2` at real
    x, and the generator descends that gap and 10 times MMD^2 in the critic's features. It is the
    rule of ``configs/mnist.yaml``; ``benchmarks/README.md`` compares it with others.

    Args:
        critic: What it trains. The features of a `LearnedKernelCritic` are matched; other critics
            show none.

    Source:
        Gulrajani et al. 2017, arXiv 1704.00028, whose slope is penalised between real and generated
        points; see `FeatureMatching` for the rest.

    Examples:
        >>> standard_rule(LearnedKernelCritic(nn.Linear(2, 8), 8)).matching.weight
        20.0
    """
    plain = getattr(critic, "_orig_mod", critic)
    return GradientAscent(
        alpha=0.0,
        beta=0.0,
        objective=Linear(),
        slope=SlopePenalty(20.0, at="real", target=1.0),
        matching=FeatureMatching(20.0) if isinstance(plain, LearnedKernelCritic) else None,
    )
