import random
import time

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_tracking import KERNEL, TinyGenerator, loaders, make_trainer
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid

from lightning_mmd.callbacks import MMDTracker, SampleGrid


def names(folder):
    return sorted(path.name for path in folder.glob("*"))


def pixels(path):
    with Image.open(path) as picture:
        return pil_to_tensor(picture.convert("RGB"))


def expected_grid(images, columns, low=-1.0, high=1.0):
    """Grid of images with a border of 2, each value to the nearest of 256 levels, by loops."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    columns = min(n, columns)
    grid = torch.zeros(3, rows * (height + 2) + 2, columns * (width + 2) + 2, dtype=torch.uint8)
    for i in range(n):
        top = 2 + (i // columns) * (height + 2)
        left = 2 + (i % columns) * (width + 2)
        levels = ((images[i].clamp(low, high) - low) / (high - low) * 255).round()
        grid[:, top : top + height, left : left + width] = levels.expand(3, -1, -1)
    return grid


def test_png_shows_the_samples_of_fixed_latents(tmp_path):
    pictures = SampleGrid(every_n_steps=3, num_samples=10, num_columns=4, dirpath=tmp_path, seed=7)
    model = TinyGenerator()
    start = model(model.fixed_latents(10, 7)).detach()
    make_trainer(tmp_path / "root", pictures, max_steps=5).fit(model, loaders()[0])
    end = model(model.fixed_latents(10, 7)).detach()
    assert names(tmp_path) == ["step=000000.png", "step=000003.png", "step=000005.png"]
    assert pictures.last_path == tmp_path / "step=000005.png"
    for samples, step in ((start, 0), (end, 5)):
        shown = pixels(tmp_path / f"step={step:06d}.png").int()
        assert (shown - expected_grid(samples, 4)).abs().max() <= 1  # rounding in float32
    assert not torch.equal(pixels(tmp_path / "step=000000.png"), shown)


def test_drawing_equals_make_grid_and_enlarges():
    images = torch.rand(5, 3, 6, 6) * 5 - 2  # some values outside of the range
    drawn = SampleGrid(num_columns=3, value_range=(-2.0, 2.0)).draw(images)
    grid = make_grid(images.float(), nrow=3, normalize=True, value_range=(-2.0, 2.0))
    assert torch.equal(drawn, (grid * 255).round().byte())
    assert (drawn.int() - expected_grid(images, 3, -2.0, 2.0)).abs().max() <= 1
    large = SampleGrid(num_columns=3, value_range=(-2.0, 2.0), scale=3).draw(images)
    assert torch.equal(large[:, 1::3, 2::3], drawn)
    assert torch.equal(large[:, ::3, ::3], drawn)
    assert large.shape == (3, *(3 * side for side in drawn.shape[1:]))


def test_points_become_a_histogram():
    # Four points to the right, above the axis; one to the left, below it; one far outside.
    points = torch.tensor([[0.5, 0.25]] * 4 + [[-0.5, -0.75], [9.0, 0.0]])
    drawn = SampleGrid(value_range=(-1.0, 1.0)).draw(points)
    assert drawn.shape == (3, 128, 128)
    dark = {(i, j): drawn[0, i, j].item() for i, j in (drawn[0] < 255).nonzero().tolist()}
    # Column (x + 1) / 2 * 128, row counted from above; brightness 1 - sqrt(count / largest).
    assert dark == {(47, 96): 0, (111, 32): 128, (63, 127): 128}


def test_values_that_are_not_finite_are_drawn():
    images = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).reshape(1, 1, 2, 2)
    drawn = SampleGrid().draw(images)[0]
    assert drawn.flatten().tolist() == [128, 255, 0, 255]


def test_steps_count_generator_updates(tmp_path):
    pictures = SampleGrid(every_n_steps=2, num_samples=4, dirpath=tmp_path)
    model = TinyGenerator(critic_steps=5)
    make_trainer(tmp_path, pictures, max_epochs=1).fit(model, loaders(train=100)[0])
    assert names(tmp_path) == [f"step={step:06d}.png" for step in (0, 2, 4, 5)]
    assert len(model.drawn) == 4


def test_a_resumed_run_repeats_no_picture(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=4, filename="{step}")
    pictures = SampleGrid(every_n_steps=4, num_samples=4, dirpath=tmp_path / "a")
    make_trainer(tmp_path, pictures, checkpoint, max_steps=5).fit(TinyGenerator(), loaders()[0])
    assert names(tmp_path / "a") == [f"step={step:06d}.png" for step in (0, 4, 5)]
    pictures, model = SampleGrid(4, num_samples=4, dirpath=tmp_path / "b"), TinyGenerator()
    trainer = make_trainer(tmp_path, pictures, max_steps=8)
    trainer.fit(model, loaders()[0], ckpt_path=tmp_path / "step=4.ckpt")
    assert names(tmp_path / "b") == ["step=000008.png"]


def test_pictures_lie_in_the_log_directory(tmp_path):
    for logger in (False, CSVLogger(tmp_path, "csv", version="run")):
        pictures = SampleGrid(num_samples=4)
        trainer = make_trainer(tmp_path / "root", pictures, max_steps=1, logger=logger)
        trainer.fit(TinyGenerator(), loaders()[0])
        folder = tmp_path / "csv" / "run" if logger else tmp_path / "root"
        assert pictures.last_path == folder / "samples" / "step=000001.png"
        assert names(folder / "samples") == ["step=000000.png", "step=000001.png"]
    pictures = SampleGrid(num_samples=4, dirpath=tmp_path / "none")
    make_trainer(tmp_path, pictures, fast_dev_run=True).fit(TinyGenerator(), loaders()[0])
    assert pictures.last_path is None
    assert not (tmp_path / "none").exists()


def test_tensorboard_shows_pictures_on_the_axis_of_updates(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    pictures = SampleGrid(every_n_steps=2, num_samples=4, num_columns=2)
    model = TinyGenerator(critic_steps=2)
    make_trainer(tmp_path, pictures, logger=logger, max_steps=3).fit(model, loaders()[0])
    events = EventAccumulator(logger.log_dir).Reload()
    shown = events.Images("samples")
    assert [event.step for event in shown] == [0, 2, 3]
    (tmp_path / "shown.png").write_bytes(shown[-1].encoded_image_string)
    assert torch.equal(pixels(tmp_path / "shown.png"), pixels(pictures.last_path))


def test_wandb_offline_holds_pictures_and_scalars(tmp_path):
    logger = WandbLogger(offline=True, save_dir=str(tmp_path), project="test")
    pictures = SampleGrid(every_n_steps=2, num_samples=4, num_columns=2)
    tracker = MMDTracker(KERNEL, every_n_steps=2, num_fake=8)
    try:
        trainer = make_trainer(tmp_path, pictures, tracker, logger=logger, max_steps=3)
        trainer.fit(TinyGenerator(critic_steps=2), *loaders())
        summary = dict(logger.experiment.summary)
        measured = logger.experiment.config["val/mmd2"]
    finally:
        logger.experiment.finish()
    saved = sorted(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png"))
    assert len(saved) == 3
    shown = [pixels(path) for path in saved]
    assert any(torch.equal(picture, pixels(pictures.last_path)) for picture in shown)
    assert names(pictures.last_path.parent) == [f"step={s:06d}.png" for s in (0, 2, 3)]
    assert summary["trainer/global_step"] == 3
    assert summary["val/mmd2"] == tracker.last
    assert summary["val/mmd2_real"] == tracker.floor
    assert measured["num_real"] == 20
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20
    while (record := log.read_bytes()).count(b"samples_") < 3 and time.monotonic() < deadline:
        time.sleep(0.05)  # W&B's own process writes the file
    assert record.count(b"samples_") >= 3
    assert b"val/mmd2" in record


def test_training_is_the_same_with_and_without_callbacks(tmp_path):
    def train(*callbacks):
        model, (train_loader, held_out) = TinyGenerator(), loaders()
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        trainer = make_trainer(tmp_path, *callbacks, max_steps=9)
        trainer.fit(model, train_loader, held_out)
        states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
        return model, states

    plain, plain_states = train()
    observers = SampleGrid(every_n_steps=2, num_samples=4), MMDTracker(KERNEL, every_n_steps=3)
    observed, observed_states = train(*observers)
    assert len(observed.drawn) > 8
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, observed.get_parameter(name))
    assert torch.equal(plain_states[0], observed_states[0])
    assert plain_states[1:] == observed_states[1:]


def test_bad_arguments_and_samples_are_refused(tmp_path):
    with pytest.raises(ValueError, match="every_n_steps of at least 1, got 0"):
        SampleGrid(every_n_steps=0)
    with pytest.raises(ValueError, match="of at least 1, got 0, 8 and 1"):
        SampleGrid(num_samples=0)
    with pytest.raises(ValueError, match=r"low < high, got \(1.0, 1.0\)"):
        SampleGrid(value_range=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"points of shape \(n, 2\), got samples.*\(4, 7\)"):
        SampleGrid().draw(torch.zeros(4, 7))
    trainer = make_trainer(tmp_path, SampleGrid(), max_steps=1)
    with pytest.raises(TypeError, match=r"got BoringModel. Use MMDGAN"):
        trainer.fit(BoringModel())
