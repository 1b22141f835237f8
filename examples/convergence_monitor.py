"""Which verdict ConvergenceMonitor reaches on games whose outcome is known beforehand."""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

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

CASES = {  # expected verdicts, alpha, the critic's learning rate, spread of the latents
    "alpha = 1": (("converging", "converged"), 1.0, 5e-2, 1.0),
    "alpha = 0": (("cycling",), 0.0, 5e-2, 1.0),
    "latents squeezed 100 times": (("collapsed",), 1.0, 5e-2, 0.01),
    "critic rate / 100": (("critic too weak",), 1.0, 5e-4, 1.0),
    "critic rate * 100": (("critic too strong",), 1.0, 5.0, 1.0),
}


def mixture(num: int, seed: int) -> torch.Tensor:
    """Draw from four Gaussians of width 0.2 at (+-1.5, +-1.5)."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (num, 2), generator=generator) * 2 - 1
    return 1.5 * signs + 0.2 * torch.randn(num, 2, generator=generator)


def play(
    seed: int, alpha: float, critic_lr: float, spread: float, num_updates: int = 300
) -> ConvergenceMonitor:
    """Train once against a critic on random Fourier features; return the monitor."""
    torch.manual_seed(seed)
    features = RandomFourierFeatures(Gaussian(2.0), 2, 128, seed=seed)
    model = MMDGAN(
        MLPGenerator(2, 2, (32, 32)),
        LearnedKernelCritic(nn.Identity(), 2, features),
        alpha=alpha,
        beta=0.01 * alpha,
        critic_mode="adversarial",
        generator_optimizer=lambda p: torch.optim.Adam(p, lr=5e-3, betas=(0.0, 0.9)),
        critic_optimizer=lambda p: torch.optim.Adam(p, lr=critic_lr, betas=(0.0, 0.9)),
        sample_latents=lambda num: spread * torch.randn(num, 2),
        seed=seed,
    )
    monitor = ConvergenceMonitor(every_n_steps=5, seed=seed)
    trainer = Trainer(
        max_steps=num_updates,
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
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = []
    for case, (expected, alpha, critic_lr, spread) in CASES.items():
        monitors = [play(seed, alpha, critic_lr, spread) for seed in seeds]
        names = [monitor.verdict.name for monitor in monitors if monitor.verdict]
        for seed, monitor in zip(seeds, monitors, strict=True):
            print(f"{case}, seed {seed}: {monitor.verdict}", flush=True)
        counts = {name: names.count(name) for name in VERDICTS}
        right = sum(name in expected for name in names)
        rows.append({"case": case, "right": right, "of": len(seeds)} | counts)
    save_table(rows, directory / "results/convergence_monitor.csv")
    return rows


if __name__ == "__main__":
    main()
