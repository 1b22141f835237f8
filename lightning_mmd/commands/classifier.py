"""Train the classifier whose features judge generated images."""

from pathlib import Path

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_mmd.classifier import ImageClassifier

__all__ = ["ClassifierCLI", "train_classifier"]


class ClassifierCLI(LightningCLI):
    """A trainer, an `ImageClassifier`, data with labels, and where the classifier goes."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the file that is written."""
        parser.add_argument("--output", type=Path, default=Path("classifier.ckpt"))


def train_classifier(args: list[str]) -> float:
    """Train a classifier, test it, and save it with its accuracy in the checkpoint's metrics.

    Args:
        args: ``--config FILE`` and what may follow it.

    Returns:
        Share of the test images that it classifies right.
    """
    cli = ClassifierCLI(
        ImageClassifier,
        LightningDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        parser_kwargs={
            "prog": "lightning-mmd classifier",
            "description": "Train a classifier whose features judge generated images.",
            "exit_on_error": False,
        },
        args=args,
        run=False,
    )
    cli.trainer.fit(cli.model, cli.datamodule)
    (metrics,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    output = cli.config["output"]
    output.parent.mkdir(parents=True, exist_ok=True)
    cli.trainer.save_checkpoint(output, weights_only=True)
    accuracy = metrics["test/accuracy"]
    if cli.trainer.is_global_zero:
        print(f"{accuracy:.2%} of the test images right: {output}")
    return accuracy
