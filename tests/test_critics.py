"""Critics: f = <w, phi>, its RKHS norm, and what every critic must be."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_mmd.critics import LearnedKernelCritic
from lightning_mmd.features import RandomFourierFeatures
from lightning_mmd.kernels import Gaussian
from lightning_mmd.networks import ConvFeatures, MLPFeatures
from lightning_mmd.penalties import parametric_gradient_penalty, rkhs_norm_penalty
from lightning_mmd.witness import solve_witness


def plain():
    return LearnedKernelCritic(MLPFeatures(3, 6, hidden=(5,)), 6)


def on_images():
    return LearnedKernelCritic(ConvFeatures((1, 4, 4), 6, channels=(4,)), 6)


def characteristic():
    random_features = RandomFourierFeatures(Gaussian(2.0), 6, 16)
    return LearnedKernelCritic(MLPFeatures(3, 6, hidden=(5,)), 6, random_features)


# Every critic of the package, with the shape of a sample: add yours here.
CRITICS = {"plain": (plain, (3,)), "images": (on_images, (1, 4, 4)), "rff": (characteristic, (3,))}


@pytest.fixture(params=CRITICS)
def case(request):
    build, shape = CRITICS[request.param]
    return build(), torch.randn(5, *shape)


def test_value_is_the_inner_product_with_the_embedding(case):
    critic, x = case
    phi = critic.embed(x)
    values = critic(x)
    assert values.shape == (5,)
    for value, row in zip(values, phi, strict=True):
        pairs = zip(critic.weights.tolist(), row.tolist(), strict=True)
        expected = sum(w * p for w, p in pairs)
        assert value.item() == pytest.approx(expected, rel=1e-12)


def test_rkhs_norm_is_that_of_the_weights(case):
    critic, _ = case
    expected = sum(w**2 for w in critic.weights.tolist())
    assert critic.rkhs_norm2().item() == pytest.approx(expected, rel=1e-12)
    (slopes,) = torch.autograd.grad(rkhs_norm_penalty(critic), critic.weights)
    torch.testing.assert_close(slopes, 2 * critic.weights)


def test_values_are_bounded_by_the_norm(case):
    """|f(x)| <= ||f|| sqrt(k(x, x)), with equality for f = k(x, .)."""
    critic, x = case
    phi = critic.embed(x).detach()
    bound = (critic.rkhs_norm2() * phi.square().sum(1)).sqrt()
    assert (critic(x).abs() <= bound).all()
    with torch.no_grad():
        critic.weights.copy_(phi[0])
    assert critic(x)[0].item() == pytest.approx(critic.rkhs_norm2().item(), rel=1e-12)


def test_samples_do_not_see_each_other(case):
    critic, x = case
    alone = torch.cat([critic(row[None]) for row in x])
    torch.testing.assert_close(critic(x), alone, rtol=1e-12, atol=1e-12)


def test_every_parameter_learns(case):
    critic, x = case
    critic(x).square().sum().backward()
    for name, parameter in critic.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_penalty_is_the_quadratic_form_of_the_weights(case):
    """||L f||^2 = w^T J J^T w scales with the square of w; the witness solves on embed."""
    critic, x = case
    generator = nn.Sequential(nn.Linear(2, x[0].numel()), nn.Unflatten(1, x.shape[1:]), nn.Tanh())
    z = torch.randn(8, 2)
    penalty = parametric_gradient_penalty(critic, generator, z)
    assert penalty > 0
    gap = torch.ones_like(critic.weights)
    solution = solve_witness(
        critic.embed, generator, z, gap, beta=0.1, tolerance=1e-12, max_iterations=99
    )
    with torch.no_grad():
        critic.weights.mul_(3)
        tripled = parametric_gradient_penalty(critic, generator, z)
        critic.weights.copy_(solution.weights)
        at_solution = parametric_gradient_penalty(critic, generator, z)
    assert tripled.item() == pytest.approx(9 * penalty.item(), rel=1e-10)
    expected = solution.parametric_gradient.square().sum()
    assert at_solution.item() == pytest.approx(expected.item(), rel=1e-9)


def test_state_dict_restores_the_function(case):
    critic, x = case
    twin = type(critic)(critic.features, critic.num_features, critic.random_features)
    assert not torch.equal(twin(x), critic(x))
    twin.load_state_dict(critic.state_dict())
    assert torch.equal(twin(x), critic(x))


def test_random_features_make_the_kernel_characteristic():
    """The learned kernel tends to k(h(x), h(y)), and k(x, x) is k(0) exactly."""
    features, x = MLPFeatures(3, 6, hidden=(5,)), 3 * torch.randn(20, 3)
    with torch.no_grad():
        expected = Gaussian(0.3)(features(x), features(x))
    errors = []  # root mean square over draws of the frequencies
    for num_features in (64, 1024):
        squares = []
        for seed in range(20):
            random_features = RandomFourierFeatures(Gaussian(0.3), 6, num_features, seed)
            critic = LearnedKernelCritic(features, 6, random_features)
            assert critic.weights.shape == (num_features,)
            phi = critic.embed(x).detach()
            torch.testing.assert_close((phi @ phi.T).diagonal(), torch.ones(20))
            squares.append((phi @ phi.T - expected).square().mean())
        errors.append(torch.stack(squares).mean().sqrt().item())
    assert errors[0] > 0.01
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)  # 16 times the features


def test_initial_weights_have_norm_about_one():
    norms = [LearnedKernelCritic(nn.Identity(), 400).rkhs_norm2().item() for _ in range(50)]
    mean = sum(norms) / 50
    assert abs(mean - 1) < 5 * (2 / 400 / 50) ** 0.5  # chi-squared with 400 degrees of freedom


@pytest.mark.parametrize("num_features", [0, -3])
def test_number_of_features_is_checked(num_features):
    with pytest.raises(ValueError, match=f"at least 1, got {num_features}"):
        LearnedKernelCritic(nn.Identity(), num_features)


def test_random_features_must_fit():
    with pytest.raises(ValueError, match="take the 6 learned features, got in_features = 5"):
        LearnedKernelCritic(nn.Identity(), 6, RandomFourierFeatures(Gaussian(), 5, 8))


@pytest.mark.parametrize(
    ("features", "got"),
    [
        (nn.Linear(3, 5), r"\(4, 5\)"),
        (nn.Flatten(0), r"\(12,\)"),
        (nn.Unflatten(1, (3, 1)), r"\(4, 3, 1\)"),
        (nn.LSTM(3, 6), "tuple"),
    ],
)
def test_output_of_the_feature_net_is_checked(features, got):
    critic = LearnedKernelCritic(features.double(), 6).double()
    with pytest.raises(ValueError, match=rf"must return shape \(4, 6\), got {got}. Set num_feat"):
        critic(torch.randn(4, 3))


def test_gradient_in_x_is_that_of_the_formula():
    critic = LearnedKernelCritic(nn.Sequential(nn.Linear(3, 6), nn.Tanh()), 6)
    x = torch.randn(5, 3, requires_grad=True)
    (slopes,) = torch.autograd.grad(critic(x).sum(), x)
    a, b = critic.features[0].weight, critic.features[0].bias
    expected = (critic.weights * (1 - F.linear(x, a, b).tanh().square())) @ a
    torch.testing.assert_close(slopes, expected)
