"""Rows of results: each says where and when it was measured."""

import csv
import datetime
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from race import commit

ORIGIN = ("commit", "torch", "processor", "date")
"""Last columns, which `append_row` fills."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append_row(path: Path, fields: Sequence[str], row: dict[str, Any]) -> None:
    """Append a row in one write: several processes may share the file.

    Args:
        path: The file; its first row makes it.
        fields: Names of all columns, those of `ORIGIN` last.
        row: Values but those.
    """
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    today = datetime.date.today().isoformat()
    origin = zip(ORIGIN, (commit(), torch.__version__, processor, today), strict=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*fields, *ORIGIN])
        if new:
            writer.writeheader()
        writer.writerow(row | dict(origin))
