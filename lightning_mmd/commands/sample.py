"""Samples of a checkpoint, drawn into a picture."""

import sys
from pathlib import Path

from lightning_mmd.callbacks import SampleGrid
from lightning_mmd.checkpoints import read_checkpoint
from lightning_mmd.module import MMDGAN

__all__ = ["check_checkpoint", "load_model", "sample"]


def sample(
    ckpt_path: Path,
    num: int = 64,
    output: Path = Path("samples.png"),
    num_columns: int = 8,
    scale: int = 1,
    value_range: tuple[float, float] | None = None,
    seed: int = 0,
    trust: list[str] | str | None = None,
) -> None:
    """Draw samples from a checkpoint into one picture, with averaged weights where it has any.

    Args:
        ckpt_path: Checkpoint that ``lightning-mmd fit`` wrote.
        num: How many samples, >= 1; take thousands for points in the plane.
        output: The PNG file.
        num_columns: Images in a row.
        scale: Enlarges every pixel to scale x scale.
        value_range: Pixel values drawn as black and white, by default (-1, 1); for points, the
            range of both axes, by default what holds them all.
        seed: Of the latents.
        trust: Module of your own that the checkpoint's networks come from, or a list of some: they
            are imported, from this folder too. What is of neither torch nor this package is
            refused otherwise.
    """
    if num < 1:
        raise ValueError(f"--num must be at least 1, got {num}.")
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output must be a .png file, got {output}.")
    model = load_model(ckpt_path, trust)
    grid = SampleGrid(
        num_samples=num, num_columns=num_columns, scale=scale, value_range=value_range, seed=seed
    )
    grid.save(grid.draw(model.sample(num, model.fixed_latents(num, seed))), output)
    weights = "" if model.averaged_generator is None else " (averaged weights)"
    print(f"{num} samples{weights}: {output}")


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
    if trust and "" not in sys.path:
        sys.path.append("")
    try:
        return MMDGAN.load_from_checkpoint(path, "cpu", trust=trust or ())
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
