"""The package's networks: smooth, without batch statistics, and alive in every parameter."""

import pytest
import torch
from torch import nn

from lightning_mmd.networks import (
    ConvFeatures,
    ConvGenerator,
    DoublingConv2d,
    MLPFeatures,
    MLPGenerator,
)
from lightning_mmd.pushforward import Pushforward

SIZES = [(1, 8, 8), (1, 16, 16), (1, 28, 28), (3, 32, 32), (1, 32, 32), (3, 8, 8), (3, 12, 20)]
SMOOTH = (nn.SiLU, nn.Tanh)
LINEAR = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.Flatten, nn.Unflatten, nn.Sequential)


def generators():
    return [
        *((lambda s=s: ConvGenerator(s, 5, (8, 6, 4)), (5,), s) for s in SIZES),
        (lambda: ConvGenerator((1, 8, 8)), (32,), (1, 8, 8)),
        (lambda: ConvGenerator((1, 7, 9), 5, (6,)), (5,), (1, 7, 9)),
        (MLPGenerator, (8,), (2,)),
        (lambda: MLPGenerator(3, 5, hidden=()), (5,), (3,)),
    ]


def features():
    return [
        *((lambda s=s: ConvFeatures(s, 7, (8, 6)), s, (7,)) for s in SIZES),
        (lambda: ConvFeatures((1, 8, 8)), (1, 8, 8), (256,)),
        (lambda: ConvFeatures((2, 5, 3), 7), (2, 5, 3), (7,)),
        (MLPFeatures, (2,), (64,)),
        (lambda: MLPFeatures(12, 7, hidden=(5,)), (3, 2, 2), (7,)),
    ]


@pytest.fixture(params=[*generators(), *features()], ids=lambda case: f"{case[1]}-{case[2]}")
def case(request):
    build, in_shape, out_shape = request.param
    return build(), torch.randn(4, *in_shape), out_shape


def test_maps_samples_one_by_one(case):
    network, x, out_shape = case
    y = network(x)
    assert y.shape == (4, *out_shape)
    alone = torch.cat([network(row[None]) for row in x])
    torch.testing.assert_close(y, alone, rtol=1e-11, atol=1e-11)
    assert (y[1:] - y[:1]).flatten(1).abs().amax(1).min() > 1e-4  # and tells them apart


def test_has_no_state_and_no_mode(case):
    network, x, _ = case
    assert not list(network.buffers())
    torch.manual_seed(3)
    before = torch.get_rng_state()
    trained = network.train()(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(network.eval()(x), trained)


def test_every_parameter_learns(case):
    network, x, _ = case
    y = network(x)
    weights = torch.randn_like(y)  # a plain sum would miss what a norm takes out
    (weights * y).sum().backward()
    for name, parameter in network.named_parameters():
        per_entry = parameter.grad.abs()
        assert per_entry.max() > 1e-8, name


def test_is_built_of_smooth_layers(case):
    network, *_ = case
    for module in network.modules():
        assert isinstance(module, SMOOTH + LINEAR) or type(module) is type(network), module
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    assert all(m.num_channels % m.num_groups == 0 for m in norms)


def test_derivative_is_continuous(case):
    """The slope along a line changes in proportion to the step: no kinks."""
    network, x, _ = case
    rng = torch.Generator().manual_seed(1)
    direction = torch.randn(x.shape, generator=rng)
    c = torch.randn(network(x).shape, generator=rng)

    def slope(t):
        point = (x + t * direction).requires_grad_()
        (g,) = torch.autograd.grad((c * network(point)).sum(), point)
        return float((g * direction).sum())

    for start in (0.0, 0.5, 1.0):
        near, far = (abs(slope(start + h) - slope(start)) for h in (1e-6, 1e-5))
        assert near == pytest.approx(far / 10, rel=0.05, abs=1e-9)


@pytest.mark.parametrize("shape", SIZES)
def test_images_lie_between_minus_one_and_one(shape):
    generator = ConvGenerator(shape, 5, (8, 6, 4))
    for parameter in generator.parameters():
        parameter.data.mul_(5)
    images = generator(10 * torch.randn(6, 5))
    assert images.abs().max() <= 1
    assert images.min() < -0.5
    assert images.max() > 0.5


def test_points_are_not_confined():
    generator = MLPGenerator(2, 3, hidden=(4,))
    for parameter in generator.parameters():
        parameter.data.mul_(5)
    assert generator(10 * torch.randn(20, 3)).abs().max() > 2


def test_mlp_features_flatten():
    network = MLPFeatures(12, 7, hidden=(5,))
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(network(x), network(x.flatten(1)))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: ConvGenerator((1, 10, 8)), "2 doublings.*divisible by 4, got 10 x 8. Give fewer"),
        (lambda: ConvGenerator((1, 28, 28), channels=(8, 8, 8, 8)), "divisible by 8, got 28 x 28"),
        (lambda: ConvGenerator((28, 28)), r"shape \(c, h, w\), got \(28, 28\)"),
        (lambda: ConvFeatures((4, 1, 28, 28)), r"shape \(c, h, w\), got \(4, 1, 28, 28\)"),
        (lambda: ConvGenerator((1, 0, 0)), r"got \(1, 0, 0\)"),
        (lambda: ConvFeatures((0, 8, 8)), r"got \(0, 8, 8\)"),
        (lambda: ConvGenerator((1, 8, 8), channels=()), "at least one"),
    ],
)
def test_bad_sizes_are_refused(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_fewer_channels_as_the_message_says():
    assert ConvGenerator((1, 10, 8), channels=(8, 8))(torch.randn(2, 32)).shape == (2, 1, 10, 8)


@pytest.mark.parametrize("shape", [(3, 5, 4, 4), (2, 1, 1, 1), (1, 4, 3, 7)], ids=str)
def test_a_doubling_convolution_is_doubling_and_a_convolution(shape):
    layer = DoublingConv2d(shape[1], 6)
    twin = nn.Conv2d(shape[1], 6, 3, padding=1)
    twin.load_state_dict(layer.state_dict())
    two = nn.Sequential(nn.Upsample(scale_factor=2), twin)
    x = torch.randn(shape, requires_grad=True)
    tangent, weights = torch.randn_like(x), [torch.randn_like(p) for p in layer.parameters()]

    def derivatives(network):
        y = network(x)
        first = torch.autograd.grad(y.pow(3).sum(), [x, *network.parameters()], create_graph=True)
        along = sum((g * w).sum() for g, w in zip(first, [tangent, *weights], strict=True))
        second = torch.autograd.grad(along, [x, *network.parameters()])
        forward = Pushforward(network, x).tangent(torch.cat([w.flatten() for w in weights]))
        return y, *first, *second, forward

    for one, other in zip(derivatives(layer), derivatives(two), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_generators_and_plain_layers_draw_the_same_weights():
    torch.manual_seed(3)
    ours = ConvGenerator((1, 8, 8), 4, (6, 4))
    torch.manual_seed(3)
    plain = nn.Sequential(
        *(nn.Linear(4, 96), nn.Unflatten(1, (6, 4, 4)), nn.GroupNorm(3, 6), nn.SiLU()),
        *(nn.Upsample(scale_factor=2), nn.Conv2d(6, 4, 3, padding=1), nn.GroupNorm(2, 4)),
        *(nn.SiLU(), nn.Conv2d(4, 1, 3, padding=1), nn.Tanh()),
    )
    z = torch.randn(5, 4)
    torch.testing.assert_close(ours(z), plain(z), rtol=1e-12, atol=1e-12)
