r"""Flows that descend MMD^2: of points, and of a generator's parameters.

Each flow is an iterator of immutable states, one a step and the start first, so that its user can
log, stop and save where it pleases. A state holds all that is needed to go on: passed back as
`initial` it continues bit for bit. `vars(state)` is a dictionary of tensors and numbers for
`torch.save`, and `State(**saved)` its inverse.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mmd.embedding import MeanEmbedding
from lightning_mmd.kernel_witness import KernelWitness
from lightning_mmd.kernels import Kernel
from lightning_mmd.mmd import mmd2_biased
from lightning_mmd.noise import Moment, Noise, hessian_constant
from lightning_mmd.parameters import trainable_parameters, unflatten
from lightning_mmd.passes import copy_network
from lightning_mmd.points import require_positive, require_steps, require_tensors
from lightning_mmd.witness import (
    WitnessConvergenceWarning,
    WitnessSolution,
    check_problem,
    solve_embedding,
)

__all__ = [
    "GeneratorState",
    "PointState",
    "generator_flow",
    "point_flow",
]


@dataclass(frozen=True, eq=False)
class PointState:
    """A moment of `point_flow`.

    Args:
        particles: The model sample y, (m, d).
        step: Number of steps made.
        time: Sum of the step sizes.
        mmd2: Biased MMD^2 of target and particles, twice the energy that the flow descends.
        noise: Level of the noise in the step that led here, 0 at the start.
        rng_state: State of the generator of the noise, None without noise.
        memory: What the noise remembers, None for noise that remembers nothing.
        noise_sum: Sum over the steps of the noise's squared level times the mean ||u||^2 of its
            draw: the running sum of beta^2 of `noisy_flow_bound`.
    """

    particles: Tensor
    step: int
    time: float
    mmd2: float
    noise: float
    rng_state: Tensor | None
    memory: tuple[float, float, float] | None = None
    noise_sum: float = 0.0


def point_flow(
    initial: Tensor | PointState,
    target: Tensor,
    kernel: Kernel,
    *,
    step_size: float,
    num_steps: int,
    noise: Noise | None = None,
    rng: torch.Generator | None = None,
) -> Iterator[PointState]:
    r"""Move particles along the MMD flow, with noise injection if asked for.

    .. math:: y \leftarrow y + s\, \nabla f(y + \beta_t u), \quad u \sim N(0, I),
        \quad f = \mu_x - \mu_y

    Without noise this is explicit Euler for the Wasserstein gradient flow of 1/2 MMD^2, which can
    come to rest far from the target: particles that see no gradient stay. Noise enters where the
    gradient is evaluated only; the witness f is that of the particles without noise, and the
    particles themselves are not perturbed. Without noise MMD^2 falls at every step while

    .. math:: s\,(\kappa^2 + \lambda\, MMD) < 2, \qquad \kappa^2 = -k''(0),

    lambda the `hessian_constant`; for the Gaussian kernel :math:`s < 2 b^2 / (1 + \sqrt3\, MMD)`.
    That bounds the Hessian of m F in the particles, :math:`-\mathrm{Hess} f(y_j)\,\delta_{jl} +
    \frac1m \partial_1\partial_2 k(y_j, y_l)`: its second part is there at the target too, where f
    is flat, and one particle beside one target point is unstable from :math:`2 / \kappa^2` on. Cost
    O(m (n + m)) a step, for `AdaptiveNoise` times the number of levels that it tries.

    Args:
        initial: Particles y of shape (m, d), or a state to continue from.
        target: Target sample x of shape (n, d), of the same dtype.
        kernel: The kernel.
        step_size: s > 0; see above for where it is stable.
        num_steps: Number of steps, >= 0.
        noise: Levels of the noise; none when not given.
        rng: Where the noise starts, on the particles' device. It is left alone: the flow draws
            from a copy. A state brings its own.

    Yields:
        num_steps + 1 states, the start first.

    Raises:
        ValueError: If an argument is out of range, or noise lacks a rng.
        TypeError: If `AdaptiveNoise` meets a kernel without a `hessian_constant`.

    Source:
        Arbel et al. 2019, arXiv 1906.04370: MMD flow and noise injection.

    Examples:
        >>> from lightning_mmd.kernels import Gaussian
        >>> x, y = torch.zeros(1, 1), torch.ones(1, 1)
        >>> *_, last = point_flow(y, x, Gaussian(), step_size=0.5, num_steps=50)
        >>> last.mmd2 < 1e-10
        True
    """
    require_positive("point_flow", step_size=step_size)
    require_steps("point_flow", num_steps)
    require_tensors("point_flow", target=target)
    if not isinstance(initial, PointState):
        require_tensors("point_flow", initial=initial)
        if noise is not None and rng is None:
            raise ValueError(
                "point_flow with noise needs a rng: torch.Generator(device).manual_seed(0)."
            )
        initial = PointState(
            particles=initial.detach(),
            step=0,
            time=0.0,
            mmd2=float(mmd2_biased(target, initial.detach(), kernel)),
            noise=0.0,
            rng_state=None if noise is None or rng is None else rng.get_state(),
        )
    if noise is not None and initial.rng_state is None:
        raise ValueError(
            "this state comes from a flow without noise and has no random state. Start from its "
            "particles, with a rng."
        )
    memory = None if noise is None else noise.begin(initial.mmd2)
    if memory is not None and initial.memory is None:
        if initial.step > 0:
            raise ValueError(
                f"this state comes from a flow with other noise, which {type(noise).__name__} "
                "cannot take over. Start from its particles, with a rng."
            )
        initial = dataclasses.replace(initial, memory=memory)
    return _point_flow(initial, target, kernel, step_size, num_steps, noise)


def _point_flow(
    state: PointState,
    target: Tensor,
    kernel: Kernel,
    step_size: float,
    num_steps: int,
    noise: Noise | None,
) -> Iterator[PointState]:
    yield state
    for _ in range(num_steps):
        y, rng_state, memory, level, u = state.particles, state.rng_state, state.memory, 0.0, 0.0
        noise_sum = state.noise_sum
        witness = KernelWitness(target, y, kernel)
        if noise is not None and rng_state is not None:
            rng = torch.Generator(y.device)
            rng.set_state(rng_state)
            u = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=rng)
            rng_state = rng.get_state()
            level = noise.at(_moment(state, witness, kernel, u))
            noise_sum += level**2 * float(u.square().sum(1).mean())
        y = y + step_size * witness.gradient(y + level * u)
        step, mmd2 = state.step + 1, float(mmd2_biased(target, y, kernel))
        memory = None if noise is None else noise.advance(memory, step, mmd2)
        state = PointState(
            particles=y,
            step=step,
            time=state.time + step_size,
            mmd2=mmd2,
            noise=level,
            rng_state=rng_state,
            memory=memory,
            noise_sum=noise_sum,
        )
        yield state


def _moment(state: PointState, witness: KernelWitness, kernel: Kernel, u: Tensor) -> Moment:
    return Moment(
        step=state.step,
        memory=state.memory,
        energy=0.5 * state.mmd2,
        constant=lambda: hessian_constant(kernel) ** 2 * float(u.square().sum(1).mean()),
        dissipation=lambda level: float(
            witness.gradient(state.particles + level * u).square().sum(1).mean()
        ),
    )


@dataclass(frozen=True, eq=False)
class GeneratorState:
    r"""A moment of `generator_flow`.

    Args:
        parameters: Name to tensor of the generator's trainable parameters; also an argument of
            `torch.func.functional_call` and, with strict=False, of `load_state_dict`.
        velocity: J^T w, the flow's direction at these parameters, flat, (P,).
        weights: w of the witness at these parameters, (r,).
        step: Number of steps made.
        time: Sum of the step sizes.
        energy: F = 1/2 ||delta||^2, half of MMD^2 in the features; or the functional's value, and
            below h stands in place of delta and 1/2 ||h||^2 in place of F.
        regularised_mmd2: 1/2 <delta, w>.
        rate: dF/dt that the theorem predicts, -(2 / alpha) (F - beta regularised_mmd2); for
            alpha = 0 its limit, -<delta, D w>.
        squared_speed: alpha ||D f||^2 + beta <f, D f>, the squared Riemannian speed; equal to -rate
            but computed on another way.
        efficiency: alpha <delta, D w> / ||delta||^2, in [0, 1] for the exact w, where it is
            1 - beta regularised_mmd2 / energy; None for alpha = 0, NaN for delta = 0. Along the
            flow F(t) = F(0) exp(-(2 / alpha) integral of efficiency), and it is 0 only where
            D delta = 0: where a flow with F > 0 comes to rest.
        length: Riemannian length of the path so far, the sum of speeds times step sizes.
        residual: Relative residual of the witness.
        num_iterations: Conjugate-gradient iterations made for it.
    """

    parameters: dict[str, Tensor]
    velocity: Tensor
    weights: Tensor
    step: int
    time: float
    energy: float
    regularised_mmd2: float
    rate: float
    squared_speed: float
    efficiency: float | None
    length: float
    residual: float
    num_iterations: int


def generator_flow(
    generator: nn.Module,
    z: Tensor,
    features: Callable[[Tensor], Tensor],
    target_embedding: Tensor | Callable[[Tensor], Tensor],
    *,
    alpha: float,
    beta: float,
    step_size: float,
    num_steps: int,
    tolerance: float = 1e-10,
    max_iterations: int = 1000,
    initial: GeneratorState | None = None,
) -> Iterator[GeneratorState]:
    r"""Move a generator's parameters along the regularised MMD flow, witness in closed form.

    .. math:: \dot\theta = J^T w, \qquad (\alpha J J^T + \beta I)\, w = \delta,
        \qquad \dot F = -\frac2\alpha \left(F - \beta\, MMD^2_{\alpha,\beta}\right) \le 0

    by explicit Euler on fixed latents: the textbook for `MMDGAN`. In place of F = 1/2 ||delta||^2
    any functional F(m) of the mean embedding may descend: its negative differential h = -dF/dm then
    takes the place of delta, :math:`(\alpha J J^T + \beta I)\, w = h`, and

    .. math:: \dot F = -\langle h, D w\rangle
        = -\frac2\alpha \left(\tfrac12\|h\|^2 - \tfrac\beta2\langle h, w\rangle\right) \le 0.

    The natural time is alpha: for
    small beta / alpha, F falls like exp(-2 t / alpha). Each step starts from copies of the
    generator's buffers, so the flow depends on the parameters alone; the generator is not changed.
    Layers that draw random numbers (dropout) belong in eval mode.

    Args:
        generator: Module from latents to samples; where the flow starts.
        z: Latents of shape (n, ...).
        features: Feature map from samples to (n, r).
        target_embedding: Mean features of the target, (r,); or F, a differentiable function from m
            of shape (r,) to a scalar.
        alpha: Weight of the parametric-gradient penalty, >= 0.
        beta: Weight of the RKHS norm, >= 0 and not zero together with alpha.
        step_size: Time step dt > 0; for alpha > 0 below alpha.
        num_steps: Number of steps, >= 0.
        tolerance: Relative residual of the witness; the flow is exact up to it.
        max_iterations: Most conjugate-gradient iterations a step.
        initial: A state to continue from, of a flow of the same generator and arguments.

    Yields:
        num_steps + 1 states, the start first.

    Raises:
        ValueError: If an argument is out of range or a shape does not fit.

    Warns:
        WitnessConvergenceWarning: If a witness misses the tolerance.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402: the flow, theorem 1 (with F = 1/2 MMD^2) and the
        Riemannian metric d_{alpha,beta}.

    Examples:
        >>> generator = torch.nn.Linear(1, 1)
        >>> flow = generator_flow(
        ...     generator, torch.randn(8, 1), lambda x: x, torch.tensor([2.0]),
        ...     alpha=1.0, beta=0.0, step_size=0.5, num_steps=2,
        ... )
        >>> energies = [state.energy for state in flow]
        >>> [round(energy / energies[0], 4) for energy in energies]
        [1.0, 0.25, 0.0625]

        A functional: the regularised chi-squared distance of DrMMD, 1/2 <delta, (C + I / 2)^-1
        delta> with the second moment C = 1 / 2 of the target's features; its h is delta.

        >>> half = torch.tensor([[0.5]])
        >>> drmmd = lambda m: 0.5 * (2 - m) @ torch.linalg.solve(half + 0.5 * torch.eye(1), 2 - m)
        >>> flow = generator_flow(
        ...     generator, torch.randn(8, 1), lambda x: x, drmmd,
        ...     alpha=1.0, beta=0.0, step_size=0.5, num_steps=2,
        ... )
        >>> energies = [state.energy for state in flow]
        >>> [round(energy / energies[0], 4) for energy in energies]
        [1.0, 0.25, 0.0625]
    """
    require_positive("generator_flow", step_size=step_size)
    require_steps("generator_flow", num_steps)
    if not callable(target_embedding):
        require_tensors("generator_flow", target_embedding=target_embedding)

    start = {n: p.detach().clone() for n, p in trainable_parameters(generator).items()}
    limits = {"tolerance": tolerance, "max_iterations": max_iterations}

    def observe(parameters: dict[str, Tensor], previous: GeneratorState | None) -> GeneratorState:
        embedding = MeanEmbedding(features, z, copy_network(generator), parameters)
        energy, gap = _descended(target_embedding, embedding.mean.detach())
        check_problem(embedding, gap, alpha, beta, **limits)
        warm = None if previous is None else previous.weights
        solution = solve_embedding(embedding, gap, alpha=alpha, beta=beta, **limits, initial=warm)
        _warn_of_residual(solution, tolerance)
        w, velocity = solution.weights, solution.parametric_gradient
        image = embedding.push(velocity)[0]  # D w = J J^T w
        half, regularised = 0.5 * float(solution.mmd2), float(solution.regularised_mmd2)
        return GeneratorState(
            parameters=parameters,
            velocity=velocity,
            weights=w,
            step=0 if previous is None else previous.step + 1,
            time=0.0 if previous is None else previous.time + step_size,
            energy=energy,
            regularised_mmd2=regularised,
            rate=-2 / alpha * (half - beta * regularised) if alpha > 0 else -float(gap @ image),
            squared_speed=float(alpha * image @ image + beta * w @ image),
            efficiency=None if alpha == 0 else float(alpha * gap @ image / (gap @ gap)),
            length=0.0 if previous is None else _length_after(previous, step_size),
            residual=solution.residual,
            num_iterations=solution.num_iterations,
        )

    def flow() -> Iterator[GeneratorState]:
        state = observe(start, None) if initial is None else initial
        yield state
        for _ in range(num_steps):
            state = observe(_moved(state, step_size), state)
            yield state

    return flow()


def _descended(target: Tensor | Callable[[Tensor], Tensor], mean: Tensor) -> tuple[float, Tensor]:
    """Return F and its negative differential at a mean embedding."""
    if isinstance(target, Tensor):
        if target.shape != mean.shape:
            raise ValueError(
                f"target_embedding must have one entry for each of the {len(mean)} features, got "
                f"shape {tuple(target.shape)}."
            )
        gap = target - mean
        return 0.5 * float(gap.square().sum()), gap
    with torch.enable_grad():
        m = mean.clone().requires_grad_()
        value = target(m)
        if value.shape != () or not value.requires_grad:
            raise ValueError(
                "the functional must return a scalar that depends on the mean embedding by torch "
                f"operations, got shape {tuple(value.shape)}. Reduce it: (...).sum()."
            )
        (slope,) = torch.autograd.grad(value, m)
    return float(value.detach()), -slope


def _moved(state: GeneratorState, step_size: float) -> dict[str, Tensor]:
    along = unflatten(state.velocity, state.parameters)
    return {n: p + step_size * along[n] for n, p in state.parameters.items()}


def _length_after(state: GeneratorState, step_size: float) -> float:
    return state.length + step_size * math.sqrt(max(state.squared_speed, 0.0))


def _warn_of_residual(solution: WitnessSolution, tolerance: float) -> None:
    if not solution.residual <= tolerance:
        warnings.warn(
            f"a witness of the flow has a relative residual of {solution.residual:.2g} after "
            f"{solution.num_iterations} iterations, more than the tolerance {tolerance:.2g}. "
            "Raise max_iterations, beta or tolerance, or use float64.",
            WitnessConvergenceWarning,
            stacklevel=4,
        )
