r"""Estimators of the squared maximum mean discrepancy, and the tests built on them.

MMD^2(P, Q) = E k(x, x') - 2 E k(x, y) + E k(y, y') = ||mu_P - mu_Q||^2 in the kernel's RKHS, with
x, x' from the target P and y, y' from the model Q. Nothing here returns its root: the root of an
unbiased estimate is neither unbiased nor always defined.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product

import torch
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from lightning_mmd.kernels import Kernel
from lightning_mmd.points import gram_dtype, require_tensors
from lightning_mmd.wide import to_like, wide_sum, widen

__all__ = [
    "MMD2Estimate",
    "RelativeSimilarityTest",
    "TwoSampleTest",
    "mmd2_biased",
    "mmd2_features",
    "mmd2_unbiased",
    "mmd2_with_error",
    "relative_similarity_test",
    "two_sample_test",
]


def mmd2_unbiased(x: Tensor, y: Tensor, kernel: Kernel, *, block_size: int = 2048) -> Tensor:
    r"""Return the unbiased estimate (U-statistic) of MMD^2.

    sum_{i != j} k(x_i, x_j) / (n (n - 1)) + sum_{i != j} k(y_i, y_j) / (m (m - 1))
    - 2 sum_{i, j} k(x_i, y_j) / (n m)

    Its mean is MMD^2 at every sample size, so it takes negative values where both samples have one
    distribution, and often: its law is then skewed, negative in about half of all draws for a
    kernel that sees many directions, and in 68 % (P(chi^2_1 < 1)) for one that sees a single one,
    as `Linear` in one dimension. It is never clamped. Cost O((n + m)^2), memory O(block_size^2),
    also with gradients: blocks are then computed again in the backward pass. Sums are accumulated
    in float64. Differentiable to second order in x, y.

    Args:
        x: Target sample of shape (n, ...), n >= 2; trailing dimensions are flattened.
        y: Model sample of shape (m, ...), m >= 2, with the same trailing shape, dtype and device.
        kernel: The kernel k.
        block_size: Number of points on each side of a block.

    Returns:
        A scalar in the samples' dtype (float32 for half-precision samples), of either sign.

    Raises:
        TypeError: If a sample is no tensor.
        ValueError: If there are fewer than 2 samples on a side, or the samples differ in shape,
            dtype or device, or are not floating, or the block size is not positive.

    Source:
        Gretton et al. 2012, A kernel two-sample test, equation 3.

    Examples:
        >>> import torch
        >>> from lightning_mmd.kernels import Linear
        >>> x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0], [5.0]])
        >>> mmd2_unbiased(x, y, Linear())  # 16 - (2 / 2 + 1 / 3): the means' variance removed
        tensor(14.6667)
    """
    x, y = _paired("mmd2_unbiased", x, y, min_samples=2)
    return _estimate(x, y, kernel, block_size, unbiased=True)


def mmd2_biased(x: Tensor, y: Tensor, kernel: Kernel, *, block_size: int = 2048) -> Tensor:
    r"""Return the biased estimate (V-statistic) of MMD^2: that of the empirical distributions.

    sum_{i, j} k(x_i, x_j) / n^2 + sum_{i, j} k(y_i, y_j) / m^2 - 2 sum_{i, j} k(x_i, y_j) / (n m)

    Never negative (up to rounding), and zero where the mean embeddings of the samples agree: for
    equal empirical distributions only under a characteristic kernel, for more under `Linear` or
    `Polynomial`, which see some moments only. Too large by (E k(x, x) - E k(x, x')) / n
    + (E k(y, y) - E k(y, y')) / m on average. It is the energy that a flow of particles descends.
    Cost and memory as for `mmd2_unbiased`.

    Args:
        x: Target sample of shape (n, ...), n >= 1; trailing dimensions are flattened.
        y: Model sample of shape (m, ...), m >= 1, with the same trailing shape, dtype and device.
        kernel: The kernel k.
        block_size: Number of points on each side of a block.

    Returns:
        A scalar in the samples' dtype (float32 for half-precision samples), >= 0 up to rounding.

    Raises:
        TypeError: If a sample is no tensor.
        ValueError: If a sample is empty, or the samples differ in shape, dtype or device, or are
            not floating, or the block size is not positive.

    Source:
        Gretton et al. 2012, A kernel two-sample test, equation 5.

    Examples:
        >>> import torch
        >>> from lightning_mmd.kernels import Linear
        >>> mmd2_biased(torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]]), Linear())
        tensor(16.)
    """
    x, y = _paired("mmd2_biased", x, y, min_samples=1)
    return _estimate(x, y, kernel, block_size, unbiased=False)


def mmd2_features(phi_x: Tensor, phi_y: Tensor, *, unbiased: bool = False) -> Tensor:
    r"""Return MMD^2 under the kernel k(x, y) = <phi(x), phi(y)> from the feature vectors.

    ||mean phi_x - mean phi_y||^2; the unbiased version leaves out the terms <phi(x_i), phi(x_i)>
    and <phi(y_i), phi(y_i)>. Linear time and memory; sums are accumulated in float64.

    Args:
        phi_x: Features of the target sample, (n, r) or (n, ...), flattened.
        phi_y: Features of the model sample, (m, r), of the same trailing shape, dtype and device.
        unbiased: Estimate without bias; needs at least 2 samples on each side.

    Returns:
        A scalar in the features' dtype (float32 for half precision); >= 0 unless unbiased.

    Raises:
        TypeError: If a sample is no tensor.
        ValueError: If there are too few samples, or they differ in shape, dtype or device, or are
            not floating.

    Source:
        Gretton et al. 2012, A kernel two-sample test, lemma 4 (MMD as a distance of means).

    Examples:
        >>> import torch
        >>> mmd2_features(torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]]))
        tensor(16.)
        >>> mmd2_features(torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]]), unbiased=True)
        tensor(14.)
    """
    phi_x, phi_y = _paired("mmd2_features", phi_x, phi_y, min_samples=2 if unbiased else 1)
    n, m = len(phi_x), len(phi_y)
    mean_x = wide_sum(phi_x, 0) / n
    mean_y = wide_sum(phi_y, 0) / m
    mmd2 = (mean_x - mean_y).square().sum()
    if unbiased:
        # The variance of a mean, estimated without bias: what the diagonal terms add to ||mean||^2.
        mmd2 = mmd2 - (phi_x - mean_x).square().sum() / (n * (n - 1))
        mmd2 = mmd2 - (phi_y - mean_y).square().sum() / (m * (m - 1))
    return to_like(mmd2, phi_x)


@dataclass(frozen=True)
class MMD2Estimate:
    """Result of `mmd2_with_error`.

    Args:
        value: The unbiased estimate of MMD^2.
        std_error: Its estimated standard deviation.
    """

    value: float
    std_error: float


@torch.no_grad()
def mmd2_with_error(
    x: Tensor, y: Tensor, kernel: Kernel, *, block_size: int = 2048
) -> MMD2Estimate:
    r"""Return the unbiased estimate of MMD^2 with its standard error.

    With mu_x(t) = E k(x, t) and so on, the Hoeffding decomposition of the U-statistic U is

    Var U = 4 Var[mu_x(x) - mu_y(x)] / n + 4 Var[mu_y(y) - mu_x(y)] / m + S,
    S = 2 V_xx / (n (n - 1)) + 2 V_yy / (m (m - 1)) + 4 V_xy / (n m),

    V being the variance of the doubly centred kernel. It is estimated as in
    `relative_similarity_test`: by the sample variances of the witness less S, and by no less than
    S. U is about normal where the distributions differ by more than a few standard errors; where
    they agree it is not (see `two_sample_test`), and the standard error is conservative there. Cost
    O((n + m)^2), memory O(block_size (n + m)).

    Args:
        x: Target sample of shape (n, ...), n >= 2; trailing dimensions are flattened.
        y: Model sample of shape (m, ...), m >= 2, of the same trailing shape, dtype and device.
        kernel: The kernel k.
        block_size: Rows of the kernel matrix in memory at a time, >= 1.

    Returns:
        The estimate of `mmd2_unbiased` and its standard error.

    Raises:
        TypeError: If a sample is no tensor.
        ValueError: As `mmd2_unbiased`.

    Source:
        Sutherland et al. 2017, Generative models and model criticism via optimized MMD, section 2;
        the second-order terms are those of Bounliphone et al. 2016.

    Examples:
        >>> import torch
        >>> from lightning_mmd.kernels import Gaussian
        >>> x, y = torch.randn(2, 200, 2, generator=torch.Generator().manual_seed(0))
        >>> found = mmd2_with_error(x, y + 1.0, Gaussian())
        >>> exact = 2 / 3 * (1 - math.exp(-1 / 3))
        >>> abs(found.value - exact) < 3 * found.std_error
        True
    """
    x, y = _paired("mmd2_with_error", x, y, min_samples=2)
    if block_size < 1:
        raise ValueError(f"MMD^2 needs block_size >= 1, got {block_size}.")
    n, m = len(x), len(y)
    xx, yy = _Sums(kernel, x, x, block_size), _Sums(kernel, y, y, block_size)
    xy = _Sums(kernel, x, y, block_size)
    at_x, at_y = xx.of_others - xy.rows / m, yy.of_others - xy.columns / n
    first_order = 4 * (at_x.var() / n + at_y.var() / m)
    second_order = (
        2 * xx.centred_within / (n * (n - 1))
        + 2 * yy.centred_within / (m * (m - 1))
        + 4 * xy.centred / (n * m)
    )
    variance = torch.maximum(first_order - second_order, second_order)
    return MMD2Estimate((at_x.mean() + at_y.mean()).item(), variance.sqrt().item())


@dataclass(frozen=True)
class TwoSampleTest:
    """Result of `two_sample_test`.

    Args:
        statistic: The unbiased estimate of MMD^2.
        p_value: Small when the samples differ; in [1 / (1 + num_permutations), 1].
        null_statistics: The statistic under each permutation, shape (num_permutations,), float64;
            float32 where the device has no other.
    """

    statistic: float
    p_value: float
    null_statistics: Tensor = field(repr=False, compare=False)


@torch.no_grad()
def two_sample_test(
    x: Tensor,
    y: Tensor,
    kernel: Kernel,
    *,
    num_permutations: int = 500,
    generator: Generator | None = None,
) -> TwoSampleTest:
    r"""Test whether two samples come from one distribution, by permutations of the pooled sample.

    The statistic is the unbiased MMD^2, computed for every permutation from one Gram matrix of the
    pooled sample; p = (1 + #{permuted >= observed}) / (1 + num_permutations). The level is exact at
    every sample size: under equality P(p <= a) <= a. The power depends on the kernel: it is lost
    when the bandwidth is far from the scale on which the distributions differ; a kernel must not be
    chosen on the samples it then tests (`median_bandwidth` of the pooled sample is allowed, for it
    does not see who is who). Cost O((n + m)^2 num_permutations), memory O((n + m)^2).

    Args:
        x: Target sample of shape (n, ...), n >= 2; trailing dimensions are flattened.
        y: Model sample of shape (m, ...), m >= 2, with the same trailing shape, dtype and device.
        kernel: The kernel; a characteristic one detects every difference in the limit.
        num_permutations: Number of permutations; the smallest p-value is 1 / (1 + that).
        generator: Source of the permutations, on any device; the global one when not given.

    Returns:
        The statistic, its p-value and the permuted statistics.

    Raises:
        ValueError: As `mmd2_unbiased`, if there are no permutations, or if a kernel value is not
            finite: NaN compares as false, which would read as a significant difference.

    Source:
        Gretton et al. 2012, A kernel two-sample test, section 8. Phipson and Smyth 2010,
        Permutation p-values should never be zero.

    Examples:
        >>> import torch
        >>> from lightning_mmd.kernels import Gaussian
        >>> generator = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(100, 2, 2, generator=generator)[..., 0], torch.ones(50, 2)
        >>> two_sample_test(x, y, Gaussian(), num_permutations=99, generator=generator).p_value
        0.01
    """
    x, y = _paired("two_sample_test", x, y, min_samples=2)
    if num_permutations < 1:
        raise ValueError(f"two_sample_test needs num_permutations >= 1, got {num_permutations}.")
    n, m = len(x), len(y)
    pooled = torch.cat([x, y])
    gram = widen(kernel(pooled, pooled)).fill_diagonal_(0.0)
    _require_finite("two_sample_test", gram)
    device = gram.device if generator is None else generator.device
    order = torch.rand(num_permutations, n + m, device=device, generator=generator).argsort(1)
    order = torch.cat([torch.arange(n + m, device=device)[None], order])  # the observed one first
    is_x = (order < n).to(gram)

    within_x = ((is_x @ gram) * is_x).sum(1)
    from_x = is_x @ gram.sum(1)
    across = from_x - within_x
    within_y = gram.sum() - from_x - across
    statistics = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m)

    observed, permuted = statistics[0], statistics[1:]
    # A permutation that keeps the groups is a tie.
    rounding = (1e-12 if gram.dtype == torch.float64 else 1e-6) * gram.abs().mean()
    exceeding = int((permuted >= observed - rounding).sum())
    return TwoSampleTest(observed.item(), (1 + exceeding) / (1 + num_permutations), permuted)


@dataclass(frozen=True)
class RelativeSimilarityTest:
    """Result of `relative_similarity_test`.

    Args:
        difference: Unbiased estimate of MMD^2(x, y) - MMD^2(x, z).
        std_error: Its estimated standard deviation.
        p_value: Of the hypothesis MMD(x, y) <= MMD(x, z); small when z is closer to x than y is.
    """

    difference: float
    std_error: float
    p_value: float


@torch.no_grad()
def relative_similarity_test(
    x: Tensor, y: Tensor, z: Tensor, kernel: Kernel
) -> RelativeSimilarityTest:
    r"""Test whether the sample y is at most as far from the reference x as the sample z is.

    The statistic D = MMD^2_u(x, y) - MMD^2_u(x, z) is asymptotically normal, and the k(x, x') terms
    cancel. With mu_x(t) = E k(x, t) and so on, and n, m, l points, its Hoeffding decomposition is

    Var D = 4 Var[mu_y(x) - mu_z(x)] / n + 4 Var[mu_y(y) - mu_x(y)] / m
          + 4 Var[mu_z(z) - mu_x(z)] / l + S,
    S = 2 V_yy / (m (m - 1)) + 2 V_zz / (l (l - 1)) + 4 V_xy / (n m) + 4 V_xz / (n l),

    V being the variance of the doubly centred kernel. Sample averages in place of the means mu add
    2 S to the first three terms, to leading order; hence Var D is estimated by the variances of
    these averages minus S, and by no less than S. The p-value is Phi(-D / std_error): its level is
    right when the two distances are equal and positive, conservative when y is truly closer. It is
    not meant for y and z that both have x's distribution, where D is not normal. Where D and its
    standard error are both zero, as for y and z that are one and the same point (a generator that
    has collapsed), there is no evidence either way, and the p-value is 1/2. The power grows
    with D / std_error, so with the root of the sample size, and depends on the kernel as in
    `two_sample_test`; the three samples must be independent. Cost and memory O((n + m + l)^2).

    Args:
        x: Reference sample of shape (n, ...), at least 2; trailing dimensions are flattened.
        y: First candidate of shape (m, ...), at least 2, of the same trailing shape and dtype.
        z: Second candidate of shape (l, ...), at least 2, of the same trailing shape and dtype.
        kernel: The kernel k.

    Returns:
        The difference, its standard error and the p-value.

    Raises:
        ValueError: As `mmd2_unbiased`, or if a kernel value is not finite.

    Source:
        Bounliphone et al. 2016, A test of relative similarity for model selection in generative
        models, section 3.

    Examples:
        >>> import torch
        >>> from lightning_mmd.kernels import Gaussian
        >>> x, y, z = torch.randn(3, 200, 2, generator=torch.Generator().manual_seed(0))
        >>> relative_similarity_test(x, y + 1.0, z, Gaussian()).p_value < 0.01
        True
    """
    reference, y = _paired("relative_similarity_test", x, y, min_samples=2)
    x, z = _paired("relative_similarity_test", x, z, min_samples=2)
    xy, xz = widen(kernel(reference, y)), widen(kernel(x, z))
    yy, zz = widen(kernel(y, y)), widen(kernel(z, z))
    for gram in (xy, xz, yy, zz):
        _require_finite("relative_similarity_test", gram)
    n, m, l = len(x), len(y), len(z)  # noqa: E741

    # Witness values at each point, from the other points only.
    at_x = xy.mean(1) - xz.mean(1)
    at_y = _mean_of_others(yy) - xy.mean(0)
    at_z = _mean_of_others(zz) - xz.mean(0)
    difference = (at_y.mean() - at_z.mean() - at_x.mean()).item()

    first_order = 4 * (at_x.var() / n + at_y.var() / m + at_z.var() / l)
    second_order = (
        2 * _centred_variance(yy, within=True) / (m * (m - 1))
        + 2 * _centred_variance(zz, within=True) / (l * (l - 1))
        + 4 * _centred_variance(xy) / (n * m)
        + 4 * _centred_variance(xz) / (n * l)
    )
    std_error = torch.maximum(first_order - second_order, second_order).sqrt().item()
    rounding = (
        50 * torch.finfo(xy.dtype).eps * max(float(gram.abs().max()) for gram in (xy, xz, yy, zz))
    )
    if abs(difference) <= rounding and std_error <= rounding:
        return RelativeSimilarityTest(difference, std_error, 0.5)
    score = difference / std_error if std_error > 0 else math.copysign(math.inf, difference)
    p_value = 0.5 * math.erfc(score / math.sqrt(2.0))
    return RelativeSimilarityTest(difference, std_error, p_value)


def _paired(name: str, x: Tensor, y: Tensor, min_samples: int) -> tuple[Tensor, Tensor]:
    """Check two samples and return them as (n, d), (m, d) in at least float32."""
    require_tensors(name, x=x, y=y)
    if x.ndim < 2 or y.ndim < 2 or x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"{name} expects samples of shapes (n, ...) and (m, ...) with the same trailing "
            f"dimensions, at least one, got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    if x.dtype != y.dtype or not x.is_floating_point():
        raise ValueError(
            f"{name} expects samples of one floating dtype, got {x.dtype} and {y.dtype}. "
            f"Convert them: x.float()."
        )
    if x.device != y.device:
        raise ValueError(
            f"{name} expects samples on one device, got {x.device} and {y.device}. "
            f"Move one: y.to(x.device)."
        )
    if min(len(x), len(y)) < min_samples:
        raise ValueError(
            f"{name} needs at least {min_samples} samples on each side, got n = {len(x)} and "
            f"m = {len(y)}. Use a larger batch"
            + (", or the biased estimate." if min_samples > 1 else ".")
        )
    dtype = gram_dtype(x)
    return x.flatten(1).to(dtype), y.flatten(1).to(dtype)


def _require_finite(name: str, gram: Tensor) -> None:
    if not gram.isfinite().all():
        raise ValueError(
            f"{name} needs finite kernel values, got NaN or infinity: the samples hold some, or "
            "their powers leave the dtype's range. Remove such samples, "
            "x[x.flatten(1).isfinite().all(1)], or scale them."
        )


def _estimate(x: Tensor, y: Tensor, kernel: Kernel, block_size: int, unbiased: bool) -> Tensor:
    """Average the three kernel terms, with the diagonals of k(x, x), k(y, y) or without."""
    if block_size < 1:
        raise ValueError(f"MMD^2 needs block_size >= 1, got {block_size}.")
    x_blocks, y_blocks = x.split(block_size), y.split(block_size)
    within = _off_diagonal_sum if unbiased else _sum

    def mean_within(blocks: Sequence[Tensor], n: int) -> Tensor:
        total = _reduce_blocks(within, kernel, [(block, block) for block in blocks])
        if len(blocks) > 1:
            total = total + 2 * _reduce_blocks(_sum, kernel, list(combinations(blocks, 2)))
        return total / (n * (n - 1) if unbiased else n**2)

    across = _reduce_blocks(_sum, kernel, list(product(x_blocks, y_blocks))) / (len(x) * len(y))
    mmd2 = mean_within(x_blocks, len(x)) + mean_within(y_blocks, len(y)) - 2 * across
    return to_like(mmd2, x)


def _reduce_blocks(
    reduce: Callable[[Tensor], Tensor], kernel: Kernel, pairs: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """Add reduce(kernel(a, b)) over pairs of blocks, never holding more than one Gram matrix."""

    def term(a: Tensor, b: Tensor) -> Tensor:
        return reduce(kernel(a, b))

    if len(pairs) == 1:  # no memory to save; also keeps torch.func transforms working
        return term(*pairs[0])
    return torch.stack(
        [checkpoint(term, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    ).sum()


def _sum(gram: Tensor) -> Tensor:
    return wide_sum(gram)


def _off_diagonal_sum(gram: Tensor) -> Tensor:
    return _sum(gram) - _sum(gram.diagonal())


def _mean_of_others(gram: Tensor) -> Tensor:
    """Return the mean of k(x_i, x_j) over j != i, shape (n,)."""
    return (gram.sum(1) - gram.diagonal()) / (len(gram) - 1)


def _centred_variance(gram: Tensor, within: bool = False) -> Tensor:
    """Return the mean square of the doubly centred Gram matrix, off the diagonal if within."""
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    squares = centred.square()
    return _mean_of_others(squares).mean() if within else squares.mean()


class _Sums:
    """Sums of a Gram matrix (n, m) and of its squares, of some rows at a time.

    Its variances are differences, right to the rounding of the squares. `relative_similarity_test`
    must know a variance of zero, and so has whole matrices and `_centred_variance`.

    Attributes:
        rows: Sums of the rows, (n,).
        columns: Sums of the columns, (m,).
    """

    def __init__(self, kernel: Kernel, x: Tensor, y: Tensor, block_size: int) -> None:
        rows, columns, squares, diagonals, start = [], [], [], [], 0
        for block in x.split(block_size):
            gram = widen(kernel(block, y))
            rows.append(gram.sum(1))
            columns.append(gram.sum(0))
            squares.append(gram.square().sum())
            diagonals.append(gram.diagonal(start))  # of no meaning between two samples
            start += len(block)
        self.rows, self._diagonal = torch.cat(rows), torch.cat(diagonals)
        self.columns, self._squares = torch.stack(columns).sum(0), torch.stack(squares).sum()
        self._size = len(x) * len(y)
        self._row_means, self._column_means = self.rows / len(y), self.columns / len(x)
        self._mean = self.rows.sum() / self._size

    @property
    def of_others(self) -> Tensor:
        """Mean of k(x_i, x_j) over j != i, (n,)."""
        return (self.rows - self._diagonal) / (len(self.rows) - 1)

    @property
    def centred(self) -> Tensor:
        """Mean square of the doubly centred matrix."""
        means = self._row_means.square().mean() + self._column_means.square().mean()
        return (self._squares / self._size - means + self._mean.square()).clamp_min(0)

    @property
    def centred_within(self) -> Tensor:
        """Mean square of the doubly centred matrix off its diagonal."""
        on_diagonal = (self._diagonal - self._row_means - self._column_means + self._mean).square()
        n = len(self.rows)
        return (self.centred * n**2 - on_diagonal.sum()).clamp_min(0) / (n * (n - 1))
