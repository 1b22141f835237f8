"""The average is the formula, moves only with the generator, and is used where samples are seen."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tiny import gan
from torch import nn
from torch.utils.data import DataLoader

from lightning_mmd import MMDGAN, Gaussian, GeneratorEMA, LearnedKernelCritic, MMDTracker
from lightning_mmd.networks import MLPFeatures, MLPGenerator


def data():
    return DataLoader(torch.randn(12, 2), batch_size=12)


def model(**kwargs):
    torch.manual_seed(0)
    critic = LearnedKernelCritic(MLPFeatures(2, 8, (8,)), 8)
    return gan(MLPGenerator(2, 3, (8,)), critic, latents=3, **kwargs)


def trainer(max_steps, *callbacks, **kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "log_every_n_steps": 1}
    return Trainer(max_steps=max_steps, max_epochs=-1, callbacks=[*callbacks], **(quiet | kwargs))


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()]).clone()


class Watch(Callback):
    """Keeps the generator's weights, and what it averages to, after every batch."""

    def __init__(self, name="generator"):
        self.name, self.live, self.averages = name, [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.live.append(flat(getattr(pl_module, self.name)))
        (ema,) = (c for c in trainer.callbacks if isinstance(c, GeneratorEMA))
        average = ema.averaged_generator
        self.averages.append(None if average is None else flat(average))


def by_hand(live, half_life, ramp=None, unit=1.0, first=None):
    """The average of a list of weights, one a generator update, `unit` images or updates apart."""
    average, clock = live[0], (unit if first is None else first)
    for weights in live[1:]:
        clock += unit
        life = half_life if ramp is None else min(half_life, ramp * clock)
        d = 0.5 ** (unit / life)
        average = d * average + (1 - d) * weights
    return average


@pytest.mark.parametrize(("ramp", "critic_steps"), [(None, 1), (0.5, 1), (None, 3)])
def test_the_average_is_the_formula_on_the_generators_clock(ramp, critic_steps):
    watch, ema = Watch(), GeneratorEMA(half_life=2.0, ramp=ramp)
    trainer(5, watch, ema).fit(model(critic_steps=critic_steps), data())
    live = watch.live[critic_steps - 1 :: critic_steps]
    assert len(watch.live) == 5 * critic_steps
    assert watch.averages[: critic_steps - 1] == [None] * (critic_steps - 1)
    for num in range(1, 6):  # the average of the same update, though the watch was listed first
        expected = by_hand(live[:num], 2.0, ramp)
        assert torch.allclose(watch.averages[num * critic_steps - 1], expected, atol=1e-12)
    assert (live[-1] - expected).norm() > 1e-3 * live[-1].norm()
    assert not any(name.startswith("critic") for name in ema.averaged_generator.state_dict())


def test_half_life_in_images_counts_every_batch():
    watch, ema = Watch(), GeneratorEMA(half_life_images=48, ramp=None)
    trainer(4, watch, ema).fit(model(critic_steps=2), data())
    expected = by_hand(watch.live[1::2], 48.0, unit=24.0)
    assert torch.allclose(flat(ema.averaged_generator), expected, atol=1e-12)
    assert not torch.allclose(flat(ema.averaged_generator), watch.live[-1], atol=1e-6)


class Validates(MMDGAN):
    def validation_step(self, batch, batch_idx):
        self.seen = (self.trainer.global_step, self.sample(5, self.fixed_latents(5)))


def test_samples_trackers_and_validation_see_the_average_and_training_does_not():
    torch.manual_seed(0)
    tracker = MMDTracker(Gaussian(), every_n_steps=3, num_real=12, num_fake=6, seed=4)
    network, ema = model(), GeneratorEMA(half_life=3.0)
    network.__class__ = Validates
    values = {"check_val_every_n_epoch": None, "val_check_interval": 4, "num_sanity_val_steps": 1}
    loader = data()
    trainer(4, tracker, ema, **values).fit(network, loader, loader)
    plain, watch = model(), Watch()
    trainer(4, watch, GeneratorEMA(half_life=3.0)).fit(plain, loader)
    assert torch.equal(flat(network.generator), flat(plain.generator))  # not overwritten at the end
    z = network.fixed_latents(5)
    averaged = ema.averaged_generator.eval()(z)
    assert torch.equal(network.sample(5, z), averaged)
    assert not torch.allclose(network.generator(z), averaged, atol=1e-6)
    assert network.seen[0] == 4
    assert torch.equal(network.seen[1], averaged)
    assert len(list(network.parameters())) == len(list(plain.parameters()))
    untouched = model()
    twin = MMDTracker(Gaussian(), every_n_steps=3, num_real=12, num_fake=6, seed=4)
    trainer(4, twin).fit(untouched, loader, loader)
    assert tracker.history[0]["mmd2"] == twin.history[0]["mmd2"]  # no average yet
    assert abs(tracker.history[1]["mmd2"] - twin.history[1]["mmd2"]) > 1e-6
    trainer(1).fit(network, loader)  # training goes on without the callback: so does sampling
    assert network.averaged_generator is None


@pytest.mark.parametrize("unit", [{"half_life": 4.0}, {"half_life_images": 70.0}])
def test_a_checkpoint_holds_both_and_a_resumed_run_is_exact(unit, tmp_path):
    loader = data()
    through, ema = model(critic_steps=2), GeneratorEMA(**unit)
    trainer(6, ema).fit(through, loader)
    first, half = model(critic_steps=2), GeneratorEMA(**unit)
    short = trainer(3, half)
    short.fit(first, loader)
    short.save_checkpoint(tmp_path / "half.ckpt")
    second, resumed = model(critic_steps=2), GeneratorEMA(**unit)
    trainer(6, resumed).fit(second, loader, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(flat(second.generator), flat(through.generator))
    assert torch.equal(flat(resumed.averaged_generator), flat(ema.averaged_generator))
    z = through.fixed_latents(4)
    assert torch.equal(second.sample(4, z), through.sample(4, z))
    loaded = MMDGAN.load_from_checkpoint(
        tmp_path / "half.ckpt",
        generator=MLPGenerator(2, 3, (8,)),
        critic=model().critic,
        rule=first.rule,
    )
    assert torch.equal(loaded.sample(4, z), first.sample(4, z))
    assert torch.equal(flat(loaded.generator), flat(first.generator))
    assert not torch.equal(flat(loaded.generator), flat(loaded.averaged_generator))
    before = model(critic_steps=2)
    early = trainer(1, GeneratorEMA())
    early.fit(before, loader)
    without = trainer(4)
    without.fit(model(critic_steps=2), loader, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert without.lightning_module.averaged_generator is None


class Foreign(LightningModule):
    """A GAN with two optimizers, of which both count in global_step."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.netG = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.netD = nn.Linear(2, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        g, d = self.optimizers()
        optimizer, sign = (g, -1) if self.global_step % 3 == 2 else (d, 1)
        optimizer.zero_grad()
        gap = self.netD(self.netG(torch.randn(12, 2))).mean() - self.netD(batch).mean()
        self.manual_backward(sign * gap + self.netD.weight.square().sum())
        optimizer.step()

    def sample(self, num, latents=None):
        self.seen.append(flat(self.netG))
        with torch.no_grad():
            return self.netG(latents)

    def fixed_latents(self, num, seed):
        return torch.randn(num, 2, generator=torch.Generator().manual_seed(seed))

    def validation_step(self, batch, batch_idx):
        if self.global_step == 9:
            self.validated = flat(self.netG)
        if self.global_step == 12:
            raise KeyboardInterrupt

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.netG, self.netD)]


def test_a_foreign_module_is_swapped_while_it_is_looked_at():
    watch, ema = Watch("netG"), GeneratorEMA(half_life=2.0, ramp=None, generator="netG")
    tracker = MMDTracker(Gaussian(), every_n_steps=3, num_real=12, num_fake=6)
    loader, network = data(), Foreign()
    values = {"check_val_every_n_epoch": None, "val_check_interval": 3, "num_sanity_val_steps": 0}
    running = trainer(15, watch, tracker, ema, **values)
    with pytest.raises(SystemExit):
        running.fit(network, loader, loader)
    assert len(watch.live) == 12  # validation at update 12 was broken off
    updates = watch.live[2::3]
    assert torch.allclose(watch.averages[8], by_hand(updates[:3], 2.0), atol=1e-12)
    assert torch.equal(network.validated, watch.averages[8])
    assert torch.equal(network.seen[1], watch.averages[8])
    assert torch.equal(flat(network.netG), watch.live[-1])


@pytest.mark.parametrize("name", ["half_life", "half_life_images", "ramp"])
def test_bad_arguments_are_named(name):
    with pytest.raises(ValueError, match=f"{name} > 0, got 0"):
        GeneratorEMA(**{name: 0.0})
    with pytest.raises(ValueError, match=r"'net'.*MMDGAN has no.*generator \(MLPGenerator\)"):
        trainer(1, GeneratorEMA(generator="net")).fit(model(), data())
