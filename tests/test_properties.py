"""Properties that hold for all inputs: kernels, estimators, penalties, schedules."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_mmd import (
    Energy,
    Gaussian,
    InverseMultiquadric,
    Laplace,
    Linear,
    RationalQuadratic,
    SumKernel,
    input_gradient_penalty,
    mmd2_biased,
    mmd2_unbiased,
    mmd2_with_error,
    parametric_gradient_penalty,
    two_sample_test,
)
from lightning_mmd.noise import ConstantNoise, GeometricNoise, HalvingNoise

always = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,  # the same cases everywhere
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
seeds = st.integers(0, 2**31)
widths = st.floats(1e-3, 1e3)
sizes = st.integers(2, 12)
STATIONARY = {
    "Gaussian": Gaussian,
    "Laplace": Laplace,
    "RationalQuadratic": lambda width: RationalQuadratic(0.5, width),
    "InverseMultiquadric": lambda width: InverseMultiquadric(bandwidth=width),
    "SumKernel": lambda width: SumKernel([Gaussian(width), Laplace(2 * width)]),
}
names = st.sampled_from(sorted(STATIONARY))


def draw(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@always
@given(names, widths, sizes, seeds, st.floats(1e-3, 1e3))
def test_kernels_are_positive_symmetric_and_know_no_origin(name, width, num, seed, scale):
    kernel, x = STATIONARY[name](width), draw(seed, num, 3, scale=scale)
    gram = kernel(x, x)
    torch.testing.assert_close(gram, gram.T, rtol=1e-12, atol=1e-12)
    assert torch.linalg.eigvalsh(gram).min() > -1e-9 * num
    assert gram.max() <= gram.diagonal().max() * (1 + 1e-12)  # Cauchy-Schwarz
    torch.testing.assert_close(kernel(x + 5, x + 5), gram, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kernel.scaled(4.0)(4 * x, 4 * x), gram, rtol=1e-9, atol=1e-9)


@always
@given(names, widths, sizes, sizes, seeds)
def test_estimators_are_symmetric_and_know_no_order(name, width, n, m, seed):
    kernel, x, y = STATIONARY[name](width), draw(seed, n, 2), draw(seed + 1, m, 2) + 0.5
    biased, unbiased = mmd2_biased(x, y, kernel), mmd2_unbiased(x, y, kernel)
    assert biased > -1e-12
    for other, value in ((mmd2_biased, biased), (mmd2_unbiased, unbiased)):
        torch.testing.assert_close(other(y, x, kernel), value, rtol=1e-9, atol=1e-12)
        again = other(x.flip(0), y.roll(1, 0), kernel, block_size=3)
        torch.testing.assert_close(again, value, rtol=1e-9, atol=1e-12)
    # the diagonals are all that tells them apart
    within = 0.0
    for sample in (x, y):
        gram = kernel(sample, sample)
        within += float(gram.mean() - (gram.sum() - gram.trace()) / (len(gram) * (len(gram) - 1)))
    assert float(biased - unbiased) == pytest.approx(within, abs=1e-10)
    error = mmd2_with_error(x, y, kernel, block_size=4)
    assert error.value == pytest.approx(float(unbiased), abs=1e-10)
    assert 0 <= error.std_error < math.inf


@always
@given(sizes, sizes, seeds)
def test_the_linear_kernel_compares_means(n, m, seed):
    x, y = draw(seed, n, 3), draw(seed + 1, m, 3)
    expected = (x.mean(0) - y.mean(0)).square().sum()
    torch.testing.assert_close(mmd2_biased(x, y, Linear()), expected, rtol=1e-9, atol=1e-12)


@always
@given(st.integers(2, 8), seeds, st.floats(0.1, 1.9))
def test_the_energy_distance_is_not_negative(num, seed, exponent):
    x, y = draw(seed, num, 2), draw(seed + 1, num + 1, 2)
    assert mmd2_biased(x, y, Energy(exponent)) > -1e-10


@always
@given(st.integers(4, 10), seeds)
def test_p_values_are_probabilities(num, seed):
    x, y = draw(seed, num, 2), draw(seed + 1, num, 2)
    p = two_sample_test(x, y, Gaussian(), num_permutations=39).p_value
    assert 1 / 40 <= p <= 1


@always
@given(st.integers(1, 9), seeds, st.floats(-3, 3))
def test_penalties_of_linear_networks_have_closed_forms(num, seed, factor):
    """f(G(z)) = <w, A z + b>: grad_A is w (mean z)^T, grad_b is w; the slope is w."""
    z, w = draw(seed, num, 3), draw(seed + 1, 2)
    generator, critic = nn.Linear(3, 2), nn.Linear(2, 1)
    with torch.no_grad():
        critic.weight.copy_(factor * w)
    norm2 = factor**2 * float(w.square().sum())
    expected = norm2 * (1 + float(z.mean(0).square().sum()))
    for method in ("forward", "double_backward"):
        penalty = parametric_gradient_penalty(critic, generator, z, method=method)
        assert penalty.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    slope = input_gradient_penalty(critic, generator(z).detach(), target=0.0).item()
    assert slope == pytest.approx(norm2, rel=1e-9, abs=1e-12)
    to_one = input_gradient_penalty(critic, z[:, :2], generator(z), target=1.0).item()
    assert to_one == pytest.approx((math.sqrt(norm2) - 1) ** 2, rel=1e-6, abs=1e-9)


@always
@given(st.floats(0, 1e3), st.integers(1, 50), st.integers(0, 10_000), st.floats(0.01, 1))
def test_schedules_fall_and_never_rise(initial, every, step, ratio):
    until = step + every
    for schedule in (
        ConstantNoise(initial, until=until),
        HalvingNoise(initial, every, until),
        GeometricNoise(initial, ratio, until),
    ):
        now, later = schedule.level(step), schedule.level(step + 1)
        assert 0 <= later <= now <= initial
        assert schedule.level(until) == 0
    halving = HalvingNoise(initial, every)
    assert halving.level(step + every) == halving.level(step) / 2
