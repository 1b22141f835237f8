"""What torch.compile saves in an iteration, and which penalties it refuses.

    python benchmarks/compiled.py

Networks are compiled as a user would, ``generator.compile()`` and ``critic.compile()``. Compiled
code has no second derivative: torch refuses R1 as one writes it by hand. This package's penalties,
the input-gradient penalty of WGAN-GP among them, find the uncompiled code where they need it.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dcgan
import torch
from iteration_cost import PENALTIES
from jsonargparse import auto_cli
from loops import (
    Pair,
    adversarial_iteration,
    adversarial_pair,
    closed_form_pair,
    closed_form_update,
    generator_step,
)
from meters import interleaved_seconds, ratio
from torch import Tensor

from lightning_mmd import LearnedKernelCritic

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from reporting import save_table

REFUSALS = ("does not currently support double backward", "requires create_graph=False")


def make_pair(
    build: Callable[..., Pair], width: int, num_features: int, backend: str | None
) -> Pair:
    """Build a pair, its networks compiled if a backend is named."""
    torch.manual_seed(1)
    generator = dcgan.generator(width)
    critic = LearnedKernelCritic(dcgan.features(width, num_features), num_features)
    pair = build(generator, critic)
    if backend is not None:
        generator.compile(backend=backend)
        critic.compile(backend=backend)
    return pair


def runs(pair: Pair, real: Tensor, z: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """Return the iterations of an adversarial pair by the name of their penalty."""
    generator_step(pair, z[1])  # the lagged penalty has a direction, the optimizers a state
    return {
        name: partial(adversarial_iteration, pair, penalty, real, z)
        for name, penalty in PENALTIES.items()
    }


def refused(run: Callable[[], Any]) -> bool:
    """Run once; return whether torch refuses to differentiate compiled code twice."""
    try:
        run()
    except RuntimeError as error:
        if not any(text in str(error) for text in REFUSALS):
            raise
        return True
    return False


def main(
    width: int = 64,
    batch_size: int = 64,
    num_features: int = 128,
    repeats: int = 4,
    backend: str = "inductor",
    directory: Path = Path(__file__).parent / "results",
) -> list[dict[str, Any]]:
    """Time every iteration eager and compiled, in turns, and save the ratios.

    Args:
        width: Channels of the networks' largest feature maps; 64 is the DCGAN.
        batch_size: Images of a batch.
        num_features: Length r of the critic's features.
        repeats: Turns of the timing.
        backend: Of torch.compile.
        directory: Where the table goes.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    real = torch.rand(batch_size, 3, 32, 32) * 2 - 1
    z = list(torch.randn(2, batch_size, 128))
    iterations = []
    for chosen in (None, backend):
        pair = make_pair(adversarial_pair, width, num_features, chosen)
        closed = make_pair(closed_form_pair, width, num_features, chosen)
        update = partial(closed_form_update, closed, real, z[0], 3, tolerance=1e-12)
        iterations.append(runs(pair, real, z) | {"closed form, 3 CG iterations": update})
    eager, compiled = iterations
    rows = []
    for name in eager:
        eager[name]()
        if refused(compiled[name]):
            rows.append({"iteration": name, "time": "refused", "time_min": "-", "time_max": "-"})
            continue
        pairs = {"eager": eager[name], "compiled": compiled[name]}
        seconds = interleaved_seconds(pairs, repeats)
        rows.append({"iteration": name} | ratio(seconds["compiled"], seconds["eager"]))
    save_table(rows, directory / "compiled.csv")
    return rows


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
