r"""The largest eigenvalue of the parametric Gramian :math:`JJ^T`, and the step that it allows."""

import torch

from lightning_mmd.embedding import MeanEmbedding

__all__ = ["largest_gramian_eigenvalue", "natural_scale"]


def largest_gramian_eigenvalue(
    embedding: MeanEmbedding, num_iterations: int = 50, *, seed: int = 0
) -> float:
    r"""Estimate the largest eigenvalue of the parametric Gramian :math:`JJ^T` by power iteration.

    The Rayleigh quotient :math:`\|J^T w\|^2` of a unit vector w, never above the eigenvalue; it
    gains on it like :math:`(\lambda_2 / \lambda_1)^{2 t}`. One reverse and one forward-mode pass
    an iteration.

    Args:
        embedding: The model's mean embedding at its current parameters.
        num_iterations: Number of iterations, >= 1.
        seed: Of the first vector.

    Returns:
        The estimate, >= 0.

    Raises:
        ValueError: If there are no iterations.

    Source:
        Golub and Van Loan 2013, Matrix computations, section 8.2.1.

    Examples:
        >>> embedding = MeanEmbedding(lambda x: x, torch.zeros(4, 2), torch.nn.Linear(2, 3))
        >>> round(largest_gramian_eigenvalue(embedding), 6)  # J is the bias's: the identity
        1.0
    """
    if num_iterations < 1:
        raise ValueError(
            f"largest_gramian_eigenvalue needs num_iterations >= 1, got {num_iterations}."
        )
    start = torch.randn(len(embedding.mean), generator=torch.Generator().manual_seed(seed))
    w, eigenvalue = start.to(embedding.mean), 0.0
    for _ in range(num_iterations):
        w = w / w.norm()
        v = embedding.adjoint(w)
        eigenvalue = float(v @ v)
        w = embedding.push(v)[0]
        if not w.any():
            break
    return eigenvalue


def natural_scale(alpha: float, beta: float, largest_eigenvalue: float) -> float:
    r"""Return :math:`\alpha + \beta / \lambda_{\max}`, the unit of a closed form's steps.

    The linear model of a step of length :math:`\tau` along :math:`J^T w` shrinks the gap's largest
    component by :math:`1 - \tau \lambda / (\alpha\lambda + \beta)`: to nothing at this
    :math:`\tau`, whatever alpha and beta are. It is continuous at alpha = 0, where it is that of
    gradient descent on MMD^2 / 2 with beta = 1.

    Args:
        alpha: Weight of the parametric-gradient penalty, >= 0.
        beta: Weight of the RKHS norm, >= 0.
        largest_eigenvalue: Of :math:`JJ^T`, >= 0. Where J is zero, beta / lambda is left out.

    Examples:
        >>> natural_scale(alpha=1.0, beta=0.5, largest_eigenvalue=2.0)
        1.25
    """
    return alpha + beta / largest_eigenvalue if largest_eigenvalue > 0 else alpha or beta
