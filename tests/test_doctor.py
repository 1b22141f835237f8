from pathlib import Path

import pytest
import torch
import yaml
from tiny import gan
from torch import nn

from lightning_mmd import (
    ClosedForm,
    DeepKernel,
    EmbeddingCritic,
    GradientAscent,
    Lagged,
    LearnedKernelCritic,
    RandomFourierFeatures,
    Split,
)
from lightning_mmd.cli import main
from lightning_mmd.commands.doctor import advise, check_parity, examine, suspicious_layers
from lightning_mmd.kernels import Gaussian
from lightning_mmd.networks import ConvGenerator, MLPFeatures, MLPGenerator

DIGITS = Path(__file__).parent.parent / "configs/digits_closed_form.yaml"


class Normalised(nn.Module):
    """Statistics of the batch that no layer shows."""

    def forward(self, x):
        return x - x.mean(0)


def make(kind=ClosedForm, generator=None, critic=None, **kwargs):
    critic = critic or LearnedKernelCritic(MLPFeatures(2, 12, (16,)), 12)
    generator = generator or MLPGenerator(2, 3, (16,))
    defaults = {"latents": 3} | ({} if kind is DeepKernel else {"beta": 0.1})
    return gan(generator, critic, kind, **(defaults | kwargs))


@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({}, ["generator", "critic", "critic's solved weights"]),
        ({"kind": GradientAscent, "estimator": Split()}, ["generator", "critic"]),
        ({"kind": GradientAscent, "estimator": Lagged()}, ["generator", "critic"]),
        (
            {"kind": DeepKernel, "critic": EmbeddingCritic(MLPFeatures(2, 8), 8, 4), "alpha": 1.0},
            ["generator", "critic"],
        ),
    ],
    ids=["closed form", "split", "lagged", "deep kernel"],
)
def test_gradients_of_two_processes_are_those_of_one(kwargs, names):
    model = make(**kwargs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = check_parity(model)
    assert [row.name for row in rows] == names
    assert max(row.error for row in rows) < 1e-11
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rounding_that_conjugate_gradients_amplify_is_no_alarm():
    features = RandomFourierFeatures(Gaussian(0.5), 2, 256)
    critic = LearnedKernelCritic(nn.Identity(), 2, random_features=features)
    model = make(critic=critic, max_iterations=100, tolerance=1e-12)
    assert max(row.error for row in check_parity(model)) < 1e-9


def test_what_the_training_does_with_a_gradient_takes_no_part():
    """Float32 networks, Adam's first step, clipping, several critic steps, latents of one's own."""
    torch.set_default_dtype(torch.float32)
    model = make(
        generator_optimizer=torch.optim.Adam,
        generator_clip_norm=1e-3,
        critic_steps=3,
        latents=lambda num: torch.rand(num, 3),
    )
    assert max(row.error for row in check_parity(model)) < 1e-11


def test_batch_statistics_are_found_and_named(capsys):
    layers = [nn.Linear(3, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.3), nn.Linear(16, 2)]
    generator = nn.Sequential(*layers)
    assert not examine(make(generator=generator))
    out = capsys.readouterr().out
    assert out.count("FAILS") == 3
    assert "generator.1 (BatchNorm1d) takes statistics over the batch of its own process" in out
    assert "generator.3 (Dropout) draws random numbers" in out
    assert "GroupNorm" in out
    assert out.count("problem:") == 2
    generator[1].eval()  # means nothing: training mode is what counts
    assert list(suspicious_layers(generator, (torch.randn(8, 3),))) == [
        "1 (BatchNorm1d)",
        "3 (Dropout)",
    ]
    assert generator[1].num_batches_tracked == 0


def test_statistics_outside_layers_are_reported_too(capsys):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, z):
            x = self.linear(z)
            return x - x.mean(0)

    assert not examine(make(generator=Own()))
    assert "no layer explains it" in capsys.readouterr().out
    assert list(suspicious_layers(Normalised(), (torch.randn(4, 2),))) == [" (Normalised)"]


def test_layers_of_our_own_networks_are_above_suspicion():
    generator = ConvGenerator((1, 8, 8), 5, (8, 4))
    assert suspicious_layers(generator, (torch.randn(6, 5),)) == {}
    fixed = LearnedKernelCritic(
        nn.Identity(), 2, random_features=RandomFourierFeatures(Gaussian(), 2, 8)
    )
    assert suspicious_layers(fixed, (torch.randn(6, 2),)) == {}
    rows = check_parity(make(critic=fixed))
    assert [row.name for row in rows] == ["generator", "critic's solved weights"]
    assert max(row.error for row in rows) < 1e-11


def test_advice_is_the_stability_bound_of_the_models_own_critic():
    model = make(GradientAscent, alpha=3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lines = advise(model)
    z, features = model.fixed_latents(256), model.critic.feature_map
    parameters = {name: p.detach() for name, p in model.generator.named_parameters()}

    def embedding(theta):
        return features(torch.func.functional_call(model.generator, theta, (z,))).mean(0)

    jacobian = torch.cat(
        [part.flatten(1) for part in torch.func.jacrev(embedding)(parameters).values()], 1
    )
    jacobian = jacobian.detach()
    top = float(torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1])
    told = float(lines[1].split(" = ")[1])
    assert told == pytest.approx(2 / (3.0 * top + 0.1), rel=0.02)
    # It is a bound: plain ascent settles below it and explodes above it.
    for rate, settles in ((0.9 * told, True), (1.2 * told, False)):
        w = torch.ones(len(jacobian))
        for _ in range(400):
            w = w - rate * (3.0 * jacobian @ (jacobian.T @ w) + 0.1 * w)
        assert bool(w.norm() < 1) == settles
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert (
        "LearnedKernelCritic" in advise(make(GradientAscent, critic=nn.Linear(2, 1), beta=0.0))[0]
    )


def test_the_command_examines_the_model_of_a_configuration(tmp_path, monkeypatch, capsys):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(DIGITS.read_text())
    config["trainer"]["accelerator"] = "gpu"  # nothing of it is needed
    config["data"] = {"class_path": "ImageFolderDataModule", "init_args": {"root": "nowhere"}}
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(config))
    main(["doctor", "--config=digits.yaml"])
    out = capsys.readouterr().out
    assert "all is well" in out
    assert "stable below a learning rate" in out
    assert "critic's solved weights: " in out
    assert list(tmp_path.iterdir()) == [tmp_path / "digits.yaml"]
    (tmp_path / "batchnets.py").write_text(
        "from torch import nn\n\n\n"
        "class Batch(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        shape = nn.Unflatten(1, (1, 8, 8))\n"
        "        super().__init__(nn.Linear(32, 64), nn.BatchNorm1d(64), shape)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--config=digits.yaml", "--model.generator=batchnets.Batch"])
    assert exit_.value.code == 1
    assert "generator.1 (BatchNorm1d)" in capsys.readouterr().out
