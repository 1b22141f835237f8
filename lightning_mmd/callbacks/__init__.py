"""Callbacks for Lightning's Trainer, one a file."""

from lightning_mmd.callbacks.augment import DiffAugment
from lightning_mmd.callbacks.bandwidth import BandwidthSchedule
from lightning_mmd.callbacks.convergence import ConvergenceMonitor
from lightning_mmd.callbacks.divergence import OnDivergence
from lightning_mmd.callbacks.ema import GeneratorEMA
from lightning_mmd.callbacks.input_gradient import InputGradientPenalty
from lightning_mmd.callbacks.instance_noise import InstanceNoise
from lightning_mmd.callbacks.interruption import GracefulStop, StoppedError
from lightning_mmd.callbacks.noise import NoiseInjection
from lightning_mmd.callbacks.penalty import ParametricGradientPenalty
from lightning_mmd.callbacks.progress import GeneratorProgressBar
from lightning_mmd.callbacks.proximal import ProximalPoint
from lightning_mmd.callbacks.quality import SampleQuality
from lightning_mmd.callbacks.rehearsal import Rehearsal
from lightning_mmd.callbacks.relative_test import RelativeTestLR
from lightning_mmd.callbacks.samples import SampleGrid
from lightning_mmd.callbacks.tracking import MMDTracker

__all__ = [
    "BandwidthSchedule",
    "ConvergenceMonitor",
    "DiffAugment",
    "GeneratorEMA",
    "GeneratorProgressBar",
    "GracefulStop",
    "InputGradientPenalty",
    "InstanceNoise",
    "MMDTracker",
    "NoiseInjection",
    "OnDivergence",
    "ParametricGradientPenalty",
    "ProximalPoint",
    "Rehearsal",
    "RelativeTestLR",
    "SampleGrid",
    "SampleQuality",
    "StoppedError",
]
