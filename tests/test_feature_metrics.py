"""Scores in features: formulas in float64, brute force, two processes against one."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from lightning_mmd import FeatureMetrics, Polynomial, mmd2_unbiased
from lightning_mmd.metrics import MaximumMeanDiscrepancy


def draw(num, dim, seed=0, shift=0.0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num, dim, generator=generator, dtype=torch.float64) + shift


def scores(real, fake, **kwargs):
    metrics = FeatureMetrics(nn.Identity(), **kwargs)
    metrics.update(real, real=True)
    metrics.update(fake, real=False)
    return metrics.compute()


def test_fid_is_the_formula():
    real, fake = draw(3000, 4), draw(2500, 4, 1, shift=0.5, scale=1.5)
    cov_r, cov_f = torch.cov(real.T), torch.cov(fake.T)
    values, vectors = torch.linalg.eigh(cov_r)
    root = vectors @ values.sqrt().diag() @ vectors.T  # tr (C_r C_f)^(1/2) by a symmetric matrix
    cross = torch.linalg.eigvalsh(root @ cov_f @ root).sqrt().sum()
    gap = (real.mean(0) - fake.mean(0)).square().sum()
    expected = gap + cov_r.trace() + cov_f.trace() - 2 * cross
    assert float(scores(real, fake)["fid"]) == pytest.approx(float(expected), rel=1e-8)


def test_fid_of_gaussians_tends_to_that_of_their_laws():
    real, fake = draw(40_000, 2), draw(40_000, 2, 1, shift=1.0, scale=2.0)
    population = 2 * 1.0**2 + 2 * (2.0 - 1.0) ** 2
    assert float(scores(real, fake, neighbours=None)["fid"]) == pytest.approx(population, rel=0.03)


def test_kid_of_one_whole_subset_is_unbiased_mmd2_under_its_kernel():
    real, fake = draw(60, 5), draw(60, 5, 1, shift=0.3)
    result = scores(real, fake, subsets=3, subset_size=60)
    kernel = Polynomial(degree=3, offset=1.0, scale=1 / 5)
    expected = mmd2_unbiased(real, fake, kernel)
    assert float(result["kid"]) == pytest.approx(float(expected), rel=1e-10)
    assert float(result["kid_std"]) == pytest.approx(0.0, abs=1e-10)


def test_kid_is_drawn_from_its_seed_alone():
    real, fake = draw(100, 5), draw(100, 5, 1, shift=0.3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = scores(real, fake, subset_size=20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert scores(real, fake, subset_size=20)["kid"] == one["kid"]
    assert scores(real, fake, subset_size=20, seed=1)["kid"] != one["kid"]


def test_precision_and_recall_by_brute_force():
    real, fake = draw(40, 3), draw(50, 3, 1, shift=0.8)

    def inside(points, others, k=2):
        radii = [sorted((o - x).norm() for x in others)[k] for o in others]  # itself is first
        covered = [
            any((p - o).norm() <= r for o, r in zip(others, radii, strict=True)) for p in points
        ]
        return sum(covered) / len(points)

    result = scores(real, fake, neighbours=2)
    assert float(result["precision"]) == pytest.approx(inside(fake, real), abs=1e-6)
    assert float(result["recall"]) == pytest.approx(inside(real, fake), abs=1e-6)
    assert 0.05 < result["precision"] < 0.95


def test_few_samples_give_no_fid():
    assert "fid" not in scores(draw(100, 3), draw(3000, 3))
    assert "fid" in scores(draw(100, 3), draw(100, 3, 1), min_fid_samples=100)


def test_the_floor_leaves_the_generated_side_alone():
    metrics = FeatureMetrics(nn.Identity(), subset_size=50)
    metrics.update(draw(50, 3), real=True)
    metrics.update(draw(50, 3, 1, shift=2.0), real=False)
    value = metrics.compute()["kid"]
    floor = metrics.floor(draw(50, 3, 2))["kid"]
    metrics._computed = None  # torchmetrics keeps a value until the next update
    assert metrics.compute()["kid"] == value
    assert abs(float(floor)) < 0.1 * float(value)


class Embedding(nn.Module):
    """A network that dropout would change."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))

    def forward(self, x):
        return self.layers(x)


def test_the_network_is_used_in_evaluation_mode_and_is_no_submodule():
    network = Embedding().double()
    metrics = FeatureMetrics(network, subset_size=30)
    metrics.update(draw(30, 4), real=True)
    metrics.update(draw(30, 4), real=False)
    assert float(metrics.compute()["precision"]) == 1.0  # equal samples, equal features
    assert network.training
    assert not list(metrics.parameters())
    assert not metrics.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": "inception"}, "a torch.nn.Module, got 'inception'"),
        ({"subsets": 0}, "subsets must be at least 1, got 0"),
        ({"subset_size": 1}, "subset_size must be at least 2, got 1"),
        ({"neighbours": 0}, "neighbours must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        FeatureMetrics(**({"features": nn.Identity()} | arguments))


def test_too_few_samples_are_named():
    metrics = FeatureMetrics(nn.Identity())
    metrics.update(draw(3, 2), real=True)
    metrics.update(draw(9, 2), real=False)
    with pytest.raises(ValueError, match="at least 4 samples on each side, got 3 real and 9"):
        metrics.compute()


def _score_on_a_process(rank, size, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=size)
    real, fake = draw(61, 3), draw(40, 3, 1, shift=0.4)
    metrics = FeatureMetrics(nn.Identity(), subset_size=40, min_fid_samples=30)
    metrics.update(real[rank::size], real=True)
    metrics.update(fake[rank::size], real=False)
    if rank == 0:
        torch.save(metrics.compute(), f"{path}/scores.pt")
    else:
        metrics.compute()
    dist.destroy_process_group()


def test_two_processes_score_as_one(tmp_path):
    mp.spawn(_score_on_a_process, args=(2, str(tmp_path)), nprocs=2)
    together = torch.load(tmp_path / "scores.pt", weights_only=True)
    order = [0, 1]
    real, fake = draw(61, 3), draw(40, 3, 1, shift=0.4)
    real = torch.cat([real[r::2] for r in order])
    fake = torch.cat([fake[r::2] for r in order])
    alone = scores(real, fake, subset_size=40, min_fid_samples=30)
    for name, value in alone.items():
        assert float(together[name]) == pytest.approx(float(value), rel=1e-9, abs=1e-12), name


def test_mmd2_under_a_characteristic_kernel_sees_what_mean_and_covariance_do_not():
    """What FID cannot see: two laws of equal moments; why tables give more than FID."""
    n = 4000
    signs = torch.randint(0, 2, (n, 1), generator=torch.Generator().manual_seed(0)).double()
    real, fake = draw(n, 1), 2 * signs - 1  # standard normal, and a fair coin
    result = scores(real, fake, neighbours=None)
    kernel_metric = MaximumMeanDiscrepancy(kernel=Polynomial(degree=4, offset=1.0, scale=1.0))
    kernel_metric.update(real, real=True)
    kernel_metric.update(fake, real=False)
    assert float(result["fid"]) < 0.01
    assert float(kernel_metric.compute()) == pytest.approx((3 - 1) ** 2, rel=0.25)
    assert math.isfinite(float(result["kid"]))
