"""How many updates a generator has had: one clock, which all callbacks of a run share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from lightning_mmd.callbacks.foreign import find_network, holds, own_optimizer
from lightning_mmd.module import MMDGAN
from lightning_mmd.passes import Watch

__all__ = ["Clocked", "GeneratorClock", "usual_name"]

USUAL_NAMES = ("generator", "netG", "net_G", "gen", "G")
"""Attributes under which people keep a generator, most common first."""


class GeneratorClock:
    """Counts the updates of one generator.

    In `MMDGAN` that is ``trainer.global_step``. Elsewhere it is the number of steps of the
    generator's optimizer: of those that Lightning knows the one that holds the fewest parameters
    besides; where it knows none, the first optimizer that steps and holds some.

    Attributes:
        optimizer: The optimizer whose steps count; None in `MMDGAN` and before it is known.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._count = 0
        self._handle: Any = None
        self._trainer: Trainer | None = None
        self._is_ours = False
        self.optimizer: Optimizer | None = None

    @property
    def updates(self) -> int:
        """Updates so far."""
        if self._is_ours and self._trainer is not None:
            return self._trainer.global_step
        return self._count

    @updates.setter
    def updates(self, number: int) -> None:
        self._count = number

    def start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from now on; from zero in a new run. What runs already goes on."""
        if self._handle is not None and self._trainer is trainer:
            return
        self.stop()
        self._trainer, self._is_ours = trainer, isinstance(pl_module, MMDGAN)
        if trainer.global_step == 0:  # a new run; a resumed one hands its count in afterwards
            self._count = 0
        if self._is_ours:
            return
        self.optimizer = own_optimizer(trainer, self._network)
        if self.optimizer is None:
            self._handle = register_optimizer_step_post_hook(self._seen)
        else:
            self._handle = self.optimizer.register_step_post_hook(self._seen)

    def stop(self) -> None:
        """Count no further."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _seen(self, optimizer: Optimizer, *_: Any) -> None:
        if self.optimizer is None and holds(optimizer, self._network):
            self.optimizer = optimizer
        if optimizer is self.optimizer:
            self._count += 1


_clocks: WeakKeyDictionary[LightningModule, dict[int, GeneratorClock]] = WeakKeyDictionary()


def _clock(pl_module: LightningModule, network: nn.Module) -> GeneratorClock:
    """Return the clock of a network: every callback gets the same one."""
    own = next((p for p in network.parameters() if p.requires_grad), None)
    own = next(network.parameters(), None) if own is None else own
    clocks = _clocks.setdefault(pl_module, {})
    key = id(network if own is None else own)
    return clocks.setdefault(key, GeneratorClock(network))


class Clocked(Callback):
    """A callback on the clock of a generator's updates.

    Attributes:
        generator: Attribute of the LightningModule that holds the generator; None where it is to
            be found.
    """

    generator: Any = None
    waits_for_updates = False
    """Whether the callback does nothing where the generator is never seen to move."""
    _ticking: GeneratorClock | None = None
    _saved_updates: int | None = None

    @property
    def updates(self) -> int:
        """Updates of the generator so far."""
        if self._ticking is None:
            return self._saved_updates or 0
        return self._ticking.updates

    def find_generator(self, trainer: Trainer, pl_module: LightningModule) -> nn.Module:
        """Return the network whose updates count."""
        name = self.generator or usual_name(pl_module) or "generator"
        return find_network(self, pl_module, "generator", name)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ticking = _clock(pl_module, self.find_generator(trainer, pl_module))
        self._ticking.start(trainer, pl_module)
        self._restore_clock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_clock()  # strategies that shard load the state late

    def _restore_clock(self) -> None:
        if self._saved_updates is not None and self._ticking is not None:
            self._ticking.updates, self._saved_updates = self._saved_updates, None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        clock = self._ticking
        if clock is None:
            return
        unseen = clock.optimizer is None and not isinstance(pl_module, MMDGAN)
        if self.waits_for_updates and unseen and trainer.global_step > 0:
            rank_zero_warn(
                f"{type(self).__name__} counts updates of the generator by the steps of its "
                "optimizer and has seen none in this training. Name the generator that is trained, "
                "generator='...', and let a torch.optim.Optimizer move it."
            )
        clock.stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if self._ticking is not None:
            self._ticking.stop()

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved_updates = state_dict["updates"]


def usual_name(pl_module: LightningModule) -> str | None:
    """Return the usual name under which a module holds its generator; None where it has none."""
    for name in USUAL_NAMES:
        if isinstance(getattr(pl_module, name, None), nn.Module):
            return name
    return None


@contextmanager
def called_networks(pl_module: LightningModule) -> Iterator[list[nn.Module]]:
    """List the networks of a module, each with all that it holds, that are called within."""
    called: list[nn.Module] = []
    running: list[nn.Module] = []

    def begin(network: nn.Module, _: Any) -> None:
        if not running and network not in called:
            called.append(network)
        running.append(network)

    def end(network: nn.Module, *_: Any) -> None:
        if running:
            running.pop()

    handles = []
    for network in pl_module.modules():
        if network is not pl_module and next(network.parameters(), None) is not None:
            handles.append(network.register_forward_pre_hook(Watch(begin)))
            handles.append(network.register_forward_hook(Watch(end), always_call=True))
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
