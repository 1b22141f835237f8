"""What a training game is doing, told from traces of a few numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal, get_args

import torch

__all__ = ["VERDICTS", "Traces", "Verdict", "cycle_length", "judge", "swings"]

Name = Literal[
    "undecided",
    "converged",
    "converging",
    "cycling",
    "collapsed",
    "critic too weak",
    "critic too strong",
    "rising",
    "stalled",
]
VERDICTS: tuple[Name, ...] = get_args(Name)
"""The verdicts, in the order of their numbers in logs."""

_ADVICE: dict[Name, str] = {
    "undecided": "Train longer, or observe more often.",
    "converged": "Stop, or go on with a lower learning rate, a narrower bandwidth or more samples.",
    "converging": "Go on.",
    "cycling": "Raise alpha (from 0, try 1) or beta, or use the rule ClosedForm, which does not "
    "cycle; or lower the generator's learning rate.",
    "collapsed": "Widen the bandwidth or inject noise; a lower learning rate helps only where the "
    "step was too long (under a narrow kernel a collapse stands at every step size).",
    "critic too weak": "Raise the critic's learning rate or critic_steps, or lower the generator's "
    "learning rate.",
    "critic too strong": "Lower the critic's learning rate (stable: rate * (alpha * "
    "lambda_max(J J^T) + beta) < 2), or eta in closed form; or lower alpha.",
    "rising": "Lower the learning rates, or raise alpha or beta; look whether the images and the "
    "samples have one range of values.",
    "stalled": "Lower beta; where that changes nothing, the generator cannot move towards the data "
    "in these features (D delta = 0): inject noise, widen the bandwidth, or use other features.",
}


@dataclass
class Traces:
    """Numbers of a training, one of each an observation; NaN where there is none.

    Args:
        steps: Generator updates.
        mmd2: Unbiased MMD^2 of samples against data.
        descent: Change of that MMD^2, on the same latents, by the last generator update.
        diversity: Mean distance between samples over that between data.
        critic_scale: Standard deviation of the critic's values on data and samples.
        critic_change: Standard deviation of the change of these values by one critic step, over
            the sum of those before and after: 0 for a critic that stands still, about 0.7 for one
            that is drawn anew.
        gradient_norm: Norm of the mean gradient of the critic in the generator's parameters.
        projection: The generator's parameters along a fixed random direction.
        efficiency: Of the closed form: alpha <delta, D w> / ||delta||^2, in [0, 1] for the exact w.
    """

    steps: list[int] = field(default_factory=list)
    mmd2: list[float] = field(default_factory=list)
    descent: list[float] = field(default_factory=list)
    diversity: list[float] = field(default_factory=list)
    critic_scale: list[float] = field(default_factory=list)
    critic_change: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    projection: list[float] = field(default_factory=list)
    efficiency: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """A name, why, and what to do.

    Args:
        name: One of `VERDICTS`.
        reason: The numbers that led to it.
        advice: What the papers advise.
    """

    name: Name
    reason: str
    advice: str

    @property
    def is_alarm(self) -> bool:
        """Whether something should be changed."""
        return VERDICTS.index(self.name) > VERDICTS.index("converging")

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}. {self.advice}"


def judge(
    traces: Traces,
    floor: float,
    *,
    diverged: bool = False,
    min_observations: int = 20,
    collapse: float = 0.2,
    restless: float = 0.3,
    idle: float = 0.1,
) -> Verdict:
    r"""Tell what a training is doing from its traces, the newest half of them above all.

    In this order:

    * values are not finite: the critic is too strong;
    * one critic step changes the critic by ``restless`` or more, in the median, while MMD^2 is
      above twice the floor and a tenth of its start, and does not fall by half within a quarter of
      the run: too strong, its steps overshoot;
    * the certificate's efficiency is below ``idle`` / 10 and MMD^2 has not halved: stalled;
    * the critic changes by less than ``idle`` a step, its scale has not grown fivefold since the
      start and MMD^2 has not halved: too weak, it never learned what tells samples from data;
    * MMD^2 is above twice the floor, it or its logarithm swings at least three times (or twice,
      where the projection of the parameters has a cycle) and has a `cycle_length`, it has not
      fallen to a third of its start, and samples have not been within a fifth of ``collapse``
      throughout: cycling, be it with samples that have come together for the moment;
    * samples are less than ``collapse`` as far apart as data are: collapsed;
    * MMD^2 is within twice the floor: converged;
    * it fell to a third of its start and does not rise, or is falling: converging;
    * the quarters of the run have a median that is half of the newest one's or less, and that of
      the quarter before is four fifths of it or less: rising;
    * none of these: undecided.

    Noise that is correlated but has no period, an AR(1) process about a plateau with a standard
    deviation of a quarter of it, is called cycling in 5 % of verdicts at most, whatever its
    correlation, and rising in 2 % at most where the correlation of neighbours is up to 0.9.

    Args:
        traces: Observations, the first before training.
        floor: What MMD^2 of data against data hardly exceeds, > 0.
        diverged: Whether training broke off because a value was not finite.
        min_observations: Fewer give no verdict, unless the run diverged.
        collapse: Least share of the data's diversity, in (0, 1).
        restless: Change of the critic a step from which it is too strong, in (0, 1).
        idle: Change of the critic a step below which it may be too weak, in (0, 1).

    Returns:
        The verdict.

    Raises:
        ValueError: If the floor is not positive.

    Source:
        Mroueh & Nguyen, arXiv 2011.02402 (cycles without the penalty, alpha); Turinici, arXiv
        2012.10410 (a collapse is no limit of the dynamics); Becker et al., arXiv 2305.08277 (for
        kernel critics it is, which is what we find; bandwidth and rates). The thresholds are ours.

    Examples:
        >>> steps = list(range(0, 400, 10))
        >>> falling = Traces(steps, [0.8**t for t in range(40)])
        >>> judge(falling, floor=1e-3).name
        'converged'
        >>> ring = Traces(steps, [1 + math.sin(t) for t in range(40)])
        >>> judge(ring, floor=1e-3).name
        'cycling'
    """
    if not floor > 0:
        raise ValueError(f"judge needs a floor > 0, got {floor}.")
    mmd2 = traces.mmd2
    finite = all(map(math.isfinite, mmd2))
    if diverged or not finite:
        return _verdict("critic too strong", "values are not finite")
    if len(mmd2) < min_observations:
        return _verdict("undecided", f"{len(mmd2)} observations of {min_observations} at least")
    half, quarter = len(mmd2) // 2, len(mmd2) // 4
    start, before, now = mmd2[0], median(mmd2[half:-quarter]), median(mmd2[-quarter:])
    level = f"MMD^2 {start:.3g} -> {now:.3g}"
    change = _median(traces.critic_change[half:])
    if change >= restless and now > max(2 * floor, start / 10, before / 2):
        return _verdict(
            "critic too strong", f"one step changes {change:.0%} of the critic; {level}"
        )
    efficiency = _median(traces.efficiency[half:])
    stands = median(mmd2[half:]) > max(2 * floor, start / 2)
    if efficiency < idle / 10 and stands:
        return _verdict("stalled", f"{level}, efficiency of the flow {efficiency:.2g}")
    scales = [scale for scale in traces.critic_scale if math.isfinite(scale)]
    growth = _median(scales[len(scales) // 2 :]) / max(scales[0], 1e-30) if scales else math.nan
    if change < idle and growth < 5 and stands:
        return _verdict(
            "critic too weak",
            f"its values vary {growth:.2g} times as much as at the start; {level}",
        )
    fell = now <= start / 3 and now <= 1.5 * before + floor
    diversities = sorted(d for d in traces.diversity[half:] if math.isfinite(d))
    motionless = bool(diversities) and diversities[-1 - len(diversities) // 10] < collapse / 5
    if now > 2 * floor and not (fell or motionless):
        returns = _returns(traces, floor)
        if returns is not None:
            return _verdict("cycling", f"{returns}; {level}")
    diversity = _median(traces.diversity[-quarter:])
    if diversity < collapse:
        return _verdict(
            "collapsed", f"samples are {diversity:.1%} as far apart as the data; {level}"
        )
    if now <= 2 * floor:
        return _verdict("converged", f"{level}, floor {floor:.2g}")
    if fell or (now <= 0.8 * before and now < start):
        return _verdict("converging", level)
    lowest = min(median(mmd2[i : i + quarter]) for i in range(0, len(mmd2) - quarter, quarter))
    if now >= 2 * max(lowest, floor) and now >= 1.25 * before:
        return _verdict("rising", f"{level}, up from {lowest:.3g}")
    gauge = "" if math.isnan(efficiency) else f", efficiency of the flow {efficiency:.2g}"
    return _verdict("undecided", f"{level}, neither falling nor returning{gauge}")


def _returns(traces: Traces, floor: float) -> str | None:
    """Describe the cycle of MMD^2 in the last three quarters of the run; None without one."""
    first = len(traces.mmd2) // 4
    mmd2, projection = traces.mmd2[first:], traces.projection[first:]
    ratios = [math.log(max(value / floor, 1.0)) for value in mmd2]  # it spans decades
    turns = max(swings(mmd2, noise=2 * floor), swings(ratios))
    period = None
    if turns >= 3:
        period = cycle_length(mmd2) or cycle_length(ratios)
    elif turns == 2:
        period = cycle_length(projection)
    if period is None:
        return None
    updates = period * (traces.steps[-1] - traces.steps[first]) / max(len(mmd2) - 1, 1)
    half = len(traces.mmd2) // 2
    rose = _share([d > 0 for d in traces.descent[half:] if math.isfinite(d)])
    raised = "" if math.isnan(rose) else f", {rose:.0%} of updates raise it"
    return (
        f"MMD^2 returns about every {updates:.0f} updates{raised}, and the generator's parameters "
        f"have turned {swings(projection)} times"
    )


def swings(trace: Sequence[float], noise: float = 0.0) -> int:
    """Count how often a trace crosses from below the middle of its range to above, or back.

    A crossing counts once the trace is a fifth of its range beyond the middle. The range is that
    between the tenth and the ninetieth percentile.

    Args:
        trace: Numbers in order of time.
        noise: A range below twice this, or below a third of the middle, counts as none.

    Returns:
        The number of crossings; about two a period.

    Examples:
        >>> swings([0, 1, 0, 1, 1, 0])
        4
        >>> swings([5, 4, 3, 2, 1])
        1
    """
    ordered = sorted(trace)
    if len(ordered) < 3:
        return 0
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    middle, span = (low + high) / 2, high - low
    if span <= max(2 * noise, abs(middle) / 3):
        return 0
    count, side = 0, 0
    for value in trace:
        now = (value > middle + span / 5) - (value < middle - span / 5)
        if now and now != side:
            count += side != 0
            side = now
    return count


def cycle_length(trace: Sequence[float], level: float = 0.01) -> float | None:
    r"""Return the length of the cycle that a trace goes through, where there is one.

    A cycle is a peak of the spectrum away from zero. The periodogram of the trace, less its linear
    trend, is compared with the spectrum of the AR(1) process of the same variance and correlation
    :math:`\phi` of neighbours (its small-sample bias corrected),

    .. math:: S(\nu) = s^2 \frac{1 - \phi^2}{1 - 2\phi\cos 2\pi\nu + \phi^2},

    at frequencies of two periods in the trace or more. Their ratio is exponential where the trace
    is of this process. There is a cycle where the largest of K ratios exceeds what noise reaches
    with probability ``level``, :math:`-\ln(1 - (1 - level)^{1/K})`, and the periodogram there is
    half as large again as anywhere at lower frequencies: red noise, a walk and a trend have none.
    Of AR(1) noise up to 4 % is taken for a cycle (15 to 60 values, phi of 0.7 and more), of longer
    noise about ``level``.

    Args:
        trace: Numbers in order of time, at equal intervals; fewer than 8 have no cycle.
        level: False alarms with white noise, in (0, 1).

    Returns:
        The number of values a cycle takes, or None.

    Source:
        Torrence & Compo 1998, A practical guide to wavelet analysis, section 4 (the red-noise
        background); the second condition is ours.

    Examples:
        >>> cycle_length([math.sin(2 * math.pi * t / 12) for t in range(60)])
        12.0
        >>> cycle_length([0.9**t for t in range(60)]) is None
        True
    """
    num = len(trace)
    if num < 8:
        return None
    time = torch.linspace(-1, 1, num, dtype=torch.float64)
    x = torch.tensor(trace, dtype=torch.float64)
    x = x - x.mean()
    x = x - time * (time @ x) / (time @ time)
    variance = float(x @ x) / num
    if not variance > 1e-24 * max(abs(value) for value in trace) ** 2:  # also for NaN
        return None
    neighbours = float(x[1:] @ x[:-1]) / (num * variance)
    phi = min(max(neighbours + (1 + 4 * neighbours) / num, -0.99), 0.99)
    power = torch.fft.rfft(x, 2 * num).abs().square() / num
    angles = torch.arange(num) * math.pi / num
    background = variance * (1 - phi**2) / (1 - 2 * phi * angles.cos() + phi**2)
    first = 4  # of a grid of half frequencies
    ratios = (power[:num] / background)[first:]
    best = first + int(ratios.argmax())
    highest = float(power[best - 2 : best + 3].max())
    lower = float(power[1 : max(best - 2, 2)].max())
    trials = 0.75 * len(ratios)  # half frequencies are dependent
    threshold = -math.log(1 - (1 - level) ** (1 / trials))
    peaks = float(ratios.max()) > threshold and highest >= 1.5 * lower
    return 2 * num / best if peaks else None


def _verdict(name: Name, reason: str) -> Verdict:
    return Verdict(name, reason, _ADVICE[name])


def _median(values: Sequence[float]) -> float:
    """Return the median of the values that are numbers, NaN where there is none."""
    finite = [value for value in values if not math.isnan(value)]
    return median(finite) if finite else math.nan


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else math.nan
