"""A GAN that knows nothing of this package, with and without our callbacks, on real digits.

    python examples/drop_in.py

The module is Lightning's tutorial GAN in its usual form (binary cross entropy, manual optimization,
toggled optimizers) on the 8x8 digits that scikit-learn carries. Only the Trainer's list of
callbacks differs from row to row. MMD^2 is unbiased, of held-out digits against as many samples.
"""

import logging
import statistics
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from reporting import save_table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mmd import (
    NoiseInjection,
    ParametricGradientPenalty,
    RationalQuadratic,
    SumKernel,
    mmd2_unbiased,
)
from lightning_mmd.noise import HalvingNoise

HERE = Path(__file__).parent
KERNEL = SumKernel([RationalQuadratic(a, bandwidth=8.0) for a in (0.2, 0.5, 1.0, 2.0, 5.0)])


class TutorialGAN(LightningModule):
    """What a user has already."""

    def __init__(self, latent_dim: int = 32, lr: float = 1e-3) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.latent_dim, self.lr = latent_dim, lr
        self.generator = nn.Sequential(
            nn.Linear(latent_dim, 128),
            nn.BatchNorm1d(128),
            nn.LeakyReLU(0.2),
            nn.Linear(128, 256),
            nn.BatchNorm1d(256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 64),
            nn.Tanh(),
            nn.Unflatten(1, (1, 8, 8)),
        )
        self.discriminator = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 256),
            nn.SiLU(),
            nn.Linear(256, 128),
            nn.SiLU(),
            nn.Linear(128, 1),
            nn.Sigmoid(),
        )

    def training_step(self, batch: list[Tensor]) -> None:
        """Step the generator, then the discriminator."""
        (images,) = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(len(images), self.latent_dim, device=self.device)
        real, fake = images.new_ones(len(images), 1), images.new_zeros(len(images), 1)

        self.toggle_optimizer(optimizer_g)
        loss = F.binary_cross_entropy(self.discriminator(self.generator(z)), real)
        optimizer_g.zero_grad()
        self.manual_backward(loss)
        optimizer_g.step()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        on_real = F.binary_cross_entropy(self.discriminator(images), real)
        on_fake = F.binary_cross_entropy(self.discriminator(self.generator(z).detach()), fake)
        optimizer_d.zero_grad()
        self.manual_backward((on_real + on_fake) / 2)
        optimizer_d.step()
        self.untoggle_optimizer(optimizer_d)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One Adam for each network."""
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(n.parameters(), lr=self.lr, betas=(0.5, 0.999)) for n in networks]


class Curve(Callback):
    """MMD^2 to held-out digits, every so many batches."""

    def __init__(self, held_out: Tensor, every: int) -> None:
        self.held_out, self.every, self.values = held_out, every, []

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, *_: int
    ) -> None:
        """Measure in eval mode, from latents that the update determines."""
        updates = trainer.global_step // 2  # Lightning counts the steps of both optimizers
        if updates % self.every == 0:
            z = torch.randn(360, 32, generator=torch.Generator().manual_seed(updates))
            pl_module.generator.eval()
            self.values.append(mmd2_unbiased(self.held_out, pl_module.generator(z), KERNEL).item())
            pl_module.generator.train()


def penalty(alpha: float) -> ParametricGradientPenalty:
    names = {"generator": "generator", "critic": "discriminator"}
    return ParametricGradientPenalty(alpha, **names, critic_values=torch.logit)


def noise(level: float, every: int) -> NoiseInjection:
    return NoiseInjection(HalvingNoise(level, every=every), critic="discriminator")


def train(seed: int, num_updates: int, *callbacks: Callback) -> tuple[list[float], float]:
    """Train once; return the curve of ten values and the seconds it took."""
    seed_everything(seed, verbose=False)
    digits = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    held_out, images = digits[torch.randperm(len(digits))].split([360, len(digits) - 360])
    curve = Curve(held_out, every=max(1, num_updates // 10))
    loader = DataLoader(TensorDataset(images), 64, shuffle=True, drop_last=True)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2 * num_updates,
        max_epochs=-1,
        callbacks=[*callbacks, curve],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(TutorialGAN(), loader)
    return curve.values, time.perf_counter() - start


def main(
    num_updates: int = 1000,
    seeds: tuple[int, ...] = (0, 1, 2),
    alphas: tuple[float, ...] = (1.0, 10.0, 100.0),
    directory: Path = HERE,
) -> list[dict[str, object]]:
    """Train with each set of callbacks and each seed; return the table's rows."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    sets = {"none": list} | {
        f"ParametricGradientPenalty({alpha:g})": lambda alpha=alpha: [penalty(alpha)]
        for alpha in alphas
    }
    sets["NoiseInjection"] = lambda: [noise(0.3, num_updates // 8)]
    rows = []
    for name, callbacks in sets.items():
        runs = [train(seed, num_updates, *callbacks()) for seed in seeds]
        row: dict[str, object] = {"callbacks": name}
        # The mean of the second half of a curve: a GAN that cycles is as good as its average.
        halves = [statistics.fmean(curve[len(curve) // 2 :]) for curve, _ in runs]
        row |= {f"seed {seed}": half for seed, half in zip(seeds, halves, strict=True)}
        row["mean"] = statistics.fmean(halves)
        row["worst"] = max(value for curve, _ in runs for value in curve[len(curve) // 2 :])
        row["last"] = statistics.fmean(curve[-1] for curve, _ in runs)
        row["seconds"] = statistics.fmean(seconds for _, seconds in runs)
        rows.append(row)
    save_table(rows, directory / "results" / "drop_in.csv")
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
