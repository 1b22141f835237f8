"""Entry of the command line: says what is wrong with an installation that cannot be imported."""

import sys

from lightning_mmd.commands.versions import find_versions


def main() -> None:
    """Run the command line of the process's arguments; exit with status 1 if it cannot start."""
    try:
        from lightning_mmd.cli import main as run
    except (ImportError, RuntimeError, OSError, AttributeError):
        _, problems = find_versions()
        if not problems:
            raise
        for problem in problems:
            print(f"lightning-mmd: {problem}", file=sys.stderr)
        sys.exit(1)
    run()


if __name__ == "__main__":
    main()
