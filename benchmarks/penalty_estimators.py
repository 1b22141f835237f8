"""Cheap estimates of the parametric penalty: bias, spread, FLOPs, and what training makes of them.

    python benchmarks/penalty_estimators.py

Bias and spread are relative to the penalty over a population of 4,096 latents, at the generator and
critic that 200 updates with the estimator ``batch`` have made of the mixture. FLOPs are those of a
whole training iteration on digits, critic and generator. Final MMD^2 is unbiased, of held-out data
against fresh samples, after equally many updates.
"""

import argparse
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from flops import Flops
from lightning.pytorch import LightningDataModule, Trainer
from parity import RESULTS, save_table
from torch import Tensor

from lightning_mmd import (
    MMDGAN,
    Batch,
    Gaussian,
    GradientAscent,
    Lagged,
    LearnedKernelCritic,
    MMDTracker,
    RationalQuadratic,
    Split,
    SumKernel,
    parametric_gradient,
    parametric_gradient_penalty,
)
from lightning_mmd.data import DigitsDataModule, GaussianMixtureDataModule
from lightning_mmd.networks import ConvFeatures, ConvGenerator, MLPFeatures, MLPGenerator

METHODS: dict[str, dict[str, Any]] = {
    "no penalty": {"alpha": 0.0},
    "batch": {},
    "split": {"estimator": Split()},
    "lagged": {"estimator": Lagged()},
    "batch, on a quarter": {"fraction": 0.25},
}
MIXTURE_BATCH, DIGITS_BATCH, LATENT_DIM = 128, 64, 16
UPDATES = {"mixture": 300, "digits": 200}
KERNELS = {
    "mixture": Gaussian(0.5),
    "digits": SumKernel([RationalQuadratic(a, bandwidth=8.0) for a in (0.2, 0.5, 1.0, 2.0, 5.0)]),
}


def make_model(task: str, seed: int, **arguments: Any) -> MMDGAN:
    """Return an adversarial model with fresh networks."""
    torch.manual_seed(seed)
    if task == "mixture":
        generator = MLPGenerator(2, LATENT_DIM, (64, 64))
        critic = LearnedKernelCritic(MLPFeatures(2, 64, (64, 64)), 64)
    else:
        generator = ConvGenerator((1, 8, 8), LATENT_DIM, (32, 16))
        critic = LearnedKernelCritic(ConvFeatures((1, 8, 8), 256, (16, 32)), 256)
    rule = GradientAscent(
        **({"alpha": 1.0, "beta": 0.01, "estimator": Batch(), "share_samples": False} | arguments)
    )
    return MMDGAN(
        generator,
        critic,
        rule,
        latents=LATENT_DIM,
        seed=seed,
        generator_optimizer=_adam,
        critic_optimizer=_adam,
    )


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3, betas=(0.0, 0.9))


def make_data(task: str, seed: int) -> LightningDataModule:
    """Return a mixture of eight Gaussians on a ring, or digits."""
    if task == "mixture":
        return GaussianMixtureDataModule(
            num_modes=8, radius=2.0, std=0.05, batch_size=MIXTURE_BATCH, seed=seed
        )
    return DigitsDataModule(batch_size=DIGITS_BATCH, seed=seed)


def train(model: MMDGAN, task: str, num_updates: int, seed: int) -> float:
    """Train, and return the MMD^2 at the end, infinite where training diverged."""
    tracker = MMDTracker(KERNELS[task], every_n_steps=num_updates, floor=False)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=num_updates,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[tracker],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(model, datamodule=make_data(task, seed))
    except RuntimeError as error:
        if "diverged" not in str(error):
            raise
        return float("inf")
    return tracker.last or 0.0


def spread(model: MMDGAN, arguments: dict[str, Any], num_batches: int) -> tuple[float, float]:
    """Return bias and standard deviation of one step's penalty, relative to the population's."""
    if arguments.get("alpha") == 0.0:
        return -1.0, 0.0
    critic, generator = model.critic, model.generator
    population = torch.randn(4096, LATENT_DIM, generator=torch.Generator().manual_seed(0))
    whole = parametric_gradient_penalty(critic, generator, population).detach()
    rng = torch.Generator().manual_seed(1)
    num = int(MIXTURE_BATCH * arguments.get("fraction", 1.0))

    def draw(num: int) -> Tensor:
        return population[torch.randint(len(population), (num,), generator=rng)]

    values = []
    for _ in range(num_batches):
        estimator = arguments.get("estimator", Batch())
        if isinstance(estimator, Lagged):
            estimator.observe(parametric_gradient(critic, generator, draw(MIXTURE_BATCH)))
        value = parametric_gradient_penalty(critic, generator, draw(num), estimator=estimator)
        values.append(float(value / whole))
    return fmean(values) - 1, stdev(values)


def flops(arguments: dict[str, Any]) -> float:
    """Return the FLOPs of a training iteration on digits, averaged over eight."""
    counts = []
    for num_updates in (1, 9):  # the first has no lagged direction, nor what a fit does around
        model = make_model("digits", 0, **arguments)
        with Flops() as counter:
            train(model, "digits", num_updates, 0)
        counts.append(counter.total)
    return (counts[1] - counts[0]) / 8


def main(
    num_updates: Mapping[str, int] = UPDATES,
    mixture_seeds: int = 10,
    digits_seeds: int = 10,
    num_batches: int = 400,
    methods: Sequence[str] = tuple(METHODS),
    output: Path = RESULTS,
) -> list[dict[str, Any]]:
    """Measure every estimator, print the table, save it, and return it."""
    warnings.simplefilter("ignore")
    trained = make_model("mixture", 0)
    train(trained, "mixture", min(num_updates["mixture"], 200), 0)
    least = flops(METHODS["no penalty"])
    rows = []
    for name in methods:
        arguments = METHODS[name]
        bias, deviation = spread(trained, arguments, num_batches)
        ends = {
            task: [
                train(make_model(task, s, **arguments), task, num_updates[task], s) for s in seeds
            ]
            for task, seeds in {
                "mixture": range(mixture_seeds),
                "digits": range(digits_seeds),
            }.items()
        }
        row: dict[str, Any] = {"estimator": name, "bias": f"{bias:.2f}", "std": f"{deviation:.2f}"}
        row["FLOPs"] = f"{flops(arguments) / least:.2f}"
        for task, values in ends.items():
            row[f"{task} mean"] = f"{fmean(values):.4f}"
            row[f"{task} std"] = f"{stdev(values):.4f}" if len(values) > 1 else ""
            row[f"{task} worst"] = f"{max(values):.4f}"
        print(row, flush=True)
        rows.append(row)
    save_table(rows, output / "penalty_estimators.csv")
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    main(output=parser.parse_args().output)
