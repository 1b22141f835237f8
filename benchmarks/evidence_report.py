"""Tables of `docs/evidence.md` and of `docs/reliability.md`, from committed rows.

python benchmarks/evidence_report.py
"""

import math
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

from csv_rows import read_rows
from race_report import inject
from scipy.stats import spearmanr

HERE = Path(__file__).parent
RELIABILITY = HERE.parent / "docs" / "reliability.md"
FRONT = HERE.parent / "README.md"
PAGE = HERE.parent / "docs" / "evidence.md"
GANS = {
    "tutorial": "Lightning's tutorial GAN",
    "dcgan": "DCGAN, BatchNorm",
    "r1": "non-saturating + R1",
    "hinge_spectral": "hinge + spectral norm",
}
CALLBACKS = {
    "parametric": "`ParametricGradientPenalty()`",
    "slope": "`InputGradientPenalty()`",
    "proximal": "`ProximalPoint()`",
    "noise_0.03": "`NoiseInjection(HalvingNoise(0.03, 500))`",
    "proximal_1000": "`ProximalPoint(tau=1000)`",
    "proximal_100": "`ProximalPoint(tau=100)`",
    "proximal_10": "`ProximalPoint(tau=10)`",
    "noise_0.1": "`NoiseInjection(HalvingNoise(0.1, 500))`",
}
FAILED = 0.1
"""A run on digits has failed if its KID is not below this part of the untrained generator's."""
UNTRAINED = 1270.0
Row = dict[str, str]


def read(name: str) -> list[Row]:
    """Return the rows of a file of `results/`."""
    return read_rows(HERE / "results" / f"{name}.csv")


def foreign_table(
    rows: list[Row], factors: tuple[str, ...] = ("1.0",), callbacks: dict[str, str] = CALLBACKS
) -> list[str]:
    """Return median ratios of FID with a callback over FID without, by GAN."""
    ended = {_cell(row) for row in rows if row["end"]}
    runs: dict[tuple[str, ...], dict[int, Row]] = defaultdict(dict)
    for row in rows:
        if _cell(row) in ended:
            runs[_cell(row)][int(row["updates"])] = row
    lines = ["| callback | " + " | ".join(GANS.values()) + " |", "|---" * (len(GANS) + 1) + "|"]
    for factor in factors:
        for callback, shown in callbacks.items():
            cells = [_ratios(runs, gan, factor, callback) for gan in GANS]
            if any(cells):
                name = shown if factor == "1.0" else f"{shown}, rate x {float(factor):g}"
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def front_table(rows: list[Row]) -> list[str]:
    """Return the lines of the README: the callbacks at their defaults."""
    usual = ("slope", "parametric", "proximal", "noise_0.03")
    return foreign_table(rows, callbacks={name: CALLBACKS[name] for name in usual})


def _cell(row: Row) -> tuple[str, ...]:
    return row["gan"], row["factor"], row["callback"], row["seed"]


def _ratios(
    runs: dict[tuple[str, ...], dict[int, Row]], gan: str, factor: str, callback: str
) -> str:
    at_updates, at_time = [], []
    for (name, scale, used, seed), own in runs.items():
        plain = runs.get((gan, factor, "none", seed))
        if (name, scale, used) != (gan, factor, callback) or plain is None:
            continue
        shared = max(set(own) & set(plain))
        at_updates.append(float(own[shared]["fid"]) / float(plain[shared]["fid"]))
        at_time.append(float(own[max(own)]["fid"]) / float(plain[max(plain)]["fid"]))
    if not at_updates:
        return ""
    few = "" if len(at_updates) >= 3 else f" ({len(at_updates)})"
    return f"{median(at_updates):.2f}; {median(at_time):.2f}{few}"


def finals(rows: list[Row], study: str, data: str) -> list[Row]:
    """Return the last row of each run of a study."""
    return [row for row in rows if (row["study"], row["data"]) == (study, data) and row["end"]]


def failed(row: Row) -> bool:
    """Whether a run is no better than a tenth of the untrained generator."""
    return not float(row["kid"]) < FAILED * UNTRAINED


def ablation_table(rows: list[Row]) -> list[str]:
    """Return median, lowest and highest KID and the failures, by rule and stabiliser."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for data in ("digits", "MNIST"):
        for row in finals(rows, "ablation", data):
            found[row["rule"], row["stabiliser"]][data].append(row)
    lines = [
        "| rule | stabiliser | digits: KID | updates | failed | MNIST: FID | KID | updates |",
        "|---" * 8 + "|",
    ]
    for (rule, stabiliser), runs in found.items():
        digits, mnist = runs["digits"], runs["MNIST"]
        lines.append(
            f"| {rule} | {stabiliser} | {_spread(digits, 'kid')} | {_middle(digits, 'updates')} | "
            f"{sum(map(failed, digits))} of {len(digits)} | "
            f"{_spread(mnist, 'fid')} | {_spread(mnist, 'kid')} | {_middle(mnist, 'updates')} |"
        )
    return lines


def _spread(rows: list[Row], name: str) -> str:
    values = sorted(float(row[name]) for row in rows)
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{median(values):.3g} ({values[0]:.3g} to {values[-1]:.3g})"


def _middle(rows: list[Row], name: str) -> str:
    return f"{median(float(row[name]) for row in rows):.0f}" if rows else ""


def rates_table(rows: list[Row]) -> list[str]:
    """Return how many of the learning rates fail, by rule and stabiliser."""
    found: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in finals(rows, "rates", "digits"):
        found[row["rule"], row["stabiliser"]].append(row)
    lines = ["| rule | stabiliser | failed | best KID, at rates | median KID |", "|---" * 5 + "|"]
    for (rule, stabiliser), runs in found.items():
        best = min(runs, key=lambda row: _number(row["kid"]))
        middle = median(_number(row["kid"]) for row in runs)
        lines.append(
            f"| {rule} | {stabiliser} | {sum(map(failed, runs))} of {len(runs)} | "
            f"{float(best['kid']):.3g}, {best['rates']} | {middle:.3g} |"
        )
    return lines


def _number(text: str) -> float:
    return value if (value := float(text)) == value else math.inf


def signals_table(rows: list[Row]) -> list[str]:
    """Return the rank correlation of what a training tells with KID by the judge."""
    lines = [
        "| what a training tells | data | runs | rank correlation with KID |",
        "|---" * 4 + "|",
    ]
    for name, shown in (
        ("mmd2", "MMD^2 in pixels"),
        ("efficiency", "efficiency of the flow (closed form)"),
        ("ratio", "realised over predicted decrease (closed form)"),
    ):
        for data in ("digits", "MNIST"):
            runs = [
                row
                for row in finals(rows, "ablation", data)
                if math.isfinite(float(row[name])) and math.isfinite(float(row["kid"]))
            ]
            if len(runs) >= 5:
                pairs = [[float(row[key]) for row in runs] for key in (name, "kid")]
                told = spearmanr(*pairs).statistic
                lines.append(f"| {shown} | {data} | {len(runs)} | {told:.2f} |")
    return lines


def verdicts_table(rows: list[Row]) -> list[str]:
    """Return how often each verdict ended a run, and the KID of these runs."""
    runs = [*finals(rows, "ablation", "digits"), *finals(rows, "rates", "digits")]
    counts = Counter(row["verdict"] for row in runs)
    lines = ["| last verdict | runs | failed | median KID |", "|---" * 4 + "|"]
    for verdict, count in counts.most_common():
        own = [row for row in runs if row["verdict"] == verdict]
        middle = median(_number(row["kid"]) for row in own)
        lines.append(f"| {verdict} | {count} | {sum(map(failed, own))} | {middle:.3g} |")
    return lines


def resume_table(rows: list[Row]) -> list[str]:
    """Return how many resumed trainings were equal, by rule, processes and workers."""
    groups = [("1", "0"), ("1", "2"), ("2", "0"), ("2", "2")]
    shown = [f"{n} process{'es' if n == '2' else ''}, {w} workers" for n, w in groups]
    lines = ["| rule | " + " | ".join(shown) + " |", "|---" * (len(groups) + 1) + "|"]
    for rule in dict.fromkeys(row["rule"] for row in rows):
        cells = []
        for group in groups:
            own = [r for r in rows if (r["rule"], r["processes"], r["workers"]) == (rule, *group)]
            equal = sum(not row["different"] for row in own)
            cells.append(f"{equal} of {len(own)}" if own else "not tried")
        lines.append(f"| {rule} | " + " | ".join(cells) + " |")
    return lines


def tables() -> dict[str, list[str]]:
    """Return the lines of all tables by the name of their mark."""
    foreign, ablation = read("foreign"), read("ablation")
    return {
        "callbacks": foreign_table(foreign),
        "ablation": ablation_table(ablation),
        "rates": rates_table(ablation),
        "signals": signals_table(ablation),
        "verdicts": verdicts_table(ablation),
    }


if __name__ == "__main__":
    found = tables()
    for lines in found.values():
        print("\n".join(lines), end="\n\n")
    PAGE.write_text(inject(PAGE.read_text(), found))
    resume = {"resume": resume_table(read("resume"))}
    RELIABILITY.write_text(inject(RELIABILITY.read_text(), resume))
    front = {"callbacks": front_table(read("foreign"))}
    FRONT.write_text(inject(FRONT.read_text(), front))
