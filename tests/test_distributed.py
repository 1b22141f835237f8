"""Two processes against one on the concatenated batch: the same mathematics."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lightning_mmd import MMDGAN, LearnedKernelCritic
from lightning_mmd.data import SampleDataModule, TensorSamples
from lightning_mmd.networks import MLPFeatures, MLPGenerator

NUM_STEPS, BATCH = 6, 8


class WholeBatch(MMDGAN):
    """One process that draws what two processes draw between them."""

    draws = 0

    def training_step(self, batch, batch_idx):
        self.draws = 0
        super().training_step(batch, batch_idx)

    def sample_latents(self, num):
        if self._trainer is None or num != 2 * BATCH:
            return super().sample_latents(num)
        self.draws += 1
        parts = []
        for rank in range(2):
            with self._seeded(self.seed, rank, self.critic_step):
                parts.append([torch.randn(BATCH, 3) for _ in range(self.draws)][-1])
        return torch.cat(parts)


class Points(SampleDataModule):
    """64 points; each rank reads its share of every epoch."""

    sample_shape = (2,)

    def load(self):
        points = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
        return TensorSamples(points), TensorSamples(points)


def make_model(kind, **kwargs):
    torch.manual_seed(0)
    critic = LearnedKernelCritic(MLPFeatures(2, 12, (16,)), 12)
    return kind(MLPGenerator(2, 3, (16,)), critic, latent_dim=3, beta=0.1, **kwargs)


def fit(model, path, devices, strategy="auto"):
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=NUM_STEPS,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
    )
    trainer.fit(model, datamodule=Points(BATCH * (2 // devices), num_workers=0, seed=0))
    trainer.save_checkpoint(path / f"{devices}.ckpt", weights_only=True)
    return torch.load(path / f"{devices}.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"critic_mode": "closed_form"},
        {"critic_mode": "adversarial", "alpha": 5.0},
        {"critic_mode": "adversarial", "alpha": 5.0, "penalty_estimator": "lagged"},
    ],
    ids=["closed form", "adversarial", "lagged"],
)
def test_two_processes_train_as_one(kwargs, tmp_path):
    one = make_model(WholeBatch, **kwargs)
    start = copy.deepcopy(one.state_dict())
    whole = fit(one, tmp_path, devices=1)
    parts = fit(make_model(MMDGAN, **kwargs), tmp_path, devices=2, strategy="ddp_fork")
    size = nn.utils.parameters_to_vector([whole[n] - start[n] for n in whole]).norm()
    assert size > 0.05  # they moved
    for name, value in whole.items():
        assert (value - parts[name]).norm() < 1e-9 * size, name
