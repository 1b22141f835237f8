"""The pair that costs are measured on: DCGAN with GroupNorm and SiLU; both networks cost alike."""

from torch import nn


def generator(width: int = 64, latent_dim: int = 128) -> nn.Sequential:
    """Return a generator of 32x32 colour images: transposed 4x4 convolutions of stride 2."""
    return nn.Sequential(
        nn.Linear(latent_dim, 4 * width * 16),
        nn.Unflatten(1, (4 * width, 4, 4)),
        *_normalised(4 * width),
        nn.ConvTranspose2d(4 * width, 2 * width, 4, 2, 1),
        *_normalised(2 * width),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
        *_normalised(width),
        nn.ConvTranspose2d(width, 3, 4, 2, 1),
        nn.Tanh(),
    )


def features(width: int = 64, num_features: int = 128) -> nn.Sequential:
    """Return its mirror image, from 32x32 colour images to feature vectors."""
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1),
        *_normalised(width),
        nn.Conv2d(width, 2 * width, 4, 2, 1),
        *_normalised(2 * width),
        nn.Conv2d(2 * width, 4 * width, 4, 2, 1),
        *_normalised(4 * width),
        nn.Flatten(),
        nn.Linear(4 * width * 16, num_features),
    )


def _normalised(channels: int) -> list[nn.Module]:
    return [nn.GroupNorm(min(8, channels // 2), channels), nn.SiLU()]
