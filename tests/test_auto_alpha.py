"""The weight that follows the sizes of gradients: closed forms, and a Jacobian that is scaled."""

import math
import re
import warnings

import pytest
import torch
from lightning.pytorch import LightningModule
from tiny import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_mmd import AutoAlpha, LearnedKernelCritic, ParametricGradientPenalty
from lightning_mmd.auto_alpha import FixedAlpha
from lightning_mmd.networks import MLPFeatures, MLPGenerator


def test_the_ratio_is_held_once_the_ramp_is_over():
    auto = AutoAlpha(level=0.2, horizon=10)
    ratios = [auto.update(3.0, 6.0) * 3.0 / 6.0 for _ in range(30)]
    ramp = [0.2 * min(1.0, step / 10) for step in range(1, 31)]
    assert ratios == pytest.approx(ramp, rel=1e-12)


def test_alpha_is_a_geometric_mean_of_newest_weight_one_in_horizon():
    auto, horizon = AutoAlpha(level=0.1, horizon=5), 5
    other = [math.exp(math.sin(k)) for k in range(40)]
    alphas = [auto.update(1.0, q) for q in other]
    mean = 0.0
    for k, q in enumerate(other):
        natural = math.log(0.1 * q)
        mean += (natural - mean) * max(1 / (k + 1), 1 / horizon)
        expected = min(1.0, (k + 1) / horizon) * math.exp(mean)
        assert alphas[k] == pytest.approx(min(expected, 2 * math.exp(natural)), rel=1e-12)


def test_a_sudden_gradient_is_bounded_at_twice_the_level():
    auto = AutoAlpha(level=0.1, horizon=10)
    for _ in range(50):
        auto.update(1.0, 1.0)
    assert auto.update(1e6, 1.0) * 1e6 == pytest.approx(0.2)


@pytest.mark.parametrize("norms", [(0.0, 1.0), (1.0, 0.0), (math.inf, 1.0), (1.0, math.nan)])
def test_a_step_that_teaches_nothing_changes_nothing(norms):
    auto = AutoAlpha(horizon=4)
    auto.update(1.0, 1.0)
    before = auto.state_dict()
    assert auto.update(*norms) == 0.0
    assert auto.state_dict() == before


def test_the_state_goes_on():
    one, other = AutoAlpha(horizon=7), AutoAlpha(horizon=7)
    for k in range(5):
        one.update(1.0 + k, 2.0)
    other.load_state_dict(one.state_dict())
    assert [one.update(2.0, k + 1.0) for k in range(9)] == [
        other.update(2.0, k + 1.0) for k in range(9)
    ]


@pytest.mark.parametrize("arguments", [{"level": 0.0}, {"level": 1.5}, {"horizon": 0}])
def test_what_is_out_of_range_is_refused(arguments):
    with pytest.raises(ValueError, match="level in \\(0, 1\\] and a horizon >= 1"):
        AutoAlpha(**arguments)


class Scaled(nn.Module):
    """A generator whose parameters are kept c times smaller: its Jacobian is c times as large."""

    def __init__(self, network, c):
        super().__init__()
        self.network, self.c = network, c
        for p in network.parameters():
            p.data /= c

    def forward(self, z):
        scaled = {name: self.c * p for name, p in self.network.named_parameters()}
        return torch.func.functional_call(self.network, scaled, (z,))


class Gan(LightningModule):
    """A GAN by hand, of plain gradient descent."""

    def __init__(self, c=1.0):
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.generator = Scaled(MLPGenerator(2, 3, (8,)), c)
        self.critic = LearnedKernelCritic(MLPFeatures(2, 6, (8,)), 6)
        self.c, self.mmd = c, []

    def training_step(self, real, index):
        mine, other = self.optimizers()
        z = torch.randn(len(real), 3, generator=torch.Generator().manual_seed(index)).double()
        loss = self.critic(self.generator(z).detach()).mean() - self.critic(real).mean()
        other.zero_grad()
        self.manual_backward(loss)
        other.step()
        mine.zero_grad()
        self.manual_backward(-self.critic(self.generator(z)).mean())
        mine.step()
        self.mmd.append(float((self.generator(z).mean(0) - real.mean(0)).norm().detach()))

    def configure_optimizers(self):
        return (
            torch.optim.SGD(self.generator.parameters(), 0.05 / self.c**2),  # the same path
            torch.optim.SGD(self.critic.parameters(), 0.05),
        )


def train(path, callback, c=1.0, steps=40, kind=Gan):
    model = kind(c)
    real = torch.randn(8, 2, generator=torch.Generator().manual_seed(3)).double() + 1
    trainer = quiet_trainer(path, max_steps=2 * steps, callbacks=[callback])
    trainer.fit(model, DataLoader(real, batch_size=8))
    return torch.tensor(model.mmd)


def test_the_scale_of_the_jacobian_does_not_matter(tmp_path):
    curves = {
        c: train(tmp_path, ParametricGradientPenalty(AutoAlpha(0.3, horizon=5)), c)
        for c in (0.1, 1.0, 10.0)
    }
    for c in (0.1, 10.0):
        torch.testing.assert_close(curves[c], curves[1.0], rtol=1e-6, atol=1e-9)
    plain = train(tmp_path, ParametricGradientPenalty(0.0))
    fixed = [train(tmp_path, ParametricGradientPenalty(1.0), c) for c in (0.1, 10.0)]
    assert (curves[1.0] - plain).abs().max() > 1e-3  # the penalty does something,
    assert not torch.allclose(fixed[0], fixed[1], atol=0.05)  # a fixed weight depends on the scale


def test_the_ratio_of_gradients_in_a_training_is_the_level(tmp_path):
    shares = []

    class Record(ParametricGradientPenalty):
        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            shares.append(float(trainer.callback_metrics["penalty/share"]))

    train(tmp_path, Record(AutoAlpha(0.25, horizon=1)))
    assert shares == pytest.approx([0.2] * 40, rel=1e-5)  # 0.25 / (1 + 0.25)
    shares.clear()
    train(tmp_path, Record(AutoAlpha(0.25, horizon=8)))
    assert max(shares) < 0.5 / 1.5 * (1 + 1e-5)
    assert 0.15 < sum(shares[10:]) / 30 < 0.3


class AdamGan(Gan):
    """The same with Adam, which moves a flat critic on and on."""

    def configure_optimizers(self):
        return (
            torch.optim.Adam(self.generator.parameters(), 0.01),
            torch.optim.Adam(self.critic.parameters(), 0.02),
        )


def test_a_weight_that_takes_over_is_named_and_its_cure_works(tmp_path):
    start = float(train(tmp_path, ParametricGradientPenalty(0.0), kind=AdamGan, steps=1)[0])
    with pytest.warns(UserWarning, match="has made the parametric") as said:
        curve = train(tmp_path, ParametricGradientPenalty(1000.0), kind=AdamGan, steps=60)
    assert curve.min() > 0.95 * start  # samples do not move
    (message,) = [str(w.message) for w in said if "alpha=1000" in str(w.message)]
    assert re.search("of the critic's gradient over 50 steps.* Use alpha='auto'", message)
    cure = float(re.search(r"at most about alpha=(\S+) with", message)[1])
    for alpha in (cure, "auto"):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="alpha=")
            curve = train(tmp_path, ParametricGradientPenalty(alpha), kind=AdamGan, steps=60)
        assert curve.min() < 0.6 * start


def test_a_takeover_must_last():
    weight = FixedAlpha(1.0, patience=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(40):  # a mean of 0.71
            assert weight.update(*((100.0, 1.0), (3.0, 4.0))[step % 2]) == 1.0
    with pytest.warns(UserWarning, match="alpha=1 has made .* 8.% .* over 10 steps"):
        _ = [weight.update(100.0, 1.0) for _ in range(20)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight.update(100.0, 1.0)  # it is said once


@pytest.mark.parametrize("alpha", ["automatic", -1.0, math.inf, True, None])
def test_other_weights_are_refused(alpha):
    with pytest.raises(ValueError, match="alpha must be 'auto', an AutoAlpha or a finite number"):
        ParametricGradientPenalty(alpha)
