"""What the processes of a trainer do together: means, gathered tensors, equal parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from lightning_mmd.game import Processes

__all__ = [
    "SHARDING",
    "TrainerProcesses",
    "mean_over_processes",
    "refuse_different_parameters",
    "together",
]

SHARDING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
"""Strategies that cut parameters into shards."""


def mean_over_processes(trainer: Trainer, tensor: Tensor) -> Tensor:
    """Return the mean of a tensor over processes."""
    if trainer.world_size == 1:
        return tensor
    return trainer.strategy.reduce(tensor.clone(), reduce_op="mean")


@contextmanager
def together(trainer: Trainer) -> Iterator[None]:
    """Let an error on one process stop all, where the others would wait for it for ever.

    All processes enter; what is within must not wait for other processes.

    Args:
        trainer: The trainer.

    Raises:
        RuntimeError: On processes without an error of their own, if another one has one.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if trainer.world_size > 1:
        failed = torch.tensor(float(error is not None), device=trainer.strategy.root_device)
        if bool(trainer.strategy.reduce(failed, reduce_op="sum") > 0) and error is None:
            raise RuntimeError("another process has failed; its error says why.")
    if error is not None:
        raise error


class TrainerProcesses(Processes):
    """The processes of a trainer.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self.rank = trainer.global_rank
        self.size = trainer.world_size

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean of a tensor over processes."""
        return mean_over_processes(self._trainer, tensor)

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, of shape (size, ...), without a graph."""
        if self.size == 1:
            return tensor.detach()[None]
        own = tensor.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(parts, own)
        return torch.stack(parts)


def refuse_different_parameters(trainer: Trainer, module: LightningModule) -> None:
    """Compare the bits of all parameters over processes.

    Raises:
        RuntimeError: If processes hold different parameters.
    """
    if trainer.world_size == 1:
        return
    names, parameters = zip(*module.named_parameters(), strict=True)
    own = torch.stack([_fingerprint(p) for p in parameters])
    reduce = trainer.strategy.reduce
    least, most = (reduce(own.clone(), reduce_op=extreme) for extreme in ("min", "max"))
    differing = [n for n, same in zip(names, least == most, strict=True) if not same]
    if differing:
        raise RuntimeError(
            f"the {trainer.world_size} processes hold different parameters "
            f"({len(differing)} of {len(names)}, the first is {differing[0]}), so they no "
            "longer train one model. Something moves parameters on some of them alone, such "
            "as a callback that draws random numbers or acts on rank zero. Go on from an "
            "older checkpoint without it."
        )


def _fingerprint(tensor: Tensor) -> Tensor:
    """Hash a tensor's bits to an integer: equal for equal bits, and hardly ever otherwise."""
    words = torch.int32 if tensor.element_size() % 4 == 0 else torch.int16
    bits = tensor.detach().reshape(-1).view(words).long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()
