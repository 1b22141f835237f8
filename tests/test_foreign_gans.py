"""Five GANs of others, with all callbacks that apply, against the same written by hand."""

import copy

import pytest
import torch
from foreign import SHAPE, ConditionalGAN, CycleGAN, InfoGAN, StyleGAN2, TutorialGAN
from lightning.pytorch import Callback
from tiny import quiet_trainer
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from lightning_mmd import (
    ConstantNoise,
    ConvergenceMonitor,
    Gaussian,
    GeneratorEMA,
    MMDTracker,
    NoiseInjection,
    ParametricGradientPenalty,
    SampleGrid,
    mmd2_unbiased,
)
from lightning_mmd.passes import counter_seed

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_mmd.critic_warnings.KinkedCriticWarning"),
    pytest.mark.filterwarnings("ignore:.*but have no `validation_step`:UserWarning"),
]
ALPHA, LEVEL, HALF_LIFE, UPDATES = 0.7, 0.4, 3.0, 10


class ExampleGAN(TutorialGAN):
    """Lightning's own, with what observers and a twin by hand need."""

    def adversarial(self, name, critic, fake, loss):
        return loss(critic(fake))

    def generator_loss(self, fake, valid):
        return self.adversarial(
            "discriminator", self.discriminator, fake, lambda f: self.adversarial_loss(f, valid)
        )

    def fixed_latents(self, num, seed=0):
        return torch.randn(num, self.latent_dim, generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def sample(self, num, latents):
        training = self.generator.training
        samples = self.generator.eval()(latents)
        self.generator.train(training)
        return samples


def first(output):
    return output[0]


def patches(output):
    return output.flatten(1).mean(1)


# Pairs of generator and critic, critic_values, and how a critic is called on a generator's output.
CASES = {
    "Lightning's example": (
        ExampleGAN,
        {"discriminator": "generator"},
        torch.logit,
        lambda g, f, z: f(g(z)),
    ),
    "conditional": (
        ConditionalGAN,
        {"discriminator": "generator"},
        None,
        lambda g, f, z, y: f(g(z, y), y),
    ),
    "CycleGAN": (
        CycleGAN,
        {"netD_A": "netG_A", "netD_B": "netG_B"},
        None,
        lambda g, f, x: patches(f(g(x))),
    ),
    "StyleGAN2": (
        StyleGAN2,
        {"discriminator": "generator"},
        None,
        lambda g, f, styles: f(g(styles, inject_index=1)[0]),
    ),
    "InfoGAN": (
        InfoGAN,
        {"discriminator": "generator"},
        first,
        lambda g, f, *inputs: f(g(*inputs)),
    ),
}


class Live(Callback):
    """Keeps the generators' weights after every update."""

    def __init__(self, names):
        self.kept = {name: [] for name in names}

    def on_train_batch_end(self, trainer, pl_module, *_):
        for name, kept in self.kept.items():
            parameters = pl_module.get_submodule(name).parameters()
            kept.append(torch.cat([p.detach().flatten() for p in parameters]))


def write_by_hand(module, pairs, values, compose):
    """Put penalties into critics' losses, by double backward, and noise into generators'."""
    steps = dict.fromkeys(pairs, 0)
    updates, drawn = dict.fromkeys(pairs, 0), {}
    values = values or (lambda out: out)

    def penalty(critic, *inputs):
        steps[critic] += 1
        networks = [module.get_submodule(name) for name in (pairs[critic], critic)]
        leaves = {n: p.detach().requires_grad_() for n, p in networks[0].named_parameters()}
        kept = [(b, b.clone()) for net in networks for b in net.buffers()]
        with torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(counter_seed(0, 0, steps[critic]))
            f = values(
                compose(
                    lambda *args, **kwargs: functional_call(networks[0], leaves, args, kwargs),
                    networks[1],
                    *inputs,
                )
            )
            (*g,) = torch.autograd.grad(f.mean(), list(leaves.values()), create_graph=True)
        for buffer, before in kept:
            buffer.data.copy_(before)
        return ALPHA / 2 * sum(part.square().sum() for part in g)

    def adversarial(name, critic, fake, loss, moves=True):
        """The critic's gradient is clean, the generator's is that at noisy samples."""
        counters = (0, 0, updates[name], drawn.get((name, updates[name]), 0))
        u = torch.randn(
            fake.shape, generator=torch.Generator().manual_seed(counter_seed(*counters))
        )
        drawn[name, updates[name]] = counters[-1] + 1
        updates[name] += moves
        network = module.get_submodule(name)
        trained = [p for p in network.parameters() if p.requires_grad]
        clean = critic(fake.detach())
        parts = clean if isinstance(clean, tuple) else (clean,)
        leaves = [part.detach().requires_grad_() for part in parts]
        value = loss(tuple(leaves) if isinstance(clean, tuple) else leaves[0])
        weights = torch.autograd.grad(value, leaves, allow_unused=True)
        for p in trained:
            p.requires_grad_(False)
        noisy = critic(fake + LEVEL * u)
        for p in trained:
            p.requires_grad_(True)
        noisy = noisy if isinstance(noisy, tuple) else (noisy,)
        pulled = [(w * f).sum() for w, f in zip(weights, noisy, strict=True) if w is not None]
        return loss(clean) + sum(pulled)

    if isinstance(module, TutorialGAN):
        module.penalty = lambda z: penalty("discriminator", z)
    else:
        module.penalty = penalty
    module.adversarial = adversarial
    return module


def images():
    rng = torch.Generator().manual_seed(1)
    labels = torch.arange(80) % 4
    return TensorDataset(torch.randn(80, *SHAPE, generator=rng).tanh(), labels)


def fit(module, path, *callbacks):
    torch.manual_seed(5)
    trainer = quiet_trainer(path, callbacks=list(callbacks), max_epochs=1, num_sanity_val_steps=0)
    loader = DataLoader(images(), 8)
    trainer.fit(module, loader, loader)
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_ten_updates_with_all_callbacks_are_those_written_by_hand(case, tmp_path):
    kind, pairs, values, compose = CASES[case]
    torch.manual_seed(0)
    module = kind()
    twin = write_by_hand(copy.deepcopy(module), pairs, values, compose)
    plain = copy.deepcopy(module)
    output = {"generator_output": first} if kind is StyleGAN2 else {}
    critic, generator = next(iter(pairs.items()))
    tracker = MMDTracker(
        Gaussian(2.0), 5, num_real=40, num_fake=30, generator=generator, floor=False, **output
    )
    monitor = ConvergenceMonitor(
        2, Gaussian(2.0), 20, critic, generator, critic_values=values, **output
    )
    grid = SampleGrid(5, 4, generator=generator, dirpath=tmp_path / "grids", **output)
    live = Live(pairs.values())
    averages = [GeneratorEMA(HALF_LIFE, ramp=None, generator=g) for g in pairs.values()]
    penalties = [
        ParametricGradientPenalty(ALPHA, g, f, critic_values=values) for f, g in pairs.items()
    ]
    noises = [NoiseInjection(ConstantNoise(LEVEL), g, f) for f, g in pairs.items()]
    callbacks = [tracker, monitor, grid, *averages, *penalties, *noises, live]
    trainer = fit(module, tmp_path, *callbacks)
    fit(twin, tmp_path)
    fit(plain, tmp_path)

    assert [c.updates for c in callbacks[:-1]] == [UPDATES] * (len(callbacks) - 1)
    assert [penalty.critic_step for penalty in penalties] == [UPDATES] * len(pairs)
    own, other = module.state_dict(), twin.state_dict()
    for name, value in own.items():
        torch.testing.assert_close(value, other[name], rtol=1e-10, atol=1e-10, msg=name)
    for name in (*pairs, *pairs.values()):  # the callbacks made a difference
        apart = [
            (p - q).norm()
            for p, q in zip(
                module.get_submodule(name).parameters(),
                plain.get_submodule(name).parameters(),
                strict=True,
            )
        ]
        assert max(apart) > 1e-4, name
    for average, g in zip(averages, pairs.values(), strict=True):
        mean = live.kept[g][0]
        for weights in live.kept[g][1:]:
            mean = torch.lerp(weights, mean, 0.5 ** (1 / HALF_LIFE))
        found = torch.cat([p.flatten() for p in average.averaged_generator.parameters()])
        torch.testing.assert_close(found, mean, rtol=1e-10, atol=1e-12)
    assert [entry["step"] for entry in tracker.history] == [0, 5, 10]
    assert monitor.traces.steps == [0, 2, 4, 6, 8, 10]
    changes = torch.tensor(monitor.traces.critic_change)
    assert changes[1:].gt(0).all()  # each update was compared with the one before
    assert sorted(path.name for path in (tmp_path / "grids").iterdir()) == [
        f"step={step:06d}.png" for step in (0, 5, 10)
    ]
    names = {n.rsplit("/", 1)[0] for n in trainer.callback_metrics if n.startswith("penalty/")}
    assert len(names) == len(pairs)


def test_the_tracker_measures_the_average_of_a_conditional_gan(tmp_path):
    torch.manual_seed(0)
    module = ConditionalGAN()
    tracker = MMDTracker(Gaussian(2.0), 100, num_real=80, num_fake=30, floor=False)
    average = GeneratorEMA(HALF_LIFE)
    latents = []
    draw = module.fixed_latents
    module.fixed_latents = lambda num, seed=0: latents.append(draw(num, seed)) or latents[-1]
    fit(module, tmp_path, tracker, average)
    fake = average.averaged_generator(*latents[-1])
    expected = mmd2_unbiased(images().tensors[0].flatten(1), fake.flatten(1), Gaussian(2.0))
    assert abs(tracker.last - expected.item()) < 1e-10
