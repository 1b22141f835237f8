"""The race: contenders run, rows are kept and skipped, and the text has the tables of the rows."""

import csv
import importlib
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def race(monkeypatch, tmp_path):
    torch.set_default_dtype(torch.float32)
    monkeypatch.syspath_prepend(FOLDER)
    race = importlib.import_module("race")
    judge = importlib.import_module("judge")
    monkeypatch.setattr(race, "MARKS", (0,))
    monkeypatch.setattr(race, "RESULTS", tmp_path / "race.csv")
    monkeypatch.setattr(race, "CACHE", tmp_path)
    monkeypatch.setattr(judge, "NUM_SAMPLES", 40)
    return race


@pytest.fixture
def images():
    judge = importlib.import_module("judge")
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (120, 1, 8, 8), dtype=torch.uint8, generator=draw)
    labels = torch.arange(120) % 10
    return judge.Images(pixels[:80], labels[:80], pixels[80:], labels[80:])


METHODS = ["nonsaturating_r1", "hinge_spectral", "wgan_gp", "relativistic_r1_r2", "mmd_proximal"]
OURS = [["method=deep_kernel"], ["method=ascent", "slope=1.0", "matching=20.0"]]


@pytest.mark.parametrize("options", [[f"method={m}"] for m in [*METHODS, "gfmn"]] + OURS, ids=str)
def test_a_contender_moves_and_leaves_a_row(race, images, options, tmp_path):
    judge = importlib.import_module("judge")
    spec = race.parse([*options, "lr=1e-3", "seconds=0", "batch=16", "split=test"])
    player = race.contender(spec, images, (1, 8, 8))
    before = [p.detach().clone() for p in player.generator.parameters()]
    player.update(judge.to_unit(images.train[:16]), 0)
    moved = [
        not torch.equal(p, q) for p, q in zip(before, player.generator.parameters(), strict=True)
    ]
    assert all(moved)
    classifier = judge.train_classifier(images)
    race.train(spec, images, judge.Judge(classifier, images), tmp_path)
    (row,) = race.rows()
    assert (row["method"], row["updates"], row["images"]) == (spec["method"], "1", "16")
    assert float(row["kid"]) == pytest.approx(float(row["kid"]))
    assert row["end"] == "time"
    assert race.done(spec)
    assert not race.done(spec | {"lr": 2e-3})
    assert not race.done(spec | {"seed": 1})


def test_a_long_run_that_is_cut_off_goes_on_as_if_it_was_not(race, images, tmp_path, monkeypatch):
    judge = importlib.import_module("judge")
    monkeypatch.setattr(race, "EVERY", 2)
    scorer = judge.Judge(judge.train_classifier(images), images)
    options = ["method=ascent", "slope=1.0", "matching=20.0", "lr=1e-3", "batch=16", "split=test"]
    spec = race.parse([*options, "updates=6"])

    def scores() -> list[tuple[str, str]]:
        return [(row["updates"], row["kid"]) for row in race.rows()]

    race.train(spec, images, scorer, tmp_path)
    whole = scores()
    assert [updates for updates, _ in whole] == ["2", "4", "6"]
    assert race.rows()[-1]["end"] == "updates"
    race.RESULTS.unlink()
    race.state_file(spec).unlink()

    class CutOff(Exception):
        pass

    write = race.append

    def cut(*args):
        write(*args)
        if args[2] == 4:
            raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(race, "append", cut)  # the row is there, the state is that of update 2
        with pytest.raises(CutOff):
            race.train(spec, images, scorer, tmp_path)
    assert not race.done(spec)
    race.train(spec, images, scorer, tmp_path)
    assert [*dict.fromkeys(scores())] == whole
    assert race.done(spec)


def test_schedules_are_in_images_and_updates(race):
    grow = {"batch": "64,100:128,500:256"}
    assert [race.batch_size(grow, seen) for seen in (0, 99, 100, 499, 500)] == [
        *(64, 64, 128, 128, 256)
    ]
    assert race.batch_size({}, 10**9) == 64
    constant = [race.average_weight({"average": "0.01"}, step) for step in (0, 8, 998)]
    assert constant == [0.5, 0.1, 0.01]
    power = [race.average_weight({"average": "power:9"}, step) for step in (0, 8, 998)]
    assert power == [1.0, 1.0, 0.01]
    fall = {"decay": "linear:100:300"}
    assert [race.rate_factor(fall, seen) for seen in (0, 100, 200)] == [1.0, 1.0, 0.5]


def test_a_hopeless_run_is_cut_only_while_searching(race):
    spec = race.parse(["method=wgan_gp", "lr=1e-3", "seconds=0"])
    scores = dict.fromkeys(("fid", "kid", "kid_std", "confident", "rarest", "commonest"), 10.0)
    race.append(spec, 30, 5, 320, scores | {"end": "", "judge_accuracy": 1.0})
    assert race.hopeless(spec, 30, {"kid": 41.0})  # above 2 x 10 + 20
    assert not race.hopeless(spec, 30, {"kid": 39.0})
    assert not race.hopeless(spec, 60, {"kid": 41.0})
    assert not race.hopeless(spec | {"split": "test"}, 30, {"kid": 41.0})
    assert race.hopeless(spec | {"split": "test"}, 30, {"kid": float("nan")})


def test_the_tables_in_the_text_are_those_of_the_rows(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    report = importlib.import_module("race_report")
    rows = report.read()
    text = report.README.read_text()
    assert report.inject(text, report.tables(rows, report.read(report.FIRST))) == text
    front = report.FRONT.read_text()
    assert report.inject(front, {"results": report.front_table(rows)}) == front
    with (FOLDER / "results" / "race.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows) > 0
