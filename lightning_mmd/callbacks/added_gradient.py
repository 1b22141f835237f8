"""A gradient that joins the one of an optimizer of any GAN, just before it steps."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mmd.callbacks.clock import Clocked
from lightning_mmd.callbacks.loggers import Log
from lightning_mmd.internals import callbacks_of

__all__ = ["AddedGradient"]


class AddedGradient(Clocked):
    """Adds a gradient to an optimizer's own just before each step, and before Lightning clips.

    A subclass calls `attach` when fitting begins, and says in `_add` what it adds.

    Attributes:
        role: Whose optimizer that is: ``generator`` or ``critic``, the attribute of the callback
            that holds the network's name.
        prefix: First part of names in the log.
        generator: Attribute of the LightningModule that holds the generator.
        critic: Likewise, the critic; empty where there is no need of one.
    """

    role = "critic"
    prefix = "penalty"
    generator = "generator"
    critic = "critic"
    _clip: Callable | None = None
    _clipping: Callable | None = None
    _seen = False
    _handles: list[Any]
    _optimizer: Optimizer

    def _add(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the gradient to that of the optimizer."""
        raise NotImplementedError

    @property
    def _network_name(self) -> str:
        return getattr(self, self.role)

    def attach(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer, handles: list[Any]
    ) -> None:
        """Add at every step of an optimizer from now on, until fitting ends.

        Args:
            trainer: The trainer.
            pl_module: The module.
            optimizer: Whose steps.
            handles: Hooks of the subclass, to be removed at the end.
        """
        self._trainer, self._optimizer, self._log = trainer, optimizer, Log()
        self._seen = False
        self._handles = [*handles, optimizer.register_step_post_hook(self._check_step)]
        self._clip = self._clipping = None
        if not pl_module.automatic_optimization:
            self._clip = pl_module.clip_gradients
            self._clip_was_own = "clip_gradients" in vars(pl_module)
            self._clipping = _Clipping(self._clip_gradients, pl_module)
            pl_module.clip_gradients = self._clipping  # pyright: ignore[reportAttributeAccessIssue]

    def _check_step(self, *_: Any) -> None:
        if not self._seen:
            raise RuntimeError(
                f"the optimizer of the {self.role} {self._network_name!r} stepped without "
                "Lightning's knowledge, so that no penalty could be added. Take it from "
                "self.optimizers(), which wraps it, and call its step()."
            )
        self._seen = False

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if optimizer is self._optimizer:
            if not self._seen:
                self._add(trainer, pl_module)
            self._seen = True

    def _clip_gradients(
        self, pl_module: LightningModule, optimizer: Optimizer, *args: Any, **kwargs: Any
    ) -> None:
        """Add before a module that optimises by hand clips the gradient."""
        if getattr(optimizer, "_optimizer", optimizer) is self._optimizer and not self._seen:
            self._add(pl_module.trainer, pl_module)
            self._seen = True
        if self._clip is not None:
            self._clip(optimizer, *args, **kwargs)

    def moving(self, network: nn.Module) -> list[nn.Parameter]:
        """Return the network's parameters that the optimizer moves."""
        own = {id(p) for p in network.parameters()}
        held = [p for group in self._optimizer.param_groups for p in group["params"]]
        return [p for p in held if id(p) in own and p.requires_grad]

    @staticmethod
    def norm(parameters: Sequence[nn.Parameter]) -> Tensor:
        """Return the norm of the gradient that is there."""
        return torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()

    @staticmethod
    def join(parameters: Sequence[nn.Parameter], added: Tensor, others: Tensor) -> Tensor:
        """Add a flat gradient to that of parameters.

        Args:
            parameters: At least one of them has a gradient.
            added: The gradient, in their order.
            others: Norm of the gradient that is there.

        Returns:
            The norm of what was added as a part of the sum of both norms.
        """
        for p, g in zip(parameters, added.split([p.numel() for p in parameters]), strict=True):
            g = g.view_as(p).to(p.dtype)
            p.grad = g if p.grad is None else p.grad.add_(g)
        size = added.norm()
        return (size / (size + others).clamp_min(torch.finfo(size.dtype).tiny)).float()

    def log_name(self, name: str) -> str:
        """Return the name of a number in the log: with the networks' where there are several."""
        alone = sum(type(c) is type(self) for c in callbacks_of(self._trainer)) == 1
        networks = [name for name in (self.generator, self.critic) if name]
        return "/".join([self.prefix, *([] if alone else networks), name])

    def note(self, pl_module: LightningModule, metrics: dict[str, Tensor]) -> None:
        """Keep numbers for the log of this batch."""
        self._log.note(pl_module, {self.log_name(name): v for name, v in metrics.items()})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._log.send(trainer, self.updates)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log.send(trainer, self.updates, last=True)
        super().on_fit_end(trainer, pl_module)
        self._release(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        for handle in getattr(self, "_handles", []):
            handle.remove()
        self._handles = []
        if self._clip is not None and vars(pl_module).get("clip_gradients") is self._clipping:
            vars(pl_module).pop("clip_gradients")
            if self._clip_was_own:
                pl_module.clip_gradients = self._clip


class _Clipping:
    """What stands in place of a module's `clip_gradients`; a copy of the module has its own."""

    def __init__(self, clip: Callable[..., None], module: LightningModule) -> None:
        self._clip, self._module = clip, module

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._clip(self._module, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        copied = memo.get(id(self._module), self._module)
        return functools.partial(type(self._module).clip_gradients, copied)
