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

__all__ = ["StepHalving", "bilinear_game", "step_halving"]

Verdict = Literal["converged", "not yet", "no limit"]


@dataclass(frozen=True)
class StepHalving:
    """Result of :func:`step_halving`.

    Attributes:
        cumulative_lr: The common axis, of shape (k,).
        curves: Mean curves over seeds, of shape (num_halvings + 1, k), the longest steps first.
        distances: Root-mean-square distance of each curve from that with half its step, in units of
            the first curve's range, of length num_halvings.
        spread: Standard error over seeds of the mean curve, in the same units and averaged over the
            axis; 0 for one seed.
        verdict: ``"converged"``: the last distance is below the tolerance or the seeds' spread;
            ``"not yet"``: it is above, but fell by a quarter or more at the last halving, as for a
            method of order one whose steps are still long; ``"no limit"``: it did not fall.
    """

    cumulative_lr: Tensor
    curves: Tensor
    distances: tuple[float, ...]
    spread: float
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
        seeds: Seeds to average over.
        tolerance: Relative distance that counts as none, > 0.
        num_points: Points of the common axis.

    Returns:
        Curves, distances and verdict.

    Raises:
        ValueError: If an argument is out of range or a curve has another length.

    Source:
        Turinici, arXiv 2012.10410, the convergence criterion.

    Example:
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
    axis = torch.linspace(0.0, step_size * num_steps, num_points, dtype=torch.float64)
    samples = torch.stack(
        [
            torch.stack(
                [
                    _on_axis(run(step_size / 2**k, num_steps * 2**k, seed), axis, num_steps * 2**k)
                    for seed in seeds
                ]
            )
            for k in range(num_halvings + 1)
        ]
    )  # (levels, seeds, points)
    curves = samples.mean(1)
    scale = float(curves[0].max() - curves[0].min()) or 1.0
    distances = tuple(float(d.square().mean().sqrt()) / scale for d in curves.diff(dim=0))
    spread = 0.0
    if len(seeds) > 1:
        spread = float(samples.std(1).mean()) / len(seeds) ** 0.5 / scale
    return StepHalving(axis, curves, distances, spread, _verdict(distances, spread, tolerance))


def _on_axis(curve: Tensor, axis: Tensor, num_steps: int) -> Tensor:
    if curve.shape != (num_steps + 1,):
        raise ValueError(
            f"a run of {num_steps} steps must return the metric at {num_steps + 1} points, its "
            f"start included, got shape {tuple(curve.shape)}."
        )
    curve = curve.detach().double()
    position = axis / axis[-1] * num_steps
    left = position.floor().long().clamp(max=num_steps - 1)
    return torch.lerp(curve[left], curve[left + 1], position - left)


def _verdict(distances: Sequence[float], spread: float, tolerance: float) -> Verdict:
    *_, before, last = distances
    if last <= max(tolerance, spread):
        return "converged"
    return "not yet" if last <= 0.75 * before else "no limit"


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
