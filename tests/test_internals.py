"""Guards: each private part of Lightning and jsonargparse does what the package stands on."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.compile import from_compiled
from tiny import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_mmd import internals
from lightning_mmd.cli import main


class Two(LightningModule):
    """Steps two optimizers a batch; the second does not count where ``hide`` is set."""

    def __init__(self, hide=True):
        super().__init__()
        self.save_hyperparameters()
        self.built = internals.built_by_command_line()
        self.automatic_optimization = False
        self.one, self.other = nn.Linear(1, 1), nn.Linear(1, 1)
        self.hide = hide

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        if self.hide:
            assert internals.uncounted(second) is second
        for optimizer in (first, second):
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.one, self.other)]


@pytest.mark.parametrize("hide", [True, False])
def test_steps_of_an_optimizer_can_be_left_uncounted(hide, tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=6)
    trainer.fit(Two(hide), DataLoader(torch.zeros(64, 1), batch_size=1))
    assert trainer.global_step == 6
    assert trainer.fit_loop.epoch_loop.total_batch_idx + 1 == (6 if hide else 3)


def test_a_module_knows_its_trainer(tmp_path):
    module = Two()
    assert internals.attached_trainer(module) is None
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(module, DataLoader(torch.zeros(4, 1)))
    assert isinstance(internals.attached_trainer(module), Trainer)


def test_whether_a_checkpoint_is_due_is_known_before_it_is_written(tmp_path):
    """By steps the prediction is exact; by a clock it may always be."""
    predicted, saved = [], []

    class Notes(Callback):
        def on_train_batch_end(self, trainer, *_):
            predicted.append(internals.saves_after_batch(trainer))
            saved.append(False)

        def on_save_checkpoint(self, trainer, *_):
            saved[-1] = True

    savers = [ModelCheckpoint(tmp_path / "a", every_n_train_steps=3), ModelCheckpoint(tmp_path)]
    trainer = quiet_trainer(
        tmp_path, max_steps=7, callbacks=[Notes(), *savers], enable_checkpointing=True
    )
    trainer.fit(Two(hide=True), DataLoader(torch.zeros(64, 1)))
    assert predicted == [False, False, True, False, False, True, False]
    assert saved[:6] == predicted[:6]  # the epoch's saver saves at the end
    savers = [ModelCheckpoint(tmp_path, train_time_interval=timedelta(hours=1))]
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=savers, enable_checkpointing=True)
    assert internals.saves_after_batch(trainer)


def test_hyperparameters_can_be_forgotten():
    module = Two()
    assert dict(module.hparams) == {"hide": True}
    internals.keep_hyperparameters(module, set())
    assert dict(module.hparams) == dict(module.hparams_initial) == {}


def test_who_builds_a_module_is_known(monkeypatch):
    assert not Two().built
    cli = LightningCLI(
        Two,
        run=False,
        args=["--model.hide=false", "--seed_everything=0"],
        save_config_callback=None,
        trainer_defaults={"logger": False, "enable_checkpointing": False},
    )
    assert cli.model.built


def test_torch_compile_of_a_module_is_undone():
    module = Two()
    assert not internals.uncompile(module)
    from_compiled(torch.compile(module, backend="eager"))
    assert internals.uncompile(module)
    assert not internals.uncompile(module)


def test_a_logger_is_switched_offline(tmp_path):
    """In a process of its own: W&B keeps settings for the rest of one."""
    script = """
from lightning.pytorch.loggers import WandbLogger
from lightning_mmd import internals
logger = WandbLogger(save_dir=".", offline=False)
assert not internals.offline(logger)
internals.switch_offline(logger)
run = logger.experiment
assert run.offline, run
run.finish()
assert internals.offline(WandbLogger(save_dir=".", offline=True))
"""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("WANDB")}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=environment)


def test_help_refers_to_long_lists(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    assert "see --model.generator.help CLASS" in " ".join(text.split())
    assert "torch.nn.Linear" not in text
    assert len(text.splitlines()) < 700


def test_imports_of_a_parser_can_be_asked_about():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=nn.Module)
    parser.add_argument("--call", type=Callable)
    parser.add_argument("--any", type=Any)
    asked = []
    with internals.replace_imports(asked.append):
        for name in ("net", "call", "any"):
            parser.parse_object({name: {"class_path": "torch.nn.ReLU"}})
            assert asked, name
            assert set(asked) == {"torch.nn.ReLU"}
            asked.clear()
    parser.parse_object({"net": {"class_path": "torch.nn.ReLU"}})
    assert asked == []


def test_an_import_that_is_refused_does_not_happen(tmp_path, monkeypatch):
    (tmp_path / "never_imported.py").write_text("import torch\nclass Net(torch.nn.ReLU): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=nn.Module)

    def refuse(path):
        raise ValueError(f"no {path}")

    with internals.replace_imports(refuse), pytest.raises(Exception, match="never_imported"):
        parser.parse_object({"net": {"class_path": "never_imported.Net"}})
    assert "never_imported" not in sys.modules


def test_what_loggers_get_of_hyperparameters_can_be_changed():
    module = Two()
    internals.change_logged_hyperparameters(module, lambda values: dict.fromkeys(values, "x"))
    assert dict(module.hparams_initial) == {"hide": "x"}
    assert dict(module.hparams) == {"hide": True}


def test_as_trained_is_what_training_step_gets(tmp_path):
    class Module(LightningModule):
        seen = None

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch + 1

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch * 2

        def training_step(self, batch, batch_idx):
            self.seen = (batch, internals.as_trained(self.trainer, torch.zeros(2)))

        def configure_optimizers(self):
            return None

    module = Module()
    trainer = quiet_trainer(tmp_path, max_steps=1, max_epochs=1, precision="64-true")
    with pytest.warns(UserWarning, match="returned `None`"):
        trainer.fit(module, DataLoader(torch.zeros(2), 2))
    own, found = module.seen
    assert torch.equal(own, found)
    assert found.dtype == torch.float64
    assert found.tolist() == [2.0, 2.0]
