"""Small smooth generators and feature nets: SiLU and GroupNorm, no state outside the weights.

GroupNorm keeps gradients of W processes equal to those of one (batch statistics do not), and SiLU
keeps gradient penalties differentiable.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mmd.conditional import ClassGroupNorm, ClassSequential

__all__ = [
    "ConvClassifier",
    "ConvFeatures",
    "ConvGenerator",
    "DoublingConv2d",
    "MLPFeatures",
    "MLPGenerator",
]


class DoublingConv2d(nn.Conv2d):
    r"""Nearest-neighbour doubling and a 3x3 convolution with zero padding, in one pass.

    The same function of the same parameters as ``nn.Upsample(scale_factor=2)`` and then
    ``nn.Conv2d(in_channels, out_channels, 3, padding=1)``. A doubled image has each value four
    times, so that sums of the kernel's weights do on the small image what its weights do on the
    large one: a transposed convolution of stride 2 whose 4x4 kernel is the 3x3 kernel convolved
    with ones(2, 2). It multiplies 4 / 9 as often, and on a CPU takes about half of the time.

    Args:
        in_channels: Channels of the small image, >= 1.
        out_channels: Channels of the image that is twice as large.

    Examples:
        >>> import torch
        >>> DoublingConv2d(3, 5)(torch.randn(2, 3, 7, 6)).shape
        torch.Size([2, 5, 14, 12])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        """Map images (n, in_channels, h, w) to (n, out_channels, 2 h, 2 w)."""
        k = F.pad(self.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))
        k = k[..., 1:, 1:] + k[..., 1:, :-1] + k[..., :-1, 1:] + k[..., :-1, :-1]
        return F.conv_transpose2d(input, k, self.bias, stride=2, padding=1)


class ConvGenerator(nn.Module):
    """Convolutional generator of images in [-1, 1].

    A linear map to a small image, then between two entries of ``channels`` a nearest-neighbour
    doubling and a 3x3 convolution, and a last convolution under tanh.

    Args:
        sample_shape: Shape (c, h, w) of an image; h and w divisible by 2^(len(channels) - 1). On
            the command line ``data`` takes it from the data module.
        latent_dim: Length of a latent vector.
        channels: Channels from the smallest image to the largest; ``auto`` doubles from images of 4
            to 8 pixels, with 16 channels (32 for colour) in the largest and at most 256.
        num_classes: Number of classes; the generator is then called with latents and labels, and
            each class has gains and shifts of its own in the normalisations (`ClassGroupNorm`).

    Raises:
        ValueError: If the image size does not fit the number of doublings, or there are no
            ``channels``.
    """

    def __init__(
        self,
        sample_shape: Sequence[int] | Literal["data"],
        latent_dim: int = 32,
        channels: Sequence[int] | Literal["auto"] = (64, 32, 16),
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if channels == "auto":
            channels = _automatic(sample_shape, smallest=8)[::-1]
        out_channels, height, width = _check_image_shape(sample_shape, len(channels) - 1)
        scale = 2 ** (len(channels) - 1)
        base = (channels[0], height // scale, width // scale)
        layers: list[nn.Module] = [
            nn.Linear(latent_dim, math.prod(base)),
            nn.Unflatten(1, base),
            *_normalised(channels[0], num_classes),
        ]
        for before, after in pairwise(channels):
            layers += [DoublingConv2d(before, after), *_normalised(after, num_classes)]
        layers += [nn.Conv2d(channels[-1], out_channels, 3, padding=1), nn.Tanh()]
        self.layers = (nn.Sequential if num_classes is None else ClassSequential)(*layers)

    def forward(self, z: Tensor, *labels: Tensor) -> Tensor:
        """Map latents (n, latent_dim), and labels (n,) of classes, to images (n, c, h, w)."""
        return self.layers(z, *labels)


class ConvFeatures(nn.Module):
    """Convolutional feature net: stride-2 3x3 convolutions and a linear map.

    Args:
        sample_shape: Shape (c, h, w) of an image; on the command line, ``data``.
        num_features: Length of the feature vector.
        channels: Channels of the convolutions; each halves the image. ``auto`` halves until 2 to 4
            pixels are left, with 16 channels (32 for colour) in the first and at most 256.
        activated: Whether SiLU follows the last map. A `LearnedKernelCritic` is linear in its
            features: without, their last map and its weights are one linear map.

    Raises:
        ValueError: If ``sample_shape`` is not (c, h, w).
    """

    def __init__(
        self,
        sample_shape: Sequence[int] | Literal["data"],
        num_features: int = 256,
        channels: Sequence[int] | Literal["auto"] = (16, 32, 64),
        activated: bool = False,
    ) -> None:
        super().__init__()
        if channels == "auto":
            channels = _automatic(sample_shape, smallest=4)[:-1]
        before, height, width = _check_image_shape(sample_shape, 0)
        layers: list[nn.Module] = []
        for after in channels:
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), *_normalised(after)]
            before, height, width = after, (height + 1) // 2, (width + 1) // 2
        layers += [nn.Flatten(), nn.Linear(before * height * width, num_features)]
        layers += [nn.SiLU()] if activated else []
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, c, h, w) to features (n, num_features)."""
        return self.layers(x)


class ConvClassifier(nn.Module):
    """Small classifier whose last hidden layer serves as features to judge samples by.

    Stride-2 3x3 convolutions, a linear map to ``num_features``, and one to the classes; SiLU after
    each but the last.

    Args:
        sample_shape: Shape (c, h, w) of an image.
        num_classes: Number of classes.
        num_features: Length of the feature vector.
        channels: Channels of the convolutions; each halves the image.

    Raises:
        ValueError: If ``sample_shape`` is not (c, h, w).
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        num_classes: int = 10,
        num_features: int = 128,
        channels: Sequence[int] = (32, 64),
    ) -> None:
        super().__init__()
        before, height, width = _check_image_shape(sample_shape, 0)
        layers: list[nn.Module] = []
        for after in channels:
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
            before, height, width = after, (height + 1) // 2, (width + 1) // 2
        layers += [nn.Flatten(), nn.Linear(before * height * width, num_features), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, c, h, w) to logits (n, num_classes)."""
        return self.head(self.features(x))


class MLPGenerator(nn.Module):
    """Fully connected generator of points.

    Args:
        sample_dim: Dimension of a point.
        latent_dim: Length of a latent vector.
        hidden: Widths of the hidden layers.
    """

    def __init__(
        self, sample_dim: int = 2, latent_dim: int = 8, hidden: Sequence[int] = (64, 64)
    ) -> None:
        super().__init__()
        self.layers = _mlp(latent_dim, hidden, sample_dim)

    def forward(self, z: Tensor) -> Tensor:
        """Map latents (n, latent_dim) to points (n, sample_dim)."""
        return self.layers(z)


class MLPFeatures(nn.Module):
    """Fully connected feature net.

    Args:
        sample_dim: Dimension of a sample, after flattening.
        num_features: Length of the feature vector.
        hidden: Widths of the hidden layers.
    """

    def __init__(
        self, sample_dim: int = 2, num_features: int = 64, hidden: Sequence[int] = (64, 64)
    ) -> None:
        super().__init__()
        self.layers = _mlp(sample_dim, hidden, num_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map samples (n, ...) to features (n, num_features)."""
        return self.layers(x.flatten(1))


def _mlp(in_features: int, hidden: Sequence[int], out_features: int) -> nn.Sequential:
    widths = [in_features, *hidden]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], out_features))


def _normalised(channels: int, num_classes: int | None = None) -> list[nn.Module]:
    # two channels a group at least: alone, a channel loses its mean and its bias does nothing
    num_groups = math.gcd(channels, max(1, min(8, channels // 2)))
    if num_classes is not None:
        return [ClassGroupNorm(num_groups, channels, num_classes), nn.SiLU()]
    return [nn.GroupNorm(num_groups, channels), nn.SiLU()]


def _automatic(sample_shape: Sequence[int] | Literal["data"], smallest: int) -> list[int]:
    """Return channels from the largest image to the one of at most ``smallest`` pixels."""
    channels, height, width = _check_image_shape(sample_shape, 0)
    first = 16 if channels == 1 else 32
    levels = max(0, math.ceil(math.log2(max(height, width) / smallest)))
    return [min(first * 2**level, 256) for level in range(levels + 1)]


def _check_image_shape(
    sample_shape: Sequence[int] | Literal["data"], num_doublings: int
) -> tuple[int, int, int]:
    if sample_shape == "data":
        raise ValueError(
            "sample_shape='data' is for the command line, which takes the shape from the data "
            "module. In Python give it: sample_shape=data.sample_shape."
        )
    if len(sample_shape) != 3 or min(sample_shape) < 1:
        raise ValueError(f"an image has a shape (c, h, w), got {tuple(sample_shape)}.")
    if num_doublings < 0:
        raise ValueError("a convolutional generator needs at least one entry in channels, got ().")
    channels, height, width = sample_shape
    if height % 2**num_doublings or width % 2**num_doublings:
        raise ValueError(
            f"{num_doublings} doublings need a height and width divisible by {2**num_doublings}, "
            f"got {height} x {width}. Give fewer channels, or pad the images."
        )
    return channels, height, width
