"""Private parts of Lightning and torch that the package needs: one function and one test each.

Nothing here is promised by Lightning. `tests/test_internals.py` fails where a new version changes
what a function stands on.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.compile import to_uncompiled

__all__ = [
    "as_trained",
    "attached_trainer",
    "built_by_command_line",
    "callbacks_of",
    "change_logged_hyperparameters",
    "is_fast_dev_run",
    "keep_hyperparameters",
    "leave_hp_metric_out",
    "offline",
    "replace_imports",
    "saves_after_batch",
    "set_callbacks",
    "short_help",
    "switch_offline",
    "uncompile",
    "uncounted",
]


def built_by_command_line() -> bool:
    """Whether a module is being built by LightningCLI, which records arguments as class paths."""
    return _given_hyperparameters.get() is not None


def keep_hyperparameters(module: LightningModule, names: set[str]) -> None:
    """Drop the recorded hyperparameters of other names, also from what loggers get."""
    for hparams in (module.hparams, cast(dict, module._hparams_initial)):
        for name in list(hparams):
            if name not in names:
                del hparams[name]


def change_logged_hyperparameters(module: LightningModule, change: Callable[[Any], Any]) -> None:
    """Change what loggers get of the recorded hyperparameters; a checkpoint keeps them."""
    recorded = cast(dict, module._hparams_initial)
    for name, value in list(recorded.items()):
        recorded[name] = change({name: value})[name]


def attached_trainer(module: LightningModule) -> Trainer | None:
    """Return a module's trainer, None where it has none; ``module.trainer`` would raise."""
    return cast(Trainer | None, module._trainer)


def as_trained(trainer: Trainer, batch: Any) -> Any:
    """Return a batch as ``training_step`` gets it: in precision, by the hooks, on the device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def saves_after_batch(trainer: Trainer) -> bool:
    """Whether a ModelCheckpoint may save at the end of this batch, by its steps or its clock."""
    return any(
        saver._train_time_interval is not None
        or (
            saver._every_n_train_steps > 0 and trainer.global_step % saver._every_n_train_steps == 0
        )
        for saver in callbacks_of(trainer)
        if isinstance(saver, ModelCheckpoint)
    )


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the trainer's list of callbacks, which its type does not declare."""
    return cast(Any, trainer).callbacks


def set_callbacks(trainer: Trainer, callbacks: list[Callback]) -> None:
    """Give a trainer another list of callbacks."""
    cast(Any, trainer).callbacks = callbacks


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Whether the trainer only tries a few batches and must write nothing."""
    return bool(cast(Any, trainer).fast_dev_run)


def uncompile(module: LightningModule) -> bool:
    """Undo torch.compile of a whole LightningModule; return whether it was compiled."""
    if module._compiler_ctx is None:
        return False
    to_uncompiled(module)
    return True


def uncounted(optimizer: LightningOptimizer) -> LightningOptimizer:
    """Let an optimizer's steps not count in ``trainer.global_step``.

    Lightning counts the steps of every optimizer of a manually optimised module. It sets the two
    hooks anew for each batch, so this is called for each batch.
    """
    optimizer._on_before_step = optimizer._on_after_step = _no_op
    return optimizer


def offline(logger: WandbLogger) -> bool:
    """Whether a W&B logger was asked to log offline."""
    return bool(logger._offline)


def leave_hp_metric_out(logger: TensorBoardLogger) -> None:
    """Let a TensorBoard logger not write ``hp_metric = -1`` beside the hyperparameters."""
    logger._default_hp_metric = False


def switch_offline(logger: WandbLogger) -> None:
    """Let a W&B logger that has not started yet log offline."""
    logger._wandb_init["mode"] = "offline"


@contextmanager
def replace_imports(check: Callable[[str], None]) -> Iterator[None]:
    """Let jsonargparse ask before it imports what a value names.

    Args:
        check: Gets the dotted path, and raises if it must not be imported.

    Raises:
        RuntimeError: If jsonargparse does not import as it did, so that nothing would be checked.
    """
    modules = [m for n, m in sorted(sys.modules.items()) if n.split(".")[0] == "jsonargparse"]
    held = [(module, vars(module)["import_object"]) for module in modules if _imports(module)]
    if not any(module.__name__.endswith("._typehints") for module, _ in held):
        raise RuntimeError(
            "this version of jsonargparse imports classes in another way than is known here, so "
            "what a checkpoint builds cannot be checked. Install jsonargparse 4.53."
        )

    def asking(original: Callable[..., Any]) -> Callable[..., Any]:
        def import_object(name: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(name, str):
                check(name)
            return original(name, *args, **kwargs)

        return import_object

    for module, original in held:
        cast(Any, module).import_object = asking(original)
    try:
        yield
    finally:
        for module, original in held:
            cast(Any, module).import_object = original


def _imports(module: Any) -> bool:
    return callable(vars(module).get("import_object"))


def short_help(everything: bool = False) -> type[DefaultHelpFormatter]:
    """Return a help formatter of a few screens.

    It leaves out long lists of classes, of which ``--NAME.help CLASS`` tells, and of Lightning's
    Trainer what is rarely changed, which ``--trainer.help`` shows.

    Args:
        everything: Whether to show that too.
    """
    if not hasattr(DefaultHelpFormatter, "_get_help_string"):  # then help is merely long
        return DefaultHelpFormatter

    class ShortHelp(DefaultHelpFormatter):
        def __init__(self, prog: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(prog, *args, **{"max_help_position": 30, "width": 100} | kwargs)

        def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
            if usage is None and sum(len(a.option_strings) > 0 for a in actions) > _MOST_IN_USAGE:
                usage = "%(prog)s --config NAME_OR_FILE [--NAME VALUE ...]"
            super().add_usage(usage, actions, groups, prefix)

        def add_argument(self, action: Any) -> None:
            name = action.dest.split(".")
            of_a_class = len(name) > 1 and name[-1] == "help"
            rare = len(name) > 1 and name[0] == "trainer" and name[1] not in _USUAL
            if everything or not (of_a_class or rare):
                super().add_argument(action)

        def start_section(self, heading: Any) -> None:
            words = str(heading).split(" ")
            super().start_section(_HEADINGS.get(" ".join(words[:2]), heading))

        def _get_help_string(self, action: Any) -> str:
            text = super()._get_help_string(action)
            if not text:
                return text
            text = _TEXTS.get(action.dest, text) if not everything else text
            start, mark, known = text.partition(", known subclasses: ")
            if not mark or len(known) <= _LONGEST_LIST:
                return text
            return f"{start}; see --{action.dest}.help CLASS)"

    return ShortHelp


_LONGEST_LIST = 300  # characters: what is longer lists all modules of torch, or all strategies
_MOST_IN_USAGE = 12  # options: with more the usage is no help
_USUAL = (
    "accelerator", "callbacks", "default_root_dir", "devices", "fast_dev_run", "log_every_n_steps",
    "logger", "max_steps", "max_time", "precision", "strategy", "val_check_interval",
)  # fmt: skip
_HEADINGS = {
    "Customize every": "Lightning's Trainer (all of it: lightning-mmd fit --trainer.help)",
    "A generator": "Model (of a class CLASS: --model.rule.help CLASS, --model.critic.help CLASS)",
    "A DataModule": "Data (of a class CLASS: --data.help CLASS)",
    "Runs the": "Resume",
}
_TEXTS = {
    "ckpt_path": "Checkpoint to go on from; 'last' is the newest of this configuration's runs.",
    "weights_only": "False reads a checkpoint as a pickle, which may run any code; default: True.",
}


def _no_op(*_: Any) -> None:
    pass
