import itertools
import math

import pytest
import torch

from lightning_mmd.flows import point_flow
from lightning_mmd.halving import bilinear_game, compare_halvings, step_halving
from lightning_mmd.kernel_gan import kernel_gan_flow
from lightning_mmd.kernels import Gaussian


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
    assert result.noise < 1e-12  # the same at every step size
    assert result.seed_distances == pytest.approx(result.distances)
    lone = step_halving(noisy, step_size=0.1, num_steps=30, seeds=[0])
    assert lone.spread == 0.0
    assert lone.distances == pytest.approx(result.distances)  # the noise is common


def random_walk(step_size, num_steps, seed):
    """Noise of mini-batches along a descent: its variance over a stretch scales with the step."""
    generator = torch.Generator().manual_seed(round(seed + 1e6 * step_size))
    steps = torch.randn(num_steps, generator=generator) * step_size
    return euler(step_size, num_steps) + torch.cat([torch.zeros(1), steps.cumsum(0)])


def test_noise_of_mini_batches_leaves_0_71_of_a_distance_and_averages_out():
    run = {"step_size": 0.01, "num_steps": 100, "tolerance": 1e-4}
    result = step_halving(random_walk, seeds=range(1000), **run)
    assert result.seed_distances[1] / result.seed_distances[0] == pytest.approx(0.5**0.5, rel=0.05)
    assert result.distances[1] < 0.2 * result.seed_distances[1]
    # the mean over the axis of the variance of both walks, s * eta / 2 and s * eta / 4, s to 1
    exact = ((0.005 + 0.0025) / 2 / 1000) ** 0.5 / (1 - 0.99**100)
    assert result.noise == pytest.approx(exact, rel=0.1)
    assert result.verdict == "not yet"


def test_curves_on_axes_of_their_own_are_compared_on_the_common_one():
    def curve(*axis):
        return torch.tensor(axis), 3.0 * torch.tensor(axis) + 1.0

    straight = [[curve(0.0, 0.7, 2.0)], [curve(0.0, 0.1, 1.5, 2.5)], [curve(0.5, 2.0)]]
    result = compare_halvings(straight)
    assert result.cumulative_lr[[0, -1]].tolist() == [0.5, 2.0]
    assert max(result.distances) < 1e-15
    shifted = [[(axis, values + 0.9 * k)] for k, ((axis, values),) in enumerate(straight)]
    assert compare_halvings(shifted).distances == pytest.approx((0.2, 0.2))  # range 3 * 1.5
    assert compare_halvings(shifted).verdict == "no limit"
    assert compare_halvings(shifted, tolerance=0.21).verdict == "converged"
    with pytest.raises(ValueError, match="a quarter of it"):
        compare_halvings(straight[:2])
    with pytest.raises(ValueError, match="of the same seeds"):
        compare_halvings([straight[0] * 2, *straight[1:]])
    with pytest.raises(ValueError, match="that rise"):
        compare_halvings([[curve(0.0, 0.0)], *straight[1:]])


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


@pytest.mark.parametrize("flow", ["critic", "witness"])
@pytest.mark.parametrize(("bandwidth", "left"), [(0.5, False), (1.0, True)])
def test_a_collapse_is_a_limit_of_the_dynamics_of_a_narrow_kernel(flow, bandwidth, left):
    """Two targets, both points near one. Shorter steps change nothing; a wider kernel does.

    So the halving test passes in a collapse too, and no learning rate leaves it. (Turinici has
    collapse unstable as the step falls, Becker et al. stable for kernel critics: the latter holds.)
    """
    target, start = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.6], [1.7]])
    kernel, ends = Gaussian(bandwidth), []

    def run(step_size, num_steps, seed):
        if flow == "critic":
            states = kernel_gan_flow(
                start,
                target,
                kernel,
                norm_weight=1.0,
                critic_lr=step_size,
                generator_lr=step_size,
                num_steps=num_steps,
                truncation=1e-6,
            )
        else:
            states = point_flow(start, target, kernel, step_size=step_size, num_steps=num_steps)
        curve = [state.mmd2 for state in states]
        ends.append(curve[-1])
        return torch.tensor(curve)

    result = step_halving(run, step_size=0.25, num_steps=100)
    assert result.verdict == "converged"
    if left:
        assert max(ends) < 0.2 * float(result.curves[0, 0])
    else:
        assert min(ends) > 0.35
        assert max(ends) - min(ends) < 0.01
