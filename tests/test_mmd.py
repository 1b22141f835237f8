import math
from itertools import permutations

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from lightning_mmd.kernels import (
    Energy,
    Gaussian,
    Kernel,
    Laplace,
    Linear,
    Polynomial,
    RationalQuadratic,
    SumKernel,
)
from lightning_mmd.mmd import (
    mmd2_biased,
    mmd2_features,
    mmd2_unbiased,
    mmd2_with_error,
    relative_similarity_test,
    two_sample_test,
)

KERNELS = [
    Gaussian(1.5),
    Laplace(2.0),
    Energy(),
    Polynomial(),
    SumKernel([RationalQuadratic(0.2), Linear()], weights=[1.0, 0.3]),
]


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mmd2_by_loops(x, y, kernel, *, unbiased):
    def k(a, b):
        return kernel(a[None], b[None]).item()

    def within(points):
        n = len(points)
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j or not unbiased]
        return sum(k(points[i], points[j]) for i, j in pairs) / len(pairs)

    across = sum(k(a, b) for a in x for b in y) / (len(x) * len(y))
    return within(x) + within(y) - 2 * across


def gaussian_mmd2(mean_gap2, variance_x, variance_y, dim, bandwidth):
    """MMD^2 of N(m, variance_x I), N(m', variance_y I) under the Gaussian kernel.

    x - y is normal, and E exp(-||u||^2 / (2 b^2)) = (b^2 / (b^2 + v))^(d/2) exp(-||mu||^2 / (2 (b^2
    + v))) for u ~ N(mu, v I).
    """

    def mean_kernel(gap2, variance):
        total = bandwidth**2 + variance
        return (bandwidth**2 / total) ** (dim / 2) * math.exp(-gap2 / (2 * total))

    return (
        mean_kernel(0.0, 2 * variance_x)
        + mean_kernel(0.0, 2 * variance_y)
        - 2 * mean_kernel(mean_gap2, variance_x + variance_y)
    )


@pytest.mark.parametrize("block_size", [1, 3, 7, 2048])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
def test_equals_double_loops(kernel, block_size):
    x, y = randn(7, 2, 2, seed=1), randn(5, 2, 2, seed=2) + 0.5
    y[0] = x[0]
    for estimator, unbiased in ((mmd2_unbiased, True), (mmd2_biased, False)):
        expected = mmd2_by_loops(x.flatten(1), y.flatten(1), kernel, unbiased=unbiased)
        value = estimator(x, y, kernel, block_size=block_size)
        assert value.shape == ()
        assert value.item() == pytest.approx(expected, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("estimator", [mmd2_unbiased, mmd2_biased])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
def test_blocked_derivatives_equal_unblocked(kernel, estimator):
    x, y = randn(10, 2, seed=3).requires_grad_(), randn(7, 2, seed=4).requires_grad_()

    def derivatives(block_size):
        value = estimator(x, y, kernel, block_size=block_size)
        first = grad(value, (x, y), create_graph=True)
        return (*first, *grad(sum(g.square().sum() for g in first), (x, y)))

    whole = derivatives(2048)
    assert all(g.abs().max() > 1e-3 for g in whole)
    for block_size in (3, 8):
        for blocked, expected in zip(derivatives(block_size), whole, strict=True):
            torch.testing.assert_close(blocked, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", [mmd2_unbiased, mmd2_biased])
@pytest.mark.parametrize("block_size", [2, 2048])
def test_derivatives_equal_finite_differences(estimator, block_size):
    x, y = randn(4, 2, seed=5).requires_grad_(), randn(3, 2, seed=6).requires_grad_()

    def value(x, y):
        return estimator(x, y, Gaussian(), block_size=block_size)

    assert gradcheck(value, (x, y))
    assert gradgradcheck(value, (x, y))


def test_memory_is_bounded_by_the_block():
    class Largest(Kernel):
        """Records the largest Gram matrix, and how many values the graph keeps."""

        def __init__(self):
            self.entries = 0

        def __call__(self, x, y):
            gram = Gaussian()(x, y)
            self.entries = max(self.entries, gram.numel())
            return gram

        def diagonal(self, x):
            return Gaussian().diagonal(x)

    x, y = randn(100, 2, seed=7).requires_grad_(), randn(90, 2, seed=8)
    kernel, saved = Largest(), []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = mmd2_unbiased(x, y, kernel, block_size=10)
    kept = max(saved)
    value.backward()
    assert kernel.entries == 100
    assert kept <= 100
    assert x.grad.abs().max() > 1e-3


@pytest.mark.parametrize("dim", [1, 3])
def test_closed_form_and_bias(dim):
    """The U-statistic's mean is MMD^2; the V-statistic's is not, by the amount documented."""
    variance_x, variance_y, bandwidth, n, m = 1.0, 2.25, 1.2, 6, 9
    kernel = Gaussian(bandwidth)
    exact = gaussian_mmd2(0.25 * dim, variance_x, variance_y, dim, bandwidth)
    num = 3000
    x = randn(num, n, dim, seed=9) * variance_x**0.5
    y = randn(num, m, dim, seed=10) * variance_y**0.5 + 0.5
    pairs = list(zip(x, y, strict=True))
    unbiased = torch.stack([mmd2_unbiased(*pair, kernel) for pair in pairs])
    biased = torch.stack([mmd2_biased(*pair, kernel) for pair in pairs])
    tolerance = 5 * unbiased.std().item() / math.sqrt(num)
    assert tolerance < 0.25 * exact
    assert abs(unbiased.mean().item() - exact) < tolerance

    def self_excess(variance):
        return 1 - (bandwidth**2 / (bandwidth**2 + 2 * variance)) ** (dim / 2)

    bias = self_excess(variance_x) / n + self_excess(variance_y) / m
    assert bias > 3 * tolerance
    assert abs(biased.mean().item() - exact - bias) < tolerance


def test_unbiased_is_never_clamped():
    draws = randn(200, 2, 10, 2, seed=11)
    values = torch.stack([mmd2_unbiased(x, y, Gaussian()) for x, y in draws])
    assert 0.35 < (values < 0).double().mean().item() < 0.75
    assert abs(values.mean().item()) < 5 * values.std().item() / math.sqrt(200)
    assert min(mmd2_biased(x, y, Gaussian()).item() for x, y in draws) > 0.01


def test_large_samples_reach_the_closed_form():
    x, y = randn(4000, 2, seed=12, dtype=torch.float32), randn(3000, 2, seed=13).float() * 1.5
    y += 1.0
    exact = gaussian_mmd2(2.0, 1.0, 2.25, 2, 1.0)
    value = mmd2_unbiased(x, y, Gaussian(), block_size=700)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(exact, rel=0.1)  # its standard deviation is about 0.03
    precise = mmd2_unbiased(x.double(), y.double(), Gaussian())
    assert value.item() == pytest.approx(precise.item(), rel=1e-5)


def test_energy_is_half_the_energy_distance():
    x, y = randn(8, 3, seed=14), randn(6, 3, seed=15) + 1.0
    xx, yy, xy = torch.cdist(x, x), torch.cdist(y, y), torch.cdist(x, y)
    energy_distance = 2 * xy.mean() - xx.mean() - yy.mean()
    value = mmd2_biased(x, y, Energy())
    torch.testing.assert_close(value, energy_distance / 2, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mmd2_biased(x + 50, y + 50, Energy()), value, rtol=1e-10, atol=0)


@pytest.mark.parametrize("unbiased", [False, True])
def test_features_equal_linear_kernel(unbiased):
    phi_x, phi_y = randn(9, 4, seed=16).requires_grad_(), (randn(6, 4, seed=17) + 0.3).clone()
    by_kernel = (mmd2_unbiased if unbiased else mmd2_biased)(phi_x, phi_y, Linear())
    value = mmd2_features(phi_x, phi_y, unbiased=unbiased)
    torch.testing.assert_close(value, by_kernel, rtol=1e-12, atol=1e-13)
    (by_kernel,), (gradient,) = grad(by_kernel, phi_x), grad(value, phi_x)
    torch.testing.assert_close(gradient, by_kernel, rtol=1e-12, atol=1e-13)


def test_features_keep_their_digits_far_from_the_origin():
    phi_x, phi_y = randn(500, 8, seed=18).float() + 100, randn(400, 8, seed=19).float() + 100
    expected = mmd2_unbiased(phi_x.double(), phi_y.double(), Linear()).item()
    value = mmd2_features(phi_x, phi_y, unbiased=True)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x, y = randn(40, 3, seed=20).to(dtype), (randn(30, 3, seed=21) + 1).to(dtype)
    value = mmd2_unbiased(x, y, Gaussian())
    assert value.dtype == torch.float32
    expected = mmd2_unbiased(x.double(), y.double(), Gaussian()).item()
    assert value.item() == pytest.approx(expected, rel=1e-5)


ESTIMATORS = {
    "mmd2_unbiased": lambda x, y: mmd2_unbiased(x, y, Gaussian()),
    "mmd2_biased": lambda x, y: mmd2_biased(x, y, Gaussian()),
    "mmd2_features": lambda x, y: mmd2_features(x, y, unbiased=True),
    "mmd2_with_error": lambda x, y: mmd2_with_error(x, y, Gaussian()),
    "two_sample_test": lambda x, y: two_sample_test(x, y, Gaussian()),
    "relative_similarity_test": lambda x, y: relative_similarity_test(x, x, y, Gaussian()),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_rejects_wrong_samples(name):
    estimate, x = ESTIMATORS[name], torch.ones(3, 2)
    with pytest.raises(ValueError, match=rf"{name} expects .* got \(3, 2\) and \(3, 4\)"):
        estimate(x, torch.ones(3, 4))
    with pytest.raises(ValueError, match=rf"{name} expects samples of shapes"):
        estimate(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match=rf"{name} .* torch.float32 and torch.float64"):
        estimate(x.float(), x.double())
    with pytest.raises(ValueError, match=rf"{name} .* torch.int64"):
        estimate(x.long(), x.long())
    with pytest.raises(
        ValueError, match=rf"{name} expects samples on one device, got cpu and meta"
    ):
        estimate(x, x.to("meta"))
    with pytest.raises(ValueError, match=rf"{name} needs at least [12] samples .* m = 0"):
        estimate(x, x[:0])


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - {"mmd2_biased"}))
def test_single_samples_need_a_biased_estimate(name):
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"at least 2 samples on each side, got n = 3 and m = 1"):
        ESTIMATORS[name](x, x[:1])
    assert mmd2_biased(x, x[:1] + 1, Linear()) == 2
    assert mmd2_features(x, x[:1] + 1) == 2


def test_rejects_wrong_options():
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match="block_size >= 1, got 0"):
        mmd2_unbiased(x, x, Gaussian(), block_size=0)
    with pytest.raises(ValueError, match="num_permutations >= 1, got 0"):
        two_sample_test(x, x, Gaussian(), num_permutations=0)


def test_permuted_statistics_are_those_of_permuted_samples():
    """With 3 + 2 points there are 10 groupings: the test's null values are exactly these."""
    pooled = randn(5, 2, seed=22)
    kernel = Gaussian()
    result = two_sample_test(
        pooled[:3],
        pooled[3:],
        kernel,
        num_permutations=3000,
        generator=torch.Generator().manual_seed(0),
    )
    groupings = torch.tensor(
        [
            mmd2_unbiased(pooled[list(p[:3])], pooled[list(p[3:])], kernel)
            for p in permutations(range(5))
        ]
    ).double()
    assert result.statistic == pytest.approx(groupings[0].item(), abs=1e-12)
    distances = (result.null_statistics[:, None] - groupings).abs().min(1).values
    assert distances.max() < 1e-6
    exact = (groupings >= groupings[0]).double().mean().item()
    assert result.p_value == pytest.approx(exact, abs=5 * math.sqrt(0.25 / 3000))


def test_permutation_test_has_its_level_and_power():
    generator = torch.Generator().manual_seed(1)
    kernel, num = Gaussian(), 300

    def p_value(shift):
        x, y = randn_like(generator, 12, 2), randn_like(generator, 8, 2) + shift
        return two_sample_test(x, y, kernel, num_permutations=99, generator=generator).p_value

    null = torch.tensor([p_value(0.0) for _ in range(num)])
    for level in (0.05, 0.2, 0.5, 0.8):
        rate = (null <= level + 1e-6).double().mean().item()
        assert abs(rate - level) < 4 * math.sqrt(level * (1 - level) / num)
    assert null.min() >= 0.01
    assert sum(p_value(2.0) <= 0.05 for _ in range(40)) >= 36


def randn_like(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_permutation_test_is_reproducible():
    x, y = randn(20, 2, seed=23), randn(20, 2, seed=24) + 0.3

    def run(seed):
        generator = torch.Generator().manual_seed(seed)
        return two_sample_test(x, y, Laplace(), num_permutations=50, generator=generator)

    assert run(0) == run(0)
    assert torch.equal(run(0).null_statistics, run(0).null_statistics)
    assert not torch.equal(run(0).null_statistics, run(1).null_statistics)
    assert run(0).statistic == pytest.approx(mmd2_unbiased(x, y, Laplace()).item(), abs=1e-14)


@pytest.mark.parametrize(
    ("shift_y", "shift_z", "sizes"),
    [(1.0, -1.0, (30, 20, 45)), (0.8, 0.3, (15, 40, 25)), (0.0, 0.0, (20, 20, 20))],
    ids=["equal", "different", "degenerate"],
)
def test_relative_similarity_std_error(shift_y, shift_z, sizes):
    """The estimated variance of the difference is the variance over repeated draws."""
    generator, num, kernel = torch.Generator().manual_seed(2), 1500, Gaussian(1.0)
    results = []
    for _ in range(num):
        x, y, z = (randn_like(generator, size, 2) for size in sizes)
        results.append(relative_similarity_test(x, y + shift_y, z + shift_z, kernel))
    differences = torch.tensor([r.difference for r in results], dtype=torch.float64)
    variances = torch.tensor([r.std_error**2 for r in results], dtype=torch.float64)
    exact = gaussian_mmd2(2 * shift_y**2, 1, 1, 2, 1.0) - gaussian_mmd2(
        2 * shift_z**2, 1, 1, 2, 1.0
    )
    spread = differences.std().item()
    assert abs(differences.mean().item() - exact) < 5 * spread / math.sqrt(num)
    estimated = variances.mean().sqrt().item()
    if shift_y == shift_z:  # both distances zero: conservative, for it is bounded below
        assert spread < estimated < 1.3 * spread
    else:  # the Monte Carlo spread itself is known to 1 / sqrt(2 num), 2 %
        assert estimated == pytest.approx(spread, rel=0.06)
    if shift_y == -shift_z != 0:
        p_values = torch.tensor([r.p_value for r in results])
        for level in (0.05, 0.2, 0.5, 0.8, 0.95):
            rate = (p_values <= level).double().mean().item()
            assert rate == pytest.approx(level, abs=0.015 + 4 * math.sqrt(0.25 * level / num))


def test_relative_similarity_difference_and_direction():
    x, y, z = randn(60, 2, seed=25), randn(50, 2, seed=26) + 1.0, randn(40, 2, seed=27) + 0.1
    for kernel in KERNELS:
        result = relative_similarity_test(x, y, z, kernel)
        expected = mmd2_unbiased(x, y, kernel) - mmd2_unbiased(x, z, kernel)
        assert result.difference == pytest.approx(expected.item(), rel=1e-9)
        swapped = relative_similarity_test(x, z, y, kernel)
        assert swapped.difference == pytest.approx(-result.difference, rel=1e-12)
        assert swapped.p_value == pytest.approx(1 - result.p_value, abs=1e-12)
        assert result.p_value < 0.01


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_tests_refuse_what_is_not_finite(bad):
    """NaN compares as false: it read as the smallest p-value there is."""
    x, y = randn(20, 2, seed=28), randn(20, 2, seed=29)
    y[3, 1] = bad
    for samples in ((x, y), (y, x)):
        with pytest.raises(ValueError, match="two_sample_test needs finite kernel values"):
            two_sample_test(*samples, Gaussian())
    for samples in ((x, x, y), (x, y, x), (y, x, x)):
        with pytest.raises(ValueError, match="relative_similarity_test needs finite"):
            relative_similarity_test(*samples, Gaussian())
    kept = y[y.flatten(1).isfinite().all(1)]  # the cure that the message gives
    assert 0 < two_sample_test(x, kept, Gaussian(), num_permutations=20).p_value <= 1
    assert math.isnan(mmd2_unbiased(x, y, Gaussian())) or bad == math.inf


def test_tests_of_images_are_those_of_flat_images():
    x, y, z = randn(3, 12, 1, 3, 2, seed=30)
    flat = (points.flatten(1) for points in (x, y, z))
    assert relative_similarity_test(x, y, z, Gaussian()) == relative_similarity_test(
        *flat, Gaussian()
    )
    shuffle = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert two_sample_test(x, y, Gaussian(), generator=shuffle[0]) == two_sample_test(
        x.flatten(1), y.flatten(1), Gaussian(), generator=shuffle[1]
    )
    with pytest.raises(ValueError, match=r"got \(12, 1, 3, 2\) and \(12, 6\)"):
        relative_similarity_test(x, y, z.flatten(1), Gaussian())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(40, 40), (40, 30)])
def test_one_collapsed_generator_then_and_now_is_no_evidence(sizes, dtype):
    """D = 0 with standard error 0: p = 1/2, as for D = 0 with any other."""
    x = randn(50, 2, seed=31).to(dtype)
    y, z = (torch.full((size, 2), 0.7, dtype=dtype) for size in sizes)
    result = relative_similarity_test(x, y, z, Gaussian())
    assert abs(result.difference) < 1e-15
    assert result.p_value == 0.5
    apart = relative_similarity_test(x, y, z + 0.1, Gaussian())  # collapsed, but elsewhere
    assert apart.std_error > 0
    blind = relative_similarity_test(x, x[:20] + 0.01, x[20:40] + 0.01, Gaussian(1e-6))
    assert blind.p_value == 0.5


@pytest.mark.parametrize(("shift", "p_value"), [(2.0, 0.0), (0.5, 1.0)])
def test_three_points_that_repeat_are_told_apart_with_certainty(shift, p_value):
    x, y, z = (torch.full((5, 1), at) for at in (0.0, shift, 1.0))
    result = relative_similarity_test(x, y, z, Gaussian())
    assert (result.std_error, result.p_value) == (pytest.approx(0.0, abs=1e-12), p_value)


def modes(num, distance, width, shift, generator):
    """Two modes of the given width at -distance and +distance, in float32."""
    side = torch.randint(0, 2, (num,), generator=generator) * 2.0 - 1.0
    noise = torch.randn(num, 2, generator=generator, dtype=torch.float64) * width
    centres = torch.stack([side * distance, torch.full_like(side, shift)], 1)
    return (centres + noise).float()


@pytest.mark.parametrize(("distance", "width"), [(50, 0.05), (100, 0.05), (1000, 1.0)])
def test_modes_thousands_of_bandwidths_apart_in_float32(distance, width):
    """Float32 distances around a common centre were off by 3 to 90 % here."""
    generator = torch.Generator().manual_seed(3)
    x, y = (modes(200, distance, width, shift, generator) for shift in (0.0, width))
    expected = mmd2_unbiased(x.double(), y.double(), Gaussian(width)).item()
    assert mmd2_unbiased(x, y, Gaussian(width)).item() == pytest.approx(expected, rel=1e-4)
    kernel = SumKernel([Laplace(width), RationalQuadratic(1.0, width)])
    expected = mmd2_biased(x.double(), y.double(), kernel).item()
    assert mmd2_biased(x, y, kernel).item() == pytest.approx(expected, rel=1e-4)


def test_sign_of_the_unbiased_estimate_where_the_laws_agree():
    """P(chi^2_1 < 1) = 0.683 for one direction: with a linear kernel U = s^2 (chi^2_1 - 1)."""
    x, y = randn(4000, 50, 1, seed=32), randn(4000, 50, 1, seed=33)
    gap2 = (x.mean(1) - y.mean(1)).square().sum(1)
    negative = (gap2 < (x.var(1) + y.var(1))[:, 0] / 50).double().mean().item()
    one = mmd2_unbiased(x[0], y[0], Linear())
    assert one.item() == pytest.approx(
        (gap2[0] - (x[0].var(0) + y[0].var(0))[0] / 50).item(), abs=1e-12
    )
    assert negative == pytest.approx(math.erf(0.5**0.5), abs=4 * math.sqrt(0.22 / 4000))


def test_biased_estimate_is_zero_where_mean_embeddings_agree():
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0]])
    assert mmd2_biased(x, y, Linear()) == 0.0
    assert mmd2_biased(x, y, Gaussian()) > 0.1
    assert mmd2_biased(x, x.repeat(3, 1), Gaussian()) == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_arrays_are_refused_with_a_cure(name):
    x = torch.ones(3, 2)
    with pytest.raises(TypeError, match=r"got ndarray\. Convert it: torch\.as_tensor\("):
        ESTIMATORS[name](x.numpy(), x)


@pytest.mark.parametrize(("shift", "sizes"), [(1.0, (30, 20)), (0.4, (15, 40)), (0.0, (20, 20))])
def test_standard_error_of_mmd2(shift, sizes):
    """The estimated variance is that over repeated draws; larger where the laws agree."""
    generator, num, kernel = torch.Generator().manual_seed(4), 1500, Gaussian(1.0)
    results = []
    for _ in range(num):
        x, y = (randn_like(generator, size, 2) for size in sizes)
        results.append(mmd2_with_error(x, y + shift, kernel))
    values = torch.tensor([r.value for r in results], dtype=torch.float64)
    errors = torch.tensor([r.std_error for r in results], dtype=torch.float64)
    spread, estimated = values.std().item(), errors.square().mean().sqrt().item()
    exact = gaussian_mmd2(2 * shift**2, 1, 1, 2, 1.0)
    assert abs(values.mean().item() - exact) < 5 * spread / math.sqrt(num)
    if shift == 0.0:
        assert spread < estimated < 1.3 * spread
    else:
        assert estimated == pytest.approx(spread, rel=0.08)
    assert results[-1].value == pytest.approx(mmd2_unbiased(x, y + shift, kernel).item(), rel=1e-9)


@pytest.mark.parametrize("block_size", [1, 4, 7, 100])
def test_standard_error_in_blocks_is_that_of_whole_gram_matrices(block_size):
    generator = torch.Generator().manual_seed(5)
    x, y = randn_like(generator, 11, 3), randn_like(generator, 7, 3) + 0.3
    xx, yy, xy = (Gaussian(1.2)(a, b) for a, b in ((x, x), (y, y), (x, y)))
    n, m = 11, 7

    def others(gram):
        return (gram.sum(1) - gram.diagonal()) / (len(gram) - 1)

    def centred(gram, within):
        squares = (gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()).square()
        return others(squares).mean() if within else squares.mean()

    first = 4 * (others(xx) - xy.mean(1)).var() / n + 4 * (others(yy) - xy.mean(0)).var() / m
    second = 2 * centred(xx, True) / (n * (n - 1)) + 2 * centred(yy, True) / (m * (m - 1))
    second = second + 4 * centred(xy, False) / (n * m)
    found = mmd2_with_error(x, y, Gaussian(1.2), block_size=block_size)
    expected = torch.maximum(first - second, second).sqrt().item()
    assert found.std_error == pytest.approx(expected, rel=1e-11)
    with pytest.raises(ValueError, match="block_size >= 1, got 0"):
        mmd2_with_error(x, y, Gaussian(), block_size=0)
