"""What Lightning and MMDGAN add to the same iteration written by hand.

    python benchmarks/framework_tax.py

Both take turns step by step in one process, on the same images and latents, and must end with the
same parameters. The time of a step under the Trainer is all that passes until the next one.
"""

import copy
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dcgan
import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, Trainer
from loops import (
    Pair,
    adversarial_iteration,
    adversarial_pair,
    by_hand,
    closed_form_pair,
    closed_form_update,
    no_penalty,
)
from meters import ratio
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mmd import MMDGAN, Batch, ClosedForm, GradientAscent, LearnedKernelCritic, UpdateRule

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from reporting import save_table

RULES: dict[str, UpdateRule] = {
    "adversarial, no penalty": GradientAscent(alpha=0.0, share_samples=False),
    "adversarial, forward": GradientAscent(alpha=1.0, estimator=Batch(), share_samples=False),
    "closed form, 3 CG iterations": ClosedForm(alpha=1.0),
}


class Bank:
    """Latents for every draw of a training, in a fixed order."""

    def __init__(self, num_draws: int, batch_size: int) -> None:
        self.latents = torch.randn(num_draws, batch_size, 128)
        self.remaining = iter(self.latents)

    def __call__(self, num: int) -> Tensor:
        """Return the next latents; fewer than a batch are for the checks before training."""
        whole = num == self.latents.shape[1]
        return next(self.remaining) if whole else self.latents[0, :num]


class TakeTurns(Callback):
    """After each step of the Trainer, make and time one by hand."""

    def __init__(self, by_hand: Callable[[Tensor], None], batches: Iterator[Tensor]) -> None:
        self.by_hand, self.batches = by_hand, batches
        self.trainer_seconds: list[float] = []
        self.hand_seconds: list[float] = []
        self.begin = 0.0

    def on_train_batch_end(self, *_: Any) -> None:  # noqa: D102
        middle = time.process_time()
        self.by_hand(next(self.batches))
        end = time.process_time()
        self.trainer_seconds.append(middle - self.begin)
        self.hand_seconds.append(end - middle)
        self.begin = end


def compare(
    name: str, width: int, batch_size: int, num_features: int, num_steps: int
) -> dict[str, Any]:
    """Train both ways; return times, their ratio and the distance of the parameters at the end."""
    rule = RULES[name]
    alpha = rule.alpha
    torch.manual_seed(0)
    images = torch.rand(num_steps, batch_size, 3, 32, 32) * 2 - 1
    closed = isinstance(rule, ClosedForm)
    bank = Bank(num_steps * (1 if closed else 2), batch_size)
    features = dcgan.features(width, num_features)
    critic = LearnedKernelCritic(features, num_features)
    generator = dcgan.generator(width)
    build = closed_form_pair if closed else adversarial_pair
    pair = build(*copy.deepcopy((generator, critic)), alpha=alpha)
    hand_latents = iter(bank.latents.clone())

    def step(real: Tensor) -> None:
        if closed:
            closed_form_update(pair, real, next(hand_latents), 3)
        else:
            loss = by_hand if alpha else no_penalty
            adversarial_iteration(pair, loss, real, [next(hand_latents), next(hand_latents)])

    model = MMDGAN(generator, critic, rule, latents=bank)
    turns = TakeTurns(step, iter(DataLoader(images, batch_size=None)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            max_steps=num_steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[turns],
        )
        trainer.fit(model, DataLoader(images, batch_size=None))
    trainer_seconds, hand_seconds = turns.trainer_seconds[2:], turns.hand_seconds[2:]
    tax = ratio(trainer_seconds, hand_seconds, "ratio")
    total = sum(trainer_seconds) / sum(hand_seconds)
    hand_ms = 1000 * sum(hand_seconds) / len(hand_seconds)
    row = {"iteration": name, "steps": len(hand_seconds), "hand_ms": hand_ms, "total_ratio": total}
    return row | tax | {"difference": _distance(model, pair)}


def _distance(model: MMDGAN, pair: Pair) -> float:
    ours = [*model.generator.parameters(), *model.critic.parameters()]
    theirs = [*pair.generator.parameters(), *pair.critic.parameters()]
    a, b = (torch.cat([p.detach().reshape(-1) for p in side]) for side in (ours, theirs))
    return float((a - b).norm() / b.norm())


def main(
    width: int = 64,
    batch_size: int = 64,
    num_features: int = 128,
    num_steps: int = 20,
    directory: Path = Path(__file__).parent / "results",
) -> list[dict[str, Any]]:
    """Compare the steps of MMDGAN under the Trainer with those of a plain loop.

    Args:
        width: Channels of the networks' largest feature maps; 64 is the DCGAN.
        batch_size: Images of a batch.
        num_features: Length r of the critic's features.
        num_steps: Steps of each; the first two are not timed.
        directory: Where the table goes.
    """
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = [compare(name, width, batch_size, num_features, num_steps) for name in RULES]
    save_table(rows, directory / "framework_tax.csv")
    return rows


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
