"""A parameter that no derivative reaches is named; a layer with one derivative is refused."""

import functools

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lightning_mmd import (
    input_gradient_penalty,
    parametric_gradient,
    parametric_gradient_penalty,
    solve_witness,
)
from lightning_mmd.critic_warnings import SigmoidCriticWarning
from lightning_mmd.passes import copy_network


class Positions(nn.Module):
    """TransGAN's way: registered parameters, used through a plain list."""

    def __init__(self, registered):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.position = nn.Parameter(torch.randn(4))
        kinds = {list: [self.position], "ParameterList": nn.ParameterList([self.position])}
        self.positions = kinds[registered]

    def forward(self, z):
        return self.layer(z) * self.positions[0]


class Partial(nn.Module):
    """A parameter that is used both ways: a part of its gradient would be missing."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 4), nn.Parameter(torch.randn(4))
        self.function = functools.partial(torch.mul, self.scale)

    def forward(self, z):
        return self.function(self.layer(z)) + self.scale


class Closure(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 4), nn.Parameter(torch.randn(4))
        scale = self.scale
        self.function = lambda x: x * scale

    def forward(self, z):
        return self.function(self.layer(z))


def test_what_is_not_reached_is_named_and_the_cure_works():
    z, critic = torch.randn(5, 3), nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))
    for generator, name in (
        (Positions(list), "position"),
        (Partial(), "scale"),
        (Closure(), "scale"),
    ):
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"parameters \['{name}'\].*ParameterList"):
                parametric_gradient(critic, generator, z)
        for p in generator.parameters():
            p.requires_grad_(False)  # toggled off, as while the critic is trained
        with pytest.raises(ValueError, match=rf"\['{name}'\]"):
            parametric_gradient_penalty(critic, generator, z)
        assert not any(p.requires_grad for p in generator.parameters())
    generator = Positions("ParameterList")
    found = parametric_gradient(critic, generator, z)
    expected = torch.autograd.grad(critic(generator(z)).mean(), list(generator.parameters()))
    expected = torch.cat([g.flatten() for g in expected])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_generator_that_is_not_repeatable_is_not_accused():
    class Counting(nn.Linear):
        calls = 0

        def forward(self, z):
            self.calls += 1
            return super().forward(z) * self.calls

    generator = Counting(3, 4)
    found = parametric_gradient(lambda x: x.sum(1), generator, torch.ones(2, 3))
    assert found.shape == (16,)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, w = ctx.saved_tensors
        return gradient @ w.T, x.T @ gradient


class LastLayer(nn.Module):
    def __init__(self, num=1):
        super().__init__()
        self.first, self.w = (
            nn.Sequential(nn.Linear(4, 5), nn.Tanh()),
            nn.Parameter(torch.randn(5, num)),
        )

    def forward(self, x):
        return Once.apply(self.first(x), self.w)


@pytest.mark.parametrize("method", ["forward", "double_backward"])
def test_a_once_differentiable_last_layer_is_refused(method):
    with pytest.raises(RuntimeError, match="once_differentiable has no second derivative"):
        parametric_gradient_penalty(LastLayer(), nn.Linear(3, 4), torch.randn(5, 3), method)


def test_it_is_refused_as_features_and_by_the_input_gradient_penalty():
    with pytest.raises(RuntimeError, match="once_differentiable has no second derivative"):
        input_gradient_penalty(LastLayer(), torch.randn(5, 4))
    with pytest.raises(RuntimeError, match="once_differentiable has no second derivative"):
        solve_witness(LastLayer(6), nn.Linear(3, 4), torch.randn(5, 3), torch.ones(6))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()),
        lambda: lambda x: torch.sigmoid(x.sum(1)),
        lambda: lambda x: torch.sigmoid(x.sum(1)).view(-1, 1).squeeze(1),
    ],
)
def test_a_penalised_critic_that_ends_in_a_sigmoid_is_warned_of(make):
    critic = make()
    z, generator = torch.randn(5, 3), nn.Linear(3, 4)
    with pytest.warns(SigmoidCriticWarning, match=r"critic_values=torch\.logit"):
        parametric_gradient_penalty(critic, generator, z)
    parametric_gradient_penalty(lambda x: torch.logit(critic(x)), generator, z)  # the cure
    parametric_gradient_penalty(lambda x: critic(x) * x.sum(1).view_as(critic(x)), generator, z)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_networks_with_computed_weights_are_copied():
    network = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.BatchNorm1d(4))
    z = torch.randn(5, 3)
    network(z)
    twin = copy_network(network)
    assert torch.equal(twin.eval()(z), network.eval()(z))
    assert {id(p) for p in twin.parameters()}.isdisjoint(id(p) for p in network.parameters())
    assert not network[0].weight.is_leaf  # as it was
    with torch.no_grad():
        twin[0].weight_g.mul_(2)
    assert not torch.equal(twin(z), network(z))
