"""How a module that we did not write calls its networks: what went in, and what the critic saw."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from lightning_mmd.callbacks.observing import is_observed
from lightning_mmd.passes import Watch
from lightning_mmd.pushforward import Pushforward

__all__ = [
    "CriticCall",
    "GeneratorCall",
    "LatentLog",
    "OtherCall",
    "Place",
    "Samples",
    "first_tensor",
    "hangs_on",
    "replace_tensor",
]


class Place(NamedTuple):
    """Where a tensor stands among the arguments of a call, lists and dictionaries included."""

    position: int
    tensor: Tensor


def first_tensor(args: tuple, kwargs: dict, suits: Callable[[Tensor], bool]) -> Place | None:
    """Return the first tensor of a call that suits; None where none does."""
    for index, leaf in enumerate(tree_flatten((args, kwargs))[0]):
        if isinstance(leaf, Tensor) and suits(leaf):
            return Place(index, leaf)
    return None


def replace_tensor(args: tuple, kwargs: dict, place: Place, by: Tensor) -> tuple[tuple, dict]:
    """Return the arguments of a call with another tensor in a place."""
    leaves, spec = tree_flatten((args, kwargs))
    leaves[place.position] = by
    return tree_unflatten(leaves, spec)


def hangs_on(tensor: Tensor, parameters: set[int]) -> bool:
    """Whether the graph of a tensor leads to a parameter, given by ids."""
    waiting = [] if tensor.grad_fn is None else [tensor.grad_fn]
    visited = set(waiting)
    while waiting:
        node = waiting.pop()
        if id(getattr(node, "variable", None)) in parameters:
            return True
        following = {n for n, _ in node.next_functions if n is not None} - visited
        visited |= following
        waiting += following
    return False


class _Caller(nn.Module):
    """A generator that is called as a module calls it, from tensors to one of its outputs."""

    def __init__(self, network: nn.Module, call: "GeneratorCall", output: int) -> None:
        super().__init__()
        self.network = network
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in call.leaves]
        self._tensors = [i for i, leaf in enumerate(call.leaves) if isinstance(leaf, Tensor)]
        self._spec, self._output = call.spec, output

    def forward(self, _: Tensor, *tensors: Tensor) -> Tensor:
        leaves = list(self._leaves)
        for index, tensor in zip(self._tensors, tensors, strict=True):
            leaves[index] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        return tree_flatten(self.network(*args, **kwargs))[0][self._output]


@dataclass(eq=False)
class GeneratorCall:
    """One call of a generator.

    Attributes:
        leaves: What it was called with, flat.
        spec: The structure of that.
        outputs: Tensors that it returned, by their place, without a graph.
        versions: How often each had been written to.
    """

    leaves: list[Any]
    spec: TreeSpec
    outputs: dict[int, Tensor]
    versions: dict[int, int]

    def select(self, group: slice, num: int) -> "GeneratorCall":
        """Return the call for some of its `num` samples alone."""
        leaves = [_rows(leaf, num, group) for leaf in self.leaves]
        outputs = {index: _rows(x, num, group) for index, x in self.outputs.items()}
        return GeneratorCall(leaves, self.spec, outputs, self.versions)

    @property
    def is_plain(self) -> bool:
        """Whether one tensor went in, by position, and one came out."""
        return len(self.leaves) == 1 and isinstance(self.leaves[0], Tensor) and self._is_positional

    @property
    def _is_positional(self) -> bool:
        args, kwargs = tree_unflatten(self.leaves, self.spec)
        return not kwargs and len(args) == 1 and args[0] is self.leaves[0]


class Slot(NamedTuple):
    """Where a critic's input holds an output of the generator: a part of a tensor, along one axis.

    The whole tensor is the part that begins at 0 and ends at its length.
    """

    leaf: int
    axis: int
    start: int
    call: GeneratorCall
    output: int


@dataclass(eq=False)
class CriticCall:
    """One call of a critic on samples of the generator.

    Attributes:
        leaves: What it was called with, flat, without a graph.
        spec: The structure of that.
        slots: Where the samples stand.
        attached: Whether the samples hung on the generator's parameters.
    """

    leaves: list[Any]
    spec: TreeSpec
    slots: list[Slot]
    attached: bool
    total: int = field(init=False)

    def __post_init__(self) -> None:
        self.total = len(self.leaves[self.slots[0].leaf])

    @property
    def num_samples(self) -> int:
        """Samples of the first output that the call holds."""
        return len(self.slots[0].call.outputs[self.slots[0].output])

    def rows(self) -> Tensor:
        """Return which rows of the critic's output belong to samples."""
        rows = torch.zeros(self.total, dtype=torch.bool)
        for slot in self.slots:
            num = len(slot.call.outputs[slot.output])
            first, last = (slot.start, slot.start + num) if slot.axis == 0 else (0, self.total)
            rows[first:last] = True
        return rows.nonzero().flatten()

    def inputs(self, samples: Mapping[tuple[int, int], Tensor]) -> tuple[tuple, dict]:
        """Return the call's arguments with other samples in their slots.

        Args:
            samples: By ``(id(call), output)``.
        """
        dtype = next(iter(samples.values())).dtype  # of the penalty: not that of autocast
        leaves = [
            leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            for leaf in self.leaves
        ]
        for slot in self.slots:
            x, old = samples[id(slot.call), slot.output], leaves[slot.leaf]
            if x.shape == old.shape:
                leaves[slot.leaf] = x
                continue
            before = old.narrow(slot.axis, 0, slot.start)
            end = slot.start + x.shape[slot.axis]
            after = old.narrow(slot.axis, end, old.shape[slot.axis] - end)
            leaves[slot.leaf] = torch.cat([before, x, after], slot.axis)
        return tree_unflatten(leaves, self.spec)

    def select(self, group: slice) -> "CriticCall":
        """Return the call on some of its samples alone.

        Args:
            group: Which rows of the samples.

        Raises:
            ValueError: If the samples are not in the same rows of all arguments.
        """
        nums = {len(slot.call.outputs[slot.output]) for slot in self.slots}
        starts = {slot.start if slot.axis == 0 else 0 for slot in self.slots}
        if len(nums) > 1 or len(starts) > 1:
            raise ValueError(
                "an estimator that splits a batch needs a critic that sees the outputs of one call "
                "of the generator at a time. Use the estimator Batch()."
            )
        (start,) = starts
        rows = slice(start + group.start, start + group.stop)
        leaves = [_rows(leaf, self.total, rows) for leaf in self.leaves]
        halves = {id(slot.call): slot.call.select(group, *nums) for slot in self.slots}
        slots = [
            slot._replace(start=0 if slot.axis == 0 else slot.start, call=halves[id(slot.call)])
            for slot in self.slots
        ]
        return CriticCall(leaves, self.spec, slots, self.attached)


@dataclass(eq=False)
class OtherCall:
    """One call of a critic on samples that are not the generator's.

    Attributes:
        leaves: What it was called with, flat, without a graph.
        spec: The structure of that.
        first: Place of the first floating-point tensor.
    """

    leaves: list[Any]
    spec: TreeSpec
    first: int

    def has(self, place: Place) -> bool:
        """Whether the same values stand in a place."""
        own = self.leaves[place.position] if place.position < len(self.leaves) else None
        return isinstance(own, Tensor) and _equal(own, place.tensor.detach())


@dataclass(eq=False)
class Samples:
    """Some samples in a call of a critic, and what the critic was given beside them.

    Attributes:
        x: The samples, (n, ...), without a graph.
        leaf: Their place among the leaves.
        leaves: What the critic was called with, flat, for these samples alone.
        spec: The structure of that.
    """

    x: Tensor
    leaf: int
    leaves: list[Any]
    spec: TreeSpec

    @classmethod
    def of(
        cls, call: "CriticCall | OtherCall", leaf: int, rows: Tensor | None, dtype: torch.dtype
    ) -> "Samples":
        """Return those of a call that stand in some rows, or all, in a floating type."""
        num = len(call.leaves[leaf])
        leaves = [
            part.to(dtype) if isinstance(part, Tensor) and part.is_floating_point() else part
            for part in call.leaves
        ]
        if rows is not None:
            leaves = [_rows(part, num, rows) for part in leaves]
        return cls(leaves[leaf], leaf, leaves, call.spec)

    def inputs(self, x: Tensor) -> tuple[tuple, dict]:
        """Return the critic's arguments with other values for the samples."""
        leaves = list(self.leaves)
        leaves[self.leaf] = x
        return tree_unflatten(leaves, self.spec)


def _rows(leaf: Any, num: int, rows: slice | Tensor) -> Any:
    """Return rows of a tensor that has one for each sample; anything else as it is."""
    return leaf[rows] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == num else leaf


class LatentLog:
    """What the critic was trained on since its last step: whose outputs, and how it was called.

    A critic's input counts as an output of the generator where it holds the output's values: alone,
    or as a part of a tensor along its first two axes (real and generated samples in one batch, an
    input beside its translation), in any argument. Calls without gradient, or while the critic's
    parameters need none, train no critic. Where it saw both samples that were cut off from the
    generator and samples that were not, the latter belong to the generator's update; so do those
    that a step of the generator's optimizer followed.

    Args:
        generator: As the module calls it.
        critic: Likewise.
        network: The generator, uncompiled.
        others: Whether to keep the critic's calls on other samples too, see `take_others`.
    """

    def __init__(
        self, generator: nn.Module, critic: nn.Module, network: nn.Module, others: bool = False
    ) -> None:
        self._critic, self._network = critic, network
        self._parameters = {id(p) for p in network.parameters()}
        self._callers: dict[Any, _Caller] = {}
        self._generated: list[GeneratorCall] = []
        self._seen: list[CriticCall] = []
        self._others: list[OtherCall] | None = [] if others else None
        self._stepped = False
        self._records = False
        self.generator_was_called = False
        self.generator_called_since = False
        """Whether the generator has been called since the critic's last step."""
        self.handles = [
            generator.register_forward_hook(Watch(self._note_generator), with_kwargs=True),
            critic.register_forward_pre_hook(
                Watch(self._note_critic), with_kwargs=True, prepend=True
            ),
        ]

    def begin_batch(self) -> None:
        """Record from now on."""
        self._records = True
        self._generated.clear()  # what the critic has seen of them is kept
        if self._stepped and self._others:
            self._others.clear()  # they came after the critic's step, in the generator's update
        self._stepped = False

    def end_batch(self) -> None:
        """Record no more."""
        self._records = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing within."""
        before, self._records = self._records, False
        try:
            yield
        finally:
            self._records = before

    def end_generator_step(self, *_: Any) -> None:
        """Forget what belonged to the generator's update."""
        self._seen = [call for call in self._seen if not call.attached]

    def take(self) -> list[CriticCall]:
        """Return the calls since the critic's last step, and forget them."""
        seen, self._seen = self._seen, []
        self.generator_called_since = False
        self._stepped = True
        cut_off = [call for call in seen if not call.attached]
        return cut_off or seen

    def take_others(self) -> list["OtherCall"]:
        """Return the critic's calls on samples that are not the generator's, and forget them.

        Those since its last step; a call on the same samples counts once. What followed a step of
        the critic in the same batch belongs to the generator's update.
        """
        others, self._others = self._others or [], []
        return others

    def _note_generator(self, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not self._records or is_observed():
            return
        leaves, spec = tree_flatten((args, kwargs))
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        outputs = {
            index: leaf
            for index, leaf in enumerate(tree_flatten(output)[0])
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0
        }
        versions = {index: leaf._version for index, leaf in outputs.items()}
        outputs = {index: leaf.detach() for index, leaf in outputs.items()}
        self._generated.append(GeneratorCall(leaves, spec, outputs, versions))
        self.generator_was_called = self.generator_called_since = True

    def _note_critic(self, critic: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self._records or is_observed() or not torch.is_grad_enabled():
            return
        if not any(p.requires_grad for p in critic.parameters()):
            return
        leaves, spec = tree_flatten((args, kwargs))
        slots, attached = [], False
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim > 0:
                found = list(self._find(index, leaf))
                slots += found
                attached |= bool(found) and hangs_on(leaf, self._parameters)
        if slots:
            leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._seen = [c for c in self._seen if not (c.slots == slots and c.attached)]
            self._seen.append(CriticCall(leaves, spec, slots, attached))
        elif self._others is not None:
            place = first_tensor(args, kwargs, lambda x: x.is_floating_point() and x.ndim > 0)
            if place is None or any(call.has(place) for call in self._others):
                return
            leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._others.append(OtherCall(leaves, spec, place.position))

    def _find(self, index: int, leaf: Tensor) -> Iterator[Slot]:
        """Yield where a tensor holds outputs of the generator."""
        covered: set[tuple[int, int]] = set()
        for call in reversed(self._generated):
            for output, x in call.outputs.items():
                if x._version != call.versions[output]:
                    continue  # written over since
                place = _find_part(leaf.detach(), x)
                if place is not None and place not in covered:
                    covered.add(place)
                    yield Slot(index, *place, call, output)

    # The generator, called once more

    def push(self, slot: Slot, parameters: Mapping[str, Tensor]) -> Pushforward:
        """Return the pushforward of a generator's call to one of its outputs.

        Args:
            slot: Which.
            parameters: The generator's parameters to differentiate in, by name.
        """
        call = slot.call
        dtype = next(iter(parameters.values())).dtype
        tensors = [
            leaf.to(dtype) if leaf.is_floating_point() else leaf
            for leaf in call.leaves
            if isinstance(leaf, Tensor)
        ]
        num = len(call.outputs[slot.output])
        if call.is_plain and list(call.outputs) == [0] and len(tensors[0]) == num:
            return Pushforward(self._network, tensors[0], parameters)
        statics = tuple(repr(leaf) for leaf in call.leaves if not isinstance(leaf, Tensor))
        key = (slot.output, repr(call.spec), statics)
        if key not in self._callers:
            if len(self._callers) > _MOST_CALLERS:
                self._callers.clear()
            self._callers[key] = _Caller(self._network, call, slot.output)
        rows = torch.zeros(num, 0, dtype=dtype, device=call.outputs[slot.output].device)
        named = {f"network.{name}": value for name, value in parameters.items()}
        return Pushforward(self._callers[key], (rows, *tensors), named)


_MOST_CALLERS = 32


def _find_part(tensor: Tensor, x: Tensor) -> tuple[int, int] | None:
    """Return the axis and the start at which a tensor holds another one; None where it does not."""
    if tensor.ndim != x.ndim or tensor.device != x.device:
        return None
    differing = [i for i in range(x.ndim) if tensor.shape[i] != x.shape[i]]
    if not differing:
        return (0, 0) if _equal(tensor, x) else None
    if len(differing) > 1 or differing[0] > 1:
        return None
    (axis,) = differing
    length, whole = x.shape[axis], tensor.shape[axis]
    starts = sorted(range(whole - length + 1), key=lambda s: (s % length != 0, s))
    for start in starts:  # multiples first: equal parts side by side
        if _equal(tensor.narrow(axis, start, length), x):
            return axis, start
    return None


def _equal(part: Tensor, x: Tensor) -> bool:
    same = part.shape == x.shape and part.data_ptr() == x.data_ptr()
    if same and part.stride() == x.stride() and part.dtype == x.dtype:
        return True
    first = (slice(0, 1),) * x.ndim  # a look at one value spares most comparisons
    x = x.to(part.dtype)
    return torch.equal(part[first], x[first]) and torch.equal(part, x)
