r"""Data modules: images in [-1, 1] or points in the plane, one plain tensor a batch, no labels.

Every module serves float32 batches of shape (n, \*sample_shape), holds out part of the data for
validation and test, and shuffles by its own generator: the order of epoch e is a function of
(seed, e) alone. It neither reads nor moves the global random state.
"""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from types import ModuleType

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_convert


def import_torchvision() -> ModuleType:
    """Import torchvision late, so that only the data sets that need it can fail for its sake.

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


def pixels_to_unit(pixels: Tensor) -> Tensor:
    r"""Map bytes to floats, x = pixel / 127.5 - 1, so that 0 becomes -1 and 255 becomes 1 exactly.

    Args:
        pixels: uint8 tensor of any shape.

    Returns:
        float32 tensor of the same shape in [-1, 1].

    Example:
        >>> pixels_to_unit(torch.tensor([0, 255], dtype=torch.uint8))
        tensor([-1.,  1.])
    """
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def split_indices(
    num_samples: int, val_fraction: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Split range(num_samples) at random into training and held-out indices.

    Args:
        num_samples: size of the whole set.
        val_fraction: share to hold out, in (0, 1); the count is rounded.
        generator: source of the randomness.

    Returns:
        Training and held-out indices: disjoint, and together every index once.

    Raises:
        ValueError: one side would be empty.

    Example:
        >>> train, held_out = split_indices(10, 0.2, torch.Generator().manual_seed(0))
        >>> len(train), len(held_out)
        (8, 2)
    """
    num_val = round(val_fraction * num_samples) if 0.0 < val_fraction < 1.0 else 0
    if not 0 < num_val < num_samples:
        raise ValueError(
            f"Expected val_fraction in (0, 1) that leaves samples on both sides, got "
            f"val_fraction={val_fraction} of {num_samples} samples. Change it, or add data."
        )
    order = torch.randperm(num_samples, generator=generator)
    return order[num_val:], order[:num_val]


class TensorSamples(Dataset[Tensor]):
    """Samples held in one tensor and read a batch at a time.

    Args:
        data: uint8 pixels, converted to float32 in [-1, 1] as they are read (a quarter of the
            memory), or floating-point samples, served as they are; shape (n, ...).
    """

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        batch = self.data[indices]
        return pixels_to_unit(batch) if batch.dtype == torch.uint8 else batch


class FileSamples(Dataset[Tensor]):
    """Image files, decoded as they are read, resized and centre-cropped to squares.

    Args:
        paths: the files.
        image_size: side of the square in pixels.
        channels: 1 for grey, 3 for colour.
    """

    def __init__(self, paths: list[Path], image_size: int, channels: int) -> None:
        torchvision = import_torchvision()
        transforms = torchvision.transforms
        self.paths = paths
        self.mode = "L" if channels == 1 else "RGB"
        self.open = torchvision.datasets.folder.pil_loader
        self.to_pixels = transforms.Compose(
            [
                transforms.Resize(image_size),
                transforms.CenterCrop(image_size),
                transforms.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        image = self.open(self.paths[index]).convert(self.mode)
        return pixels_to_unit(self.to_pixels(image))

    def __getitems__(self, indices: list[int]) -> Tensor:
        return torch.stack([self[index] for index in indices])


class SampleDataModule(LightningDataModule, ABC):
    r"""Abstract: batches of samples, each one float32 tensor of shape (n, \*sample_shape).

    A subclass sets `sample_shape` and defines `load`. Training batches are shuffled, all of the
    same size, the incomplete last one is left out. Held-out batches keep their order and come
    whole; they serve validation and test.

    Under several processes each rank reads its own share of every epoch, so W ranks with batches
    of n see what one process with batches of W n sees. The epoch comes from Lightning's Trainer;
    a hand-written loop calls `loader.sampler.set_epoch(epoch)`.

    Args:
        batch_size: samples in a batch of one process, at least 1.
        num_workers: loader processes; 0 loads in the training process, batches are the same.
        seed: fixes the split and the order of every epoch.

    Raises:
        ValueError: batch_size is below 1.
    """

    sample_shape: tuple[int, ...]

    def __init__(self, batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"Expected batch_size of at least 1, got {batch_size}.")
        # Not to the logger: Lightning refuses a name that model and data give different values.
        self.save_hyperparameters(logger=False)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._train: Dataset[Tensor] | None = None
        self._held_out: Dataset[Tensor] | None = None

    @abstractmethod
    def load(self) -> tuple[Dataset[Tensor], Dataset[Tensor]]:
        """Return training and held-out sets, each sized and with a batched `__getitems__`."""

    def setup(self, stage: str | None = None) -> None:
        """Load the data, once however often it is called.

        Args:
            stage: ignored, every stage needs the same data.
        """
        if self._train is None:
            self._train, self._held_out = self.load()

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Return the loader of shuffled, full training batches.

        Raises:
            RuntimeError: called before `setup`.
            ValueError: one process's share of the data does not fill a single batch.
        """
        dataset = self._ready(self._train)
        sampler = DistributedSampler(
            dataset,
            num_replicas=1 if self.trainer is None else self.trainer.world_size,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            seed=self.seed,
            drop_last=True,
        )
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"Expected at least batch_size={self.batch_size} training samples a process, got "
                f"{len(sampler)}. Lower batch_size or val_fraction, or add data."
            )
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Return the loader of all held-out batches, in a fixed order, once `setup` has run."""
        return self._loader(self._ready(self._held_out), None)

    def test_dataloader(self) -> DataLoader[Tensor]:
        """Return the loader of the held-out batches: there is no third split."""
        return self.val_dataloader()

    def _ready(self, dataset: Dataset[Tensor] | None) -> Dataset[Tensor]:
        if dataset is None:
            name = type(self).__name__
            raise RuntimeError(f"{name} holds no data yet. Call prepare_data() and setup() first.")
        return dataset

    def _loader(self, dataset: Dataset[Tensor], sampler: Sampler[int] | None) -> DataLoader[Tensor]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=sampler is not None,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=default_convert,  # `__getitems__` has made the batch already
            generator=torch.Generator().manual_seed(self.seed),  # or workers draw on the global one
        )


class ImageDataModule(SampleDataModule):
    """Abstract: images as float32 in [-1, 1], shape (n, c, h, w), `sample_shape` = (c, h, w)."""


class DigitsDataModule(ImageDataModule):
    """Scikit-learn's bundled handwritten digits: 1,797 grey 8x8 images, no download.

    Grey levels 0..16 become level / 8 - 1.

    Args:
        image_size: side in pixels; 8 is the data's own, larger ones are bilinear enlargements.
        batch_size: images in a batch of one process.
        val_fraction: share held out for validation and test, in (0, 1).
        num_workers: loader processes; 0 loads in the training process.
        seed: fixes the split and the order of every epoch.

    Raises:
        ValueError: image_size is below 8, or one side of the split is empty.

    Source:
        E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.

    Example:
        >>> digits = DigitsDataModule(batch_size=64)
        >>> digits.setup()
        >>> batch = next(iter(digits.train_dataloader()))
        >>> batch.shape, batch.min().item(), batch.max().item()
        (torch.Size([64, 1, 8, 8]), -1.0, 1.0)
    """

    def __init__(
        self,
        image_size: int = 8,
        batch_size: int = 256,
        val_fraction: float = 0.2,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if image_size < 8:
            raise ValueError(
                f"Expected image_size of at least 8, the data's own, got {image_size}."
            )
        self.sample_shape = (1, image_size, image_size)
        self.val_fraction = val_fraction

    def load(self) -> tuple[Dataset[Tensor], Dataset[Tensor]]:
        """Return the training and held-out digits."""
        from sklearn.datasets import load_digits

        levels, _ = load_digits(return_X_y=True)
        images = torch.tensor(levels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8.0 - 1.0
        images = F.interpolate(images, self.sample_shape[1:], mode="bilinear")
        generator = torch.Generator().manual_seed(self.seed)
        train, held_out = split_indices(len(images), self.val_fraction, generator)
        return TensorSamples(images[train]), TensorSamples(images[held_out])


class TorchvisionDataModule(ImageDataModule):
    """Abstract: a set that torchvision knows, its official test split held out, read as bytes.

    A subclass names the `files` it needs, as paths below `root`, and defines `read`.

    Args:
        root: folder that holds the set, or will.
        batch_size: images in a batch of one process.
        download: fetch the files when some are missing.
        num_workers: loader processes; 0 loads in the training process.
        seed: fixes the order of every epoch.
    """

    files: tuple[str, ...]

    def __init__(
        self, root: str | Path, batch_size: int, download: bool, num_workers: int, seed: int
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.hparams["root"] = str(root)  # checkpoints hold primitives only
        self.root = Path(root).expanduser()
        self.download = download

    @abstractmethod
    def read(self, train: bool, download: bool = False) -> Tensor:
        """Return one official split as uint8 pixels (n, c, h, w).

        Args:
            train: the training split, else the test split.
            download: fetch the files first.
        """

    def prepare_data(self) -> None:
        """Download what is missing, if `download` allows it.

        Raises:
            RuntimeError: the download failed.
        """
        if not self.download or not self._missing():
            return
        try:
            self.read(train=True, download=True)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"{type(self).__name__} could not download its data to root={str(self.root)!r}: "
                f"{error}. Without a network, copy these files there by hand (from a machine "
                f"where the download works): {', '.join(self.files)}; or point `root` to a folder "
                f"that has them."
            ) from error

    def load(self) -> tuple[Dataset[Tensor], Dataset[Tensor]]:
        """Return the official training and test splits.

        Raises:
            FileNotFoundError: some of `files` are missing.
            RuntimeError: a file is damaged.
        """
        if missing := self._missing():
            raise FileNotFoundError(
                f"{type(self).__name__} looked in root={str(self.root)!r} and did not find "
                f"{', '.join(missing)}. Set `download: true` to fetch the data (prepare_data() "
                f"does it), or point `root` to the folder that holds them."
            )
        try:
            train, held_out = self.read(train=True), self.read(train=False)
        except (RuntimeError, TypeError, ValueError, EOFError) as error:
            raise RuntimeError(
                f"{type(self).__name__} found damaged files in root={str(self.root)!r}: {error}. "
                f"Delete {', '.join(self.files)} and set `download: true` to fetch them anew."
            ) from error
        return TensorSamples(train), TensorSamples(held_out)

    def _missing(self) -> list[str]:
        return [name for name in self.files if not (self.root / name).is_file()]


def _idx_files(folder: str) -> tuple[str, ...]:
    """Name the four files of a set in MNIST's format."""
    kinds = ("images-idx3-ubyte", "labels-idx1-ubyte")
    return tuple(f"{folder}/raw/{split}-{kind}" for split in ("train", "t10k") for kind in kinds)


class _GreyDataModule(TorchvisionDataModule):
    """Abstract: 28x28 grey images in MNIST's format, optionally padded to 32x32."""

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        image_size: int,
        download: bool,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(root, batch_size, download, num_workers, seed)
        if image_size not in (28, 32):
            raise ValueError(
                f"Expected image_size 28, the data's own, or 32, padded; got {image_size}."
            )
        self.sample_shape = (1, image_size, image_size)

    def _pad(self, pixels: Tensor) -> Tensor:
        margin = (self.sample_shape[1] - 28) // 2
        return F.pad(pixels, (margin, margin, margin, margin)).unsqueeze(1)


class MNISTDataModule(_GreyDataModule):
    """MNIST: 60,000 + 10,000 grey 28x28 handwritten digits, the official test split held out.

    Args:
        root: folder that holds `MNIST/raw/`, or will.
        batch_size: images in a batch of one process.
        image_size: 28, the data's own, or 32, with a black margin of two pixels.
        download: fetch the files (12 MB) when some are missing.
        num_workers: loader processes; 0 loads in the training process.
        seed: fixes the order of every epoch.

    Raises:
        ValueError: image_size is neither 28 nor 32.

    Source:
        Y. LeCun, L. Bottou, Y. Bengio and P. Haffner, Gradient-Based Learning Applied to Document
        Recognition, 1998.

    Example:
        >>> MNISTDataModule(root="data", image_size=32).sample_shape
        (1, 32, 32)
    """

    files = _idx_files("MNIST")

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 128,
        image_size: int = 28,
        download: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, image_size, download, num_workers, seed)

    def read(self, train: bool, download: bool = False) -> Tensor:
        """Return one official split as uint8 pixels (n, 1, image_size, image_size)."""
        source = import_torchvision().datasets.MNIST(self.root, train, download=download)
        return self._pad(source.data)


class FashionMNISTDataModule(_GreyDataModule):
    """Fashion-MNIST: 60,000 + 10,000 grey 28x28 garments, the official test split held out.

    Args:
        root: folder that holds `FashionMNIST/raw/`, or will.
        batch_size: images in a batch of one process.
        image_size: 28, the data's own, or 32, with a black margin of two pixels.
        download: fetch the files (30 MB) when some are missing.
        num_workers: loader processes; 0 loads in the training process.
        seed: fixes the order of every epoch.

    Raises:
        ValueError: image_size is neither 28 nor 32.

    Source:
        H. Xiao, K. Rasul and R. Vollgraf, arXiv 1708.07747.

    Example:
        >>> FashionMNISTDataModule(root="data").sample_shape
        (1, 28, 28)
    """

    files = _idx_files("FashionMNIST")

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 128,
        image_size: int = 28,
        download: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, image_size, download, num_workers, seed)

    def read(self, train: bool, download: bool = False) -> Tensor:
        """Return one official split as uint8 pixels (n, 1, image_size, image_size)."""
        source = import_torchvision().datasets.FashionMNIST(self.root, train, download=download)
        return self._pad(source.data)


class CIFAR10DataModule(TorchvisionDataModule):
    """CIFAR-10: 50,000 + 10,000 colour 32x32 photographs, the official test split held out.

    Args:
        root: folder that holds `cifar-10-batches-py/`, or will.
        batch_size: images in a batch of one process.
        download: fetch the files (170 MB) when some are missing.
        num_workers: loader processes; 0 loads in the training process.
        seed: fixes the order of every epoch.

    Source:
        A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Example:
        >>> CIFAR10DataModule(root="data").sample_shape
        (3, 32, 32)
    """

    files = (
        *(f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)),
        "cifar-10-batches-py/test_batch",
        "cifar-10-batches-py/batches.meta",
    )

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 128,
        download: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(root, batch_size, download, num_workers, seed)
        self.sample_shape = (3, 32, 32)

    def read(self, train: bool, download: bool = False) -> Tensor:
        """Return one official split as uint8 pixels (n, 3, 32, 32)."""
        source = import_torchvision().datasets.CIFAR10(self.root, train, download=download)
        return torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()


class ImageFolderDataModule(ImageDataModule):
    """Any folder of images, flat or nested: each is resized and centre-cropped to a square.

    Files are decoded as they are read, so the folder may be larger than the memory.

    Args:
        root: the folder; every image file below it counts, whatever its subfolder.
        image_size: side of the square in pixels.
        batch_size: images in a batch of one process.
        val_fraction: share held out for validation and test, in (0, 1).
        channels: 1 for grey, 3 for colour.
        num_workers: loader processes; 0 loads in the training process.
        seed: fixes the split and the order of every epoch.

    Raises:
        ValueError: channels is neither 1 nor 3, image_size is below 1, or one side of the split is
            empty.

    Example:
        >>> ImageFolderDataModule(root="photos", image_size=64).sample_shape
        (3, 64, 64)
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int = 32,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        channels: int = 3,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if channels not in (1, 3):
            raise ValueError(f"Expected channels 1, grey, or 3, colour; got {channels}.")
        if image_size < 1:
            raise ValueError(f"Expected image_size of at least 1, got {image_size}.")
        self.hparams["root"] = str(root)  # checkpoints hold primitives only
        self.root = Path(root).expanduser()
        self.sample_shape = (channels, image_size, image_size)
        self.val_fraction = val_fraction

    def load(self) -> tuple[Dataset[Tensor], Dataset[Tensor]]:
        """Return the training and held-out files.

        Raises:
            FileNotFoundError: no image lies below `root`.
        """
        suffixes = import_torchvision().datasets.folder.IMG_EXTENSIONS
        paths = sorted(path for path in self.root.rglob("*") if path.suffix.lower() in suffixes)
        if not paths:
            raise FileNotFoundError(
                f"ImageFolderDataModule looked for images ({', '.join(suffixes)}) below "
                f"root={str(self.root)!r} and found none. Point `root` to a folder of images."
            )
        channels, image_size, _ = self.sample_shape
        generator = torch.Generator().manual_seed(self.seed)
        train, held_out = (
            FileSamples([paths[index] for index in indices.tolist()], image_size, channels)
            for indices in split_indices(len(paths), self.val_fraction, generator)
        )
        return train, held_out


class GaussianMixtureDataModule(SampleDataModule):
    r"""Points in the plane from an equal mixture of Gaussians, p = mean_k N(modes_k, std^2 I).

    The modes lie on a ring, at radius (cos 2 pi k / K, sin 2 pi k / K), or on a square grid about
    the origin.

    Args:
        num_modes: number K of Gaussians, at least 1; a square number for a grid.
        radius: distance of the ring's modes from the origin.
        std: standard deviation of each Gaussian in each direction, at least 0.
        grid_spacing: distance between neighbours of a grid, which then replaces the ring.
        num_samples: points drawn in all, once, by `seed`.
        batch_size: points in a batch of one process.
        val_fraction: share of the points held out for validation and test, in (0, 1).
        num_workers: loader processes; 0 loads in the training process.
        seed: fixes the points, the split and the order of every epoch.

    Attributes:
        modes: the centres, float32 of shape (num_modes, 2), to count the modes a model covers.

    Raises:
        ValueError: num_modes is below 1 or, for a grid, no square; std is negative; one side of
            the split is empty.

    Example:
        >>> GaussianMixtureDataModule(num_modes=4, grid_spacing=3.0).modes
        tensor([[-1.5000, -1.5000],
                [-1.5000,  1.5000],
                [ 1.5000, -1.5000],
                [ 1.5000,  1.5000]])
    """

    def __init__(
        self,
        num_modes: int = 8,
        radius: float = 2.0,
        std: float = 0.05,
        grid_spacing: float | None = None,
        num_samples: int = 10_000,
        batch_size: int = 256,
        val_fraction: float = 0.2,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if num_modes < 1:
            raise ValueError(f"Expected num_modes of at least 1, got {num_modes}.")
        if std < 0.0:
            raise ValueError(f"Expected std of at least 0, got {std}.")
        self.sample_shape = (2,)
        self.modes = (
            _ring(num_modes, radius) if grid_spacing is None else _grid(num_modes, grid_spacing)
        )
        self.std = std
        self.num_samples = num_samples
        self.val_fraction = val_fraction

    def load(self) -> tuple[Dataset[Tensor], Dataset[Tensor]]:
        """Draw the points and split them."""
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randint(len(self.modes), (self.num_samples,), generator=generator)
        noise = torch.randn(self.num_samples, 2, generator=generator, dtype=torch.float32)
        points = self.modes[chosen] + self.std * noise
        train, held_out = split_indices(self.num_samples, self.val_fraction, generator)
        return TensorSamples(points[train]), TensorSamples(points[held_out])


def _ring(num_modes: int, radius: float) -> Tensor:
    """Place (num_modes, 2) centres evenly on a circle, the first on the positive x axis."""
    angles = 2.0 * math.pi * torch.arange(num_modes, dtype=torch.float32) / num_modes
    return radius * torch.stack([angles.cos(), angles.sin()], dim=1)


def _grid(num_modes: int, spacing: float) -> Tensor:
    """Place (num_modes, 2) centres on a square grid about the origin, row by row."""
    side = math.isqrt(num_modes)
    if side**2 != num_modes:
        raise ValueError(
            f"Expected a square num_modes for a grid, got {num_modes}. Take {side**2} or "
            f"{(side + 1) ** 2}, or leave grid_spacing out for a ring."
        )
    ticks = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    return spacing * torch.cartesian_prod(ticks, ticks)
