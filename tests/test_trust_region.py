import math
from itertools import pairwise

import pytest
import torch

from lightning_mmd import TrustRegion


@pytest.mark.parametrize(
    ("realised", "kept", "trust", "damping"),
    [
        (1.0, True, 1.2, 1 / 1.5),
        (0.76, True, 1.2, 1 / 1.5),
        (0.74, True, 1.0, 1.0),
        (0.26, True, 1.0, 1.0),
        (0.24, True, 0.7, 1.5),
        (0.0, True, 0.7, 1.5),
        (-0.01, False, 0.5, 1.5),
        (math.nan, False, 0.5, 1.5),
        (math.inf, False, 0.5, 1.5),
    ],
)
def test_the_rule(realised, kept, trust, damping):
    control = TrustRegion()
    assert control.judge(3 * realised, 3.0, 2.0) is kept
    assert (control.trust, control.damping) == pytest.approx((trust, damping))


def test_a_step_beyond_the_model_is_too_long():
    """Past twice the minimum of the model it predicts a rise: a ratio of two rises is no gain."""
    control = TrustRegion()
    assert not control.judge(-1.0, -1.0, 2.0)
    assert control.trust == 0.5
    assert control.judge(1.0, -1.0, 2.0)
    assert control.trust == pytest.approx(0.35)


def test_the_factors_stay_in_their_ranges():
    control = TrustRegion()
    control.trust = 4.0
    control.judge(1.0, 1.0, 1.5)
    assert control.trust == 1.5
    for _ in range(60):
        control.judge(0.1, 1.0, 1.5)
    assert control.damping == 1e3
    for _ in range(200):
        control.judge(1.0, 1.0, 1.5)
    assert (control.trust, control.damping) == (1.5, 1e-3)


@pytest.mark.parametrize("start", [1e-3, 1.0, 1e3])
def test_least_squares_converge_from_any_start(start):
    """Damped Gauss-Newton on m(theta) = (theta, 10 e^(theta - 1)): F falls from any first step."""
    theta, control = 3.0, TrustRegion()
    control.trust = min(start, 4.0)

    def gap(value):
        return torch.tensor([1.0 - value, 10 - 10 * math.exp(value - 1.0)], dtype=torch.float64)

    energies = []
    for _ in range(120):
        delta, jacobian = gap(theta), torch.tensor([1.0, 10 * math.exp(theta - 1.0)]).double()
        gramian = torch.outer(jacobian, jacobian)
        damped = gramian + control.damping * start * torch.eye(2)
        w = torch.linalg.solve(damped, delta)
        image, step = gramian @ w, control.trust
        proposal = theta + step * float(jacobian @ w)
        modelled = step * delta @ image - step**2 * image @ image / 2
        realised = (delta @ delta - gap(proposal) @ gap(proposal)) / 2
        energies.append(float(delta @ delta) / 2)
        if control.judge(float(realised), float(modelled), 1.0):
            theta = proposal
    assert all(b <= a for a, b in pairwise(energies))
    assert energies[-1] < 1e-10
    assert theta == pytest.approx(1.0)


@pytest.mark.parametrize("largest_eta", [0.0, -1.0, math.inf, math.nan])
def test_bad_arguments_are_named(largest_eta):
    with pytest.raises(ValueError, match="TrustRegion needs largest_eta > 0"):
        TrustRegion(largest_eta)
