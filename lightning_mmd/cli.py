"""The command line: ``lightning-mmd fit | validate | test``, and the commands of `COMMANDS`."""

import argparse
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, auto_cli
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
)

from lightning_mmd.callbacks import (
    GracefulStop,
    StoppedError,
)
from lightning_mmd.commands.classifier import train_classifier
from lightning_mmd.commands.configurations import SaveMaskedConfig
from lightning_mmd.commands.doctor import examine
from lightning_mmd.commands.evaluate import evaluate
from lightning_mmd.commands.explanations import NAMED, explain
from lightning_mmd.commands.export import export
from lightning_mmd.commands.halving import climb
from lightning_mmd.commands.layers import (
    config_files,
    tell_of_replaced_callbacks,
    with_named_callbacks,
)
from lightning_mmd.commands.models import check_checkpoint
from lightning_mmd.commands.report import run_report
from lightning_mmd.commands.runs import command_to_go_on, draw_at_end, find_last
from lightning_mmd.commands.sample import sample
from lightning_mmd.commands.shapes import fill_in_shapes
from lightning_mmd.commands.shipped import configs, with_files
from lightning_mmd.commands.summaries import summary
from lightning_mmd.commands.tensorboard_logs import send_final_scores, without_hp_metric
from lightning_mmd.commands.wandb_logs import start_or_go_offline
from lightning_mmd.halving import StepHalving
from lightning_mmd.internals import (
    callbacks_of,
    is_fast_dev_run,
    short_help,
)
from lightning_mmd.masking import mask
from lightning_mmd.module import MMDGAN
from lightning_mmd.safety import Configuration

__all__ = ["MMDCLI", "doctor", "halving", "main"]

for _name in NAMED:  # what these hold can then be named in YAML without its path
    import_module(f"lightning_mmd.{_name}")

_DESCRIPTION = """Train MMD GANs with a regularised kernel critic.

Besides the subcommands below,
'lightning-mmd sample --ckpt_path FILE --num 64 --output grid.png' draws samples from a checkpoint,
'lightning-mmd sample --pretrained mnist' draws from weights that come with this package,
'lightning-mmd export --ckpt_path FILE --output FOLDER' writes the generator for other programs,
'lightning-mmd evaluate --ckpt_path FILE --data ... --features ...' scores them: FID, KID and more,
'lightning-mmd report RUN_DIR...' lays runs side by side on one page: curves, samples, differences,
'lightning-mmd classifier --config FILE' trains a classifier to judge them by,
'lightning-mmd halving --config FILE' tells whether a training follows a limit dynamics,
'lightning-mmd doctor [--config FILE]' examines the installation and a model on two processes,
'lightning-mmd configs [--copy NAME]' lists the configurations that --config takes by name,
'lightning-mmd --version' tells the version."""

_NOISE = (  # warnings that say nothing to a user of this command
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*ModelCheckpoint with manual optimization.*",
    ".*isinstance.treespec, LeafSpec.*",
    "LightningCLI's args parameter.*",
    "Checkpoint directory .* exists and is not empty.*",  # so does one of the same W&B run
    "The dirpath has changed from.*",  # a resumed run has a folder of its own
)


class Parser(LightningArgumentParser):
    """A parser whose help does not list hundreds of classes."""

    everything = False
    """Whether its help shows all of Lightning's Trainer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=short_help(self.everything), **kwargs)


def _rules_afresh(arguments: list[str]) -> list[str]:
    """Put ``--model.rule=null`` before every rule that is named."""
    afresh = []
    for argument in arguments:
        if re.match(r"--model\.rule(=\w|$)", argument):
            afresh.append("--model.rule=null")
        afresh.append(argument)
    return afresh


class _Parts:
    """What a configuration has beside model and trainer."""

    def __init__(self, data: LightningDataModule) -> None: ...


class MMDCLI(LightningCLI):
    """LightningCLI for ``MMDGAN``: rules, data modules, loggers and callbacks by name.

    A rule that is named among the arguments starts afresh: what a file says of another rule does
    not carry over, though names may agree. ``seed_everything`` is the model's seed too. What a
    checkpoint recorded never replaces what the configuration says.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return Lightning's subcommands, without one that has no data here."""
        return {n: skip for n, skip in LightningCLI.subcommands().items() if n != "predict"}

    def __init__(self, *positional: Any, args: ArgsType = None, **kwargs: Any) -> None:
        arguments = sys.argv[1:] if args is None else args
        if isinstance(arguments, list):
            arguments = list(_rules_afresh(arguments))
        super().__init__(*positional, args=arguments, parser_class=Parser, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Link the seeds. A default rule would lend its arguments to the rule that a file names."""
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_model_seed)

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint before anything is built; Lightning would take its arguments.

        ``last`` is the newest of all runs of the configuration: Lightning would look in the folder
        of the run that is about to start, and go on without one.
        """
        subcommand = self.config.get("subcommand")
        path = self.config[subcommand].get("ckpt_path") if subcommand else None
        if path == "last":
            path = str(find_last(self.config[subcommand].trainer))
            self.config[subcommand].ckpt_path = path
        if path is not None and path not in ("best", "hpc", "registry"):
            check_checkpoint(path)

    def before_instantiate_classes(self) -> None:
        """Refuse what a configuration must not build, before anything is called."""
        policy = Configuration()
        for name, kind in (("model", MMDGAN), ("trainer", Trainer)):
            policy.check(self._get(self.config, name), kind)
        policy.check({"data": self._get(self.config, "data")}, _Parts)
        fill_in_shapes(self._get(self.config, "model"), self._get(self.config, "data"))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Leave the progress bar out where none is wanted: Lightning refuses both together."""
        config = self._get(self.config_init, "trainer")
        if config.get("enable_progress_bar") is False and isinstance(config.get("callbacks"), list):
            bars = (callback for callback in config.callbacks if isinstance(callback, ProgressBar))
            for bar in list(bars):
                config.callbacks.remove(bar)
        trainer = super().instantiate_trainer(**kwargs)
        if not any(isinstance(callback, GracefulStop) for callback in callbacks_of(trainer)):
            callbacks_of(trainer).append(GracefulStop())  # behind those that save
        return trainer

    def before_fit(self) -> None:
        """Never let W&B stop a run to ask for a login, nor TensorBoard make up a metric."""
        start_or_go_offline(self.trainer)
        without_hp_metric(self.trainer)

    before_validate = before_test = before_fit

    def after_fit(self) -> None:
        """Save the last state beside the other checkpoints and say what came of the run."""
        stops = [c for c in callbacks_of(self.trainer) if isinstance(c, GracefulStop)]
        checkpoint = stops[0].saved if stops else None
        callback = self.trainer.checkpoint_callback
        folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
        if checkpoint is None and folder and not is_fast_dev_run(self.trainer):
            checkpoint = Path(folder) / "last.ckpt"
            self.trainer.save_checkpoint(checkpoint, weights_only=False)
        send_final_scores(self.trainer)
        if self.trainer.is_global_zero:
            picture = draw_at_end(self.trainer)
            print(summary(self.trainer, checkpoint), *picture, sep="\n")


class BuiltCLI(MMDCLI):
    """What ``fit`` would run, built only."""

    data_class: type[LightningDataModule] | None = LightningDataModule

    def __init__(self, args: list[str], prog: str, description: str) -> None:
        kwargs = {"prog": f"lightning-mmd {prog}", "description": description}
        super().__init__(
            MMDGAN,
            self.data_class,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=None,
            parser_kwargs=kwargs | {"exit_on_error": False},
            args=args,
            run=False,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Accept the configuration that ``fit`` saves."""
        super().add_arguments_to_parser(parser)
        for name in ("ckpt_path", "weights_only"):
            parser.add_argument(f"--{name}", help=argparse.SUPPRESS)


class HalvingCLI(BuiltCLI):
    """A training, and the arguments of the halving test."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the arguments of the test to those of a training."""
        super().add_arguments_to_parser(parser)
        parser.add_function_arguments(climb, skip={"user", "build"})


class DoctorCLI(BuiltCLI):
    """The model of a training alone: neither its data nor its devices need be at hand."""

    data_class = None  # then they are not required

    def before_instantiate_classes(self) -> None:
        """Leave data, logger and callbacks out."""
        super().before_instantiate_classes()
        self.config.data = None
        for name in vars(self.config.trainer):
            self.config.trainer[name] = None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return a trainer that asks for nothing."""
        return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


def halving(args: list[str]) -> StepHalving:
    """Run the halving test of a training, see :func:`lightning_mmd.commands.halving.climb`.

    Args:
        args: Arguments of ``fit``, and ``--num_halvings``, ``--seeds`` and ``--tolerance``.

    Returns:
        Curves, distances and verdict.
    """

    def build(overrides: list[str]) -> HalvingCLI:
        about = "Does a training follow a limit dynamics? Takes what 'fit' takes."
        return HalvingCLI([*args, *overrides], "halving", about)

    _quieten()
    user = build([])
    options = {name: user.config[name] for name in ("num_halvings", "seeds", "tolerance")}
    return climb(user, build, **options)


def doctor(args: list[str]) -> bool:
    """Examine the installation and, with a configuration, its model on two processes.

    Args:
        args: Nothing, or arguments of ``fit``.

    Returns:
        Whether nothing is wrong, see :func:`lightning_mmd.doctor.examine`.
    """
    _quieten()
    about = "Examine the installation and, with --config, gradients on two processes."
    return examine(DoctorCLI(args, "doctor", about).model if args else None)


def _quieten() -> None:
    """Let Lightning not repeat seeds and devices for each run."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _model_seed(seed_everything: bool | int) -> int:
    return 0 if isinstance(seed_everything, bool) else seed_everything


def _command(function: Callable[..., Any]) -> Callable[[list[str]], Any]:
    """Return what runs a function with the arguments of a command line."""
    return lambda args: auto_cli(
        function,
        args=args,
        as_positional=False,
        prog=f"lightning-mmd {function.__name__}",
        exit_on_error=False,
    )


def _doctor(args: list[str]) -> None:
    if not doctor(args):
        sys.exit(1)


COMMANDS: dict[str, Callable[[list[str]], Any]] = {
    "sample": _command(sample),
    "evaluate": _command(evaluate),
    "export": _command(export),
    "report": run_report,
    "classifier": train_classifier,
    "halving": halving,
    "doctor": _doctor,
    "configs": _command(configs),
}
"""Subcommands besides those of Lightning, by name: functions of the arguments after it."""


def run(args: ArgsType = None) -> None:
    """Run the command line; errors are raised.

    Args:
        args: Arguments; default: those of the process.
    """
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    arguments = sys.argv[1:] if args is None else args
    sampling = isinstance(arguments, list) and arguments[:1] == ["sample"]
    if "" not in sys.path and not sampling:
        sys.path.append("")  # a user's own networks are found beside a configuration
    if isinstance(arguments, list):
        args = arguments = with_files(arguments)
        if arguments == ["--version"]:
            print(f"lightning-mmd {metadata.version('lightning-mmd')}")
            return
    if isinstance(arguments, list) and arguments and arguments[0] in COMMANDS:
        COMMANDS[arguments[0]](arguments[1:])
        return
    Parser.everything = isinstance(args, list) and "--trainer.help" in args
    if isinstance(args, list):
        args = ["--help" if argument == "--trainer.help" else argument for argument in args]
        tell_of_replaced_callbacks(config_files(args))
        args = with_named_callbacks(args)
    MMDCLI(
        MMDGAN,
        LightningDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=SaveMaskedConfig,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "prog": "lightning-mmd",
            "description": _DESCRIPTION,
            "exit_on_error": False,
            **{name: {"exit_on_error": False} for name in MMDCLI.subcommands()},
        },
        args=args,
    )


def main(args: ArgsType = None) -> None:
    """Run the command line; an error becomes one message and exit status 2.

    A training that Ctrl-C or SIGTERM stopped ends with exit status 130 or 143, the path of its
    checkpoint and the command that goes on.

    Set ``LIGHTNING_MMD_TRACEBACK=1`` to see where it came from.

    Args:
        args: Arguments; default: those of the process.
    """
    try:
        run(args)
    except StoppedError as stop:
        if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # the first process speaks for all
            sys.exit(0)
        message = str(stop)
        if stop.checkpoint is not None:
            arguments = sys.argv[1:] if args is None else args
            message += f"\nto go on: {command_to_go_on(arguments, stop.checkpoint)}"
        _leave(message, _EXIT_STATUS + stop.signal)
    except KeyboardInterrupt:
        _leave("stopped before the first update was finished; nothing was saved", _INTERRUPTED)
    except SystemExit as leaving:
        if isinstance(leaving.__context__, KeyboardInterrupt):  # Lightning's way of being stopped
            _leave("stopped between updates; the last checkpoint is what is saved", _INTERRUPTED)
        raise
    except _EXPECTED as error:
        if os.environ.get("LIGHTNING_MMD_TRACEBACK"):
            raise
        _leave(mask(explain(error, [*MMDCLI.subcommands(), *COMMANDS])), 2)


_EXPECTED = (ArgumentError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
_EXIT_STATUS = 128  # of a process that a signal ended, and the signal's number
_INTERRUPTED = _EXIT_STATUS + signal.SIGINT


def _leave(message: object, status: int) -> None:
    print(f"lightning-mmd: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
