"""Weights out and in again: folders, the hub, the package's own, and the generator alone."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import SHA, fake_hub
from PIL import Image
from safetensors.torch import load_file
from tiny import ascent, closed_form
from torch import nn

import lightning_mmd.pretrained as pretrained
from lightning_mmd import MMDGAN, DivergedError, LearnedKernelCritic
from lightning_mmd.cli import BuiltCLI, run
from lightning_mmd.commands.sample import between
from lightning_mmd.networks import MLPFeatures, MLPGenerator
from lightning_mmd.passes import copy_network
from lightning_mmd.pretrained import packaged, without_defaults
from lightning_mmd.safety import UntrustedError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(autouse=True)
def single_precision_in_a_folder_of_its_own(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model():
    """A model with averaged weights, built as ``lightning-mmd fit`` builds it."""
    model = BuiltCLI([f"--config={CONFIGS}/digits.yaml"], "test", "test").model
    average = copy_network(model.generator)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.mul_(1.1)
    model.sample_with(average)
    return model


def in_python(**kwargs):
    torch.manual_seed(0)
    return closed_form(MLPGenerator(2, 3), LearnedKernelCritic(MLPFeatures(2, 4), 4), **kwargs)


def samples(model):
    return model.sample(5, model.fixed_latents(5, 1))


def weights(model):
    return {n: t for n, t in model.state_dict().items()}


def test_what_is_loaded_is_what_was_saved(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "out")
    found = MMDGAN.from_pretrained(folder)
    assert torch.equal(samples(found), samples(model))  # of averaged weights
    assert not torch.equal(found.generator(found.fixed_latents(5, 1)), samples(found))
    for name, value in weights(model).items():
        assert torch.equal(weights(found)[name], value), name
    assert repr(found.rule) == repr(model.rule)
    again = found.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_for_sampling_only_the_averaged_generator_is_kept(model, tmp_path):
    folder = model.save_pretrained(tmp_path, for_sampling=True)
    tensors = load_file(folder / "model.safetensors")
    assert set(tensors) == {f"generator.{n}" for n in model.generator.state_dict()}
    found = MMDGAN.from_pretrained(folder)
    assert found.averaged_generator is None
    assert torch.equal(samples(found), samples(model))


def test_weights_are_rounded_on_request(model, tmp_path):
    whole = model.save_pretrained(tmp_path / "whole", for_sampling=True)
    half = model.save_pretrained(tmp_path / "half", for_sampling=True, store_as="float16")
    exact = load_file(whole / "model.safetensors")
    for name, value in load_file(half / "model.safetensors").items():
        assert torch.equal(value, exact[name].half())
    found = MMDGAN.from_pretrained(half)
    assert next(found.generator.parameters()).dtype == torch.float32
    torch.testing.assert_close(samples(found), samples(model), atol=5e-3, rtol=0)
    with pytest.raises(ValueError, match=r"store_as must be one of float16, .*got 'int8'"):
        model.save_pretrained(tmp_path, store_as="int8")


def test_a_model_made_in_python_is_given_its_networks(tmp_path):
    model = in_python(latents=3, beta=0.3)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"how critic and generator are built.*made in Python"):
        MMDGAN.from_pretrained(tmp_path)
    other = ascent(MLPGenerator(2, 3), LearnedKernelCritic(MLPFeatures(2, 4), 4), latents=3)
    parts = {"generator": other.generator, "critic": other.critic}
    with pytest.raises(ValueError, match="was trained by ClosedForm"):
        MMDGAN.from_pretrained(tmp_path, rule=other.rule, **parts)
    found = MMDGAN.from_pretrained(tmp_path, rule=in_python(beta=0.3).rule, **parts)
    assert torch.equal(samples(found), samples(model))
    assert found.latents.dim == 3  # a plain argument is recorded


def test_a_checkpoint_is_saved_on_by_the_model_that_was_read_from_it(model, tmp_path):
    """Class paths survive loading: they were lost, so that nothing could be read a second time."""
    folder = model.save_pretrained(tmp_path)
    found = MMDGAN.from_pretrained(folder, seed=7)
    assert found.hparams["generator"]["class_path"] == "lightning_mmd.networks.ConvGenerator"
    assert found.hparams["seed"] == found.seed == 7


@pytest.mark.filterwarnings(r"ignore:\s*Importing '.*' is not allowed")
def test_a_hostile_configuration_builds_nothing(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    attack = {"class_path": "os.system", "init_args": {"command": f"touch {tmp_path}/owned"}}
    for name in ("generator", "latents", "generator_optimizer"):
        changed = config | {"hyper_parameters": config["hyper_parameters"] | {name: attack}}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises((UntrustedError, ValueError)):
            MMDGAN.from_pretrained(folder)
    assert not (tmp_path / "owned").exists()


def test_folders_that_are_not_whole_are_told_of(model, tmp_path):
    folder = model.save_pretrained(tmp_path / "out")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match="cut off or damaged"):
        MMDGAN.from_pretrained(folder)
    file.write_bytes(whole)
    config = folder / "config.json"
    for text in ("{", "[]", '{"rule": 1}'):
        config.write_text(text)
        with pytest.raises(ValueError, match="not one that save_pretrained writes"):
            MMDGAN.from_pretrained(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        MMDGAN.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"no weights named 'digitz'.*digits and mnist"):
        MMDGAN.from_pretrained("digitz")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = in_python(latents=3)
    next(model.generator.parameters()).data[0] = math.nan
    with pytest.raises(DivergedError, match="not finite"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_push_and_a_pull_through_a_hub(model, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with fake_hub() as (address, state):
        url = model.push_to_hub(
            "me/digits", token="hf_test", endpoint=address, for_sampling=True, message="Digits"
        )
        assert url.endswith(SHA)
        assert state["created"]["name"] == "digits"
        assert state["message"] == "Digits"
        assert {"config.json", "model.safetensors", "README.md"} <= set(state["files"])
        assert 'from_pretrained("me/digits")' in state["files"]["README.md"].decode()
        found = MMDGAN.from_pretrained("me/digits", token="hf_test", endpoint=address)
        assert torch.equal(samples(found), samples(model))
        assert "Bearer hf_test" in state["tokens"]
        with pytest.raises(FileNotFoundError, match="nor to be had from the Hugging Face hub"):
            MMDGAN.from_pretrained("me/other", endpoint=address)
    with pytest.raises(ValueError, match="named owner/name, got 'digits'"):
        model.push_to_hub("digits")


@pytest.mark.parametrize(
    ("module", "call", "cure"),
    [
        ("huggingface_hub", lambda m: m.push_to_hub("me/digits"), "pip install huggingface_hub"),
        ("huggingface_hub", lambda m: m.from_pretrained("me/digits"), "pip install huggingface"),
        (
            "onnx",
            lambda m: run(["export", "--pretrained", "digits", "--formats", "onnx"]),
            "pip install onnx",
        ),
    ],
)
def test_a_missing_package_is_named(module, call, cure, model, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=cure):
        call(model)


@pytest.mark.parametrize("name", ["digits", "mnist", "mnist_conditional"])
def test_the_packages_own_weights_sample(name, tmp_path):
    assert name in packaged()
    home = Path(pretrained.__file__).parent / "weights" / name
    assert sum(file.stat().st_size for file in home.iterdir()) < 500_000
    card = (home / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["license"] == ("cc-by-4.0" if name == "digits" else "cc-by-sa-3.0")
    assert ("pipeline_tag" in header) is (name != "mnist_conditional")
    assert "| kid |" in card
    run(["sample", "--pretrained", name, "--output", "out.png"])
    picture = torch.tensor(list(Image.open("out.png").convert("L").tobytes())).float()
    assert 20 < picture.std() < 120  # dark ground, bright strokes
    with Image.open("out.png") as drawn:
        assert 250 < drawn.width <= 500  # large enough to see
    values = MMDGAN.from_pretrained(name).sample(64)
    assert values.mean() < -0.2
    assert values.max() > 0.9


def test_the_packages_own_weights_draw_the_digit_that_is_asked_for():
    """Zeros have a hole and ones have little ink: no trained judge is needed to tell them."""
    model = MMDGAN.from_pretrained("mnist_conditional")
    ink = [(model.sample(64, labels=label) > 0).float() for label in range(10)]
    assert min(part.mean() for part in ink) == ink[1].mean()
    middle = [part[:, :, 12:16, 12:16].mean() for part in ink]
    assert min(middle) == middle[0] < 0.1
    run(["sample", "--pretrained", "mnist_conditional", "--labels", "4,2", "--output", "out.png"])
    with Image.open("out.png") as drawn:
        assert drawn.width > 250
    card = Path(pretrained.__file__).parent / "weights" / "mnist_conditional" / "README.md"
    assert "model.sample(64, labels=3)" in card.read_text()
    assert "--labels 0,1,2" in card.read_text()


def test_sample_takes_one_of_checkpoint_and_weights():
    for args in ([], ["--pretrained=digits", "--ckpt_path=x.ckpt"]):
        with pytest.raises(ValueError, match=r"either --ckpt_path FILE or --pretrained NAME"):
            run(["sample", *args])


def test_a_folder_of_pictures_holds_those_of_the_grid():
    run(
        [
            "sample",
            "--pretrained=digits",
            "--num=4",
            "--num_columns=4",
            "--output=grid.png",
            "--scale=1",
        ]
    )
    run(["sample", "--pretrained=digits", "--num=4", "--output=each"])
    grid = Image.open("grid.png")
    for i, file in enumerate(sorted(Path("each").iterdir())):
        left = 2 + 10 * i  # a frame of 2 pixels between images of 8
        assert Image.open(file).tobytes() == grid.crop((left, 2, left + 8, 10)).tobytes()
    assert i == 3


def test_between_goes_along_great_circles():
    torch.manual_seed(1)
    ends = torch.randn(6, 5, dtype=torch.float64)
    ends /= ends.norm(dim=1, keepdim=True)
    way, labels = between((ends, torch.arange(6)), 9)
    way = way.view(3, 9, 5)
    torch.testing.assert_close(way[:, 0], ends[0::2])
    torch.testing.assert_close(way[:, -1], ends[1::2])
    torch.testing.assert_close(way.norm(dim=2), torch.ones(3, 9).double())
    steps = (way[:, 1:] * way[:, :-1]).sum(2).acos()
    whole = (ends[0::2] * ends[1::2]).sum(1).acos()
    torch.testing.assert_close(steps, (whole / 8)[:, None].expand(3, 8))
    assert labels.tolist() == [0] * 9 + [2] * 9 + [4] * 9
    same = torch.ones(2, 3)
    assert torch.equal(between((same,), 4)[0], torch.ones(4, 3))


def test_interpolation_needs_whole_rows():
    with pytest.raises(ValueError, match="--num a multiple of it, got 8 and 12"):
        run(["sample", "--pretrained=digits", "--interpolate=true", "--num=12"])
    run(
        [
            "sample",
            "--pretrained=digits",
            "--interpolate=true",
            "--num=16",
            "--output=s.png",
            "--scale=1",
        ]
    )
    with Image.open("s.png") as picture:
        assert picture.size == (8 * 10 + 2, 2 * 10 + 2)


def test_the_exported_generator_needs_torch_alone(tmp_path):
    run(["export", "--pretrained=digits", "--output=out"])
    lines = (tmp_path / "out/load.py").read_text().splitlines()
    assert len([line for line in lines if line]) <= 10
    script = (
        "import runpy, sys\nrunpy.run_path('load.py')\n"
        "print(*{n.split('.')[0] for n in sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd="out", capture_output=True, text=True, check=True
    )
    assert not {"lightning", "lightning_mmd", "pytorch_lightning"} & set(result.stdout.split())
    found = torch.load("out/samples.pt")
    model = MMDGAN.from_pretrained("digits")
    torch.manual_seed(0)
    torch.testing.assert_close(found, model.sample(64, torch.randn(64, 32)), atol=1e-6, rtol=0)
    tensors = load_file("out/generator.safetensors")
    for name, value in model.generator.state_dict().items():
        assert torch.equal(tensors[name], value)


@pytest.mark.filterwarnings("ignore")  # of the converter
def test_the_generator_as_onnx():
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run(["export", "--pretrained=digits", "--output=out", "--formats=onnx"])
    model = MMDGAN.from_pretrained("digits")
    session = runtime.InferenceSession("out/generator.onnx")
    for num in (1, 7):  # any number of rows
        z = model.fixed_latents(num)
        (found,) = session.run(None, {"latents": z.numpy()})
        # Sums in float32 by another library, in another order.
        torch.testing.assert_close(torch.tensor(found), model.sample(num, z), atol=4e-6, rtol=0)


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.embedding = nn.Linear(3, 2), nn.Embedding(4, 3)

    def forward(self, z, labels):
        return self.layer(z * self.embedding(labels))


def test_a_generator_with_labels_is_exported_with_both_inputs(tmp_path):
    from lightning_mmd.commands.export import _export_torch

    model = in_python(latents=3)
    model.generator = Labelled()
    model.latents.source = lambda n: (torch.randn(n, 3), torch.arange(n) % 4)
    _export_torch(model, model.generator, tmp_path)
    inputs = model.fixed_latents(6)
    found = torch.export.load(tmp_path / "generator.pt2").module()(*inputs)
    torch.testing.assert_close(found, model.sample(6, inputs), atol=1e-6, rtol=0)
    assert not (tmp_path / "load.py").exists()


def test_what_is_saved_leaves_out_defaults_that_another_torch_may_not_know():
    adam = {"lr": 0.005, "betas": [0.0, 0.99], "eps": 1e-08, "decoupled_weight_decay": False}
    config = {
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": adam},
        "own": [{"class_path": "mynets.G", "init_args": {"width": 3}}],
        "latents": 32,
    }
    found = without_defaults(config)
    assert found["optimizer"]["init_args"] == {"lr": 0.005, "betas": [0.0, 0.99]}
    assert (found["own"], found["latents"]) == (config["own"], 32)
    for name in packaged():
        home = Path(pretrained.__file__).parent / "weights" / name / "config.json"
        saved = json.loads(home.read_text())["hyper_parameters"]
        assert saved == without_defaults(saved)
