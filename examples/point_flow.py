r"""Particles that follow the MMD flow get stuck; with noise injected they do not.

    python examples/point_flow.py

The experiment of Arbel et al. (arXiv 1906.04370) with targets that the plain flow misses: eight
Gaussians on a ring, all particles at one of them, a kernel much narrower than the ring. A user
would try a grid of schedules on a few runs and keep the best: the three best of them are played on
new seeds against two rules that adapt. `AdaptiveNoise` takes the largest level with a guaranteed
descent. `PlateauNoise` lowers the level where the flow rests, from the root-mean-square distance of
the target's points from their mean to the kernel's bandwidth, below which it ends, and stays under
a line that ends with the run. All MMD^2 are biased, in the flow's own kernel, and thus at least 0.

The column `stuck` gauges whether the plain flow could go on from the end: the regularised negative
Sobolev distance as a share of the largest value that it can have, MMD / sqrt(epsilon). Where no
particle feels a gradient it is 1.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, pstdev

import torch
from jsonargparse import auto_cli
from reporting import new_figure, save_figure, save_table
from torch import Tensor
from witness_fields import centres, mixture, num_modes_found

from lightning_mmd import Gaussian, point_flow
from lightning_mmd.flows import PointState
from lightning_mmd.noise import (
    AdaptiveNoise,
    ConstantNoise,
    GeometricNoise,
    HalvingNoise,
    NoiseSchedule,
    PlateauNoise,
)
from lightning_mmd.sobolev import negative_sobolev_distance

Noise = NoiseSchedule | AdaptiveNoise | PlateauNoise | None
KERNEL = Gaussian(0.4)
STEP_SIZE = 1.0
EPSILON = 1e-4
PLAIN, GUARANTEED, PLATEAU = "no noise", "AdaptiveNoise", "PlateauNoise"
LINE = "PlateauNoise that only follows its line"
TUNING, FRESH = 100, 200  # first seeds


def hand_tuned(num_steps: int) -> dict[str, Noise]:
    """Schedules over which one would search: levels, and when they fall or end."""
    grid: dict[str, Noise] = {}
    for level in (0.25, 0.5, 1.0, 2.0):
        for part in (0.25, 0.5, 0.75):
            until = round(part * num_steps)
            grid[f"constant {level} until {until}"] = ConstantNoise(level, until)
        for number in (5, 10, 20):
            every = max(1, num_steps // number)
            grid[f"{level} halved every {every}"] = HalvingNoise(level, every)
        for end in (1e-1, 1e-2, 1e-3):
            grid[f"geometric {level} to {end} of it"] = GeometricNoise(
                level, end ** (1 / num_steps)
            )
    return grid


def start(seed: int, num_particles: int) -> tuple[Tensor, Tensor]:
    """Return target and particles of a seed."""
    torch.manual_seed(seed)
    x = mixture(8, num_particles // 8)
    return x, centres(1) + 0.15 * torch.randn_like(x)


def play(seed: int, noise: Noise, num_steps: int, num_particles: int) -> Iterator[PointState]:
    """Follow one flow."""
    x, y = start(seed, num_particles)
    rng = torch.Generator().manual_seed(seed)
    return point_flow(y, x, KERNEL, step_size=STEP_SIZE, num_steps=num_steps, noise=noise, rng=rng)


def plateau(num_steps: int, num_particles: int, **options: int) -> PlateauNoise:
    """Return the rule with what is known of the run: sizes of data and kernel, and its length."""
    x, _ = start(TUNING, num_particles)
    spread = float((x - x.mean(0)).square().sum(1).mean().sqrt())
    return PlateauNoise(spread, smallest=KERNEL.bandwidth, until=num_steps, **options)


def stuck(x: Tensor, y: Tensor, mmd2: float) -> float:
    """Return the gauge: 1 where the plain flow rests."""
    distance = negative_sobolev_distance(x, y, KERNEL, regulariser=EPSILON)
    return distance * math.sqrt(EPSILON / mmd2)


@dataclass
class Result:
    """What came of a schedule, by seed.

    Args:
        curves: MMD^2 of every state.
        levels: Its noise.
        ends: The last states.
        cpu_seconds: Processor time.
    """

    curves: list[list[float]]
    levels: list[list[float]]
    ends: list[PointState]
    cpu_seconds: float

    @property
    def finals(self) -> list[float]:
        """The last MMD^2 of each seed."""
        return [state.mmd2 for state in self.ends]

    @property
    def median(self) -> float:
        """The median of the last MMD^2."""
        return median(self.finals)


def follow(noise: Noise, seeds: range, num_steps: int, num_particles: int) -> Result:
    """Follow the flow of every seed to its end."""
    result, begin = Result([], [], [], 0.0), time.process_time()
    for seed in seeds:
        curve, levels = [], []
        for state in play(seed, noise, num_steps, num_particles):
            curve.append(state.mmd2)
            levels.append(state.noise)
        result.curves.append(curve)
        result.levels.append(levels)
        result.ends.append(state)
    result.cpu_seconds = time.process_time() - begin
    return result


def paired_ratio(finals: list[float], reference: list[float]) -> dict[str, float]:
    """Return the geometric mean of the ratios of the same runs, and its relative standard error."""
    logs = [math.log(a / b) for a, b in zip(finals, reference, strict=False)]
    error = pstdev(logs) / math.sqrt(max(1, len(logs) - 1))
    return {"over_best_tuned": math.exp(mean(logs)), "standard_error": error}


def draw(shown: dict[str, Result], num_particles: int, path: Path) -> None:
    """Draw where the particles of the first seed end, and every seed's curve and noise."""
    figure = new_figure(3.1 * (len(shown) + 2), 3.1)
    *panels, curve_axes, level_axes = figure.subplots(1, len(shown) + 2)
    x, _ = start(FRESH, num_particles)
    for number, (axes, (name, result)) in enumerate(zip(panels, shown.items(), strict=True)):
        axes.plot(*x.T, ".", color="0.75", ms=2)
        axes.plot(*result.ends[0].particles.T, "o", color=f"C{number}", ms=2.5)
        axes.set(title=name, xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
        for run, (curve, levels) in enumerate(zip(result.curves, result.levels, strict=True)):
            style = {"color": f"C{number}", "lw": 0.6, "label": name if run == 0 else None}
            curve_axes.semilogy(curve, **style)
            level_axes.semilogy(range(1, len(levels)), levels[1:], **style)
    curve_axes.set(xlabel="steps", title="MMD$^2$")
    level_axes.set(xlabel="steps", title="noise level", ylim=(1e-3, 5))
    curve_axes.legend(fontsize=6, frameon=False)
    for axes in (curve_axes, level_axes):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def main(
    seeds: int = 30,
    tuning_seeds: int = 5,
    num_steps: int = 1500,
    num_particles: int = 160,
    directory: Path = Path(__file__).parent,
) -> dict[str, list[dict[str, object]]]:
    """Play all schedules; print, save tables and figure; return the tables.

    Args:
        seeds: Runs of `PlateauNoise` and of the best schedules of the grid.
        tuning_seeds: Runs of every schedule of the grid, with other seeds, and of the two that stay
            far behind, which need no more.
        num_steps: Steps of a run.
        num_particles: Particles, and points of the target.
        directory: Where tables and figure go.
    """
    torch.set_default_dtype(torch.float64)
    tuning, fresh = range(TUNING, TUNING + tuning_seeds), range(FRESH, FRESH + seeds)
    grid = hand_tuned(num_steps)
    tuned = {name: follow(noise, tuning, num_steps, num_particles) for name, noise in grid.items()}
    best, *others = sorted(tuned, key=lambda name: tuned[name].median)[:3]
    players: dict[str, Noise] = {
        PLAIN: None,
        GUARANTEED: AdaptiveNoise(largest=KERNEL.bandwidth),
        PLATEAU: plateau(num_steps, num_particles),
        LINE: plateau(num_steps, num_particles, window=num_steps + 1),
        **{name: grid[name] for name in (best, *others)},
    }
    few = fresh[:tuning_seeds]
    results = {
        name: follow(noise, few if name in (PLAIN, GUARANTEED) else fresh, num_steps, num_particles)
        for name, noise in players.items()
    }
    table: list[dict[str, object]] = [
        {
            "seeds": f"{first}-{first + len(result.ends) - 1}",
            "noise": name,
            "mmd2_median": result.median,
            "mmd2_min": min(result.finals),
            "mmd2_max": max(result.finals),
            **paired_ratio(result.finals, reference.finals),
            "cpu_seconds": round(result.cpu_seconds, 1),
        }
        for first, some, reference in (
            (FRESH, results, results[best]),
            (TUNING, tuned, tuned[best]),
        )
        for name, result in some.items()
    ]
    shown = {name: results[name] for name in (PLAIN, GUARANTEED, PLATEAU, best)}
    ends = []
    for name, result in shown.items():
        for seed, state in zip(fresh, result.ends, strict=False):
            x, _ = start(seed, num_particles)
            gauge = stuck(x, state.particles, state.mmd2)
            found = num_modes_found(state.particles)
            row = {"noise": name, "seed": seed, "mmd2": state.mmd2, "modes": found}
            ends.append({**row, "stuck": gauge})
    save_table(table, directory / "results/point_flow.csv")
    save_table(ends, directory / "results/point_flow_ends.csv")
    draw(shown, num_particles, directory / "figures/point_flow.png")
    return {"schedules": table, "ends": ends}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
