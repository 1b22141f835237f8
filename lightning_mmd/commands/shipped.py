"""The configurations that come with the package, by name: ``--config mnist`` from any folder."""

import difflib
import re
from pathlib import Path

__all__ = ["configs", "find", "names", "with_files"]

_PLACES = (
    Path(__file__).parents[1] / "configs",  # an installed wheel
    Path(__file__).parents[2] / "configs",  # a clone
)


def _folder() -> Path:
    for folder in _PLACES:
        if (folder / "digits.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"the configurations of the package are missing, looked in {_PLACES[0]} and {_PLACES[1]}. "
        "Reinstall it, or give the path of a configuration of your own: --config PATH."
    )


def names() -> list[str]:
    """Return the names of the shipped configurations, sorted, loggers as ``loggers/wandb``."""
    folder = _folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in _files(folder))


def _files(folder: Path) -> list[Path]:
    return [*folder.glob("*.yaml"), *(folder / "loggers").glob("*.yaml")]


def find(name: str) -> Path:
    """Return the file of a shipped configuration.

    Args:
        name: One of :func:`names`.

    Raises:
        ValueError: If there is none of this name; neighbours are named.
    """
    known = names()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        meant = f"Did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"there is no configuration named {name!r}, and no file of that name here. {meant}"
            "'lightning-mmd configs' lists them."
        )
    return _folder() / f"{name}.yaml"


def with_files(arguments: list[str]) -> list[str]:
    """Replace names of shipped configurations after ``--config`` by the paths of their files.

    What has a suffix, or is a file here, is a path and stays as it is.

    Args:
        arguments: Those of the command line.

    Raises:
        ValueError: If a word after ``--config`` is neither a file nor a name.
    """
    found, follows = [], False
    for word in arguments:
        prefix, value = ("--config=", word[9:]) if word.startswith("--config=") else ("", word)
        is_name = re.fullmatch(r"\w+(/\w+)?", value) and value != "null"
        if (follows or prefix) and is_name and not Path(value).is_file():
            word = f"{prefix}{find(value)}"
        found.append(word)
        follows = word == "--config"
    return found


def configs(copy: str | None = None) -> None:
    """List the configurations that ``--config`` takes by name, or write one here to change it.

    Args:
        copy: Name of the configuration to write into this folder.

    Raises:
        FileExistsError: If a file of that name is here: it is never overwritten.
        ValueError: If there is no configuration of this name.
    """
    if copy is None:
        for name in names():
            line = find(name).read_text(encoding="utf-8").splitlines()[0]
            print(f"{name:<24}{line.lstrip('# ') if line.startswith('#') else ''}".rstrip())
        sweeps = sorted(path.stem for path in (_folder() / "sweeps").glob("*.yaml"))
        print(f"to copy only: {', '.join(f'sweeps/{name}' for name in sweeps)}")
        return
    sweep = _folder() / f"{copy}.yaml"
    source = sweep if copy.startswith("sweeps/") and sweep.is_file() else find(copy)
    target = Path(source.name)
    if target.exists():
        raise FileExistsError(f"{target} is here already. Move it, or copy from another folder.")
    target.write_bytes(source.read_bytes())
    use = f"train with it by lightning-mmd fit --config {target}"
    print(f"{target}: {'its first lines say how to use it' if source == sweep else use}")
