"""What is shipped: configurations by name from any folder, and what the build is told."""

import sys
from pathlib import Path

import pytest

from lightning_mmd.cli import main
from lightning_mmd.commands import shipped
from lightning_mmd.commands.shipped import configs, find, names, with_files

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"


def test_every_configuration_has_a_name_and_no_other_has():
    files = {path.relative_to(CONFIGS).with_suffix("") for path in CONFIGS.rglob("*.yaml")}
    files = {path for path in files if path.parts[0] != "sweeps"}  # not for fit
    assert set(names()) == {path.as_posix() for path in files}
    for name in names():
        assert find(name).read_bytes() == (CONFIGS / f"{name}.yaml").read_bytes()


def test_names_are_replaced_only_after_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mnist = str(find("mnist"))
    words = ["fit", "--config", "mnist", "--config=loggers/wandb", "--data.name", "mnist"]
    wandb = f"--config={find('loggers/wandb')}"
    assert with_files(words) == ["fit", "--config", mnist, wandb, "--data.name", "mnist"]
    for path in ("mnist.yaml", "./mnist", "configs/mnist.yaml", "a b"):
        assert with_files(["--config", path]) == ["--config", path]
    Path("mnist").touch()  # a file of one's own goes first
    assert with_files(["--config", "mnist"]) == ["--config", "mnist"]


def test_a_configuration_by_name_is_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = []
    for config in ("digits", CONFIGS / "digits.yaml"):
        with pytest.raises(SystemExit) as end:
            main(["fit", "--config", str(config), "--print_config"])
        assert end.value.code == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert "GradientAscent" in printed[0]


def test_a_misspelt_name_names_its_neighbour(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", "fashion_mnits"])
    assert end.value.code == 2
    assert "Did you mean fashion_mnist" in capsys.readouterr().err


def test_configs_lists_and_copies_and_never_overwrites(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["configs"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names()
    assert last == "to copy only: sweeps/digits"
    main(["configs", "--copy", "mnist"])
    assert Path("mnist.yaml").read_bytes() == (CONFIGS / "mnist.yaml").read_bytes()
    Path("mnist.yaml").write_text("mine")
    with pytest.raises(FileExistsError, match="Move it"):
        configs("mnist")
    assert Path("mnist.yaml").read_text() == "mine"


def test_configurations_that_are_missing_are_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "_PLACES", (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(FileNotFoundError, match="Reinstall"):
        names()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is of Python 3.11")
def test_the_build_names_every_package():
    import tomllib

    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {path.parent.relative_to(ROOT) for path in (ROOT / "lightning_mmd").rglob("*.py")}
    packages = {".".join(folder.parts) for folder in found}
    folders = {folder.relative_to(ROOT) for folder in CONFIGS.rglob("*") if folder.is_dir()}
    packages |= {f"lightning_mmd.{'.'.join(f.parts)}" for f in (Path("configs"), *folders)}
    assert set(tools["packages"]) == packages
    assert tools["package-dir"]["lightning_mmd.configs"] == "configs"


def test_version_is_that_of_the_package(capsys):
    from importlib.metadata import version

    main(["--version"])
    assert capsys.readouterr().out == f"lightning-mmd {version('lightning-mmd')}\n"


def test_a_sweep_can_be_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    configs("sweeps/digits")
    assert Path("digits.yaml").read_bytes() == (CONFIGS / "sweeps/digits.yaml").read_bytes()
    assert "first lines" in capsys.readouterr().out


def test_the_help_of_fit_is_a_few_screens_and_all_of_the_trainer_is_behind_a_request(capsys):
    texts = []
    for option in ("--help", "--trainer.help"):
        with pytest.raises(SystemExit):
            main(["fit", option])
        texts.append(capsys.readouterr().out)
    short, everything = texts
    assert len(short.splitlines()) <= 200
    for name in ("--trainer.max_steps", "--model.rule", "--data", "--ckpt_path", "--config"):
        assert f"\n  {name}" in short or f", {name}" in short
    assert "--trainer.limit_predict_batches" not in short
    assert "--trainer.limit_predict_batches" in everything


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fti"], "there is no command 'fti'. Did you mean fit? They are: fit, validate, test, s"),
        (["evalute"], "Did you mean evaluate"),
        (["fit", "--trainer.max_stpes=3"], "Did you mean --trainer.max_steps"),
        (["fit", "--model.criticsteps=3"], "Did you mean --model.critic_steps"),
        (["fit", "--xyzzy=3"], "See lightning-mmd fit --help"),
    ],
)
def test_misspelt_words_have_neighbours(arguments, message, capsys):
    digits = ["--config=digits"] if arguments[0] == "fit" else []
    with pytest.raises(SystemExit) as end:
        main([arguments[0], *digits, *arguments[1:]])
    assert end.value.code == 2
    assert message in capsys.readouterr().err
