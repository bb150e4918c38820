"""Time and memory of CPP's compression term and of its training step: the published form against ours.

Claims, in one run on the same machine. The compression term, forward and backward, exact in float32: at n = 1024,
d = 128 at least 10 times as fast with at most a quarter of the peak memory; at n = 1024, d = 1024, where the published
form does not fit in 22 GB, exact in under 6 GB. And the whole step at h = 4096.

    python benchmarks/cpp_step.py [--threads 2] [--rounds 5] [--parts term memory wide step]

Contenders take turns, round after round; times are the least and, in brackets, the median over rounds. Peak memory is
that of a process of its own, less what it held before the first call. Differences are relative to the largest entry of
the published form in float64, at n = 1024 and d = 128; at d = 1024 the value of eight columns of Π is compared.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from published_cpp import PublishedCpp, compression, membership
from temi_step import processor
from torch import Tensor

from rayclust.losses.coding_rate import compression_rate
from rayclust.methods import build
from rayclust.methods.base import Batch
from rayclust.methods.cpp_settings import CppConfig
from rayclust.methods.settings import EMBEDDINGS
from rayclust.training.loop import Stepper

N, D, H, DISTORTION, TEMPERATURE = 1024, 1280, 4096, 0.1, 0.175
FORMS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"published": compression, "ours": compression_rate}


def problem(width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return unit rows around 10 directions and their membership, leaves that require gradients."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % 10
    x = torch.randn(10, width, generator=generator)[labels] + torch.randn(N, width, generator=generator)
    z = torch.nn.functional.normalize(x.double(), dim=1)
    pi = membership(z, TEMPERATURE, 5)
    return z.to(dtype).requires_grad_(), pi.to(dtype).requires_grad_()


def evaluate(form: str, z: Tensor, pi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return value and gradients."""
    value = FORMS[form](z, pi, DISTORTION)
    return value.detach(), *torch.autograd.grad(value, (z, pi))


def peak_bytes(form: str, width: int) -> tuple[float, float]:
    """Measure one evaluation in a fresh process: peak bytes above those held before it, and seconds."""
    command = [sys.executable, __file__, "--alone", form, str(width), "--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return float("nan"), float("nan")
    peak, seconds = done.stdout.split()
    return float(peak), float(seconds)


def alone(form: str, width: int) -> None:
    """Run in the fresh process."""
    z, pi = problem(width)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = held("VmRSS")
    start = time.perf_counter()
    evaluate(form, z, pi)
    seconds = time.perf_counter() - start
    print(held("VmHWM") - before, seconds)


def held(name: str) -> int:
    """Return bytes of this process's memory now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name + ":"))


def turns(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Measure the least and median milliseconds of each, taking turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: (1e3 * min(times), 1e3 * statistics.median(times)) for name, times in seconds.items()}


def table(times: dict[str, tuple[float, float]]) -> None:
    """Print times and ratios to the first."""
    first = next(iter(times.values()))
    for name, (least, median) in times.items():
        ratio = f"{first[0] / least:.1f} ({first[1] / median:.1f})"
        print(f"  {name:24}{f'{least:.0f} ({median:.0f})':>18} ms {ratio:>14} times as fast")


def measure_term(rounds: int) -> None:
    """Measure time and differences at d = 128."""
    z, pi = problem(128)
    times = turns({form: lambda form=form: evaluate(form, z, pi) for form in FORMS}, rounds)
    print(f"\ncompression term, forward and backward, n = {N}, d = 128, float32")
    table(times)
    exact = evaluate("published", *problem(128, torch.float64))
    names = ("value", "gradient by Z", "gradient by Π")
    for form, dtype in (("published", torch.float32), ("ours", torch.float32), ("ours", torch.float64)):
        found = evaluate(form, *problem(128, dtype))
        apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)]
        shown = ", ".join(f"{name} {part:.1e}" for name, part in zip(names, apart, strict=True))
        print(f"  {form}, {str(dtype).removeprefix('torch.')}, against the published form in float64: {shown}")


def measure_memory() -> None:
    """Measure peak memory at d = 128."""
    published, ours = (peak_bytes(form, 128)[0] for form in FORMS)
    print(f"\npeak memory of one evaluation, n = {N}, d = 128")
    print(f"  published {published / 2**20:.0f} MiB, ours {ours / 2**20:.0f} MiB: {ours / published:.0%}")


def measure_wide() -> None:
    """Measure time and peak memory of ours at d = 1024, and its difference."""
    peak, seconds = peak_bytes("ours", 1024)
    print(f"\ncompression term, forward and backward, n = {N}, d = 1024, float32")
    print(f"  ours {seconds:.1f} s, peak memory {peak / 2**30:.2f} GiB")
    z, pi = (x.detach() for x in problem(1024, torch.float64))
    some = slice(0, N, N // 8)
    plain = torch.stack([_column(z, column) for column in pi[:, some].T]).sum()
    found = compression_rate(z.float(), pi[:, some].float(), DISTORTION)
    print(f"  value of 8 columns against the plain form in float64: {abs(float(found / plain) - 1):.1e}")


def _column(z: Tensor, column: Tensor) -> Tensor:
    """Return one column's term of R_c in the plain form."""
    total = column.sum() + 1e-8
    matrix = torch.eye(z.shape[1]) + z.shape[1] / (total * DISTORTION) * (z.T * column) @ z
    return total / (2 * len(z)) * torch.logdet(matrix)


def measure_step(rounds: int) -> None:
    """Measure the whole joint step at D = 1280, h = 4096, d = 128."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    published = PublishedCpp(D, H, 128, torch.device("cpu"))
    contenders: dict[str, Callable[[], object]] = {"published, float32": lambda: published.step(x)}
    batch = Batch({EMBEDDINGS: x[None]}, torch.arange(N), step=1, epoch=0)
    for precision in ("fp32", "bf16"):
        settings = {"clusters": 10, "preset": "none", "precision": precision, "expansion_steps": 0}
        stepper = Stepper(build(CppConfig.model_validate(settings), D, N, seed=0))
        contenders[f"ours, {precision}"] = lambda stepper=stepper: stepper.step(batch)
    print(f"\ntraining step, n = {N}, D = {D}, h = {H}, d = 128")
    table(turns(contenders, rounds))


def main() -> None:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parts = {
        "term": lambda: measure_term(arguments.rounds),
        "memory": measure_memory,
        "wide": measure_wide,
        "step": lambda: measure_step(arguments.rounds),
    }
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.alone:
        return alone(arguments.alone[0], int(arguments.alone[1]))
    command = " ".join(["benchmarks/" + Path(__file__).name, *sys.argv[1:]])
    print(f"python {command}\n{processor()}; {arguments.threads} threads, load {os.getloadavg()[0]:.1f}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    for part in arguments.parts:
        parts[part]()
    return None


if __name__ == "__main__":
    main()
