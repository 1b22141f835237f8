"""Pictures of the generator's samples while it trains."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_mmd.callbacks.cadence import GeneratorCadence, Sampling
from lightning_mmd.callbacks.loggers import send_picture
from lightning_mmd.callbacks.sample_table import send_rows
from lightning_mmd.data import import_torchvision
from lightning_mmd.internals import is_fast_dev_run
from lightning_mmd.latents import with_labels
from lightning_mmd.processes import together

__all__ = ["SampleGrid", "run_directory"]

SCATTER_BINS = 128


class SampleGrid(GeneratorCadence):
    """Picture of samples from fixed latents: always a PNG file, and in loggers that take pictures.

    Made before the first generator update, every `every_n_steps` updates and at the end, on the
    axis of the scalars. Images become a grid, with `LabelledLatents` a row a class; points in the
    plane become a two-dimensional histogram, darker where there are more (values outside
    `value_range` pile up on the border).
    Values that are not finite are drawn as 0 or as a limit of the range. `Trainer(fast_dev_run)`
    writes no files.

    Args:
        every_n_steps: Generator updates between pictures, at least 1.
        num_samples: Samples in a picture. For points in the plane take thousands.
        num_columns: Images in a row.
        dirpath: Directory of the files ``step=000100.png``; by default one named ``name`` in the
            run's own directory, beside the checkpoints.
        seed: Of the latents, which are the same in every picture.
        value_range: Pixel values drawn as black and white, by default (-1, 1); for points, the
            range of both axes, by default what holds them all.
        scale: Enlarges every pixel to scale x scale, for example 4 for 8x8 images.
        name: Name in the logs and of the default directory, to tell several grids apart.
        generator: See `GeneratorCadence`; also the following two.
        generator_output: See there.
        sampler: See there.

    Attributes:
        last_path: File of the newest picture, None before the first.

    Raises:
        ValueError: If a count is less than 1, the range is empty, or samples are neither images of
            shape (n, c, h, w) with c in (1, 3) nor points of shape (n, 2).
        ImportError: At set-up, if torchvision is missing or does not match torch.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> pictures = SampleGrid(every_n_steps=50, num_samples=64, num_columns=8, scale=4)
        >>> trainer = Trainer(max_steps=400, callbacks=[pictures], logger=False)
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        num_samples: int = 64,
        num_columns: int = 8,
        dirpath: str | Path | None = None,
        seed: int = 0,
        value_range: tuple[float, float] | None = None,
        scale: int = 1,
        name: str = "samples",
        generator: str | None = None,
        generator_output: Callable | None = None,
        sampler: str = "sample",
    ) -> None:
        super().__init__(every_n_steps, generator, generator_output, sampler)
        if min(num_samples, num_columns, scale) < 1:
            raise ValueError(
                "SampleGrid needs num_samples, num_columns and scale of at least 1, got "
                f"{num_samples}, {num_columns} and {scale}."
            )
        if value_range is not None and not value_range[0] < value_range[1]:
            raise ValueError(
                f"SampleGrid needs value_range = (low, high) with low < high, got {value_range}."
            )
        self.num_samples = num_samples
        self.num_columns = num_columns
        self.dirpath = dirpath
        self.seed = seed
        self.value_range = value_range
        self.scale = scale
        self.name = name
        self.last_path: Path | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        try:
            import_torchvision()
        except ImportError as error:
            raise ImportError(
                f"SampleGrid draws with torchvision, which cannot be imported beside torch "
                f"{torch.__version__}. Reinstall the two together (pip install --upgrade torch "
                "torchvision), or remove the callback."
            ) from error

    def observe(self, trainer: Trainer, model: Sampling) -> None:
        with together(trainer):
            if trainer.is_global_zero:
                self._draw_and_save(trainer, model)

    def _draw_and_save(self, trainer: Trainer, model: Sampling) -> None:
        latents = model.fixed_latents(self.num_samples, self.seed)
        classes: list[int] = []
        if model.num_classes is not None:
            every = range(model.num_classes)
            classes = [row_class(i, self.num_columns, every) for i in range(self.num_samples)]
            latents = with_labels(latents, classes)
        samples = model.sample(latents)
        picture = self.draw(samples)
        if is_fast_dev_run(trainer):
            return
        directory = run_directory(trainer) / self.name if self.dirpath is None else self.dirpath
        self.last_path = Path(directory) / f"step={self.updates:06d}.png"
        self.save(picture, self.last_path)
        send_picture(trainer, self.name, picture, self.last_path, self.updates)
        rows: list[tuple[int | None, Tensor]] = [(None, picture)]
        if classes:
            told = torch.tensor(classes, device=samples.device)
            rows = [(c, self.draw(samples[told == c])) for c in sorted(set(classes))]
        send_rows(trainer, self.name, rows, self.updates)

    def draw(self, samples: Tensor) -> Tensor:
        """Return the picture of some samples.

        Args:
            samples: Images (n, c, h, w) with c in (1, 3), or points (n, 2).

        Returns:
            RGB picture of shape (3, height, width) in uint8, on the CPU.
        """
        samples = samples.detach().float().cpu().nan_to_num()
        if samples.ndim == 4 and samples.shape[1] in (1, 3):
            picture = import_torchvision().utils.make_grid(
                samples,
                nrow=self.num_columns,
                normalize=True,
                value_range=self.value_range or (-1.0, 1.0),
            )
        elif samples.ndim == 2 and samples.shape[1] == 2:
            picture = self._scatter(samples).expand(3, -1, -1)
        else:
            raise ValueError(
                "SampleGrid draws images of shape (n, c, h, w) with c in (1, 3) or points of shape "
                f"(n, 2), got samples of shape {tuple(samples.shape)}. Remove the callback for "
                "other data."
            )
        pixels = picture.mul(255).round().to(torch.uint8)
        return pixels.repeat_interleave(self.scale, dim=1).repeat_interleave(self.scale, dim=2)

    @staticmethod
    def save(picture: Tensor, path: Path) -> None:
        """Write a picture to a PNG file, in a directory that is made if need be.

        Args:
            picture: uint8 tensor of shape (3, height, width), as `draw` returns it.
            path: The file.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        import_torchvision().transforms.functional.to_pil_image(picture).save(path)

    def _scatter(self, points: Tensor) -> Tensor:
        """Return the picture of points in the plane, (bins, bins) in [0, 1], y upwards."""
        limit = 1.05 * points.abs().max().clamp_min(1e-6).item()
        low, high = self.value_range or (-limit, limit)
        counts = torch.histogramdd(
            points.clamp(low, high), bins=[SCATTER_BINS, SCATTER_BINS], range=[low, high] * 2
        ).hist
        return 1 - (counts / counts.max()).sqrt().T.flip(0)


def row_class(index: int, num_columns: int, classes: Sequence[int]) -> int:
    """Return the class of a picture's image where each row has one, over and over."""
    return classes[index // num_columns % len(classes)]


def run_directory(trainer: Trainer) -> Path:
    """Return the run's own directory, where ModelCheckpoint makes its ``checkpoints`` too."""
    if not trainer.loggers:
        return Path(trainer.default_root_dir)
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version
