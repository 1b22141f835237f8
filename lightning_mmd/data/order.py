"""The order of the training samples: a pure function of a seed and of a count of samples."""

import random
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

__all__ = ["BatchSizes", "Order", "coin_flips"]


class BatchSizes:
    """The size of a batch as a function of the samples seen: b(P) = size of the last step <= P.

    Args:
        sizes: one size for the whole training, or {samples seen: size from then on}, which begins
            at 0. The samples are those of all processes, a size is that of one process.

    Raises:
        ValueError: a size is below 1, or no size stands at 0 samples.

    Examples:
        >>> sizes = BatchSizes({0: 64, 10_000: 128})
        >>> sizes.at(9_999), sizes.at(10_000), sizes.after(0, batches=2, num_replicas=1)
        (64, 128, 128)
    """

    def __init__(self, sizes: int | dict[int, int]) -> None:
        steps = sizes if isinstance(sizes, dict) else {0: sizes}
        if 0 not in steps or min(steps) < 0 or min(steps.values()) < 1:
            raise ValueError(
                f"Expected batch_size of at least 1, got {sizes}. A schedule begins at 0 "
                "samples, as {0: 64, 10000: 128}."
            )
        self.steps = sorted(steps.items())
        self.largest = max(steps.values())

    def at(self, position: int) -> int:
        """Return the size of the batch that begins after `position` samples.

        Args:
            position: samples that all processes have seen, at least 0.
        """
        return next(size for start, size in reversed(self.steps) if start <= position)

    def after(self, position: int, batches: int, num_replicas: int) -> int:
        """Return the samples seen after some more batches.

        Args:
            position: samples that all processes have seen, at least 0.
            batches: further batches of each process, at least 0.
            num_replicas: number of processes.
        """
        for _ in range(batches):
            position += self.at(position) * num_replicas
        return position


class Order(DistributedSampler[Any]):
    r"""Batches of indices from one endless stream of samples, each process its part of a batch.

    The stream is s(P) = pi_e(P mod N), e = floor(P / N), with a permutation pi_e of range(N) that
    is a function of (seed, e). A batch of size b that begins at position P takes s(P), ...,
    s(P + W b - 1), and process r of W takes b of them from s(P + r b) on. So the order does not
    depend on b, on W, or on where a training was cut; a batch that reaches past the end of a
    permutation goes on with the next.

    One iteration yields floor(N / (W b)) batches, Lightning's epoch. It begins at `position()`,
    where that is given, else after `epoch` such iterations, as `set_epoch` says. Lightning tells
    a sampler the epoch after it has begun to iterate, and counts an epoch that `max_steps` cut as a
    whole one; `position` makes it independent of either. It is a DistributedSampler, since
    Lightning puts a sampler of its own in the place of any other.

    Args:
        num_samples: size N of the training set.
        sizes: batch sizes of one process.
        seed: fixes the permutations.
        num_replicas: number W of processes.
        rank: this process, in 0..W-1.
        position: returns how many samples all processes have trained on.

    Raises:
        ValueError: N samples do not fill one batch of every process.

    Examples:
        >>> two = [Order(4, BatchSizes(1), 0, num_replicas=2, rank=rank) for rank in range(2)]
        >>> [a + b for a, b in zip(*two)] == list(Order(4, BatchSizes(2), 0))
        True
    """

    def __init__(
        self,
        num_samples: int,
        sizes: BatchSizes,
        seed: int,
        num_replicas: int = 1,
        rank: int = 0,
        position: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(cast(Any, range(num_samples)), num_replicas, rank, seed=seed)
        if num_samples < sizes.largest * num_replicas:
            raise ValueError(
                f"Expected at least batch_size={sizes.largest} training samples a process, got "
                f"{num_samples // num_replicas} on each of {num_replicas}. Lower batch_size or the "
                "held-out shares, or add data."
            )
        self.num_samples = num_samples
        self.sizes = sizes
        self.position = position

    def __len__(self) -> int:
        return self.num_samples // (self.sizes.at(0) * self.num_replicas)

    def __iter__(self) -> Iterator[Any]:
        return (self.indices(first, size) for first, size in self.spans())

    def spans(self) -> Iterator[tuple[int, int]]:
        """Return the batches of one iteration, as the position of the first sample and the size."""
        if self.position is not None:
            start = self.position()  # now, and not when the first batch is asked for
        else:
            start = self.sizes.after(0, self.epoch * len(self), self.num_replicas)
        return self._spans(start)

    def _spans(self, position: int) -> Iterator[tuple[int, int]]:
        for _ in range(len(self)):
            size = self.sizes.at(position)
            yield position + self.rank * size, size
            position += size * self.num_replicas

    def indices(self, first: int, num: int) -> list[int]:
        """Return s(first), ..., s(first + num - 1).

        Args:
            first: position in the stream, at least 0.
            num: number of samples.
        """
        found: list[int] = []
        while len(found) < num:
            epoch, offset = divmod(first + len(found), self.num_samples)
            part = permutation(self.seed, epoch, self.num_samples)
            found += part[offset : offset + num - len(found)].tolist()
        return found


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, num: int) -> Tensor:
    """Return the permutation of range(num) that is a function of (seed, epoch), int64 of (num).

    Args:
        seed: any integer.
        epoch: number of the permutation.
        num: its length.
    """
    mixed = random.Random(f"order {seed} {epoch}").getrandbits(63)  # hashed: (0, 1) is not (1, 0)
    return torch.randperm(num, generator=torch.Generator().manual_seed(mixed))


def coin_flips(seed: int, first: int, num: int) -> Tensor:
    """Return fair coin flips of consecutive positions, each a function of (seed, position).

    Args:
        seed: any integer.
        first: the first position, at least 0.
        num: number of positions.

    Returns:
        bool tensor of shape (num), on the CPU.

    Source:
        G. L. Steele, D. Lea and C. H. Flood, Fast Splittable Pseudorandom Number Generators, 2014
        (the mixing function of SplitMix64).

    Examples:
        >>> bool((coin_flips(0, 3, 5) == coin_flips(0, 0, 8)[3:]).all())
        True
    """
    key = np.uint64(random.Random(f"flip {seed}").getrandbits(64))
    with np.errstate(over="ignore"):  # modulo 2^64
        z = key + np.arange(first, first + num, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy((z ^ (z >> np.uint64(31))) >> np.uint64(63) == 1)
