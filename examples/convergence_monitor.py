"""Which verdict ConvergenceMonitor reaches on games whose outcome is known beforehand."""

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from reporting import save_table
from torch import nn
from torch.utils.data import DataLoader

from lightning_mmd import (
    MMDGAN,
    ConvergenceMonitor,
    Gaussian,
    LearnedKernelCritic,
    RandomFourierFeatures,
)
from lightning_mmd.module import DivergedError
from lightning_mmd.networks import MLPGenerator
from lightning_mmd.verdicts import VERDICTS


class Case(NamedTuple):
    """A game with a known outcome.

    Attributes:
        expected: Verdicts that are right.
        alpha: Weight of the penalty.
        rates: Learning rates of generator and critic.
        adam: Adam with betas (0, 0.9) on both sides, or plain SGD.
        spread: Of the latents.
        num_updates: Of the generator.
    """

    expected: tuple[str, ...]
    alpha: float
    rates: tuple[float, float]
    adam: bool = True
    spread: float = 1.0
    num_updates: int = 300


GOOD, PLAIN = ("converging", "converged"), {"rates": (0.03, 1.0), "adam": False, "num_updates": 600}
CASES = {
    "alpha = 1": Case(GOOD, 1.0, (5e-3, 5e-2)),
    "alpha = 1, SGD": Case(GOOD, 1.0, **PLAIN),
    "alpha = 0, SGD": Case(("cycling",), 0.0, **PLAIN),
    "latents squeezed 100 times": Case(("collapsed",), 1.0, (5e-3, 5e-2), spread=0.01),
    "critic rate / 100": Case(("critic too weak",), 1.0, (5e-3, 5e-4)),
    "critic rate * 100": Case(("critic too strong",), 1.0, (5e-3, 5.0)),
}


def mixture(num: int, seed: int) -> torch.Tensor:
    """Draw from four Gaussians of width 0.2 at (+-1.5, +-1.5)."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (num, 2), generator=generator) * 2 - 1
    return 1.5 * signs + 0.2 * torch.randn(num, 2, generator=generator)


def play(seed: int, case: Case) -> ConvergenceMonitor:
    """Train once against a critic on random Fourier features; return the monitor."""

    def optimizer(lr: float) -> Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]:
        if case.adam:
            return lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.9))
        return lambda parameters: torch.optim.SGD(parameters, lr=lr)

    torch.manual_seed(seed)
    features = RandomFourierFeatures(Gaussian(2.0), 2, 128, seed=seed)
    model = MMDGAN(
        MLPGenerator(2, 2, (32, 32)),
        LearnedKernelCritic(nn.Identity(), 2, features),
        alpha=case.alpha,
        beta=0.01 * case.alpha,
        critic_mode="adversarial",
        generator_optimizer=optimizer(case.rates[0]),
        critic_optimizer=optimizer(case.rates[1]),
        sample_latents=lambda num: case.spread * torch.randn(num, 2),
        seed=seed,
    )
    monitor = ConvergenceMonitor(every_n_steps=5, seed=seed)
    trainer = Trainer(
        max_steps=case.num_updates,
        max_epochs=-1,
        callbacks=[monitor],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(model, DataLoader(mixture(2560, seed), batch_size=256, shuffle=True))
    except DivergedError as error:
        print(f"seed {seed}: {error}")
    return monitor


def main(
    seeds: Sequence[int] = range(10), directory: Path = Path(__file__).parent
) -> list[dict[str, object]]:
    """Play every case with every seed; print and save how often each verdict came out."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    rows = []
    for name, case in CASES.items():
        monitors = [play(seed, case) for seed in seeds]
        verdicts = [monitor.verdict.name for monitor in monitors if monitor.verdict]
        for seed, monitor in zip(seeds, monitors, strict=True):
            print(f"{name}, seed {seed}: {monitor.verdict}", flush=True)
        counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
        right = sum(verdict in case.expected for verdict in verdicts)
        rows.append({"case": name, "right": right, "of": len(seeds)} | counts)
    save_table(rows, directory / "results/convergence_monitor.csv")
    return rows


if __name__ == "__main__":
    main()
