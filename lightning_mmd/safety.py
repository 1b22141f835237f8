"""What a file may build: classes of the kinds that a training consists of, and nothing else.

A configuration and a checkpoint of the command line name classes by their dotted paths. Whoever
wrote the file chooses them, so what is built is checked before anything is called: it must be a
class, never a function, and of a kind that the argument declares or that a training consists of. A
checkpoint may moreover import nothing: see :class:`Checkpoint`.
"""

import inspect
import sys
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_mmd.estimators import Estimator
from lightning_mmd.game import UpdateRule
from lightning_mmd.internals import replace_imports
from lightning_mmd.kernel_objectives import KernelObjective
from lightning_mmd.kernels import Kernel
from lightning_mmd.latents import Latents
from lightning_mmd.noise import Noise
from lightning_mmd.objectives import Objective
from lightning_mmd.witness import System

__all__ = ["Checkpoint", "Configuration", "Policy", "UntrustedError", "opened"]

_KINDS = (
    nn.Module,
    Optimizer,
    LRScheduler,
    Kernel,
    UpdateRule,
    Estimator,
    Objective,
    KernelObjective,
    Latents,
    System,
    Noise,
)
_HOMES = ("lightning_mmd", "torch.nn", "torch.optim", "torchvision.models")
_FUNCTIONS = ("lightning_mmd", "torch.nn.functional", "torch.nn.init", "math", "operator")
_DEPENDENCIES = {  # their classes write files, start processes or fetch what a file asks for
    "PIL",
    "fsspec",
    "jsonargparse",
    "lightning",
    "lightning_fabric",
    "matplotlib",
    "numpy",
    "pytorch_lightning",
    "requests",
    "scipy",
    "sklearn",
    "torch",
    "torchmetrics",
    "torchvision",
    "tqdm",
    "wandb",
    "yaml",
}
_INSTANTIATORS = {
    "lightning.pytorch.cli.instantiate_module",
    "pytorch_lightning.cli.instantiate_module",
}
_Declared = tuple[type, ...]


class UntrustedError(ValueError):
    """A file asks for something to be built or imported that it may not ask for."""


class Policy(ABC):
    """Which classes and functions a file may name."""

    def check(self, config: Any, parent: type | None = None) -> None:
        """Walk a parsed configuration.

        Args:
            config: What a parser made of a file: nested dictionaries, lists and values.
            parent: The class whose arguments it holds.

        Raises:
            UntrustedError: If something in it may not be built.
        """
        for name, value in _items(config):
            self._walk(value, _declared(parent, name), name)

    @abstractmethod
    def check_class(self, found: Any, declared: _Declared, name: str) -> None:
        """Raise unless a file may build this, for an argument that declares some classes.

        Args:
            found: What a class path names.
            declared: Classes that the argument declares, none where it declares nothing.
            name: The argument, for the message.
        """

    @abstractmethod
    def check_function(self, found: Any, name: str) -> None:
        """Raise unless a file may hand over this function.

        Args:
            found: Anything callable.
            name: The argument, for the message.
        """

    def _walk(self, value: Any, declared: _Declared, name: str) -> None:
        if isinstance(value, str):
            if ":" in value:  # a parser reads such a text as what it says
                try:
                    inner = yaml.safe_load(value)
                except (yaml.YAMLError, ValueError):
                    return
                if inner != value:
                    self._walk(inner, (), name)
        elif isinstance(value, (Mapping, Namespace)):
            path = value.get("class_path")
            parent = None
            if path is not None:
                parent = self.resolve(path, name)
                self.check_class(parent, declared, name)
            for key, part in _items(value):
                if path is not None and key in ("init_args", "dict_kwargs"):
                    for inner, argument in _items(part):
                        self._walk(argument, _declared(parent, inner), inner)
                elif key != "class_path":
                    self._walk(part, declared, key)
        elif isinstance(value, (list, tuple, set)):
            for part in value:
                self._walk(part, declared, name)
        elif isinstance(value, type):
            self.check_class(value, declared, name)
        elif callable(value) and not isinstance(value, _KINDS):
            self.check_function(value, name)

    def resolve(self, path: Any, name: str) -> Any:
        """Return what a class path names.

        Args:
            path: A dotted path.
            name: The argument, for the message.
        """
        parts = path.split(".") if isinstance(path, str) else []
        if len(parts) < 2 or not all(part.isidentifier() for part in parts):
            raise UntrustedError(f"{name}: expected a class path such as torch.nn.ReLU: {path!r}.")
        module, _, rest = path.rpartition(".")
        while module:
            try:
                found: Any = import_module(module)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                    raise
                module, _, last = module.rpartition(".")
                rest = f"{last}.{rest}"
            else:
                for part in rest.split("."):
                    if not hasattr(found, part):
                        raise UntrustedError(f"{name}: {module} has no {rest}. Check its spelling.")
                    found = getattr(found, part)
                return found
        raise UntrustedError(f"{name}: there is no module of {path!r}. Check its spelling.")


class Configuration(Policy):
    """What a configuration on the command line may name: any module, but only fitting classes."""

    def check_class(self, found: Any, declared: _Declared, name: str) -> None:
        """Raise unless it is a class of a kind that the argument declares, or of a training's.

        Args:
            found: What a class path names.
            declared: Classes that the argument declares.
            name: The argument.
        """
        if not isinstance(found, type):
            raise UntrustedError(
                f"{name}: {_path(found)} is a function, and a file may build classes only. "
                "Name a class in its place."
            )
        if not _fits(found, declared):
            wanted = " or ".join(sorted({c.__name__ for c in declared})) or "a class of a network"
            raise UntrustedError(
                f"{name}: {_path(found)} is not what this argument takes. Expected {wanted}, or "
                "an optimizer, scheduler, kernel, rule, estimator or objective."
            )

    def check_function(self, found: Any, name: str) -> None:
        """Raise if it is a function of Python's own library or of torch's tools.

        Args:
            found: Anything callable.
            name: The argument.
        """
        home = getattr(found, "__module__", None) or ""
        if _within(home, _FUNCTIONS):
            return
        top = home.partition(".")[0]
        if top in sys.stdlib_module_names or (top == "torch" and home != "torch"):
            raise UntrustedError(
                f"{name}: {_path(found)} is a function that a configuration may not name. Give a "
                "function of a module of your own."
            )


class Checkpoint(Configuration):
    """What a checkpoint may name: nothing that would have to be imported for it.

    Classes of torch.nn, torch.optim, torchvision.models and this package; those of modules that the
    running program has imported, but not of Python's own library and of what this package stands
    on; and both classes and functions of modules that are trusted by name.

    Args:
        trust: Names of modules, which are imported now; their submodules are trusted too.

    Raises:
        UntrustedError: If one of them cannot be imported.
    """

    def __init__(self, trust: Iterable[str] = ()) -> None:
        self.trusted = (trust,) if isinstance(trust, str) else tuple(trust)
        for name in self.trusted:
            try:
                import_module(name)
            except ImportError as error:
                raise UntrustedError(
                    f"the module {name!r}, which is to be trusted, cannot be imported: {error}. "
                    "Give the name that 'import' takes, from the folder where it lies."
                ) from error

    def check_class(self, found: Any, declared: _Declared, name: str) -> None:
        """Raise unless it is a fitting class of a home that a checkpoint may name.

        Args:
            found: What a class path names.
            declared: Classes that the argument declares.
            name: The argument.
        """
        super().check_class(found, declared, name)
        if not self._may_name(found.__module__):
            raise UntrustedError(self._refusal(_path(found), name))

    def check_function(self, found: Any, name: str) -> None:
        """Raise unless it is a function of a trusted module or of this package.

        Args:
            found: Anything callable.
            name: The argument.
        """
        if not _within(getattr(found, "__module__", None) or "", (*self.trusted, "lightning_mmd")):
            raise UntrustedError(self._refusal(_path(found), name))

    def check_import(self, path: str) -> None:
        """Raise unless a dotted path can be followed without an import that is not allowed.

        Args:
            path: The dotted path of a class or function.
        """
        module, _, _ = path.rpartition(".")
        parent, _, outer = module.rpartition(".")
        nested = isinstance(getattr(sys.modules.get(parent), outer, None), type)
        known = module in sys.modules or nested
        if not _within(path, (*_HOMES, *self.trusted)) and not known:
            raise UntrustedError(self._refusal(path, "the checkpoint"))

    def resolve(self, path: Any, name: str) -> Any:
        """Return what a class path names, without an import that is not allowed.

        Args:
            path: A dotted path.
            name: The argument.
        """
        if isinstance(path, str):
            self.check_import(path)
        return super().resolve(path, name)

    def _may_name(self, module: str) -> bool:
        if _within(module, (*_HOMES, *self.trusted)):
            return True
        top = module.partition(".")[0]
        foreign = top not in sys.stdlib_module_names and top not in _DEPENDENCIES
        return module == "__main__" or (foreign and module in sys.modules)

    def _refusal(self, path: str, name: str) -> str:
        top = path.partition(".")[0]
        if top in sys.stdlib_module_names or top in _DEPENDENCIES:
            return (
                f"{name} names {path}, which a checkpoint may not build. It was not made by "
                "this package, or somebody has changed it: do not use it."
            )
        module = path.rpartition(".")[0] or path
        return (
            f"{name} names {path}, of a module that this program has not imported. Where you know "
            f"the module, trust it: --trust {module} on the command line, trust=[{module!r}] in "
            "load_from_checkpoint."
        )


@contextmanager
def opened(
    kind: type, hyper_parameters: Mapping[str, Any], given: Mapping[str, Any], trust: Iterable[str]
) -> Iterator[None]:
    """Check what a checkpoint would build of its hyperparameters; in the context it may be built.

    Args:
        kind: The class that is to be built.
        hyper_parameters: The checkpoint's own.
        given: Arguments of the program, which replace the checkpoint's and need no check.
        trust: Names of modules that the checkpoint may name.

    Raises:
        UntrustedError: If the checkpoint asks for what it may not ask for.
    """
    policy = Checkpoint(trust)
    refused: list[UntrustedError] = []

    def check(path: str) -> None:
        try:
            policy.check_import(path)
        except UntrustedError as error:  # a parser swallows it where a type is optional
            refused.append(error)
            raise

    with replace_imports(check):
        try:
            _check_parsed(policy, kind, hyper_parameters, given)
            yield
        except Exception as error:
            if refused:
                raise refused[0] from None
            if isinstance(error, ArgumentError):
                raise UntrustedError(
                    f"the checkpoint's arguments are not those of {kind.__name__}: {error}"
                ) from error
            raise
    if refused:
        raise refused[0]


def _check_parsed(
    policy: Checkpoint, kind: type, hyper_parameters: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Parse hyperparameters as Lightning will, and walk what it would build."""
    arguments = {name: v for name, v in hyper_parameters.items() if name not in given}
    instantiator, path = arguments.pop("_instantiator", None), arguments.pop("_class_path", None)
    if instantiator is None:
        policy.check(arguments, kind)
        return
    if instantiator not in _INSTANTIATORS:
        raise UntrustedError(
            f"the checkpoint wants to be built by {instantiator!r}, which this package never "
            "writes. Do not use it."
        )
    if path is not None:
        found = policy.resolve(path, "the checkpoint")
        policy.check_class(found, (kind,), "the checkpoint")
        if not (isinstance(found, type) and issubclass(found, kind)):
            raise UntrustedError(f"the checkpoint is of {_path(found)}, not of {kind.__name__}.")
        kind = found
    names = inspect.signature(kind).parameters
    arguments = {name: value for name, value in arguments.items() if name in names}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "module", fail_untyped=False)
    parsed = parser.parse_object({"module": arguments | {n: given[n] for n in given if n in names}})
    policy.check({n: v for n, v in vars(parsed.module).items() if n not in given}, kind)


def _items(config: Any) -> list[tuple[str, Any]]:
    if isinstance(config, Mapping):
        return [(str(name), value) for name, value in config.items()]
    return list(vars(config).items()) if isinstance(config, Namespace) else []


def _declared(parent: Any, name: str) -> _Declared:
    """Return the classes that a constructor declares for an argument, none if it says nothing."""
    for kind in parent.__mro__ if isinstance(parent, type) else ():
        init: Callable[..., Any] | None = kind.__dict__.get("__init__")
        if init is None:
            continue
        try:
            hints = typing.get_type_hints(init)
        except Exception:  # names that only a type checker knows
            hints = getattr(init, "__annotations__", {})
        if name in hints:
            return tuple(_classes(hints[name]))
    return ()


def _classes(annotation: Any) -> Iterator[type]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if (
        origin is None
        and isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
    ):
        if annotation.__module__ not in ("builtins", "typing", "collections.abc"):
            yield annotation
    elif origin is not None:
        returned = origin is Callable or getattr(origin, "__name__", "") == "Callable"
        for argument in arguments[-1:] if returned else arguments:
            yield from _classes(argument)


def _fits(found: type, declared: _Declared) -> bool:
    if issubclass(found, _KINDS) or _within(found.__module__, ("lightning_mmd",)):
        return True
    for wanted in declared:
        if getattr(wanted, "_is_protocol", False):
            top = found.__module__.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in _DEPENDENCIES:
                return True
        elif issubclass(found, wanted):
            return True
    return False


def _within(path: str, homes: Iterable[str]) -> bool:
    return any(f"{path}.".startswith(f"{home}.") for home in homes)


def _path(found: Any) -> str:
    module, name = (getattr(found, n, None) for n in ("__module__", "__qualname__"))
    return f"{module}.{name}" if module and name else repr(found)
