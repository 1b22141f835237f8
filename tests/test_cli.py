import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from lightning_mmd import MMDGAN, LearnedKernelCritic
from lightning_mmd.cli import main, run
from lightning_mmd.commands.layers import config_files, tell_of_replaced_callbacks
from lightning_mmd.networks import MLPFeatures, MLPGenerator

CONFIGS = Path(__file__).parent.parent / "configs"
SHORT = ["--trainer.max_steps=4", "--trainer.enable_model_summary=false"]


@pytest.fixture(autouse=True)
def single_precision_in_a_folder_of_its_own(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)


def fit(*args, config="digits_closed_form.yaml"):
    main(["fit", "--config", str(CONFIGS / config), *SHORT, *args])


@pytest.fixture
def checkpoint(tmp_path, capsys):
    """A checkpoint of a short run on the digits, made by the command line."""
    fit("--trainer.callbacks.every_n_train_steps=2")  # of the last callback, ModelCheckpoint
    (path,) = tmp_path.glob("runs/digits_closed_form/version_0/checkpoints/*step=4.ckpt")
    capsys.readouterr()
    return path


def test_fit_ends_with_a_summary_of_files_that_exist(tmp_path, capsys):
    fit("--trainer.callbacks.every_n_train_steps=2")
    first, samples, checkpoint, curves = capsys.readouterr().out.strip().splitlines()[-4:]
    assert "4 generator updates; MMD^2 1." in first
    assert "real against real" in first
    files = ((samples, "step=000004.png"), (checkpoint, "last.ckpt"), (curves, "run.png"))
    for line, suffix in files:
        path = Path(line.split(":")[1].strip())
        assert path.name.endswith(suffix)
        assert path.is_file()


def test_a_checkpoint_loads_by_its_path_alone(checkpoint):
    model = MMDGAN.load_from_checkpoint(checkpoint)
    assert model.critic_step == 4
    assert model.sample(3).shape == (3, 1, 8, 8)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name])


def test_fit_test_and_sample_take_a_checkpoint(checkpoint, tmp_path, capsys):
    fit(f"--ckpt_path={checkpoint}", "--trainer.max_steps=6")
    assert "6 generator updates" in capsys.readouterr().out
    main(
        ["test", "--config", str(CONFIGS / "digits_closed_form.yaml"), f"--ckpt_path={checkpoint}"]
    )
    assert "test/mmd2" in capsys.readouterr().out
    main(
        [
            "sample",
            f"--ckpt_path={checkpoint}",
            "--num=6",
            "--num_columns=3",
            "--output=a/b.png",
            "--scale=1",
        ]
    )
    with Image.open(tmp_path / "a/b.png") as image:
        assert image.size == (2 + 3 * 10, 2 + 2 * 10)
        assert len(image.convert("L").getcolors()) > 20
    main(
        [
            "validate",
            "--config",
            str(CONFIGS / "digits_closed_form.yaml"),
            f"--ckpt_path={checkpoint}",
        ]
    )
    assert "val/gap" in capsys.readouterr().out


def test_sample_uses_averaged_weights_when_the_checkpoint_has_them(checkpoint, tmp_path, capsys):
    main(["sample", f"--ckpt_path={checkpoint}", "--num=4", "--output=live.png", "--scale=1"])
    assert capsys.readouterr().out == "4 samples: live.png\n"
    fit("--trainer.callbacks+=GeneratorEMA", "--trainer.callbacks.half_life=2")
    (path,) = tmp_path.glob("runs/digits_closed_form/version_1/checkpoints/last.ckpt")
    capsys.readouterr()
    main(["sample", f"--ckpt_path={path}", "--num=4", "--output=averaged.png", "--scale=1"])
    assert capsys.readouterr().out == "4 samples (averaged weights): averaged.png\n"
    model = MMDGAN.load_from_checkpoint(path)
    z = model.fixed_latents(4)
    assert torch.equal(model.sample(4, z), model.averaged_generator.eval()(z))


def test_a_run_resumed_by_the_command_line_is_the_uninterrupted_one(checkpoint, tmp_path):
    """Digits have 5 batches an epoch: 4 + 4 updates resume inside one. Order is not kept there,

    so the comparison is of counters and schedule, not of weights.
    """
    fit(
        f"--ckpt_path={checkpoint}",
        "--trainer.max_steps=8",
        "--trainer.callbacks.every_n_train_steps=4",
    )
    (path,) = tmp_path.glob("runs/digits_closed_form/version_1/checkpoints/*step=8.ckpt")
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 8
    assert state["mmdgan"]["critic_step"] == 8
    assert state["mmdgan"]["images_seen"] == 8 * 256


def test_wandb_offline_holds_scalars_and_images(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    fit(
        "--config",
        str(CONFIGS / "loggers/wandb.yaml"),
        "--trainer.logger.init_args.offline=true",
        "--trainer.log_every_n_steps=1",
    )
    import wandb

    summary = dict(wandb.run.summary)
    wandb.finish()
    assert summary["trainer/global_step"] == summary["critic_step"] == 4
    assert summary["critic/parametric_gradient_norm"] > 0
    assert 0 < summary["val/mmd2"]["min"] <= summary["val/mmd2"]["last"] < 2
    (run,) = tmp_path.glob("runs/wandb/offline-run-*")
    assert len(list(run.glob("files/media/images/samples*.png"))) == 2
    deadline, rows = time.monotonic() + 60, 0
    while rows < 4 and time.monotonic() < deadline:  # W&B's own process writes the file
        time.sleep(0.05)
        rows = sum(log.read_bytes().count(b"critic/gap") for log in run.glob("*.wandb"))
    assert rows >= 4


def test_wandb_without_a_login_goes_offline_instead_of_asking(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "lightning_mmd.cli",
            "fit",
            "--config",
            CONFIGS / "digits_closed_form.yaml",
            "--config",
            CONFIGS / "loggers/wandb.yaml",
            *SHORT,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(CONFIGS.parent)},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert "Weights & Biases: no login is configured" in process.stderr
    assert list(tmp_path.glob("runs/wandb/offline-run-*"))


def test_tensorboard_composes(tmp_path):
    fit("--config", str(CONFIGS / "loggers/tensorboard.yaml"), "--trainer.log_every_n_steps=1")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log_dir,) = tmp_path.glob("runs/digits_closed_form/version_0")
    events = EventAccumulator(str(log_dir))
    events.Reload()
    assert [event.step for event in events.Scalars("critic/gap")] == [1, 2, 3, 4]
    assert [event.step for event in events.Images("samples")] == [0, 4]
    tags = events.Tags()["scalars"]
    assert "hp_metric" not in tags  # Lightning writes -1 there
    (final,) = events.Scalars("final/val/mmd2")
    assert (final.step, final.value) == (4, events.Scalars("val/mmd2")[-1].value)
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_print_config_is_complete_and_help_tells_what_the_docstring_does(capsys):
    with pytest.raises(SystemExit):
        fit("--print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["rule"]["init_args"]["alpha"] == 1.0
    assert config["model"]["generator"]["class_path"].endswith("ConvGenerator")
    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Length of a standard normal latent vector" in text
    with pytest.raises(SystemExit):
        main(["fit", "--model.rule.help", "GradientAscent"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Weight of the parametric-gradient penalty, >= 0." in text
    assert "eta" not in text.split()
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "lightning-mmd sample" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--trainer.callbacks.kernel.class_path=Gausian"], "Did you mean Gaussian?"),
        (["--trainer.callbacks+=ConvergenceMonito"], "Did you mean ConvergenceMonitor"),
        (["--trainer.callbacks+=Xyzzy"], "needs its dotted path"),
        (["--trainer.callbacks+=NoiseInjection"], "NoiseInjection: the following arguments are re"),
        (
            ["--trainer.callbacks+=GeneratorEMA", "--trainer.callbacks.half_lif=3"],
            "GeneratorEMA has no argument 'half_lif'. Did you mean half_life or half",
        ),
        (["--model.nonsense=3"], "nonsense"),
        (["--model.rule.alpha=-1"], "alpha must be a finite number >= 0, got -1.0"),
        (["--model.critic.init_args.num_features=0"], "num_features must be at least 1"),
        (["--ckpt_path=nowhere.ckpt"], "no checkpoint at nowhere.ckpt"),
        (["--ckpt_path=damaged.ckpt"], "cannot be read as a checkpoint"),
        (["--model.latents=7"], "does not take latents of shape (2, 7)"),
        (["--data.init_args.image_size=16"], "samples of shape (1, 16, 16)"),
        (["--data=TorchvisionDataModule", "--data.init_args.download=false"], "`download: true`"),
    ],
)
def test_bad_input_is_one_clear_message(args, message, tmp_path, capsys):
    (tmp_path / "damaged.ckpt").write_bytes(b"not a checkpoint")
    config = "toy_gaussians.yaml" if "kernel" in args[0] else "digits_closed_form.yaml"
    if "kernel" in args[0]:  # a list on the command line: lay a second file over the first
        broken = yaml.safe_load((CONFIGS / config).read_text())["trainer"]["callbacks"]
        broken[1]["init_args"]["kernel"]["class_path"] = "Gausian"
        (tmp_path / "broken.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": broken}}))
        args = ["--config", "broken.yaml"]
    with pytest.raises(SystemExit) as exit_:
        fit(*args, config=config)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()[-1]) < 600
    assert not list(tmp_path.glob("runs/*/*/checkpoints/*"))  # nothing half-done


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": {"rule": {"class_path": "GradientAscent", "init_args": {"slope": {}}}}},
            "SlopePenalty has no argument 'wait'. Did you mean at or weight? It takes weight, at,",
        ),
        (
            {"trainer": {"callbacks": [{"class_path": "NoiseInjection", "init_args": {}}]}},
            "ConstantNoise has no argument 'level'. It takes initial, until.",
        ),
    ],
)
def test_a_wrong_argument_of_a_part_of_a_part_is_named(settings, message, tmp_path, capsys):
    """Where an argument may be of several kinds, the parser says last that it is no class."""
    if "model" in settings:
        part = {"class_path": "SlopePenalty", "init_args": {"wait": 3}}
        settings["model"]["rule"]["init_args"]["slope"] = part
    else:
        part = {"class_path": "ConstantNoise", "init_args": {"level": 0.05}}
        settings["trainer"]["callbacks"][0]["init_args"]["schedule"] = part
    if "trainer" in settings:
        settings["trainer"]["callbacks+"] = settings["trainer"].pop("callbacks")
    (tmp_path / "over.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit):
        fit("--config", "over.yaml", config="digits.yaml")
    assert message in capsys.readouterr().err


def test_an_option_reaches_every_callback_by_its_name():
    fit(
        "--trainer.callbacks.MMDTracker.every_n_steps",
        "3",
        "--trainer.callbacks.MMDTracker.kernel.init_args.kernels=[Laplace]",
        "--trainer.callbacks.GeneratorEMA.half_life=7",
        "--trainer.callbacks+=DiffAugment",
        "--trainer.callbacks.max_images=3",  # of the last one, as ever
        "--trainer.max_steps=1",
        config="digits.yaml",
    )
    (saved,) = Path("runs").rglob("config.yaml")
    callbacks = yaml.safe_load(saved.read_text())["trainer"]["callbacks"]
    found = {c["class_path"].rpartition(".")[2]: c.get("init_args", {}) for c in callbacks}
    shipped = yaml.safe_load((CONFIGS / "digits.yaml").read_text())["trainer"]["callbacks"]
    assert list(found)[: len(shipped) + 1] == [*(c["class_path"] for c in shipped), "DiffAugment"]
    assert found["MMDTracker"]["every_n_steps"] == 3
    assert len(found["MMDTracker"]["kernel"]["init_args"]["kernels"]) == 1
    assert found["GeneratorEMA"]["half_life"] == 7
    assert found["GeneratorEMA"]["ramp"] == 0.0693  # the file's own
    assert found["SampleGrid"]["scale"] == 4
    assert found["DiffAugment"]["max_images"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trainer.callbacks.MMDTrackr.every_n_steps=3"], "have 0 callbacks MMDTrackr, expected"),
        (["--trainer.callbacks.MMDTracker.every_n_steps"], "needs a value"),
    ],
)
def test_a_callback_that_is_not_there_is_named(words, message, capsys):
    with pytest.raises(SystemExit):
        fit(*words, config="digits.yaml")
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")  # over.yaml replaces callbacks
def test_a_run_with_nothing_to_draw_ends_well(tmp_path, capsys):
    (tmp_path / "over.yaml").write_text(
        yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "GeneratorEMA"}]}})
    )
    fit("--config", "over.yaml", "--trainer.max_steps=1", config="digits.yaml")
    out = capsys.readouterr().out
    assert "1 generator updates" in out
    assert "curves:" not in out


def test_errors_are_raised_where_a_traceback_is_asked_for(monkeypatch):
    monkeypatch.setenv("LIGHTNING_MMD_TRACEBACK", "1")
    with pytest.raises(ValueError, match="alpha"):
        fit("--model.rule.alpha=-1")


def test_the_configuration_rules_over_the_checkpoint(checkpoint, tmp_path):
    """Lightning would put the recorded arguments in place of the user's."""
    with pytest.warns(
        UserWarning, match=r"trained by ClosedForm\(.*beta=0.1.*goes on with .*beta=0.5"
    ):
        fit(f"--ckpt_path={checkpoint}", "--trainer.max_steps=6", "--model.rule.beta=0.5")
    path = tmp_path / "runs/digits_closed_form/version_1/checkpoints/last.ckpt"
    recorded = torch.load(path, weights_only=True)
    assert recorded["hyper_parameters"]["rule"]["init_args"]["beta"] == 0.5
    assert recorded["global_step"] == 6


def test_own_networks_are_found_and_the_bar_can_be_left_out(tmp_path, monkeypatch):
    (tmp_path / "mynets.py").write_text(
        "from lightning_mmd.networks import ConvGenerator\n\n\n"
        "class MyGenerator(ConvGenerator):\n    pass\n"
    )
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", ".")])
    fit("--model.generator.class_path=mynets.MyGenerator", "--trainer.enable_progress_bar=false")
    assert (tmp_path / "runs/digits_closed_form/version_0/checkpoints/last.ckpt").is_file()


def test_the_seed_is_the_models_too(tmp_path):
    fit("--seed_everything=3")
    path = tmp_path / "runs/digits_closed_form/version_0/checkpoints/last.ckpt"
    assert MMDGAN.load_from_checkpoint(path).seed == 3


def test_sample_draws_points_within_the_picture(tmp_path):
    fit("--trainer.max_steps=2", config="toy_gaussians.yaml")
    path = tmp_path / "runs/toy_gaussians/version_0/checkpoints/last.ckpt"
    main(["sample", f"--ckpt_path={path}", "--num=500", "--output=toy.png", "--scale=1"])
    with Image.open(tmp_path / "toy.png") as image:
        pixels = torch.tensor(list(image.convert("L").tobytes())).reshape(128, 128)
    inner = pixels[2:-2, 2:-2]
    assert (inner < 255).sum() > 0.9 * (pixels < 255).sum()


def test_an_image_folder_trains(tmp_path):
    (tmp_path / "pictures").mkdir()
    for index in range(40):
        pixels = torch.randint(0, 256, (8, 8), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / f"pictures/{index}.png")
    fit(
        "--data=ImageFolderDataModule",
        "--data.root=pictures",
        "--data.image_size=8",
        "--data.channels=1",
        "--data.batch_size=16",
    )


def test_sample_says_why_a_module_made_in_python_does_not_load(tmp_path):
    from lightning.pytorch import Trainer

    critic = LearnedKernelCritic(MLPFeatures(2, 4), 4)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_steps=0)
    trainer.strategy.connect(MMDGAN(MLPGenerator(2, 3), critic, latents=3))
    trainer.save_checkpoint(tmp_path / "python.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="made in Python"):
        run(["sample", f"--ckpt_path={tmp_path / 'python.ckpt'}"])


def test_sample_refuses_to_draw_nothing(checkpoint):
    with pytest.raises(ValueError, match="--num must be at least 1, got 0"):
        run(["sample", f"--ckpt_path={checkpoint}", "--num=0"])


def test_callbacks_and_their_schedules_go_by_bare_name(tmp_path):
    noise = {"class_path": "HalvingNoise", "init_args": {"initial": 0.1, "every": 2}}
    added = {"class_path": "NoiseInjection", "init_args": {"schedule": noise}}
    config = yaml.safe_load((CONFIGS / "digits_closed_form.yaml").read_text())
    config["trainer"]["callbacks"] += [added]
    (tmp_path / "noise.yaml").write_text(yaml.safe_dump(config))
    fit("--trainer.log_every_n_steps=1", config=tmp_path / "noise.yaml")
    (rows,) = tmp_path.glob("runs/digits_closed_form/version_0/metrics.csv")
    assert "noise/level" in rows.read_text().splitlines()[0]


def test_callbacks_that_a_second_configuration_replaces_are_told_of(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(
        "trainer: {callbacks: [{class_path: SampleGrid}, {class_path: GeneratorEMA}]}"
    )
    Path("b.yaml").write_text("trainer: {callbacks: [{class_path: GeneratorEMA}]}")
    Path("c.yaml").write_text("trainer: {callbacks+: [{class_path: MMDTracker}]}")
    arguments = ["fit", "--config", "a.yaml", "--config=b.yaml", "-c", "c.yaml", "--seed", "1"]
    assert config_files(arguments) == ["a.yaml", "b.yaml", "c.yaml"]
    with pytest.warns(UserWarning, match=r"b.yaml replaces .* a.yaml: SampleGrid is gone. Write"):
        tell_of_replaced_callbacks(["a.yaml", "b.yaml", "c.yaml"])
    tell_of_replaced_callbacks(["a.yaml", "c.yaml"])  # a warning would be an error here
    tell_of_replaced_callbacks(["b.yaml", "a.yaml", "nothing.yaml"])
