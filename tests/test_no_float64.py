"""Devices without float64, such as Apple's MPS, emulated: whatever widens float32 fails."""

import pytest
import torch
from tiny import NoDouble
from torch import nn

from lightning_mmd import (
    Energy,
    Gaussian,
    KernelWitness,
    Laplace,
    Linear,
    mmd2_biased,
    mmd2_features,
    mmd2_unbiased,
    mmd2_with_error,
    relative_similarity_test,
    solve_witness,
    two_sample_test,
)
from lightning_mmd.kernels import median_bandwidth
from lightning_mmd.wide import has_float64


def samples(num):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(num, 40, 2, generator=generator, dtype=torch.float32)
    return [points + shift for points, shift in zip(drawn, (0.0, 1.0, 0.4), strict=False)]


def witness():
    torch.manual_seed(0)
    features, generator = nn.Linear(3, 5).float(), nn.Linear(2, 3).float()
    z, gap = torch.randn(8, 2, dtype=torch.float32), torch.randn(5, dtype=torch.float32)
    options = {"tolerance": 1e-4, "max_iterations": 30}
    return solve_witness(features, generator, z, gap, alpha=1.0, beta=0.3, **options).weights


CASES = {
    **{
        f"mmd2_{name} of {type(kernel).__name__}": lambda e=estimator, k=kernel: e(*samples(2), k)
        for name, estimator in (("unbiased", mmd2_unbiased), ("biased", mmd2_biased))
        for kernel in (Gaussian(), Laplace(), Energy(), Linear())
    },
    "mmd2_features": lambda: mmd2_features(*samples(2), unbiased=True),
    "mmd2_with_error": lambda: torch.tensor(
        list(vars(mmd2_with_error(*samples(2), Gaussian())).values()), dtype=torch.float32
    ),
    "two_sample_test": lambda: torch.tensor(
        two_sample_test(
            *samples(2), Gaussian(), generator=torch.Generator().manual_seed(0)
        ).p_value,
        dtype=torch.float32,
    ),
    "relative_similarity_test": lambda: torch.tensor(
        list(vars(relative_similarity_test(*samples(3), Gaussian())).values()),
        dtype=torch.float32,
    ),
    "median_bandwidth": lambda: torch.tensor(median_bandwidth(*samples(2)), dtype=torch.float32),
    "KernelWitness": lambda: KernelWitness(*samples(2), Gaussian()).gradient(samples(1)[0]),
    "solve_witness": witness,
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers_come_out_in_float32(name):
    expected = CASES[name]()
    assert has_float64(torch.device("cpu"))
    with NoDouble():
        assert not has_float64(torch.device("cpu"))
        got = CASES[name]()
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-6)
