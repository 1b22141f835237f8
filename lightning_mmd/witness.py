r"""Closed-form witness functions :math:`f(x) = \langle w, \phi(x)\rangle`.

The regularised MMD is a concave problem in w; its solution is the regularised witness

.. math:: (\alpha J J^T + \beta I)\, w = \delta,
    \qquad \delta = E\,\phi(x) - E\,\phi(G_\theta(z)),
    \quad J = \nabla_\theta E_z\,\phi(G_\theta(z)) \in R^{r \times P},

and :math:`J^T w = L f` is the direction in which the generator descends.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mmd.embedding import EmbeddingPart, MeanEmbedding
from lightning_mmd.latents import Inputs
from lightning_mmd.parameters import refuse_shared_parameters
from lightning_mmd.points import require_tensors
from lightning_mmd.wide import to_like, widen

__all__ = [
    "Image",
    "ParametricGramian",
    "System",
    "WitnessConvergenceWarning",
    "WitnessSolution",
    "check_problem",
    "solve_embedding",
    "solve_witness",
]


_MOST_SECANTS = 256  # of 2 r numbers each


class WitnessConvergenceWarning(UserWarning):
    """The conjugate gradients stopped before they reached the tolerance that was asked for."""


@dataclass(frozen=True)
class Image:
    """What a system makes of a vector p; everything is linear in p but the energy.

    Attributes:
        value: A p, of shape (r,), float64.
        energy: <p, A p>, a scalar in float64, from terms that do not cancel.
        parametric_gradient: J^T p, of shape (P,).
        tangents: J_theta G(z) J^T p, of the samples' shape.
        gramian_image: J J^T p, of shape (r,), float64.
    """

    value: Tensor
    energy: Tensor
    parametric_gradient: Tensor
    tangents: Tensor
    gramian_image: Tensor


class System(ABC):
    r"""The operator A of a regularised witness, :math:`A w = \delta`; the generator follows J^T w.

    A depends on the weights alpha and beta of the rule. Another preconditioner of the gap is one
    class of this kind: implement :meth:`apply` and :meth:`slope`, and hand it to the rule,
    ``ClosedForm(system=MySystem())``.
    """

    @abstractmethod
    def apply(self, embedding: MeanEmbedding, p: Tensor, alpha: float, beta: float) -> Image:
        """Apply A to a vector.

        Args:
            embedding: The model's mean embedding, with the products with J and its transpose.
            p: Vector of shape (r,), float64.
            alpha: Weight, >= 0.
            beta: Weight, >= 0.

        Returns:
            A p and what came with it, equal on all processes.
        """

    @abstractmethod
    def slope(
        self, part: EmbeddingPart, w: Tensor, tangents: Tensor, alpha: float, beta: float
    ) -> Tensor:
        r"""Return a scalar whose gradient in the features is that of <w, A w> / 2, w held.

        Args:
            part: A part of the model's mean embedding.
            w: Weights of shape (r,).
            tangents: J_theta G(z) J^T w of this part's samples.
            alpha: Weight, >= 0.
            beta: Weight, >= 0.

        Returns:
            A mean over the part's samples, with a graph.
        """


class ParametricGramian(System):
    r"""The regularised parametric Gramian, :math:`A = \alpha J J^T + \beta I`.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402.
    """

    def apply(self, embedding: MeanEmbedding, p: Tensor, alpha: float, beta: float) -> Image:
        """Apply A by one reverse and one forward-mode pass."""
        v = embedding.adjoint(to_like(p, embedding.mean))
        jv, dx = embedding.push(v)
        jv = widen(jv)
        energy = alpha * widen(v).square().sum() + beta * (p @ p)
        return Image(alpha * jv + beta * p, energy, v, dx, jv)

    def slope(
        self, part: EmbeddingPart, w: Tensor, tangents: Tensor, alpha: float, beta: float
    ) -> Tensor:
        """Return alpha <grad f, dx>: ||J^T w||^2 / 2 depends on the features through grad f."""
        return alpha * (part.witness_gradient(w) * tangents).sum()


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
        error: delta - A w of shape (r,), float64.
        system: The operator A.
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
    error: Tensor
    system: System
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
        """The rate of arXiv 2011.02402, theorem 1: (2 / alpha) (F - beta MMD^2_{alpha,beta}).

        It is evaluated as <delta, D w> + <delta, delta - A w> / alpha, which does not cancel where
        alpha D is far below beta. At alpha = 0 the theorem is silent, and this is its limit at the
        exact witness, <delta, D w>.
        """
        if self.alpha == 0:
            return self.descent_rate
        return self.descent_rate + self.gap @ self.error.to(self.gap.dtype) / self.alpha

    @property
    def efficiency(self) -> Tensor | None:
        r"""How fast F falls, of what is possible: alpha <delta, D w> / ||delta||^2.

        In [0, 1] for the exact witness, where it equals :math:`1 - \beta MMD^2_{\alpha,\beta} / F`
        (a difference that cancels). On fixed features :math:`F(t) = F(0)
        \exp(-\frac2\alpha\int\text{efficiency}\,dt)` along the flow, and it is 0 only where
        D delta = 0. None at alpha = 0, where F has no natural time; NaN at delta = 0.
        """
        return self.alpha * self.descent_rate / self.mmd2 if self.alpha > 0 else None

    @property
    def speed2(self) -> Tensor:
        """Squared speed of the flow in its metric, alpha ||D f||^2 + beta <f, D f>."""
        image = self.gramian_image
        return self.alpha * image.square().sum() + self.beta * self.weights @ image

    def model_decrease(self, dt: float) -> Tensor:
        """Decrease of F after a step dt if m were linear: dt <delta, D w> - dt^2 ||D w||^2 / 2."""
        return dt * self.descent_rate - 0.5 * dt**2 * self.gramian_image.square().sum()


def solve_witness(
    features: Callable[..., Tensor],
    generator: nn.Module,
    z: Inputs,
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
        z: Latents of shape (n, ...), or a tuple (latents, labels): both networks get the labels.
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
    embedding = MeanEmbedding(features, z, generator)
    check_problem(
        embedding, gap, alpha, beta, tolerance, max_iterations, initial=initial, secants=secants
    )
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
    embedding: MeanEmbedding,
    gap: Tensor,
    *,
    alpha: float,
    beta: float,
    tolerance: float,
    max_iterations: int,
    system: System | None = None,
    initial: Tensor | None = None,
    secants: Tensor | None = None,
    overhead: float | None = None,
) -> WitnessSolution:
    """Solve for the witness of a mean embedding that was evaluated before.

    Arguments and result are those of :func:`solve_witness`, which checks them; nothing is checked
    here, and a residual above the tolerance is returned without a warning, for a training loop that
    makes few iterations on purpose.

    Args:
        embedding: The model's mean embedding at the current parameters.
        gap: See :func:`solve_witness`.
        alpha: See :func:`solve_witness`.
        beta: See :func:`solve_witness`.
        tolerance: See :func:`solve_witness`.
        max_iterations: See :func:`solve_witness`.
        system: The operator A; default: :class:`ParametricGramian`.
        initial: See :func:`solve_witness`.
        secants: See :func:`solve_witness`.
        overhead: What an update costs besides its iterations, in iterations, >= 0. When given, stop
            also as soon as an iteration did not raise the descent rate <delta, D w> for the cost:
            when its k-th raised it by less than the factor (overhead + k) / (overhead + k - 1).

    Returns:
        The solution, with its residual.

    Raises:
        ValueError: If a direction has no positive curvature.
    """
    secants = gap.new_zeros(0, 2, len(gap)) if secants is None else secants
    secants = widen(secants.detach())
    gap = gap.detach()
    iterate = _Iterate(
        system or ParametricGramian(), embedding, gap, (alpha, beta), _bfgs_inverse(secants)
    )
    if initial is not None and bool(initial.any()):
        iterate.line_search(widen(initial.detach()))
    size = iterate.gap.norm()
    num_iterations = 0
    while num_iterations < max_iterations and iterate.residual.norm() > tolerance * size:
        rate = iterate.gap @ iterate.total.gramian_image
        iterate.conjugate_step()
        num_iterations += 1
        if overhead is not None:
            worth = (overhead + num_iterations) / max(overhead + num_iterations - 1, 1e-12)
            if iterate.gap @ iterate.total.gramian_image < worth * rate:
                break
    return WitnessSolution(
        weights=to_like(iterate.weights, gap),
        gap=gap,
        parametric_gradient=iterate.total.parametric_gradient,
        tangents=iterate.total.tangents,
        gramian_image=to_like(iterate.total.gramian_image, gap),
        alpha=alpha,
        beta=beta,
        residual=float(iterate.residual.norm() / size) if size > 0 else 0.0,
        num_iterations=num_iterations,
        error=iterate.residual,
        system=iterate.system,
        secants=torch.cat([secants, *iterate.secants])[-_MOST_SECANTS:],
    )


class _Iterate:
    """Conjugate gradients that carry J^T w and its tangents along: a step gives them for nothing.

    They are preconditioned by a function close to r -> A^-1 r. Vectors of length r are accumulated
    in float64 (where the device has it) over products in the networks' precision.
    """

    def __init__(
        self,
        system: System,
        embedding: MeanEmbedding,
        gap: Tensor,
        penalty_weights: tuple[float, float],
        precondition: Callable[[Tensor], Tensor],
    ) -> None:
        self.system, self._embedding = system, embedding
        self._penalty_weights = penalty_weights
        self._precondition = precondition
        self.gap = widen(gap)
        self.weights = torch.zeros_like(self.gap)
        self.residual = self.gap.clone()
        samples = embedding.samples
        self.total = Image(
            value=torch.zeros_like(self.gap),
            energy=self.gap.new_zeros(()),
            parametric_gradient=samples.new_zeros(embedding.num_parameters),
            tangents=torch.zeros_like(samples, requires_grad=False),
            gramian_image=torch.zeros_like(self.gap),
        )
        self._direction, self._size = torch.zeros_like(self.gap), math.inf
        self.secants: list[Tensor] = []
        self._largest_curvature = 0.0

    def line_search(self, p: Tensor) -> None:
        """Move along p to the least energy 1/2 <w, A w> - <w, delta>."""
        alpha, beta = self._penalty_weights
        image = self.system.apply(self._embedding, p, alpha, beta)
        size = p @ p
        curvature = image.energy / size
        self._largest_curvature = max(self._largest_curvature, float(curvature))
        precision = torch.finfo(image.parametric_gradient.dtype).eps
        rounding = 0.0 if beta else precision * self._largest_curvature
        if not curvature > rounding:  # also for NaN
            raise ValueError(
                f"the regularised Gramian has curvature {float(curvature):.3g} along a direction; "
                "it must be positive. Use beta > 0, and check the samples for NaN."
            )
        step = p @ self.residual / (curvature * size)
        self.secants.append(step * torch.stack([p, image.value])[None])
        self.weights = self.weights + step * p
        self.residual = self.residual - step * image.value
        self.total = _add(self.total, step, image)

    def conjugate_step(self) -> None:
        """Make one preconditioned conjugate-gradient iteration."""
        z = self._precondition(self.residual)
        size = self.residual @ z
        self._direction = z + (size / self._size) * self._direction
        self._size = size
        self.line_search(self._direction)


def _add(total: Image, step: Tensor, image: Image) -> Image:
    single = to_like(step, image.parametric_gradient)
    return Image(
        value=total.value + step * image.value,
        energy=total.energy,
        parametric_gradient=total.parametric_gradient + single * image.parametric_gradient,
        tangents=total.tangents + single * image.tangents,
        gramian_image=total.gramian_image + step * image.gramian_image,
    )


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


def check_problem(
    embedding: MeanEmbedding,
    gap: Tensor,
    alpha: float,
    beta: float,
    tolerance: float,
    max_iterations: int,
    *,
    initial: Tensor | None = None,
    secants: Tensor | None = None,
) -> None:
    """Refuse a witness that cannot be solved for; arguments are those of :func:`solve_witness`.

    Raises:
        ValueError: If an argument is out of range or a shape does not fit.
    """
    if not (0 <= alpha < math.inf and 0 <= beta < math.inf and alpha + beta > 0):
        raise ValueError(
            "the penalty weights must be finite, alpha >= 0 and beta >= 0, and not both zero, got "
            f"alpha = {alpha}, beta = {beta}."
        )
    if not (tolerance > 0 and max_iterations >= 0):
        raise ValueError(
            "a witness needs tolerance > 0 and max_iterations >= 0, got "
            f"tolerance = {tolerance}, max_iterations = {max_iterations}."
        )
    given = {"gap": gap, "initial": initial, "secants": secants}
    require_tensors("a witness", **{k: v for k, v in given.items() if v is not None})
    num_features = len(embedding.mean)
    for name, vector in (("gap", gap), ("initial", initial)):
        if vector is not None and vector.shape != (num_features,):
            raise ValueError(
                f"{name} must have one entry for each of the {num_features} features, got "
                f"shape {tuple(vector.shape)}."
            )
    if not gap.isfinite().all():
        raise ValueError(
            "gap must be finite, got NaN or infinite entries. Check the real and the generated "
            "samples; a smaller generator step helps where the generator has diverged."
        )
    if secants is None:
        return
    if secants.ndim != 3 or secants.shape[1:] != (2, num_features):
        raise ValueError(
            f"secants must be of shape (k, 2, {num_features}), the secants of an earlier solution, "
            f"got shape {tuple(secants.shape)}."
        )
    if not secants.isfinite().all():
        raise ValueError(
            "secants must be finite, got NaN or infinite entries: the solve that they come from "
            "has diverged. Start without secants."
        )
