"""What makes penalties of a critic's gradient other than they seem."""

import warnings
from weakref import WeakSet

from torch import Tensor, nn

__all__ = ["KinkedCriticWarning", "SigmoidCriticWarning", "warn_of_kinks", "warn_of_sigmoid"]

_KINKED = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.Hardtanh, nn.Threshold)


class KinkedCriticWarning(UserWarning):
    """Automatic differentiation loses the kinks' part of a gradient penalty's gradient."""


def warn_of_kinks(critic: nn.Module) -> None:
    """Warn once a critic that its ReLU-like layers make gradient penalties inconsistent.

    The gradient of a penalty on grad f contains the jumps of grad f at the kinks, which automatic
    differentiation does not see: biases get exactly zero, and the error in the whole gradient is
    around 60 % (0.1 % for SiLU).

    Args:
        critic: The module.

    Warns:
        KinkedCriticWarning: If it holds ReLU, LeakyReLU or another piecewise-linear activation.
    """
    if critic in _warned:
        return
    _warned.add(critic)
    kinked = sorted({type(m).__name__ for m in critic.modules() if isinstance(m, _KINKED)})
    if kinked:
        warnings.warn(
            f"the critic {type(critic).__name__} holds {', '.join(kinked)}: automatic "
            "differentiation misses the kinks' part of a gradient penalty's gradient (about 60 %). "
            "Use SiLU, GELU or Softplus.",
            KinkedCriticWarning,
            stacklevel=2,
        )


_warned: WeakSet[nn.Module] = WeakSet()


class SigmoidCriticWarning(UserWarning):
    """The penalty is of probabilities, where the theory is about raw scores."""


def warn_of_sigmoid(values: Tensor) -> None:
    """Warn of critic values that come out of a sigmoid, as those of a classifier do.

    Args:
        values: Critic values with their graph.

    Warns:
        SigmoidCriticWarning: If the last operation but reshaping is a sigmoid.
    """
    node = values.grad_fn
    while node is not None and node.name().rstrip("0123456789") in _RESHAPING:
        node = next((n for n, _ in node.next_functions if n is not None), None)
    if node is not None and node.name().startswith("SigmoidBackward"):
        warnings.warn(
            "the critic ends in a sigmoid: the penalty is of probabilities, whose slopes vanish "
            "where the critic is sure, and the theory is about the raw score. Return the score, or "
            "take it back with critic_values=torch.logit (in the callbacks), or penalise "
            "lambda x: torch.logit(critic(x)).",
            SigmoidCriticWarning,
            stacklevel=2,
        )


_RESHAPING = {
    f"{name}Backward"
    for name in ("View", "Reshape", "UnsafeView", "Squeeze", "Unsqueeze", "Mean", "Select", "T")
} | {"ReshapeAliasBackward", "ToCopyBackward", "IndexBackward", "IndexSelectBackward"}
