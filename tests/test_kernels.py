import math
import pickle

import numpy
import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_mmd.kernel_witness import KernelWitness
from lightning_mmd.kernels import (
    Energy,
    Gaussian,
    InverseMultiquadric,
    Kernel,
    Laplace,
    Linear,
    Polynomial,
    RationalQuadratic,
    SumKernel,
    median_bandwidth,
)
from lightning_mmd.points import squared_distances


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def norm(x):
    return math.sqrt(sum(a * a for a in x))


def distance(x, y):
    return norm([a - b for a, b in zip(x, y, strict=True)])


def inner(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


# Each kernel beside its textbook formula on lists of floats.
CASES = {
    "gaussian": (Gaussian(0.7), lambda x, y: math.exp(-(distance(x, y) ** 2) / (2 * 0.7**2))),
    "laplace": (Laplace(1.3), lambda x, y: math.exp(-distance(x, y) / 1.3)),
    "rational_quadratic": (
        RationalQuadratic(alpha=0.4, bandwidth=1.7),
        lambda x, y: (1 + distance(x, y) ** 2 / (2 * 0.4 * 1.7**2)) ** -0.4,
    ),
    "inverse_multiquadric": (
        InverseMultiquadric(1.2),
        lambda x, y: 1 / math.sqrt(1 + (distance(x, y) / 1.2) ** 2),
    ),
    "energy": (Energy(), lambda x, y: (norm(x) + norm(y) - distance(x, y)) / 2),
    "energy_1.5": (
        Energy(exponent=1.5),
        lambda x, y: (norm(x) ** 1.5 + norm(y) ** 1.5 - distance(x, y) ** 1.5) / 2,
    ),
    "polynomial": (Polynomial(), lambda x, y: (inner(x, y) / len(x) + 1) ** 3),
    "polynomial_1": (
        Polynomial(degree=1, scale=2.0, offset=0.5),
        lambda x, y: 2 * inner(x, y) + 0.5,
    ),
    "linear": (Linear(), inner),
    "sum": (
        SumKernel([Gaussian(0.5), Laplace(2.0), SumKernel([Gaussian(2.0), Linear()])], [1, 0.5, 2]),
        lambda x, y: (
            math.exp(-(distance(x, y) ** 2) / 0.5)
            + 0.5 * math.exp(-distance(x, y) / 2)
            + 2 * (math.exp(-(distance(x, y) ** 2) / 8) + inner(x, y))
        ),
    ),
}
STATIONARY = {
    "gaussian": Gaussian(0.7),
    "laplace": Laplace(1.3),
    "rational_quadratic": RationalQuadratic(alpha=0.4, bandwidth=1.7),
    "inverse_multiquadric": InverseMultiquadric(1.2),
    "sum": SumKernel([Gaussian(0.5), SumKernel([Laplace(2.0), Gaussian(3.0)])], [1.0, 2.0]),
}
ROUGH = {"laplace", "energy", "energy_1.5", "sum"}  # not twice differentiable at zero distance


@pytest.mark.parametrize("name", CASES)
class TestContract:
    def test_equals_formula(self, name):
        kernel, formula = CASES[name]
        x, y = randn(5, 3, seed=1), randn(4, 3, seed=2)
        y[1] = x[2]
        expected = [[formula(a, b) for b in y.tolist()] for a in x.tolist()]
        expected = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(kernel(x, y), expected, rtol=1e-13, atol=1e-13)

    def test_gram_is_symmetric_and_positive(self, name):
        kernel, _ = CASES[name]
        x = randn(40, 3, seed=3)
        gram = kernel(x, x)
        torch.testing.assert_close(gram, gram.T, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(kernel.diagonal(x), gram.diagonal(), rtol=1e-14, atol=1e-14)
        eigenvalues = torch.linalg.eigvalsh(gram)
        assert eigenvalues[0] > -1e-12 * eigenvalues[-1]

    def test_first_and_second_derivatives(self, name):
        kernel, _ = CASES[name]
        x, y = randn(3, 2, seed=4).requires_grad_(), randn(2, 2, seed=5).requires_grad_()
        assert torch.autograd.gradcheck(kernel, (x, y))
        assert torch.autograd.gradgradcheck(kernel, (x, y))
        assert torch.autograd.gradgradcheck(lambda x: kernel.diagonal(x) + kernel(x, x)[0], x)

    def test_derivatives_at_coincident_points(self, name):
        kernel, _ = CASES[name]
        x = randn(4, 3, seed=6) + 3.0
        y = torch.cat([x[1:3], torch.zeros(1, 3, dtype=x.dtype)]).requires_grad_()
        x = torch.cat([x, torch.zeros(1, 3, dtype=x.dtype)]).requires_grad_()
        if name not in ROUGH:
            assert torch.autograd.gradgradcheck(kernel, (x, y))
        cotangent = randn(5, 3, seed=7)
        first = torch.autograd.grad((kernel(x, y) * cotangent).sum(), (x, y), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (x, y))
        assert all(g.isfinite().all() and g.any() for g in first + second if name != "linear")
        # k(x_1, y_0), x_1 = y_0: a symmetric difference quotient is the derivative that we define.
        step = 1e-5 * torch.eye(3, dtype=x.dtype)
        up, down = x[1] + step, x[1] - step
        quotient = (kernel(up, y[:1]) - kernel(down, y[:1])) / 2e-5
        (gradient,) = torch.autograd.grad(kernel(x, y)[1, 0], x)
        torch.testing.assert_close(gradient[1], quotient[:, 0].detach(), rtol=1e-6, atol=1e-6)

    def test_float32_agrees_with_float64(self, name):
        kernel, _ = CASES[name]
        x, y = randn(30, 20, seed=8) + 100.0, randn(20, 20, seed=9) + 100.0
        y[:5] = x[:5]
        exact, rounded = kernel(x, y), kernel(x.float(), y.float())
        assert rounded.dtype == torch.float32
        # An inner product around zero is not translation invariant, so its values are large.
        scale = exact.abs().max()
        torch.testing.assert_close(rounded.double() / scale, exact / scale, rtol=0, atol=1e-4)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(kernel(x.float(), y.float()), rounded)

    def test_is_a_value(self, name):
        kernel, _ = CASES[name]
        copy = pickle.loads(pickle.dumps(kernel))
        assert copy == kernel
        assert hash(copy) == hash(kernel)
        assert eval(repr(kernel)) == kernel
        assert all(kernel != other for key, (other, _) in CASES.items() if key != name)

    def test_rejects_wrong_points(self, name):
        kernel, _ = CASES[name]
        with pytest.raises(ValueError, match=r"shapes \(n, d\) and \(m, d\), got \(3, 2\)"):
            kernel(torch.ones(3, 2), torch.ones(3, 4))
        with pytest.raises(ValueError, match="Flatten"):
            kernel(torch.ones(3, 2, 2), torch.ones(3, 2, 2))
        with pytest.raises(ValueError, match=r"torch\.float32 and torch\.float64"):
            kernel(torch.ones(3, 2, dtype=torch.float32), torch.ones(3, 2))

    def test_nan_is_not_hidden(self, name):
        kernel, _ = CASES[name]
        x = randn(3, 2, seed=10)
        x[1, 0] = math.nan
        assert kernel(x, x)[1].isnan().all()


@pytest.mark.parametrize("dim", [1, 2, 16, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coincident_points_have_distance_zero(dtype, dim):
    x = randn(60, dim, seed=11, dtype=dtype) * torch.logspace(-2, 2, 60, dtype=dtype)[:, None] + 7
    y = torch.cat([randn(9, dim, seed=12, dtype=dtype), x[20:50]])
    assert (Laplace()(x, y)[20:50, 9:].diagonal() == 1).all()
    # ... and nearby points do not: one part in a hundred is seen in both precisions.
    assert (Laplace()(x, x * 1.01) < 1).all()


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("name", STATIONARY)
def test_frequencies_follow_the_spectral_measure(name, dim):
    kernel, num = STATIONARY[name], 40_000
    frequencies = kernel.sample_frequencies(num, dim, torch.Generator().manual_seed(0))
    assert frequencies.shape == (num, dim)
    assert frequencies.dtype == torch.float64
    lags = torch.linspace(0.0, 4.0, 9, dtype=torch.float64)[:, None] * torch.ones(1, dim)
    lags = lags.double() / math.sqrt(dim)
    origin = torch.zeros(1, dim, dtype=torch.float64)
    expected = kernel(lags, origin)[:, 0] / kernel.diagonal(origin)
    cosines = (lags @ frequencies.T).cos()
    std_error = cosines.std(1) / math.sqrt(num)
    assert ((cosines.mean(1) - expected).abs() <= 5 * std_error + 1e-12).all()
    again = kernel.sample_frequencies(num, dim, torch.Generator().manual_seed(0))
    assert torch.equal(frequencies, again)
    other = kernel.sample_frequencies(num, dim, torch.Generator().manual_seed(1))
    assert not torch.equal(frequencies, other)


def test_sum_kernel_stratifies_its_frequencies():
    wide, narrow = Gaussian(1e6), Gaussian(1e-6)
    kernel = SumKernel([wide, narrow], weights=[1.0, 2.0])
    generator = torch.Generator().manual_seed(0)

    def count_narrow(num):
        return int((kernel.sample_frequencies(num, 1, generator).abs() > 1).sum())

    assert {count_narrow(30) for _ in range(20)} == {20}
    counts = torch.tensor([count_narrow(4) for _ in range(600)], dtype=torch.float64)
    assert set(counts.tolist()) == {2.0, 3.0}  # expected 8 / 3
    assert abs(counts.mean() - 8 / 3) < 5 * counts.std() / math.sqrt(600)


def test_only_stationary_kernels_have_frequencies():
    generator = torch.Generator()
    sums = (SumKernel([Energy(), Linear()]), SumKernel([Gaussian(), Linear()]))
    for kernel in (Energy(), Linear(), Polynomial(), *sums):
        with pytest.raises(TypeError, match="stationary kernel"):
            kernel.sample_frequencies(4, 2, generator)


def test_median_bandwidth():
    x = torch.tensor([[0.0], [1.0], [1.0], [4.0]], dtype=torch.float64)
    # Pairs: 1, 1, 4, (0 left out), 3, 3; the lower middle of 1, 1, 3, 3, 4 is 3.
    assert median_bandwidth(x) == 3.0
    assert median_bandwidth(x[:1], x[1:]) == 3.0
    assert median_bandwidth(torch.tensor([[0.0], [1.0], [5.0]])) == 4.0
    # Two standard normals in d dimensions: ||x - y||^2 / 2 is chi-squared, of median about d - 2/3.
    images = randn(600, 3, 4, 4, seed=13)
    assert median_bandwidth(images) == pytest.approx(math.sqrt(2 * (48 - 2 / 3)), rel=0.02)
    thinned = median_bandwidth(images, images + 0.01, max_samples=300)
    assert thinned == pytest.approx(median_bandwidth(images), rel=0.03)
    assert thinned != median_bandwidth(images, images + 0.01)
    half = torch.arange(4.0)[:, None]
    assert median_bandwidth(half, half + 100.0, max_samples=2) == 100.0


def test_median_bandwidth_rejects():
    for x in (torch.ones(1, 2), torch.ones(5, 2), torch.ones(0, 2)):
        with pytest.raises(ValueError, match="two distinct points"):
            median_bandwidth(x)
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(3, 4\)"):
        median_bandwidth(torch.ones(3, 2), torch.ones(3, 4))
    with pytest.raises(ValueError, match="max_samples >= 2, got 1"):
        median_bandwidth(torch.ones(3, 2), max_samples=1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Gaussian(0.0), "Gaussian needs a positive, finite bandwidth, got 0.0"),
        (lambda: Gaussian(math.inf), "finite bandwidth, got inf"),
        (lambda: Laplace(-1.0), "Laplace needs a positive"),
        (lambda: InverseMultiquadric(math.nan), "got nan"),
        (lambda: RationalQuadratic(alpha=-0.5), "positive, finite alpha"),
        (lambda: RationalQuadratic(bandwidth=-0.5), "positive, finite bandwidth"),
        (lambda: Energy(2.0), "strictly between 0 and 2, got 2.0"),
        (lambda: Polynomial(degree=0), "degree >= 1, got 0"),
        (lambda: Polynomial(degree=2.5), "integer degree"),  # type: ignore[arg-type]
        (lambda: Polynomial(scale=0.0), "positive, finite scale"),
        (lambda: Polynomial(offset=-1.0), "offset >= 0, got -1.0"),
        (lambda: SumKernel([]), "at least one kernel"),
        (lambda: SumKernel([Linear()], [1.0, 2.0]), "2 weights for 1 kernels"),
        (lambda: SumKernel([Linear()], [-1.0]), "weights >= 0"),
        (lambda: SumKernel([Linear()], [0.0]), "not all zero"),
    ],
)
def test_rejects_wrong_parameters(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_yaml_builds_kernels():
    parser = ArgumentParser()
    parser.add_argument("--kernel", type=Kernel)
    config = parser.parse_object(
        {
            "kernel": {
                "class_path": "lightning_mmd.kernels.SumKernel",
                "init_args": {
                    "kernels": [
                        {
                            "class_path": "lightning_mmd.kernels.RationalQuadratic",
                            "init_args": {"alpha": 0.2, "bandwidth": 3.0},
                        },
                        {
                            "class_path": "lightning_mmd.kernels.SumKernel",
                            "init_args": {
                                "kernels": [{"class_path": "lightning_mmd.kernels.Linear"}]
                            },
                        },
                    ],
                    "weights": [1.0, 0.5],
                },
            }
        }
    )
    built = parser.instantiate(config).kernel
    assert built == SumKernel([RationalQuadratic(0.2, 3.0), SumKernel([Linear()])], [1.0, 0.5])


@pytest.mark.parametrize("name", STATIONARY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_and_slopes_are_finite_at_extreme_points(name, dtype):
    kernel = STATIONARY[name]
    largest = min(torch.finfo(dtype).max / 4, 1e150)
    x = torch.tensor([[0.0], [1.0], [largest], [-largest]], dtype=dtype).requires_grad_()
    gram = kernel(x, x.detach())
    (slope,) = torch.autograd.grad(gram.sum(), x)
    assert gram.dtype == torch.promote_types(dtype, torch.float32)
    assert gram.isfinite().all()
    assert slope.isfinite().all()
    diagonal = kernel.diagonal(x.detach())
    assert torch.equal(gram.detach().diagonal(), diagonal)
    assert diagonal.dtype == gram.dtype
    if dtype != torch.float16:  # there 16376 is not so far
        assert (gram.detach()[2:, :2] < 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bandwidth", [1e-300, 1e-170, 1e-30, 1e30, 1e170, 1e300])
@pytest.mark.parametrize(
    "kernel", [Gaussian, Laplace, InverseMultiquadric, lambda b: RationalQuadratic(0.5, b)]
)
def test_values_are_finite_at_extreme_bandwidths(kernel, bandwidth, dtype):
    x = torch.tensor([[0.0], [1.0]], dtype=dtype).requires_grad_()
    gram = kernel(bandwidth)(x, x.detach())
    expected = torch.eye(2) if bandwidth < 1 else torch.ones(2, 2)
    torch.testing.assert_close(gram.detach().double(), expected, rtol=0, atol=1e-15)
    assert torch.autograd.grad(gram.sum(), x)[0].isfinite().all()


def test_half_precision_sums_do_not_overflow():
    """A column of products passed 65504 in float16."""
    x = torch.full((400, 1), 200.0, dtype=torch.float16)
    assert torch.equal(Gaussian()(x, x), torch.ones(400, 400, dtype=torch.float32))
    assert torch.equal(Energy()(x, x), torch.full((400, 400), 200.0, dtype=torch.float32))
    wide = torch.full((2, 4), 200.0, dtype=torch.float16)
    assert torch.equal(Linear()(wide, wide), torch.full((2, 2), 160000.0, dtype=torch.float32))
    assert torch.equal(Linear().diagonal(wide), torch.full((2,), 160000.0, dtype=torch.float32))


@pytest.mark.parametrize("offset", [1e4, 1e5])
def test_float32_distances_keep_the_digits_of_the_points(offset):
    """Two clusters at -offset and offset: those within one keep what x - y keeps."""
    x = torch.cat([randn(20, 3, seed=31) - offset, randn(20, 3, seed=32) + offset]).float()
    exact = (x.double()[:, None] - x.double()).square().sum(2)
    resolution = 4 * torch.finfo(torch.float64).eps * 3 * offset**2
    got = squared_distances(x, x).double()
    torch.testing.assert_close(got, exact, rtol=2e-7, atol=resolution)
    assert torch.equal(squared_distances(x, x).diagonal(), torch.zeros(40, dtype=torch.float32))


def test_median_bandwidth_says_what_is_wrong():
    with pytest.raises(ValueError, match="needs finite points"):
        median_bandwidth(torch.full((3, 2), math.nan))
    for kwargs in ({"x": numpy.ones((3, 2))}, {"x": torch.ones(3, 2), "y": numpy.ones((3, 2))}):
        with pytest.raises(TypeError, match="got ndarray"):
            median_bandwidth(**kwargs)
    with pytest.raises(TypeError, match="A kernel expects a tensor y, got ndarray"):
        Gaussian()(torch.ones(3, 2), numpy.ones((3, 2)))


def test_the_origin_matters_to_energy_where_masses_differ():
    """Moving everything changes the witness by (sum a - sum b) (||t + s|| - ||t||) / 2 + const."""
    x, y, t = randn(3, 2, seed=33), randn(4, 2, seed=34), randn(2, 2, seed=35)
    shift = torch.tensor([10.0, 0.0], dtype=torch.float64)

    def witness(s, mass):
        a = torch.full((3,), mass / 3, dtype=torch.float64)
        values = KernelWitness(x + s, y + s, Energy(), x_weights=a)(t + s)
        return values[0] - values[1]

    assert witness(shift, 1.0) == pytest.approx(witness(0.0, 1.0).item(), abs=1e-12)
    norms = (t + shift).norm(dim=1) - t.norm(dim=1)
    expected = 0.2 * (norms[0] - norms[1]) / 2
    moved = witness(shift, 1.2) - witness(0.0, 1.2)
    assert moved.item() == pytest.approx(expected.item(), abs=1e-12)
    assert abs(expected) > 1e-3
