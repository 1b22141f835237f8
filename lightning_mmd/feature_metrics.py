"""Scores of generated samples in the features of a network that no method trained on."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.metric_prc import calculate_precision_recall_part
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.utilities.data import dim_zero_cat

from lightning_mmd.passes import evaluating, seeded
from lightning_mmd.points import require_tensors

__all__ = ["FeatureMetrics"]


class FeatureMetrics(Metric):
    r"""FID, KID, precision and recall of generated samples, in the features of one network.

    With features :math:`\varphi` of mean m and covariance C, all lower is better except the last:

    ============= ============================================================================
    ``fid``       :math:`\|m_r - m_g\|^2 + tr(C_r + C_g - 2 (C_r C_g)^{1/2})`, by torchmetrics
    ``kid``       unbiased MMD^2 under :math:`(\langle\varphi, \varphi'\rangle / d + 1)^3`, the
                  mean over random subsets, by torchmetrics; may be negative
    ``kid_std``   its standard deviation over the subsets
    ``precision`` share of generated samples inside the balls of real ones, by torch-fidelity
    ``recall``    share of real samples inside the balls of generated ones
    ============= ============================================================================

    The ball of a sample reaches to its ``neighbours``-th nearest of its own kind. FID has a bias
    that grows as samples get fewer: it is left out where a side has fewer than ``min_fid_samples``.
    Values of one network, of one number of samples and of one real set can be compared, others
    cannot. The score of real against real samples says what can be reached.

    Args:
        features: Network from samples (n, ...) to features, flattened to (n, d). It is put into
            evaluation mode meanwhile; it is not a submodule, so it is saved nowhere.
        subsets: Random subsets of KID, >= 1.
        subset_size: Samples of one, at least 2; no more than the smaller side has are taken.
        neighbours: Neighbours of precision and recall, >= 1; None leaves both out, which cost most:
            n m d operations.
        min_fid_samples: Samples on each side that FID needs, at least 2.
        seed: Draws the subsets.
        reset_real_samples: False keeps the real samples when `reset` is called.
        **kwargs: Of `torchmetrics.Metric`.

    Raises:
        TypeError: If ``features`` is no module.
        ValueError: If a number is out of range; from `compute`, where a side has fewer samples than
            neighbours + 1.

    Source:
        Heusel et al. 2017, arXiv 1706.08500 (FID); Binkowski et al. 2018, arXiv 1801.01401 (KID);
        Kynkaanniemi et al. 2019, arXiv 1904.06991 (precision and recall).

    Examples:
        >>> metrics = FeatureMetrics(torch.nn.Flatten())
        >>> metrics.update(torch.randn(100, 1, 2, 2), real=True)
        >>> metrics.update(torch.randn(100, 1, 2, 2), real=False)
        >>> sorted(metrics.compute())
        ['kid', 'kid_std', 'precision', 'recall']
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False

    real: list[Tensor]
    fake: list[Tensor]

    def __init__(
        self,
        features: nn.Module,
        subsets: int = 100,
        subset_size: int = 1000,
        neighbours: int | None = 3,
        min_fid_samples: int = 2000,
        seed: int = 0,
        reset_real_samples: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(features, nn.Module):
            raise TypeError(
                "FeatureMetrics needs a network from samples to features, a torch.nn.Module, got "
                f"{features!r}."
            )
        for name, value, least in (
            ("subsets", subsets, 1),
            ("subset_size", subset_size, 2),
            ("neighbours", 1 if neighbours is None else neighbours, 1),
            ("min_fid_samples", min_fid_samples, 2),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        self._features = (features,)  # in a tuple: no submodule
        self.subsets = subsets
        self.subset_size = subset_size
        self.neighbours = neighbours
        self.min_fid_samples = min_fid_samples
        self.seed = seed
        self.reset_real_samples = reset_real_samples
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("fake", default=[], dist_reduce_fx="cat")

    def update(self, samples: Tensor, real: bool) -> None:
        """Embed a batch and add it to one side.

        Args:
            samples: Shape (n, ...), as the network takes them.
            real: True for samples of the data, False for generated ones.

        Raises:
            TypeError: If they are no tensor.
        """
        require_tensors("FeatureMetrics", samples=samples)
        (network,) = self._features
        network.to(samples.device)
        with torch.no_grad(), evaluating(network):
            embedded = network(samples).detach().flatten(1).double()
        (self.real if real else self.fake).append(embedded)

    def compute(self) -> dict[str, Tensor]:
        """Return the scores by name, float64 scalars."""
        real, fake = dim_zero_cat(self.real), dim_zero_cat(self.fake)
        fewest = min(len(real), len(fake))
        least = max(2, (self.neighbours or 0) + 1)
        if fewest < least:
            raise ValueError(
                f"FeatureMetrics needs at least {least} samples on each side, got {len(real)} real "
                f"and {len(fake)} generated ones. Update both sides before compute, or lower "
                "`neighbours`."
            )
        scores: dict[str, Tensor] = {}
        embedded = nn.Identity()
        if fewest >= self.min_fid_samples:
            embedded.__dict__["num_features"] = real.shape[1]  # torchmetrics asks for it
            fid = FrechetInceptionDistance(feature=embedded, sync_on_compute=False).to(real.device)
            fid.set_dtype(torch.float64)
            scores["fid"] = _compared(fid, real, fake)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Metric `Kernel Inception Distance`")
            kid = KernelInceptionDistance(
                feature=embedded,
                subsets=self.subsets,
                subset_size=min(self.subset_size, fewest),
                sync_on_compute=False,  # each process has all samples by now
            ).to(real.device)
        with seeded(real.device, self.seed):
            scores["kid"], scores["kid_std"] = _compared(kid, real, fake)
        if self.neighbours is not None:
            shares = calculate_precision_recall_part(fake.float(), real.float(), self.neighbours)
            scores["precision"], scores["recall"] = map(real.new_tensor, shares)
        return scores

    def reset(self) -> None:
        """Forget the fake samples, and the real ones unless `reset_real_samples` is False."""
        kept = [] if self.reset_real_samples else list(self.real)
        super().reset()
        self.real.extend(kept)

    def floor(self, other: Tensor) -> dict[str, Tensor]:
        """Return the scores of other real samples in place of the generated ones.

        Args:
            other: Real samples that are not among those of `update`, as many as will be generated.
        """
        kept = self.fake
        self.fake = []
        try:
            self.update(other, real=False)
            return self.compute()
        finally:
            self.fake = kept


def _compared(metric: Metric, real: Tensor, fake: Tensor) -> Any:
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()
