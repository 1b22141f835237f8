r"""Theorem 1 in numbers: the decrease of MMD^2 that the theory predicts is the one that happens.

    python examples/descent_certificate.py

A small generator follows the regularised MMD flow on fixed random features in float64. The theorem
says dF/dt = -(2 / alpha) (F - beta MMD2_{alpha,beta}), F = 1/2 MMD^2. Measured over seeds: the
predicted over the realised decrease of every step, the order in dt at which the two meet, the error
that is left in the limit dt -> 0, the decay of F beside exp(-2 t / alpha), and the path's length.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from reporting import new_figure, save_figure, save_table
from torch import Tensor

from lightning_mmd import Gaussian, RandomFourierFeatures, generator_flow
from lightning_mmd.flows import GeneratorState
from lightning_mmd.networks import MLPGenerator

ALPHA = 1.0  # the unit of time: other values at the same beta / alpha only rescale the clock
COARSEST = 0.04  # the largest step of the ladder; each rung halves it


class Flow:
    """The flow of one seed's generator towards four Gaussians at (+-1.5, +-1.5)."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.generator = MLPGenerator(latent_dim=2, sample_dim=2, hidden=(32, 32)).double()
        self.z = torch.randn(128, 2, dtype=torch.float64)
        self.features = RandomFourierFeatures(Gaussian(1.0), 2, 16, seed=seed).double()
        corners = torch.cartesian_prod(*2 * [torch.tensor([-1.5, 1.5], dtype=torch.float64)])
        x = corners.repeat(64, 1) + 0.2 * torch.randn(256, 2, dtype=torch.float64)
        self.target = self.features(x).mean(0)

    def run(
        self, beta: float, dt: float, steps: int, initial: GeneratorState | None = None
    ) -> list[GeneratorState]:
        """Return the states of a number of steps."""
        flow = generator_flow(
            self.generator,
            self.z,
            self.features,
            self.target,
            alpha=ALPHA,
            beta=beta,
            step_size=dt,
            num_steps=steps,
            initial=initial,
        )
        return list(flow)


def ratios(states: Sequence[GeneratorState]) -> Tensor:
    """Predicted over realised decrease of each step."""
    ratio = [a.rate * (b.time - a.time) / (b.energy - a.energy) for a, b in pairwise(states)]
    return torch.tensor(ratio, dtype=torch.float64)


def limit(values: Sequence[float]) -> float:
    """Extrapolate values at dt, dt/2, dt/4, ... to dt = 0 (Richardson, all orders)."""
    order = 1
    while len(values) > 1:
        values = [(2**order * fine - coarse) / (2**order - 1) for coarse, fine in pairwise(values)]
        order += 1
    return values[0]


def label(
    decay_axes: Any, ratio_axes: Any, order_axes: Any, times: list[float], steps: list[float]
) -> None:
    """Draw what is expected into the three panels, and name their axes."""
    decay_axes.semilogy(
        times, [math.exp(-2 * t / ALPHA) for t in times], "k--", label=r"$e^{-2t/\alpha}$"
    )
    decay_axes.set(title="F(t) / F(0)", xlabel=r"$t / \alpha$")
    ratio_axes.axhspan(0.98, 1.02, color="0.92")
    ratio_axes.set(title="predicted / realised decrease of a step", xlabel=r"$t / \alpha$")
    order_axes.loglog(steps, steps, "k--", label="order 1")
    order_axes.set(title="largest |ratio - 1| of a run", xlabel=r"$dt / \alpha$")
    for axes in (decay_axes, ratio_axes, order_axes):
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)


def main(
    seeds: Sequence[int] = (0, 1, 2),
    num_halvings: int = 6,
    horizon: float = 0.48,
    betas: Sequence[float] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4),
    decay_horizon: float = 2.0,
    directory: Path = Path(__file__).parent,
) -> dict[str, list[dict[str, float]]]:
    """Measure, print, save tables and figure; return the tables."""
    figure = new_figure(12, 3.6)
    decay_axes, ratio_axes, order_axes = figure.subplots(1, 3)

    steps = [COARSEST / 2**k for k in range(num_halvings + 1)]
    certificate, identity = [], []
    for seed in seeds:
        flow = Flow(seed)
        for dt in steps:
            states = flow.run(0.1, dt, round(horizon / dt))
            ratio = ratios(states)
            row = {"seed": seed, "dt": dt, "ratio_min": ratio.min(), "ratio_max": ratio.max()}
            row["discrepancy"] = (ratio - 1).abs().max()
            certificate.append({**row, "path_length": states[-1].length})
            if seed == seeds[0]:
                times = [state.time for state in states[:-1]]
                ratio_axes.plot(times, ratio, label=f"dt = {dt:g}")
        rungs = certificate[-len(steps) :]
        logs = torch.tensor([[row["dt"], row["discrepancy"]] for row in rungs]).log2()
        slope = torch.cov(logs.T)[0, 1] / logs[:, 0].var()
        errors = []
        for state in states[:: len(states) // 4]:  # along the path of the smallest step
            realised = [1 / ratios(flow.run(0.1, dt, 1, state)).item() for dt in steps]
            errors.append(abs(limit(realised) - 1))
        speed = max(abs(state.squared_speed / -state.rate - 1) for state in states)
        identity.append(
            {"seed": seed, "order": slope, "error_at_dt_0": max(errors), "speed_error": speed}
        )
        order_axes.loglog(steps, [row["discrepancy"] for row in rungs], "o-", label=f"seed {seed}")

    decay = []
    for beta in betas:
        states = Flow(seeds[0]).run(beta, 0.01, round(decay_horizon / 0.01))
        times, start = [state.time for state in states], states[0].energy
        bound = math.sqrt(2 * start * ALPHA) * (1 - math.exp(-decay_horizon / ALPHA))
        row = {"beta": beta, "F_end/F_start": states[-1].energy / start}
        row["exp(-2t/alpha)"] = math.exp(-2 * decay_horizon / ALPHA)
        decay.append({**row, "path_length": states[-1].length, "length_beta_0": bound})
        decay_axes.semilogy(times, [s.energy / start for s in states], label=rf"$\beta$ = {beta:g}")
    label(decay_axes, ratio_axes, order_axes, times, steps)
    save_figure(figure, directory / "figures/descent_certificate.png")

    tables = {"certificate": certificate, "identity": identity, "decay": decay}
    for name, rows in tables.items():
        save_table(rows, directory / f"results/descent_{name}.csv")
    return tables


if __name__ == "__main__":
    main()
