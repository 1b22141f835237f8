"""The width is the formula at each update, is that of another kernel, and resumes exactly."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny import gan
from torch import nn
from torch.utils.data import DataLoader

from lightning_mmd import (
    BandwidthSchedule,
    Gaussian,
    LearnedKernelCritic,
    Linear,
    RandomFourierFeatures,
    RationalQuadratic,
    SumKernel,
    mmd2_biased,
)
from lightning_mmd.networks import MLPFeatures, MLPGenerator


def model(random_features=True, **kwargs):
    torch.manual_seed(0)
    psi = RandomFourierFeatures(Gaussian(0.5), 4, 32) if random_features else None
    critic = LearnedKernelCritic(MLPFeatures(2, 4, (8,)), 4, psi)
    return gan(MLPGenerator(2, 3, (8,)), critic, latents=3, **kwargs)


def data():
    torch.manual_seed(1)
    return DataLoader(torch.randn(12, 2), batch_size=12)


def trainer(max_steps, *callbacks):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu"}
    return Trainer(max_steps=max_steps, max_epochs=-1, callbacks=[*callbacks], **quiet)


class Watch(Callback):
    def __init__(self, read):
        self.read, self.seen = read, []

    def on_train_batch_end(self, trainer, pl_module, *_):
        value = self.read(pl_module)
        factor = trainer.callback_metrics["bandwidth_factor"].item()
        self.seen.append((trainer.global_step, value, factor))


def test_frequencies_are_those_of_the_scaled_kernel_at_each_generator_update():
    watch = Watch(lambda module: module.critic.random_features.frequencies.clone())
    schedule = BandwidthSchedule(initial=4.0, final=0.25, num_steps=4)
    trainer(6, watch, schedule).fit(model(critic_steps=2), data())
    assert [step for step, *_ in watch.seen] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    for batch, (_, frequencies, logged) in enumerate(watch.seen):
        update = batch // 2  # both batches that lead to an update see one width
        factor = 4.0 * 2.0 ** -min(update, 4)
        assert logged == pytest.approx(factor, rel=1e-6)
        expected = RandomFourierFeatures(Gaussian(0.5 * factor), 4, 32).frequencies
        assert torch.allclose(frequencies, expected, rtol=1e-12)


def test_a_staircase_halves():
    schedule = BandwidthSchedule(initial=8.0, final=2.0, num_steps=20, every_n_steps=10)
    assert [schedule.factor(t) for t in (0, 9, 10, 19, 20, 99)] == [8, 8, 4, 4, 2, 2]
    rising = BandwidthSchedule(initial=0.5, final=1.0, num_steps=2)
    assert rising.factor(1) == pytest.approx(2**-0.5, rel=1e-12)


def test_a_resumed_run_is_exact_even_where_the_features_were_built_otherwise(tmp_path):
    def run(steps, network, **kwargs):
        running = trainer(steps, BandwidthSchedule(initial=3.0, num_steps=7))
        running.fit(network, data(), **kwargs)
        return running

    through, second = model(), model()
    run(6, through)
    run(3, model()).save_checkpoint(tmp_path / "half.ckpt")
    for tensor in [*second.parameters(), *second.buffers()]:
        tensor.data.fill_(7.0)
    run(6, second, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for (name, a), b in zip(
        through.state_dict().items(), second.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


class KernelLoss(LightningModule):
    """A generative moment matching network, whose loss reads a kernel from an attribute."""

    def __init__(self, kernel):
        super().__init__()
        self.generator, self.kernel = nn.Linear(2, 2), kernel

    def training_step(self, batch, batch_idx):
        return mmd2_biased(batch, self.generator(torch.randn(12, 2)), self.kernel)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_kernel_of_a_loss_is_replaced():
    parts = [Gaussian(1.0), SumKernel([RationalQuadratic(0.5, 2.0), Linear()])]
    module = KernelLoss(SumKernel(parts, weights=[0.3, 0.7]))
    watch = Watch(lambda module: module.kernel)
    schedule = BandwidthSchedule(initial=4.0, num_steps=2, target="kernel")
    trainer(3, watch, schedule).fit(module, data())
    x = torch.randn(5, 2)
    for (_, kernel, _), c in zip(watch.seen, (4.0, 2.0, 1.0), strict=True):
        inner = RationalQuadratic(0.5, 2 * c)(x, x) + Linear()(x, x)
        assert torch.allclose(kernel(x, x), 0.3 * Gaussian(c)(x, x) + 0.7 * inner, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "target", "error", "message"),
    [
        (lambda: model(False), "critic", ValueError, r"in 'critic', got LearnedKernelCritic"),
        (model, "netD", ValueError, r"'netD', which MMDGAN.*are: generator, critic"),
        (
            lambda: KernelLoss(Linear()),
            "kernel",
            ValueError,
            r"Linear\(\) has no bandwidth",
        ),
    ],
)
def test_targets_without_a_bandwidth_are_named(module, target, error, message):
    with pytest.raises(error, match=message):
        trainer(1, BandwidthSchedule(2.0, target=target)).fit(module(), data())


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match=r"initial > 0 and final > 0, got 0.0 and 1.0"):
        BandwidthSchedule(0.0)
    with pytest.raises(ValueError, match=r"at least 1, got 1000 and 0"):
        BandwidthSchedule(2.0, every_n_steps=0)
