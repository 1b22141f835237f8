"""README and documentation: links lead somewhere, commands are understood, Python runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_mmd.cli import COMMANDS, main
from lightning_mmd.commands.shipped import names

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.filterwarnings("ignore")


def commands():
    """Every indented line of a page that calls the command line, without its comment."""
    for page in PAGES:
        for line in page.read_text().splitlines():
            if line.startswith("    lightning-mmd "):
                yield pytest.param(shlex.split(line, comments=True)[1:], id=f"{page.stem}: {line}")


def headings(text):
    for heading in re.findall(r"^#+ (.*)", text, re.MULTILINE):
        yield re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, mark = target.partition("#")
        if name.startswith("pictures/"):  # those of the examples, see docs/hooks.py
            folders = [ROOT / "examples" / "figures", ROOT / "benchmarks" / "figures"]
            assert any((folder / Path(name).name).is_file() for folder in folders), target
            continue
        path = page.parent / name if name else page
        assert path.exists(), target
        if mark:
            assert mark in list(headings(path.read_text())), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        pass

    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    listed = set()
    for part in config["nav"]:
        (content,) = part.values()
        listed |= {content} if isinstance(content, str) else set(content)
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("words", list(commands()))
def test_commands_are_understood(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command, rest = words[0], words[1:]
    assert command in {*COMMANDS, "fit", "test", "validate"}
    configs = [rest[i + 1] for i, word in enumerate(rest[:-1]) if word == "--config"]
    assert all(name in names() for name in configs)
    if command in ("fit", "test"):
        if "--ckpt_path" in rest:  # nothing has been trained
            at = rest.index("--ckpt_path")
            rest = rest[:at] + rest[at + 2 :]
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([command, *rest, "--print_config"])
        assert end.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        assert {"model", "trainer", "data"} <= set(printed)
        return
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    given = [word.partition("=")[0] for word in rest if word.startswith("--")]
    for option in given:
        if "." not in option:
            assert option in text, option


def test_the_python_of_the_readme_and_of_the_pages_runs(tmp_path, monkeypatch):
    """Blocks in their order on a page; the first of the README is `tests/test_examples.py`'s."""
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)
    critic = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
    generator = torch.nn.Linear(3, 2)
    for page in PAGES:
        scope = {"critic": critic, "generator": generator, "alpha": 1.0}
        scope |= {"z": torch.randn(5, 3), "real": torch.randn(5, 2)}
        for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            if "trainer.fit" in block or "push_to_hub" in block or "my-name" in block:
                compile(block, str(page), "exec")
            else:
                exec(compile(block, str(page), "exec"), scope)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (tmp_path / "site" / "api" / "index.html").read_text()
    assert ":math:" not in page
    assert "MMDGAN" in page
