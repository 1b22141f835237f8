"""The shipped recipe in the race: `lightning-mmd fit`, judged at the marks of `race.py`.

    OMP_NUM_THREADS=1 python benchmarks/race_lightning.py DATA --config configs/mnist.yaml

Training runs as shipped, with loader, checkpoints, trackers and pictures; the processor time of
all of that counts, of this process and of its children. Start-up (until the first batch) and the
judge's scoring do not. Rows go to `results/race.csv`, with "lightning" in the column `loop`; the
last row is the end of the recipe, whatever its time.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import race
import torch
from judge import Judge, cached_classifier, load
from lightning.pytorch import Callback, LightningModule, Trainer
from rivals import LATENT_DIM

from lightning_mmd import cli
from lightning_mmd.callbacks import GeneratorEMA


class Marks(Callback):
    """Scores the averaged generator at the marks of the race.

    Args:
        config: Name of the recipe, for the rows.
        data: Folder of the images.
        split: Whose images the judge compares with.
        seed: Seed of the run, for the rows.
        name: Data set.
    """

    def __init__(self, config: str, data: str, split: str, seed: int, name: str = "MNIST") -> None:
        images = load(name, data, split)
        self.judge = Judge(cached_classifier(images, name, race.CACHE, seed=0), images)
        texts = [f"data={name}", f"split={split}", f"method={config}", f"seed={seed}"]
        self.spec = race.parse([*texts, "loop=lightning"])
        self.marks = list(race.MARKS)
        self.start = self.scoring = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.start = spent()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Score if a mark has passed."""
        if self.marks and spent() - self.start - self.scoring >= self.marks[0]:
            self.score(trainer, self.marks.pop(0), last=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the end of the recipe."""
        self.score(trainer, round(spent() - self.start - self.scoring), last=True)

    def score(self, trainer: Trainer, seconds: int, last: bool) -> None:
        """Judge the averaged generator, and append a row."""
        before = spent()
        (average,) = [c for c in trainer.callbacks if isinstance(c, GeneratorEMA)]
        generator = average.averaged_generator
        assert generator is not None
        state = torch.get_rng_state()
        scores, _ = self.judge(generator, LATENT_DIM, last)
        torch.set_rng_state(state)
        steps = trainer.fit_loop.total_batch_idx + 1
        extra = {**scores, "end": "recipe" if last else "", "judge_accuracy": self.judge.accuracy}
        race.append(self.spec, seconds, steps, trainer.lightning_module.images_seen, extra)
        print(f"{seconds} s, {steps} updates, {scores}", flush=True)
        self.scoring += spent() - before


def spent() -> float:
    """Return the processor seconds of this process and of its children that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--config", default=race.HERE.parent / "configs" / "mnist.yaml")
    parser.add_argument("--split", default="test")
    parser.add_argument("--seed", type=int, default=0)
    args, more = parser.parse_known_args()  # the others are options of fit
    config = Path(args.config).resolve()
    torch.set_num_threads(1)
    race.keep_memory()
    callback = "--trainer.callbacks+=race_lightning.Marks"
    settings = {"config": config.stem, "data": str(Path(args.data).resolve()), "split": args.split}
    settings["seed"] = args.seed
    options = [f"--trainer.callbacks.{name}={value}" for name, value in settings.items()]
    folder = ["--data.root", str(Path(args.data).resolve()), "--seed_everything", str(args.seed)]
    os.chdir(tempfile.mkdtemp())
    cli.main(["fit", "--config", str(config), *folder, callback, *options, *more])
