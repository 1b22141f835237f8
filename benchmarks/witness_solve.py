"""Conjugate gradients against forming the Jacobian, and the worth of a warm start.

    python benchmarks/witness_solve.py

J has r rows, each a reverse pass through features and generator; they are computed in vectorised
blocks, and (alpha J J^T + beta I) w = delta is solved by Cholesky factorisation in float64.
"""

import sys
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import dcgan
import torch
from jsonargparse import auto_cli
from meters import interleaved_seconds, peak_memory, ratio
from torch import Tensor, nn
from torch.func import functional_call

from lightning_mmd import Gaussian, RandomFourierFeatures, median_bandwidth, solve_witness
from lightning_mmd.data import DigitsDataModule
from lightning_mmd.networks import ConvFeatures, ConvGenerator
from lightning_mmd.parameters import unflatten
from lightning_mmd.witness import WitnessSolution

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from reporting import save_table

ALPHA, BETA = 1.0, 1e-2
TO_TOLERANCE = {
    f"to_{tolerance}": {"tolerance": tolerance, "max_iterations": 500} for tolerance in (0.3, 0.01)
}


def dense_system(features: nn.Module, generator: nn.Module, z: Tensor) -> Tensor:
    """Form J of shape (r, P) and return alpha J J^T + beta I."""
    parameters = {n: p.detach().requires_grad_() for n, p in generator.named_parameters()}
    mean = features(functional_call(generator, parameters, (z,))).mean(0)
    blocks = [
        torch.autograd.grad(
            mean, list(parameters.values()), rows, retain_graph=True, is_grads_batched=True
        )
        for rows in torch.eye(len(mean)).split(16)
    ]
    jacobian = torch.cat([torch.cat([g.flatten(1) for g in block], dim=1) for block in blocks])
    return ALPHA * (jacobian @ jacobian.T).double() + BETA * torch.eye(len(mean)).double()


def dense_solve(features: nn.Module, generator: nn.Module, z: Tensor, gap: Tensor) -> Tensor:
    """Form J and return w."""
    system = dense_system(features, generator, z)
    return torch.cholesky_solve(gap.double()[:, None], torch.linalg.cholesky(system))[:, 0]


def solve_costs(
    name: str,
    features: nn.Module,
    generator: nn.Module,
    latent_dim: int,
    shape: tuple[int, ...],
    batch_size: int,
    repeats: int,
) -> list[dict[str, Any]]:
    """Time, memory and error of the ways to solve for a witness, at the generator's start."""
    z = torch.randn(batch_size, latent_dim)
    with torch.no_grad():
        real = (torch.rand(batch_size, *shape) * 2 - 1).cumsum(-1).tanh()
        gap = features(real).mean(0) - features(generator(z)).mean(0)
    arguments = (features, generator, z, gap)
    solve = partial(solve_witness, *arguments, alpha=ALPHA, beta=BETA)
    ways: dict[str, Callable[[], Any]] = {
        "3 iterations": lambda: solve(tolerance=1e-12, max_iterations=3),
        "to 1e-2": lambda: solve(tolerance=1e-2, max_iterations=500),
        "to 1e-3": lambda: solve(tolerance=1e-3, max_iterations=500),
    }
    exact: list[Tensor] = []
    ways = {"dense": lambda: exact.append(dense_solve(*arguments)), **ways}
    num_parameters = sum(p.numel() for p in generator.parameters())
    seconds = interleaved_seconds(ways, repeats)
    value = gap.double() @ exact[0] / 2
    common = {"networks": name, "batch": batch_size, "r": len(gap), "P": num_parameters}
    common["J_MiB"] = 4 * len(gap) * num_parameters / 2**20
    rows = []
    for way, run in ways.items():
        row = common | {"solve": way, "iterations": "-", "seconds": median(seconds[way])}
        row |= ratio(seconds["dense"], seconds[way], "faster")
        row["peak_MiB"] = peak_memory(run) / 2**20
        if way == "dense":
            row |= {"residual": 0.0, "error_w": 0.0, "error_value": 0.0}
        else:
            solution = run()
            row["iterations"] = solution.num_iterations
            row["residual"] = solution.residual
            row["error_w"] = float((solution.weights - exact[0]).norm() / exact[0].norm())
            row["error_value"] = float((solution.regularised_mmd2 - value).abs() / value)
        rows.append(row)
    return rows


def exact_secants(system: Tensor) -> Tensor:
    """Return secants whose BFGS formula is the exact inverse: the eigenvectors."""
    values, vectors = torch.linalg.eigh(system)
    return torch.stack([vectors.T, values[:, None] * vectors.T], dim=1)


@torch.no_grad()
def follow(generator: nn.Module, step: torch.Tensor) -> None:
    """Add a vector to a generator's parameters."""
    parameters = dict(generator.named_parameters())
    for name, move in unflatten(step, parameters).items():
        parameters[name] += move


def warm_start(
    learned: bool, fresh: bool, eta: float, num_features: int, num_updates: int, batch_size: int
) -> dict[str, Any]:
    """Train on digits, and count products with J J^T in every update's solve from several starts.

    Cold: from zero, a product each iteration. Warm: from the last weights, whose line search is a
    product more. Secants: warm, and preconditioned by the steps of earlier solves. Each of these
    carries its own weights along. Last inverse: from the last weights of the training, which solves
    to 0.01, preconditioned by the exact inverse of the last update's system: all that it could
    tell. Beside the products to two tolerances, the residual that 3 iterations leave, as many as a
    training makes, and how many from zero leave what 3 warm ones do. Latents and images are new in
    every update or held; features, where learned, ascend.
    """
    torch.manual_seed(0)
    data = DigitsDataModule(batch_size=batch_size)
    data.prepare_data()
    data.setup("fit")
    images = torch.stack(list(data.train_dataloader().dataset))
    generator = ConvGenerator((1, 8, 8), 32, (32, 16))
    if learned:
        features: nn.Module = ConvFeatures((1, 8, 8), num_features, (16, 32))
    else:
        kernel = Gaussian(6.0)
        features = RandomFourierFeatures(kernel, in_features=64, num_features=num_features)
    ascent = torch.optim.Adam(features.parameters(), lr=5e-4, betas=(0.0, 0.9)) if learned else None
    last: dict[str, WitnessSolution] = {}
    inverse = weights = None
    rows: list[dict[str, float]] = []
    for k in range(num_updates):
        if k == 0 or fresh:
            z = torch.randn(batch_size, 32)
            real = images[torch.randint(len(images), (batch_size,))]
        with torch.no_grad():
            gap = features(real).mean(0) - features(generator(z)).mean(0)
        solve = partial(solve_witness, *(features, generator, z, gap), alpha=ALPHA, beta=BETA)
        limits = {**TO_TOLERANCE, "residual_3": {"tolerance": 1e-9, "max_iterations": 3}}
        row: dict[str, float] = {}
        for (limit, options), start in product(limits.items(), ("cold", "warm", "secants")):
            before = None if start == "cold" else last.get(f"{limit}_{start}")
            solution = solve(
                **options,
                initial=before and before.weights,
                secants=before.secants if before and start == "secants" else None,
            )
            last[f"{limit}_{start}"] = solution
            products = solution.num_iterations + (before is not None)
            row[f"{limit}_{start}"] = products if limit in TO_TOLERANCE else solution.residual
        enough = solve(tolerance=row["residual_3_warm"], max_iterations=500)
        row["cold_for_3_warm"] = enough.num_iterations
        informed = solve(**TO_TOLERANCE["to_0.01"], initial=weights, secants=inverse)
        row["to_0.01_last_inverse"] = informed.num_iterations + 1
        solution = last["to_0.01_secants"]
        weights = solution.weights
        inverse = exact_secants(dense_system(features, generator, z))
        rows.append(row)
        if ascent is not None:
            objective = weights @ (features(real).mean(0) - features(generator(z)).mean(0))
            (-objective).backward()
            ascent.step()
            ascent.zero_grad()
        follow(generator, eta * solution.parametric_gradient)
    return {
        "features": "learned" if learned else "fixed",
        "batches": "fresh" if fresh else "held",
        "batch": batch_size,
        "eta": eta,
        "updates": num_updates - 1,
        **{name: median(row[name] for row in rows[1:]) for name in rows[0]},
        "mmd2_end": float(solution.mmd2),
    }


def main(
    num_features: int = 512,
    batch_size: int = 32,
    width: int = 32,
    channels: tuple[int, ...] = (64, 32, 16),
    num_updates: int = 9,
    repeats: int = 1,
    directory: Path = Path(__file__).parent / "results",
) -> dict[str, list[dict[str, Any]]]:
    """Measure both, print and save the tables.

    Args:
        num_features: Length r of the embedding.
        batch_size: Latents of a solve; a fourth of the training's.
        width: Channels of the DCGAN's largest feature maps.
        channels: Channels of the generator of 28x28 images.
        num_updates: Updates of the training with and without warm start.
        repeats: Turns of the timing.
        directory: Where the tables go.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    generator = ConvGenerator((1, 28, 28), 32, channels)
    with torch.no_grad():
        pixels = generator(torch.randn(64, 32)).flatten(1)
    fixed = RandomFourierFeatures(
        Gaussian(float(median_bandwidth(pixels))), in_features=784, num_features=num_features
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        costs = solve_costs(
            "28x28, fixed", fixed, generator, 32, (1, 28, 28), batch_size, repeats
        ) + solve_costs(
            "32x32 DCGAN, learned",
            dcgan.features(width, num_features),
            dcgan.generator(width),
            128,
            (3, 32, 32),
            batch_size,
            repeats,
        )
        save_table(costs, directory / "witness_solve.csv")
        starts = [
            warm_start(learned, fresh, eta, num_features, num_updates, batches * batch_size)
            for learned in (False, True)
            for fresh, eta, batches in (
                (True, 0.4, 4),
                (True, 0.4, 16),
                (True, 0.1, 16),
                (False, 0.1, 4),
                (False, 0.02, 4),
            )
        ]
    save_table(starts, directory / "warm_start.csv")
    return {"costs": costs, "starts": starts}


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
