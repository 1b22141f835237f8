"""Noise levels, the adaptive rule's inequality, and the negative Sobolev distance."""

import math

import pytest
import torch
from torch import Tensor

from lightning_mmd.features import RandomFourierFeatures
from lightning_mmd.flows import point_flow
from lightning_mmd.kernels import (
    Gaussian,
    InverseMultiquadric,
    Kernel,
    Laplace,
    Linear,
    Polynomial,
    RationalQuadratic,
    SumKernel,
)
from lightning_mmd.mmd import mmd2_biased
from lightning_mmd.noise import (
    AdaptiveNoise,
    ConstantNoise,
    GeometricNoise,
    HalvingNoise,
    NoiseSchedule,
    PlateauNoise,
    hessian_constant,
    negative_sobolev_distance,
)
from lightning_mmd.witness import KernelWitness

SMOOTH = [
    Gaussian(0.8),
    RationalQuadratic(0.7, 1.3),
    InverseMultiquadric(1.2),
    SumKernel([Gaussian(0.5), InverseMultiquadric(2.0)], weights=[0.3, 2.0]),
]


class FeatureKernel(Kernel):
    """The kernel of an explicit feature map: a finite-dimensional RKHS."""

    def __init__(self, phi: RandomFourierFeatures) -> None:
        self.phi = phi

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.phi(x) @ self.phi(y).T

    def diagonal(self, x: Tensor) -> Tensor:
        return self.phi(x).square().sum(1)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ConstantNoise(0.5), [0.5] * 7),
        (ConstantNoise(0.5, until=3), [0.5] * 3 + [0.0] * 4),
        (GeometricNoise(2.0, ratio=0.5, until=4), [2.0, 1.0, 0.5, 0.25, 0.0, 0.0, 0.0]),
        (HalvingNoise(1.0, every=3), [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]),
        (HalvingNoise(1.0, every=1, until=2), [1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_levels(schedule: NoiseSchedule, expected: list[float]) -> None:
    assert [schedule.level(step) for step in range(7)] == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ConstantNoise(-1.0), "initial level >= 0"),
        (lambda: ConstantNoise(math.inf), "initial level >= 0"),
        (lambda: HalvingNoise(1.0, every=2, until=-1), "until >= 0"),
        (lambda: HalvingNoise(1.0, every=0), "every >= 1"),
        (lambda: GeometricNoise(1.0, ratio=1.5), r"ratio in \(0, 1\]"),
        (lambda: AdaptiveNoise(0.0), "largest > 0"),
        (lambda: AdaptiveNoise(1.0, ratio=1.0), r"ratio in \(0, 1\)"),
        (lambda: PlateauNoise(0.0), "initial level > 0"),
        (lambda: PlateauNoise(1.0, window=0), "window >= 1"),
        (lambda: PlateauNoise(1.0, tolerance=1.0), r"tolerance and ratio in \(0, 1\)"),
        (lambda: PlateauNoise(1.0, ratio=0.0), r"tolerance and ratio in \(0, 1\)"),
        (lambda: PlateauNoise(1.0, smallest=-0.1), "smallest >= 0 and finite, got.*-0.1"),
    ],
)
def test_levels_out_of_range_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("kernel", SMOOTH, ids=str)
def test_hessian_constant_is_the_fourth_derivative_of_the_profile(kernel: Kernel) -> None:
    t, origin = torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1)
    derivative = kernel(t, origin)
    for _ in range(4):
        (derivative,) = torch.autograd.grad(derivative.sum(), t, create_graph=True)
    assert hessian_constant(kernel) ** 2 == pytest.approx(derivative.item(), rel=1e-12)


@pytest.mark.parametrize("kernel", SMOOTH, ids=str)
def test_hessian_constant_bounds_second_derivatives_and_the_bound_is_attained(
    kernel: Kernel,
) -> None:
    def steepest(x: Tensor, y: Tensor, weights: Tensor) -> float:
        """||Hf(0)|| / ||f|| of f = sum weights k(x, .) in the plane."""
        norm = (weights @ kernel(x, x) @ weights).sqrt()
        hessian = torch.autograd.functional.hessian(lambda t: weights @ kernel(x, t[None])[:, 0], y)
        return float(torch.linalg.matrix_norm(hessian, 2) / norm)

    bound = hessian_constant(kernel)
    ratios = [steepest(torch.randn(6, 2), torch.zeros(2), torch.randn(6)) for _ in range(20)]
    assert 0 < max(ratios) <= bound
    h = 0.05  # the second difference of kernel sections, d_e^2 k(0, .), is the extremal function
    extremal = torch.tensor([[h, 0.0], [0.0, 0.0], [-h, 0.0]])
    ratio = steepest(extremal, torch.zeros(2), torch.tensor([1.0, -2.0, 1.0]))
    assert 0.97 * bound < ratio <= bound


def test_hessian_constant_refuses_rough_kernels() -> None:
    for kernel in (Laplace(), SumKernel([Gaussian(), Laplace()]), Linear()):
        with pytest.raises(TypeError, match="HalvingNoise"):
            hessian_constant(kernel)


def test_adaptive_level_is_the_largest_root_on_a_known_curve() -> None:
    # D = 2 - beta gives the root of 8 beta^2 = 2 - beta; D = 0 admits no noise; D large, the most.
    root = (math.sqrt(65) - 1) / 16
    noise = AdaptiveNoise(largest=3.0, num_bisections=50)
    level = noise.level(energy=1.0, constant=1.0, dissipation=lambda beta: 2 - beta)
    assert level == pytest.approx(root, rel=1e-12)
    assert noise.level(energy=1.0, constant=1.0, dissipation=lambda beta: 0.0) == 0.0
    assert noise.level(energy=1.0, constant=1.0, dissipation=lambda beta: 1e6) == 3.0
    coarse = AdaptiveNoise(largest=3.0, num_bisections=0)
    assert coarse.level(energy=1.0, constant=1.0, dissipation=lambda beta: 2 - beta) == 0.375


def test_adaptive_noise_obeys_its_inequality_and_halves_no_descent() -> None:
    x, y, kernel = torch.randn(40, 2), torch.randn(30, 2) * 0.3 + 1.5, Gaussian(1.0)
    noise = AdaptiveNoise(largest=1.0, num_bisections=20)
    rng = torch.Generator().manual_seed(1)
    step_size = 1e-4
    start, moved = point_flow(y, x, kernel, step_size=step_size, num_steps=1, noise=noise, rng=rng)
    u = torch.randn(y.shape, generator=rng)
    witness = KernelWitness(x, y, kernel)

    def slack(beta: float) -> float:
        dissipation = witness.gradient(y + beta * u).square().sum(1).mean()
        return float(dissipation - 8 * 3 * beta**2 * 0.5 * start.mmd2 * u.square().sum(1).mean())

    assert 0 < moved.noise < 1 / math.sqrt(12)
    assert slack(moved.noise) >= 0 > slack(moved.noise * 1.001)
    dissipation = float(witness.gradient(y + moved.noise * u).square().sum(1).mean())
    rate = 0.5 * (moved.mmd2 - start.mmd2) / step_size
    assert -2 * dissipation < rate <= -0.5 * dissipation


def test_sobolev_distance_of_linear_functions() -> None:
    # H = {<w, .>}, ||grad||^2 = ||w||^2: S = ||mean x - mean y|| / sqrt(1 + regulariser).
    x, y = torch.randn(6, 3), torch.randn(4, 3)
    expected = float((x.mean(0) - y.mean(0)).norm())
    for regulariser in (1e-6, 0.1, 3.0):
        got = negative_sobolev_distance(x, y, Linear(), regulariser=regulariser)
        assert got == pytest.approx(expected / math.sqrt(1 + regulariser), rel=1e-7)


def test_sobolev_distance_of_quadratics_in_one_dimension() -> None:
    # (x y + 1)^2 = <(1, sqrt2 x, x^2), ...>: D = mean of phi'(y) phi'(y)^T, solved by hand.
    x, y, regulariser = torch.randn(8, 1), torch.randn(5, 1), 0.05
    phi = lambda t: torch.cat([torch.ones_like(t), math.sqrt(2) * t, t**2], 1)  # noqa: E731
    slopes = torch.cat([torch.zeros_like(y), torch.full_like(y, math.sqrt(2)), 2 * y], 1)
    gap = phi(x).mean(0) - phi(y).mean(0)
    metric = slopes.T @ slopes / 5 + regulariser * torch.eye(3)
    expected = float((gap @ torch.linalg.solve(metric, gap)).sqrt())
    kernel = Polynomial(degree=2, scale=1.0, offset=1.0)
    got = negative_sobolev_distance(x, y, kernel, regulariser=regulariser)
    assert got == pytest.approx(expected, rel=1e-10)


def test_sobolev_distance_is_the_supremum_in_a_finite_feature_space() -> None:
    phi = RandomFourierFeatures(Gaussian(), in_features=2, num_features=12)
    x, y, regulariser = torch.randn(9, 2), torch.randn(7, 2), 0.02
    gap = phi(x).mean(0) - phi(y).mean(0)
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda t: phi(t[None])[0], point) for point in y]
    )  # (m, r, d)
    metric = torch.einsum("jri,jsi->rs", jacobians, jacobians) / 7 + regulariser * torch.eye(12)
    got = negative_sobolev_distance(x, y, FeatureKernel(phi), regulariser=regulariser)
    best = torch.linalg.solve(metric, gap)
    attained = (best @ gap).abs() / (best @ metric @ best).sqrt()
    assert got == pytest.approx(float(attained), rel=1e-9)
    candidates = best + 0.3 * best.norm() * torch.randn(500, 12)  # no other g does better
    norms = torch.einsum("kr,rs,ks->k", candidates, metric, candidates).sqrt()
    assert float(((candidates @ gap).abs() / norms).max()) < got


def test_sobolev_distance_grows_to_its_limit_where_the_witness_has_slope() -> None:
    # A particle that sees the target: finite S. One at a critical point of f: MMD / sqrt(epsilon).
    x, kernel = torch.tensor([[-1.0], [1.0]]), Gaussian(1.0)
    ratio = {}
    for name, y in (("sees", torch.tensor([[0.5], [-1.0]])), ("stuck", torch.zeros(1, 1))):
        mmd = float(mmd2_biased(x, y, kernel).sqrt())
        got = negative_sobolev_distance(x, y, kernel, regulariser=1e-4)
        ratio[name] = got / (mmd / 1e-2)
    assert ratio["stuck"] == pytest.approx(1.0, abs=1e-9)
    assert 0.0 < ratio["sees"] < 0.9


def test_sobolev_distance_refuses_wrong_arguments() -> None:
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match="regulariser > 0"):
        negative_sobolev_distance(x, x, Gaussian(), regulariser=0.0)
    with pytest.raises(ValueError, match="flatten"):
        negative_sobolev_distance(torch.ones(2, 2, 2), x, Gaussian())
