"""The closed form's step: a minimising movement, its two bounds, its efficiency, its limits."""

import math

import pytest
import torch
from reference import embedding_jacobian, solve_dense
from torch import nn

from lightning_mmd import ClosedForm, Game, LearnedKernelCritic, Player, solve_witness
from lightning_mmd.witness import WitnessConvergenceWarning


def problem(num_features=5, num_parameters=9, seed=0):
    """A random J with known singular values, and a gap."""
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.randn(num_features, num_parameters, generator=generator)
    return jacobian, torch.randn(num_features, generator=generator)


def step(jacobian, gap, tau, alpha, beta):
    normal = alpha * jacobian.T @ jacobian + beta * torch.eye(jacobian.shape[1])
    return tau * torch.linalg.solve(normal, jacobian.T @ gap)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (2.0, 3.0), (0.0, 0.7)])
@pytest.mark.parametrize("share", [0.3, 0.999, 1.001])
def test_the_step_is_a_minimising_movement(alpha, beta, share):
    """It is where 1/2 ||delta - J u||^2 + |u|^2 / (2 tau) in the metric is least."""
    jacobian, gap = problem()
    largest = float(torch.linalg.eigvalsh(jacobian @ jacobian.T).max())
    tau = share * (alpha + beta / largest)
    metric = (alpha - tau) * jacobian.T @ jacobian + beta * torch.eye(9)
    u = step(jacobian, gap, tau, alpha, beta).requires_grad_()
    objective = 0.5 * (gap - jacobian @ u).square().sum() + u @ metric @ u / (2 * tau)
    (gradient,) = torch.autograd.grad(objective, u)
    assert float(gradient.norm()) < 1e-12
    lowest = float(torch.linalg.eigvalsh(metric).min())
    assert (lowest > 0) == (share < 1)  # a metric iff tau < alpha + beta / lambda_max
    if share < 1:  # and then it is the minimum
        for _ in range(20):
            v = u + 0.1 * torch.randn(9)
            other = 0.5 * (gap - jacobian @ v).square().sum() + v @ metric @ v / (2 * tau)
            assert other > objective


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (2.0, 3.0), (0.0, 0.7)])
def test_the_linear_step_is_stable_until_twice_the_bound(alpha, beta):
    jacobian, gap = problem()
    largest = float(torch.linalg.eigvalsh(jacobian @ jacobian.T).max())
    for share, falls in ((0.5, True), (1.999, True), (2.001, False), (2.5, False)):
        tau, delta = share * (alpha + beta / largest), gap.clone()
        norms = [float(delta.norm())]
        for _ in range(20000):
            delta = delta - jacobian @ step(jacobian, delta, tau, alpha, beta)
            norms.append(float(delta.norm()))
            if norms[-1] > 1e6 * norms[0] or norms[-1] < 1e-6 * norms[0]:
                break
        assert (norms[-1] < norms[0]) == falls


def play(eta, alpha, beta, num_updates, max_iterations=50):
    """Let the rule move a generator whose mean embedding is linear: features x, G(z) = A z + b."""
    torch.manual_seed(3)
    generator, z = nn.Linear(2, 3), torch.randn(6, 2)
    critic = LearnedKernelCritic(nn.Identity(), 3)
    rule = ClosedForm(alpha, beta, eta=eta, max_iterations=max_iterations, tolerance=1e-13)
    rule.check(generator, critic)
    values = dict(generator.named_parameters())
    player = Player("generator", generator, values, rule.generator_optimizer(values.values()))
    real, metrics = torch.randn(6, 3) + 1, []
    for index in range(num_updates):
        opponent = Player("critic", critic, {}, None)
        metrics.append(rule.update(Game(player, opponent, real, lambda n: z, step=index)))
    jacobian = embedding_jacobian(lambda x: x, generator, z)
    return metrics, jacobian, player


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (2.0, 6.0), (0.0, 0.7)])
def test_both_bounds_in_terms_of_eta(alpha, beta):
    """The bounds are 1 and 2 in units of alpha + beta / lambda, at alpha = 0 too."""
    for eta, falls in ((0.5, True), (1.98, True), (2.02, False)):
        metrics, jacobian, player = play(eta, alpha, beta, 60)
        largest = float(torch.linalg.eigvalsh(jacobian @ jacobian.T).max())
        tau = eta * (alpha + beta / largest)
        assert metrics[0]["certificate/step"] == pytest.approx(tau, rel=1e-9)
        assert player.cumulative_lr == pytest.approx(60 * tau, rel=1e-9)
        energies = [float(m["certificate/objective"]) for m in metrics]
        assert (energies[-1] < energies[0]) == falls
    metrics, _, _ = play(1.0, alpha, beta, 3)  # here the stiffest direction ends at once
    assert float(metrics[1]["certificate/objective"]) < 1e-20


def test_nothing_jumps_where_alpha_goes_to_zero():
    """F after 20 updates is continuous in alpha, and in beta down to 0."""
    runs = {(a, b): play(0.3, a, b, 20)[0] for a in (0.0, 1e-8, 1e-6) for b in (1.0, 1e-3)}
    for beta in (1.0, 1e-3):
        start, *others = [
            float(runs[alpha, beta][-1]["certificate/objective"]) for alpha in (0.0, 1e-8, 1e-6)
        ]
        for alpha, other in zip((1e-8, 1e-6), others, strict=True):
            assert other == pytest.approx(start, rel=100 * alpha / beta)
    ends = [play(0.3, 1.0, b, 20)[0][-1]["certificate/objective"] for b in (0.0, 1e-9)]
    assert float(ends[1]) == pytest.approx(float(ends[0]), rel=1e-6)


@pytest.mark.parametrize("max_iterations", [1, 50])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (100.0, 1e-3), (1e-3, 10.0)])
def test_efficiency_of_an_update(alpha, beta, max_iterations):
    """Logged for exact and inexact w; at the exact one it is 1 - beta MMD^2_ab / F, in [0, 1]."""
    (metrics, *_), jacobian, _ = play(0.4, alpha, beta, 1, max_iterations)
    efficiency = float(metrics["certificate/efficiency"])
    rate = -float(metrics["certificate/predicted"]) / metrics["certificate/step"]
    mmd2 = float(metrics["witness/mmd2"])
    assert efficiency == pytest.approx(alpha * rate / mmd2, rel=1e-9)
    if max_iterations > 1:
        values = torch.linalg.eigvalsh(jacobian @ jacobian.T)  # all 3 equal: 1 + |mean z|^2
        assert values[0] == pytest.approx(float(values[2]), rel=1e-9)
        damped = alpha * float(values[0])
        assert efficiency == pytest.approx(damped / (damped + beta), rel=1e-9)
    assert "certificate/efficiency" not in play(0.4, 0.0, 1.0, 1)[0][0]


def witness(alpha, beta, **kwargs):
    torch.manual_seed(4)
    features, generator = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Linear(2, 3)
    z, gap = torch.randn(8, 2), torch.randn(5)
    jacobian = embedding_jacobian(features, generator, z)
    options = {"tolerance": 1e-13, "max_iterations": 60} | kwargs
    return solve_witness(features, generator, z, gap, alpha=alpha, beta=beta, **options), jacobian


def test_theorem_rate_without_the_penalty_and_beside_a_large_norm_weight():
    """NaN at alpha = 0, and cancelled for alpha lambda far below beta."""
    limit, jacobian = witness(0.0, 0.3)
    gap = limit.gap
    exact = float((jacobian.T @ gap).square().sum()) / 0.3
    assert limit.theorem_rate.item() == pytest.approx(exact, rel=1e-12)
    for alpha in (1e-3, 1e-6, 1e-9, 1e-12):
        solution, _ = witness(alpha, 0.3)
        w = solve_dense(jacobian, gap, alpha, 0.3)
        rate = float(gap @ jacobian @ jacobian.T @ w)
        assert solution.descent_rate.item() == pytest.approx(rate, rel=1e-10)
        # The residual of 1e-13 weighs 1 / alpha: that much is the theorem's own.
        assert solution.theorem_rate.item() == pytest.approx(rate, rel=1e-10 + 1e-12 / alpha)
        assert rate == pytest.approx(exact, rel=100 * alpha)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.01), (100.0, 1e-3), (2.0, 5.0)])
def test_efficiency_of_a_witness(alpha, beta):
    solution, _ = witness(alpha, beta)
    energy = solution.mmd2 / 2
    exact = 1 - beta * solution.regularised_mmd2 / energy
    assert 0 < solution.efficiency < 1
    assert solution.efficiency.item() == pytest.approx(exact.item(), rel=1e-9)
    assert solution.theorem_rate.item() == pytest.approx(
        float(2 / alpha * energy * solution.efficiency), rel=1e-9
    )
    with pytest.warns(WitnessConvergenceWarning):
        inexact, _ = witness(alpha, beta, max_iterations=1)
    falls = alpha * inexact.descent_rate / inexact.mmd2  # what happens, not what the theorem says
    assert inexact.efficiency.item() == pytest.approx(falls.item(), rel=1e-12)
    assert witness(0.0, 1.0)[0].efficiency is None


def test_efficiency_beside_a_large_norm_weight_does_not_cancel():
    """1 - beta MMD^2_ab / F loses all digits here."""
    solution, jacobian = witness(1e-9, 10.0)
    gap = solution.gap
    expected = 1e-9 / 10 * float((jacobian.T @ gap).square().sum() / gap.square().sum())
    assert solution.efficiency.item() == pytest.approx(expected, rel=1e-7)
    assert math.isfinite(expected)
