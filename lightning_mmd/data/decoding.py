"""One image file to a square of bytes, whatever the kind of its pixels."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

__all__ = ["Square", "Wide", "decode"]

_WIDE_MODES = ("I", "F")  # 32-bit integers and floats, whose range the file does not tell
_ALPHA_MODES = ("LA", "PA", "RGBA", "La", "RGBa")


class Square(NamedTuple):
    """How images become squares.

    Attributes:
        size: side of the square in pixels.
        channels: 1 for grey, 3 for colour.
        background: grey level, 0 to 255, that shows where an image is transparent.
    """

    size: int
    channels: int
    background: int


class Wide(NamedTuple):
    """The range of pixels whose scale is not known from the file alone.

    Attributes:
        low: least value.
        high: greatest value.
    """

    low: float
    high: float


def decode(path: Path, square: Square, scale: float | None = None) -> np.ndarray | Wide:
    """Read an image, bring it to 8 bits and to a square.

    Pixels of 16 bits are divided by 257, so that full scale stays full scale. 32-bit integers and
    floats are multiplied by `scale`. Transparent pixels show the background; palettes, CMYK and the
    like become colours; a camera's note of its orientation is followed; of several pictures the
    first counts. Then the shorter side is resized to the square's and the centre is cut out.

    Args:
        path: the file.
        square: what to make of it.
        scale: from 32-bit pixels to 0..255, where it is known.

    Returns:
        uint8 array (channels, size, size); the range of 32-bit pixels where `scale` is not given.

    Raises:
        ValueError: 32-bit pixels lie outside of every known range.
        Exception: whatever Pillow raises for a file that it cannot read to its end.
    """
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode in _WIDE_MODES:
            values = np.asarray(image, dtype=np.float64)
            if scale is None:
                return _range(values)
            image = Image.fromarray(_to_bytes(values * scale))
        elif image.mode.startswith("I;16"):
            image = Image.fromarray(_to_bytes(np.asarray(image, dtype=np.float64) / 257.0))
        if image.mode in _ALPHA_MODES or "transparency" in image.info:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, (*[square.background] * 3, 255))
            image = Image.alpha_composite(ground, image)
        if image.mode not in ("1", "L", "RGB"):
            image = image.convert("RGB")  # first, since LAB and HSV do not turn grey at once
        image = image.convert("L" if square.channels == 1 else "RGB")
        pixels = np.asarray(_centre(image, square.size))
    return pixels.reshape(square.size, square.size, square.channels).transpose(2, 0, 1)


def _range(values: np.ndarray) -> Wide:
    low, high = float(values.min()), float(values.max())
    if not 0.0 <= low <= high <= 65535.0:
        raise ValueError(
            f"32-bit pixels from {low:g} to {high:g}; 0 to 1, 0 to 255 and 0 to 65535 are known"
        )
    return Wide(low, high)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.floor(values + 0.5).clip(0, 255).astype(np.uint8)


def _centre(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side, smoothing where it shrinks, and cut the centre out."""
    width, height = image.size
    shorter = min(width, height)
    width, height = (max(size, int(size * side / shorter)) for side in (width, height))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))
