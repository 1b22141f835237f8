"""Faults from outside, as a user's machine has them: kills, full disks, no server, no memory."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lightning_mmd.checkpoints import read_checkpoint
from lightning_mmd.cli import main
from lightning_mmd.commands.explanations import explain

CONFIGS = Path(__file__).parent.parent / "configs"
DIGITS = [
    "fit",
    f"--config={CONFIGS}/digits.yaml",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=0",
    "--trainer.callbacks.every_n_train_steps=2",  # of the last callback, ModelCheckpoint
    "--data.init_args.batch_size=64",
]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)


def start(*words, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "lightning_mmd", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    )


def saved():
    return sorted(Path("runs").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_killed_goes_on_with_the_configuration_as_shipped(seed):
    """kill -9 at a random moment loses at most one interval of checkpoints, 2 updates."""
    process = start(*DIGITS, "--trainer.max_steps=100000")
    deadline = time.monotonic() + 240
    while not any("step=" in path.name for path in saved()) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(random.Random(seed).uniform(0, 1))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    newest = max(int(path.stem.rpartition("step=")[2]) for path in saved() if "step=" in path.name)
    main([*DIGITS, f"--trainer.max_steps={newest + 2}", "--ckpt_path=last"])
    last = read_checkpoint("runs/digits/version_1/checkpoints/last.ckpt")
    assert last["global_step"] == newest + 2
    assert last["mmdgan"]["critic_step"] == newest + 2
    assert last["DigitsDataModule"]["batches"] == newest + 2


def test_wandb_online_without_a_key_trains_offline(tmp_path):
    process = start(
        *DIGITS,
        f"--config={CONFIGS}/loggers/wandb.yaml",
        "--trainer.max_steps=2",
        WANDB_MODE="online",
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_API_KEY="",
        HOME=str(tmp_path),
        NETRC=str(tmp_path / "netrc"),
        WANDB_SILENT="true",
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-2000:]
    assert "2 generator updates" in out
    assert "so the run is logged offline" in err
    assert "Traceback" not in err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounts need root")
def test_a_full_disk_names_the_last_good_checkpoint(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        os.chdir(place)
        main([*DIGITS, "--trainer.max_steps=2", "--trainer.callbacks.dirpath=ck"])
        good = (place / "ck/last.ckpt").read_bytes()
        free = os.statvfs(place)
        (place / "ballast").write_bytes(b"x" * (free.f_bavail * free.f_bsize - 20_000))
        process = start(
            *DIGITS, "--trainer.max_steps=8", "--trainer.callbacks.dirpath=ck", "--ckpt_path=last"
        )
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2
        assert "Traceback" not in err
        assert "No space left on device" in err
        assert (place / "ck/last.ckpt").read_bytes() == good
    finally:
        os.chdir(tmp_path)
        subprocess.run(["umount", "-l", str(place)], check=False)


@pytest.mark.parametrize(
    ("error", "start"),
    [
        (MemoryError(), "out of memory: no memory is left. Lower the memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 20 GiB."), "out of memory: CUDA out of"),
        (RuntimeError("MPS backend out of memory (x)"), "out of memory: MPS backend out of memory"),
    ],
)
def test_no_memory_names_what_needs_less(error, start):
    text = explain(error)
    assert text.startswith(start)
    assert "micro_batches" in text
    assert "batch_size" in text


def test_an_error_of_a_loaders_worker_is_its_last_line():
    text = (
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        "last):\n  File ...\nValueError: photos/7.png is cut off"
    )
    assert explain(ValueError(text)) == "photos/7.png is cut off (in a worker of the loader)"
    assert "LIGHTNING_MMD_TRACEBACK=1" in explain(ValueError())
