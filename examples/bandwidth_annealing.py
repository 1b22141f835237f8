r"""A kernel whose width shrinks while one trains, against the best fixed width.

    python examples/bandwidth_annealing.py

Becker et al. (arXiv 2305.08277) advise to shrink the effective width of the critic's kernel during
training: a wide one has a slope between modes that are far apart, a narrow one resolves them. Two
trainings on eight Gaussians on a ring, both by W2^2 to the target, which favours no width:

* points that follow the flow of MMD^2 in steps of c * bandwidth^2, all from one mode; every fixed
  width with its best c, the shrinking one with one c;
* a generator under `MMDGAN` in closed form, whose random Fourier features `BandwidthSchedule`
  narrows. Its steps are of second order and cross the flat parts of a kernel anyhow: nothing is to
  be gained there, and the table shows it.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, Trainer
from point_flow import start
from reporting import new_figure, save_figure, save_table
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.data import DataLoader
from witness_fields import mixture

from lightning_mmd import (
    MMDGAN,
    BandwidthSchedule,
    ClosedForm,
    Gaussian,
    LearnedKernelCritic,
    RandomFourierFeatures,
    point_flow,
)
from lightning_mmd.networks import MLPGenerator

WIDEST = 3.0
NARROWEST = {"points": 0.1, "generator": 0.35}
FIXED = (0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
FACTORS = (1.0, 3.0, 8.0)  # c; 8 is too long a step for a width that shrinks
STAGE = 10  # steps of a width
SHRINKING = "shrinking"

Curve = list[tuple[int, float]]


def w2(x: Tensor, y: Tensor) -> float:
    """Return W2^2 of two samples of one size, by the best assignment."""
    cost = torch.cdist(x, y).square()
    rows, columns = linear_sum_assignment(cost.numpy())
    return float(cost[rows, columns].mean())


def shrinking(num_steps: int) -> list[float]:
    """Return a width for each stage, from the widest to the narrowest in equal ratios."""
    stages = max(2, num_steps // STAGE)
    ratio = NARROWEST["points"] / WIDEST
    return [WIDEST * ratio ** (i / (stages - 1)) for i in range(stages)]


def flow_points(seed: int, widths: Sequence[float], factor: float, num_particles: int) -> Curve:
    """Follow the points' flow, a stage for each width."""
    x, y = start(seed, num_particles)
    curve = [(0, w2(x, y))]
    for number, width in enumerate(widths, start=1):
        step_size = factor * width**2
        *_, last = point_flow(y, x, Gaussian(width), step_size=step_size, num_steps=STAGE)
        y = last.particles
        curve.append((number * STAGE, w2(x, y)))
    return curve


class Distance(Callback):
    """W2^2 of fresh samples of generator and target, on the clock of generator updates."""

    def __init__(self, every_n_steps: int, num_samples: int = 400) -> None:
        self.every_n_steps = every_n_steps
        self.curve: Curve = []
        torch.manual_seed(2**20)
        self.target = mixture(8, num_samples // 8)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:  # noqa: D102
        self.measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:  # noqa: D102
        if trainer.global_step % self.every_n_steps == 0:
            self.measure(trainer, pl_module)

    def measure(self, trainer: Trainer, pl_module: MMDGAN) -> None:
        """Draw samples and compare."""
        num = len(self.target)
        samples = pl_module.sample(num, pl_module.fixed_latents(num, seed=trainer.global_step))
        self.curve.append((trainer.global_step, w2(self.target, samples.to(self.target))))


def train_generator(seed: int, width: float | None, num_updates: int) -> Curve:
    """Train with features of a fixed width, or None for one that shrinks."""
    torch.manual_seed(seed)
    narrowest = NARROWEST["generator"]
    kernel = Gaussian(narrowest if width is None else width)
    features = RandomFourierFeatures(kernel, 2, 512, seed=seed)
    model = MMDGAN(
        MLPGenerator(2, 8, (64, 64)),
        LearnedKernelCritic(nn.Identity(), 2, features),
        ClosedForm(beta=1e-2, max_iterations=8),
        latents=8,
        seed=seed,
    )
    distance = Distance(max(1, num_updates // 20))
    callbacks: list[Callback] = [distance]
    if width is None:
        callbacks.append(BandwidthSchedule(WIDEST / narrowest, num_steps=num_updates))
    trainer = Trainer(
        max_steps=num_updates,
        max_epochs=-1,
        callbacks=callbacks,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    dtype = next(model.generator.parameters()).dtype
    trainer.fit(model, DataLoader(mixture(8, 320).to(dtype), batch_size=256, shuffle=True))
    return distance.curve


def summarise(training: str, width: str, curves: Sequence[Curve], level: float) -> dict[str, Any]:
    """Return a width's row: where its curves end, and when they fall below a level."""
    ends = [curve[-1][1] for curve in curves]
    below = [next((step for step, value in curve if value < level), None) for curve in curves]
    reached = [step for step in below if step is not None]
    shown = f"{WIDEST:g} to {NARROWEST[training]:g}" if width == SHRINKING else width
    row: dict[str, Any] = {"training": training, "bandwidth": shown, "w2_median": median(ends)}
    row |= {"w2_min": min(ends), "w2_max": max(ends)}
    row["steps_to_best_fixed"] = median(reached) if len(reached) > len(curves) / 2 else "-"
    return row


def main(
    seeds: int = 3,
    num_steps: int = 400,
    num_updates: int = 200,
    num_particles: int = 160,
    directory: Path = Path(__file__).parent,
) -> list[dict[str, Any]]:
    """Train with every width; print, save the table and the figure.

    Args:
        seeds: Number of seeds.
        num_steps: Steps of the points' flow, a multiple of 10.
        num_updates: Updates of the generator.
        num_particles: Points, a multiple of 8.
        directory: Where results go.
    """
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_default_dtype(torch.float64)
    stages = num_steps // STAGE
    points: dict[str, list[Curve]] = {}
    for width in FIXED:
        trials = [
            [flow_points(seed, [width] * stages, c, num_particles) for seed in range(seeds)]
            for c in FACTORS
        ]
        points[f"{width:g}"] = min(trials, key=lambda curves: median(c[-1][1] for c in curves))
    points[SHRINKING] = [
        flow_points(seed, shrinking(num_steps), FACTORS[1], num_particles) for seed in range(seeds)
    ]
    torch.set_default_dtype(torch.float32)
    generators = {
        f"{width:g}": [train_generator(seed, width, num_updates) for seed in range(seeds)]
        for width in FIXED
    }
    generators[SHRINKING] = [train_generator(seed, None, num_updates) for seed in range(seeds)]

    figure = new_figure(9, 3.4)
    rows = []
    for axes, (training, runs) in zip(
        figure.subplots(1, 2), {"points": points, "generator": generators}.items(), strict=True
    ):
        ends = {width: median(c[-1][1] for c in curves) for width, curves in runs.items()}
        best = min(ends[f"{width:g}"] for width in FIXED)
        for number, (width, curves) in enumerate(runs.items()):
            rows.append(summarise(training, width, curves, level=best))
            shrinks = width == SHRINKING
            middle = [
                (step, median(curve[i][1] for curve in curves))
                for i, (step, _) in enumerate(curves[0])
            ]
            style = {"color": "k" if shrinks else f"C{number}", "lw": 2 if shrinks else 1}
            axes.semilogy(*zip(*middle, strict=True), label=width, **style)
        axes.set(title=training, xlabel="steps" if training == "points" else "updates")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(ylabel="$W_2^2$, median over seeds")
    axes.legend(title="bandwidth", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save_table(rows, directory / "results/bandwidth_annealing.csv")
    save_figure(figure, directory / "figures/bandwidth_annealing.png")
    return rows


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
