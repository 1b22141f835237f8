r"""Closed-form witness functions :math:`f(x) = \langle w, \phi(x)\rangle`.

The regularised MMD is a concave problem in w; its solution is the regularised witness

.. math:: (\alpha J J^T + \beta I)\, w = \delta,
    \qquad \delta = E\,\phi(x) - E\,\phi(G_\theta(z)),
    \quad J = \nabla_\theta E_z\,\phi(G_\theta(z)) \in R^{r \times P},

and :math:`J^T w = L f` is the direction in which the generator descends.
"""

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mmd.kernels import Kernel
from lightning_mmd.pushforward import (
    Pushforward,
    Replay,
    full_precision,
    refuse_once_differentiable,
    refuse_shared_parameters,
    unfused_attention,
)

__all__ = [
    "KernelWitness",
    "MeanEmbedding",
    "MicroBatchEmbedding",
    "WitnessConvergenceWarning",
    "WitnessSolution",
    "solve_witness",
]


_MOST_SECANTS = 256  # of 2 r numbers each


class WitnessConvergenceWarning(UserWarning):
    """The conjugate gradients stopped before they reached the tolerance that was asked for."""


class MeanEmbedding:
    r"""The model's mean embedding :math:`m(\theta) = \frac1n\sum_i \phi(G_\theta(z_i))` and its J.

    J is never formed: :meth:`adjoint` is one reverse pass, :meth:`push` one forward-mode pass, and
    both reuse the graph of the single evaluation made on construction.

    Args:
        features: Feature map from samples (n, ...) to (n, r).
        generator: Module from latents to samples.
        z: Latents of shape (n, ...).
        parameters: See :class:`~lightning_mmd.pushforward.Pushforward`.
        reduce: Averages a tensor over processes; default: this process is alone.
        records: Passes of generator and features to repeat, the ``records`` of another embedding:
            their buffers and random numbers are used again, and the present ones are left alone.

    Attributes:
        mean: m of shape (r,), over all processes, without a graph.
        local_mean: m of this process, with the graph in the features' parameters.
        samples: The samples, of shape (n, ...).
        records: Buffers and random states that the passes of generator and features began with.

    Raises:
        ValueError: If the features are not of shape (n, r).
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        generator: nn.Module,
        z: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        records: tuple[Replay, Replay] | None = None,
    ) -> None:
        of_generator, of_features = records or (None, None)
        self.pushforward = Pushforward(generator, z, parameters, reuse=True, record=of_generator)
        self._reduce = reduce
        self.samples = self.pushforward.samples.requires_grad_()
        with torch.enable_grad(), full_precision(z.device), unfused_attention():
            self.records = (self.pushforward.record, of_features or Replay(features, z.device))
            phi = (of_features or features)(self.samples)
            if not isinstance(phi, Tensor) or phi.ndim != 2 or len(phi) != len(z):
                got = tuple(phi.shape) if isinstance(phi, Tensor) else type(phi).__name__
                raise ValueError(
                    f"features must map {len(z)} samples to a matrix of shape ({len(z)}, r), got "
                    f"{got}. Flatten the feature net's output."
                )
            self.local_mean = phi.mean(0)
        self.mean = reduce(self.local_mean.detach())

    @property
    def num_parameters(self) -> int:
        """The dimension P of the parameter space."""
        return self.pushforward.num_parameters

    def average(self, evaluate: "Callable[[MeanEmbedding, slice], Tensor]") -> Tensor:
        """Return what a function makes of this embedding and its part of the batch, the whole."""
        return evaluate(self, slice(None))

    def witness_gradient(self, w: Tensor) -> Tensor:
        r"""Gradient :math:`\frac1n \nabla f(x_i)`, f = <w, phi>, with a graph.

        Args:
            w: Weights of shape (r,).

        Returns:
            Tensor of the samples' shape, differentiable in w and in the features' parameters.
        """
        with torch.enable_grad(), full_precision(w.device):
            return torch.autograd.grad(
                self.local_mean, self.samples, w, create_graph=True, materialize_grads=True
            )[0]

    def witness_gradient_at(self, w: Tensor, samples: Tensor) -> Tensor:
        """Return the gradients (1/n) grad f(x_i) of the witness at other samples, without a graph.

        Buffers and dropout masks of the features are those of this embedding.
        """
        x = samples.detach().requires_grad_()
        with torch.enable_grad(), full_precision(x.device):
            _, features = self.records
            mean = features(x).mean(0)
            return torch.autograd.grad(mean, x, w, materialize_grads=True)[0]

    def mean_at(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return this process's mean embedding at other generator parameters, by name.

        Latents, buffers and dropout masks are those of this embedding, and the features still
        those with the parameters of the present moment.
        """
        _, features = self.records
        with torch.no_grad(), full_precision(self.samples.device):
            return features(self.pushforward.replay(parameters)).mean(0)

    def adjoint(self, w: Tensor) -> Tensor:
        """Return J^T w = L f of the witness with weights w, (P,), averaged over processes."""
        with full_precision(w.device):
            (c,) = torch.autograd.grad(
                self.local_mean, self.samples, w, retain_graph=True, materialize_grads=True
            )
        return self._reduce(self.pushforward.cotangent(c))

    def push(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return J v of shape (r,), averaged over processes, and the samples' tangents dx."""
        dx = self.pushforward.tangent(v)
        u, reverse = self._transposed_graph
        if not reverse.requires_grad:
            return torch.zeros_like(self.mean), dx
        with full_precision(v.device):
            (jv,) = torch.autograd.grad(reverse, u, dx, retain_graph=True)
        return self._reduce(jv), dx

    @functools.cached_property
    def _transposed_graph(self) -> tuple[Tensor, Tensor]:
        """The features' reverse pass as a graph that is linear in its weights u."""
        u = torch.zeros_like(self.local_mean, requires_grad=True)
        reverse = self.witness_gradient(u)
        refuse_once_differentiable([reverse])
        return u, reverse


class MicroBatchEmbedding:
    r"""A :class:`MeanEmbedding` that is evaluated in parts, one at a time.

    The same mean, adjoint and tangents to rounding, with the memory of one part: a part is
    evaluated anew whenever it is needed, with the buffers and random numbers that it had first, so
    that each product with J or its transpose costs a forward pass of generator and features more.
    The parts are z[j::num_parts].

    Args:
        features: See :class:`MeanEmbedding`.
        generator: See :class:`MeanEmbedding`.
        z: See :class:`MeanEmbedding`.
        parameters: See :class:`MeanEmbedding`.
        num_parts: Number of parts, >= 1.
        reduce: See :class:`MeanEmbedding`.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor],
        generator: nn.Module,
        z: Tensor,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        num_parts: int,
        reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self._evaluate = lambda latents, records: MeanEmbedding(
            features, generator, latents, parameters, records=records
        )
        self._z = z
        self._reduce = reduce
        self._parts = [slice(j, None, num_parts) for j in range(min(num_parts, len(z)))]
        self._records: list[tuple[Replay, Replay] | None] = [None] * len(self._parts)
        samples: list[Tensor] = []
        self.mean = reduce(self.average(lambda part, _: self._begin(part, samples)))
        self.samples = torch.empty_like(torch.cat(samples))
        for part, some in zip(self._parts, samples, strict=True):
            self.samples[part] = some

    def _begin(self, embedding: MeanEmbedding, samples: list[Tensor]) -> Tensor:
        self._records[len(samples)] = embedding.records
        self.num_parameters = embedding.num_parameters
        samples.append(embedding.samples.detach())
        return embedding.mean

    def average(self, evaluate: Callable[[MeanEmbedding, slice], Tensor]) -> Tensor:
        """Return the mean over samples of what a function makes of each part's embedding.

        Args:
            evaluate: Function of a part's embedding, of this process alone, and its slice of the
                batch, to a tensor that is a mean over samples.

        Returns:
            Tensor of the function's shape, of this process.
        """
        terms = (  # no name holds an embedding: there would be two at a time
            evaluate(self._evaluate(self._z[part], records), part)
            * (len(self._z[part]) / len(self._z))
            for part, records in zip(self._parts, self._records, strict=True)
        )
        return functools.reduce(torch.add, terms)

    def mean_at(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`MeanEmbedding.mean_at`."""
        return self.average(lambda embedding, _: embedding.mean_at(parameters))

    def adjoint(self, w: Tensor) -> Tensor:
        """See :meth:`MeanEmbedding.adjoint`."""
        return self._reduce(self.average(lambda embedding, _: embedding.adjoint(w)))

    def push(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`MeanEmbedding.push`."""
        tangents = torch.empty_like(self.samples)

        def push_part(embedding: MeanEmbedding, part: slice) -> Tensor:
            jv, tangents[part] = embedding.push(v)
            return jv

        return self._reduce(self.average(push_part)), tangents


@dataclass(frozen=True)
class WitnessSolution:
    r"""A solution of :math:`(\alpha JJ^T + \beta I) w = \delta`.

    Attributes:
        weights: w of shape (r,).
        gap: delta of shape (r,).
        parametric_gradient: J^T w = L f of shape (P,), the generator's direction of descent.
        tangents: J_theta G(z) J^T w, how the samples move along it, of the samples' shape.
        gramian_image: D w = J J^T w of shape (r,), how the mean embedding moves along it.
        residual: Relative residual norm, ||delta - (alpha J J^T + beta I) w|| / ||delta||.
        num_iterations: Conjugate-gradient iterations made.
        alpha: Weight of the parametric-gradient penalty.
        beta: Weight of the RKHS norm.
        secants: The steps s that led to w and their images (alpha J J^T + beta I) s, float64, of
            shape (k, 2, r), after those that the solve was given; the newest 256 of them. The
            next solve can be preconditioned with them.
    """

    weights: Tensor
    gap: Tensor
    parametric_gradient: Tensor
    tangents: Tensor
    gramian_image: Tensor
    residual: float
    num_iterations: int
    alpha: float
    beta: float
    secants: Tensor

    @property
    def mmd2(self) -> Tensor:
        """MMD^2 in these features, ||delta||^2, biased."""
        return self.gap.square().sum()

    @property
    def regularised_mmd2(self) -> Tensor:
        """The regularised MMD^2 at the optimum, 1/2 <delta, w> (arXiv 2011.02402)."""
        return 0.5 * self.gap @ self.weights

    @property
    def descent_rate(self) -> Tensor:
        r"""Rate -dF/dt of F = 1/2 ||delta||^2 along d theta/dt = L f: <delta, D w>, exact.

        For the exact witness it is the theorem's (2 / alpha) (F - beta MMD^2_{alpha,beta}); for one
        with a residual e it is less than that by <delta, e> / alpha.
        """
        return self.gap @ self.gramian_image

    @property
    def theorem_rate(self) -> Tensor:
        """The rate of arXiv 2011.02402, theorem 1: (2 / alpha) (F - beta MMD^2_{alpha,beta})."""
        return (self.mmd2 - 2 * self.beta * self.regularised_mmd2) / self.alpha

    @property
    def speed2(self) -> Tensor:
        """Squared speed of the flow in its metric, alpha ||D f||^2 + beta <f, D f>."""
        image = self.gramian_image
        return self.alpha * image.square().sum() + self.beta * self.weights @ image

    def model_decrease(self, dt: float) -> Tensor:
        """Decrease of F after a step dt if m were linear: dt <delta, D w> - dt^2 ||D w||^2 / 2."""
        return dt * self.descent_rate - 0.5 * dt**2 * self.gramian_image.square().sum()


def solve_witness(
    features: Callable[[Tensor], Tensor],
    generator: nn.Module,
    z: Tensor,
    gap: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1e-2,
    tolerance: float = 1e-3,
    max_iterations: int = 50,
    initial: Tensor | None = None,
    secants: Tensor | None = None,
) -> WitnessSolution:
    r"""Solve for the regularised witness without forming the Gramian.

    .. math:: (\alpha J J^T + \beta I)\, w = \delta

    by conjugate gradients. An iteration costs one reverse and one forward-mode pass through
    features and generator; its memory does not depend on r x P.

    Args:
        features: Feature map from samples (n, ...) to (n, r), r > 0.
        generator: Module from latents to samples.
        z: Latents of shape (n, ...).
        gap: delta, mean embedding of the target minus that of the model, of shape (r,).
        alpha: Weight of the parametric-gradient penalty, >= 0.
        beta: Weight of the RKHS norm, >= 0 and not zero together with alpha.
        tolerance: Relative residual at which to stop, > 0.
        max_iterations: Most iterations, >= 0.
        initial: Weights to start from, of shape (r,), such as those of the last update. They are
            scaled first so that the energy along their line is least.
        secants: ``secants`` of an earlier solution with the same alpha and beta, of shape
            (k, 2, r): its steps and images precondition this solve by the BFGS formula, those of
            positive curvature. That saves iterations where the system has changed by little more
            than beta since, in norm, and slows them down or stalls them where it has changed by
            much more; three iterations on a new batch gain nothing. An iteration then costs O(k r)
            operations more.

    Returns:
        The solution, with its residual.

    Raises:
        ValueError: If an argument is out of range or a shape does not fit.

    Warns:
        WitnessConvergenceWarning: If the tolerance was not reached.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402: f = (alpha D + beta I)^-1 (mu_p - mu_q), D = L^T L.
        Preconditioner: after Morales & Nocedal 2000, SIAM J. Optim. 10(4), who keep some pairs of
        the last solve; here all pairs of several are kept.
    """
    if isinstance(features, nn.Module):
        refuse_shared_parameters(features, generator)
    embedding = MeanEmbedding(features, generator, z)
    solution = solve_embedding(
        embedding,
        gap,
        alpha=alpha,
        beta=beta,
        tolerance=tolerance,
        max_iterations=max_iterations,
        initial=initial,
        secants=secants,
    )
    if not solution.residual <= tolerance:
        warnings.warn(
            f"the witness has a relative residual of {solution.residual:.2g} after "
            f"{solution.num_iterations} iterations, more than the tolerance {tolerance:.2g}. Raise "
            "max_iterations or beta, or start from the last weights (initial)"
            + ("." if secants is None else ", without secants: the system has changed too much."),
            WitnessConvergenceWarning,
            stacklevel=2,
        )
    return solution


def solve_embedding(
    embedding: MeanEmbedding | MicroBatchEmbedding,
    gap: Tensor,
    *,
    alpha: float,
    beta: float,
    tolerance: float,
    max_iterations: int,
    initial: Tensor | None = None,
    secants: Tensor | None = None,
    overhead: float | None = None,
) -> WitnessSolution:
    """Solve for the witness of a mean embedding that was evaluated before.

    Arguments and result are those of :func:`solve_witness`; a residual above the tolerance is
    returned without a warning, for a training loop that makes few iterations on purpose.

    Args:
        embedding: The model's mean embedding at the current parameters.
        gap: See :func:`solve_witness`.
        alpha: See :func:`solve_witness`.
        beta: See :func:`solve_witness`.
        tolerance: See :func:`solve_witness`.
        max_iterations: See :func:`solve_witness`.
        initial: See :func:`solve_witness`.
        secants: See :func:`solve_witness`.
        overhead: What an update costs besides its iterations, in iterations, >= 0. When given, stop
            also as soon as an iteration did not raise the descent rate <delta, D w> for the cost:
            when its k-th raised it by less than the factor (overhead + k) / (overhead + k - 1).

    Returns:
        The solution, with its residual.

    Raises:
        ValueError: If an argument is out of range or a shape does not fit.
    """
    _check_weights(alpha, beta)
    if not (tolerance > 0 and max_iterations >= 0):
        raise ValueError(
            "a witness needs tolerance > 0 and max_iterations >= 0, got "
            f"tolerance = {tolerance}, max_iterations = {max_iterations}."
        )
    for name, vector in (("gap", gap), ("initial", initial)):
        if vector is not None and vector.shape != embedding.mean.shape:
            raise ValueError(
                f"{name} must have one entry for each of the {len(embedding.mean)} features, got "
                f"shape {tuple(vector.shape)}."
            )
    if not gap.isfinite().all():
        raise ValueError(
            "gap must be finite, got NaN or infinite entries. Check the real and the generated "
            "samples; a smaller generator step helps where the generator has diverged."
        )
    if secants is None:
        secants = gap.new_zeros(0, 2, len(gap))
    elif secants.ndim != 3 or secants.shape[1:] != (2, len(gap)):
        raise ValueError(
            f"secants must be of shape (k, 2, {len(gap)}), the secants of an earlier solution, got "
            f"shape {tuple(secants.shape)}."
        )
    elif not secants.isfinite().all():
        raise ValueError(
            "secants must be finite, got NaN or infinite entries: the solve that they come from "
            "has diverged. Start without secants."
        )
    secants = secants.detach().double()
    iterate = _Iterate(embedding, gap.detach(), alpha, beta, _bfgs_inverse(secants))
    if initial is not None and bool(initial.any()):
        iterate.line_search(initial.detach())
    size = iterate.gap.norm()
    num_iterations = 0
    while num_iterations < max_iterations and iterate.residual.norm() > tolerance * size:
        rate = iterate.gap @ iterate.gramian_image
        iterate.conjugate_step()
        num_iterations += 1
        if overhead is not None:
            worth = (overhead + num_iterations) / max(overhead + num_iterations - 1, 1e-12)
            if iterate.gap @ iterate.gramian_image < worth * rate:
                break
    return WitnessSolution(
        weights=iterate.weights.to(gap.dtype),
        gap=gap.detach(),
        parametric_gradient=iterate.parametric_gradient,
        tangents=iterate.tangents,
        gramian_image=iterate.gramian_image.to(gap.dtype),
        alpha=alpha,
        beta=beta,
        residual=float(iterate.residual.norm() / size) if size > 0 else 0.0,
        num_iterations=num_iterations,
        secants=torch.cat([secants, *iterate.secants])[-_MOST_SECANTS:],
    )


class _Iterate:
    """Conjugate gradients that carry J^T w and its tangents along: a step gives them for nothing.

    They are preconditioned by a function close to r -> A^-1 r, A = alpha J J^T + beta I. Vectors of
    length r are accumulated in float64 over products in the networks' precision.
    """

    def __init__(
        self,
        embedding: MeanEmbedding | MicroBatchEmbedding,
        gap: Tensor,
        alpha: float,
        beta: float,
        precondition: Callable[[Tensor], Tensor],
    ) -> None:
        self.embedding, self.alpha, self.beta = embedding, alpha, beta
        self.gap = gap.double()
        self.weights = torch.zeros_like(self.gap)
        self.residual = self.gap.clone()
        self.gramian_image = torch.zeros_like(self.gap)
        self._precondition = precondition
        self._direction, self._size = torch.zeros_like(self.gap), math.inf
        self.secants: list[Tensor] = []
        self._largest_curvature = 0.0
        self.parametric_gradient = torch.zeros(
            embedding.num_parameters,
            dtype=embedding.samples.dtype,
            device=embedding.samples.device,
        )
        self.tangents = torch.zeros_like(embedding.samples, requires_grad=False)

    def line_search(self, p: Tensor) -> None:
        """Move along p to the least energy 1/2 <w, A w> - <w, delta>."""
        v = self.embedding.adjoint(p.to(self.embedding.mean.dtype))
        jv, dx = self.embedding.push(v)
        p = p.double()
        image = self.alpha * jv.double() + self.beta * p
        size = p @ p
        curvature = (self.alpha * v.double().square().sum() + self.beta * size) / size
        self._largest_curvature = max(self._largest_curvature, float(curvature))
        rounding = 0.0 if self.beta else torch.finfo(v.dtype).eps * self._largest_curvature
        if not curvature > rounding:  # also for NaN
            raise ValueError(
                f"the regularised Gramian has curvature {float(curvature):.3g} along a direction; "
                "it must be positive. Use beta > 0, and check the samples for NaN."
            )
        step = p @ self.residual / (curvature * size)
        self.secants.append(step * torch.stack([p, image])[None])
        self.weights = self.weights + step * p
        self.residual = self.residual - step * image
        self.gramian_image = self.gramian_image + step * jv.double()
        step = step.to(v.dtype)
        self.parametric_gradient = self.parametric_gradient + step * v
        self.tangents = self.tangents + step * dx

    def conjugate_step(self) -> None:
        z = self._precondition(self.residual)
        size = self.residual @ z
        self._direction = z + (size / self._size) * self._direction
        self._size = size
        self.line_search(self._direction)


def _bfgs_inverse(secants: Tensor) -> Callable[[Tensor], Tensor]:
    """Return r -> H r, H the BFGS approximation of A^-1 from pairs s, y = A s, the oldest first.

    H y = s for the newest pair, and for all of them where they are conjugate. It starts from the
    multiple of the identity that fits A along the newest, which is where conjugate gradients come
    to small eigenvalues. Without pairs H = I.

    Compact form: Byrd, Nocedal & Schnabel 1994, Math. Program. 63, theorem 2.2.
    """
    if not len(secants):
        return lambda r: r
    s, y = secants[(secants[:, 0] * secants[:, 1]).sum(1) > 0].unbind(1)
    if not len(s):
        return lambda r: r
    products = s @ y.T
    scale = s[-1] @ s[-1] / products[-1, -1]
    upper = products.triu()
    middle = products.diag().diag() + scale * y @ y.T

    def solve(b: Tensor, *, transposed: bool = False) -> Tensor:
        matrix = upper.T if transposed else upper
        return torch.linalg.solve_triangular(matrix, b[:, None], upper=not transposed)[:, 0]

    def apply(r: Tensor) -> Tensor:
        t = solve(s @ r)
        return scale * (r - t @ y) + solve(middle @ t - scale * y @ r, transposed=True) @ s

    return apply


def _check_weights(alpha: float, beta: float) -> None:
    if not (0 <= alpha < math.inf and 0 <= beta < math.inf and alpha + beta > 0):
        raise ValueError(
            "the penalty weights must be finite, alpha >= 0 and beta >= 0, and not both zero, got "
            f"alpha = {alpha}, beta = {beta}."
        )


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
        ValueError: If a sample or its weights are empty or of another shape.

    Source:
        Gretton et al. 2012, A kernel two-sample test, section 2.3.

    Example:
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
        terms = (self._kernel(points, centres) @ weights for centres, weights in self._blocks)
        return sum(terms, points.new_zeros(len(points)))

    def gradient(self, points: Tensor) -> Tensor:
        """Return the gradients of f at points of shape (k, d), as (k, d), without a graph."""
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
    if points.ndim != 2 or len(points) == 0:
        raise ValueError(
            f"KernelWitness expects {name} of shape (n, d) with n >= 1, got "
            f"{tuple(points.shape)}. Flatten images first: {name}.flatten(1)."
        )
    if weights is None:
        weights = points.new_full((len(points),), 1.0 / len(points))
    if weights.shape != (len(points),):
        raise ValueError(
            f"KernelWitness expects one weight for each of the {len(points)} points {name}, got "
            f"shape {tuple(weights.shape)}."
        )
    return list(zip(points.split(block_size), (sign * weights).split(block_size), strict=True))
