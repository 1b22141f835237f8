"""The witness function of two weighted samples under any kernel, in closed form."""

import torch
from torch import Tensor

from lightning_mmd.kernels import Kernel
from lightning_mmd.points import gram_dtype, require_tensors

__all__ = ["KernelWitness"]


class KernelWitness:
    r"""The witness function of two weighted samples under any kernel, in closed form.

    .. math:: f(t) = \sum_i a_i\, k(x_i, t) - \sum_j b_j\, k(y_j, t)

    With the default weights 1/n and 1/m it is :math:`\mu_p - \mu_q` of the empirical
    distributions, positive where the target has more mass than the model. Samples that climb its
    gradient descend :math:`\frac12 MMD^2`. Cost O((n + m) k), memory O(block_size k).

    Args:
        x: Target sample of shape (n, d).
        y: Model sample of shape (m, d), of the same floating dtype.
        kernel: The kernel k.
        x_weights: a, of shape (n,); of any sign. Default 1/n each.
        y_weights: b, of shape (m,); of any sign. Default 1/m each.
        block_size: Number of sample points whose kernel values are held at a time.

    Raises:
        TypeError: If a sample or its weights are no tensor.
        ValueError: If a sample or its weights are empty or of another shape.

    Source:
        Gretton et al. 2012, A kernel two-sample test, section 2.3.

    Examples:
        >>> from lightning_mmd.kernels import Linear
        >>> witness = KernelWitness(torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0]]), Linear())
        >>> witness(torch.tensor([[10.0]])), witness.gradient(torch.tensor([[10.0]]))
        (tensor([-30.]), tensor([[-3.]]))
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        kernel: Kernel,
        *,
        x_weights: Tensor | None = None,
        y_weights: Tensor | None = None,
        block_size: int = 2048,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"KernelWitness needs block_size >= 1, got {block_size}.")
        self._kernel = kernel
        self._blocks = [
            block
            for sign, name, points, weights in ((1, "x", x, x_weights), (-1, "y", y, y_weights))
            for block in _weighted_blocks(sign, name, points, weights, block_size)
        ]

    def __call__(self, points: Tensor) -> Tensor:
        """Return f at points of shape (k, d), as (k,), differentiable in the points."""
        require_tensors("KernelWitness", points=points)
        terms = (self._kernel(points, centres) @ weights for centres, weights in self._blocks)
        return sum(terms, points.new_zeros(len(points), dtype=gram_dtype(points)))

    def gradient(self, points: Tensor) -> Tensor:
        """Return the gradients of f at points of shape (k, d), as (k, d), without a graph."""
        require_tensors("KernelWitness", points=points)
        points = points.detach().requires_grad_()
        gradient = torch.zeros_like(points, requires_grad=False)
        for centres, weights in self._blocks:
            with torch.enable_grad():
                total = (self._kernel(points, centres) @ weights).sum()
            gradient += torch.autograd.grad(total, points)[0]
        return gradient


def _weighted_blocks(
    sign: int, name: str, points: Tensor, weights: Tensor | None, block_size: int
) -> list[tuple[Tensor, Tensor]]:
    given = {} if weights is None else {f"{name}_weights": weights}
    require_tensors("KernelWitness", **{name: points}, **given)
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(
            f"KernelWitness expects {name} of shape (n, d) with n >= 1, got "
            f"{tuple(points.shape)}. Flatten images first: {name}.flatten(1)."
        )
    if weights is None:
        weights = points.new_full((len(points),), 1.0 / len(points), dtype=gram_dtype(points))
    if weights.shape != (len(points),):
        raise ValueError(
            f"KernelWitness expects one weight for each of the {len(points)} points {name}, got "
            f"shape {tuple(weights.shape)}."
        )
    weights = weights.to(gram_dtype(points))
    return list(zip(points.split(block_size), (sign * weights).split(block_size), strict=True))
