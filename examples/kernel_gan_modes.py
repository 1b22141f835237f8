r"""Points against a kernel critic: modes lost and found, and rates that theory knows beforehand.

    python examples/kernel_gan_modes.py

Three tables of `kernel_gan_flow` (Becker et al. 2022, arXiv 2305.08277). `sweep`: target points at
1 and -1, generated points at 1.6 and 1.7; the bandwidth decides whether the second mode is found,
missed, or whether a point is driven away for ever. The authors' masses are random, without a seed:
beside equal masses stands the pair of masses that fits their five published results. `rates`: the
contraction measured near the target beside the predicted spectral radius. `grid`: the published
hyperparameters of one point on another beside those of `suggest_hyperparameters`.
"""

import cmath
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from reporting import new_figure, save_figure, save_table
from torch import Tensor

from lightning_mmd import (
    Gaussian,
    convergence_rates,
    kernel_gan_flow,
    suggest_hyperparameters,
)
from lightning_mmd.kernel_gan import KernelGANState

PUBLISHED = {0.1: 1e3, 0.25: 1.6e2, 0.5: 2.5, 0.75: 0.55, 1.0: 0.2}  # bandwidth: final W2^2
FITTED = {"point_masses": (0.05, 0.95), "target_masses": (0.325, 0.675)}  # of 1.6, 1.7; of 1, -1
EQUAL = {"point_masses": (0.5, 0.5), "target_masses": (0.5, 0.5)}
LEARNING_RATES = ((1.0, 0.1), (0.1, 0.1), (0.1, 0.01), (0.01, 0.01))  # critic, generator


def positions(
    points: Sequence[float],
    target: Sequence[float],
    bandwidth: float,
    *,
    point_masses: Sequence[float],
    target_masses: Sequence[float],
    num_steps: int,
    **rates: float,
) -> Tensor:
    """Return the points' positions on the line, (num_steps + 1, m)."""
    y, x, q, p = (
        torch.tensor(values, dtype=torch.float64)
        for values in (points, target, point_masses, target_masses)
    )
    masses = {"point_weights": q, "target_weights": p}
    options = {"num_steps": num_steps, "truncation": 1e-12, **masses, **rates}
    states = kernel_gan_flow(y[:, None], x[:, None], Gaussian(bandwidth), **options)
    return torch.stack([state.points[:, 0] for state in states])


def contraction(series: Tensor) -> float:
    """Return the larger root of the second-order recursion that a series obeys."""
    lagged = torch.stack([series[1:-1], series[:-2]], 1)  # x'' = trace x' - determinant x
    trace, minus_determinant = torch.linalg.lstsq(lagged, series[2:]).solution.tolist()
    root = cmath.sqrt(0.25 * trace**2 + minus_determinant)
    return max(abs(0.5 * trace + root), abs(0.5 * trace - root))


def measure(bandwidth: float, norm_weight: float, mass: float, num: int) -> dict[str, float]:
    """Measure the contraction of points of one mass around a target point of mass 1."""
    rates = {"norm_weight": norm_weight, "critic_lr": 0.1, "generator_lr": 0.1}
    theory = convergence_rates(bandwidth=bandwidth, **rates, generated_mass=mass, num_generated=num)
    x, masses = torch.zeros(1, 1, dtype=torch.float64), torch.full((num,), mass).double()
    measured = 0.0
    for start in ([1e-4, 1e-4], [1e-4, -1e-4])[:num]:  # the points' mean, their difference
        # Points pushed off the target, under a critic that is still in equilibrium there.
        at_rest = KernelGANState(
            points=torch.tensor(start[:num], dtype=torch.float64)[:, None],
            target_coefficients=x.new_full((1,), 1 / norm_weight),
            history=x.expand(num, 1),
            history_coefficients=masses / norm_weight,
            step=0,
            mmd2=math.nan,
        )
        weights = {"point_weights": masses, "target_weights": x.new_ones(1)}
        flow = kernel_gan_flow(at_rest, x, Gaussian(bandwidth), num_steps=80, **weights, **rates)
        measured = max(measured, contraction(torch.cat([state.points[0] for state in flow])))
    setting = {"bandwidth": bandwidth, "norm_weight": norm_weight, "mass": mass, "points": num}
    predicted = theory.spectral_radius
    error = abs(measured - predicted)
    return {**setting, "predicted": predicted, "measured": measured, "error": error}


def compare(setting: tuple[float, tuple[float, float], float], num_steps: int) -> dict[str, float]:
    """Run a published setting, and what is suggested in its place; one point 0.1 off the target."""
    bandwidth, (critic_lr, generator_lr), norm_weight = setting
    advice = suggest_hyperparameters(
        bandwidth, max_critic_lr=critic_lr, max_generator_lr=generator_lr
    )
    row = {"bandwidth": bandwidth, "critic_lr": critic_lr, "generator_lr": generator_lr}
    row |= {"norm_weight": norm_weight, "suggested": advice.norm_weight}
    published = {"critic_lr": critic_lr, "generator_lr": generator_lr, "norm_weight": norm_weight}
    suggested = {name: getattr(advice, name) for name in published}
    for name, rates in (("", published), ("_suggested", suggested)):
        masses = {"point_masses": [1.0], "target_masses": [1.0]}
        y = positions([0.1], [0.0], bandwidth, num_steps=num_steps, **masses, **rates)
        row["radius" + name] = convergence_rates(bandwidth=bandwidth, **rates).spectral_radius
        row["distance2" + name] = float(y[-1].square())
    return row


def steps_to_tenth(radius: float) -> float:
    """Return the steps after which a deviation is a tenth, at least 1; 1e5 for never."""
    return math.log(0.1) / math.log(max(radius, 0.1)) if radius < 1 else 1e5


def draw_map(
    axes: Any, map_size: int, bandwidths: Sequence[float], norm_weights: Sequence[float]
) -> Any:
    """Draw the slowest factor over bandwidth and norm weight; return what a colour bar is about."""
    widths, weights = torch.logspace(-1.5, 1, map_size), torch.logspace(-2, 1, map_size)
    learning = {"critic_lr": 0.1, "generator_lr": 0.1, "generated_mass": 0.4, "num_generated": 2}
    radius = torch.empty(map_size, map_size)
    for (i, weight), (j, width) in product(enumerate(weights.tolist()), enumerate(widths.tolist())):
        theory = convergence_rates(bandwidth=width, norm_weight=weight, **learning)
        radius[i, j] = min(1.1, max(theory.spectral_radius, theory.critic_mode))
    levels = [0.9 + 0.01 * i for i in range(11)]
    shades = axes.contourf(widths, weights, radius, levels, cmap="viridis", extend="both")
    axes.contour(widths, weights, radius, levels=[1.0], colors="red")
    axes.plot(widths, math.sqrt(0.4 * 0.2) / widths, "w--", label="fastest, published formula")
    axes.plot(*zip(*product(bandwidths, norm_weights), strict=True), "w.", label="measured")
    axes.set(xscale="log", yscale="log", ylim=(0.01, 10), xlabel="bandwidth")
    axes.set(ylabel="norm weight", title="slowest factor a step (red: 1)")
    axes.legend(fontsize=7, loc="lower left", labelcolor="white", facecolor="0.3")
    return shades


def main(
    sweep_steps: int = 1999,
    bandwidths: Sequence[float] = (0.3, 0.5, 1.0, 2.0),
    norm_weights: Sequence[float] = (0.2, 0.5, 1.0, 2.0),
    grid_steps: int = 1000,
    grid_bandwidths: Sequence[float] = (0.1, 1.0, 10.0),
    map_size: int = 80,
    directory: Path = Path(__file__).parent,
) -> dict[str, list[dict[str, float]]]:
    """Measure, print, save tables and figure; return the tables."""
    figure = new_figure(13.5, 3.8)
    sweep_axes, map_axes, grid_axes = figure.subplots(1, 3)

    game = {"norm_weight": 1.0, "critic_lr": 0.1, "generator_lr": 0.01, "num_steps": sweep_steps}
    sweep = []
    for bandwidth, published in PUBLISHED.items():
        row = {"bandwidth": bandwidth, "published_W2^2": published}
        for name, masses in (("fitted", FITTED), ("equal", EQUAL)):
            y = positions([1.6, 1.7], [1.0, -1.0], bandwidth, **masses, **game)
            w2 = (y.sort(1).values - torch.tensor([-1.0, 1.0])).square().mean(1)
            row[name + "_masses"] = w2[-1].item()
            if masses is FITTED:
                (line,) = sweep_axes.semilogy(w2, label=f"bandwidth {bandwidth:g}")
                sweep_axes.plot(sweep_steps, published, "o", color=line.get_color(), clip_on=False)
        sweep.append(row)
    sweep_axes.set(title="W2² to the target (dots: published)", xlabel="step")
    sweep_axes.legend(fontsize=7)

    cases = ((0.8, 1), (0.4, 2))  # masses of the generated points and their number: surplus 0.2
    settings = list(product(bandwidths, norm_weights, cases))
    rates = [measure(bandwidth, weight, *case) for bandwidth, weight, case in settings]
    shades = draw_map(map_axes, map_size, bandwidths, norm_weights)
    figure.colorbar(shades, ax=map_axes)

    points = product(grid_bandwidths, LEARNING_RATES, (1.0, 0.1, 0.01))
    grid = [compare(setting, grid_steps) for setting in points]
    for bandwidth in grid_bandwidths:
        rows = [row for row in grid if row["bandwidth"] == bandwidth]
        theirs, ours = (
            [steps_to_tenth(r[n]) for r in rows] for n in ("radius", "radius_suggested")
        )
        grid_axes.loglog(theirs, ours, "o", alpha=0.7, label=f"bandwidth {bandwidth:g}")
    grid_axes.axline((1, 1), (10, 10), color="0.5")
    grid_axes.axvspan(7e4, 2e5, color="0.92")
    grid_axes.text(1.2e5, 20, "unstable", rotation=90, ha="center", fontsize=8)
    grid_axes.set(xlabel="with a published setting", ylabel="with the suggested one")
    grid_axes.set(title="steps to a tenth: below the line is faster")
    grid_axes.legend(fontsize=7, loc="upper left")
    for axes in (sweep_axes, grid_axes):
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, directory / "figures/kernel_gan_modes.png")

    tables = {"sweep": sweep, "rates": rates, "grid": grid}
    for name, rows in tables.items():
        save_table(rows, directory / f"results/kernel_gan_{name}.csv")
    return tables


if __name__ == "__main__":
    main()
