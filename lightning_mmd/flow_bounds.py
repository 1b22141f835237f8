r"""What theory promises of `point_flow`, to stand beside a run of it.

The bounds are those of Arbel et al., with constants derived anew: the Hessian of m F in the
particles is bounded by :math:`L = \kappa^2 + \lambda\, MMD`, so a step of size s along v changes
F = 1/2 MMD^2 by at most :math:`-s\,\overline{\langle\nabla f, v\rangle} + \frac{s^2 L}2
\overline{\|v\|^2}`.
"""

import math

import torch

from lightning_mmd.kernels import Kernel
from lightning_mmd.noise import hessian_constant
from lightning_mmd.points import require_positive, require_steps

__all__ = ["noisy_flow_bound", "plain_flow_bound", "smoothness"]


def smoothness(kernel: Kernel, mmd2: float) -> float:
    r"""Bound the Hessian of m F in the particles, :math:`L = \kappa^2 + \lambda\, MMD`.

    :math:`\kappa^2 = -k''(0)` bounds the gradients of functions in the RKHS, lambda from
    `hessian_constant` their second derivatives. The flow without noise descends for s < 2 / L.

    Args:
        kernel: A smooth kernel of the distance.
        mmd2: MMD^2 of target and particles, biased, >= 0: that of the start bounds all later ones.

    Returns:
        L > 0.

    Raises:
        ValueError: If MMD^2 is negative or not finite.
        TypeError: If the kernel has no `hessian_constant`.

    Examples:
        >>> from lightning_mmd.kernels import Gaussian
        >>> smoothness(Gaussian(bandwidth=0.5), mmd2=0.0)
        4.0
    """
    if not 0 <= mmd2 < math.inf:
        raise ValueError(f"smoothness needs a finite mmd2 >= 0, got {mmd2}.")
    constant = hessian_constant(kernel)
    squared = torch.zeros((), dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(kernel.of_squared_distances(squared), squared)
    return -2 * float(slope) + constant * math.sqrt(mmd2)


def plain_flow_bound(
    mmd2: float, *, step_size: float, num_steps: int, smoothness: float, sobolev: float
) -> float:
    r"""Bound MMD^2 after a number of steps without noise: it falls like 1 / t.

    .. math:: MMD_n^2 \le \left(\frac1{MMD_0^2} + \frac{2 s (1 - s L / 2)}{S^2}\, n\right)^{-1}

    where the negative Sobolev distance of target and particles is at most S all along.

    Args:
        mmd2: MMD^2 at the start, > 0.
        step_size: s > 0, at most 2 / L.
        num_steps: n >= 0.
        smoothness: L, see `smoothness`.
        sobolev: S > 0, the largest on the way: the limit of `negative_sobolev_distance` as its
            regulariser falls.

    Returns:
        The bound.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Arbel et al. 2019, arXiv 1906.04370, proposition on the Lojasiewicz inequality.

    Examples:
        >>> plain_flow_bound(1.0, step_size=0.5, num_steps=3, smoothness=2.0, sobolev=1.0)
        0.4
    """
    require_positive("plain_flow_bound", mmd2=mmd2, step_size=step_size, sobolev=sobolev)
    require_steps("plain_flow_bound", num_steps)
    gain = 2 * step_size * _share(step_size, smoothness / 2) / sobolev**2
    return 1 / (1 / mmd2 + gain * num_steps)


def noisy_flow_bound(
    mmd2: float, *, step_size: float, smoothness: float, hessian_constant: float, noise_sum: float
) -> float:
    r"""Bound MMD^2 with `AdaptiveNoise`: it falls exponentially in the running sum of beta^2.

    .. math:: MMD_n^2 \le MMD_0^2 \exp\Big(-4 s (1 - s L)\, \lambda^2
        \sum_{t < n} \beta_t^2\, \overline{\|u_t\|^2}\Big)

    It goes to zero where the sum grows without end. The paper has the factor 1 - 3 s L, and for the
    mean of ||u||^2 its expectation, d.

    Args:
        mmd2: MMD^2 at the start, > 0.
        step_size: s > 0, at most 1 / L.
        smoothness: L, see `smoothness`.
        hessian_constant: lambda of the kernel.
        noise_sum: The running sum of beta^2 times the mean of ||u||^2, `PointState.noise_sum`, of a
            run whose levels all obey the inequality of `AdaptiveNoise`.

    Returns:
        The bound.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Arbel et al. 2019, arXiv 1906.04370, theorem on noise injection.

    Examples:
        >>> round(noisy_flow_bound(
        ...     1.0, step_size=0.25, smoothness=2.0, hessian_constant=1.0, noise_sum=2.0
        ... ), 4)  # exp(-1)
        0.3679
    """
    require_positive(
        "noisy_flow_bound", mmd2=mmd2, step_size=step_size, hessian_constant=hessian_constant
    )
    if not 0 <= noise_sum < math.inf:
        raise ValueError(f"noisy_flow_bound needs a finite noise_sum >= 0, got {noise_sum}.")
    rate = 4 * step_size * _share(step_size, smoothness) * hessian_constant**2
    return mmd2 * math.exp(-rate * noise_sum)


def _share(step_size: float, smoothness: float) -> float:
    """Return 1 - s L, the part of the descent that curvature leaves."""
    require_positive("the bound", smoothness=smoothness)
    share = 1 - step_size * smoothness
    if share < 0:
        raise ValueError(
            f"the bound needs a step of at most {1 / smoothness:.3g}, got {step_size}. Take a "
            "shorter step."
        )
    return share
