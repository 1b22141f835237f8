"""What a wrong use says: a table of calls, of errors and of their exact texts."""

import pytest
import torch
from torch import nn

import lightning_mmd
import lightning_mmd.data
import lightning_mmd.networks
from lightning_mmd import MMDGAN, LearnedKernelCritic
from lightning_mmd.networks import MLPFeatures, MLPGenerator


def names():
    """Return what the calls may name."""
    generator = MLPGenerator(2, 3, (4,))
    critic = LearnedKernelCritic(MLPFeatures(2, 4, (4,)), 4)
    modules = (lightning_mmd, lightning_mmd.data, lightning_mmd.networks)
    return {
        **{name: getattr(module, name) for module in modules for name in module.__all__},
        "torch": torch,
        "nn": nn,
        "NET": generator,
        "CRITIC": critic,
        "MODEL": MMDGAN(generator, critic, latents=3),
    }


WRONG = [  # call, error, text
    (
        "MMDGAN(NET, CRITIC, latents=3.5)",
        TypeError,
        "latents must be the length of a standard normal vector, or a callable from a number n to latents for n samples, got 3.5.",  # noqa: E501
    ),
    ("MMDGAN(NET, CRITIC, latents=0)", ValueError, "latents must have a positive length, got 0."),
    ("MMDGAN(NET, CRITIC, latents=-1)", ValueError, "latents must have a positive length, got -1."),
    (
        'MMDGAN(NET, CRITIC, latents="3")',
        TypeError,
        "latents must be the length of a standard normal vector, or a callable from a number n to latents for n samples, got '3'.",  # noqa: E501
    ),
    (
        "MMDGAN(NET, CRITIC, latents=None)",
        TypeError,
        "latents must be the length of a standard normal vector, or a callable from a number n to latents for n samples, got None.",  # noqa: E501
    ),
    (
        "MMDGAN(MLPGenerator, CRITIC, latents=3)",
        TypeError,
        "generator must be a network, got the class MLPGenerator: call it, MLPGenerator(...).",
    ),
    (
        "MMDGAN(NET, LearnedKernelCritic, latents=3)",
        TypeError,
        "critic must be a network, got the class LearnedKernelCritic: call it, LearnedKernelCritic(...).",  # noqa: E501
    ),
    (
        'MMDGAN("net", CRITIC, latents=3)',
        TypeError,
        "generator must be a torch.nn.Module, got 'net'.",
    ),
    (
        'MMDGAN(NET, "critic", latents=3)',
        TypeError,
        "critic must be a torch.nn.Module, got 'critic'.",
    ),
    ("MMDGAN(NET, None, latents=3)", TypeError, "critic must be a torch.nn.Module, got None."),
    (
        'MMDGAN(NET, CRITIC, "ClosedForm", latents=3)',
        TypeError,
        "rule must be an UpdateRule such as ClosedForm() or GradientAscent(), got 'ClosedForm'.",
    ),
    (
        "MMDGAN(NET, CRITIC, ClosedForm, latents=3)",
        TypeError,
        "rule must be an UpdateRule such as ClosedForm() or GradientAscent(), got <class 'lightning_mmd.closed_form.ClosedForm'>.",  # noqa: E501
    ),
    (
        "MMDGAN(NET, CRITIC, latents=3, critic_steps=0)",
        ValueError,
        "critic_steps must be a positive number, got 0.",
    ),
    (
        "MMDGAN(NET, CRITIC, latents=3, critic_steps=1.5)",
        TypeError,
        "critic_steps must be an integer, got 1.5.",
    ),
    (
        'MMDGAN(NET, CRITIC, latents=3, critic_steps="2")',
        TypeError,
        "critic_steps must be an integer, got '2'.",
    ),
    (
        "MMDGAN(NET, CRITIC, latents=3, micro_batches=0)",
        ValueError,
        "micro_batches must be a positive number, got 0.",
    ),
    (
        "MMDGAN(NET, CRITIC, latents=3, micro_batches=2.5)",
        TypeError,
        "micro_batches must be an integer, got 2.5.",
    ),
    (
        "MMDGAN(NET, CRITIC, latents=3, micro_batches=True)",
        TypeError,
        "micro_batches must be an integer, got True.",
    ),
    (
        "MMDGAN(NET, CRITIC, latents=3, generator_clip_norm=-1)",
        ValueError,
        "generator_clip_norm must be a positive number, got -1.",
    ),
    (
        'MMDGAN(NET, CRITIC, latents=3, generator_clip_norm="1")',
        TypeError,
        "generator_clip_norm must be a number, got '1'.",
    ),
    (
        'MMDGAN(NET, CRITIC, latents=3, critic_clip_norm=float("nan"))',
        ValueError,
        "critic_clip_norm must be a positive number, got nan.",
    ),
    (
        "MMDGAN(NET, CRITIC, latents=3, critic_clip_norm=0)",
        ValueError,
        "critic_clip_norm must be a positive number, got 0.",
    ),
    ('MMDGAN(NET, CRITIC, latents=3, seed="1")', TypeError, "seed must be an integer, got '1'."),
    ("MMDGAN(NET, CRITIC, latents=3, seed=1.5)", TypeError, "seed must be an integer, got 1.5."),
    (
        'MMDGAN(NET, CRITIC, latents=3, generator_optimizer="adam")',
        TypeError,
        "generator_optimizer must be a callable from parameters to an optimizer, such as torch.optim.Adam, got str.",  # noqa: E501
    ),
    (
        "MMDGAN(NET, CRITIC, latents=3, generator_optimizer=torch.optim.Adam(NET.parameters()))",
        TypeError,
        "generator_optimizer must be a callable from parameters to an optimizer, such as torch.optim.Adam, got Adam.",  # noqa: E501
    ),
    (
        "MMDGAN(NET, CRITIC, latents=3, critic_optimizer=3)",
        TypeError,
        "critic_optimizer must be a callable from parameters to an optimizer, such as torch.optim.Adam, got int.",  # noqa: E501
    ),
    (
        'MMDGAN(NET, CRITIC, latents=3, generator_scheduler="cosine")',
        TypeError,
        "generator_scheduler must be a callable from an optimizer to a scheduler, such as lambda optimizer: ExponentialLR(optimizer, 0.9), got str.",  # noqa: E501
    ),
    (
        'MMDGAN(NET, CRITIC, latents=3, batch="image")',
        TypeError,
        "batch must be a BatchParts, got 'image'.",
    ),
    (
        "MMDGAN(nn.Identity(), CRITIC, latents=3)",
        ValueError,
        "the generator Identity has no parameter with requires_grad=True, so there is nothing to train. Unfreeze some.",  # noqa: E501
    ),
    (
        "MMDGAN(NET, NET, latents=3)",
        ValueError,
        "critic and generator share the parameters ['layers.0.weight', 'layers.0.bias', 'layers.2.weight', 'layers.2.bias']; the theory differentiates in the one and holds the other, so no layer can belong to both. Copy the shared layers.",  # noqa: E501
    ),
    ("ClosedForm(alpha=-1)", ValueError, "alpha must be a finite number >= 0, got -1."),
    ('ClosedForm(alpha=float("nan"))', ValueError, "alpha must be a finite number >= 0, got nan."),
    ("ClosedForm(beta=-1)", ValueError, "beta must be a finite number >= 0, got -1."),
    (
        "ClosedForm(alpha=0, beta=0)",
        ValueError,
        "ClosedForm needs alpha > 0 or beta > 0, got both zero.",
    ),
    ("ClosedForm(eta=0)", ValueError, "eta must be a positive number, got 0."),
    ('ClosedForm(eta=float("inf"))', ValueError, "eta must be a positive number, got inf."),
    (
        "ClosedForm(max_iterations=0)",
        ValueError,
        "max_iterations must be a positive number, got 0.",
    ),
    ("ClosedForm(tolerance=-1)", ValueError, "tolerance must be a positive number, got -1."),
    ("ClosedForm(overhead=-1)", ValueError, "overhead must be a finite number >= 0, got -1."),
    ("GradientAscent(alpha=-1)", ValueError, "alpha must be a finite number >= 0, got -1."),
    (
        'GradientAscent(beta=float("inf"))',
        ValueError,
        "beta must be a finite number >= 0, got inf.",
    ),
    ("GradientAscent(fraction=0)", ValueError, "fraction must be in (0, 1], got 0."),
    ("GradientAscent(fraction=1.5)", ValueError, "fraction must be in (0, 1], got 1.5."),
    (
        'GradientAscent(objective="hinge")',
        TypeError,
        "objective must be an Objective such as Linear(), got 'hinge'.",
    ),
    (
        "GradientAscent(objective=Hinge)",
        TypeError,
        "objective must be an Objective such as Linear(), got <class 'lightning_mmd.objectives.Hinge'>.",  # noqa: E501
    ),
    (
        'GradientAscent(estimator="lagged")',
        TypeError,
        "estimator must be an Estimator such as Batch(), got 'lagged'.",
    ),
    (
        "GradientAscent(estimator=Lagged)",
        TypeError,
        "estimator must be an Estimator such as Batch(), got <class 'lightning_mmd.estimators.Lagged'>.",  # noqa: E501
    ),
    (
        'DeepKernel(objective="repulsive")',
        TypeError,
        "objective must be a KernelObjective such as Repulsive(), got 'repulsive'.",
    ),
    (
        'DeepKernel(kernel="gaussian")',
        TypeError,
        "kernel must be a Kernel such as Gaussian(1.0), got 'gaussian'.",
    ),
    (
        "DeepKernel(kernel=Gaussian)",
        TypeError,
        "kernel must be a Kernel such as Gaussian(1.0), got <class 'lightning_mmd.kernels.Gaussian'>.",  # noqa: E501
    ),
    ("DeepKernel(alpha=-1)", ValueError, "alpha must be a finite number >= 0, got -1."),
    ("Split(share=0)", ValueError, "Split needs share in (0, 1), got 0."),
    ("Split(share=1)", ValueError, "Split needs share in (0, 1), got 1."),
    (
        "SlopePenalty(-1)",
        ValueError,
        "SlopePenalty needs weight > 0, target >= 0 and interval >= 1, got -1, 0.0 and 1.",
    ),
    (
        "SlopePenalty(1.0, interval=0)",
        ValueError,
        "SlopePenalty needs weight > 0, target >= 0 and interval >= 1, got 1.0, 0.0 and 0.",
    ),
    ("Gaussian(0)", ValueError, "Gaussian needs a positive, finite bandwidth, got 0."),
    ("Gaussian(-1)", ValueError, "Gaussian needs a positive, finite bandwidth, got -1."),
    ('Gaussian(float("nan"))', ValueError, "Gaussian needs a positive, finite bandwidth, got nan."),
    ("Laplace(0)", ValueError, "Laplace needs a positive, finite bandwidth, got 0."),
    ("Laplace(-2.0)", ValueError, "Laplace needs a positive, finite bandwidth, got -2.0."),
    (
        "RationalQuadratic(0)",
        ValueError,
        "RationalQuadratic needs a positive, finite alpha, got 0.",
    ),
    (
        "RationalQuadratic(1.0, bandwidth=0)",
        ValueError,
        "RationalQuadratic needs a positive, finite bandwidth, got 0.",
    ),
    (
        "InverseMultiquadric(bandwidth=0)",
        ValueError,
        "InverseMultiquadric needs a positive, finite bandwidth, got 0.",
    ),
    ("Polynomial(degree=0)", ValueError, "Polynomial needs an integer degree >= 1, got 0."),
    ("Polynomial(degree=1.5)", ValueError, "Polynomial needs an integer degree >= 1, got 1.5."),
    (
        "Energy(0)",
        ValueError,
        "Energy needs an exponent strictly between 0 and 2, got 0. Use 1 for the energy distance.",
    ),
    (
        "Energy(2.5)",
        ValueError,
        "Energy needs an exponent strictly between 0 and 2, got 2.5. Use 1 for the energy distance.",  # noqa: E501
    ),
    ("SumKernel([])", ValueError, "SumKernel needs at least one kernel, got none."),
    (
        "SumKernel([Gaussian(1.0)], weights=[1, 2])",
        ValueError,
        "SumKernel needs one weight a kernel, got 2 weights for 1 kernels.",
    ),
    (
        "SumKernel([Gaussian(1.0)], weights=[-1])",
        ValueError,
        "SumKernel needs finite weights >= 0 that are not all zero, got (-1,).",
    ),
    (
        "RandomFourierFeatures(Gaussian(1.0), 0, 10)",
        ValueError,
        "RandomFourierFeatures needs in_features >= 1, got 0.",
    ),
    (
        "RandomFourierFeatures(Gaussian(1.0), 2, 0)",
        ValueError,
        "RandomFourierFeatures needs a positive even num_features (sine-cosine pairs), got 0.",
    ),
    (
        "RandomFourierFeatures(Gaussian(1.0), 2, 3.5)",
        ValueError,
        "RandomFourierFeatures needs a positive even num_features (sine-cosine pairs), got 3.5.",
    ),
    (
        "RandomFourierFeatures(Energy(), 2, 10)",
        TypeError,
        "Frequencies need a stationary kernel (Gaussian, Laplace, RationalQuadratic, InverseMultiquadric, or a SumKernel of these), got Energy(exponent=1.0), which has no spectral measure. Use the kernel itself, for example in mmd2_unbiased.",  # noqa: E501
    ),
    (
        "LearnedKernelCritic(nn.Linear(2, 4), 0)",
        ValueError,
        "num_features must be at least 1, got 0.",
    ),
    (
        "LearnedKernelCritic(nn.Linear(2, 4), -1)",
        ValueError,
        "num_features must be at least 1, got -1.",
    ),
    (
        "mmd2_unbiased(torch.randn(1, 2), torch.randn(5, 2), Gaussian(1.0))",
        ValueError,
        "mmd2_unbiased needs at least 2 samples on each side, got n = 1 and m = 5. Use a larger batch, or the biased estimate.",  # noqa: E501
    ),
    (
        "mmd2_unbiased(torch.randn(5, 2), torch.randn(5, 3), Gaussian(1.0))",
        ValueError,
        "mmd2_unbiased expects samples of shapes (n, ...) and (m, ...) with the same trailing dimensions, at least one, got (5, 2) and (5, 3).",  # noqa: E501
    ),
    (
        "mmd2_unbiased(torch.zeros(5, 2, dtype=torch.long), torch.zeros(5, 2, dtype=torch.long), Gaussian(1.0))",  # noqa: E501
        ValueError,
        "mmd2_unbiased expects samples of one floating dtype, got torch.int64 and torch.int64. Convert them: x.float().",  # noqa: E501
    ),
    (
        "mmd2_biased(torch.randn(0, 2), torch.randn(5, 2), Gaussian(1.0))",
        ValueError,
        "mmd2_biased needs at least 1 samples on each side, got n = 0 and m = 5. Use a larger batch.",  # noqa: E501
    ),
    (
        "mmd2_features(torch.randn(5, 2), torch.randn(5, 3))",
        ValueError,
        "mmd2_features expects samples of shapes (n, ...) and (m, ...) with the same trailing dimensions, at least one, got (5, 2) and (5, 3).",  # noqa: E501
    ),
    (
        "median_bandwidth(torch.zeros(5, 2))",
        ValueError,
        "median_bandwidth needs at least two distinct points, got 5 that coincide. Give a larger sample or set the bandwidth yourself.",  # noqa: E501
    ),
    (
        "median_bandwidth(torch.randn(1, 2))",
        ValueError,
        "median_bandwidth needs at least two distinct points, got 1 that coincide. Give a larger sample or set the bandwidth yourself.",  # noqa: E501
    ),
    (
        'MMDTracker("gaussian")',
        TypeError,
        "a discrepancy needs a kernel such as Gaussian(bandwidth), got 'gaussian'. Others are in lightning_mmd.kernels; your own derives from Kernel.",  # noqa: E501
    ),
    (
        "MMDTracker(Gaussian(1.0), every_n_steps=0)",
        ValueError,
        "MMDTracker needs every_n_steps of at least 1, got 0. It counts generator updates; remove the callback to observe none.",  # noqa: E501
    ),
    (
        "MMDTracker(Gaussian(1.0), num_real=1)",
        ValueError,
        "MMDTracker needs num_real and num_fake of at least 2 and sample_batch_size of at least 1, got 1, 2000 and 500.",  # noqa: E501
    ),
    (
        "MMDTracker(Gaussian(1.0), sample_batch_size=0)",
        ValueError,
        "MMDTracker needs num_real and num_fake of at least 2 and sample_batch_size of at least 1, got 2000, 2000 and 0.",  # noqa: E501
    ),
    (
        "ConvergenceMonitor(every_n_steps=0)",
        ValueError,
        "ConvergenceMonitor needs every_n_steps of at least 1, got 0. It counts generator updates; remove the callback to observe none.",  # noqa: E501
    ),
    (
        "ConvergenceMonitor(num_samples=0)",
        ValueError,
        "ConvergenceMonitor needs num_samples of at least 10, got 0.",
    ),
    ("GeneratorEMA(0)", ValueError, "GeneratorEMA needs half_life > 0, got 0."),
    ('GeneratorEMA(float("nan"))', ValueError, "GeneratorEMA needs half_life > 0, got nan."),
    ("GeneratorEMA(half_life=10, ramp=-1)", ValueError, "GeneratorEMA needs ramp > 0, got -1."),
    (
        "SampleGrid(every_n_steps=0)",
        ValueError,
        "SampleGrid needs every_n_steps of at least 1, got 0. It counts generator updates; remove the callback to observe none.",  # noqa: E501
    ),
    (
        "SampleGrid(num_samples=0)",
        ValueError,
        "SampleGrid needs num_samples, num_columns and scale of at least 1, got 0, 8 and 1.",
    ),
    (
        "SampleGrid(num_columns=0)",
        ValueError,
        "SampleGrid needs num_samples, num_columns and scale of at least 1, got 64, 0 and 1.",
    ),
    (
        "SampleGrid(scale=0)",
        ValueError,
        "SampleGrid needs num_samples, num_columns and scale of at least 1, got 64, 8 and 0.",
    ),
    (
        "SampleGrid(value_range=(1, 0))",
        ValueError,
        "SampleGrid needs value_range = (low, high) with low < high, got (1, 0).",
    ),
    (
        "BandwidthSchedule(0, num_steps=5)",
        ValueError,
        "BandwidthSchedule needs finite factors initial > 0 and final > 0, got 0 and 1.0.",
    ),
    (
        "BandwidthSchedule(2.0, num_steps=0)",
        ValueError,
        "BandwidthSchedule needs num_steps and every_n_steps of at least 1, got 0 and 1.",
    ),
    (
        "RelativeTestLR(Gaussian(1.0), 0)",
        ValueError,
        "RelativeTestLR needs every_n_steps of at least 1, got 0. It counts generator updates; remove the callback to observe none.",  # noqa: E501
    ),
    (
        "RelativeTestLR(Gaussian(1.0), 10, lookback=0)",
        ValueError,
        "RelativeTestLR needs lookback, patience and sample_batch_size of at least 1 and num_samples of at least 3, got 0, 3, 500 and 2048.",  # noqa: E501
    ),
    (
        "NoiseInjection(0.5)",
        TypeError,
        "NoiseInjection needs a NoiseSchedule, such as HalvingNoise, or AdaptiveNoise, got float. (PlateauNoise is for point_flow, which measures MMD^2 at every step.)",  # noqa: E501
    ),
    (
        'NoiseInjection("halving")',
        TypeError,
        "NoiseInjection needs a NoiseSchedule, such as HalvingNoise, or AdaptiveNoise, got str. (PlateauNoise is for point_flow, which measures MMD^2 at every step.)",  # noqa: E501
    ),
    (
        "InstanceNoise(0.5)",
        TypeError,
        "InstanceNoise needs a level that depends on the step alone, a NoiseSchedule such as GeometricNoise, got float.",  # noqa: E501
    ),
    (
        "HalvingNoise(-1.0, every=4)",
        ValueError,
        "HalvingNoise needs a finite initial level >= 0 and until >= 0 or None, got initial = -1.0, until = None.",  # noqa: E501
    ),
    ("HalvingNoise(0.5, every=0)", ValueError, "HalvingNoise needs every >= 1 steps, got 0."),
    ("GeometricNoise(0.5, -1)", ValueError, "GeometricNoise needs a ratio in (0, 1], got -1."),
    (
        "ConstantNoise(-1)",
        ValueError,
        "ConstantNoise needs a finite initial level >= 0 and until >= 0 or None, got initial = -1, until = None.",  # noqa: E501
    ),
    (
        "PlateauNoise(-1.0)",
        ValueError,
        "PlateauNoise needs a finite initial level > 0, window >= 1, tolerance and ratio in (0, 1), smallest in [0, initial] and until >= 1 or None, got PlateauNoise(initial=-1.0, window=50, tolerance=0.05, ratio=0.8, smallest=0.0, until=None).",  # noqa: E501
    ),
    ("GracefulStop(0)", ValueError, "limit must be a positive number of seconds, got 0."),
    ('GracefulStop("30")', ValueError, "limit must be a positive number of seconds, got '30'."),
    ('OnDivergence("stop")', ValueError, "action must be 'raise' or 'restore', got 'stop'."),
    (
        "OnDivergence(every_n_steps=0)",
        ValueError,
        "OnDivergence needs every_n_steps and max_tries, integers of at least 1, got 0 and 3.",
    ),
    (
        "OnDivergence(every_n_steps=1.5)",
        ValueError,
        "OnDivergence needs every_n_steps and max_tries, integers of at least 1, got 1.5 and 3.",
    ),
    ("OnDivergence(factor=0)", ValueError, "factor must be in (0, 1], got 0."),
    ("OnDivergence(factor=2)", ValueError, "factor must be in (0, 1], got 2."),
    (
        "OnDivergence(max_tries=0)",
        ValueError,
        "OnDivergence needs every_n_steps and max_tries, integers of at least 1, got 100 and 0.",
    ),
    (
        'MaximumMeanDiscrepancy("gaussian")',
        TypeError,
        "a discrepancy needs a kernel such as Gaussian(bandwidth), got 'gaussian'. Others are in lightning_mmd.kernels; your own derives from Kernel.",  # noqa: E501
    ),
    (
        "ParametricGradientPenalty(-1.0)",
        ValueError,
        "alpha must be 'auto', an AutoAlpha or a finite number >= 0, got -1.0.",
    ),
    (
        "GaussianMixtureDataModule(batch_size=0)",
        ValueError,
        "Expected batch_size of at least 1, got 0. A schedule begins at 0 samples, as {0: 64, 10000: 128}.",  # noqa: E501
    ),
    (
        "GaussianMixtureDataModule(num_modes=0)",
        ValueError,
        "Expected num_modes of at least 1, got 0.",
    ),
    ("GaussianMixtureDataModule(std=-1)", ValueError, "Expected std of at least 0, got -1."),
    (
        "DigitsDataModule(batch_size={10: 64})",
        ValueError,
        "Expected batch_size of at least 1, got {10: 64}. A schedule begins at 0 samples, as {0: 64, 10000: 128}.",  # noqa: E501
    ),
    (
        'TorchvisionDataModule(name="NotASet")',
        ValueError,
        "Expected a name of MNIST, FashionMNIST, CIFAR10; got 'NotASet'.",
    ),
    (
        "ConvGenerator((1, 7, 7), 3, channels=(4, 4))",
        ValueError,
        "1 doublings need a height and width divisible by 2, got 7 x 7. Give fewer channels, or pad the images.",  # noqa: E501
    ),
    ("ConvGenerator((8, 8), 3)", ValueError, "an image has a shape (c, h, w), got (8, 8)."),
    ("MODEL.sample(0)", ValueError, "sample needs num >= 1 and as many latents, got 0 and none."),
    ("MODEL.sample(2.5)", TypeError, "num must be an integer, got 2.5."),
    ('MODEL.sample("3")', TypeError, "num must be an integer, got '3'."),
    (
        "MODEL.sample(3, torch.randn(2, 3))",
        ValueError,
        "sample needs num >= 1 and as many latents, got 3 and 2.",
    ),
    (
        'MMDGAN.load_from_checkpoint("nothing.ckpt")',
        FileNotFoundError,
        "no checkpoint at nothing.ckpt. Give the path of a .ckpt file.",
    ),
]


@pytest.mark.parametrize(("call", "kind", "text"), WRONG, ids=[call for call, *_ in WRONG])
def test_a_wrong_use_is_refused_in_these_words(call, kind, text):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    with pytest.raises(kind) as caught:
        eval(call, names())
    assert str(caught.value) == text
    assert type(caught.value) is kind


def test_the_table_is_long_and_each_text_says_what_came():
    assert len(WRONG) >= 120
    for _, _, text in WRONG:
        assert text.endswith((".", ")"))
        assert any(word in text for word in ("got", "share", "needs", "no checkpoint", "nothing"))
