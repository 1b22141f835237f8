"""MMD GANs that converge: regularised kernel critics for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mmd.callbacks import (
        BandwidthSchedule,
        ConvergenceMonitor,
        GeneratorEMA,
        GeneratorProgressBar,
        InstanceNoise,
        MMDTracker,
        NoiseInjection,
        ParametricGradientPenalty,
        RelativeTestLR,
        SampleGrid,
    )
    from lightning_mmd.critics import LearnedKernelCritic
    from lightning_mmd.features import RandomFourierFeatures, SumFeatures
    from lightning_mmd.flows import generator_flow, kernel_gan_flow, point_flow
    from lightning_mmd.halving import bilinear_game, step_halving
    from lightning_mmd.kernels import (
        Energy,
        Gaussian,
        InverseMultiquadric,
        Kernel,
        Laplace,
        Linear,
        Polynomial,
        RationalQuadratic,
        SumKernel,
        median_bandwidth,
    )
    from lightning_mmd.metrics import MaximumMeanDiscrepancy
    from lightning_mmd.mmd import (
        mmd2_biased,
        mmd2_features,
        mmd2_unbiased,
        relative_similarity_test,
        two_sample_test,
    )
    from lightning_mmd.module import MMDGAN
    from lightning_mmd.noise import (
        AdaptiveNoise,
        ConstantNoise,
        GeometricNoise,
        HalvingNoise,
        PlateauNoise,
    )
    from lightning_mmd.penalties import (
        input_gradient_penalty,
        parametric_gradient_penalty,
        rkhs_norm_penalty,
    )
    from lightning_mmd.pushforward import parametric_gradient, parametric_tangent
    from lightning_mmd.rates import convergence_rates, suggest_hyperparameters
    from lightning_mmd.witness import KernelWitness, solve_witness

_HOMES = {
    "callbacks": [
        "BandwidthSchedule",
        "ConvergenceMonitor",
        "GeneratorEMA",
        "GeneratorProgressBar",
        "InstanceNoise",
        "MMDTracker",
        "NoiseInjection",
        "ParametricGradientPenalty",
        "RelativeTestLR",
        "SampleGrid",
    ],
    "critics": ["LearnedKernelCritic"],
    "features": ["RandomFourierFeatures", "SumFeatures"],
    "flows": ["generator_flow", "kernel_gan_flow", "point_flow"],
    "halving": ["bilinear_game", "step_halving"],
    "kernels": [
        "Energy",
        "Gaussian",
        "InverseMultiquadric",
        "Kernel",
        "Laplace",
        "Linear",
        "Polynomial",
        "RationalQuadratic",
        "SumKernel",
        "median_bandwidth",
    ],
    "metrics": ["MaximumMeanDiscrepancy"],
    "mmd": [
        "mmd2_biased",
        "mmd2_features",
        "mmd2_unbiased",
        "relative_similarity_test",
        "two_sample_test",
    ],
    "module": ["MMDGAN"],
    "noise": [
        "AdaptiveNoise",
        "ConstantNoise",
        "GeometricNoise",
        "HalvingNoise",
        "PlateauNoise",
    ],
    "penalties": ["input_gradient_penalty", "parametric_gradient_penalty", "rkhs_norm_penalty"],
    "pushforward": ["parametric_gradient", "parametric_tangent"],
    "rates": ["convergence_rates", "suggest_hyperparameters"],
    "witness": ["KernelWitness", "solve_witness"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "MMDGAN",
    "AdaptiveNoise",
    "BandwidthSchedule",
    "ConstantNoise",
    "ConvergenceMonitor",
    "Energy",
    "Gaussian",
    "GeneratorEMA",
    "GeneratorProgressBar",
    "GeometricNoise",
    "HalvingNoise",
    "InstanceNoise",
    "InverseMultiquadric",
    "Kernel",
    "KernelWitness",
    "Laplace",
    "LearnedKernelCritic",
    "Linear",
    "MMDTracker",
    "MaximumMeanDiscrepancy",
    "NoiseInjection",
    "ParametricGradientPenalty",
    "PlateauNoise",
    "Polynomial",
    "RandomFourierFeatures",
    "RationalQuadratic",
    "RelativeTestLR",
    "SampleGrid",
    "SumFeatures",
    "SumKernel",
    "bilinear_game",
    "convergence_rates",
    "generator_flow",
    "input_gradient_penalty",
    "kernel_gan_flow",
    "median_bandwidth",
    "mmd2_biased",
    "mmd2_features",
    "mmd2_unbiased",
    "parametric_gradient",
    "parametric_gradient_penalty",
    "parametric_tangent",
    "point_flow",
    "relative_similarity_test",
    "rkhs_norm_penalty",
    "solve_witness",
    "step_halving",
    "suggest_hyperparameters",
    "two_sample_test",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lightning_mmd' has no attribute {name!r}")
    return getattr(import_module(f"lightning_mmd.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
