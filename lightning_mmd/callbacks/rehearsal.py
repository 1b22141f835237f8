"""What a training will take, told before its first step."""

import copy
import itertools
import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_mmd.callbacks.observing import observing
from lightning_mmd.data import SampleDataModule
from lightning_mmd.data.order import BatchSizes
from lightning_mmd.game import Game, Player
from lightning_mmd.module import MMDGAN
from lightning_mmd.passes import copy_network

__all__ = ["Rehearsal"]


class Rehearsal(Callback):
    """Plays one update on copies, and says what the training takes: parameters, memory, time.

    The copies do not move, and random number generators are left as they were, so the training is
    the same with and without the callback. Memory counts weights, gradients and Adam's state, and
    what the update keeps for its backward passes; time is wall time of one process and has neither
    the loader nor other callbacks in it.

    Args:
        images: Number of images that the time is told for, >= 1.

    Attributes:
        seconds: Time of an update, None before.
        update_bytes: What the update kept for backward passes.

    Raises:
        ValueError: If ``images`` is below 1.
        MemoryError: When fitting begins, if an update does not fit the memory.

    Examples:
        >>> Rehearsal(images=50_000).images
        50000
    """

    def __init__(self, images: int = 100_000) -> None:
        if images < 1:
            raise ValueError(f"Rehearsal needs images of at least 1, got {images}.")
        self.images = images
        self.seconds: float | None = None
        self.update_bytes = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, MMDGAN) or not isinstance(data, SampleDataModule):
            return
        num = BatchSizes(data.batch_size).largest
        real = torch.zeros(num, *data.sample_shape, device=pl_module.device)
        labels = [torch.zeros(num, dtype=torch.int64, device=real.device)] if data.labels else []
        try:
            with observing(pl_module.device):
                self._play(pl_module, (real, *labels))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError) and "memory" not in str(error):
                raise
            raise MemoryError(
                f"an update on {num} images of shape {tuple(data.sample_shape)} does not fit the "
                f"memory ({error}). Take a smaller data.batch_size or image_size, or evaluate the "
                "batch in parts: model.micro_batches."
            ) from error
        if trainer.is_global_zero:
            rank_zero_info(self._told(pl_module, num, trainer.world_size))

    def _play(self, model: MMDGAN, real: tuple[Tensor, ...]) -> None:
        """Play one update for its shapes, and a second one with a watch."""
        rule = copy.deepcopy(model.rule)
        players = [
            Player(name, network, chosen(network), torch.optim.SGD(chosen(network).values(), 0.0))
            for name, network, chosen in (
                ("generator", copy_network(model.generator), rule.generator_parameters),
                ("critic", copy_network(model.critic), rule.critic_parameters),
            )
        ]
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        draw = model.fixed_latents
        generator, critic = players
        options = {"micro_batches": model.micro_batches, "pairs": model.latents.paired}
        games = (Game(generator, critic, real, draw, step=step, **options) for step in range(2))
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            rule.update(next(games))
        self.update_bytes = sum(kept.values())
        begin = time.perf_counter()
        metrics = rule.update(next(games))
        float(torch.as_tensor(metrics["critic/gap"]))  # waits for the device
        self.seconds = time.perf_counter() - begin

    def _told(self, model: MMDGAN, num: int, world_size: int) -> str:
        networks = {"generator": model.generator, "critic": model.critic}
        counts = {n: sum(p.numel() for p in m.parameters()) for n, m in networks.items()}
        weights = sum(
            4 * p.numel() * p.element_size()
            for p in itertools.chain(*(m.parameters() for m in networks.values()))
        )
        batches = -(-self.images // (num * world_size))
        seconds = batches * (self.seconds or 0.0)
        sizes = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        return (
            f"Parameters: {sizes}. Memory: about {(weights + self.update_bytes) / 2**20:,.0f} MiB. "
            f"{self.images:,} images ({batches:,} batches of {num * world_size}) take about "
            f"{duration(seconds)}."
        )


def duration(seconds: float) -> str:
    """Say a time in the unit that suits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
