"""Checkpoints that are whole or absent, and are read as plain data."""

import contextlib
import errno
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import RandomSampler, WeightedRandomSampler

__all__ = [
    "WholeCheckpoints",
    "check_whole",
    "newest_whole",
    "read_checkpoint",
    "use_whole_checkpoints",
    "warn_of_inexact_order",
    "write_whole",
]

_DAMAGED = (
    "cannot be read as a checkpoint: it is cut off, damaged or of another kind. Take an earlier "
    "checkpoint."
)
_UNREADABLE = (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile)


def check_whole(path: str | Path) -> None:
    """Compare a checkpoint with the checksums in it: torch writes a CRC-32 beside each tensor.

    Args:
        path: A file that ``torch.save`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a byte of a tensor is another one, or the file is cut off or no checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}. Give the path of a .ckpt file.")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
    except (*_UNREADABLE, NotImplementedError, OSError, OverflowError) as error:
        raise ValueError(f"{path} {_DAMAGED}") from error
    if damaged is not None:
        raise ValueError(f"{path} {_DAMAGED} (The checksum of {damaged} is another one.)")


def read_checkpoint(
    path: str | Path | IO[bytes], map_location: Any = "cpu", weights_only: bool = True
) -> dict[str, Any]:
    """Read a checkpoint as plain data, after a look at its checksums.

    Args:
        path: A file, or an open one, which stays where it is.
        map_location: Device of the tensors, as ``torch.load`` takes it.
        weights_only: False reads a pickle, which may run any code.

    Returns:
        What was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds more than plain data.
    """
    local = isinstance(path, (str, Path))
    if local and "://" not in str(path):
        check_whole(path)
        position = 0
    elif local:  # on another machine: torch alone reads it
        import fsspec

        with fsspec.open(str(path), "rb") as file:
            return read_checkpoint(file, map_location, weights_only)  # pyright: ignore
    else:
        position = path.tell()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        found = torch.load(path, map_location=map_location, weights_only=weights_only)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged, or holds more than tensors and "
            "plain data, which might run code. Take one that this package wrote."
        ) from error
    except _UNREADABLE as error:
        raise ValueError(f"{path} {_DAMAGED}") from error
    finally:
        if not local:
            path.seek(position)  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(found, dict):
        raise ValueError(f"{path} is no checkpoint of MMDGAN. Give one that this package wrote.")
    return found


def write_whole(write: Callable[[IO[bytes]], None], path: str | Path) -> None:
    """Write a file so that it is there whole, or what was there before is.

    It is written beside its place, flushed to the disk, and renamed; the folder is flushed too.

    Args:
        write: Writes to the open file that it gets.
        path: Its place; folders are made.

    Raises:
        OSError: If it cannot be written, with the last good checkpoint of the folder.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f".{path.name}.*.part"):
            old.unlink(missing_ok=True)  # of a process that was killed
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise _not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_written(path: Path, error: Exception) -> OSError:
    reason, number = str(error), getattr(error, "errno", None)
    cause = error.__context__
    if number is None and isinstance(cause, OSError):
        number = cause.errno
    if number is not None:
        reason = os.strerror(number)
    cure = {
        errno.ENOSPC: "Free some space",
        errno.EDQUOT: "Free some space",
        errno.EACCES: "Make the folder writable, or save elsewhere (dirpath of ModelCheckpoint)",
        errno.EROFS: "Save elsewhere (dirpath of ModelCheckpoint)",
    }.get(number or 0, "Look after the disk")
    good = newest_whole(path.parent.glob("*.ckpt"))
    last = "There is no earlier checkpoint beside it" if good is None else f"{good} is whole"
    return OSError(f"the checkpoint {path} could not be written: {reason}. {last}. {cure}.")


def newest_whole(paths: Any) -> Path | None:
    """Return the newest checkpoint that is whole, with a warning of newer ones that are not.

    Args:
        paths: Files to choose from.

    Returns:
        Its path; None if there is none.
    """
    dated = [(path.stat().st_mtime_ns, path) for path in map(Path, paths) if path.is_file()]
    for _, path in sorted(dated, reverse=True):
        try:
            check_whole(path)
        except ValueError as error:
            rank_zero_warn(f"left out: {error}")
        else:
            return path
    return None


class WholeCheckpoints(TorchCheckpointIO):
    """Lightning's plugin that writes and reads checkpoints: whole or absent, and plain data.

    `MMDGAN` gives it to every Trainer that has Lightning's own. Files on other machines
    (``s3://...``) are left to Lightning's own way of writing.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint beside its place, flush it, and rename it.

        Args:
            checkpoint: What to save.
            path: The file.
            storage_options: Must be None.

        Raises:
            OSError: If it cannot be written; what was there before is left.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        write_whole(lambda file: torch.save(checkpoint, file), path)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint as plain data.

        Args:
            path: The file.
            map_location: As ``torch.load`` takes it.
            weights_only: False reads a pickle, which may run any code; default: True.

        Raises:
            ValueError: If it is damaged, or holds more than plain data.
        """
        return read_checkpoint(path, map_location, weights_only is not False)


def use_whole_checkpoints(trainer: Trainer) -> None:
    """Give a Trainer :class:`WholeCheckpoints`, unless a user has chosen another plugin.

    Args:
        trainer: Its strategy's plugin is replaced where it is Lightning's own.
    """
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpoints()


def warn_of_inexact_order(trainer: Trainer) -> None:
    """Warn where a training resumes and the order of its data is not that of the first one.

    Args:
        trainer: A trainer that starts to train.
    """
    loader = trainer.train_dataloader
    shuffled = isinstance(getattr(loader, "sampler", None), (RandomSampler, WeightedRandomSampler))
    if trainer.ckpt_path and shuffled and not hasattr(loader, "state_dict"):
        rank_zero_warn(
            "the order of the data does not go on where the checkpoint was: this loader draws it "
            "anew. All else is as it was. For the same order take a data module of this package, "
            "or a loader that saves its state, such as torchdata's StatefulDataLoader."
        )
