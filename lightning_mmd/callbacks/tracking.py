"""MMD^2 between held-out data and fresh samples while the generator trains."""

import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_mmd.batches import BatchParts
from lightning_mmd.callbacks.cadence import GeneratorCadence, Sampling
from lightning_mmd.callbacks.ema import averaged_weights
from lightning_mmd.callbacks.images import ImageReader, RangeCheck
from lightning_mmd.callbacks.loggers import describe, send_scalars
from lightning_mmd.callbacks.observing import observing
from lightning_mmd.kernels import Kernel
from lightning_mmd.latents import select
from lightning_mmd.metrics import MaximumMeanDiscrepancy
from lightning_mmd.processes import together

__all__ = ["MMDTracker"]


class MMDTracker(GeneratorCadence):
    """Squared MMD of held-out real data against fresh samples, with a real-vs-real floor.

    Measured before the first generator update, every `every_n_steps` updates and at the end. The
    real side is one seeded random subset of the validation data; the fake side is drawn afresh at
    each measurement, from latents seeded by (`seed`, update). The floor replaces the fakes by as
    many images as the real side has, of the *training* data: a generator that has learned the data
    gets there, and the unbiased estimate of it is about zero. With several processes each one
    samples and embeds its share; the values are those of one process.

    Logged on the axis of generator updates: ``val/mmd2`` (also shown in the progress bar, and a
    valid ``monitor`` of ModelCheckpoint) and the floor ``val/mmd2_real``; once, as hyperparameters
    (text in TensorBoard), what is measured: kernel, estimator, sample sizes, value range.
    ``trainer.validate`` and ``trainer.test`` alone log ``val/mmd2`` and ``test/mmd2`` against their
    own data, once.

    Datasets are read item by item, not through their loader; the first element of a tuple or list
    is the image.

    Args:
        kernel: Kernel on flattened images, or on embeddings where `features` is given.
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
        history: One dictionary a measurement: ``step`` (generator updates), ``mmd2`` and
            ``seconds`` (that it took).
        start: First value of the run, None before. A resumed run keeps it.
        last: Newest value, None before.
        floor: Real-vs-real value, None before or without one.

    Raises:
        ValueError: If a count is too small; at the start of training, if there is no validation
            data or an image has a value that is not finite.
        TypeError: If a loader or dataset cannot be read item by item, or an item holds no tensor.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_mmd.kernels import RationalQuadratic, SumKernel
        >>> scales = [RationalQuadratic(a, bandwidth=8.0) for a in (0.2, 0.5, 1.0, 2.0, 5.0)]
        >>> tracker = MMDTracker(SumKernel(scales), every_n_steps=50)
        >>> trainer = Trainer(max_steps=400, callbacks=[tracker], logger=False)
    """

    def __init__(
        self,
        kernel: Kernel,
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
        super().__init__(every_n_steps, generator, generator_output, sampler)
        if min(num_real, num_fake) < 2 or sample_batch_size < 1:
            raise ValueError(
                "MMDTracker needs num_real and num_fake of at least 2 and sample_batch_size of at "
                f"least 1, got {num_real}, {num_fake} and {sample_batch_size}."
            )
        self.num_real = num_real
        self.num_fake = num_fake
        self.with_floor = floor
        self.sample_batch_size = sample_batch_size
        self.seed = seed
        self.name = name
        self.batch = batch
        self._range = RangeCheck(self)
        self.history: list[dict[str, float]] = []
        self.floor: float | None = None
        self._metric = MaximumMeanDiscrepancy(
            kernel, features=features, unbiased=unbiased, reset_real_samples=False
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
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        history = [dict(entry) for entry in self.history]
        return {**super().state_dict(), "history": history, "floor": self.floor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.history = [dict(entry) for entry in state_dict["history"]]
        self.floor = state_dict["floor"]

    def reset(self) -> None:
        """Forget an earlier run."""
        super().reset()
        self.history = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with observing(pl_module.device):
            self._prepare(trainer, pl_module)
        super().on_train_start(trainer, pl_module)

    def observe(self, trainer: Trainer, model: Sampling) -> None:
        begin = time.perf_counter()
        value = self._measure(trainer, model)
        seconds = time.perf_counter() - begin
        self.history.append({"step": self.updates, "mmd2": value, "seconds": seconds})
        scalars = {f"val/{self.name}": value}
        if self.floor is not None:
            scalars[f"val/{self.name}_real"] = self.floor
        send_scalars(trainer, scalars, self.updates)
        # Not `pl_module.log`: before the first and after the last batch Lightning refuses it or
        # would report the value of the start as that of the first epoch's end.
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in scalars.items()})
        trainer.progress_bar_metrics[f"val/{self.name}"] = value

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._evaluate(trainer, pl_module, trainer.val_dataloaders, f"val/{self.name}")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module, trainer.test_dataloaders, f"test/{self.name}")

    def _evaluate(
        self, trainer: Trainer, pl_module: LightningModule, loaders: Any, key: str
    ) -> None:
        """Measure once against some data, outside of training."""
        with observing(pl_module.device), averaged_weights(trainer, pl_module):
            _, images = self._draw(trainer, pl_module, loaders, self.num_real)
            self._hold_out(images)
            value = self._measure(trainer, self.sampling(pl_module))
        pl_module.log(key, value, prog_bar=True, sync_dist=True)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the held-out images, measure the floor and say what is measured."""
        loaders = trainer.val_dataloaders
        source = trainer.fit_loop.epoch_loop.val_loop._data_source
        if loaders is None and source.is_defined():  # validation is off, or begins later
            loaders = source.dataloader()
        if loaders is None or loaders == []:
            raise ValueError(
                "MMDTracker needs held-out images, got no validation data. Pass val_dataloaders to "
                "trainer.fit, or give the data module a val_dataloader()."
            )
        num_real, images = self._draw(trainer, pl_module, loaders, self.num_real)
        self._hold_out(images)
        self.floor = None
        if self.with_floor:
            _, others = self._draw(
                trainer, pl_module, trainer.train_dataloader, num_real, floor=True
            )
            self.floor = self._compare(others.split(self.sample_batch_size))
        low = trainer.strategy.reduce(images.min(), reduce_op="min")
        high = trainer.strategy.reduce(images.max(), reduce_op="max")
        self._describe(trainer, num_real, low, high)

    def _draw(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        loaders: Any,
        num: int,
        floor: bool = False,
    ) -> tuple[int, Tensor]:
        """Return how many images are drawn from a loader's dataset, and this rank's share."""
        cure = "The floor needs training images by index: set floor=False, or put the images"
        reader = ImageReader(
            self, trainer, pl_module, loaders, self.batch, cure if floor else "Put the images"
        )
        available = reader.num
        smallest = min(available, num, self.num_fake)
        if smallest < max(2, trainer.world_size):
            raise ValueError(
                f"MMDTracker needs at least 2 images a side, and one a process, got {smallest} on "
                f"{trainer.world_size} process(es). Raise num_real or num_fake, or add data."
            )
        if available < num:
            rank_zero_info(f"MMDTracker compares with all {available} images, fewer than {num}.")
        num = min(num, available)
        order = torch.randperm(available, generator=torch.Generator().manual_seed(self.seed))
        share = order[:num].tensor_split(trainer.world_size)[trainer.global_rank]
        torch.manual_seed(self.seed)  # of random transforms; put back by `observing`
        with together(trainer):
            images = reader.read(share)
        return num, images

    def _hold_out(self, images: Tensor) -> None:
        """Make some images the real side."""
        self._metric.to(images.device)
        self._metric.real.clear()
        self._metric.reset()
        for batch in images.split(self.sample_batch_size):
            self._metric.update(batch, real=True)
        self._range.real(images)

    def _compare(self, batches: Iterable[Tensor]) -> float:
        """Return MMD^2 of the held-out images against some others, of all ranks."""
        for batch in batches:
            self._metric.update(batch, real=False)
        value = self._metric.compute().item()
        self._metric.reset()
        return value

    def _measure(self, trainer: Trainer, model: Sampling) -> float:
        """Return MMD^2 of the held-out images against fresh samples, of all ranks."""
        seed = random.Random(f"{self.seed} {self.updates}").getrandbits(32)
        latents = model.fixed_latents(self.num_fake, seed)
        cuts = torch.arange(self.num_fake).tensor_split(trainer.world_size)[trainer.global_rank]
        share = select(latents, slice(int(cuts[0]), int(cuts[-1]) + 1)) if len(cuts) else ()
        with together(trainer):
            parts = model.in_parts(share, self.sample_batch_size) if share else []
            samples = [self._range.generated(part) for part in parts]
        return self._compare(samples)

    def _describe(self, trainer: Trainer, num_real: int, low: Tensor, high: Tensor) -> None:
        """Log what is measured."""
        measured = {
            "split": "validation",
            "kernel": repr(self._metric.kernel),
            "features": self._features_name,
            "estimator": "unbiased" if self._metric.unbiased else "biased",
            "num_real": num_real,
            "num_fake": self.num_fake,
            "real_range": [low.item(), high.item()],
        }
        describe(trainer, f"val/{self.name}", measured)
