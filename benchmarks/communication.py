"""What two processes send each other in a step, and what the step costs each of them.

    python benchmarks/communication.py

Plain ``ddp`` on gloo, half a batch each, against one process with the whole batch. Bytes are those
that a process hands to collectives, seen by torch's dispatcher; a plain pair trained on ``ddp``
would send its gradients, 4 (P_G + P_C) bytes.
"""

import json
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import dcgan
import torch
from jsonargparse import auto_cli
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_mmd import (
    MMDGAN,
    Batch,
    ClosedForm,
    GradientAscent,
    Lagged,
    LearnedKernelCritic,
    Split,
    UpdateRule,
)

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from reporting import save_table

RULES: dict[str, UpdateRule] = {
    "adversarial, no penalty": GradientAscent(alpha=0.0),
    "adversarial, batch": GradientAscent(estimator=Batch()),
    "adversarial, split": GradientAscent(estimator=Split()),
    "adversarial, lagged": GradientAscent(estimator=Lagged()),
    "closed form, 3 CG iterations": ClosedForm(tolerance=1e-9),
    "closed form, 1 CG iteration": ClosedForm(tolerance=1e-9, max_iterations=1),
}


class Collectives(TorchDispatchMode):
    """Count the collective calls and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run an operation and count it if it is a collective with tensors."""
        if func.namespace == "c10d" and args and isinstance(args[0], list):
            self.calls += 1
            self.bytes += sum(t.nbytes for t in args[0] if isinstance(t, Tensor))
        return func(*args, **(kwargs or {}))


class StepCosts(Callback):
    """Write processor and wall time of each step, and the messages of the last, to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.processor: list[float] = []
        self.wall: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        self.collectives = None
        if trainer.global_step == trainer.max_steps - 1:  # counted, not timed
            self.collectives = Collectives()
            self.collectives.__enter__()
        self.begin = time.process_time(), time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:  # noqa: D102
        if self.collectives is None:
            self.processor.append(time.process_time() - self.begin[0])
            self.wall.append(time.perf_counter() - self.begin[1])
            return
        self.collectives.__exit__(None, None, None)
        if trainer.global_rank == 0:
            costs = {"messages": self.collectives.calls, "bytes": self.collectives.bytes}
            costs |= {"ms": 1000 * median(self.processor[1:])}
            costs |= {"wall_ms": 1000 * median(self.wall[1:])}
            self.path.write_text(json.dumps(costs))


def measure(
    rule: UpdateRule, width: int, batch_size: int, num_steps: int, devices: int
) -> dict[str, Any]:
    """Train; return the costs of a step in the first process, and the networks' sizes."""
    torch.manual_seed(0)
    images = torch.rand(batch_size * num_steps, 3, 32, 32) * 2 - 1
    critic = LearnedKernelCritic(dcgan.features(width, 128), 128)
    model = MMDGAN(dcgan.generator(width), critic, rule, latents=128)
    sizes = [sum(p.numel() for p in net.parameters()) for net in (model.generator, critic)]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "costs.json"
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            max_steps=num_steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[StepCosts(path)],
        )
        trainer.fit(model, DataLoader(images, batch_size=batch_size // devices))
        return json.loads(path.read_text()) | {"generator": sizes[0], "critic": sizes[1]}


def main(
    width: int = 32,
    batch_size: int = 32,
    num_steps: int = 5,
    directory: Path = Path(__file__).parent / "results",
) -> list[dict[str, Any]]:
    """Measure one and two processes, print and save the table.

    Args:
        width: Channels of the networks' largest feature maps.
        batch_size: Images of a whole batch.
        num_steps: Steps of each training; the first is not timed, the last is counted.
        directory: Where the table goes.
    """
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    rows = []
    for name, rule in RULES.items():
        one, two = (measure(rule, width, batch_size, num_steps, n) for n in (1, 2))
        gradients = 4 * (two["generator"] + two["critic"])
        row = {"iteration": name, "P_G": two["generator"], "P_C": two["critic"]}
        row |= {"messages": two["messages"], "MB": two["bytes"] / 1e6}
        row |= {"of_gradients": two["bytes"] / gradients}
        row |= {"one_ms": one["ms"], "two_ms": two["ms"], "share": two["ms"] / one["ms"]}
        row |= {"wall_one_ms": one["wall_ms"], "wall_two_ms": two["wall_ms"]}
        rows.append(row)
    save_table(rows, directory / "communication.csv")
    return rows


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
