"""A folder of images as data."""

from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_mmd.data.base import ImageDataModule
from lightning_mmd.data.dataset import TensorSamples, split_indices
from lightning_mmd.data.decoded import DecodedFolder, decoded_folder, default_cache
from lightning_mmd.data.decoding import Square

__all__ = ["ImageFolderDataModule"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_NAMED = 20  # bad files in an error, before it points to the file that names all


class ImageFolderDataModule(ImageDataModule):
    """Any folder of images, flat or nested: each is resized and centre-cropped to a square.

    Every file is read once, in parallel threads and before training; a later start takes the
    decoded bytes from the cache, from where they are mapped into memory, shared by all processes.
    So the folder may be larger than the memory. Images of 16 bits are scaled to 8; those of
    32-bit integers or floats, whose scale no file tells, by the greatest value among them: up to 1,
    255 or 65535. What is transparent shows the background.

    Args:
        root: the folder; every image file below it counts, whatever its subfolder.
        image_size: side of the square in pixels.
        batch_size: images in a batch of one process, or a schedule {images seen: batch size}.
        val_fraction: share held out for validation, in (0, 1).
        test_fraction: share held out for the test, in (0, 1).
        channels: 1 for grey, 3 for colour.
        labels: serve pairs of images and classes. A class is a folder just below `root`, and the
            classes are numbered in the order of their names.
        flip: mirror each training image left to right with probability 1/2.
        on_bad_image: what to do about files that cannot be read: "raise" an error that names them,
            or "skip" them, which is said once.
        background: grey level, 0 to 255, behind what is transparent.
        cache_dir: folder for the decoded images, c h w bytes each; None for `lightning_mmd` in
            the user's cache folder.
        num_workers: loader processes; 0 loads in the training process.
        seed: fixes the split, the order and what is mirrored.

    Attributes:
        classes: the names of the classes with `labels=True`, once `setup` has run.

    Raises:
        ValueError: channels is neither 1 nor 3; image_size is below 1; background is not a grey
            level; on_bad_image is no such word.

    Examples:
        >>> ImageFolderDataModule(root="photos", image_size=64).sample_shape
        (3, 64, 64)
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int = 32,
        batch_size: int | dict[int, int] = 128,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        channels: int = 3,
        labels: bool = False,
        flip: bool = False,
        on_bad_image: Literal["raise", "skip"] = "raise",
        background: int = 255,
        cache_dir: str | Path | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, labels, flip)
        if channels not in (1, 3):
            raise ValueError(f"Expected channels 1, grey, or 3, colour; got {channels}.")
        if image_size < 1:
            raise ValueError(f"Expected image_size of at least 1, got {image_size}.")
        if not 0 <= background <= 255:
            raise ValueError(f"Expected background in 0..255, got {background}.")
        if on_bad_image not in ("raise", "skip"):
            raise ValueError(f"Expected on_bad_image 'raise' or 'skip', got {on_bad_image!r}.")
        self.hparams["root"] = str(root)  # checkpoints hold primitives only
        self.hparams["cache_dir"] = None if cache_dir is None else str(cache_dir)
        self.root = Path(root).expanduser()
        self.sample_shape = (channels, image_size, image_size)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.on_bad_image = on_bad_image
        self.background = background
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.classes: list[str] = []

    def prepare_data(self) -> None:
        """Decode the images into the cache, on one process for all.

        Raises:
            FileNotFoundError: no image lies below `root`.
            OSError: the cache cannot be written.
        """
        self._decode(self._paths())

    def load(self) -> tuple[TensorSamples, TensorSamples, TensorSamples]:
        """Return the training, validation and test images.

        Raises:
            FileNotFoundError: no image lies below `root`.
            RuntimeError: images cannot be read, unless they are to be skipped.
            ValueError: there are too few images to split, or `labels` is set and an image lies in
                no folder of a class.
            OSError: the cache cannot be written.
        """
        paths = self._paths()
        pixels, bad, report = self._decode(paths)
        if bad:
            self._complain([(paths[index], why) for index, why in bad.items()], len(paths), report)
        good = torch.tensor([index for index in range(len(paths)) if index not in bad])
        labels = self._classes(paths) if self.labels else None
        if len(good) < 3:
            raise ValueError(
                f"Expected at least 3 images below root={str(self.root)!r}, for training, "
                f"validation and test; got {len(good)}. Add images, or point `root` to another "
                "folder."
            )
        generator = torch.Generator().manual_seed(self.seed)
        train, val, test = (
            TensorSamples(pixels, labels, good[part])
            for part in split_indices(len(good), self.val_fraction, self.test_fraction, generator)
        )
        return train, val, test

    def _decode(self, paths: list[Path]) -> DecodedFolder:
        channels, size, _ = self.sample_shape
        square = Square(size, channels, self.background)
        return decoded_folder(self.root, paths, square, self.cache_dir or default_cache())

    def _paths(self) -> list[Path]:
        found = (path for path in self.root.rglob("*") if path.suffix.lower() in _SUFFIXES)
        paths = sorted(path for path in found if path.is_file())
        if not paths:
            where = "and found none" if self.root.is_dir() else "which is no folder"
            raise FileNotFoundError(
                f"ImageFolderDataModule looked for images ({', '.join(_SUFFIXES)}) below "
                f"root={str(self.root)!r} {where}. Point `root` to a folder of images."
            )
        return paths

    def _complain(self, bad: list[tuple[Path, str]], num: int, report: Path) -> None:
        """Name the bad files, in an error or in a warning."""
        named = ", ".join(f"{path} ({why})" for path, why in bad[:_NAMED])
        if len(bad) > _NAMED:
            named += f" and {len(bad) - _NAMED} more, all named in {report}"
        found = f"{len(bad)} of {num} images below root={str(self.root)!r} cannot be read: {named}."
        if self.on_bad_image == "raise":
            raise RuntimeError(f"{found} Delete or replace them, or set `on_bad_image: skip`.")
        rank_zero_warn(f"{found} They are skipped.")

    def _classes(self, paths: list[Path]) -> Tensor:
        """Number the classes, and return that of each file."""
        parts = [path.relative_to(self.root).parts for path in paths]
        if loose := [path for path, names in zip(paths, parts, strict=True) if len(names) < 2]:
            raise ValueError(
                f"labels=True takes the folder just below root={str(self.root)!r} for the class "
                f"of an image, and {loose[0]} lies in none. Move it, or leave `labels` out."
            )
        self.classes = sorted({names[0] for names in parts})
        self.num_classes = len(self.classes)
        return torch.tensor([self.classes.index(names[0]) for names in parts])
