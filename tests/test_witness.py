"""Witnesses against an explicit Jacobian, a dense solve and the identities of the theory."""

import copy
from itertools import pairwise

import pytest
import torch
from reference import (
    APPROXIMATE,
    GENERATORS,
    SEED,
    Attention,
    Sine,
    conv_generator,
    embedding_jacobian,
    flat,
    gradient_penalty,
    instance_norm,
    mlp_generator,
    relative_error,
    sample_jacobian,
    shake,
    solve_dense,
    spectral_norm,
    token_generator,
    transformer,
)
from torch import nn

from lightning_mmd.embedding import MeanEmbedding
from lightning_mmd.pushforward import DerivativeFallbackWarning
from lightning_mmd.witness import (
    WitnessConvergenceWarning,
    solve_embedding,
    solve_witness,
)

RANK = 6


def mlp_features(*middle, wrap=lambda module: module):
    return nn.Sequential(wrap(nn.Linear(4, 5)), *middle, nn.SiLU(), nn.Linear(5, RANK))


def image_features(norm):
    convolution = nn.Conv2d(2, 4, 3, stride=2, padding=1)
    return nn.Sequential(convolution, norm(4), nn.SiLU(), nn.Flatten(), nn.Linear(16, RANK))


def token_features(middle):
    return nn.Sequential(middle, nn.Flatten(), nn.SiLU(), nn.Linear(12, RANK))


NETWORKS = {
    "mlp": (mlp_features, mlp_generator),
    "batch norm": (
        lambda: image_features(nn.BatchNorm2d),
        lambda: conv_generator(nn.BatchNorm2d),
    ),
    "instance norm": (
        lambda: image_features(instance_norm),
        lambda: conv_generator(instance_norm),
    ),
    "dropout": (lambda: mlp_features(nn.Dropout(0.4)), lambda: mlp_generator(nn.Dropout(0.4))),
    "spectral norm": (
        lambda: mlp_features(wrap=spectral_norm),
        lambda: mlp_generator(wrap=spectral_norm),
    ),
    "attention": (
        lambda: token_features(Attention(fused=True)),
        lambda: token_generator(Attention(fused=False)),
    ),
    "transformer": (
        lambda: token_features(transformer(0.3)),
        lambda: token_generator(transformer(0.3)),
    ),
    "tied": (mlp_features, GENERATORS["tied"][0]),
    "partly frozen": (mlp_features, GENERATORS["partly frozen"][0]),
}


def wide_features():
    return nn.Sequential(nn.Linear(4, 9), nn.SiLU(), nn.Linear(9, RANK))


def networks(name="mlp"):
    features, generator = (shake(build()) for build in NETWORKS[name])
    return features, generator, torch.randn(8, 3), torch.randn(RANK)


def embed(features, generator, z):
    """The mean embedding, from the random state of the references."""
    torch.manual_seed(SEED)
    return MeanEmbedding(features, z, generator)


@pytest.fixture
def problem():
    features, generator, z, gap = networks()
    return features, generator, z, gap, embedding_jacobian(features, generator, z)


@pytest.mark.parametrize("name", NETWORKS)
def test_embedding_is_differentiated_like_its_jacobian(name):
    features, generator, z, w = networks(name)
    jacobian = embedding_jacobian(features, generator, z)
    of_samples = sample_jacobian(generator, z)
    embedding = embed(features, generator, z)
    v = torch.randn(jacobian.shape[1])
    adjoint, (jv, dx) = embedding.adjoint(w), embedding.push(v)
    assert relative_error(adjoint, jacobian.T @ w) < 1e-12
    assert relative_error(jv, jacobian @ v) < 1e-12
    assert relative_error(dx.reshape(-1), of_samples @ v) < 1e-12
    assert float(adjoint @ adjoint) == pytest.approx(float(w @ jacobian @ jacobian.T @ w))
    assert not any(t.requires_grad for t in (adjoint, jv, dx, embedding.mean))


@pytest.mark.parametrize("name", NETWORKS)
def test_one_forward_pass_serves(name):
    features, generator, z, gap = networks(name)
    twins = copy.deepcopy(features), copy.deepcopy(generator)
    torch.manual_seed(SEED)
    mean = twins[0](twins[1](z)).mean(0)
    random_state = torch.get_rng_state()

    passes = []
    features.register_forward_hook(lambda *_: passes.append("features"))
    embedding = embed(features, generator, z)
    solve_embedding(embedding, gap, alpha=1.0, beta=0.1, tolerance=1e-6, max_iterations=9)
    assert passes == ["features"]
    assert relative_error(embedding.mean, mean) < 1e-14
    assert torch.equal(torch.get_rng_state(), random_state)
    for net, twin in zip((features, generator), twins, strict=True):
        assert all(p.grad is None for p in net.parameters())
        expected = dict(twin.named_buffers())
        assert all(torch.equal(b, expected[n]) for n, b in net.named_buffers())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1e-2), (100.0, 1.0), (0.1, 1.0), (1.0, 1e-4)])
def test_conjugate_gradients_equal_a_dense_solve(name, alpha, beta):
    features, generator, z, gap = networks(name)
    jacobian = embedding_jacobian(features, generator, z)
    expected = solve_dense(jacobian, gap, alpha, beta)
    torch.manual_seed(SEED)
    solution = solve_witness(
        features, generator, z, gap, alpha=alpha, beta=beta, tolerance=1e-12, max_iterations=99
    )
    assert relative_error(solution.weights, expected) < 1e-8
    assert solution.residual <= 1e-12
    assert relative_error(solution.parametric_gradient, jacobian.T @ expected) < 1e-8


def test_ill_conditioned_gramian(problem):
    features, generator, z, gap, jacobian = problem
    largest = float(torch.linalg.matrix_norm(jacobian, 2)) ** 2
    beta = 1e-7 * largest
    expected = solve_dense(jacobian, gap, 1.0, beta)
    condition = torch.linalg.cond(jacobian @ jacobian.T + beta * torch.eye(RANK))
    assert condition > 1e4
    solution = solve_witness(
        features, generator, z, gap, beta=beta, tolerance=1e-13, max_iterations=99
    )
    assert relative_error(solution.weights, expected) < 1e-8
    assert solution.num_iterations > RANK - 2


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_iterations", [1, 2, 4])
def test_partial_solution_is_consistent(name, num_iterations):
    features, generator, z, gap = networks(name)
    jacobian, of_samples = embedding_jacobian(features, generator, z), sample_jacobian(generator, z)
    alpha, beta = 0.7, 1e-3
    solution = solve_embedding(
        embed(features, generator, z),
        gap,
        alpha=alpha,
        beta=beta,
        tolerance=1e-15,
        max_iterations=num_iterations,
        initial=torch.ones(RANK),
    )
    w = solution.weights
    assert solution.num_iterations == num_iterations
    left = gap - alpha * jacobian @ (jacobian.T @ w) - beta * w
    assert 1e-6 < float(left.norm() / gap.norm())
    assert solution.residual == pytest.approx(float(left.norm() / gap.norm()), rel=1e-8)
    v = jacobian.T @ w
    assert relative_error(solution.parametric_gradient, v) < 1e-11
    assert relative_error(solution.tangents.reshape(-1), of_samples @ v) < 1e-11
    assert solution.mmd2.item() == pytest.approx(float(gap @ gap))
    assert solution.regularised_mmd2.item() == pytest.approx(0.5 * float(gap @ w))


def test_energy_falls_with_every_iteration(problem):
    features, generator, z, gap, jacobian = problem
    gramian = jacobian @ jacobian.T + 0.01 * torch.eye(RANK)
    energies = []
    for n in range(4):
        expected = f"after {n} iterations, more than the tolerance 1e-09. Raise max_iterations"
        with pytest.warns(WitnessConvergenceWarning, match=expected):
            w = solve_witness(features, generator, z, gap, tolerance=1e-9, max_iterations=n).weights
        energies.append(float(0.5 * w @ gramian @ w - w @ gap))
    energies.append(-0.5 * float(gap @ torch.linalg.solve(gramian, gap)))  # the least of all
    assert all(later < earlier for earlier, later in pairwise(energies))


def test_optimum_of_the_regularised_discrepancy(problem):
    features, generator, z, gap, jacobian = problem
    alpha, beta = 2.0, 0.05
    solution = solve_witness(
        features, generator, z, gap, alpha=alpha, beta=beta, tolerance=1e-13, max_iterations=99
    )
    w = solution.weights.clone().requires_grad_()
    slope, norm2 = jacobian.T @ w, w @ w
    objective = w @ gap - 0.5 * alpha * slope @ slope - 0.5 * beta * norm2
    (gradient,) = torch.autograd.grad(objective, w)
    assert float(gradient.norm() / gap.norm()) < 1e-11
    assert objective.item() == pytest.approx(solution.regularised_mmd2.item(), rel=1e-11)


def test_push_through_identity(problem):
    features, generator, z, gap, jacobian = problem
    alpha, beta = 2.0, 0.05
    solution = solve_witness(
        features, generator, z, gap, alpha=alpha, beta=beta, tolerance=1e-13, max_iterations=99
    )
    damped = alpha * jacobian.T @ jacobian + beta * torch.eye(jacobian.shape[1])
    expected = torch.linalg.solve(damped, jacobian.T @ gap)
    assert relative_error(solution.parametric_gradient, expected) < 1e-10


def test_warm_start_from_the_solution_needs_no_iteration(problem):
    features, generator, z, gap, jacobian = problem
    expected = solve_dense(jacobian, gap, 1.0, 0.01)
    for scale in (1.0, 3.0, -0.2):  # the start is scaled to the least energy
        solution = solve_witness(
            features, generator, z, gap, tolerance=1e-10, initial=scale * expected
        )
        assert solution.num_iterations == 0
        assert relative_error(solution.weights, expected) < 1e-10
        assert relative_error(solution.parametric_gradient, jacobian.T @ expected) < 1e-10


def test_warm_start_is_scaled_to_the_least_energy(problem):
    features, generator, z, gap, jacobian = problem
    start = torch.randn(RANK)
    gramian = jacobian @ jacobian.T + 0.01 * torch.eye(RANK)
    with pytest.warns(WitnessConvergenceWarning):
        solution = solve_witness(features, generator, z, gap, max_iterations=0, initial=start)
    expected = start * (start @ gap) / (start @ gramian @ start)
    assert relative_error(solution.weights, expected) < 1e-12
    left = gap - gramian @ expected
    assert solution.residual == pytest.approx(float(left.norm() / gap.norm()), rel=1e-10)
    assert abs(float(start @ left)) < 1e-12  # the least along the line


def test_warm_start_near_the_solution_saves_iterations(problem):
    features, generator, z, gap, jacobian = problem
    near = solve_dense(jacobian, gap, 1.0, 0.01) + 1e-4 * torch.randn(RANK)
    cold = solve_witness(features, generator, z, gap)
    warm = solve_witness(features, generator, z, gap, initial=near)
    assert warm.num_iterations < cold.num_iterations
    zero = solve_witness(features, generator, z, gap, initial=torch.zeros(RANK))
    assert torch.equal(zero.weights, cold.weights)


def test_secants_are_steps_and_their_images(problem):
    features, generator, z, gap, jacobian = problem
    start = torch.randn(RANK)
    solution = solve_witness(features, generator, z, gap, tolerance=1e-10, initial=start)
    steps, images = solution.secants.unbind(1)
    assert len(steps) == 1 + solution.num_iterations  # one along the start
    assert relative_error(steps.sum(0), solution.weights) < 1e-12
    system = jacobian @ jacobian.T + 0.01 * torch.eye(RANK)
    assert relative_error(images, steps @ system) < 1e-10


def test_secants_that_span_the_features_leave_one_iteration(problem):
    features, generator, z, gap, jacobian = problem
    first = solve_witness(features, generator, z, gap, tolerance=1e-10)
    num = first.num_iterations
    assert num in (RANK, RANK + 1)  # conjugate directions, once more for rounding: BFGS is exact
    other = torch.randn(RANK)
    solution = solve_witness(features, generator, z, other, tolerance=1e-8, secants=first.secants)
    assert solution.num_iterations == 1
    assert relative_error(solution.weights, solve_dense(jacobian, other, 1.0, 0.01)) < 1e-8
    assert len(solution.secants) == num + 1
    assert torch.equal(solution.secants[:num], first.secants)


@pytest.mark.parametrize("beta", [0.01, 0.0])
def test_preconditioned_iterations_minimise_over_their_krylov_space(problem, beta):
    features, generator, z, gap, jacobian = problem
    secants = torch.randn(3, 1, RANK)
    factor = torch.randn(RANK, RANK)
    other = factor @ factor.T + torch.eye(RANK)  # of another system, as after an update
    secants = torch.cat([secants, secants @ other], dim=1)
    step, image = secants[-1]
    inverse = (step @ step) / (step @ image) * torch.eye(RANK)
    for s, y in secants:  # the BFGS formula, dense
        project = torch.eye(RANK) - torch.outer(s, y) / (s @ y)
        inverse = project @ inverse @ project.T + torch.outer(s, s) / (s @ y)
    system = jacobian @ jacobian.T + beta * torch.eye(RANK)
    basis, krylov = [], inverse @ gap
    for _ in range(3):
        basis.append(krylov / krylov.norm())
        krylov = inverse @ (system @ krylov)
    v = torch.stack(basis, dim=1)  # the energy is least on span{H delta, H A H delta, ...}
    expected = v @ torch.linalg.solve(v.T @ system @ v, v.T @ gap)
    with pytest.warns(WitnessConvergenceWarning):
        solution = solve_witness(
            features,
            generator,
            z,
            gap,
            beta=beta,
            tolerance=1e-14,
            max_iterations=3,
            secants=secants,
        )
    assert relative_error(solution.weights, expected) < 1e-8


def test_pairs_without_positive_curvature_are_passed_over(problem):
    features, generator, z, gap, _ = problem
    nothing = torch.zeros(1, 2, RANK)
    downhill = torch.stack([gap, -gap])[None]
    plain = solve_witness(features, generator, z, gap)
    solution = solve_witness(features, generator, z, gap, secants=torch.cat([nothing, downhill]))
    assert torch.equal(solution.weights, plain.weights)


def test_the_newest_secants_are_kept(problem):
    features, generator, z, gap, _ = problem
    many = torch.randn(300, 1, RANK)
    many = torch.cat([many, 2 * many], dim=1)  # those of 2 I
    solution = solve_witness(features, generator, z, gap, tolerance=0.3, secants=many)
    assert len(solution.secants) == 256
    kept = 256 - solution.num_iterations
    assert 0 < kept < 256
    assert torch.equal(solution.secants[:kept], many[-kept:])


def test_secants_of_another_system_are_blamed(problem):
    features, generator, z, gap, _ = problem
    wrong = torch.randn(RANK, 1, RANK) * torch.logspace(0, 4, RANK)
    wrong = torch.cat([wrong, wrong * torch.logspace(-8, 8, RANK)], dim=1)
    with pytest.warns(WitnessConvergenceWarning, match="without secants: the system has changed"):
        solve_witness(features, generator, z, gap, max_iterations=2, secants=wrong)


def test_as_many_iterations_as_distinct_eigenvalues():
    features, z, gap = shake(mlp_features()), torch.randn(8, 3), torch.randn(RANK)
    generator = shake(mlp_generator()).requires_grad_(False)
    generator[2].bias.requires_grad_(True)
    jacobian = embedding_jacobian(features, generator, z)
    assert torch.linalg.matrix_rank(jacobian) == 4
    solution = solve_witness(features, generator, z, gap, beta=0.1, tolerance=1e-11)
    assert solution.num_iterations == 5  # four eigenvalues of the Gramian, and zero
    assert relative_error(solution.weights, solve_dense(jacobian, gap, 1.0, 0.1)) < 1e-10


def test_no_iterations_give_the_zero_witness(problem):
    features, generator, z, gap, _ = problem
    with pytest.warns(WitnessConvergenceWarning, match="residual of 1 after 0 iterations.*Raise"):
        solution = solve_witness(features, generator, z, gap, max_iterations=0)
    assert solution.residual == 1.0
    for vector in (solution.weights, solution.parametric_gradient, solution.tangents):
        assert not vector.any()


@pytest.mark.parametrize("initial", [None, torch.ones(RANK, dtype=torch.float64)])
def test_no_gap_gives_the_zero_witness(problem, initial):
    features, generator, z, gap, _ = problem
    solution = solve_witness(features, generator, z, 0 * gap, initial=initial)
    assert (solution.residual, solution.num_iterations) == (0.0, 0)
    for vector in (solution.weights, solution.parametric_gradient, solution.tangents):
        assert not vector.any()


def test_without_penalty_the_witness_is_the_scaled_gap(problem):
    features, generator, z, gap, _ = problem
    solution = solve_witness(features, generator, z, gap, alpha=0.0, beta=0.25, tolerance=1e-12)
    assert relative_error(solution.weights, 4 * gap) < 1e-14
    assert solution.num_iterations == 1


def test_without_rkhs_norm_the_gramian_is_inverted():
    features, generator = shake(wide_features()), shake(mlp_generator())
    z, gap = torch.randn(8, 3), torch.randn(RANK)
    jacobian = embedding_jacobian(features, generator, z)
    solution = solve_witness(
        features, generator, z, gap, alpha=3.0, beta=0.0, tolerance=1e-11, max_iterations=99
    )
    expected = solve_dense(jacobian, gap, 3.0, 0.0)
    condition = float(torch.linalg.cond(jacobian @ jacobian.T))
    assert relative_error(solution.weights, expected) < 1e-11 * condition


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_singular_gramian_is_noticed(problem, dtype):
    features, generator, z, gap, jacobian = problem
    assert torch.linalg.matrix_rank(jacobian) < RANK  # five hidden units
    features, generator, z, gap = (t.to(dtype) for t in (features, generator, z, gap))
    with pytest.raises(ValueError, match=r"must be positive\. Use beta > 0"):
        solve_witness(features, generator, z, gap, beta=0.0, tolerance=1e-12, max_iterations=99)


def test_gap_that_no_parameter_closes_is_noticed(problem):
    features, generator, z, _, _ = problem

    def with_constant(x):
        return torch.cat([features(x), 0 * x[:, :1] + 1], 1)

    gap = torch.eye(RANK + 1)[-1]
    with pytest.raises(ValueError, match=r"curvature 0 along.*Use beta > 0"):
        solve_witness(with_constant, generator, z, gap, beta=0.0)


def test_constant_features_have_no_derivative(problem):
    _, generator, z, gap, _ = problem
    solution = solve_witness(lambda x: 0 * x[:, :1] + gap, generator, z, gap, beta=0.5)
    assert relative_error(solution.weights, 2 * gap) < 1e-14
    assert not solution.parametric_gradient.any()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"alpha": 0.0, "beta": 0.0}, "not both zero, got alpha = 0.0, beta = 0.0"),
        ({"alpha": -1.0}, "alpha >= 0 and beta >= 0.*alpha = -1"),
        ({"beta": -1e-3}, "alpha >= 0 and beta >= 0.*beta = -0.001"),
        ({"alpha": float("nan")}, "must be finite.*alpha = nan"),
        ({"beta": float("inf")}, "must be finite.*beta = inf"),
        ({"tolerance": 0.0}, "tolerance > 0.*got tolerance = 0"),
        ({"max_iterations": -1}, "max_iterations >= 0, got.*-1"),
        ({"gap": torch.ones(RANK + 1)}, rf"gap must have.*{RANK} features, got shape \(7,\)"),
        ({"initial": torch.ones(RANK, 1)}, r"initial must have.*got shape \(6, 1\)"),
        (
            {"secants": torch.ones(3, RANK)},
            r"secants must be of shape \(k, 2, 6\).*got shape \(3, 6\)",
        ),
        ({"gap": torch.full((RANK,), float("nan"))}, "gap must be finite.*Check the real"),
        ({"initial": torch.full((RANK,), float("nan"))}, "check the samples for NaN"),
        ({"features": nn.Flatten(0)}, r"shape \(8, r\), got \(32,\). Flatten"),
        ({"features": lambda x: x[:3]}, r"got \(3, 4\)"),
        ({"features": lambda x: (x, x)}, "got tuple"),
    ],
)
def test_bad_arguments_are_refused(problem, arguments, match):
    features, generator, z, gap, _ = problem
    defaults = {"features": features, "generator": generator, "z": z, "gap": gap}
    with pytest.raises(ValueError, match=match):
        solve_witness(**defaults | arguments)


def test_features_without_second_derivative_are_refused(problem):
    _, generator, z, gap, _ = problem
    with pytest.raises(RuntimeError, match="once_differentiable"):
        solve_witness(mlp_features(Sine(once=True)), generator, z, gap)


def test_generator_without_tangents_is_solved_approximately():
    features, z, gap = shake(mlp_features()), torch.randn(8, 3), torch.randn(RANK)
    generator = shake(mlp_generator(Sine(once=True)))
    expected = solve_dense(embedding_jacobian(features, generator, z), gap, 1.0, 0.1)
    with pytest.warns(DerivativeFallbackWarning, match=APPROXIMATE) as caught:
        solution = solve_witness(features, generator, z, gap, beta=0.1, tolerance=1e-7)
    assert len(caught) == 1
    assert 1e-13 < relative_error(solution.weights, expected) < 1e-5


@pytest.mark.parametrize("beta", [1.0, 1e-2])
def test_single_precision_networks(problem, beta):
    features, generator, z, gap, jacobian = problem
    expected = solve_dense(jacobian, gap, 1.0, beta)
    gramian = jacobian @ jacobian.T
    condition = float(torch.linalg.matrix_norm(gramian, 2)) / beta + 1
    solution = solve_witness(
        features.float(), generator.float(), z.float(), gap.float(), beta=beta, tolerance=1e-6
    )
    assert solution.weights.dtype == solution.tangents.dtype == torch.float32
    error = relative_error(solution.weights.double(), expected)
    assert 1e-9 < error < 3e-6 * condition
    left = gap - gramian @ solution.weights.double() - beta * solution.weights.double()
    assert float(left.norm() / gap.norm()) < 1e-6 + 3e-6 * condition
    wide = solve_witness(features, generator, z.float(), gap, beta=beta, tolerance=1e-6)
    assert wide.weights.dtype == torch.float64


def test_autocast_is_switched_off(problem):
    features, generator, z, gap, _ = problem
    features, generator, z, gap = features.float(), generator.float(), z.float(), gap.float()
    expected = solve_witness(features, generator, z, gap, beta=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solve_witness(features, generator, z, gap, beta=0.1)
    assert solution.num_iterations == expected.num_iterations
    assert relative_error(solution.weights, expected.weights) < 1e-5


def test_processes_average_to_the_whole_batch(problem):
    features, generator, z, w, jacobian = problem
    shards = [MeanEmbedding(features, shard, generator) for shard in z.chunk(2)]
    whole = MeanEmbedding(features, z, generator)
    v = jacobian.T @ w

    def mean(results):
        return torch.stack(list(results)).mean(0)

    assert relative_error(mean(s.mean for s in shards), whole.mean) < 1e-13
    assert relative_error(mean(s.adjoint(w) for s in shards), v) < 1e-13
    assert relative_error(mean(s.push(v)[0] for s in shards), jacobian @ v) < 1e-13
    doubled = MeanEmbedding(features, z, generator, mean=lambda t: 2 * t)
    for got, expected in (
        (doubled.mean, whole.mean),
        (doubled.adjoint(w), v),
        (doubled.push(v)[0], jacobian @ v),
    ):
        assert relative_error(got, 2 * expected) < 1e-13


@pytest.mark.parametrize("name", ["mlp", "batch norm", "spectral norm", "attention"])
def test_witness_gradient_carries_the_penalty_s_gradient(name):
    """<witness gradient, tangents> is ||L f||^2, its gradient half that of ||L f||^2."""
    features, generator, z, w = networks(name)
    last = nn.Linear(RANK, 1, bias=False).requires_grad_(False)
    last.weight.copy_(w)
    penalty, slopes, _ = gradient_penalty(nn.Sequential(features, last), generator, z)
    embedding = embed(features, generator, z)
    _, dx = embedding.push(embedding.adjoint(w))
    value = embedding.average(lambda part, _: (part.witness_gradient(w) * dx).sum())
    weights = list(features.parameters())
    gradient = flat(torch.autograd.grad(value, weights, materialize_grads=True))
    assert relative_error(value, penalty) < 1e-12
    assert relative_error(2 * gradient, slopes) < 1e-12


def test_embedding_of_chosen_parameters(problem):
    features, generator, z, w, jacobian = problem
    embedding = MeanEmbedding(features, z, generator, {"2.bias": generator[2].bias})
    assert relative_error(embedding.adjoint(w), jacobian[:, -4:].T @ w) < 1e-12
    v = torch.randn(4)
    assert relative_error(embedding.push(v)[0], jacobian[:, -4:] @ v) < 1e-12


@pytest.mark.parametrize("overhead", [0.5, 2.3, 20.0])
def test_the_iterations_stop_where_they_no_longer_pay(problem, overhead):
    """They stop at the first iteration that did not raise the descent rate per cost."""
    features, generator, z, gap, _ = problem
    options = {"alpha": 1.0, "beta": 1e-3, "tolerance": 1e-12}
    rates = []
    for n in range(1, 10):
        embedding = MeanEmbedding(features, z, generator)
        solution = solve_embedding(embedding, gap, max_iterations=n, **options)
        rates.append(float(solution.descent_rate))
    per_cost = [rate / (overhead + n) for n, rate in enumerate(rates, start=1)]
    expected = 1 + next(n for n in range(1, 9) if per_cost[n] < per_cost[n - 1])
    embedding = MeanEmbedding(features, z, generator)
    solution = solve_embedding(embedding, gap, max_iterations=50, overhead=overhead, **options)
    assert solution.num_iterations == expected
    assert float(solution.descent_rate) == pytest.approx(rates[expected - 1], rel=1e-12)
