import csv

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
)

from lightning_mmd import MMDGAN, ClosedForm, LearnedKernelCritic
from lightning_mmd.callbacks import BandwidthSchedule, ConvergenceMonitor, GeneratorEMA
from lightning_mmd.cli import HalvingCLI, halving, main
from lightning_mmd.commands.halving import climb, shorten_steps
from lightning_mmd.networks import MLPFeatures, MLPGenerator

CONFIG = {
    "seed_everything": 0,
    "trainer": {
        "max_steps": 12,
        "max_epochs": -1,
        "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "toy"}},
        "callbacks": [
            {
                "class_path": "MMDTracker",
                "init_args": {
                    "kernel": {"class_path": "Gaussian", "init_args": {"bandwidth": 1.0}},
                    "num_real": 400,
                    "num_fake": 800,
                },
            },
            {"class_path": "GeneratorProgressBar"},
            {"class_path": "SampleGrid"},
            {"class_path": "ModelCheckpoint"},
        ],
    },
    "model": {
        "latents": 2,
        "rule": {"class_path": "ClosedForm", "init_args": {"beta": 0.03, "eta": 0.4}},
        "generator_scheduler": {
            "class_path": "torch.optim.lr_scheduler.LinearLR",
            "init_args": {"end_factor": 0.2, "total_iters": 10},
        },
        "generator": {
            "class_path": "MLPGenerator",
            "init_args": {"sample_dim": 2, "latent_dim": 2, "hidden": [16]},
        },
        "critic": {
            "class_path": "LearnedKernelCritic",
            "init_args": {
                "num_features": 2,
                "features": {"class_path": "torch.nn.Identity"},
                "random_features": {
                    "class_path": "RandomFourierFeatures",
                    "init_args": {
                        "in_features": 2,
                        "num_features": 32,
                        "kernel": {"class_path": "Gaussian", "init_args": {"bandwidth": 1.0}},
                    },
                },
            },
        },
    },
    "data": {
        "class_path": "GaussianMixtureDataModule",
        "init_args": {"num_modes": 4, "num_samples": 2000, "batch_size": 256},
    },
}


def schedule(factor, num_steps, scheduler, **kwargs):
    """Learning rates of generator and critic at every step, and their optimizers."""
    critic = LearnedKernelCritic(MLPFeatures(2, 4), 4)
    rule, scheduler = ClosedForm(), {"generator_scheduler": scheduler}
    model = MMDGAN(MLPGenerator(2, 2), critic, rule, latents=2, **scheduler, **kwargs)
    shorten_steps(model, factor)
    optimizers, schedulers = model.configure_optimizers()
    rates = []
    for _ in range(num_steps):
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        for optimizer, stretched in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            stretched.step()
    return torch.tensor(rates), optimizers


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda optimizer: LinearLR(optimizer, 1.0, 0.05, total_iters=9),
        lambda optimizer: CosineAnnealingLR(optimizer, T_max=12, eta_min=0.01),
        lambda optimizer: MultiStepLR(optimizer, milestones=[3, 7], gamma=0.3),
        lambda optimizer: ExponentialLR(optimizer, gamma=0.8),
        lambda optimizer: OneCycleLR(optimizer, 0.4, total_steps=13, cycle_momentum=False),
        None,
    ],
    ids=["linear", "cosine", "multistep", "exponential", "one cycle", "none"],
)
@pytest.mark.parametrize("factor", [2, 4])
def test_schedules_are_the_same_functions_of_the_cumulative_learning_rate(scheduler, factor):
    rates, _ = schedule(1, 12, scheduler)
    shorter, _ = schedule(factor, 12 * factor, scheduler)
    cumulative, every = rates.cumsum(0), shorter.cumsum(0)[factor - 1 :: factor]
    assert torch.allclose(every, cumulative, rtol=1e-12)
    assert rates[0, 1] == 5e-4  # the default, Adam's
    assert shorter[0].tolist() == (rates[0] / factor).tolist()


def test_adams_memory_is_held_fixed_on_the_axis_and_that_of_momentum_cannot_be():
    def make(betas):
        return lambda parameters: Adam(parameters, lr=0.1, betas=betas)

    _, (_, critic) = schedule(4, 1, None, critic_optimizer=make((0.0, 0.9)))
    first, second = critic.param_groups[0]["betas"]
    assert first == 0.0
    assert second**4 == pytest.approx(0.9, rel=1e-12)
    sgd = {"generator_optimizer": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9)}
    with pytest.warns(UserWarning, match="momentum of SGD counts steps"):
        schedule(2, 1, None, **sgd)
    schedule(1, 1, None, **sgd)


@pytest.fixture
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def test_a_closed_form_training_passes(in_a_folder_of_its_own, capsys):
    result = halving(["--config=toy.yaml", "--seeds=[0,1]", "--tolerance=0.05"])
    assert result.verdict == "converged"
    assert 1e-4 < result.distances[-1] < 0.05
    out = capsys.readouterr().out
    assert "verdict: converged dynamics" in out
    folder = in_a_folder_of_its_own / "runs/toy/version_0"
    with (folder / "halving.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    runs = {
        (k, seed): [row for row in rows if (row["halvings"], row["seed"]) == (k, seed)]
        for k in range(3)
        for seed in range(2)
    }
    for (k, seed), run in runs.items():
        first = runs[0, seed]
        assert [row["step"] for row in run] == [2**k * step for step in range(13)]
        axis = [row["cumulative_lr"] for row in run]
        assert axis == pytest.approx([row["cumulative_lr"] for row in first])
        assert run[0]["mmd2"] == first[0]["mmd2"]  # one start
        assert run[-1]["mmd2"] < 0.5 * run[0]["mmd2"]
    assert runs[0, 0][0]["mmd2"] != runs[0, 1][0]["mmd2"]
    assert (folder / "halving_distances.csv").read_text().count("\n") == 3
    assert not list(in_a_folder_of_its_own.rglob("*.ckpt"))
    assert sorted(path.suffix for path in folder.iterdir()) in (
        [".csv", ".csv"],
        [".csv", ".csv", ".png"],
    )


def test_steps_that_are_too_long_do_not_pass(in_a_folder_of_its_own, capsys):
    """A witness without damping on the gradient-ascent side: alpha = 0 and a fast critic."""
    result = halving(
        [
            "--config=toy.yaml",
            "--model.rule=GradientAscent",
            "--model.rule.alpha=0",
            "--model.rule.beta=0",
            "--model.generator_optimizer=SGD",
            "--model.generator_optimizer.init_args.lr=0.3",
            "--model.critic_optimizer=SGD",
            "--model.critic_optimizer.init_args.lr=3.0",
            "--model.generator_scheduler=null",
            "--trainer.max_steps=20",
        ]
    )
    assert result.verdict != "converged"
    assert min(result.distances) > 0.1
    told = capsys.readouterr().out
    assert "1 seed of 20 updates decide little: take at least 3 seeds and 100 updates" in told


def test_callbacks_are_stretched_with_the_run(in_a_folder_of_its_own, monkeypatch):
    """What a callback did at the end of a run in its place: averages, widths, and a warning."""
    seen, warned = [], []
    monkeypatch.setattr("lightning_mmd.commands.halving.rank_zero_warn", warned.append)

    class Strange(Callback):
        def on_train_end(self, trainer, pl_module):
            average, width = trainer.callbacks[:2]
            seen.append((average.half_life, width.num_steps, width.factor(trainer.global_step)))

    class Built:
        """A command line whose trainer has further callbacks."""

        def __init__(self, overrides):
            cli = HalvingCLI(["--config=toy.yaml", *overrides], "halving", "")
            schedule = BandwidthSchedule(initial=4.0, num_steps=6)
            cli.trainer.callbacks[:0] = [GeneratorEMA(half_life=3), schedule, Strange()]
            cli.trainer.callbacks.append(ConvergenceMonitor())
            vars(self).update(vars(cli))

    width = pytest.approx(4 ** (2 / 3))  # a third of the way
    climb(Built(["--trainer.max_steps=2"]), Built)
    assert [text for text in warned if "Strange may count steps" in text] == warned
    assert len(warned) == 2  # of the shorter runs
    assert seen == [(3, 6, width), (6, 12, width), (12, 24, width)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.rule.trust_region=TrustRegion"], "chooses them by itself"),
        (["--num_halvings=1"], "num_halvings >= 2"),
        (["--trainer.callbacks=null"], "add an MMDTracker"),
        (["--trainer.max_steps=-1"], "needs an end to double"),
    ],
)
def test_what_is_missing_is_said(args, message, in_a_folder_of_its_own, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["halving", "--config=toy.yaml", *args])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err
