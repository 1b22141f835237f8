r"""Kernels k(x, y): small immutable objects that map two samples to their Gram matrix.

All but `Polynomial`, `Linear` and sums with them are built on Euclidean distances, which
`lightning_mmd.points` forms in float64. Values have the precision of the points, float32 for points
in half precision, under `torch.autocast` too.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Generator, Tensor

from lightning_mmd.points import (
    gram_dtype,
    inner_products,
    power,
    require_tensors,
    squared_distances,
    wide_squared_distances,
)
from lightning_mmd.wide import widen_on_device

__all__ = [
    "Energy",
    "Gaussian",
    "InverseMultiquadric",
    "Kernel",
    "Laplace",
    "Linear",
    "Polynomial",
    "RationalQuadratic",
    "StationaryKernel",
    "SumKernel",
    "median_bandwidth",
]


class Kernel(ABC):
    """A symmetric positive semi-definite function k(x, y) of two points.

    Subclasses are frozen dataclasses: they compare, hash, print and pickle by their parameters, and
    a YAML file builds them from `class_path` and `init_args`. Values of stationary kernels are
    finite at all points of float16 to float32, and at those of float64 up to 1e150; values of the
    others where their powers are in the dtype's range. So are first and second derivatives, where
    the fourth power of 1 / bandwidth is in the range too; at coincident points, where `Laplace` and
    `Energy` are not differentiable, they have derivative 0.
    """

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the Gram matrix of two samples.

        Args:
            x: Points of shape (n, d).
            y: Points of shape (m, d), of the same floating dtype.

        Returns:
            k(x_i, y_j) of shape (n, m), in the dtype of the points; float32 for half precision.

        Raises:
            TypeError: If a sample is no tensor.
            ValueError: If a sample is not of shape (n, d), or the two differ in d or in dtype.
        """

    @abstractmethod
    def diagonal(self, x: Tensor) -> Tensor:
        """Return k(x_i, x_i) of shape (n,) for points of shape (n, d), at linear cost."""

    def scaled(self, factor: float) -> "Kernel":
        """Return the kernel with its bandwidth, or those of its summands, times a factor.

        Args:
            factor: > 0.

        Raises:
            TypeError: If the kernel is no dataclass with a field ``bandwidth``, and does not say
                itself how it scales.
        """
        bandwidth = vars(self).get("bandwidth")
        if not dataclasses.is_dataclass(self) or bandwidth is None:
            raise TypeError(
                f"{self!r} has no bandwidth to scale. Use a Gaussian, Laplace, RationalQuadratic "
                "or InverseMultiquadric, a sum with one of them, or give it a method "
                "scaled(factor)."
            )
        return dataclasses.replace(self, bandwidth=bandwidth * factor)

    def fourth_moment(self) -> float:
        r"""Return :math:`E\langle\omega, e\rangle^4` of the spectral measure, e a unit vector.

        It is the fourth derivative of the kernel's profile at 0, and bounds the second derivatives
        of functions in the RKHS, see `lightning_mmd.noise.hessian_constant`.

        Raises:
            TypeError: If the kernel is not smooth at distance 0, or has no bound.
        """
        raise TypeError(
            "the Hessian's bound is known for Gaussian, RationalQuadratic, InverseMultiquadric and "
            f"SumKernel of these, got {self!r}. Use one of them, or a schedule that is fixed "
            "beforehand, such as HalvingNoise."
        )

    def of_squared_distances(self, squared_distances: Tensor) -> Tensor:
        """Return the values of a kernel of the distance alone.

        Args:
            squared_distances: ||x - y||^2, of any shape, >= 0.

        Returns:
            k(x, y), elementwise.

        Raises:
            TypeError: If the kernel depends on more than the distance.
        """
        raise TypeError(
            "bounds on distances need a kernel of the distance alone (Gaussian, Laplace, "
            "RationalQuadratic, InverseMultiquadric, or a SumKernel of these), got "
            f"{self!r}. Use one of them, or an objective without bounds."
        )

    def sample_frequencies(self, num: int, dim: int, generator: Generator) -> Tensor:
        r"""Draw frequencies from the spectral measure of a stationary kernel.

        By Bochner's theorem k(x, y) = k(0) E_w cos<w, x - y> for a probability measure of w.

        Args:
            num: Number of frequencies.
            dim: Dimension d of the points.
            generator: Source of randomness; its device is where the frequencies are drawn.

        Returns:
            Frequencies of shape (num, dim), float64.

        Raises:
            TypeError: If the kernel is not stationary.
        """
        raise TypeError(
            f"Frequencies need a stationary kernel (Gaussian, Laplace, RationalQuadratic, "
            f"InverseMultiquadric, or a SumKernel of these), got {self!r}, which has no spectral "
            f"measure. Use the kernel itself, for example in mmd2_unbiased."
        )


class StationaryKernel(Kernel):
    """A kernel of the distance alone, with k(x, x) = 1."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the Gram matrix of shape (n, m)."""
        return self._profile(squared_distances(x, y))

    def of_squared_distances(self, squared_distances: Tensor) -> Tensor:
        """Return the kernel's values at given squared distances, elementwise."""
        return self._profile(squared_distances)

    def diagonal(self, x: Tensor) -> Tensor:
        """Return ones, k(0), of shape (n,)."""
        return x.new_ones(len(x), dtype=gram_dtype(x))

    @abstractmethod
    def _profile(self, squared_distances: Tensor) -> Tensor:
        """Return the kernel's values at given squared distances, elementwise."""

    @abstractmethod
    def sample_frequencies(self, num: int, dim: int, generator: Generator) -> Tensor:
        """Draw from the spectral measure, as `Kernel.sample_frequencies` says."""


@dataclass(frozen=True)
class Gaussian(StationaryKernel):
    r"""Gaussian kernel exp(-||x - y||^2 / (2 bandwidth^2)); its frequencies are Gaussian.

    Smooth and characteristic; blind beyond a few bandwidths. `median_bandwidth` is a first guess.

    Args:
        bandwidth: Length scale, positive, in the units of the data.

    Raises:
        ValueError: If the bandwidth is not positive and finite.

    Source:
        Rahimi and Recht 2007, Random features for large-scale kernel machines, figure 1.

    Examples:
        >>> import torch
        >>> Gaussian(bandwidth=1.0)(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0]]))
        tensor([[1.0000],
                [0.6065]])
    """

    bandwidth: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, bandwidth=self.bandwidth)

    def _profile(self, squared_distances: Tensor) -> Tensor:
        return (_scaled(squared_distances, self.bandwidth) / -2.0).exp()

    def fourth_moment(self) -> float:
        """Return 3 / bandwidth^4, that of a normal distribution."""
        return 3.0 / self.bandwidth**4

    def sample_frequencies(self, num: int, dim: int, generator: Generator) -> Tensor:
        """Draw normal frequencies of standard deviation 1 / bandwidth."""
        return _normal(num, dim, generator) / self.bandwidth


@dataclass(frozen=True)
class Laplace(StationaryKernel):
    r"""Laplace kernel exp(-||x - y|| / bandwidth), Euclidean norm; its frequencies are Cauchy.

    Characteristic, rough at zero distance and longer in range than the Gaussian of equal bandwidth.

    Args:
        bandwidth: Length scale, positive, in the units of the data.

    Raises:
        ValueError: If the bandwidth is not positive and finite.

    Source:
        Rasmussen and Williams 2006, Gaussian processes for machine learning, section 4.2.1 (Matern
        class with nu = 1/2: the spectral density is a multivariate Student t with 2 nu = 1 degrees
        of freedom).

    Examples:
        >>> import torch
        >>> Laplace(bandwidth=2.0)(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[0.0821]])
    """

    bandwidth: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, bandwidth=self.bandwidth)

    def _profile(self, squared_distances: Tensor) -> Tensor:
        return (-power(_scaled(squared_distances, self.bandwidth), 0.5)).exp()

    def sample_frequencies(self, num: int, dim: int, generator: Generator) -> Tensor:
        """Draw multivariate Cauchy frequencies of scale 1 / bandwidth."""
        scale = _normal(num, 1, generator).abs()
        return _normal(num, dim, generator) / (scale * self.bandwidth)


@dataclass(frozen=True)
class RationalQuadratic(StationaryKernel):
    r"""Rational quadratic kernel (1 + ||x - y||^2 / (2 alpha bandwidth^2))^-alpha.

    A mixture of Gaussian kernels whose inverse squared bandwidths follow a gamma distribution of
    shape alpha: it sees many scales at once. It tends to the Gaussian kernel as alpha grows.

    Args:
        alpha: Exponent, positive; the smaller, the heavier the tail.
        bandwidth: Length scale, positive, in the units of the data.

    Raises:
        ValueError: If alpha or the bandwidth is not positive and finite.

    Source:
        Rasmussen and Williams 2006, Gaussian processes for machine learning, equation 4.19.
        Binkowski et al. 2018, Demystifying MMD GANs, section 4 (sums over alpha).

    Examples:
        >>> import torch
        >>> RationalQuadratic(alpha=0.5)(torch.tensor([[0.0]]), torch.tensor([[1.0], [2.0]]))
        tensor([[0.7071, 0.4472]])
    """

    alpha: float = 1.0
    bandwidth: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, alpha=self.alpha, bandwidth=self.bandwidth)

    def _profile(self, squared_distances: Tensor) -> Tensor:
        scaled = _scaled(squared_distances, self.bandwidth) / (2.0 * self.alpha)
        return (scaled.log1p() * -self.alpha).exp()

    def fourth_moment(self) -> float:
        """Return 3 (1 + 1 / alpha) / bandwidth^4, that of a gamma mixture of Gaussians."""
        return 3.0 * (1.0 + 1.0 / self.alpha) / self.bandwidth**4

    def sample_frequencies(self, num: int, dim: int, generator: Generator) -> Tensor:
        """Draw normal frequencies of gamma-distributed variance."""
        normal = _normal(num, dim, generator)
        seed = torch.randint(2**62, (), generator=generator, device=generator.device).item()
        gamma = Random(seed).gammavariate  # torch's public gamma distribution takes no generator
        precision = [[gamma(self.alpha, 1.0 / self.alpha)] for _ in range(num)]
        return normal * normal.new_tensor(precision).reshape(num, 1).sqrt() / self.bandwidth


@dataclass(frozen=True)
class InverseMultiquadric(StationaryKernel):
    r"""Inverse multiquadric kernel (1 + ||x - y||^2 / bandwidth^2)^(-1/2).

    The rational quadratic kernel of exponent 1/2 in its usual scaling: slow, polynomial tails.

    Args:
        bandwidth: Length scale, positive, in the units of the data.

    Raises:
        ValueError: If the bandwidth is not positive and finite.

    Source:
        Gorham and Mackey 2017, Measuring sample quality with kernels, section 4.

    Examples:
        >>> import torch
        >>> InverseMultiquadric(bandwidth=1.0)(torch.tensor([[0.0]]), torch.tensor([[1.0]]))
        tensor([[0.7071]])
    """

    bandwidth: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, bandwidth=self.bandwidth)

    def _profile(self, squared_distances: Tensor) -> Tensor:
        return (_scaled(squared_distances, self.bandwidth) + 1.0).rsqrt()

    def fourth_moment(self) -> float:
        """Return 9 / bandwidth^4, that of the rational quadratic with alpha = 1/2."""
        return 9.0 / self.bandwidth**4

    def sample_frequencies(self, num: int, dim: int, generator: Generator) -> Tensor:
        """Draw normal frequencies of half-normal standard deviation."""
        scale = _normal(num, 1, generator).abs()
        return _normal(num, dim, generator) * (scale / self.bandwidth)


@dataclass(frozen=True)
class Energy(Kernel):
    r"""Distance-induced kernel (||x||^e + ||y||^e - ||x - y||^e) / 2.

    MMD^2 under it is half the generalised energy distance 2 E||x - y||^e - E||x - x'||^e
    - E||y - y'||^e, which has no length scale to tune. The origin does not matter to MMD, nor to
    witnesses of equal total masses, sum a = sum b; where the masses differ it does, by
    (sum a - sum b) ||t||^e / 2 in the witness: move it into the data then.

    Args:
        exponent: Exponent e, strictly between 0 and 2; 1 is the energy distance.

    Raises:
        ValueError: If the exponent is not strictly between 0 and 2.

    Source:
        Sejdinovic et al. 2013, Equivalence of distance-based and RKHS-based statistics, lemma 12
        and theorem 22.

    Examples:
        >>> import torch
        >>> Energy()(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0], [3.0, 4.0]]))
        tensor([[2., 5.]])
    """

    exponent: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.exponent < 2.0:
            raise ValueError(
                f"Energy needs an exponent strictly between 0 and 2, got {self.exponent}. "
                f"Use 1 for the energy distance."
            )

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the Gram matrix of shape (n, m)."""
        distances = power(wide_squared_distances(x, y), self.exponent / 2)
        values = (self._wide_diagonal(x)[:, None] + self._wide_diagonal(y) - distances) / 2
        return values.to(gram_dtype(x))

    def diagonal(self, x: Tensor) -> Tensor:
        """Return ||x_i||^e of shape (n,)."""
        return self._wide_diagonal(x).to(gram_dtype(x))

    def _wide_diagonal(self, x: Tensor) -> Tensor:
        return power(widen_on_device(x).square().sum(1), self.exponent / 2)


@dataclass(frozen=True)
class Polynomial(Kernel):
    r"""Polynomial kernel (scale <x, y> + offset)^degree; its defaults are those of KID.

    Sees moments up to the degree only, so it is not characteristic.

    Args:
        degree: Positive integer.
        scale: Factor of the inner product, positive; 1 / d when not given.
        offset: Non-negative constant.

    Raises:
        ValueError: If the degree is not a positive integer, the scale not positive or the offset
            negative.

    Source:
        Binkowski et al. 2018, Demystifying MMD GANs, section 4 (kernel inception distance).

    Examples:
        >>> import torch
        >>> Polynomial()(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
        tensor([[27.]])
    """

    degree: int = 3
    scale: float | None = None
    offset: float = 1.0

    def __post_init__(self) -> None:
        if self.degree != int(self.degree) or self.degree < 1:
            raise ValueError(f"Polynomial needs an integer degree >= 1, got {self.degree}.")
        if self.scale is not None:
            _require_positive(self, scale=self.scale)
        if not 0.0 <= self.offset < math.inf:
            raise ValueError(
                f"Polynomial needs a finite offset >= 0, got {self.offset}: "
                f"a negative one is not positive definite."
            )

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the Gram matrix of shape (n, m)."""
        return self._profile(inner_products(x, y), x.shape[1])

    def diagonal(self, x: Tensor) -> Tensor:
        """Return (scale ||x_i||^2 + offset)^degree of shape (n,)."""
        return self._profile(x.to(gram_dtype(x)).square().sum(1), x.shape[1])

    def _profile(self, inner_products: Tensor, dim: int) -> Tensor:
        scale = 1.0 / dim if self.scale is None else self.scale
        return (inner_products * scale + self.offset) ** self.degree


@dataclass(frozen=True)
class Linear(Kernel):
    r"""Linear kernel <x, y>: MMD^2 is the squared distance of the means.

    For samples that are feature maps already; `mmd2_features` is the linear-time way to it.

    Examples:
        >>> import torch
        >>> Linear()(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.]])
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the Gram matrix of shape (n, m)."""
        return inner_products(x, y)

    def diagonal(self, x: Tensor) -> Tensor:
        """Return ||x_i||^2 of shape (n,)."""
        return x.to(gram_dtype(x)).square().sum(1)


@dataclass(frozen=True)
class SumKernel(Kernel):
    r"""Weighted sum of kernels, sum_i weights_i k_i(x, y), for example over several bandwidths.

    Stationary components share one computation of the distances.

    Args:
        kernels: One or more kernels.
        weights: As many non-negative weights, not all zero; ones when not given.

    Raises:
        ValueError: If there is no kernel, or weights are negative, all zero or of another number.

    Source:
        Gretton et al. 2012, Optimal kernel choice for large-scale two-sample tests, section 2.

    Examples:
        >>> import torch
        >>> kernel = SumKernel([Gaussian(bandwidth=b) for b in (0.5, 1.0, 2.0)])
        >>> kernel(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor([[3.]])
    """

    kernels: Sequence[Kernel]
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        kernels = tuple(self.kernels)
        weights = (1.0,) * len(kernels) if self.weights is None else tuple(self.weights)
        if not kernels:
            raise ValueError("SumKernel needs at least one kernel, got none.")
        if len(weights) != len(kernels):
            raise ValueError(
                f"SumKernel needs one weight a kernel, got {len(weights)} weights "
                f"for {len(kernels)} kernels."
            )
        if not (all(0.0 <= weight < math.inf for weight in weights) and any(weights)):
            raise ValueError(
                f"SumKernel needs finite weights >= 0 that are not all zero, got {weights}."
            )
        object.__setattr__(self, "kernels", kernels)
        object.__setattr__(self, "weights", weights)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the Gram matrix of shape (n, m)."""
        gram = x.new_zeros(())
        distances2 = None
        for weight, kernel in self._components():
            if isinstance(kernel, StationaryKernel):
                distances2 = squared_distances(x, y) if distances2 is None else distances2
                gram = gram + weight * kernel._profile(distances2)
            else:
                gram = gram + weight * kernel(x, y)
        return gram

    def scaled(self, factor: float) -> Kernel:
        """Return the sum with every summand that has a bandwidth scaled; one at least must."""
        parts, failed = [], None
        for kernel in self.kernels:
            try:
                parts.append(kernel.scaled(factor))
            except TypeError as error:
                parts.append(kernel)
                failed = error
        if failed is not None and all(a is b for a, b in zip(parts, self.kernels, strict=True)):
            raise failed
        return SumKernel(parts, self.weights)

    def fourth_moment(self) -> float:
        """Return sum_k weights_k times that of each."""
        return sum(w * kernel.fourth_moment() for w, kernel in self._components())

    def of_squared_distances(self, squared_distances: Tensor) -> Tensor:
        """Return sum_k weights_k k of the distance, elementwise."""
        components = self._components()
        return sum(
            (w * kernel.of_squared_distances(squared_distances) for w, kernel in components),
            squared_distances.new_zeros(()),
        )

    def diagonal(self, x: Tensor) -> Tensor:
        """Return sum_k weights_k k(x_i, x_i) of shape (n,)."""
        diagonals = [weight * kernel.diagonal(x) for weight, kernel in self._components()]
        return torch.stack(diagonals).sum(0)

    def sample_frequencies(self, num: int, dim: int, generator: Generator) -> Tensor:
        """Draw from the mixture of the components' spectral measures, stratified.

        Component i has probability proportional to weights_i k_i(0) and gets num times that many
        frequencies, rounded down; only the few that rounding leaves over are allotted at random, so
        that each component's expected share is exact.
        """
        origin = torch.zeros(1, dim, dtype=torch.float64, device=generator.device)
        components = self._components()
        mass = torch.cat([weight * kernel.diagonal(origin) for weight, kernel in components])
        if not mass.any():
            return super().sample_frequencies(num, dim, generator)  # raises: none is stationary
        shares = num * mass / mass.sum()
        counts = shares.floor().long()
        rest = num - int(counts.sum())
        if rest > 0:
            chosen = torch.multinomial(shares.frac(), rest, replacement=True, generator=generator)
            counts += torch.bincount(chosen, minlength=len(counts))
        drawn = [
            kernel.sample_frequencies(int(count), dim, generator)
            for count, (_, kernel) in zip(counts, components, strict=True)
        ]
        return torch.cat(drawn)

    def _components(self) -> list[tuple[float, Kernel]]:
        weights = self.weights or ()
        return [(w, kernel) for w, kernel in zip(weights, self.kernels, strict=True) if w > 0.0]


def median_bandwidth(x: Tensor, y: Tensor | None = None, max_samples: int = 1000) -> float:
    r"""Return the median distance within the pooled sample: the median heuristic.

    The median is over all pairs i < j of the pooled points that do not coincide (the lower of the
    two middle distances when their number is even). It is the distance itself, meant for the
    bandwidth of `Gaussian`, exp(-||x - y||^2 / (2 bandwidth^2)). Larger pools are thinned to
    `max_samples` points, evenly spaced in their order, so the result is deterministic.

    Args:
        x: Sample of shape (n, ...), floating; trailing dimensions are flattened.
        y: Second sample of shape (m, ...), pooled with x when given.
        max_samples: Largest number of points used, at least 2; the cost grows with its square.

    Returns:
        A positive distance.

    Raises:
        TypeError: If a sample is no tensor.
        ValueError: If the shapes differ, `max_samples` is less than 2, a value is not finite, or
            there are fewer than two distinct points.

    Source:
        Gretton et al. 2012, A kernel two-sample test, section 8. Garreau et al. 2017, Large sample
        analysis of the median heuristic.

    Examples:
        >>> import torch
        >>> median_bandwidth(torch.tensor([[0.0], [1.0], [4.0]]))
        3.0
    """
    require_tensors("median_bandwidth", x=x, **({} if y is None else {"y": y}))
    if max_samples < 2:
        raise ValueError(f"median_bandwidth needs max_samples >= 2, got {max_samples}.")
    if y is not None and x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"median_bandwidth expects samples of the same shape but for their number, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}."
        )
    pooled = x.detach() if y is None else torch.cat([x.detach(), y.detach()])
    num = len(pooled)
    if num > max_samples:
        pooled = pooled[torch.arange(max_samples, device=pooled.device) * num // max_samples]
    if not pooled.isfinite().all():
        raise ValueError(
            "median_bandwidth needs finite points, got NaN or infinite values. Remove them: "
            "x[x.flatten(1).isfinite().all(1)]."
        )
    points = widen_on_device(pooled.flatten(1))
    distances = torch.pdist(points) if num > 1 else points.new_empty(0)
    distances = distances[distances > 0]
    if len(distances) == 0:
        raise ValueError(
            f"median_bandwidth needs at least two distinct points, got {num} that coincide. "
            f"Give a larger sample or set the bandwidth yourself."
        )
    return distances.median().item()


def _scaled(squared_distances: Tensor, bandwidth: float) -> Tensor:
    """Return squared distances over bandwidth^2, 0 at distance 0 whatever the bandwidth.

    Where the square leaves the dtype's range it is replaced by the end of the range: all distances
    but 0 are then far beyond a tiny bandwidth, and far within a huge one.
    """
    limits = torch.finfo(squared_distances.dtype)
    return squared_distances / min(max(bandwidth * bandwidth, limits.tiny), limits.max)


def _require_positive(kernel: Kernel, **parameters: float) -> None:
    for name, value in parameters.items():
        if not 0.0 < value < math.inf:
            raise ValueError(
                f"{type(kernel).__name__} needs a positive, finite {name}, got {value}."
            )


def _normal(num: int, dim: int, generator: Generator) -> Tensor:
    device = generator.device
    return torch.randn(num, dim, dtype=torch.float64, device=device, generator=generator)
