"""The floors: a file imports only from floors below its own, floors 1 to 4 only torch besides."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_mmd"
FLOORS = {
    "kernels": 1,
    "pushforward": 1,
    "verdicts": 1,
    "features": 2,
    "mmd": 2,
    "damping": 3,
    "noise": 3,
    "sobolev": 3,
    "witness": 3,
    "penalties": 3,
    "flows": 4,
    "halving": 4,
    "rates": 4,
    "metrics": 5,
    "data": 5,
    "versions": 5,
    "networks": 5,
    "critics": 5,
    "module": 6,
    "callbacks": 7,
    "doctor": 7,
    "ladder": 8,
    "cli": 9,
    "__main__": 10,
}
HIGHEST_TORCH_ONLY_FLOOR = 4
MODULES = sorted(path.relative_to(PACKAGE.parent).with_suffix("") for path in PACKAGE.rglob("*.py"))


def imported(source: str, package: str) -> list[str]:
    """List the dotted names that a source imports anywhere, relative ones resolved."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(
                [*(parents if node.level else []), *([node.module] if node.module else [])]
            )
            own = base in ("lightning_mmd", "lightning_mmd.callbacks", "lightning_mmd.data")
            names += [f"{base}.{alias.name}" for alias in node.names] if own else [base]
    return names


def violations(room: str, source: str, package: str = "lightning_mmd") -> list[str]:
    """List the imports that the floor of `room`, a file or folder of the package, forbids."""
    floor, found = FLOORS[room], []
    for name in imported(source, package):
        first, *rest = name.split(".")
        if first == "lightning_mmd":
            target = rest[0] if rest else ""
            inside = room == target in ("callbacks", "data")
            if not inside and FLOORS.get(target, sys.maxsize) >= floor:
                found.append(name)
        elif floor <= HIGHEST_TORCH_ONLY_FLOOR and first not in {"torch", *sys.stdlib_module_names}:
            found.append(name)
    return found


def eager_imports(source: str) -> list[str]:
    """List what a package's __init__ imports when it is imported, the standard library aside."""
    statements = [
        node
        for node in ast.parse(source).body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        and not isinstance(node, ast.FunctionDef)
    ]
    names = imported("\n".join(map(ast.unparse, statements)), "lightning_mmd")
    return [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_module_keeps_to_its_floor(module: Path) -> None:
    source = (PACKAGE.parent / module).with_suffix(".py").read_text()
    if module == Path("lightning_mmd/__init__"):
        assert eager_imports(source) == []
    else:
        room = module.parts[1]
        assert room in FLOORS, f"{module} has no floor: add it to FLOORS"
        assert violations(room, source, ".".join(module.parts[:-1])) == []


@pytest.mark.parametrize(
    ("room", "source", "package", "expected"),
    [
        ("mmd", "from lightning_mmd.kernels import Gaussian", "lightning_mmd", []),
        ("mmd", "import math\nimport torch.nn as nn", "lightning_mmd", []),
        ("mmd", "from .kernels import Gaussian", "lightning_mmd", []),
        ("mmd", "from .features import x", "lightning_mmd", ["lightning_mmd.features"]),
        ("kernels", "import lightning_mmd.mmd", "lightning_mmd", ["lightning_mmd.mmd"]),
        ("kernels", "def f():\n    import numpy", "lightning_mmd", ["numpy"]),
        (
            "witness",
            "from lightning.pytorch import Trainer",
            "lightning_mmd",
            ["lightning.pytorch"],
        ),
        ("module", "from lightning_mmd import cli", "lightning_mmd", ["lightning_mmd.cli"]),
        (
            "module",
            "from lightning_mmd import Gaussian",
            "lightning_mmd",
            ["lightning_mmd.Gaussian"],
        ),
        ("module", "import lightning_mmd", "lightning_mmd", ["lightning_mmd"]),
        ("module", "import lightning.pytorch", "lightning_mmd", []),
        ("callbacks", "from .samples import x", "lightning_mmd.callbacks", []),
        ("callbacks", "from ..module import MMDGAN", "lightning_mmd.callbacks", []),
        ("callbacks", "from ..cli import main", "lightning_mmd.callbacks", ["lightning_mmd.cli"]),
        ("callbacks", "from .. import cli", "lightning_mmd.callbacks", ["lightning_mmd.cli"]),
        (
            "module",
            "from .callbacks.ema import x",
            "lightning_mmd",
            ["lightning_mmd.callbacks.ema"],
        ),
    ],
)
def test_checker_on_made_sources(room: str, source: str, package: str, expected: list[str]) -> None:
    assert violations(room, source, package) == expected


def test_checker_tells_lazy_from_eager_imports() -> None:
    lazy = "if TYPE_CHECKING:\n    from .mmd import x\ndef __getattr__(name):\n    import torch"
    assert eager_imports(lazy) == []
    assert eager_imports("from .mmd import x") == ["lightning_mmd.mmd"]
    assert eager_imports("try:\n    import torch\nexcept ImportError:\n    pass") == ["torch"]


def test_importing_kernels_leaves_lightning_alone() -> None:
    script = "import sys, lightning_mmd.kernels; print(*sys.modules, sep='\\n')"
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    loaded = {name.split(".")[0] for name in result.stdout.splitlines()}
    assert "torch" in loaded
    heavy = {"lightning", "pytorch_lightning", "torchmetrics", "torchvision"}
    assert loaded & heavy == set()


def test_public_names_are_lazy_and_say_one_thing():
    """`__all__`, the lazy table and the block for type checkers hold the same names."""
    import lightning_mmd

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazy = {name: f"lightning_mmd.{home}" for name, home in lightning_mmd._HOME_OF.items()}
    assert typed == lazy
    assert set(lightning_mmd.__all__) == set(lazy)
    for name in lightning_mmd.__all__:
        assert getattr(lightning_mmd, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lightning_mmd.nothing
