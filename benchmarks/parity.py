"""Gradients of W processes against those of one process on the concatenated batch.

    python benchmarks/parity.py

Every row trains `MMDGAN` by Lightning's own ``strategy="ddp"``, with optimizers that do not move,
and compares what they are given (after the reduction over processes) and the metric that
`MMDTracker` logs. The rows "rank-local penalty" are what one gets without care: every process
penalises the gradient on its own share of the batch.
"""

import argparse
import dataclasses
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_mmd import (
    MMDGAN,
    Batch,
    ClosedForm,
    Game,
    Gaussian,
    GradientAscent,
    Lagged,
    LearnedKernelCritic,
    MMDTracker,
    Processes,
    Split,
    UpdateRule,
)
from lightning_mmd.networks import ConvFeatures, ConvGenerator

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from reporting import save_table

RESULTS = Path(__file__).parent / "results"
SHAPE, LATENT_DIM, NUM_FEATURES, BATCH = (1, 8, 8), 8, 32, 64


class RankLocal(GradientAscent):
    """The naive penalty: no process knows of the others' gradients."""

    def _on_penalised(self, game: Game, *arguments: Any) -> Any:
        alone = dataclasses.replace(game, processes=Processes())
        return super()._on_penalised(alone, *arguments)


@dataclass(frozen=True)
class Case:
    """A configuration, and the gradients of it that a row of the table is about."""

    name: str
    gradients: tuple[str, ...] = ("critic", "generator")
    rule: UpdateRule = field(default_factory=ClosedForm)
    promised: bool = True


def _penalised(**options: Any) -> GradientAscent:
    return GradientAscent(**({"beta": 0.0, "estimator": Batch(), "share_samples": False} | options))


CASES = [
    Case("critic loss", rule=GradientAscent(alpha=0.0, beta=0.0)),
    Case("critic loss, RKHS norm", rule=GradientAscent(alpha=0.0, beta=1.0)),
    Case("penalty, forward", ("critic",), _penalised()),
    Case("penalty, double_backward", ("critic",), _penalised(method="double_backward")),
    Case("penalty, split", ("critic",), _penalised(estimator=Split())),
    Case("penalty, lagged", ("critic",), _penalised(estimator=Lagged())),
    Case("witness direction L f", ("generator",), ClosedForm(beta=0.1)),
    Case("witness features", ("critic",), ClosedForm(beta=0.1)),
    Case("MMD^2 (MMDTracker)", ("mmd2",), ClosedForm(beta=0.1)),
    Case("rank-local penalty", ("critic",), RankLocal(beta=0.0, estimator=Batch()), promised=False),
]


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(batch: Tensor) -> Tensor:
    """Return this process's share: its part of each half, as the split estimator sees halves."""
    rank, world = rank_and_world()
    return torch.cat([half.tensor_split(world)[rank] for half in batch.chunk(2)])


class Latents:
    """Latents of which W processes draw between them what one process draws."""

    def __init__(self) -> None:
        self.draws = 0

    def __call__(self, num: int) -> Tensor:
        """Return this process's `num` of the next draw."""
        self.draws += 1
        rng = torch.Generator().manual_seed(self.draws)
        shape = (num * rank_and_world()[1], LATENT_DIM)
        return share(torch.randn(shape, dtype=torch.float64, generator=rng))


class Images(LightningDataModule):
    """One batch of made images, shared among the processes, and held-out ones."""

    def _draw(self, seed: int, num: int) -> Tensor:
        return torch.randn(num, *SHAPE, generator=torch.Generator().manual_seed(seed)).tanh()

    def train_dataloader(self) -> DataLoader:
        """Return two equal batches."""
        batches: Any = [share(self._draw(1, BATCH))] * 2
        return DataLoader(batches, batch_size=None)

    def val_dataloader(self) -> DataLoader:
        """Return held-out images one by one."""
        images: Any = self._draw(2, BATCH)
        return DataLoader(images, batch_size=BATCH)


class Recorder(Callback):
    """Keeps the gradients that the optimizers were given last."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Listen to the optimizers."""
        self.values: dict[str, Tensor] = {}
        for name, optimizer in zip(("generator", "critic"), trainer.optimizers, strict=True):
            optimizer.register_step_pre_hook(lambda o, *_, name=name: self._record(name, o))

    def _record(self, name: str, optimizer: Any) -> None:
        parameters = optimizer.param_groups[0]["params"]
        self.values[name] = torch.cat([p.grad.flatten() for p in parameters])


def measure(
    case: Case, world: int, dtype: torch.dtype, directory: Path, strategy: Any = "ddp_fork"
) -> dict[str, Tensor]:
    """Return the gradients and the metric of one configuration on `world` processes."""
    torch.manual_seed(0)
    features = ConvFeatures(SHAPE, NUM_FEATURES, channels=(8, 16))
    model = MMDGAN(
        ConvGenerator(SHAPE, LATENT_DIM, channels=(16, 8)),
        LearnedKernelCritic(features, NUM_FEATURES),
        generator_optimizer=_still,
        critic_optimizer=_still,
        rule=case.rule,
        latents=LATENT_DIM if "mmd2" in case.gradients else Latents(),
    )
    recorder = Recorder()
    tracker = MMDTracker(Gaussian(5.0), num_real=BATCH, num_fake=BATCH, floor=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=strategy,
        precision="64-true" if dtype == torch.float64 else "32-true",
        max_steps=2,
        limit_val_batches=0,
        callbacks=[recorder, tracker] if "mmd2" in case.gradients else [recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=directory,
    )
    path = directory / "values.pt"
    recorder.on_fit_end = lambda *_: _save(recorder, tracker, path)  # the processes end with fit
    trainer.fit(model, datamodule=Images())
    return torch.load(path)


def _save(recorder: Recorder, tracker: MMDTracker, path: Path) -> None:
    if tracker.history:
        recorder.values["mmd2"] = torch.tensor([tracker.history[0]["mmd2"]], dtype=torch.float64)
    if rank_and_world()[0] == 0:
        torch.save(recorder.values, path)


def _still(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0)


def errors(
    case: Case, worlds: Sequence[int], dtype: torch.dtype, directory: Path
) -> Iterator[tuple[int, float]]:
    """Yield numbers of processes and the largest relative error of a case."""
    one = measure(case, 1, dtype, directory, strategy="auto")
    for world in worlds:
        many = measure(case, world, dtype, directory)
        differences = [
            (many[name] - one[name]).norm() / one[name].norm() for name in case.gradients
        ]
        yield world, float(max(differences))


def main(worlds: Sequence[int] = (1, 2, 4), output: Path = RESULTS) -> list[dict[str, Any]]:
    """Measure every case, print the table, save it, and return it."""
    rows = []
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in CASES:
            row: dict[str, Any] = {"quantity": case.name}
            for dtype in (torch.float64, torch.float32):
                for world, error in errors(case, worlds, dtype, Path(directory)):
                    row[f"{str(dtype)[6:]} W={world}"] = float(f"{error:.2g}")
            rows.append(row)
    save_table(rows, output / "parity.csv")
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    main(output=parser.parse_args().output)
