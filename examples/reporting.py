"""Tables and pictures of the examples: printed, saved as CSV, drawn with matplotlib."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_table(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Print rows with the same keys under their file's name, and save them as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [[_cell(value) for value in row.values()] for row in rows]
    lines = [list(rows[0]), *cells]
    widths = [max(len(line[i]) for line in lines) + 2 for i in range(len(lines[0]))]
    print(f"\n{path.stem}")
    for line in lines:
        print("".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure, width and height in inches; without matplotlib, say what to do."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise SystemExit("the figure needs matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path, dpi: int = 110) -> None:
    """Save as a PNG of 128 colours, a third of the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi, format="png")
    Image.open(picture).convert("RGB").quantize(128).save(path, optimize=True)


def _cell(value: object) -> str:
    return f"{value:.6g}" if hasattr(value, "__float__") else str(value)
