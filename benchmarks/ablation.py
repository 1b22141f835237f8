"""What each stabiliser gives to each rule, and at which learning rates: digits and MNIST.

    OMP_NUM_THREADS=1 python benchmarks/ablation.py ablation DATA --data digits
    OMP_NUM_THREADS=1 python benchmarks/ablation.py ablation DATA --data MNIST
    OMP_NUM_THREADS=1 python benchmarks/ablation.py rates DATA
    OMP_NUM_THREADS=1 python benchmarks/ablation.py long DATA

A run is an `MMDGAN` under Lightning with constant learning rates: the networks of `configs/`, batch
64, a `ConvergenceMonitor` that looks every 15 updates. It trains for some processor seconds of one
thread (all but scoring), or for a number of updates. The averaged generator (weight 0.01) is scored
by features that nothing trained on: FID and KID of `judge.py` on MNIST's test images, KID of
`DigitsFeatures` on the digits' test images; beside it MMD^2 in pixels, and what the rule and the
monitor say. Each score is a row of `results/ablation.csv`; runs that are there are skipped.

`evidence_report.py` makes the tables. ``rates`` is a grid of 4 x 4 learning rates, ``long``
20,000 updates (closed form 4,000) at twice the rates, both on digits.
"""

import argparse
import copy
import logging
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from csv_rows import append_row, read_rows
from judge import cached_classifier, load
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from race import CACHE, keep_memory
from torch import nn

from lightning_mmd import (
    MMDGAN,
    ClosedForm,
    ConvergenceMonitor,
    DeepKernel,
    DigitsFeatures,
    EmbeddingCritic,
    FeatureMatching,
    FeatureMetrics,
    GradientAscent,
    LearnedKernelCritic,
    NoiseInjection,
    ProximalPoint,
    RationalQuadratic,
    SlopePenalty,
    SumKernel,
    UpdateRule,
    mmd2_unbiased,
)
from lightning_mmd.data import DigitsDataModule, TorchvisionDataModule
from lightning_mmd.networks import ConvFeatures, ConvGenerator
from lightning_mmd.noise import HalvingNoise
from lightning_mmd.objectives import Linear, Logistic

RESULTS = Path(__file__).parent / "results" / "ablation.csv"
FIELDS = [
    "study", "data", "rule", "stabiliser", "rates", "seed", "updates", "seconds", "fid", "kid",
    "mmd2", "efficiency", "ratio", "verdict", "end",
]  # fmt: skip
SLOPE_TO_ONE = SlopePenalty(20.0, at="real", target=1.0)
R1 = SlopePenalty(1.0, at="real")


def ascent(**options: Any) -> UpdateRule:
    """Gradient ascent on the MMD."""
    return GradientAscent(**{"alpha": 0.0, "beta": 0.0, "objective": Linear(), **options})


def plain(**options: Any) -> UpdateRule:
    """The non-saturating GAN."""
    return GradientAscent(**{"alpha": 0.0, "beta": 0.0, "objective": Logistic(), **options})


def closed(alpha: float = 0.0) -> UpdateRule:
    """The closed form of the configurations."""
    return ClosedForm(alpha=alpha, beta=0.1, eta=0.4, max_iterations=3)


CELLS: dict[str, dict[str, Callable[[], UpdateRule]]] = {
    "closed form": {
        "none": closed,
        "parametric 1": lambda: closed(1.0),
        "noise": closed,
        "parametric 1, noise": lambda: closed(1.0),
    },
    "gradient ascent": {
        "none": ascent,
        "parametric 0.1": lambda: ascent(alpha=0.1),
        "parametric 1": lambda: ascent(alpha=1.0),
        "parametric 10": lambda: ascent(alpha=10.0),
        "parametric 1, norm 0.01": lambda: ascent(alpha=1.0, beta=0.01),
        "R1": lambda: ascent(slope=R1),
        "slope to 1": lambda: ascent(slope=SLOPE_TO_ONE),
        "proximal": ascent,
        "noise": ascent,
        "slope to 1, matching": lambda: ascent(slope=SLOPE_TO_ONE, matching=FeatureMatching(20.0)),
        "slope to 1, parametric 0.1": lambda: ascent(slope=SLOPE_TO_ONE, alpha=0.1),
        "slope to 1, proximal": lambda: ascent(slope=SLOPE_TO_ONE),
    },
    "deep kernel": {
        "none": DeepKernel,
        "parametric 1": lambda: DeepKernel(alpha=1.0),
        "slope 0.03": lambda: DeepKernel(slope=SlopePenalty(0.03)),
        "proximal": DeepKernel,
        "noise": DeepKernel,
    },
    "plain": {
        "none": plain,
        "parametric 0.01": lambda: plain(alpha=0.01),
        "parametric 1": lambda: plain(alpha=1.0),
        "R1": lambda: plain(slope=R1),
        "proximal": plain,
        "noise": plain,
        "R1, matching": lambda: plain(slope=R1, matching=FeatureMatching(20.0)),
        "R1, parametric 0.01": lambda: plain(slope=R1, alpha=0.01),
    },
}
GRID = [  # rule and stabilisers of the grid of learning rates
    ("closed form", "parametric 1"),
    ("gradient ascent", "slope to 1, matching"),
    ("gradient ascent", "slope to 1"),
    ("gradient ascent", "none"),
    ("deep kernel", "none"),
    ("plain", "R1"),
    ("plain", "none"),
]
LONG = [
    ("closed form", "parametric 1"),
    ("closed form", "none"),
    ("gradient ascent", "slope to 1, matching"),
    ("gradient ascent", "slope to 1"),
    ("gradient ascent", "none"),
    ("deep kernel", "none"),
    ("deep kernel", "proximal"),
    ("plain", "none"),
    ("plain", "R1"),
    ("plain", "proximal"),
]
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
ETAS = (0.05, 0.2, 0.8, 3.2)


class Data:
    """A data set, its networks' sizes, and who judges.

    Args:
        name: ``digits`` or ``MNIST``.
        root: Folder of MNIST.
    """

    def __init__(self, name: str, root: str) -> None:
        self.name, self.root = name, root
        self.shape = (1, 8, 8) if name == "digits" else (1, 28, 28)
        self.channels = (32, 16) if name == "digits" else (64, 32, 16)
        self.rate = 5e-3 if name == "digits" else 3e-3
        width = 8.0 if name == "digits" else 15.336
        self.kernel = SumKernel([RationalQuadratic(a, width) for a in (0.2, 0.5, 1.0, 2.0, 5.0)])
        if name == "digits":
            module = self.module()
            module.setup("test")
            held = torch.cat(list(module.test_dataloader()))
            network: nn.Module = DigitsFeatures()
            self.num = 1000
        else:
            images = load("MNIST", root, "test")
            order = torch.randperm(len(images.held), generator=torch.Generator().manual_seed(0))
            held = images.held[order[:5000]].float() / 127.5 - 1
            network = cached_classifier(images, "MNIST", CACHE, seed=0).features
            self.num = 5000
        self.metrics = FeatureMetrics(network, subsets=50, neighbours=None)
        for part in held.split(500):
            self.metrics.update(part, real=True)
        self.held = held[:1000]

    def module(self) -> LightningDataModule:
        """Return batches of 64."""
        if self.name == "digits":
            return DigitsDataModule(batch_size=64)
        return TorchvisionDataModule(name="MNIST", root=self.root, batch_size=64, num_val=10_000)

    def model(self, rule: UpdateRule, rates: tuple[float, float], seed: int) -> MMDGAN:
        """Return networks and rule; the first rate is eta for the closed form."""
        torch.manual_seed(seed + 1)
        generator = ConvGenerator(self.shape, 32, self.channels)
        deep, solved = isinstance(rule, DeepKernel), isinstance(rule, ClosedForm)
        features = ConvFeatures(self.shape, 256, self.channels[::-1], activated=not deep)
        critic = (
            EmbeddingCritic(features, 256, 64, spectral_norm=True, scale=4.0)
            if deep
            else LearnedKernelCritic(features, 256)
        )

        def adam(lr: float) -> Any:
            return lambda parameters: torch.optim.Adam(parameters, lr, (0.0, 0.99))

        if isinstance(rule, ClosedForm):
            rule.eta = rates[0]
        options = {} if solved else {"generator_optimizer": adam(rates[0])}
        return MMDGAN(
            generator, critic, rule, latents=32, critic_optimizer=adam(rates[1]), **options
        )

    def scores(self, generator: nn.Module) -> dict[str, float]:
        """Return FID (MNIST), KID, and MMD^2 in pixels."""
        z = torch.randn(self.num, 32, generator=torch.Generator().manual_seed(99))
        samples = torch.cat([generator(part) for part in z.split(500)])
        if not samples.isfinite().all():
            return {"fid": math.nan, "kid": math.nan, "mmd2": math.nan}
        self.metrics.fake = []
        for part in samples.split(500):
            self.metrics.update(part, real=False)
        scores = {name: float(value) for name, value in self.metrics.compute().items()}
        mmd2 = float(mmd2_unbiased(self.held, samples[: len(self.held)], self.kernel))
        return {"fid": scores.get("fid", math.nan), "kid": scores["kid"], "mmd2": mmd2}


class Marks(Callback):
    """Averages the generator, scores it at the marks, and ends the run.

    Args:
        data: Who scores.
        base: First columns of the row.
        monitor: Whose verdict is a column.
        seconds: Processor seconds after which the run ends.
        updates: Updates after which it ends.
        every: Updates between scores; default: only the end.
    """

    def __init__(
        self,
        data: Data,
        base: dict[str, Any],
        monitor: ConvergenceMonitor,
        seconds: float = math.inf,
        updates: float = math.inf,
        every: int = 0,
    ) -> None:
        self.data, self.base, self.monitor = data, base, monitor
        self.seconds, self.last, self.every = seconds, updates, every
        self.updates, self.scoring, self.ended = 0, 0.0, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the average and the clock."""
        self.average, self.begin = copy.deepcopy(pl_module.generator), time.process_time()

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Count, average, score, end."""
        self.updates += 1
        weight = max(0.01, 1 / (self.updates + 1))
        own, new = self.average.parameters(), pl_module.generator.parameters()
        torch._foreach_lerp_(list(own), list(new), weight)
        spent = time.process_time() - self.begin - self.scoring
        end = spent >= self.seconds or self.updates >= self.last
        if end or (self.every and self.updates % self.every == 0):
            self.score(trainer, "budget" if end else "")
        trainer.should_stop = trainer.should_stop or end

    @torch.no_grad()
    def score(self, trainer: Trainer, end: str) -> None:
        """Append a row."""
        start = time.process_time()
        spent = start - self.begin - self.scoring
        logged = trainer.callback_metrics
        scores = self.data.scores(self.average)
        row = {
            **self.base, "updates": self.updates, "seconds": f"{spent:.1f}",
            **{name: f"{value:.4g}" for name, value in scores.items()},
            "efficiency": f"{float(logged.get('certificate/efficiency', math.nan)):.4g}",
            "ratio": f"{float(logged.get('certificate/ratio', math.nan)):.4g}",
            "verdict": self.monitor.verdict.name if self.monitor.verdict else "", "end": end,
        }  # fmt: skip
        append_row(RESULTS, FIELDS, row)
        self.ended = bool(end)
        self.scoring += time.process_time() - start


def rows() -> list[dict[str, str]]:
    """Return the rows so far."""
    return read_rows(RESULTS)


def cell(row: dict[str, Any]) -> tuple[str, ...]:
    """Return what names a run."""
    names = ("study", "data", "rule", "stabiliser", "rates", "seed")
    return tuple(str(row[name]) for name in names)


def run(data: Data, base: dict[str, Any], rates: tuple[float, float], **budget: Any) -> None:
    """Train once; a training that diverges ends with a row of its own."""
    if cell(base) in {cell(row) for row in rows() if row["end"]}:
        return
    rule = CELLS[base["rule"]][base["stabiliser"]]()
    model = data.model(rule, rates, base["seed"])
    monitor = ConvergenceMonitor(every_n_steps=15, num_samples=128, kernel=data.kernel)
    marks = Marks(data, base, monitor, **budget)
    callbacks: list[Callback] = [monitor, marks]
    if "noise" in base["stabiliser"]:
        callbacks.insert(0, NoiseInjection(HalvingNoise(0.1, every=500)))
    if "proximal" in base["stabiliser"]:
        callbacks.insert(0, ProximalPoint(tau=10.0))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    torch.manual_seed(base["seed"] + 1)
    try:
        trainer.fit(model, data.module())
    except (RuntimeError, ValueError) as error:  # DivergedError, and what a collapse breaks
        if not marks.updates or marks.ended:
            raise
        print(f"{base}: {str(error)[:200]}", flush=True)
        marks.score(trainer, "diverged")
    row = rows()[-1]
    print([row[name] for name in FIELDS[:14]], row["end"], flush=True)


def ablation(root: str, name: str, seeds: int, seconds: float) -> None:
    """Every rule with every stabiliser."""
    data = Data(name, root)
    for seed in range(seeds):
        for rule, stabilisers in CELLS.items():
            rates = (0.4, 5e-4) if rule == "closed form" else (data.rate, data.rate)
            for stabiliser in stabilisers:
                base = base_of("ablation", name, rule, stabiliser, rates, seed)
                run(data, base, rates, seconds=seconds)


def base_of(study: str, name: str, rule: str, stabiliser: str, rates: Any, seed: int) -> dict:
    """Return the first columns of a row."""
    return {
        "study": study, "data": name, "rule": rule, "stabiliser": stabiliser,
        "rates": "{:g} {:g}".format(*rates), "seed": seed,
    }  # fmt: skip


def grid(root: str, seconds: float) -> None:
    """4 x 4 learning rates on digits."""
    data = Data("digits", root)
    for rule, stabiliser in GRID:
        for first in ETAS if rule == "closed form" else RATES:
            for second in RATES:
                base = base_of("rates", "digits", rule, stabiliser, (first, second), 0)
                run(data, base, (first, second), seconds=seconds)


def long(root: str, updates: int) -> None:
    """Many updates on digits at twice the rates."""
    data = Data("digits", root)
    for rule, stabiliser in LONG:
        solved = rule == "closed form"
        rates = (0.8, 1e-3) if solved else (2 * data.rate, 2 * data.rate)
        base = base_of("long", "digits", rule, stabiliser, rates, 0)
        num = updates // 5 if solved else updates
        run(data, base, rates, updates=num, every=100 if solved else 500)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=["ablation", "rates", "long"])
    parser.add_argument("root", nargs="?", default="data")
    parser.add_argument("--data", default="digits", choices=["digits", "MNIST"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--updates", type=int, default=20_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_mmd").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers|.*LeafSpec|.*kinks")
    if args.study == "ablation":
        default = 10 if args.data == "digits" else 30
        ablation(args.root, args.data, args.seeds, args.seconds or default)
    elif args.study == "rates":
        grid(args.root, args.seconds or 6)
    else:
        long(args.root, args.updates)
