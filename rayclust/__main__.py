"""`python -m rayclust` and `rayclust` are the command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line and exit; say what to install where the base installation lacks it."""
    try:
        from rayclust.cli import main as run
    except ModuleNotFoundError as error:
        sys.exit(f"rayclust: commands need {error.name}: pip install 'rayclust[ray]'")
    run()


if __name__ == "__main__":
    main()
