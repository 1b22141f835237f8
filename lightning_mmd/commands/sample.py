"""Samples of a checkpoint or of saved weights, drawn into a picture or a folder of them."""

import math
from pathlib import Path

import torch
from torch import Tensor

from lightning_mmd.callbacks import SampleGrid
from lightning_mmd.callbacks.samples import row_class
from lightning_mmd.commands.models import load_either
from lightning_mmd.latents import as_inputs, select, with_labels
from lightning_mmd.module import MMDGAN

__all__ = ["between", "sample"]

_MOST_AT_ONCE = 500
_WIDE = 500  # pixels of a picture that one can see


def sample(
    ckpt_path: Path | None = None,
    pretrained: str | None = None,
    num: int = 64,
    output: Path = Path("samples.png"),
    num_columns: int = 8,
    interpolate: bool = False,
    labels: list[int] | int | str | None = None,
    scale: int | None = None,
    value_range: tuple[float, float] | None = None,
    seed: int = 0,
    trust: list[str] | str | None = None,
) -> None:
    """Draw samples into one picture, or a folder of them, with averaged weights if there are any.

    Args:
        ckpt_path: Checkpoint that ``lightning-mmd fit`` wrote.
        pretrained: In place of a checkpoint, saved weights: ``digits`` or ``mnist``, which come
            with this package, a folder, or owner/name on the Hugging Face hub.
        num: How many samples, >= 1; take thousands for points in the plane.
        output: A PNG file; a name without a suffix is a folder, which gets a file an image.
        num_columns: Images in a row.
        interpolate: Let each row lead from one latent to another, in equal angles.
        labels: Classes to draw, for example 0,1,2: a row each, over and over. Default: as in
            training, at random.
        scale: Enlarges every pixel to scale x scale. Default: as far as the picture stays within
            500 pixels; a folder of files gets none.
        value_range: Pixel values drawn as black and white, by default (-1, 1); for points, the
            range of both axes, by default what holds them all.
        seed: Of the latents.
        trust: Module of your own that the checkpoint's networks come from, or a list of some: they
            are imported, from this folder too. What is of neither torch nor this package is
            refused otherwise.
    """
    if num < 1:
        raise ValueError(f"--num must be at least 1, got {num}.")
    if output.suffix.lower() not in ("", ".png"):
        raise ValueError(
            f"--output must be a .png file, or a folder (a name without a suffix), got {output}."
        )
    if interpolate and (num_columns < 2 or num % num_columns):
        raise ValueError(
            "--interpolate needs --num_columns of at least 2 and --num a multiple of it, got "
            f"{num_columns} and {num}."
        )
    model = load_either(ckpt_path, pretrained, trust)
    if interpolate:
        latents = between(as_inputs(model.fixed_latents(2 * num // num_columns, seed)), num_columns)
    else:
        latents = as_inputs(model.fixed_latents(num, seed))
    if labels is not None:
        latents = with_labels(
            latents,
            [row_class(i, num_columns, _classes(labels)) for i in range(num)],
            getattr(model.latents, "num_classes", None),
        )
    samples = _draw(model, latents)
    grid = SampleGrid(
        num_samples=num,
        num_columns=num_columns,
        scale=scale or 1,
        value_range=value_range,
        seed=seed,
    )
    if output.suffix:
        picture = grid.draw(samples)
        enlarged = 1 if scale else max(1, _WIDE // max(picture.shape[1:]))
        picture = picture.repeat_interleave(enlarged, 1).repeat_interleave(enlarged, 2)
        grid.save(picture, output)
    else:
        if samples.ndim != 4:
            raise ValueError(
                f"a folder gets a file an image, but these are samples of shape "
                f"{tuple(samples.shape[1:])}. Give a .png file."
            )
        alone = SampleGrid(num_columns=1, scale=scale or 1, value_range=value_range)
        for i, one in enumerate(samples):
            picture = alone.draw(one[None])  # one image alone gets no frame
            grid.save(picture, output / f"{i:06d}.png")
    weights = "" if model.averaged_generator is None else " (averaged weights)"
    print(f"{num} samples{weights}: {output}")


def _classes(labels: list[int] | int | str) -> list[int]:
    parts = labels.split(",") if isinstance(labels, str) else labels
    try:
        return [parts] if isinstance(parts, int) else [int(part) for part in parts]
    except ValueError:
        raise ValueError(
            f"--labels must be whole numbers with commas between, such as 0,1,2, got {labels!r}."
        ) from None


def between(latents: tuple[Tensor, ...], num: int) -> tuple[Tensor, ...]:
    """Lead from each even row to the next odd one.

    Floating-point vectors a, b of angle w go by sin((1 - t) w) / sin w a + sin(t w) / sin w b,
    which keeps the length that standard normal vectors have; other parts (labels) stay those of a.

    Args:
        latents: Tensors of 2 n rows.
        num: Rows from a to b, both included, >= 2.

    Returns:
        Tensors of n * num rows.

    Source:
        K. Shoemake, Animating rotation with quaternion curves, 1985 (eq. 1).
    """
    t = torch.linspace(0, 1, num, dtype=torch.float64)
    found = []
    for part in latents:
        starts, ends = part[0::2], part[1::2]
        if not part.is_floating_point() or part.ndim != 2:
            found.append(starts.repeat_interleave(num, dim=0))
            continue
        a, b = starts.double().cpu()[:, None], ends.double().cpu()[:, None]
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1)
        angle = cosine.clamp(-1, 1).acos()[..., None]
        straight = (angle < 1e-6) | (angle > math.pi - 1e-6)
        sine = angle.sin().where(~straight, torch.ones_like(angle))
        t_ = t[None, :, None]
        first = (((1 - t_) * angle).sin() / sine).where(~straight, 1 - t_)
        second = ((t_ * angle).sin() / sine).where(~straight, t_)
        found.append((first * a + second * b).flatten(0, 1).to(part))
    return tuple(found)


def _draw(model: MMDGAN, latents: tuple[Tensor, ...]) -> Tensor:
    num = len(latents[0])
    parts = []
    for start in range(0, num, _MOST_AT_ONCE):
        part = select(latents, slice(start, start + _MOST_AT_ONCE))
        parts.append(model.sample(len(part[0]), part))
    return torch.cat(parts)
