"""What follows from a folder of pictures: networks, kernel, changes for few images, estimate."""

import json
import math

import pytest
import torch
from PIL import Image
from tiny import quiet_trainer
from torch import nn

from lightning_mmd import MMDGAN, DiffAugment, LearnedKernelCritic, PixelKernel, Rehearsal
from lightning_mmd.callbacks import rehearsal
from lightning_mmd.callbacks.augment import augmented
from lightning_mmd.callbacks.rehearsal import duration
from lightning_mmd.cli import main
from lightning_mmd.data import DigitsDataModule
from lightning_mmd.networks import ConvFeatures, ConvGenerator

SHAPE = (1, 8, 8)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_translation_moves_by_at_most_an_eighth_and_fills_with_grey():
    x = torch.rand(40, 2, 16, 8) + 1
    y = augmented(x, ["translation"], source())
    seen = set()
    for before, after in zip(x, y, strict=True):
        shifts = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-1, 2)
            if torch.equal(after, shifted(before, dy, dx))
        ]
        assert len(shifts) == 1
        seen |= set(shifts)
    assert {dy for dy, _ in seen} == {-2, -1, 0, 1, 2}
    assert {dx for _, dx in seen} == {-1, 0, 1}


def shifted(image, dy, dx):
    """Move an image by hand: pixel (i, j) comes from (i + dy, j + dx), 0 where there is none."""
    result = torch.zeros_like(image)
    _, height, width = image.shape
    for i in range(height):
        for j in range(width):
            if 0 <= i + dy < height and 0 <= j + dx < width:
                result[:, i, j] = image[:, i + dy, j + dx]
    return result


def test_a_cutout_is_a_rectangle_of_half_the_sides():
    y = augmented(torch.ones(60, 1, 16, 8), ["cutout"], source())[:, 0]
    areas = set()
    for image in y:
        rows, columns = (image == 0).any(1), (image == 0).any(0)
        assert (image == 0).sum() == rows.sum() * columns.sum() > 0
        assert rows.nonzero().diff(dim=0).eq(1).all()
        areas.add(int((image == 0).sum()))
    assert max(areas) == 8 * 4
    assert min(areas) < 8 * 4  # at the border a part of it lies outside


def test_colours_change_as_the_formula_says():
    x = torch.rand(5, 3, 4, 4) * 2 - 1
    y = augmented(x, ["colour"], source(3))
    rng = source(3)
    brightness, saturation, contrast = (
        torch.rand(5, 1, 1, 1, generator=rng, dtype=torch.float64) for _ in range(3)
    )
    z = x + brightness - 0.5
    grey = z.mean(1, keepdim=True)
    z = grey + 2 * saturation * (z - grey)
    level = z.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(y, level + (0.5 + contrast) * (z - level))
    grey_images = torch.rand(4, 1, 4, 4)  # one channel has no saturation, and stays finite
    assert augmented(grey_images, ["colour"], source()).isfinite().all()


def test_changes_have_two_derivatives():
    def value(x):
        return augmented(x, ["colour", "translation", "cutout"], source()).pow(3)

    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    assert torch.autograd.gradcheck(value, x)
    assert torch.autograd.gradgradcheck(value, x)


def test_other_changes_and_other_data_are_named():
    with pytest.raises(ValueError, match="colour, translation, cutout, got"):
        DiffAugment(["blur"])
    with pytest.raises(ValueError, match=r"images \(n, c, h, w\), got shape \(2, 3\)"):
        augmented(torch.zeros(2, 3), ["colour"], source())


def model():
    torch.manual_seed(0)
    generator = ConvGenerator(SHAPE, 8, (16, 8))
    critic = LearnedKernelCritic(ConvFeatures(SHAPE, 16, (8, 16), activated=True), 16)
    return MMDGAN(generator, critic, latents=8)


def fit(path, steps, callbacks, ckpt=None):
    torch.set_default_dtype(torch.float32)
    trained = model()
    trainer = quiet_trainer(path, max_steps=steps, callbacks=callbacks)
    trainer.fit(trained, DigitsDataModule(batch_size=32), ckpt_path=ckpt, weights_only=True)
    return trained, trainer


def same(one, other):
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_few_images_are_changed_and_many_are_not(tmp_path):
    plain, _ = fit(tmp_path, 3, [])
    many, _ = fit(tmp_path, 3, [DiffAugment(max_images=100)])
    callback = DiffAugment(max_images=100)
    fit(tmp_path, 1, [callback])
    callback.max_images = 5000  # the next training finds its images few
    few, _ = fit(tmp_path, 3, [callback])
    assert same(plain, many)
    assert not same(plain, few)
    again, _ = fit(tmp_path, 3, [DiffAugment()])
    assert same(few, again)


def test_a_resumed_training_draws_the_same_changes(tmp_path):
    whole, _ = fit(tmp_path, 4, [DiffAugment()])
    _, trainer = fit(tmp_path, 2, [DiffAugment()])
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(tmp_path, 4, [DiffAugment()], tmp_path / "half.ckpt")
    assert same(whole, resumed)


def test_the_critic_sees_changed_images_and_observers_do_not(tmp_path):
    seen = []
    torch.set_default_dtype(torch.float32)
    trained = model()
    trained.critic.features.register_forward_pre_hook(
        lambda module, inputs: seen.append((trained.training, inputs[0].abs().max().item()))
    )
    trainer = quiet_trainer(tmp_path, max_steps=3, callbacks=[DiffAugment(["colour"])])
    trainer.fit(trained, DigitsDataModule(batch_size=32))
    assert max(value for training, value in seen if training) > 1.05  # colours leave [-1, 1]
    seen.clear()
    trainer.validate(trained, DigitsDataModule(batch_size=32), verbose=False)
    assert seen
    assert max(value for _, value in seen) <= 1


def test_the_rehearsal_changes_nothing_and_counts_right(tmp_path, monkeypatch):
    callback, told = Rehearsal(images=1000), []
    monkeypatch.setattr(rehearsal, "rank_zero_info", told.append)
    rehearsed, _ = fit(tmp_path, 3, [DiffAugment(), callback])
    plain, _ = fit(tmp_path, 3, [DiffAugment()])
    assert same(rehearsed, plain)
    (text,) = told
    generator = sum(p.numel() for p in plain.generator.parameters())
    assert f"generator {generator:,}, critic" in text
    assert f"1,000 images ({math.ceil(1000 / 32)} batches of 32)" in text
    assert callback.seconds > 0
    # the activations of both networks on 32 images at least
    assert callback.update_bytes > 32 * 4 * (16 * 4 * 4 + 8 * 8 * 8)


def test_a_batch_is_one_critic_step(tmp_path, monkeypatch):
    """Several critic steps an update take no more batches for as many images."""
    told = []
    monkeypatch.setattr(rehearsal, "rank_zero_info", told.append)
    torch.set_default_dtype(torch.float32)
    trained = model()
    trained.critic_steps = 3
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[Rehearsal(images=64)])
    trainer.fit(trained, DigitsDataModule(batch_size=32))
    assert "64 images (2 batches of 32)" in told[0]


def test_what_does_not_fit_memory_is_said_before_the_first_step(tmp_path, monkeypatch):
    def play(self, model, real):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Rehearsal, "_play", play)
    with pytest.raises(MemoryError, match=r"32 images of shape \(1, 8, 8\) does not fit.*micro"):
        fit(tmp_path, 1, [Rehearsal()])


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2, "4 s"), (99, "99 s"), (600, "10 minutes"), (7200, "2.0 hours")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_pixel_kernel_is_that_of_the_size():
    x, y = torch.randn(3, 50), torch.randn(4, 50)
    distances = torch.cdist(x, y).square()
    expected = sum((1 + distances / (2 * a * 50)) ** -a for a in (0.2, 0.5, 1.0, 2.0, 5.0))
    torch.testing.assert_close(PixelKernel()(x, y), expected)
    torch.testing.assert_close(PixelKernel().diagonal(x), torch.full((3,), 5.0))


@pytest.mark.parametrize(
    ("shape", "generator", "features"),
    [
        ((1, 28, 28), [64, 32, 16], [16, 32, 64]),
        ((3, 32, 32), [128, 64, 32], [32, 64, 128]),
        ((3, 64, 64), [256, 128, 64, 32], [32, 64, 128, 256]),
        ((3, 96, 96), [256, 256, 128, 64, 32], [32, 64, 128, 256, 256]),
        ((3, 8, 8), [32], [32]),
    ],
)
def test_automatic_channels(shape, generator, features):
    made = ConvGenerator(shape, 4, "auto")
    widths = [m.num_channels for m in made.modules() if isinstance(m, nn.GroupNorm)]
    assert widths == generator
    net = ConvFeatures(shape, 8, "auto")
    assert [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)] == features
    assert net(made(torch.randn(2, 4))).shape == (2, 8)


def test_a_shape_from_the_data_needs_the_command_line():
    with pytest.raises(ValueError, match="is for the command line"):
        ConvGenerator("data")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    for i in range(24):
        path = tmp_path / "pictures" / ("cats" if i % 2 else "dogs") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((20 + i, 40), 60).convert(("L", "RGB", "RGBA")[i % 3]).save(path)
    return tmp_path


ARGUMENTS = ["fit", "--config=images", "--data.root=pictures", "--data.cache_dir=cache"]


def test_a_folder_trains_by_one_command(folder, capsys):
    main([*ARGUMENTS, "--data.image_size=16", "--data.batch_size=8", "--trainer.max_steps=2"])
    (path,) = folder.glob("runs/images/*/checkpoints/last.ckpt")
    loaded = MMDGAN.load_from_checkpoint(path)
    assert loaded.sample(2).shape == (2, 3, 16, 16)
    assert loaded.hparams["generator"]["init_args"]["sample_shape"] == [3, 16, 16]
    saved = next(folder.glob("runs/images/*/config.yaml")).read_text()
    assert "sample_shape: data" not in saved


def test_sizes_and_data_that_do_not_fit_are_named(folder, capsys):
    with pytest.raises(SystemExit):
        main([*ARGUMENTS, "--data.image_size=50"])
    assert "divisible by 8, got 50 x 50" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*ARGUMENTS[:2], "--data.root=nothing"])
    assert "which is no folder" in capsys.readouterr().err
    (folder / "pictures" / "cats" / "bad.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        main([*ARGUMENTS, "--data.image_size=16"])
    assert "bad.png" in capsys.readouterr().err
    points = json.dumps({"class_path": "GaussianMixtureDataModule"})
    with pytest.raises(SystemExit):
        main(["fit", "--config=images", f"--data={points}"])
    assert "an image has a shape (c, h, w), got (2,)" in capsys.readouterr().err
