"""Flows: orders of convergence, descent identities, autograd twins, resumption bit for bit."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from reference import embedding_jacobian, solve_dense
from torch import Tensor, nn
from torch.func import functional_call

from lightning_mmd.features import RandomFourierFeatures
from lightning_mmd.flows import (
    GeneratorState,
    PointState,
    generator_flow,
    point_flow,
)
from lightning_mmd.kernel_gan import KernelGANState, kernel_gan_flow
from lightning_mmd.kernels import Gaussian, Kernel, Laplace, RationalQuadratic
from lightning_mmd.mmd import mmd2_biased
from lightning_mmd.noise import (
    AdaptiveNoise,
    ConstantNoise,
    GeometricNoise,
    HalvingNoise,
    PlateauNoise,
    hessian_constant,
)
from lightning_mmd.witness import WitnessConvergenceWarning


def last(states: Iterator):
    *_, state = states
    return state


def rng(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(a, b) -> None:
    """Compare two states bit for bit."""
    assert vars(a).keys() == vars(b).keys()
    for name, value in vars(a).items():
        other = vars(b)[name]
        if isinstance(value, dict):
            assert value.keys() == other.keys()
            assert all(torch.equal(value[key], other[key]) for key in value)
        elif isinstance(value, Tensor):
            assert torch.equal(value, other), name
        else:
            assert value == other, name


def orders(error_at: Callable[[int], float]) -> list[float]:
    """Observed orders of an error at step sizes 1 / n, 1 / 2n, 1 / 4n."""
    errors = [error_at(n) for n in (1, 2, 4)]
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


# Points.


def two_blobs() -> tuple[Tensor, Tensor]:
    return torch.randn(25, 2), 0.5 * torch.randn(20, 2) + 1.0


@pytest.mark.parametrize("kernel", [Gaussian(1.0), RationalQuadratic(), Laplace()], ids=str)
def test_a_step_is_gradient_descent_on_half_mmd2(kernel: Kernel) -> None:
    x, y = two_blobs()
    leaf = y.clone().requires_grad_()
    (slope,) = torch.autograd.grad(0.5 * mmd2_biased(x, leaf, kernel), leaf)
    before = y.clone()
    start, moved = point_flow(y, x, kernel, step_size=0.3, num_steps=1)
    torch.testing.assert_close(moved.particles, y - 0.3 * len(y) * slope, rtol=0, atol=1e-14)
    assert start.mmd2 == float(mmd2_biased(x, y, kernel))
    assert moved.mmd2 == float(mmd2_biased(x, moved.particles, kernel))
    assert (moved.step, moved.time, moved.noise, moved.rng_state) == (1, 0.3, 0.0, None)
    assert torch.equal(y, before)


def test_point_flow_is_of_order_one() -> None:
    x, y = two_blobs()

    def end(n: int) -> Tensor:
        flow = point_flow(y, x, Gaussian(), step_size=0.4 / n, num_steps=5 * n)
        return last(flow).particles

    exact = 2 * end(256) - end(128)
    observed = orders(lambda n: float((end(4 * n) - exact).norm()))
    assert observed == pytest.approx([1.0, 1.0], abs=0.1)


def test_energy_decreases_at_the_rate_of_the_gradient() -> None:
    x, y = two_blobs()
    states = list(point_flow(y, x, Gaussian(), step_size=0.1, num_steps=100))
    assert all(b.mmd2 < a.mmd2 for a, b in itertools.pairwise(states))
    # dF/dt = -mean ||velocity||^2, F = MMD^2 / 2, up to the step size.
    a, b = itertools.islice(point_flow(y, x, Gaussian(), step_size=1e-5, num_steps=1), 2)
    dissipation = float(((b.particles - a.particles) / 1e-5).square().sum(1).mean())
    assert 0.5 * (b.mmd2 - a.mmd2) / 1e-5 == pytest.approx(-dissipation, rel=1e-4)


def test_noise_frees_particles_that_the_plain_flow_leaves_behind() -> None:
    # Half of the particles start three bandwidths to the left of the target, half to the right. One
    # made example: how many of them the plain flow leaves behind depends on where they start.
    seeded = torch.Generator().manual_seed(0)
    x, y = (0.3 * torch.randn(20, 2, generator=seeded) for _ in range(2))
    y[:, 0] += torch.tensor([3.0, -3.0]).repeat(10)
    options = {"step_size": 0.5, "num_steps": 500}
    plain = list(point_flow(y, x, Gaussian(), **options))
    noise = ConstantNoise(2.0, until=400)
    noisy = last(point_flow(y, x, Gaussian(), noise=noise, rng=rng(), **options))
    assert plain[500].mmd2 > 0.95 * plain[300].mmd2 > 0.03  # at rest, far from the target
    assert 0 < noisy.mmd2 < 0.1 * plain[500].mmd2
    stranded = [int((s.particles[:, 0].abs() > 2).sum()) for s in (plain[500], noisy)]
    assert stranded[0] >= 3
    assert stranded[1] <= 1


def test_noise_moves_the_evaluation_point_only() -> None:
    # The formula twin, by autograd: clean witness, noisy evaluation point, clean iterate.
    x, y, kernel, schedule = *two_blobs(), Gaussian(), HalvingNoise(0.8, every=2)
    states = list(point_flow(y, x, kernel, step_size=0.2, num_steps=5, noise=schedule, rng=rng()))
    twin, source = y, rng()
    for step in range(5):
        u = torch.randn(y.shape, generator=source)
        at = (twin + schedule.level(step) * u).requires_grad_()
        witness = kernel(at, x).mean(1) - kernel(at, twin).mean(1)
        (gradient,) = torch.autograd.grad(witness.sum(), at)
        twin = twin + 0.2 * gradient
        torch.testing.assert_close(states[step + 1].particles, twin, rtol=0, atol=1e-13)
        assert states[step + 1].noise == schedule.level(step)


def test_noise_of_level_zero_is_the_plain_flow() -> None:
    x, y = two_blobs()
    plain = last(point_flow(y, x, Gaussian(), step_size=0.2, num_steps=5))
    zero = ConstantNoise(0.0)
    quiet = last(point_flow(y, x, Gaussian(), step_size=0.2, num_steps=5, noise=zero, rng=rng()))
    assert torch.equal(plain.particles, quiet.particles)


@pytest.mark.parametrize(
    "noise",
    [None, GeometricNoise(0.5, 0.9), AdaptiveNoise(1.0), PlateauNoise(0.5, window=2, ratio=0.5)],
    ids=str,
)
def test_a_resumed_point_flow_is_the_uninterrupted_one(noise) -> None:
    x, y = two_blobs()
    source = None if noise is None else rng()
    options = {"step_size": 0.2, "noise": noise}
    whole = list(point_flow(y, x, Gaussian(), num_steps=9, rng=source, **options))
    half = last(point_flow(y, x, Gaussian(), num_steps=4, rng=source, **options))
    assert_same(half, whole[4])
    saved = PointState(**vars(half))
    rest = list(point_flow(initial=saved, target=x, kernel=Gaussian(), num_steps=5, **options))
    assert len(rest) == 6
    for a, b in zip(rest, whole[4:], strict=True):
        assert_same(a, b)


def test_the_plateau_rule_lowers_the_level_only_where_the_flow_rests() -> None:
    x, y = 0.3 * torch.randn(20, 2), 0.3 * torch.randn(20, 2) + 3.0
    noise = PlateauNoise(2.0, window=10, tolerance=0.1, ratio=0.5)
    flow = point_flow(y, x, Gaussian(), step_size=0.5, num_steps=200, noise=noise, rng=rng())
    states = list(flow)
    reference, level = states[0].mmd2, 2.0
    for begin in range(0, 200, 10):
        assert {state.noise for state in states[begin + 1 : begin + 11]} == {level}
        average = sum(state.mmd2 for state in states[begin + 1 : begin + 11]) / 10
        level *= 0.5 if average > 0.9 * reference else 1.0
        reference = average
    assert 2.0 * 0.5**15 < states[-1].noise < 1.0  # it fell, and was kept at times
    assert states[-1].mmd2 < 0.2 * states[0].mmd2
    ended = dataclasses.replace(noise, smallest=0.4)
    flow = point_flow(y, x, Gaussian(), step_size=0.5, num_steps=200, noise=ended, rng=rng())
    reached = [state.noise for state in states].index(0.25)  # halved below the smallest
    whole = list(flow)
    for state, same in zip(whole[:reached], states, strict=False):
        assert state.noise == same.noise
        assert torch.equal(state.particles, same.particles)
    assert {state.noise for state in whole[reached:]} == {0.0}
    other = ConstantNoise(1.0)
    half = last(point_flow(y, x, Gaussian(), step_size=0.5, num_steps=3, noise=other, rng=rng()))
    with pytest.raises(ValueError, match="other noise"):
        point_flow(half, x, Gaussian(), step_size=0.5, num_steps=3, noise=noise)
    between = last(point_flow(states[-1], x, Gaussian(), step_size=0.5, num_steps=3, noise=other))
    with pytest.raises(ValueError, match="other noise"):
        point_flow(between, x, Gaussian(), step_size=0.5, num_steps=3, noise=noise)


def test_the_plateau_rule_stays_under_its_line() -> None:
    x, y = 0.3 * torch.randn(20, 2), 0.3 * torch.randn(20, 2) + 3.0
    noise = PlateauNoise(2.0, window=10, tolerance=0.9, ratio=0.7, smallest=0.1, until=50)
    flow = point_flow(y, x, Gaussian(), step_size=0.5, num_steps=60, noise=noise, rng=rng())
    next(flow)
    memory = None
    for step, state in enumerate(flow):
        rule = noise.initial if memory is None else memory[0]
        line = 2.0 * (1 - step / 50)
        assert state.noise == (min(rule, line) if min(rule, line) >= 0.1 else 0.0)
        memory = state.memory
    assert 0.1 < memory[0] < 2.0  # the rule lowered its own level, and the line ended the noise


def test_states_are_not_changed_by_later_steps() -> None:
    x, y = two_blobs()
    flow = point_flow(y, x, Gaussian(), step_size=0.2, num_steps=3)
    first = next(flow)
    copied = copy.deepcopy(first)
    assert last(flow).mmd2 < first.mmd2
    assert_same(first, copied)


def test_noise_needs_a_source_and_a_smooth_kernel_where_it_adapts() -> None:
    x, y = two_blobs()
    options = {"step_size": 0.2, "num_steps": 1}
    with pytest.raises(ValueError, match="needs a rng"):
        point_flow(y, x, Gaussian(), noise=ConstantNoise(0.1), **options)
    plain = last(point_flow(y, x, Gaussian(), **options))
    with pytest.raises(ValueError, match="without noise"):
        point_flow(plain, x, Gaussian(), noise=ConstantNoise(0.1), rng=rng(), **options)
    with pytest.raises(TypeError, match="HalvingNoise"):
        last(point_flow(y, x, Laplace(), noise=AdaptiveNoise(1.0), rng=rng(), **options))


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf])
def test_flows_refuse_wrong_sizes_at_once(value: float) -> None:
    x, y = two_blobs()
    with pytest.raises(ValueError, match="finite step_size > 0"):
        point_flow(y, x, Gaussian(), step_size=value, num_steps=1)
    with pytest.raises(ValueError, match="finite critic_lr > 0"):
        kernel_gan_flow(
            y, x, Gaussian(), norm_weight=1, critic_lr=value, generator_lr=0.1, num_steps=1
        )
    with pytest.raises(ValueError, match="num_steps >= 0"):
        point_flow(y, x, Gaussian(), step_size=1.0, num_steps=-1)


def hessian_of_energy(y: Tensor, x: Tensor, kernel: Kernel) -> Tensor:
    """Hessian of m F in the particles, by autograd: (m d, m d)."""

    def energy(flat: Tensor) -> Tensor:
        return 0.5 * len(y) * mmd2_biased(x, flat.reshape(y.shape), kernel)

    return torch.autograd.functional.hessian(energy, y.flatten())


@pytest.mark.parametrize("num", [1, 2, 6])
@pytest.mark.parametrize("bandwidth", [0.5, 1.3])
def test_bound_on_the_step_of_particles(bandwidth: float, num: int) -> None:
    kernel = Gaussian(bandwidth)
    curvature, constant = 1 / bandwidth**2, hessian_constant(kernel)
    for scale in (0.1, 1.0, 3.0):
        x, y = torch.randn(5, 2), scale * torch.randn(num, 2)
        mmd = float(mmd2_biased(x, y, kernel).clamp_min(0).sqrt())
        bound = curvature + constant * mmd
        assert bound == pytest.approx((1 + math.sqrt(3) * mmd) / bandwidth**2)
        assert float(torch.linalg.matrix_norm(hessian_of_energy(y, x, kernel), 2)) <= bound
        *_, moved = point_flow(y, x, kernel, step_size=1.99 / bound, num_steps=1)
        assert moved.mmd2 <= mmd**2 + 1e-15
    # The second derivative of the other kernels' profiles: kappa^2 = -k''(0).
    for other, expected in ((RationalQuadratic(0.5, 1.3), 1.3**-2), (Gaussian(0.7), 0.7**-2)):
        at_target = hessian_of_energy(torch.zeros(1, 1), torch.zeros(1, 1), other)
        assert float(at_target) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("step_size", "returns"), [(1.9, True), (2.1, False)])
def test_one_particle_is_unstable_where_the_witness_is_flat(
    step_size: float, returns: bool
) -> None:
    """ "s times the Hessian of the witness below 2" held for both: it is 3e-4 here."""
    y = torch.full((1, 1), 0.01)
    *_, state = point_flow(y, torch.zeros(1, 1), Gaussian(), step_size=step_size, num_steps=200)
    assert (float(state.particles.abs()) < 1e-6) == returns
    assert (float(state.particles.abs()) > 0.1) != returns


# Generators.


def small_generator() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))


def setup(
    num_features: int = 12,
) -> tuple[nn.Module, Tensor, RandomFourierFeatures, Tensor]:
    features = RandomFourierFeatures(Gaussian(1.5), in_features=2, num_features=num_features)
    return small_generator(), torch.randn(30, 2), features, features(torch.randn(50, 2) + 1).mean(0)


def test_first_state_against_dense_algebra() -> None:
    generator, z, features, target = setup()
    alpha, beta = 2.0, 0.05
    flow = generator_flow(
        generator,
        z,
        features,
        target,
        alpha=alpha,
        beta=beta,
        step_size=0.1,
        num_steps=1,
        tolerance=1e-13,
    )
    start, moved = flow
    jacobian = embedding_jacobian(features, generator, z)
    gap = target - features(generator(z)).mean(0).detach()
    w = solve_dense(jacobian, gap, alpha, beta)
    image = jacobian @ jacobian.T @ w
    torch.testing.assert_close(start.weights, w, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(start.velocity, jacobian.T @ w, rtol=1e-9, atol=1e-10)
    # The other side of the push-through identity: a Levenberg-Marquardt step.
    normal = alpha * jacobian.T @ jacobian + beta * torch.eye(jacobian.shape[1])
    torch.testing.assert_close(
        start.velocity, torch.linalg.solve(normal, jacobian.T @ gap), rtol=1e-9, atol=1e-10
    )
    assert start.energy == pytest.approx(0.5 * float(gap @ gap), rel=1e-12)
    assert start.regularised_mmd2 == pytest.approx(0.5 * float(gap @ w), rel=1e-10)
    speed2 = float(alpha * image @ image + beta * w @ image)
    assert start.squared_speed == pytest.approx(speed2, rel=1e-9)
    assert (start.length, start.residual < 1e-13) == (0.0, True)
    assert moved.length == pytest.approx(0.1 * math.sqrt(speed2), rel=1e-9)
    step = torch.cat([(moved.parameters[n] - p).flatten() for n, p in start.parameters.items()])
    torch.testing.assert_close(step, 0.1 * start.velocity, rtol=0, atol=1e-14)


def realised_rate(step_size: float, alpha: float = 1.0, beta: float = 0.05) -> tuple[float, float]:
    torch.manual_seed(2)
    generator, z, features, target = setup()
    start, moved = generator_flow(
        generator,
        z,
        features,
        target,
        alpha=alpha,
        beta=beta,
        step_size=step_size,
        num_steps=1,
        tolerance=1e-13,
    )
    return (moved.energy - start.energy) / step_size, start.rate


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.05), (100.0, 1.0), (0.5, 1e-3), (1.0, 10.0)])
def test_descent_identity_in_the_limit(alpha: float, beta: float) -> None:
    scale = min(alpha, 1.0) * 2e-4
    (coarse, rate), (fine, _) = (realised_rate(scale * h, alpha, beta) for h in (1.0, 0.5))
    limit = 2 * fine - coarse  # Richardson: the first-order error cancels
    assert rate < 0
    assert limit == pytest.approx(rate, rel=1e-6)
    assert fine != pytest.approx(rate, rel=1e-12)


def test_discrepancy_of_the_identity_is_of_order_one() -> None:
    def discrepancy(n: int) -> float:
        realised, predicted = realised_rate(0.02 / n)
        return abs(realised - predicted)

    assert orders(discrepancy) == pytest.approx([1.0, 1.0], abs=0.05)


def test_generator_flow_is_of_order_one() -> None:
    generator, z, features, target = setup()

    def end(n: int) -> float:
        flow = generator_flow(
            generator, z, features, target, alpha=1.0, beta=0.1, step_size=0.2 / n, num_steps=4 * n
        )
        return last(flow).energy

    ends = {n: end(n) for n in (8, 16, 32, 64)}  # differences of an order-one scheme halve too
    assert orders(lambda n: abs(ends[8 * n] - ends[16 * n])) == pytest.approx([1.0, 1.0], abs=0.2)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.01), (5.0, 0.3), (0.0, 1.0)])
def test_rate_is_minus_the_squared_speed_along_the_flow(alpha: float, beta: float) -> None:
    generator, z, features, target = setup()
    states = list(
        generator_flow(
            generator,
            z,
            features,
            target,
            alpha=alpha,
            beta=beta,
            step_size=0.2,
            num_steps=15,
            tolerance=1e-12,
        )
    )
    for state in states:
        assert state.rate == pytest.approx(-state.squared_speed, rel=1e-8)
    lengths = [0.2 * math.sqrt(state.squared_speed) for state in states[:-1]]
    assert states[-1].length == pytest.approx(sum(lengths), rel=1e-12)
    assert all(b.energy < a.energy for a, b in itertools.pairwise(states))


def test_energy_falls_like_an_exponential_when_damping_vanishes() -> None:
    generator, z, features, target = setup(num_features=4)  # J has full rank 4
    alpha = 3.0
    states = list(
        generator_flow(
            generator,
            z,
            features,
            target,
            alpha=alpha,
            beta=1e-9,
            step_size=0.003,
            num_steps=500,
        )
    )
    for state in states[100::100]:
        expected = states[0].energy * math.exp(-2 * state.time / alpha)
        assert state.energy == pytest.approx(expected, rel=2e-2)  # steps of finite length


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.05), (3.0, 2.0)])
def test_energy_is_the_exponential_of_the_efficiency(alpha: float, beta: float) -> None:
    generator, z, features, target = setup()

    def gap(n: int) -> float:
        """log F(T) / F(0) + (2 / alpha) times the integral of efficiency, T = 0.4 alpha."""
        states = list(
            generator_flow(
                generator,
                z,
                features,
                target,
                alpha=alpha,
                beta=beta,
                step_size=0.1 * alpha / n,
                num_steps=4 * n,
            )
        )
        values = [state.efficiency for state in states]
        integral = sum((a + b) / 2 * 0.1 * alpha / n for a, b in itertools.pairwise(values))
        for state in states:
            exact = 1 - beta * state.regularised_mmd2 / state.energy
            assert 0 < state.efficiency < 1
            assert state.efficiency == pytest.approx(exact, abs=1e-8)
            assert state.rate == pytest.approx(-2 / alpha * state.energy * state.efficiency)
        fallen = math.log(states[-1].energy / states[0].energy)
        assert fallen < -0.05
        return fallen + 2 / alpha * integral

    coarse, fine = gap(12), gap(24)
    assert coarse / fine == pytest.approx(2.0, rel=0.1)  # Euler's order
    assert abs(2 * fine - coarse) < 0.1 * abs(fine)  # Richardson: exact in the limit


def drmmd(phi: Tensor, regulariser: float) -> Callable[[Tensor], Tensor]:
    """(1 + lambda) / 2 times <delta, (C + lambda I)^-1 delta>, C of the target's features."""
    second = phi.T @ phi / len(phi) + regulariser * torch.eye(phi.shape[1])
    return lambda m: (
        (1 + regulariser) / 2 * ((phi.mean(0) - m) @ torch.linalg.solve(second, phi.mean(0) - m))
    )


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.05), (3.0, 2.0), (0.0, 1.0)])
@pytest.mark.parametrize("name", ["drmmd", "quartic", "mmd"])
def test_any_functional_of_the_embedding_descends(name: str, alpha: float, beta: float) -> None:
    generator, z, features, target = setup()
    phi = features(torch.randn(50, 2) + 1)
    functional = {
        "drmmd": drmmd(phi, 0.1),
        "quartic": lambda m: (m - target).pow(4).sum() + 0.3 * (m - target).square().sum(),
        "mmd": lambda m: 0.5 * (target - m).square().sum(),
    }[name]

    def flow(goal: Tensor | Callable, step_size: float) -> list[GeneratorState]:
        options = {"alpha": alpha, "beta": beta, "step_size": step_size, "tolerance": 1e-12}
        return list(generator_flow(generator, z, features, goal, num_steps=1, **options))

    start, moved = flow(functional, 1e-5)
    m = features(generator(z)).mean(0).detach().requires_grad_()
    assert start.energy == pytest.approx(float(functional(m.detach())), rel=1e-12)
    (slope,) = torch.autograd.grad(functional(m), m)
    jacobian = embedding_jacobian(features, generator, z)
    w = solve_dense(jacobian, -slope, alpha, beta)
    torch.testing.assert_close(start.weights, w, rtol=1e-8, atol=1e-9)
    rate = float(slope @ jacobian @ jacobian.T @ w)
    assert start.rate == pytest.approx(rate, rel=1e-8)
    assert start.squared_speed == pytest.approx(-rate, rel=1e-8)
    *_, nearer = flow(functional, 5e-6)
    coarse, fine = ((s.energy - start.energy) / s.time for s in (moved, nearer))
    assert 2 * fine - coarse == pytest.approx(rate, rel=1e-4)
    assert rate < 0
    if name == "mmd":
        for ours, theirs in zip((start, moved), flow(target, 1e-5), strict=True):
            assert ours.energy == pytest.approx(theirs.energy, rel=1e-12)
            torch.testing.assert_close(ours.velocity, theirs.velocity, rtol=1e-9, atol=1e-12)


def test_functionals_without_a_differential_are_refused() -> None:
    generator, z, features, target = setup()
    options = {"alpha": 1.0, "beta": 0.1, "step_size": 0.1, "num_steps": 1}
    for goal in (lambda m: (m - target).square(), lambda m: torch.tensor(1.0)):
        with pytest.raises(ValueError, match="must return a scalar that depends"):
            list(generator_flow(generator, z, features, goal, **options))
    with pytest.raises(ValueError, match="one entry for each of the 12 features"):
        list(generator_flow(generator, z, features, target[:3], **options))


def test_a_flow_stalls_where_the_gap_is_across_what_the_generator_can_do() -> None:
    """G(z) = z (0, theta): only the second mean moves. D delta = 0, F > 0 and efficiency 0."""

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor(0.3))

        def forward(self, z: Tensor) -> Tensor:
            return torch.cat([torch.zeros_like(z), z * self.theta], 1)

    def first(target: list[float], alpha: float = 2.0) -> GeneratorState:
        flow = generator_flow(
            Second(),
            torch.ones(4, 1),
            lambda x: x,
            torch.tensor(target),
            alpha=alpha,
            beta=0.5,
            step_size=0.1,
            num_steps=0,
        )
        return next(flow)

    assert first([1.0, 0.3]).efficiency == 0.0
    assert first([1.0, 0.3]).energy == 0.5
    # delta = (1, 1), w = delta / (0.5, 2.5), D w = (0, 1 / 2.5): 2 (1 / 2.5) / 2.
    assert first([1.0, 1.3]).efficiency == pytest.approx(0.4, rel=1e-12)
    assert first([1.0, 1.3], alpha=0.0).efficiency is None
    assert math.isnan(first([0.0, 0.3]).efficiency)


def test_without_the_penalty_it_is_gradient_descent_on_half_mmd2() -> None:
    generator, z, features, target = setup()
    energy = 0.5 * (features(generator(z)).mean(0) - target).square().sum()
    slopes = torch.autograd.grad(energy, list(generator.parameters()))
    start = next(
        generator_flow(
            generator, z, features, target, alpha=0.0, beta=2.0, step_size=0.1, num_steps=0
        )
    )
    expected = -torch.cat([slope.flatten() for slope in slopes]) / 2.0
    torch.testing.assert_close(start.velocity, expected, rtol=0, atol=1e-14)


def test_a_resumed_generator_flow_is_the_uninterrupted_one() -> None:
    generator, z, features, target = setup()

    def flow(num_steps: int, initial: GeneratorState | None = None) -> list[GeneratorState]:
        return list(
            generator_flow(
                generator,
                z,
                features,
                target,
                alpha=1.0,
                beta=0.1,
                step_size=0.3,
                num_steps=num_steps,
                initial=initial,
            )
        )

    whole, half = flow(6), flow(3)
    for a, b in zip(flow(3, GeneratorState(**vars(half[-1]))), whole[3:], strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("normalised", [False, True])
def test_the_generator_is_left_alone(normalised: bool) -> None:
    _, z, features, target = setup()
    layer = nn.BatchNorm1d(8) if normalised else nn.Identity()
    generator = nn.Sequential(nn.Linear(2, 8), layer, nn.Tanh(), nn.Linear(8, 2))
    before = copy.deepcopy(generator.state_dict())
    states = list(
        generator_flow(
            generator, z, features, target, alpha=1.0, beta=0.1, step_size=0.3, num_steps=5
        )
    )
    for name, value in generator.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in generator.parameters())
    moved = functional_call(copy.deepcopy(generator), states[-1].parameters, (z,))
    gap = features(moved).mean(0) - target
    assert 0.5 * float(gap.detach().square().sum()) == pytest.approx(states[-1].energy, rel=1e-12)
    assert states[-1].energy < 0.6 * states[0].energy


def test_a_witness_that_misses_its_tolerance_warns() -> None:
    generator, z, features, target = setup()
    flow = generator_flow(
        generator,
        z,
        features,
        target,
        alpha=1.0,
        beta=1e-6,
        step_size=0.3,
        num_steps=1,
        max_iterations=2,
    )
    with pytest.warns(WitnessConvergenceWarning, match="after 2 iterations"):
        state = next(flow)
    assert state.residual > 1e-10


# Points against a kernel critic.


class FeatureKernel(Kernel):
    """The kernel of an explicit feature map: a finite-dimensional RKHS."""

    def __init__(self, phi: nn.Module) -> None:
        self.phi = phi

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.phi(x) @ self.phi(y).T

    def diagonal(self, x: Tensor) -> Tensor:
        return self.phi(x).square().sum(1)


@pytest.mark.parametrize("norm_weight", [0.0, 0.3, 10.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_game_is_that_of_an_autograd_critic(norm_weight: float, weighted: bool) -> None:
    x, y = torch.randn(6, 2), torch.randn(4, 2) * 0.5 + 0.5
    p = torch.rand(6) + 0.1 if weighted else torch.full((6,), 1 / 6)
    q = torch.rand(4) + 0.1 if weighted else torch.full((4,), 1 / 4)
    phi = RandomFourierFeatures(Gaussian(), in_features=2, num_features=16)
    critic_lr, generator_lr = 0.1, 0.4
    states = kernel_gan_flow(
        y,
        x,
        FeatureKernel(phi),
        norm_weight=norm_weight,
        critic_lr=critic_lr,
        generator_lr=generator_lr,
        num_steps=60,
        target_weights=p if weighted else None,
        point_weights=q if weighted else None,
    )
    w, points = torch.zeros(16, requires_grad=True), y.clone().requires_grad_()
    critic, generator = torch.optim.SGD([w], critic_lr), torch.optim.SGD([points], generator_lr)
    path = [y]

    def value() -> Tensor:
        payoff = p @ (phi(x) @ w) - q @ (phi(points) @ w)
        return payoff - 0.5 * norm_weight * w.square().sum()

    for _ in range(60):
        for optimizer, sign in ((critic, -1), (generator, 1)):
            critic.zero_grad()
            generator.zero_grad()
            (sign * value()).backward()
            optimizer.step()
        path.append(points.detach().clone())
    assert (path[-1] - y).norm() > 0.1
    for state, expected in zip(states, path, strict=True):
        torch.testing.assert_close(state.points, expected, rtol=0, atol=1e-9)  # rounding grows
    embedding = p @ phi(x) - q @ phi(state.points)
    assert state.mmd2 == pytest.approx(float(embedding.square().sum()), abs=1e-12)
    coefficients = state.target_coefficients @ phi(x)
    coefficients = coefficients - state.history_coefficients @ phi(state.history)
    torch.testing.assert_close(coefficients, w.detach(), rtol=0, atol=1e-9)


def test_first_steps_by_hand() -> None:
    # One point at distance r of one target: f = eta_d (k(0, .) - k(r, .)) after the first step.
    r, critic_lr, generator_lr = 0.3, 0.1, 0.5
    _, first, second = kernel_gan_flow(
        torch.tensor([[r]]),
        torch.zeros(1, 1),
        Gaussian(1.0),
        norm_weight=1.0,
        critic_lr=critic_lr,
        generator_lr=generator_lr,
        num_steps=2,
    )
    slope = lambda t, c: -(t - c) * math.exp(-((t - c) ** 2) / 2)  # noqa: E731
    a = r + generator_lr * critic_lr * slope(r, 0.0)
    assert first.points.item() == pytest.approx(a, abs=1e-15)
    b = a + generator_lr * critic_lr * (1.9 * slope(a, 0.0) - 0.9 * slope(a, r))
    assert second.points.item() == pytest.approx(b, abs=1e-15)


def test_truncation_forgets_the_oldest_points_only() -> None:
    x, y = torch.randn(6, 2), torch.randn(4, 2) * 0.5 + 0.5
    options = {"norm_weight": 1.0, "critic_lr": 0.1, "generator_lr": 0.3, "num_steps": 150}
    full = last(kernel_gan_flow(y, x, Gaussian(), **options))
    cut = last(kernel_gan_flow(y, x, Gaussian(), truncation=1e-5, **options))
    kept = 1 + int(math.log(1e-5) / math.log(0.9))
    assert (len(full.history), len(cut.history)) == (4 * 150, 4 * kept)
    assert torch.equal(cut.target_coefficients, full.target_coefficients)
    torch.testing.assert_close(
        cut.history_coefficients, full.history_coefficients[-4 * kept :], rtol=1e-12, atol=0
    )
    error = float((cut.points - full.points).norm())
    assert 1e-12 < error < 1e-4


@pytest.mark.parametrize("power", [1, 3, 5, 8, 12])
def test_truncation_forgets_whole_steps_where_masses_differ(power: int) -> None:
    """Where decay^t met the truncation, rounding forgot a part of a step: 58 of 270 failed."""
    y, x = torch.tensor([[1.0], [2.0], [3.0]]), torch.zeros(1, 1)
    for q in ([0.3, 0.15, 0.55], [0.1, 0.7, 0.2], [0.37, 0.21, 0.42]):
        for critic_lr in (0.1, 0.7):
            options = {"norm_weight": 1.0, "critic_lr": critic_lr, "generator_lr": 0.1}
            options |= {"num_steps": 15, "point_weights": torch.tensor(q)}
            full = last(kernel_gan_flow(y, x, Gaussian(), **options))
            for truncation in ((1 - critic_lr) ** power, (1 - critic_lr) ** (power + 0.5)):
                cut = last(kernel_gan_flow(y, x, Gaussian(), truncation=truncation, **options))
                num = 3 * min(power + 1, 15)  # ages 0 to power
                assert len(cut.history) == len(cut.history_coefficients) == num
                torch.testing.assert_close(
                    cut.history_coefficients, full.history_coefficients[-num:], rtol=1e-12, atol=0
                )


@pytest.mark.parametrize("truncation", [0.0, 0.3])
def test_a_resumed_game_is_the_uninterrupted_one(truncation: float) -> None:
    x, y = torch.randn(6, 2), torch.randn(4, 2)
    q = torch.tensor([0.1, 0.4, 0.2, 0.3])

    def flow(initial: Tensor | KernelGANState, num_steps: int) -> list[KernelGANState]:
        return list(
            kernel_gan_flow(
                initial,
                x,
                Gaussian(),
                norm_weight=1.0,
                critic_lr=0.1,
                generator_lr=0.3,
                num_steps=num_steps,
                point_weights=q,
                truncation=truncation,
            )
        )

    whole, half = flow(y, 30), flow(y, 17)
    for a, b in zip(flow(KernelGANState(**vars(half[-1])), 13), whole[17:], strict=True):
        assert_same(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_weight": -1.0}, "norm_weight >= 0"),
        ({"norm_weight": 11.0}, r"critic_lr \* norm_weight <= 1"),
        ({"truncation": 1.0}, r"truncation in \[0, 1\)"),
        ({"point_weights": torch.ones(3)}, "point_weights must hold a mass > 0"),
        ({"target_weights": -torch.ones(6)}, "target_weights must hold a mass > 0"),
    ],
)
def test_wrong_games_are_refused(options: dict, message: str) -> None:
    arguments = {"norm_weight": 1.0, "critic_lr": 0.1, "generator_lr": 0.1, "num_steps": 1}
    with pytest.raises(ValueError, match=message):
        kernel_gan_flow(torch.ones(4, 2), torch.ones(6, 2), Gaussian(), **arguments | options)
