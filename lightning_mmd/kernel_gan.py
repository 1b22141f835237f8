r"""The game of points against a critic in the RKHS, by exact gradient steps.

It is an iterator of immutable states like those of `lightning_mmd.flows`: a state holds all that is
needed to go on, and `vars(state)` is a dictionary for `torch.save`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mmd.kernel_witness import KernelWitness
from lightning_mmd.kernels import Kernel
from lightning_mmd.points import require_positive, require_steps, require_tensors

__all__ = ["KernelGANState", "kernel_gan_flow"]


@dataclass(frozen=True, eq=False)
class KernelGANState:
    """A moment of `kernel_gan_flow`.

    The critic is f = sum_i a_i k(x_i, .) - sum_s b_s k(h_s, .) with target points x and the points'
    history h: `KernelWitness(target, history, kernel, x_weights=target_coefficients,
    y_weights=history_coefficients)`, where the history is not empty.

    Args:
        points: The model sample y, (m, d).
        target_coefficients: a, (n,).
        history: h, the points of earlier steps, oldest first, (s, d).
        history_coefficients: b, (s,).
        step: Number of steps made.
        mmd2: Squared MMD of the weighted target and points, ||sum p k(x, .) - sum p~ k(y, .)||^2.
    """

    points: Tensor
    target_coefficients: Tensor
    history: Tensor
    history_coefficients: Tensor
    step: int
    mmd2: float


def kernel_gan_flow(
    initial: Tensor | KernelGANState,
    target: Tensor,
    kernel: Kernel,
    *,
    norm_weight: float,
    critic_lr: float,
    generator_lr: float,
    num_steps: int,
    point_weights: Tensor | None = None,
    target_weights: Tensor | None = None,
    truncation: float = 0.0,
) -> Iterator[KernelGANState]:
    r"""Play the game between points and a critic in the RKHS, by alternating gradient steps.

    .. math:: f &\leftarrow (1 - \eta_d\lambda) f + \eta_d
        \Big[\sum_i p_i k(x_i, \cdot) - \sum_j \tilde p_j k(y_j, \cdot)\Big] \\
        y_j &\leftarrow y_j + \eta_g \tilde p_j \nabla f(y_j)

    Gradient ascent on :math:`\sum p f(x) - \sum \tilde p f(y) - \frac\lambda2\|f\|_H^2` in f,
    then descent in y with the new f: a GAN whose critic is trained, not solved for. The critic is
    exact: its coefficients on the target and on all earlier points, which decay by 1 - critic_lr *
    norm_weight a step. Cost O(m (n + m s)) at step s; truncation bounds it.

    Args:
        initial: Points y of shape (m, d), or a state to continue from.
        target: Target points x of shape (n, d), of the same dtype.
        kernel: The kernel.
        norm_weight: lambda >= 0, weight of the critic's RKHS norm.
        critic_lr: eta_d > 0, with critic_lr * norm_weight <= 1.
        generator_lr: eta_g > 0.
        num_steps: Number of steps, >= 0.
        point_weights: Masses p~ > 0 of the points, (m,). Default 1/m each.
        target_weights: Masses p > 0 of the target points, (n,). Default 1/n each.
        truncation: The points of a step are forgotten once their coefficients have decayed below
            this factor, in [0, 1); 0 keeps all.

    Yields:
        num_steps + 1 states, the start first.

    Raises:
        ValueError: If an argument is out of range or a shape does not fit.

    Source:
        Becker et al. 2022, arXiv 2305.08277, the exact recursion of points and kernel critic.

    Examples:
        >>> from lightning_mmd.kernels import Gaussian
        >>> *_, last = kernel_gan_flow(
        ...     torch.tensor([[0.1]]), torch.zeros(1, 1), Gaussian(),
        ...     norm_weight=1.0, critic_lr=0.1, generator_lr=0.1, num_steps=200,
        ... )
        >>> bool(last.points.abs() < 1e-4)
        True
    """
    require_positive("kernel_gan_flow", critic_lr=critic_lr, generator_lr=generator_lr)
    require_steps("kernel_gan_flow", num_steps)
    if not (0 <= norm_weight and critic_lr * norm_weight <= 1 and 0 <= truncation < 1):
        raise ValueError(
            "kernel_gan_flow needs norm_weight >= 0, critic_lr * norm_weight <= 1 and truncation "
            f"in [0, 1), got norm_weight = {norm_weight}, critic_lr = {critic_lr}, "
            f"truncation = {truncation}."
        )
    start = initial.points if isinstance(initial, KernelGANState) else initial
    require_tensors("kernel_gan_flow", initial=start, target=target)
    points = start.detach()
    p = _masses("target_weights", target_weights, target)
    q = _masses("point_weights", point_weights, points)
    within_target = p @ kernel(target, target) @ p

    def mmd2(y: Tensor) -> float:
        return float(within_target + q @ kernel(y, y) @ q - 2 * p @ kernel(target, y) @ q)

    def flow() -> Iterator[KernelGANState]:
        if isinstance(initial, KernelGANState):
            state = initial
        else:
            empty = points.new_empty(0)
            state = KernelGANState(
                points, torch.zeros_like(p), points[:0], empty, step=0, mmd2=mmd2(points)
            )
        yield state
        decay = 1 - critic_lr * norm_weight
        for _ in range(num_steps):
            y = state.points
            kept = decay * state.history_coefficients
            num_ages = len(kept) // len(q)  # whole steps are forgotten, the oldest first
            forgotten = len(q) * sum(decay**age < truncation for age in range(1, num_ages + 1))
            a = decay * state.target_coefficients + critic_lr * p
            b = torch.cat([kept[forgotten:], critic_lr * q])
            history = torch.cat([state.history[forgotten:], y])
            critic = KernelWitness(target, history, kernel, x_weights=a, y_weights=b)
            y = y + generator_lr * q[:, None] * critic.gradient(y)
            state = KernelGANState(y, a, history, b, step=state.step + 1, mmd2=mmd2(y))
            yield state

    return flow()


def _masses(name: str, weights: Tensor | None, points: Tensor) -> Tensor:
    if len(points) == 0:
        raise ValueError(f"kernel_gan_flow needs at least one point, got none for {name}.")
    if weights is None:
        return points.new_full((len(points),), 1.0 / len(points))
    require_tensors("kernel_gan_flow", **{name: weights})
    if weights.shape != (len(points),) or not (weights > 0).all():
        raise ValueError(
            f"{name} must hold a mass > 0 for each of the {len(points)} points, got {weights}."
        )
    return weights
