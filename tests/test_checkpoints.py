"""A checkpoint is whole or absent, and a damaged one is refused."""

import errno
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from test_safety import networks
from tiny import quiet_trainer
from torch.utils.data import DataLoader

from lightning_mmd import MMDGAN
from lightning_mmd.checkpoints import (
    WholeCheckpoints,
    check_whole,
    newest_whole,
    read_checkpoint,
    write_whole,
)
from lightning_mmd.commands.runs import command_to_go_on, find_last
from lightning_mmd.data import DigitsDataModule


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def state():
    return {"mmdgan": {"n": 1}, "state_dict": {"w": torch.randn(64, 64)}}


def save(state, path):
    write_whole(lambda file: torch.save(state, file), path)


def test_a_written_checkpoint_is_what_was_saved(state, tmp_path):
    save(state, tmp_path / "new" / "a.ckpt")
    assert torch.equal(
        read_checkpoint(tmp_path / "new/a.ckpt")["state_dict"]["w"], state["state_dict"]["w"]
    )
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.ckpt"]


def test_a_flipped_bit_of_a_tensor_is_found_wherever_it_is(state, tmp_path):
    """Every one of 64 flips, spread over the tensor, that torch.load alone would accept."""
    save(state, tmp_path / "a.ckpt")
    good = (tmp_path / "a.ckpt").read_bytes()
    raw = state["state_dict"]["w"].numpy().tobytes()
    start = good.find(raw)
    assert start > 0
    rng = random.Random(0)
    for _ in range(64):
        at, bit = start + rng.randrange(len(raw)), 1 << rng.randrange(8)
        bad = bytearray(good)
        bad[at] ^= bit
        (tmp_path / "b.ckpt").write_bytes(bytes(bad))
        torch.load(tmp_path / "b.ckpt", weights_only=True)
        with pytest.raises(ValueError, match="damaged"):
            read_checkpoint(tmp_path / "b.ckpt")


def test_a_checkpoint_that_is_cut_off_is_refused_at_every_length(state, tmp_path):
    save(state, tmp_path / "a.ckpt")
    good = (tmp_path / "a.ckpt").read_bytes()
    for length in [0, 1, 30, *range(100, len(good), len(good) // 40), len(good) - 1]:
        (tmp_path / "b.ckpt").write_bytes(good[:length])
        with pytest.raises(ValueError, match="cut off, damaged"):
            read_checkpoint(tmp_path / "b.ckpt")


@pytest.mark.parametrize("blob", [b"hello\n" * 50, bytes(1000), b"PK\x03\x04" + bytes(100)])
def test_what_is_no_checkpoint_is_refused(blob, tmp_path):
    (tmp_path / "b.ckpt").write_bytes(blob)
    with pytest.raises(ValueError, match=r"b.ckpt cannot be read as a checkpoint"):
        check_whole(tmp_path / "b.ckpt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        check_whole(tmp_path / "nothing.ckpt")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "No space left on device.*a.ckpt is whole.*Free some space"),
        (errno.EACCES, "Permission denied.*Make the folder writable"),
        (errno.EIO, "Look after the disk"),
    ],
)
def test_a_disk_that_fails_leaves_the_last_checkpoint_and_names_it(number, words, state, tmp_path):
    save(state, tmp_path / "a.ckpt")
    before = (tmp_path / "a.ckpt").read_bytes()

    def half(file):
        file.write(before[: len(before) // 2])
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=words):
        write_whole(half, tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_folder_that_cannot_be_made_is_an_error(state, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"could not be written.*no earlier checkpoint"):
        save(state, tmp_path / "file" / "a.ckpt")


@pytest.mark.parametrize("moment", ["writing", "before the rename", "after the rename"])
def test_a_process_that_is_killed_leaves_a_whole_checkpoint(moment, state, tmp_path):
    """kill -9 in the middle of the write, before and after the rename."""
    save(state, tmp_path / "a.ckpt")
    script = f"""
import os, signal, pathlib, sys
from lightning_mmd.checkpoints import write_whole
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
replace = pathlib.Path.replace
if {moment!r} == "before the rename":
    pathlib.Path.replace = die
if {moment!r} == "after the rename":
    pathlib.Path.replace = lambda a, b: (replace(a, b), die())
def write(file):
    file.write(open("a.ckpt", "rb").read()[:100 if {moment!r} == "writing" else None])
    file.flush()
    if {moment!r} == "writing":
        die()
write_whole(write, "a.ckpt")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    check_whole(tmp_path / "a.ckpt")
    save(state, tmp_path / "a.ckpt")  # the next one clears what was left
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_the_newest_whole_checkpoint_is_found(state, tmp_path):
    for age, name in enumerate(["new", "middle", "old"]):
        save(state, tmp_path / f"{name}.ckpt")
        os.utime(tmp_path / f"{name}.ckpt", ns=(0, 10**9 * (9 - age)))
    assert newest_whole(tmp_path.glob("*.ckpt")).name == "new.ckpt"
    (tmp_path / "new.ckpt").write_bytes(b"")
    os.utime(tmp_path / "new.ckpt", ns=(0, 10**10))
    with pytest.warns(UserWarning, match=r"left out: .*new.ckpt cannot be read"):
        assert newest_whole(tmp_path.glob("*.ckpt")).name == "middle.ckpt"
    assert newest_whole([]) is None


CSV = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}}
WANDB = {
    "class_path": "lightning.pytorch.loggers.WandbLogger",
    "init_args": {"save_dir": "runs", "project": "p"},
}


@pytest.mark.parametrize(
    ("trainer", "place"),
    [
        ({"logger": CSV | {"init_args": {"save_dir": "runs", "name": "x"}}}, "runs/x/version_3"),
        ({"logger": [CSV]}, "runs/lightning_logs/version_0"),
        ({"logger": WANDB}, "runs/p/a1b2"),
        ({"logger": None, "default_root_dir": "root"}, "root/lightning_logs/version_0"),
        ({"logger": True}, "lightning_logs/version_0"),
        ({"logger": False}, "."),
        (
            {
                "logger": CSV,
                "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "x"}}],
            },
            None,
        ),
    ],
)
def test_last_is_looked_for_where_the_runs_are(trainer, place, state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint of an earlier run, looked for"):
        find_last(trainer)
    path = Path("x/last.ckpt") if place is None else Path(place) / "checkpoints/last.ckpt"
    save(state, path)
    assert find_last(trainer) == path
    path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="no checkpoint of 1 is whole"),
    ):
        find_last(trainer)


def test_the_command_that_goes_on_is_the_one_that_was_stopped():
    arguments = ["fit", "--config", "a b.yaml", "--ckpt_path", "old", "--trainer.max_steps=3"]
    assert command_to_go_on(arguments, Path("new.ckpt")) == (
        "lightning-mmd fit --config 'a b.yaml' --trainer.max_steps=3 --ckpt_path new.ckpt"
    )
    assert "old" not in command_to_go_on(["fit", "--ckpt_path=old"], Path("new.ckpt"))


def test_a_module_gives_every_trainer_whole_checkpoints(tmp_path):
    """In Python too, and a user's own plugin is left alone."""

    class Own(TorchCheckpointIO): ...

    for plugins, kind in (([], WholeCheckpoints), ([Own()], Own)):
        trainer = quiet_trainer(
            tmp_path,
            max_steps=1,
            enable_checkpointing=True,
            plugins=plugins,
            limit_val_batches=0,
            callbacks=[ModelCheckpoint(tmp_path / kind.__name__, every_n_train_steps=1)],
        )
        trainer.fit(MMDGAN(**networks()), DigitsDataModule())
        assert type(trainer.strategy.checkpoint_io) is kind
        check_whole(trainer.checkpoint_callback.best_model_path)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_that_shuffles_anew_is_said_to(shuffle, tmp_path, recwarn):
    def fit(steps, ckpt_path=None):
        trainer = quiet_trainer(tmp_path, max_steps=steps, limit_val_batches=0)
        loader = DataLoader(torch.randn(32, 1, 8, 8), batch_size=16, shuffle=shuffle)
        trainer.fit(MMDGAN(**networks()), loader, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=False)

    fit(2)
    if shuffle:
        with pytest.warns(UserWarning, match="order of the data does not go on .* StatefulDataLoa"):
            fit(4, tmp_path / "a.ckpt")
    else:
        fit(4, tmp_path / "a.ckpt")
        assert not [w for w in recwarn.list if "order of the data" in str(w.message)]
