"""Looking at a training without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng

__all__ = ["is_observed", "observing"]

_depth = 0


def is_observed() -> bool:
    """Whether networks are called by an observer now, so that no callback may act on the call."""
    return _depth > 0


@contextmanager
def observing(device: torch.device) -> Iterator[None]:
    """Look at networks, and leave no trace.

    The random states of torch (CPU and `device`), numpy and Python are put back on exit. Callbacks
    that act on calls of networks (noise, penalties) leave calls within alone.

    Args:
        device: The module's device.
    """
    global _depth
    devices = [device] if device.type == "cuda" else []
    with isolate_rng(include_cuda=False), torch.random.fork_rng(devices=devices):
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
