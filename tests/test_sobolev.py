"""The negative Sobolev distance against closed forms and the supremum that defines it."""

import math

import pytest
import torch
from torch import Tensor

from lightning_mmd.features import RandomFourierFeatures
from lightning_mmd.kernels import Energy, Gaussian, Kernel, Laplace, Linear, Polynomial, SumKernel
from lightning_mmd.mmd import mmd2_biased
from lightning_mmd.sobolev import negative_sobolev_distance


class FeatureKernel(Kernel):
    """The kernel of an explicit feature map: a finite-dimensional RKHS."""

    def __init__(self, phi: RandomFourierFeatures) -> None:
        self.phi = phi

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.phi(x) @ self.phi(y).T

    def diagonal(self, x: Tensor) -> Tensor:
        return self.phi(x).square().sum(1)


def test_sobolev_distance_of_linear_functions() -> None:
    # H = {<w, .>}, ||grad||^2 = ||w||^2: S = ||mean x - mean y|| / sqrt(1 + regulariser).
    x, y = torch.randn(6, 3), torch.randn(4, 3)
    expected = float((x.mean(0) - y.mean(0)).norm())
    for regulariser in (1e-6, 0.1, 3.0):
        got = negative_sobolev_distance(x, y, Linear(), regulariser=regulariser)
        assert got == pytest.approx(expected / math.sqrt(1 + regulariser), rel=1e-7)


def test_sobolev_distance_of_quadratics_in_one_dimension() -> None:
    # (x y + 1)^2 = <(1, sqrt2 x, x^2), ...>: D = mean of phi'(y) phi'(y)^T, solved by hand.
    x, y, regulariser = torch.randn(8, 1), torch.randn(5, 1), 0.05
    phi = lambda t: torch.cat([torch.ones_like(t), math.sqrt(2) * t, t**2], 1)  # noqa: E731
    slopes = torch.cat([torch.zeros_like(y), torch.full_like(y, math.sqrt(2)), 2 * y], 1)
    gap = phi(x).mean(0) - phi(y).mean(0)
    metric = slopes.T @ slopes / 5 + regulariser * torch.eye(3)
    expected = float((gap @ torch.linalg.solve(metric, gap)).sqrt())
    kernel = Polynomial(degree=2, scale=1.0, offset=1.0)
    got = negative_sobolev_distance(x, y, kernel, regulariser=regulariser)
    assert got == pytest.approx(expected, rel=1e-10)


def test_sobolev_distance_is_the_supremum_in_a_finite_feature_space() -> None:
    phi = RandomFourierFeatures(Gaussian(), in_features=2, num_features=12)
    x, y, regulariser = torch.randn(9, 2), torch.randn(7, 2), 0.02
    gap = phi(x).mean(0) - phi(y).mean(0)
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda t: phi(t[None])[0], point) for point in y]
    )  # (m, r, d)
    metric = torch.einsum("jri,jsi->rs", jacobians, jacobians) / 7 + regulariser * torch.eye(12)
    got = negative_sobolev_distance(x, y, FeatureKernel(phi), regulariser=regulariser)
    best = torch.linalg.solve(metric, gap)
    attained = (best @ gap).abs() / (best @ metric @ best).sqrt()
    assert got == pytest.approx(float(attained), rel=1e-9)
    candidates = best + 0.3 * best.norm() * torch.randn(500, 12)  # no other g does better
    norms = torch.einsum("kr,rs,ks->k", candidates, metric, candidates).sqrt()
    assert float(((candidates @ gap).abs() / norms).max()) < got


def test_sobolev_distance_grows_to_its_limit_where_the_witness_has_slope() -> None:
    # A particle that sees the target: finite S. One at a critical point of f: MMD / sqrt(epsilon).
    x, kernel = torch.tensor([[-1.0], [1.0]]), Gaussian(1.0)
    ratio = {}
    for name, y in (("sees", torch.tensor([[0.5], [-1.0]])), ("stuck", torch.zeros(1, 1))):
        mmd = float(mmd2_biased(x, y, kernel).sqrt())
        got = negative_sobolev_distance(x, y, kernel, regulariser=1e-4)
        ratio[name] = got / (mmd / 1e-2)
    assert ratio["stuck"] == pytest.approx(1.0, abs=1e-9)
    assert 0.0 < ratio["sees"] < 0.9


def test_sobolev_distance_refuses_wrong_arguments() -> None:
    x = torch.ones(2, 2)
    with pytest.raises(ValueError, match="regulariser > 0"):
        negative_sobolev_distance(x, x, Gaussian(), regulariser=0.0)
    with pytest.raises(ValueError, match="flatten"):
        negative_sobolev_distance(torch.ones(2, 2, 2), x, Gaussian())


class Rough(Kernel):
    """The Laplace kernel, by somebody who did not say that it has no second derivative."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return Laplace(1.0)(x, y)

    def diagonal(self, x: Tensor) -> Tensor:
        return Laplace(1.0).diagonal(x)


def test_sobolev_distance_refuses_rough_kernels() -> None:
    """It was 0, which reads as "the plain flow can converge"."""
    x = torch.randn(20, 2)
    for kernel in (Laplace(1.0), Energy(), SumKernel([Gaussian(), SumKernel([Laplace()])])):
        with pytest.raises(TypeError, match="two derivatives at distance 0"):
            negative_sobolev_distance(x, x + 0.5, kernel)
    with pytest.raises(ValueError, match="Use a smooth kernel"):
        negative_sobolev_distance(x, x + 0.5, Rough())
    smooth = SumKernel([Gaussian(), Laplace()], weights=[1.0, 0.0])
    expected = negative_sobolev_distance(x, x + 0.5, Gaussian())
    assert negative_sobolev_distance(x, x + 0.5, smooth) == pytest.approx(expected, rel=1e-12)


def test_sobolev_distance_refuses_samples_without_a_distance() -> None:
    x = torch.randn(5, 2)
    bad = x.clone()
    bad[0, 0] = math.nan
    for samples in ((x, bad), (bad, x)):
        with pytest.raises(ValueError, match="finite kernel values"):
            negative_sobolev_distance(*samples, Gaussian())
    for samples in ((x, x[:0]), (x[:0], x)):
        with pytest.raises(ValueError, match="n, m >= 1"):
            negative_sobolev_distance(*samples, Gaussian())
    with pytest.raises(TypeError, match="got ndarray"):
        negative_sobolev_distance(x, x.numpy(), Gaussian())
