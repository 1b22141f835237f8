"""Does a long training grow or slow down? 20,000 updates of a toy model with all callbacks.

    OMP_NUM_THREADS=1 python benchmarks/endurance.py

Every 1,000 updates, after a garbage collection: resident memory of the process, tensors alive,
hooks on modules, open files, and processor seconds of the thousand. Each is a row of
`results/endurance.csv`. What is written to disk (logs, checkpoints, pictures) grows, as it should.
"""

import csv
import gc
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_mmd import (
    MMDGAN,
    ConvergenceMonitor,
    FeatureMatching,
    Gaussian,
    GeneratorEMA,
    GracefulStop,
    GradientAscent,
    InstanceNoise,
    LearnedKernelCritic,
    MMDTracker,
    NoiseInjection,
    OnDivergence,
    ProximalPoint,
    RelativeTestLR,
    SampleQuality,
    SlopePenalty,
)
from lightning_mmd.data import GaussianMixtureDataModule
from lightning_mmd.networks import MLPFeatures, MLPGenerator
from lightning_mmd.noise import ConstantNoise

RESULTS = Path(__file__).parent / "results" / "endurance.csv"


class Watch(Callback):
    """Counts what is alive.

    Args:
        every: Updates between rows.
    """

    def __init__(self, every: int) -> None:
        self.every, self.updates, self.rows = every, 0, []
        self.begin = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Make a row."""
        self.updates += 1
        if self.updates % self.every:
            return
        seconds = time.process_time() - self.begin
        gc.collect()
        alive = gc.get_objects()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.rows.append(
            {
                "updates": self.updates,
                "seconds": round(seconds, 2),
                "resident_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
                "tensors": sum(issubclass(type(x), torch.Tensor) for x in alive),
                "hooks": sum(
                    len(x._forward_hooks) + len(x._forward_pre_hooks) + len(x._backward_hooks)
                    for x in alive
                    if issubclass(type(x), nn.Module)
                ),
                "files": len(os.listdir("/proc/self/fd")),
            }
        )
        print(self.rows[-1], flush=True)
        self.begin = time.process_time()


def main(updates: int = 20_000, every: int = 1000, results: Path = RESULTS) -> list[dict[str, Any]]:
    """Train, and write the rows."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_mmd").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    seed_everything(0, verbose=False)
    rule = GradientAscent(
        alpha=0.1,
        beta=0.01,
        slope=SlopePenalty(1.0, at="interpolated"),
        matching=FeatureMatching(1.0),
    )
    model = MMDGAN(
        MLPGenerator(2, 3, (16,)),
        LearnedKernelCritic(MLPFeatures(2, 16, (16,)), 16),
        rule,
        latents=3,
    )
    watch = Watch(every)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=updates,
            max_epochs=-1,
            default_root_dir=folder,
            logger=CSVLogger(folder),
            log_every_n_steps=50,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[
                MMDTracker(Gaussian(0.5), 100, 100, 100),
                ConvergenceMonitor(50, num_samples=50),
                SampleQuality(nn.Flatten(), 500, 100, 100),
                RelativeTestLR(Gaussian(0.5), 500, num_samples=50),
                GeneratorEMA(100),
                NoiseInjection(ConstantNoise(0.01)),
                InstanceNoise(ConstantNoise(0.01)),
                ProximalPoint(tau=1000.0),
                OnDivergence("restore"),
                ModelCheckpoint(every_n_train_steps=500, save_last=True),
                watch,
                GracefulStop(),
            ],
        )
        data = GaussianMixtureDataModule(num_samples=400, batch_size=32)
        trainer.fit(model, data)
    with results.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(watch.rows[0]))
        writer.writeheader()
        writer.writerows(watch.rows)
    return watch.rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
