import math

import pytest
import torch

from lightning_mmd.features import RandomFourierFeatures, SumFeatures
from lightning_mmd.kernels import (
    Energy,
    Gaussian,
    InverseMultiquadric,
    Laplace,
    Linear,
    RationalQuadratic,
    SumKernel,
)
from lightning_mmd.mmd import mmd2_biased, mmd2_features, mmd2_unbiased

KERNELS = {
    "gaussian": Gaussian(1.5),
    "laplace": Laplace(2.0),
    "rational_quadratic": RationalQuadratic(alpha=0.3, bandwidth=2.0),
    "inverse_multiquadric": InverseMultiquadric(1.5),
    "mixture": SumKernel([Gaussian(0.7), Laplace(1.0), RationalQuadratic(2.0)], [1.0, 0.5, 2.0]),
}


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def approximate_gram(kernel, num_features, seed, x, y):
    features = RandomFourierFeatures(kernel, x.shape[1], num_features, seed=seed)
    return features(x) @ features(y).T


@pytest.mark.parametrize("name", KERNELS)
def test_norm_is_exact_at_every_size(name):
    kernel, x = KERNELS[name], 100 * randn(20, 3, seed=1)
    for num_features in (2, 10, 64):
        squared_norms = RandomFourierFeatures(kernel, 3, num_features)(x).square().sum(1)
        torch.testing.assert_close(squared_norms, kernel.diagonal(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_is_unbiased(name):
    kernel, x, y, num = KERNELS[name], randn(4, 3, seed=2), randn(5, 3, seed=3), 2000
    draws = torch.stack([approximate_gram(kernel, 6, seed, x, y) for seed in range(num)])
    std_error = draws.std(0) / math.sqrt(num)
    assert std_error.max() < 0.05
    assert ((draws.mean(0) - kernel(x, y)).abs() < 5 * std_error).all()


@pytest.mark.parametrize("name", ["gaussian", "laplace", "mixture"])
def test_error_falls_like_the_root_of_the_number_of_features(name):
    kernel, x, y = KERNELS[name], randn(20, 3, seed=4), randn(20, 3, seed=5)
    exact = kernel(x, y)
    sizes = [2**k for k in range(4, 12)]

    def log_error(num_features):
        grams = [approximate_gram(kernel, num_features, seed, x, y) for seed in range(30)]
        return math.log(torch.stack([(g - exact).square().mean() for g in grams]).mean().sqrt())

    errors = torch.tensor([log_error(size) for size in sizes])
    logs = torch.tensor(sizes).log()
    logs, errors = logs - logs.mean(), errors - errors.mean()
    slope = (logs @ errors / (logs @ logs)).item()
    assert -0.55 < slope < -0.45


def test_mmd2_of_features_approaches_that_of_the_kernel():
    x, y, kernel = randn(60, 3, seed=6), randn(50, 3, seed=7) + 0.7, KERNELS["mixture"]

    def root_mean_square_error(num_features, unbiased, exact):
        errors = []
        for seed in range(60):
            features = RandomFourierFeatures(kernel, 3, num_features, seed=seed)
            errors.append(mmd2_features(features(x), features(y), unbiased=unbiased) - exact)
        return torch.stack(errors).square().mean().sqrt().item()

    for unbiased, estimator in ((True, mmd2_unbiased), (False, mmd2_biased)):
        exact = estimator(x, y, kernel)
        coarse = root_mean_square_error(64, unbiased, exact)
        fine = root_mean_square_error(64 * 16, unbiased, exact)
        assert fine < 0.15 * exact
        assert 3.0 < coarse / fine < 5.3  # 16 times the features, 4 times less error


def test_seed_alone_decides_the_frequencies():
    def frequencies(seed):
        return RandomFourierFeatures(Gaussian(), 3, 8, seed=seed).frequencies

    first = frequencies(0)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(frequencies(0), first)
    assert not torch.equal(frequencies(1), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (4, 3)


def test_state_dict_carries_the_frequencies():
    one = RandomFourierFeatures(Gaussian(), 3, 8, seed=0)
    other = RandomFourierFeatures(Gaussian(), 3, 8, seed=1)
    x = randn(5, 3, seed=8)
    assert not torch.allclose(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))
    assert not list(one.parameters())


def test_precision():
    features = RandomFourierFeatures(Gaussian(3.0), 12, 64)
    images = randn(7, 3, 2, 2, seed=9)
    expected = features(images)
    torch.testing.assert_close(expected, features(images.flatten(1)), rtol=0, atol=0)
    features.float()
    assert features.frequencies.dtype == torch.float32
    single = features(images.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(images.float()), single)
    assert features(images.bfloat16()).dtype == torch.float32
    assert features(images).dtype == torch.float64
    torch.set_default_dtype(torch.float32)  # the tests' default, float64, is restored afterwards
    assert torch.equal(RandomFourierFeatures(Gaussian(3.0), 12, 64)(images.float()), single)


def test_derivatives():
    features = RandomFourierFeatures(Laplace(3.0), 3, 8)
    x = randn(2, 3, seed=10).requires_grad_()
    assert torch.autograd.gradcheck(features, x)
    assert torch.autograd.gradgradcheck(features, x)


def test_rejects():
    with pytest.raises(TypeError, match=r"stationary kernel .* got Energy\(exponent=1.0\)"):
        RandomFourierFeatures(Energy(), 3, 8)
    with pytest.raises(TypeError, match=r"got Linear\(\)"):
        RandomFourierFeatures(SumKernel([Gaussian(), Linear()]), 3, 8)
    for num_features in (7, 0, -2):
        with pytest.raises(ValueError, match=f"positive even num_features.*got {num_features}"):
            RandomFourierFeatures(Gaussian(), 3, num_features)
    with pytest.raises(ValueError, match="in_features >= 1, got 0"):
        RandomFourierFeatures(Gaussian(), 0, 8)
    features = RandomFourierFeatures(Gaussian(), 3, 8)
    for shape in ((5, 4), (3,), (5, 3, 2)):
        with pytest.raises(ValueError, match=r"expects points of shape \(n, 3\)"):
            features(torch.ones(shape))
    assert "Gaussian(bandwidth=1.0), in_features=3, num_features=8" in repr(features)


def test_sum_features_are_those_of_the_sum_of_kernels():
    torch.manual_seed(0)
    x, y = torch.randn(7, 3), torch.randn(4, 3)
    parts = [RandomFourierFeatures(Gaussian(b), 3, 20, seed=i) for i, b in enumerate((0.5, 2.0))]
    parts.append(torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.SiLU()))
    features = SumFeatures(parts, weights=[2.0, 0.5, 0.1])
    expected = sum(w * p(x) @ p(y).T for w, p in zip((2.0, 0.5, 0.1), parts, strict=True))
    assert torch.allclose(features(x) @ features(y).T, expected, rtol=1e-12)
    assert features(x).shape == (7, 46)
    assert set(map(id, features.parameters())) == set(map(id, parts[2].parameters()))


@pytest.mark.parametrize(
    ("maps", "weights"), [(0, None), (1, [1.0, 2.0]), (1, [0.0]), (1, [-1.0]), (1, [torch.inf])]
)
def test_sum_features_refuse_bad_weights(maps, weights):
    with pytest.raises(ValueError, match="one positive weight for each, got"):
        SumFeatures([torch.nn.Linear(2, 3)] * maps, weights)
