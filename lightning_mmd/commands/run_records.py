"""What a finished run left in its folder: numbers, pictures, configuration."""

import csv
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = ["RunRecord", "differences", "read_run"]

_NOT_METRICS = ("step", "epoch")


@dataclass
class RunRecord:
    """One run.

    Attributes:
        folder: Where it lies.
        name: A short name, from the folder's.
        curves: Lists of (generator updates, value) by metric, in their order.
        config: Its configuration, flat: values by dotted name; empty where none was saved.
        pictures: Pictures of samples by generator updates, in their order.
    """

    folder: Path
    name: str
    curves: dict[str, list[tuple[int, float]]]
    config: dict[str, Any] = field(default_factory=dict)
    pictures: dict[int, Path] = field(default_factory=dict)

    @property
    def updates(self) -> int:
        """Generator updates of the last number."""
        return max((curve[-1][0] for curve in self.curves.values()), default=0)

    def last(self, metric: str) -> float | None:
        """Return the newest finite value of a metric; None where there is none."""
        return next((v for _, v in reversed(self.curves.get(metric, [])) if math.isfinite(v)), None)

    def lowest(self, metric: str) -> tuple[int, float] | None:
        """Return the lowest finite value of a metric, with its update; None where there is none."""
        found = [pair for pair in self.curves.get(metric, []) if math.isfinite(pair[1])]
        return min(found, key=lambda pair: pair[1], default=None)


def read_run(folder: Path) -> RunRecord:
    """Read a run's folder, as CSVLogger and the callbacks of this package leave it.

    Args:
        folder: With ``metrics.csv``, and maybe ``config.yaml`` and ``samples/step=*.png``.

    Raises:
        FileNotFoundError: If there is no ``metrics.csv``; it names the runs below the folder.
        ValueError: If the file holds no numbers.
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        below = sorted(str(found.parent) for found in folder.glob("**/metrics.csv"))
        hint = (
            f"There are runs below it: {' '.join(below[:5])}."
            if below
            else "CSVLogger writes it: take the folder that 'lightning-mmd fit' names, or set "
            "--trainer.logger CSVLogger."
        )
        raise FileNotFoundError(f"{folder} is no folder of a run: it has no metrics.csv. {hint}")
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = int(float(row.get("step") or 0))
            for name, text in row.items():
                if text and name not in _NOT_METRICS:
                    curves[name].append((step, float(text)))
    if not curves:
        raise ValueError(f"{path} holds no numbers: the run ended before its first log.")
    config = folder / "config.yaml"
    pictures = {
        int(match[1]): found
        for found in folder.glob("samples/step=*.png")
        if (match := re.fullmatch(r"step=(\d+)\.png", found.name))
    }
    return RunRecord(
        folder,
        "/".join(folder.resolve().parts[-2:]),
        {name: sorted(curve, key=lambda pair: pair[0]) for name, curve in curves.items()},
        _flat(yaml.safe_load(config.read_text(encoding="utf-8"))) if config.is_file() else {},
        dict(sorted(pictures.items())),
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries and lists by dotted names."""
    if isinstance(value, dict) and value:
        parts = value.items()
    elif isinstance(value, list) and any(isinstance(part, (dict, list)) for part in value):
        parts = ((_class_of(part, number), part) for number, part in enumerate(value))
    else:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, part in parts:
        flat |= _flat(part, f"{name}.{key}" if name else str(key))
    return flat


def _class_of(part: Any, number: int) -> str:
    """Return the class's name of a part of a list, or its number."""
    path = part.get("class_path") if isinstance(part, dict) else None
    return str(path).rpartition(".")[2] if path else str(number)


def differences(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """Return the configured values that not all runs share, by name, one for each run."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    values = {name: [run.config.get(name) for run in runs] for name in names}
    return {name: found for name, found in values.items() if any(v != found[0] for v in found)}
