"""FID, KID, precision and recall of fresh samples while the generator trains."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_mmd.batches import BatchParts
from lightning_mmd.callbacks.held_out import HeldOutTracker
from lightning_mmd.feature_metrics import FeatureMetrics

__all__ = ["SampleQuality"]


class SampleQuality(HeldOutTracker):
    """Scores of fresh samples in the features of a network, each beside its real-vs-real floor.

    Measured before the first generator update, every `every_n_steps` updates and at the end, with
    averaged weights where `GeneratorEMA` keeps some, against a fixed subset of the validation data.
    A network that training has not seen judges what MMD^2 under a kernel on pixels cannot: whether
    a picture shows something. See `FeatureMetrics` for the scores.

    Logged on the axis of generator updates: ``val/kid`` (also shown in the progress bar, and a
    valid ``monitor`` of ModelCheckpoint), ``val/kid_std``, ``val/fid``, ``val/precision`` and
    ``val/recall``, each with its floor, for example ``val/kid_real``; once, what is measured.
    With ``name="judge"`` they are ``val/judge/kid`` and so on. ``trainer.validate`` and
    ``trainer.test`` alone log them once, as ``val/kid`` and ``test/kid``, against their own data.

    Args:
        features: Network from images to features, for example `ClassifierFeatures`,
            `TorchvisionFeatures` or `InceptionFeatures`.
        every_n_steps: Generator updates between measurements, at least 1.
        num_real: Held-out images, at least 4. Where the validation data has fewer, all of them.
        num_fake: Samples at each measurement, at least 4.
        floor: Whether to measure the floor, once a run.
        subsets: Random subsets of KID, >= 1.
        neighbours: Neighbours of precision and recall, >= 1; None leaves both out.
        sample_batch_size: Images sampled or embedded at a time.
        seed: Of the subsets and of the latents.
        name: Part of the names in the logs, to tell several callbacks apart.
        generator: See `GeneratorCadence`; also the following two.
        generator_output: See there.
        batch: Where images stand in a batch. Default: the module's own ``batch``, else first.
        sampler: See there.

    Attributes:
        history: One dictionary a measurement: ``step`` (generator updates), the scores by name and
            ``seconds`` (that it took).
        floors: Scores of real images against real images, empty before or without.

    Raises:
        ValueError: If a number is out of range; at the start of training, if there is no validation
            data or an image has a value that is not finite.
        TypeError: If ``features`` is no module, or a dataset cannot be read item by item.

    Source:
        See `FeatureMetrics`.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> from torch import nn
        >>> quality = SampleQuality(nn.Flatten(), every_n_steps=500)  # features: the pixels
        >>> trainer = Trainer(max_steps=2000, callbacks=[quality], logger=False)
    """

    main = "kid"

    def __init__(
        self,
        features: nn.Module,
        every_n_steps: int = 500,
        num_real: int = 5000,
        num_fake: int = 5000,
        floor: bool = True,
        subsets: int = 50,
        neighbours: int | None = 3,
        sample_batch_size: int = 500,
        seed: int = 0,
        name: str = "",
        generator: str | None = None,
        generator_output: Callable | None = None,
        batch: BatchParts | None = None,
        sampler: str = "sample",
    ) -> None:
        super().__init__(
            FeatureMetrics(
                features,
                subsets=subsets,
                neighbours=neighbours,
                seed=seed,
                reset_real_samples=False,
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
        self._features_name = type(features).__name__

    @property
    def last(self) -> dict[str, float]:
        """Newest scores, empty before."""
        scores = self.history[-1] if self.history else {}
        return {name: value for name, value in scores.items() if name not in ("step", "seconds")}

    def key(self, split: str, score: str) -> str:
        return "/".join(part for part in (split, self.name, score) if part)

    def facts(self) -> dict[str, Any]:
        metric = self._metric
        return {
            "features": self._features_name,
            "subsets": metric.subsets,
            "subset_size": metric.subset_size,
            "neighbours": metric.neighbours,
        }
