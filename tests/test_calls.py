"""What the critic was trained on: all of it, as it was called, or a refusal by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
from foreign import SHAPE, HingeGAN, mlp
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from tiny import quiet_trainer
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_mmd import (
    ConstantNoise,
    ConvergenceMonitor,
    InstanceNoise,
    NoiseInjection,
    ParametricGradientPenalty,
    Split,
)
from lightning_mmd.passes import counter_seed

ALPHA = 0.7
NAMES = {"generator": "netG", "critic": "netD"}


class GAN(HingeGAN):
    """The critic's step first; cases override its fake loss, and say which values f it saw."""

    def __init__(self, critic=None, generator=None):
        generator = generator or nn.Sequential(mlp(5, 16), nn.Unflatten(1, SHAPE))
        super().__init__(generator, critic or nn.Sequential(nn.Flatten(), mlp(16, 1)), 5)

    def by_hand(self, values):
        return 0.0

    def training_step(self, batch, batch_idx):
        opt_g, opt_d = self.optimizers()
        opt_d.zero_grad()
        loss, values = self.critic_loss(batch[0])
        self.manual_backward(loss + self.by_hand(values))
        opt_d.step()
        opt_g.zero_grad()
        self.manual_backward(-self.generator_values(batch[0]).mean())
        opt_g.step()

    def generator_values(self, x):
        return self.netD(self.netG(self.draw(len(x))))


class OneBatch(GAN):
    """Real and generated samples in one call."""

    def critic_loss(self, x):
        z = self.draw(len(x))
        f = self.netD(torch.cat([x, self.netG(z).detach()]))
        return f[len(x) :].mean() - f[: len(x)].mean(), lambda g: self.netD(g(z))


class Pairs(GAN):
    """Pix2pix: the critic sees an image and its translation."""

    def __init__(self):
        generator = nn.Conv2d(1, 1, 3, padding=1)
        critic = nn.Sequential(nn.Conv2d(2, 4, 2, 2), nn.SiLU(), nn.Conv2d(4, 1, 1))
        super().__init__(critic, generator)

    def critic_loss(self, x):
        f = self.netD(torch.cat([x, self.netG(x).detach()], 1))
        real = self.netD(torch.cat([x, -x], 1))
        return f.mean() - real.mean(), lambda g: self.netD(torch.cat([x, g(x)], 1)).flatten(1)

    def generator_values(self, x):
        return self.netD(torch.cat([x, self.netG(x)], 1))


class Twice(GAN):
    """The generator is called again before the critic steps, as for cycle losses."""

    def critic_loss(self, x):
        z = self.draw(len(x))
        fake = self.netG(z).detach()
        self.netG(self.draw(len(x)))
        return self.netD(fake).mean() - self.netD(x).mean(), lambda g: self.netD(g(z))


class Accumulated(GAN):
    """Two batches by hand, of unequal size, for one step."""

    def critic_loss(self, x):
        zs = [self.draw(num) for num in (5, 3)]
        loss = -self.netD(x).mean()
        for z in zs:
            loss = loss + self.netD(self.netG(z).detach()).mean() / 2
        return loss, lambda g: torch.cat([self.netD(g(z)) for z in zs])


class Attached(GAN):
    """Samples are not cut off from the generator."""

    def critic_loss(self, x):
        z = self.draw(len(x))
        return self.netD(self.netG(z)).mean() - self.netD(x).mean(), lambda g: self.netD(g(z))


class Keywords(GAN):
    def critic_loss(self, x):
        z = self.draw(len(x))
        f = self.netD(input=self.netG(input=z).detach())
        return f.mean() - self.netD(input=x).mean(), lambda g: self.netD(g(z))


class Checkpointed(GAN):
    """The critic's activations are computed again in the reverse pass."""

    def critic_loss(self, x):
        z = self.draw(len(x))
        fake = self.netG(z).detach()
        f = checkpoint(self.netD, fake, use_reentrant=False)
        return f.mean() - self.netD(x).mean(), lambda g: self.netD(g(z))

    def generator_values(self, x):
        return checkpoint(self.netD, self.netG(self.draw(len(x))), use_reentrant=False)


class Lists(GAN):
    """A critic that returns features and a score, in a dictionary."""

    def __init__(self):
        class Critic(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = mlp(16, 1)

            def forward(self, x):
                return {"features": [x], "score": self.net(x.flatten(1))}

        super().__init__(Critic())

    def critic_loss(self, x):
        z = self.draw(len(x))
        fake = self.netD(self.netG(z).detach())["score"]
        return fake.mean() - self.netD(x)["score"].mean(), lambda g: self.netD(g(z))["score"]

    def generator_values(self, x):
        return self.netD(self.netG(self.draw(len(x))))["score"]


def score(output):
    return output["score"]


def loader(num=32, batch=8):
    rng = torch.Generator().manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(num, *SHAPE, generator=rng).tanh()), batch)


def fit(module, path, *callbacks, data=None):
    torch.manual_seed(5)
    trainer = quiet_trainer(path, callbacks=list(callbacks), max_epochs=1)
    trainer.fit(module, data or loader())
    return trainer


def with_penalty_by_hand(module):
    def by_hand(values):
        leaves = {n: p.detach().requires_grad_() for n, p in module.netG.named_parameters()}
        f = values(lambda *args: functional_call(module.netG, leaves, args))
        g = torch.autograd.grad(f.mean(), list(leaves.values()), create_graph=True)
        return ALPHA / 2 * sum(part.square().sum() for part in g)

    module.by_hand = by_hand
    return module


@pytest.mark.parametrize(
    "kind", [OneBatch, Pairs, Twice, Accumulated, Attached, Keywords, Checkpointed, Lists]
)
def test_the_penalty_is_at_all_that_the_critic_saw(kind, tmp_path):
    torch.manual_seed(0)
    module = kind()
    twin, plain = with_penalty_by_hand(copy.deepcopy(module)), copy.deepcopy(module)
    values = {"critic_values": score} if kind is Lists else {}
    callback = ParametricGradientPenalty(ALPHA, **NAMES, **values)
    fit(module, tmp_path, callback)
    fit(twin, tmp_path)
    fit(plain, tmp_path)
    assert callback.critic_step == 4
    moved = 0.0
    for own, other, before in zip(
        module.parameters(), twin.parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)
        moved = max(moved, float((own - before).detach().norm()))
    assert moved > 1e-4


class Augmented(GAN):
    def critic_loss(self, x):
        fake = self.netG(self.draw(len(x))).detach()
        return self.netD(fake + 0.1).mean() - self.netD(x).mean(), None


class Pool(GAN):
    """A buffer of older samples."""

    def critic_loss(self, x):
        fake = self.netG(self.draw(len(x))).detach()
        fake, self.kept = getattr(self, "kept", 2 * fake), fake
        return self.netD(fake).mean() - self.netD(x).mean(), None


@pytest.mark.parametrize("kind", [Augmented, Pool])
def test_samples_that_are_none_of_the_generators_are_refused_and_the_cure_works(kind, tmp_path):
    with pytest.raises(RuntimeError, match=r"no output of the generator 'netG'.*or give latents"):
        fit(kind(), tmp_path, ParametricGradientPenalty(ALPHA, **NAMES))
    callback = ParametricGradientPenalty(ALPHA, **NAMES, latents=5)
    fit(kind(), tmp_path, callback)
    assert callback.critic_step == 4


def test_an_odd_last_batch_is_split_too(tmp_path):
    callback = ParametricGradientPenalty(ALPHA, **NAMES, estimator=Split())
    fit(Twice(), tmp_path, callback, data=loader(21))
    assert callback.critic_step == 3
    callback = ParametricGradientPenalty(ALPHA, **NAMES, estimator=Split())
    with pytest.raises(ValueError, match=r"at least 2 latents to split, got 1.*drop_last=True"):
        fit(Twice(), tmp_path, callback, data=loader(17))


class Pretrained(GAN):
    """The generator has two batches without its critic."""

    def critic_loss(self, x):
        z = self.draw(len(x))
        return self.netD(self.netG(z).detach()).mean() - self.netD(x).mean(), None

    def training_step(self, batch, batch_idx):
        if batch_idx >= 2:
            return super().training_step(batch, batch_idx)
        optimizer = self.optimizers()[0]
        optimizer.zero_grad()
        self.manual_backward(F.l1_loss(self.netG(self.draw(8)), batch[0]))
        optimizer.step()


@pytest.mark.parametrize("kind", [NoiseInjection, InstanceNoise])
def test_pretraining_without_the_critic_stays_clean(kind, tmp_path):
    torch.manual_seed(0)
    module = Pretrained()
    twin = copy.deepcopy(module)
    weights = []
    for own, callbacks in ((module, [kind(ConstantNoise(0.3), **NAMES)]), (twin, [])):
        own.on_train_batch_end = lambda *_, m=own: weights.append(m.netG[0][0].weight.clone())
        fit(own, tmp_path, *callbacks)
    first, second = weights[:4], weights[4:]
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[3], second[3])


class First(Callback):
    """Keeps the first gradient of the generator, with the critic and the latents of then."""

    def __init__(self):
        self.gradient = None

    def on_fit_start(self, trainer, pl_module):
        draw = pl_module.draw
        pl_module.draw = lambda num: setattr(self, "drawn", draw(num)) or self.drawn

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if optimizer is trainer.optimizers[0] and self.gradient is None:
            self.gradient = torch.cat([p.grad.flatten() for p in pl_module.netG.parameters()])
            self.critic, self.z = copy.deepcopy(pl_module.netD), self.drawn
            for module in self.critic.modules():
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()


@pytest.mark.parametrize(("kind", "values"), [(Checkpointed, lambda out: out), (Lists, score)])
def test_noise_reaches_a_critic_that_is_checkpointed_or_returns_much(kind, values, tmp_path):
    torch.manual_seed(0)
    module, first = kind(), First()
    generator = copy.deepcopy(module.netG)
    fit(module, tmp_path, NoiseInjection(ConstantNoise(0.3), **NAMES), first)
    x = generator(first.z)
    u = torch.randn(x.shape, generator=torch.Generator().manual_seed(counter_seed(0, 0, 0, 0)))
    f = values(first.critic(x + 0.3 * u))
    g = torch.autograd.grad(-f.mean(), list(generator.parameters()))
    expected = torch.cat([part.flatten() for part in g])
    torch.testing.assert_close(first.gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_critic_values_can_be_functions_of_torch_on_a_command_line():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ParametricGradientPenalty, "penalty")
    parser.add_class_arguments(ConvergenceMonitor, "monitor")
    arguments = ["--penalty.critic_values=torch.logit", "--monitor.critic_values=torch.logit"]
    made = parser.instantiate_classes(parser.parse_args(arguments))
    assert made.penalty.critic_values is torch.logit
    assert made.monitor.critic_values is torch.logit
