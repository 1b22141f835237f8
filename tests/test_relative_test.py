"""The rates fall exactly when the test fails three times in a row, and a resumed run agrees."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from tiny import gan
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, SequentialLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_mmd import (
    Gaussian,
    GradientAscent,
    LearnedKernelCritic,
    Polynomial,
    RelativeTestLR,
    relative_similarity_test,
)
from lightning_mmd.callbacks.learning_rates import scale_learning_rates
from lightning_mmd.networks import MLPFeatures, MLPGenerator

KERNEL = Gaussian(3.0)


class Scripted(LightningModule):
    """Samples N(mean, 1) with a mean that is a given function of the generator update."""

    def __init__(self, mean):
        super().__init__()
        self.mean, self.weight, self.drawn = mean, nn.Parameter(torch.zeros(1)), {}

    def fixed_latents(self, num, seed):
        return torch.randn(num, 2, generator=torch.Generator().manual_seed(seed))

    def sample(self, num, latents=None):
        samples = latents + self.mean(self.global_step)
        self.drawn[self.global_step] = samples
        return samples

    def training_step(self, batch, batch_idx):
        return self.weight.square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.8)


def data():
    torch.manual_seed(3)
    return DataLoader(torch.randn(160, 2), batch_size=8)


class Recorder(DummyLogger):
    def __init__(self):
        super().__init__()
        self.scalars = []

    def log_metrics(self, metrics, step=None):
        self.scalars.append((step, metrics))


def trainer(max_steps, *callbacks, logger=False):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "log_every_n_steps": 1}
    return Trainer(
        max_steps=max_steps, max_epochs=-1, callbacks=[*callbacks], logger=logger, **quiet
    )


def schedule(**kwargs):
    defaults = {"every_n_steps": 2, "lookback": 2, "num_samples": 120, "sample_batch_size": 200}
    defaults["threshold"] = 1e-3  # p is uniform where nothing changes: 0.1 would flip now and then
    return RelativeTestLR(KERNEL, **(defaults | kwargs))


def test_a_stuck_generator_lowers_the_rate_at_the_right_updates():
    module, callback, logger = Scripted(lambda t: 1.5), schedule(min_lr=0.15), Recorder()
    trainer(24, callback, logger=logger).fit(module, data())
    assert [entry["step"] for entry in callback.history] == list(range(4, 25, 2))
    assert len({entry["p_value"] for entry in callback.history}) == 11  # fresh samples
    rates = [0.8, 0.8, 0.4, 0.4, 0.4, 0.2, 0.2, 0.2, 0.15, 0.15, 0.15]
    assert [entry["lr"] for entry in callback.history] == pytest.approx(rates)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0))[:120]
    real = data().dataset[order]
    for entry in callback.history:
        then, now = (module.drawn[int(entry["step"]) - ago] for ago in (4, 0))
        expected = relative_similarity_test(real, then, now, KERNEL)
        assert entry["p_value"] == pytest.approx(expected.p_value, rel=1e-9)
    logged = [(s, m) for s, m in logger.scalars if "relative_test/p_value" in m]
    assert [s for s, _ in logged] == list(range(4, 25, 2))
    assert logged[2][1]["relative_test/lr"] == pytest.approx(0.4)


def test_an_improving_generator_keeps_its_rate():
    module, callback = Scripted(lambda t: 6.0 - 0.25 * t), schedule()
    trainer(20, callback).fit(module, data())
    assert len(callback.history) == 9
    assert max(entry["p_value"] for entry in callback.history) < 1e-3
    assert module.optimizers().param_groups[0]["lr"] == 0.8


def test_one_improvement_starts_the_count_anew():
    means = {0: 3, 2: 3, 4: 3, 6: 3, 8: 1, 10: 1, 12: 1, 14: 1, 16: 1}  # better at 8 and 10
    module, callback = Scripted(lambda t: means[t]), schedule()
    trainer(16, callback).fit(module, data())
    improved = [entry["step"] for entry in callback.history if entry["p_value"] < 1e-3]
    assert improved == [8, 10]
    assert [e["step"] for e in callback.history if e["lr"] == pytest.approx(0.4)] == [16]


def test_a_resumed_run_is_exact(tmp_path):
    def run(steps, **kwargs):
        callback, module = schedule(), Scripted(lambda t: 1.5)
        running = trainer(steps, callback)
        running.fit(module, data(), **kwargs)
        return callback, running

    through, _ = run(20)
    _, half = run(10)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed, running = run(20, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert resumed.history == through.history
    assert running.optimizers[0].param_groups[0]["lr"] == through.history[-1]["lr"]


def test_every_rate_of_an_mmdgan_falls_and_features_are_used():
    critic = LearnedKernelCritic(MLPFeatures(2, 4, (8,)), 4)
    adam = torch.optim.Adam
    module = gan(
        MLPGenerator(2, 3, (8,)),
        critic,
        latents=3,
        rule=GradientAscent,
        critic_steps=2,
        generator_optimizer=lambda p: adam(p, lr=0.0),  # it cannot improve
        critic_optimizer=lambda p: adam(p, lr=1e-3),
        generator_scheduler=lambda o: LambdaLR(o, lambda t: 1.0),
    )
    shapes = []
    net = nn.Linear(2, 3)
    callback = schedule(every_n_steps=1, lookback=1, features=net, min_lr=0.0)
    embed = callback._embed
    callback._embed = lambda x: shapes.append(embed(x).shape) or embed(x)
    trainer(4, callback).fit(module, data())
    assert set(shapes) == {(120, 3)}
    assert [entry["step"] for entry in callback.history] == [1, 2, 3, 4]
    assert module.optimizers()[1].param_groups[0]["lr"] == pytest.approx(5e-4)


@pytest.mark.parametrize(
    "build",
    [
        lambda o: LambdaLR(o, lambda t: 1 / (1 + t)),
        lambda o: LinearLR(o, 1.0, 0.1, total_iters=8),
        lambda o: SequentialLR(
            o, [LambdaLR(o, lambda t: (1 + t) / 4), CosineAnnealingLR(o, 9)], milestones=[4]
        ),
    ],
    ids=["lambda", "linear", "sequential"],
)
def test_scaling_composes_with_schedulers(build):
    class Runs(Scripted):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": build(optimizer), "interval": "step"}]

    def rates(scale_at):
        seen = []
        module = Runs(lambda t: 0)
        module.on_train_batch_start = lambda *_: (
            (
                scale_learning_rates(module.trainer, 0.5)
                if module.global_step == scale_at
                else None,
                seen.append(module.optimizers().param_groups[0]["lr"]),
            )
            and None
        )
        trainer(8).fit(module, data())
        return seen

    plain, scaled = rates(None), rates(3)
    assert scaled[:3] == plain[:3]
    assert scaled[3:] == pytest.approx([0.5 * rate for rate in plain[3:]], rel=1e-9)
    assert len(set(plain)) > 4


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(8, 2))


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (DataLoader(Stream(), 4), TypeError, "RelativeTestLR reads images by index"),
        (DataLoader(torch.zeros(2, 2), 2), ValueError, "at least 3 training images, got 2"),
        (DataLoader(["a"] * 5, 2), TypeError, "floating-point tensor of real samples.*got str"),
        (DataLoader(torch.full((9, 2), torch.nan), 4), ValueError, "finite images, got NaN"),
    ],
)
def test_unusable_data_is_named(loader, error, message):
    with pytest.raises(error, match=message):
        trainer(1, schedule()).fit(Scripted(lambda t: 0), loader)


def images(num=64):
    return DataLoader(torch.rand(num, 1, 4, 4) * 2 - 1, batch_size=8)


class Pictures(Scripted):
    """Samples images (n, 1, 4, 4) from 16 latents by a function of update and latents."""

    def __init__(self, picture):
        super().__init__(None)
        self.picture = picture

    def fixed_latents(self, num, seed):
        return torch.rand(num, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    def sample(self, num, latents=None):
        flat = self.picture(self.global_step, latents)
        self.drawn[self.global_step] = flat.double()
        return flat.reshape(num, 1, 4, 4)


def test_images_are_compared_as_vectors():
    module, callback = Pictures(lambda t, z: z + 0.3), schedule(num_samples=40)
    trainer(8, callback).fit(module, images())
    (entry, *_) = callback.history
    assert entry["step"] == 4
    real = callback._real.flatten(1)
    assert real.shape == (40, 16)
    expected = relative_similarity_test(real, module.drawn[0], module.drawn[4], KERNEL)
    assert entry["p_value"] == pytest.approx(expected.p_value, rel=1e-9)
    assert entry["difference"] == pytest.approx(expected.difference, rel=1e-9)


@pytest.mark.parametrize(
    ("picture", "p_value"),
    [
        (lambda t, z: torch.full_like(z, 0.9), 0.5),  # collapsed, saturated
        (lambda t, z: z * torch.nan, float("nan")),  # diverged
        (lambda t, z: z * 1e30, None),  # flown away: no two points are near
    ],
)
def test_broken_generators_do_not_improve_and_training_goes_on(picture, p_value):
    module, callback = Pictures(picture), schedule(num_samples=40)
    running = trainer(8, callback)
    running.fit(module, images())
    assert running.global_step == 8
    assert [entry["step"] for entry in callback.history] == [4, 6, 8]
    if p_value is not None:
        assert [e["p_value"] for e in callback.history] == pytest.approx([p_value] * 3, nan_ok=True)
    assert callback.history[-1]["lr"] == pytest.approx(0.4)  # three tests without improvement


def test_kernel_values_that_are_not_finite_do_not_end_training():
    module = Pictures(lambda t, z: (z * 1e30).float())
    callback = RelativeTestLR(Polynomial(), every_n_steps=2, lookback=1, num_samples=20)
    trainer(4, callback).fit(module, images())
    assert [entry["p_value"] for entry in callback.history] == pytest.approx(
        [float("nan")] * 2, nan_ok=True
    )


def test_half_precision_samples_are_compared_in_float32():
    module = Pictures(lambda t, z: (z + 0.3).to(torch.bfloat16))
    callback = schedule(num_samples=40)
    trainer(4, callback).fit(module, images())
    real = callback._real.float()
    then, now = (module.drawn[t].float().reshape(40, 1, 4, 4) for t in (0, 4))
    expected = relative_similarity_test(real, then, now, KERNEL)
    assert callback.history[0]["p_value"] == pytest.approx(expected.p_value, rel=1e-4)


def test_a_blind_kernel_and_other_shapes_are_refused_before_the_first_update():
    for callback, message in (
        (RelativeTestLR(Gaussian(1e-4), num_samples=20), "a kernel that varies on the images"),
        (RelativeTestLR(KERNEL, num_samples=20, every_n_steps=1), r"\(2,\), got \(1, 4, 4\)"),
    ):
        module = Pictures(lambda t, z: z)
        loader = images() if "varies" in message else data()
        with pytest.raises(ValueError, match=message):
            trainer(4, callback).fit(module, loader)
        assert module.global_step == 0


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="at least 1 and num_samples of at least 3, got 0, 3, 500"):
        RelativeTestLR(KERNEL, lookback=0)
    with pytest.raises(ValueError, match=r"in \(0, 1\) and a finite min_lr >= 0, got 1.0, 0.5"):
        RelativeTestLR(KERNEL, threshold=1.0)
