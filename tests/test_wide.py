"""Devices without float64, emulated: what makes float64 of float32 there fails, as on MPS."""

import pytest
import torch
from foreign import SHAPE
from test_observing import GAN
from tiny import NoDouble, ascent, closed_form, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mmd import (
    MMDGAN,
    AdaptiveNoise,
    ConvergenceMonitor,
    DeepKernel,
    Gaussian,
    GeneratorEMA,
    LearnedKernelCritic,
    MMDTracker,
    NoiseInjection,
    ParametricGradientPenalty,
    RelativeTestLR,
    SampleGrid,
    mmd2_unbiased,
    solve_witness,
)
from lightning_mmd.wide import wide_sum, widen

pytestmark = pytest.mark.filterwarnings("ignore:.*but have no `validation_step`:UserWarning")


@pytest.fixture(autouse=True)
def single_precision(double_precision):
    torch.set_default_dtype(torch.float32)


def model(make):
    generator = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Unflatten(1, SHAPE))
    features = nn.Sequential(nn.Flatten(), nn.Linear(16, 8))
    if make is DeepKernel:
        return MMDGAN(generator, features, DeepKernel(Gaussian(1.0)), latents=5)
    return make(generator, LearnedKernelCritic(features, 8), latents=5)


def ours(path):
    features = nn.Flatten()
    return [
        MMDTracker(Gaussian(2.0), 1, 20, 20),
        ConvergenceMonitor(1, num_samples=16),
        RelativeTestLR(Gaussian(2.0), 1, lookback=1, num_samples=16, features=features),
        SampleGrid(1, 4, dirpath=path),
        GeneratorEMA(2.0),
    ]


def fit(module, path, callbacks, **kwargs):
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.rand(32, *SHAPE) * 2 - 1), 8)
    trainer = quiet_trainer(path, callbacks=callbacks, max_epochs=1, **kwargs)
    trainer.fit(module, data, data)


@pytest.mark.parametrize("make", [closed_form, ascent, DeepKernel])
def test_every_rule_and_callback_runs_without_float64(make, tmp_path):
    with NoDouble():
        fit(model(make), tmp_path, ours(tmp_path))


def test_callbacks_of_other_gans_run_without_float64(tmp_path):
    names = {"generator": "netG", "critic": "netD"}
    callbacks = [
        ParametricGradientPenalty(1.0, **names),
        NoiseInjection(AdaptiveNoise(1.0), **names),
        MMDTracker(Gaussian(2.0), 1, 20, 20),
        ConvergenceMonitor(1, num_samples=16, **names),
    ]
    with NoDouble():
        fit(GAN(), tmp_path, callbacks)


def test_values_are_those_of_float64_but_for_rounding():
    x, y = torch.randn(300, 2), torch.randn(200, 2) + 0.5
    generator, features = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 6), nn.Tanh())
    z, gap = torch.randn(20, 3), torch.randn(6)
    expected = mmd2_unbiased(x, y, Gaussian())
    solution = solve_witness(features, generator, z, gap, max_iterations=6)
    with NoDouble():
        assert widen(x).dtype == torch.float64
        torch.testing.assert_close(wide_sum(x).float(), x.sum())
        found = mmd2_unbiased(x, y, Gaussian())
        again = solve_witness(features, generator, z, gap, max_iterations=6)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(again.weights, solution.weights, rtol=1e-5, atol=1e-6)


def test_gradients_pass_where_nothing_has_float64():
    x, y = torch.randn(30, 2, requires_grad=True), torch.randn(20, 2)
    expected = torch.autograd.grad(mmd2_unbiased(x, y, Gaussian()), x)[0]
    with NoDouble():
        found = torch.autograd.grad(mmd2_unbiased(x, y, Gaussian()), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [closed_form, ascent])
def test_every_callback_runs_in_every_precision(make, precision, tmp_path):
    fit(model(make), tmp_path, ours(tmp_path), precision=precision)


def test_an_average_of_bfloat16_weights_is_taken_in_float32(tmp_path):
    average, kept = GeneratorEMA(1000.0, ramp=None), []
    module = model(ascent)
    module.on_train_batch_end = lambda *_: kept.append(module.generator[0].weight.detach().clone())
    fit(module, tmp_path, [average], precision="bf16-true")
    expected = kept[0].double()
    for weight in kept[1:]:
        expected = torch.lerp(weight.double(), expected, 0.5**0.001)
    found = average.state_dict()["average"]["wide"]["0.weight"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    assert average.averaged_generator[0].weight.dtype == torch.bfloat16
