"""The negative Sobolev distance, a gauge of whether the plain MMD flow can converge."""

import math

import torch
from torch import Tensor

from lightning_mmd.kernels import Energy, Kernel, Laplace, SumKernel
from lightning_mmd.mmd import mmd2_biased
from lightning_mmd.points import require_tensors
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
        kernel: A kernel with two derivatives at distance 0: not `Laplace`, `Energy`, or a sum with
            one of them, whose derivatives d are not in the RKHS.
        regulariser: epsilon > 0. The estimate grows as it falls.

    Returns:
        S_epsilon, between 0 and MMD / sqrt(epsilon).

    Raises:
        TypeError: If the kernel is not smooth at distance 0, or a sample is no tensor.
        ValueError: If the regulariser is not positive, a value is not finite, or the samples are
            not of shapes (n, d) and (m, d), n and m >= 1; also where K is not positive or the
            difference negative beyond rounding: the kernel is one of yours that is not smooth, or
            the regulariser is too small.

    Source:
        Arbel et al. 2019, arXiv 1906.04370, section on the Lojasiewicz inequality; Mroueh et al.
        2019, Sobolev descent, for the regularised form in an RKHS.

    Examples:
        >>> from lightning_mmd.kernels import Linear
        >>> x, y = torch.tensor([[3.0], [5.0]]), torch.tensor([[1.0], [2.0]])
        >>> round(negative_sobolev_distance(x, y, Linear(), regulariser=1e-9), 6)
        2.5
    """
    if not 0 < regulariser < math.inf:
        raise ValueError(
            f"negative_sobolev_distance needs a finite regulariser > 0, got {regulariser}."
        )
    if _is_rough(kernel):
        raise TypeError(
            "negative_sobolev_distance needs a kernel with two derivatives at distance 0, got "
            f"{kernel!r}. Use a Gaussian, RationalQuadratic, InverseMultiquadric, Polynomial or "
            "Linear."
        )
    require_tensors("negative_sobolev_distance", x=x, y=y)
    if x.ndim != 2 or y.ndim != 2 or min(len(x), len(y)) == 0:
        raise ValueError(
            "negative_sobolev_distance expects samples of shapes (n, d) and (m, d), n, m >= 1, got "
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
    mmd2 = mmd2_biased(x, y, kernel)
    factor, failed = torch.linalg.cholesky_ex(torch.stack(rows) + ridge)
    explained = slope @ torch.cholesky_solve(slope[:, None], factor)[:, 0]
    difference = float(mmd2 - explained)
    if not (mmd2.isfinite() and slope.isfinite().all()):
        raise ValueError(
            "negative_sobolev_distance needs finite kernel values and slopes, got NaN or infinity. "
            "Remove such samples: x[x.isfinite().all(1)]."
        )
    rounding = 1e-8 * float(mmd2) + 1e-12 * float(kernel.diagonal(y).abs().max())
    if failed or not difference >= -rounding:
        raise ValueError(
            f"negative_sobolev_distance finds slopes that {kernel!r} with two derivatives at "
            f"distance 0 cannot have, with regulariser = {regulariser}. Use a smooth kernel, or a "
            "larger regulariser."
        )
    return math.sqrt(max(difference, 0.0) / regulariser)


def _is_rough(kernel: Kernel) -> bool:
    """Return whether a kernel is known to lack the second derivative at distance 0."""
    if isinstance(kernel, SumKernel):
        pairs = zip(kernel.kernels, kernel.weights or (), strict=True)
        return any(weight > 0 and _is_rough(part) for part, weight in pairs)
    return isinstance(kernel, (Laplace, Energy))
