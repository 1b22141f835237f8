"""The iterations of MMDGAN, written by hand in plain PyTorch, and those of its rivals."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call

from lightning_mmd import LearnedKernelCritic, input_gradient_penalty
from lightning_mmd.embedding import EmbeddingPart, MeanEmbedding
from lightning_mmd.estimators import Batch, Estimator, Lagged
from lightning_mmd.parameters import unflatten
from lightning_mmd.penalties import Method, penalised_critic
from lightning_mmd.witness import WitnessSolution, solve_embedding

Penalise = Callable[["Pair", Tensor, Tensor], Tensor]
"""From a pair, real samples and latents to a critic's loss."""


@dataclass
class Pair:
    """Two networks, their optimizers and what is carried from one iteration to the next."""

    generator: nn.Module
    critic: LearnedKernelCritic
    generator_optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer
    alpha: float = 1.0
    beta: float = 1e-2
    direction: Tensor | None = None
    solution: WitnessSolution | None = None


def adversarial_pair(generator: nn.Module, critic: LearnedKernelCritic, **weights: float) -> Pair:
    """Return a pair with the adversarial mode's default optimizers."""
    return Pair(
        generator,
        critic,
        torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.0, 0.9)),
        torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.0, 0.9)),
        **weights,
    )


def closed_form_pair(generator: nn.Module, critic: LearnedKernelCritic, **weights: float) -> Pair:
    """Return a pair with the closed form's default optimizers."""
    return Pair(
        generator,
        critic,
        torch.optim.SGD(generator.parameters(), lr=0.4 * weights.get("alpha", 1.0)),
        torch.optim.Adam(critic.features.parameters(), lr=5e-4, betas=(0.0, 0.9)),
        **weights,
    )


# Losses of a critic


def no_penalty(pair: Pair, real: Tensor, z: Tensor) -> Tensor:
    """The difference of the means and the RKHS norm."""
    with torch.no_grad():
        fake = pair.generator(z)
    return _loss(pair, pair.critic(real), pair.critic(fake))


def r1(pair: Pair, real: Tensor, z: Tensor) -> Tensor:
    """R1, from the critic's pass over the real samples that the loss makes anyhow."""
    with torch.no_grad():
        fake = pair.generator(z)
    real = real.detach().requires_grad_()
    on_real = pair.critic(real)
    (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
    return _loss(pair, on_real, pair.critic(fake)) + 5 * slope.square().sum() / len(real)


def wgan_gp(pair: Pair, real: Tensor, z: Tensor) -> Tensor:
    """WGAN-GP, which evaluates the critic between real and generated samples too."""
    with torch.no_grad():
        fake = pair.generator(z)
    penalty = input_gradient_penalty(pair.critic, real, fake)
    return _loss(pair, pair.critic(real), pair.critic(fake)) + 10 * penalty


def ours(method: Method = "forward", estimator: Estimator | None = None) -> Penalise:
    """The library's penalty; `Lagged` takes the last generator step's direction."""
    estimator = Batch() if estimator is None else estimator

    def loss(pair: Pair, real: Tensor, z: Tensor) -> Tensor:
        if isinstance(estimator, Lagged) and pair.direction is not None:
            estimator.observe(pair.direction)
        groups = [(z[group],) for group in estimator.groups(len(z))]
        on_fake = penalised_critic(pair.critic, pair.generator, groups, method, estimator=estimator)
        unpenalised = _loss(pair, pair.critic(real), on_fake.values)
        return unpenalised + pair.alpha / 2 * on_fake.penalty

    return loss


def by_hand(pair: Pair, real: Tensor, z: Tensor) -> Tensor:
    """The penalty by the forward method, as one would write it for one's own networks."""
    parameters = {n: p.detach().requires_grad_() for n, p in pair.generator.named_parameters()}
    samples = functional_call(pair.generator, parameters, (z,))
    x = samples.detach().requires_grad_()
    on_fake = pair.critic(x)
    (slope,) = torch.autograd.grad(on_fake.mean(), x, create_graph=True)
    v = torch.autograd.grad(samples, list(parameters.values()), slope.detach())
    with torch.no_grad(), forward_ad.dual_level():
        duals = {
            n: forward_ad.make_dual(p.detach(), t)
            for (n, p), t in zip(parameters.items(), v, strict=True)
        }
        tangents = forward_ad.unpack_dual(functional_call(pair.generator, duals, (z,))).tangent
    penalty = 2 * (slope * tangents).sum()
    return _loss(pair, pair.critic(real), on_fake) + pair.alpha / 2 * penalty


def _loss(pair: Pair, on_real: Tensor, on_fake: Tensor) -> Tensor:
    return on_fake.mean() - on_real.mean() + pair.beta / 2 * pair.critic.weights.square().sum()


# Iterations


def critic_step(pair: Pair, loss: Penalise, real: Tensor, z: Tensor) -> None:
    """Move the critic."""
    parameters = list(pair.critic.parameters())
    _step(
        pair.critic_optimizer,
        parameters,
        torch.autograd.grad(loss(pair, real, z), parameters, materialize_grads=True),
    )


def generator_step(pair: Pair, z: Tensor) -> None:
    """Move the generator, and keep its direction."""
    parameters = list(pair.generator.parameters())
    loss = -pair.critic(pair.generator(z)).mean()
    gradients = torch.autograd.grad(loss, parameters)
    pair.direction = -torch.cat([g.reshape(-1) for g in gradients])
    _step(pair.generator_optimizer, parameters, gradients)


def adversarial_iteration(pair: Pair, loss: Penalise, real: Tensor, z: Sequence[Tensor]) -> None:
    """A step of the critic and one of the generator, on latents of their own."""
    critic_step(pair, loss, real, z[0])
    generator_step(pair, z[1])


def closed_form_update(
    pair: Pair, real: Tensor, z: Tensor, iterations: int, *, tolerance: float = 1e-3
) -> None:
    """Solve for the witness, move the generator along L f, the features up, certificate included.

    The library solves; the loop around it is written by hand.
    """
    embedding = MeanEmbedding(pair.critic.features, z, pair.generator)
    on_real = pair.critic.features(real).mean(0)
    solution = pair.solution = solve_embedding(
        embedding,
        on_real.detach() - embedding.mean,
        alpha=pair.alpha,
        beta=pair.beta,
        tolerance=tolerance,
        max_iterations=iterations,
        initial=None if pair.solution is None else pair.solution.weights,
    )
    w = solution.weights

    def objective(part: EmbeddingPart, _: slice) -> Tensor:
        slope = (part.witness_gradient(w) * solution.tangents).sum()
        return w @ (on_real - part.mean) - pair.alpha * slope

    features = list(pair.critic.features.parameters())
    ascent = embedding.average(objective)
    gradients = torch.autograd.grad(-ascent, features, materialize_grads=True)
    parameters = dict(pair.generator.named_parameters())
    moves = unflatten(-solution.parametric_gradient, parameters)
    _step(pair.generator_optimizer, parameters.values(), moves.values())
    embedding.mean_at(parameters)
    pair.critic.weights.data.copy_(w)
    _step(pair.critic_optimizer, features, gradients)


def _step(
    optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], gradients: Iterable[Tensor]
) -> None:
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g
    optimizer.step()
    optimizer.zero_grad()
