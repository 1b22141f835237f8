"""Closed form against gradient ascent: MMD^2 by updates, images seen, processor time and FLOPs.

Trains digits (5 seeds) and, with ``--data_root`` of a folder that has it, MNIST (3 seeds). Runs in
``results/headline.json`` are not repeated, so that it can be stopped and resumed; delete the file
after a change of the methods.

    python benchmarks/headline.py --data_root data
"""

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from runs import ROOT, Run, train

sys.path.append(str(ROOT / "examples"))
from reporting import new_figure, save_figure, save_table

LEVELS = {"digits": (0.1, 0.03, 0.01, 0.005), "mnist": (0.3, 0.1, 0.05, 0.03, 0.02)}
SHAPES = {"digits": [1, 8, 8], "mnist": [1, 28, 28]}
BANDWIDTHS = {"digits": 6.0, "mnist": 15.0}
CHANNELS = {"digits": [16, 32], "mnist": [16, 32, 64]}
# Without the penalty the witness is delta / beta and the update plain gradient descent on MMD^2 / 2
# with rate eta; 1 was the best of 1, 3, 10, 30 on digits.
PLAIN = {"model.rule.alpha": 0.0, "model.rule.beta": 1.0, "model.rule.eta": 1.0}
COLOURS = ["C0", "C2", "C1", "C4", "C5", "C3"]


def fixed(data: str) -> dict[str, Any]:
    """512 random features of a Gaussian kernel on pixels."""
    shape = SHAPES[data]
    kernel = {"class_path": "Gaussian", "init_args": {"bandwidth": BANDWIDTHS[data]}}
    sizes = {"in_features": shape[0] * shape[1] * shape[2], "num_features": 512}
    return {"class_path": "RandomFourierFeatures", "init_args": {"kernel": kernel, **sizes}}


def learned(data: str) -> dict[str, Any]:
    """The same, plus a tenth of the kernel of 256 learned features."""
    sizes = {"sample_shape": SHAPES[data], "num_features": 256, "channels": CHANNELS[data]}
    network = {"class_path": "ConvFeatures", "init_args": sizes}
    arguments = {"maps": [fixed(data), network], "weights": [1.0, 0.1]}
    return {"class_path": "SumFeatures", "init_args": arguments}


def closed_form(data: str, features: dict[str, Any], num: int, **model: Any) -> dict[str, Any]:
    """Options of a closed-form training on given features."""
    critic = {"features": features, "num_features": num}
    options = {f"model.{name}": value for name, value in model.items()}
    return options | {f"model.critic.init_args.{name}": value for name, value in critic.items()}


def decay(num_updates: int) -> dict[str, Any]:
    """A learning rate that falls linearly to a twentieth."""
    arguments = {"start_factor": 1.0, "end_factor": 0.05, "total_iters": num_updates}
    return {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": arguments}


def methods(data: str) -> dict[str, tuple[str, dict[str, Any], int]]:
    """Return configuration, options and number of updates by the name of a method."""
    short, long = {"digits": (50, 600), "mnist": (60, 300)}[data]
    flow = {"rule.beta": 0.01, "rule.eta": 0.5, "generator_scheduler": decay(short)}
    ours, adversary = f"{data}_closed_form.yaml", f"{data}_gradient_ascent.yaml"

    def on_fixed(**model: Any) -> dict[str, Any]:
        flow["rule.max_iterations"] = 8
        return closed_form(data, fixed(data), 512, **flow, **model)

    def on_learned(**model: Any) -> dict[str, Any]:
        flow["rule.max_iterations"] = 3
        return closed_form(data, learned(data), 768, **flow, **model)

    return {
        "closed form, fixed kernel": (ours, on_fixed(), short),
        "closed form, learned kernel": (ours, on_learned(), short),
        "gradient ascent": (adversary, {}, long),
        "closed form, fixed kernel, alpha = 0": (ours, on_fixed() | PLAIN, short),
        "closed form, learned kernel, alpha = 0": (ours, on_learned() | PLAIN, short),
        "gradient ascent, alpha = 0": (adversary, {"model.rule.alpha": 0.0}, long),
    }


def collect(data: str, seeds: range, path: Path, data_root: str | None) -> dict[str, list[Run]]:
    """Train what is not in the file yet; return the runs of each method."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    runs: dict[str, list[Run]] = {}
    for seed in seeds:
        for name, (config, options, num_updates) in methods(data).items():
            key = f"{data}, {name}, {num_updates} updates, {seed}"
            if key not in stored:
                run = train(
                    config,
                    options,
                    seed=seed,
                    num_updates=num_updates,
                    cadence=5 if num_updates < 300 else 20,
                    data_root=data_root if data == "mnist" else None,
                )
                stored[key] = asdict(run)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(stored, indent=0))
                print(f"{key}: {run.mmd2[-1]:.4f} {run.error[:60]}", flush=True)
            runs.setdefault(name, []).append(Run(**stored[key]))
    return runs


def compare(data: str, runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """One row for each method and level: medians over the seeds that reached it."""
    rows = []
    for name, trained in runs.items():
        for level in LEVELS[data]:
            reached = [(run, step) for run in trained if (step := run.first_below(level))]
            row: dict[str, Any] = {"data": data, "method": name, "MMD^2 below": level}
            row["seeds"] = f"{len(reached)} of {len(trained)}"
            for unit in ("updates", "images", "seconds", "TFLOP"):
                row[unit] = "-"
            if len(reached) > len(trained) / 2:
                row["updates"] = median(step for _, step in reached)
                row["images"] = round(median(s * run.images_per_update for run, s in reached))
                row["seconds"] = round(median(s * run.seconds_per_update for run, s in reached), 1)
                tera = (s * run.flops_per_update / 1e12 for run, s in reached)
                row["TFLOP"] = round(median(tera), 3)
            rows.append(row)
    return rows


def draw(results: dict[str, dict[str, list[Run]]], path: Path) -> None:
    """Draw each seed's curve against the four units."""
    figure = new_figure(14, 3.6 * len(results))
    grid = figure.subplots(len(results), 4, squeeze=False)
    units = {
        "generator updates": lambda run: 1.0,
        "images seen": lambda run: run.images_per_update,
        "processor seconds": lambda run: run.seconds_per_update,
        "TFLOP": lambda run: run.flops_per_update / 1e12,
    }
    for line, (data, runs) in zip(grid, results.items(), strict=True):
        for axes, (unit, scale) in zip(line, units.items(), strict=True):
            for colour, (name, trained) in zip(COLOURS, runs.items(), strict=True):
                for index, run in enumerate(trained):
                    label = name if index == 0 else None
                    steps = [scale(run) * step for step in run.steps[1:]]
                    values = [max(v, 1e-3) for v in run.mmd2[1:]]
                    axes.loglog(steps, values, color=colour, lw=0.9, alpha=0.8, label=label)
            axes.set(xlabel=unit, ylim=(1e-3, 5))
            axes.tick_params(axis="x", which="minor", labelbottom=False)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set(ylabel=f"{data}: MMD$^2$ to held-out data")
    grid[0][0].legend(fontsize=6)
    save_figure(figure, path)


def main(
    data_root: str | None = None,
    digits_seeds: int = 5,
    mnist_seeds: int = 3,
    directory: Path = Path(__file__).parent,
) -> list[dict[str, Any]]:
    """Train, print the table, save it with the curves and the picture.

    Args:
        data_root: Folder with MNIST; without one, digits alone.
        digits_seeds: Number of seeds on digits.
        mnist_seeds: Number of seeds on MNIST.
        directory: Where results go.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    path = directory / "results/headline.json"
    results = {"digits": collect("digits", range(digits_seeds), path, None)}
    if data_root is not None:
        results["mnist"] = collect("mnist", range(mnist_seeds), path, data_root)
    rows = [row for data, runs in results.items() for row in compare(data, runs)]
    save_table(rows, directory / "results/headline.csv")
    draw(results, directory / "figures/headline.png")
    return rows


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
