"""Forward passes that leave no trace or are repeated, and random numbers from counters."""

import copy
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

__all__ = [
    "Replay",
    "Watch",
    "buffers_kept",
    "copy_network",
    "counter_seed",
    "embed",
    "evaluating",
    "frozen_power_iterations",
    "full_precision",
    "random_state_kept",
    "seeded",
    "spectral_norms",
    "undisturbed",
    "unfused_attention",
]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast, and torch.compile, within a context.

    bfloat16 costs penalties and witnesses 1 to 4 percent, and compiled functions have no second
    derivative: modules that hold them run as they were written.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    with (
        torch.autocast(device_type=device.type, enabled=False),
        set_stance("force_eager")
        if set_stance is not None and "torch._dynamo" in sys.modules
        else nullcontext(),
    ):
        yield


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Give attention second and forward derivatives within a context.

    The fused kernels, and the fast path that transformer layers take in eval mode, have neither;
    the unfused formula computes the same function.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def counter_seed(*counters: int) -> int:
    """Hash counters to a seed: neighbouring counters give unrelated streams."""
    digest = hashlib.sha256(repr(counters).encode()).digest()
    return int.from_bytes(digest[:4], "little")


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Put torch's random state, of the CPU and of a device, back on exit."""
    with torch.random.fork_rng(_accelerators(device)):
        yield


@contextmanager
def seeded(device: torch.device, *counters: int) -> Iterator[None]:
    """Run with random numbers that are a function of the counters; restore the state after."""
    with random_state_kept(device):
        torch.manual_seed(counter_seed(*counters))
        yield


@contextmanager
def buffers_kept(*modules: nn.Module) -> Iterator[None]:
    """Put buffers back, such as power iterations, that forward passes within have moved.

    The buffers' version counters are not touched: a graph that is still to be walked stays valid.
    """
    kept = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.data.copy_(value)


@contextmanager
def undisturbed(
    networks: Iterable[nn.Module], device: torch.device, *counters: int
) -> Iterator[None]:
    """Run networks with random numbers that counters alone determine, and leave no trace.

    Buffers (batch-norm statistics, power iterations) and torch's random state are put back.
    """
    with buffers_kept(*networks), seeded(device, *counters):
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a network in eval mode for a while, and every part back into the mode that it had."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


Network = TypeVar("Network", bound=nn.Module)


class Watch:
    """A hook by which a callback watches a network: copies of the network are not watched.

    A copy, or a pickle, of a network has its hooks copied too. That of a callback would bring the
    Trainer with it; a watch becomes a hook that does nothing.

    Args:
        hook: The hook.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the hook."""
        return self._hook(*args, **kwargs)

    def __reduce__(self) -> Any:
        """Leave the hook behind; `copy.deepcopy` asks here too."""
        return Watch, (_unwatched,)


def _unwatched(*args: Any, **kwargs: Any) -> None:
    """Do nothing, as a hook."""


def copy_network(network: Network) -> Network:
    """Return a deep copy of a network.

    Weights that a hook computes anew before each call (``torch.nn.utils.weight_norm``, the older
    ``spectral_norm``) hang on a graph, which ``copy.deepcopy`` refuses; they are copied as values.
    Hooks by which callbacks of this package watch the network are left out.

    Args:
        network: The network.

    Returns:
        A copy that shares no tensor with it.
    """
    computed = [
        (values, name, value)
        for module in network.modules()
        for values in (vars(module), module._buffers)
        for name, value in list(values.items())
        if isinstance(value, Tensor) and not value.is_leaf
    ]
    hooks = [
        (own, dict(own))
        for module in network.modules()
        for own in (module._forward_hooks, module._forward_pre_hooks)
        if own
    ]
    for values, name, value in computed:
        values[name] = value.detach()
    for own, before in hooks:
        for key, hook in before.items():
            if isinstance(hook, Watch):
                del own[key]
    try:
        return copy.deepcopy(network)
    finally:
        for values, name, value in computed:
            values[name] = value
        for own, before in hooks:
            own.clear()
            own.update(before)  # in their order


def embed(features: nn.Module, samples: Tensor) -> Tensor:
    """Return features of samples, on the samples' device and in the features' own precision."""
    own = next((p for p in features.parameters() if p.is_floating_point()), None)
    features = features.to(samples.device)
    return features(samples if own is None else samples.to(own.dtype))


def spectral_norms(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules that own power iterations, of both of torch's spectral norms, by name."""
    return [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, _SpectralNorm)
        or any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    ]


@contextmanager
def frozen_power_iterations(network: nn.Module) -> Iterator[None]:
    """Hold u and v of spectral norms: they iterate in train mode, by an in-place division."""
    training = [module for _, module in spectral_norms(network) if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class Replay:
    """Repeats a forward pass from the buffers and the random state of the present moment.

    Whatever is replayed leaves both alone and sees the same dropout masks.

    Args:
        function: The module, or any callable, whose passes are repeated; only a module's buffers
            can be put back.
        device: Where it runs.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self._function = function
        self._devices = _accelerators(device)
        self._state = torch.get_rng_state()
        self._device_states = [torch.cuda.get_rng_state(d) for d in self._devices]
        self._buffers = (
            {n: b.clone() for n, b in function.named_buffers()}
            if isinstance(function, nn.Module)
            else {}
        )

    def __call__(
        self, *inputs: Any, replacements: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Tensor:
        """Run the forward pass.

        Args:
            *inputs: The function's inputs.
            replacements: Parameters and buffers to use in place of a module's own, by name.
            **kwargs: The function's keyword arguments.

        Returns:
            The function's output.
        """
        with torch.random.fork_rng(self._devices):
            torch.set_rng_state(self._state)
            for device, state in zip(self._devices, self._device_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            if not isinstance(self._function, nn.Module):
                return self._function(*inputs, **kwargs)
            fresh = {n: b.clone() for n, b in self._buffers.items()}
            values = {**fresh, **(replacements or {})}
            return functional_call(self._function, values, inputs, kwargs)


def _accelerators(device: torch.device) -> list[torch.device]:
    return [device] if device.type == "cuda" else []
