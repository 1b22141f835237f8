"""Linearised rates against the game itself, the adviser against the published grid, eigenvalues."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from reference import embedding_jacobian
from torch import Tensor, nn

from lightning_mmd.embedding import MeanEmbedding
from lightning_mmd.gramian import largest_gramian_eigenvalue
from lightning_mmd.kernel_gan import kernel_gan_flow
from lightning_mmd.kernels import Gaussian, InverseMultiquadric, Kernel, RationalQuadratic
from lightning_mmd.rates import (
    convergence_rates,
    max_stable_critic_lr,
    second_moment_dynamics,
    suggest_hyperparameters,
)

# (bandwidth, norm_weight, critic_lr, generator_lr, real_mass, generated_mass, num_generated)
Setting = tuple[float, float, float, float, float, float, int]
NAMES = (
    "bandwidth",
    "norm_weight",
    "critic_lr",
    "generator_lr",
    "real_mass",
    "generated_mass",
    "num_generated",
)
PUBLISHED = [
    ((1, 0.1, 0.1, 0.01, 1, 1, 1), 0.99499),
    ((1, 1, 0.1, 0.1, 1, 1, 1), 0.94868),
    ((1, 1, 0.1, 0.01, 1, 0.8, 1), 0.99146),
    ((0.5, 0.5, 0.05, 0.05, 1, 0.4, 2), 0.97149),
]
SETTINGS: list[Setting] = [
    *(setting for setting, _ in PUBLISHED),
    (1, 2, 0.1, 0.1, 1, 1, 1),
    (1, 3, 0.1, 0.05, 1, 1, 1),
    (2, 0.2, 0.1, 0.1, 1, 1, 1),
    (2, 1.5, 0.1, 0.1, 1, 1, 1),
    (0.5, 1, 0.1, 0.1, 1, 1, 1),
    (0.5, 0.2, 0.05, 0.02, 1, 1, 1),
    (0.3, 1, 0.5, 0.05, 1, 1, 1),
    (1, 0.5, 0.5, 0.5, 1, 1, 1),
    (1, 0.5, 1, 0.1, 2, 2, 1),
    (1, 0.5, 0.1, 0.1, 0.5, 0.5, 1),
    (1, 0.5, 0.1, 0.1, 1, 0.5, 1),
    (1, 0.5, 0.1, 0.1, 1, 1.2, 1),
    (0.7, 0.3, 0.1, 0.1, 1, 0.9, 1),
    (1, 0.5, 0.1, 0.1, 1, 0.4, 2),
    (1, 0.2, 0.1, 0.05, 1, 0.3, 3),
    (0.5, 1, 0.1, 0.1, 1, 0.2, 4),
    (2, 0.5, 0.2, 0.2, 1, 0.1, 5),
    (0.8, 0.8, 0.1, 0.1, 2, 0.6, 3),
    (1, 1, 0.8, 0.8, 1, 0.45, 2),
    (1.5, 0.3, 0.3, 0.3, 1, 0.8, 1),
]


def rates_of(setting: Setting):
    return convergence_rates(**dict(zip(NAMES, setting, strict=True)))


def offsets(setting: Setting, starts: Sequence[float], num_steps: int, kernel: Kernel) -> Tensor:
    """Positions of the points around a target point at 0, (num_steps + 1, N)."""
    _, norm_weight, critic_lr, generator_lr, real_mass, generated_mass, num = setting
    states = kernel_gan_flow(
        torch.tensor(starts)[:, None],
        torch.zeros(1, 1),
        kernel,
        norm_weight=norm_weight,
        critic_lr=critic_lr,
        generator_lr=generator_lr,
        num_steps=num_steps,
        point_weights=torch.full((num,), float(generated_mass)),
        target_weights=torch.tensor([float(real_mass)]),
        truncation=1e-18,
    )
    return torch.stack([state.points[:, 0] for state in states])


def measured_radius(series: Tensor, oscillating: bool) -> float:
    """Contraction a step at the end of a series: a ratio, or the modulus of a fitted pair."""
    if not oscillating:
        return float((series[-1] / series[-21]).abs() ** (1 / 20))
    tail = series[-80:] / series[-80:].abs().max()
    lagged = torch.stack([tail[1:-1], tail[:-2]], 1)  # x'' = trace x' - determinant x
    determinant = -torch.linalg.lstsq(lagged, tail[2:, None]).solution[1].item()
    return math.sqrt(determinant)


def num_steps_for(radius: float, critic_mode: float) -> int:
    """Steps after which a deviation of 1e-4 is about 1e-12 and the critic's curvature settled."""
    return min(900, max(120, int(18 / -math.log(radius)), int(8 / -math.log(critic_mode))))


@pytest.mark.parametrize(("setting", "expected"), PUBLISHED)
def test_published_check_numbers(setting: Setting, expected: float) -> None:
    radius = max(map(abs, rates_of(setting).mean_mode))
    assert radius == pytest.approx(expected, abs=5e-6)


def test_published_check_number_of_the_difference_mode() -> None:
    rates = rates_of((0.5, 0.5, 0.05, 0.05, 1, 0.4, 2))
    assert rates.difference_mode == pytest.approx(0.96800, abs=1e-12)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_game_contracts_at_the_predicted_rate(setting: Setting) -> None:
    rates, num = rates_of(setting), int(setting[-1])
    predicted = abs(rates.mean_mode[0])
    assert rates.stable
    steps = num_steps_for(predicted, rates.critic_mode)
    series = offsets(setting, [1e-4 * setting[0]] * num, steps, Gaussian(setting[0])).mean(1)
    measured = measured_radius(series, rates.mean_mode[0].imag != 0)
    assert measured == pytest.approx(predicted, abs=1e-4)


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s[-1] > 1], ids=str)
def test_differences_of_points_contract_at_the_predicted_rate(setting: Setting) -> None:
    rates, num = rates_of(setting), int(setting[-1])
    assert rates.difference_mode is not None
    starts = torch.linspace(-1e-4, 1e-4, num).mul(setting[0]).tolist()
    steps = num_steps_for(rates.difference_mode, rates.critic_mode)
    points = offsets(setting, starts, steps, Gaussian(setting[0]))
    measured = measured_radius(points[:, -1] - points[:, 0], oscillating=False)
    assert measured == pytest.approx(rates.difference_mode, abs=1e-4)


@pytest.mark.parametrize(
    ("kernel", "bandwidth"),
    [(RationalQuadratic(alpha=0.5, bandwidth=1.3), 1.3), (InverseMultiquadric(1.2), 1.2)],
)
def test_other_kernels_have_the_rate_of_their_curvature(kernel: Kernel, bandwidth: float) -> None:
    setting = (bandwidth, 0.3, 0.2, 0.2, 1, 0.8, 1)
    series = offsets(setting, [1e-4], 500, kernel)[:, 0]
    predicted = rates_of(setting).spectral_radius
    assert measured_radius(series, oscillating=True) == pytest.approx(predicted, abs=1e-4)


def test_eigenvalues_are_those_of_the_matrix() -> None:
    for setting in SETTINGS:
        s, norm_weight, critic_lr, generator_lr, real, mass, num = setting
        curvature = (real - num * mass) / (norm_weight * s**2)
        damping = 1 - critic_lr * norm_weight
        matrix = torch.tensor(
            [
                [damping, -critic_lr * num * mass / s**2],
                [
                    generator_lr * mass * damping,
                    1
                    - generator_lr * mass * curvature
                    - generator_lr * critic_lr * num * mass**2 / s**2,
                ],
            ]
        )
        expected = sorted(torch.linalg.eigvals(matrix).tolist(), key=lambda v: (v.real, v.imag))
        got = sorted(rates_of(setting).mean_mode, key=lambda v: (v.real, v.imag))
        assert got == pytest.approx(expected, abs=2e-8)  # square-root sensitivity when they meet
        if got[0].imag:
            pull = 1 - generator_lr * mass * curvature
            assert abs(got[0]) == pytest.approx(math.sqrt(damping * pull), rel=1e-12)


def test_regimes() -> None:
    assert rates_of((1, 0.1, 0.1, 0.01, 1, 1, 1)).regime == "oscillating"
    assert rates_of((1, 3, 0.1, 0.01, 1, 1, 1)).regime == "monotone"
    neutral = rates_of((1, 1, 0.1, 0.1, 1, 0.5, 2))  # masses balance: differences stay
    assert neutral.difference_mode == 1.0
    assert (neutral.stable, neutral.regime) == (False, "unstable")
    repelled = rates_of((1, 1, 0.1, 0.1, 1, 0.6, 2))
    assert repelled.difference_mode == pytest.approx(1.012)
    assert repelled.regime == "unstable"
    assert not rates_of((0.1, 1, 1, 0.1, 1, 1, 1)).stable  # steps too large for a narrow kernel


def test_unstable_game_diverges_at_the_predicted_rate() -> None:
    setting = (1, 1, 0.1, 0.1, 1, 0.6, 2)
    predicted = rates_of(setting).difference_mode
    points = offsets(setting, [-1e-6, 1e-6], 400, Gaussian(1.0))
    measured = measured_radius(points[:, 1] - points[:, 0], oscillating=False)
    assert measured == pytest.approx(predicted, abs=1e-4)
    assert measured > 1.01


GRID = list(itertools.product((0.1, 1, 10), ((1, 0.1), (0.1, 0.1), (0.1, 0.01), (0.01, 0.01))))


@pytest.mark.parametrize(("bandwidth", "lrs"), GRID)
def test_suggestion_beats_the_published_grid(bandwidth: float, lrs: tuple[float, float]) -> None:
    critic_lr, generator_lr = lrs
    best = suggest_hyperparameters(
        bandwidth, max_critic_lr=critic_lr, max_generator_lr=generator_lr
    )
    assert best.rates.stable
    assert best.critic_lr <= critic_lr
    assert best.generator_lr <= generator_lr
    for norm_weight in (1, 0.1, 0.01):
        rates = rates_of((bandwidth, norm_weight, critic_lr, generator_lr, 1, 1, 1))
        assert best.rates.spectral_radius < rates.spectral_radius - 1e-6


@pytest.mark.parametrize(("bandwidth", "lrs"), GRID[4:8])
def test_suggestion_wins_in_the_game_itself(bandwidth: float, lrs: tuple[float, float]) -> None:
    best = suggest_hyperparameters(bandwidth, max_critic_lr=lrs[0], max_generator_lr=lrs[1])
    suggested = (bandwidth, best.norm_weight, best.critic_lr, best.generator_lr, 1, 1, 1)
    steps = int(10 / (1 - best.rates.spectral_radius))
    distances = [
        offsets(setting, [0.1], steps, Gaussian(bandwidth))[-10:].abs().max().item()
        for setting in (suggested, *((bandwidth, w, *lrs, 1, 1, 1) for w in (1, 0.1, 0.01)))
    ]
    assert 0 < distances[0] < 0.9 * min(distances[1:])


def test_suggestion_in_closed_form_is_critical_damping() -> None:
    best = suggest_hyperparameters(2.0, max_critic_lr=0.1, max_generator_lr=0.05, real_mass=1.0)
    q = 0.1 * 0.05 / 4.0
    assert best.rates.spectral_radius == pytest.approx(1 - math.sqrt(q), abs=1e-7)
    assert best.norm_weight == pytest.approx(2 * math.sqrt(0.05 / 0.1) / 2.0, rel=0.02)
    for factor in (0.8, 0.95, 1.05, 1.2):  # a minimum in lambda
        other = (2.0, factor * best.norm_weight, 0.1, 0.05, 1, 1, 1)
        assert rates_of(other).spectral_radius > best.rates.spectral_radius + 1e-4


def test_generous_bounds_reach_the_target_in_two_steps() -> None:
    best = suggest_hyperparameters(0.1, max_critic_lr=1.0, max_generator_lr=1.0)
    assert best.generator_lr == pytest.approx(0.01)
    assert best.rates.spectral_radius < 1e-7
    setting = (0.1, best.norm_weight, best.critic_lr, best.generator_lr, 1, 1, 1)
    series = offsets(setting, [1e-5], 3, Gaussian(0.1))[:, 0]
    assert abs(series[1].item()) < 1e-12  # from rest the first step lands, by the cubic remainder


@pytest.mark.parametrize(
    ("real_mass", "generated_mass", "num"), [(1, 0.8, 1), (1, 0.4, 2), (1, 1.2, 1), (1, 0.1, 5)]
)
def test_numerical_suggestion_beats_random_search(
    real_mass: float, generated_mass: float, num: int
) -> None:
    best = suggest_hyperparameters(
        0.7,
        max_critic_lr=0.2,
        max_generator_lr=0.1,
        real_mass=real_mass,
        generated_mass=generated_mass,
        num_generated=num,
    )
    assert best.rates.stable
    assert best.critic_lr <= 0.2
    assert best.generator_lr <= 0.1
    found = 1.0
    for a, b, c in (torch.rand(4000, 3) * torch.tensor([7.0, 3.0, 3.0])).neg().exp().tolist():
        setting = (0.7, a / (0.2 * b), 0.2 * b, 0.1 * c, real_mass, generated_mass, num)
        found = min(found, rates_of(setting).spectral_radius)
    assert best.rates.spectral_radius <= found
    assert best.rates.spectral_radius > 1 - 3 * (1 - found)  # and is not too good to be true


def test_numerical_suggestion_tends_to_the_closed_form() -> None:
    exact = suggest_hyperparameters(1.0, max_critic_lr=0.1, max_generator_lr=0.1)
    near = suggest_hyperparameters(1.0, max_critic_lr=0.1, max_generator_lr=0.1, real_mass=1 + 1e-9)
    assert near.rates.spectral_radius == pytest.approx(exact.rates.spectral_radius, abs=1e-4)
    assert near.norm_weight == pytest.approx(exact.norm_weight, rel=1e-2)


def test_equal_damping_is_the_published_choice_of_norm_weight() -> None:
    # lambda* = sqrt(mu p~ Delta) / bandwidth makes both damping factors equal.
    bandwidth, critic_lr, generator_lr, mass = 0.5, 0.01, 0.02, 0.8
    norm_weight = math.sqrt(generator_lr / critic_lr * mass * (1 - mass)) / bandwidth
    rates = rates_of((bandwidth, norm_weight, critic_lr, generator_lr, 1, mass, 1))
    assert rates.regime == "oscillating"
    assert rates.spectral_radius == pytest.approx(1 - critic_lr * norm_weight, rel=1e-12)


@pytest.mark.parametrize(
    ("bandwidth", "real_mass", "generated_mass", "num"),
    [(0.2, 0.5, 0.1, 3), (0.3, 1.0, 0.2, 4), (0.5, 1.0, 0.7, 1), (0.1, 2.0, 0.6, 3)],
)
def test_points_with_a_surplus_are_deadbeat_where_the_bounds_allow(
    bandwidth: float, real_mass: float, generated_mass: float, num: int
) -> None:
    """The grid ended at radii of 0.015 to 0.099; q = 1 and eta_d lambda = surplus / p bring 0."""
    best = suggest_hyperparameters(
        bandwidth,
        max_critic_lr=1.0,
        max_generator_lr=1.0,
        real_mass=real_mass,
        generated_mass=generated_mass,
        num_generated=num,
    )
    assert best.rates.spectral_radius < 1e-7  # a double eigenvalue: the root of rounding
    assert best.rates.stable
    assert best.critic_lr <= 1.0
    assert best.generator_lr <= 1.0
    setting = (bandwidth, best.norm_weight, best.critic_lr, best.generator_lr)
    path = offsets(
        (*setting, real_mass, generated_mass, num),
        [1e-4 * (1 + i) for i in range(num)],
        200,
        Gaussian(bandwidth),
    )
    assert float(path[-1].abs().max()) < 1e-12  # and in the game itself


def test_a_surplus_of_rounding_is_none() -> None:
    with pytest.raises(ValueError, match="no setting pulls 49 points"):
        suggest_hyperparameters(
            1.0, max_critic_lr=0.1, max_generator_lr=0.1, num_generated=49, generated_mass=1 / 49
        )
    exact, rounded = (
        suggest_hyperparameters(1.0, max_critic_lr=0.1, max_generator_lr=0.1, generated_mass=mass)
        for mass in (1.0, 1.0 - 2e-16)
    )
    assert exact.norm_weight == pytest.approx(rounded.norm_weight, rel=1e-12)


def test_suggestion_refuses_what_cannot_be_stable() -> None:
    with pytest.raises(ValueError, match="Lower generated_mass"):
        suggest_hyperparameters(
            1.0, max_critic_lr=0.1, max_generator_lr=0.1, generated_mass=0.5, num_generated=2
        )


def cloud(scale: float) -> Tensor:
    points = torch.randn(40, 2, generator=torch.Generator().manual_seed(3))
    return scale * (points - points.mean(0)) * torch.tensor([1.0, 1.5])


@pytest.mark.parametrize(("real_mass", "offset"), [(1.0, 0.0), (1.3, 0.0), (1.3, 1.0)])
def test_second_moments_follow_the_game(real_mass: float, offset: float) -> None:
    options = {"norm_weight": 0.2, "critic_lr": 0.05, "generator_lr": 1.0, "num_steps": 60}

    def error(scale: float) -> float:
        """Relative error of the change of the log-covariance, the worst of both axes."""
        points = cloud(scale) + offset * scale * torch.tensor([1.0, -0.5])
        *_, last = kernel_gan_flow(
            points,
            torch.zeros(1, 2),
            Gaussian(1.0),
            target_weights=torch.tensor([real_mass]),
            **options,
        )
        *_, moments = second_moment_dynamics(
            points.mean(0),
            points.T.cov(correction=0),
            bandwidth=1.0,
            real_mass=real_mass,
            generated_mass=1 / 40,
            num_generated=40,
            **options,
        )
        start = points.T.cov(correction=0).diagonal()
        true = (last.points.T.cov(correction=0).diagonal() / start).log()
        model = (moments.covariance.diagonal() / start).log()
        mean_error = (moments.mean - last.points.mean(0)).norm() / scale
        assert mean_error < 20 * scale**2
        return float(((model - true) / true).abs().max())

    coarse, fine = error(0.05), error(0.025)
    assert 0 < fine < 0.02
    assert coarse / fine == pytest.approx(4.0, rel=0.3)  # a model of second order


def test_second_moments_of_a_single_point_are_the_linear_recursion() -> None:
    # Without spread the model is the 2 x 2 matrix of convergence_rates: same asymptotic ratio.
    setting: Setting = (1, 1, 0.1, 0.01, 1, 0.8, 1)
    *_, before, last = second_moment_dynamics(
        torch.tensor([1e-6]),
        torch.zeros(1, 1),
        num_steps=600,
        **dict(zip(NAMES, setting, strict=True)),
    )
    ratio = float(last.mean / before.mean)
    assert ratio == pytest.approx(rates_of(setting).spectral_radius, abs=1e-7)


def test_second_moments_in_one_dimension_gain_one_and_a_half() -> None:
    moments = second_moment_dynamics(
        torch.zeros(1),
        torch.tensor([[0.04]]),
        bandwidth=2.0,
        norm_weight=0.1,
        critic_lr=0.1,
        generator_lr=0.1,
        num_steps=1,
    )
    *_, first = moments
    assert float(first.curvature) == pytest.approx(1.5 * 0.1 * 0.04 / 16, rel=1e-12)


def small_model() -> tuple[nn.Module, nn.Module, Tensor]:
    generator = nn.Sequential(nn.Linear(2, 6), nn.SiLU(), nn.Linear(6, 3))
    features = nn.Sequential(nn.Linear(3, 5), nn.Tanh())
    return generator, features, torch.randn(9, 2)


def test_largest_eigenvalue_of_a_dense_gramian() -> None:
    generator, features, z = small_model()
    jacobian = embedding_jacobian(features, generator, z)
    expected = float(torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1])
    embedding = MeanEmbedding(features, z, generator)
    assert largest_gramian_eigenvalue(embedding, 200) == pytest.approx(expected, rel=1e-10)
    estimates = [largest_gramian_eigenvalue(embedding, n) for n in (1, 2, 4, 8)]
    assert estimates == sorted(estimates)
    assert estimates[-1] <= expected * (1 + 1e-12)


@pytest.mark.parametrize(("factor", "converges"), [(0.98, True), (1.02, False)])
def test_critic_ascent_is_stable_exactly_below_the_bound(factor: float, converges: bool) -> None:
    generator, features, z = small_model()
    jacobian, alpha, beta = embedding_jacobian(features, generator, z), 3.0, 0.5
    eigenvalue = largest_gramian_eigenvalue(MeanEmbedding(features, z, generator), 200)
    critic_lr = factor * max_stable_critic_lr(alpha, beta, eigenvalue)
    w, gap = torch.zeros(5), torch.randn(5)
    matrix = alpha * jacobian @ jacobian.T + beta * torch.eye(5)
    for _ in range(600):
        w = w + critic_lr * (gap - matrix @ w)
    error = float((w - torch.linalg.solve(matrix, gap)).norm())
    assert (error < 1e-5) if converges else (error > 1e5)


@pytest.mark.parametrize("share", [0.5, 0.98, 1.02])
def test_critic_ascent_without_norm_weight_converges_where_the_generator_looks(
    share: float,
) -> None:
    """beta = 0, more features than parameters: w grows linearly at every rate, J^T w converges."""
    jacobian, gap, alpha = torch.randn(10, 4), torch.randn(10), 2.0
    eigenvalue = float(torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1])
    critic_lr = share * max_stable_critic_lr(alpha, 0.0, eigenvalue)
    w, steps = torch.zeros(10), []
    for step in range(4001):
        if step in (2000, 4000):
            steps.append(w)
        w = w + critic_lr * (gap - alpha * jacobian @ (jacobian.T @ w))
    limit = torch.linalg.pinv(jacobian) @ gap / alpha
    converges = float((jacobian.T @ steps[1] - limit).norm()) < 1e-6
    assert converges == (share < 1)
    if share < 1:
        unseen = gap - jacobian @ torch.linalg.pinv(jacobian) @ gap
        torch.testing.assert_close(
            steps[1] - steps[0], 2000 * critic_lr * unseen, rtol=1e-6, atol=1e-6
        )
        inside, u = jacobian @ torch.randn(4), torch.zeros(10)
        for _ in range(4000):
            u = u + critic_lr * (inside - alpha * jacobian @ (jacobian.T @ u))
        gramian = torch.linalg.pinv(alpha * jacobian @ jacobian.T)
        torch.testing.assert_close(u, gramian @ inside, rtol=1e-6, atol=1e-6)  # w too


def test_nothing_limits_a_critic_without_curvature() -> None:
    assert max_stable_critic_lr(0.0, 0.0, 3.0) == math.inf


def test_gramian_of_constant_features_is_zero() -> None:
    embedding = MeanEmbedding(lambda x: 0 * x, torch.randn(4, 2), nn.Linear(2, 3))
    assert largest_gramian_eigenvalue(embedding) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_rates_refuse_what_is_not_positive(name: str) -> None:
    arguments = dict(zip(NAMES, SETTINGS[0], strict=True))
    with pytest.raises(ValueError, match=f"finite {name} > 0, got 0"):
        convergence_rates(**{**arguments, name: 0})


def test_other_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="arguments >= 0"):
        max_stable_critic_lr(-1.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="num_iterations >= 1"):
        largest_gramian_eigenvalue(
            MeanEmbedding(nn.Identity(), torch.ones(2, 1), nn.Linear(1, 1)), 0
        )
    options = {"bandwidth": 1.0, "norm_weight": 0.1, "critic_lr": 0.1, "generator_lr": 0.1}
    with pytest.raises(ValueError, match="covariance of shape"):
        second_moment_dynamics(torch.zeros(2), torch.zeros(2), num_steps=1, **options)
    with pytest.raises(ValueError, match="num_steps >= 0"):
        second_moment_dynamics(torch.zeros(1), torch.zeros(1, 1), num_steps=-1, **options)
