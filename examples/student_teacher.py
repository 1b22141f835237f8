r"""A student of many particles learns a teacher: without noise it rests, with noise it arrives.

    python examples/student_teacher.py                # two minutes
    python examples/student_teacher.py --full true    # the published size, more than an hour

The experiment of Arbel et al. (arXiv 1906.04370). The teacher is one particle, the student the mean
of many, phi_w(x) = exp(-(w_2 . relu(W_1 x))^2 / 4), so that

    1/2 mean_x (y(x) - 1/m sum_i phi_i(x))^2 = 1/2 MMD^2

in the kernel k(w, w') = mean_x phi_w(x) phi_w'(x) between the distributions of the weights. As in
the authors' code, particles share one hidden layer, and fresh N(0, 1) noise enters where the
gradient is evaluated and nowhere else. In full, sizes, initial weights, learning rate and noise
(its level starts at 1 and is halved every tenth of the run) are theirs too. The scaled game has
fewer particles, more inputs, a longer step, and noise of level 0.15 for the first 7 tenths.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import auto_cli
from reporting import new_figure, save_figure, save_table
from torch import Tensor

from lightning_mmd.noise import ConstantNoise, HalvingNoise, NoiseSchedule

WIDTH = 2.0  # of the output's bump
HIDDEN = 3  # units of the teacher, and of the student for each particle


@dataclass(frozen=True)
class Sizes:
    """How large a game is.

    Args:
        dimension: Of the inputs, which are uniform on the sphere.
        num_particles: Of the student.
        num_hidden: Hidden units of the student, shared by its particles.
        num_inputs: Number of training inputs, and of held-out ones.
        batch_size: Of a step.
        num_epochs: Passes over the training inputs.
        learning_rate: Of a step.
    """

    dimension: int
    num_particles: int
    num_hidden: int
    num_inputs: int
    batch_size: int
    num_epochs: int
    learning_rate: float = 0.1


FULL = Sizes(50, 1000, HIDDEN * 1000, 1000, 100, 10_000)
SCALED = Sizes(50, 400, HIDDEN * 400, 3000, 100, 300, learning_rate=0.3)


def schedule(full: bool, num_epochs: int) -> NoiseSchedule:
    """Return the level of the noise by epochs."""
    if full:
        return HalvingNoise(1.0, every=max(1, num_epochs // 10))
    return ConstantNoise(0.15, until=round(0.7 * num_epochs))


def particles(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Evaluate every particle at inputs (n, d): (n, m)."""
    first, second = weights
    return torch.exp(-((torch.relu(x @ first.T) @ second.T) ** 2) / WIDTH**2)


def sphere(num: int, dimension: int) -> Tensor:
    """Draw from the uniform distribution on the unit sphere."""
    return torch.nn.functional.normalize(torch.randn(num, dimension))


class Noise:
    r"""The noise V of the second layer's weights, m x h, by its products with a batch alone.

    With hidden units H (n, h) a step needs H V^T and, for a matrix S of slopes that depends on it,
    S V. These are drawn exactly with n m + n h random numbers in place of m h: with H H^T = R R^T
    and Q = R^-1 H, whose rows are orthonormal, H V^T = R Z; given it, V = Z^T Q + V (I - Q^T Q),
    and the second part is independent of Z.

    Args:
        hidden: H.
        num_particles: m.
    """

    def __init__(self, hidden: Tensor, num_particles: int) -> None:
        root = _root(hidden @ hidden.T)
        self._hidden = hidden
        self._basis = torch.linalg.solve_triangular(root, hidden, upper=False)
        self._normal = torch.randn(len(hidden), num_particles).to(hidden)
        self.forward = root @ self._normal  # H V^T

    def backward(self, slopes: Tensor) -> Tensor:
        """Return S V of shape (n, h)."""
        rest = _root(slopes @ slopes.T) @ torch.randn_like(self._hidden)
        rest -= (rest @ self._basis.T) @ self._basis
        return (slopes @ self._normal.T) @ self._basis + rest


def _root(gram: Tensor) -> Tensor:
    """Return a Cholesky factor, of a matrix that may be singular to rounding."""
    jitter = 1e-6 * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny
    return torch.linalg.cholesky(gram + jitter * torch.eye(len(gram)).to(gram))


@dataclass
class Game:
    """Weights and data of a seed.

    Args:
        seed: Which.
        sizes: How large.
    """

    seed: int
    sizes: Sizes

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        d, hidden = self.sizes.dimension, self.sizes.num_hidden
        teacher = [torch.randn(HIDDEN, d), torch.randn(1, HIDDEN)]
        self.inputs = [sphere(self.sizes.num_inputs, d) for _ in range(2)]
        self.outputs = [particles(x, teacher)[:, 0] for x in self.inputs]
        first, second = torch.randn(hidden, d), torch.randn(self.sizes.num_particles, hidden)
        self.weights = [first + 1e-3, second + 1e-3]

    def energy(self, held_out: bool = True) -> float:
        """Return F = 1/2 MMD^2 on held-out or training inputs."""
        x, y = self.inputs[held_out], self.outputs[held_out]
        return float((y - particles(x, self.weights).mean(1)).square().mean() / 2)

    def step(self, x: Tensor, y: Tensor, level: float) -> None:
        """Move every weight down the gradient of F, evaluated at weights with noise.

        The gradient is m / 2 times that of F in the weights, that of a particle's own witness.
        """
        first, second = self.weights
        gap = particles(x, self.weights).mean(1) - y  # of the weights without noise
        hidden = torch.relu(
            x @ torch.randn_like(first).mul_(level).add_(first).T if level else x @ first.T
        )
        inner = hidden @ second.T
        noise = Noise(hidden, len(second)) if level else None
        if noise is not None:
            inner += level * noise.forward
        slope = gap[:, None] / (2 * len(x)) * torch.exp(-((inner / WIDTH) ** 2))
        slope *= -2 * inner / WIDTH**2
        back = slope @ second
        if noise is not None:
            back += level * noise.backward(slope)
        second.addmm_(slope.T, hidden, alpha=-self.sizes.learning_rate)
        first.addmm_((back * (hidden > 0)).T, x, alpha=-self.sizes.learning_rate)

    @torch.no_grad()
    def play(self, noise: NoiseSchedule) -> Iterator[tuple[int, float]]:
        """Train; yield epoch and F on held-out inputs, a hundred times."""
        x, y = self.inputs[0], self.outputs[0]
        for epoch in range(self.sizes.num_epochs + 1):
            if epoch % max(1, self.sizes.num_epochs // 100) == 0:
                yield epoch, self.energy()
            order = torch.randperm(len(x))
            for part in order.split(self.sizes.batch_size):
                self.step(x[part], y[part], noise.level(epoch))


def main(
    full: bool = False,
    seeds: int = 1,
    num_epochs: int | None = None,
    directory: Path = Path(__file__).parent,
) -> list[dict[str, object]]:
    """Train with and without noise; print and save the table and the curves.

    Args:
        full: The published size, for seed 0 alone.
        seeds: Number of seeds of the scaled game.
        num_epochs: Passes over the training inputs; default: 10,000 in full, 300 scaled.
        directory: Where results go.
    """
    sizes = FULL if full else SCALED
    if num_epochs is not None:
        sizes = Sizes(**(vars(sizes) | {"num_epochs": num_epochs}))
    torch.set_flush_denormal(True)  # tails of the bump underflow, and slow products down threefold
    name = "student_teacher_full" if full else "student_teacher"
    figure = new_figure(5.5, 3.4)
    axes = figure.subplots()
    rows, curves = [], []
    for seed in [0] if full else range(seeds):
        noises = {"with noise": schedule(full, sizes.num_epochs), "without noise": ConstantNoise(0)}
        for label, noise in noises.items():
            begin = time.process_time()
            game, curve = Game(seed, sizes), []
            for epoch, energy in game.play(noise):
                curve.append((epoch, energy))
                curves.append({"seed": seed, "run": label, "epoch": epoch, "F": energy})
                if full:
                    print(f"{label}, epoch {epoch}: {energy:.3g}", flush=True)
            start, end = curve[0][1], curve[-1][1]
            row: dict[str, object] = {"seed": seed, "run": label, "F_start": start, "F_end": end}
            row |= {"training_F_end": game.energy(held_out=False), "end/start": end / start}
            rows.append(row | {"cpu_seconds": round(time.process_time() - begin)})
            colour = {"without noise": "C3", "with noise": "C0"}[label]
            shown = label if seed == 0 else None
            axes.semilogy(*zip(*curve, strict=True), color=colour, lw=1, label=shown)
    axes.set(xlabel="epochs", ylabel=r"$\frac{1}{2}$ MMD$^2$ on held-out inputs")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save_figure(figure, directory / f"figures/{name}.png")
    save_table(rows, directory / f"results/{name}.csv")
    if full:
        save_table(curves, directory / f"results/{name}_curve.csv")
    return rows


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
