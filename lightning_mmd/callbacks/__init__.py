"""Callbacks for Lightning's Trainer, one a file."""

from lightning_mmd.callbacks.ema import GeneratorEMA
from lightning_mmd.callbacks.progress import GeneratorProgressBar
from lightning_mmd.callbacks.samples import SampleGrid
from lightning_mmd.callbacks.tracking import MMDTracker

__all__ = ["GeneratorEMA", "GeneratorProgressBar", "MMDTracker", "SampleGrid"]
