"""Penalties against double backward, central differences, closed forms and exact expectations."""

import copy
from contextlib import nullcontext

import pytest
import torch
from reference import (
    APPROXIMATE,
    CRITICS,
    GENERATORS,
    SEED,
    UNFUSED,
    Sine,
    View,
    all_batches,
    central_differences,
    conv_critic,
    conv_generator,
    critic_for,
    flat,
    gradient_penalty,
    group_norm,
    mlp_critic,
    mlp_generator,
    relative_error,
    shake,
)
from torch import nn

from lightning_mmd.critic_warnings import KinkedCriticWarning
from lightning_mmd.estimators import Batch, Lagged, Split
from lightning_mmd.penalties import (
    input_gradient_penalty,
    parametric_gradient_penalty,
    penalised_critic,
    rkhs_norm_penalty,
)
from lightning_mmd.pushforward import DerivativeFallbackWarning

EXACT = ["forward", "double_backward"]
METHODS = [*EXACT, "finite_difference"]


def lagged(direction):
    estimator = Lagged()
    estimator.observe(direction)
    return estimator


def announcement(note):
    return pytest.warns(DerivativeFallbackWarning, match=note) if note else nullcontext()


def critic_gradient(value, critic, **kwargs):
    weights = [p for p in critic.parameters() if p.requires_grad]
    return flat(torch.autograd.grad(value, weights, materialize_grads=True, **kwargs))


def pair(name):
    critic, generator = (shake(build()) for build in CRITICS[name])
    return critic, generator, torch.randn(6, 3)


@pytest.mark.parametrize("toggled", [False, True])
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("name", GENERATORS)
def test_equals_double_backward_for_every_generator(name, method, toggled):
    build, note = GENERATORS[name]
    generator, z = shake(build()), torch.randn(6, 3)
    if toggled:  # then all parameters count, frozen or not
        generator.requires_grad_(True)
    critic = critic_for(copy.deepcopy(generator)(z))
    penalty, slopes, gradient = gradient_penalty(critic, generator, z)
    if toggled:
        generator.requires_grad_(False)
    torch.manual_seed(SEED)
    with announcement(note if method == "forward" and note != UNFUSED else None):
        result = penalised_critic(critic, generator, [(z,)], method, estimator=Batch())
    assert relative_error(result.penalty, penalty) < 1e-10
    assert relative_error(critic_gradient(result.penalty, critic), slopes) < 1e-10
    assert relative_error(result.direction, gradient) < 1e-10
    assert result.penalty.item() == pytest.approx(float(result.direction @ result.direction))
    assert not result.direction.requires_grad


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("name", CRITICS)
def test_equals_double_backward_for_every_critic(name, method):
    critic, generator, z = pair(name)
    penalty, slopes, _ = gradient_penalty(critic, generator, z)
    assert penalty > 1e-6
    torch.manual_seed(SEED)
    value = parametric_gradient_penalty(critic, generator, z, method)
    assert value.shape == ()
    assert value.item() >= 0
    assert relative_error(value, penalty) < 1e-10
    assert relative_error(critic_gradient(value, critic), slopes) < 1e-10


@pytest.mark.parametrize("name", CRITICS)
def test_finite_difference_is_close_but_not_exact(name):
    critic, generator, z = pair(name)
    penalty, slopes, _ = gradient_penalty(critic, generator, z)
    torch.manual_seed(SEED)
    value = parametric_gradient_penalty(critic, generator, z, "finite_difference")
    assert 1e-15 < relative_error(value, penalty) < 1e-6
    assert 1e-14 < relative_error(critic_gradient(value, critic), slopes) < 1e-5


@pytest.mark.parametrize("name", ["spectral norm", "old spectral norm", "dropout", "batch norm"])
def test_finite_difference_holds_the_state_of_the_generator(name):
    generator, z = shake(GENERATORS[name][0]()), torch.randn(6, 3)
    critic = critic_for(copy.deepcopy(generator)(z))
    penalty, slopes, _ = gradient_penalty(critic, generator, z)
    torch.manual_seed(SEED)
    value = parametric_gradient_penalty(critic, generator, z, "finite_difference")
    assert 1e-15 < relative_error(value, penalty) < 1e-6
    assert 1e-14 < relative_error(critic_gradient(value, critic), slopes) < 1e-6


def test_finite_difference_in_single_precision():
    critic, generator, z = pair("mlp")
    _, slopes, _ = gradient_penalty(critic, generator, z)
    critic, generator = critic.float(), generator.float()
    value = parametric_gradient_penalty(critic, generator, z.float(), "finite_difference")
    error = relative_error(critic_gradient(value, critic).double(), slopes)
    assert 1e-8 < error < 1e-3


@pytest.mark.parametrize("name", ["mlp", "weight norm", "dropout", "layer norm", "batch norm"])
def test_gradient_equals_central_differences_of_the_value(name):
    critic, generator, z = pair(name)

    def value(critic=critic):
        torch.manual_seed(SEED)
        with torch.no_grad():
            return parametric_gradient_penalty(copy.deepcopy(critic), copy.deepcopy(generator), z)

    torch.manual_seed(SEED)
    penalty = parametric_gradient_penalty(copied := copy.deepcopy(critic), generator, z)
    slopes = critic_gradient(penalty, copied)
    expected = central_differences(value, list(critic.parameters()))
    assert relative_error(slopes, expected) < 1e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("critic", "generator"),
    [
        (CRITICS["spectral norm"][0], GENERATORS["dropout"][0]),
        (CRITICS["old spectral norm"][0], GENERATORS["partly frozen"][0]),
        (CRITICS["batch norm"][0], GENERATORS["old spectral norm"][0]),
        (CRITICS["dropout"][0], GENERATORS["spectral norm"][0]),
    ],
    ids=["spectral norm, dropout", "old spectral norm, frozen", "batch norm", "dropout, spectral"],
)
@pytest.mark.filterwarnings("ignore::lightning_mmd.pushforward.DerivativeFallbackWarning")
def test_leaves_what_one_forward_pass_leaves(critic, generator, method):
    critic, generator = shake(critic()), shake(generator())
    critic[0].requires_grad_(False)
    z = torch.randn(6, 3, requires_grad=True)
    twins = copy.deepcopy(critic), copy.deepcopy(generator)
    kept = next(p for p in generator.parameters() if p.requires_grad)
    kept.grad = torch.randn_like(kept)
    expected_grad = kept.grad.clone()
    networks = critic, generator
    flags = [p.requires_grad for net in networks for p in net.parameters()]
    modes = [m.training for net in networks for m in net.modules()]

    torch.manual_seed(SEED)
    expected_values = twins[0](twins[1](z)).reshape(-1)
    random_state = torch.get_rng_state()
    torch.manual_seed(SEED)
    result = penalised_critic(critic, generator, [(z,)], method, estimator=Batch())
    assert torch.equal(torch.get_rng_state(), random_state)
    (result.penalty + result.values.sum()).backward()

    assert relative_error(result.values, expected_values) < 1e-14
    for net, twin in zip(networks, twins, strict=True):
        buffers = dict(net.named_buffers())
        assert buffers.keys() == dict(twin.named_buffers()).keys()
        assert all(torch.equal(buffers[n], b) for n, b in twin.named_buffers())
    assert z.grad is None
    assert all(p.grad is None for p in generator.parameters() if p is not kept)
    assert torch.equal(kept.grad, expected_grad)
    assert all((p.grad is not None) == p.requires_grad for p in critic.parameters())
    assert [p.requires_grad for net in networks for p in net.parameters()] == flags
    assert [m.training for net in networks for m in net.modules()] == modes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("estimator", [Batch(), Split()])
def test_values_come_with_their_graph(method, estimator):
    critic, generator, z = pair("mlp")
    groups = [(z[group],) for group in estimator.groups(len(z))]
    result = penalised_critic(critic, generator, groups, method, estimator=estimator)
    expected = critic(generator(z).detach()).squeeze(1)
    assert relative_error(result.values, expected) < 1e-14
    got = critic_gradient(result.values.mean(), critic, retain_graph=True)
    assert relative_error(got, critic_gradient(expected.mean(), critic)) < 1e-13


@pytest.mark.parametrize("method", EXACT)
def test_chosen_parameters_alone_count(method):
    critic, generator, z = pair("mlp")
    *_, gradient = gradient_penalty(critic, generator, z)
    chosen = {"0.weight": generator[0].weight, "2.bias": generator[2].bias}
    kept = torch.cat([gradient[:15], gradient[-4:]])
    value = parametric_gradient_penalty(critic, generator, z, method, parameters=chosen)
    assert relative_error(value, kept.square().sum()) < 1e-12
    value.backward()
    assert all(p.grad is None for p in generator.parameters())


@pytest.mark.parametrize("method", EXACT)
def test_batch_estimator_is_biased_by_the_variance_of_the_batch_mean(method):
    critic, generator, latents = pair("mlp")
    latents = latents[:3]
    gradients = torch.stack([gradient_penalty(critic, generator, z[None])[2] for z in latents])
    mean = gradients.mean(0)
    variance = (gradients - mean).square().sum(1).mean()  # the trace of the covariance
    for n in (1, 2, 4):
        batches = all_batches(latents, n)
        values = [parametric_gradient_penalty(critic, generator, z, method) for z in batches]
        bias = torch.stack(values).mean() - mean.square().sum()
        assert relative_error(bias, variance / n) < 1e-11
        assert bias > 0.01 * mean.square().sum()  # the claim is not about nothing


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("n", [2, 4])
def test_split_estimator_is_unbiased(method, n):
    critic, generator, latents = pair("mlp")
    penalty, slopes, _ = gradient_penalty(critic, generator, latents[:3])
    values = torch.stack(
        [
            parametric_gradient_penalty(critic, generator, z, method, estimator=Split())
            for z in all_batches(latents[:3], n)
        ]
    )
    assert values.std() > 0.01 * penalty
    assert relative_error(values.mean(), penalty) < 1e-12
    assert relative_error(critic_gradient(values.mean(), critic), slopes) < 1e-12


@pytest.mark.parametrize("method", EXACT)
def test_a_direction_gives_the_part_of_the_penalty_along_it(method):
    critic, generator, z = pair("mlp")
    penalty, _, gradient = gradient_penalty(critic, generator, z)
    v = torch.randn_like(gradient)
    value = parametric_gradient_penalty(critic, generator, z, method, estimator=lagged(v))
    parameters = list(generator.parameters())
    slopes = torch.autograd.grad(critic(generator(z)).mean(), parameters, create_graph=True)
    expected = (v @ torch.cat([g.reshape(-1) for g in slopes])).square() / v.square().sum()
    assert relative_error(value, expected) < 1e-12
    assert relative_error(critic_gradient(value, critic), critic_gradient(expected, critic)) < 1e-12
    assert 0 < value < penalty
    zero = parametric_gradient_penalty(critic, generator, z, method, estimator=lagged(0 * v))
    assert zero == 0


def test_split_estimator_over_draws():
    critic, generator, latents = pair("mlp")
    penalty, slopes, _ = gradient_penalty(critic, generator, latents)
    draws = torch.randint(6, (400, 4), generator=torch.Generator().manual_seed(1))
    values, gradients = [], []  # of shapes (draws, 1) and (draws, weights)
    for draw in draws:
        value = parametric_gradient_penalty(critic, generator, latents[draw], estimator=Split())
        values.append(value.detach()[None])
        gradients.append(critic_gradient(value, critic))
    for got, expected in (
        (torch.stack(values)[:, None], penalty),
        (torch.stack(gradients), slopes),
    ):
        error = got.mean(0) - expected
        assert (error.abs() <= 5 * got.std(0) / len(draws) ** 0.5 + 1e-15).all()


def test_direction_of_one_s_own_gives_the_penalty_itself():
    critic, generator, z = pair("mlp")
    penalty, slopes, gradient = gradient_penalty(critic, generator, z)
    given = gradient.clone().requires_grad_()
    result = penalised_critic(critic, generator, [(z,)], "forward", estimator=lagged(given))
    assert torch.equal(result.direction, gradient)
    assert not result.direction.requires_grad
    assert relative_error(result.penalty, penalty) < 1e-12
    assert relative_error(critic_gradient(result.penalty, critic), slopes) < 1e-12
    opposite = parametric_gradient_penalty(critic, generator, z, estimator=lagged(-gradient))
    assert relative_error(opposite, penalty) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_processes_average_to_the_penalty_of_the_whole_batch(method):
    critic, generator, z = pair("group norm")
    penalty, slopes, gradient = gradient_penalty(critic, generator, z)
    tolerance = 1e-7 if method == "finite_difference" else 1e-12

    def mean_of_processes(own):
        assert relative_error(own, gradient) > 1e-3  # a shard's gradient is another one
        return gradient

    shares = torch.stack(
        [
            parametric_gradient_penalty(critic, generator, shard, method, mean=mean_of_processes)
            for shard in z.chunk(2)
        ]
    )
    assert relative_error(shares.mean(), penalty) < tolerance
    assert relative_error(critic_gradient(shares.mean(), critic), slopes) < tolerance


def test_generator_without_second_derivative_is_announced_as_approximate():
    critic, generator = shake(mlp_critic()), shake(mlp_generator(Sine(once=True)))
    z = torch.randn(6, 3)
    twin = copy.deepcopy(generator)
    twin[1] = Sine(once=False)
    penalty, slopes, _ = gradient_penalty(critic, twin, z)
    with announcement(APPROXIMATE):
        value = parametric_gradient_penalty(critic, generator, z)
    assert 1e-15 < relative_error(value, penalty) < 1e-8
    assert 1e-14 < relative_error(critic_gradient(value, critic), slopes) < 1e-8
    parametric_gradient_penalty(critic, generator, z)  # and announced once
    with pytest.raises(RuntimeError, match="once_differentiable"):
        parametric_gradient_penalty(critic, generator, z, "double_backward")


@pytest.mark.parametrize("method", EXACT)
def test_critic_without_second_derivative_is_refused(method):
    critic = mlp_critic(Sine(once=True))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        parametric_gradient_penalty(critic, mlp_generator(), torch.randn(4, 3), method)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_is_switched_off(method):
    critic, generator, z = pair("mlp")
    critic, generator, z = critic.float(), generator.float(), z.float()
    value = parametric_gradient_penalty(critic, generator, z, method)
    slopes = critic_gradient(value, critic)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        other = parametric_gradient_penalty(critic, generator, z, method)
    assert relative_error(other, value) < 1e-5
    assert relative_error(critic_gradient(other, critic), slopes) < 1e-5


def test_critic_may_be_any_callable():
    critic, generator, z = pair("mlp")
    penalty, slopes, _ = gradient_penalty(critic, generator, z)
    value = parametric_gradient_penalty(lambda x: critic(x).squeeze(1), generator, z)
    assert relative_error(value, penalty) < 1e-12
    assert relative_error(critic_gradient(value, critic), slopes) < 1e-12


@pytest.mark.parametrize("requires_grad", [True, False])
def test_shared_layers_are_refused(requires_grad):
    generator = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    critic = nn.Sequential(generator[1], nn.Linear(4, 1))
    generator[1].requires_grad_(requires_grad)
    with pytest.raises(ValueError, match=r"share the parameters \['1.weight', '1.bias'\].*Copy"):
        parametric_gradient_penalty(critic, generator, torch.randn(4, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"method": "reverse"}, ValueError, r"one of \['double_backward', .*, got 'reverse'"),
        (
            {"estimator": "split"},
            TypeError,
            r"an Estimator such as Batch\(\) or Split\(\), got 'split'",
        ),
        ({"estimator": lagged(torch.ones(3))}, ValueError, r"shape \(44,\), one entry.*got \(3,\)"),
        ({"critic": lambda x: x[:, :2]}, ValueError, r"or \(5, 1\), got \(5, 2\). Flatten or pool"),
        ({"critic": lambda x: [x]}, TypeError, "must return a tensor.*got list. Wrap"),
        ({"critic": lambda x: x.sum()}, ValueError, r"one value a sample.*got \(\)"),
        ({"generator": mlp_generator()[:1].append(nn.LSTM(5, 4))}, TypeError, "got tuple. Wrap"),
        ({"generator": nn.Sequential(nn.Linear(3, 4), View(2))}, ValueError, "each of the 5 lat"),
        ({"generator": nn.SiLU()}, ValueError, "Pass a generator with weights"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(arguments, error, match):
    defaults = {"critic": mlp_critic(), "generator": mlp_generator(), "z": torch.randn(5, 3)}
    arguments = defaults | arguments
    arguments["generator"].to(torch.float64)
    with pytest.raises(error, match=match):
        parametric_gradient_penalty(**arguments)


@pytest.mark.parametrize("kink", [nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU(), nn.Hardtanh()])
def test_kinked_critic_is_warned_of_once(kink):
    critic, generator, z = mlp_critic(nn.Sequential(kink)), mlp_generator(), torch.randn(4, 3)
    critic.double()
    with pytest.warns(KinkedCriticWarning, match=f"{type(kink).__name__}.*Use SiLU") as caught:
        parametric_gradient_penalty(critic, generator, z)
    assert len(caught) == 1
    parametric_gradient_penalty(critic, generator, z)  # a second warning would be an error
    with pytest.warns(KinkedCriticWarning):
        parametric_gradient_penalty(copy.deepcopy(critic), generator, z)


def test_kinks_in_the_generator_are_harmless():
    critic, generator, z = mlp_critic(), mlp_generator(nn.ReLU()), torch.randn(6, 3)
    penalty, slopes, _ = gradient_penalty(critic, generator, z)
    value = parametric_gradient_penalty(critic, generator, z)
    assert relative_error(value, penalty) < 1e-12
    assert relative_error(critic_gradient(value, critic), slopes) < 1e-12


def test_rkhs_norm_penalty_is_the_critic_s_own():
    class Known(nn.Linear):
        def rkhs_norm2(self):
            return 3 * self.weight.square().sum()

    critic = Known(4, 1)
    value = rkhs_norm_penalty(critic)
    (slopes,) = torch.autograd.grad(value, critic.weight)
    assert value.item() == pytest.approx(3 * critic.weight.norm().item() ** 2, rel=1e-14)
    assert relative_error(slopes, 6 * critic.weight) < 1e-14


@pytest.mark.parametrize("critic", [mlp_critic(), lambda x: x.sum(1)])
def test_rkhs_norm_penalty_refuses_a_critic_without_norm(critic):
    with pytest.raises(TypeError, match=r"no RKHS norm.*Use LearnedKernelCritic, or beta = 0"):
        rkhs_norm_penalty(critic)


@pytest.mark.parametrize("target", [1.0, 0.0, 2.5])
@pytest.mark.parametrize("shape", [(4,), (2, 3, 3)])
def test_input_gradient_penalty_of_a_linear_critic(shape, target):
    real, fake = torch.randn(2, 5, *shape)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(real[0].numel(), 1))
    a = critic[1].weight
    norm = a.norm().item()  # over all entries of an image, and the same for each sample
    for value in (
        input_gradient_penalty(critic, real, fake, target=target),
        input_gradient_penalty(critic, real, target=target),
    ):
        (slopes,) = torch.autograd.grad(value, a)
        assert value.item() == pytest.approx((norm - target) ** 2, rel=1e-12)
        assert relative_error(slopes, 2 * (norm - target) / norm * a) < 1e-12


@pytest.mark.parametrize("target", [1.0, 0.0])
def test_input_gradient_penalty_interpolates_each_pair(target):
    real, fake = torch.randn(2, 6, 2, 3)

    def critic(x):  # grad f = x
        return 0.5 * x.square().sum((1, 2))

    u = torch.rand(6, generator=torch.Generator().manual_seed(5))[:, None, None]
    points = u * real + (1 - u) * fake
    rng = torch.Generator().manual_seed(5)
    between = input_gradient_penalty(critic, real, fake, target=target, rng=rng)
    at_real = input_gradient_penalty(critic, real, target=target)
    for value, x in ((between, points), (at_real, real)):
        expected = sum((float(row.norm()) - target) ** 2 for row in x) / 6
        assert value.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("target", [1.0, 0.0])
def test_input_gradient_penalty_has_the_gradient_of_its_value(target):
    critic = shake(conv_critic(group_norm))
    generator = conv_generator(group_norm)
    real, fake = torch.randn(4, 2, 4, 4, requires_grad=True), generator(torch.randn(4, 3))

    def value():
        rng = torch.Generator().manual_seed(5)
        return input_gradient_penalty(critic, real, fake, target=target, rng=rng)

    value().backward()
    slopes = flat([p.grad for p in critic.parameters() if p.grad is not None])
    expected = central_differences(value, list(critic.parameters())[:-1])
    assert critic[-1].bias.grad is None or not critic[-1].bias.grad.any()
    assert relative_error(slopes[: len(expected)], expected) < 1e-6
    assert real.grad is None
    assert all(p.grad is None for p in generator.parameters())


@pytest.mark.parametrize("target", [1.0, 0.0])
def test_input_gradient_penalty_of_a_flat_critic_is_finite(target):
    critic = nn.Linear(4, 1)
    nn.init.zeros_(critic.weight)
    value = input_gradient_penalty(critic, torch.randn(5, 4), target=target)
    value.backward()
    assert value.item() == pytest.approx(target**2, abs=1e-14)
    assert torch.equal(critic.weight.grad, torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"fake": torch.ones(4, 4)}, ValueError, r"one shape, got \(5, 4\) and \(4, 4\)"),
        ({"target": -1.0}, ValueError, "finite number >= 0, got -1"),
        ({"target": float("nan")}, ValueError, "finite number >= 0, got nan"),
        ({"critic": lambda x: x}, ValueError, r"or \(5, 1\), got \(5, 4\). Flatten or pool"),
        ({"critic": lambda x: (x,)}, TypeError, "got tuple. Wrap"),
    ],
)
def test_input_gradient_penalty_refuses(arguments, error, match):
    with pytest.raises(error, match=match):
        input_gradient_penalty(**{"critic": mlp_critic(), "real": torch.ones(5, 4)} | arguments)
