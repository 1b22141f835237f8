import csv
import random

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_mmd.callbacks import MMDTracker
from lightning_mmd.kernels import RationalQuadratic, SumKernel
from lightning_mmd.mmd import mmd2_biased, mmd2_unbiased, mmd2_with_error

KERNEL = SumKernel([RationalQuadratic(a, bandwidth=4.0) for a in (0.5, 2.0)])


class TinyGenerator(LightningModule):
    """Linear generator of (1, 4, 4) images; its critic, if any, only delays the generator."""

    def __init__(self, critic_steps=1, learning_rate=0.1):
        super().__init__()
        self.automatic_optimization = critic_steps == 1
        self.critic_steps = critic_steps
        self.learning_rate = learning_rate
        torch.manual_seed(1)
        self.generator = nn.Linear(3, 16, dtype=torch.float64)
        self.drawn = []

    def fixed_latents(self, num, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(num, 3, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def sample(self, num, latents=None, generator=None):
        assert len(latents) == num
        torch.rand(3), np.random.rand(3), random.random()  # a sloppy generator
        self.drawn.append((self.global_step, latents))
        return self(latents)

    def forward(self, latents):
        return self.generator(latents).tanh().reshape(-1, 1, 4, 4)

    def training_step(self, batch, batch_idx):
        images = batch[0]
        fake = self(torch.randn(len(images), 3, dtype=torch.float64))
        loss = mmd2_biased(images, fake, KERNEL)
        if self.automatic_optimization:
            return loss
        if (batch_idx + 1) % self.critic_steps == 0:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class Images(TensorDataset):
    """Images with a label, that remember which were read."""

    def __init__(self, num, seed, mean=0.4):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(num, 1, 4, 4, generator=generator, dtype=torch.float64)
        super().__init__((images * 0.2 + mean).clamp(-1, 1), torch.arange(num))
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


class RecordingLogger(DummyLogger):
    def __init__(self):
        super().__init__()
        self.scalars, self.hyperparameters = [], []

    def log_metrics(self, metrics, step=None):
        self.scalars.append((step, metrics))

    def log_hyperparams(self, params, *args, **kwargs):
        self.hyperparameters.append(params)


def make_trainer(tmp_path, *callbacks, logger=False, **kwargs):
    arguments = {"accelerator": "cpu", "devices": 1, "max_epochs": -1, "log_every_n_steps": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return Trainer(
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        logger=logger,
        enable_checkpointing=checkpoints,
        **{**arguments, **quiet, **kwargs},
    )


def loaders(train=24, held_out=20, batch_size=4):
    return (
        DataLoader(Images(train, seed=1), batch_size, shuffle=True),
        DataLoader(Images(held_out, seed=2), batch_size),
    )


def steps(tracker):
    return [entry["step"] for entry in tracker.history]


def test_values_are_mmd2_of_held_out_images_and_fresh_samples(tmp_path):
    tracker = MMDTracker(KERNEL, every_n_steps=3, num_fake=17, sample_batch_size=5)
    model, (train, held_out) = TinyGenerator(), loaders()
    start = TinyGenerator().generator
    make_trainer(tmp_path, tracker, max_steps=7).fit(model, train, held_out)
    assert steps(tracker) == [0, 3, 6, 7]
    real = held_out.dataset.tensors[0]
    latents = {
        step: torch.cat([z for at, z in model.drawn if at == step]) for step in steps(tracker)
    }
    assert {len(z) for z in latents.values()} == {17}
    fake = start(latents[0]).tanh().reshape(-1, 1, 4, 4)
    assert tracker.start == pytest.approx(mmd2_unbiased(real, fake, KERNEL).item(), rel=1e-12)
    last = mmd2_unbiased(real, model(latents[7]), KERNEL).item()
    assert tracker.last == pytest.approx(last, rel=1e-12)
    for first, second in ((0, 3), (3, 6), (6, 7)):  # independent draws, not one repeated
        correlation = torch.corrcoef(torch.stack([latents[first], latents[second]]).flatten(1))
        assert abs(correlation[0, 1]) < 0.5
    assert all(0 < entry["seconds"] < 10 for entry in tracker.history)


@pytest.mark.parametrize(("unbiased", "estimator"), [(True, mmd2_unbiased), (False, mmd2_biased)])
def test_floor_compares_training_with_held_out_images(tmp_path, unbiased, estimator):
    tracker = MMDTracker(KERNEL, unbiased=unbiased)
    train, held_out = loaders(train=20, held_out=20)
    make_trainer(tmp_path, tracker, max_steps=1).fit(TinyGenerator(), train, held_out)
    expected = estimator(held_out.dataset.tensors[0], train.dataset.tensors[0], KERNEL).item()
    assert tracker.floor == pytest.approx(expected, rel=1e-10)
    assert abs(tracker.floor) < tracker.start / 5
    tracker = MMDTracker(KERNEL, floor=False)
    make_trainer(tmp_path, tracker, max_steps=1).fit(TinyGenerator(), train, held_out)
    assert tracker.floor is None


def test_subsets_and_latents_depend_on_the_seed_alone(tmp_path):
    def run(seed, global_seed):
        (train, held_out), model = loaders(train=30), TinyGenerator()
        tracker = MMDTracker(KERNEL, num_real=8, num_fake=8, seed=seed)
        torch.manual_seed(global_seed)
        trainer = make_trainer(tmp_path, tracker, max_steps=1, limit_val_batches=0)
        trainer.fit(model, train, held_out)
        return held_out.dataset.read, model.drawn[0][1].tolist(), tracker.start, tracker.floor

    read, *values = run(seed=0, global_seed=5)
    assert len(set(read)) == len(read) == 8
    assert read != sorted(read)
    assert run(seed=0, global_seed=6) == (read, *values)
    for one, other in zip((read, *values), run(seed=1, global_seed=5), strict=True):
        assert one != other


def test_two_trackers_keep_apart(tmp_path):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4, dtype=torch.float64), nn.Dropout(0.9))
    pixels = MMDTracker(KERNEL, num_fake=8)
    embedded = MMDTracker(KERNEL, num_fake=8, features=net, name="mmd2_embedded")
    model, (train, held_out) = TinyGenerator(), loaders()
    trainer = make_trainer(tmp_path, pixels, embedded, max_steps=1)
    trainer.fit(model, train, held_out)
    real, fake = held_out.dataset.tensors[0], model(model.drawn[-1][1])
    expected = mmd2_unbiased(real, fake, KERNEL).item()
    assert pixels.last == pytest.approx(expected, rel=1e-12)
    expected = mmd2_unbiased(net[:2](real), net[:2](fake), KERNEL).item()
    assert embedded.last == pytest.approx(expected, rel=1e-12)
    keys = {"val/mmd2", "val/mmd2_real", "val/mmd2_embedded", "val/mmd2_embedded_real"}
    assert keys <= set(trainer.callback_metrics)
    assert pixels.state_key != embedded.state_key


def test_batches_of_the_critic_alone_measure_nothing(tmp_path):
    tracker = MMDTracker(KERNEL, every_n_steps=2, num_fake=8)
    model, (train, held_out) = TinyGenerator(critic_steps=5), loaders(train=100)
    make_trainer(tmp_path, tracker, max_epochs=1).fit(model, train, held_out)
    assert model.global_step == 5
    assert steps(tracker) == [0, 2, 4, 5]
    assert [step for step, _ in model.drawn] == [0, 2, 4, 5]


class Probe(Callback):
    """Reads what other callbacks can see, and stops training on request."""

    def __init__(self, stop_at=None):
        self.stop_at = stop_at
        self.start = self.epoch_end = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            self.start = trainer.callback_metrics["val/mmd2"].item()
        trainer.should_stop = trainer.global_step + 1 == self.stop_at

    def on_train_epoch_end(self, trainer, pl_module):
        self.epoch_end = trainer.callback_metrics["val/mmd2"].item()


def test_the_end_of_the_last_epoch_is_measured_before_checkpoints(tmp_path):
    tracker, probe = MMDTracker(KERNEL, every_n_steps=4), Probe()
    make_trainer(tmp_path, tracker, probe, max_epochs=2).fit(TinyGenerator(), *loaders())
    assert steps(tracker) == [0, 4, 8, 12]
    tracker = MMDTracker(KERNEL, every_n_steps=5)
    make_trainer(tmp_path, tracker, probe, max_epochs=2).fit(TinyGenerator(), *loaders())
    assert steps(tracker) == [0, 5, 10, 12]
    assert probe.start == tracker.start
    assert probe.epoch_end == tracker.last


def test_an_early_stop_is_measured(tmp_path):
    tracker = MMDTracker(KERNEL, every_n_steps=4)
    trainer = make_trainer(tmp_path, tracker, Probe(stop_at=7), max_steps=100)
    trainer.fit(TinyGenerator(), *loaders())
    assert steps(tracker) == [0, 4, 7]


def test_logs_share_the_axis_and_say_what_is_measured(tmp_path):
    logger = RecordingLogger()
    tracker = MMDTracker(KERNEL, every_n_steps=2, num_fake=9)
    train, held_out = loaders()
    trainer = make_trainer(tmp_path, tracker, logger=logger, max_steps=5)
    trainer.fit(TinyGenerator(), train, held_out)
    logged = [(step, metrics) for step, metrics in logger.scalars if "val/mmd2" in metrics]
    assert logged == [
        (
            entry["step"],
            {
                "val/mmd2": entry["mmd2"],
                "val/mmd2_error": entry["mmd2_error"],
                "val/mmd2_real": tracker.floor,
                "val/mmd2_error_real": tracker.floors["mmd2_error"],
            },
        )
        for entry in tracker.history
    ]
    (measured,) = (p["val/mmd2"] for p in logger.hyperparameters if p and "val/mmd2" in p)
    images = held_out.dataset.tensors[0]
    assert measured == {
        "split": "validation",
        "kernel": repr(KERNEL),
        "features": "none",
        "estimator": "unbiased",
        "num_real": 20,
        "num_fake": 9,
        "real_range": [images.min().item(), images.max().item()],
    }
    assert trainer.progress_bar_metrics["val/mmd2"] == tracker.last
    assert trainer.callback_metrics["val/mmd2_real"].item() == tracker.floor


def test_tensorboard_shows_scalars_and_text(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    tracker = MMDTracker(KERNEL, every_n_steps=2)
    make_trainer(tmp_path, tracker, logger=logger, max_steps=3).fit(TinyGenerator(), *loaders())
    events = EventAccumulator(logger.log_dir).Reload()
    values = [(event.step, event.value) for event in events.Scalars("val/mmd2")]
    assert values == [(e["step"], pytest.approx(e["mmd2"], rel=1e-6)) for e in tracker.history]
    (text,) = events.Tensors("val/mmd2/text_summary")
    assert repr(KERNEL) in text.tensor_proto.string_val[0].decode()


def test_checkpoints_can_monitor_the_value(tmp_path):
    tracker = MMDTracker(KERNEL, every_n_steps=2)
    checkpoint = ModelCheckpoint(
        tmp_path / "best", monitor="val/mmd2", every_n_train_steps=2, filename="{step}"
    )
    trainer = make_trainer(tmp_path, checkpoint, tracker, max_steps=8)
    trainer.fit(TinyGenerator(learning_rate=0.5), *loaders())
    best = min(tracker.history[1:], key=lambda entry: entry["mmd2"])
    assert checkpoint.best_model_score.item() == best["mmd2"]
    assert checkpoint.best_model_path.endswith(f"step={best['step']}.ckpt")


def test_a_resumed_run_continues_the_history(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="{step}")
    first = MMDTracker(KERNEL, every_n_steps=2, num_fake=8)
    make_trainer(tmp_path, first, checkpoint, max_steps=5).fit(TinyGenerator(), *loaders())
    assert steps(first) == [0, 2, 4, 5]
    second, model = MMDTracker(KERNEL, every_n_steps=2, num_fake=8), TinyGenerator()
    trainer = make_trainer(tmp_path, second, max_steps=8)
    trainer.fit(model, *loaders(), ckpt_path=tmp_path / "step=4.ckpt")
    assert steps(second) == [0, 2, 4, 6, 8]
    assert second.history[:3] == first.history[:3]
    assert second.start == first.start
    assert [step for step, _ in model.drawn] == [6, 8]
    make_trainer(tmp_path, second, max_steps=1).fit(TinyGenerator(), *loaders())  # a new run
    assert steps(second) == [0, 1]


def test_validate_and_test_alone_measure_once(tmp_path):
    model, (_, held_out) = TinyGenerator(), loaders()
    tracker = MMDTracker(KERNEL, num_fake=11, sample_batch_size=4)
    for run, key in (("validate", "val/mmd2"), ("test", "test/mmd2")):
        model.drawn.clear()
        trainer = make_trainer(tmp_path, tracker)
        (result,) = getattr(trainer, run)(model, held_out, verbose=False)
        fake = model(torch.cat([latents for _, latents in model.drawn]))
        assert len(fake) == 11
        expected = mmd2_with_error(held_out.dataset.tensors[0], fake, KERNEL)
        assert result == {
            key: pytest.approx(expected.value, rel=1e-12),
            key + "_error": pytest.approx(expected.std_error, rel=1e-12),
        }
    assert tracker.history == []


def test_two_processes_equal_one(tmp_path):
    def measure(name, **kwargs):
        logger = CSVLogger(tmp_path, name)
        tracker = MMDTracker(KERNEL, num_real=13, num_fake=7, sample_batch_size=2)
        trainer = make_trainer(tmp_path, tracker, logger=logger, max_steps=1, **kwargs)
        trainer.fit(TinyGenerator(learning_rate=0.0), *loaders())
        (path,) = tmp_path.glob(f"{name}/*/metrics.csv")
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if row["val/mmd2"]]
        return [(row["step"], row["val/mmd2"], row["val/mmd2_real"]) for row in rows]

    single = measure("single")
    assert [row[0] for row in single] == ["0", "1"]
    assert measure("double", devices=2, strategy="ddp_fork") == single


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(8, 1, 4, 4))


@pytest.mark.parametrize(
    ("held_out", "error", "message"),
    [
        (None, ValueError, "no validation data. Pass val_dataloaders"),
        (DataLoader(Stream(), 4), TypeError, "by index from the dataset"),
        (DataLoader(["a"] * 8, 4), TypeError, "floating-point tensor of real samples.*got str"),
        (DataLoader(torch.full((8, 1, 4, 4), torch.nan), 4), ValueError, "finite images, got NaN"),
        (DataLoader(torch.zeros(1, 1, 4, 4), 4), ValueError, r"2 images a side.*got 1 on 1"),
        (DataLoader(torch.zeros(8, 1, 5, 5), 4), ValueError, r"one shape, got \(1, 4, 4\) after"),
        (DataLoader(torch.zeros(8, 1, 4, 4).byte(), 4), TypeError, r"got torch.uint8\. Convert"),
    ],
    ids=["none", "stream", "strings", "nan", "one", "shape", "bytes"],
)
def test_unusable_data_is_refused_before_the_first_step(tmp_path, held_out, error, message):
    model = TinyGenerator()
    trainer = make_trainer(tmp_path, MMDTracker(KERNEL), max_steps=2, num_sanity_val_steps=0)
    with pytest.raises(error, match=message):
        trainer.fit(model, loaders()[0], held_out)
    assert trainer.global_step == 0


def test_unusable_modules_and_arguments_are_refused(tmp_path):
    class Unsampled(LightningModule):
        def training_step(self, batch, batch_idx):
            raise AssertionError

        def configure_optimizers(self):
            return None

    trainer = make_trainer(tmp_path, MMDTracker(KERNEL), max_steps=2)
    with pytest.raises(TypeError, match=r"sample\(num, latents\).*got Unsampled"):
        trainer.fit(Unsampled(), loaders()[0])
    with pytest.raises(ValueError, match="every_n_steps of at least 1, got 0"):
        MMDTracker(KERNEL, every_n_steps=0)
    with pytest.raises(ValueError, match=r"at least 2 and sample_batch_size.*got 1, 2000 and 500"):
        MMDTracker(KERNEL, num_real=1)


def test_streamed_training_data_need_no_floor(tmp_path):
    class Pairs(IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(1, 4, 4), 0)] * 8)

    train, held_out = DataLoader(Pairs(), 4), loaders()[1]
    with pytest.raises(TypeError, match="set floor=False, or put the images into a map-style"):
        make_trainer(tmp_path, MMDTracker(KERNEL), max_steps=2).fit(
            TinyGenerator(), train, held_out
        )
    tracker = MMDTracker(KERNEL, floor=False)  # the cure
    make_trainer(tmp_path, tracker, max_steps=2).fit(TinyGenerator(), train, held_out)
    assert len(tracker.history) == 2
