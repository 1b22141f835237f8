"""The penalty as a callback against the penalty written into the loss by hand."""

import copy

import pytest
import torch
from foreign import (
    SHAPE,
    WGAN,
    AutomaticCritic,
    ClippedTutorialGAN,
    HingeGAN,
    TutorialGAN,
    by_hand,
    mlp,
)
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from lightning_mmd import (
    MMDGAN,
    Lagged,
    LearnedKernelCritic,
    ParametricGradientPenalty,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning_mmd.critic_warnings.KinkedCriticWarning",
    "ignore::lightning_mmd.critic_warnings.SigmoidCriticWarning",
    "ignore:.*was configured so.*:UserWarning",
)
ALPHA, BATCH = 3.0, 8
TUTORIAL = {"generator": "generator", "critic": "discriminator"}
NETS = {"generator": "netG", "critic": "netD"}
DICT = {"generator": "nets.G", "critic": "nets.D"}


def images(num=64):
    x = torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x.tanh())


def fit(module, *callbacks, steps=6, path=None, data=None, batch=BATCH, **kwargs):
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
    trainer.fit(module, data if isinstance(data, LightningDataModule) else DataLoader(data, batch))
    return trainer


CASES = {
    "tutorial": (TutorialGAN, {**TUTORIAL, "critic_values": torch.logit}, {}),
    "tutorial, probabilities": (TutorialGAN, TUTORIAL, {}),
    "tutorial, clipped by hand": (
        ClippedTutorialGAN,
        {**TUTORIAL, "critic_values": torch.logit},
        {},
    ),
    "wgan": (WGAN, DICT, {}),
    "automatic": (AutomaticCritic, NETS, {}),
    "automatic, clipped": (AutomaticCritic, NETS, {"gradient_clip_val": 0.02}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_equals_that_with_the_penalty_in_the_loss(case, tmp_path):
    kind, names, kwargs = CASES[case]
    torch.manual_seed(0)
    module = kind()
    plain, twin = copy.deepcopy(module), copy.deepcopy(module)
    for automatic in (m for m in (plain, twin) if isinstance(m, AutomaticCritic)):
        automatic.own = torch.optim.SGD(automatic.netG.parameters(), lr=automatic.lr)
    values = {"values": names["critic_values"]} if "critic_values" in names else {}
    by_hand(twin, names["generator"], names["critic"], ALPHA, **values)
    callback = ParametricGradientPenalty(ALPHA, **names)
    trainer = fit(module, callback, path=tmp_path, **kwargs)
    fit(twin, path=tmp_path, **kwargs)
    fit(plain, path=tmp_path, **kwargs)
    assert callback.critic_step == 6
    assert trainer.callback_metrics["penalty/parametric"] > 0
    assert 0 < trainer.callback_metrics["penalty/share"] < 1
    for (name, own), other in zip(
        module.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10, msg=name)
    moved = [parameters_to_vector(m.parameters()) for m in (module, plain)]
    assert (moved[0] - moved[1]).norm() > 1e-4  # the penalty made a difference
    assert "clip_gradients" not in vars(module)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


def test_accumulated_micro_batches_are_penalised_as_one_batch(tmp_path):
    class Dealt(AutomaticCritic):
        """Latents in the order in which one large batch draws them."""

        def draw(self, num):
            rng = torch.Generator().manual_seed(0)
            z = torch.randn(2 * BATCH, self.latent_dim, generator=rng)
            return z.split(num)[self.trainer.fit_loop.batch_idx % (2 * BATCH // num)]

    torch.manual_seed(0)
    small = Dealt(critic_steps=100)
    large = by_hand(copy.deepcopy(small), "netG", "netD", ALPHA)
    fit(small, ParametricGradientPenalty(ALPHA, **NETS), accumulate_grad_batches=2, path=tmp_path)
    fit(large, batch=2 * BATCH, steps=3, path=tmp_path)
    for own, other in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def halves(kind):
    """One process that draws what two processes draw between them, and a GAN whose ranks differ."""

    def draw_of_rank(self, num, rank):
        rng = torch.Generator().manual_seed(100 * self.draws + rank)
        return torch.randn(num, self.latent_dim, generator=rng)

    class Ranks(kind):
        draws = 0

        def draw(self, num):
            self.draws += 1
            return draw_of_rank(self, num, self.global_rank)

    class Whole(kind):
        draws = 0

        def draw(self, num):
            self.draws += 1
            return torch.cat([draw_of_rank(self, num // 2, rank) for rank in range(2)])

    return Ranks, Whole


class GroupNormGAN(HingeGAN):
    def __init__(self):
        norm = nn.GroupNorm(2, 16)
        generator = nn.Sequential(nn.Linear(5, 16), norm, mlp(16, 16), nn.Unflatten(1, SHAPE))
        super().__init__(generator, nn.Sequential(nn.Flatten(), mlp(16, 1)), 5)


class PlainTutorial(TutorialGAN):
    """Without batch normalisation, whose statistics are each process's own."""

    def __init__(self):
        super().__init__()
        self.generator.model[3] = nn.Identity()


class Shares(LightningDataModule):
    """Every process reads its contiguous half of each batch of 2 x BATCH."""

    def train_dataloader(self):
        size = self.trainer.world_size
        whole = images(12 * BATCH).tensors[0].view(6, size, 2 * BATCH // size, *SHAPE)
        x = whole[:, self.trainer.global_rank].flatten(0, 1)
        return DataLoader(TensorDataset(x), 2 * BATCH // size)


class SaveOnExit(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), self.path)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (PlainTutorial, TUTORIAL | {"critic_values": torch.logit}),
        (WGAN, DICT),
        (GroupNormGAN, NETS),
    ],
)
def test_two_processes_train_as_one(kind, names, tmp_path):
    ranks, whole = halves(kind)
    torch.manual_seed(0)
    parts, one = ranks(), whole()
    one.load_state_dict(parts.state_dict())
    start = parameters_to_vector(parts.parameters()).detach().clone()

    callbacks = [ParametricGradientPenalty(ALPHA, **names), SaveOnExit(tmp_path / "two.pt")]
    strategy = DDPStrategy(start_method="fork", find_unused_parameters=True)
    kwargs = {"data": Shares(), "use_distributed_sampler": False, "path": tmp_path}
    fit(parts, *callbacks, devices=2, strategy=strategy, **kwargs)
    values = {"values": names["critic_values"]} if "critic_values" in names else {}
    by_hand(one, names["generator"], names["critic"], ALPHA, **values)
    fit(one, **kwargs)
    result = torch.load(tmp_path / "two.pt")
    size = (parameters_to_vector(one.parameters()) - start).norm()
    assert size > 0.01
    for name, value in one.state_dict().items():
        assert (value - result[name]).norm() < 1e-9 * size, name


def test_fresh_latents_are_a_function_of_seed_and_step_and_a_resumed_run_goes_on(tmp_path):
    names = {**DICT, "latents": 5}
    drawn = []

    class Recording(ParametricGradientPenalty):
        def _draw(self, num, device):
            inputs = super()._draw(num, device)
            if num == BATCH:  # not the two with which networks are tried
                drawn.append(inputs[0])
            return inputs

    fixed = TensorDataset(images().tensors[0][:BATCH].repeat(6, 1, 1, 1))

    class Seeded(WGAN):
        def draw(self, num):
            rng = torch.Generator().manual_seed(self.global_step)
            return torch.randn(num, self.latent_dim, generator=rng)

    def module():
        torch.manual_seed(0)
        return Seeded(critic_steps=1)

    through, callback = module(), Recording(ALPHA, **names, seed=3)
    fit(through, callback, data=fixed, path=tmp_path)
    whole, drawn[:] = list(drawn), []
    assert len(whole) == 6
    assert all(z.shape == (BATCH, 5) for z in whole)
    correlation = torch.corrcoef(torch.stack([z.flatten() for z in whole])).fill_diagonal_(0)
    assert correlation.abs().max() < 0.6  # independent draws

    first = module()
    trainer = fit(first, Recording(ALPHA, **names, seed=3), data=fixed, steps=3, path=tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second, resumed = module(), Recording(ALPHA, **names, seed=3)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[resumed],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=2,
        limit_train_batches=3,
    )
    trainer.fit(second, DataLoader(fixed, BATCH), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.critic_step == 6
    torch.testing.assert_close(torch.stack(drawn), torch.stack(whole), rtol=0, atol=0)
    for own, other in zip(second.parameters(), through.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_random_state_and_buffers_are_left_alone(tmp_path):
    """With alpha = 0 a GAN with batch normalisation and dropout trains as without the callback."""
    torch.manual_seed(0)
    module = TutorialGAN()
    module.discriminator.model.insert(2, nn.Dropout(0.5))
    module.discriminator.model[0] = nn.utils.parametrizations.spectral_norm(
        module.discriminator.model[0]
    )
    twin = copy.deepcopy(module)
    fit(module, ParametricGradientPenalty(0.0, **TUTORIAL, latents=5), path=tmp_path)
    after = torch.get_rng_state()
    fit(twin, path=tmp_path)
    assert torch.equal(after, torch.get_rng_state())
    for own, other in zip(module.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(own, other)


def test_interval_adds_as_much_less_often(tmp_path):
    """In one descent step from one point: three times as much, or nothing."""

    def update(interval, critic_step):
        torch.manual_seed(0)
        module = AutomaticCritic(lr=1.0, critic_steps=100)
        start = parameters_to_vector(module.netD.parameters()).detach().clone()
        callback = ParametricGradientPenalty(ALPHA, **NETS, interval=interval)
        callback.critic_step = critic_step
        fit(module, callback, steps=1, path=tmp_path)
        assert callback.critic_step == critic_step + 1
        return parameters_to_vector(module.netD.parameters()).detach() - start

    nothing = update(interval=3, critic_step=1)
    torch.testing.assert_close(update(3, 2), nothing, rtol=0, atol=0)
    added = update(interval=1, critic_step=7) - nothing
    assert added.norm() > 1e-3
    torch.testing.assert_close(update(interval=3, critic_step=6) - nothing, 3 * added)


def test_bfloat16_training_gets_a_float32_penalty(tmp_path):
    torch.set_default_dtype(torch.float32)
    seen, inside = [], []

    class Watch(ParametricGradientPenalty):
        def _read(self, output, num):
            if inside:
                seen.append(output.dtype)
            return super()._read(output, num)

        def gradient(self, *args):
            inside.append(True)
            try:
                return super().gradient(*args)
            finally:
                inside.clear()

    torch.manual_seed(0)
    x = torch.randn(4 * BATCH, *SHAPE)
    trainer = fit(WGAN(), Watch(ALPHA, **DICT), precision="bf16-mixed", data=TensorDataset(x))
    assert set(seen) == {torch.float32}
    assert trainer.callback_metrics["penalty/share"] > 0


# What does not fit


class Frozen(WGAN):
    def __init__(self):
        super().__init__()
        self.nets["D"].requires_grad_(False)

    def configure_optimizers(self):
        first, second = super().configure_optimizers()
        return first, second


class OneOptimizer(AutomaticCritic):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Tuples(HingeGAN):
    def __init__(self):
        class Critic(nn.Linear):
            def forward(self, x):
                return super().forward(x.flatten(1)), x

        super().__init__(nn.Sequential(mlp(5, 16), nn.Unflatten(1, SHAPE)), Critic(16, 1), 5)


class Wide(HingeGAN):
    def __init__(self):
        critic = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        super().__init__(nn.Sequential(mlp(5, 16), nn.Unflatten(1, SHAPE)), critic, 5)


class Shared(HingeGAN):
    def __init__(self):
        layer = nn.Linear(16, 16)
        generator = nn.Sequential(nn.Linear(5, 16), layer, nn.Unflatten(1, SHAPE))
        super().__init__(generator, nn.Sequential(nn.Flatten(), layer, nn.Linear(16, 1)), 5)


class Maximising(WGAN):
    def configure_optimizers(self):
        first, _ = super().configure_optimizers()
        return first, torch.optim.SGD(self.nets["D"].parameters(), lr=0.1, maximize=True)


class BareOptimizer(HingeGAN):
    def __init__(self):
        critic = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
        super().__init__(nn.Sequential(mlp(5, 16), nn.Unflatten(1, SHAPE)), critic, 5)

    def optimizers(self, use_pl_optimizer=True):
        return super().optimizers(use_pl_optimizer=False)


class NoLatents(WGAN):
    def training_step(self, batch, batch_idx):
        _, opt_d = self.optimizers()
        self.manual_backward(self.nets["D"](batch[0]).mean())
        opt_d.step()


def kernel_gan():
    return MMDGAN(mlp(5, 16), LearnedKernelCritic(mlp(16, 4), 4), latents=5)


REFUSED = {
    "no such name": (WGAN, {"generator": "netG"}, ValueError, r"It has nets \(ModuleDict\)\. Set"),
    "no such dotted name": (
        WGAN,
        {"generator": "nets.G", "critic": "nets.E"},
        ValueError,
        r"nets\.G \(Sequential\), nets\.D",
    ),
    "empty name": (WGAN, {"generator": ""}, ValueError, "has no network of that name"),
    "nothing to train": (Frozen, DICT, ValueError, "no parameter with requires_grad=True"),
    "one optimizer": (OneOptimizer, NETS, ValueError, "holds parameters of both 'netD' and 'netG'"),
    "maximised": (Maximising, DICT, ValueError, "maximize=True. Minimise the negative"),
    "shared layer": (Shared, NETS, ValueError, r"share the parameters \['1.weight', '1.bias'\]"),
    "tuple": (Tuples, NETS, TypeError, "'netD' returns no tensor but tuple. Give critic_values"),
    "tuple, probed": (Tuples, {**NETS, "latents": 5}, TypeError, "no tensor but tuple"),
    "three values": (Wide, NETS, ValueError, r"returns shape \(\d, 3\) for \d samples"),
    "no values": (
        Tuples,
        {**NETS, "critic_values": lambda out: None},
        TypeError,
        "gives, through critic_values, no tensor",
    ),
    "latents": (WGAN, {**DICT, "latents": 6}, ValueError, r"does not take latents .*\(2, 6\)"),
    "number of latents": (
        WGAN,
        {**DICT, "latents": lambda n: torch.zeros(3, 5)},
        ValueError,
        r"latents for 2 samples must have 2 rows, got shape \(3, 5\)",
    ),
    "swapped": (
        WGAN,
        {"generator": "nets.D", "critic": "nets.G", "latents": 16},
        ValueError,
        "does not take samples of shape",
    ),
    "MMDGAN": (kernel_gan, {}, ValueError, "set its alpha"),
}


class NoStep(Callback):
    """Fails when any optimizer is about to step."""

    def on_before_optimizer_step(self, *_):
        raise AssertionError("a step was made")


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_said_before_the_first_step(case, tmp_path):
    kind, names, error, message = REFUSED[case]
    module = kind()
    with pytest.raises(error, match=message):
        fit(module, NoStep(), ParametricGradientPenalty(**names), path=tmp_path)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


def test_steps_that_lightning_does_not_see_are_not_passed_over(tmp_path):
    with pytest.raises(RuntimeError, match="stepped without Lightning's knowledge"):
        fit(BareOptimizer(), ParametricGradientPenalty(**NETS), path=tmp_path)


def test_critic_steps_before_any_latents(tmp_path):
    with pytest.raises(RuntimeError, match=r"no latents to penalise at\. The module must call"):
        fit(NoLatents(), ParametricGradientPenalty(**DICT), path=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, "alpha must be 'auto', an AutoAlpha or a finite number >= 0, got -1.0"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"estimator": Lagged()}, r"Batch\(\), Split\(\) or one of your own, got Lagged"),
        ({"estimator": "batch"}, "got 'batch'"),
        ({"latents": 0}, "positive length, got 0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParametricGradientPenalty(**arguments)


def test_half_precision_is_refused(tmp_path):
    trainer = Trainer(
        accelerator="cpu", precision="16-true", logger=False, enable_checkpointing=False
    )
    callback: LightningModule = WGAN()
    with pytest.raises(ValueError, match="does not support precision='16-true'"):
        ParametricGradientPenalty(**DICT).on_fit_start(trainer, callback)


def test_maps_of_patch_scores_are_averaged(tmp_path):
    """A patch critic (n, 1, h, w) is penalised as the mean over its places."""
    generator = nn.Sequential(mlp(5, 16), nn.Unflatten(1, SHAPE))
    critic = nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.Conv2d(4, 1, 2))
    torch.manual_seed(0)
    module = HingeGAN(generator, critic, 5)
    twin = by_hand(
        copy.deepcopy(module), "netG", "netD", ALPHA, values=lambda out: out.mean((1, 2, 3))
    )
    fit(module, ParametricGradientPenalty(ALPHA, **NETS), path=tmp_path)
    fit(twin, path=tmp_path)
    for own, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def test_third_party_networks(tmp_path):
    """torchgan's DCGAN, batch normalisation included, in a plain LightningModule."""
    models = pytest.importorskip("torchgan.models", exc_type=ImportError)
    torch.manual_seed(0)
    generator = models.DCGANGenerator(5, out_size=16, out_channels=1, step_channels=4)
    critic = models.DCGANDiscriminator(in_size=16, in_channels=1, step_channels=4)
    module = HingeGAN(generator, critic, 5)
    twin = by_hand(copy.deepcopy(module), "netG", "netD", ALPHA)
    x = torch.randn(4 * BATCH, 1, 16, 16).tanh()
    fit(module, ParametricGradientPenalty(ALPHA, **NETS), data=TensorDataset(x), path=tmp_path)
    fit(twin, data=TensorDataset(x), path=tmp_path)
    for (name, own), other in zip(
        module.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-10, msg=name)
