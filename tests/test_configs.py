"""Every configuration file trains through the command line."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lightning_mmd.cli import main

CONFIGS = Path(__file__).parent.parent / "configs"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.fixture(scope="session")
def made_data(tmp_path_factory):
    """Small random sets in the layouts of MNIST, Fashion-MNIST and CIFAR-10."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for name in ("MNIST", "FashionMNIST"):
        for split in ("train", "t10k"):
            raw = root / name / "raw"
            images = random.integers(0, 256, (256, 28, 28), dtype=np.uint8)
            write_idx(raw / f"{split}-images-idx3-ubyte", images)
            write_idx(raw / f"{split}-labels-idx1-ubyte", np.zeros(256, dtype=np.uint8))
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        data = random.integers(0, 256, (64, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [0] * 64}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return root


@pytest.mark.parametrize("name", NAMES)
def test_config_trains(name, made_data, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    for split in ("train_list", "test_list"):
        pairs = [(file, None) for file, _ in getattr(CIFAR10, split)]
        monkeypatch.setattr(CIFAR10, split, pairs)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--trainer.fast_dev_run=1"]
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if "root" in config["data"]["init_args"]:
        arguments.append(f"--data.init_args.root={made_data}")
    main([*arguments, "--data.init_args.batch_size=16"])


@pytest.mark.parametrize("name", NAMES)
def test_config_is_consistent(name):
    """What stands twice in a flat file stands there with one value."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    model, trainer = config["model"], config["trainer"]
    assert model["generator"]["init_args"]["latent_dim"] == model["latents"]
    critic = model["critic"]["init_args"]
    features = critic["features"].get("init_args", {})
    assert features.get("num_features", critic["num_features"]) == critic["num_features"]
    if "generator_scheduler" in model:
        assert model["generator_scheduler"]["init_args"]["total_iters"] == trainer["max_steps"]
    intervals = {c["class_path"]: c.get("init_args", {}) for c in trainer["callbacks"]}
    saves = intervals["ModelCheckpoint"]["every_n_train_steps"]
    assert trainer["max_steps"] % saves == 0  # so that the last state is saved
