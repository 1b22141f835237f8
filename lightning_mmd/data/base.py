"""What all data modules share: three splits, batches, their order and its state."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerStatus
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mmd.data.dataset import TensorSamples, pixels_to_unit
from lightning_mmd.data.loader import ResumableLoader, SampleLoader
from lightning_mmd.data.order import BatchSizes, Order, coin_flips

__all__ = ["ImageDataModule", "SampleDataModule"]


class SampleDataModule(LightningDataModule, ABC):
    r"""Abstract: batches of samples of shape (n, \*sample_shape), in three splits.

    A subclass sets `sample_shape` and defines `load`. Training batches are shuffled and full;
    validation and test batches keep their order and come whole.

    Training sees one endless stream of samples, permutation after permutation, each a function of
    (seed, epoch) alone. Every process takes its part of each batch, so W processes with batches of
    n see what one process with batches of W n sees. A checkpoint of a training on the data module
    holds how many samples were trained on, and a training that resumes goes on with the next one:
    in mid-epoch, with any number of workers, and with another number of processes or batch size.

    Under a Trainer a loader serves samples as they are stored, bytes for images, and
    `on_after_batch_transfer` finishes them on the device, in the precision of the Trainer. Without
    one, a loader serves finished samples: float32, or the type in which floats are stored. A
    hand-written loop calls `loader.sampler.set_epoch(epoch)` before each epoch. Loaders that are
    given to `trainer.fit` in place of the data module serve finished samples too, but there a
    training that resumes in mid-epoch begins the epoch anew.

    Args:
        batch_size: samples in a batch of one process, at least 1; or a schedule {samples seen by
            all processes: batch size from then on} that begins at 0. Validation and test take the
            largest.
        num_workers: loader processes; 0 loads in the training process, batches are the same.
        seed: fixes the split, the order and what is mirrored.
        labels: serve pairs of samples and classes, int64 of shape (n), in place of samples.

    Attributes:
        num_classes: number of classes, once `setup` has run; None where there are none.

    Raises:
        ValueError: batch_size is below 1.
    """

    sample_shape: tuple[int, ...]
    num_classes: int | None = None

    def __init__(
        self,
        batch_size: int | dict[int, int],
        num_workers: int,
        seed: int,
        labels: bool = False,
    ) -> None:
        super().__init__()
        BatchSizes(batch_size)  # refuses what is none
        # Not to the logger: Lightning refuses a name that model and data give different values.
        self.save_hyperparameters(logger=False)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.labels = labels
        self._splits: tuple[TensorSamples, TensorSamples, TensorSamples] | None = None
        self._anchor = (0, 0)  # batches and samples that were trained on, at some time
        self._resuming = False  # the anchor is a checkpoint's; Lightning's counters may come later

    @abstractmethod
    def load(self) -> tuple[TensorSamples, TensorSamples, TensorSamples]:
        """Return the training, validation and test samples, with labels where there are any."""

    def setup(self, stage: str | None = None) -> None:
        """Load the data, once however often it is called.

        Args:
            stage: ignored, every stage needs the same data.

        Raises:
            ValueError: `labels` is set and the data have none.
        """
        self._resuming = False  # a checkpoint is loaded after this hook
        if self._splits is not None:
            return
        splits = self.load()
        for samples in splits:
            if not self.labels:
                samples.labels = None
            elif samples.labels is None:
                raise ValueError(
                    f"{type(self).__name__} has no labels to serve. Leave `labels` out."
                )
        self._splits = splits

    @property
    def num_train(self) -> int:
        """Number of training samples, once `setup` has run."""
        return len(self._split(0))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of shuffled, full training batches.

        Raises:
            RuntimeError: called before `setup`.
            ValueError: one process's share of the data does not fill a single batch.
        """
        dataset, in_trainer = self._split(0), self._in_trainer
        if self._overfits:  # Lightning wants the first batches, again and again
            return self._loader(SampleLoader, dataset, BatchSizes(self.batch_size).largest)
        sampler = Order(
            len(dataset),
            BatchSizes(self.batch_size),
            self.seed,
            self.trainer.world_size if in_trainer and self.trainer else 1,
            self.trainer.global_rank if in_trainer and self.trainer else 0,
            self.position if in_trainer else None,
        )
        kind = ResumableLoader if in_trainer else SampleLoader
        return self._loader(kind, dataset, batch_size=None, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of all validation samples, in a fixed order, once `setup` has run."""
        return self._loader(SampleLoader, self._split(1), BatchSizes(self.batch_size).largest)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of all test samples, in a fixed order, once `setup` has run."""
        return self._loader(SampleLoader, self._split(2), BatchSizes(self.batch_size).largest)

    def position(self) -> int:
        """Return how many samples all processes have trained on, with the Trainer that is attached.

        It counts finished training steps, so a batch whose step was cut off comes again.
        """
        if self.trainer is None:
            return 0
        batches, samples = self._anchor
        trained = self._batches_trained()
        if trained < batches and self._resuming:
            return samples
        if trained < batches:  # another training
            batches = samples = 0
        self._resuming = False
        sizes = BatchSizes(self.batch_size)
        self._anchor = trained, sizes.after(samples, trained - batches, self.trainer.world_size)
        return self._anchor[1]

    def state_dict(self) -> dict[str, Any]:
        """Return how many samples and batches were trained on."""
        return {"samples": self.position(), "batches": self._batches_trained()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after as many samples as a checkpoint's training has seen.

        Args:
            state_dict: what `state_dict` returned.
        """
        self._anchor = state_dict["batches"], state_dict["samples"]
        self._resuming = True

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Finish a batch on its device: bytes to [-1, 1], images mirrored where it is of training.

        Args:
            batch: samples as they are stored, alone or with labels.
            dataloader_idx: ignored.

        Returns:
            The batch in the Trainer's precision.
        """
        first = None
        if self.trainer is not None and self.trainer.training and not self._overfits:
            position = self.position()
            first = position + self.trainer.global_rank * BatchSizes(self.batch_size).at(position)
        return self.finish(batch, first)

    def finish(self, batch: Any, first: int | None = None) -> Any:
        """Make a batch as a model takes it from one as it is stored.

        Args:
            batch: samples, alone or in a pair with labels, on any device.
            first: position of the batch's first sample in the order of training, None for
                validation and test.

        Returns:
            The batch, bytes converted to floating-point numbers in [-1, 1].
        """
        samples, *labels = batch if isinstance(batch, (tuple, list)) else [batch]
        if first is not None:
            samples = self.augment(samples, first)
        if samples.dtype == torch.uint8:
            samples = pixels_to_unit(samples, self._dtype())
        return (samples, *labels) if labels else samples

    def augment(self, samples: Tensor, first: int) -> Tensor:
        """Return training samples as they are; a subclass may change them.

        Args:
            samples: as they are stored, on any device.
            first: position of the first of them in the order of training, the one source of
                randomness that keeps order, workers, processes and resumed trainings equal.
        """
        return samples

    @property
    def _in_trainer(self) -> bool:
        return self.trainer is not None and self.trainer.state.status == TrainerStatus.RUNNING

    @property
    def _overfits(self) -> bool:
        trainer: Any = self.trainer
        return self._in_trainer and trainer.overfit_batches > 0

    def _batches_trained(self) -> int:
        # Lightning raises `processed` after the step and before it saves a checkpoint.
        if self.trainer is None:
            return 0
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return progress.total.processed

    def _dtype(self) -> torch.dtype:
        if not self._in_trainer or self.trainer is None:
            return torch.float32
        sample = torch.empty(0, dtype=torch.float32)
        return self.trainer.precision_plugin.convert_input(sample).dtype

    def _split(self, number: int) -> TensorSamples:
        if self._splits is None:
            name = type(self).__name__
            raise RuntimeError(f"{name} holds no data yet. Call prepare_data() and setup() first.")
        return self._splits[number]

    def _loader(
        self,
        kind: type[SampleLoader],
        dataset: TensorSamples,
        batch_size: int | None,
        sampler: Order | None = None,
    ) -> DataLoader[Any]:
        loader = kind(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_as_it_is,  # the dataset has made the batch already
            generator=torch.Generator().manual_seed(self.seed),  # or workers draw on the global one
        )
        loader.finish = self._finish_by_hand
        return loader

    def _finish_by_hand(self, batch: Any, first: int | None) -> Any:
        return batch if self._in_trainer else self.finish(batch, first)


def _as_it_is(batch: Any) -> Any:
    return batch


class ImageDataModule(SampleDataModule):
    """Abstract: images (n, c, h, w) in [-1, 1], `sample_shape` = (c, h, w).

    Args:
        batch_size: images in a batch of one process, or a schedule {images seen: batch size}.
        num_workers: loader processes; 0 loads in the training process.
        seed: fixes the split, the order and what is mirrored.
        labels: serve pairs of images and classes.
        flip: mirror each training image left to right with probability 1/2, anew in every epoch,
            as a function of (seed, position).
    """

    def __init__(
        self,
        batch_size: int | dict[int, int],
        num_workers: int,
        seed: int,
        labels: bool = False,
        flip: bool = False,
    ) -> None:
        super().__init__(batch_size, num_workers, seed, labels)
        self.flip = flip

    def augment(self, samples: Tensor, first: int) -> Tensor:
        """Mirror images whose coin flip says so.

        Args:
            samples: images (n, c, h, w), bytes or floats.
            first: position of the first image in the order of training.
        """
        if not self.flip:
            return samples
        mirrored = coin_flips(self.seed, first, len(samples)).to(samples.device)
        return torch.where(mirrored[:, None, None, None], samples.flip(-1), samples)
