import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

from lightning_mmd.data import (
    CIFAR10DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    GaussianMixtureDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    MNISTDataModule,
    SampleDataModule,
    TensorSamples,
    import_torchvision,
    pixels_to_unit,
)


def ready(data: SampleDataModule) -> SampleDataModule:
    data.prepare_data()
    data.setup()
    return data


def stacked(loader: DataLoader[Tensor]) -> Tensor:
    return torch.cat(list(loader))


def epoch_of(data: SampleDataModule, epoch: int) -> Tensor:
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, DistributedSampler)
    loader.sampler.set_epoch(epoch)
    return stacked(loader)


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


def write_grey_set(folder: Path, rng: np.random.Generator) -> dict[str, np.ndarray]:
    pixels = {
        "train": rng.integers(0, 256, (12, 28, 28), dtype=np.uint8),
        "t10k": rng.integers(0, 256, (5, 28, 28), dtype=np.uint8),
    }
    for split, values in pixels.items():
        write_idx(folder / "raw" / f"{split}-images-idx3-ubyte", values)
        write_idx(folder / "raw" / f"{split}-labels-idx1-ubyte", np.zeros(len(values)))
    return pixels


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
    data = ready(DigitsDataModule(batch_size=1, seed=3))
    train, held_out = stacked(data.train_dataloader()), stacked(data.val_dataloader())
    assert (len(train), len(held_out)) == (1797 - 359, 359)  # 359 = round(0.2 * 1797)
    both = torch.cat([train, held_out])
    assert both.dtype == torch.float32
    assert both.shape[1:] == data.sample_shape == (1, 8, 8)
    expected = torch.tensor(load_digits(return_X_y=True)[0], dtype=torch.float32) / 8 - 1
    assert len(as_rows(expected)) == 1797  # all digits differ, so a set is a fair comparison
    assert torch.equal(as_rows(both), as_rows(expected))
    assert (both.min().item(), both.max().item()) == (-1.0, 1.0)
    assert torch.equal(stacked(data.test_dataloader()), held_out)


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


# --- loaders: order, random state, workers, processes ---


def test_order_depends_on_epoch_and_seed_alone() -> None:
    data = ready(DigitsDataModule(batch_size=64))
    first, second = epoch_of(data, 0), epoch_of(data, 1)
    assert not torch.equal(first, second)
    torch.manual_seed(99)
    assert torch.equal(epoch_of(ready(DigitsDataModule(batch_size=64)), 0), first)
    assert torch.equal(epoch_of(data, 1), second)
    assert not torch.equal(epoch_of(ready(DigitsDataModule(batch_size=64, seed=1)), 0), first)


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
    assert [len(batch) for batch in data.train_dataloader()] == [256] * (1438 // 256)
    assert [len(batch) for batch in data.val_dataloader()] == [256, 103]


def test_two_processes_see_what_one_sees() -> None:
    data = ready(DigitsDataModule(batch_size=128))
    whole = list(data.train_dataloader())
    half = ready(DigitsDataModule(batch_size=64))
    ranks = []
    for rank in range(2):
        half.trainer = cast(Trainer, SimpleNamespace(world_size=2, global_rank=rank))
        ranks.append(list(half.train_dataloader()))
    assert len(whole) == len(ranks[0]) == len(ranks[1])
    for one, zero_rank, first_rank in zip(whole, *ranks, strict=True):
        assert torch.equal(as_rows(one), as_rows(torch.cat([zero_rank, first_rank])))


class Recorder(LightningModule):
    """Train nothing and keep every batch, epoch by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.epochs: dict[int, list[Tensor]] = {}

    def training_step(self, batch: Tensor) -> Tensor:
        self.epochs.setdefault(self.current_epoch, []).append(batch)
        return self.weight * batch.mean()

    def validation_step(self, batch: Tensor) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_trainer_advances_the_epoch(tmp_path: Path) -> None:
    data = DigitsDataModule(batch_size=256)
    model = Recorder()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, data)
    for epoch in (0, 1):
        assert torch.equal(torch.cat(model.epochs[epoch]), epoch_of(data, epoch))
    assert not torch.equal(model.epochs[0][0], model.epochs[1][0])


def test_setup_loads_once() -> None:
    data = ready(DigitsDataModule())
    before = data.val_dataloader().dataset
    data.setup("fit")
    data.setup("test")
    assert data.val_dataloader().dataset is before


def test_hyperparameters_are_the_arguments_as_primitives(tmp_path: Path) -> None:
    assert dict(MNISTDataModule(tmp_path, batch_size=7).hparams) == {
        "root": str(tmp_path),
        "batch_size": 7,
        "image_size": 28,
        "download": True,
        "num_workers": 0,
        "seed": 0,
    }
    assert ImageFolderDataModule(tmp_path).hparams["root"] == str(tmp_path)


# --- torchvision's sets, from made files ---


@pytest.mark.parametrize(
    ("data_class", "folder"),
    [(MNISTDataModule, "MNIST"), (FashionMNISTDataModule, "FashionMNIST")],
)
def test_grey_sets_are_pixel_exact(
    tmp_path: Path, data_class: type[MNISTDataModule] | type[FashionMNISTDataModule], folder: str
) -> None:
    pixels = write_grey_set(tmp_path / folder, np.random.default_rng(0))
    data = ready(data_class(tmp_path, batch_size=4))
    assert isinstance(data, ImageDataModule)
    assert data.sample_shape == (1, 28, 28)
    held_out, train = stacked(data.val_dataloader()), stacked(data.train_dataloader())
    assert torch.equal(as_pixels(held_out), torch.from_numpy(pixels["t10k"]).unsqueeze(1))
    assert torch.equal(as_rows(as_pixels(train)), as_rows(torch.from_numpy(pixels["train"])))

    padded = stacked(ready(data_class(tmp_path, batch_size=4, image_size=32)).val_dataloader())
    assert torch.equal(padded, F.pad(held_out, (2, 2, 2, 2), value=-1.0))


def test_cifar10_is_pixel_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, held_out = write_cifar10(tmp_path, np.random.default_rng(0), monkeypatch)
    data = ready(CIFAR10DataModule(tmp_path, batch_size=2))
    assert data.sample_shape == (3, 32, 32)
    assert torch.equal(as_pixels(stacked(data.test_dataloader())), torch.from_numpy(held_out))
    served = as_pixels(stacked(data.train_dataloader()))
    assert torch.equal(as_rows(served), as_rows(torch.from_numpy(train)))


@pytest.mark.parametrize(
    ("data_class", "first_file"),
    [
        (MNISTDataModule, "MNIST/raw/train-images-idx3-ubyte"),
        (FashionMNISTDataModule, "FashionMNIST/raw/train-images-idx3-ubyte"),
        (CIFAR10DataModule, "cifar-10-batches-py/data_batch_1"),
    ],
)
class TestMissingData:
    def test_without_download(self, tmp_path: Path, data_class: Any, first_file: str) -> None:
        data = data_class(tmp_path, download=False)
        data.prepare_data()
        with pytest.raises(FileNotFoundError) as caught:
            data.setup()
        message = str(caught.value)
        assert str(tmp_path) in message
        assert first_file in message
        assert "`download: true`" in message
        assert list(tmp_path.iterdir()) == []

    def test_offline(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_class: Any, first_file: str
    ) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise URLError("no route to host")

        monkeypatch.setattr("urllib.request.urlopen", refuse)
        with pytest.raises(RuntimeError, match="could not download") as caught:
            data_class(tmp_path).prepare_data()
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
    data = ready(MNISTDataModule(tmp_path, batch_size=4, download=True))
    assert len(stacked(data.val_dataloader())) == 5


def test_damaged_file_is_named_with_its_cure(tmp_path: Path) -> None:
    write_grey_set(tmp_path / "MNIST", np.random.default_rng(0))
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match=r"damaged files in root=.*Delete MNIST/raw"):
        MNISTDataModule(tmp_path).setup()


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


# --- image folders ---


def write_png(image: Tensor, path: Path) -> None:
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path)


def write_folder(root: Path, names: list[str]) -> Tensor:
    pixels = torch.randint(0, 256, (len(names), 3, 6, 6), dtype=torch.uint8)
    for name, image in zip(names, pixels, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_png(image, root / name)
    return pixels


@pytest.mark.parametrize(
    "names",
    [[f"{i}.png" for i in range(8)], [f"class{i % 2}/{i}.PNG" for i in range(8)]],
    ids=["flat", "class-wise"],
)
def test_folder_of_images_is_pixel_exact(tmp_path: Path, names: list[str]) -> None:
    pixels = write_folder(tmp_path, names)
    (tmp_path / "notes.txt").write_text("not an image")
    data = ready(ImageFolderDataModule(tmp_path, image_size=6, batch_size=1, val_fraction=0.25))
    train, held_out = stacked(data.train_dataloader()), stacked(data.val_dataloader())
    assert (len(train), len(held_out)) == (6, 2)
    served = torch.cat([train, held_out])
    assert torch.equal(as_rows(as_pixels(served)), as_rows(pixels))


def test_folder_crops_the_centre_and_resizes(tmp_path: Path) -> None:
    # Columns of 4 pixels in 4 levels; the central 8 of 16 columns survive, then halve.
    levels = torch.tensor([0, 50, 200, 250], dtype=torch.uint8).repeat_interleave(4)
    for name in ("a.png", "b.png"):
        write_png(levels.expand(3, 8, 16), tmp_path / name)
    data = ready(ImageFolderDataModule(tmp_path, image_size=4, batch_size=1, val_fraction=0.5))
    image = next(iter(data.val_dataloader()))[0]
    assert image.shape == (3, 4, 4)
    middle = torch.tensor([50, 50, 200, 200]) / 127.5 - 1
    assert torch.equal(image[:, 0].sign().double(), middle.sign().expand(3, 4))
    # The resampling filter blurs the inner edge, never beyond half the step of 150 levels.
    assert (image - middle.float()).abs().max().item() < 75 / 127.5


def test_folder_in_grey_weighs_the_colours(tmp_path: Path) -> None:
    pixels = write_folder(tmp_path, ["a.png", "b.png"])
    data = ready(
        ImageFolderDataModule(tmp_path, image_size=6, channels=1, batch_size=1, val_fraction=0.5)
    )
    served = torch.cat([stacked(data.train_dataloader()), stacked(data.val_dataloader())])
    assert served.shape == (2, 1, 6, 6)
    luma = torch.einsum("c,nchw->nhw", torch.tensor([0.299, 0.587, 0.114]), pixels.double())
    grey = as_pixels(served).squeeze(1).double()
    deviations = [(grey - candidate).abs().max().item() for candidate in (luma, luma.flip(0))]
    assert 0.1 < min(deviations) < 0.51  # luma, rounded to whole levels


def test_empty_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(FileNotFoundError, match=r"looked for images \(\.jpg.*found none"):
        ImageFolderDataModule(tmp_path).setup()


# --- mixtures ---


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
    points = torch.cat([cast(TensorSamples, data._train).data, stacked(data.val_dataloader())])
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
    for points in (cast(TensorSamples, data._train).data, stacked(data.val_dataloader())):
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
        (lambda: MNISTDataModule(image_size=30), "image_size 28, .*or 32.*got 30"),
        (lambda: ImageFolderDataModule("x", channels=2), "channels 1, grey, or 3, colour; got 2"),
        (lambda: ImageFolderDataModule("x", image_size=0), "image_size of at least 1, got 0"),
        (lambda: GaussianMixtureDataModule(num_modes=0), "num_modes of at least 1, got 0"),
        (lambda: GaussianMixtureDataModule(std=-1.0), "std of at least 0, got -1"),
        (lambda: GaussianMixtureDataModule(grid_spacing=1.0), "got 8. Take 4 or 9"),
        (lambda: DigitsDataModule(val_fraction=1.5).setup(), "val_fraction=1.5 of 1797 samples"),
        (lambda: DigitsDataModule(val_fraction=0.0).setup(), "val_fraction=0.0 of 1797 samples"),
        (lambda: DigitsDataModule(val_fraction=1e-4).setup(), "leaves samples on both sides"),
        (
            lambda: ready(DigitsDataModule(batch_size=1439)).train_dataloader(),
            "batch_size=1439 training samples a process, got 1438",
        ),
    ],
)
def test_bad_input_is_refused_with_a_cure(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_loader_before_setup_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"DigitsDataModule holds no data yet\. Call"):
        DigitsDataModule().train_dataloader()
