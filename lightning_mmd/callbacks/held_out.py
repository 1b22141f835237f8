"""What callbacks share that compare samples with held-out data while the generator trains."""

import random
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import Metric

from lightning_mmd.batches import BatchParts
from lightning_mmd.callbacks.cadence import GeneratorCadence, Sampling
from lightning_mmd.callbacks.ema import averaged_weights
from lightning_mmd.callbacks.images import ImageReader, RangeCheck
from lightning_mmd.callbacks.loggers import describe, send_scalars
from lightning_mmd.callbacks.observing import observing
from lightning_mmd.latents import select
from lightning_mmd.processes import together

__all__ = ["HeldOutTracker"]


class HeldOutTracker(GeneratorCadence):
    """Scores of fresh samples against held-out data, on the clock of the generator.

    The real side is one seeded random subset of the validation data; the fake side is drawn afresh
    at each measurement, from latents seeded by (``seed``, update). The floor replaces the fakes by
    images of the training data. With several processes each one samples and embeds its share.

    Args:
        metric: Metric with ``update(samples, real)``, whose value is a scalar or a dictionary of
            them, and which keeps the real side on ``reset``.
        every_n_steps: Generator updates between measurements, at least 1.
        num_real: Held-out images, at least 2. Where the validation data has fewer, all of them.
        num_fake: Samples at each measurement, at least 2.
        floor: Whether to measure the floor, once a run.
        sample_batch_size: Images sampled or embedded at a time.
        seed: Of the subsets and of the latents.
        name: Name in the logs, to tell several callbacks apart.
        generator: See `GeneratorCadence`; also the following two.
        generator_output: See there.
        batch: Where images stand in a batch. Default: the module's own ``batch``, else first.
        sampler: See there.

    Attributes:
        history: One dictionary a measurement: ``step`` (generator updates), the scores by name and
            ``seconds`` (that it took).
        floors: Scores of real images against real images, empty before or without.
    """

    main = ""
    """Name of the score that is shown in the progress bar."""

    def __init__(
        self,
        metric: Metric,
        every_n_steps: int,
        num_real: int,
        num_fake: int,
        floor: bool,
        sample_batch_size: int,
        seed: int,
        name: str,
        generator: str | None,
        generator_output: Callable | None,
        batch: BatchParts | None,
        sampler: str,
    ) -> None:
        super().__init__(every_n_steps, generator, generator_output, sampler)
        if min(num_real, num_fake) < 2 or sample_batch_size < 1:
            raise ValueError(
                f"{type(self).__name__} needs num_real and num_fake of at least 2 and "
                f"sample_batch_size of at least 1, got {num_real}, {num_fake} and "
                f"{sample_batch_size}."
            )
        self.num_real = num_real
        self.num_fake = num_fake
        self.with_floor = floor
        self.sample_batch_size = sample_batch_size
        self.seed = seed
        self.name = name
        self.batch = batch
        self.history: list[dict[str, float]] = []
        self.floors: dict[str, float] = {}
        self._range = RangeCheck(self)
        self._metric: Any = metric

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """Return what is measured, by name, for the log."""

    @abstractmethod
    def key(self, split: str, score: str) -> str:
        """Return the name of a score in the log."""

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self.name)

    def state_dict(self) -> dict[str, Any]:
        history = [dict(entry) for entry in self.history]
        return {**super().state_dict(), "history": history, "floors": dict(self.floors)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.history = [dict(entry) for entry in state_dict["history"]]
        self.floors = dict(state_dict["floors"])

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
        scores = self._measure(trainer, model)
        seconds = time.perf_counter() - begin
        self.history.append({"step": self.updates, **scores, "seconds": seconds})
        scalars = {self.key("val", name): value for name, value in scores.items()}
        floors = {self.key("val", name) + "_real": value for name, value in self.floors.items()}
        scalars |= floors
        send_scalars(trainer, scalars, self.updates)
        # Not `pl_module.log`: before the first and after the last batch Lightning refuses it or
        # would report the value of the start as that of the first epoch's end.
        trainer.callback_metrics.update({k: torch.tensor(v) for k, v in scalars.items()})
        shown = self.key("val", self.main)
        trainer.progress_bar_metrics[shown] = scalars[shown]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._evaluate(trainer, pl_module, trainer.val_dataloaders, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluate(trainer, pl_module, trainer.test_dataloaders, "test")

    def _evaluate(
        self, trainer: Trainer, pl_module: LightningModule, loaders: Any, split: str
    ) -> None:
        """Measure once against some data, outside of training."""
        with observing(pl_module.device), averaged_weights(trainer, pl_module):
            _, images = self._draw(trainer, pl_module, loaders, self.num_real)
            self._hold_out(images)
            scores = self._measure(trainer, self.sampling(pl_module))
        for name, value in scores.items():
            shown = name == self.main
            pl_module.log(self.key(split, name), value, prog_bar=shown, sync_dist=True)

    def _prepare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the held-out images, measure the floor and say what is measured."""
        loaders = trainer.val_dataloaders
        source = trainer.fit_loop.epoch_loop.val_loop._data_source
        if loaders is None and source.is_defined():  # validation is off, or begins later
            loaders = source.dataloader()
        if loaders is None or loaders == []:
            raise ValueError(
                f"{type(self).__name__} needs held-out images, got no validation data. Pass "
                "val_dataloaders to trainer.fit, or give the data module a val_dataloader()."
            )
        num_real, images = self._draw(trainer, pl_module, loaders, self.num_real)
        self._hold_out(images)
        self.floors = {}
        if self.with_floor:
            _, others = self._draw(
                trainer, pl_module, trainer.train_dataloader, num_real, floor=True
            )
            self.floors = self._compare(others.split(self.sample_batch_size))
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
                f"{type(self).__name__} needs at least 2 images a side, and one a process, got "
                f"{smallest} on {trainer.world_size} process(es). Raise num_real or num_fake, or "
                "add data."
            )
        if available < num:
            rank_zero_info(
                f"{type(self).__name__} compares with all {available} images, fewer than {num}."
            )
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

    def _compare(self, batches: Iterable[Tensor]) -> dict[str, float]:
        """Return scores of some images against the held-out ones, of all ranks."""
        for batch in batches:
            self._metric.update(batch, real=False)
        value = self._metric.compute()
        self._metric.reset()
        scores = value if isinstance(value, dict) else {self.main: value}
        return {name: float(score) for name, score in scores.items()}

    def _measure(self, trainer: Trainer, model: Sampling) -> dict[str, float]:
        """Return scores of fresh samples against the held-out images, of all ranks."""
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
            **self.facts(),
            "num_real": num_real,
            "num_fake": self.num_fake,
            "real_range": [low.item(), high.item()],
        }
        describe(trainer, self.key("val", self.main), measured)
