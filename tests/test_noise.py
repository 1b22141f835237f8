"""Noise levels and the inequality of the adaptive rule."""

import math

import pytest
import torch
from torch import Tensor

from lightning_mmd.flows import point_flow
from lightning_mmd.kernel_witness import KernelWitness
from lightning_mmd.kernels import (
    Gaussian,
    InverseMultiquadric,
    Kernel,
    Laplace,
    Linear,
    RationalQuadratic,
    SumKernel,
)
from lightning_mmd.noise import (
    AdaptiveNoise,
    ConstantNoise,
    GeometricNoise,
    HalvingNoise,
    NoiseSchedule,
    PlateauNoise,
    hessian_constant,
)

SMOOTH = [
    Gaussian(0.8),
    RationalQuadratic(0.7, 1.3),
    InverseMultiquadric(1.2),
    SumKernel([Gaussian(0.5), InverseMultiquadric(2.0)], weights=[0.3, 2.0]),
]


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
        (lambda: PlateauNoise(1.0, smallest=-0.1), r"smallest in \[0, initial\].*got.*-0.1"),
        (lambda: PlateauNoise(1.0, until=0), "until >= 1 or None, got.*until=0"),
        (lambda: PlateauNoise(1.0, smallest=1.1), r"smallest in \[0, initial\].*got.*1.1"),
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


@pytest.mark.parametrize("num", [1, 3, 2000])
def test_cap_on_the_adaptive_level_is_that_of_the_draw(num: int) -> None:
    """kappa / (2 lambda) over the root mean square of u: bandwidth / sqrt(12 d) for many only."""
    x, y, kernel = torch.zeros(5, 2), torch.ones(num, 2), Gaussian(1.0)
    highest = 0.0
    for seed in range(40 if num < 10 else 2):
        flow = point_flow(
            y,
            x,
            kernel,
            step_size=0.01,
            num_steps=1,
            noise=AdaptiveNoise(10.0),
            rng=torch.Generator().manual_seed(seed),
        )
        *_, state = flow
        u = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
        cap = 1 / (2 * math.sqrt(3) * float(u.square().sum(1).mean().sqrt()))
        assert state.noise <= cap
        highest = max(highest, state.noise)
    claimed = 1 / math.sqrt(12 * 2)
    assert highest <= 1.1 * claimed or num < 10
    assert highest > claimed or num > 1
