import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lightning_mmd.cli import main
from lightning_mmd.commands.versions import find_versions


def test_versions_fit_here():
    versions, problems = find_versions()
    assert versions["torch"] == metadata.version("torch")
    assert problems == []


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        ("torchvision", None, "torchvision is missing"),
        ("torch", "2.0.1", "torch is 2.0.1, but >=2.6 is needed"),
        ("torch", "2.5.0", "was built for torch"),
    ],
)
def test_versions_that_do_not_fit_are_explained(name, version, message, monkeypatch, capsys):
    installed = metadata.version

    def pretend(package):
        if package != name:
            return installed(package)
        if version is None:
            raise metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(metadata, "version", pretend)
    assert any(message in problem for problem in find_versions()[1])
    with pytest.raises(SystemExit) as exit_:
        main(["doctor"])
    assert exit_.value.code == 1
    assert message in capsys.readouterr().out


def test_a_torchvision_that_cannot_be_imported_is_explained(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    process = subprocess.run(
        [sys.executable, "-m", "lightning_mmd", "fit"],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": f"{tmp_path}:{Path(__file__).parent.parent}", "PATH": ""},
    )
    assert process.returncode == 1, process.stderr[-2000:]
    assert "torchvision::nms does not exist" in process.stderr
    assert "Reinstall the two together" in process.stderr
    assert "Traceback" not in process.stderr
