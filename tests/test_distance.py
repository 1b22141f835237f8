"""The distance d_{alpha,beta}: closed forms, bounds, and the length of a flow."""

import itertools
import math

import pytest
import torch
from torch import nn

from lightning_mmd import Gaussian, RandomFourierFeatures, generator_flow
from lightning_mmd.distance import flow_distance
from lightning_mmd.parameters import flatten


class Curve(nn.Module):
    """All samples are one point, a function of the parameters."""

    def __init__(self, point, num):
        super().__init__()
        self.theta, self.point = nn.Parameter(torch.zeros(num)), point

    def forward(self, z):
        return self.point(self.theta).expand(len(z), -1)


def circle(theta):
    return torch.stack([theta[0].cos(), theta[0].sin()])


def polar(theta):
    return torch.stack([theta[0] * theta[1].cos(), theta[0] * theta[1].sin()])


def distance(point, start, end, **kwargs):
    ends = ({"theta": torch.tensor(values)} for values in (start, end))
    generator = Curve(point, len(start))
    return flow_distance(generator, torch.ones(3, 1), lambda x: x, *ends, **kwargs)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (2.0, 0.5), (0.0, 3.0)])
@pytest.mark.parametrize("angle", [0.5, 2.0])
def test_one_parameter_has_one_path(alpha, beta, angle):
    """On the circle m' has norm 1: the distance is sqrt(alpha + beta) times the angle."""
    found = distance(circle, [0.1], [0.1 + angle], alpha=alpha, beta=beta)
    exact = math.sqrt(alpha + beta) * angle
    assert found.straight == pytest.approx(exact, rel=1e-6)
    assert found.upper == pytest.approx(exact, rel=1e-6)
    chord = math.sqrt(alpha * (2 * math.sin(angle / 2)) ** 2 + beta * angle**2)
    assert found.lower == pytest.approx(chord, rel=1e-12)
    assert found.lower <= found.upper + 1e-12


def test_geodesic_of_polar_coordinates_is_the_straight_line_of_the_plane():
    """Without beta the metric is the plane's: the geodesic is a chord, and no line of theta."""
    found = distance(polar, [1.0, 0.0], [2.0, 1.5], alpha=4.0, beta=1e-8, num_segments=16)
    chord = math.sqrt(1 + 4 - 4 * math.cos(1.5))
    assert found.lower == pytest.approx(2 * chord, rel=1e-6)
    assert found.upper == pytest.approx(2 * chord, rel=1e-3)
    # Along the straight line rho = 1 + t, phi = 1.5 t: the integral of sqrt(1 + 2.25 (1 + t)^2).
    grid = (torch.arange(10000) + 0.5) / 10000
    expected = 2 * (1 + 2.25 * (1 + grid) ** 2).sqrt().mean()
    assert found.straight == pytest.approx(float(expected), rel=1e-6)
    assert found.straight > 1.05 * found.upper
    points = torch.stack([polar(theta) for theta in found.path])
    across = points - points[0]
    direction = (points[-1] - points[0]) / (points[-1] - points[0]).norm()
    assert float((across - (across @ direction)[:, None] * direction).norm(dim=1).max()) < 0.02


def test_more_sides_come_nearer_to_the_distance():
    found = [
        distance(polar, [1.0, 0.0], [2.0, 1.5], alpha=1.0, beta=0.1, num_segments=n)
        for n in (1, 2, 4, 8)
    ]
    assert found[0].upper == pytest.approx(found[0].straight, rel=1e-12)
    assert all(a.upper > b.upper for a, b in itertools.pairwise(found))
    assert all(f.lower <= f.upper <= f.straight for f in found)


def flow(num_steps=12, alpha=1.0, beta=0.05):
    generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    features = RandomFourierFeatures(Gaussian(1.5), in_features=2, num_features=12)
    z, target = torch.randn(30, 2), features(torch.randn(50, 2) + 1).mean(0)
    weights = {"alpha": alpha, "beta": beta}
    states = list(
        generator_flow(
            generator, z, features, target, step_size=0.1, num_steps=num_steps, **weights
        )
    )
    return generator, z, features, states, weights


def test_distance_of_what_a_flow_has_gone():
    generator, z, features, states, weights = flow()
    ends = states[0].parameters, states[-1].parameters
    found = flow_distance(generator, z, features, *ends, **weights, num_segments=4)
    moved = flatten(list(ends[1].values())) - flatten(list(ends[0].values()))
    gap = [features(torch.func.functional_call(generator, p, z)).mean(0) for p in ends]
    chord = weights["alpha"] * (gap[1] - gap[0]).square().sum() + weights["beta"] * moved @ moved
    assert found.lower == pytest.approx(float(chord.sqrt()), rel=1e-12)
    assert found.lower <= found.upper <= found.straight
    low, high = found.straightness(states[-1].length)
    assert 0.3 < low <= high <= 1.0
    assert low == pytest.approx(found.lower / states[-1].length, rel=1e-12)


def test_metric_is_that_of_the_speed_of_the_flow():
    """A short straight step along J^T w has the length dt (alpha ||D f||^2 + beta <f, D f>)^1/2."""
    generator, z, features, states, weights = flow(num_steps=0)
    (state,) = states
    moved, offset = {}, 0
    for name, p in state.parameters.items():
        moved[name] = p + 1e-4 * state.velocity[offset : offset + p.numel()].reshape(p.shape)
        offset += p.numel()
    found = flow_distance(generator, z, features, state.parameters, moved, **weights)
    assert found.straight == pytest.approx(1e-4 * math.sqrt(state.squared_speed), rel=1e-3)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": 0.0, "beta": 0.0}, "not both zero"),
        ({"alpha": -1.0}, "finite alpha, beta >= 0"),
        ({"num_segments": 0}, "num_segments >= 1"),
        ({"num_iterations": -1}, "num_iterations >= 0"),
    ],
)
def test_wrong_arguments_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        distance(circle, [0.0], [1.0], **({"alpha": 1.0, "beta": 1.0} | kwargs))


def test_parameters_of_another_generator_are_refused():
    with pytest.raises(ValueError, match=r"end must hold .*Take GeneratorState.parameters"):
        distance(lambda theta: theta[:1], [0.0], [1.0, 2.0], alpha=1.0, beta=1.0)
    found = distance(circle, [0.0], [1.0], alpha=1.0, beta=1.0)
    with pytest.raises(ValueError, match="length > 0, got 0"):
        found.straightness(0.0)
