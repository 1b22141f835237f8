"""Ctrl-C, SIGTERM and processes that die: work is saved, the command that goes on is said."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from test_safety import networks
from tiny import quiet_trainer
from torch.distributed import HashStore

from lightning_mmd import MMDGAN, GracefulStop
from lightning_mmd.callbacks import StoppedError
from lightning_mmd.checkpoints import read_checkpoint
from lightning_mmd.cli import main
from lightning_mmd.data import DigitsDataModule
from lightning_mmd.heartbeat import Heartbeat

CONFIGS = Path(__file__).parent.parent / "configs"
DIGITS = [
    "fit",
    f"--config={CONFIGS}/digits.yaml",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=0",
    "--trainer.callbacks=[]",
]
SAVES = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2"]
SENDER = """
import os, signal
from lightning.pytorch import Callback
class Sender(Callback):
    def __init__(self, number: int, at: int = 3, rank: int = 0):
        self.number, self.at, self.rank = number, at, rank
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.at and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)
"""


@pytest.fixture(autouse=True)
def in_a_folder_with_a_sender(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    Path("sender.py").write_text(SENDER)
    monkeypatch.syspath_prepend("")
    yield
    sys.modules.pop("sender", None)


def sends(number, **more):
    arguments = {"number": int(number), **more}
    return [
        "--trainer.callbacks+=sender.Sender",
        *(f"--trainer.callbacks.init_args.{name}={value}" for name, value in arguments.items()),
    ]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_after_the_step_and_the_said_command_goes_on(number, status, capsys):
    """The stopped run and the one that goes on make, together, what one run makes."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as caught:
        main([*DIGITS, *sends(number), "--trainer.max_steps=6"])
    assert caught.value.code == status
    assert {n: signal.getsignal(n) for n in before} == before
    first, second = capsys.readouterr().err.strip().splitlines()[-2:]
    path = "runs/digits/version_0/checkpoints/last.ckpt"
    name = signal.Signals(number).name
    assert f"stopped by {name} after 4 generator updates; checkpoint: {path}" in first
    assert second.startswith("to go on: lightning-mmd fit --config=")
    assert read_checkpoint(path)["global_step"] == 4
    words = shlex.split(second.removeprefix("to go on: lightning-mmd "))
    main([*words, *SAVES[:1], "--trainer.max_steps=6"])
    main([*DIGITS, *SAVES[:1], "--trainer.max_steps=6"])
    resumed, whole = (
        read_checkpoint(f"runs/digits/version_{version}/checkpoints/last.ckpt")
        for version in (1, 2)
    )
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_last_goes_on_from_the_newest_run_or_refuses(capsys):
    with pytest.raises(SystemExit) as caught:
        main([*DIGITS, *SAVES, "--ckpt_path=last", "--trainer.max_steps=4"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "there is no checkpoint of an earlier run" in error
    assert "runs/digits/*/checkpoints/*.ckpt" in error
    for steps in (2, 4):
        main(
            [*DIGITS, *SAVES, f"--trainer.max_steps={steps}", *(["--ckpt_path=last"] * (steps > 2))]
        )
    last = read_checkpoint("runs/digits/version_1/checkpoints/last.ckpt")
    assert last["global_step"] == last["mmdgan"]["critic_step"] == 4


def test_k_and_k_updates_are_2k_where_k_is_no_multiple_of_a_cadence():
    """Weights, optimizers, tracker, data and counters of the last checkpoint, bit for bit.

    5 batches an epoch, a tracker every 4 updates, a cut at 6: inside an epoch and a cadence.
    """
    tracked = [
        "--trainer.callbacks=[]",
        "--trainer.callbacks+=MMDTracker",
        "--trainer.callbacks.kernel=Gaussian",
        "--trainer.callbacks.every_n_steps=4",
        "--trainer.callbacks+=ModelCheckpoint",
        "--trainer.callbacks.every_n_train_steps=3",
    ]
    words = [*DIGITS, *tracked, "--trainer.log_every_n_steps=1"]
    main([*words, "--trainer.max_steps=6"])
    main([*words, "--trainer.max_steps=12", "--ckpt_path=last"])
    main([*words, "--trainer.max_steps=12"])
    resumed, whole = (
        read_checkpoint(f"runs/digits/version_{version}/checkpoints/last.ckpt")
        for version in (1, 2)
    )
    for state in (resumed, whole):
        tracker = next(v for k, v in state["callbacks"].items() if "MMDTracker" in k)
        for row in tracker["history"]:
            del row["seconds"]
        state["tracker"] = tracker
        del state["callbacks"], state["hyper_parameters"]
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "mmdgan", "tracker", "epoch")
    for key in (*keys, "global_step", "DigitsDataModule"):
        assert equal(resumed[key], whole[key]), key


def equal(a, b):
    """Whether nested data are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_a_second_interrupt_is_not_swallowed():
    stop = GracefulStop()
    stop._take(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop._take(signal.SIGINT, None)


def test_it_works_in_python_too(tmp_path):
    class Interrupts(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    trainer = quiet_trainer(
        tmp_path, max_steps=5, limit_val_batches=0, callbacks=[Interrupts(), GracefulStop()]
    )
    with pytest.raises(StoppedError) as caught:
        trainer.fit(MMDGAN(**networks()), DigitsDataModule())
    assert caught.value.step == 2
    assert caught.value.signal == signal.SIGINT
    assert read_checkpoint(caught.value.checkpoint)["global_step"] == 2
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_agree_on_a_stop(rank):
    """SIGTERM to one of two: both stop after the same update, and none hangs."""
    arguments = [*DIGITS, *sends(signal.SIGTERM, rank=rank), "--trainer.max_steps=1000"]
    arguments += ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accelerator=cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_mmd", *arguments, "--data.init_args.batch_size=64"],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 143, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("stopped by SIGTERM after 4 generator updates") == 1
    assert read_checkpoint("runs/digits/version_0/checkpoints/last.ckpt")["global_step"] == 4


def beating(size, limit=1.0):
    """Heartbeats of several processes, in one: what each one says, and the hearts."""
    store, said = HashStore(), {}
    hearts = [
        Heartbeat(store, rank, size, limit, lambda text, rank=rank: said.setdefault(rank, text))
        for rank in range(size)
    ]
    return hearts, said


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_hearts_that_beat_say_nothing():
    hearts, said = beating(3)
    time.sleep(2.5)  # more than two limits
    for heart in hearts:
        heart.stop()
    time.sleep(0.5)
    assert said == {}
    assert wait_for(lambda: not any(t.name == "heartbeat" for t in threading.enumerate()))


def test_a_rank_that_falls_silent_is_named_by_all_others():
    hearts, said = beating(3)
    hearts[1]._stop.set()  # as a process that is frozen
    assert wait_for(lambda: len(said) == 2)
    assert said.keys() == {0, 2}
    for text in said.values():
        assert text.startswith(f"rank 1 (process {os.getpid()} on ")
        assert "was killed, is frozen or cut off" in text
    for heart in hearts:
        heart.stop()


def test_a_rank_that_fails_says_why():
    hearts, said = beating(2, limit=30.0)  # found long before the limit
    hearts[1].fail("ValueError: no such thing")
    assert wait_for(lambda: 0 in said)
    assert said == {0: "rank 1 has failed: ValueError: no such thing"}
    hearts[0].stop()


def test_a_store_that_is_gone_means_the_first_rank():
    class Gone:
        def __init__(self):
            self.store, self.dead = HashStore(), False

        def set(self, *words):
            if self.dead:
                raise RuntimeError("connection reset")
            self.store.set(*words)

        def get(self, name):
            if self.dead:
                raise RuntimeError("connection reset")
            return self.store.get(name)

    store, said = Gone(), []
    store.set("lightning_mmd/heart/0", "7 1234 here")
    heart = Heartbeat(store, 1, 2, 1.0, said.append)
    time.sleep(0.5)
    store.dead = True
    assert wait_for(lambda: bool(said))
    assert said[0].startswith("rank 0 (process 1234 on here) does not answer any more")
    heart.stop()


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_a_limit_is_positive(limit):
    with pytest.raises(ValueError, match="positive number of seconds"):
        GracefulStop(limit)
