"""What came of a run, in a few lines."""

import math
from pathlib import Path

from lightning.pytorch import Trainer

from lightning_mmd.callbacks import ConvergenceMonitor, MMDTracker, SampleGrid, SampleQuality
from lightning_mmd.internals import callbacks_of

__all__ = ["summary"]


def summary(trainer: Trainer, checkpoint: Path | None = None) -> str:
    """Describe a finished run: MMD^2 at start and end, scores, floors, and where files are.

    Args:
        trainer: The trainer after ``fit``.
        checkpoint: The last checkpoint, if there is one.

    Returns:
        A few lines of text.
    """
    lines = [f"{trainer.global_step} generator updates"]
    for callback in callbacks_of(trainer):
        if isinstance(callback, MMDTracker) and callback.history:
            lines[0] += f"; {callback.name.replace('mmd2', 'MMD^2')} {_descent(callback)}"
        if isinstance(callback, SampleQuality) and callback.history:
            lines.append(f"quality:    {_quality(callback)}")
        if isinstance(callback, SampleGrid) and callback.last_path:
            lines.append(f"samples:    {callback.last_path}")
        if isinstance(callback, ConvergenceMonitor) and callback.verdict:
            lines.append(f"verdict:    {callback.verdict}")
    if checkpoint is not None:
        lines.append(f"checkpoint: {checkpoint}")
    return "\n".join(lines)


def _quality(callback: SampleQuality) -> str:
    names = {"fid": "FID", "kid": "KID"}
    scores = [
        f"{shown} {callback.last[name]:.3g}"
        + (f" (real against real {callback.floors[name]:.2g})" if name in callback.floors else "")
        for name, shown in names.items()
        if name in callback.last
    ]
    return f"{', '.join(scores)} in {callback.facts()['features']}"


def _descent(tracker: MMDTracker) -> str:
    start, last = tracker.history[0]["mmd2"], tracker.history[-1]["mmd2"]
    if not math.isfinite(last) or last >= start:
        fall = "not lower"
    elif last <= max(0.0, tracker.floor or 0.0):
        fall = "at the floor"
    else:
        fall = f"{start / last:.3g}-fold lower"
    floor = "" if tracker.floor is None else f"; real against real {tracker.floor:.2g}"
    return f"{start:.4g} -> {last:.4g} ({fall}{floor})"
