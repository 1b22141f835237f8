"""MMD GANs that converge: regularised kernel critics for PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mmd.auto_alpha import AutoAlpha
    from lightning_mmd.batches import BatchParts
    from lightning_mmd.callbacks import (
        BandwidthSchedule,
        ConvergenceMonitor,
        DiffAugment,
        GeneratorEMA,
        GeneratorProgressBar,
        GracefulStop,
        InputGradientPenalty,
        InstanceNoise,
        MMDTracker,
        NoiseInjection,
        OnDivergence,
        ParametricGradientPenalty,
        ProximalPoint,
        Rehearsal,
        RelativeTestLR,
        SampleGrid,
        SampleQuality,
    )
    from lightning_mmd.classifier import ImageClassifier
    from lightning_mmd.closed_form import ClosedForm, TrustRegion
    from lightning_mmd.conditional import ClassFeatures, ClassProductFeatures
    from lightning_mmd.critics import EmbeddingCritic, LearnedKernelCritic
    from lightning_mmd.deep_kernel import DeepKernel
    from lightning_mmd.distance import FlowDistance, flow_distance
    from lightning_mmd.embedding import MeanEmbedding
    from lightning_mmd.estimators import Batch, Estimator, Lagged, Split
    from lightning_mmd.feature_metrics import FeatureMetrics
    from lightning_mmd.feature_networks import (
        ClassifierFeatures,
        DigitsFeatures,
        InceptionFeatures,
        TorchvisionFeatures,
    )
    from lightning_mmd.features import RandomFourierFeatures, SumFeatures
    from lightning_mmd.flow_bounds import noisy_flow_bound, plain_flow_bound, smoothness
    from lightning_mmd.flows import generator_flow, point_flow
    from lightning_mmd.game import DivergedError, Game, Player, Processes, UpdateRule
    from lightning_mmd.gradient_ascent import GradientAscent
    from lightning_mmd.halving import bilinear_game, step_halving
    from lightning_mmd.kernel_gan import kernel_gan_flow
    from lightning_mmd.kernel_objectives import (
        Attractive,
        KernelObjective,
        Repulsive,
        SlopePenalty,
    )
    from lightning_mmd.kernel_witness import KernelWitness
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
    from lightning_mmd.latents import LabelledLatents, Latents
    from lightning_mmd.matching import FeatureMatching
    from lightning_mmd.metrics import MaximumMeanDiscrepancy
    from lightning_mmd.mmd import (
        mmd2_biased,
        mmd2_features,
        mmd2_unbiased,
        mmd2_with_error,
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
    from lightning_mmd.objectives import KALE, Hinge, Logistic, Objective
    from lightning_mmd.penalties import (
        input_gradient_penalty,
        parametric_gradient_penalty,
        rkhs_norm_penalty,
    )
    from lightning_mmd.pixel_kernel import PixelKernel
    from lightning_mmd.pushforward import parametric_gradient, parametric_tangent
    from lightning_mmd.rates import convergence_rates, suggest_hyperparameters
    from lightning_mmd.standard import standard_rule
    from lightning_mmd.witness import (
        Image,
        ParametricGramian,
        System,
        WitnessSolution,
        solve_witness,
    )

_HOMES = {
    "auto_alpha": ["AutoAlpha"],
    "batches": ["BatchParts"],
    "callbacks": [
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
    ],
    "classifier": ["ImageClassifier"],
    "closed_form": ["ClosedForm", "TrustRegion"],
    "conditional": ["ClassFeatures", "ClassProductFeatures"],
    "critics": ["EmbeddingCritic", "LearnedKernelCritic"],
    "deep_kernel": ["DeepKernel"],
    "distance": ["FlowDistance", "flow_distance"],
    "embedding": ["MeanEmbedding"],
    "estimators": ["Batch", "Estimator", "Lagged", "Split"],
    "feature_metrics": ["FeatureMetrics"],
    "feature_networks": [
        "ClassifierFeatures",
        "DigitsFeatures",
        "InceptionFeatures",
        "TorchvisionFeatures",
    ],
    "features": ["RandomFourierFeatures", "SumFeatures"],
    "flow_bounds": ["noisy_flow_bound", "plain_flow_bound", "smoothness"],
    "flows": ["generator_flow", "point_flow"],
    "game": ["DivergedError", "Game", "Player", "Processes", "UpdateRule"],
    "gradient_ascent": ["GradientAscent"],
    "halving": ["bilinear_game", "step_halving"],
    "kernel_gan": ["kernel_gan_flow"],
    "kernel_objectives": ["Attractive", "KernelObjective", "Repulsive", "SlopePenalty"],
    "kernel_witness": ["KernelWitness"],
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
    "latents": ["LabelledLatents", "Latents"],
    "matching": ["FeatureMatching"],
    "metrics": ["MaximumMeanDiscrepancy"],
    "mmd": [
        "mmd2_biased",
        "mmd2_features",
        "mmd2_unbiased",
        "mmd2_with_error",
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
    "objectives": ["KALE", "Hinge", "Logistic", "Objective"],
    "penalties": ["input_gradient_penalty", "parametric_gradient_penalty", "rkhs_norm_penalty"],
    "pixel_kernel": ["PixelKernel"],
    "pushforward": ["parametric_gradient", "parametric_tangent"],
    "rates": ["convergence_rates", "suggest_hyperparameters"],
    "standard": ["standard_rule"],
    "witness": ["Image", "ParametricGramian", "System", "WitnessSolution", "solve_witness"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lightning_mmd' has no attribute {name!r}")
    return getattr(import_module(f"lightning_mmd.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
