"""The floors: a file imports only from floors below its own, floors 1 to 5 only torch besides."""

import ast
import inspect
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_mmd"
FLOORS = {
    "auto_alpha": 1,
    "points": 0,
    "batches": 1,
    "cards": 1,
    "critic_values": 1,
    "critic_warnings": 1,
    "heartbeat": 1,
    "conditional": 1,
    "kernels": 1,
    "latents": 1,
    "masking": 1,
    "objectives": 1,
    "parameters": 1,
    "passes": 1,
    "reach": 1,
    "verdicts": 1,
    "wide": -1,
    "estimators": 2,
    "features": 2,
    "game": 2,
    "halving": 2,
    "kernel_objectives": 2,
    "kernel_witness": 2,
    "mmd": 2,
    "pixel_kernel": 2,
    "noise": 2,
    "pushforward": 2,
    "critics": 3,
    "embedding": 3,
    "flow_bounds": 3,
    "kernel_gan": 3,
    "finite": 3,
    "parted": 3,
    "penalties": 3,
    "sobolev": 3,
    "gramian": 4,
    "matching": 4,
    "witness": 4,
    "closed_form": 5,
    "deep_kernel": 5,
    "distance": 5,
    "flows": 5,
    "gradient_ascent": 5,
    "rates": 5,
    "data": 6,
    "internals": 6,
    "metrics": 6,
    "feature_metrics": 6,
    "networks": 6,
    "processes": 6,
    "standard": 6,
    "safety": 7,
    "checkpoints": 7,
    "pretrained": 7,
    "classifier": 7,
    "module": 8,
    "callbacks": 9,
    "feature_networks": 9,
    "commands": 10,
    "cli": 11,
    "__main__": 12,
}
FOLDERS = ("callbacks", "commands", "data")
HIGHEST_TORCH_ONLY_FLOOR = 5
MOST_LINES = 300  # of code: docstrings, comments and blank lines apart
LONGER_FILES = {
    "module": "the one LightningModule: its hooks belong together",
}
MOST_FUNCTION_LINES = 60  # its docstring apart
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
            inside = room == target and target in FOLDERS
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


def docstrings(tree: ast.Module) -> list[ast.Expr]:
    """List the docstrings of a module, its classes and its functions."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    owners = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    first = [owner.body[0] for owner in owners if owner.body]
    return [
        node
        for node in first
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]


def lines_of_code(source: str) -> int:
    """Count the lines that hold code."""
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in {*blank, tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in docstrings(ast.parse(source)):
        lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def long_functions(source: str) -> list[str]:
    """Name the functions that are too long."""
    tree, found = ast.parse(source), []
    texts = {id(node): node for node in docstrings(tree)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            text = texts.get(id(node.body[0]))
            length -= 0 if text is None else (text.end_lineno or 0) - text.lineno + 1
            if length > MOST_FUNCTION_LINES:
                found.append(f"{node.name}: {length}")
    return found


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_file_is_about_one_noun_and_not_long(module: Path) -> None:
    source = (PACKAGE.parent / module).with_suffix(".py").read_text()
    name = ".".join(module.parts[1:])
    if name not in LONGER_FILES:
        assert lines_of_code(source) <= MOST_LINES


SOURCES = sorted(
    path
    for folder in ("lightning_mmd", "examples", "benchmarks")
    for path in (PACKAGE.parent / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_functions_are_not_long(path: Path) -> None:
    assert long_functions(path.read_text()) == []


def test_the_counts_on_made_sources() -> None:
    source = '"""A\nB"""\n\n# C\ndef f():\n    """D\n    E"""\n    return (\n        1\n    )\n'
    assert lines_of_code(source) == 4
    body = "".join(f"    x = {i}\n" for i in range(MOST_FUNCTION_LINES))
    assert long_functions(f'def f():\n    """D\n    E"""\n{body}') == ["f: 61"]
    assert long_functions(f"def f():\n{body[:-11]}") == []


def test_there_is_no_import_cycle() -> None:
    """Floors exclude cycles between rooms; within a folder they are looked for."""
    imports = {
        ".".join(module.parts): set(
            imported(
                (PACKAGE.parent / module).with_suffix(".py").read_text(),
                ".".join(module.parts[:-1]),
            )
        )
        for module in MODULES
    }
    waiting = dict(imports)
    while waiting:
        free = [name for name, needs in waiting.items() if not needs & (waiting.keys() - {name})]
        assert free, f"these import each other: {sorted(waiting)}"
        for name in free:
            del waiting[name]


def test_the_module_has_few_arguments() -> None:
    from lightning_mmd import MMDGAN

    assert len(inspect.signature(MMDGAN.__init__).parameters) - 1 <= 14
