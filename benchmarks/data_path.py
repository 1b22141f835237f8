"""How many images a second does the data path serve, against decoding each as it is read?

    python benchmarks/data_path.py

Before: a dataset that decodes, normalises and mirrors item by item, as torchvision's transforms do.
After: our data modules, bytes in memory, the batch normalised and mirrored as a whole. Both end
with a float batch in [-1, 1] on the CPU. For scale, the images a second of one forward and backward
pass of a small critic, which any training step exceeds. The images are made of random bytes.
"""

import struct
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
from jsonargparse import auto_cli
from meters import interleaved_seconds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from lightning_mmd.data import ImageFolderDataModule, SampleDataModule, TorchvisionDataModule
from lightning_mmd.networks import ConvFeatures

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from reporting import save_table

ITEM = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]


def write_mnist(root: Path, num: int, rng: np.random.Generator) -> None:
    """Write random images in MNIST's format, as many for training as for the test."""
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        images = struct.pack(">4I", 0x0803, num, 28, 28) + rng.bytes(num * 784)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(images)
        labels = struct.pack(">2I", 0x0801, num) + bytes(num)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(labels)


def write_folder(root: Path, num: int, suffix: str, side: int, rng: np.random.Generator) -> None:
    """Write smooth random colour images, which compress as photographs do."""
    (root / "all").mkdir(parents=True)
    for index in range(num):
        small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
        image = small.resize((side, side), Image.Resampling.BICUBIC)
        image.save(root / f"all/{index}{suffix}")


def sources(root: Path, num: int, batch: int) -> Iterator[tuple[str, Dataset[Any], Any]]:
    """Yield a name, the dataset that decodes item by item, and our data module."""
    rng = np.random.default_rng(0)
    write_mnist(root, num, rng)
    mnist = torchvision.datasets.MNIST(root, transform=transforms.Compose(ITEM))
    grey = TorchvisionDataModule("MNIST", root, batch, flip=True, num_val=num // 10)
    yield "MNIST, 28x28", Subset(mnist, range(num - num // 10)), grey
    for suffix, side, size in ((".png", 32, 32), (".jpg", 178, 64)):
        folder = root / f"{side}{suffix}"
        write_folder(folder, num, suffix, side, rng)
        crop = [transforms.Resize(size), transforms.CenterCrop(size), *ITEM]
        items = torchvision.datasets.ImageFolder(str(folder), transforms.Compose(crop))
        ours = ImageFolderDataModule(
            folder, size, batch, 0.05, 0.05, flip=True, cache_dir=root / "cache"
        )
        yield f"folder of {suffix[1:]}, {side} to {size}", items, ours


def item_by_item(dataset: Dataset[Any], batch: int) -> int:
    """Serve one epoch and return its images."""
    loader = DataLoader(dataset, batch, shuffle=True, drop_last=True)
    return sum(len(images) for images, _ in loader)


def from_memory(data: SampleDataModule) -> int:
    """Serve one epoch and return its images."""
    return sum(len(images) for images in data.train_dataloader())


def critic_pass(critic: ConvFeatures, images: Tensor) -> None:
    """Run one forward and one backward pass."""
    critic(images).sum().backward()


def main(
    num: int = 3000,
    batch_size: int = 64,
    repeats: int = 5,
    directory: Path = Path(__file__).parent / "results",
) -> list[dict[str, Any]]:
    """Time epochs in turns, and save the images a processor second.

    Args:
        num: Images of each set.
        batch_size: Images of a batch.
        repeats: Turns of the timing; medians are kept.
        directory: Where the table goes.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, items, data in sources(Path(folder), num, batch_size):
            data.prepare_data()
            data.setup()
            images = torch.rand(batch_size, *data.sample_shape) * 2 - 1
            critic = ConvFeatures(data.sample_shape, 256, (16, 32, 64))
            candidates = {
                "before": partial(item_by_item, items, batch_size),
                "after": partial(from_memory, data),
                "critic": partial(critic_pass, critic, images),
            }
            seconds = interleaved_seconds(candidates, repeats)
            served = {k: candidates[k]() for k in ("before", "after")} | {"critic": batch_size}
            speed = {k: served[k] / median(seconds[k]) for k in candidates}
            share = speed["critic"] / speed["after"]
            rows.append({"images": name, **speed, "of_a_critic_pass": share})
    save_table(rows, directory / "data_path.csv")
    return rows


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
