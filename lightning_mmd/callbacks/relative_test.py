"""Learning rates that fall when samples no longer improve."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_mmd.batches import BatchParts
from lightning_mmd.callbacks.cadence import GeneratorCadence, Sampling
from lightning_mmd.callbacks.images import training_images
from lightning_mmd.callbacks.learning_rates import scale_learning_rates
from lightning_mmd.callbacks.loggers import send_scalars
from lightning_mmd.callbacks.observing import observing
from lightning_mmd.kernels import Kernel
from lightning_mmd.mmd import relative_similarity_test
from lightning_mmd.passes import copy_network, embed
from lightning_mmd.points import gram_dtype
from lightning_mmd.processes import together

__all__ = ["RelativeTestLR"]


class RelativeTestLR(GeneratorCadence):
    """Halve the learning rates when samples are no longer closer to the data than some time ago.

    Every ``every_n_steps`` generator updates the samples of now and those of ``lookback``
    evaluations ago are compared with real images by `relative_similarity_test`. Where its p-value
    (small when the newer samples are closer) is above ``threshold`` ``patience`` times in a row,
    all learning rates are multiplied by ``factor``, but not below ``min_lr``, and counting starts
    anew. Samples that are all one point, then and now, show no improvement (p = 1/2), nor do those
    that are not finite or whose kernel values are not (p-value NaN). It composes with learning-rate
    schedulers. Logged on the axis of generator updates:
    ``relative_test/p_value`` and ``relative_test/lr``, the first rate.

    The rate never falls before lookback + patience evaluations. The samples (embedded, if there are
    ``features``) of the last ``lookback`` evaluations are kept in memory and in checkpoints, so
    that a resumed run goes on exactly: lookback * num_samples vectors. With several processes the
    first one decides for all.

    Args:
        kernel: Kernel on flattened images, or on embeddings where ``features`` is given.
        every_n_steps: Generator updates between evaluations, at least 1.
        lookback: Evaluations between the two samples compared, at least 1.
        patience: Tests in a row without improvement that lower the rates, at least 1.
        threshold: p-value above which a test shows no improvement, in (0, 1).
        factor: Factor on the learning rates, in (0, 1).
        min_lr: Rates do not fall below this, >= 0.
        num_samples: Samples of each kind, at least 3; cost O(num_samples^2) an evaluation.
        features: Network that embeds images before the kernel; a frozen copy of it is used.
        sample_batch_size: Images sampled or embedded at a time.
        seed: Of the real images and of the latents.
        generator: See `GeneratorCadence`; also the following two.
        generator_output: See there.
        batch: Where images stand in a batch. Default: the module's own ``batch``, else first.
        sampler: See there.

    Attributes:
        history: One dictionary a test: ``step``, ``p_value``, ``difference`` (MMD^2 then minus
            MMD^2 now) and ``lr`` after it.

    Raises:
        ValueError: If a number is out of range; at the start of training, if there are too few
            images, the kernel does not tell them apart, or samples are of another shape.
        TypeError: If the training data cannot be read by index.

    Source:
        Binkowski et al. 2018, arXiv 1801.01401 (their schedule: every 2000 updates, 10 evaluations
        back, 0.1, three times, 1e-6, polynomial kernel on Inception features); Bounliphone et al.
        2016, arXiv 1511.04581, the test.

    Examples:
        >>> from lightning_mmd.kernels import RationalQuadratic
        >>> schedule = RelativeTestLR(RationalQuadratic(1.0, bandwidth=8.0), every_n_steps=100)
    """

    onlooker = False

    def __init__(
        self,
        kernel: Kernel,
        every_n_steps: int = 2000,
        lookback: int = 10,
        patience: int = 3,
        threshold: float = 0.1,
        factor: float = 0.5,
        min_lr: float = 1e-6,
        num_samples: int = 2048,
        features: nn.Module | None = None,
        sample_batch_size: int = 500,
        seed: int = 0,
        generator: str | None = None,
        generator_output: Callable | None = None,
        batch: BatchParts | None = None,
        sampler: str = "sample",
    ) -> None:
        super().__init__(every_n_steps, generator, generator_output, sampler)
        if min(lookback, patience, sample_batch_size) < 1 or num_samples < 3:
            raise ValueError(
                "RelativeTestLR needs lookback, patience and sample_batch_size of at least 1 and "
                f"num_samples of at least 3, got {lookback}, {patience}, {sample_batch_size} and "
                f"{num_samples}."
            )
        if not (0 < threshold < 1 and 0 < factor < 1 and 0 <= min_lr < math.inf):
            raise ValueError(
                "RelativeTestLR needs threshold and factor in (0, 1) and a finite min_lr >= 0, got "
                f"{threshold}, {factor} and {min_lr}."
            )
        self.kernel = kernel
        self.lookback = lookback
        self.patience = patience
        self.threshold = threshold
        self.factor = factor
        self.min_lr = min_lr
        self.num_samples = num_samples
        self.features = None if features is None else copy_network(features).eval()
        self.sample_batch_size = sample_batch_size
        self.seed = seed
        self.batch = batch
        self.history: list[dict[str, float]] = []
        self._failures = 0
        self._past: list[Tensor] = []
        self._real: Tensor | None = None

    def stretch(self, factor: int) -> None:
        """Let shorter steps be tested at the same times, and rates fall equally far."""
        super().stretch(factor)
        self.min_lr /= factor

    def reset(self) -> None:
        """Forget an earlier run."""
        super().reset()
        self.history, self._past, self._failures = [], [], 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with together(trainer):
            if trainer.is_global_zero:
                with observing(pl_module.device):
                    torch.manual_seed(self.seed)  # of random transforms
                    images, *_ = training_images(
                        self, trainer, self.num_samples, self.seed, self.batch
                    )
                    batches = images.to(pl_module.device).split(self.sample_batch_size)
                    self._real = torch.cat([self._embed(batch) for batch in batches])
                self._refuse_blind_kernel(self._real)
        super().on_train_start(trainer, pl_module)

    def _refuse_blind_kernel(self, real: Tensor) -> None:
        points = real.flatten(1)
        gram = self.kernel(points, points)
        others = gram[~torch.eye(len(gram), dtype=torch.bool, device=gram.device)]
        if others.max() == others.min():
            raise ValueError(
                f"RelativeTestLR needs a kernel that varies on the images, got {self.kernel!r}, "
                f"which is {float(others[0]):.3g} between any two. Choose another bandwidth, such "
                "as median_bandwidth(images)."
            )

    def observe(self, trainer: Trainer, model: Sampling) -> None:
        with together(trainer):
            lowers = trainer.is_global_zero and self._no_longer_improves(trainer, model)
        if trainer.strategy.broadcast(lowers):
            rates = scale_learning_rates(trainer, self.factor, self.min_lr)
            shown = ", ".join(f"{rate:.3g}" for rate in rates)
            rank_zero_info(
                f"RelativeTestLR: no improvement at generator update {self.updates}; "
                f"learning rates are now {shown}."
            )
        if trainer.is_global_zero and self.history:
            newest = self.history[-1]
            newest.setdefault("lr", float(trainer.optimizers[0].param_groups[0]["lr"]))
            if newest["step"] == self.updates:
                scalars = {f"relative_test/{k}": newest[k] for k in ("p_value", "lr")}
                send_scalars(trainer, scalars, self.updates)

    def _no_longer_improves(self, trainer: Trainer, model: Sampling) -> bool:
        """Compare with the samples of some evaluations ago; return whether to lower the rates."""
        seed = random.Random(f"relative test {self.seed} {self.updates}").getrandbits(32)
        latents = model.fixed_latents(self.num_samples, seed)
        now = torch.cat([self._embed(x) for x in model.in_parts(latents, self.sample_batch_size)])
        if self._real is not None and now.shape[1:] != self._real.shape[1:]:
            raise ValueError(
                f"RelativeTestLR compares samples with images of shape "
                f"{tuple(self._real.shape[1:])}, got {tuple(now.shape[1:])}. Give the generator "
                "that shape, or resize the data."
            )
        self._past.append(now)
        if len(self._past) <= self.lookback or self._real is None:
            return False
        then = self._past.pop(0).to(now)
        p_value = difference = math.nan
        if self._is_finite(then) and self._is_finite(now):
            real = self._real.to(torch.promote_types(self._real.dtype, now.dtype))
            result = relative_similarity_test(
                real, then.to(real.dtype), now.to(real.dtype), self.kernel
            )
            p_value, difference = result.p_value, result.difference
        self.history.append({"step": self.updates, "p_value": p_value, "difference": difference})
        self._failures = 0 if p_value <= self.threshold else self._failures + 1
        if self._failures < self.patience:
            return False
        self._failures = 0
        return True

    def _is_finite(self, samples: Tensor) -> bool:
        values = self.kernel.diagonal(samples.flatten(1))  # k(x, y)^2 <= k(x, x) k(y, y)
        return bool(samples.isfinite().all() and values.isfinite().all())

    @torch.no_grad()
    def _embed(self, images: Tensor) -> Tensor:
        vectors = images if self.features is None else embed(self.features, images)
        return vectors.to(gram_dtype(vectors))

    def state_dict(self) -> dict[str, Any]:
        history = [dict(entry) for entry in self.history]
        past = [samples.cpu() for samples in self._past]
        state = {"history": history, "past": past, "failures": self._failures}
        return {**super().state_dict(), **state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.history = [dict(entry) for entry in state_dict["history"]]
        self._past = list(state_dict["past"])
        self._failures = state_dict["failures"]
