"""KernelWitness: definition by loops, finite differences, the reproducing property, blocks."""

import pytest
import torch

from lightning_mmd.features import RandomFourierFeatures
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
)
from lightning_mmd.mmd import mmd2_biased

KERNELS = [
    Gaussian(0.7),
    Laplace(1.3),
    RationalQuadratic(0.5, 1.1),
    InverseMultiquadric(0.9),
    Energy(),
    Polynomial(),
    Linear(),
    SumKernel([Gaussian(0.5), Linear()], weights=[2.0, 0.5]),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
def test_values_and_gradients_follow_the_definition(kernel: Kernel) -> None:
    x, y, points = torch.randn(5, 3), torch.randn(4, 3) + 1, torch.randn(6, 3)
    a, b = torch.rand(5), torch.rand(4)
    witness = KernelWitness(x, y, kernel, x_weights=a, y_weights=b)

    def value(t: torch.Tensor) -> float:
        positive = sum(a[i] * kernel(x[i : i + 1], t[None]).item() for i in range(5))
        negative = sum(b[j] * kernel(y[j : j + 1], t[None]).item() for j in range(4))
        return float(positive - negative)

    expected = torch.tensor([value(t) for t in points])
    torch.testing.assert_close(witness(points), expected, rtol=0, atol=1e-12)
    h = 1e-5
    slopes = torch.tensor(
        [[(value(t + h * e) - value(t - h * e)) / (2 * h) for e in torch.eye(3)] for t in points]
    )
    torch.testing.assert_close(witness.gradient(points), slopes, rtol=0, atol=2e-9)


def test_default_weights_make_it_the_gradient_of_half_mmd2() -> None:
    # d/dy_j of MMD^2 / 2 = -grad f(y_j) / m, the sign of every flow in the package.
    x, y, kernel = torch.randn(7, 2), torch.randn(5, 2), Gaussian(1.2)
    y.requires_grad_()
    (slope,) = torch.autograd.grad(0.5 * mmd2_biased(x, y, kernel), y)
    gradient = KernelWitness(x, y.detach(), kernel).gradient(y)
    torch.testing.assert_close(-gradient / 5, slope, rtol=0, atol=1e-14)
    assert not gradient.requires_grad


def test_mean_difference_of_values_is_mmd2() -> None:
    x, y, kernel = torch.randn(7, 2), torch.randn(5, 2), RationalQuadratic()
    witness = KernelWitness(x, y, kernel)
    gap = witness(x).mean() - witness(y).mean()
    torch.testing.assert_close(gap, mmd2_biased(x, y, kernel), rtol=0, atol=1e-14)


def test_random_features_approach_it_like_the_inverse_root_of_their_number() -> None:
    x, y, points, kernel = (
        torch.randn(20, 2),
        torch.randn(30, 2) + 1,
        torch.randn(40, 2),
        Gaussian(),
    )
    exact = KernelWitness(x, y, kernel)(points)

    def error(num: int) -> float:
        squared = []
        for seed in range(20):
            phi = RandomFourierFeatures(kernel, 2, num, seed)
            approximate = phi(points) @ (phi(x).mean(0) - phi(y).mean(0))
            squared.append(float((approximate - exact).square().mean()))
        return (sum(squared) / len(squared)) ** 0.5

    assert error(64) / error(1024) == pytest.approx(4.0, rel=0.3)


@pytest.mark.parametrize("block_size", [1, 3, 5, 100])
def test_blocks_do_not_matter(block_size: int) -> None:
    x, y, points, kernel = torch.randn(5, 2), torch.randn(7, 2), torch.randn(4, 2), Gaussian()
    whole = KernelWitness(x, y, kernel)
    blocked = KernelWitness(x, y, kernel, block_size=block_size)
    torch.testing.assert_close(blocked(points), whole(points), rtol=0, atol=1e-15)
    torch.testing.assert_close(blocked.gradient(points), whole.gradient(points), rtol=0, atol=1e-15)


def test_values_are_differentiable_in_the_points() -> None:
    x, y = torch.randn(5, 2), torch.randn(7, 2)
    points = torch.randn(4, 2, requires_grad=True)
    witness = KernelWitness(x, y, Gaussian(), block_size=3)
    (gradient,) = torch.autograd.grad(witness(points).sum(), points)
    torch.testing.assert_close(gradient, witness.gradient(points), rtol=0, atol=1e-15)
    with torch.no_grad():
        torch.testing.assert_close(gradient, witness.gradient(points), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.ones(0, 2), {}, "n >= 1"),
        (torch.ones(3, 2, 2), {}, r"x\.flatten\(1\)"),
        (torch.ones(3, 2), {"x_weights": torch.ones(2)}, "one weight for each of the 3 points x"),
        (
            torch.ones(3, 2),
            {"y_weights": torch.ones(4, 1)},
            "one weight for each of the 4 points y",
        ),
        (torch.ones(3, 2), {"block_size": 0}, "block_size >= 1"),
    ],
)
def test_wrong_arguments_are_refused(x: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelWitness(x, torch.ones(4, 2), Gaussian(), **options)


def test_half_precision_witness_is_computed_in_float32() -> None:
    x = torch.full((400, 1), 200.0, dtype=torch.float16)
    y = torch.full((300, 1), 199.0, dtype=torch.float16)
    witness = KernelWitness(x, y, Gaussian(2.0))
    exact = KernelWitness(x.double(), y.double(), Gaussian(2.0))
    t = torch.tensor([[198.0], [200.0]], dtype=torch.float16)
    assert witness(t).dtype == torch.float32
    torch.testing.assert_close(witness(t).double(), exact(t.double()), rtol=1e-5, atol=1e-6)
    gradient = witness.gradient(t)
    assert gradient.dtype == torch.float16
    torch.testing.assert_close(gradient.double(), exact.gradient(t.double()), rtol=1e-3, atol=1e-5)


def test_witness_refuses_arrays() -> None:
    x = torch.ones(3, 2)
    with pytest.raises(TypeError, match=r"got ndarray\. Convert it: torch\.as_tensor\(y\)"):
        KernelWitness(x, x.numpy(), Gaussian())
    with pytest.raises(TypeError, match="x_weights, got ndarray"):
        KernelWitness(x, x, Gaussian(), x_weights=torch.ones(3).numpy())
    for evaluate in (KernelWitness(x, x, Gaussian()), KernelWitness(x, x, Gaussian()).gradient):
        with pytest.raises(TypeError, match="points, got ndarray"):
            evaluate(x.numpy())
