"""Parts of networks that know the class of a sample."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ClassFeatures", "ClassGroupNorm", "ClassProductFeatures", "ClassSequential"]


class ClassGroupNorm(nn.Module):
    r"""Group normalisation whose gain and shift belong to the class of a sample.

    .. math:: y_c = \gamma_{y, c}\, \hat x_c + \beta_{y, c}

    Args:
        num_groups: Groups of channels.
        channels: Number of channels.
        num_classes: Number C of classes; gain and shift have the shape (C, channels) and begin as 1
            and 0.

    Source:
        Dumoulin et al. 2017, arXiv 1610.07629, eq. 5 (with instance normalisation).
    """

    def __init__(self, num_groups: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.normalise = nn.GroupNorm(num_groups, channels, affine=False)
        self.gain = nn.Parameter(torch.ones(num_classes, channels))
        self.shift = nn.Parameter(torch.zeros(num_classes, channels))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Map (n, channels, ...) and labels (n,) to the shape of the first."""
        broadcast = (..., *(None,) * (x.ndim - 2))
        return self.gain[labels][broadcast] * self.normalise(x) + self.shift[labels][broadcast]


class ClassSequential(nn.Sequential):
    """Layers one after the other, of which `ClassGroupNorm` gets the labels too."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, input: Tensor, labels: Tensor
    ) -> Tensor:
        """Map samples and labels (n,) through all layers."""
        for layer in self:
            input = layer(input, labels) if isinstance(layer, ClassGroupNorm) else layer(input)
        return input


class ClassFeatures(nn.Module):
    r"""Features scaled by a vector of the class: a critic by projection.

    .. math:: \varphi(x, y) = h(x) \odot (1 + e_y)

    A `LearnedKernelCritic` on them is f(x, y) = <w, h(x)> + <v_y, h(x)> with v_y = w * e_y: the
    projection discriminator. Samples of all classes share h, so that a batch of 64 is not ten
    batches of six. The e_y are standard normal: on average over them the kernel between (x, y) and
    (x', y') is (1 + 1[y = y']) <h(x), h(x')>, where `ClassProductFeatures` leaves nothing between
    different classes. Learned ones measured about as well on MNIST (``benchmarks/README.md``).

    Args:
        features: Network h from samples (n, ...) to (n, num_features).
        num_features: Length of its output, >= 1.
        num_classes: Number of classes, >= 2.
        learned: Whether the e_y are trained; else they stay as they were drawn.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Miyato & Koyama 2018, arXiv 1802.05637, eq. 3.

    Examples:
        >>> features = ClassFeatures(nn.Linear(2, 8), 8, num_classes=10)
        >>> features(torch.randn(5, 2), torch.arange(5)).shape
        torch.Size([5, 8])
    """

    scale: Tensor

    def __init__(
        self, features: nn.Module, num_features: int, num_classes: int, learned: bool = False
    ) -> None:
        super().__init__()
        _check(num_features, num_classes)
        self.features = features
        scale = torch.randn(num_classes, num_features)
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Map samples (n, ...) and labels (n,) to features (n, num_features)."""
        return self.features(x) * (1 + self.scale[labels])


class ClassProductFeatures(nn.Module):
    r"""Features of the product kernel k(x, x') 1[y = y'] / sum_y p_y^2, k(x, x') = <h(x), h(x')>.

    Feature r of h stands in block y of C blocks, the others are zero. Classes share nothing but h:
    of a batch of n samples about n / C meet in a block, so that MMD^2 estimates vary C times as
    much, and a penalty on the norm of w counts every class. Divided by sum_y p_y^2, the chance that
    two samples have one class, the mean of k over pairs is as large as without labels.

    Args:
        features: Network h from samples (n, ...) to (n, num_features).
        num_features: Length r of its output, >= 1. The critic gets ``num_features`` r * C.
        num_classes: Number C of classes, >= 2.
        frequencies: Probability p_y of each class; default: 1 / C.

    Raises:
        ValueError: If a number is out of range.

    Source:
        The tensor product of kernels, Szabo & Sriperumbudur 2018, arXiv 1708.08157: characteristic
        on pairs (x, y) where k is on x, as 1[y = y'] is on finitely many classes.
    """

    def __init__(
        self,
        features: nn.Module,
        num_features: int,
        num_classes: int,
        frequencies: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        _check(num_features, num_classes)
        weights = [1.0] * num_classes if frequencies is None else list(frequencies)
        if len(weights) != num_classes or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError(f"expected {num_classes} finite frequencies >= 0, got {frequencies}.")
        self.features = features
        self.num_classes = num_classes
        self.matches = sum((p / sum(weights)) ** 2 for p in weights)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """Map samples (n, ...) and labels (n,) to features (n, num_features * num_classes)."""
        h = self.features(x) / math.sqrt(self.matches)
        blocks = nn.functional.one_hot(labels, self.num_classes).to(h.dtype)
        return (blocks[:, :, None] * h[:, None]).flatten(1)


def _check(num_features: int, num_classes: int) -> None:
    if num_features < 1 or num_classes < 2:
        raise ValueError(
            "features of classes need num_features of at least 1 and num_classes of at least 2, "
            f"got {num_features} and {num_classes}."
        )
