"""Critics: trained functions f from samples to the real line."""

import math

import torch
from torch import Tensor, nn

from lightning_mmd.features import RandomFourierFeatures

__all__ = ["LearnedKernelCritic"]


class LearnedKernelCritic(nn.Module):
    r"""A function in the RKHS of a learned kernel, :math:`f(x) = \langle w, \phi_\omega(x)\rangle`.

    The kernel is :math:`k(x, y) = \langle\phi_\omega(x), \phi_\omega(y)\rangle` and the RKHS
    norm of f is that of w. With ``random_features`` on top, :math:`\phi = \psi \circ h_\omega` for
    random Fourier features psi of a characteristic kernel and a network h: the learned kernel is
    then a characteristic kernel between learned features, and is bounded.

    Smooth activations (SiLU, GELU, Softplus) belong in ``features``: with ReLU-like ones automatic
    differentiation loses part of the gradient of every gradient penalty.

    Args:
        features: Network from samples (n, ...) to (n, num_features).
        num_features: Length of the network's output, >= 1.
        random_features: Optional random Fourier features of ``num_features`` inputs.

    Raises:
        ValueError: If ``num_features`` is not positive or does not fit ``random_features``, or, on
            evaluation, if the network's output is not of shape (n, num_features).

    Source:
        Mroueh & Nguyen, arXiv 2011.02402, learned kernels.

    Example:
        >>> critic = LearnedKernelCritic(torch.nn.Linear(2, 16), 16)
        >>> critic(torch.randn(5, 2)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: nn.Module,
        num_features: int,
        random_features: RandomFourierFeatures | None = None,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {num_features}.")
        if random_features is not None and random_features.in_features != num_features:
            raise ValueError(
                f"random_features must take the {num_features} learned features, got in_features = "
                f"{random_features.in_features}."
            )
        self.features = features
        self.num_features = num_features
        self.random_features = random_features
        dim = num_features if random_features is None else random_features.num_features
        self.weights = nn.Parameter(torch.randn(dim) / math.sqrt(dim))

    def embed(self, x: Tensor) -> Tensor:
        """Return the feature map phi(x), of shape (n, r)."""
        h = self.features(x)
        if not isinstance(h, Tensor) or h.shape != (len(x), self.num_features):
            got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(
                f"the feature net must return shape ({len(x)}, {self.num_features}), got {got}. "
                "Set num_features to its output's length, or flatten it."
            )
        return h if self.random_features is None else self.random_features(h)

    def feature_map(self) -> nn.Module:
        """Return phi as a module that shares this critic's parameters."""
        return (
            self.features
            if self.random_features is None
            else nn.Sequential(self.features, self.random_features)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return f(x), of shape (n,)."""
        return self.embed(x) @ self.weights

    def rkhs_norm2(self) -> Tensor:
        """Return the squared RKHS norm of f, ||w||^2."""
        return self.weights.square().sum()
