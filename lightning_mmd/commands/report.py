"""Several runs side by side, as one page that needs no network."""

import argparse
import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_mmd.commands.curves import PANELS, figure_svg, has_matplotlib, spaced
from lightning_mmd.commands.run_records import RunRecord, differences, read_run

__all__ = ["report", "run_report"]

_SCORES = {
    "val/mmd2": "MMD^2",
    "val/fid": "FID",
    "val/kid": "KID",
    "val/precision": "precision",
    "val/recall": "recall",
}
_LOWER_IS_BETTER = ("val/mmd2", "val/fid", "val/kid")
_MOST_PICTURES = 40  # a run

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ground: #fff; --ink: #1a1a1a; --line: #ccc; --soft: #666; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ground: #151515; --ink: #e8e8e8; --line: #444; --soft: #aaa; }}
  .light {{ display: none; }}
}}
@media (prefers-color-scheme: light) {{ .dark {{ display: none; }} }}
body {{ background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif;
  max-width: 1200px; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.2rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; font-size: 0.9rem; }}
th, td {{ text-align: left; padding: 0.25rem 0.75rem 0.25rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }}
th {{ min-width: 9rem; }} td {{ overflow-wrap: anywhere; min-width: 6rem; }}
td.number {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
.wide {{ overflow-x: auto; }}
.grid {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem),
  1fr)); }}
.grid svg {{ width: 100%; height: auto; }}
figure {{ margin: 0; }} figcaption, .soft {{ color: var(--soft); font-size: 0.9rem; }}
figure img {{ width: 100%; max-width: 34rem; image-rendering: pixelated; }}
input[type=range] {{ width: 100%; max-width: 40rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="soft">{about}</p>
<h2>Scores</h2>
<div class="wide">{scores}</div>
<h2>Curves</h2>
<div class="grid">{curves}</div>
{samples}
<h2>Configuration</h2>
<div class="wide">{configuration}</div>
</body>
</html>
"""

_SAMPLES = """<h2>Samples</h2>
<p><label for="time">After <output id="shown">{last:,}</output> generator updates</label><br>
<input id="time" type="range" min="0" max="{most}" value="{most}" step="1"></p>
<div class="grid">{figures}</div>
<script>
const times = {times};
const slider = document.getElementById("time");
slider.addEventListener("input", () => {{
  const now = times[slider.value];
  document.getElementById("shown").textContent = now.toLocaleString("en");
  for (const figure of document.querySelectorAll("figure[data-run]")) {{
    let newest = null;
    for (const image of figure.querySelectorAll("img")) {{
      image.hidden = true;
      if (newest === null || Number(image.dataset.step) <= now) newest = image;
    }}
    newest.hidden = false;
    figure.querySelector("span").textContent = Number(newest.dataset.step).toLocaleString("en");
  }}
}});
</script>
"""


def report(runs: Sequence[Path], output: Path = Path("report.html"), title: str = "") -> None:
    """Write a page about runs: scores with floors, curves, samples by time, configurations.

    Args:
        runs: Folders of runs, with the ``metrics.csv`` of CSVLogger.
        output: The HTML file. Nothing in it is loaded from elsewhere.
        title: Title of the page. Default: the runs' names.

    Raises:
        FileNotFoundError: If a folder is none of a run.
        ModuleNotFoundError: If matplotlib is missing.
    """
    if not has_matplotlib():
        raise ModuleNotFoundError(
            "'report' draws curves by matplotlib, which is not installed: pip install matplotlib"
        )
    found = [read_run(Path(run)) for run in runs]
    _name_apart(found)
    panels = [panel for panel in PANELS if panel.found_in(found)]
    curves = "".join(
        f"<figure>{figure_svg(panel, found, False)}{figure_svg(panel, found, True)}</figure>"
        for panel in panels
    )
    text = _PAGE.format(
        title=html.escape(title or ", ".join(run.name for run in found)),
        about=_about(found),
        scores=_score_table(found),
        curves=curves or "<p>No curves of the known kinds.</p>",
        samples=_samples(found),
        configuration=_configuration(found),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    print(f"report: {output} ({len(text.encode()) / 1e6:.1f} MB, {len(found)} runs)")


def run_report(args: list[str]) -> None:
    """Run the command ``lightning-mmd report RUN_DIR... [--output FILE] [--title TEXT]``."""
    parser = argparse.ArgumentParser(
        prog="lightning-mmd report",
        description="Lay runs side by side on one HTML page that needs no network.",
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, with metrics.csv")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page")
    parser.add_argument("--title", default="", help="its title; default: the runs' names")
    given = parser.parse_args(args)
    report(given.runs, given.output, given.title)


def _name_apart(runs: list[RunRecord]) -> None:
    """Give runs of one name their whole path."""
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.folder)


def _about(runs: list[RunRecord]) -> str:
    lengths = ", ".join(f"{html.escape(run.name)}: {run.updates:,}" for run in runs)
    return f"Generator updates: {lengths}. The axis of all curves is generator updates."


def _table(head: list[str], rows: list[list[str]], numbers: bool) -> str:
    kind = ' class="number"' if numbers else ""
    top = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in head)
    lines = "".join(
        f"<tr><th scope=row>{html.escape(first)}</th>"
        + "".join(f"<td{kind}>{html.escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


def _score_table(runs: list[RunRecord]) -> str:
    rows = []
    for metric, name in _SCORES.items():
        if not any(metric in run.curves for run in runs):
            continue
        rows.append([f"{name}, at the end", *(_number(run.last(metric)) for run in runs)])
        if metric in _LOWER_IS_BETTER:
            rows.append([f"{name}, lowest", *(_lowest(run, metric) for run in runs)])
        if any(f"{metric}_real" in run.curves for run in runs):
            floors = (_number(run.last(f"{metric}_real")) for run in runs)
            rows.append([f"{name}, between real images", *floors])
    if not rows:
        return "<p>No scores were logged: MMDTracker and SampleQuality make them.</p>"
    return _table(["score", *(run.name for run in runs)], rows, numbers=True)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _lowest(run: RunRecord, metric: str) -> str:
    found = run.lowest(metric)
    return "-" if found is None else f"{found[1]:.4g} after {found[0]:,} updates"


def _samples(runs: list[RunRecord]) -> str:
    shown = [run for run in runs if run.pictures]
    if not shown:
        return ""
    kept = {run.name: spaced(sorted(run.pictures), _MOST_PICTURES) for run in shown}
    times = sorted({step for steps in kept.values() for step in steps})
    figures = []
    for run in shown:
        images = "".join(
            f'<img data-step="{step}" alt="samples of {html.escape(run.name)} after {step} updates"'
            f'{"" if step == kept[run.name][-1] else " hidden"} src="data:image/png;base64,'
            f'{base64.b64encode(run.pictures[step].read_bytes()).decode()}">'
            for step in kept[run.name]
        )
        caption = f"{html.escape(run.name)}, <span>{kept[run.name][-1]:,}</span> updates"
        figures.append(f"<figure data-run>{images}<figcaption>{caption}</figcaption></figure>")
    return _SAMPLES.format(
        last=times[-1], most=len(times) - 1, figures="".join(figures), times=json.dumps(times)
    )


def _configuration(runs: list[RunRecord]) -> str:
    if not any(run.config for run in runs):
        return "<p>No configuration was saved.</p>"
    if len(runs) == 1:
        rows: list[list[Any]] = [[name, value] for name, value in runs[0].config.items()]
        rows = [[name, str(value)] for name, value in rows if value is not None]
        head = ["name", runs[0].name]
    else:
        rows = [[name, *map(str, found)] for name, found in differences(runs).items()]
        head = ["where they differ", *(run.name for run in runs)]
    return _table(head, rows, numbers=False) if rows else "<p>All configurations are equal.</p>"
