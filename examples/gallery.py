"""Real MNIST digits beside the first that the package's weights draw: the README's picture.

    python examples/gallery.py data

`data` holds MNIST as torchvision keeps it. The weights are those of `lightning-mmd fit --config
mnist`.
"""

import argparse
from pathlib import Path

import torch
from torchvision.datasets import MNIST
from torchvision.utils import make_grid, save_image

from lightning_mmd import MMDGAN

NUM = 100


def main(data: str, directory: Path = Path(__file__).parent / "figures") -> Path:
    """Draw the picture and return its path."""
    model = MMDGAN.from_pretrained("mnist")
    torch.manual_seed(0)
    real = MNIST(data, train=False).data[:NUM].unsqueeze(1) / 255
    made = (model.sample(NUM) + 1).clamp(0, 2) / 2
    left, right = (make_grid(x, nrow=10, padding=1) for x in (real, made))
    gap = torch.ones(3, left.shape[1], 12)
    picture = torch.cat([left, gap, right], 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    path = directory / "mnist_real_and_generated.png"
    save_image(picture, path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    print(main(parser.parse_args().data))
