"""Whoever looks on changes nothing, reads no test data, and stops with the others."""

import copy

import pytest
import torch
from foreign import SHAPE, HingeGAN, mlp
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers.logger import DummyLogger
from tiny import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_mmd import (
    BatchParts,
    ConstantNoise,
    ConvergenceMonitor,
    Gaussian,
    GeneratorEMA,
    InstanceNoise,
    MMDTracker,
    NoiseInjection,
    ParametricGradientPenalty,
    RelativeTestLR,
    SampleGrid,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*but have no `validation_step`:UserWarning")
NAMES = {"generator": "netG", "critic": "netD"}


class GAN(HingeGAN):
    def __init__(self, critic=None):
        generator = nn.Sequential(mlp(5, 16), nn.Tanh(), nn.Unflatten(1, SHAPE))
        critic = critic or nn.Sequential(nn.Flatten(), nn.Dropout(0.1), mlp(16, 1))
        super().__init__(generator, critic, 5)

    def fixed_latents(self, num, seed=0):
        return torch.randn(num, 5, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def sample(self, num, latents):
        return self.netG(latents)


def images(num=80):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(num, *SHAPE, generator=rng).tanh()


def fit(module, path, *callbacks, data=None, **kwargs):
    torch.manual_seed(5)
    trainer = quiet_trainer(path, callbacks=list(callbacks), max_epochs=1, **kwargs)
    if isinstance(data, LightningDataModule):
        trainer.fit(module, data)
    else:
        loader = DataLoader(TensorDataset(images()) if data is None else data, 8)
        trainer.fit(module, loader, loader)
    return trainer


def observers(path):
    return [
        MMDTracker(Gaussian(2.0), 2, num_real=20, num_fake=20),
        ConvergenceMonitor(2, Gaussian(2.0), 20, **NAMES),
        SampleGrid(2, 4, dirpath=path / "grids"),
        GeneratorEMA(3.0, generator="netG"),
    ]


@pytest.mark.parametrize("kind", [InstanceNoise, NoiseInjection, ParametricGradientPenalty])
def test_training_is_bit_for_bit_the_same_beside_observers(kind, tmp_path):
    def actor():
        if kind is ParametricGradientPenalty:
            return kind(0.5, **NAMES)
        return kind(ConstantNoise(0.3), **NAMES)

    torch.manual_seed(0)
    module = GAN()
    alone = copy.deepcopy(module)
    fit(module, tmp_path, *observers(tmp_path), actor())
    fit(alone, tmp_path, actor())
    for own, other in zip(module.parameters(), alone.parameters(), strict=True):
        assert torch.equal(own, other)


class Untouched(Dataset):
    """Test data that nobody may read."""

    def __len__(self):
        return 80

    def __getitem__(self, index):
        raise AssertionError("the test split was read")


class Splits(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(images()), 8)

    val_dataloader = train_dataloader

    def test_dataloader(self):
        return DataLoader(Untouched(), 8)


class Recorder(DummyLogger):
    def __init__(self):
        super().__init__()
        self.facts = {}

    def log_hyperparams(self, params, *_):
        self.facts.update(params)


def test_no_callback_reads_the_test_split_and_each_names_its_own(tmp_path):
    logger = Recorder()
    test = RelativeTestLR(
        Gaussian(2.0), 2, lookback=1, patience=1, num_samples=20, features=nn.Flatten()
    )
    fit(GAN(), tmp_path, *observers(tmp_path), test, data=Splits(), logger=logger)
    assert test.history
    assert logger.facts["val/mmd2"]["split"] == "validation"
    assert logger.facts["convergence"]["split"] == "training"


class Scaled(GAN):
    """Trains on 2 x - 1, and samples exactly that."""

    pixels = images(200).double().mul(0.5).add(0.5)

    def training_step(self, batch, batch_idx):
        super().training_step((2 * batch[0] - 1,), batch_idx)

    def sample(self, num, latents):
        return 2 * self.pixels[torch.randperm(200)[:num]] - 1


class ScaledOnTransfer(Scaled):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (2 * batch[0] - 1,)

    def training_step(self, batch, batch_idx):
        HingeGAN.training_step(self, batch, batch_idx)


@pytest.mark.parametrize("kind", ["tracker", "monitor"])
def test_images_that_training_step_scales_are_warned_of(kind, tmp_path):
    callback = {
        "tracker": MMDTracker(Gaussian(2.0), 5, 50, 50),
        "monitor": ConvergenceMonitor(5, Gaussian(2.0), 50, **NAMES),
    }[kind]
    with pytest.warns(UserWarning, match=r"real images range from 0.* in on_after_batch_transfer"):
        fit(Scaled(), tmp_path, callback, data=TensorDataset(Scaled.pixels))


def test_a_perfect_generator_is_one_where_hooks_or_collation_scale(tmp_path):
    def collate(items):
        return (2 * torch.stack([x for (x,) in items]) - 1,)

    data = TensorDataset(Scaled.pixels)
    for module, loader in (
        (ScaledOnTransfer(), DataLoader(data, 8)),
        (Scaled(), DataLoader(data, 8, collate_fn=collate)),
    ):
        tracker = MMDTracker(Gaussian(2.0), 100, 200, 200)
        module.training_step = lambda batch, _, m=module: HingeGAN.training_step(m, batch, 0)
        trainer = quiet_trainer(tmp_path, callbacks=[tracker], max_epochs=1)
        trainer.fit(module, loader, loader)
        assert abs(tracker.last) < 0.01  # all 200 on both sides
        assert abs(tracker.floor) < 0.01


def test_batches_of_dictionaries_are_read_by_their_keys(tmp_path):
    class Named(Dataset):
        def __len__(self):
            return 80

        def __getitem__(self, index):
            return {"digit": index % 10, "image": images()[index]}

    class OnDictionaries(GAN):
        def training_step(self, batch, batch_idx):
            super().training_step((batch["image"],), batch_idx)

    parts = BatchParts("image", "digit")
    tracker = MMDTracker(Gaussian(2.0), 5, 80, 20, batch=parts)
    monitor = ConvergenceMonitor(5, Gaussian(2.0), 80, **NAMES, batch=parts)
    average = GeneratorEMA(half_life_images=30, generator="netG", batch=parts)
    penalty = ParametricGradientPenalty(0.1, **NAMES, latents=5, batch=parts)
    fit(OnDictionaries(), tmp_path, tracker, monitor, average, penalty, data=Named())
    assert average.state_dict()["clock"] == 80
    assert penalty.critic_step == 10
    with pytest.raises(TypeError, match=r"MMDTracker: a batch is a dictionary .*'image'\]"):
        fit(OnDictionaries(), tmp_path, MMDTracker(Gaussian(2.0)), data=Named())
