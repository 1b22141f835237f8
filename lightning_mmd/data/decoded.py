"""A folder of images as one file of bytes in the cache: decoded and checked once."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lightning_mmd.data.decoding import Square, Wide, decode

__all__ = ["DecodedFolder", "decoded_folder", "default_cache"]

_VERSION = 1  # of the way that images are decoded


class DecodedFolder(NamedTuple):
    """What was read from a folder.

    Attributes:
        pixels: uint8 images (n, c, h, w) in the order of the files, mapped from the cache; zeros
            where a file is bad.
        bad: why a file could not be read, by its number.
        report: the file of the cache that names the bad files.
    """

    pixels: Tensor
    bad: dict[int, str]
    report: Path


def default_cache() -> Path:
    """Return the folder for decoded images: `lightning_mmd` in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning_mmd"


def decoded_folder(root: Path, paths: Sequence[Path], square: Square, cache: Path) -> DecodedFolder:
    """Decode images in parallel threads, or take what an earlier call left in the cache.

    The cache knows the files by path, size and time of change. It holds one entry for each root and
    kind of square, and an entry is whole or absent.

    Args:
        root: the folder.
        paths: the files below it.
        square: what to make of each.
        cache: folder of the cache, made where it is missing.

    Returns:
        The pixels, and the files that could not be read.

    Raises:
        OSError: the cache cannot be written.
    """
    name = _digest([str(root.resolve()), repr(square)])
    files = [(str(path.relative_to(root)), _stamp(path)) for path in paths]
    stem = f"{name}-{_digest([repr(files), str(_VERSION)])}"
    pixels_path, report = cache / f"{stem}.npy", cache / f"{stem}.json"
    shape = (len(paths), square.channels, square.size, square.size)
    if (found := _load(pixels_path, report, shape)) is not None:
        return found
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _replacing(pixels_path) as file:
            bad = _write(file, paths, square, shape)
        entry = {"root": str(root), "bad": {files[i][0]: [i, why] for i, why in bad.items()}}
        with _replacing(report) as file:
            file.write(json.dumps(entry, indent=1).encode())
    except OSError as error:
        raise OSError(
            f"the decoded images of {str(root)!r} ({np.prod(shape) / 1e6:.0f} MB) cannot be "
            f"written to {str(cache)!r}: {error}. Make room there, or set `cache_dir` to a folder "
            "that can hold them."
        ) from error
    for old in cache.glob(f"{name}-*"):
        if old.stem != stem and old.suffix in (".npy", ".json"):
            old.unlink(missing_ok=True)
    found = _load(pixels_path, report, shape)
    if found is None:
        raise OSError(
            f"the decoded images were written to {str(pixels_path)!r} and cannot be read back. "
            "Set `cache_dir` to another folder."
        )
    return found


def _load(pixels_path: Path, report: Path, shape: tuple[int, ...]) -> DecodedFolder | None:
    """Map an entry of the cache, None where it is not there or not whole."""
    try:
        entry = json.loads(report.read_text())
        pixels = np.load(pixels_path, mmap_mode="c")
    except (OSError, ValueError):
        return None
    if pixels.shape != shape or pixels.dtype != np.uint8:
        return None
    bad = {index: why for index, why in entry["bad"].values()}
    return DecodedFolder(torch.from_numpy(pixels), bad, report)


def _write(
    file: IO[bytes], paths: Sequence[Path], square: Square, shape: tuple[int, ...]
) -> dict[int, str]:
    """Write the images as one array, and return the reasons of those that cannot be read."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    begin, empty = file.tell(), np.zeros(shape[1:], dtype=np.uint8)
    bad: dict[int, str] = {}
    wide: dict[int, Wide] = {}
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as threads:
        read = threads.map(lambda path: _attempt(path, square), paths)
        for index, image in enumerate(_bar(read, len(paths))):
            if isinstance(image, str):
                bad[index] = image
            elif isinstance(image, Wide):
                wide[index] = image
            file.write(image.tobytes() if isinstance(image, np.ndarray) else empty.tobytes())
    if wide:
        scale = _scale(max(image.high for image in wide.values()))
        for index in wide:
            image = _attempt(paths[index], square, scale)
            if isinstance(image, np.ndarray):
                file.seek(begin + index * empty.size)
                file.write(image.tobytes())
            else:
                bad[index] = str(image)
    return bad


def _attempt(path: Path, square: Square, scale: float | None = None) -> np.ndarray | Wide | str:
    """Decode a file, or say why that fails."""
    try:
        if path.stat().st_size == 0:
            return "empty"
        return decode(path, square, scale)
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        if path.name.startswith("._"):
            return "no image, but what macOS notes beside one"
        return f"{error or type(error).__name__}".replace(str(path), path.name).rstrip(".")


def _scale(high: float) -> float:
    """Return the factor to 0..255 of a folder's 32-bit pixels, from their greatest value."""
    if high <= 1.0:
        return 255.0
    return 1.0 if high <= 255.0 else 1.0 / 257.0


def _bar(items: Iterable[Any], total: int) -> Iterable[Any]:
    return tqdm(items, "reading images", total, leave=False, disable=None, unit="image")


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _digest(words: list[str]) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file beside and move it to its place, so that it is whole or absent."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
