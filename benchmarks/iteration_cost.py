"""What one training iteration costs: penalties and witness solves against none, R1 and WGAN-GP.

python benchmarks/iteration_cost.py
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dcgan
import torch
from flops import Flops
from jsonargparse import auto_cli
from loops import (
    Pair,
    Penalise,
    adversarial_iteration,
    adversarial_pair,
    closed_form_pair,
    closed_form_update,
    critic_step,
    generator_step,
    no_penalty,
    ours,
    r1,
    wgan_gp,
)
from meters import interleaved_seconds, peak_memory, ratio
from torch import Tensor

from lightning_mmd import Lagged, LearnedKernelCritic, Split

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from reporting import save_table

PENALTIES: dict[str, Penalise] = {
    "none": no_penalty,
    "R1": r1,
    "WGAN-GP": wgan_gp,
    "forward": ours(),
    "double backward": ours(method="double_backward"),
    "finite difference": ours(method="finite_difference"),
    "forward, split": ours(estimator=Split()),
    "forward, lagged": ours(estimator=Lagged()),
}
INTERVAL = 4


def every_fourth(pair: Pair, real: Tensor, z: list[Tensor]) -> None:
    """Four iterations, the first with the lagged penalty."""
    for k in range(INTERVAL):
        penalty = PENALTIES["forward, lagged"] if k == 0 else no_penalty
        adversarial_iteration(pair, penalty, real, z)


def flops(run: Callable[[], Any]) -> int:
    """Return the FLOPs of a call."""
    with Flops() as counter:
        run()
    return counter.total


def main(
    width: int = 64,
    batch_size: int = 64,
    num_features: int = 128,
    repeats: int = 4,
    directory: Path = Path(__file__).parent / "results",
) -> list[dict[str, Any]]:
    """Measure FLOPs, processor time (interleaved) and peak memory of an iteration, and save them.

    Args:
        width: Channels of the networks' largest feature maps; 64 is the DCGAN.
        batch_size: Images of a batch.
        num_features: Length r of the critic's features.
        repeats: Turns of the timing.
        directory: Where the table goes.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    real = torch.rand(batch_size, 3, 32, 32) * 2 - 1
    z = list(torch.randn(2, batch_size, 128))

    def networks() -> tuple[torch.nn.Module, LearnedKernelCritic]:
        torch.manual_seed(1)
        features = dcgan.features(width, num_features)
        return dcgan.generator(width), LearnedKernelCritic(features, num_features)

    steps: dict[str, Callable[[], Any]] = {}  # what the memory and the critic's FLOPs are of
    iterations: dict[str, Callable[[], Any]] = {}
    num_iterations = {}
    for name, penalty in PENALTIES.items():
        pair = adversarial_pair(*networks())
        generator_step(pair, z[1])  # the lagged penalty has a direction, the optimizers a state
        steps[name] = partial(critic_step, pair, penalty, real, z[0])
        iterations[name] = partial(adversarial_iteration, pair, penalty, real, z)
        if name == "forward, lagged":
            name = f"forward, lagged, every {INTERVAL}th"
            iterations[name] = partial(every_fourth, pair, real, z)
            num_iterations[name] = INTERVAL
    for k in (3, 1):
        pair = closed_form_pair(*networks())
        name = f"closed form, {k} CG iteration" + "s" * (k > 1)
        update = partial(closed_form_update, pair, real, z[0], k, tolerance=1e-12)
        update()  # the next ones start warm
        iterations[name] = steps[name] = update
    for run in iterations.values():
        run()

    counts = {n: flops(run) / num_iterations.get(n, 1) for n, run in iterations.items()}
    critic = {n: flops(run) for n, run in steps.items() if n in PENALTIES}
    memory = {n: peak_memory(run) for n, run in steps.items()}
    seconds = interleaved_seconds(iterations, repeats)
    seconds = {n: [s / num_iterations.get(n, 1) for s in v] for n, v in seconds.items()}
    rows = []
    for name in iterations:
        row: dict[str, Any] = {"iteration": name}
        row["critic_step"] = critic[name] / critic["none"] if name in critic else "-"
        row["GFLOP"] = counts[name] / 1e9
        row["FLOPs"] = counts[name] / counts["none"]
        row["of_penalised"] = counts[name] / counts["forward"]
        row |= ratio(seconds[name], seconds["none"])
        row["peak_MiB"] = memory[name] / 2**20 if name in memory else "-"
        rows.append(row)
    save_table(rows, directory / "iteration_cost.csv")
    return rows


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
