"""Versions of what this package stands on, looked up without importing Lightning.

A torchvision that was built for another torch breaks the import of torchmetrics, and with it that
of Lightning: what explains it has to come before.
"""

import platform
from importlib import import_module, metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

__all__ = ["find_versions"]

_PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "wandb")
_REINSTALL = "Reinstall the two together: pip install --upgrade torch torchvision"


def find_versions() -> tuple[dict[str, str], list[str]]:
    """Look up the versions of what this package stands on, and what is wrong with them.

    Ranges are those of the installed package's own metadata; torchvision's say for which torch it
    was built, and it is imported, because a mismatch shows there.

    Returns:
        Version by name, ``"missing"`` for what is not installed, and a list of problems.
    """
    versions = {"python": platform.python_version()}
    versions |= {name: _version(name) for name in _PACKAGES}
    problems = []
    try:
        wanted = [Requirement(text) for text in metadata.requires("lightning-mmd") or []]
        python = SpecifierSet(metadata.metadata("lightning-mmd")["Requires-Python"] or "")
    except metadata.PackageNotFoundError:
        problems.append("lightning-mmd itself is not installed. In a clone of it: pip install -e .")
        wanted, python = [], SpecifierSet()
    if not python.contains(versions["python"], prereleases=True):
        problems.append(f"python is {versions['python']}, but {python} is needed.")
    for requirement in wanted:
        name, version = requirement.name, versions.get(requirement.name)
        if version is None or (requirement.marker and not requirement.marker.evaluate()):
            continue
        if version == "missing":
            problems.append(f"{name} is missing. pip install '{requirement}'")
        elif not requirement.specifier.contains(version, prereleases=True):
            problems.append(
                f"{name} is {version}, but {requirement.specifier} is needed. "
                f"pip install --upgrade '{requirement}'"
            )
    if versions["torchvision"] != "missing":
        problems += _torchvision_problems(versions)
    return versions, problems


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _torchvision_problems(versions: dict[str, str]) -> list[str]:
    needs = [Requirement(text) for text in metadata.requires("torchvision") or []]
    for torch_needed in (need.specifier for need in needs if need.name == "torch"):
        if not torch_needed.contains(versions["torch"], prereleases=True):
            return [
                f"torchvision {versions['torchvision']} was built for torch {torch_needed}, but "
                f"torch is {versions['torch']}: its compiled operators do not fit, and importing "
                f"it fails or crashes. {_REINSTALL}"
            ]
    try:
        import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        return [
            f"torchvision cannot be imported: {error}. Each of its releases is built for one torch "
            f"release, and this is torch {versions['torch']}. {_REINSTALL}"
        ]
    return []
