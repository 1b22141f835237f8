"""SampleQuality: the scores of FeatureMetrics on a training's clock, which it leaves alone."""

import random

import pytest
import torch
from tiny import closed_form, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_mmd import FeatureMetrics, LearnedKernelCritic, SampleQuality
from lightning_mmd.callbacks import GeneratorEMA
from lightning_mmd.networks import MLPFeatures, MLPGenerator

REAL = torch.randn(40, 2, generator=torch.Generator().manual_seed(1)).double() + 1.0
HELD = torch.randn(30, 2, generator=torch.Generator().manual_seed(2)).double() + 1.0
SIZES = {"every_n_steps": 2, "num_real": 30, "num_fake": 25, "subsets": 5}


def make_model():
    torch.manual_seed(0)
    return closed_form(
        MLPGenerator(2, 3, (8,)), LearnedKernelCritic(MLPFeatures(2, 4, (8,)), 4), latents=3
    )


def fit(path, callbacks, steps=4, ckpt_path=None, model=None):
    model = make_model() if model is None else model
    trainer = quiet_trainer(path, max_steps=steps, callbacks=callbacks, limit_val_batches=0)
    trainer.fit(
        model, DataLoader(REAL, batch_size=40), DataLoader(HELD, batch_size=30), ckpt_path=ckpt_path
    )
    return trainer, model


def test_scores_are_those_of_the_samples_of_each_update(tmp_path):
    quality = SampleQuality(nn.Identity(), **SIZES)
    trainer, model = fit(tmp_path, [quality])
    assert [entry["step"] for entry in quality.history] == [0, 2, 4]
    last = quality.history[-1]
    seed = random.Random("0 4").getrandbits(32)
    fake = model.sample(25, model.fixed_latents(25, seed))
    metrics = FeatureMetrics(nn.Identity(), subsets=5)
    metrics.update(HELD[torch.randperm(30, generator=torch.Generator().manual_seed(0))], real=True)
    metrics.update(fake, real=False)
    for name, value in metrics.compute().items():
        assert last[name] == pytest.approx(float(value), rel=1e-9), name
        assert float(trainer.callback_metrics[f"val/{name}"]) == pytest.approx(last[name])
    assert quality.last == {name: last[name] for name in metrics.compute()}
    assert trainer.callback_metrics["val/kid_real"] == pytest.approx(quality.floors["kid"])
    assert "val/kid" in trainer.progress_bar_metrics


def test_the_floor_is_that_of_training_images(tmp_path):
    quality = SampleQuality(nn.Identity(), **SIZES)
    fit(tmp_path, [quality], steps=1)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:30]
    metrics = FeatureMetrics(nn.Identity(), subsets=5)
    metrics.update(HELD[torch.randperm(30, generator=torch.Generator().manual_seed(0))], real=True)
    metrics.update(REAL[order], real=False)
    for name, value in metrics.compute().items():
        assert quality.floors[name] == pytest.approx(float(value), rel=1e-9), name


def test_training_is_the_same_beside_it_and_averages_are_scored(tmp_path):
    plain = fit(tmp_path, [GeneratorEMA(half_life=1.0)])[1]
    quality = SampleQuality(nn.Identity(), **SIZES)
    watched = fit(tmp_path, [GeneratorEMA(half_life=1.0), quality])[1]
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
    live = SampleQuality(nn.Identity(), **SIZES)
    fit(tmp_path, [live])
    assert live.history[0]["kid"] == quality.history[0]["kid"]  # no average before an update
    assert live.history[-1]["kid"] != quality.history[-1]["kid"]


def test_two_with_names_and_a_resumed_history(tmp_path):
    first, other = (
        SampleQuality(nn.Identity(), name=name, neighbours=None, **SIZES) for name in ("a", "b")
    )
    trainer, _ = fit(tmp_path, [first, other], steps=2)
    trainer.save_checkpoint(tmp_path / "at2.ckpt")
    assert {"val/a/kid", "val/b/kid"} <= trainer.callback_metrics.keys()
    assert "val/a/precision" not in trainer.callback_metrics
    again, twin = (
        SampleQuality(nn.Identity(), name=name, neighbours=None, **SIZES) for name in ("a", "b")
    )
    fit(tmp_path, [again, twin], steps=4, ckpt_path=tmp_path / "at2.ckpt")
    whole = SampleQuality(nn.Identity(), name="a", neighbours=None, **SIZES)
    fit(tmp_path, [whole], steps=4)
    assert [e["step"] for e in again.history] == [0, 2, 4]
    assert [e["kid"] for e in again.history] == [e["kid"] for e in whole.history]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": 3}, "a torch.nn.Module, got 3"),
        ({"num_real": 1}, "SampleQuality needs num_real and num_fake of at least 2"),
        ({"every_n_steps": 0}, "SampleQuality needs every_n_steps of at least 1"),
        ({"subsets": 0}, "subsets must be at least 1"),
    ],
)
def test_what_is_wrong_is_named(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SampleQuality(**({"features": nn.Identity()} | arguments))
