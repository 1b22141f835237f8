"""The command line: ``lightning-mmd fit | validate | test | sample``."""

import os
import pickle
import sys
import warnings
from pathlib import Path

import torch
from jsonargparse import auto_cli
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

import lightning_mmd.data  # these four can then be named in YAML without their path
import lightning_mmd.features
import lightning_mmd.kernels
import lightning_mmd.networks  # noqa: F401
from lightning_mmd.callbacks import MMDTracker, SampleGrid
from lightning_mmd.module import MMDGAN

__all__ = ["MMDCLI", "main", "sample"]

_DESCRIPTION = """Train MMD GANs with a regularised kernel critic.

Besides the subcommands below, 'lightning-mmd sample --ckpt_path FILE --num 64 --output grid.png'
draws samples from a checkpoint."""

_NOISE = (  # warnings that say nothing to a user of this command
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*ModelCheckpoint with manual optimization.*",
    ".*isinstance.treespec, LeafSpec.*",
)


class MMDCLI(LightningCLI):
    """LightningCLI for ``MMDGAN``: data modules, loggers and callbacks by name."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Refuse a checkpoint that cannot be read before anything is built or written."""
        super().parse_arguments(parser, args)
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path is not None and path not in ("last", "best", "hpc", "registry"):
            check_checkpoint(path)

    def before_fit(self) -> None:
        """Never let Weights & Biases stop a run to ask for a login."""
        log_offline_without_login(self.trainer)

    before_validate = before_test = before_fit

    def after_fit(self) -> None:
        """Say what came of the run."""
        if self.trainer.is_global_zero:
            print(summary(self.trainer))


def check_checkpoint(path: str | Path) -> None:
    """Raise a clear error unless a file is a readable checkpoint of an ``MMDGAN``.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read or comes from another kind of module.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}. Give the path of a .ckpt file.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {str(error).strip().splitlines()[0]}. The "
            "file may be cut off or of another kind; take an earlier checkpoint."
        ) from error
    if not isinstance(checkpoint, dict) or "mmdgan" not in checkpoint:
        raise ValueError(f"{path} is no checkpoint of MMDGAN. Give one that this package wrote.")


def log_offline_without_login(trainer: Trainer) -> None:
    """Switch W&B loggers to offline mode, with a warning, where no login is configured.

    Args:
        trainer: The trainer whose loggers are about to start.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
    if not loggers or "WANDB_MODE" in os.environ or all(logger._offline for logger in loggers):
        return
    import wandb

    if not wandb.login(prompt=False):
        for logger in loggers:
            logger._wandb_init["mode"] = "offline"
        rank_zero_warn(
            "no Weights & Biases login is configured, so the run is logged offline. Run "
            "'wandb login' once, or set WANDB_API_KEY, and 'wandb sync' uploads the folder later."
        )


def summary(trainer: Trainer) -> str:
    """Describe a finished run: MMD^2 at the start, at the end and its floor, and where files are.

    Args:
        trainer: The trainer after ``fit``.

    Returns:
        A few lines of text.
    """
    lines = [f"{trainer.global_step} generator updates"]
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(callback, MMDTracker) and callback.start and callback.last is not None:
            floor = "not measured" if callback.floor is None else f"{callback.floor:.2g}"
            ratio = callback.start / abs(callback.last)
            lines[0] += (
                f": MMD^2 {callback.start:.4g} -> {callback.last:.4g}, {ratio:.0f}-fold lower "
                f"(real against real: {floor})"
            )
        if isinstance(callback, SampleGrid) and callback.last_path:
            lines.append(f"samples:    {callback.last_path}")
    checkpoint = trainer.checkpoint_callback
    if checkpoint is not None and checkpoint.best_model_path:  # pyright: ignore
        lines.append(f"checkpoint: {checkpoint.best_model_path}")  # pyright: ignore
    return "\n".join(lines)


def sample(
    ckpt_path: Path,
    num: int = 64,
    output: Path = Path("samples.png"),
    num_columns: int = 8,
    scale: int = 1,
    seed: int = 0,
) -> None:
    """Draw samples from a checkpoint into one picture.

    Args:
        ckpt_path: Checkpoint that ``lightning-mmd fit`` wrote.
        num: How many samples.
        output: The PNG file.
        num_columns: Images in a row.
        scale: Enlarges every pixel to scale x scale.
        seed: Of the latents.
    """
    check_checkpoint(ckpt_path)
    try:
        model = MMDGAN.load_from_checkpoint(ckpt_path, map_location="cpu")
    except TypeError as error:
        raise ValueError(
            f"{ckpt_path} does not say how its networks are built, because they were made in "
            "Python. Load it there: MMDGAN.load_from_checkpoint(path, generator=..., critic=...)."
        ) from error
    grid = SampleGrid(num_samples=num, num_columns=num_columns, scale=scale, seed=seed)
    grid.save(grid.draw(model.sample(num, model.fixed_latents(num, seed))), output)
    print(f"{num} samples: {output}")


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: Arguments; default: those of the process.
    """
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)
    arguments = sys.argv[1:] if args is None else args
    if isinstance(arguments, list) and arguments[:1] == ["sample"]:
        auto_cli(sample, args=arguments[1:], as_positional=False, prog="lightning-mmd sample")
        return
    MMDCLI(
        MMDGAN,
        LightningDataModule,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"description": _DESCRIPTION},
        args=args,
    )


if __name__ == "__main__":
    main()
