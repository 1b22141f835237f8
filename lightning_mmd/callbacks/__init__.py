"""Callbacks for Lightning's Trainer, one a file."""

from lightning_mmd.callbacks.noise import InstanceNoise, NoiseInjection
from lightning_mmd.callbacks.penalty import ParametricGradientPenalty
from lightning_mmd.callbacks.progress import GeneratorProgressBar
from lightning_mmd.callbacks.samples import SampleGrid
from lightning_mmd.callbacks.tracking import MMDTracker

__all__ = [
    "GeneratorProgressBar",
    "InstanceNoise",
    "MMDTracker",
    "NoiseInjection",
    "ParametricGradientPenalty",
    "SampleGrid",
]
