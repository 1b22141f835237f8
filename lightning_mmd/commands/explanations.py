"""What an error of the command line says: the reason, where it is, and what to do."""

import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

__all__ = ["NAMED", "explain"]

_PARSERS = ("jsonargparse", "argparse", "lightning/pytorch/cli")
NAMED = (
    "callbacks",
    "closed_form",
    "critics",
    "data",
    "deep_kernel",
    "estimators",
    "feature_networks",
    "features",
    "gradient_ascent",
    "kernel_objectives",
    "kernels",
    "matching",
    "networks",
    "noise",
    "objectives",
)
"""Files whose classes a configuration names without their path."""

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_MEMORY = (
    "Lower the memory of a step: model.micro_batches 2 (or more) evaluates a batch in parts and "
    "follows the same gradient; a smaller data.batch_size changes it."
)


def explain(error: BaseException, commands: Sequence[str] = ()) -> str:
    """Return what a user should read of an error.

    A constructor's own words count for more than what a parser makes of them, and are found by
    following the causes; of names that are not known, neighbours are named.

    Args:
        error: What was raised.
        commands: All subcommands.
    """
    text = str(error).strip()
    if misspelt := _of_a_misspelt_word(text, commands):
        return misspelt
    if _is_about_memory(error):
        text = text.splitlines()[0] if text else "no memory is left"
        return f"out of memory: {text.rstrip('.')}. {_MEMORY}"
    if not text:
        return f"{type(error).__name__}. Set LIGHTNING_MMD_TRACEBACK=1 to see where it comes from."
    if unknown_argument := _of_an_unknown_argument(text):
        return unknown_argument
    unknown = re.search(r"Expected a dot import path string: (\w+)", text)
    if unknown is not None:
        return f"there is no class named {unknown[1]!r}. {_neighbours(unknown[1])}"
    key = re.search(r'Parser key "([\w.]+)"', text)
    reason = _of_the_constructor(error)
    text = _of_the_class(text)
    named = re.search(r"class_path '(?:\w+\.)*(\w+)'", text)
    if key is not None and named is not None:
        if reason is None:
            problem = re.search(
                r"Problem with given class_path '[\w.]+':\n\s*(.+)", text, re.DOTALL
            )
            reason = problem[1].strip() if problem else text
        return f"{named[1]}: {reason}. See --{key[1]}.help {named[1]}".replace("..", ".")
    worker = _of_a_worker(text)
    return worker or text


def _of_a_misspelt_word(text: str, commands: Sequence[str]) -> str | None:
    """Name the neighbours of a subcommand or an option that there is none of."""
    command = re.search(r"argument subcommand: invalid choice: '([^']*)'", text)
    if command is not None:
        close = difflib.get_close_matches(command[1], commands, n=2)
        meant = f"Did you mean {' or '.join(close)}? " if close else ""
        return f"there is no command {command[1]!r}. {meant}They are: {', '.join(commands)}."
    option = re.match(r"unrecognized arguments: --([\w.]+)", text, re.IGNORECASE)
    if option is None:
        return None
    close = difflib.get_close_matches(option[1], _options(), n=2, cutoff=0.7)
    meant = " or ".join(f"--{name}" for name in close)
    return f"{text}. " + (f"Did you mean {meant}?" if close else "See lightning-mmd fit --help.")


def _of_an_unknown_argument(text: str) -> str | None:
    """Name the arguments of a class that were likely meant, where it does not have the one given.

    Where an argument may be of several classes, the one that was named comes first.
    """
    found = re.findall(r"class_path '([\w.]+)\.(\w+)':\s*Option '([\w.]+)' is not accepted", text)
    if not found:
        return None
    module, name, option = found[0]
    kind = getattr(sys.modules.get(module), name, None)
    if not isinstance(kind, type):
        return None
    taken = [n for n, p in inspect.signature(kind).parameters.items() if p.kind not in _VARIADIC]
    close = difflib.get_close_matches(option, taken, n=2)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    takes = f"It takes {', '.join(taken)}." if taken else "It takes none."
    return f"{name} has no argument {option!r}. {meant}{takes}"


def _options() -> list[str]:
    """List the options of fit that belong to no class of a user's choice."""
    from lightning.pytorch import Trainer

    from lightning_mmd.module import MMDGAN

    found = ["config", "seed_everything", "ckpt_path", "print_config", "trainer", "model", "data"]
    for group, kind in (("trainer", Trainer), ("model", MMDGAN)):
        found += [f"{group}.{name}" for name in inspect.signature(kind).parameters]
    return found


def _is_about_memory(error: BaseException) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or "out of memory" in str(error)


def _of_the_constructor(error: BaseException) -> str | None:
    """Return the words of the innermost cause that no parser raised, None where there is none."""
    found, cause = None, error.__cause__
    while cause is not None:
        frames = traceback.extract_tb(cause.__traceback__)
        if frames and not any(name in frames[-1].filename for name in _PARSERS):
            found = str(cause).strip()
        cause = cause.__cause__
    return found


def _of_the_class(text: str) -> str:
    """Of what a parser says of an optional argument, take what is not about None."""
    if "Union subtypes" not in text or "Errors:" not in text:
        return text
    errors = re.split(r"\n\s*- ", text.split("Errors:", 1)[1])
    about = [error.strip() for error in errors if error.strip() and "NoneType" not in error]
    return about[0] if about else text


def _of_a_worker(text: str) -> str | None:
    """Of a loader's worker's traceback, take the last line."""
    if "Caught " not in text or "DataLoader worker" not in text:
        return None
    last = text.strip().splitlines()[-1]
    return f"{last.partition(': ')[2] or last} (in a worker of the loader)"


def _neighbours(name: str) -> str:
    modules = [import_module(f"lightning_mmd.{module}") for module in NAMED]
    values = {n: v for m in modules for n, v in vars(m).items() if isinstance(v, type)}
    known = sorted(n for n, v in values.items() if n[0] != "_" and "lightning_mmd" in v.__module__)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return (
        "Check its spelling; a class that is not ours needs its dotted path (mynets.MyGenerator)."
    )
