"""Modules and trainers of the package pytorch_lightning, which is the same code under two names."""

import logging

import pytest
import torch
from foreign import SHAPE, HingeGAN, mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mmd import (
    ConstantNoise,
    ConvergenceMonitor,
    Gaussian,
    GeneratorEMA,
    MMDTracker,
    NoiseInjection,
    ParametricGradientPenalty,
    RelativeTestLR,
    SampleGrid,
)

pl = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
NAMES = {"generator": "netG", "critic": "netD"}


def make():
    """A GAN of pytorch_lightning with the steps of one of lightning.pytorch."""
    own = {
        name: getattr(HingeGAN, name)
        for name in ("draw", "training_step", "penalty", "configure_optimizers")
    }
    module = type("GAN", (pl.LightningModule,), own)()
    module.automatic_optimization, module.latent_dim, module.lr = False, 5, 1e-3
    module.netG = nn.Sequential(mlp(5, 16), nn.Unflatten(1, SHAPE))
    module.netD = nn.Sequential(nn.Flatten(), mlp(16, 1))
    module.fixed_latents = lambda num, seed=0: torch.randn(
        num, 5, generator=torch.Generator().manual_seed(seed)
    )
    module.sample = lambda num, latents: module.netG(latents).detach()
    return module


class WandbLogger(pl.loggers.Logger):
    """Records what a logger of that name is sent."""

    name, version = "run", 0

    def __init__(self):
        super().__init__()
        self.pictures, self.scalars = [], []

    def log_image(self, key, images, step=None):
        self.pictures.append(step)

    def log_metrics(self, metrics, step=None):
        self.scalars.append((step, metrics))

    def log_hyperparams(self, *_):
        pass


def test_all_callbacks_work_with_the_other_package(tmp_path):
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.manual_seed(0)
    module, logger = make(), WandbLogger()
    tracker = MMDTracker(Gaussian(2.0), 2, 20, 20)
    monitor = ConvergenceMonitor(2, Gaussian(2.0), 20, **NAMES)
    average = GeneratorEMA(2.0, generator="netG")
    test = RelativeTestLR(Gaussian(2.0), 2, lookback=1, num_samples=20, features=nn.Flatten())
    penalty = ParametricGradientPenalty(0.5, **NAMES)
    noise = NoiseInjection(ConstantNoise(0.1), **NAMES)
    grid = SampleGrid(2, 4, dirpath=tmp_path)
    callbacks = [tracker, monitor, average, test, penalty, noise, grid]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=tmp_path,
    )
    data = DataLoader(TensorDataset(torch.randn(64, *SHAPE).tanh()), 8)
    trainer.fit(module, data, data)
    assert [callback.updates for callback in callbacks] == [8] * len(callbacks)
    assert [entry["step"] for entry in tracker.history] == [0, 2, 4, 6, 8]
    assert monitor.traces.steps == [0, 2, 4, 6, 8]
    assert logger.pictures == [0, 2, 4, 6, 8]
    assert penalty.critic_step == 8
    assert average.averaged_generator is not None
    assert test.history
    assert max(step for step, metrics in logger.scalars if "penalty/share" in metrics) == 8
