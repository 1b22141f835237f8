"""Do our callbacks help or harm GANs that are not ours?

    OMP_NUM_THREADS=1 python benchmarks/foreign_gans.py DATA
    OMP_NUM_THREADS=1 python benchmarks/foreign_gans.py DATA --seeds 1 --factors 0.25 4

Four GANs as other people write them, on MNIST, each with none and with one of the callbacks that
act on training. The pictures of one seed are the same images in the same order, from the same
weights. A run trains for some processor seconds of one thread, all but scoring. The judge
(`judge.py`, test images) scores 5,000 samples of the averaged generator (weight 0.01) every so many
updates and at the end. Each score is a row of `results/foreign.csv`; runs that are there are
skipped. `evidence_report.py` makes the table.
"""

import argparse
import copy
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from csv_rows import append_row, read_rows
from judge import Judge, cached_classifier, load, to_unit
from lightning.pytorch import Callback, LightningModule, Trainer
from race import CACHE, keep_memory
from rivals import spectrally_normalised
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_mmd import (
    InputGradientPenalty,
    NoiseInjection,
    ParametricGradientPenalty,
    ProximalPoint,
)
from lightning_mmd.networks import ConvFeatures, ConvGenerator
from lightning_mmd.noise import HalvingNoise

RESULTS = Path(__file__).parent / "results" / "foreign.csv"
FIELDS = [
    "gan", "factor", "callback", "seed", "updates", "seconds", "fid", "kid", "end",
]  # fmt: skip
CALLBACKS = ("none", "parametric", "slope", "proximal", "noise_0.03")
OTHERS = ("proximal_10", "proximal_100", "proximal_1000", "noise_0.1")  # with --others
SAMPLES = 5000


class Foreign(LightningModule):
    """A GAN under manual optimization: the critic's step, then the generator's.

    Args:
        factor: On the generator's learning rate.
    """

    latent_dim = 64
    rates = (2e-4, 2e-4)
    betas = (0.5, 0.999)
    batch_size = 64
    mark = 150
    critic_values: Any = None

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.factor = factor

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One Adam for each network."""
        rates = (self.rates[0] * self.factor, self.rates[1])
        networks = (self.netG, self.netD)
        pairs = zip(networks, rates, strict=True)
        return [torch.optim.Adam(n.parameters(), rate, self.betas) for n, rate in pairs]

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return what the critic descends."""
        on_real, on_fake = self.netD(real), self.netD(fake)
        return (F.softplus(-on_real) + F.softplus(on_fake)).mean()

    def generator_loss(self, fake: Tensor) -> Tensor:
        """Return what the generator descends."""
        return F.softplus(-self.netD(fake)).mean()

    def training_step(self, batch: Tensor) -> None:
        """Step the critic, then the generator."""
        for_generator, for_critic = self.optimizers()
        fake = self.netG(torch.randn(len(batch), self.latent_dim))
        self.toggle_optimizer(for_critic)
        loss = self.critic_loss(batch, fake.detach())
        for_critic.zero_grad()
        self.manual_backward(loss)
        for_critic.step()
        self.untoggle_optimizer(for_critic)

        self.toggle_optimizer(for_generator)
        loss = self.generator_loss(self.netG(torch.randn(len(batch), self.latent_dim)))
        for_generator.zero_grad()
        self.manual_backward(loss)
        for_generator.step()
        self.untoggle_optimizer(for_generator)


class Tutorial(Foreign):
    """Lightning's tutorial: fully connected, BatchNorm, a sigmoid under binary cross entropy."""

    latent_dim = 100
    mark = 250
    critic_values = staticmethod(torch.logit)

    def __init__(self, factor: float) -> None:
        super().__init__(factor)

        def block(inputs: int, outputs: int, normalize: bool = True) -> list[nn.Module]:
            norm = [nn.BatchNorm1d(outputs, 0.8)] if normalize else []
            return [nn.Linear(inputs, outputs), *norm, nn.LeakyReLU(0.2)]

        widths = ((100, 128, False), (128, 256, True), (256, 512, True), (512, 1024, True))
        layers = [layer for width in widths for layer in block(*width)]
        self.netG = nn.Sequential(
            *layers, nn.Linear(1024, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28))
        )
        self.netD = nn.Sequential(
            nn.Flatten(),
            *block(784, 512, False),
            *block(512, 256, False),
            nn.Linear(256, 1),
            nn.Sigmoid(),
        )

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return what the critic descends."""
        ones = real.new_ones(len(real), 1)
        on_real = F.binary_cross_entropy(self.netD(real), ones)
        return (on_real + F.binary_cross_entropy(self.netD(fake), 0 * ones)) / 2

    def generator_loss(self, fake: Tensor) -> Tensor:
        """Return what the generator descends."""
        return F.binary_cross_entropy(self.netD(fake), fake.new_ones(len(fake), 1))


class DCGAN(Foreign):
    """PyTorch's example, for 28 pixels: BatchNorm in both networks."""

    def __init__(self, factor: float, width: int = 16) -> None:
        super().__init__(factor)
        up = nn.ConvTranspose2d
        self.netG = nn.Sequential(
            nn.Unflatten(1, (64, 1, 1)),
            up(64, 4 * width, 7, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.ReLU(),
            up(4 * width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            up(2 * width, 1, 4, 2, 1, bias=False),
            nn.Tanh(),
        )
        self.netD = nn.Sequential(
            nn.Conv2d(1, 2 * width, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(4 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 7, bias=False),
            nn.Flatten(0),
        )
        for part in (*self.netG, *self.netD):
            if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.normal_(part.weight, 0.0, 0.02)
            elif isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.weight, 1.0, 0.02)


class R1(Foreign):
    """Non-saturating with R1 (Mescheder et al. 2018), the networks of the race."""

    latent_dim = 32
    rates = (2e-3, 2e-3)
    betas = (0.0, 0.99)
    mark = 100
    spectral = False

    def __init__(self, factor: float) -> None:
        super().__init__(factor)
        self.netG = ConvGenerator((1, 28, 28), 32, (64, 32, 16))
        features = ConvFeatures((1, 28, 28), 256, (16, 32, 64))
        self.netD = nn.Sequential(features, nn.SiLU(), nn.Linear(256, 1), nn.Flatten(0))
        if self.spectral:
            spectrally_normalised(self.netD)

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return what the critic descends."""
        real = real.detach().requires_grad_()
        values = self.netD(real)
        (slope,) = torch.autograd.grad(values.sum(), real, create_graph=True)
        penalty = slope.square().flatten(1).sum(1).mean() / 2
        return F.softplus(-values).mean() + F.softplus(self.netD(fake)).mean() + penalty


class HingeSpectral(R1):
    """The hinge under spectral normalisation (Miyato et al. 2018)."""

    mark = 150
    spectral = True

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """Return what the critic descends."""
        return F.relu(1 - self.netD(real)).mean() + F.relu(1 + self.netD(fake)).mean()

    def generator_loss(self, fake: Tensor) -> Tensor:
        """Return what the generator descends."""
        return -self.netD(fake).mean()


GANS: dict[str, type[Foreign]] = {
    "tutorial": Tutorial,
    "dcgan": DCGAN,
    "r1": R1,
    "hinge_spectral": HingeSpectral,
}


def new_callback(name: str, gan: type[Foreign]) -> list[Callback]:
    """Return a callback at its defaults; the number in a name is tau, or the noise's level."""
    names = {"generator": "netG", "critic": "netD"}
    if name == "parametric":
        return [ParametricGradientPenalty(**names, critic_values=gan.critic_values)]
    if name == "slope":
        return [InputGradientPenalty(**names, critic_values=gan.critic_values)]
    kind, _, number = name.partition("_")
    if kind == "proximal":
        tau = float(number) if number else "auto"
        return [ProximalPoint(tau, generator="netG")]
    if kind == "noise":
        return [NoiseInjection(HalvingNoise(float(number), every=500), **names)]
    return []


class Batches(IterableDataset):
    """Random batches of images, without end."""

    def __init__(self, images: Tensor, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed = images, batch_size, seed

    def __iter__(self):
        random = torch.Generator().manual_seed(self.seed)
        while True:
            index = torch.randint(len(self.images), (self.batch_size,), generator=random)
            yield to_unit(self.images[index])


class Marks(Callback):
    """Averages the generator, scores it at the marks, and ends the run when time is up."""

    def __init__(self, judge: Judge, seconds: float, base: dict[str, Any]) -> None:
        self.judge, self.seconds, self.base = judge, seconds, base
        self.updates, self.scoring = 0, 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the average and the clock."""
        self.average, self.begin = copy.deepcopy(pl_module.netG), time.process_time()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count, average, score, end."""
        self.updates += 1
        weight = max(0.01, 1 / (self.updates + 1))
        mine, new = self.average.state_dict(), pl_module.netG.state_dict()
        for name, value in mine.items():
            if value.is_floating_point():
                value.lerp_(new[name], weight)
        spent = time.process_time() - self.begin - self.scoring
        end = spent >= self.seconds
        if end or self.updates % pl_module.mark == 0:
            start, state = time.process_time(), torch.get_rng_state()
            torch.manual_seed(99)
            scores, _ = self.judge(self.average.eval(), pl_module.latent_dim, last=False)
            torch.set_rng_state(state)
            row = {
                **self.base, "updates": self.updates, "seconds": f"{spent:.1f}",
                "fid": f"{scores['fid']:.4g}", "kid": f"{scores['kid']:.4g}",
                "end": "time" if end else "",
            }  # fmt: skip
            append_row(RESULTS, FIELDS, row)
            self.scoring += time.process_time() - start
        trainer.should_stop = trainer.should_stop or end


def rows() -> list[dict[str, str]]:
    """Return the rows so far, of runs that came to their end."""
    found = read_rows(RESULTS)
    ended = {cell(row) for row in found if row["end"]}
    return [row for row in found if cell(row) in ended]


def cell(row: dict[str, Any]) -> tuple[str, ...]:
    """Return what names a run."""
    return tuple(str(row[name]) for name in ("gan", "factor", "callback", "seed"))


def run(base: dict[str, Any], seconds: float, images: Tensor, judge: Judge) -> None:
    """Train one GAN with one callback."""
    gan = GANS[base["gan"]]
    torch.manual_seed(base["seed"] + 1)
    module = gan(base["factor"])
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[*new_callback(base["callback"], gan), Marks(judge, seconds, base)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(base["seed"] + 1)
    data = Batches(images, gan.batch_size, base["seed"])
    trainer.fit(module, DataLoader(data, batch_size=None))


def main(root: str, seconds: float, seeds: int, factors: list[float], others: bool) -> None:
    """Run what is not there yet."""
    torch.set_num_threads(1)
    keep_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec|.*kinks")
    images = load("MNIST", root, "test")
    order = torch.randperm(len(images.held), generator=torch.Generator().manual_seed(0))
    images.held, images.held_labels = images.held[order], images.held_labels[order]
    judge = Judge(cached_classifier(images, "MNIST", CACHE, seed=0), images, num=SAMPLES)
    print("floor", judge.floor(), flush=True)
    done = {cell(row) for row in rows()}
    for seed in range(seeds):
        for factor in factors:
            for gan in GANS:
                for name in OTHERS if others else CALLBACKS:
                    base = {"gan": gan, "factor": factor, "callback": name, "seed": seed}
                    if cell(base) in done:
                        continue
                    run(base, seconds, images.train, judge)
                    print(list(base.values()), rows()[-1]["updates"], rows()[-1]["fid"], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--seconds", type=float, default=45)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--factors", type=float, nargs="*", default=[1.0])
    parser.add_argument("--others", action="store_true")
    args = parser.parse_args()
    main(args.data, args.seconds, args.seeds, args.factors, args.others)
