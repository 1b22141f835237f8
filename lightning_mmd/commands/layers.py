"""Configurations laid over one another."""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["config_files", "tell_of_replaced_callbacks", "with_named_callbacks"]

_NAMED = re.compile(r"--trainer\.callbacks\.([A-Z]\w*)\.([\w.]+)(?:=(.*))?", re.DOTALL)


def config_files(arguments: Sequence[str]) -> list[str]:
    """Return the files of a command line's ``--config``, in order."""
    files = []
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before in ("--config", "-c"):
            files.append(word)
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
    return files


def tell_of_replaced_callbacks(files: Sequence[str]) -> None:
    """Say which callbacks of a configuration a later one replaces: a list is replaced as a whole.

    Args:
        files: Paths of the configurations, in the order in which one is laid over the other.
    """
    if len(files) < 2:  # the usual start reads no file twice
        return
    before: tuple[str, list[str]] | None = None
    for file in files:
        callbacks = _trainer_of(file).get("callbacks")
        if not isinstance(callbacks, list):
            continue
        names = [_name_of(callback) for callback in callbacks]
        dropped = [name for name in before[1] if name not in names] if before else []
        if before and dropped:
            rank_zero_warn(
                f"{file} replaces the callbacks of {before[0]}: {', '.join(dropped)} "
                f"{'is' if len(dropped) == 1 else 'are'} gone. Write 'callbacks+:' there to add to "
                "them instead."
            )
        before = file, names


def with_named_callbacks(arguments: Sequence[str]) -> list[str]:
    """Let an option reach any callback of the configurations by the name of its class.

    ``--trainer.callbacks.MMDTracker.every_n_steps 10`` becomes the whole list of callbacks, with
    that one changed: by itself the parser's option reaches the last of a list.

    Args:
        arguments: A command line.

    Returns:
        The command line without such options, with the list behind the last configuration.

    Raises:
        ValueError: If no callback has that name, or several have.
    """
    words, wanted = list(arguments), []
    for index in range(len(words) - 1, -1, -1):
        named = _NAMED.fullmatch(words[index])
        if named is None:
            continue
        value = named[3]
        if value is None:
            if index + 1 == len(words):
                raise ValueError(f"{words[index]} needs a value: {words[index]}=VALUE.")
            value = words.pop(index + 1)
        words.pop(index)
        wanted.append((named[1], named[2], yaml.safe_load(value)))
    if not wanted:
        return words
    callbacks: list[Any] = []
    for file in config_files(words):
        trainer = _trainer_of(file)
        found, more = trainer.get("callbacks"), trainer.get("callbacks+")
        callbacks = found if isinstance(found, list) else callbacks
        callbacks = [*callbacks, *(more if isinstance(more, list) else [more] if more else [])]
    callbacks = [
        copy.deepcopy(c) if isinstance(c, dict) else {"class_path": str(c)} for c in callbacks
    ]
    for name, option, value in reversed(wanted):
        own = [c for c in callbacks if _name_of(c).rpartition(".")[2] == name]
        if len(own) != 1:
            names = ", ".join(_name_of(c).rpartition(".")[2] for c in callbacks) or "none"
            raise ValueError(
                f"the configurations have {len(own)} callbacks {name}, expected one. They have: "
                f"{names}."
            )
        *path, last = option.split(".")
        place = own[0].setdefault("init_args", {})
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    files = config_files(words)
    ends = [i + 1 for i, w in enumerate(words) if w in files or w.startswith("--config=")]
    behind = max(ends, default=len(words))
    words.insert(behind, f"--trainer.callbacks={json.dumps(callbacks)}")
    return words


def _trainer_of(file: str) -> dict[str, Any]:
    """Return what a configuration says of the trainer; nothing where it cannot be read."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}  # the parser says what is wrong with it
    trainer = content.get("trainer") if isinstance(content, dict) else None
    return trainer if isinstance(trainer, dict) else {}


def _name_of(callback: Any) -> str:
    return callback.get("class_path", "?") if isinstance(callback, dict) else str(callback)
