r"""Mean embeddings of samples, :math:`m = \frac1n\sum_i\phi(x_i)`, and of a generator's samples."""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_mmd.critic_values import refuse_once_differentiable
from lightning_mmd.latents import Inputs, as_inputs, select
from lightning_mmd.passes import Replay, full_precision, unfused_attention
from lightning_mmd.pushforward import Pushforward

__all__ = ["EmbeddingPart", "MeanEmbedding"]

Records = tuple[Replay, Replay]
"""What the passes of generator and features began with."""


class _Given(nn.Module):
    """Stands for a generator where samples are given."""

    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        return x


class EmbeddingPart:
    r"""The mean embedding of one part of a batch, on one process, with its derivatives.

    J is never formed: :meth:`adjoint` is one reverse pass, :meth:`push` one forward-mode pass, and
    both reuse the graph of the single evaluation made on construction.

    Args:
        features: Feature map from samples (n, ...), and labels if there are any, to (n, r).
        inputs: What the generator is called with, or samples where there is none; then labels.
        generator: Module from latents to samples, or None.
        parameters: See :class:`~lightning_mmd.pushforward.Pushforward`.
        records: Passes to repeat, the ``records`` of another part: their buffers and random numbers
            are used again, and the present ones are left alone.

    Attributes:
        samples: The samples, of shape (n, ...).
        mean: m of shape (r,), with the graph in the features' parameters.
        records: Buffers and random states that the passes of generator and features began with.

    Raises:
        ValueError: If the features are not of shape (n, r).
    """

    def __init__(
        self,
        features: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        generator: nn.Module | None,
        parameters: Mapping[str, Tensor] | None,
        records: Records | None = None,
    ) -> None:
        of_generator, of_features = records or (None, None)
        if generator is None:
            generator, parameters = _Given(), {}
        self.pushforward = Pushforward(
            generator, inputs, parameters, reuse=True, record=of_generator
        )
        self.samples = self.pushforward.samples.requires_grad_()
        self.labels = inputs[1:]
        num = len(self.samples)
        with torch.enable_grad(), full_precision(self.samples.device), unfused_attention():
            of_features = of_features or Replay(features, self.samples.device)
            phi = (features if records is None else of_features)(self.samples, *self.labels)
            self.records = (self.pushforward.record, of_features)
            if not isinstance(phi, Tensor) or phi.ndim != 2 or len(phi) != num:
                got = tuple(phi.shape) if isinstance(phi, Tensor) else type(phi).__name__
                raise ValueError(
                    f"features must map {num} samples to a matrix of shape ({num}, r), got "
                    f"{got}. Flatten the feature net's output."
                )
            self.mean = phi.mean(0)

    def witness_gradient(self, w: Tensor) -> Tensor:
        r"""Gradient :math:`\frac1n \nabla f(x_i)`, f = <w, phi>, with a graph.

        Args:
            w: Weights of shape (r,).

        Returns:
            Tensor of the samples' shape, differentiable in w and in the features' parameters.
        """
        with torch.enable_grad(), full_precision(w.device):
            return torch.autograd.grad(
                self.mean, self.samples, w, create_graph=True, materialize_grads=True
            )[0]

    def witness_gradient_at(self, w: Tensor, samples: Tensor) -> Tensor:
        """Return the gradients (1/n) grad f(x_i) of the witness at other samples, without a graph.

        Buffers and dropout masks of the features are those of this embedding.
        """
        x = samples.detach().requires_grad_()
        with torch.enable_grad(), full_precision(x.device):
            _, features = self.records
            mean = features(x, *self.labels).mean(0)
            return torch.autograd.grad(mean, x, w, materialize_grads=True)[0]

    def mean_at(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the mean embedding at other generator parameters, by name, without a graph.

        Latents, buffers and dropout masks are those of this embedding, and the features still
        those with the parameters of the present moment.
        """
        _, features = self.records
        with torch.no_grad(), full_precision(self.samples.device):
            return features(self.pushforward.replay(parameters), *self.labels).mean(0)

    def adjoint(self, w: Tensor) -> Tensor:
        """Return J^T w = L f of the witness with weights w, of shape (P,)."""
        with full_precision(w.device):
            (c,) = torch.autograd.grad(
                self.mean, self.samples, w, retain_graph=True, materialize_grads=True
            )
        return self.pushforward.cotangent(c)

    def push(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return J v of shape (r,) and the samples' tangents dx."""
        dx = self.pushforward.tangent(v)
        u, reverse = self._transposed_graph
        if not reverse.requires_grad:
            return torch.zeros_like(u), dx
        with full_precision(v.device):
            (jv,) = torch.autograd.grad(reverse, u, dx, retain_graph=True)
        return jv, dx

    @functools.cached_property
    def _transposed_graph(self) -> tuple[Tensor, Tensor]:
        """The features' reverse pass as a graph that is linear in its weights u."""
        u = torch.zeros_like(self.mean, requires_grad=True)
        reverse = self.witness_gradient(u)
        refuse_once_differentiable([reverse])
        return u, reverse


class MeanEmbedding:
    r"""The mean embedding :math:`m(\theta) = \frac1n\sum_i \phi(G_\theta(z_i))` and its J.

    With several parts, one at a time is evaluated and in memory: the same mean, adjoint and
    tangents to rounding. A part is then evaluated anew whenever it is needed, with the buffers and
    random numbers that it had first, so that each product with J or its transpose costs a forward
    pass of generator and features more. The parts are z[j::num_parts].

    Args:
        features: Feature map from samples (n, ...) to (n, r).
        z: Latents of shape (n, ...), or samples where there is no generator; or a tuple of these
            and labels, which generator and features get too.
        generator: Module from latents to samples; None where samples are given.
        parameters: See :class:`~lightning_mmd.pushforward.Pushforward`.
        num_parts: Number of parts, >= 1.
        mean: Averages a tensor over processes; default: this process is alone.

    Attributes:
        mean: m of shape (r,), over all processes, without a graph.
        samples: The samples of this process, of shape (n, ...).

    Raises:
        ValueError: If the features are not of shape (n, r).
    """

    def __init__(
        self,
        features: Callable[..., Tensor],
        z: Inputs,
        generator: nn.Module | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        num_parts: int = 1,
        mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self._inputs = as_inputs(z)
        self._num = len(self._inputs[0])
        self._network = (features, generator, parameters)
        self._mean_over_processes = mean
        self._indices = [slice(None)]
        if num_parts > 1:
            self._indices = [slice(j, None, num_parts) for j in range(min(num_parts, self._num))]
        self._records: list[Records | None] = [None] * len(self._indices)
        self._kept: EmbeddingPart | None = None  # one part keeps its graph, several do not
        samples: list[Tensor] = []
        self.mean = mean(self.average(lambda part, _: self._begin(part, samples)))
        self.samples = samples[0]
        if num_parts > 1:
            self.samples = torch.empty_like(torch.cat(samples))
            for index, some in zip(self._indices, samples, strict=True):
                self.samples[index] = some

    def _begin(self, part: EmbeddingPart, samples: list[Tensor]) -> Tensor:
        self._records[len(samples)] = part.records
        self.num_parameters = part.pushforward.num_parameters
        samples.append(part.samples.detach())
        if len(self._indices) == 1:
            self._kept = part
        return part.mean.detach()

    def _part(self, number: int) -> EmbeddingPart:
        if self._kept is not None:
            return self._kept
        features, generator, parameters = self._network
        inputs = select(self._inputs, self._indices[number])
        return EmbeddingPart(features, inputs, generator, parameters, self._records[number])

    def average(self, evaluate: Callable[[EmbeddingPart, slice], Tensor]) -> Tensor:
        """Return the mean over samples of what a function makes of each part.

        Args:
            evaluate: Function of a part and its slice of the batch to a tensor that is a mean over
                the part's samples.

        Returns:
            Tensor of the function's shape, of this process.
        """
        if len(self._indices) == 1:
            return evaluate(self._part(0), self._indices[0])
        sizes = [len(range(self._num)[index]) for index in self._indices]
        terms = (  # no name holds a part: there would be two at a time
            evaluate(self._part(number), index) * (size / self._num)
            for number, (index, size) in enumerate(zip(self._indices, sizes, strict=True))
        )
        return functools.reduce(torch.add, terms)

    def mean_at(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return m at other generator parameters, by name, averaged over processes.

        Latents, buffers and dropout masks are those of this embedding, and the features still
        those with the parameters of the present moment.
        """
        return self._mean_over_processes(self.average(lambda part, _: part.mean_at(parameters)))

    def adjoint(self, w: Tensor) -> Tensor:
        """Return J^T w = L f of the witness with weights w, (P,), averaged over processes."""
        return self._mean_over_processes(self.average(lambda part, _: part.adjoint(w)))

    def push(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return J v of shape (r,), averaged over processes, and this process's tangents dx."""
        tangents = torch.empty_like(self.samples)

        def push_part(part: EmbeddingPart, index: slice) -> Tensor:
            jv, dx = part.push(v)
            tangents[index] = dx
            return jv

        return self._mean_over_processes(self.average(push_part)), tangents
