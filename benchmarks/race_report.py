"""Tables and figure of the race, from the rows of `results/race.csv`.

    python benchmarks/race_report.py

The tables are printed and put into `README.md` here, between their marks. `race_first.csv` holds
the rows of a first search, made before the generator of all contenders became faster.
"""

import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
README = HERE / "README.md"
FRONT = HERE.parent / "README.md"
FIRST = HERE / "results" / "race_first.csv"
NAMES = {
    "ascent": "GradientAscent",
    "deep_kernel": "DeepKernel",
    "nonsaturating_r1": "non-saturating + R1",
    "hinge_spectral": "hinge + spectral norm",
    "relativistic_r1_r2": "relativistic + R1 + R2",
    "wgan_gp": "WGAN-GP",
    "gfmn": "GFMN (frozen features of a classifier that saw labels)",
    "mmd_proximal": "MMD GAN, proximal term",
}
USUAL = {"average": "power:9", "batch": "32,16000:64"}
"""What the text says of all runs of the second round; a label tells where a run differs."""
PLAIN = {"average": "0.01", "batch": "64"}
Row = dict[str, str]


def read(path: Path = HERE / "results" / "race.csv") -> list[Row]:
    """Return all rows."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def label(row: Row) -> str:
    """Return a method's name with the options that tell its runs apart."""
    options = PLAIN | json.loads(row["options"])
    for name, value in USUAL.items():
        if options[name] == value:
            del options[name]
    options.pop("updates", None)
    text = ", ".join(f"{name} {value}" for name, value in sorted(options.items()))
    name = NAMES.get(row["method"], row["method"])
    if row["loop"] == "lightning":
        return f"`lightning-mmd fit`, configs/{name}.yaml"
    return f"{name}: {text}"


def finals(
    rows: list[Row], split: str = "test", data: str = "MNIST"
) -> dict[str, dict[int, list[Row]]]:
    """Return rows of timed runs on a split by method and mark."""
    found: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        timed = "updates" not in json.loads(row["options"])
        if timed and (row["split"], row["data"]) == (split, data):
            found[label(row)][int(row["seconds"])].append(row)
    return found


def spread(values: list[float]) -> str:
    """Return a median, with lowest and highest where there are several."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def final_table(rows: list[Row], data: str = "MNIST") -> list[str]:
    """Return the table of runs on test images: FID; KID, medians over seeds."""
    found = finals(rows, data=data)
    marks = sorted({mark for runs in found.values() for mark in runs})
    lines = ["| method | seeds | " + " | ".join(f"{mark} s" for mark in marks) + " |"]
    lines.append("|---" * (len(marks) + 2) + "|")
    for name, runs in found.items():
        cells = []
        for mark in marks:
            fid = [float(row["fid"]) for row in runs.get(mark, [])]
            kid = [float(row["kid"]) for row in runs.get(mark, [])]
            cells.append(f"{spread(fid)}; {spread(kid)}" if fid else "")
        seeds = max(len(rows) for rows in runs.values())
        lines.append(f"| {name} | {seeds} | " + " | ".join(cells) + " |")
    return lines


def front_table(rows: list[Row]) -> list[str]:
    """Return the README's table: of each method the finals with most seeds, FID; KID, medians."""
    latest: dict[str, dict[int, list[Row]]] = {}
    for name, runs in finals(rows).items():
        method = name.split(":")[0]
        known = latest.get(method, {}).get(480, [])
        if not name.startswith("`") and len(runs[480]) > len(known):
            latest[method] = runs
    marks = (60, 120, 240, 480)
    lines = ["| method | " + " | ".join(f"{mark} s" for mark in marks) + " | seeds |"]
    lines.append("|---" * 6 + "|")
    for name, runs in sorted(latest.items(), key=lambda pair: middle(pair[1][480], "fid")):
        cells = [f"{middle(runs[m], 'fid'):.1f}; {middle(runs[m], 'kid'):.1f}" for m in marks]
        own = f"**{name}, the recipe**" if name == NAMES["ascent"] else name
        lines.append(f"| {own} | " + " | ".join(cells) + f" | {len(runs[480])} |")
    return lines


def middle(rows: list[Row], score: str) -> float:
    """Return the median of a score over rows."""
    return median(float(row[score]) for row in rows)


def long_table(rows: list[Row]) -> list[str]:
    """Return the table of long runs: FID; KID and processor seconds at each 2,000 updates."""
    found: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if "updates" in json.loads(row["options"]):
            found[label(row)][int(row["updates"])] = row
    marks = sorted({m for runs in found.values() for m in runs if m % 2000 == 0})
    lines = ["| updates | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    for mark in marks:
        cells = [
            f"{float(r[mark]['fid']):.1f}; {float(r[mark]['kid']):.1f} ({r[mark]['seconds']} s)"
            if mark in r
            else ""
            for r in found.values()
        ]
        lines.append(f"| {mark:,} | " + " | ".join(cells) + " |")
    return lines


def search_table(rows: list[Row], marks: tuple[int, ...] = (30, 60, 120)) -> list[str]:
    """Return the table of searching runs, seed 0, on the validation split: FID; KID."""
    found = finals(rows, "validation")
    lines = ["| run | " + " | ".join(f"{mark} s" for mark in marks) + " |", "|---" * 4 + "|"]
    for name, runs in found.items():
        cells = [
            f"{float(runs[m][0]['fid']):.0f}; {float(runs[m][0]['kid']):.0f}"
            if m in runs
            else "cut"
            for m in marks
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def draw(rows: list[Row], path: Path) -> None:
    """Draw FID against processor seconds, the median of the seeds and each of them."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axis, score in zip(axes, ("fid", "kid"), strict=True):
        for name, runs in finals(rows).items():
            if max(runs) < 480:
                continue
            marks = sorted(runs)
            middle = [median(float(row[score]) for row in runs[mark]) for mark in marks]
            fall = ", falling rate" if "decay" in name else ""
            (line,) = axis.plot(marks, middle, label=name.split(":")[0] + fall)
            for mark in marks:
                values = [float(row[score]) for row in runs[mark]]
                axis.plot([mark] * len(values), values, ".", color=line.get_color(), alpha=0.5)
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="processor seconds, one thread",
            ylabel=f"{score.upper()} to test images",
        )
        axis.set_xticks([30, 60, 120, 240, 480], ["30", "60", "120", "240", "480"])
        axis.set_xticks([], minor=True)
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "1235" else "")
        if axis.lines:
            axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def tables(rows: list[Row], first: list[Row]) -> dict[str, list[str]]:
    """Return the lines of all tables by the name of their mark."""
    return {
        "finals": final_table(rows),
        "fashion": final_table(rows, "FashionMNIST"),
        "long": long_table(rows),
        "search": search_table(rows),
        "first search": search_table(first),
    }


def inject(text: str, found: dict[str, list[str]]) -> str:
    """Put tables between their marks ``<!-- name -->`` and ``<!-- end of name -->``."""
    for name, lines in found.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        block = "\n".join([start, "", *lines, "", end])
        text, count = re.subn(f"{start}.*?{end}", lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{count} places are marked {start} ... {end}, expected one.")
    return text


if __name__ == "__main__":
    every = read()
    found = tables(every, read(FIRST))
    for lines in found.values():
        print("\n".join(lines), end="\n\n")
    README.write_text(inject(README.read_text(), found))
    front = {"results": front_table(every)}
    FRONT.write_text(inject(FRONT.read_text(), front))
    draw(every, HERE / "figures" / "race.png")
