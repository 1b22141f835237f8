"""Learning rates for digits by Optuna: 20 trials, the ones that look bad are stopped early.

    pip install optuna
    python examples/tune_rates.py

Optuna's pruner sees KID to the validation digits, in the features of a classifier, at every 100
updates. Nothing here is special to Optuna but the lines with ``trial`` in them.
"""

import argparse
import logging
import warnings

import optuna
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_mmd import MMDGAN, DigitsFeatures, GeneratorEMA, LearnedKernelCritic, SampleQuality
from lightning_mmd.data import DigitsDataModule
from lightning_mmd.networks import ConvFeatures, ConvGenerator

SHAPE = (1, 8, 8)


class Report(Callback):
    """Tells Optuna each new KID, and ends a trial that Optuna gives up.

    Args:
        trial: The trial.
        quality: What measures KID.
    """

    def __init__(self, trial: optuna.Trial, quality: SampleQuality) -> None:
        self.trial, self.quality, self.told = trial, quality, 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """Report what was measured since the last batch."""
        step = self.quality.history[-1]["step"]
        if step > self.told:
            self.told = int(step)
            self.trial.report(self.quality.last["kid"], self.told)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def train(trial: optuna.Trial, features: DigitsFeatures, updates: int) -> float:
    """Train with the rates of a trial and return KID."""
    rates = {name: trial.suggest_float(name, 5e-4, 2e-2, log=True) for name in ("lr_g", "lr_c")}
    seed_everything(0, verbose=False)
    network = ConvFeatures(SHAPE, 256, (16, 32), activated=True)
    model = MMDGAN(
        ConvGenerator(SHAPE, 32, (32, 16)),
        LearnedKernelCritic(network, 256),
        generator_optimizer=lambda p: torch.optim.Adam(p, rates["lr_g"], (0.0, 0.99)),
        critic_optimizer=lambda p: torch.optim.Adam(p, rates["lr_c"], (0.0, 0.99)),
    )
    quality = SampleQuality(features, every_n_steps=100, num_fake=1000, neighbours=None)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=updates,
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[GeneratorEMA(half_life=1000.0, ramp=0.0693), quality, Report(trial, quality)],
    )
    trainer.fit(model, DigitsDataModule(batch_size=32))
    return quality.last["kid"]


def main(trials: int = 20, updates: int = 400) -> optuna.Study:
    """Search, print the best trials, and return the study."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    features = DigitsFeatures()
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
    )
    study.optimize(lambda trial: train(trial, features, updates), n_trials=trials)
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    print(f"{len(done)} of {len(study.trials)} trials ran to the end; KID, rates of both players:")
    for trial in sorted(done, key=lambda t: t.value or 0.0)[:3]:
        print(f"{trial.value:8.2f}  {trial.params['lr_g']:.1e}  {trial.params['lr_c']:.1e}")
    return study


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--updates", type=int, default=400)
    main(**vars(parser.parse_args()))
