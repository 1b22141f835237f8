"""How many of 4 x 4 learning rates fail on digits: closed form and gradient ascent.

A cell fails where MMD^2 does not end below a tenth of its start. Gradient ascent gets five times
the updates of the closed form. Cells in ``results/learning_rates.json`` are not repeated.

    python benchmarks/learning_rates.py
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from headline import ROOT  # noqa: F401  (puts the examples' reporting on the path)
from jsonargparse import auto_cli
from reporting import new_figure, save_figure, save_table
from runs import Run, train

ETAS = (0.05, 0.4, 1.0, 2.5)
RATES = (1e-4, 1e-3, 1e-2, 1e-1)
METHODS = {
    "closed form": ("digits_closed_form.yaml", {}),
    "closed form, trust region": ("digits_closed_form.yaml", {"model.rule.trust_region": {}}),
    "gradient ascent": ("digits_gradient_ascent.yaml", {}),
    "gradient ascent, alpha = 0": ("digits_gradient_ascent.yaml", {"model.rule.alpha": 0.0}),
}


def adam(lr: float) -> dict[str, Any]:
    """An optimizer of the configurations with another learning rate."""
    return {"class_path": "torch.optim.Adam", "init_args": {"lr": lr, "betas": [0.0, 0.9]}}


def cells(config: str) -> dict[tuple[float, float], dict[str, Any]]:
    """Options of the grid of a configuration, by the learning rates of generator and critic."""
    constant = {"model.generator_scheduler": None}
    if config == "digits_closed_form.yaml":
        return {
            (eta, rate): constant | {"model.rule.eta": eta, "model.critic_optimizer": adam(rate)}
            for eta in ETAS
            for rate in RATES
        }
    return {
        (first, second): constant
        | {"model.generator_optimizer": adam(first), "model.critic_optimizer": adam(second)}
        for first in RATES
        for second in RATES
    }


def main(
    num_updates: int = 60,
    ascent_factor: int = 5,
    seed: int = 0,
    directory: Path = Path(__file__).parent,
) -> list[dict[str, Any]]:
    """Train the grids, print how many cells fail, save tables and picture.

    Args:
        num_updates: Generator updates of the closed form.
        ascent_factor: As many times more for gradient ascent.
        seed: Seed of all runs.
        directory: Where results go.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    path = directory / "results/learning_rates.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = json.loads(path.read_text()) if path.exists() else {}
    figure = new_figure(3.3 * len(METHODS), 3.2)
    rows, table = [], []
    for axes, (name, (config, options)) in zip(
        figure.subplots(1, len(METHODS)), METHODS.items(), strict=True
    ):
        updates = num_updates * (1 if config == "digits_closed_form.yaml" else ascent_factor)
        grid = cells(config)
        runs = []
        for rates, cell in grid.items():
            key = f"{name}, {rates}, {updates}, {seed}"
            if key not in stored:
                run = train(config, cell | options, seed=seed, num_updates=updates, cadence=updates)
                stored[key] = asdict(run)
                path.write_text(json.dumps(stored, indent=0))
            runs.append(Run(**stored[key]))
        ends = [run.mmd2[-1] for run in runs]
        for rates, run in zip(grid, runs, strict=True):
            row = {"method": name, "generator": rates[0], "critic": rates[1]}
            table.append(row | {"MMD^2": f"{run.mmd2[-1]:.4g}", "failed": run.failed})
        rows.append(
            {
                "method": name,
                "updates": updates,
                "failed of 16": sum(run.failed for run in runs),
                "median MMD^2": f"{median(ends):.4f}",
                "best": f"{min(ends):.4f}",
                "worst": f"{max(ends):.4f}",
            }
        )
        image = torch.tensor(ends).nan_to_num(posinf=10.0).clamp(1e-3, 10.0).log10().view(4, 4)
        axes.imshow(image, cmap="RdYlGn_r", vmin=-2.5, vmax=0.3)
        for index, run in enumerate(runs):
            axes.text(index % 4, index // 4, f"{run.mmd2[-1]:.2g}", ha="center", va="center")
        firsts = list(dict.fromkeys(rates[0] for rates in grid))
        axes.set(xticks=range(4), xticklabels=RATES, yticks=range(4), yticklabels=firsts)
        label = "eta" if config == "digits_closed_form.yaml" else "generator's learning rate"
        axes.set(xlabel="critic's learning rate", ylabel=label)
        axes.set_title(f"{name}, {updates} updates", fontsize=8)
    save_figure(figure, directory / "figures/learning_rates.png")
    save_table(table, directory / "results/learning_rates_cells.csv")
    save_table(rows, directory / "results/learning_rates.csv")
    return rows


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
