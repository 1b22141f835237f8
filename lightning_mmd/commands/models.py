"""Models that commands read: of a checkpoint, or of weights that were saved for others."""

import sys
from pathlib import Path

from lightning_mmd.checkpoints import read_checkpoint
from lightning_mmd.module import MMDGAN

__all__ = ["check_checkpoint", "load_either", "load_model"]


def load_either(
    ckpt_path: Path | None, pretrained: str | None, trust: str | list[str] | None
) -> MMDGAN:
    """Read a model from a checkpoint or from saved weights, of which one must be given.

    Args:
        ckpt_path: Checkpoint that ``lightning-mmd fit`` wrote.
        pretrained: What ``MMDGAN.from_pretrained`` takes.
        trust: Modules that the networks may come from, imported from this folder too.

    Raises:
        ValueError: If both or none are given, or networks were made in Python.
        FileNotFoundError: If there are none such.
    """
    if ckpt_path is not None and pretrained is None:
        return load_model(ckpt_path, trust)
    if pretrained is None or ckpt_path is not None:
        raise ValueError(
            "give either --ckpt_path FILE or --pretrained NAME (digits, mnist, a folder, or "
            f"owner/name on the hub), got {'none' if pretrained is None else 'both'}."
        )
    _look_here(trust)
    return MMDGAN.from_pretrained(pretrained, trust=_names(trust))


def load_model(path: Path, trust: str | list[str] | None = None) -> MMDGAN:
    """Read a model from a checkpoint.

    Args:
        path: The file.
        trust: Modules that the checkpoint's networks may come from, imported from this folder too.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of ours, or its networks were made in Python.
    """
    check_checkpoint(path)
    _look_here(trust)
    try:
        return MMDGAN.load_from_checkpoint(path, "cpu", trust=_names(trust))
    except TypeError as error:
        raise ValueError(
            f"{path} does not say how its networks are built, because they were made in Python. "
            "Load it there: MMDGAN.load_from_checkpoint(path, generator=..., critic=...)."
        ) from error


def check_checkpoint(path: str | Path) -> None:
    """Raise a clear error unless a file is a readable checkpoint of an ``MMDGAN``.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read or comes from another kind of module.
    """
    checkpoint = read_checkpoint(path)
    if "mmdgan" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of MMDGAN. Give one that this package wrote.")


def _look_here(trust: str | list[str] | None) -> None:
    if trust and "" not in sys.path:
        sys.path.append("")


def _names(trust: str | list[str] | None) -> list[str]:
    return [trust] if isinstance(trust, str) else list(trust or ())
