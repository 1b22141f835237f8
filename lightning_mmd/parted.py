"""Forward passes of a batch in parts, and embeddings that all processes share."""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mmd.critic_values import evaluate_critic
from lightning_mmd.game import Game, Player, Processes
from lightning_mmd.kernel_objectives import SlopePenalty
from lightning_mmd.latents import select
from lightning_mmd.passes import Replay, frozen_power_iterations

__all__ = [
    "PartedPass",
    "SharedEmbedding",
    "Terms",
    "contiguous_parts",
    "generate",
    "interleaved_parts",
    "moved_gradient",
    "pull_back",
    "slope_alone",
    "summed",
]

Inputs = tuple[Tensor, ...]
Terms = tuple[Tensor, ...]
"""Means over the samples of a micro-batch."""


def contiguous_parts(num: int, num_parts: int) -> list[slice]:
    """Split ``num`` samples into at most ``num_parts`` slices of about one size."""
    num_parts = min(num, num_parts)
    ends = [num * k // num_parts for k in range(num_parts + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]


def interleaved_parts(game: Game, groups: Sequence[slice]) -> list[list[Tensor]]:
    """Split groups of samples into index sets of at most batch_size / micro_batches in all.

    Args:
        game: What is played.
        groups: Slices of the batch that each part has its share of, see `Estimator.groups`.

    Returns:
        For each part, the indices of its share of each group; no part where there are no samples.
    """
    sizes = [group.stop - group.start for group in groups]
    if not sum(sizes):
        return []
    num_parts = math.ceil(sum(sizes) / math.ceil(game.batch_size / game.micro_batches))
    num_parts = min(num_parts, *sizes) if len(sizes) > 1 else num_parts
    device = game.images.device
    indices = [torch.arange(group.start, group.stop, device=device) for group in groups]
    return [[index[j::num_parts] for index in indices] for j in range(num_parts)]


class PartedPass:
    """A network's pass over a batch: kept with its graph, or in parts that are repeated.

    Each part is evaluated first without a graph. :meth:`part` evaluates it anew, from the buffers
    and the random state that it had first, so that one graph is in memory at a time. Power
    iterations of spectral norms move once a batch. With one part the graph is simply kept.

    Args:
        network: The network.
        inputs: Function of a part's number, and of whether a graph is wanted, to its inputs.
        parts: Slices of the batch, see :func:`contiguous_parts`.
        keep: With one part: whether its graph is kept.

    Attributes:
        parts: The slices.
        records: Buffers and random state that each part began with.
        whole: The output for the batch, without a graph.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Callable[[int, bool], Inputs],
        parts: Sequence[slice],
        keep: bool = True,
    ) -> None:
        self._network, self._inputs = network, inputs
        self.parts = parts
        self.records: list[Replay] = []
        self._kept: Tensor | None = None
        with_graph = keep and len(parts) == 1
        outputs = []
        for k in range(len(parts)):
            x = inputs(k, with_graph)
            self.records.append(Replay(network, x[0].device))
            with self._held(k), torch.set_grad_enabled(with_graph):
                outputs.append(network(*x))
        if len(parts) == 1:
            self._kept = outputs[0]
        self.whole = torch.cat([output.detach() for output in outputs])

    def _held(self, k: int) -> AbstractContextManager[None]:
        return nullcontext() if k == 0 else frozen_power_iterations(self._network)

    def part(self, k: int) -> Tensor:
        """Return the output of a part, with its graph."""
        if self._kept is not None:
            return self._kept
        with self._held(k), torch.enable_grad():
            return self.records[k](*self._inputs(k, True))

    def again(self, k: int, *inputs: Tensor) -> Tensor:
        """Return the output at other inputs, as a part's pass would have made it."""
        with self._held(k):
            return self.records[k](*inputs)


def generate(game: Game, z: Inputs, keep: bool = True) -> PartedPass:
    """Return the generator's pass over latents of a batch, in the game's micro-batches.

    Args:
        game: What is played.
        z: Latents, and labels where there are any.
        keep: Whether the graph of a pass in one part is kept.
    """
    parts = contiguous_parts(game.batch_size, game.micro_batches)
    return PartedPass(game.generator.network, lambda k, _: select(z, parts[k]), parts, keep)


class SharedEmbedding:
    """Embeddings of a batch that is shared out over processes, as leaves of one Gram matrix.

    Args:
        embedding: The pass of the critic over this process's share.
        processes: The processes.

    Attributes:
        everyone: Embeddings of all processes, of shape (W n, d), in the order of ranks: a leaf that
            requires a gradient, in float32 at least.

    Raises:
        ValueError: If the embeddings are not of shape (n, d).
    """

    def __init__(self, embedding: PartedPass, processes: Processes) -> None:
        self.embedding, self._processes = embedding, processes
        own = embedding.whole
        if own.ndim != 2:
            raise ValueError(
                "DeepKernel needs a critic from samples to embeddings of shape (n, d), got shape "
                f"{tuple(own.shape)}. Use EmbeddingCritic(features, num_features), or flatten its "
                "output."
            )
        own = own.float() if own.dtype in (torch.bfloat16, torch.float16) else own
        self._offset = processes.rank * len(own)
        self.everyone = processes.gather(own).flatten(0, 1).requires_grad_()

    def rows(self, k: int) -> slice:
        """Return where a part of this process's share stands among all rows."""
        part = self.embedding.parts[k]
        return slice(self._offset + part.start, self._offset + part.stop)


def pull_back(
    player: Player, terms: Sequence[tuple[SharedEmbedding, Tensor]], processes: Processes
) -> Tensor:
    """Return the gradient in a player's parameters of a loss of shared embeddings.

    Args:
        player: Whose gradient.
        terms: Embeddings of equally many parts, each with the gradient of the loss in ``everyone``,
            the same on all processes.
        processes: The processes.

    Returns:
        Vector of shape (P,), of this process, whose mean over processes is the whole gradient.
    """
    total = terms[0][1].new_zeros(())
    for k in range(len(terms[0][0].embedding.parts)):
        loss = total.new_zeros(())
        for shared, cotangent in terms:
            c = cotangent[shared.rows(k)]
            loss = loss + (shared.embedding.part(k).to(c.dtype) * c).sum()
        total = total + player.gradient(loss)
        del loss  # and its graph, before the next is made
    return processes.size * total


def summed(
    evaluate: Callable[[Sequence[Any]], Terms],
    weights: tuple[float, ...],
    parts: Sequence[Sequence[Any]],
    player: Player,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Sum terms over micro-batches, one in memory, and add the gradient of their weighted sum.

    Args:
        evaluate: Function of a part to its terms.
        weights: Weights of the terms in the sum whose gradient is wanted.
        parts: What ``evaluate`` takes of each part, see :func:`interleaved_parts`.
        player: In whose parameters.
        total: A gradient to add it to.

    Returns:
        The terms and the total gradient, of this process, without a graph; no total where there was
        none and there are no parts.
    """
    terms = next(iter(player.parameters.values())).new_zeros(len(weights))
    gradient = total if len(parts) == 1 else None  # parts are summed first: as the batch would be
    for part in parts:
        values = torch.stack(evaluate(part)).to(terms.dtype)
        gradient = player.gradient(values @ values.new_tensor(weights), onto=gradient)
        terms += values.detach()
        del values  # and its graph, before the next is made
    if len(parts) > 1 and total is not None and gradient is not None:
        return terms, total.add_(gradient)
    return terms, total if gradient is None else gradient


def moved_gradient(
    game: Game, fake: Tensor, labels: Inputs, values: Tensor, term: Tensor, replay: Replay
) -> Tensor | None:
    """Gradient of a term in the generator, with the gradients that hooks give the samples.

    It is None where all hooks leave the step alone. The critic is differentiated at other samples
    with the loss's own weights at the clean values.
    """
    (weights,) = torch.autograd.grad(term, values, retain_graph=True)

    def gradient_at(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            at_x = evaluate_critic(replay, x, *labels)
            return torch.autograd.grad(at_x, x, weights, materialize_grads=True)[0]

    gradients = game.moved(fake, gradient_at)
    if gradients is None:
        return None
    return game.generator.gradient((fake * gradients.detach()).sum(), retain_graph=True)


def slope_alone(
    game: Game, slope: SlopePenalty, points: Inputs, weight: float, total: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the slope of the critic at points that its objective does not see.

    Args:
        game: What is played.
        slope: The penalty.
        points: Points, and labels where there are any.
        weight: Of the penalty, in the gradient.
        total: A gradient to add it to.

    Returns:
        The penalty and the gradient, see :func:`summed`.
    """
    num, network = len(points[0]), game.critic.network
    critic = functools.partial(evaluate_critic, network)

    def evaluate(part: Sequence[Tensor]) -> Terms:
        return (slope.value(critic, select(points, part[0])) * (len(part[0]) / num),)

    parts = interleaved_parts(game, (slice(0, num),))
    with frozen_power_iterations(network):
        (steepness,), total = summed(evaluate, (weight,), parts, game.critic, total)
    return steepness, total
