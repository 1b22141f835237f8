"""A kernel width that changes while the generator trains."""

import math
from operator import attrgetter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_mmd.callbacks.clock import Clocked
from lightning_mmd.callbacks.loggers import Log
from lightning_mmd.features import RandomFourierFeatures
from lightning_mmd.kernels import Kernel

__all__ = ["BandwidthSchedule"]


class BandwidthSchedule(Clocked):
    r"""Scale a kernel's bandwidth along a geometric path, on the clock of generator updates.

    .. math:: \sigma_t = \sigma\, c_0^{1 - s} c_1^s, \qquad s = \min(t / T, 1)

    where sigma is the bandwidth that was configured. A wide kernel sees modes that are far apart
    and has a long-lived slope between them; a narrow one resolves them. Narrowing it is the usual
    course. The target is either a module that holds `RandomFourierFeatures`, such as a
    `LearnedKernelCritic` with ``random_features`` (their frequencies scale like 1 / sigma), or a
    `Kernel` that a loss reads from an attribute, sums of kernels included. Each batch sees the
    width of the generator update that it leads to. Logged as ``bandwidth_factor``; a resumed run
    goes on exactly.

    Args:
        initial: Factor c_0 on the bandwidth before the first update, > 0.
        final: Factor c_1 from update ``num_steps`` on, > 0.
        num_steps: Updates T from the first factor to the last, at least 1.
        every_n_steps: Updates between changes, at least 1. With ``initial=4, final=1,
            num_steps=200, every_n_steps=100`` the bandwidth is halved twice.
        target: Attribute of the LightningModule, dotted if need be.
        generator: Attribute that holds the generator whose updates count; default: the usual names.

    Raises:
        ValueError: If a number is out of range; at the start of training, if there is no such
            attribute or it holds no bandwidth.

    Source:
        Becker et al., arXiv 2305.08277: shrinking the kernel's effective width in training helps.

    Examples:
        >>> schedule = BandwidthSchedule(initial=4.0, num_steps=200, every_n_steps=100)
        >>> [schedule.factor(step) for step in (0, 99, 100, 200, 900)]
        [4.0, 4.0, 2.0, 1.0, 1.0]
    """

    def __init__(
        self,
        initial: float,
        final: float = 1.0,
        num_steps: int = 1000,
        every_n_steps: int = 1,
        target: str = "critic",
        generator: str | None = None,
    ) -> None:
        if not (0 < initial < math.inf and 0 < final < math.inf):
            raise ValueError(
                "BandwidthSchedule needs finite factors initial > 0 and final > 0, got "
                f"{initial} and {final}."
            )
        if min(num_steps, every_n_steps) < 1:
            raise ValueError(
                "BandwidthSchedule needs num_steps and every_n_steps of at least 1, got "
                f"{num_steps} and {every_n_steps}."
            )
        self.initial = initial
        self.final = final
        self.num_steps = num_steps
        self.every_n_steps = every_n_steps
        self.target = target
        self.generator = generator
        self._log = Log()
        self._frequencies: dict[str, Tensor] = {}  # as configured, by the module's name
        self._kernel: Kernel | None = None
        self._applied: float | None = None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(target=self.target)

    def stretch(self, factor: int) -> None:
        """Let the path be that of shorter steps."""
        self.num_steps *= factor
        self.every_n_steps *= factor

    def factor(self, step: int) -> float:
        """Return the factor on the bandwidth after some generator updates.

        Args:
            step: Number of updates, >= 0.

        Returns:
            A number between ``initial`` and ``final``.
        """
        share = min(step // self.every_n_steps * self.every_n_steps / self.num_steps, 1.0)
        return self.initial * (self.final / self.initial) ** share

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.global_step == 0:  # another fit of the same trainer goes on
            self._frequencies, self._kernel, self._applied = {}, None, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        target = self._find(pl_module)
        if isinstance(target, Kernel):
            self._kernel = target if self._kernel is None else self._kernel
            try:
                target.scaled(2.0)
            except TypeError as error:
                raise ValueError(f"BandwidthSchedule: {error}") from error
        elif not self._frequencies:  # a new run, not a resumed one
            self._frequencies = {n: m.frequencies.clone() for n, m in _features(target)}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        factor = self.factor(self.updates)
        self._log.note(pl_module, {"bandwidth_factor": factor})
        self._log.send(trainer, self.updates)
        if factor == self._applied:
            return
        target = self._find(pl_module)
        if self._kernel is not None:
            path, _, name = self.target.rpartition(".")
            owner = attrgetter(path)(pl_module) if path else pl_module
            setattr(owner, name, self._kernel.scaled(factor))
        elif isinstance(target, nn.Module):
            for name, module in _features(target):
                configured = self._frequencies[name].to(module.frequencies)
                module.frequencies.copy_(configured / factor)
        self._applied = factor

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "frequencies": {n: f.cpu() for n, f in self._frequencies.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._frequencies = dict(state_dict["frequencies"])

    def _find(self, pl_module: LightningModule) -> nn.Module | Kernel:
        try:
            target = attrgetter(self.target)(pl_module)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise ValueError(
                f"BandwidthSchedule changes {self.target!r}, which {type(pl_module).__name__} does "
                f"not have. Its networks are: {names}. Name one of them, or an attribute that "
                "holds a kernel, by target=..."
            ) from error
        holds = isinstance(target, Kernel) or (isinstance(target, nn.Module) and _features(target))
        if not holds:
            raise ValueError(
                f"BandwidthSchedule needs RandomFourierFeatures or a Kernel in {self.target!r}, "
                f"got {type(target).__name__}, which has no bandwidth. Give the critic "
                "random_features, or name another target."
            )
        return target


def _features(module: nn.Module) -> list[tuple[str, RandomFourierFeatures]]:
    named = module.named_modules()
    return [(name, part) for name, part in named if isinstance(part, RandomFourierFeatures)]
