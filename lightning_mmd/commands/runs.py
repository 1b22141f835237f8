"""Where the runs of a configuration lie, and the command that goes on from one."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_mmd.checkpoints import newest_whole
from lightning_mmd.commands.curves import draw_run, has_matplotlib
from lightning_mmd.commands.run_records import read_run
from lightning_mmd.internals import is_fast_dev_run

__all__ = ["command_to_go_on", "draw_at_end", "find_last"]


def find_last(trainer: Any) -> Path:
    """Return the newest whole checkpoint of the runs of a configuration.

    Args:
        trainer: The part ``trainer`` of a parsed configuration.

    Returns:
        The newest by time of writing, over all runs that share the folder of the logger, or in the
        folder that a ModelCheckpoint names.

    Raises:
        FileNotFoundError: If there is none: a training must not start anew where it was to go on.
        ValueError: If there are some, but none is whole.
    """
    patterns = list(_patterns(trainer))
    found = [path for folder, glob in patterns for path in folder.glob(glob)]
    if not found:
        places = " or ".join(sorted({str(folder / glob) for folder, glob in patterns}))
        raise FileNotFoundError(
            f"--ckpt_path last: there is no checkpoint of an earlier run, looked for {places}. "
            "Leave --ckpt_path out to train from the start, or give the path of a checkpoint."
        )
    newest = newest_whole(found)
    if newest is None:
        raise ValueError(
            f"--ckpt_path last: no checkpoint of {len(found)} is whole, the newest is "
            f"{max(found, key=lambda path: path.stat().st_mtime_ns)}; all are cut off or damaged. "
            "Leave --ckpt_path out to train from the start."
        )
    return newest


def _patterns(trainer: Any) -> Iterable[tuple[Path, str]]:
    """Return folders and patterns of checkpoints in them."""
    root = Path(_get(trainer, "default_root_dir") or ".")
    callbacks = _get(trainer, "callbacks") or []
    folders = [
        _get(_get(callback, "init_args"), "dirpath")
        for callback in (callbacks if isinstance(callbacks, list) else [callbacks])
        if str(_get(callback, "class_path")).rpartition(".")[2] == "ModelCheckpoint"
    ]
    given = [Path(folder) for folder in folders if folder]
    if given:
        yield from ((folder, "*.ckpt") for folder in given)
        return
    loggers = _get(trainer, "logger")
    if loggers is False:
        yield root / "checkpoints", "*.ckpt"
        return
    loggers = loggers if isinstance(loggers, list) else [loggers]
    for logger in loggers[:1]:  # Lightning's ModelCheckpoint follows the first
        arguments = _get(logger, "init_args")
        base = Path(_get(arguments, "save_dir") or _get(arguments, "dir") or root)
        name = _get(arguments, "project") or _get(arguments, "name") or "lightning_logs"
        if arguments is None or _get(arguments, "version") is None:
            yield base, f"{name}/*/checkpoints/*.ckpt"
        else:
            version = _get(arguments, "version")
            folder = f"version_{version}" if isinstance(version, int) else version
            yield base / str(name) / folder, "checkpoints/*.ckpt"


def _get(config: Any, name: str) -> Any:
    if config is None or isinstance(config, (bool, str)):
        return None
    return config.get(name) if hasattr(config, "get") else getattr(config, name, None)


def command_to_go_on(arguments: Any, checkpoint: Path) -> str:
    """Return the command that goes on from a checkpoint.

    Args:
        arguments: Those of the command that was stopped.
        checkpoint: What it saved.
    """
    words = list(map(str, arguments)) if isinstance(arguments, (list, tuple)) else ["fit"]
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word == "--ckpt_path":
            skip = True
        elif not word.startswith("--ckpt_path="):
            kept.append(word)
    return shlex.join(["lightning-mmd", *kept, "--ckpt_path", str(checkpoint)])


def draw_at_end(trainer: Trainer) -> list[str]:
    """Draw curves and samples of a finished run as ``run.png`` beside its numbers.

    Args:
        trainer: The trainer after ``fit``, on the process that logs.

    Returns:
        A line for each thing that there is to say: where the picture is, or what is missing.
    """
    folders = [Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger)]
    if not folders or is_fast_dev_run(trainer) or not (folders[0] / "metrics.csv").is_file():
        return []
    if not has_matplotlib():
        return ["curves:     none drawn; for a picture of each run: pip install matplotlib"]
    path = folders[0] / "run.png"
    drawn = draw_run(read_run(folders[0]), path)
    return [f"curves:     {path}"] if drawn else []
