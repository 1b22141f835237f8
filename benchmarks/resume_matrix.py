"""Is a resumed training the uninterrupted one, bit for bit? All cells, as users run them.

    OMP_NUM_THREADS=1 python benchmarks/resume_matrix.py

Digits with small networks and every callback that has a state: averages, an automatic proximal
term, noise, augmentation, trackers, the monitor, the halving test, good states. A cell is a rule,
1 or 2 processes, 0 or 2 workers, k inside an epoch or at its end, the checkpoint at update k of a
run of 2k or the last one of a run of k, and how it is resumed: by the command line from a path or
from ``last``, or in Python. Compared is all that the checkpoint after 2k updates holds, but wall
clocks, names of files, and Lightning's count of epochs (see `EPOCHS`). Each cell is a row of
`results/resume.csv`.
"""

import contextlib
import copy
import csv
import io
import logging
import os
import shutil
import tempfile
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml
from csv_rows import read_rows
from runs import parse

from lightning_mmd.cli import main

RESULTS = Path(__file__).parent / "results" / "resume.csv"
FIELDS = ["rule", "processes", "workers", "k", "checkpoint", "by", "different"]
CLOCKS = ("seconds", "time", "path", "dirpath", "best_model", "last_model", "kth_", "filename")
EPOCHS = ("epoch", "epoch_progress", "loops")
NETWORK = {"sample_shape": [1, 8, 8], "num_features": 16, "channels": [8, 16]}
FEATURES = {"class_path": "ConvFeatures", "init_args": NETWORK}


def noise(level: float) -> dict[str, Any]:
    """Return a schedule of one level."""
    return {"class_path": "ConstantNoise", "init_args": {"initial": level}}


def callbacks_of(solved: bool, k: int) -> list[dict[str, Any]]:
    """Return every callback that has a state and suits the rule."""
    relative = {
        "kernel": {"class_path": "Gaussian", "init_args": {"bandwidth": 4.0}},
        "every_n_steps": 2, "lookback": 1, "patience": 1, "num_samples": 30,
    }  # fmt: skip
    chosen: dict[str, dict[str, Any]] = {
        "GeneratorEMA": {"half_life": 3},
        "MMDTracker": {"every_n_steps": 2, "num_fake": 50},
        "ConvergenceMonitor": {"every_n_steps": 1, "num_samples": 20},
        "RelativeTestLR": relative,
        "NoiseInjection": {"schedule": noise(0.05)},
        "OnDivergence": {},
    }
    if not solved:
        chosen |= {
            "InstanceNoise": {"schedule": noise(0.05)},
            "ProximalPoint": {"renew_every": 3},
            "DiffAugment": {"max_images": 10_000},
        }
    chosen["ModelCheckpoint"] = {"every_n_train_steps": k, "save_last": True, "save_top_k": -1}
    return [{"class_path": name, "init_args": given} for name, given in chosen.items()]


def rule_of(name: str) -> dict[str, Any]:
    """Return a rule with what it carries from batch to batch."""
    if name == "closed form":
        return {"class_path": "ClosedForm", "init_args": {"beta": 0.1, "max_iterations": 3}}
    if name == "deep kernel":
        return {"class_path": "DeepKernel", "init_args": {"alpha": 0.1}}
    slope = {"class_path": "SlopePenalty", "init_args": {"at": "interpolated"}}
    matching = {"class_path": "FeatureMatching", "init_args": {"weight": 1.0}}
    given = {"alpha": 0.1, "beta": 0.01, "slope": slope, "matching": matching}
    return {"class_path": "GradientAscent", "init_args": given}


def model_of(name: str) -> dict[str, Any]:
    """Return networks, latents and rule."""
    generator = {"sample_shape": [1, 8, 8], "latent_dim": 8, "channels": [16, 8]}
    features: dict[str, Any] = copy.deepcopy(FEATURES)
    latents: Any = 8
    if name == "by class":
        generator["num_classes"] = 10
        wrapped = {"num_features": 16, "num_classes": 10, "features": features}
        features = {"class_path": "ClassFeatures", "init_args": wrapped}
        latents = {"class_path": "LabelledLatents", "init_args": {"dim": 8, "num_classes": 10}}
    critic = {"class_path": "LearnedKernelCritic"}
    arguments = {"num_features": 16, "features": features}
    if name == "deep kernel":
        critic, arguments = {"class_path": "EmbeddingCritic"}, {**arguments, "dim": 8}
    falling = {
        "class_path": "torch.optim.lr_scheduler.LinearLR",
        "init_args": {"start_factor": 1.0, "end_factor": 0.05, "total_iters": 12},
    }
    return {
        "rule": rule_of(name), "latents": latents, "generator_scheduler": falling,
        "generator": {"class_path": "ConvGenerator", "init_args": generator},
        "critic": {**critic, "init_args": arguments},
    }  # fmt: skip


def config(rule: str, processes: int, workers: int, k: int, steps: int) -> dict[str, Any]:
    """Return a configuration as a user writes it."""
    data = {"batch_size": 256 // processes, "num_workers": workers, "labels": rule == "by class"}
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu", "devices": processes, "max_steps": steps, "max_epochs": -1,
            "strategy": "ddp_fork" if processes > 1 else "auto", "limit_val_batches": 0,
            "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "x"}},
            "callbacks": callbacks_of(rule == "closed form", k),
        },
        "model": model_of(rule),
        "data": {"class_path": "DigitsDataModule", "init_args": data},
    }  # fmt: skip


def fit(by: str, settings: dict[str, Any], path: str | None) -> Path:
    """Train, and return the newest ``last`` checkpoint."""
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    words = ["fit", "--config", "config.yaml"]
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            if by == "Python":
                made = parse(words[1:])
                made.trainer.fit(made.model, made.datamodule, ckpt_path=path, weights_only=True)
            else:
                main([*words, *([f"--ckpt_path={path}"] if path else [])])
    except SystemExit as error:
        raise RuntimeError(told.getvalue()) from error
    return max(Path("runs").rglob("last.ckpt"), key=lambda p: p.stat().st_mtime_ns)


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return the places where two states differ."""
    name = where.rpartition("/")[2]
    if name in EPOCHS or any(clock in name for clock in CLOCKS):
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [k for k in {**one, **other} if not str(k).startswith("ModelCheckpoint")]
        return [d for k in keys for d in differences(one.get(k), other.get(k), f"{where}/{k}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [where]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, pair in pairs for d in differences(*pair, f"{where}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5)) else [where]
    return [] if one == other or (one != one and other != other) else [where]


def cells(rule: str, processes: int, workers: int, k: int) -> list[dict[str, Any]]:
    """Run the cells that share an uninterrupted training, each in a fresh folder."""
    found = []
    whole = config(rule, processes, workers, k, 2 * k)
    half = config(rule, processes, workers, k, k)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        expected = torch.load(fit("path", whole, None), weights_only=True)
        at_k = next(p for p in Path("runs").rglob("*.ckpt") if f"step={k}." in p.name)
        shutil.copy(at_k, "at_k.ckpt")
        shutil.rmtree("runs")
        shutil.copy(fit("path", half, None), "final.ckpt")
        for origin, by in product(("of 2k", "final of k"), ("path", "last", "Python")):
            source = Path("at_k.ckpt" if origin == "of 2k" else "final.ckpt")
            shutil.rmtree("runs", ignore_errors=True)
            path = str(source)
            if by == "last":
                home = Path("runs/x/version_0/checkpoints")
                home.mkdir(parents=True)
                shutil.copy(source, home / "last.ckpt")
                path = "last"
            end = torch.load(fit(by, whole, path), weights_only=True)
            wrong = differences(expected, end)
            found.append(
                {
                    "rule": rule, "processes": processes, "workers": workers, "k": k,
                    "checkpoint": origin, "by": by, "different": " ".join(wrong),
                }
            )  # fmt: skip
    return found


def run(results: Path = RESULTS, rules: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Run all cells that are not there yet."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_mmd").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rows: list[dict[str, Any]] = [*read_rows(results)]
    done = {tuple(str(row[name]) for name in FIELDS[:4]) for row in rows}
    every = rules or ("closed form", "gradient ascent", "deep kernel", "by class")
    for group in product(every, (1, 2), (0, 2), (3, 4)):  # an epoch has four updates
        if tuple(map(str, group)) in done:
            continue
        new = cells(*group)
        rows += new
        equal = sum(not row["different"] for row in new)
        print(group, f"{equal} of {len(new)} equal", flush=True)
        for row in new:
            if row["different"]:
                print("   ", row["checkpoint"], row["by"], row["different"][:300], flush=True)
        with results.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    run()
