"""Folders of images: every kind of pixel becomes the right bytes, every bad file is named."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from lightning_mmd.data import ImageFolderDataModule

SIDE = 6


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def folder(root, **kwargs):
    """A data module of a folder, whose images lie one third in each split."""
    kwargs = {
        "image_size": SIDE,
        "batch_size": 1,
        "val_fraction": 0.34,
        "test_fraction": 0.34,
    } | kwargs
    return ImageFolderDataModule(root, **kwargs)


def served(data):
    """All images of the three splits as bytes (n, c, h, w), in the order of their files."""
    data.prepare_data()
    data.setup()
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    images = torch.cat([torch.cat(list(loader)) for loader in loaders])
    order = order_of(data)
    levels = (images.double() + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=2e-5)
    return levels.round().to(torch.uint8)[order.argsort()]


def order_of(data):
    train, val, test = data._splits
    rows = data.train_dataloader().sampler.indices(0, len(train))
    return torch.cat([train.indices[rows], val.indices, test.indices])


def colours(rng, num=3):
    return rng.integers(0, 256, (num, SIDE, SIDE, 3), dtype=np.uint8)


def write(root, images, name="{}.png", **kwargs):
    for index, image in enumerate(images):
        path = root / name.format(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **kwargs)


def png16(path, pixels):
    """Write a colour PNG of 16 bits a channel, which Pillow reads and does not write."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    height, width, channels = pixels.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


# --- which images, and what becomes of 8-bit ones ---


@pytest.mark.parametrize("name", ["{}.png", "class{}/x.PNG", "a/b/{}.bmp"])
def test_images_of_flat_and_nested_folders_are_pixel_exact(name, tmp_path, rng):
    images = colours(rng, 8)
    write(tmp_path, images, name)
    (tmp_path / "notes.txt").write_text("not an image")
    data = folder(tmp_path)
    assert torch.equal(served(data), torch.from_numpy(images).permute(0, 3, 1, 2))
    assert [len(split) for split in data._splits] == [2, 3, 3]


def test_a_second_start_and_another_split_take_the_decoded_bytes(tmp_path, rng, cache, monkeypatch):
    write(tmp_path, colours(rng, 8))
    first = served(folder(tmp_path))
    monkeypatch.setattr("lightning_mmd.data.decoded.decode", None)  # it would fail every file
    assert torch.equal(served(folder(tmp_path, seed=1, num_workers=1)), first)
    assert len(list(cache.iterdir())) == 2
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    changed = 255 - np.asarray(Image.open(tmp_path / "3.png"))
    Image.fromarray(changed).save(tmp_path / "3.png")
    os.utime(tmp_path / "3.png", ns=(1, 1))
    assert torch.equal(served(folder(tmp_path))[3], 255 - first[3])
    assert len(list(cache.iterdir())) == 2  # the old entry has made room
    assert served(folder(tmp_path, channels=1)).shape[1] == 1
    assert len(list(cache.iterdir())) == 4


def test_a_damaged_cache_is_made_anew(tmp_path, rng, cache):
    write(tmp_path, colours(rng, 3))
    first = served(folder(tmp_path))
    (entry,) = cache.glob("*.npy")
    entry.write_bytes(entry.read_bytes()[:-7])
    assert torch.equal(served(folder(tmp_path)), first)


def test_a_cache_that_cannot_be_written_is_named_with_a_cure(tmp_path, rng):
    write(tmp_path / "images", colours(rng, 3))
    (tmp_path / "file").write_text("in the way")
    broken = folder(tmp_path / "images", cache_dir=tmp_path / "file/cache")
    with pytest.raises(OSError, match=r"cannot be written to '.*file/cache'.*set `cache_dir`"):
        broken.prepare_data()
    served(folder(tmp_path / "images", cache_dir=tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_images_are_resized_and_their_centre_is_cut_out(tmp_path):
    # Columns of 4 pixels in 4 levels; the central 8 of 16 columns survive, then halve.
    levels = np.repeat(np.array([0, 50, 200, 250], dtype=np.uint8), 4)
    write(tmp_path, [np.tile(levels, (8, 1))] * 3)
    (image, *_) = served(folder(tmp_path, image_size=4, channels=1)).double()
    assert image.shape == (1, 4, 4)
    middle = torch.tensor([50, 50, 200, 200]).double()
    # The resampling filter blurs the inner edge, never beyond half the step of 150 levels.
    assert (image - middle).abs().max() < 75
    assert torch.equal(image[0], image[0, :1].expand(4, 4))


def test_class_folders_are_labels(tmp_path, rng):
    images = colours(rng, 9)
    for index, name in enumerate("bac"):
        write(tmp_path / name, images[3 * index : 3 * index + 3])
    data = folder(tmp_path, labels=True)
    data.setup()
    assert (data.classes, data.num_classes) == (["a", "b", "c"], 3)
    pairs = [pair for split in (0, 1, 2) for pair in data._splits[split]]
    found = {np.asarray(((i + 1) * 127.5).round().byte()).tobytes(): int(c) for i, c in pairs}
    for index, image in enumerate(images):
        assert found[image.transpose(2, 0, 1).tobytes()] == [1, 0, 2][index // 3]
    write(tmp_path, images[:1], "loose.png")
    with pytest.raises(ValueError, match=r"loose\.png lies in none\. Move it, or leave `labels`"):
        folder(tmp_path, labels=True).setup()


# --- other kinds of pixels ---


def test_grey_weighs_the_colours(tmp_path, rng):
    images = colours(rng)
    write(tmp_path, images)
    luma = images @ np.array([0.299, 0.587, 0.114])
    grey = served(folder(tmp_path, channels=1))[:, 0].double()
    assert (grey - torch.from_numpy(luma)).abs().max() < 0.51


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_grey_images_of_16_bits(mode, tmp_path, rng):
    values = rng.integers(0, 65536, (3, SIDE, SIDE)).astype(np.uint16)
    values[0, 0, :4] = [0, 65535, 128, 129]  # 128 / 257 is below a half, 129 / 257 above
    if mode == "I;16":
        write(tmp_path, list(values))
    else:
        big = [Image.frombytes("I;16B", (SIDE, SIDE), v.astype(">u2").tobytes()) for v in values]
        write(tmp_path, big, "{}.tif")
    expected = np.floor(values / 65535 * 255 + 0.5).astype(np.uint8)
    images = served(folder(tmp_path, channels=1))
    assert torch.equal(images[:, 0], torch.from_numpy(expected))
    assert images[0, 0, 0, :4].tolist() == [0, 255, 0, 1]
    assert torch.equal(served(folder(tmp_path)), images.expand(-1, 3, -1, -1))


def test_colour_images_of_16_bits(tmp_path, rng):
    values = rng.integers(0, 65536, (3, SIDE, SIDE, 3))
    for index, value in enumerate(values):
        png16(tmp_path / f"{index}.png", value)
    exact = torch.from_numpy(values / 257.0).permute(0, 3, 1, 2)
    assert (served(folder(tmp_path)).double() - exact).abs().max() < 1  # Pillow rounds down


@pytest.mark.parametrize(
    ("top", "scale"), [(1.0, 255.0), (255.0, 1.0), (65535.0, 1 / 257)], ids=["1", "255", "65535"]
)
@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_32_bit_images_are_scaled_by_the_greatest_of_the_folder(kind, top, scale, tmp_path, rng):
    values = (rng.random((3, SIDE, SIDE)) * top).round(6 if top == 1 else 0).astype(kind)
    values[0] *= 0.003 if kind == np.float32 else 0  # a dark image stays dark
    values[1, 2, 3] = top
    write(tmp_path, list(values), "{}.tif")
    expected = np.floor(values.astype(np.float64) * scale + 0.5).astype(np.uint8)
    images = served(folder(tmp_path, channels=1))[:, 0]
    assert torch.equal(images, torch.from_numpy(expected))
    assert images[1].max() == 255


@pytest.mark.parametrize(
    ("value", "range_"),
    [(-0.5, r"from -0\.5 to 1"), (float("nan"), "from nan to nan"), (1e6, r"from 1 to 1e\+06")],
)
def test_32_bit_images_outside_of_known_ranges_are_bad(value, range_, tmp_path, rng):
    values = np.ones((3, SIDE, SIDE), dtype=np.float32)
    values[1, 2, 3] = value
    write(tmp_path, list(values), "{}.tif")
    with pytest.raises(RuntimeError, match=rf"1 of 3 images .*1\.tif \(32-bit pixels {range_}"):
        served(folder(tmp_path))


@pytest.mark.parametrize("background", [255, 0, 100])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_the_background(mode, background, tmp_path, rng):
    images = colours(rng)
    alpha = rng.integers(0, 256, (3, SIDE, SIDE, 1), dtype=np.uint8)
    if mode == "LA":
        images[:] = images[..., :1]
    if mode == "P":
        alpha[:] = 255 * (alpha > 99)
        images[:] = np.where(alpha > 0, [200, 30, 4], [1, 2, 3])
        paletted = []
        for image in alpha:
            picture = Image.fromarray((image[..., 0] > 0).astype(np.uint8), "P")
            picture.putpalette([1, 2, 3, 200, 30, 4])
            paletted.append(picture)
        write(tmp_path, paletted, transparency=0)
    elif mode == "LA":
        write(tmp_path, [Image.fromarray(i) for i in np.concatenate([images[..., :1], alpha], 3)])
    else:
        write(tmp_path, list(np.concatenate([images, alpha], axis=3)))
    share = alpha / 255.0
    exact = torch.from_numpy(images * share + background * (1 - share)).permute(0, 3, 1, 2)
    found = served(folder(tmp_path, background=background))
    assert (found.double() - exact).abs().max() < 1.01


def test_palettes_cmyk_and_one_bit_become_colours(tmp_path, rng):
    white_and_black = rng.integers(0, 2, (SIDE, SIDE)).astype(bool)
    palette = Image.fromarray(white_and_black.astype(np.uint8), "P")
    palette.putpalette([10, 20, 30, 200, 100, 0])
    write(tmp_path, [palette], "0.png")
    write(tmp_path, [Image.fromarray(white_and_black)], "1.png")
    write(tmp_path, [Image.new("CMYK", (SIDE, SIDE), (0, 255, 255, 0))], "2.tif")
    images = served(folder(tmp_path))
    chosen = torch.from_numpy(white_and_black)
    table = torch.tensor([[10, 20, 30], [200, 100, 0]], dtype=torch.uint8)
    assert torch.equal(images[0].permute(1, 2, 0), table[chosen.long()])
    assert torch.equal(images[1], chosen.byte().mul(255).expand(3, -1, -1))
    assert torch.equal(images[2, :, 0, 0], torch.tensor([255, 0, 0], dtype=torch.uint8))


def test_the_orientation_that_a_camera_noted_is_followed(tmp_path, rng):
    images = colours(rng)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees, clockwise
    write(tmp_path, images, exif=exif)
    expected = torch.from_numpy(np.rot90(images, -1, axes=(1, 2)).copy()).permute(0, 3, 1, 2)
    assert torch.equal(served(folder(tmp_path)), expected)


def test_lab_becomes_colours_and_grey(tmp_path, rng):
    images = colours(rng)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    there = ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    write(tmp_path, [ImageCms.applyTransform(Image.fromarray(i), there) for i in images], "{}.tif")
    found = served(folder(tmp_path)).double()
    errors = (found - torch.from_numpy(images).permute(0, 3, 1, 2)).abs()
    assert errors.mean() < 3  # bytes of LAB are coarse
    luma = torch.einsum("c,nchw->nhw", torch.tensor([0.299, 0.587, 0.114]), found)
    assert (served(folder(tmp_path, channels=1))[:, 0] - luma).abs().max() < 0.51


# --- bad files ---


def spoil(root, rng):
    """A folder with one bad file of each kind; return their names."""
    write(root, colours(rng, 40), "good/{}.png")
    write(root, colours(rng, 4), "bad/{}.png")
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    write(root, [noise], "bad/cut.jpg")
    cut = root / "bad/cut.jpg"
    cut.write_bytes(cut.read_bytes()[:900])
    whole = (root / "bad/0.png").read_bytes()
    (root / "bad/0.png").write_bytes(b"")
    (root / "bad/1.png").write_bytes(whole[: len(whole) // 2])
    (root / "bad/2.png").write_text("hello")
    (root / "bad/3.png").write_bytes(whole[:60] + b"\0\0\0\0" + whole[64:])
    (root / "bad/._4.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(60))
    (root / "bad/folder.png").mkdir()  # no file, so not counted
    return ["0.png", "1.png", "2.png", "3.png", "._4.png", "cut.jpg"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_bad_file_is_named_before_training(num_workers, tmp_path, rng, monkeypatch):
    names = spoil(tmp_path, rng)
    for attempt in range(2):  # found, then known from the cache
        data = folder(tmp_path, num_workers=num_workers)
        data.prepare_data()
        with pytest.raises(RuntimeError) as caught:
            data.setup()
        message = str(caught.value)
        assert message.startswith(f"6 of 46 images below root='{tmp_path}' cannot be read: ")
        assert message.endswith("Delete or replace them, or set `on_bad_image: skip`.")
        assert message.count(".png (") + message.count(".jpg (") == 6
        for name in names:
            assert f"{tmp_path / 'bad' / name} (" in message
        assert "0.png (empty)" in message
        assert "._4.png (no image, but what macOS notes beside one)" in message
        assert "\n" not in message
        if attempt == 0:
            monkeypatch.setattr("lightning_mmd.data.decoded.decode", None)


def test_both_cures_of_bad_files_work(tmp_path, rng):
    names = spoil(tmp_path, rng)
    data = folder(tmp_path, on_bad_image="skip")
    data.prepare_data()  # silent: it is said once
    with pytest.warns(UserWarning, match=r"6 of 46 .*They are skipped") as warned:
        skipped = served(data)
    assert len(warned) == 1
    assert all(name in str(warned[0].message) for name in names)
    for name in names:
        (tmp_path / "bad" / name).unlink()
    assert torch.equal(served(folder(tmp_path)), skipped)
    paths = sorted((tmp_path / "good").iterdir())
    expected = [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in paths]
    assert torch.equal(skipped, torch.stack(expected))


def test_many_bad_files_are_named_in_a_report(tmp_path, rng):
    for index in range(30):
        (tmp_path / f"{index:02d}.png").write_bytes(b"")
    with pytest.raises(RuntimeError, match=r"30 of 30 .* and 10 more, all named in (.*)\. D") as e:
        served(folder(tmp_path))
    report = Path(str(e.value).split("all named in ")[1].split(". Delete")[0])
    assert all(f"{index:02d}.png" in report.read_text() for index in range(30))


def test_nothing_to_train_on_is_one_clear_line(tmp_path, rng):
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(FileNotFoundError, match=r"looked for images \(\.jpg.*found none\. Point"):
        folder(tmp_path).setup()
    with pytest.raises(FileNotFoundError, match=r"root='.*nowhere' which is no folder\. Point"):
        folder(tmp_path / "nowhere").setup()
    write(tmp_path, colours(rng, 2))
    with pytest.raises(ValueError, match=r"at least 3 images .*got 2\. Add images"):
        folder(tmp_path).setup()
    write(tmp_path, colours(rng, 4))
    with pytest.raises(ValueError, match=r"val_fraction=0.8 .*of 4 samples\. Change them, or add"):
        folder(tmp_path, val_fraction=0.8).setup()
    data = folder(tmp_path, batch_size=5)
    data.setup()
    with pytest.raises(ValueError, match=r"batch_size=5 training samples a process, got 2"):
        data.train_dataloader()
