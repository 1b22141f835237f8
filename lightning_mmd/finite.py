"""Numbers that a training must not go on with, found before anything moves."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mmd.game import DivergedError, Player, UpdateRule

__all__ = ["LARGEST_JUMP", "first_not_finite", "refuse_not_finite", "refuse_to_save", "state_of"]

LARGEST_JUMP = 1e5
"""A learning rate this many times the one that its optimizer was built with is a mistake."""


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, None if all are finite.

    One number a tensor is computed, its Euclidean norm, and all are looked at together. A norm that
    overflows is no proof, so such a tensor is then looked at element by element.

    Args:
        named: Names and tensors, of any shapes; what is no floating-point tensor is passed over.

    Examples:
        >>> first_not_finite([("a", torch.ones(2)), ("b", torch.tensor([1.0, float("nan")]))])
        'b'
    """
    pairs = [(name, t) for name, t in named if t.is_floating_point() and t.numel()]
    if _all_norms_finite([tensor for _, tensor in pairs]):
        return None
    return next((name for name, tensor in pairs if not tensor.isfinite().all()), None)


@torch.no_grad()
def _all_norms_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether norms are finite, in one kernel a device and dtype; True proves finite elements."""
    by_kind: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.ndim == 0 and tensor.device.type == "cpu":  # a count of Adam: no kernel
            if not math.isfinite(tensor.item()):
                return False
        elif tensor.is_floating_point() and tensor.numel():
            by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    foreach: Any = vars(torch)["_foreach_norm"]  # as torch.nn.utils.get_total_norm computes them
    return all(
        math.isfinite(torch.stack(list(foreach(group))).sum().item()) for group in by_kind.values()
    )


def _moving(player: Player) -> Iterator[Tensor]:
    """Yield the tensors of `state_of` without their names, which cost as much as the look."""
    yield from player.network.parameters()
    optimizer = getattr(player.optimizer, "optimizer", player.optimizer)
    for state in getattr(optimizer, "state", {}).values():
        if isinstance(state, Mapping):
            yield from (value for value in state.values() if isinstance(value, Tensor))


def state_of(player: Player) -> Iterator[tuple[str, Tensor]]:
    """Yield what a player moves by: its parameters, frozen ones too, and its optimizer's state.

    Args:
        player: Generator or critic.
    """
    names = {id(p): inner for inner, p in player.network.named_parameters()}
    for inner, parameter in player.network.named_parameters():
        yield f"the parameter {player.name}.{inner}", parameter
    optimizer = getattr(player.optimizer, "optimizer", player.optimizer)
    for parameter, state in getattr(optimizer, "state", {}).items():
        if isinstance(state, Mapping):
            for key, value in state.items():
                if isinstance(value, Tensor):
                    whose = f"{player.name}.{names.get(id(parameter), '?')}"
                    yield f"{key} of {whose} in the {player.name}'s optimizer", value


def refuse_not_finite(players: Iterable[Player], rule: UpdateRule) -> None:
    """Look at everything that an update starts from, but for data and latents.

    Args:
        players: Generator and critic.
        rule: The rule; its numbers may have been changed while it trains.

    Raises:
        DivergedError: If a parameter, an optimizer's state, a learning rate or a number of the rule
            is NaN or infinite; nothing has moved then.
        ValueError: If a learning rate is negative, or more than `LARGEST_JUMP` times the one that
            its optimizer was built with: by schedules that multiply, training has diverged.
    """
    players = list(players)
    if not _all_norms_finite(tensor for player in players for tensor in _moving(player)):
        found = first_not_finite(pair for player in players for pair in state_of(player))
        if found is not None:
            raise DivergedError(found)
    for player in players:
        _refuse_rates(player)
    for field in fields(rule) if is_dataclass(rule) else ():
        value = getattr(rule, field.name)
        if isinstance(value, float) and not math.isfinite(value) and field.init:
            raise DivergedError(f"{field.name} of {type(rule).__name__}")


def _refuse_rates(player: Player) -> None:
    """Refuse learning rates that are not finite, negative, or far above what was asked for."""
    optimizer = getattr(player.optimizer, "optimizer", player.optimizer)
    built = float(getattr(optimizer, "defaults", {}).get("lr", 0.0))
    for group in getattr(optimizer, "param_groups", []):
        rate = float(group["lr"])
        if not math.isfinite(rate):
            raise DivergedError(f"the learning rate of the {player.name}")
        if rate < 0:
            raise ValueError(
                f"the learning rate of the {player.name} is {rate:g}. It must be at least 0: "
                "look at its optimizer and scheduler."
            )
        asked = max(built, float(group.get("initial_lr", 0.0)), float(group.get("max_lr", 0.0)))
        if rate > LARGEST_JUMP * asked > 0:
            raise ValueError(
                f"the learning rate of the {player.name} has diverged: it is {rate:g}, and its "
                f"optimizer was built with {asked:g}. Look at what changes it, a scheduler or a "
                "callback; if it is meant, build the optimizer with it."
            )


def refuse_to_save(network: nn.Module, optimizer_states: Any) -> None:
    """Look at what a checkpoint is about to hold.

    Args:
        network: The module; its buffers may hold infinities (masks), its parameters none.
        optimizer_states: The checkpoint's own.

    Raises:
        DivergedError: If something in it is not finite.
    """
    found = first_not_finite(
        [
            *((f"the parameter {name}", p) for name, p in network.named_parameters()),
            *(("the state of an optimizer", t) for t in _tensors(optimizer_states)),
        ]
    )
    if found is not None:
        raise DivergedError(
            f"{found} is not finite, so this state is not saved. Go on from the last checkpoint, "
            "which is left as it is, with lower learning rates."
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
