"""Micro-batches and partial penalties: what they change, and what they do not."""

import copy
import weakref

import pytest
import torch
from lightning.pytorch import Callback
from tiny import gan, quiet_trainer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_mmd import (
    MMDGAN,
    Batch,
    ClosedForm,
    GradientAscent,
    Lagged,
    LearnedKernelCritic,
    MeanEmbedding,
    Processes,
    Split,
    parametric_gradient,
    parametric_gradient_penalty,
)
from lightning_mmd.networks import ConvFeatures, ConvGenerator, MLPFeatures, MLPGenerator
from lightning_mmd.passes import seeded

BATCH = 12


def make_model(kind=MMDGAN, generator=None, features=None, **kwargs):
    torch.manual_seed(0)
    generator = generator or MLPGenerator(2, 3, (16,))
    critic = LearnedKernelCritic(features or MLPFeatures(2, 8, (16,)), 8)
    return gan(generator, critic, kind=kind, latents=3, **({"beta": 0.1} | kwargs))


def train(model, path, num_steps=3, data=None, callbacks=(), ckpt_path=None):
    if data is None:
        data = torch.randn(BATCH, 2, generator=torch.Generator().manual_seed(1))
    trainer = quiet_trainer(path, max_steps=num_steps, callbacks=list(callbacks))
    trainer.fit(
        model, DataLoader(data, batch_size=len(data)), ckpt_path=ckpt_path, weights_only=True
    )
    return trainer


def assert_equal_parameters(one, other, tolerance):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (p - q).abs().max() <= tolerance, name


ADVERSARIAL = {"rule": GradientAscent, "alpha": 5.0}
CONFIGURATIONS = {
    "closed form": {},
    "batch": ADVERSARIAL,
    "split": ADVERSARIAL | {"estimator": Split()},
    "lagged": ADVERSARIAL | {"estimator": Lagged()},
    "double backward": ADVERSARIAL | {"method": "double_backward"},
    "partial": ADVERSARIAL | {"fraction": 0.5},
    "partial split": ADVERSARIAL | {"fraction": 0.6, "estimator": Split()},
    "no penalty": ADVERSARIAL | {"alpha": 0.0},
}


@pytest.mark.parametrize("num_parts", [5, 12])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_micro_batches_train_as_the_batch(name, num_parts, tmp_path):
    """Adam divides by the gradient's size, so SGD: errors are seen as they are."""
    kwargs = CONFIGURATIONS[name] | {"critic_optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}
    whole, parts = make_model(**kwargs), make_model(micro_batches=num_parts, **kwargs)
    start = copy.deepcopy(whole)
    train(whole, tmp_path)
    train(parts, tmp_path)
    assert_equal_parameters(whole, parts, 1e-12)
    moved = [
        (p - q).abs().max() for p, q in zip(whole.parameters(), start.parameters(), strict=True)
    ]
    assert max(moved) > 1e-3
    torch.testing.assert_close(penalty_of(whole), penalty_of(parts), rtol=1e-12, atol=0)


def penalty_of(model):
    return getattr(model.rule, "_last_penalty", torch.zeros(()))


class Listening(MMDGAN):
    """Keeps the vectors that are averaged over processes."""

    def _game(self, real):
        game = super()._game(real)
        if not isinstance(game.processes, Listener):
            self.averaged = []
            game.processes = Listener(self.averaged)
        return game


class Listener(Processes):
    def __init__(self, averaged):
        self.averaged = averaged

    def mean(self, tensor):
        self.averaged.append(tensor)
        return tensor


def with_state():
    """Networks whose passes draw masks and move buffers."""
    generator = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Dropout(0.3), nn.Linear(16, 2))
    hidden = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 16))
    for vector in hidden.parametrizations.weight[0].buffers():  # far from converged
        vector.copy_(nn.functional.normalize(torch.randn_like(vector), dim=0))
    return generator, nn.Sequential(hidden, nn.SiLU(), nn.Dropout(0.3), nn.Linear(16, 8))


def test_the_two_passes_of_a_penalty_see_one_mask(tmp_path):
    """The penalty's value is the mean slope of the second pass along the first one's L f."""
    generator, features = with_state()
    model = make_model(Listening, generator, features, micro_batches=3, **ADVERSARIAL)
    train(model, tmp_path, 1)
    direction = model.averaged[0]
    assert direction.shape == (sum(p.numel() for p in generator.parameters()),)
    torch.testing.assert_close(penalty_of(model), direction.square().sum(), rtol=1e-12, atol=0)


def test_a_micro_batch_embedding_is_adjoint_to_itself():
    """<J^T w, v> = <w, J v> needs the same masks and power iterations in every evaluation."""
    generator, features = with_state()
    embedding = MeanEmbedding(features, torch.randn(7, 3), generator, num_parts=3)
    w, v = torch.randn(8), torch.randn(embedding.num_parameters)
    buffers, state = copy.deepcopy(dict(features.named_buffers())), torch.get_rng_state()
    jv, tangents = embedding.push(v)
    torch.testing.assert_close(embedding.adjoint(w) @ v, w @ jv, rtol=1e-12, atol=0)
    assert tangents.shape == (7, 2)
    parameters = dict(generator.named_parameters())
    torch.testing.assert_close(embedding.mean_at(parameters), embedding.mean)
    assert torch.equal(state, torch.get_rng_state())
    for name, buffer in features.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("rule", [ClosedForm, GradientAscent])
def test_micro_batches_save_memory(rule, tmp_path):
    peaks = []
    for accumulate in (1, 4):
        model = make_model(
            MMDGAN,
            ConvGenerator((1, 8, 8), 3, (8, 8)),
            ConvFeatures((1, 8, 8), 8, (8, 8)),
            rule=rule,
            micro_batches=accumulate,
        )
        with LiveBytes() as memory:
            train(model, tmp_path, 1, torch.randn(64, 1, 8, 8))
        peaks.append(memory.peak)
    assert 3 < peaks[0] / peaks[1] < 4.5


# Partial penalties


def gradients_of(model, path, num_steps):
    """Return the critic's gradient of every step; nothing moves."""
    seen = []
    model.critic_optimizer = model.generator_optimizer = lambda p: torch.optim.SGD(p, lr=0.0)

    class Listen(Callback):
        def on_fit_start(self, trainer, pl_module):
            critic = trainer.optimizers[1]
            critic.register_step_pre_hook(lambda *_: seen.append(flat(pl_module.critic)))

    train(model, path, num_steps, callbacks=[Listen()])
    return seen


def flat(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize(("estimator", "size"), [(Batch(), 5), (Split(), 6)])
def test_a_partial_penalty_is_that_of_the_first_latents(estimator, size, tmp_path):
    """Of 12 latents and a fraction of 0.4: 4.8, upwards 5, and to an even number 6."""
    kwargs = {"fraction": 0.4, "estimator": estimator}
    (ours,) = gradients_of(make_model(**ADVERSARIAL | kwargs), tmp_path, 1)
    model = make_model(**ADVERSARIAL)
    with seeded(model.device, 0, 0, 0):
        z = model.sample_latents(BATCH)
    real = torch.randn(BATCH, 2, generator=torch.Generator().manual_seed(1))
    critic, generator = model.critic, model.generator
    penalty = parametric_gradient_penalty(critic, generator, z[:size], estimator=estimator)
    loss = critic(generator(z).detach()).mean() - critic(real).mean()
    loss = loss + 2.5 * penalty + 0.05 * critic.rkhs_norm2()
    theirs = torch.autograd.grad(loss, list(critic.parameters()))
    theirs = torch.cat([g.flatten() for g in theirs])
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["lagged", "partial split"])
def test_the_phase_of_a_penalty_is_resumed(name, tmp_path):
    """Three steps and four more, with a checkpoint between them, are seven steps."""
    kwargs = CONFIGURATIONS[name] | {"critic_steps": 2}
    through, first, second = (make_model(**kwargs) for _ in range(3))
    train(through, tmp_path, 5)
    trainer = train(first, tmp_path, 2)  # four critic steps: the next penalty is two steps ahead
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    train(second, tmp_path, 5, ckpt_path=tmp_path / "a.ckpt")
    assert_equal_parameters(through, second, 0.0)


class Population:
    """Finitely many latents, so that expectations over batches are known."""

    def __init__(self):
        torch.manual_seed(0)
        self.generator = MLPGenerator(2, 2, (4,))
        self.critic = LearnedKernelCritic(MLPFeatures(2, 3, (4,)), 3)
        self.critic.weights.data *= 3
        self.z = torch.randn(40, 2)
        rows = [parametric_gradient(self.critic, self.generator, z) for z in self.z.split(1)]
        self.gradients = torch.stack(rows)  # (40, P), of single latents
        self.mean = self.gradients.mean(0)
        self.covariance = self.gradients.T.cov(correction=0)

    def penalty(self, z, **kwargs):
        return parametric_gradient_penalty(self.critic, self.generator, z, **kwargs)

    def twin(self, name, num, num_batches=20_000):
        """The estimator in terms of single latents' gradients, on many batches."""
        draws = self.gradients[torch.randint(len(self.z), (num_batches, num))]
        if name == "split":
            return (draws[:, : num // 2].mean(1) * draws[:, num // 2 :].mean(1)).sum(1)
        means = draws.mean(1)
        if name == "lagged":
            return (means @ self.mean) ** 2 / self.mean.square().sum()
        return means.square().sum(1)

    def batch(self, num):
        return self.z[torch.randint(len(self.z), (num,))]


def lagged(direction):
    estimator = Lagged()
    estimator.observe(direction)
    return estimator


NUM_BATCHES, SIZE = 600, 8


@pytest.mark.parametrize("name", ["batch", "split", "lagged", "partial"])
def test_bias_and_variance_against_the_whole_population(name):
    """Expectation, to 5 standard errors, of value and gradient over batches with replacement."""
    population = Population()
    length2, noise = population.mean.square().sum(), population.covariance.trace()
    along = population.mean @ population.covariance @ population.mean / length2
    kwargs, size, bias = {
        "batch": ({}, SIZE, noise / SIZE),
        "split": ({"estimator": Split()}, SIZE, 0.0),
        "lagged": ({"estimator": lagged(population.mean)}, SIZE, along / SIZE),
        "partial": ({}, SIZE // 4, noise / (SIZE // 4)),
    }[name]
    values, gradients = [], []
    for _ in range(NUM_BATCHES):
        penalty = population.penalty(population.batch(size), **kwargs)
        values.append(penalty.detach())
        gradients.append(torch.autograd.grad(penalty, population.critic.weights)[0])
    values, gradients = torch.stack(values), torch.stack(gradients)
    error = values.std() / NUM_BATCHES**0.5
    assert abs(values.mean() - (length2 + bias)) < 5 * error
    twin = population.twin(name, size)
    errors_of_variance = [
        (v - v.mean()).square().var() ** 0.5 / len(v) ** 0.5 for v in (values, twin)
    ]
    assert abs(values.var() - twin.var()) < 5 * sum(errors_of_variance)
    if name in ("batch", "partial"):  # and the bias is there to be seen
        assert values.mean() - length2 > 5 * error
    if name == "split":
        whole = population.penalty(population.z)
        torch.testing.assert_close(whole.detach(), length2, rtol=1e-10, atol=0)
        (expected,) = torch.autograd.grad(whole, population.critic.weights)
        errors = gradients.std(0) / NUM_BATCHES**0.5
        assert ((gradients.mean(0) - expected).abs() < 5 * errors).all()
