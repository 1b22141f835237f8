"""Stabilisers as callbacks against the same terms written into the losses by hand."""

import copy
import io

import pytest
import torch
from foreign import SHAPE, WGAN, AutomaticCritic, ConditionalGAN, HingeGAN, TutorialGAN, mlp
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mmd import (
    MMDGAN,
    ClosedForm,
    DiffAugment,
    GradientAscent,
    InputGradientPenalty,
    InstanceNoise,
    LearnedKernelCritic,
    NoiseInjection,
    ParametricGradientPenalty,
    ProximalPoint,
)
from lightning_mmd.auto_alpha import AutoAlpha
from lightning_mmd.noise import ConstantNoise
from lightning_mmd.passes import seeded

pytestmark = pytest.mark.filterwarnings("ignore")
CPU, BATCH = torch.device("cpu"), 8


def images(num=64):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(num, *SHAPE, generator=rng).tanh()
    return TensorDataset(x, torch.randint(0, 4, (num,), generator=rng))


def fit(module, *callbacks, path, steps=6, data=None, batch=BATCH, ckpt_path=None, **kwargs):
    arguments = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False}
    trainer = Trainer(
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        **{**arguments, "limit_train_batches": steps, **kwargs},
    )
    torch.manual_seed(5)
    data = images() if data is None else data
    loader = data if isinstance(data, LightningDataModule) else DataLoader(data, batch)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return trainer


def assert_same(module, twin, tolerance=1e-10):
    for (name, own), other in zip(
        module.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance, msg=name)


def moved(module, other):
    return max(
        float((p - q).abs().max())
        for p, q in zip(module.parameters(), other.parameters(), strict=True)
    )


def slope_term(critic, x, weight, target=0.0):
    """weight / 2 E (||grad f|| - target)^2, by double backward."""
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    squared = slope.flatten(1).square().sum(1)
    if target == 0:
        return weight / 2 * squared.mean()
    return weight / 2 * (squared.sqrt() - target).square().mean()


class Hinge(HingeGAN):
    """With a term in each loss, the critic's and the generator's, where a test writes one."""

    def __init__(self, **kwargs):
        generator = nn.Sequential(mlp(5, 16), nn.Tanh(), nn.Unflatten(1, SHAPE))
        super().__init__(generator, nn.Sequential(nn.Flatten(), mlp(16, 1)), 5, lr=5e-3, **kwargs)

    def on_critic(self, x, fake):
        return 0.0

    def on_generator(self, z, fake):
        return 0.0

    def training_step(self, batch, batch_idx):
        x = batch[0]
        opt_g, opt_d = self.optimizers()
        z = self.draw(len(x))
        fake = self.netG(z)
        loss = (1 - self.netD(x)).relu().mean() + (1 + self.netD(fake.detach())).relu().mean()
        opt_d.zero_grad()
        self.manual_backward(loss + self.on_critic(x, fake.detach()))
        opt_d.step()
        opt_g.zero_grad()
        self.manual_backward(-self.netD(fake).mean() + self.on_generator(z, fake))
        opt_g.step()


class HingeInOneBatch(Hinge):
    """Real and generated samples in one call of the critic."""

    def training_step(self, batch, batch_idx):
        x = batch[0]
        opt_g, opt_d = self.optimizers()
        z = self.draw(len(x))
        fake = self.netG(z)
        values = self.netD(torch.cat([x, fake.detach()]))
        loss = (1 - values[: len(x)]).relu().mean() + (1 + values[len(x) :]).relu().mean()
        opt_d.zero_grad()
        self.manual_backward(loss + self.on_critic(x, fake.detach()))
        opt_d.step()
        opt_g.zero_grad()
        self.manual_backward(-self.netD(fake).mean() + self.on_generator(z, fake))
        opt_g.step()


@pytest.mark.parametrize("kind", [Hinge, HingeInOneBatch])
@pytest.mark.parametrize(
    ("at", "target", "interval"),
    [("real", 0.0, 1), ("real", 1.0, 2), ("generated", 0.0, 1), ("interpolated", 1.0, 3)],
)
def test_a_slope_penalty_equals_that_in_the_loss(kind, at, target, interval, tmp_path):
    module = kind()
    plain, twin = copy.deepcopy(module), copy.deepcopy(module)
    steps = 0

    def on_critic(x, fake):
        nonlocal steps
        steps += 1
        if (steps - 1) % interval:
            return 0.0
        points = {"real": x, "generated": fake}.get(at)
        if points is None:
            with seeded(CPU, 7, 0, steps):
                u = torch.rand(len(x)).reshape(-1, 1, 1, 1)
            points = u * x + (1 - u) * fake
        return interval * slope_term(twin.netD, points, 3.0, target)

    twin.on_critic = on_critic
    callback = InputGradientPenalty(3.0, at, target, interval, "netG", "netD", seed=7)
    trainer = fit(module, callback, path=tmp_path)
    fit(twin, path=tmp_path)
    fit(plain, path=tmp_path)
    assert_same(module, twin)
    assert moved(module, plain) > 1e-3
    assert callback.critic_step == 6
    assert trainer.callback_metrics["slope/penalty"] > 0
    assert 0 < trainer.callback_metrics["slope/share"] < 1
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


def test_r1_and_r2_beside_each_other_in_the_tutorial(tmp_path):
    """Toggled optimizers, a sigmoid at the end, batch normalisation in the generator."""

    class Twin(TutorialGAN):
        def training_step(self, batch):
            self.real = batch[0]
            return super().training_step(batch)

        def penalty(self, z):
            with torch.no_grad():
                buffers = copy.deepcopy(dict(self.generator.named_buffers()))
                fake = self(z)
                for name, buffer in self.generator.named_buffers():
                    buffer.copy_(buffers[name])
            values = lambda x: torch.logit(self.discriminator(x))  # noqa: E731
            return slope_term(values, self.real, 2.0) + slope_term(values, fake, 0.5)

    module = TutorialGAN()
    twin, plain = Twin(), copy.deepcopy(module)
    twin.load_state_dict(module.state_dict())
    names = {"critic": "discriminator", "critic_values": torch.logit}
    both = InputGradientPenalty(2.0, **names), InputGradientPenalty(0.5, "generated", **names)
    trainer = fit(module, *both, path=tmp_path)
    fit(twin, path=tmp_path)
    fit(plain, path=tmp_path)
    assert_same(module, twin)
    assert moved(module, plain) > 1e-4
    assert trainer.callback_metrics["slope/generator/discriminator/penalty"] > 0


def test_automatic_optimisation_accumulates_and_clips(tmp_path):
    class Dealt(AutomaticCritic):
        """Latents in the order in which one large batch draws them."""

        def draw(self, num):
            rng = torch.Generator().manual_seed(0)
            z = torch.randn(2 * BATCH, self.latent_dim, generator=rng)
            return z.split(num)[self.trainer.fit_loop.batch_idx % (2 * BATCH // num)]

    class Twin(Dealt):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + slope_term(self.netD, batch[0], 4.0)

    module = Dealt(critic_steps=100)
    twin, plain = Twin(critic_steps=100), copy.deepcopy(module)
    twin.load_state_dict(module.state_dict())
    callback = InputGradientPenalty(4.0, generator="netG", critic="netD")
    clip = {"gradient_clip_val": 0.05}
    fit(module, callback, path=tmp_path, accumulate_grad_batches=2, **clip)
    fit(twin, path=tmp_path, steps=3, batch=2 * BATCH, **clip)
    fit(plain, path=tmp_path, accumulate_grad_batches=2, **clip)
    assert_same(module, twin)
    assert moved(module, plain) > 1e-4


def test_labels_beside_samples_are_those_of_the_samples(tmp_path):
    class Twin(ConditionalGAN):
        def training_step(self, batch, batch_idx):
            self.batch = batch
            return super().training_step(batch, batch_idx)

        def penalty(self, name, z, labels):
            real, own = self.batch
            return slope_term(lambda x: self.discriminator(x, own), real, 2.0)

    module = ConditionalGAN()
    twin = Twin()
    twin.load_state_dict(module.state_dict())
    fit(module, InputGradientPenalty(2.0, critic="discriminator"), path=tmp_path)
    fit(twin, path=tmp_path)
    assert_same(module, twin)


def test_what_a_slope_penalty_refuses(tmp_path):
    module = Hinge()
    with pytest.raises(ValueError, match="weight > 0"):
        InputGradientPenalty(0.0)
    with pytest.raises(ValueError, match="at must be"):
        InputGradientPenalty(at="fake")
    with pytest.raises(ValueError, match="has no network of that name"):
        fit(module, InputGradientPenalty(), path=tmp_path)
    critic = LearnedKernelCritic(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), 4)
    with pytest.raises(ValueError, match="give slope=SlopePenalty"):
        fit(
            MMDGAN(module.netG, critic, GradientAscent(), latents=5),
            InputGradientPenalty(),
            path=tmp_path,
        )

    class Noisy(Hinge):
        def training_step(self, batch, batch_idx):
            own = self.netD
            hidden = own.forward
            own.forward = lambda x: hidden(x)
            x = batch[0]
            _, opt_d = self.optimizers()
            fake = self.netG(self.draw(len(x)))
            loss = own(fake.detach() + 0.1).mean() - own(x).mean()
            self.manual_backward(loss)
            opt_d.step()

    names = {"generator": "netG", "critic": "netD"}
    with pytest.raises(RuntimeError, match="changed on the way"):
        fit(Noisy(), InputGradientPenalty(**names), path=tmp_path)

    class OnlyGenerated(Hinge):
        def training_step(self, batch, batch_idx):
            _, opt_d = self.optimizers()
            self.manual_backward(self.netD(self.netG(self.draw(8)).detach()).mean())
            opt_d.step()

    with pytest.raises(RuntimeError, match="no real ones to penalise"):
        fit(OnlyGenerated(), InputGradientPenalty(**names), path=tmp_path)


def hold(twin, name, tau, renew_every):
    """Return the proximal term of a twin's generator at latents, by hand."""
    old, step = None, 0

    def term(zs):
        nonlocal old, step
        network = twin.get_submodule(name)
        if step % renew_every == 0:
            old = copy.deepcopy(network)
        step += 1
        z = torch.cat(zs)
        with torch.no_grad():
            before = old(z)
        return (network(z) - before).square().flatten(1).sum(1).mean() / (2 * tau)

    return term


@pytest.mark.parametrize("renew_every", [2, 4])
def test_a_proximal_term_equals_that_in_the_loss(renew_every, tmp_path):
    module = Hinge()
    plain, twin = copy.deepcopy(module), copy.deepcopy(module)
    term = hold(twin, "netG", 0.02, renew_every)
    twin.on_generator = lambda z, fake: term([z])
    callback = ProximalPoint(0.02, renew_every, "netG")
    trainer = fit(module, callback, path=tmp_path, steps=8)
    fit(twin, path=tmp_path, steps=8)
    fit(plain, path=tmp_path, steps=8)
    assert_same(module, twin)
    assert moved(module, plain) > 1e-4
    assert trainer.callback_metrics["proximal/distance"] > 0
    assert 0 < trainer.callback_metrics["proximal/share"] < 1
    assert all(not m._forward_hooks for m in module.modules())


class Told(Callback):
    """What each update logged."""

    def __init__(self):
        self.told = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        logged = trainer.callback_metrics
        if "proximal/share" in logged:
            self.told.append((float(logged["proximal/share"]), float(logged["proximal/tau"])))


def test_an_automatic_tau_holds_the_term_at_a_part_of_the_gradient(tmp_path):
    module, shares = Hinge(), Told()
    callback = ProximalPoint(AutoAlpha(0.2, 20), 4, "netG")
    fit(module, callback, shares, path=tmp_path, steps=200, data=images(1600))
    ratios = torch.tensor([share / (1 - share) for share, _ in shares.told[40:]])
    assert 0.14 < float(ratios.log().mean().exp()) < 0.25
    assert ratios.max() < 0.4 + 1e-6  # never above twice the level
    assert len({tau for _, tau in shares.told}) > 10


def test_an_automatic_tau_goes_on_where_it_was(tmp_path):
    whole, half = Hinge(), Hinge()
    half.load_state_dict(whole.state_dict())
    callbacks = [ProximalPoint(generator="netG") for _ in range(2)]
    fit(whole, callbacks[0], path=tmp_path, steps=8)
    fit(half, callbacks[1], path=tmp_path, steps=8)
    saved = callbacks[1].state_dict()
    assert saved["tau"]["steps"] == 7  # none at the renewal
    third = ProximalPoint(generator="netG")
    third.load_state_dict(saved)
    assert third.state_dict()["tau"] == saved["tau"]
    assert ProximalPoint(3.0).state_dict()["tau"] == {}


def test_the_critics_latents_count_as_well(tmp_path):
    class Twin(WGAN):
        zs = None

        def draw(self, num):
            z = super().draw(num)
            self.zs = [*(self.zs or []), z]
            return z

        def manual_backward(self, loss):
            if self.trainer.fit_loop.batch_idx % 2 and self.optimizing == "G":
                loss, self.zs = loss + self.term(self.zs), []
            super().manual_backward(loss)

        def training_step(self, batch, batch_idx):
            self.optimizing, own = "D", self.nets["D"]
            seen = own.register_forward_hook(
                lambda *call: setattr(
                    self, "optimizing", "G" if call[2].grad_fn and call[1][0].requires_grad else "D"
                )
            )
            super().training_step(batch, batch_idx)
            seen.remove()

    module = WGAN(critic_steps=2)
    twin, plain = Twin(critic_steps=2), copy.deepcopy(module)
    twin.load_state_dict(module.state_dict())
    twin.term = hold(twin, "nets.G", 0.05, 2)
    fit(module, ProximalPoint(0.05, 2, "nets.G"), path=tmp_path, steps=8)
    fit(twin, path=tmp_path, steps=8)
    fit(plain, path=tmp_path, steps=8)
    assert_same(module, twin)
    assert moved(module, plain) > 1e-4


class Counted(Hinge):
    """Latents that are a function of the number of draws, which a checkpoint holds."""

    def __init__(self):
        super().__init__()
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))

    def draw(self, num):
        self.draws += 1
        rng = torch.Generator().manual_seed(int(self.draws))
        return torch.randn(num, self.latent_dim, generator=rng)


def stabilisers():
    return (
        InputGradientPenalty(2.0, "interpolated", 1.0, 2, "netG", "netD"),
        ProximalPoint(0.02, 4, "netG"),
    )


@pytest.mark.parametrize("half", [3, 4, 6])
def test_a_resumed_run_goes_on(half, tmp_path):
    data = TensorDataset(images(BATCH).tensors[0])
    first = Counted()
    start = copy.deepcopy(first)
    trainer = fit(first, *stabilisers(), path=tmp_path, data=data, max_epochs=half)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    whole, resumed = copy.deepcopy(start), copy.deepcopy(start)
    fit(whole, *stabilisers(), path=tmp_path, data=data, max_epochs=9)
    callbacks = stabilisers()
    checkpoint = {"ckpt_path": tmp_path / "half.ckpt"}
    fit(resumed, *callbacks, path=tmp_path, data=data, max_epochs=9, **checkpoint)
    assert (callbacks[0].critic_step, callbacks[1].step) == (9, 9)
    assert all(
        torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True)
    )


class Ranks(Hinge):
    """Each process draws a part of the latents that one process draws."""

    def draw(self, num):
        self.draws = getattr(self, "draws", 0) + 1
        rng = torch.Generator().manual_seed(self.draws)
        z = torch.randn(2 * BATCH, self.latent_dim, generator=rng, dtype=torch.float64)
        if num == 2 * BATCH:
            return z
        return z[self.global_rank * num :][:num]


class Shares(LightningDataModule):
    """Every process reads its contiguous half of each batch of 2 x BATCH."""

    def train_dataloader(self):
        size = self.trainer.world_size
        whole = images(8 * BATCH).tensors[0].view(4, size, 2 * BATCH // size, *SHAPE)
        x = whole[:, self.trainer.global_rank].flatten(0, 1)
        return DataLoader(TensorDataset(x), 2 * BATCH // size)


class SaveOnExit(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), self.path)


def test_two_processes_train_as_one(tmp_path):
    module = Ranks()
    alone, plain = copy.deepcopy(module), copy.deepcopy(module)
    callbacks = lambda: (  # noqa: E731
        InputGradientPenalty(2.0, "real", 0.0, 2, "netG", "netD"),
        ProximalPoint(0.02, 2, "netG"),
        SaveOnExit(tmp_path / "last.pt"),
    )
    strategy = DDPStrategy(start_method="fork", find_unused_parameters=True)
    shares = {"data": Shares(), "use_distributed_sampler": False, "path": tmp_path, "steps": 4}
    fit(module, *callbacks(), devices=2, strategy=strategy, **shares)
    module.load_state_dict(torch.load(tmp_path / "last.pt"))
    fit(alone, *callbacks(), **shares)
    assert_same(module, alone, 1e-9)
    fit(plain, **shares)
    assert moved(plain, alone) > 1e-4


def test_what_a_proximal_term_refuses(tmp_path):
    for tau in (0.0, -1.0, float("inf"), float("nan"), "automatic", True):
        with pytest.raises(ValueError, match="tau must be a positive number, 'auto' or"):
            ProximalPoint(tau)
    with pytest.raises(ValueError, match="at least 2"):
        ProximalPoint(1.0, 1)
    generator = nn.Sequential(mlp(5, 16), nn.Unflatten(1, SHAPE))
    critic = LearnedKernelCritic(nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), 4)
    with pytest.raises(ValueError, match="Lower eta"):
        fit(MMDGAN(generator, critic, ClosedForm(), latents=5), ProximalPoint(1.0), path=tmp_path)

    class Frozen(Hinge):
        def training_step(self, batch, batch_idx):
            opt_g, _ = self.optimizers()
            self.manual_backward(sum(p.sum() for p in self.netG.parameters()))
            opt_g.step()

    with pytest.raises(RuntimeError, match="nothing to hold"):
        fit(Frozen(), ProximalPoint(1.0, generator="netG"), path=tmp_path)


def test_a_short_proximal_step_holds_a_generator_of_ours(tmp_path):
    """The smaller tau, the shorter the way between renewals, under GradientAscent."""
    lengths = {}
    z = torch.randn(64, 5)
    for tau in (1e-5, 1e5):
        torch.manual_seed(0)
        generator = nn.Sequential(mlp(5, 16), nn.Tanh(), nn.Unflatten(1, SHAPE))
        critic = LearnedKernelCritic(nn.Sequential(nn.Flatten(), mlp(16, 8)), 8)
        model = MMDGAN(
            generator,
            critic,
            GradientAscent(alpha=0.0, beta=0.1),
            latents=5,
            generator_optimizer=lambda p: torch.optim.SGD(p, lr=1e-5),
        )
        before = generator(z).detach()
        data = TensorDataset(images().tensors[0])
        trainer = fit(model, ProximalPoint(tau, 100), path=tmp_path, steps=8, data=data)
        lengths[tau] = float((generator(z) - before).norm())
        assert trainer.callback_metrics["proximal/distance"] > 0
    assert lengths[1e-5] < lengths[1e5]


class Copying(Callback):
    """Somebody's callback that copies and pickles the networks and calls the copies."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.copies = [copy.deepcopy(net) for net in networks_of(pl_module)]
        with torch.no_grad(), seeded(CPU, batch_idx):
            for net in self.copies:
                net.train()(batch[0] if net is self.copies[1] else torch.randn(BATCH, 5))
        torch.save(networks_of(pl_module)[0], io.BytesIO())
        copy.deepcopy(pl_module)


def networks_of(module):
    return module.generator, getattr(module, "discriminator", getattr(module, "critic", None))


@pytest.mark.parametrize(
    "name", ["parametric", "slope", "proximal", "instance", "noise", "changes"]
)
@pytest.mark.parametrize("own", [False, True])
def test_others_may_copy_the_networks_meanwhile(name, own, tmp_path, monkeypatch):
    """Callbacks watch the networks, not copies of them, and a copy does not bring the Trainer."""
    copied = []
    for part in (Trainer, Callback):  # a Trainer at work holds what cannot be copied
        monkeypatch.setattr(part, "__deepcopy__", lambda x, _: copied.append(x), raising=False)
    names = {} if own else {"critic": "discriminator"}
    values = {} if own else {"critic_values": torch.logit}
    build = {
        "parametric": lambda: ParametricGradientPenalty(**names, **values),
        "slope": lambda: InputGradientPenalty(**names, **values),
        "proximal": lambda: ProximalPoint(tau=1.0),
        "instance": lambda: InstanceNoise(ConstantNoise(0.3), **names),
        "noise": lambda: NoiseInjection(ConstantNoise(0.3), **names),
        "changes": lambda: DiffAugment(**names, max_images=100),
    }[name]
    if own and name in ("parametric", "slope"):
        pytest.skip("its rules have the penalty themselves")
    ended = []
    for others in ([], [Copying()]):
        torch.manual_seed(0)
        if own:
            critic = LearnedKernelCritic(nn.Sequential(nn.Flatten(), mlp(16, 8)), 8)
            generator = nn.Sequential(mlp(5, 16), nn.Unflatten(1, SHAPE))
            module = MMDGAN(generator, critic, GradientAscent(beta=0.1), latents=5)
        else:
            module = TutorialGAN()
        fit(module, build(), *others, path=tmp_path)
        ended.append(module)
    assert not copied
    assert all(torch.equal(p, q) for p, q in zip(*(m.parameters() for m in ended), strict=True))
