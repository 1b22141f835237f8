"""The negative Sobolev distance, a gauge of whether the plain MMD flow can converge."""

import math

import torch
from torch import Tensor

from lightning_mmd.kernels import Kernel
from lightning_mmd.mmd import mmd2_biased
from lightning_mmd.wide import widen

__all__ = ["negative_sobolev_distance"]


def negative_sobolev_distance(
    x: Tensor, y: Tensor, kernel: Kernel, *, regulariser: float = 1e-3
) -> float:
    r"""Estimate the weighted negative Sobolev distance S(target | model) within the RKHS.

    .. math:: S_\epsilon = \sup\Big\{ |\langle g, \mu_x - \mu_y\rangle| :
        \frac1m\sum_j \|\nabla g(y_j)\|^2 + \epsilon\|g\|_H^2 \le 1 \Big\}

    A gauge of whether the plain flow can converge: while S^2 <= C along the flow (y the current
    particles), MMD^2 falls at least like 1 / t; where particles sit on critical points of the
    witness, S is infinite and its estimate grows like MMD / sqrt(epsilon), its largest value, as
    epsilon falls. Estimates at two values of epsilon tell the cases apart.

    With :math:`d_{ji} = \partial_i k(y_j, \cdot)`, their Gram matrix K of shape (m d, m d),
    :math:`\delta = \mu_x - \mu_y` and :math:`g_{ji} = \partial_i\delta(y_j)`, Woodbury's identity
    turns :math:`S_\epsilon^2 = \langle\delta, (\frac1m\sum d\otimes d + \epsilon)^{-1}\delta
    \rangle` into

    .. math:: S_\epsilon^2 = \frac1\epsilon \left( MMD^2 - g^T (K + m\epsilon I)^{-1} g \right).

    Cost m d backward passes of O(m^2 d) and a solve of O((m d)^3); memory O((m d)^2). The
    difference cancels when epsilon is small: an epsilon below 1e-12 of the kernel's scale is noise.

    Args:
        x: Target sample of shape (n, d).
        y: Model sample of shape (m, d), a few hundred points at most.
        kernel: A kernel with two derivatives at distance 0.
        regulariser: epsilon > 0. The estimate grows as it falls.

    Returns:
        S_epsilon, between 0 and MMD / sqrt(epsilon).

    Raises:
        ValueError: If the regulariser is not positive, or the samples are not of shapes (n, d) and
            (m, d).

    Source:
        Arbel et al. 2019, arXiv 1906.04370, section on the Lojasiewicz inequality; Mroueh et al.
        2019, Sobolev descent, for the regularised form in an RKHS.

    Example:
        >>> from lightning_mmd.kernels import Linear
        >>> x, y = torch.tensor([[3.0], [5.0]]), torch.tensor([[1.0], [2.0]])
        >>> round(negative_sobolev_distance(x, y, Linear(), regulariser=1e-9), 6)
        2.5
    """
    if not 0 < regulariser < math.inf:
        raise ValueError(
            f"negative_sobolev_distance needs a finite regulariser > 0, got {regulariser}."
        )
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(
            "negative_sobolev_distance expects samples of shapes (n, d) and (m, d), got "
            f"{tuple(x.shape)} and {tuple(y.shape)}. Flatten images first: x.flatten(1)."
        )
    x, y = widen(x.detach()), widen(y.detach())
    points, copies = y.clone().requires_grad_(), y.clone().requires_grad_()
    with torch.enable_grad():
        towards_x = torch.autograd.grad(kernel(points, x).sum(), points)[0] / len(x)
        (slopes,) = torch.autograd.grad(kernel(points, copies).sum(), points, create_graph=True)
    slope = (towards_x - slopes.detach() / len(y)).flatten()
    rows = [
        torch.autograd.grad(entry, copies, retain_graph=True, materialize_grads=True)[0].flatten()
        for entry in slopes.flatten()
    ]
    ridge = len(y) * regulariser * torch.eye(len(slope), dtype=y.dtype, device=y.device)
    explained = slope @ torch.linalg.solve(torch.stack(rows) + ridge, slope)
    squared = (mmd2_biased(x, y, kernel) - explained) / regulariser
    return math.sqrt(max(float(squared), 0.0))
