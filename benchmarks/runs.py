"""One training by its configuration: MMD^2 against updates, images, seconds and FLOPs."""

import json
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flops import Flops
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from lightning_mmd import MMDGAN, MMDTracker
from lightning_mmd.cli import MMDCLI

ROOT = Path(__file__).parent.parent
QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=0",
]


@dataclass
class Run:
    """A finished or failed training.

    Attributes:
        steps: Generator updates at which MMD^2 was measured.
        mmd2: Its values; the last is infinite if the training stopped with an error.
        seconds_per_update: Processor time of an update, without measurements: wall time, where the
            process has one thread and a core of its own.
        images_per_update: Real images of an update.
        flops_per_update: FLOPs of an update by torch's formulas.
        error: The message of a training that stopped, or an empty text.
    """

    steps: list[int] = field(default_factory=list)
    mmd2: list[float] = field(default_factory=list)
    seconds_per_update: float = 0.0
    images_per_update: float = 0.0
    flops_per_update: float = 0.0
    error: str = ""

    def first_below(self, level: float) -> int | None:
        """Return the update from which all measured values are below a level, or None."""
        answer = None
        for step, value in zip(reversed(self.steps), reversed(self.mmd2), strict=True):
            if not value < level:
                break
            answer = step
        return answer

    @property
    def failed(self) -> bool:
        """Whether MMD^2 did not end below a tenth of its start."""
        return not self.mmd2[-1] < self.mmd2[0] / 10


class Meter(Callback):
    """Count processor seconds of batches, and FLOPs of a few, which are not timed."""

    def __init__(self, first_counted: int = 3, num_counted: int = 4) -> None:
        self.counted = range(first_counted, first_counted + num_counted)
        self.flops: list[int] = []
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        self.counter = Flops() if len(self.seconds) + len(self.flops) in self.counted else None
        if self.counter is not None:
            self.counter.__enter__()
        self.begin = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # noqa: D102
        if self.counter is None:
            self.seconds.append(time.process_time() - self.begin)
        else:
            self.counter.__exit__(None, None, None)
            self.flops.append(self.counter.total)


def build(config: str, arguments: Sequence[str]) -> MMDCLI:
    """Build trainer, model and data of a configuration in ``configs/``, without training."""
    return parse(["--config", str(ROOT / "configs" / config), *QUIET, *arguments])


def parse(arguments: list[str]) -> MMDCLI:
    """Build trainer, model and data of a command line behind ``fit``, without training."""
    return MMDCLI(
        MMDGAN,
        LightningDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        run=False,
        args=arguments,
    )


def option(name: str, value: Any) -> str:
    """Return a command-line option; classes with arguments are nested dictionaries."""
    written = value is None or isinstance(value, (dict, list, bool))
    return f"--{name}={json.dumps(value) if written else value}"


def train(
    config: str,
    options: dict[str, Any],
    *,
    seed: int = 0,
    num_updates: int = 100,
    cadence: int = 10,
    data_root: str | None = None,
) -> Run:
    """Train by a configuration and measure MMD^2 every ``cadence`` updates."""
    options = options | {"seed_everything": seed, "trainer.max_steps": num_updates}
    if data_root is not None:
        options["data.init_args.root"] = data_root
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cli = build(config, [option(name, value) for name, value in options.items()])
        tracker = next(c for c in cli.trainer.callbacks if isinstance(c, MMDTracker))
        tracker.every_n_steps, tracker.with_floor = cadence, False
        meter = Meter()
        cli.trainer.callbacks = [tracker, meter]
        run = Run()
        try:
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
        except (RuntimeError, ValueError) as error:
            run.error = str(error)
    model: LightningModule = cli.model
    run.steps = [int(entry["step"]) for entry in tracker.history]
    run.mmd2 = [entry["mmd2"] for entry in tracker.history]
    if run.error:
        run.steps.append(cli.trainer.global_step)
        run.mmd2.append(float("inf"))
    batches = model.critic_steps
    run.seconds_per_update = batches * sum(meter.seconds) / max(1, len(meter.seconds))
    run.flops_per_update = batches * sum(meter.flops) / max(1, len(meter.flops))
    run.images_per_update = model.images_seen / max(1, cli.trainer.global_step)
    return run
