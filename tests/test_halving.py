import itertools
import math

import pytest
import torch

from lightning_mmd.halving import bilinear_game, step_halving


def euler(step_size, num_steps, seed=0):
    """Euler steps of m' = -m."""
    return (1 - step_size) ** torch.arange(num_steps + 1.0)


def test_distances_are_those_of_euler_and_fall_by_half():
    result = step_halving(euler, step_size=0.2, num_steps=20, num_halvings=5, tolerance=1e-4)
    exact = (-result.cumulative_lr).exp()
    errors = [float((curve - exact).square().mean().sqrt()) for curve in result.curves]
    for before, after in itertools.pairwise(errors):
        assert before / after == pytest.approx(2.0, rel=0.15)
    for before, after in zip(result.distances, result.distances[1:], strict=False):
        assert before / after == pytest.approx(2.0, rel=0.15)
    assert result.verdict == "not yet"
    assert step_halving(euler, step_size=0.01, num_steps=400).verdict == "converged"
    assert result.cumulative_lr[-1] == pytest.approx(4.0)


def test_a_game_whose_outcome_depends_on_the_step_has_no_limit():
    def chaotic(step_size, num_steps, seed):
        """The logistic map at a rate that the step does not rescale."""
        values = [0.3 + step_size]
        for _ in range(num_steps):
            values.append(3.9 * values[-1] * (1 - values[-1]))
        return torch.tensor(values)

    result = step_halving(chaotic, step_size=0.1, num_steps=100, num_halvings=3)
    assert result.verdict == "no limit"
    assert min(result.distances) > 0.1


def test_seeds_are_averaged_and_their_spread_is_reported():
    def noisy(step_size, num_steps, seed):
        noise = torch.randn((), generator=torch.Generator().manual_seed(seed))
        return euler(step_size, num_steps) + 0.5 * noise

    result = step_halving(noisy, step_size=0.1, num_steps=30, seeds=range(50))
    noises = torch.stack(
        [torch.randn((), generator=torch.Generator().manual_seed(s)) for s in range(50)]
    )
    scale = 1 - 0.9**30
    assert result.spread == pytest.approx(float(0.5 * noises.std() / 50**0.5 / scale), rel=1e-6)
    lone = step_halving(noisy, step_size=0.1, num_steps=30, seeds=[0])
    assert lone.spread == 0.0
    assert lone.distances == pytest.approx(result.distances)  # the noise is common


@pytest.mark.parametrize("step_size", [0.5, 0.1, 0.01])
def test_the_bilinear_game_runs_around_its_ellipse(step_size):
    start, target = (1.5, 0.2), 0.5
    points = torch.tensor(
        list(bilinear_game(*start, step_size=step_size, num_steps=2000, target=target))
    )
    x, y = points[:, 0] - target, points[:, 1]
    invariant = x**2 + y**2 + step_size * x * y
    assert (invariant - invariant[0]).abs().max() < 1e-11
    angle = 2 * math.asin(step_size / 2)  # of one step: cos(angle) = 1 - tau^2 / 2
    turns = (x[:-1] * x[1:] < 0).sum() / 2
    assert float(turns) == pytest.approx(2000 * angle / (2 * math.pi), abs=1.0)


def test_the_games_trajectory_converges_although_the_game_does_not():
    def distance(step_size, num_steps, seed):
        points = bilinear_game(1.0, 0.0, step_size=step_size, num_steps=num_steps)
        return torch.tensor([x for x, _ in points])

    result = step_halving(distance, step_size=0.1, num_steps=200, num_halvings=4, tolerance=0.01)
    assert result.distances[0] / result.distances[1] == pytest.approx(2.0, rel=0.2)
    limit = result.cumulative_lr.cos()
    assert float((result.curves[-1] - limit).abs().max()) < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_size": 0.0}, "step_size > 0"),
        ({"num_halvings": 1}, "num_halvings >= 2"),
        ({"seeds": []}, "at least one seed"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        step_halving(euler, **({"step_size": 0.1, "num_steps": 5} | change))
    with pytest.raises(ValueError, match="at 6 points"):
        step_halving(lambda *_: torch.zeros(3), step_size=0.1, num_steps=5)
