"""A thin way in: `python jobs/submit.py RUN.yaml --address http://HOST:8265` is `rayclust submit RUN.yaml …`."""

from __future__ import annotations

import sys

from rayclust.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(["submit", *sys.argv[1:]]))
