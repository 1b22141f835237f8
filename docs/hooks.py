"""What mkdocs does beside copying: the pictures of examples are those of the gallery."""

from pathlib import Path

from mkdocs.structure.files import File

_ROOT = Path(__file__).parents[1]
_FOLDERS = (_ROOT / "examples" / "figures", _ROOT / "benchmarks" / "figures")


def on_files(files, config):
    """Add the pictures of examples and benchmarks as ``pictures/NAME.png``."""
    for folder in _FOLDERS:
        for path in sorted(folder.glob("*.png")):
            files.append(File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)))
    return files
