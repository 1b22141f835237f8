"""The bounds of Arbel et al. beside runs of the flow."""

import math

import pytest
import torch

from lightning_mmd import (
    AdaptiveNoise,
    Energy,
    Gaussian,
    InverseMultiquadric,
    RationalQuadratic,
    SumKernel,
    noisy_flow_bound,
    plain_flow_bound,
    point_flow,
    smoothness,
)
from lightning_mmd.noise import hessian_constant
from lightning_mmd.sobolev import negative_sobolev_distance

KERNEL = Gaussian(1.0)


def test_smoothness_against_closed_forms():
    assert smoothness(Gaussian(0.5), 0.25) == pytest.approx(4 + 0.5 * math.sqrt(3) / 0.25)
    assert smoothness(RationalQuadratic(0.7, 2.0), 0.0) == pytest.approx(0.25)
    assert smoothness(InverseMultiquadric(2.0), 0.0) == pytest.approx(0.25)
    both = SumKernel([Gaussian(1.0), Gaussian(2.0)], weights=[1.0, 2.0])
    assert smoothness(both, 0.0) == pytest.approx(1.0 + 2 / 4)
    with pytest.raises(TypeError, match="Hessian's bound"):
        smoothness(Energy(), 0.1)
    with pytest.raises(ValueError, match="mmd2 >= 0, got -1"):
        smoothness(KERNEL, -1)


def test_plain_flow_stays_under_its_bound():
    x, y = torch.randn(20, 1), torch.randn(12, 1) * 0.8 + 0.7
    start = next(point_flow(y, x, KERNEL, step_size=0.1, num_steps=0)).mmd2
    curvature = smoothness(KERNEL, start)
    step = 1 / curvature  # the best of the bound
    states = list(point_flow(y, x, KERNEL, step_size=step, num_steps=25))
    sobolev = max(
        negative_sobolev_distance(x, state.particles, KERNEL, regulariser=1e-9) for state in states
    )
    bounds = [
        plain_flow_bound(start, step_size=step, num_steps=n, smoothness=curvature, sobolev=sobolev)
        for n in range(26)
    ]
    assert bounds[0] == pytest.approx(start)
    rounding = 1 + 1e-12  # at the start the two are equal
    assert all(state.mmd2 <= bound * rounding for state, bound in zip(states, bounds, strict=True))
    # One step: dF <= -s (1 - s L / 2) D, and D >= MMD^4 / S^2 by the definition of S.
    assert bounds[1] < start
    first = negative_sobolev_distance(x, y, KERNEL, regulariser=1e-9)
    witness_slope2 = ((states[1].particles - y) / step).square().sum(1).mean()
    assert float(witness_slope2) >= start**2 / first**2 * (1 - 1e-6)


def test_noisy_flow_stays_under_its_bound():
    x, y = torch.randn(30, 2), torch.randn(20, 2) * 0.3 + 1.0
    constant = hessian_constant(KERNEL)
    start = next(point_flow(y, x, KERNEL, step_size=0.1, num_steps=0)).mmd2
    curvature = smoothness(KERNEL, start)
    step = 0.5 / curvature
    rng = torch.Generator().manual_seed(0)
    states = list(
        point_flow(
            y,
            x,
            KERNEL,
            step_size=step,
            num_steps=40,
            noise=AdaptiveNoise(1.0, num_bisections=8),
            rng=rng,
        )
    )
    draws = torch.Generator().manual_seed(0)
    total = 0.0
    for state in states[1:]:
        u = torch.randn(y.shape, generator=draws)
        total += state.noise**2 * float(u.square().sum(1).mean())
        assert state.noise_sum == pytest.approx(total, rel=1e-12)
        bound = noisy_flow_bound(
            start,
            step_size=step,
            smoothness=curvature,
            hessian_constant=constant,
            noise_sum=state.noise_sum,
        )
        assert state.mmd2 <= bound
    assert bound < 0.9 * start  # it says something
    half = list(
        point_flow(
            states[20],
            x,
            KERNEL,
            step_size=step,
            num_steps=20,
            noise=AdaptiveNoise(1.0, num_bisections=8),
        )
    )
    assert half[-1].noise_sum == states[-1].noise_sum


def test_steps_beyond_the_bound_are_refused():
    numbers = {"step_size": 1.1, "smoothness": 2.0}
    with pytest.raises(ValueError, match=r"at most 1, got 1\.1\. Take a shorter step"):
        plain_flow_bound(1.0, num_steps=1, sobolev=1.0, **numbers)
    with pytest.raises(ValueError, match=r"at most 0\.5, got 1\.1"):
        noisy_flow_bound(1.0, hessian_constant=1.0, noise_sum=1.0, **numbers)
    with pytest.raises(ValueError, match="noise_sum >= 0"):
        noisy_flow_bound(
            1.0, step_size=0.1, smoothness=1.0, hessian_constant=1.0, noise_sum=math.nan
        )
