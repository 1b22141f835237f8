"""One clock: the updates of the named generator, whatever moves it."""

import csv

import pytest
import torch
from foreign import SHAPE, HingeGAN, mlp
from lightning.pytorch.loggers import CSVLogger
from tiny import closed_form, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mmd import (
    BandwidthSchedule,
    ConstantNoise,
    ConvergenceMonitor,
    Gaussian,
    GeneratorEMA,
    LearnedKernelCritic,
    MMDTracker,
    NoiseInjection,
    ParametricGradientPenalty,
)
from lightning_mmd.features import RandomFourierFeatures

pytestmark = pytest.mark.filterwarnings("ignore:.*but have no `validation_step`:UserWarning")
NAMES = {"generator": "netG", "critic": "netD"}


class GAN(HingeGAN):
    def __init__(self):
        generator = nn.Sequential(mlp(5, 16), nn.Tanh(), nn.Unflatten(1, SHAPE))
        super().__init__(generator, nn.Sequential(nn.Flatten(), mlp(16, 1)), 5)

    def fixed_latents(self, num, seed=0):
        return torch.randn(num, 5, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def sample(self, num, latents):
        return self.netG(latents)


def loader():
    rng = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(64, *SHAPE, generator=rng).tanh()), 8)


def fit(module, path, *callbacks, epochs=1, trainer=None, **kwargs):
    torch.manual_seed(5)
    if trainer is None:
        trainer = quiet_trainer(path, callbacks=list(callbacks), max_epochs=epochs, **kwargs)
    trainer.fit(module, loader(), loader())
    return trainer


def tracker(every=2, **kwargs):
    return MMDTracker(Gaussian(2.0), every, num_real=20, num_fake=20, **kwargs)


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


class FewUpdates(GAN):
    """The generator moves in every fourth batch."""

    def training_step(self, batch, batch_idx):
        moving = self.optimizers()[0]
        if batch_idx % 4 < 3:
            moving.step = lambda *_: None
        super().training_step(batch, batch_idx)
        vars(moving).pop("step", None)


def test_observations_are_spaced_by_generator_updates(tmp_path):
    watches = [tracker(), ConvergenceMonitor(2, Gaussian(2.0), 20, **NAMES)]
    trainer = fit(GAN(), tmp_path, *watches)
    assert trainer.global_step == 16  # both optimizers'
    assert [entry["step"] for entry in watches[0].history] == [0, 2, 4, 6, 8]
    assert watches[1].traces.steps == [0, 2, 4, 6, 8]
    assert torch.tensor(watches[1].traces.descent[1:]).isfinite().all()  # even intervals too
    seldom = tracker(1)
    fit(FewUpdates(), tmp_path, seldom)
    assert [entry["step"] for entry in seldom.history] == [0, 1, 2]


def test_all_that_is_logged_lies_on_one_axis(tmp_path):
    logger = CSVLogger(tmp_path)
    callbacks = [
        tracker(),
        ParametricGradientPenalty(0.5, **NAMES),
        NoiseInjection(ConstantNoise(0.1), **NAMES),
    ]
    fit(GAN(), tmp_path, *callbacks, logger=logger, log_every_n_steps=2)
    text = (tmp_path / logger.log_dir / "metrics.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    for name in ("val/mmd2", "penalty/parametric", "penalty/share", "noise/level"):
        assert max(int(row["step"]) for row in rows if row.get(name)) == 8, name


class DataSGD(torch.optim.SGD):
    """As optimizers of the days of .data are written."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.add_(p.grad, alpha=-group["lr"])


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.Adam(p, 1e-2, fused=True),
        lambda p: torch.optim.Adam(p, 1e-2, foreach=True),
        lambda p: DataSGD(p, 1e-1),
    ],
    ids=["fused", "foreach", "data"],
)
def test_averages_are_taken_whatever_the_optimizer(optimizer, tmp_path):
    class Optimised(GAN):
        def configure_optimizers(self):
            return [optimizer(net.parameters()) for net in (self.netG, self.netD)]

        def on_train_batch_end(self, *_):
            self.kept = [*getattr(self, "kept", []), flat(self.netG)]

    average, module = GeneratorEMA(2.0, ramp=None, generator="netG"), Optimised()
    fit(module, tmp_path, average)
    expected = module.kept[0]
    for weights in module.kept[1:]:
        expected = torch.lerp(weights, expected, 0.5**0.5)
    torch.testing.assert_close(flat(average.averaged_generator), expected, rtol=1e-12, atol=0)


def test_an_optimizer_that_lightning_does_not_know_counts(tmp_path):
    class Own(GAN):
        def __init__(self):
            super().__init__()
            self.own = torch.optim.SGD(self.netG.parameters(), 1e-2)

        def optimizers(self):
            return self.own, super().optimizers()

        def configure_optimizers(self):
            return torch.optim.SGD(self.netD.parameters(), 1e-2)

    average, seen = GeneratorEMA(2.0, generator="netG"), tracker(3)
    fit(Own(), tmp_path, average, seen)
    assert average.updates == 8
    assert [entry["step"] for entry in seen.history] == [0, 3, 6, 8]


def test_a_second_fit_goes_on(tmp_path):
    once, twice = GAN(), GAN()
    kinds = [lambda: GeneratorEMA(3.0, generator="netG"), tracker]
    kinds.append(lambda: NoiseInjection(ConstantNoise(0.1), **NAMES))
    kinds.append(lambda: ParametricGradientPenalty(0.5, **NAMES))
    through, parts = [make() for make in kinds], [make() for make in kinds]
    fit(once, tmp_path, *through, epochs=2)
    trainer = fit(twice, tmp_path, *parts, epochs=1)
    assert [c.updates for c in parts] == [8] * 4
    trainer.fit_loop.max_epochs = 2
    fit(twice, tmp_path, trainer=trainer)
    assert [c.updates for c in parts] == [c.updates for c in through] == [16] * 4
    assert parts[0].state_dict()["clock"] == 16
    assert [e["step"] for e in parts[1].history] == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    fit(twice, tmp_path, *parts, epochs=1)  # another trainer: a new run
    assert [c.updates for c in parts] == [8] * 4


def test_a_bandwidth_in_a_second_fit_is_not_scaled_twice(tmp_path):
    features = RandomFourierFeatures(Gaussian(1.0), 4, 8)
    configured = features.frequencies.clone()
    critic = LearnedKernelCritic(nn.Linear(2, 4), 4, random_features=features)
    model = closed_form(nn.Linear(3, 2), critic, latents=3)
    schedule = BandwidthSchedule(4.0, 1.0, num_steps=8)
    trainer = quiet_trainer(tmp_path, callbacks=[schedule], max_steps=4)
    data = DataLoader(torch.randn(8, 2), 8)
    trainer.fit(model, data)
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(model, data)
    found = model.critic.random_features.frequencies
    torch.testing.assert_close(found, configured / schedule.factor(5))


def test_the_generator_that_sample_calls_is_found_else_asked_for(tmp_path):
    class Renamed(GAN):
        def __init__(self):
            super().__init__()
            self.decoder = self.netG
            del self.netG

        def training_step(self, batch, batch_idx):
            self.netG = self.decoder
            try:
                super().training_step(batch, batch_idx)
            finally:
                del self.netG

        def sample(self, num, latents):
            return self.decoder(latents)

        def configure_optimizers(self):
            return [torch.optim.Adam(net.parameters()) for net in (self.decoder, self.netD)]

    found = tracker(4)
    fit(Renamed(), tmp_path, found)
    assert [entry["step"] for entry in found.history] == [0, 4, 8]

    class Hidden(Renamed):
        def sample(self, num, latents):
            return torch.zeros(num, *SHAPE)

    with pytest.raises(ValueError, match=r"It has .*decoder \(Sequential\).*Set generator"):
        fit(Hidden(), tmp_path, tracker(4))
    named = tracker(4, generator="decoder")
    with pytest.warns(UserWarning, match="real images range"):  # zeros cover nothing
        fit(Hidden(), tmp_path, named)
    assert [entry["step"] for entry in named.history] == [0, 4, 8]


def test_two_of_a_kind_live_side_by_side(tmp_path):
    class Two(GAN):
        def __init__(self):
            super().__init__()
            self.netG2 = nn.Sequential(mlp(5, 16), nn.Tanh(), nn.Unflatten(1, SHAPE))
            self.netD2 = nn.Sequential(nn.Flatten(), mlp(16, 1))

        def training_step(self, batch, batch_idx):
            optimizers = list(self.optimizers())
            for g, d, pair in ((self.netG, self.netD, (0, 1)), (self.netG2, self.netD2, (2, 3))):
                for index, sign in zip(reversed(pair), (1, -1), strict=True):
                    fake = g(self.draw(8))
                    optimizers[index].zero_grad()
                    fake = fake.detach() if sign == 1 else fake
                    self.manual_backward(sign * (d(fake).mean() - d(batch[0]).mean()))
                    optimizers[index].step()

        def second(self, num, latents):
            with torch.no_grad():
                return self.netG2(latents)

        def configure_optimizers(self):
            nets = (self.netG, self.netD, self.netG2, self.netD2)
            return [torch.optim.Adam(net.parameters(), 1e-3) for net in nets]

    second = {"generator": "netG2", "critic": "netD2"}
    callbacks = [
        *(GeneratorEMA(2.0, generator=g) for g in ("netG", "netG2")),
        *(ParametricGradientPenalty(0.5, **names) for names in (NAMES, second)),
        *(NoiseInjection(ConstantNoise(0.1), **names) for names in (NAMES, second)),
        tracker(4, name="first", generator="netG"),
        tracker(4, name="second", generator="netG2", sampler="second"),
    ]
    assert len({callback.state_key for callback in callbacks}) == len(callbacks)
    module = Two()
    trainer = fit(module, tmp_path, *callbacks)
    logged = trainer.callback_metrics
    for name in ("penalty/netG/netD/share", "penalty/netG2/netD2/share", "noise/netD2/level"):
        assert logged[name] > 0
    assert callbacks[-1].last != callbacks[-2].last
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    state = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert len([key for key in state if key.startswith("GeneratorEMA")]) == 2
    resumed = Two()
    averages = [GeneratorEMA(2.0, generator=g) for g in ("netG", "netG2")]
    again = quiet_trainer(tmp_path, callbacks=averages, max_epochs=1)
    again.fit(resumed, loader(), ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    for own, other in zip(averages, callbacks[:2], strict=True):
        assert torch.equal(flat(own.averaged_generator), flat(other.averaged_generator))
