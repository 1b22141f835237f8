"""Networks of a LightningModule that we did not write: found by name, left as they were."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.optim import Optimizer

__all__ = ["find_network", "holds", "optimizers_of", "require_whole_networks"]


def find_network(callback: Callback, pl_module: LightningModule, role: str, path: str) -> nn.Module:
    """Return the network that an attribute of the module, maybe dotted, names.

    Args:
        callback: Who asks.
        pl_module: The module.
        role: The callback's argument that holds the path: ``generator`` or ``critic``.
        path: The attribute, for example ``netG`` or ``gan.netG``.

    Returns:
        The network; a compiled one as it was before.

    Raises:
        ValueError: If there is no network of that name; it lists those that there are.
    """
    try:
        network = pl_module.get_submodule(path) if path else None
    except AttributeError:
        network = None
    if network is None:
        depth = path.count(".")
        found = [
            f"{name} ({type(module).__name__})"
            for name, module in pl_module.named_modules()
            if name and name.count(".") <= depth
        ]
        raise ValueError(
            f"{type(callback).__name__}({role}={path!r}): {type(pl_module).__name__} has no "
            f"network of that name. It has {', '.join(found) or 'no networks at all'}. Set {role} "
            "to the attribute's name."
        )
    return getattr(network, "_orig_mod", network)


def optimizers_of(trainer: Trainer, network: nn.Module) -> list[Optimizer]:
    """Return the trainer's optimizers that hold a parameter of a network."""
    return [optimizer for optimizer in trainer.optimizers if holds(optimizer, network)]


def holds(optimizer: Optimizer, network: nn.Module) -> bool:
    """Whether an optimizer holds a parameter of a network."""
    own = {id(p) for p in network.parameters()}
    return any(id(p) in own for group in optimizer.param_groups for p in group["params"])


def require_whole_networks(callback: Callback, trainer: Trainer) -> None:
    """Refuse strategies that cut parameters into shards, and loss scales.

    Args:
        callback: Who asks.
        trainer: The trainer.

    Raises:
        ValueError: If parameters are sharded, or gradients carry the scale of float16.
    """
    name = type(callback).__name__
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ValueError(
            f"{name} differentiates whole networks, which {type(trainer.strategy).__name__} cuts "
            "into shards. Use one device or strategy='ddp'."
        )
    if trainer.precision in ("16-mixed", "16-true"):
        raise ValueError(
            f"{name} does not support precision={trainer.precision!r}: gradients of penalties in "
            "float16 or under its loss scale overflow. Use 'bf16-mixed' or '32-true'."
        )
