import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, cast
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from tiny import quiet_trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_mmd.data import (
    DigitsDataModule,
    GaussianMixtureDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    SampleDataModule,
    TensorSamples,
    TorchvisionDataModule,
    import_torchvision,
    pixels_to_unit,
)


def ready(data: SampleDataModule) -> SampleDataModule:
    data.prepare_data()
    data.setup()
    return data


def stacked(loader: DataLoader[Tensor]) -> Tensor:
    return torch.cat(list(loader))


def as_rows(samples: Tensor) -> Tensor:
    """Sort flattened samples, so that sets of samples can be compared."""
    return torch.from_numpy(np.unique(samples.flatten(1).numpy(), axis=0))


def as_pixels(images: Tensor) -> Tensor:
    """Undo the map to [-1, 1]: the uint8 pixels that the images stand for, to the last bit."""
    assert images.dtype == torch.float32
    levels = (images.double() + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=2e-5)
    return levels.round().to(torch.uint8)


def write_idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, dtype=">i4").tobytes()
    path.write_bytes(header + values.astype(np.uint8).tobytes())


def write_grey_set(
    folder: Path, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    pixels = {
        "train": rng.integers(0, 256, (12, 28, 28), dtype=np.uint8),
        "t10k": rng.integers(0, 256, (5, 28, 28), dtype=np.uint8),
    }
    labels = {split: rng.integers(0, 10, len(values)) for split, values in pixels.items()}
    for split, values in pixels.items():
        write_idx(folder / "raw" / f"{split}-images-idx3-ubyte", values)
        write_idx(folder / "raw" / f"{split}-labels-idx1-ubyte", labels[split])
    return pixels, labels


def write_cifar10(root: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write made batches in the official layout and let torchvision expect their checksums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    pixels = {name: rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8) for name in names}
    contents: dict[str, dict[str, Any]] = {
        name: {"data": values.reshape(2, -1), "labels": [0, 1]} for name, values in pixels.items()
    }
    contents["batches.meta"] = {"label_names": ["a", "b"]}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
    cifar10 = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar10, "train_list", [[name, None] for name in names[:-1]])
    monkeypatch.setattr(cifar10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(cifar10, "meta", {**cifar10.meta, "md5": None})
    return np.concatenate([pixels[name] for name in names[:-1]]), pixels["test_batch"]


def test_pixels_to_unit_is_affine_and_hits_both_ends() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    values = pixels_to_unit(pixels)
    assert values.dtype == torch.float32
    assert (values[0].item(), values[255].item()) == (-1.0, 1.0)
    torch.testing.assert_close(values.double(), torch.linspace(-1, 1, 256), rtol=0, atol=1e-7)
    assert torch.equal(((values + 1) * 127.5).round().to(torch.uint8), pixels)


# --- digits: the split and the values ---


def test_digits_split_is_every_digit_once_with_its_own_values() -> None:
    data = ready(DigitsDataModule(batch_size=1, seed=3, labels=True))
    splits = [
        [torch.cat(part) for part in zip(*loader, strict=True)]
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    ]
    assert [len(images) for images, _ in splits] == [1258, 180, 359]  # round(0.2 * 1797) = 359
    images, labels = (torch.cat(parts) for parts in zip(*splits, strict=True))
    assert images.dtype == torch.float32
    assert images.shape[1:] == data.sample_shape == (1, 8, 8)
    levels, digits = load_digits(return_X_y=True)
    expected = torch.tensor(levels, dtype=torch.float32) / 8 - 1
    assert len(as_rows(expected)) == 1797  # all digits differ, so a set is a fair comparison
    # Side by side with its label, so that the two belong together.
    served = torch.cat([images.flatten(1), labels[:, None].float()], dim=1)
    expected = torch.cat([expected, torch.tensor(digits)[:, None].float()], dim=1)
    assert torch.equal(as_rows(served), as_rows(expected))
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    alone = ready(DigitsDataModule(batch_size=1, seed=3))
    assert torch.equal(stacked(alone.test_dataloader()), splits[2][0])


def test_digits_split_is_a_function_of_the_seed() -> None:
    first, again, other = (
        stacked(ready(DigitsDataModule(seed=seed)).val_dataloader()) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(as_rows(first), as_rows(other))


def test_digits_enlarge_bilinearly() -> None:
    small = stacked(ready(DigitsDataModule()).val_dataloader())
    large = stacked(ready(DigitsDataModule(image_size=16)).val_dataloader())
    assert large.shape[1:] == (1, 16, 16)
    # With half-pixel centres, output pixel 2i + 1 lies a quarter of the way from i to i + 1.
    weights = torch.zeros(16, 8, dtype=torch.float32)
    for row in range(16):
        position = min(max((row + 0.5) / 2 - 0.5, 0.0), 7.0)
        low = min(int(position), 6)
        weights[row, low], weights[row, low + 1] = 1 - (position - low), position - low
    torch.testing.assert_close(large, weights @ small @ weights.T, rtol=0, atol=1e-6)


# --- loaders: random state, workers, sizes, precision ---


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_global_random_state_alone(num_workers: int) -> None:
    before = torch.get_rng_state()
    data = ready(DigitsDataModule(num_workers=num_workers))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        next(iter(loader))
    ready(GaussianMixtureDataModule())
    assert torch.equal(torch.get_rng_state(), before)


def test_two_workers_serve_the_same_batches_as_none() -> None:
    alone, helped = (ready(DigitsDataModule(num_workers=number)) for number in (0, 2))
    for ours, theirs in (
        (alone.train_dataloader(), helped.train_dataloader()),
        (alone.val_dataloader(), helped.val_dataloader()),
    ):
        batches = list(zip(ours, theirs, strict=True))
        assert len(batches) == len(ours)
        assert all(torch.equal(mine, yours) for mine, yours in batches)


def test_incomplete_training_batch_is_left_out_and_held_out_batches_are_whole() -> None:
    data = ready(DigitsDataModule(batch_size=256))
    assert [len(batch) for batch in data.train_dataloader()] == [256] * (1258 // 256)
    assert [len(batch) for batch in data.test_dataloader()] == [256, 103]
    assert [len(batch) for batch in data.val_dataloader()] == [180]


class Bytes(ImageDataModule):
    """Every byte once, and its number as its label."""

    sample_shape = (1, 1, 1)

    def load(self) -> tuple[TensorSamples, TensorSamples, TensorSamples]:
        numbers = torch.arange(256)
        pixels = numbers.to(torch.uint8)[:, None, None, None]
        train, val, test = (TensorSamples(pixels, numbers) for _ in range(3))
        return train, val, test


class Checker(LightningModule):
    """Compares each batch with the exact values of its bytes."""

    def __init__(self, exact: torch.dtype, tolerance: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.exact, self.tolerance, self.checked = exact, tolerance, 0

    def training_step(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        assert images.dtype == self.exact
        errors = images.double().flatten() - (labels.double() / 127.5 - 1)
        assert errors.abs().max() <= self.tolerance
        self.checked += len(images)
        return self.weight * images.mean()

    def validation_step(self, batch: list[Tensor]) -> None:
        self.training_step(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [
        ("32-true", torch.float32, 1e-7),
        ("64-true", torch.float64, 1e-15),
        ("bf16-true", torch.bfloat16, 2**-9),
        ("bf16-mixed", torch.float32, 1e-7),
    ],
)
def test_bytes_reach_the_module_in_the_trainers_precision(
    tmp_path: Path, precision: Any, dtype: torch.dtype, tolerance: float
) -> None:
    data, model = Bytes(64, 0, seed=0, labels=True), Checker(dtype, tolerance)
    trainer = quiet_trainer(tmp_path, precision=precision, max_epochs=1)
    trainer.fit(model, data)
    assert model.checked >= 2 * 256
    # By index, and by a loader outside of a training, values are float32 in [-1, 1].
    image, label = data.train_dataloader().dataset[200]
    assert (image.item(), label.item()) == (pixels_to_unit(torch.tensor([200])).item(), 200)
    images, labels = next(iter(data.val_dataloader()))
    assert torch.equal(images.flatten(), pixels_to_unit(labels.to(torch.uint8)))


def test_mirrored_images_are_the_mirrored_images_and_half_of_them() -> None:
    plain, mirrored = (ready(DigitsDataModule(64, flip=flip)) for flip in (False, True))
    images = torch.cat([plain.finish(batch, 0) for batch in plain.train_dataloader()])
    flipped = stacked(mirrored.train_dataloader())
    same = (images == flipped).flatten(1).all(1)
    turned = (images.flip(-1) == flipped).flatten(1).all(1)
    assert (same | turned).all()
    assert not (same & turned).any()  # no digit here is its own mirror image
    num = len(same)
    assert abs(same.double().mean().item() - 0.5) < 5 * 0.5 / num**0.5
    assert torch.equal(stacked(plain.val_dataloader()), stacked(mirrored.val_dataloader()))


def test_labels_that_are_not_there_are_refused() -> None:
    class Unlabelled(Bytes):
        def load(self) -> tuple[TensorSamples, TensorSamples, TensorSamples]:
            train, val, test = super().load()
            val.labels = None
            return train, val, test

    with pytest.raises(ValueError, match=r"Unlabelled has no labels to serve\. Leave `labels` out"):
        Unlabelled(2, 0, 0, labels=True).setup()
    Unlabelled(2, 0, 0).setup()


def test_setup_loads_once() -> None:
    data = ready(DigitsDataModule())
    before = data.val_dataloader().dataset
    data.setup("fit")
    data.setup("test")
    assert data.val_dataloader().dataset is before


def test_hyperparameters_are_the_arguments_as_primitives(tmp_path: Path) -> None:
    assert dict(TorchvisionDataModule("MNIST", tmp_path, batch_size=7).hparams) == {
        "name": "MNIST",
        "root": str(tmp_path),
        "batch_size": 7,
        "image_size": None,
        "labels": False,
        "flip": False,
        "num_val": None,
        "download": True,
        "num_workers": 0,
        "seed": 0,
    }
    folder = ImageFolderDataModule(tmp_path, cache_dir=tmp_path).hparams
    assert folder["root"] == folder["cache_dir"] == str(tmp_path)


# --- torchvision's sets, from made files ---


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_grey_sets_are_pixel_exact(tmp_path: Path, name: Any) -> None:
    pixels, labels = write_grey_set(tmp_path / name, np.random.default_rng(0))
    data = ready(TorchvisionDataModule(name, tmp_path, batch_size=1, labels=True))
    assert isinstance(data, ImageDataModule)
    assert data.sample_shape == (1, 28, 28)
    assert len(list(data.train_dataloader())) == 10  # 12 less a sixth
    for loader, split, part in (
        (data.val_dataloader(), "train", slice(10, 12)),
        (data.test_dataloader(), "t10k", slice(None)),
    ):
        images, classes = (torch.cat(values) for values in zip(*loader, strict=True))
        expected = torch.from_numpy(pixels[split][part]).unsqueeze(1)
        assert torch.equal(as_pixels(images), expected)
        assert torch.equal(classes, torch.from_numpy(labels[split][part]).long())
    images, classes = (torch.cat(v) for v in zip(*data.train_dataloader(), strict=True))
    same = as_pixels(images) == torch.from_numpy(pixels["train"])  # each against each
    order = same.flatten(2).all(2).int().argmax(1).tolist()
    assert sorted(order) == list(range(10))
    assert classes.tolist() == labels["train"][order].tolist()

    held_out = stacked(ready(TorchvisionDataModule(name, tmp_path)).test_dataloader())
    padded = stacked(ready(TorchvisionDataModule(name, tmp_path, image_size=32)).test_dataloader())
    assert torch.equal(padded, F.pad(held_out, (2, 2, 2, 2), value=-1.0))


def test_cifar10_is_pixel_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = write_cifar10(tmp_path, np.random.default_rng(0), monkeypatch)
    data = ready(TorchvisionDataModule("CIFAR10", tmp_path, batch_size=1, num_val=3))
    assert data.sample_shape == (3, 32, 32)
    assert torch.equal(as_pixels(stacked(data.test_dataloader())), torch.from_numpy(held_out))
    assert torch.equal(as_pixels(stacked(data.val_dataloader())), torch.from_numpy(train[-3:]))
    served = as_pixels(stacked(data.train_dataloader()))
    assert torch.equal(as_rows(served), as_rows(torch.from_numpy(train[:-3])))


@pytest.mark.parametrize(
    ("name", "first_file"),
    [
        ("MNIST", "MNIST/raw/train-images-idx3-ubyte"),
        ("FashionMNIST", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("CIFAR10", "cifar-10-batches-py/data_batch_1"),
    ],
)
class TestMissingData:
    def test_without_download(self, tmp_path: Path, name: Any, first_file: str) -> None:
        data = TorchvisionDataModule(name, tmp_path, download=False)
        data.prepare_data()
        with pytest.raises(FileNotFoundError) as caught:
            data.setup()
        message = str(caught.value)
        assert str(tmp_path) in message
        assert first_file in message
        assert "`download: true`" in message
        assert list(tmp_path.iterdir()) == []

    def test_offline(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, first_file: str
    ) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise URLError("no route to host")

        monkeypatch.setattr("urllib.request.urlopen", refuse)
        with pytest.raises(RuntimeError, match="could not be downloaded") as caught:
            TorchvisionDataModule(name, tmp_path).prepare_data()
        message = str(caught.value)
        assert str(tmp_path) in message
        assert first_file in message
        assert "no route to host" in message
        assert "by hand" in message


def test_present_files_are_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_grey_set(tmp_path / "MNIST", np.random.default_rng(0))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("went to the network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    data = ready(TorchvisionDataModule("MNIST", tmp_path, batch_size=4, download=True))
    assert len(stacked(data.test_dataloader())) == 5


def garbage(content: bytes) -> bytes:
    return np.random.default_rng(0).bytes(len(content))


@pytest.mark.parametrize(
    ("kind", "damage", "reason"),
    [
        (
            "train-images-idx3",
            lambda content: content[:-9],
            "9415 bytes where its header says",
        ),
        ("train-images-idx3", lambda content: content[:16], "16 bytes where its header says 9424"),
        ("train-images-idx3", lambda content: content[:9], "9 bytes, shorter than its header"),
        ("t10k-images-idx3", lambda content: b"", "0 bytes, shorter than its header"),
        ("t10k-images-idx3", garbage, "its header is not that of such a file"),
        ("train-labels-idx1", garbage, "its header is not that of such a file"),
        ("train-labels-idx1", lambda content: content + b"1", "21 bytes where its header says 20"),
        ("t10k-labels-idx1", lambda content: content[:-1] + b"\x0b", "a label of 11, above 9"),
    ],
)
def test_a_damaged_file_is_named_and_the_cure_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, damage: Any, reason: str
) -> None:
    write_grey_set(tmp_path / "MNIST", np.random.default_rng(0))
    path = tmp_path / f"MNIST/raw/{kind}-ubyte"
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.raises(RuntimeError) as caught:
        ready(TorchvisionDataModule("MNIST", tmp_path))
    message = str(caught.value)
    assert message.startswith(f"MNIST has damaged files: {path} ({reason}")
    assert message.endswith("). Delete them and set `download: true` to fetch them anew.")
    path.unlink()
    monkeypatch.setattr(
        torchvision.datasets.MNIST, "download", lambda self: path.write_bytes(whole)
    )
    ready(TorchvisionDataModule("MNIST", tmp_path, batch_size=2))


def test_images_and_labels_that_do_not_belong_together(tmp_path: Path) -> None:
    write_grey_set(tmp_path / "MNIST", np.random.default_rng(0))
    write_idx(tmp_path / "MNIST/raw/train-labels-idx1-ubyte", np.zeros(11))
    with pytest.raises(RuntimeError, match=r"train-images.*train-labels.*12 images and 11 labels"):
        ready(TorchvisionDataModule("MNIST", tmp_path))


def test_a_damaged_cifar10_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, np.random.default_rng(0), monkeypatch)
    cifar10 = torchvision.datasets.CIFAR10
    sums = [["data_batch_1", None], ["data_batch_2", "0" * 32], ["data_batch_3", "1" * 32]]
    monkeypatch.setattr(cifar10, "train_list", sums + cifar10.train_list[3:])
    with pytest.raises(RuntimeError) as caught:
        ready(TorchvisionDataModule("CIFAR10", tmp_path))
    message = str(caught.value)
    folder = tmp_path / "cifar-10-batches-py"
    assert f"damaged files: {folder}/data_batch_2, {folder}/data_batch_3 (the check" in message


def test_unavailable_torchvision_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match=r"built for one torch release, and this is torch"):
        import_torchvision()


def test_mismatched_torchvision_is_explained_and_only_where_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    script = (
        "import sys\n"
        "import lightning.pytorch\n"  # torchmetrics itself imports torchvision
        "for name in [name for name in sys.modules if name.split('.')[0] == 'torchvision']:\n"
        "    del sys.modules[name]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import lightning_mmd.data as data\n"
        "digits = data.DigitsDataModule()\n"
        "digits.setup()\n"
        "print(len(next(iter(digits.train_dataloader()))))\n"
        "try:\n"
        "    data.import_torchvision()\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    root = Path(__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=root
    )
    assert result.returncode == 0, result.stderr
    batch_size, message = result.stdout.splitlines()
    assert batch_size == "256"
    assert "torchvision::nms does not exist" in message
    assert "Reinstall the two together" in message


# --- mixtures ---


def all_points(data: SampleDataModule) -> Tensor:
    assert data._splits is not None
    return torch.cat([samples.data for samples in data._splits])


@pytest.mark.parametrize(
    "data",
    [
        GaussianMixtureDataModule(num_samples=40_000, std=0.3),
        GaussianMixtureDataModule(num_modes=3, radius=1.5, num_samples=40_000, std=0.1, seed=1),
        GaussianMixtureDataModule(num_modes=25, grid_spacing=2.0, num_samples=40_000, seed=2),
    ],
    ids=["ring of 8", "ring of 3", "grid of 25"],
)
def test_mixture_has_its_mean_and_covariance(data: GaussianMixtureDataModule) -> None:
    data.setup()
    points = all_points(data)
    assert points.dtype == torch.float32
    assert points.shape == (40_000, *data.sample_shape)
    points, modes = points.double(), data.modes.double()
    mean = modes.mean(dim=0)
    covariance = (modes - mean).T @ (modes - mean) / len(modes) + data.std**2 * torch.eye(2)
    centred = points - mean
    products = torch.einsum("ni,nj->nij", centred, centred)
    for sample, expected in ((points, mean), (products, covariance)):
        error = (sample.mean(dim=0) - expected).abs()
        standard_error = sample.std(dim=0) / len(points) ** 0.5
        assert (error < 5 * standard_error).all()
        assert (standard_error < 0.05).all()


def test_mixture_visits_every_mode_alike_and_stays_near_it() -> None:
    data = GaussianMixtureDataModule(num_modes=25, grid_spacing=1.0, num_samples=50_000)
    data.setup()
    assert data._splits is not None
    for points in (samples.data for samples in data._splits):
        distances, nearest = torch.cdist(points, data.modes).min(dim=1)
        expected = len(points) / 25
        counts = nearest.bincount(minlength=25)
        assert ((counts - expected).abs() < 5 * expected**0.5).all()
        # A radius over std is Rayleigh: its mean square is 2.
        squares = (distances.double() / data.std) ** 2
        assert squares.mean().item() == pytest.approx(2.0, abs=5 * 2.0 / len(points) ** 0.5)


def test_ring_and_grid_geometry() -> None:
    ring = GaussianMixtureDataModule(num_modes=8, radius=2.0).modes.double()
    torch.testing.assert_close(ring.norm(dim=1), torch.full((8,), 2.0), rtol=0, atol=1e-6)
    steps = (ring - ring.roll(1, 0)).norm(dim=1)
    torch.testing.assert_close(steps, torch.full((8,), 4 * np.sin(np.pi / 8)), rtol=0, atol=1e-6)
    grid = GaussianMixtureDataModule(num_modes=25, grid_spacing=2.0).modes
    assert {tuple(mode) for mode in grid.tolist()} == {
        (float(x), float(y)) for x in range(-4, 5, 2) for y in range(-4, 5, 2)
    }


def test_mixture_is_a_function_of_the_seed() -> None:
    first, again, other = (
        stacked(ready(GaussianMixtureDataModule(seed=seed)).val_dataloader()) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- bad input ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DigitsDataModule(batch_size=0), "batch_size of at least 1, got 0"),
        (lambda: DigitsDataModule(image_size=4), "image_size of at least 8, .*got 4"),
        (
            lambda: DigitsDataModule(batch_size={5: 8}),
            r"got {5: 8}\. A schedule begins at 0",
        ),
        (lambda: DigitsDataModule(batch_size={0: 8, 9: 0}), "batch_size of at least 1"),
        (lambda: TorchvisionDataModule(image_size=30), "image_size 28, MNIST.*or 32.*got 30"),
        (lambda: TorchvisionDataModule("CIFAR10", image_size=28), "32, CIFAR10's own; got 28"),
        (lambda: TorchvisionDataModule(cast(Any, "SVHN")), "MNIST, FashionMNIST, CIFAR10; got 'S"),
        (lambda: TorchvisionDataModule(num_val=0), "num_val of at least 1, got 0"),
        (lambda: ImageFolderDataModule("x", background=256), r"background in 0\.\.255, got 256"),
        (lambda: ImageFolderDataModule("x", on_bad_image=cast(Any, "no")), "'raise' or 'skip'"),
        (lambda: ImageFolderDataModule("x", channels=2), "channels 1, grey, or 3, colour; got 2"),
        (lambda: ImageFolderDataModule("x", image_size=0), "image_size of at least 1, got 0"),
        (lambda: GaussianMixtureDataModule(num_modes=0), "num_modes of at least 1, got 0"),
        (lambda: GaussianMixtureDataModule(std=-1.0), "std of at least 0, got -1"),
        (lambda: GaussianMixtureDataModule(grid_spacing=1.0), "got 8. Take 4 or 9"),
        (
            lambda: DigitsDataModule(val_fraction=1.5).setup(),
            "val_fraction=1.5 and test_fraction=0.2 of 1797",
        ),
        (lambda: DigitsDataModule(val_fraction=0.0).setup(), "val_fraction=0.0 and test"),
        (lambda: DigitsDataModule(val_fraction=0.8).setup(), "leave samples for training"),
        (
            lambda: ready(DigitsDataModule(batch_size=1259)).train_dataloader(),
            "batch_size=1259 training samples a process, got 1258",
        ),
    ],
)
def test_bad_input_is_refused_with_a_cure(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_loader_before_setup_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"DigitsDataModule holds no data yet\. Call"):
        DigitsDataModule().train_dataloader()
