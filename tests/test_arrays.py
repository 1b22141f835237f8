"""NumPy arrays, and lists, where tensors are expected: a TypeError whose cure works."""

import re

import pytest
import torch
from torch import nn

from lightning_mmd import (
    MMDGAN,
    FeatureMetrics,
    Gaussian,
    LearnedKernelCritic,
    MaximumMeanDiscrepancy,
    generator_flow,
    input_gradient_penalty,
    kernel_gan_flow,
    parametric_gradient_penalty,
    point_flow,
    solve_witness,
    step_halving,
)
from lightning_mmd.halving import compare_halvings

GAME = {"norm_weight": 1.0, "critic_lr": 0.1, "generator_lr": 0.1, "num_steps": 1}
FLOW = {"alpha": 1.0, "beta": 0.1, "step_size": 0.1, "num_steps": 0}


def points(**given):
    return {"initial": torch.ones(3, 2), "target": torch.zeros(4, 2)} | given


def witness(**given):
    arguments = {"gap": torch.ones(5), "initial": None} | given
    return solve_witness(nn.Linear(3, 5), nn.Linear(2, 3), torch.randn(8, 2), **arguments)


def halvings(**given):
    curve = {"axis": torch.arange(3.0), "metric": torch.arange(3.0)} | given
    return compare_halvings([[(curve["axis"], curve["metric"])]] * 3)


CASES = {
    "initial of point_flow": lambda v: point_flow(
        **points(initial=v(torch.ones(3, 2))), kernel=Gaussian(), step_size=0.1, num_steps=1
    ),
    "target of point_flow": lambda v: point_flow(
        **points(target=v(torch.ones(3, 2))), kernel=Gaussian(), step_size=0.1, num_steps=1
    ),
    "initial of kernel_gan_flow": lambda v: kernel_gan_flow(
        **points(initial=v(torch.ones(3, 2))), kernel=Gaussian(), **GAME
    ),
    "target of kernel_gan_flow": lambda v: kernel_gan_flow(
        **points(target=v(torch.ones(3, 2))), kernel=Gaussian(), **GAME
    ),
    "point_weights": lambda v: kernel_gan_flow(
        **points(), kernel=Gaussian(), point_weights=v(torch.ones(3)), **GAME
    ),
    "target_embedding": lambda v: generator_flow(
        nn.Linear(2, 3), torch.ones(4, 2), lambda x: x, v(torch.ones(3)), **FLOW
    ),
    "gap": lambda v: witness(gap=v(torch.ones(5))),
    "initial of solve_witness": lambda v: witness(initial=v(torch.ones(5))),
    "metric of a run": lambda v: step_halving(
        lambda step_size, num_steps, seed: v(torch.arange(num_steps + 1.0)),
        step_size=1.0,
        num_steps=2,
    ),
    "axis": lambda v: halvings(axis=v(torch.arange(3.0))),
    "metric": lambda v: halvings(metric=v(torch.arange(3.0))),
    "z of parametric_gradient_penalty": lambda v: parametric_gradient_penalty(
        nn.Linear(3, 1), nn.Linear(2, 3), v(torch.ones(4, 2))
    ),
    "real of input_gradient_penalty": lambda v: input_gradient_penalty(
        nn.Linear(3, 1), v(torch.ones(4, 3))
    ),
    "fake of input_gradient_penalty": lambda v: input_gradient_penalty(
        nn.Linear(3, 1), torch.zeros(4, 3), v(torch.ones(4, 3))
    ),
    "latents of sample": lambda v: MMDGAN(
        nn.Linear(2, 3), LearnedKernelCritic(nn.Linear(3, 4), 4), latents=2
    ).sample(4, v(torch.ones(4, 2))),
    "samples of FeatureMetrics": lambda v: FeatureMetrics(nn.Flatten()).update(
        v(torch.ones(4, 2)), real=True
    ),
    "samples": lambda v: MaximumMeanDiscrepancy(Gaussian()).update(v(torch.ones(3, 2)), real=True),
}


@pytest.mark.parametrize("convert", [lambda t: t.numpy(), lambda t: t.tolist()])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:the witness has a relative residual")
def test_arrays_and_lists_are_refused_with_a_cure(name, convert):
    with pytest.raises(TypeError, match=r"got (ndarray|list)") as error:
        CASES[name](convert)
    argument = re.search(r"torch\.as_tensor\((\w+)\)", str(error.value))
    assert argument
    assert argument[1] in name
    CASES[name](lambda t: torch.as_tensor(convert(t)))  # the cure


def test_curves_of_a_diverged_training_are_no_verdict():
    """NaN compares as false, which read as "no limit"."""
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="finite values, got NaN or infinity"):
            halvings(metric=torch.tensor([0.0, 1.0, bad]))


def test_a_game_without_points_is_refused():
    for given in (points(initial=torch.ones(0, 2)), points(target=torch.ones(0, 2))):
        with pytest.raises(ValueError, match="at least one point, got none"):
            kernel_gan_flow(**given, kernel=Gaussian(), **GAME)
