"""Objectives of a trained critic: closed forms on two points, and the limit of a strong norm."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.optim import SGD

from lightning_mmd import (
    KALE,
    Batch,
    Game,
    GradientAscent,
    Hinge,
    Latents,
    LearnedKernelCritic,
    Logistic,
    Player,
    SlopePenalty,
)
from lightning_mmd.networks import MLPFeatures, MLPGenerator
from lightning_mmd.objectives import Linear

OBJECTIVES = [Linear(), Logistic(), Hinge(), KALE()]
SLOPES = {Linear: 1.0, Logistic: 0.5, Hinge: 1.0, KALE: 1.0}
P = torch.tensor([0.7, 0.3], dtype=torch.float64)  # the target's masses of two points
Q = torch.tensor([0.2, 0.8], dtype=torch.float64)  # the model's


def value(objective, f):
    """The population's objective at the critic's values on the two points."""
    return P @ objective.on_real(f) + Q @ objective.on_fake(f)


def newton_step(function, x):
    gradient = torch.autograd.functional.jacobian(function, x)
    return torch.linalg.solve(torch.autograd.functional.hessian(function, x), gradient)


def maximise(objective, beta=0.0, features=None):
    """Newton's method in the weights of f = features w; return w and the maximum."""
    phi = torch.eye(2) if features is None else features
    w = torch.zeros(phi.shape[1])

    def energy(w):
        return value(objective, phi @ w) - beta / 2 * w @ w

    for _ in range(60):
        w = w - newton_step(energy, w)
    return w, energy(w)


def test_logistic_finds_the_log_ratio_and_the_jensen_shannon_divergence():
    f, most = maximise(Logistic())
    torch.testing.assert_close(f, (P / Q).log(), rtol=1e-10, atol=1e-12)
    m = (P + Q) / 2
    js = ((P * (P / m).log()).sum() + (Q * (Q / m).log()).sum()) / 2
    assert float(most) == pytest.approx(float(2 * js) - 2 * math.log(2), rel=1e-12)


def test_kale_finds_the_log_ratio_and_the_kl_divergence():
    f, most = maximise(KALE())
    torch.testing.assert_close(f, (P / Q).log(), rtol=1e-10, atol=1e-12)
    assert float(most) == pytest.approx(float((Q * (Q / P).log()).sum()), rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_kale_equals_its_dual(beta):
    r"""Fenchel: max_f = min_r sum_i p_i (r_i log r_i - r_i + 1) + ||mu_q - mu_{r p}||^2 / (2 beta).

    The minimum is where r = exp(-f); with one-hot features ||mu_q - mu_rp||^2 = |q - r p|^2.
    """
    f, most = maximise(KALE(), beta)

    def dual(r):
        gap = Q - r * P
        return P @ (r * r.log() - r + 1) + gap @ gap / (2 * beta)

    r = torch.ones(2)
    for _ in range(100):
        r = r - newton_step(dual, r)
    torch.testing.assert_close(r, (-f).exp(), rtol=1e-10, atol=1e-12)
    assert float(dual(r)) == pytest.approx(float(most), rel=1e-10)


def test_hinge_separates_what_it_can():
    """Its best f is the sign of p - q: total variation."""
    grid = torch.cartesian_prod(*2 * [torch.linspace(-2, 2, 81)])
    values = torch.stack([value(Hinge(), f) for f in grid])
    best = grid[values.argmax()]
    torch.testing.assert_close(best, (P - Q).sign())
    assert float(values.max()) == pytest.approx(float((P - Q).abs().sum()) - 2, rel=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_a_strong_norm_leaves_the_mmd(objective):
    """On fixed features, w -> s delta / beta; the direction's error falls like 1 / beta."""
    torch.manual_seed(0)
    phi = torch.randn(2, 5)
    delta, s = phi.T @ (P - Q), SLOPES[type(objective)]
    errors = []
    for beta in (100.0, 1000.0, 10000.0):
        w, most = maximise(objective, beta, phi)
        direction = w / w.norm() - delta / delta.norm()
        scale = w.norm() * beta / (s * delta.norm()) - 1
        rest = value(objective, torch.zeros(2))
        mmd2 = 2 * beta * (most - rest) / s**2 / (delta @ delta) - 1
        errors.append([float(e) for e in (direction.norm(), scale.abs(), mmd2.abs())])
    for coarse, fine in zip(*(torch.tensor(errors[i:][:2]) for i in (0, 1)), strict=True):
        if isinstance(objective, Linear | Hinge):  # exactly the MMD where |f| < 1
            assert (torch.stack([coarse, fine]) < 1e-8).all()
            continue
        ratio = coarse / fine
        assert ((ratio > 8) | (coarse < 1e-8)).all(), (coarse, fine)
        assert ratio[0] < 130  # of order one; of order two where odd terms cancel


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_a_step_under_both_penalties_is_the_formula(objective):
    """One update of each network against naive double backward and plain SGD."""
    torch.manual_seed(0)
    generator = MLPGenerator(2, 3, (16,))
    critic = LearnedKernelCritic(MLPFeatures(2, 8, (16,)), 8)
    critic.weights.data *= 3
    twin_generator, twin = copy.deepcopy((generator, critic))
    rule = GradientAscent(
        alpha=2.0, beta=0.3, objective=objective, estimator=Batch(), share_samples=False
    )
    real = torch.randn(12, 2)
    sides = [
        Player(name, net, dict(net.named_parameters()), SGD(net.parameters(), lr=0.1))
        for name, net in (("generator", generator), ("critic", critic))
    ]
    torch.manual_seed(5)
    metrics = rule.update(Game(*sides, real, Latents(3)))
    torch.manual_seed(5)
    z, fresh = torch.randn(12, 3), torch.randn(12, 3)
    theta = {n: p.detach().requires_grad_() for n, p in twin_generator.named_parameters()}
    fake = twin(functional_call(twin_generator, theta, z))
    slope = torch.autograd.grad(fake.mean(), list(theta.values()), create_graph=True)
    f = twin(twin_generator(z).detach())
    objective_value = objective.critic(twin(real), f)
    loss = -objective_value + 0.15 * twin.rkhs_norm2() + sum(g.square().sum() for g in slope)
    gradients = torch.autograd.grad(loss, list(twin.parameters()))
    if not isinstance(objective, Linear):
        assert float(metrics["critic/objective"]) == pytest.approx(objective_value.item())
    assert float(metrics["critic/gap"]) == pytest.approx((twin(real).mean() - f.mean()).item())
    with torch.no_grad():
        for p, g in zip(twin.parameters(), gradients, strict=True):
            p -= 0.1 * g
    for p, q in zip(critic.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    ascent = objective.generator(twin(twin_generator(fresh)))
    gradients = torch.autograd.grad(ascent, list(twin_generator.parameters()))
    for p, q, g in zip(generator.parameters(), twin_generator.parameters(), gradients, strict=True):
        torch.testing.assert_close(p, q + 0.1 * g, rtol=1e-10, atol=1e-12)


def test_a_plain_gan_needs_no_rkhs_norm():
    critic = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    GradientAscent(0.0, 0.0, Logistic()).check(MLPGenerator(2, 3), critic)
    with pytest.raises(TypeError, match="RKHS norm"):
        GradientAscent(0.0, 0.1, Logistic()).check(MLPGenerator(2, 3), critic)


def test_an_objective_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="objective must be an Objective such as"):
        GradientAscent(objective=torch.nn.BCELoss())


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("at", ["real", "generated"])
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_a_slope_is_penalised_as_by_hand(at, target, shares):
    torch.manual_seed(0)
    generator = MLPGenerator(2, 3, (8,)).double()
    critic = LearnedKernelCritic(MLPFeatures(2, 6, (8,)), 6).double()
    by_hand = copy.deepcopy(critic), copy.deepcopy(generator)
    rule = GradientAscent(
        alpha=0.0,
        beta=0.0,
        objective=Logistic(),
        slope=SlopePenalty(0.7, at=at, target=target, interval=2),
        share_samples=shares,
    )
    players = [
        Player(name, network, dict(network.named_parameters()), SGD(network.parameters(), lr))
        for name, network, lr in (("generator", generator, 0.1), ("critic", critic, 0.2))
    ]
    draws = [torch.randn(5, 3) for _ in range(6)]
    rest, real = iter(draws), torch.randn(5, 2)
    logged = [
        rule.update(Game(*players, real, lambda num: next(rest), step=k))["critic/slope_penalty"]
        for k in range(3)
    ]

    f, g = by_hand
    each = 1 if shares else 2
    for k in range(3):
        z = draws[each * k], draws[each * k + each - 1]
        points = (real if at == "real" else g(z[0])).detach().requires_grad_()
        (slope,) = torch.autograd.grad(f(points).sum(), points, create_graph=True)
        penalty = (slope.norm(dim=1) - target).square().mean()
        loss = -torch.nn.functional.logsigmoid(f(real)).mean()
        loss = loss - torch.nn.functional.logsigmoid(-f(g(z[0]))).mean()
        if k % 2 == 0:  # every second step, with twice the weight
            loss = loss + 0.7 * 2 / 2 * penalty
            torch.testing.assert_close(logged[k], penalty.detach(), rtol=1e-12, atol=0)
        else:
            assert logged[k] == logged[k - 1]
        descend(f, loss, 0.2)
        descend(g, -torch.nn.functional.logsigmoid(f(g(z[1]))).mean(), 0.1)
    for ours, hand in ((critic, f), (generator, g)):
        for p, q in zip(ours.parameters(), hand.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def descend(network, loss, lr):
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for p, g in zip(parameters, gradients, strict=True):
            p -= lr * g


def test_shared_samples_are_generated_once_where_no_penalty_needs_them():
    torch.manual_seed(0)
    generator, critic = MLPGenerator(2, 3, (8,)), LearnedKernelCritic(MLPFeatures(2, 6, (8,)), 6)
    calls = []
    generator.register_forward_hook(lambda *_: calls.append(1))
    players = [
        Player(name, network, dict(network.named_parameters()), SGD(network.parameters(), 0.1))
        for name, network in (("generator", generator), ("critic", critic))
    ]
    for shares, passes in ((True, 1), (False, 2)):
        rule = GradientAscent(alpha=0.0, share_samples=shares)
        calls.clear()
        rule.update(Game(*players, torch.randn(4, 2), Latents(3), step=1))
        assert len(calls) == passes


def test_a_slope_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"slope must be a SlopePenalty or None, got 3"):
        GradientAscent(slope=3)
