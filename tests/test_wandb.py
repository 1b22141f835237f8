"""What a W&B run holds, read back from the file of an offline run."""

import json
import struct
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers import WandbLogger
from tiny import quiet_trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_mmd import MMDGAN, ClassFeatures, LabelledLatents, LearnedKernelCritic, SampleGrid
from lightning_mmd.cli import main
from lightning_mmd.networks import ConvFeatures, ConvGenerator

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(autouse=True)
def offline_in_a_folder_of_its_own(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    wandb.teardown()  # a service that an earlier test began writes to that test's folder
    yield
    wandb.teardown()


def fit(*args):
    import wandb

    main(
        [
            "fit",
            f"--config={CONFIGS}/digits_closed_form.yaml",
            f"--config={CONFIGS}/loggers/wandb.yaml",
            "--trainer.logger.init_args.offline=true",
            "--trainer.enable_model_summary=false",
            "--trainer.log_every_n_steps=1",
            "--trainer.max_steps=2",
            *args,
        ]
    )
    name = wandb.run.id
    wandb.finish()
    return name


def scan(content):
    """Yield what a log of LevelDB's format holds: blocks of 32 KiB, whose borders cut records."""
    position, whole = 7, b""  # behind W&B's own header
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = struct.unpack("<4xHB", content[position : position + 7])
        part = content[position + 7 : position + 7 + length]
        position += 7 + length
        whole = part if kind in (1, 2) else whole + part
        if kind in (1, 4) and len(part) == length:
            yield whole


def read(file):
    """Return the records of a run's file; the last says how the run ended."""
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 30
    while True:
        records = [Record.FromString(data) for data in scan(file.read_bytes())]
        if any(r.WhichOneof("record_type") == "exit" for r in records):
            return records
        assert time.monotonic() < deadline, "the run's file is not finished"
        time.sleep(0.1)


def test_two_runs_and_what_the_first_one_holds(tmp_path):
    first = fit("--model.rule.beta=0.25")
    second = fit("--model.rule.beta=0.5")
    configs = {p.parent.name: yaml.safe_load(p.read_text()) for p in tmp_path.rglob("config.yaml")}
    betas = {n: c["model"]["rule"]["init_args"]["beta"] for n, c in configs.items() if n != "files"}
    assert betas == {first: 0.25, second: 0.5}  # one file a run: it was the last one's alone

    (file,) = tmp_path.glob(f"runs/wandb/offline-run-*{first}/*.wandb")
    records = read(file)
    config = {}
    for record in records:
        kind = record.WhichOneof("record_type")
        update = record.run.config if kind == "run" else record.config
        config |= {u.key: json.loads(u.value_json) for u in update.update}
    saved = configs[first]
    for part in ("model", "data", "trainer", "seed_everything"):
        assert config[part] == saved[part]
    assert config["lightning_mmd"]

    metrics = {r.metric.name: r.metric for r in records if r.WhichOneof("record_type") == "metric"}
    assert metrics["val/mmd2"].summary.min
    assert metrics["val/mmd2"].step_metric == "trainer/global_step"

    rows = [
        {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in r.history.item}
        for r in records
        if r.WhichOneof("record_type") == "history"
    ]
    logged = [row for row in rows if set(row) - {"_step", "_runtime", "_timestamp"}]
    assert all("trainer/global_step" in row for row in logged)  # one axis


def rows_of_tables(folder):
    """Return the rows of the tables that an offline run keeps in its folder, in their order."""
    files = sorted(folder.rglob("*samples_table*.table.json"), key=lambda p: p.stat().st_mtime_ns)
    return [row for file in files for row in json.loads(file.read_text())["data"]]


def test_samples_are_rows_of_a_table_by_update(tmp_path):
    name = fit(
        "--trainer.max_steps=10",
        '--trainer.callbacks=[{"class_path": "SampleGrid", '
        '"init_args": {"every_n_steps": 5, "num_samples": 4}}]',
    )
    (folder,) = tmp_path.glob(f"runs/wandb/offline-run-*{name}")
    rows = rows_of_tables(folder)
    assert [(update, kind) for update, kind, _ in rows] == [(0, ""), (5, ""), (10, "")]
    (file,) = folder.glob("*.wandb")
    kept = [r.artifact for r in read(file) if r.WhichOneof("record_type") == "artifact"]
    tables = [a for a in kept if a.name.endswith("samples_table")]
    assert len(tables) == 3
    pictures = {c.path for a in tables for c in a.manifest.contents if c.path.endswith(".png")}
    assert len(pictures) == 3  # a picture a row, and each another one


def test_with_labels_each_class_has_a_row(tmp_path):
    model = MMDGAN(
        ConvGenerator((1, 8, 8), 4, (8,), num_classes=3),
        LearnedKernelCritic(ClassFeatures(ConvFeatures((1, 8, 8), 8, (8,)), 8, 3), 8),
        latents=LabelledLatents(4, 3),
    )
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    grid = SampleGrid(every_n_steps=2, num_samples=6, num_columns=2)
    trainer = quiet_trainer(tmp_path, max_steps=2, logger=logger, callbacks=[grid])
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 3
    pairs = DataLoader(TensorDataset(images, labels), batch_size=8)
    trainer.fit(model, pairs)
    logger.experiment.finish()
    rows = rows_of_tables(tmp_path)
    assert [row[:2] for row in rows] == [[step, str(c)] for step in (0, 2) for c in range(3)]


def test_a_resumed_run_is_one_run(tmp_path):
    """The second training goes on in the run of the first: one id, one axis, none twice."""
    options = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2"]
    options += ["--trainer.callbacks.save_last=true"]
    first = fit(*options)
    (last,) = tmp_path.glob("runs/**/last.ckpt")
    again = fit(
        *options,
        f"--trainer.logger.init_args.id={first}",
        "--trainer.logger.init_args.resume=allow",
        f"--ckpt_path={last}",
        "--trainer.max_steps=4",
    )
    assert again == first
    steps = []
    for file in sorted(tmp_path.glob(f"runs/wandb/offline-run-*{first}/*.wandb")):
        for record in read(file):
            if record.WhichOneof("record_type") == "history":
                row = {(i.key or "/".join(i.nested_key)): i.value_json for i in record.history.item}
                if "critic_step" in row:
                    steps.append(json.loads(row["trainer/global_step"]))
    assert steps == [1, 2, 3, 4]
