"""The page and the picture of runs: the numbers of their logs, and nothing from a network."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from lightning_mmd.cli import main
from lightning_mmd.commands.curves import PANELS, draw_run, figure_svg, spaced
from lightning_mmd.commands.report import report
from lightning_mmd.commands.run_records import differences, read_run

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings("ignore")
DIGITS = str(Path(__file__).parents[1] / "configs" / "digits.yaml")


def write_run(folder, kids, lr=0.1, times=(0, 50, 100), floor=2.5):
    (folder / "samples").mkdir(parents=True)
    lines = ["step,critic/gap,val/kid,val/kid_real"]
    lines += [f"{100 * i},,{kid},{floor}" for i, kid in enumerate(kids)]
    lines += [f"{50 * i},{0.5 * i},," for i in range(5)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    config = {
        "model": {"rule": {"class_path": "ClosedForm", "init_args": {"eta": lr}}, "seed": 0},
        "trainer": {"callbacks": [{"class_path": "a.SampleGrid", "init_args": {"scale": 2}}]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for step in times:
        name = folder / "samples" / f"step={step:06d}.png"
        Image.new("RGB", (4, 4), (step % 256, 0, 0)).save(name)
    return folder


class Page(HTMLParser):
    """Tables by rows, pictures, and whatever a page would load."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.images, self.loads, self._cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True
        if tag == "img":
            self.images.append(attrs)
        self.loads += [attrs[n] for n in ("src", "href", "xlink:href", "srcset") if attrs.get(n)]

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if self._cell:
            self.rows[-1][-1] += data


def test_a_page_holds_scores_floors_differences_and_pictures(tmp_path, capsys):
    first = write_run(tmp_path / "first" / "version_0", [90, 3.25, 4.5])
    second = write_run(tmp_path / "second" / "version_0", [80, 7, 6], lr=0.2, times=(0, 75))
    main(["report", str(first), str(second), "--output", str(tmp_path / "out" / "page.html")])
    assert "2 runs" in capsys.readouterr().out
    text = (tmp_path / "out" / "page.html").read_text()
    page = Page(text)
    rows = {row[0]: row[1:] for row in page.rows}
    assert rows["score"] == ["first/version_0", "second/version_0"]
    assert rows["KID, at the end"] == ["4.5", "6"]
    assert rows["KID, lowest"] == ["3.25 after 100 updates", "6 after 200 updates"]
    assert rows["KID, between real images"] == ["2.5", "2.5"]
    assert rows["model.rule.init_args.eta"] == ["0.1", "0.2"]
    assert "model.seed" not in rows  # both have it
    steps = [(image["data-step"], "hidden" in image) for image in page.images]
    assert steps == [("0", True), ("50", True), ("100", False), ("0", True), ("75", False)]
    shown = base64.b64decode(page.images[1]["src"].partition(",")[2])
    assert shown == (first / "samples" / "step=000050.png").read_bytes()
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert "@import" not in text
    assert "const times = [0, 50, 75, 100];" in text
    marks = re.findall(r'\bid="([^"]+)"', text)
    assert len(marks) == len(set(marks))  # pictures do not share names
    for mark in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text):
        assert "".join(mark) in marks


def test_one_run_shows_its_whole_configuration(tmp_path):
    report([write_run(tmp_path / "a", [5, 4])], tmp_path / "page.html")
    rows = {row[0]: row[1:] for row in Page((tmp_path / "page.html").read_text()).rows}
    assert rows["model.seed"] == ["0"]
    assert rows["trainer.callbacks.SampleGrid.init_args.scale"] == ["2"]


def test_names_and_values_are_text_on_the_page(tmp_path):
    folder = write_run(tmp_path / "a<b>", [5])
    report([folder], tmp_path / "page.html", title="<script>alert(1)</script>")
    text = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in text
    assert "a&lt;b&gt;" in text


def test_curves_are_those_of_the_log(tmp_path):
    run = read_run(write_run(tmp_path / "a", [90, 3.25, 4.5]))
    assert run.curves["val/kid"] == [(0, 90.0), (100, 3.25), (200, 4.5)]
    assert run.updates == 200
    panel = next(panel for panel in PANELS if "val/kid" in panel.metrics)
    text = figure_svg(panel, [run], dark=False)
    (path,) = re.findall(r'<path d="(M [^"]+)" clip-path[^>]+stroke: #1f77b4', text)
    points = torch.tensor(
        [[float(v) for v in p.split()[-2:]] for p in re.split(" ?[ML] ", path)[1:]]
    )
    steps, values = points[:, 0], points[:, 1]  # linear in steps, logarithmic in values
    torch.testing.assert_close(steps[1] - steps[0], steps[2] - steps[1])
    height = (values[1] - values[0]) / torch.log(torch.tensor(90 / 3.25))
    torch.testing.assert_close(
        (values[1] - values[2]) / torch.log(torch.tensor(4.5 / 3.25)), height
    )


def test_what_is_missing_is_said(tmp_path):
    write_run(tmp_path / "runs" / "a", [5])
    with pytest.raises(FileNotFoundError, match=r"There are runs below it: .*runs/a"):
        report([tmp_path / "runs"])
    with pytest.raises(FileNotFoundError, match="CSVLogger writes it"):
        report([tmp_path / "nothing"])
    (tmp_path / "runs" / "a" / "metrics.csv").write_text("step,val/kid\n")
    with pytest.raises(ValueError, match="holds no numbers"):
        report([tmp_path / "runs" / "a"])


def test_spaced_and_differences(tmp_path):
    assert spaced([0, 1, 2], 5) == [0, 1, 2]
    assert spaced(list(range(101)), 5) == [0, 25, 50, 75, 100]
    runs = [read_run(write_run(tmp_path / n, [1], lr=lr)) for n, lr in (("a", 1), ("b", 2))]
    assert differences(runs) == {"model.rule.init_args.eta": [1, 2]}


def test_a_run_leaves_its_picture(tmp_path, monkeypatch, capsys):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_steps=4", "--trainer.val_check_interval=4"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    main(["fit", "--config", DIGITS, *short, *quiet])
    path = Path("runs/digits/version_0/run.png")
    assert f"curves:     {path}" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.width == 1200
        assert len(picture.convert("L").getcolors()) > 20  # something is drawn
    draw_run(read_run(path.parent), tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == path.read_bytes()
