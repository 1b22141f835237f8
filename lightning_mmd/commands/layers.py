"""Configurations laid over one another."""

from collections.abc import Sequence
from pathlib import Path

import yaml
from lightning.pytorch.utilities import rank_zero_warn

__all__ = ["config_files", "tell_of_replaced_callbacks"]


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
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            continue  # the parser says what is wrong with it
        trainer = content.get("trainer") if isinstance(content, dict) else None
        callbacks = trainer.get("callbacks") if isinstance(trainer, dict) else None
        if not isinstance(callbacks, list):
            continue
        names = [c.get("class_path", "?") if isinstance(c, dict) else str(c) for c in callbacks]
        dropped = [name for name in before[1] if name not in names] if before else []
        if before and dropped:
            rank_zero_warn(
                f"{file} replaces the callbacks of {before[0]}: {', '.join(dropped)} "
                f"{'is' if len(dropped) == 1 else 'are'} gone. Write 'callbacks+:' there to add to "
                "them instead."
            )
        before = file, names
