"""Tangents and cotangents against explicit Jacobians, and what a pass leaves behind."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from reference import (
    APPROXIMATE,
    GENERATORS,
    SEED,
    TWO_REVERSE_PASSES,
    UNFUSED,
    Counting,
    Recurrent,
    Sine,
    conv_generator,
    critic_for,
    gradient_penalty,
    group_norm,
    mlp_critic,
    mlp_generator,
    partly_frozen,
    relative_error,
    sample_jacobian,
    shake,
    token_generator,
)
from torch import nn

from lightning_mmd.critic_values import evaluate_critic
from lightning_mmd.embedding import MeanEmbedding
from lightning_mmd.features import RandomFourierFeatures
from lightning_mmd.kernels import Gaussian
from lightning_mmd.parameters import trainable_parameters
from lightning_mmd.passes import unfused_attention
from lightning_mmd.penalties import input_gradient_penalty, parametric_gradient_penalty
from lightning_mmd.pushforward import (
    DerivativeFallbackWarning,
    Pushforward,
    _failed_routes,
    parametric_gradient,
    parametric_tangent,
)
from lightning_mmd.witness import solve_witness


def announcement(note):
    return pytest.warns(DerivativeFallbackWarning, match=note) if note else nullcontext([])


def direction(size, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=GENERATORS)
def case(request):
    build, note = GENERATORS[request.param]
    return shake(build()), torch.randn(6, 3), note


@pytest.mark.parametrize("reuse", [False, True])
def test_tangents_and_cotangents_are_products_with_the_jacobian(case, reuse):
    generator, z, note = case
    jacobian = sample_jacobian(generator, z)
    if reuse and note != UNFUSED:
        note = None  # the transposed graph comes first, and serves
    torch.manual_seed(SEED)
    push = Pushforward(generator, z, reuse=reuse)
    assert jacobian.shape == (push.samples.numel(), push.num_parameters)
    v, w, c = (direction(n, n) for n in (jacobian.shape[1], jacobian.shape[1], jacobian.shape[0]))
    with announcement(note) as caught:
        tangents = push.tangent(v), push.tangent(w)
    cotangent = push.cotangent(c.view_as(push.samples))
    assert len(caught) == (1 if note else 0)
    for vector, dx in zip((v, w), tangents, strict=True):
        assert dx.shape == push.samples.shape
        assert relative_error(dx.reshape(-1), jacobian @ vector) < 1e-12
    assert relative_error(cotangent, jacobian.T @ c) < 1e-12
    assert not any(t.requires_grad for t in (*tangents, cotangent, push.samples))


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.filterwarnings("ignore::lightning_mmd.pushforward.DerivativeFallbackWarning")
def test_a_pass_leaves_what_a_plain_call_leaves(case, reuse):
    generator, z, _ = case
    plain = copy.deepcopy(generator)
    kept = next(p for p in generator.parameters() if p.requires_grad)
    kept.grad = direction(kept.numel()).view_as(kept)
    expected_grad = kept.grad.clone()
    flags = [p.requires_grad for p in generator.parameters()]
    modes = [m.training for m in generator.modules()]

    torch.manual_seed(SEED)
    x = plain(z)
    random_state = torch.get_rng_state()
    torch.manual_seed(SEED)
    push = Pushforward(generator, z.requires_grad_(), reuse=reuse)
    push.cotangent(torch.ones_like(push.samples))
    push.tangent(torch.ones(push.num_parameters))
    push.neighbours(torch.ones(push.num_parameters))

    assert torch.equal(push.samples, x)
    assert torch.equal(torch.get_rng_state(), random_state)
    buffers = dict(generator.named_buffers())
    assert buffers.keys() == dict(plain.named_buffers()).keys()
    assert all(torch.equal(buffers[n], b) for n, b in plain.named_buffers())
    assert all(p.grad is None for p in (z, *generator.parameters()) if p is not kept)
    assert torch.equal(kept.grad, expected_grad)
    assert [p.requires_grad for p in generator.parameters()] == flags
    assert [m.training for m in generator.modules()] == modes


def test_parametric_gradient_is_the_gradient_of_the_mean(case):
    generator, z, _ = case
    critic = critic_for(copy.deepcopy(generator)(z)).eval()
    *_, expected = gradient_penalty(critic, generator, z)
    torch.manual_seed(SEED)
    gradient = parametric_gradient(critic, generator, z)
    assert relative_error(gradient, expected) < 1e-12
    assert not gradient.requires_grad
    assert all(p.grad is None for p in (*generator.parameters(), *critic.parameters()))


@pytest.mark.filterwarnings("ignore::lightning_mmd.pushforward.DerivativeFallbackWarning")
def test_gradient_and_tangent_are_adjoint(case):
    generator, z, _ = case
    critic = critic_for(copy.deepcopy(generator)(z)).eval()
    twin = copy.deepcopy(generator)
    torch.manual_seed(SEED)
    gradient = parametric_gradient(critic, generator, z)
    v = direction(len(gradient))
    torch.manual_seed(SEED)
    x, dx = parametric_tangent(twin, z, v)
    x.requires_grad_()
    (slopes,) = torch.autograd.grad(critic(x).sum(), x)
    scale = float(gradient.norm() * v.norm())
    assert abs(float(gradient @ v - (slopes * dx).sum() / len(z))) < 1e-12 * scale


@pytest.mark.parametrize("name", ["mlp", "batch norm", "group norm", "tied", "dropout"])
def test_tangent_is_the_velocity_of_the_samples(name):
    generator, z = shake(GENERATORS[name][0]()), torch.randn(5, 3)
    parameters = trainable_parameters(generator)
    v = direction(sum(p.numel() for p in parameters.values()))

    def move(step):
        moved = copy.deepcopy(generator)
        for p, part in zip(
            moved.parameters(), v.split([p.numel() for p in moved.parameters()]), strict=True
        ):
            p.data += step * part.view_as(p)
        torch.manual_seed(SEED)
        return moved(z).detach()

    torch.manual_seed(SEED)
    x, dx = parametric_tangent(generator, z, v)
    assert torch.equal(x, move(0.0))
    errors = [relative_error((move(h) - move(-h)) / (2 * h), dx) for h in (2e-3, 1e-3)]
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)  # a central difference, order two


def test_fallback_is_announced_once_a_generator():
    generator, z = mlp_generator(Sine(once=False)), torch.randn(4, 3)
    with announcement(TWO_REVERSE_PASSES) as caught:
        for _ in range(3):
            push = Pushforward(generator, z)
            push.tangent(torch.ones(push.num_parameters))
    assert len(caught) == 1
    with announcement(TWO_REVERSE_PASSES):
        parametric_tangent(copy.deepcopy(generator), z, torch.ones(push.num_parameters))


def test_announcement_does_not_keep_the_generator_alive():
    generator = mlp_generator(Sine(once=False))
    with announcement(TWO_REVERSE_PASSES):
        parametric_tangent(generator, torch.randn(4, 3), torch.ones(44))
    reference = weakref.ref(generator)
    del generator
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("reuse", [False, True])
def test_last_resort_is_a_central_difference_and_says_so(reuse):
    generator, z = shake(mlp_generator(Sine(once=True))), torch.randn(6, 3)
    jacobian = sample_jacobian(generator, z)
    push = Pushforward(generator, z, reuse=reuse)
    v = direction(push.num_parameters)
    with announcement(APPROXIMATE) as caught:
        dx = push.tangent(v)
    push.tangent(v)
    assert len(caught) == 1
    assert 1e-14 < relative_error(dx.reshape(-1), jacobian @ v) < 1e-8
    assert relative_error(push.tangent(1e6 * v), 1e6 * dx) < 1e-8
    assert torch.equal(push.tangent(0 * v), torch.zeros_like(dx))


def test_lstm_in_single_precision():
    generator, z = token_generator(Recurrent()), torch.randn(6, 3)
    v = direction(sum(p.numel() for p in generator.parameters()))
    _, expected = parametric_tangent(generator, z, v)
    with announcement(TWO_REVERSE_PASSES):
        _, dx = parametric_tangent(generator.float(), z.float(), v.float())
    assert dx.dtype == torch.float32
    assert 1e-9 < relative_error(dx.double(), expected) < 1e-5


def test_state_outside_the_buffers_is_noticed():
    generator, z = Counting(), torch.randn(5, 3)
    generator.passes = 1  # the pass of the Pushforward is the second
    jacobian = sample_jacobian(generator, z)
    push = Pushforward(generator, z)
    v = direction(push.num_parameters)
    with announcement("two reverse passes.*second pass"):
        dx = push.tangent(v)
    assert relative_error(dx.reshape(-1), jacobian @ v) < 1e-12


def test_generator_without_any_derivative():
    class Once(nn.Sequential):
        passes = 0

        def forward(self, z):
            self.passes += 1
            if self.passes > 3:  # one, and two that look for parameters that are not reached
                raise RuntimeError("only once")
            return super().forward(z)

    push = Pushforward(Once(*mlp_generator(Sine(once=True))), torch.randn(4, 3))
    for _ in range(2):  # the second message is as good as the first
        with pytest.raises(RuntimeError, match=r"forward_mode: only once.*Replace the layer"):
            push.tangent(torch.ones(push.num_parameters))


def test_frozen_parameters_do_not_count_unless_all_are():
    generator = partly_frozen()
    assert list(trainable_parameters(generator)) == ["2.weight"]
    for p in generator.parameters():
        p.requires_grad_(False)
    assert list(trainable_parameters(generator)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(trainable_parameters(GENERATORS["tied"][0]())) == [
        "first.weight",
        "first.bias",
        "second.bias",
        "last.weight",
        "last.bias",
    ]
    generator.register_parameter("count", nn.Parameter(torch.tensor(1), requires_grad=False))
    assert "count" not in trainable_parameters(generator)


def test_toggled_generator_has_the_same_derivatives():
    generator, z = shake(conv_generator(nn.BatchNorm2d)), torch.randn(4, 3)
    push = Pushforward(generator, z)
    v, c = direction(push.num_parameters), direction(push.samples.numel()).view_as(push.samples)
    toggled = Pushforward(generator.requires_grad_(False), z)
    assert torch.equal(toggled.cotangent(c), push.cotangent(c))
    assert torch.equal(toggled.tangent(v), push.tangent(v))
    assert not any(p.requires_grad for p in generator.parameters())


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("names", [["first.weight"], ["second.weight", "last.bias"]])
def test_parameters_can_be_chosen(names, reuse):
    generator, z = GENERATORS["tied"][0](), torch.randn(4, 3)
    own = dict(generator.named_parameters(remove_duplicate=False))
    twin = copy.deepcopy(generator).requires_grad_(False)
    for name in names:
        twin.get_parameter(name).requires_grad_(True)
    jacobian = sample_jacobian(twin, z)
    push = Pushforward(generator, z, {n: own[n] for n in names}, reuse=reuse)
    v = direction(push.num_parameters)
    assert relative_error(push.tangent(v).reshape(-1), jacobian @ v) < 1e-12
    push.differentiate(lambda x: x.square().sum(1))[1].sum().backward()
    assert all(p.grad is None for p in generator.parameters())


def test_derivative_at_other_values_of_the_parameters():
    generator, z = mlp_generator(), torch.randn(4, 3)
    moved = copy.deepcopy(generator)
    for p in moved.parameters():
        p.data += 0.3
    push = Pushforward(generator, z, dict(moved.named_parameters()))
    v = direction(push.num_parameters)
    assert torch.equal(push.samples, moved(z))
    assert torch.equal(push.tangent(v), parametric_tangent(moved, z, v)[1])


@pytest.mark.parametrize("reuse", [False, True])
def test_parameters_without_influence(reuse):
    class Idle(nn.Linear):
        def forward(self, z):
            return 2 * z + 0 * self.bias.detach()

    push = Pushforward(Idle(3, 3), torch.randn(4, 3), reuse=reuse)
    with pytest.raises(RuntimeError, match="does not require grad"):
        push.cotangent(torch.ones(4, 3))


@pytest.mark.parametrize("reuse", [False, True])
def test_an_idle_parameter_has_zero_derivative(reuse):
    generator = mlp_generator()
    generator.register_parameter("idle", nn.Parameter(torch.ones(2)))
    push = Pushforward(generator, torch.randn(4, 3), reuse=reuse)
    idle = torch.zeros(push.num_parameters)
    idle[:2] = 1  # a Sequential's own parameters come first
    assert torch.equal(push.tangent(idle), torch.zeros(4, 4))
    cotangent = push.cotangent(torch.ones(4, 4))
    assert torch.equal(cotangent[:2], torch.zeros(2))
    assert cotangent[2:].abs().min() > 0


def test_constant_function_has_zero_gradient():
    gradient = parametric_gradient(lambda x: 0 * x.sum(1) + 1, mlp_generator(), torch.randn(4, 3))
    assert torch.equal(gradient, torch.zeros(44))


def test_autocast_is_switched_off():
    generator = shake(mlp_generator()).float()
    critic, z = shake(mlp_critic()).float(), torch.randn(8, 3).float()
    v = direction(44).float()
    expected = parametric_gradient(critic, generator, z), *parametric_tangent(generator, z, v)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generator(z).dtype == torch.bfloat16
        got = parametric_gradient(critic, generator, z), *parametric_tangent(generator, z, v)
        reused = Pushforward(generator, z, reuse=True).tangent(v)
    for a, b in zip((*got, reused), (*expected, expected[2]), strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 1e-6


def test_unfused_attention_puts_the_fast_path_back():
    def is_fast():
        return torch.backends.mha.get_fastpath_enabled()

    def fail():
        with unfused_attention():
            assert not is_fast()
            raise KeyError

    assert is_fast()
    with pytest.raises(KeyError):
        fail()
    assert is_fast()


def test_works_inside_no_grad():
    generator, critic, z = mlp_generator(), mlp_critic(), torch.randn(4, 3)
    v = direction(44)
    expected = parametric_gradient(critic, generator, z), parametric_tangent(generator, z, v)[1]
    with torch.no_grad():
        push = Pushforward(generator, z, reuse=True)
        got = parametric_gradient(critic, generator, z), push.tangent(v)
    assert torch.equal(got[0], expected[0])
    assert relative_error(got[1], expected[1]) < 1e-12


@pytest.mark.parametrize("build", [mlp_generator, lambda: conv_generator(group_norm)])
def test_neighbours_are_a_step_away(build):
    generator, z = shake(build()), torch.randn(4, 3)
    push = Pushforward(generator, z)
    v = direction(push.num_parameters)
    step, (ahead, behind) = push.neighbours(v)
    assert relative_error((ahead - behind) / (2 * step), push.tangent(v)) < 1e-7
    other_step, _ = push.neighbours(10 * v)
    assert other_step == pytest.approx(step / 10, rel=1e-12)


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.bias, self.value = nn.Parameter(torch.zeros(())), value

    def forward(self, z):
        return self.value(z + self.bias.to(z.dtype))


@pytest.mark.parametrize(
    ("generator", "error", "match"),
    [
        (Returns(lambda x: (x, x)), TypeError, "tensor of samples, got tuple. Wrap"),
        (Returns(lambda x: x[:2]), ValueError, r"each of the 5 latents, got shape \(2, 3\)"),
        (Returns(torch.sum), ValueError, r"each of the 5 latents, got shape \(\)"),
        (nn.Tanh(), ValueError, "no floating-point parameters.*Pass a generator with weights"),
    ],
    ids=["tuple", "rows", "scalar", "no parameters"],
)
def test_generators_that_are_refused(generator, error, match):
    with pytest.raises(error, match=match):
        Pushforward(generator, torch.randn(5, 3))


@pytest.mark.parametrize(
    ("critic", "error", "match"),
    [
        (lambda x: (x, x), TypeError, "must return a tensor.*got tuple. Wrap"),
        (lambda x: x[:, :2], ValueError, r"shape \(5,\) or \(5, 1\), got \(5, 2\). Flatten"),
        (lambda x: x.mean(), ValueError, r"got \(\)"),
        (lambda x: x[:3].sum(1), ValueError, r"got \(3,\)"),
    ],
    ids=["tuple", "two values", "scalar", "rows"],
)
def test_critics_that_are_refused(critic, error, match):
    with pytest.raises(error, match=match):
        parametric_gradient(critic, mlp_generator(), torch.randn(5, 3))


def test_a_column_of_values_is_as_good_as_a_vector():
    generator, z = mlp_generator(), torch.randn(5, 3)
    vector, column = (
        parametric_gradient(lambda x, k=k: x.sum(1, keepdim=k), generator, z) for k in (False, True)
    )
    assert torch.equal(vector, column)


@pytest.mark.parametrize("shape", [(43,), (44, 1), ()])
def test_vectors_that_are_refused(shape):
    generator, z = mlp_generator(), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"shape \(44,\), one entry for each"):
        parametric_tangent(generator, z, torch.ones(shape))
    with pytest.raises(ValueError, match=r"shape \(44,\), one entry for each"):
        Pushforward(generator, z).tangent(torch.ones(shape))
    parametric_tangent(generator, z, torch.ones(44))  # nothing is remembered against it


def test_unknown_parameters_are_refused():
    with pytest.raises(ValueError, match=r"no parameters \['weight'\]. Take the names"):
        Pushforward(mlp_generator(), torch.randn(5, 3), {"weight": torch.ones(2)})


def test_empty_batches_are_refused_and_forgotten():
    """One was NaN, one 0, one gap / beta; and the generator gave forward mode up for good."""
    generator = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    critic = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
    none, some = torch.randn(0, 2), torch.randn(5, 2)
    cases = [
        lambda z: parametric_gradient(critic, generator, z),
        lambda z: parametric_tangent(generator, z, torch.ones(9)),
        lambda z: parametric_gradient_penalty(critic, generator, z),
        lambda z: solve_witness(nn.Linear(3, 5), generator, z, torch.ones(5), beta=0.5),
        lambda z: MeanEmbedding(nn.Linear(2, 5), z),
        lambda z: input_gradient_penalty(critic, generator(z).detach()),
        lambda z: evaluate_critic(critic, generator(z)),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=r"empty batch.*\(drop_last=True\)"):
            case(none)
        case(some)
    assert not _failed_routes.get(generator)


def test_arrays_are_refused_with_a_cure():
    generator, critic = nn.Linear(2, 3), nn.Linear(3, 1)
    for case in (
        lambda z: parametric_gradient(critic, generator, z),
        lambda z: parametric_tangent(generator, z, torch.ones(9)),
        lambda z: evaluate_critic(critic, z),
        lambda z: MeanEmbedding(nn.Linear(2, 5), z),
        lambda z: RandomFourierFeatures(Gaussian(), in_features=2, num_features=4)(z),
    ):
        with pytest.raises(TypeError, match=r"got ndarray\. Convert it: torch\.as_tensor\("):
            case(torch.ones(5, 2).numpy())
