"""MNIST, Fashion-MNIST and CIFAR-10, in the layout and by the downloads of torchvision."""

from pathlib import Path
from types import ModuleType
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_mmd.data.base import ImageDataModule
from lightning_mmd.data.dataset import TensorSamples

__all__ = ["TorchvisionDataModule", "import_torchvision"]


def import_torchvision() -> ModuleType:
    """Import torchvision late, so that only what needs it can fail for its sake.

    Returns:
        The package, with `datasets` and `transforms` loaded.

    Raises:
        ImportError: torchvision is missing or was built for another torch.
    """
    try:
        import torchvision
        import torchvision.datasets
        import torchvision.transforms
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise ImportError(
            f"torchvision is needed here and cannot be imported: {error}. Each "
            f"torchvision release is built for one torch release, and this is torch "
            f"{torch.__version__}. Reinstall the two together "
            f"(pip install --upgrade torch torchvision), or use DigitsDataModule, which needs none."
        ) from error
    return torchvision


class _Source(NamedTuple):
    """A set: its files below the root, its images, and one in how many of them validates."""

    files: tuple[str, ...]
    sample_shape: tuple[int, int, int]
    val_divisor: int


def _idx_files(folder: str) -> tuple[str, ...]:
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    return tuple(f"{folder}/raw/{split}-{kind}" for split in ("train", "t10k") for kind in kinds)


_CIFAR10_FILES = (
    *(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)),
    "cifar-10-batches-py/test_batch",
    "cifar-10-batches-py/batches.meta",
)
_SOURCES = {
    "MNIST": _Source(_idx_files("MNIST"), (1, 28, 28), 6),
    "FashionMNIST": _Source(_idx_files("FashionMNIST"), (1, 28, 28), 6),
    "CIFAR10": _Source(_CIFAR10_FILES, (3, 32, 32), 10),
}


class TorchvisionDataModule(ImageDataModule):
    """A set of images that torchvision knows, read into memory as bytes, in three splits.

    | name | images | train | validation | test |
    |---|---|---|---|---|
    | MNIST | grey 28x28 handwritten digits | 50,000 | 10,000 | 10,000 |
    | FashionMNIST | grey 28x28 garments | 50,000 | 10,000 | 10,000 |
    | CIFAR10 | colour 32x32 photographs | 45,000 | 5,000 | 10,000 |

    Validation takes the last images of the official training split; the test split is the official
    one.

    Args:
        name: the set.
        root: folder that holds the set as torchvision lays it out (`MNIST/raw/`,
            `FashionMNIST/raw/`, `cifar-10-batches-py/`), or will.
        batch_size: images in a batch of one process, or a schedule {images seen: batch size}.
        image_size: side in pixels; None for the data's own, 32 for the grey sets with a black
            margin of two pixels.
        labels: serve pairs of images and classes, 0 to 9.
        flip: mirror each training image left to right with probability 1/2.
        num_val: images for validation, at least 1; None for those of the table.
        download: fetch the files when some are missing.
        num_workers: loader processes; 0 loads in the training process.
        seed: fixes the order and what is mirrored.

    Raises:
        ValueError: the name is not one of these, or image_size is not a side that the set has.

    Source:
        MNIST: Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-Based Learning Applied to
        Document Recognition, 1998. Fashion-MNIST: H. Xiao, K. Rasul and R. Vollgraf,
        arXiv 1708.07747. CIFAR-10: A. Krizhevsky, Learning Multiple Layers of Features from Tiny
        Images, 2009.

    Examples:
        >>> TorchvisionDataModule("MNIST", image_size=32).sample_shape
        (1, 32, 32)
    """

    num_classes = 10

    def __init__(
        self,
        name: Literal["MNIST", "FashionMNIST", "CIFAR10"] = "MNIST",
        root: str | Path = "data",
        batch_size: int | dict[int, int] = 128,
        image_size: int | None = None,
        labels: bool = False,
        flip: bool = False,
        num_val: int | None = None,
        download: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, labels, flip)
        if name not in _SOURCES:
            raise ValueError(f"Expected a name of {', '.join(_SOURCES)}; got {name!r}.")
        self.name = name
        self._source = source = _SOURCES[name]
        channels, own, _ = source.sample_shape
        size = own if image_size is None else image_size
        if size not in (own, 32):
            padded = "" if own == 32 else ", or 32, padded"
            raise ValueError(
                f"Expected image_size {own}, {name}'s own{padded}; got {size}. "
                "ImageFolderDataModule serves images of any size."
            )
        if num_val is not None and num_val < 1:
            raise ValueError(f"Expected num_val of at least 1, got {num_val}.")
        self.hparams["root"] = str(root)  # checkpoints hold primitives only
        self.root = Path(root).expanduser()
        self.sample_shape = (channels, size, size)
        self.num_val = num_val
        self.download = download

    @property
    def files(self) -> tuple[str, ...]:
        """The files that the set needs, as paths below `root`."""
        return self._source.files

    def prepare_data(self) -> None:
        """Download what is missing, if `download` allows it.

        Raises:
            RuntimeError: the download failed.
        """
        if not self.download or not self._missing():
            return
        try:
            getattr(import_torchvision().datasets, str(self.name))(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"{self.name} could not be downloaded to root={str(self.root)!r}: "
                f"{error}. Without a network, copy these files there by hand (from a machine "
                f"where the download works): {', '.join(self.files)}; or point `root` to a folder "
                f"that has them."
            ) from error

    def load(self) -> tuple[TensorSamples, TensorSamples, TensorSamples]:
        """Return the three splits, validation from the end of the official training split.

        Raises:
            FileNotFoundError: some of `files` are missing.
            RuntimeError: a file is damaged.
            ValueError: num_val leaves no image to train on.
        """
        if missing := self._missing():
            raise FileNotFoundError(
                f"{self.name} was looked for in root={str(self.root)!r}, which does not hold "
                f"{', '.join(missing)}. Set `download: true` to fetch the data (prepare_data() "
                f"does it), or point `root` to the folder that holds them."
            )
        read = self._read_cifar10 if self.name == "CIFAR10" else self._read_grey
        (images, labels), (test_images, test_labels) = read(train=True), read(train=False)
        num_val = self.num_val or max(1, len(images) // self._source.val_divisor)
        if num_val >= len(images):
            raise ValueError(
                f"Expected num_val below {len(images)}, the images of {self.name}'s training "
                f"split in root={str(self.root)!r}, got {num_val}. Lower it."
            )
        return (
            TensorSamples(images[:-num_val], labels[:-num_val]),
            TensorSamples(images[-num_val:], labels[-num_val:]),
            TensorSamples(test_images, test_labels),
        )

    def _missing(self) -> list[str]:
        return [name for name in self.files if not (self.root / name).is_file()]

    def _read_grey(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return images (n, 1, h, w) as bytes and labels (n) of one official split."""
        names = self.files[:2] if train else self.files[2:]
        images, labels = (self._read_idx(name) for name in names)
        if len(images) != len(labels):
            raise self._damaged(names, f"{len(images)} images and {len(labels)} labels")
        if len(labels) and int(labels.max()) > 9:
            raise self._damaged(names[1:], f"a label of {int(labels.max())}, above 9")
        margin = (self.sample_shape[1] - 28) // 2
        return F.pad(images, (margin,) * 4).unsqueeze(1), labels.long()

    def _read_idx(self, name: str) -> Tensor:
        """Return what a file in MNIST's format holds, after its header is checked."""
        content = np.fromfile(self.root / name, dtype=np.uint8)
        inner = (28, 28) if "images" in name else ()
        head = 8 + 4 * len(inner)
        if len(content) < head:
            raise self._damaged([name], f"{len(content)} bytes, shorter than its header")
        magic, num, *shape = np.frombuffer(content[:head].tobytes(), dtype=">u4").tolist()
        if magic != 0x0801 + 2 * (len(inner) > 0) or tuple(shape) != inner:
            raise self._damaged([name], "its header is not that of such a file")
        if num < 1 or len(content) != head + num * 28 ** len(inner):
            size = head + num * 28 ** len(inner)
            raise self._damaged([name], f"{len(content)} bytes where its header says {size}")
        return torch.from_numpy(content[head:]).reshape(num, *inner)

    def _read_cifar10(self, train: bool) -> tuple[Tensor, Tensor]:
        """Return images (n, 3, 32, 32) as bytes and labels (n) of one official split."""
        datasets = import_torchvision().datasets
        cifar10 = datasets.CIFAR10
        sums = dict([*cifar10.train_list, *cifar10.test_list])
        sums[cifar10.meta["filename"]] = cifar10.meta["md5"]
        if damaged := [
            name
            for name in self.files
            if not datasets.utils.check_integrity(str(self.root / name), sums[Path(name).name])
        ]:
            raise self._damaged(damaged, "the checksum is another")
        source = cifar10(self.root, train)
        images = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(source.targets, dtype=torch.int64)

    def _damaged(self, names: tuple[str, ...] | list[str], reason: str) -> RuntimeError:
        paths = ", ".join(str(self.root / name) for name in names)
        return RuntimeError(
            f"{self.name} has damaged files: {paths} ({reason}). Delete them and set "
            "`download: true` to fetch them anew."
        )
