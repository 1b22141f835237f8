r"""The learning-rate-halving test: do the curves of a training converge as its step size falls?

A training of T steps with learning rate eta follows a limit dynamics only if 2T steps with eta / 2
draw the same curve over the cumulative learning rate :math:`s = \sum_t \eta_t`. A run that cycles
or has lost modes by accident fails the test, however flat its curve looks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_mmd.points import require_tensors

__all__ = ["StepHalving", "bilinear_game", "compare_halvings", "step_halving"]

Verdict = Literal["converged", "not yet", "no limit"]
Curve = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class StepHalving:
    """Result of :func:`step_halving` and :func:`compare_halvings`.

    Attributes:
        cumulative_lr: The common axis, of shape (k,).
        curves: Mean curves over seeds, of shape (num_halvings + 1, k), the longest steps first.
        distances: Root-mean-square distance of each curve from that with half its step, in units of
            the first curve's range, of length num_halvings.
        seed_distances: The same seed by seed, root-mean-square over seeds; nothing averages out.
        spread: Standard error over seeds of the mean curve, in the same units and averaged over the
            axis: how much starts and noise matter; 0 for one seed.
        noise: Standard error over seeds of the last difference of two curves, likewise. Seeds share
            their start, so it is what the last distance would be of noise alone; 0 for one seed.
        verdict: ``"converged"``: the last distance is within the tolerance; ``"not yet"``: it is
            above, but that of the seeds fell by 15 % or more at the last halving; ``"no limit"``:
            it did not fall. A method of order one halves it, noise of mini-batches alone leaves
            0.71 of it, a run without a limit all of it.
    """

    cumulative_lr: Tensor
    curves: Tensor
    distances: tuple[float, ...]
    seed_distances: tuple[float, ...]
    spread: float
    noise: float
    verdict: Verdict


def step_halving(
    run: Callable[[float, int, int], Tensor],
    *,
    step_size: float,
    num_steps: int,
    num_halvings: int = 2,
    seeds: Sequence[int] = (0,),
    tolerance: float = 0.02,
    num_points: int = 200,
) -> StepHalving:
    r"""Compare trainings with (eta, T), (eta/2, 2T), (eta/4, 4T), ... from one start and noise.

    With stochastic gradients or Adam the noise along s scales with eta too: take several seeds, and
    hold (1 - beta) / eta of Adam fixed or use SGD.

    Args:
        run: Callable (step_size, num_steps, seed) -> metric after 0, 1, ..., num_steps steps, of
            shape (num_steps + 1,). Equal seeds must mean an equal start and equal noise.
        step_size: The longest step eta, > 0.
        num_steps: Its number of steps T, >= 1.
        num_halvings: How often to halve, >= 2: a distance says nothing until it is seen to fall.
        seeds: Seeds to average over, at least one.
        tolerance: Relative distance that counts as none, > 0.
        num_points: Points of the common axis.

    Returns:
        Curves, distances and verdict.

    Raises:
        TypeError: If a run returns no tensor.
        ValueError: If an argument is out of range, a curve has another length, or a value is not
            finite.

    Source:
        Turinici, arXiv 2012.10410, the convergence criterion.

    Examples:
        >>> def decay(step_size, num_steps, seed):
        ...     return (1 - step_size) ** torch.arange(num_steps + 1.0)
        >>> step_halving(decay, step_size=0.1, num_steps=40).verdict
        'converged'
    """
    if not (step_size > 0 and num_steps >= 1 and num_halvings >= 2 and seeds and tolerance > 0):
        raise ValueError(
            "step_halving needs step_size > 0, num_steps >= 1, num_halvings >= 2, tolerance > 0 "
            f"and at least one seed, got {step_size}, {num_steps}, {num_halvings}, {tolerance} and "
            f"{list(seeds)}."
        )

    def curve(halving: int, seed: int) -> Curve:
        num = num_steps * 2**halving
        values = run(step_size / 2**halving, num, seed)
        require_tensors("step_halving", metric=values)
        if values.shape != (num + 1,):
            raise ValueError(
                f"a run of {num} steps must return the metric at {num + 1} points, its start "
                f"included, got shape {tuple(values.shape)}."
            )
        return torch.linspace(0.0, step_size * num_steps, num + 1, dtype=torch.float64), values

    curves = [[curve(k, seed) for seed in seeds] for k in range(num_halvings + 1)]
    return compare_halvings(curves, tolerance=tolerance, num_points=num_points)


def compare_halvings(
    curves: Sequence[Sequence[Curve]], *, tolerance: float = 0.02, num_points: int = 200
) -> StepHalving:
    """Compare trainings that have run already, each with steps half as long as the ones before.

    Args:
        curves: ``curves[k][i]`` is the run of seed i with steps halved k times: cumulative learning
            rate, rising, and metric, both of shape (m,), at points of its own.
        tolerance: Relative distance that counts as none, > 0.
        num_points: Points of the common axis, on which curves are interpolated linearly.

    Returns:
        Curves, distances and verdict.

    Raises:
        TypeError: If a curve is no pair of tensors.
        ValueError: If there are fewer than three levels, a level lacks a seed, an axis does not
            rise, or a value is not finite.

    Source:
        Turinici, arXiv 2012.10410, the convergence criterion.
    """
    num_seeds = len(curves[0]) if curves else 0
    if len(curves) < 3 or num_seeds == 0 or any(len(level) != num_seeds for level in curves):
        raise ValueError(
            "compare_halvings needs runs with the step and with a half and a quarter of it at "
            f"least, of the same seeds, got {[len(level) for level in curves]} runs a level."
        )
    for axis, metric in (curve for level in curves for curve in level):
        require_tensors("compare_halvings", axis=axis, metric=metric)
        if not metric.isfinite().all():
            raise ValueError(
                "a curve needs finite values, got NaN or infinity: the training has diverged, at "
                "this step size at least. Start from a smaller step."
            )
        if len(axis) < 2 or not (axis.diff() > 0).all():
            raise ValueError(
                "a curve needs two points or more, at cumulative learning rates that rise, got "
                f"{axis.tolist()[:5]}."
            )
    ends = [float(axis[-1]) for level in curves for axis, _ in level]
    starts = [float(axis[0]) for level in curves for axis, _ in level]
    axis = torch.linspace(max(starts), min(ends), num_points, dtype=torch.float64)
    samples = torch.stack(
        [torch.stack([_interpolate(*curve, axis) for curve in level]) for level in curves]
    )  # (levels, seeds, points)
    means = samples.mean(1)
    scale = float(means[0].max() - means[0].min()) or 1.0
    changes = samples.diff(dim=0)
    distances = _sizes(changes.mean(1), scale)
    seed_distances = _sizes(changes.flatten(1), scale)
    spread = noise = 0.0
    if num_seeds > 1:
        spread = float(samples.std(1).mean()) / num_seeds**0.5 / scale
        noise = float(changes[-1].var(0).mean().sqrt()) / num_seeds**0.5 / scale
    verdict = _verdict(distances[-1], seed_distances, tolerance)
    return StepHalving(axis, means, distances, seed_distances, spread, noise, verdict)


def _sizes(changes: Tensor, scale: float) -> tuple[float, ...]:
    return tuple(float(change.square().mean().sqrt()) / scale for change in changes)


def _interpolate(points: Tensor, values: Tensor, axis: Tensor) -> Tensor:
    points, values = points.detach().double().cpu(), values.detach().double().cpu()
    right = torch.searchsorted(points, axis).clamp(1, len(points) - 1)
    left = right - 1
    position = (axis - points[left]) / (points[right] - points[left])
    return torch.lerp(values[left], values[right], position)


def _verdict(distance: float, seed_distances: Sequence[float], tolerance: float) -> Verdict:
    if distance <= tolerance:
        return "converged"
    *_, before, last = seed_distances
    return "not yet" if last <= 0.85 * before else "no limit"


def bilinear_game(
    x: float, y: float, *, step_size: float, num_steps: int, target: float = 0.0
) -> Iterator[tuple[float, float]]:
    r"""Play the bilinear game of a generator x against a critic y by alternating gradient steps.

    .. math:: y_{n+1} = y_n + \tau (x_n - x_r), \qquad x_{n+1} = x_n - \tau y_{n+1}

    It never converges: in the limit of small steps it runs around a circle about (x_r, 0), and for
    any :math:`\tau < 2` around the ellipse
    :math:`(x - x_r)^2 + y^2 + \tau (x - x_r) y = const`, exactly.

    Args:
        x: The generator's start.
        y: The critic's start.
        step_size: tau, > 0.
        num_steps: Steps to make.
        target: x_r.

    Yields:
        (x, y) after 0, 1, ..., num_steps steps.

    Source:
        Turinici, arXiv 2012.10410 (with a minus sign in the second step, without which the game is
        hyperbolic).
    """
    yield x, y
    for _ in range(num_steps):
        y = y + step_size * (x - target)
        x = x - step_size * y
        yield x, y
