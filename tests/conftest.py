import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # the tests' tensors are small: more threads cost more than they bring


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the whole suite run from another seed: a test that then fails passed by luck."""
    parser.addoption("--seed", type=int, default=0, help="seed of torch before every test")


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """Make float64 the default dtype, so that tolerances test the mathematics."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(previous)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep decoded images out of the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name(f"{tmp_path.name}-cache")))
    return tmp_path.with_name(f"{tmp_path.name}-cache") / "lightning_mmd"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed torch's global generators before every test; return the seed."""
    number = request.config.getoption("--seed")
    torch.manual_seed(number)
    return number


@pytest.fixture(autouse=True)
def meeting_place() -> Iterator[None]:
    """Forget the address at which a test's processes met: a test cut off leaves its port in use."""
    yield
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
