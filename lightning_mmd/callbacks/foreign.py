"""Networks of a LightningModule that we did not write: found by name, left as they were."""

import inspect
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "critics_optimizer",
    "find_network",
    "holds",
    "is_a",
    "optimizers_of",
    "own_optimizer",
    "read_values",
    "require_whole_networks",
    "takes",
]


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


def own_optimizer(trainer: Trainer, network: nn.Module) -> Optimizer | None:
    """Return the optimizer that is most a network's own; None where the trainer has none.

    Of those that hold some of the network's parameters, it is the one that holds the fewest others:
    an InfoGAN has a third optimizer, which holds a part of everything.
    """
    own = {id(p) for p in network.parameters()}

    def others(optimizer: Optimizer) -> int:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        return sum(id(p) not in own for p in held)

    return min(optimizers_of(trainer, network), key=others, default=None)


def is_a(thing: object, *names: str) -> bool:
    """Whether a class of the thing has one of the names.

    ``lightning.pytorch`` and ``pytorch_lightning`` are one code in two packages, whose classes have
    the same names and are not derived from one another.
    """
    return any(kind.__name__ in names for kind in type(thing).__mro__)


def critics_optimizer(
    callback: Any, trainer: Trainer, networks: tuple[nn.Module, nn.Module]
) -> Optimizer:
    """Return the one optimizer of a critic, which a penalty adds to.

    Args:
        callback: Who asks; it names its networks in ``critic`` and ``generator``.
        trainer: The trainer.
        networks: Critic and generator.

    Raises:
        ValueError: If there is not one that holds parameters of the critic and none of the
            generator, or it maximises.
    """
    critic, generator = networks
    name, holding = type(callback).__name__, optimizers_of(trainer, critic)
    optimizers = [optimizer for optimizer in holding if not holds(optimizer, generator)]
    if holding and not optimizers:
        raise ValueError(
            f"{name} needs an optimizer for the critic alone, but a {type(holding[0]).__name__} "
            f"holds parameters of both {callback.critic!r} and {callback.generator!r}. Let "
            "configure_optimizers return one for each network."
        )
    if len(optimizers) != 1:
        raise ValueError(
            f"{name} adds to the one optimizer of the critic {callback.critic!r}, but "
            f"{len(optimizers)} of the {len(trainer.optimizers)} optimizers of "
            f"{type(trainer.lightning_module).__name__} hold its parameters. Let "
            "configure_optimizers return one for it."
        )
    if any(group.get("maximize") for group in optimizers[0].param_groups):
        raise ValueError(
            f"{name} adds to a loss that is minimised, but the critic's optimizer has "
            "maximize=True. Minimise the negative loss."
        )
    return optimizers[0]


def holds(optimizer: Optimizer, network: nn.Module) -> bool:
    """Whether an optimizer holds a parameter of a network."""
    own = {id(p) for p in network.parameters()}
    return any(id(p) in own for group in optimizer.param_groups for p in group["params"])


def read_values(
    callback: Callback, critic: str, output: Any, num: int, critic_values: Callable | None
) -> Tensor:
    """Return a critic's values, of shape (n,).

    Args:
        callback: Who asks; errors name it.
        critic: The critic's attribute.
        output: What the critic returned: values (n,) or (n, 1), or maps (n, 1, h, w), which are
            averaged over their places.
        num: Number n of samples.
        critic_values: From the output to such values; None where it is so itself.

    Raises:
        TypeError: If that is no tensor.
        ValueError: If it has another shape.
    """
    values = output if critic_values is None else critic_values(output)
    if not isinstance(values, Tensor):
        source = "returns" if critic_values is None else "gives, through critic_values,"
        raise TypeError(
            f"{type(callback).__name__}: the critic {critic!r} {source} no tensor but "
            f"{type(values).__name__}. Give critic_values, a callable from what it returns to "
            "values of shape (n,)."
        )
    if values.ndim > 2 and values.shape[:2] == (num, 1):  # a map of scores of patches
        values = values.flatten(1).mean(1)
    if values.shape not in ((num,), (num, 1)):
        raise ValueError(
            f"{type(callback).__name__}: the critic {critic!r} returns shape "
            f"{tuple(values.shape)} for {num} samples where ({num},), ({num}, 1) or maps "
            f"({num}, 1, h, w) are expected. Give critic_values, a callable from what it returns "
            "to values of shape (n,)."
        )
    return values.reshape(num)


def takes(network: nn.Module, num: int) -> bool:
    """Whether a network can be called with a number of inputs by position."""
    try:
        inspect.signature(network.forward).bind(*range(num))
    except TypeError:
        return False
    return True


def require_whole_networks(callback: Callback, trainer: Trainer) -> None:
    """Refuse strategies that cut parameters into shards, and loss scales.

    Args:
        callback: Who asks.
        trainer: The trainer.

    Raises:
        ValueError: If parameters are sharded, or gradients carry the scale of float16.
    """
    name = type(callback).__name__
    if not is_a(trainer.strategy, "SingleDeviceStrategy", "DDPStrategy"):
        raise ValueError(
            f"{name} differentiates whole networks, which {type(trainer.strategy).__name__} cuts "
            "into shards. Use one device or strategy='ddp'."
        )
    if trainer.precision in ("16-mixed", "16-true"):
        raise ValueError(
            f"{name} does not support precision={trainer.precision!r}: gradients of penalties in "
            "float16 or under its loss scale overflow. Use 'bf16-mixed' or '32-true'."
        )
