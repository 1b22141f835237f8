"""Noise on everything that the critic sees."""

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_mmd.callbacks.calls import first_tensor, replace_tensor
from lightning_mmd.callbacks.noise import ScheduledNoise
from lightning_mmd.callbacks.observing import is_observed
from lightning_mmd.module import MMDGAN
from lightning_mmd.noise import NoiseSchedule
from lightning_mmd.passes import Watch

__all__ = ["InstanceNoise"]


class InstanceNoise(ScheduledNoise):
    r"""Lets the critic see nothing but noisy samples: :math:`f(x + \beta_t u)` for f(x).

    A method other than `NoiseInjection`: real and generated samples get noise at every call
    of the critic in training, penalties included, so that the two distributions overlap and the
    game is played between smoothed ones. Noise is on the critic's first floating-point input, by
    position or keyword. Calls by callbacks that only observe stay clean. Levels, draws, state and
    log are as there.

    Args:
        schedule: Level beta_t by generator updates.
        generator: Attribute of the LightningModule that holds the generator, maybe dotted.
        critic: Likewise, the critic.
        seed: Of the noise.

    Raises:
        TypeError: If the schedule is adaptive, which has no meaning here.
        ValueError: When fitting begins, if the attributes or the generator's optimizer are not
            found, or the rule of an ``MMDGAN`` needs equal calls of the critic.
        RuntimeError: If critic and generator move without a call of the critic.

    Source:
        Sonderby et al., arXiv 1610.04490; Arjovsky & Bottou, arXiv 1701.04862.

    Examples:
        >>> from lightning_mmd.noise import GeometricNoise
        >>> callback = InstanceNoise(GeometricNoise(0.5, ratio=0.999), critic="netD")
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        generator: str = "generator",
        critic: str = "critic",
        seed: int = 0,
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                "InstanceNoise needs a level that depends on the step alone, a NoiseSchedule such "
                f"as GeometricNoise, got {type(schedule).__name__}."
            )
        super().__init__(schedule, generator, critic, seed)

    def begin(self, pl_module: LightningModule, critic: nn.Module) -> list[Any]:
        if isinstance(pl_module, MMDGAN):
            reason = pl_module.rule.needs_equal_calls(pl_module.micro_batches)
            if reason is not None:
                name = type(self).__name__
                raise ValueError(f"{name} changes each call of the critic, but {reason}.")
        return [critic.register_forward_pre_hook(Watch(self._before_critic), with_kwargs=True)]

    def _before_critic(
        self, critic: nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        if not self._in_batch or is_observed():
            return None
        place = first_tensor(args, kwargs, torch.is_floating_point)
        if place is None:
            return None
        self._level = self._scheduled_level()
        if self._level == 0:
            return None
        return replace_tensor(args, kwargs, place, self._changed(place.tensor))

    def _changed(self, x: Tensor) -> Tensor:
        """Return what the critic sees in place of samples."""
        return x + self._level * self._draw(x)
