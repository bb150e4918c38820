"""The quick path on photographs, all defaults, beside the bare loop that a user would write to encode them.

    python benchmarks/quick_path.py [--images 1000] [--report FILE]

Claim: `rayclust quick` on photographs ends, from Enter to the report, in at most 1.25 times the bare encode loop's time
and 25 s. Images are the photographs of ../shared/data, evenly many of each of its ten classes, as JPEG files in a
folder a class; the encoder is MobileNetV2 with the weights that lie there, by the engine that the run chose. Seconds
are the claim's on idle cores; on cores that other programs share the CPU seconds of the command and all that it starts
say more, though they count both of its threads, where the bare loop has one. The search afterwards is by a photograph;
the second run is the same line again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from fixed_costs import PR_SET_CHILD_SUBREAPER, Cost, Measured, described, measure

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
WEIGHTS = DATA / "encoder" / "mobilenetv2_100_a.safetensors"
ENCODER = ("--encoder", "timm/mobilenetv2_100", f"encoder.pretrained={WEIGHTS}", "encoder.options={pad_type: same}")
ENCODER += ("encoder.mean=[0.5, 0.5, 0.5]", "encoder.std=[0.5, 0.5, 0.5]")  # as these weights were trained
TIMES, SECONDS = 1.25, 25.0
"""The claim."""
NEW, FEW = 30, 300
"""Images of `predict`, and of the run whose first progress is looked for."""


def write_photographs(folder: Path, count: int) -> int:
    """Write JPEG files, a folder a class; return how many."""
    import pyarrow.parquet as pq

    table = pq.read_table(DATA / "imagenette_val3k" / "images.parquet", columns=["image"])["image"]
    labels, written = np.load(DATA / "imagenette_val3k" / "labels.npy"), 0
    for label in np.unique(labels).tolist():
        (folder / str(label)).mkdir(parents=True)
        for row in np.flatnonzero(labels == label)[: count // 10].tolist():
            (folder / str(label) / f"{row:05d}.jpg").write_bytes(table[row].as_py())
            written += 1
    return written


def bare_loop(run: Path, images: Path) -> Cost:
    """Decode and encode one file after the other, by the run's own encoder and engine; loading it is not counted."""
    import torch

    from rayclust.runtime.api import load_run
    from rayclust.runtime.encoder import RunEncoders, with_engines
    from rayclust.store.run import Run

    torch.set_num_threads(1)
    files = sorted(images.rglob("*.jpg"))
    encoders = RunEncoders(with_engines(load_run(str(run)), Run(str(run)), len(files), is_begun=True), "cpu")
    started, cpu = time.monotonic(), time.process_time()
    for path in files:
        encoders.encode([pixels[None] for pixels in encoders.decode(path.read_bytes())])
    return Cost(time.monotonic() - started, time.process_time() - cpu)


def lines_of(name: str, measured: Measured) -> list[str]:
    """The whole command, its first line, and its stages."""
    found = [f"{name:<28}{measured.total.seconds:>10.1f}{measured.total.cpu:>10.1f}"]
    found += [f"  first line{measured.first_line:>26.1f}"]
    return found + [f"  {stage:<26}{cost.seconds:>10.1f}{cost.cpu:>10.1f}" for stage, cost in measured.stages.items()]


def main() -> None:
    """Print the table, and write it; exit code 1 where the claim is missed by seconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["RAYCLUST_SCRATCH"] = str(Path(scratch) / "scratch")  # without networks converted before
        images, run = Path(scratch) / "photos", Path(scratch) / "run"
        count = write_photographs(images, arguments.images)
        quick = ("quick", str(images), *ENCODER, "--out", str(run), "--clusters", "10")
        whole, again = measure(*quick), measure(*quick)
        found = measure("search", str(run), "--image", str(next(images.rglob("*.jpg"))))
        write_photographs(Path(scratch) / "new", NEW)
        predicted = measure("predict", str(run), str(Path(scratch) / "new"), "--out", str(Path(scratch) / "new.csv"))
        write_photographs(Path(scratch) / "few", FEW)
        few = measure("quick", str(Path(scratch) / "few"), *quick[2:-4], "--out", f"{run}-few", "--clusters", "10")
        bare, metrics = bare_loop(run, images), json.loads((run / "metrics.json").read_text())
    allowed = {kind: TIMES * getattr(bare, kind) + SECONDS for kind in ("seconds", "cpu")}
    verdicts = {kind: getattr(whole.total, kind) <= most for kind, most in allowed.items()}
    lines = [
        described(),
        f"python benchmarks/quick_path.py --images {count}",
        f"{count:,} photographs of 224 pixels, MobileNetV2, K = 10, all defaults; ACC {metrics['accuracy']:.3f}",
        "",
        f"{'':<28}{'seconds':>10}{'CPU s':>10}",
        *lines_of("quick", whole),
        *lines_of("the same line again", again)[:2],
        *lines_of("search, one image", found)[:2],
        *lines_of(f"predict, {NEW} images", predicted)[:1],
        *lines_of(f"quick, {FEW} photographs", few)[:2],
        f"  first images/s{few.first_rate:>22.1f}",
        f"{'bare loop, one thread':<28}{bare.seconds:>10.1f}{bare.cpu:>10.1f}",
        f"{f'{TIMES} x bare loop + {SECONDS:g} s':<28}{allowed['seconds']:>10.1f}{allowed['cpu']:>10.1f}",
        "",
        *(f"by {kind}: {'met' if is_met else 'MISSED'}" for kind, is_met in verdicts.items()),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.report:
        arguments.report.write_text(text)
    sys.exit(not verdicts["seconds"])


if __name__ == "__main__":
    main()
