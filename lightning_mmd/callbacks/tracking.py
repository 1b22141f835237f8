"""MMD^2 between held-out data and fresh samples while the generator trains."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_mmd.batches import BatchParts
from lightning_mmd.callbacks.held_out import HeldOutTracker
from lightning_mmd.kernels import Kernel
from lightning_mmd.metrics import MaximumMeanDiscrepancy
from lightning_mmd.pixel_kernel import PixelKernel

__all__ = ["MMDTracker"]


class MMDTracker(HeldOutTracker):
    """Squared MMD of held-out real data against fresh samples, with a real-vs-real floor.

    Measured before the first generator update, every `every_n_steps` updates and at the end. The
    real side is one seeded random subset of the validation data; the fake side is drawn afresh at
    each measurement, from latents seeded by (`seed`, update). The floor replaces the fakes by as
    many images as the real side has, of the *training* data: a generator that has learned the data
    gets there, and the unbiased estimate of it is about zero. With several processes each one
    samples and embeds its share; the values are those of one process.

    Logged on the axis of generator updates: ``val/mmd2`` (also shown in the progress bar, and a
    valid ``monitor`` of ModelCheckpoint), its standard error ``val/mmd2_error`` (U-statistic only,
    see `mmd2_with_error`), and the floor ``val/mmd2_real`` with its own; once, as hyperparameters
    (text in TensorBoard), what is measured: kernel, estimator, sample sizes, value range.
    ``trainer.validate`` and ``trainer.test`` alone log ``val/mmd2`` and ``test/mmd2`` against their
    own data, once.

    Datasets are read item by item, not through their loader; the first element of a tuple or list
    is the image.

    Args:
        kernel: Kernel on flattened images, or on embeddings where `features` is given. Default:
            `PixelKernel`, for images of any size.
        every_n_steps: Generator updates between measurements, at least 1.
        num_real: Held-out images, at least 2. Where the validation data has fewer, all of them.
        num_fake: Samples at each measurement, at least 2.
        floor: Whether to measure the floor, once a run.
        unbiased: True for the U-statistic (may be negative), False for the V-statistic.
        features: Network that embeds images before the kernel; a frozen copy of it is used.
        sample_batch_size: Images sampled or embedded at a time.
        seed: Of the subsets and of the latents.
        name: Name of the value in the logs, to tell several trackers apart.
        generator: See `GeneratorCadence`; also the following two.
        generator_output: See there.
        batch: Where images stand in a batch. Default: the module's own ``batch``, else first.
        sampler: See there.

    Attributes:
        history: One dictionary a measurement: ``step`` (generator updates), ``mmd2``,
            ``mmd2_error`` (unbiased only) and ``seconds`` (that it took).
        start: First value of the run, None before. A resumed run keeps it.
        last: Newest value, None before.
        floor: Real-vs-real value, None before or without one.

    Raises:
        ValueError: If a count is too small; at the start of training, if there is no validation
            data or an image has a value that is not finite.
        TypeError: If a loader or dataset cannot be read item by item, or an item holds no tensor.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_mmd.kernels import RationalQuadratic, SumKernel
        >>> scales = [RationalQuadratic(a, bandwidth=8.0) for a in (0.2, 0.5, 1.0, 2.0, 5.0)]
        >>> tracker = MMDTracker(SumKernel(scales), every_n_steps=50)
        >>> trainer = Trainer(max_steps=400, callbacks=[tracker], logger=False)
    """

    main = "mmd2"

    def __init__(
        self,
        kernel: Kernel | None = None,
        every_n_steps: int = 100,
        num_real: int = 2000,
        num_fake: int = 2000,
        floor: bool = True,
        unbiased: bool = True,
        features: nn.Module | None = None,
        sample_batch_size: int = 500,
        seed: int = 0,
        name: str = "mmd2",
        generator: str | None = None,
        generator_output: Callable | None = None,
        batch: BatchParts | None = None,
        sampler: str = "sample",
    ) -> None:
        super().__init__(
            MaximumMeanDiscrepancy(
                kernel or PixelKernel(),
                features=features,
                unbiased=unbiased,
                reset_real_samples=False,
                with_error=unbiased,
            ),
            every_n_steps,
            num_real,
            num_fake,
            floor,
            sample_batch_size,
            seed,
            name,
            generator,
            generator_output,
            batch,
            sampler,
        )
        self._features_name = "none" if features is None else type(features).__name__

    @property
    def start(self) -> float | None:
        """First value of the run."""
        return self.history[0]["mmd2"] if self.history else None

    @property
    def last(self) -> float | None:
        """Newest value."""
        return self.history[-1]["mmd2"] if self.history else None

    @property
    def floor(self) -> float | None:
        """Real-vs-real value."""
        return self.floors.get("mmd2")

    def key(self, split: str, score: str) -> str:
        return f"{split}/{score.replace('mmd2', self.name)}"

    def facts(self) -> dict[str, Any]:
        return {
            "kernel": repr(self._metric.kernel),
            "features": self._features_name,
            "estimator": "unbiased" if self._metric.unbiased else "biased",
        }
