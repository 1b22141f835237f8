"""The parametric-gradient penalty at what a module's critic was trained on."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mmd.callbacks.calls import CriticCall, LatentLog
from lightning_mmd.callbacks.foreign import takes
from lightning_mmd.estimators import Estimator
from lightning_mmd.latents import select
from lightning_mmd.passes import full_precision
from lightning_mmd.penalties import joint_penalty, penalised_critic

__all__ = ["RecordedPenalty"]


class RecordedPenalty:
    """The penalty of two networks, at recorded calls or at fresh latents.

    Args:
        networks: Critic and generator.
        parameters: The generator's parameters to differentiate in, by name.
        estimator: How a batch stands for the expectation.
        read: From what the critic returns and the number of samples to values (n,).
        output: From what the generator returns to samples; None where it returns samples.
        mean: Averages a tensor over processes.
    """

    def __init__(
        self,
        networks: tuple[nn.Module, nn.Module],
        parameters: Mapping[str, Tensor],
        estimator: Estimator,
        read: Callable[[Any, int], Tensor],
        output: Callable | None,
        mean: Callable[[Tensor], Tensor],
    ) -> None:
        self._critic, self._generator = networks
        self._parameters, self._estimator = parameters, estimator
        self._read, self._mean = read, mean
        if output is not None:
            self._generator = _OutputOf(self._generator, output)
            self._parameters = {f"network.{name}": p for name, p in parameters.items()}
        self._recorded_parameters = parameters

    def at(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the penalty at latents, and labels, which the critic gets where it takes them."""
        labelled = takes(self._critic, len(inputs))
        return penalised_critic(
            lambda x, *labels: self._read(self._critic(x, *labels if labelled else ()), len(x)),
            self._generator,
            [select(inputs, group) for group in self._estimator.groups(len(inputs[0]))],
            "forward",
            estimator=self._estimator,
            parameters=self._parameters,
            mean=self._mean,
        ).penalty

    def of(self, calls: list[CriticCall], log: LatentLog) -> Tensor:
        """Return the penalty at the samples of calls of the critic.

        Args:
            calls: At least one.
            log: Who recorded them.
        """
        groups = self._split(calls)
        slots = [
            {(id(slot.call), slot.output): slot for call in group for slot in call.slots}
            for group in groups
        ]

        def values(number: int, xs: Sequence[Tensor]) -> Tensor:
            samples = dict(zip(slots[number], xs, strict=True))
            return torch.cat([self._values(call, samples) for call in groups[number]])

        device = next(self._critic.parameters()).device
        with torch.enable_grad(), full_precision(device):
            pushes = [
                [log.push(slot, self._recorded_parameters) for slot in group.values()]
                for group in slots
            ]
        return joint_penalty(pushes, values, estimator=self._estimator, mean=self._mean)

    def _values(self, call: CriticCall, samples: Mapping[tuple[int, int], Tensor]) -> Tensor:
        args, kwargs = call.inputs(samples)
        values = self._read(self._critic(*args, **kwargs), call.total)
        rows = call.rows()
        return values if len(rows) == call.total else values[rows.to(values.device)]

    def _split(self, calls: list[CriticCall]) -> list[list[CriticCall]]:
        """Return the calls of each of the estimator's groups: a part of the samples of each."""
        groups = [self._estimator.groups(call.num_samples) for call in calls]
        if all(len(group) == 1 for group in groups):
            return [calls]
        return [
            [call.select(rows) for call, rows in zip(calls, parts, strict=True)]
            for parts in zip(*groups, strict=True)
        ]


class _OutputOf(nn.Module):
    """A network followed by a function that takes the samples out of what it returns."""

    def __init__(self, network: nn.Module, output: Callable) -> None:
        super().__init__()
        self.network, self._output = network, output

    def forward(self, *inputs: Tensor) -> Tensor:
        return self._output(self.network(*inputs))
