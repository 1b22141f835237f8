r"""What a witness function looks like: plain, regularised, and seen through noise.

    python examples/witness_fields.py

Target: eight Gaussians on a ring (black dots); model: a generator that has collapsed to three of
them (yellow dots). Red is where the witness asks for more mass, blue where for less. Left, the
plain witness mu_p - mu_q: the missing modes are too far away for most samples to feel. Middle, the
witness regularised by the parametric Gramian, (alpha J J^T + beta) w = delta, and how it moves the
samples through the generator. Right, noise injection: the plain witness's gradient at
y + level * u (one draw in grey, the mean in black), which is the gradient of a wider witness.
The table says how many modes are found after following each of them.
"""

import math
from pathlib import Path
from typing import Any

import torch
from reporting import new_figure, save_figure, save_table
from torch import Tensor
from torch.func import functional_call

from lightning_mmd import (
    Gaussian,
    KernelWitness,
    RandomFourierFeatures,
    generator_flow,
    mmd2_biased,
    point_flow,
    solve_witness,
)
from lightning_mmd.networks import MLPGenerator
from lightning_mmd.noise import ConstantNoise


def centres(num_modes: int = 8) -> Tensor:
    """Return the first of eight modes on a circle."""
    angles = torch.arange(num_modes, dtype=torch.float64) * (math.pi / 4)
    return 2 * torch.stack([angles.cos(), angles.sin()], 1)


def mixture(num_modes: int, samples_per_mode: int) -> Tensor:
    """Sample Gaussians around the first modes."""
    means = centres(num_modes).repeat(samples_per_mode, 1)
    return means + 0.15 * torch.randn_like(means)


def num_modes_found(y: Tensor) -> int:
    """Count the modes with at least half their share of the samples within 3 deviations."""
    return int(((torch.cdist(centres(), y) < 0.45).double().mean(1) >= 0.5 / 8).sum())


def at_noise(witness: KernelWitness, y: Tensor, level: float, num_draws: int) -> Tensor:
    """Return the witness's gradients at noisy samples, of shape (num_draws, n, d)."""
    u = torch.randn(num_draws, *y.shape, dtype=torch.float64)
    return witness.gradient((y + level * u).flatten(0, 1)).view_as(u)


def draw(
    panels: dict[str, tuple[Tensor, Tensor]], line: Tensor, x: Tensor, y: Tensor, jitter: Tensor
) -> Any:
    """Draw functions on a grid and the moves of samples; ``jitter``: of one draw of noise."""
    figure, resolution = new_figure(12, 4.3), len(line)
    for axes, (title, (values, moves)) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        height = values.view(resolution, resolution).T / values.abs().max()
        height = height.sign() * height.abs().sqrt()  # shows the faint parts
        axes.contourf(line, line, height, levels=24, cmap="RdBu_r", vmin=-1.1, vmax=1.1)
        axes.contour(line, line, height, levels=12, colors="white", linewidths=0.4)
        axes.plot(*x.T, ".", color="black", ms=1.5)
        axes.plot(*y.T, "o", color="#ffd92f", mec="black", mew=0.3, ms=2.6)
        unit, tails = moves.norm() / len(y) ** 0.5, y[:90].T
        if title == "witness seen through noise":
            axes.quiver(*tails, *(jitter / unit).T, color="0.45", scale=22, width=0.0025)
        axes.quiver(*tails, *(moves[:90] / unit).T, color="black", scale=22, width=0.0045)
        axes.set(title=title, xticks=[], yticks=[], aspect="equal")
        axes.set(xlim=(-2.9, 2.9), ylim=(-2.9, 2.9))
        axes.spines[:].set_visible(False)
    return figure


def main(
    bandwidth: float = 0.4,
    noise_level: float = 0.6,
    num_steps: int = 600,
    num_draws: int = 512,
    resolution: int = 160,
    seed: int = 0,
    directory: Path = Path(__file__).parent,
) -> list[dict[str, str | int]]:
    """Draw the three fields, print and return their numbers."""
    torch.manual_seed(seed)
    x, z = mixture(8, 50), torch.randn(256, 4, dtype=torch.float64)
    generator = MLPGenerator(sample_dim=2, latent_dim=4, hidden=(32, 32)).double()
    features = RandomFourierFeatures(Gaussian(bandwidth), 2, 512, seed=seed).double()

    wide = RandomFourierFeatures(Gaussian(0.6), 2, 256, seed=seed).double()
    collapse = {"alpha": 1.0, "beta": 0.02, "step_size": 0.2, "num_steps": 50, "tolerance": 1e-3}
    *_, state = generator_flow(generator, z, wide, wide(mixture(3, 100)).mean(0), **collapse)
    generator.load_state_dict(state.parameters)
    y = generator(z).detach()
    kernel = Gaussian(bandwidth)
    plain = KernelWitness(x, y, kernel)
    slope = plain.gradient(y)
    options = {"step_size": 0.5, "num_steps": num_steps}
    *_, still = point_flow(y, x, kernel, **options)

    gap = features(x).mean(0) - features(y).mean(0)
    weights = {"alpha": 1.0, "beta": 0.003}
    solution = solve_witness(features, generator, z, gap, **weights, max_iterations=500)
    flow = {**weights, "step_size": 0.1, "num_steps": num_steps // 6, "tolerance": 1e-2}
    *_, state = generator_flow(generator, z, features, features(x).mean(0), **flow)
    regularised = functional_call(generator, state.parameters, (z,)).detach()

    noisy = at_noise(plain, y, noise_level, num_draws)
    rng = torch.Generator().manual_seed(seed)
    noise = ConstantNoise(noise_level, until=num_steps * 2 // 3)
    *_, moved = point_flow(y, x, kernel, noise=noise, rng=rng, **options)

    rows = []
    fields = {"plain": slope, "regularised": solution.tangents, "noisy": noisy.mean(0)}
    ends = still.particles, regularised, moved.particles
    for (field, moves), end in zip(fields.items(), ends, strict=True):
        alignment = (moves * slope).sum() / (moves.norm() * slope.norm())
        row = {"field": field, "rms_move": f"{moves.norm() / len(y) ** 0.5:.6f}"}
        row |= {"alignment": f"{alignment:.6f}", "mmd2": f"{mmd2_biased(x, y, kernel):.6f}"}
        row |= {"mmd2_end": f"{mmd2_biased(x, end, kernel):.6f}", "modes": num_modes_found(y)}
        rows.append({**row, "modes_end": num_modes_found(end)})
    line = torch.linspace(-2.9, 2.9, resolution, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    widened = (bandwidth**2 + noise_level**2) ** 0.5  # E f(y + level u) has a wider kernel
    faded = KernelWitness(x, y, Gaussian(widened))(points) * (bandwidth / widened) ** 2
    panels = {
        "witness $\\mu_p - \\mu_q$": (plain(points), slope),
        "regularised witness": (features(points) @ solution.weights, solution.tangents),
        "witness seen through noise": (faded, noisy.mean(0)),
    }
    figure = draw(panels, line, x, y, noisy[0, :90])
    save_figure(figure, directory / "figures/witness_fields.png", dpi=90)
    save_table(rows, directory / "results/witness_fields.csv")
    return rows


if __name__ == "__main__":
    main()
