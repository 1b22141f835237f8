r"""Has a training converged? Halving the steps must not change its curve.

    python examples/step_halving.py

Turinici's criterion: a run of T steps with learning rate eta has a limit dynamics only if 2 T steps
of eta / 2 draw the same curve over the cumulative learning rate. A generator plays against a critic
on fixed random features, full batch, in float64, by alternating gradient steps (a critic trained by
gradient ascent): with the parametric-gradient penalty the curves of MMD^2 coincide, without it the
game cycles and they do not. And the smallest such game, bilinear, with the ellipse it runs around.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from jsonargparse import auto_cli
from reporting import new_figure, save_figure, save_table
from torch import Tensor

from lightning_mmd import Gaussian, RandomFourierFeatures, bilinear_game, step_halving
from lightning_mmd.embedding import MeanEmbedding
from lightning_mmd.networks import MLPGenerator
from lightning_mmd.parameters import trainable_parameters

STEP_SIZE = 0.1  # of the generator, the longest; the critic's is half of it
PENALTIES = ((4.0, 0.1), (0.0, 0.1), (0.0, 0.0))  # (alpha, beta)


def play(alpha: float, beta: float, step_size: float, num_steps: int, seed: int) -> Tensor:
    """Return MMD^2 after 0, 1, ..., num_steps alternating gradient steps of critic and generator.

    The critic <w, phi> ascends <w, delta> - alpha/2 ||L f||^2 - beta/2 ||w||^2 in w, the generator
    moves along L f. Target: four Gaussians at (+-1.5, +-1.5).
    """
    torch.manual_seed(seed)
    generator = MLPGenerator(latent_dim=2, sample_dim=2, hidden=(32, 32)).double()
    z = torch.randn(128, 2, dtype=torch.float64)
    features = RandomFourierFeatures(Gaussian(1.0), 2, 32, seed=seed).double()
    corners = torch.cartesian_prod(*2 * [torch.tensor([-1.5, 1.5], dtype=torch.float64)])
    x = corners.repeat(64, 1) + 0.2 * torch.randn(256, 2, dtype=torch.float64)
    target = features(x).mean(0)
    parameters = {name: p.detach().clone() for name, p in trainable_parameters(generator).items()}
    w = torch.zeros_like(target)
    curve = []
    for step in range(num_steps + 1):
        model = MeanEmbedding(features, z, generator, parameters)
        delta = target - model.mean
        curve.append(float(delta @ delta))
        if step == num_steps:
            break
        ascent = delta - beta * w
        if alpha > 0:
            ascent -= alpha * model.push(model.adjoint(w))[0]
        w = w + step_size / 2 * ascent
        velocity = model.adjoint(w).split([p.numel() for p in parameters.values()])
        parameters = {
            name: p + step_size * v.view_as(p)
            for (name, p), v in zip(parameters.items(), velocity, strict=True)
        }
    return torch.tensor(curve, dtype=torch.float64)


def ellipse(step_size: float, horizon: float) -> tuple[Tensor, float]:
    """Return the bilinear game's points and the largest relative change of its invariant."""
    game = bilinear_game(1.0, 0.0, step_size=step_size, num_steps=round(horizon / step_size))
    points = torch.tensor(list(game), dtype=torch.float64)
    x, y = points.T
    invariant = x**2 + y**2 + step_size * x * y
    return points, float((invariant / invariant[0] - 1).abs().max())


def main(
    seeds: Sequence[int] = (0, 1, 2),
    num_steps: int = 1000,
    num_halvings: int = 2,
    directory: Path = Path(__file__).parent,
) -> dict[str, list[dict[str, object]]]:
    """Measure, print, save tables and figure; return the tables."""
    figure = new_figure(12, 3.6)
    *game_axes, ellipse_axes = figure.subplots(1, 3)

    halvings: list[dict[str, object]] = []
    for alpha, beta in PENALTIES:
        for seed in seeds:
            result = step_halving(
                partial(play, alpha, beta),
                step_size=STEP_SIZE,
                num_steps=num_steps,
                num_halvings=num_halvings,
                seeds=[seed],
            )
            row: dict[str, object] = {"alpha": alpha, "beta": beta, "seed": seed}
            for k, distance in enumerate(result.distances):
                row[f"distance_1/{2**k}_1/{2 ** (k + 1)}"] = distance
            row |= {"verdict": result.verdict, "mmd2_end": result.curves[-1, -1]}
            halvings.append(row)
            if seed == seeds[0] and (alpha > 0 or beta == 0):
                axes = game_axes[0 if alpha > 0 else 1]
                for k, curve in enumerate(result.curves):
                    label = rf"$\eta$ = {STEP_SIZE / 2**k:g}"
                    axes.semilogy(result.cumulative_lr, curve, label=label)
                title = rf"MMD$^2$, $\alpha$ = {alpha:g}, $\beta$ = {beta:g}: {result.verdict}"
                axes.set(title=title, xlabel="cumulative learning rate")

    games: list[dict[str, object]] = []
    for step_size in (1.2, 0.5, 0.1):
        points, drift = ellipse(step_size, horizon=100.0)
        radius = points.norm(dim=1)
        games.append(
            {
                "tau": step_size,
                "drift": drift,
                "radius_min": radius.min(),
                "radius_max": radius.max(),
            }
        )
        ellipse_axes.plot(*points.T, ".", ms=3, label=rf"$\tau$ = {step_size:g}")
    ellipse_axes.set(title="bilinear game", xlabel="generator x", ylabel="critic y", aspect="equal")
    for axes in (*game_axes, ellipse_axes):
        axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, directory / "figures/step_halving.png")

    tables = {"step_halving": halvings, "step_halving_bilinear": games}
    for name, rows in tables.items():
        save_table(rows, directory / f"results/{name}.csv")
    return tables


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
