"""Every example runs, with few steps, and the README's Python does what it says."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plain_pytorch_descends():
    curve = load(ROOT / "examples/plain_pytorch.py").main(num_updates=60)
    assert curve[-1] < curve[0] / 3


def test_the_readme_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    code = first.replace("max_steps=200", "max_steps=2, enable_progress_bar=False, logger=False")
    scope: dict = {}
    exec(code, scope)
    assert scope["images"].shape == (64, 1, 8, 8)
    assert scope["model"].critic_step == 2
