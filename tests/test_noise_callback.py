"""Noise changes the generator's gradient to the formula's, and nothing else."""

import copy

import pytest
import torch
from foreign import SHAPE, WGAN, HingeGAN, TutorialGAN, mlp
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from tiny import gan
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from lightning_mmd import (
    MMDGAN,
    ClosedForm,
    GradientAscent,
    InstanceNoise,
    LearnedKernelCritic,
    NoiseInjection,
    TrustRegion,
)
from lightning_mmd.noise import AdaptiveNoise, ConstantNoise, HalvingNoise, PlateauNoise
from lightning_mmd.passes import counter_seed

BATCH, LEVEL = 8, 0.7
NAMES = {
    WGAN: ("nets.G", "nets.D"),
    TutorialGAN: ("generator", "discriminator"),
    HingeGAN: ("netG", "netD"),
    MMDGAN: ("generator", "critic"),
}


def loader(num=64):
    x = torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(1)).tanh()
    return DataLoader(TensorDataset(x), BATCH)


def fit(module, *callbacks, steps=1, ckpt_path=None, **kwargs):
    arguments = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False}
    trainer = Trainer(
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{**arguments, "limit_train_batches": steps, **kwargs},
    )
    torch.manual_seed(5)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


def draw(shape, update, number=0, seed=0, rank=0):
    rng = torch.Generator().manual_seed(counter_seed(seed, rank, update, number))
    return torch.randn(shape, generator=rng)


def hinge_gan(dropout=0.0):
    critic = nn.Sequential(nn.Flatten(), nn.Dropout(dropout), mlp(16, 1))
    return HingeGAN(nn.Sequential(mlp(5, 16), nn.Unflatten(1, SHAPE)), critic, 5)


def kernel_gan(rule=ClosedForm, seed=0, **kwargs):
    torch.manual_seed(seed)
    generator = nn.Sequential(mlp(5, 16), nn.Unflatten(1, SHAPE))
    critic = LearnedKernelCritic(nn.Sequential(nn.Flatten(), mlp(16, 12)), 12)
    return gan(generator, critic, rule, latents=5, beta=0.1, **kwargs)


class Gradients(Callback):
    """Keeps the gradients with which each optimizer steps, and the latents of the last call."""

    def __init__(self, generator):
        self.generator, self.of = generator, {0: [], 1: []}

    def on_fit_start(self, trainer, pl_module):
        def keep(module, args):
            if module.training and torch.is_grad_enabled():
                self.z = args[0]

        pl_module.get_submodule(self.generator).register_forward_pre_hook(keep)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if optimizer is trainer.optimizers[0]:
            self.networks = copy.deepcopy(pl_module)  # when the generator moves
            for module in self.networks.modules():
                module._forward_pre_hooks.clear()
                module._forward_hooks.clear()
        index = trainer.optimizers.index(optimizer)
        self.of[index].append(torch.cat([p.grad.flatten() for p in parameters]).clone())


def observe(module, *callbacks, **kwargs):
    generator, critic = next(NAMES[kind] for kind in type(module).mro() if kind in NAMES)
    gradients = Gradients(generator)
    fit(module, *callbacks, gradients, **kwargs)
    return gradients, generator, critic


@pytest.mark.parametrize(
    "make",
    [
        hinge_gan,
        lambda: WGAN(critic_steps=1),
        lambda: kernel_gan(GradientAscent),
        lambda: hinge_gan(dropout=0.5),
    ],
    ids=["hinge", "wgan", "MMDGAN, adversarial", "dropout"],
)
def test_the_generators_gradient_is_that_at_noisy_samples_and_nothing_else_changes(make):
    module = make()
    noisy, clean = copy.deepcopy(module), module
    generator, critic = NAMES[type(module)]
    noise = NoiseInjection(ConstantNoise(LEVEL), generator, critic, seed=4)
    one, *_ = observe(noisy, noise)
    other, *_ = observe(clean)
    torch.testing.assert_close(one.of[1], other.of[1], rtol=0, atol=0)  # the critic's
    assert (one.of[0][0] - other.of[0][0]).norm() > 1e-3 * other.of[0][0].norm()
    networks = one.networks
    if any(isinstance(m, nn.Dropout) and m.p > 0 for m in networks.modules()):
        return
    x = networks.get_submodule(generator)(one.z)
    f = networks.get_submodule(critic)(x + LEVEL * draw(x.shape, update=0, seed=4))
    parameters = list(networks.get_submodule(generator).parameters())
    expected = torch.autograd.grad(-f.mean(), parameters)
    expected = torch.cat([g.flatten() for g in expected])
    torch.testing.assert_close(one.of[0][0], expected, rtol=1e-12, atol=1e-14)


def test_dropout_masks_and_random_state_are_those_of_the_clean_pass():
    """At a vanishing level the noisy gradient is the clean one, masks included."""
    module = hinge_gan(dropout=0.5)
    states = []
    for schedule in (1e-9, 0.0):
        twin = copy.deepcopy(module)
        fit(twin, NoiseInjection(ConstantNoise(schedule), "netG", "netD"), steps=3)
        states.append((parameters_to_vector(twin.parameters()).detach(), torch.get_rng_state()))
    torch.testing.assert_close(states[0][0], states[1][0], rtol=1e-6, atol=1e-8)
    assert torch.equal(states[0][1], states[1][1])


def test_other_losses_keep_their_weights_at_clean_values():
    """With BCE: the loss's derivative at the clean score, the critic's at the noisy sample."""
    torch.manual_seed(0)
    module = TutorialGAN()
    module.discriminator.model[5] = nn.Identity()
    module.adversarial_loss = nn.functional.binary_cross_entropy_with_logits
    clean = copy.deepcopy(module)
    clean.adversarial_loss = nn.functional.binary_cross_entropy_with_logits
    names = NAMES[TutorialGAN]
    one, *_ = observe(module, NoiseInjection(ConstantNoise(LEVEL), *names))
    networks = one.networks
    with torch.no_grad():
        weights = -torch.sigmoid(-clean.discriminator(clean.generator(one.z))) / BATCH
    x = networks.generator(one.z)
    f = networks.discriminator(x + LEVEL * draw(x.shape, update=0))
    gradient = torch.autograd.grad((weights * f).sum(), list(networks.generator.parameters()))
    gradient = torch.cat([g.flatten() for g in gradient])
    torch.testing.assert_close(one.of[0][0], gradient, rtol=1e-10, atol=1e-12)


class Undetached(WGAN):
    """Leaves fakes attached, and penalises the critic's input gradient along the way."""

    def training_step(self, batch, batch_idx):
        opt_g, opt_d = self.optimizers()
        x = batch[0]
        fake = self.nets["G"](self.draw(len(x)))
        mixed = 0.5 * x + 0.5 * fake
        (slope,) = torch.autograd.grad(self.nets["D"](mixed).sum(), mixed, create_graph=True)
        loss = self.nets["D"](fake).mean() - self.nets["D"](x).mean() + slope.square().sum()
        self.manual_backward(loss)
        opt_d.step()
        opt_g.zero_grad()
        opt_d.zero_grad()
        self.manual_backward(-self.nets["D"](self.nets["G"](self.draw(len(x)))).mean())
        opt_g.step()


def test_a_critic_step_on_attached_samples_stays_clean_its_gradient_penalty_too():
    torch.manual_seed(0)
    module = Undetached()
    clean = copy.deepcopy(module)
    one, *_ = observe(module, NoiseInjection(ConstantNoise(LEVEL), "nets.G", "nets.D"))
    other, *_ = observe(clean)
    torch.testing.assert_close(one.of[1], other.of[1], rtol=0, atol=0)
    assert (one.of[0][0] - other.of[0][0]).norm() > 1e-3


def expected_closed_form(model, z, w, level):
    """J^T of the witness's gradients at noisy samples, by plain automatic differentiation."""
    x = model.generator(z)
    f = model.critic.embed(x + level * draw(x.shape, update=0)) @ w
    return torch.autograd.grad(-f.mean(), list(model.generator.parameters()))


def test_in_closed_form_the_generator_follows_the_witness_at_noisy_samples():
    model = kernel_gan()
    clean = copy.deepcopy(model)
    one, *_ = observe(model, NoiseInjection(ConstantNoise(LEVEL)))
    other, *_ = observe(clean)
    torch.testing.assert_close(one.of[1], other.of[1], rtol=0, atol=0)  # features' gradient
    assert torch.equal(model.critic.weights, clean.critic.weights)  # the witness is of clean ones
    gradient = expected_closed_form(one.networks, one.z, model.critic.weights.detach(), LEVEL)
    gradient = model.rule._scale * torch.cat([g.flatten() for g in gradient])  # eta's unit
    torch.testing.assert_close(one.of[0][0], gradient, rtol=1e-9, atol=1e-12)
    assert (one.of[0][0] - other.of[0][0]).norm() > 0.05 * gradient.norm()
    assert not model._gradient_hooks  # put back


def test_the_certificate_predicts_nothing_while_there_is_noise():
    metrics = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, *_):
            metrics.append(dict(trainer.callback_metrics))
            trainer._logger_connector._callback_metrics.clear()
            levels.append(noise._level)

    levels = []
    noise = NoiseInjection(ConstantNoise(LEVEL, until=2))
    fit(kernel_gan(), noise, Watch(), steps=4)
    assert levels == [LEVEL, LEVEL, 0.0, 0.0]
    assert ["certificate/predicted" in m for m in metrics] == [False, False, True, True]
    assert all("certificate/realised" in m for m in metrics)


@pytest.mark.parametrize(
    "make", [lambda: WGAN(critic_steps=1), kernel_gan, lambda: kernel_gan(GradientAscent)]
)
def test_it_stops_at_the_schedules_end(make):
    """With no noise left, a GAN trains as one without the callback."""
    torch.manual_seed(0)
    module = make()
    plain = copy.deepcopy(module)
    names = NAMES[type(module)]
    noise = NoiseInjection(ConstantNoise(LEVEL, until=0), *names)
    trainer = fit(module, noise, steps=3)
    fit(plain, steps=3)
    assert noise.updates == 3
    assert trainer.callback_metrics["noise/level"] == 0
    for own, other in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own, other)


class Dealt(WGAN):
    """Latents, and data, that depend on the number of steps alone."""

    def training_step(self, batch, batch_idx):
        batch = [batch[0] * 0 + torch.arange(16.0).view(SHAPE) / 16]
        return super().training_step(batch, batch_idx)

    def draw(self, num):
        rng = torch.Generator().manual_seed(self.global_step)
        return torch.randn(num, self.latent_dim, generator=rng)


@pytest.mark.parametrize("kind", [NoiseInjection, InstanceNoise])
def test_a_run_resumed_in_the_middle_of_the_schedule_goes_on_exactly(kind, tmp_path):
    def run(steps, **kwargs):
        torch.manual_seed(0)
        module = Dealt(critic_steps=1)
        noise = kind(HalvingNoise(LEVEL, every=2, until=5), *NAMES[WGAN])
        trainer = fit(module, noise, steps=steps, **kwargs)
        return module, noise, trainer

    whole, noise, _ = run(6)
    assert noise.updates == 6
    _, _, trainer = run(3)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, noise, trainer = run(3, ckpt_path=tmp_path / "half.ckpt", max_epochs=2)
    assert noise.updates == 6
    for own, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_a_trust_region_rests_while_there_is_noise():
    model = kernel_gan(trust_region=TrustRegion())
    before = copy.deepcopy(model.rule.trust_region)
    fit(model, NoiseInjection(ConstantNoise(LEVEL)), steps=3)
    assert vars(model.rule.trust_region) == vars(
        before
    )  # its model of the decrease is about the clean direction
    fit(model, steps=3)
    assert vars(model.rule.trust_region) != vars(before)


def test_levels_follow_generator_updates_not_batches():
    levels = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            levels.append(noise._scheduled_level())

    noise = NoiseInjection(HalvingNoise(1.0, every=1), *NAMES[WGAN])
    fit(WGAN(critic_steps=3), noise, Watch(), steps=7)
    assert levels == [1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_processes_draw_different_noise(tmp_path):
    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            noise = next(c for c in trainer.callbacks if isinstance(c, NoiseInjection))
            torch.save(noise._draw(torch.zeros(3)), tmp_path / f"{trainer.global_rank}.pt")

    strategy = DDPStrategy(start_method="fork", find_unused_parameters=True)
    noise = NoiseInjection(ConstantNoise(LEVEL), *NAMES[WGAN], seed=2)
    fit(WGAN(critic_steps=1), noise, Save(), devices=2, strategy=strategy, steps=2)
    for rank in range(2):
        expected = draw((3,), update=2, seed=2, rank=rank)
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), expected)


@pytest.mark.parametrize("make", [lambda: WGAN(critic_steps=1), kernel_gan])
def test_adaptive_noise_takes_the_largest_level_that_leaves_half_of_the_descent(make):
    torch.manual_seed(0)
    module = make()
    schedule = AdaptiveNoise(largest=100.0, num_levels=20, num_bisections=30)
    noise = NoiseInjection(schedule, *NAMES[type(module)])
    seen = []
    original = noise._noisy_gradient

    def spy(x, gradient_at):
        seen.append((x.clone(), gradient_at))
        result = original(x, gradient_at)
        u, clean = draw(x.shape, update=0), gradient_at(x)
        for factor, fits in ((1 - 1e-6, True), (1 + 1e-6, False)):
            v = gradient_at(x + noise._level * factor * u)
            assert (4 * (v - clean).square().sum() <= v.square().sum()) == fits
            assert (clean * v).sum() >= 0.5 * (1 - 1e-5) * v.square().sum()
        return result

    noise._noisy_gradient = spy
    fit(module, noise)
    assert len(seen) == 1
    assert 1e-3 < noise._level < 100


def test_instance_noise_is_on_both_sides_of_the_critic():
    torch.manual_seed(0)
    module = hinge_gan()
    clean = copy.deepcopy(module)
    observed, *_ = observe(module, InstanceNoise(ConstantNoise(LEVEL), "netG", "netD"))
    real = next(iter(loader()))[0]
    u, v, w = (draw(real.shape, update=0, number=i) for i in range(3))
    with torch.no_grad():
        fake = clean.netG(observed.z)
    loss = (1 - clean.netD(real + LEVEL * u)).relu().mean()
    loss = loss + (1 + clean.netD(fake + LEVEL * v)).relu().mean()
    expected = torch.autograd.grad(loss, list(clean.netD.parameters()))
    expected = torch.cat([g.flatten() for g in expected])
    torch.testing.assert_close(observed.of[1][0], expected, rtol=1e-12, atol=1e-14)
    networks = observed.networks
    f = networks.netD(networks.netG(observed.z) + LEVEL * w).mean()
    expected = torch.autograd.grad(-f, list(networks.netG.parameters()))
    expected = torch.cat([g.flatten() for g in expected])
    torch.testing.assert_close(observed.of[0][0], expected, rtol=1e-12, atol=1e-14)


class Bypassing(HingeGAN):
    """Calls a part of its critic, not the critic."""

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.manual_backward(self.netD[1](self.netD[0](self.netG(self.draw(8)))).mean())
            optimizer.step()


def bypassing():
    critic = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    return Bypassing(nn.Sequential(mlp(5, 16), nn.Unflatten(1, SHAPE)), critic, 5)


@pytest.mark.parametrize(
    ("make", "kind", "names", "error", "message"),
    [
        (WGAN, NoiseInjection, ("netG", "nets.D"), ValueError, "no network of that name"),
        (WGAN, InstanceNoise, ("nets.G", "netD"), ValueError, r"It has nets \(ModuleDict\)"),
        (bypassing, NoiseInjection, NAMES[HingeGAN], RuntimeError, "saw no call of the critic"),
        (kernel_gan, InstanceNoise, NAMES[MMDGAN], ValueError, "Use NoiseInjection"),
        (
            lambda: kernel_gan(GradientAscent, method="finite_difference"),
            InstanceNoise,
            NAMES[MMDGAN],
            ValueError,
            "compares calls",
        ),
    ],
)
def test_what_does_not_fit_is_said(make, kind, names, error, message):
    with pytest.raises(error, match=message):
        fit(make(), kind(ConstantNoise(LEVEL), *names))


def test_the_generators_optimizer_must_be_known():
    class Own(HingeGAN):
        def configure_optimizers(self):
            return torch.optim.SGD(self.netD.parameters(), lr=0.1)

    generator = nn.Sequential(mlp(5, 16), nn.Unflatten(1, SHAPE))
    module = Own(generator, nn.Sequential(nn.Flatten(), mlp(16, 1)), 5)
    with pytest.raises(ValueError, match="0 of the 1 optimizers of Own hold parameters of 'netG'"):
        fit(module, NoiseInjection(ConstantNoise(LEVEL), "netG", "netD"))


def test_instance_noise_takes_no_adaptive_schedule():
    with pytest.raises(TypeError, match="got AdaptiveNoise"):
        InstanceNoise(AdaptiveNoise(1.0))


@pytest.mark.parametrize("kind", [NoiseInjection, InstanceNoise])
def test_noise_that_follows_mmd2_is_for_point_flows(kind):
    with pytest.raises(TypeError, match="got PlateauNoise"):
        kind(PlateauNoise(1.0))
