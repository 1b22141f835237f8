"""At the ends of their ranges arguments mean what they mean near by: the limit is the value."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mmd import (
    AdaptiveNoise,
    ConstantNoise,
    Gaussian,
    GeometricNoise,
    HalvingNoise,
    InverseMultiquadric,
    Laplace,
    PlateauNoise,
    RandomFourierFeatures,
    RationalQuadratic,
    SumKernel,
    convergence_rates,
    flow_distance,
    generator_flow,
    kernel_gan_flow,
    mmd2_biased,
    mmd2_unbiased,
    point_flow,
    solve_witness,
    suggest_hyperparameters,
)
from lightning_mmd.estimators import Batch, Split, num_penalised
from lightning_mmd.noise import hessian_constant
from lightning_mmd.rates import max_stable_critic_lr, second_moment_dynamics
from lightning_mmd.sobolev import negative_sobolev_distance


def last(states: Any) -> Any:
    *_, state = states
    return state


def points(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 2, generator=generator), torch.randn(5, 2, generator=generator) + 0.5


def networks() -> tuple[nn.Module, Tensor, nn.Module, Tensor]:
    torch.manual_seed(1)
    features = RandomFourierFeatures(Gaussian(1.5), in_features=2, num_features=6)
    generator = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2))
    z = torch.randn(9, 2)
    return generator, z, features, features(torch.randn(20, 2) + 1).mean(0)


def witness(alpha: float, beta: float) -> Tensor:
    generator, z, features, target = networks()
    gap = target - features(generator(z)).mean(0).detach()
    options = {"tolerance": 1e-12, "max_iterations": 100}
    solution = solve_witness(features, generator, z, gap, alpha=alpha, beta=beta, **options)
    return torch.cat([solution.weights, solution.parametric_gradient])


def rate(alpha: float, beta: float) -> Tensor:
    generator, z, features, target = networks()
    options = {"step_size": 0.1, "num_steps": 0, "tolerance": 1e-13}
    state = last(generator_flow(generator, z, features, target, alpha=alpha, beta=beta, **options))
    return torch.tensor([state.rate, state.squared_speed, state.regularised_mmd2])


def distance(alpha: float, beta: float) -> Tensor:
    generator, z, features, _ = networks()
    start = dict(generator.named_parameters())
    end = {name: p + 0.3 for name, p in start.items()}
    options = {"num_segments": 2, "num_iterations": 5}
    found = flow_distance(generator, z, features, start, end, alpha=alpha, beta=beta, **options)
    return torch.tensor([found.lower, found.straight])


def moved(noise: Any, num_steps: int = 6) -> Tensor:
    x, y = points(3)
    rng = torch.Generator().manual_seed(4)
    flow = point_flow(y, x, Gaussian(), step_size=0.5, num_steps=num_steps, noise=noise, rng=rng)
    return last(flow).particles


def played(**kwargs: float) -> Tensor:
    x, y = points(5)
    options = {"norm_weight": 1.0, "critic_lr": 0.2, "generator_lr": 0.3, "num_steps": 8} | kwargs
    return last(kernel_gan_flow(y, x, Gaussian(), **options)).points


def gram(kernel: Any) -> Tensor:
    x, y = points(6)
    return kernel(x, y)


def sobolev_share(regulariser: float) -> Tensor:
    x, y = points(7)
    distance = negative_sobolev_distance(x, y, Gaussian(), regulariser=regulariser)
    return torch.tensor(distance * math.sqrt(regulariser))


def suggested(surplus: float, num: int = 1, most: float = 0.1) -> Tensor:
    best = suggest_hyperparameters(
        1.0,
        max_critic_lr=most,
        max_generator_lr=most,
        generated_mass=(1 - surplus) / num,
        num_generated=num,
    )
    return torch.tensor(best.rates.spectral_radius)


def spread(norm_weight: float) -> Tensor:
    options = {"bandwidth": 1.0, "critic_lr": 0.1, "generator_lr": 0.1, "num_steps": 30}
    start = torch.tensor([0.1]), torch.tensor([[0.02]])
    return last(second_moment_dynamics(*start, norm_weight=norm_weight, **options)).covariance


CASES: dict[str, tuple[Callable[[float], Tensor], Callable[[], Tensor]]] = {
    "alpha of a witness": (lambda e: witness(e, 0.5), lambda: witness(0.0, 0.5)),
    "beta of a witness": (lambda e: witness(1.0, 1e-3 * e), lambda: witness(1.0, 0.0)),
    "alpha of a flow's rate": (lambda e: rate(e, 0.5), lambda: rate(0.0, 0.5)),
    "alpha of a distance": (lambda e: distance(e, 0.5), lambda: distance(0.0, 0.5)),
    "beta of a distance": (lambda e: distance(0.5, e), lambda: distance(0.5, 0.0)),
    "alpha of a bound": (
        lambda e: torch.tensor(max_stable_critic_lr(e, 0.5, 3.0)),
        lambda: torch.tensor(max_stable_critic_lr(0.0, 0.5, 3.0)),
    ),
    "beta of a bound": (
        lambda e: torch.tensor(max_stable_critic_lr(0.5, e, 3.0)),
        lambda: torch.tensor(max_stable_critic_lr(0.5, 0.0, 3.0)),
    ),
    "exponent at infinity": (lambda e: gram(RationalQuadratic(1 / e)), lambda: gram(Gaussian())),
    "exponent's constant": (
        lambda e: torch.tensor(hessian_constant(RationalQuadratic(1 / e))),
        lambda: torch.tensor(hessian_constant(Gaussian())),
    ),
    "weight of a summand": (
        lambda e: gram(SumKernel([Gaussian(), Laplace()], [1.0, e])),
        lambda: gram(SumKernel([Gaussian(), Laplace()], [1.0, 0.0])),
    ),
    **{
        f"bandwidth of {kernel.__name__} at infinity": (
            lambda e, kernel=kernel: gram(kernel(bandwidth=1 / e)),
            lambda: torch.ones(8, 5),
        )
        for kernel in (Gaussian, Laplace, InverseMultiquadric, RationalQuadratic)
    },
    "level of constant noise": (lambda e: moved(ConstantNoise(e)), lambda: moved(None)),
    "level of halving noise": (lambda e: moved(HalvingNoise(e, 2)), lambda: moved(None)),
    "largest adaptive level": (lambda e: moved(AdaptiveNoise(e)), lambda: moved(None)),
    "level of plateau noise": (lambda e: moved(PlateauNoise(e)), lambda: moved(None)),
    "ratio of geometric noise at 1": (
        lambda e: moved(GeometricNoise(0.3, 1 - e)),
        lambda: moved(ConstantNoise(0.3)),
    ),
    "truncation of a game": (lambda e: played(truncation=e**2), lambda: played()),
    "norm weight of a game": (
        lambda e: played(norm_weight=e),
        lambda: played(norm_weight=0.0),
    ),
    "memory of a game": (  # the critic is the witness over lambda
        lambda e: played(norm_weight=5 * (1 - e)),
        lambda: played(norm_weight=5.0),
    ),
    "norm weight of second moments": (spread, lambda: spread(0.0)),
    "regulariser at infinity": (
        lambda e: sobolev_share(1 / e),
        lambda: mmd2_biased(*points(7), Gaussian()).sqrt(),
    ),
    "surplus of one point": (suggested, lambda: suggested(0.0)),
    "surplus below none": (lambda e: suggested(-e), lambda: suggested(0.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_limit_is_the_value(name: str) -> None:
    near, at = CASES[name]
    value = at()
    errors = [float((near(e) - value).norm() / value.norm()) for e in (1e-2, 1e-4, 1e-6)]
    assert errors[2] < 2e-3
    assert errors[2] <= 0.2 * errors[0] + 1e-12


def test_ends_that_are_the_thing_itself() -> None:
    x, y = points(8)
    assert torch.equal(moved(ConstantNoise(0.0)), moved(None))
    assert torch.equal(moved(ConstantNoise(0.3, until=0)), moved(None))
    assert torch.equal(moved(HalvingNoise(0.3, every=10**9)), moved(ConstantNoise(0.3)))
    assert torch.equal(moved(GeometricNoise(0.3, 1.0)), moved(ConstantNoise(0.3)))
    assert torch.equal(moved(PlateauNoise(0.3, window=10**9)), moved(ConstantNoise(0.3)))
    assert torch.equal(played(truncation=1e-300), played())
    whole = mmd2_unbiased(x, y, Gaussian())
    for block_size in (1, 5, 8, 10**9):
        blocked = mmd2_unbiased(x, y, Gaussian(), block_size=block_size)
        assert blocked.item() == pytest.approx(whole.item(), rel=1e-12)
    for estimator in (Batch(), Split()):
        assert num_penalised(estimator, 1.0, 64) == 64
        assert num_penalised(estimator, 1e-9, 64) == (1 if isinstance(estimator, Batch) else 2)


@pytest.mark.parametrize(("num", "most"), [(1, 1.0), (3, 2.0), (5, 1.5)])
def test_the_deadbeat_setting_is_reached_continuously(num: int, most: float) -> None:
    """Just within and just beyond the bounds that allow radius 0."""
    surplus = 0.4
    mass = (1 - surplus) / num
    needed = 1 / (most * mass)
    radii = [
        suggest_hyperparameters(
            1.0,
            max_critic_lr=most,
            max_generator_lr=share * needed,
            generated_mass=mass,
            num_generated=num,
        ).rates.spectral_radius
        for share in (0.9, 0.99, 0.999, 1.0, 1.1)
    ]
    assert radii == sorted(radii, reverse=True)
    assert radii[3] == pytest.approx(radii[4], abs=1e-7)
    assert radii[3] < 1e-7
    assert radii[2] < 0.1


def test_one_learning_rate_of_zero_is_the_limit_of_small_ones() -> None:
    """No step is refused, and one near by is near 1: rates are continuous in the step."""
    options = {"bandwidth": 1.0, "norm_weight": 0.5, "critic_lr": 0.1}
    radii = [
        convergence_rates(generator_lr=lr, **options).spectral_radius for lr in (1e-2, 1e-4, 1e-6)
    ]
    assert radii == sorted(radii)
    assert radii[-1] == pytest.approx(1.0, abs=1e-5)
