r"""Four Gaussians: with alpha = 0 a kernel GAN goes in cycles, with alpha > 0 it converges.

    python examples/mixture_of_gaussians.py

The experiment of Mroueh & Nguyen's talk on MMD GAN as a gradient flow (arXiv 2011.02402): samples
and MMD^2 along training for a critic that is trained by gradient ascent, on a fixed kernel with
alpha = 0 and alpha = 100 and on a learned one, and beside them the critic in closed form. Every
method plays the same ten games, full batch, on quadrature points of target and latents; MMD^2 is
measured under one fixed kernel, in the end against fresh samples.

The learning rates are those of alpha = 100 throughout. On a fixed kernel they are a choice of
units: (alpha, beta, eta_d, eta_g) and (c alpha, c beta, eta_d / c, c eta_g) play the same game with
c times smaller critics, so alpha = 100 here is alpha = 1 at rates 1 and 0.03.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from reporting import new_figure, save_figure, save_table
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from lightning_mmd import (
    Gaussian,
    LearnedKernelCritic,
    RandomFourierFeatures,
    mmd2_features,
    parametric_gradient_penalty,
)
from lightning_mmd.closed_form import TrustRegion
from lightning_mmd.embedding import MeanEmbedding
from lightning_mmd.estimators import Batch
from lightning_mmd.networks import MLPFeatures, MLPGenerator
from lightning_mmd.penalties import penalised_critic
from lightning_mmd.witness import solve_embedding

DEVIATION = 0.4
NUM_POINTS = 512  # quadrature points of the target, and of the latents
ALPHA, BETA = 100.0, 1.0
CRITIC_LR, FEATURES_LR, GENERATOR_LR = 0.01, 0.3, 3.0
CENTRES = torch.cartesian_prod(torch.tensor([-1.5, 1.5]), torch.tensor([-1.5, 1.5]))
EVALUATION = RandomFourierFeatures(Gaussian(1.0), 2, 256, seed=2011)  # the kernel of every MMD^2


def normal_points(num_points: int, seed: int) -> Tensor:
    """Return points of a scrambled Sobol sequence in the plane, mapped to a standard normal."""
    uniform = torch.quasirandom.SobolEngine(2, scramble=True, seed=seed).draw(num_points)
    return math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-6, 1 - 1e-6) - 1)


def target_points(seed: int) -> Tensor:
    """Return quadrature points of the mixture, as many around each centre."""
    quarters = [normal_points(NUM_POINTS // 4, 1000 * (seed + 1) + i) for i in range(4)]
    return torch.cat([c + DEVIATION * q for c, q in zip(CENTRES, quarters, strict=True)])


def num_modes_found(y: Tensor) -> int:
    """Count the modes with at least half their share of the samples within 3 deviations."""
    near = torch.cdist(CENTRES, y) < 3 * DEVIATION
    return int((near.double().mean(1) >= 0.5 / len(CENTRES)).sum())


def num_rebounds(curve: Sequence[float], factor: float = 1.5) -> int:
    """Count how often a curve rises by a factor over its last valley, after as large a fall."""
    count, rising, extreme = 0, False, math.inf
    for value in curve:
        if value * factor < extreme if rising else value > factor * extreme:
            count, rising, extreme = count + (not rising), not rising, value
        extreme = max(extreme, value) if rising else min(extreme, value)
    return count


class Warp(nn.Module):
    """The identity plus a network: under random Fourier features, a learned kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.network = MLPFeatures(2, 2, (32, 32))

    def forward(self, x: Tensor) -> Tensor:
        """Map points (n, 2) to points (n, 2)."""
        return x + self.network(x)


class Ensemble(nn.Module):
    """Networks of one shape as one module, from (n, members, d) to (n, members, ...)."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = members  # a list is no submodule: only the stacked parameters train
        parameters, self.stacked_buffers = stack_module_state(list(members))
        self.names = list(parameters)
        self.stacked = nn.ParameterList(p.detach() for p in parameters.values())

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate every member on its column of x."""
        state = dict(zip(self.names, self.stacked, strict=True))
        return vmap(self._evaluate, in_dims=(0, 0, 1), out_dims=1)(state, self.stacked_buffers, x)

    def _evaluate(self, parameters: dict, buffers: dict, x: Tensor) -> Tensor:
        return functional_call(self.members[0], (parameters, buffers), (x,))

    def separate(self) -> Sequence[nn.Module]:
        """Write the parameters back into the members."""
        for i, member in enumerate(self.members):
            own = {n: p[i].detach() for n, p in zip(self.names, self.stacked, strict=True)}
            member.load_state_dict(own, strict=False)
        return self.members


@dataclass
class Run:
    """What is seen of one seed's game."""

    seed: int
    generator: nn.Module
    updates: list[int] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    path: list[Tensor] = field(default_factory=list)
    excursion: float = 0.0

    def record(self, update: int, y: Tensor, x: Tensor) -> None:
        """Keep MMD^2 of the game's own points, some samples, and how far out they have been."""
        self.updates.append(update)
        self.curve.append(mmd2_features(EVALUATION(x), EVALUATION(y)).item())
        self.path.append(y[:64])
        largest = y.abs().max().item()
        self.excursion = max(self.excursion, largest if math.isfinite(largest) else math.inf)


def start(seed: int, learned: bool) -> tuple[nn.Module, LearnedKernelCritic, Tensor, Tensor]:
    """Return generator, critic, latents and target of a seed, the same for every method."""
    torch.manual_seed(seed)
    generator = MLPGenerator(sample_dim=2, latent_dim=2, hidden=(32, 32))
    features = RandomFourierFeatures(Gaussian(1.0), 2, 256, seed=seed)
    critic = LearnedKernelCritic(Warp() if learned else nn.Identity(), 2, features)
    nn.init.zeros_(critic.weights)
    return generator, critic, normal_points(NUM_POINTS, seed), target_points(seed)


def ascend(
    seeds: Sequence[int],
    num_updates: int,
    alpha: float = ALPHA,
    beta: float = BETA,
    generator_lr: float = GENERATOR_LR,
    learned: bool = False,
) -> list[Run]:
    """Play with critics trained by gradient ascent, one step of plain SGD on either side in turn.

    The games of all seeds are played as one, with the sum of the critics as its critic: Lf is then
    the games' Lf in a row, penalties and norms add up, and the seeds do not feel each other.
    """
    members, members_critics, latents, targets = zip(
        *(start(s, learned) for s in seeds), strict=True
    )
    generator, critics = Ensemble(members), Ensemble(members_critics)
    z, x = torch.stack(latents, 1), torch.stack(targets, 1)
    runs = [Run(*pair) for pair in zip(seeds, members, strict=True)]
    weights = critics.stacked[critics.names.index("weights")]
    groups = [{"params": [weights]}]
    if learned:
        features = [p for p in critics.parameters() if p is not weights]
        groups.append({"params": features, "lr": FEATURES_LR})
    critic_optimizer = torch.optim.SGD(groups, lr=CRITIC_LR)
    generator_optimizer = torch.optim.SGD(generator.parameters(), lr=generator_lr)

    def critic(samples: Tensor) -> Tensor:
        return critics(samples).sum(1)

    for update in range(num_updates + 1):
        if update % max(1, num_updates // 50) == 0:
            for i, (run, y) in enumerate(zip(runs, generator(z).detach().unbind(1), strict=True)):
                run.record(update, y, x[:, i])
        if update == num_updates:
            break
        if alpha > 0:
            penalised = penalised_critic(critic, generator, [(z,)], "forward", estimator=Batch())
            values, penalty = penalised.values, penalised.penalty
        else:
            values, penalty = critic(generator(z).detach()), torch.zeros(())
        gap = critic(x).mean() - values.mean()
        loss = -gap + alpha / 2 * penalty + beta / 2 * weights.square().sum()
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()

        generator_optimizer.zero_grad()
        (-critic(generator(z)).mean()).backward(inputs=list(generator.parameters()))
        generator_optimizer.step()
    generator.separate()
    return runs


def solve(seeds: Sequence[int], num_updates: int, learned: bool = False) -> list[Run]:
    """Play with the critic in closed form, damping and step size by the gain ratio."""
    runs = []
    for seed in seeds:
        generator, critic, z, x = start(seed, learned)
        features, weights, run = critic.feature_map, None, Run(seed, generator)
        network = list(critic.features.parameters())  # empty for a fixed kernel
        optimizer = torch.optim.Adam(network, 1e-3, (0.0, 0.9)) if learned else None
        control = TrustRegion()
        for update in range(num_updates + 1):
            embedding = MeanEmbedding(features, z, generator)
            if update % max(1, num_updates // 50) == 0:
                run.record(update, embedding.samples.detach(), x)
            if update == num_updates:
                break
            target = features(x).mean(0).detach()
            solution = solve_embedding(
                embedding,
                target - embedding.mean,
                alpha=ALPHA,
                beta=BETA * control.damping,
                tolerance=0.03,
                max_iterations=30,
                initial=weights,
            )
            weights = solution.weights
            dt = 0.3 * ALPHA * control.trust
            before = parameters_to_vector(generator.parameters()).detach()
            vector_to_parameters(before + dt * solution.parametric_gradient, generator.parameters())
            after = (target - features(generator(z)).mean(0)).square().sum()
            realised = (solution.mmd2.item() - after.item()) / 2
            if not control.judge(realised, float(solution.model_decrease(dt)), 0.5 / 0.3):
                vector_to_parameters(before, generator.parameters())
            if optimizer is not None:  # ascent in the features, the weights held
                critic.weights.data.copy_(weights)
                gap = critic(x).mean() - critic(generator(z).detach()).mean()
                penalty = parametric_gradient_penalty(critic, generator, z)
                optimizer.zero_grad()
                (-gap + ALPHA / 2 * penalty).backward(inputs=network)
                optimizer.step()
        runs.append(run)
    return runs


METHODS: dict[str, Callable[..., list[Run]]] = {
    "alpha = 0": partial(ascend, alpha=0.0),
    "alpha = 100": ascend,
    "closed form": solve,
    "alpha = 0, learned": partial(ascend, alpha=0.0, learned=True),
    "alpha = 100, learned": partial(ascend, learned=True),
    "closed form, learned": partial(solve, learned=True),
    "alpha = 0, 30 beta": partial(
        ascend, alpha=0.0, beta=30 * BETA, generator_lr=10 * GENERATOR_LR
    ),
}


def held_out(run: Run, num_samples: int) -> dict[str, float | int]:
    """Compare fresh samples of a run's generator with fresh samples of the target."""
    torch.manual_seed(10_000 + run.seed)
    x = CENTRES.repeat_interleave(num_samples // 4, 0)
    x = x + DEVIATION * torch.randn(len(x), 2)
    with torch.no_grad():
        y = run.generator(torch.randn(num_samples, 2))
    phi_x, phi_y = EVALUATION(x), EVALUATION(y)
    row = {"seed": run.seed, "mmd2_unbiased": mmd2_features(phi_x, phi_y, unbiased=True).item()}
    row |= {"mmd2_biased": mmd2_features(phi_x, phi_y).item(), "mmd2_own_points": run.curve[-1]}
    row |= {"modes": num_modes_found(y), "largest_excursion": run.excursion}
    return {**row, "rebounds": num_rebounds(run.curve)}


def summarise(method: str, rows: Sequence[dict], seconds: float) -> dict[str, str | float | int]:
    """Return quartiles, in which a run that is not finite counts as infinite, and failures."""

    def quantiles(key: str, *levels: float) -> list[float]:
        values = torch.tensor([row[key] for row in rows], dtype=torch.float64).nan_to_num(torch.inf)
        at = torch.tensor(levels, dtype=torch.float64)
        return values.quantile(at, interpolation="midpoint").nan_to_num(torch.inf).tolist()

    q1, median, q3 = quantiles("mmd2_unbiased", 0.25, 0.5, 0.75)
    covering = sum(row["modes"] == len(CENTRES) for row in rows)
    return {
        "method": method,
        "mmd2_median": median,
        "mmd2_q1": q1,
        "mmd2_q3": q3,
        "own_points_median": quantiles("mmd2_own_points", 0.5)[0],
        "rebounds_median": quantiles("rebounds", 0.5)[0],
        "covers_all": covering,
        "failures": len(rows) - covering,
        "not_finite": sum(not math.isfinite(row["mmd2_unbiased"]) for row in rows),
        "cpu_seconds": round(seconds),
    }


def main(
    seeds: Sequence[int] = range(10),
    num_updates: int = 1000,
    num_closed_updates: int = 90,
    num_held_out: int = 32768,
    methods: Sequence[str] = tuple(METHODS),
    directory: Path = Path(__file__).parent,
) -> dict[str, list[dict]]:
    """Play, print, save tables and figure; return the tables."""
    columns = len(methods)
    figure = new_figure(2.3 * columns, 4.6)
    panels = figure.subplots(2, columns, squeeze=False)
    rows, summaries = [], []
    for method, (samples_axes, curve_axes) in zip(methods, panels.T, strict=True):
        play, begin = METHODS[method], time.process_time()
        in_closed_form = play is solve or getattr(play, "func", None) is solve
        runs = play(seeds, num_closed_updates if in_closed_form else num_updates)
        seconds = time.process_time() - begin
        own = [{"method": method, **held_out(run, num_held_out)} for run in runs]
        rows += own
        summaries.append(summarise(method, own, seconds))

        path = torch.stack(runs[0].path).numpy()
        samples_axes.plot(*target_points(0).T, ".", color="0.8", ms=2)
        samples_axes.plot(path[..., 0], path[..., 1], color="tab:blue", lw=0.4, alpha=0.5)
        samples_axes.plot(*path[-1].T, "o", color="tab:red", ms=2.2)
        samples_axes.set(title=method, xlim=(-4, 4), ylim=(-4, 4), aspect="equal")
        samples_axes.set(xticks=[], yticks=[])
        for run in runs:
            curve_axes.semilogy(run.updates, run.curve, color="tab:blue", lw=0.8, alpha=0.6)
        curve_axes.set(ylim=(3e-7, 3), xlabel="updates")
        curve_axes.spines[["top", "right"]].set_visible(False)
    panels[1, 0].set(ylabel="MMD$^2$ of the game's points")
    panels[0, 0].set(ylabel="samples, seed 0")
    save_figure(figure, directory / "figures/mixture_of_gaussians.png", dpi=90)
    save_table(rows, directory / "results/mixture_of_gaussians.csv")
    save_table(summaries, directory / "results/mixture_of_gaussians_summary.csv")
    return {"runs": rows, "summary": summaries}


if __name__ == "__main__":
    main()
