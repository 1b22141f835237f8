"""Pictures and numbers reach every logger that takes them, and one that fails stops nothing."""

import pytest
import torch
from lightning.pytorch.loggers import Logger
from tiny import closed_form, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_mmd import Gaussian, LearnedKernelCritic, MMDTracker, SampleGrid


class Client:
    """What a logger's server is spoken to by; writes down what it gets."""

    def __init__(self):
        self.sent = []

    def log_image(self, path, name, step):  # Comet
        self.sent.append((name, path, step))

    def log_artifact(self, run_id, path, artifact_path):  # MLflow
        self.sent.append((run_id, path, artifact_path))

    def __getitem__(self, key):  # Neptune
        self.key = key
        return self

    def upload(self, path):
        self.sent.append((self.key, path))


class Base(Logger):
    run_id = name = "run"
    version = 0

    def log_hyperparams(self, *_):
        pass

    def __init__(self):
        super().__init__()
        self.client, self.scalars = Client(), []

    @property
    def experiment(self):
        return self.client

    def log_metrics(self, metrics, step=None):
        self.scalars.append((step, metrics))


class CometLogger(Base):
    pass


class MLFlowLogger(Base):
    pass


class NeptuneLogger(Base):
    pass


class Plain(Base):
    pass


class OfItsOwn(Base):
    def log_image(self, key, images, step=None):
        self.client.sent.append((key, images, step))


class Failing(Base):
    def log_metrics(self, metrics, step=None):
        if "val/mmd2" in metrics:  # what Lightning itself hands over is its own affair
            raise ConnectionError("no answer")

    def log_image(self, key, images, step=None):
        raise ConnectionError("no answer")


def fit(path, callbacks, loggers, steps=4):
    critic = LearnedKernelCritic(nn.Linear(2, 4), 4)
    model = closed_form(nn.Linear(3, 2), critic, latents=3)
    data = DataLoader(torch.randn(16, 2), 8)
    trainer = quiet_trainer(
        path, callbacks=callbacks, logger=loggers, max_steps=steps, log_every_n_steps=100
    )
    trainer.fit(model, data, data)
    return trainer


def test_pictures_go_to_all_loggers_that_take_them(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lightning_mmd.callbacks.loggers.rank_zero_info", said.append)
    loggers = [kind() for kind in (CometLogger, MLFlowLogger, NeptuneLogger, OfItsOwn, Plain)]
    grid = SampleGrid(2, 8, dirpath=tmp_path)
    fit(tmp_path, [grid], loggers)
    comet, mlflow, neptune, own, plain = (logger.client.sent for logger in loggers)
    paths = [str(tmp_path / f"step={step:06d}.png") for step in (0, 2, 4)]
    assert comet == [("samples", path, step) for path, step in zip(paths, (0, 2, 4), strict=True)]
    assert mlflow == [("run", path, "samples") for path in paths]
    assert neptune == [
        (f"samples/step={step:06d}", p) for step, p in zip((0, 2, 4), paths, strict=True)
    ]
    assert own == [("samples", [p], step) for step, p in zip((0, 2, 4), paths, strict=True)]
    assert plain == []
    assert said == [f"Plain takes no pictures; they are in {tmp_path}."]  # once


def test_a_logger_that_fails_stops_neither_training_nor_the_others(tmp_path):
    failing, sound = Failing(), OfItsOwn()
    callbacks = [SampleGrid(2, 8, dirpath=tmp_path), MMDTracker(Gaussian(), 2, 8, 8)]
    with pytest.warns(UserWarning, match="Failing failed: ConnectionError: no answer") as caught:
        trainer = fit(tmp_path, callbacks, [failing, sound])
    assert trainer.global_step == 4
    assert len([w for w in caught if "Failing" in str(w.message)]) == 1
    assert [step for step, metrics in sound.scalars if "val/mmd2" in metrics] == [0, 2, 4]
    assert len(sound.client.sent) == 3
