"""Ours against its rivals at equal processor time, judged by features that no method has seen.

    OMP_NUM_THREADS=1 python benchmarks/race.py DATA --plan search      # one run after another
    OMP_NUM_THREADS=1 python benchmarks/race.py DATA method=deep_kernel lr=3e-3 seconds=240
    python benchmarks/race_report.py

A run trains for some processor seconds of one thread; at 30, 60, 120, 240 and 480 seconds the
judge scores 10,000 samples of the averaged generator (`judge.py`). Each score is a row of
`results/race.csv`; runs that are there are skipped, so a plan that was cut off goes on. A long run,
`updates=20000`, is scored every 1,000 updates instead, and goes on from its last score when it was
cut off. Start-up and scoring are not counted, everything else is. While searching, the judge
compares with the last 10,000 training images, which nothing trains on; the report is on the test
images.
"""

import argparse
import copy
import csv
import ctypes
import datetime
import json
import os
import platform
import subprocess
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from judge import Images, Judge, cached_classifier, load, new_judge, to_unit
from rivals import LATENT_DIM, RIVALS, Contender, FrozenFeatures, Ours, Spec
from torchvision.utils import save_image

HERE = Path(__file__).parent
CACHE = HERE / ".cache"
RESULTS = HERE / "results" / "race.csv"
MARKS = (30, 60, 120, 240, 480)
FIELDS = [
    "data", "split", "loop", "method", "options", "seed", "seconds", "updates", "images", "fid",
    "kid", "kid_std", "precision", "recall", "confident", "rarest", "commonest", "end",
    "judge_accuracy", "commit", "torch", "processor", "date",
]  # fmt: skip
DEFAULTS = {
    "data": "MNIST",
    "split": "validation",
    "seed": 0,
    "seconds": 120,
    "loop": "bare",
    "average": "0.01",
}
COMMON = ("data", "split", "loop", "method", "seed", "seconds")  # columns of their own
EVERY = 1000  # updates between the scores of a long run
HOPELESS = 2.0  # while searching, a run ends early where its KID is so many times the best rate's


def contender(spec: Spec, images: Images, shape: tuple[int, ...]) -> Contender:
    """Make networks, losses and optimizers of a run."""
    torch.manual_seed(spec["seed"] + 1)
    if spec["method"] == "gfmn":
        state = torch.get_rng_state()
        other = cached_classifier(images, spec["data"], CACHE, seed=1)
        torch.set_rng_state(state)
        return FrozenFeatures(shape, spec, other.features, to_unit(images.train[:50_000]))
    if spec["method"] in RIVALS:
        return RIVALS[spec["method"]](shape, spec)
    return Ours(shape, spec)


def batch_size(spec: Spec, seen: int) -> int:
    """Return the batch size after so many images: "64" or "64,24000:128"."""
    first, *later = str(spec.get("batch", 64)).split(",")
    size = int(first)
    for part in later:
        start, then = part.split(":")
        if seen >= int(start):
            size = int(then)
    return size


def average_weight(spec: Spec, step: int) -> float:
    """Return the weight of the newest generator in the average, after update ``step`` from 0."""
    text = str(spec["average"])
    if text.startswith("power"):  # an average over a fixed share of the run so far
        _, gamma = text.split(":")
        return min(1.0, (float(gamma) + 1) / (step + 2))
    return max(float(text), 1 / (step + 2))


def rate_factor(spec: Spec, seen: int) -> float:
    """Return the factor on the learning rates: "linear:A:B" falls from 1 at A images to 0 at B."""
    text = str(spec.get("decay", ""))
    if not text:
        return 1.0
    kind, start, *rest = text.split(":")
    if kind == "linear":
        return 1 - min(max((seen - int(start)) / (int(rest[0]) - int(start)), 0.0), 0.98)
    return min(1.0, (int(start) / max(seen, 1)) ** float(rest[0]))  # power:A:p


@dataclass
class Run:
    """A training in progress: what a long one needs to go on."""

    player: Contender
    average: torch.nn.Module
    rates: list[list[float]]
    spent: float = 0.0
    step: int = 0
    seen: int = 0

    def update(self, spec: Spec, images: Images) -> None:
        """Move the players and the average once."""
        start = time.process_time()
        factor = rate_factor(spec, self.seen)
        for optimizer, own in zip(self.player.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = rate * factor
        size = batch_size(spec, self.seen)
        real = to_unit(images.train[torch.randint(len(images.train), (size,))])
        self.player.update(real, self.step)
        with torch.no_grad():
            weight = average_weight(spec, self.step)
            own, new = self.average.parameters(), self.player.generator.parameters()
            torch._foreach_lerp_(list(own), list(new), weight)
        self.step, self.seen = self.step + 1, self.seen + size
        self.spent += time.process_time() - start


def begin(spec: Spec, images: Images) -> Run:
    """Make a run, or take up a long one where its last score was."""
    file = state_file(spec)
    if "updates" in spec and file.exists():
        run, random_state = torch.load(file, weights_only=False)  # a file of our own
        torch.set_rng_state(random_state)
        return run
    player = contender(spec, images, tuple(images.train.shape[1:]))
    rates = [[group["lr"] for group in o.param_groups] for o in player.optimizers]
    return Run(player, copy.deepcopy(player.generator), rates)


def state_file(spec: Spec) -> Path:
    """Return where a long run keeps its state."""
    return CACHE / "states" / f"{key(spec)}.pt"


def key(spec: Spec) -> str:
    """Return a short name of a run."""
    return f"{zlib.crc32(repr(sorted(spec.items())).encode()):08x}"


def train(spec: Spec, images: Images, judge: Judge, pictures: Path) -> None:
    """Train one contender, and append a row at each mark."""
    run = begin(spec, images)
    long = "updates" in spec
    marks = [mark for mark in MARKS if mark <= spec["seconds"]]
    if long:
        marks = [*range(run.step // EVERY * EVERY + EVERY, spec["updates"] + 1, EVERY)]
    while marks:
        run.update(spec, images)
        if (run.step if long else run.spent) >= marks[0]:
            marks = score(spec, run, marks, judge, pictures)
            if long:
                state_file(spec).parent.mkdir(parents=True, exist_ok=True)
                torch.save((run, torch.get_rng_state()), state_file(spec))


def score(spec: Spec, run: Run, marks: list[int], judge: Judge, pictures: Path) -> list[int]:
    """Judge a run at its first mark, append the row, return the marks that are left."""
    state = torch.get_rng_state()
    scores, samples = judge(run.average, LATENT_DIM, len(marks) == 1)
    torch.set_rng_state(state)
    long = "updates" in spec
    cut = not long and hopeless(spec, marks[0], scores)
    last = "updates" if long else "time"
    end = last if len(marks) == 1 else "cut" if cut else ""
    seconds = round(run.spent) if long else marks[0]
    extra = {**scores, "end": end, "judge_accuracy": judge.accuracy}
    append(spec, seconds, run.step, run.seen, extra)
    pictures.mkdir(parents=True, exist_ok=True)
    name = f"{spec['data']}_{spec['method']}_{spec['seed']}_{marks[0]}.png"
    save_image(samples, pictures / name, nrow=8, normalize=True, value_range=(-1, 1))
    text = ", ".join(f"{k} {v:.3g}" for k, v in scores.items())
    who = f"{spec['method']} {options_of(spec)} seed {spec['seed']}"
    print(f"{who}: {seconds} s, {run.step} updates, {text}", flush=True)
    return [] if end else marks[1:]


def hopeless(spec: Spec, mark: int, scores: dict[str, float]) -> bool:
    """Whether a searching run is far behind the same method's best run at the same time."""
    if not scores["kid"] < 1e4:
        return True
    if spec["split"] == "test" or not spec.get("cut", True):
        return False
    rivals = [
        float(row["kid"])
        for row in rows()
        if (row["data"], row["method"], row["seconds"], row["split"])
        == (spec["data"], spec["method"], str(mark), "validation")
    ]
    return mark >= 30 and bool(rivals) and scores["kid"] > HOPELESS * min(rivals) + 20


def options_of(spec: Spec) -> str:
    """Return the options that are not defaults, as JSON."""
    options = {k: v for k, v in sorted(spec.items()) if k not in COMMON and DEFAULTS.get(k) != v}
    return json.dumps(options)


def append(spec: Spec, mark: int, step: int, seen: int, scores: dict[str, Any]) -> None:
    """Append a row in one write: several processes share the file."""
    row = {
        **{k: spec[k] for k in ("data", "split", "loop", "method", "seed")},
        "options": options_of(spec), "seconds": mark, "updates": step,
        "images": seen,
        **{n: v if isinstance(v, str) else f"{v:.5g}" for n, v in scores.items()},
        "commit": commit(), "torch": torch.__version__,
        "processor": platform.machine() + " " + torch.backends.cpu.get_cpu_capability(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)


def commit() -> str:
    """Return the commit that a row was measured at, if the tree is one."""
    result = subprocess.run(
        ["git", "-C", HERE, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return result.stdout.strip()


def rows() -> list[dict[str, str]]:
    """Return all rows so far."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def done(spec: Spec) -> bool:
    """Whether the last row of a run is there, or the row at which it was broken off."""
    name, last = "seconds", [mark for mark in MARKS if mark <= spec["seconds"]][-1]
    if "updates" in spec:
        name, last = "updates", spec["updates"]
    return any(
        row["method"] == spec["method"]
        and row["options"] == options_of(spec)
        and all(row[k] == str(spec[k]) for k in ("data", "split", "loop", "seed"))
        and (int(row[name]) >= last or row["end"] == "cut")
        for row in rows()
    )


def parse(texts: list[str]) -> Spec:
    """Read "name=value" texts; values are JSON where they can be."""
    spec: dict[str, Any] = dict(DEFAULTS)
    for text in texts:
        name, value = text.split("=", 1)
        try:
            spec[name] = json.loads(value)
        except json.JSONDecodeError:
            spec[name] = value
    spec["average"] = str(spec["average"])
    return spec


def taken(claim: Path) -> bool:
    """Claim a run for this process; return whether that worked. A dead process claims nothing."""
    claim.parent.mkdir(parents=True, exist_ok=True)
    if claim.exists() and not os.path.exists(f"/proc/{claim.read_text() or os.getpid()}"):
        claim.unlink(missing_ok=True)
    try:
        with claim.open("x") as file:  # of two processes at once, one fails here
            file.write(str(os.getpid()))
    except FileExistsError:
        return False
    return True


def main(root: str, texts: list[list[str]]) -> None:
    """Run what is not there yet, one run after another."""
    torch.set_num_threads(1)
    keep_memory()
    loaded: dict[tuple[str, str], tuple[Images, Judge]] = {}
    for spec in map(parse, texts):
        if done(spec):
            continue
        claim = CACHE / "claims" / key(spec)
        if not taken(claim):
            continue  # another process is at it
        where = spec["data"], spec["split"]
        if where not in loaded:
            images = load(spec["data"], root, spec["split"])
            judge = new_judge(spec["data"], images, CACHE)
            loaded[where] = images, judge
            print(f"judge: {judge.accuracy:.4f} right; floor {judge.floor()}", flush=True)
        train(spec, *loaded[where], CACHE / "pictures")
        claim.unlink(missing_ok=True)


def keep_memory() -> None:
    """Keep freed memory in the process: giving it back costs 10 to 20 % of each update."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, its largest


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("options", nargs="*")
    parser.add_argument("--plan", type=Path, help="file with a run's options on each line")
    args = parser.parse_args()
    lines = args.plan.read_text().splitlines() if args.plan else [" ".join(args.options)]
    main(args.data, [line.split() for line in lines if line.strip() and not line.startswith("#")])
