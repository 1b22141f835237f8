"""Streaming, multi-process metrics between real and fake samples."""

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from lightning_mmd.kernels import Kernel
from lightning_mmd.mmd import mmd2_biased, mmd2_unbiased, mmd2_with_error
from lightning_mmd.passes import copy_network, embed
from lightning_mmd.points import gram_dtype, require_tensors
from lightning_mmd.wide import widen

__all__ = ["MaximumMeanDiscrepancy"]


class MaximumMeanDiscrepancy(Metric):
    r"""Squared maximum mean discrepancy between all real and all fake samples seen.

    .. math::
        \mathrm{MMD}^2 = E\,k(x, x') - 2\,E\,k(x, y) + E\,k(y, y')

    with x real and y fake (or their embeddings by `features`). The value is that of `mmd2_unbiased`
    or `mmd2_biased` on the concatenation of all updates of all processes, which may be of unequal
    sizes. It keeps every (embedded) sample in memory; one value costs O((n + m)^2 d) time.

    Use `update` and `compute`. Calling the metric itself asks for the value of one batch, which has
    one side only.

    Args:
        kernel: Kernel on flattened samples, or on embeddings where `features` is given. There is no
            default: a value means nothing without its kernel. For images in [-1, 1] of d numbers, a
            `SumKernel` of ``RationalQuadratic(alpha=a, bandwidth=d**0.5)``, a in
            (0.2, 0.5, 1, 2, 5), sees both coarse and fine differences.
        features: Network that embeds samples before the kernel. The metric takes a frozen copy in
            evaluation mode: training the original later does not move the metric, and the copy has
            no entry in ``parameters()`` or ``state_dict()`` of whatever holds the metric.
        unbiased: True for the U-statistic, which is zero on average when both distributions are
            equal and may be negative; False for the V-statistic, which is never negative.
        block_size: Rows of the kernel matrix in memory at a time, as in `mmd2_unbiased`.
        reset_real_samples: False keeps the real samples when `reset` is called, so that several
            models can be compared with one real set.
        with_error: Whether the value is a dictionary of ``mmd2`` and ``mmd2_error``, its standard
            error as in `mmd2_with_error`. It costs nothing more, and needs the U-statistic.
        **kwargs: Of `torchmetrics.Metric`, for example ``sync_on_compute``.

    Raises:
        ValueError: If a standard error is asked for of the V-statistic; from `update`, where
            samples differ in shape; from `compute`, where a side has fewer than 2 samples
            (unbiased) or none (biased).
        TypeError: If `kernel` is not a `Kernel`; from `update`, where samples are not floating
            point.

    Source: Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, lemma 6 (unbiased: equation 3,
    biased: equation 5).

    Examples:
        >>> import torch
        >>> from lightning_mmd.kernels import Gaussian
        >>> metric = MaximumMeanDiscrepancy(Gaussian(bandwidth=1.0), unbiased=False)
        >>> metric.update(torch.tensor([[0.0], [0.0]]), real=True)
        >>> metric.update(torch.tensor([[2.0]]), real=False)
        >>> metric.compute()  # 2 - 2 exp(-2)
        tensor(1.7293, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    real: list[Tensor]
    fake: list[Tensor]

    def __init__(
        self,
        kernel: Kernel,
        features: nn.Module | None = None,
        unbiased: bool = True,
        block_size: int = 2048,
        reset_real_samples: bool = True,
        with_error: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(kernel, Kernel):
            raise TypeError(
                f"a discrepancy needs a kernel such as Gaussian(bandwidth), got {kernel!r}. Others "
                "are in lightning_mmd.kernels; your own derives from Kernel."
            )
        if with_error and not unbiased:
            raise ValueError(
                "the standard error is that of the U-statistic: set unbiased=True, or "
                "with_error=False."
            )
        self.kernel = kernel
        self.unbiased = unbiased
        self.with_error = with_error
        self.block_size = block_size
        self.reset_real_samples = reset_real_samples
        # A tuple hides the copy from nn.Module: it is no submodule, so it has no parameters here.
        self._features = (
            () if features is None else (copy_network(features).eval().requires_grad_(False),)
        )
        self.add_state("real", default=[], dist_reduce_fx="cat")
        self.add_state("fake", default=[], dist_reduce_fx="cat")

    def update(self, samples: Tensor, real: bool) -> None:
        """Add a batch to one side.

        Args:
            samples: Shape (n, ...), floating point; n may be 0. With several processes each one
                must update both sides, if only with an empty batch.
            real: True for samples of the target, False for samples of the model.
        """
        require_tensors("MaximumMeanDiscrepancy", samples=samples)
        if not samples.is_floating_point():
            raise TypeError(
                f"MaximumMeanDiscrepancy needs floating-point samples, got {samples.dtype}. Scale "
                "integer images to [-1, 1] first, as the generator's are."
            )
        with torch.no_grad():
            for features in self._features:
                samples = embed(features, samples)
        # float32 at least: half-precision samples would round the distances between them.
        samples = samples.detach().to(gram_dtype(samples))
        for seen in (*self.real[:1], *self.fake[:1]):
            if seen.shape[1:] != samples.shape[1:]:
                raise ValueError(
                    f"MaximumMeanDiscrepancy compares samples of one shape, got "
                    f"{tuple(samples.shape[1:])} after {tuple(seen.shape[1:])}. Give real and fake "
                    "samples the same shape, or pass `features` that embed them alike."
                )
        (self.real if real else self.fake).append(samples)

    def compute(self) -> Any:
        """Return MMD^2 over everything seen by all processes, a scalar (float64, but on MPS).

        With ``with_error``, a dictionary of it and its standard error.
        """
        minimum = 2 if self.unbiased else 1
        # Lists of batches; after synchronisation each is one tensor.
        n, m = (
            len(side) if isinstance(side, Tensor) else sum(map(len, side))
            for side in (self.real, self.fake)
        )
        if min(n, m) < minimum:
            raise ValueError(
                f"MaximumMeanDiscrepancy(unbiased={self.unbiased}) needs at least {minimum} samples"
                f" on each side, got n = {n} real and m = {m} fake. Update both sides, with "
                "real=True and real=False, before compute."
            )
        real, fake = dim_zero_cat(self.real), dim_zero_cat(self.fake)
        dtype = torch.promote_types(real.dtype, fake.dtype)
        if self.with_error:
            found = mmd2_with_error(
                real.to(dtype), fake.to(dtype), self.kernel, block_size=self.block_size
            )
            return {"mmd2": found.value, "mmd2_error": found.std_error}
        estimator = mmd2_unbiased if self.unbiased else mmd2_biased
        value = estimator(real.to(dtype), fake.to(dtype), self.kernel, block_size=self.block_size)
        return widen(value)

    def reset(self) -> None:
        """Forget the fake samples, and the real ones unless `reset_real_samples` is False."""
        kept = [] if self.reset_real_samples else list(self.real)
        super().reset()
        self.real.extend(kept)
