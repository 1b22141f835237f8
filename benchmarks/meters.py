"""Interleaved processor times and peaks of memory."""

import os
import time
import tracemalloc
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports every start and stop
from torch.profiler import ProfilerActivity, profile

Ratio = dict[str, float]


def interleaved_seconds(
    candidates: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
    """Return processor seconds of each candidate, which take turns; one more turn is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats + 1):
        for name, run in candidates.items():
            begin = time.process_time()
            run()
            seconds[name].append(time.process_time() - begin)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(seconds: list[float], reference: list[float], name: str = "time") -> Ratio:
    """Return median, lowest and highest ratio, turn by turn."""
    ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
    return {name: median(ratios), f"{name}_min": min(ratios), f"{name}_max": max(ratios)}


def peak_memory(run: Callable[[], Any]) -> int:
    """Return the most bytes of tensors that a call held at once beyond what was there before.

    From the allocations that torch's profiler sees on the CPU; results that ``run`` returns count.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    held = highest = 0
    for num_bytes in _memory_events(profiler):
        held += num_bytes
        highest = max(highest, held)
    return highest


def peak_numpy_memory(run: Callable[[], Any]) -> int:
    """Return the same of NumPy's arrays, as tracemalloc sees them."""
    tracemalloc.start()
    run()
    _, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return highest


def _memory_events(profiler: profile) -> list[int]:
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda event: event.start_ns())]
