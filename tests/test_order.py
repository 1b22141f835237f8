"""The order of the data is a function of (seed, epoch, position), however it is served or cut."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from tiny import quiet_trainer
from torch import nn

from lightning_mmd.data import BatchSizes, ImageDataModule, Order, TensorSamples, coin_flips

# Lightning notes that a resumed run saves elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")
NUM, BATCHES = 64, 5  # images, and batches of 12 an epoch: four images are left for the next


class Numbered(ImageDataModule):
    """Images of two pixels, their number and white."""

    sample_shape = (1, 1, 2)

    def load(self):
        numbers = torch.arange(NUM, dtype=torch.uint8)
        images = torch.stack([numbers, torch.full_like(numbers, 255)], dim=1)[:, None, None]
        return tuple(TensorSamples(images) for _ in range(3))


class Recorder(LightningModule):
    """Writes the number of each image that it trains on, negative (less 1) where mirrored."""

    def __init__(self, folder, manual=False, fail_at=-1, counts_steps=False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float32))
        self.automatic_optimization = not manual
        self.folder, self.fail_at, self.counts_steps = folder, fail_at, counts_steps

    def training_step(self, batch):
        assert batch.dtype == torch.float32
        if self.trainer.global_step == self.fail_at:
            raise RuntimeError("cut off")
        levels = ((batch[:, 0, 0] + 1) * 127.5).round().int()
        mirrored = levels[:, 0] == 255
        numbers = torch.where(mirrored, -levels[:, 1] - 1, levels[:, 0]).tolist()
        with (self.folder / f"{self.global_rank}.txt").open("a") as file:
            file.write(f"{' '.join(map(str, numbers))}\n")
        loss = self.weight * batch.mean()
        if self.automatic_optimization:
            return loss
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return None

    def validation_step(self, batch):
        levels = ((batch[:, 0, 0] + 1) * 127.5).round()
        assert (levels[:, 1] == 255).all()  # nothing is mirrored here

    def configure_optimizers(self):
        if self.counts_steps:  # makes the loader and its iterator before counters are restored
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAtEnd(Callback):
    """Saves a checkpoint in every process, when Lightning's counters are those of the end."""

    def on_train_end(self, trainer, pl_module):
        trainer.save_checkpoint(pl_module.folder / "end.ckpt")


def fit(folder, steps, processes=1, workers=0, manual=False, ckpt=None, batch=None, **kwargs):
    """Train, and return the numbers of each batch of all processes, rank by rank."""
    folder.mkdir()
    model = Recorder(folder, manual, kwargs.pop("fail_at", -1), kwargs.pop("counts_steps", False))
    saves = ModelCheckpoint(
        folder, "{step}", every_n_train_steps=kwargs.pop("every", 1000), save_top_k=-1
    )
    options = {"max_epochs": -1, "max_steps": steps, "limit_val_batches": 1} | kwargs
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        logger=False,
        callbacks=[
            SaveAtEnd(),
            *([OnExceptionCheckpoint(folder)] if model.fail_at >= 0 else [saves]),
        ],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    data = Numbered(batch or 12 // processes, workers, seed=7, flip=True)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt)
    parts = [(folder / f"{rank}.txt").read_text().splitlines() for rank in range(processes)]
    return [[int(n) for part in lines for n in part.split()] for lines in zip(*parts, strict=True)]


def expected(steps, batch=12, first=0):
    """The same numbers, from the definition."""
    order = Order(NUM, BatchSizes(1), seed=7)
    numbers = torch.tensor(order.indices(0, first + steps * batch))
    mirrored = coin_flips(7, 0, len(numbers))
    return torch.where(mirrored, -numbers - 1, numbers)[first:].reshape(steps, batch).tolist()


# --- the definition ---


def test_the_stream_is_one_permutation_after_the_other():
    order = Order(NUM, BatchSizes(12), seed=7)
    stream = torch.tensor(order.indices(0, 3 * NUM)).reshape(3, NUM)
    assert torch.equal(stream.sort(dim=1).values, torch.arange(NUM).expand(3, NUM))
    assert len({tuple(row) for row in stream.tolist()}) == 3
    # Any part of it is the same part, and another seed or the sum of seed and epoch is no help.
    assert order.indices(50, 40) == stream.flatten()[50:90].tolist()
    assert order.indices(2 * NUM - 3, 5) == stream.flatten()[125:130].tolist()
    other = Order(NUM, BatchSizes(12), seed=8)
    assert other.indices(0, NUM) not in stream.tolist()


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_every_number_of_processes_serves_the_same_global_order(num_replicas):
    ranks = [
        Order(NUM, BatchSizes(12 // num_replicas), 7, num_replicas, rank, lambda: 96)
        for rank in range(num_replicas)
    ]
    assert [len(order) for order in ranks] == [BATCHES] * num_replicas
    whole = Order(NUM, BatchSizes(1), 7).indices(96, 60)
    served = [index for parts in zip(*ranks, strict=True) for part in parts for index in part]
    assert served == whole


def test_the_order_is_uniform():
    """Each image comes first alike often: a chi-squared statistic within five deviations."""
    orders = [Order(8, BatchSizes(1), seed) for seed in range(50)]
    firsts = torch.tensor([order.indices(8 * e, 1)[0] for order in orders for e in range(40)])
    counts = firsts.bincount(minlength=8).double()
    statistic = ((counts - 250) ** 2 / 250).sum()
    assert abs(statistic - 7) < 5 * 14**0.5


def test_coins_are_fair_and_independent_between_positions_and_seeds():
    num = 100_000
    coins = torch.stack([coin_flips(seed, 0, num) for seed in (0, 1)]).double() - 0.5
    assert not torch.equal(coins[0], coins[1])
    products = [coins[0], coins[1], coins[0] * coins[1] * 2]
    products += [coins[0, lag:] * coins[0, :-lag] * 2 for lag in (1, 2, 64)]
    for values in products:
        assert values.mean().abs().item() < 5 * 0.5 / len(values) ** 0.5
    assert torch.equal(coin_flips(0, 2**40 + 5, 10), coin_flips(0, 2**40, 15)[5:])


def test_batch_sizes_grow_with_the_samples_seen():
    sizes = BatchSizes({0: 4, 30: 8, 60: 16})
    spans = list(Order(NUM, sizes, 7)._spans(0))
    assert spans[:9] == [(4 * i, 4) for i in range(8)] + [(32, 8)]
    assert spans[9:14] == [(40, 8), (48, 8), (56, 8), (64, 16), (80, 16)]
    assert [sizes.after(0, k, 1) for k in (0, 8, 9, 13, 14)] == [0, 32, 40, 80, 96]
    two = [list(Order(NUM, sizes, 7, 2, rank)._spans(0)) for rank in range(2)]
    assert two[0][3:5] == [(24, 4), (32, 8)]
    assert two[1][3:5] == [(28, 4), (40, 8)]


# --- under a Trainer ---


@pytest.mark.parametrize(
    ("processes", "workers", "manual"),
    [(1, 0, False), (1, 2, True), (2, 0, True), (2, 2, False)],
)
@pytest.mark.parametrize("k", [6, 10], ids=["mid-epoch", "epoch end"])
def test_k_and_k_steps_see_what_2k_see(processes, workers, manual, k, tmp_path):
    kind = {"processes": processes, "workers": workers, "manual": manual}
    whole = fit(tmp_path / "whole", 2 * k, every=k, **kind)
    assert whole == expected(2 * k)
    half = fit(tmp_path / "half", k, **kind)
    middle = tmp_path / f"whole/step={k}.ckpt"
    assert half == whole[:k]
    for name, ckpt in {"middle": middle, "end": tmp_path / "half/end.ckpt"}.items():
        assert fit(tmp_path / name, 2 * k, ckpt=ckpt, **kind) == whole[k:], name


@pytest.mark.parametrize("first", ["one", "two"])
def test_a_training_goes_on_with_other_processes_workers_and_batch_sizes(first, tmp_path):
    one, two = {"processes": 1, "workers": 2}, {"processes": 2, "workers": 0}
    before, after = (one, two) if first == "one" else (two, one)
    fit(tmp_path / "first", 7, **before)
    ckpt = tmp_path / "first/end.ckpt"
    assert fit(tmp_path / "second", 12, ckpt=ckpt, **after) == expected(12)[7:]
    other = fit(tmp_path / "third", 12, ckpt=ckpt, batch=8, **one)
    assert other == expected(5, batch=8, first=7 * 12)


def test_the_order_goes_on_through_short_epochs_validation_and_accumulation(tmp_path):
    kind = {"limit_train_batches": 3, "val_check_interval": 2, "accumulate_grad_batches": 2}
    whole = fit(tmp_path / "whole", 8, every=4, check_val_every_n_epoch=None, **kind)
    assert whole == expected(len(whole))
    rest = fit(
        tmp_path / "rest", 8, ckpt=tmp_path / "whole/step=4.ckpt",
        check_val_every_n_epoch=None, **kind,
    )  # fmt: skip
    assert rest == whole[-len(rest) :]
    assert len(whole) // 2 - 2 < len(rest) < len(whole) // 2 + 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_made_before_the_counters_are_restored(workers, tmp_path):
    kind = {"workers": workers, "counts_steps": True, "max_epochs": 9}
    fit(tmp_path / "first", 7, **kind)
    rest = fit(tmp_path / "rest", 14, ckpt=tmp_path / "first/end.ckpt", **kind)
    assert rest == expected(14)[7:]


def test_overfitting_sees_the_same_batches_again(tmp_path):
    seen = fit(tmp_path / "fit", 6, overfit_batches=2)
    assert seen == [list(range(12)), list(range(12, 24))] * 3


def test_epochs_end_and_resume(tmp_path):
    kind = {"check_val_every_n_epoch": 1}
    whole = fit(tmp_path / "whole", -1, max_epochs=4, every=BATCHES, **kind)
    assert whole == expected(4 * BATCHES)
    fit(tmp_path / "half", -1, max_epochs=2, **kind)
    for ckpt in (tmp_path / f"whole/step={2 * BATCHES}.ckpt", tmp_path / "half/end.ckpt"):
        rest = fit(tmp_path / ckpt.stem, -1, max_epochs=4, ckpt=ckpt, **kind)
        assert rest == whole[2 * BATCHES :], ckpt


def test_a_step_that_was_cut_off_comes_again(tmp_path):
    with pytest.raises(RuntimeError, match="cut off"), pytest.warns(UserWarning, match="ckpt_path"):
        fit(tmp_path / "cut", 12, fail_at=7)
    rest = fit(tmp_path / "rest", 12, ckpt=tmp_path / "cut/on_exception.ckpt")
    assert rest == expected(12)[7:]


def test_a_second_fit_goes_on_and_another_trainer_begins_anew(tmp_path):
    data = Numbered(12, 0, seed=7, flip=True)
    seen = []
    for name in "ab":
        (tmp_path / name).mkdir()
        model = Recorder(tmp_path / name)
        trainer = quiet_trainer(tmp_path, max_steps=4, limit_val_batches=0)  # fmt: skip
        trainer.fit(model, datamodule=data)
        trainer.fit_loop.epoch_loop.max_steps = 9
        trainer.fit(model, datamodule=data)
        lines = (tmp_path / name / "0.txt").read_text().splitlines()
        seen.append([[int(number) for number in line.split()] for line in lines])
    assert seen == [expected(9), expected(9)]


def test_a_growing_batch_resumes(tmp_path):
    schedule = {0: 4, 30: 8, 60: 16}
    whole = fit(tmp_path / "whole", 14, batch=schedule, every=11)
    assert [len(batch) for batch in whole] == [4] * 8 + [8] * 4 + [16] * 2
    assert [n for batch in whole for n in batch] == expected(1, batch=96)[0]
    rest = fit(tmp_path / "rest", 14, batch=schedule, ckpt=tmp_path / "whole/step=11.ckpt")
    assert rest == whole[11:]


def test_loaders_without_the_module_and_by_hand_serve_finished_batches(tmp_path):
    data = Numbered(12, 0, seed=7, flip=True)
    data.setup()
    trainer = quiet_trainer(tmp_path, max_epochs=2, limit_val_batches=0)  # fmt: skip
    trainer.fit(Recorder(tmp_path), data.train_dataloader())
    lines = (tmp_path / "0.txt").read_text().splitlines()
    assert [[int(n) for n in line.split()] for line in lines] == expected(2 * BATCHES)
    loader = data.train_dataloader()
    loader.sampler.set_epoch(1)
    by_hand = []
    for batch in loader:
        levels = ((batch[:, 0, 0] + 1) * 127.5).round().int()
        rows = [(-b - 1 if a == 255 else a) for a, b in levels.tolist()]
        by_hand.append(rows)
    assert by_hand == expected(2 * BATCHES)[BATCHES:]
