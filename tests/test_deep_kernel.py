"""The classical MMD GAN: objectives by hand, gradients by brute force, parts and processes."""

import copy
import math

import pytest
import torch
from tiny import quiet_trainer
from torch import nn
from torch.func import functional_call
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_mmd import (
    MMDGAN,
    Attractive,
    DeepKernel,
    EmbeddingCritic,
    Game,
    Gaussian,
    Laplace,
    Latents,
    Linear,
    Player,
    RationalQuadratic,
    Repulsive,
    SlopePenalty,
    Split,
    SumKernel,
    mmd2_unbiased,
)
from lightning_mmd.kernel_objectives import deep_mmd2, off_diagonal_mean
from lightning_mmd.networks import MLPFeatures, MLPGenerator

NUM = 12
REAL = torch.randn(NUM, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def networks(spectral_norm=True):
    torch.manual_seed(0)
    critic = EmbeddingCritic(MLPFeatures(2, 8, (16,)), 8, dim=4, spectral_norm=spectral_norm)
    return MLPGenerator(2, 3, (16,)), critic


def players(generator, critic, lr=0.1):
    return (
        Player("generator", generator, dict(generator.named_parameters()), sgd(generator, lr)),
        Player("critic", critic, dict(critic.named_parameters()), sgd(critic, lr)),
    )


def sgd(network, lr):
    return SGD(network.parameters(), lr=lr)


def play(rule, num_steps=3, spectral_norm=True, **game):
    """Return all parameters after some updates, and the last metrics."""
    rule, (generator, critic) = copy.deepcopy(rule), networks(spectral_norm)
    sides, metrics = players(generator, critic), {}
    for step in range(num_steps):
        torch.manual_seed(step)
        metrics = rule.update(Game(*sides, REAL, Latents(3), step=step, **game))
    both = [*generator.parameters(), *critic.parameters()]
    return nn.utils.parameters_to_vector(both).detach(), metrics


# Objectives


def pairs(points, value):
    """The mean of a function of two points over ordered pairs of different points."""
    values = [value(a, b) for i, a in enumerate(points) for j, b in enumerate(points) if i != j]
    return sum(values) / len(values)


def test_objectives_on_a_table_computed_by_hand():
    """Real embeddings 0 and 3, generated ones 0 and 0.1, under exp(-d^2 / 2).

    Squared distances: real pair 9, bounded by 4; generated pair 0.01, at least 0.25; between the
    two kinds 0, 0.01, 9 and 8.41.
    """
    real, fake = torch.tensor([[0.0], [3.0]]), torch.tensor([[0.0], [0.1]])
    repulsive = math.exp(-0.25 / 2) - math.exp(-4.0 / 2)
    value = Repulsive(lower=0.25, upper=4.0).critic(Gaussian(1.0), real, fake)
    assert float(value) == pytest.approx(repulsive, rel=1e-12)
    unbounded = Repulsive(lower=0.0, upper=math.inf).critic(Gaussian(1.0), real, fake)
    assert float(unbounded) == pytest.approx(math.exp(-0.005) - math.exp(-4.5), rel=1e-12)
    between = (1 + math.exp(-0.005) + math.exp(-4.5) + math.exp(-4.205)) / 4
    attractive = math.exp(-4.5) + math.exp(-0.005) - 2 * between
    value = Attractive().critic(Gaussian(1.0), real, fake)
    assert float(value) == pytest.approx(attractive, rel=1e-12)


@pytest.mark.parametrize("kernel", [Gaussian(0.7), RationalQuadratic(0.5), Linear()])
def test_mmd2_is_the_unbiased_one(kernel):
    x, y = torch.randn(7, 3), torch.randn(5, 3)
    torch.testing.assert_close(
        deep_mmd2(kernel, x, y), mmd2_unbiased(x, y, kernel), rtol=1e-12, atol=0
    )
    k = lambda a, b: kernel(a[None], b[None])[0, 0]  # noqa: E731
    cross = sum(k(a, b) for a in x for b in y) / 35
    torch.testing.assert_close(deep_mmd2(kernel, x, y), pairs(x, k) + pairs(y, k) - 2 * cross)


def test_bounds_stop_the_pull_on_pairs_beyond_them():
    real = torch.tensor([[0.0], [3.0]], requires_grad=True)
    fake = torch.tensor([[0.0], [0.1]], requires_grad=True)
    value = Repulsive(lower=0.25, upper=4.0).critic(Gaussian(1.0), real, fake)
    for points in torch.autograd.grad(value, [real, fake], materialize_grads=True):
        assert not points.any()
    value = Repulsive(lower=0.0, upper=10.0).critic(Gaussian(1.0), real, fake)
    on_real, on_fake = torch.autograd.grad(value, [real, fake])
    assert on_real[0] < 0 < on_real[1]  # apart
    assert on_fake[0] > 0 > on_fake[1]  # together


# Gradients


def by_hand(rule, generator, critic, z, points=None):
    """Loss of the critic and of the generator after its step, by plain autograd and loops."""
    k = lambda a, b: rule.kernel(a[None], b[None])[0, 0]  # noqa: E731
    real, fake = critic(REAL), critic(generator(z).detach())
    if isinstance(rule.objective, Attractive):
        cross = sum(k(a, b) for a in real for b in fake) / (len(real) * len(fake))
        objective = pairs(real, k) + pairs(fake, k) - 2 * cross
    else:
        bounded = rule.objective

        def of_real(a, b):
            return rule.kernel.of_squared_distances((a - b).square().sum().clamp(max=bounded.upper))

        def of_fake(a, b):
            return rule.kernel.of_squared_distances((a - b).square().sum().clamp(min=bounded.lower))

        objective = pairs(fake, of_fake) - pairs(real, of_real)
    return -objective, (real, fake)


@pytest.mark.parametrize("objective", [Attractive(), Repulsive(), Repulsive(0.0, 1.0)])
@pytest.mark.parametrize("kernel", [Gaussian(1.0), SumKernel([Gaussian(1.0), Gaussian(3.0)])])
def test_both_steps_are_the_gradients_by_brute_force(objective, kernel):
    rule = DeepKernel(kernel, objective)
    generator, critic = networks(spectral_norm=False)
    twin_generator, twin_critic = copy.deepcopy((generator, critic))
    torch.manual_seed(5)
    rule.update(Game(*players(generator, critic), REAL, Latents(3)))
    torch.manual_seed(5)
    z = torch.randn(NUM, 3)
    loss, _ = by_hand(rule, twin_generator, twin_critic, z)
    optimizer = sgd(twin_critic, 0.1)
    loss.backward()
    optimizer.step()
    real, fake = twin_critic(REAL).detach(), twin_critic(twin_generator(z))
    k = lambda a, b: kernel(a[None], b[None])[0, 0]  # noqa: E731
    cross = sum(k(a, b) for a in real for b in fake) / NUM**2
    optimizer = sgd(twin_generator, 0.1)
    twin_generator.zero_grad()
    (pairs(fake, k) - 2 * cross).backward(inputs=list(twin_generator.parameters()))
    optimizer.step()
    for network, twin in ((critic, twin_critic), (generator, twin_generator)):
        for p, q in zip(network.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("at", ["real", "generated", "interpolated"])
def test_the_slope_penalty_is_that_of_autograd_by_hand(at, target):
    """The witness's references hang on the critic too."""
    rule = DeepKernel(objective=Attractive(), slope=SlopePenalty(0.8, at, target, interval=3))
    generator, critic = networks(spectral_norm=False)
    twin_generator, twin = copy.deepcopy((generator, critic))
    torch.manual_seed(5)
    metrics = rule.update(Game(*players(generator, critic), REAL, Latents(3)))
    torch.manual_seed(5)
    z = torch.randn(NUM, 3)
    fake = twin_generator(z).detach()
    loss, (e_real, e_fake) = by_hand(rule, twin_generator, twin, z)
    x = {"real": REAL, "generated": fake}.get(at)
    if x is None:
        u = torch.rand(NUM)[:, None]
        x = u * REAL + (1 - u) * fake
    x = x.clone().requires_grad_()
    e = twin(x)
    witness = rule.kernel(e, e_real).mean(1) - rule.kernel(e, e_fake).mean(1)
    (slope,) = torch.autograd.grad(witness.sum(), x, create_graph=True)
    if target:
        penalty = (slope.norm(dim=1) - target).square().mean()
    else:
        penalty = slope.square().sum(1).mean()
    (loss + 3 * 0.8 / 2 * penalty).backward()
    assert float(metrics["critic/slope_penalty"]) == pytest.approx(penalty.item(), rel=1e-12)
    for p, q in zip(critic.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad, rtol=1e-11, atol=1e-13)


def test_a_lazy_slope_penalty_comes_at_every_third_step():
    lazy, _ = play(DeepKernel(slope=SlopePenalty(0.5, interval=3)), 1)
    threefold, _ = play(DeepKernel(slope=SlopePenalty(1.5)), 1)
    torch.testing.assert_close(lazy, threefold, rtol=1e-13, atol=0)
    generator, critic = networks()
    rule = DeepKernel(slope=SlopePenalty(0.5, interval=3))
    copies = copy.deepcopy((generator, critic))
    torch.manual_seed(1)
    rule.update(Game(*players(generator, critic), REAL, Latents(3), step=1))
    torch.manual_seed(1)
    DeepKernel().update(Game(*players(*copies), REAL, Latents(3), step=1))
    for p, q in zip(critic.parameters(), copies[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_parametric_penalty_is_that_of_double_backward():
    rule = DeepKernel(objective=Attractive(), alpha=0.6, estimator=Split())
    generator, critic = networks(spectral_norm=False)
    twin_generator, twin = copy.deepcopy((generator, critic))
    torch.manual_seed(5)
    metrics = rule.update(Game(*players(generator, critic), REAL, Latents(3)))
    torch.manual_seed(5)
    z = torch.randn(NUM, 3)
    loss, (e_real, e_fake) = by_hand(rule, twin_generator, twin, z)
    theta = {n: p.detach().requires_grad_() for n, p in twin_generator.named_parameters()}

    def gradient(half):
        e = twin(functional_call(twin_generator, theta, half))
        witness = rule.kernel(e, e_real).mean(1) - rule.kernel(e, e_fake).mean(1)
        grads = torch.autograd.grad(witness.mean(), list(theta.values()), create_graph=True)
        return torch.cat([g.flatten() for g in grads])

    first, second = (gradient(half) for half in z.chunk(2))
    (loss + 0.6 / 2 * 2 * first.detach() @ second).backward()
    value = (first @ second).item()
    assert float(metrics["critic/parametric_penalty"]) == pytest.approx(value, rel=1e-10)
    for p, q in zip(critic.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q - 0.1 * q.grad, rtol=1e-10, atol=1e-12)


# Parts, hooks, processes

RULES = {
    "repulsive": DeepKernel(),
    "attractive, fresh samples": DeepKernel(objective=Attractive(), share_samples=False),
    "slope": DeepKernel(slope=SlopePenalty(0.5)),
    "slope at real": DeepKernel(slope=SlopePenalty(0.5, at="real", target=1.0)),
    "alpha": DeepKernel(alpha=1.0),
    "alpha, split": DeepKernel(alpha=1.0, estimator=Split()),
}


@pytest.mark.parametrize("num_parts", [3, 5, 12])
@pytest.mark.parametrize("name", RULES)
def test_micro_batches_train_as_the_batch(name, num_parts):
    """Spectral normalisation too: its power iteration moves once a batch."""
    whole, metrics = play(RULES[name])
    parts, others = play(RULES[name], micro_batches=num_parts)
    assert (whole - parts).abs().max() < 1e-12
    for key, value in metrics.items():
        assert float(others[key]) == pytest.approx(float(value), rel=1e-10), key


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_hooks_see_the_gradient_that_samples_follow(micro_batches):
    """Handing it back changes nothing; doubling it doubles the generator's step."""
    plain, _ = play(DeepKernel(), 1, micro_batches=micro_batches)
    same, _ = play(DeepKernel(), 1, micro_batches=micro_batches, hooks=(lambda x, g: g(x),))
    alone, _ = play(DeepKernel(), 1, micro_batches=micro_batches, hooks=(lambda x, g: None,))
    torch.testing.assert_close(same, plain, rtol=1e-12, atol=1e-14)
    assert torch.equal(alone, plain)
    twice, _ = play(DeepKernel(), 1, micro_batches=micro_batches, hooks=(lambda x, g: 2 * g(x),))
    start = nn.utils.parameters_to_vector([p for n in networks() for p in n.parameters()])
    size = sum(p.numel() for p in networks()[0].parameters())
    moved = [vector[:size] - start[:size] for vector in (plain, twice)]
    torch.testing.assert_close(moved[1], 2 * moved[0], rtol=1e-10, atol=1e-13)
    assert torch.equal(twice[size:], plain[size:])  # the critic's step is not changed


class WholeBatch(MMDGAN):
    """One process that draws what two processes draw between them, rank after rank."""

    def sample_latents(self, num):
        if self._trainer is None or num != NUM:
            return super().sample_latents(num)
        rng = [torch.Generator().manual_seed(100 * self.critic_step + r) for r in range(2)]
        return torch.cat([torch.randn(NUM // 2, 3, generator=r) for r in rng])


class Share(MMDGAN):
    def sample_latents(self, num):
        if self._trainer is None or num != NUM // 2:
            return super().sample_latents(num)
        seed = 100 * self.critic_step + self.global_rank
        return torch.randn(num, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "rule",
    [
        DeepKernel(),
        DeepKernel(objective=Attractive(), slope=SlopePenalty(0.5, at="generated")),
        DeepKernel(alpha=1.0),
    ],
    ids=["repulsive", "slope", "alpha"],
)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_processes_train_as_one(rule, micro_batches, tmp_path):
    """The Gram matrix is that of both batches."""

    def fit(kind, devices, **kwargs):
        model = kind(
            *networks(),
            rule,
            latents=3,
            generator_optimizer=lambda p: SGD(p, lr=0.1),
            critic_optimizer=lambda p: SGD(p, lr=0.1),
            **kwargs,
        )
        trainer = quiet_trainer(
            tmp_path, devices=devices, strategy="auto" if devices == 1 else "ddp_fork", max_steps=3
        )
        # The distributed sampler deals samples out in turn.
        data = REAL if devices == 1 else REAL.view(2, NUM // 2, 2).transpose(0, 1).reshape(NUM, 2)
        trainer.fit(model, DataLoader(data, batch_size=NUM // devices))
        trainer.save_checkpoint(tmp_path / f"{devices}.ckpt", weights_only=True)
        return torch.load(tmp_path / f"{devices}.ckpt", weights_only=True)["state_dict"]

    one, two = fit(WholeBatch, 1), fit(Share, 2, micro_batches=micro_batches)
    start = MMDGAN(*networks(), rule, latents=3).state_dict()
    assert max(float((one[n] - p).abs().max()) for n, p in start.items()) > 1e-2  # they moved
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-10)


# What does not fit


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: DeepKernel(Linear()), TypeError, "kernel of the distance alone.*got Linear"),
        (lambda: DeepKernel("Gaussian"), TypeError, "kernel must be a Kernel such as Gaussian"),
        (lambda: DeepKernel(objective=Linear()), TypeError, "objective must be a KernelObjective"),
        (lambda: DeepKernel(alpha=-1.0), ValueError, "alpha must be a finite number >= 0"),
        (lambda: Repulsive(-1.0, 4.0), ValueError, "finite lower >= 0 and upper > 0"),
        (lambda: SlopePenalty(0.0), ValueError, "weight > 0"),
        (lambda: SlopePenalty(1.0, "between"), ValueError, "interpolated, real or generated"),
        (lambda: EmbeddingCritic(nn.Identity(), 2, dim=0), ValueError, "dim of at least 1"),
    ],
)
def test_bad_arguments_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_other_kernels_suit_the_attractive_objective():
    DeepKernel(Linear(), Attractive())
    DeepKernel(Laplace(1.0))


def test_a_critic_of_values_is_refused_before_the_first_step():
    critic = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    model = MMDGAN(MLPGenerator(2, 3), critic, DeepKernel(), latents=3)
    with pytest.raises(ValueError, match=r"shape \(2, d\), got \(2,\). Use EmbeddingCritic"):
        model.check_networks()


def test_the_witness_is_the_difference_of_mean_kernels():
    rule, (generator, critic) = DeepKernel(), networks()
    critic.eval()
    fake = generator(torch.randn(5, 3)).detach()
    f = rule.witness(critic, (REAL,), (fake,))
    x = torch.randn(4, 2)
    k = rule.kernel
    expected = k(critic(x), critic(REAL)).mean(1) - k(critic(x), critic(fake)).mean(1)
    torch.testing.assert_close(f(x), expected)
    gap = rule.gap(critic, (REAL,), (fake,))
    torch.testing.assert_close(gap, mmd2_unbiased(critic(REAL), critic(fake), k))
    assert off_diagonal_mean(torch.tensor([[9.0, 1.0], [3.0, 9.0]])) == 2.0
