"""Every configuration file trains through the command line."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from PIL import Image

from lightning_mmd import MMDGAN, ClassifierFeatures, LearnedKernelCritic, standard_rule
from lightning_mmd.cli import main
from lightning_mmd.game import UpdateRule

CONFIGS = Path(__file__).parent.parent / "configs"
EVERY = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
CLASSIFIERS = [name for name in EVERY if name.startswith("features_")]
NAMES = [name for name in EVERY if name not in CLASSIFIERS]


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


@pytest.fixture
def made_cifar10(monkeypatch):
    """Let torchvision take the random images for CIFAR-10."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    for split in ("train_list", "test_list"):
        pairs = [(file, None) for file, _ in getattr(CIFAR10, split)]
        monkeypatch.setattr(CIFAR10, split, pairs)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": None})


@pytest.mark.parametrize("name", NAMES)
def test_config_trains(name, made_data, made_cifar10, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--trainer.fast_dev_run=1"]
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if name == "images":
        arguments += ["--data.init_args.root=pictures", "--data.init_args.cache_dir=cache"]
        arguments += ["--data.init_args.image_size=16"]
        (tmp_path / "pictures").mkdir()
        for i in range(24):
            Image.effect_noise((64, 80), 50).save(tmp_path / "pictures" / f"{i}.png")
    elif "root" in config["data"]["init_args"]:
        arguments.append(f"--data.init_args.root={made_data}")
    main([*arguments, "--data.init_args.batch_size=16"])


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_trains(name, made_data, made_cifar10, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.max_epochs=1", f"--data.init_args.root={made_data}"]
    options += ["--data.init_args.batch_size=16", "--trainer.limit_train_batches=2"]
    main(["classifier", "--config", str(CONFIGS / f"{name}.yaml"), *options])
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    features = ClassifierFeatures(config["output"])
    images = torch.rand(2, *config["model"]["sample_shape"])
    assert features(images).shape == (2, config["model"]["num_features"])
    assert f"of the test images right: {config['output']}" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_config_is_consistent(name):
    """What stands twice in a flat file stands there with one value."""
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    model, trainer = config["model"], config["trainer"]
    latents, generator = model["latents"], model["generator"]["init_args"]
    dim = latents["init_args"]["dim"] if isinstance(latents, dict) else latents
    assert generator["latent_dim"] == dim
    critic = model["critic"]["init_args"]
    features = critic["features"].get("init_args", {})
    assert features.get("num_features", critic["num_features"]) == critic["num_features"]
    if isinstance(latents, dict):
        classes = latents["init_args"]["num_classes"]
        assert generator["num_classes"] == features["num_classes"] == classes
        assert config["data"]["init_args"]["labels"]
    if "generator_scheduler" in model:
        assert model["generator_scheduler"]["init_args"]["total_iters"] == trainer["max_steps"]
    intervals = {c["class_path"]: c.get("init_args", {}) for c in trainer["callbacks"]}
    saves = intervals["ModelCheckpoint"]["every_n_train_steps"]
    assert trainer["max_steps"] % saves == 0  # so that the last state is saved


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "digits"])
def test_the_recipe_is_the_rule_of_a_model_without_one(name):
    """`rule: null` in a configuration, and none in Python, mean the rule of the recipes."""
    given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["rule"]
    parser = ArgumentParser()
    parser.add_argument("--rule", type=UpdateRule)
    rule = parser.instantiate_classes(parser.parse_object({"rule": given})).rule
    critic = LearnedKernelCritic(torch.nn.Linear(2, 8), 8)
    assert rule == standard_rule(critic) == MMDGAN(torch.nn.Linear(2, 2), critic).rule
