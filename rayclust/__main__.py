"""`python -m rayclust` and `rayclust` are the command line."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line and exit; say what to install where the base installation lacks it."""
    # Threads of a product that wait for each other in a loop take the cores from all else: a small training beside
    # other programs then takes many times as long. Read once, when the first library with threads is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from rayclust.cli import run_command
    except ModuleNotFoundError as error:
        sys.exit(f"rayclust: commands need {error.name}: pip install 'rayclust[ray]'")
    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
