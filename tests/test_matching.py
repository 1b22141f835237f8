"""MMD^2 in a critic's own features: the step against autograd, and what it is refused for."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid
from torch.optim import SGD

from lightning_mmd import (
    ConstantNoise,
    FeatureMatching,
    Game,
    Gaussian,
    GradientAscent,
    LearnedKernelCritic,
    Logistic,
    Player,
)
from lightning_mmd.matching import ascent_of_mmd2
from lightning_mmd.networks import MLPFeatures, MLPGenerator

NUM = 6


def networks():
    torch.manual_seed(0)
    return MLPGenerator(2, 3, (8,)), LearnedKernelCritic(MLPFeatures(2, 5, (8,)), 5)


def players(generator, critic):
    return [
        Player(name, network, dict(network.named_parameters()), SGD(network.parameters(), lr))
        for name, network, lr in (("generator", generator, 0.1), ("critic", critic, 0.2))
    ]


def brute_mmd2(kernel, x, y):
    n = len(x)
    total = 0
    for i in range(n):
        for j in range(n):
            total = total - 2 * kernel(x[i : i + 1], y[j : j + 1])[0, 0] / n**2
            if i != j:
                pairs = kernel(x[i : i + 1], x[j : j + 1]) + kernel(y[i : i + 1], y[j : j + 1])
                total = total + pairs[0, 0] / (n * (n - 1))
    return total


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("matching", [FeatureMatching(4.0), FeatureMatching(0.7, Gaussian(0.8))])
def test_the_generator_descends_both(matching, micro_batches):
    generator, critic = networks()
    g, f = copy.deepcopy((generator, critic))
    z, real = torch.randn(NUM, 3), torch.randn(NUM, 2)
    rule = GradientAscent(0.0, 0.0, Logistic(), matching=matching)
    game = Game(
        *players(generator, critic), real, lambda num: z, step=1, micro_batches=micro_batches
    )
    rule.update(game)

    loss = -logsigmoid(f(real)).mean() - logsigmoid(-f(g(z))).mean()
    for p, d in zip(f.parameters(), torch.autograd.grad(loss, list(f.parameters())), strict=True):
        p.data -= 0.2 * d
    on_real, on_fake = f.features(real).detach(), f.features(g(z))
    spread = (on_real - on_real.mean(0)).square().sum() / (NUM - 1)
    mmd2 = brute_mmd2(matching.kernel, on_real / spread.sqrt(), on_fake / spread.sqrt())
    loss = -logsigmoid(f(g(z))).mean() + matching.weight / 2 * mmd2
    gradients = torch.autograd.grad(loss, list(g.parameters()))
    for p, q, d in zip(generator.parameters(), g.parameters(), gradients, strict=True):
        torch.testing.assert_close(p, q - 0.1 * d, rtol=0, atol=1e-12)
    for p, q in zip(critic.parameters(), f.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("paired", [False, True])
def test_the_ascent_of_each_sample_is_the_gradient_of_mmd2(paired):
    torch.manual_seed(0)
    x, y = torch.randn(5 if paired else 7, 2), torch.randn(5, 2, requires_grad=True)
    kernel = Gaussian(1.3)
    within, across = kernel(y, y), kernel(x, y)
    towards = (across.sum() - across.trace()) / 20 if paired else across.mean()
    mmd2 = (within.sum() - within.trace()) / 20 - 2 * towards
    (expected,) = torch.autograd.grad(mmd2, y)
    e = y.detach().clone().requires_grad_()
    ascent = ascent_of_mmd2(kernel, 5, e, x, y.detach(), torch.eye(5), paired)
    (gradient,) = torch.autograd.grad(ascent, e)
    torch.testing.assert_close(gradient, -expected, rtol=1e-12, atol=1e-14)


def test_the_scale_of_the_features_does_not_matter():
    torch.manual_seed(0)
    matching, real, fake = FeatureMatching(2.0), torch.randn(8, 3), torch.randn(8, 3)
    value = matching.loss(real, fake)
    torch.testing.assert_close(matching.loss(50 * real, 50 * fake), value, rtol=1e-12, atol=0)


def test_hooks_that_change_nothing_leave_the_step_as_it_is():
    """Samples that follow their own gradients: the noisy step at level 0 is the clean one."""
    z, real, ended = torch.randn(NUM, 3), torch.randn(NUM, 2), []
    for hooks in ((), (lambda samples, gradient_at: gradient_at(samples),)):
        generator, critic = networks()
        rule = GradientAscent(0.0, 0.0, Logistic(), matching=FeatureMatching(4.0))
        rule.update(Game(*players(generator, critic), real, lambda num: z, step=1, hooks=hooks))
        ended.append([p.detach().clone() for p in generator.parameters()])
    for p, q in zip(*ended, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FeatureMatching(0.0), "finite weight > 0, got 0.0"),
        (lambda: FeatureMatching(1.0, ConstantNoise(0.1)), "kernel must be a Kernel"),
        (lambda: GradientAscent(matching=3.0), "matching must be a FeatureMatching or None"),
        (
            lambda: GradientAscent(beta=0.0, matching=FeatureMatching()).check(
                MLPGenerator(2, 3), nn.Linear(2, 1)
            ),
            "only a LearnedKernelCritic shows, got Linear",
        ),
    ],
)
def test_what_cannot_be_matched_is_named(build, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()
