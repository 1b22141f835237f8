"""Which verdict ConvergenceMonitor reaches on games whose outcome is known beforehand.

    python examples/convergence_monitor.py

Two of a linear critic and a generator that shifts a mixture: the bilinear game, which without the
penalty runs on a circle. Four games of a fixed kernel under Adam: a sound one, latents that cannot
spread, and critics whose learning rate is 100 times below one that works (0.02) or above one that
works (0.05). Two of the learned kernel of `mixture_of_gaussians.py` under plain SGD, with the
penalty and without; the latter mostly cycles, but what becomes of a seed is not known beforehand.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Trainer
from mixture_of_gaussians import (
    ALPHA,
    BETA,
    CENTRES,
    CRITIC_LR,
    DEVIATION,
    FEATURES_LR,
    GENERATOR_LR,
    start,
)
from reporting import save_table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mmd import (
    MMDGAN,
    Batch,
    ConvergenceMonitor,
    Gaussian,
    GradientAscent,
    LearnedKernelCritic,
    RandomFourierFeatures,
)
from lightning_mmd.module import DivergedError
from lightning_mmd.networks import MLPGenerator
from lightning_mmd.verdicts import VERDICTS


def mixture(num: int, deviation: float, seed: int) -> Tensor:
    """Draw from four Gaussians at (+-1.5, +-1.5)."""
    generator = torch.Generator().manual_seed(seed)
    centres = CENTRES[torch.randint(0, len(CENTRES), (num,), generator=generator)]
    return centres + deviation * torch.randn(num, 2, generator=generator)


def fixed_kernel(
    seed: int, alpha: float = 1.0, critic_lr: float = 5e-2, spread: float = 1.0
) -> tuple[MMDGAN, DataLoader]:
    """A critic on random Fourier features; latents of a given spread; Adam on both sides."""

    def adam(lr: float) -> Callable[[Iterable[Tensor]], torch.optim.Optimizer]:
        return lambda parameters: torch.optim.Adam(parameters, lr=lr, betas=(0.0, 0.9))

    torch.manual_seed(seed)
    features = RandomFourierFeatures(Gaussian(2.0), 2, 128, seed=seed)
    model = MMDGAN(
        MLPGenerator(2, 2, (32, 32)),
        LearnedKernelCritic(nn.Identity(), 2, features),
        GradientAscent(alpha=alpha, beta=0.01 * alpha, estimator=Batch(), share_samples=False),
        generator_optimizer=adam(5e-3),
        critic_optimizer=adam(critic_lr),
        latents=lambda num: spread * torch.randn(num, 2),
        seed=seed,
    )
    return model, DataLoader(mixture(2560, 0.2, seed), batch_size=256, shuffle=True)


def learned_kernel(seed: int, alpha: float) -> tuple[MMDGAN, DataLoader]:
    """The game of `mixture_of_gaussians.py`, on batches of fresh samples in place of quadrature."""
    generator, critic, _, _ = start(seed, learned=True)

    def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        others = [p for p in parameters if p is not critic.weights]
        groups = [{"params": [critic.weights]}, {"params": others, "lr": FEATURES_LR}]
        return torch.optim.SGD(groups, lr=CRITIC_LR)

    model = MMDGAN(
        generator,
        critic,
        GradientAscent(alpha=alpha, beta=BETA, estimator=Batch(), share_samples=False),
        latents=2,
        generator_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=GENERATOR_LR),
        critic_optimizer=sgd,
        seed=seed,
    )
    return model, DataLoader(mixture(5120, DEVIATION, seed), batch_size=512, shuffle=True)


class Shift(nn.Module):
    """Moves points by a vector that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(2 * nn.functional.normalize(torch.randn(2), dim=0))

    def forward(self, z: Tensor) -> Tensor:
        """Return z + shift."""
        return z + self.shift


def bilinear(seed: int, alpha: float, lr: float = 0.05) -> tuple[MMDGAN, DataLoader]:
    """A shifted mixture against a linear critic, by plain SGD: without the penalty a circle."""
    torch.manual_seed(seed)
    critic = LearnedKernelCritic(nn.Identity(), 2)
    nn.init.zeros_(critic.weights)

    def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr)

    def latents(num: int) -> Tensor:
        return CENTRES[torch.randint(0, 4, (num,))] + 0.2 * torch.randn(num, 2)

    model = MMDGAN(
        Shift(),
        critic,
        GradientAscent(alpha=alpha, beta=0.0, estimator=Batch(), share_samples=False),
        latents=latents,
        generator_optimizer=sgd,
        critic_optimizer=sgd,
        seed=seed,
    )
    return model, DataLoader(mixture(2560, 0.2, seed), batch_size=256, shuffle=True)


class Case(NamedTuple):
    """A game with a known outcome.

    Attributes:
        expected: Verdicts that are right.
        build: From a seed to the game.
        num_updates: Of the generator.
        every_n_steps: Of them between two observations.
    """

    expected: tuple[str, ...]
    build: Callable[[int], tuple[MMDGAN, DataLoader]]
    num_updates: int = 300
    every_n_steps: int = 5


GOOD = ("converging", "converged")
CASES = {
    "alpha = 1": Case(GOOD, fixed_kernel),
    "latents squeezed 100 times": Case(("collapsed",), partial(fixed_kernel, spread=0.01)),
    "critic rate 2e-4": Case(("critic too weak",), partial(fixed_kernel, critic_lr=2e-4)),
    "critic rate 5": Case(("critic too strong",), partial(fixed_kernel, critic_lr=5.0)),
    "alpha = 1, bilinear": Case(GOOD, partial(bilinear, alpha=1.0), 400),
    "alpha = 0, bilinear": Case(("cycling",), partial(bilinear, alpha=0.0), 400),
    "alpha = 100, learned": Case(GOOD, partial(learned_kernel, alpha=ALPHA), 600, 10),
    "alpha = 0, learned": Case(("cycling",), partial(learned_kernel, alpha=0.0), 1000, 10),
}


def play(seed: int, case: Case) -> ConvergenceMonitor:
    """Train once; return the monitor."""
    model, data = case.build(seed)
    monitor = ConvergenceMonitor(case.every_n_steps, seed=seed)
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
        trainer.fit(model, data)
    except DivergedError as error:
        print(f"seed {seed}: {error}")
    return monitor


def main(
    seeds: Sequence[int] = range(200, 210),
    cases: Sequence[str] = tuple(CASES),
    directory: Path = Path(__file__).parent,
) -> list[dict[str, object]]:
    """Play every case with every seed; print and save how often each verdict came out."""
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    rows = []
    for name in cases:
        case = CASES[name]
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
