"""Curves of runs, drawn by matplotlib."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from lightning_mmd.commands.run_records import RunRecord

__all__ = ["PANELS", "Panel", "draw_run", "figure_svg", "has_matplotlib"]


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes.

    Attributes:
        title: What they show, with its unit.
        metrics: Names in the log.
        floors: For each metric the name of its value between real images, or None.
        log: Whether the axis is logarithmic where all values are positive.
    """

    title: str
    metrics: tuple[str, ...]
    floors: tuple[str | None, ...] = (None,)
    log: bool = False

    def found_in(self, runs: Sequence[RunRecord]) -> bool:
        """Whether a run has one of the curves, and it is not zero all along."""
        curves = [run.curves.get(name, []) for run in runs for name in self.metrics]
        return any(value != 0 for curve in curves for _, value in curve)


PANELS = (
    Panel("MMD^2 to held-out images", ("val/mmd2",), ("val/mmd2_real",), log=True),
    Panel("FID to held-out images", ("val/fid",), ("val/fid_real",), log=True),
    Panel("KID to held-out images", ("val/kid",), ("val/kid_real",), log=True),
    Panel("precision, from 0 to 1", ("val/precision",), ("val/precision_real",)),
    Panel("recall, from 0 to 1", ("val/recall",), ("val/recall_real",)),
    Panel("the critic's gap, E f(real) - E f(generated)", ("critic/gap",)),
    Panel(
        "share of the penalties in the critic's objective",
        ("critic/parametric_share", "critic/rkhs_share"),
        (None, None),
    ),
    Panel("norm of the generator's gradient", ("generator/gradient_norm",), log=True),
    Panel("MMD^2 of the batch, in the critic's features", ("witness/mmd2",), log=True),
    Panel("realised over predicted descent", ("certificate/ratio",)),
)
"""What a report draws, where runs have it."""


def has_matplotlib() -> bool:
    """Whether curves can be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def figure_svg(panel: Panel, runs: Sequence[RunRecord], dark: bool) -> str:
    """Return a panel as SVG, on a transparent ground, for a light or a dark page."""
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    base = "dark_background" if dark else "default"
    with style.context(base), rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure = Figure(figsize=(6, 3.2), layout="constrained")
        draw_panel(figure.subplots(), panel, runs)
        buffer = io.StringIO()
        metadata = {"Date": None, "Creator": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    theme = "dark" if dark else "light"
    mark = re.sub(r"\W+", "-", f"{theme}-{panel.title}")
    # Names within a picture are those of the whole page: make them this picture's own.
    text = re.sub(r'id="([^"]+)"', rf'id="{mark}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{mark}-", text)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'class="{theme}" role="img"', text)


def draw_panel(axes: Any, panel: Panel, runs: Sequence[RunRecord]) -> None:
    """Draw a panel's curves: a colour for each run, a line style for each metric."""
    positive, floors = True, []
    for number, run in enumerate(runs):
        for name, floor, dashes in zip(panel.metrics, panel.floors, ("-", "--"), strict=False):
            if name not in run.curves:
                continue
            steps, values = zip(*run.curves[name], strict=True)
            label = run.name if len(panel.metrics) == 1 else f"{run.name}, {name.split('/')[1]}"
            marker = "o" if len(steps) < 30 else None
            axes.plot(steps, values, dashes, color=f"C{number}", label=label, marker=marker, ms=3)
            positive &= min(values) > 0
            value = None if floor is None else run.last(floor)
            if value is not None:
                floors.append(value)
    for number, value in enumerate(floors[:1]):
        if value > 0 or not (panel.log and positive):
            label = "real against real images" if number == 0 else None
            axes.axhline(value, color="gray", linestyle=":", label=label)
    if panel.log and positive:
        axes.set_yscale("log")
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("generator updates")
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)


def draw_run(run: RunRecord, path: Path) -> bool:
    """Draw one run as a picture: its curves, and samples at five times.

    Args:
        run: The run.
        path: The PNG file.

    Returns:
        Whether there was anything to draw: a run without a tracker and without pictures has none.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if panel.found_in([run])][:6]
    times = spaced(sorted(run.pictures), 5)
    if not panels and not times:
        return False
    rows = -(-len(panels) // 3)
    heights = [3.0] * rows + [2.6] * bool(times)
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row in range(rows):
        axes = parts[row].subplots(1, 3)
        for axis, panel in zip(axes, panels[3 * row : 3 * row + 3], strict=False):
            draw_panel(axis, panel, [run])
        for axis in axes[len(panels) - 3 * row :]:
            axis.set_visible(False)
    if times:
        for axis, step in zip(parts[-1].subplots(1, 5), times, strict=False):
            with Image.open(run.pictures[step]) as picture:
                axis.imshow(picture.convert("RGB"), interpolation="nearest")
            axis.set_title(f"after {step:,} updates", fontsize=9)
            axis.set_axis_off()
    figure.savefig(path, dpi=100)
    return True


def spaced(numbers: Sequence[int], most: int) -> list[int]:
    """Return at most so many of the numbers, evenly spaced, first and last among them."""
    if len(numbers) <= most:
        return list(numbers)
    return [numbers[round(k * (len(numbers) - 1) / (most - 1))] for k in range(most)]
