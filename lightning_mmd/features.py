r"""Random features: explicit feature maps whose inner product approximates a kernel."""

import math

import torch
from torch import Tensor, nn

from lightning_mmd.kernels import Kernel
from lightning_mmd.points import require_tensors

__all__ = ["RandomFourierFeatures", "SumFeatures"]


class RandomFourierFeatures(nn.Module):
    r"""Random Fourier features of a stationary kernel, as sine-cosine pairs.

    phi(x) = sqrt(2 k(0) / num_features) [cos(w_1 x), ..., sin(w_1 x), ...], with num_features / 2
    frequencies w drawn from the kernel's spectral measure. Then <phi(x), phi(y)> is an unbiased
    estimate of k(x, y) whose error falls like num_features^(-1/2), and ||phi(x)||^2 = k(0) exactly;
    pairs have a lower variance than cosines with random phases. A feature map makes MMD^2 and
    its witness function linear in the sample size, see `mmd2_features`.

    The frequencies are a buffer: they move and are saved with the module and are not trained.

    Args:
        kernel: A stationary kernel: Gaussian, Laplace, RationalQuadratic, InverseMultiquadric, or a
            SumKernel of these.
        in_features: Number of values d of one point, trailing dimensions multiplied out.
        num_features: Number of features r, even.
        seed: Seed of the frequencies; they do not depend on the global random state.

    Raises:
        TypeError: If the kernel is not stationary.
        ValueError: If `num_features` is not a positive even number.

    Source:
        Rahimi and Recht 2007, Random features for large-scale kernel machines, algorithm 1.
        Sutherland and Schneider 2015, On the error of random Fourier features, section 2.

    Examples:
        >>> import torch
        >>> from lightning_mmd.kernels import Gaussian
        >>> features = RandomFourierFeatures(Gaussian(), in_features=2, num_features=4096)
        >>> x, y = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
        >>> bool((features(x) @ features(y).T - Gaussian()(x, y)).abs() < 0.05)
        True
    """

    frequencies: Tensor

    def __init__(self, kernel: Kernel, in_features: int, num_features: int, seed: int = 0) -> None:
        super().__init__()
        if num_features < 2 or num_features % 2:
            raise ValueError(
                f"RandomFourierFeatures needs a positive even num_features (sine-cosine pairs), "
                f"got {num_features}."
            )
        if in_features < 1:
            raise ValueError(f"RandomFourierFeatures needs in_features >= 1, got {in_features}.")
        generator = torch.Generator().manual_seed(seed)
        frequencies = kernel.sample_frequencies(num_features // 2, in_features, generator)
        self.register_buffer("frequencies", frequencies.to(torch.get_default_dtype()))
        self.kernel = kernel
        self.in_features = in_features
        self.num_features = num_features
        at_zero = kernel.diagonal(torch.zeros(1, in_features, dtype=torch.float64)).item()
        self.amplitude = (2.0 * at_zero / num_features) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """Return the features.

        Args:
            x: Points of shape (n, ...) with in_features values each.

        Returns:
            Features of shape (n, num_features), in the wider dtype of points and frequencies; each
            row has squared norm k(0).

        Raises:
            TypeError: If the points are no tensor.
            ValueError: If the points do not have in_features values each.
        """
        require_tensors("RandomFourierFeatures", x=x)
        if x.ndim < 2 or x.shape[1:].numel() != self.in_features:
            raise ValueError(
                f"RandomFourierFeatures expects points of shape (n, {self.in_features}), trailing "
                f"dimensions flattened, got {tuple(x.shape)}."
            )
        dtype = torch.promote_types(x.dtype, self.frequencies.dtype)
        with torch.autocast(x.device.type, enabled=False):  # angles are large: keep their digits
            angles = x.flatten(1).to(dtype) @ self.frequencies.T.to(dtype)
        return self.amplitude * torch.cat([angles.cos(), angles.sin()], dim=1)

    def extra_repr(self) -> str:
        """Show the kernel and the sizes."""
        return f"{self.kernel}, in_features={self.in_features}, num_features={self.num_features}"


class SumFeatures(nn.Module):
    r"""Features of a sum of kernels: maps side by side.

    .. math:: \phi(x) = (\sqrt{w_1}\,\phi_1(x), \sqrt{w_2}\,\phi_2(x), \ldots), \qquad
        \langle\phi(x), \phi(y)\rangle = \sum_i w_i\,\langle\phi_i(x), \phi_i(y)\rangle

    A fixed characteristic kernel on the samples beside a learned one keeps the sum characteristic
    whatever the network has learned so far; MMD^2 is the weighted sum of theirs.

    Args:
        maps: Feature maps from samples (n, ...) to (n, r_i).
        weights: Weight of each kernel, > 0; default: 1 each.

    Raises:
        ValueError: If there is no map, or the weights are not one positive number for each.

    Examples:
        >>> import torch
        >>> from lightning_mmd.kernels import Gaussian
        >>> fixed = RandomFourierFeatures(Gaussian(), in_features=2, num_features=64)
        >>> SumFeatures([fixed, torch.nn.Linear(2, 16)], weights=[1.0, 0.1])(torch.ones(5, 2)).shape
        torch.Size([5, 80])
    """

    def __init__(self, maps: list[nn.Module], weights: list[float] | None = None) -> None:
        super().__init__()
        weights = [1.0] * len(maps) if weights is None else weights
        if not maps or len(weights) != len(maps) or not all(0 < w < math.inf for w in weights):
            raise ValueError(
                "SumFeatures needs at least one map and one positive weight for each, got "
                f"{len(maps)} maps and weights = {weights}."
            )
        self.maps = nn.ModuleList(maps)
        self.weights = tuple(weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map samples (n, ...) to features (n, r_1 + r_2 + ...)."""
        parts = [w**0.5 * phi(x) for w, phi in zip(self.weights, self.maps, strict=True)]
        return torch.cat(parts, dim=1)

    def extra_repr(self) -> str:
        """Show the weights."""
        return f"weights={self.weights}"
