"""Run the golden cases and compare, or keep, the digests of all their artefacts.

    python -m tests.golden [--keep] [CASE ...]

`--keep` writes digests.json; do so only in a commit that says which stage's results change, and why.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import ray

from tests.conftest import s3_server
from tests.golden.cases import CASES, differences, digests_of, keep, run_case


def main() -> int:
    """Run, print a line for each case, and return the number of cases that differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=[], metavar="CASE")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    wanted = arguments.cases or list(CASES)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    differing = 0
    with tempfile.TemporaryDirectory() as scratch, s3_server():
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            for name in wanted:
                found = digests_of(run_case(name, Path(scratch)))
                if arguments.keep:
                    keep(name, found)
                wrong = differences(name, found)
                differing += bool(wrong)
                print(f"{name}: {len(found)} artefacts", *wrong, sep="\n  ", flush=True)  # noqa: T201 - a command
        finally:
            ray.shutdown()
    return differing


if __name__ == "__main__":
    sys.exit(main())
