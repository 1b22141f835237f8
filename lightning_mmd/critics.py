"""Critics: trained functions f from samples to the real line."""

import math

import torch
from torch import Tensor, nn

from lightning_mmd.features import RandomFourierFeatures

__all__ = ["EmbeddingCritic", "LearnedKernelCritic"]


class LearnedKernelCritic(nn.Module):
    r"""A function in the RKHS of a learned kernel, :math:`f(x) = \langle w, \phi_\omega(x)\rangle`.

    The kernel is :math:`k(x, y) = \langle\phi_\omega(x), \phi_\omega(y)\rangle`. The norm of w
    bounds the RKHS norm of f from above, and equals it for the w of least norm, which the closed
    form solves for. With ``random_features`` on top, :math:`\phi = \psi \circ h_\omega` for
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

    Examples:
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
        # In a tuple: it holds no parameters of its own, and names in state_dict stay as they are.
        self._feature_map = (_FeatureMap(features, random_features),)

    @property
    def feature_map(self) -> nn.Module:
        """The feature map phi as a module that shares this critic's parameters."""
        return self._feature_map[0]

    def embed(self, x: Tensor, *labels: Tensor) -> Tensor:
        """Return the feature map phi(x), of shape (n, r).

        Args:
            x: Samples of shape (n, ...).
            *labels: Labels, where the features take any.
        """
        h = self.features(x, *labels)
        if not isinstance(h, Tensor) or h.shape != (len(x), self.num_features):
            got = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
            raise ValueError(
                f"the feature net must return shape ({len(x)}, {self.num_features}), got {got}. "
                "Set num_features to its output's length, or flatten it."
            )
        return h if self.random_features is None else self.random_features(h)

    def forward(self, x: Tensor, *labels: Tensor, embedding: bool = False) -> Tensor:
        """Return f(x), of shape (n,); with ``embedding``, the feature map phi(x), (n, r)."""
        embedded = self.embed(x, *labels)
        return embedded if embedding else self.read(embedded)

    def read(self, embedded: Tensor) -> Tensor:
        """Return f where phi is known: <w, phi>, of shape (n,), in phi's precision."""
        return embedded @ self.weights.to(embedded.dtype)

    def rkhs_norm2(self) -> Tensor:
        """Return ||w||^2: the squared RKHS norm of f for w of least norm, else a bound."""
        return self.weights.square().sum()


class _FeatureMap(nn.Module):
    """Features, and random features of them where there are any."""

    def __init__(self, features: nn.Module, random_features: RandomFourierFeatures | None) -> None:
        super().__init__()
        self.features = features
        self.random_features = random_features

    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        h = self.features(x, *labels)
        return h if self.random_features is None else self.random_features(h)


class EmbeddingCritic(nn.Module):
    r"""An embedding for the rule `DeepKernel`: a smooth activation and a linear map on features.

    .. math:: e(x) = s\, (A\,\mathrm{SiLU}(h(x)) + b)

    With ``spectral_norm`` each linear and convolutional layer is divided by its largest singular
    value, which bounds the slope of e by about ``scale`` times that of the other layers.

    Args:
        features: Network h from samples (n, ...) to (n, num_features).
        num_features: Length of its output, >= 1.
        dim: Length d of an embedding, >= 1.
        spectral_norm: Whether linear and convolutional layers are spectrally normalised, those of
            ``features`` too.
        scale: Factor s on the embedding, > 0; in the units of the kernel's bandwidth.

    Raises:
        ValueError: If a number is out of range.

    Source:
        Binkowski et al. 2018, arXiv 1801.01401 (16 dimensions); Wang, Sun & Halgamuge 2019, arXiv
        1812.09916, section 4 (spectral normalisation of the critic, and its scale).

    Examples:
        >>> critic = EmbeddingCritic(torch.nn.Linear(2, 8), 8, dim=4)
        >>> critic(torch.randn(5, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(
        self,
        features: nn.Module,
        num_features: int,
        dim: int = 64,
        spectral_norm: bool = True,
        scale: float = 4.0,
    ) -> None:
        super().__init__()
        if num_features < 1 or dim < 1 or not 0 < scale < math.inf:
            raise ValueError(
                "EmbeddingCritic needs num_features and dim of at least 1 and a finite scale > 0, "
                f"got {num_features}, {dim} and {scale}."
            )
        self.features = features
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(num_features, dim))
        self.scale = scale
        if spectral_norm:
            for layer in list(self.modules()):
                if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                    nn.utils.parametrizations.spectral_norm(layer)

    def forward(self, x: Tensor, *labels: Tensor) -> Tensor:
        """Return the embeddings e(x), of shape (n, d)."""
        return self.scale * self.head(self.features(x, *labels))
