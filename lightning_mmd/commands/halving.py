"""The halving test of a user's own training: runs with steps of 1, 1/2, 1/4, ... of its length."""

import csv
import math
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_mmd.callbacks import MMDTracker
from lightning_mmd.halving import StepHalving, compare_halvings
from lightning_mmd.internals import callbacks_of, set_callbacks
from lightning_mmd.module import MMDGAN

__all__ = ["climb", "shorten_steps"]

_ONLOOKERS = (  # Lightning's callbacks that training does not depend on, or should not here
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
)


@runtime_checkable
class _Stretchable(Protocol):
    """A callback that knows what shorter steps mean for it."""

    def stretch(self, factor: int) -> None: ...


_NUM_MEASUREMENTS = 20  # of a curve, where the configuration has fewer
_LEAST_MEASUREMENTS = 6  # below these the verdict comes with a caveat
_LEAST_SEEDS, _LEAST_UPDATES = 3, 100  # below these a verdict against a training does too
_MEANING = {
    "converged": "converged dynamics: shorter steps draw the same curve.",
    "not yet": "not yet: the curves approach each other, but a step still matters. Halve the "
    "learning rates, or the tolerance is too strict.",
    "no limit": "no limit: shorter steps do not bring the curves together. The run cycles, or what "
    "it reaches is an accident of its step size. Raise alpha, or, where the critic is trained by "
    "gradient ascent, use the rule ClosedForm.",
}


class _Measurement(NamedTuple):
    """A row of the table of all curves."""

    halvings: int
    seed: int
    step: int
    cumulative_lr: float
    mmd2: float


class _Clock(Callback):
    """Notes the cumulative learning rate at each measurement of a tracker that comes before it."""

    def __init__(self, tracker: MMDTracker) -> None:
        self.tracker = tracker
        self.times: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._note(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note(pl_module)

    def _note(self, model: LightningModule) -> None:
        if len(self.times) < len(self.tracker.history):
            self.times.append(float(model.cumulative_lr))  # pyright: ignore[reportArgumentType]


def shorten_steps(model: MMDGAN, factor: int) -> None:
    r"""Make every step of a model that has not trained yet shorter.

    Learning rates of generator and critic are divided, and schedulers move on at every `factor`-th
    step only, so that the schedule is the same function of the cumulative learning rate, whatever
    its class. Averages over steps keep their memory on that axis: the betas of Adam and its kin
    become beta^(1 / factor), which holds :math:`-\log\beta / \eta`, to first order
    (1 - beta) / eta, fixed.

    Args:
        model: The model; its optimizers are built later, by ``trainer.fit``.
        factor: By how much, >= 1.
    """
    model.generator_scheduler = _stretched(model.generator_scheduler, factor)
    model.critic_scheduler = _stretched(model.critic_scheduler, factor)


def _stretched(build: Callable[[Optimizer], Any] | None, factor: int) -> Callable[[Optimizer], Any]:
    def stretched(optimizer: Optimizer) -> LRScheduler:
        # The scheduler sees the learning rates that its settings are about.
        scheduler = LambdaLR(optimizer, lambda _: 1.0) if build is None else build(optimizer)
        _shorten(optimizer, factor)
        advance, calls = scheduler.step, count(1)

        def step(epoch: int | None = None) -> None:
            if next(calls) % factor == 0:
                _shorten(optimizer, 1 / factor)
                advance()
                _shorten(optimizer, factor)

        scheduler.step = step
        return scheduler

    return stretched


def _shorten(optimizer: Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] / factor
        if "betas" in group:
            group["betas"] = tuple(beta ** (1 / factor) for beta in group["betas"])
        kept = [name for name in ("momentum", "alpha", "rho") if group.get(name)]
        if kept and factor > 1:
            rank_zero_warn(
                f"halving: {', '.join(kept)} of {type(optimizer).__name__} counts steps and is "
                "left as it is, so its memory shortens with the step and the limit has none."
            )


def climb(
    user: LightningCLI,
    build: Callable[[list[str]], LightningCLI],
    num_halvings: int = 2,
    seeds: list[int] | None = None,
    tolerance: float = 0.02,
) -> StepHalving:
    """Train with steps of 1, 1/2, 1/4, ... and compare the curves of MMD^2, seeds averaged.

    A training follows a limit dynamics only if twice as many steps of half the length draw the same
    curve over the cumulative learning rate. Runs of one seed share the start, and batch and latents
    of their k-th step; a run with shorter steps sees more of them, so their noise along the axis
    shrinks with the step: that is what averaging over seeds is for. Data modules with a ``seed``
    get another order of the data for each. Schedules of learning rates, `GeneratorEMA`,
    `BandwidthSchedule` and `RelativeTestLR` are stretched with the run, and so is every callback
    with a method ``stretch(factor)``; those with ``onlooker = True`` are left out.

    Prints a table and saves it with every measurement as CSV, and with matplotlib a picture, where
    the logger of the configuration would log the run.

    Args:
        user: The command line of the user's own training, built and not run.
        build: Callable from arguments that override its own to such a command line.
        num_halvings: How often to halve, >= 2: a distance says nothing until it is seen to fall.
        seeds: Seeds to average over, by default that of the configuration.
        tolerance: Root-mean-square distance of two curves, in units of the first curve's range,
            that counts as none, > 0.

    Returns:
        Curves, distances and verdict.

    Raises:
        ValueError: If an argument is out of range, training has no end in steps or epochs, or there
            is no ``MMDTracker``, or the rule adapts its steps.
    """
    seeds = [user.model.seed] if seeds is None else seeds
    if num_halvings < 2 or not seeds or not tolerance > 0:
        raise ValueError(
            "halving needs num_halvings >= 2, at least one seed and tolerance > 0, got "
            f"{num_halvings}, {seeds} and {tolerance}."
        )
    adapts = user.model.rule.adapts_steps
    if adapts is not None:
        raise ValueError(
            f"halving needs steps that it can halve: {adapts} chooses them by itself. Add "
            f"--model.rule.{adapts} null."
        )
    table: list[_Measurement] = []
    cost = len(seeds) * (2 ** (num_halvings + 1) - 1)
    if user.trainer.is_global_zero:
        print(f"{len(seeds) * (num_halvings + 1)} runs, as many updates as {cost} trainings")
    for k in range(num_halvings + 1):
        for seed in seeds:
            table += _train(build(_overrides(user, 2**k, seed)), k, seed)
    curves = [[_curve(table, k, seed) for seed in seeds] for k in range(num_halvings + 1)]
    result = compare_halvings(curves, tolerance=tolerance)
    if user.trainer.is_global_zero:
        directory = Path(user.trainer.log_dir or user.trainer.default_root_dir)
        print(_report(result, table, seeds, tolerance))
        for path in _save(result, table, directory):
            print(path)
    return result


def _overrides(user: LightningCLI, factor: int, seed: int) -> list[str]:
    trainer = user.config.trainer
    if not any(isinstance(callback, MMDTracker) for callback in callbacks_of(user.trainer)):
        raise ValueError(
            "halving compares curves of MMD^2: add an MMDTracker to trainer.callbacks."
        )
    limits = {name: trainer[name] for name in ("max_steps", "max_epochs")}
    limits = {name: n * factor for name, n in limits.items() if n is not None and n > 0}
    if not limits:
        raise ValueError("halving needs an end to double: set trainer.max_steps or max_epochs.")
    values = limits | {
        "max_time": "null",
        "fast_dev_run": "false",
        "logger": "false",
        "enable_progress_bar": "false",
        "enable_model_summary": "false",
        "limit_val_batches": 0,  # the tracker reads the data by itself
    }
    arguments = [f"--seed_everything={seed}", *(f"--trainer.{n}={v}" for n, v in values.items())]
    data = user.config.data.get("init_args") or {}
    if isinstance(data.get("seed"), int):
        arguments.append(f"--data.init_args.seed={data['seed'] + seed - user.model.seed}")
    return arguments


def _train(run: LightningCLI, halvings: int, seed: int) -> list[_Measurement]:
    factor, max_steps = 2**halvings, run.trainer.max_steps
    callbacks = callbacks_of(run.trainer)
    tracker = next(callback for callback in callbacks if isinstance(callback, MMDTracker))
    tracker.every_n_steps *= factor
    if max_steps > 0:  # enough points for a curve
        cadence = max(1, max_steps // factor // _NUM_MEASUREMENTS) * factor
        tracker.every_n_steps = min(tracker.every_n_steps, cadence)
    kept = [callback for callback in callbacks if not _looks_on(callback)]
    for callback in kept:
        _stretch(callback, factor)
    clock = _Clock(tracker)
    set_callbacks(run.trainer, [*kept, tracker, clock])
    shorten_steps(run.model, factor)
    begin = time.perf_counter()
    run.trainer.fit(run.model, datamodule=run.datamodule)
    history = tracker.history
    if run.trainer.is_global_zero:
        print(
            f"step {_name(halvings)}, seed {seed}: {run.trainer.global_step} updates, MMD^2 "
            f"{history[0]['mmd2']:.4g} -> {history[-1]['mmd2']:.4g} "
            f"({time.perf_counter() - begin:.0f} s)"
        )
    return [
        _Measurement(halvings, seed, int(entry["step"]), s, entry["mmd2"])
        for s, entry in zip(clock.times, history, strict=True)
    ]


def _looks_on(callback: Callback) -> bool:
    return isinstance(callback, _ONLOOKERS) or getattr(callback, "onlooker", False)


def _stretch(callback: Callback, factor: int) -> None:
    """Let a callback do on the axis of the cumulative learning rate what it would have done."""
    if isinstance(callback, _Stretchable):
        callback.stretch(factor)
    elif factor > 1 and not isinstance(callback, GradientAccumulationScheduler):  # always there
        rank_zero_warn(
            f"halving: {type(callback).__name__} may count steps; nothing in it is rescaled. Give "
            "it a method stretch(factor) that lengthens what it counts."
        )


def _curve(
    table: Sequence[_Measurement], halvings: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [row for row in table if (row.halvings, row.seed) == (halvings, seed)]
    axis, values = ([getattr(row, name) for row in rows] for name in ("cumulative_lr", "mmd2"))
    return torch.tensor(axis, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)


def _distances(result: StepHalving) -> list[dict[str, float]]:
    before = (math.nan, *result.seed_distances)
    pairs = zip(result.distances, result.seed_distances, strict=True)
    return [
        {"step": 2.0**-k, "distance": mean, "seed_by_seed": each, "change": each / before[k]}
        for k, (mean, each) in enumerate(pairs)
    ]


def _name(halvings: int) -> str:
    return f"1/{2**halvings}" if halvings else "1"


def _report(
    result: StepHalving, table: Sequence[_Measurement], seeds: Sequence[int], tolerance: float
) -> str:
    times = sorted({row.cumulative_lr for row in table if row.halvings == 0})
    lines = [
        f"\nMMD^2 over the cumulative learning rate 0 to {times[-1]:.4g}, mean of "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}; distances in units of the first "
        "curve's range",
        "  step  updates  MMD^2 at the end  distance to half the step  seed by seed  change",
    ]
    distances = _distances(result)
    for k, curve in enumerate(result.curves):
        updates = max(row.step for row in table if row.halvings == k)
        line = f"{_name(k):>6}{updates:>9}{float(curve[-1]):>18.4g}"
        if k < len(distances):
            _, distance, each, change = distances[k].values()
            line += f"{distance:>27.4g}{each:>14.4g}" + (f"{change:>8.2f}" if k else "")
        lines.append(line)
    if len(seeds) > 1:
        lines.append(f"standard error over seeds: of a mean curve {result.spread:.4g}, ")
        lines[-1] += f"of the last distance {result.noise:.4g}"
    else:
        lines.append("one seed: --seeds [0,1,2] tells how much of a distance is noise")
    lines.append(
        f"tolerance {tolerance:g}; the change is 0.5 for a method of order one, 0.7 for noise of "
        "mini-batches, 1 without a limit"
    )
    lines.append(f"verdict: {_MEANING[result.verdict]}")
    first = max(row.step for row in table if row.halvings == 0)
    if result.verdict != "converged" and (len(seeds) < _LEAST_SEEDS or first < _LEAST_UPDATES):
        lines.append(
            f"but {len(seeds)} seed{'s' if len(seeds) > 1 else ''} of {first} updates decide "
            f"little: take at least {_LEAST_SEEDS} seeds and {_LEAST_UPDATES} updates before you "
            "believe it"
        )
    if len(times) < _LEAST_MEASUREMENTS:
        lines.append(
            f"but each curve has {len(times)} measurements only, too few to draw it: raise "
            "trainer.max_steps"
        )
    return "\n".join(lines)


def _save(result: StepHalving, table: Sequence[_Measurement], directory: Path) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    curves, distances = directory / "halving.csv", directory / "halving_distances.csv"
    with curves.open("w", newline="") as file:
        csv.writer(file).writerows([_Measurement._fields, *table])
    rows = [row | {"spread": result.spread, "noise": result.noise} for row in _distances(result)]
    with distances.open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:  # the picture is an extra
        return [curves, distances]
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for k, curve in enumerate(result.curves):
        axes.plot(result.cumulative_lr, curve, label=f"step {_name(k)}")
    axes.set(xlabel="cumulative learning rate", ylabel="MMD$^2$", title=result.verdict)
    axes.legend()
    figure.savefig(directory / "halving.png", dpi=110)
    return [curves, distances, directory / "halving.png"]
