"""`python -m tests.chaos [N] [FIRST]`: N seeds of accidents, from FIRST; prints those that end with other bytes."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.chaos.trial import prepared, try_seed


def main(count: int, first: int) -> int:
    """Number of seeds that ended with other bytes."""
    logging.disable(logging.WARNING)
    bad, kinds, started = 0, Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, prepared(Path(folder)) as works:
        for seed in range(first, first + count):
            try:
                happened, differing = try_seed(works, seed, Path(folder) / f"run-{seed}")
            except Exception as error:  # noqa: BLE001 - counted like any other bad end
                happened, differing = f"{type(error).__name__}: {error}", ["no end"]
            kinds[happened.partition(";")[0]] += 1
            if differing:
                bad += 1
                print(f"seed {seed}: {happened}: {', '.join(differing)}", flush=True)  # noqa: T201
    seconds = time.monotonic() - started
    print(f"{count - bad} of {count} seeds ended with equal bytes, {dict(kinds)}, in {seconds:.0f} s")  # noqa: T201
    return bad


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    sys.exit(min(1, main(*([*numbers, 60, 0][:1] + ([*numbers, 0][1:2] or [0])))))
