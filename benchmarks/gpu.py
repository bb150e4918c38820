"""All measurements of the layers below Ray on one GPU, in less than six minutes.

    python benchmarks/gpu.py [--parts kernels temi_step ...] [--out FILE] [--budget 345] [--small]

Parts run one after the other, the most useful first, each in a process of its own with a time limit; while one runs,
the next already imports. A part prints its table as soon as it has it. One that fails prints the last lines of its
error, one that is stopped says so, and the next goes on. `--small` takes tiny sizes and runs on a CPU too, where
Triton's kernels are interpreted: it shows that every part works.

Claims. The Triton kernels agree with their plain form. A TEMI step is at least 10 times as fast as the published form;
with 16 heads of 25,000 clusters an epoch of 1.28 M rows takes less than 15 s in less than 24 GB.

Times are the least and, in brackets, the median of several runs after one to warm up, with the device waited for.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

VERSIONS = ("torch", "triton", "numpy", "scikit-learn", "open_clip_torch", "torchvision", "pillow", "pydantic")
GIGABYTE = 1e9


# What parts share


def cuda() -> bool:
    """Whether a GPU is measured."""
    import torch

    return torch.cuda.is_available()


def device() -> Any:
    """Where to compute."""
    import torch

    return torch.device("cuda" if cuda() else "cpu")


def wait() -> None:
    """Wait for the device."""
    import torch

    if cuda():
        torch.cuda.synchronize()


def seconds_of(run: Callable[[], object], rounds: int, warm_up: int = 1, repeats: int = 1) -> tuple[float, float]:
    """Least and median seconds of one run; `repeats` runs are timed together."""
    for _ in range(warm_up):
        run()
    found = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        wait()
        found.append((time.perf_counter() - start) / repeats)
    return min(found), statistics.median(found)


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Append the gigabytes that torch allocated on the GPU at the most, and what it held before; NaN on a CPU."""
    import torch

    found: list[float] = []
    held = 0.0
    if cuda():
        wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / GIGABYTE
    try:
        yield found
    finally:
        found += [torch.cuda.max_memory_allocated() / GIGABYTE if cuda() else math.nan, held]


def milliseconds(times: tuple[float, float]) -> str:
    """Least (median), in a column."""
    return f"{f'{1e3 * times[0]:.3f} ({1e3 * times[1]:.3f})':>24}"


def matmul_rates(small: bool) -> dict[str, float]:
    """FLOP/s of one large product: bf16, tf32 and float32, printed too."""
    import torch

    size, rates = 256 if small else 8192, {}
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False), ("tf32", torch.float32, True), ("fp32", torch.float32, False)
    ):  # fmt: skip
        a, b = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        rates[name] = 2 * size**3 / seconds_of(lambda a=a, b=b: a @ b, 5, warm_up=3)[0]
    torch.backends.cuda.matmul.allow_tf32 = False
    shown = ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in rates.items())
    print(f"  one {size} x {size} x {size} product, TFLOP/s: {shown}")
    return rates


def shares(operations: float, seconds: float, rates: dict[str, float]) -> str:
    """TFLOP/s, and its shares of the rates of large products."""
    rate = operations / seconds
    shown = ", ".join(f"{rate / other:.1%} of {name}" for name, other in rates.items())
    return f"{rate / 1e12:.2f} TFLOP/s ({shown})"


def planted(count: int, width: int, groups: int, spread: float, seed: int = 0) -> tuple[Any, Any]:
    """Unit rows Float32[N D] around planted directions, made on the device, and their groups Int64[N]."""
    import torch

    generator = torch.Generator(device()).manual_seed(seed)
    labels = torch.randint(groups, (count,), generator=generator, device=device())
    centers = spread * torch.randn(groups, width, generator=generator, device=device())
    x = torch.randn(count, width, generator=generator, device=device()).add_(centers[labels])
    return torch.nn.functional.normalize(x, dim=1), labels


# Parts


def kernels(small: bool) -> None:
    """Worst differences of Triton's kernels from their plain form, and the kernels' rates."""
    import torch

    from tests.kernels.test_pair_softmax import SIZES, differences_from_the_plain_form

    sizes = SIZES[:2] if small else (*SIZES, (16, 512, 10), (4, 256, 1000), (2, 128, 25000))
    print("  softmax of pairs: worst difference of each result from the plain form, relative to its largest entry")
    for dtype in (torch.float32, torch.bfloat16):
        for spread in (3.0, 300.0):
            with device():
                found = [differences_from_the_plain_form(dtype, some, spread) for some in sizes]
            worst = "".join(f"{max(part):12.1e}" for part in zip(*found, strict=True))
            print(f"  {str(dtype).removeprefix('torch.') + f', x {spread:.0f}':18}{worst}")
    _weight_norm(small)
    _kernel_rates(small)


def _weight_norm(small: bool) -> None:
    """Worst differences of the weight normalisation, forward and backward."""
    import torch

    from rayclust.kernels import weight_norm

    print("  weight normalisation: worst difference, relative to the largest entry: rows, direction, scale")
    sizes = ((2, 5, 7, 64), (3, 64, 20, 64)) if small else ((2, 5, 7, 64), (3, 64, 20, 64), (4, 25000, 256, 25024))
    has_kernels = weight_norm._has_kernels
    for dtype in (torch.float32, torch.bfloat16):
        worst = [0.0, 0.0, 0.0]
        for heads, clusters, width, columns in sizes:
            with device():
                direction, scale = torch.randn(heads, clusters, width), torch.randn(heads, clusters)
                slopes = torch.randn(heads, columns, width).to(dtype)
                outs = torch.full((2, heads, columns, width), 9.0, dtype=dtype)
            forms = []
            for out, choose in zip(outs, (has_kernels, lambda x: False), strict=True):
                weight_norm._has_kernels = choose
                rows = weight_norm.scaled_rows(direction, scale, 10.0, out)
                forms.append((rows, *weight_norm.scaled_rows_backward(slopes, direction, scale, 10.0)))
            for i, (a, b) in enumerate(zip(*forms, strict=True)):
                apart = float((a.double() - b.double()).abs().max() / b.double().abs().max())
                worst[i] = max(worst[i], apart)
        print(f"  {str(dtype).removeprefix('torch.'):18}" + "".join(f"{part:12.1e}" for part in worst))
    weight_norm._has_kernels = has_kernels


def _kernel_rates(small: bool) -> None:
    """Time and memory traffic of the softmax passes in bf16, beside a copy."""
    import torch

    from rayclust.kernels import pair_softmax as passes

    heads, pairs, clusters = (1, 4, 100) if small else (4, 1024, 25000)
    columns = passes.padded_columns(clusters, device().type)
    with device():
        student, teacher = torch.randn(2, heads, 2, pairs, columns).bfloat16()
        log_marginal, weights = torch.randn(heads, clusters).log_softmax(1), torch.rand(heads, pairs)
    stats = passes.teacher_forward(teacher, clusters)
    inputs = passes.PairLossInputs(stats.normalizer, log_marginal, weights, 0.6, 0.5 / pairs)
    rows: list[tuple[str, Callable[[], object], int]] = [
        ("copy", lambda: student.clone(), 2),
        ("teacher forward", lambda: passes.teacher_forward(teacher, clusters), 2),
        ("student forward", lambda: passes.student_forward_backward(student, teacher, inputs, False), 2),
        ("and backward", lambda: passes.student_forward_backward(student, teacher, inputs, True), 5),
    ]
    size = student.numel() * student.element_size()
    print(f"  bf16 passes at H = {heads}, {pairs} pairs, K = {clusters}: {size / 1e6:.0f} MB of logits")
    for name, run, times_read in rows:
        times = seconds_of(run, 1 if small else 7)
        print(f"  {name:18}{milliseconds(times)} ms {times_read * size / times[0] / 1e9:10.0f} GB/s")


def temi_step(small: bool) -> None:
    """TEMI's step: published form, ours, and the products alone; see temi_step.py."""
    import temi_step as script

    shapes = ["--shape", "2,10"] if small else ["--shape", "16,10", "--shape", "50,1000"]
    _as_command(script.main, "temi_step.py", "--rounds", "1" if small else "7", *shapes)


def temi_overcluster(small: bool) -> None:
    """Very many clusters; see temi_overcluster.py."""
    import temi_overcluster as script

    shape, steps = ("2,200,32,64", "2") if small else ("16,25000,768,1024", "5")
    _as_command(script.main, "temi_overcluster.py", "--shape", shape, "--steps", steps)


def _as_command(main: Callable[[], None], script: str, *arguments: str) -> None:
    threads = str(min(os.cpu_count() or 1, 16))
    sys.argv = [f"benchmarks/{script}", *arguments, "--device", device().type, "--threads", threads]
    main()


def temi_profile(small: bool) -> None:
    """Where the time of our TEMI step goes."""
    import temi_step as script
    from temi_overcluster import Shape, stepper

    shape = Shape(2, 200, 32, 64) if small else Shape(16, 25000, 768, 1024)
    run = stepper("kernels bf16", shape, device().type)
    _profile(f"kernels bf16, H = {shape.heads}, K = {shape.clusters}, D = {shape.dimension}, {shape.pairs} pairs", run)
    del run
    x, neighbors = script.planted()
    for some in ((2, 10),) if small else ((16, 10), (50, 1000)):
        ours = script.Ours(x, neighbors, some, "bf16", device().type)
        _profile(f"bf16, H = {some[0]}, K = {some[1]}, D = {script.D}, {script.B} pairs", ours.step)


def _profile(title: str, step: Callable[[], object], steps: int = 5, most: int = 12) -> None:
    """The operations that take most of the device's time."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    wall, _ = seconds_of(step, 5, warm_up=4)
    activity = ProfilerActivity.CUDA if cuda() else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        for _ in range(steps):
            step()
        wait()
    rows = []
    for event in found.key_averages():
        micro = event.self_device_time_total if cuda() else event.self_cpu_time_total
        if cuda() and event.device_type == DeviceType.CPU:
            continue
        if micro > 0 and not getattr(event, "is_user_annotation", False):
            rows.append((micro / 1e3 / steps, event.count / steps, event.key))
    total = sum(row[0] for row in rows) or math.nan
    print(
        f"  {title}: {1e3 * wall:.3f} ms a step, {total:.3f} ms in {sum(row[1] for row in rows):.0f} operations a step"
    )
    print(f"  {'ms a step':>12}{'share':>8}{'calls':>8}  operation")
    for spent, calls, name in sorted(rows, reverse=True)[:most]:
        print(f"  {spent:12.3f}{spent / total:8.1%}{calls:8.1f}  {name[:90]}")


def cpp(small: bool) -> None:
    """CPP's compression term and its training step beside the published form."""
    import cpp_step as script
    import torch

    rounds = 1 if small else 7
    if small:
        script.N, script.H = 64, 64
    narrow, wide = (8, 16) if small else (128, 1024)
    results = _cpp_term(narrow, rounds)
    z, pi = (t.detach().to(device()).requires_grad_() for t in script.problem(narrow, torch.float64))
    exact = script.evaluate("published", z, pi)
    for form, found in results.items():
        _apart(f"float32 {form} against published in float64", found, exact)
    _cpp_step(rounds)
    z, pi = (t.detach().to(device()) for t in script.problem(wide, torch.float64))
    columns = pi[:, :: script.N // 8]
    plain = script.compression(z, columns, script.DISTORTION)
    value = script.compression_rate(z.float(), columns.float(), script.DISTORTION)
    apart = abs(float(value / plain) - 1)
    print(f"  d = {wide}: value of 8 columns against the published form in float64: {apart:.1e}")
    del z, pi, columns, plain, value, exact, results
    _cpp_term(wide, rounds)


def _cpp_term(width: int, rounds: int) -> dict[str, tuple[Any, ...]]:
    """Print time, memory and difference; gives value and gradients by form."""
    import cpp_step as script

    print(f"  compression term, forward and backward, n = {script.N}, d = {width}, float32", flush=True)
    results = {}
    for form in ("ours", "published"):
        z, pi = (t.detach().to(device()).requires_grad_() for t in script.problem(width))
        with peak_memory() as memory:
            start = time.perf_counter()
            results[form] = script.evaluate(form, z, pi)
            wait()
            first = time.perf_counter() - start
        run = lambda form=form, z=z, pi=pi: script.evaluate(form, z, pi)  # noqa: E731
        times = seconds_of(run, rounds, warm_up=0) if first < 3.0 else (first, first)
        held = f"peak {memory[0]:.3f} GB, {memory[1]:.3f} held before"
        print(f"  {form:18}{milliseconds(times)} ms, the first time {1e3 * first:.0f} ms, {held}", flush=True)
    _apart("float32: ours against published", results["ours"], results["published"])
    return results


def _apart(title: str, found: tuple[Any, ...], exact: tuple[Any, ...]) -> None:
    names = ("value", "gradient by Z", "gradient by Pi")
    apart = [
        float((a.double() - b.double()).abs().max() / b.double().abs().max()) for a, b in zip(found, exact, strict=True)
    ]
    print(f"  {title}: " + ", ".join(f"{name} {part:.1e}" for name, part in zip(names, apart, strict=True)))


def _cpp_step(rounds: int) -> None:
    import cpp_step as script
    import torch
    from published_cpp import PublishedCpp

    from rayclust.methods import build
    from rayclust.methods.base import Batch
    from rayclust.methods.cpp_settings import CppConfig
    from rayclust.methods.settings import EMBEDDINGS
    from rayclust.training.loop import Stepper

    where = device()
    x = torch.randn(script.N, script.D, generator=torch.Generator().manual_seed(0)).to(where)
    print(f"  training step, n = {script.N}, D = {script.D}, h = {script.H}, d = 128")
    for form in ("published, float32", "ours, fp32", "ours, bf16"):
        with peak_memory() as memory:
            if form.startswith("ours"):
                settings = {"clusters": 10, "preset": "none", "precision": form[-4:], "expansion_steps": 0}
                settings |= {"hidden": script.H}
                method = build(CppConfig.model_validate(settings), script.D, script.N, seed=0).to(where)
                stepper, batch = Stepper(method), Batch({EMBEDDINGS: x[None]}, torch.arange(script.N), 1, 0)
                times = seconds_of(lambda step=stepper.step, batch=batch: step(batch), rounds, warm_up=2)
            else:
                published = PublishedCpp(script.D, script.H, 128, where)
                times = seconds_of(lambda step=published.step: step(x), rounds, warm_up=2)
        print(f"  {form:18}{milliseconds(times)} ms, peak {memory[0]:.3f} GB", flush=True)


def kmeans(small: bool) -> None:
    """Lloyd's passes and the seeding."""
    import torch

    from rayclust.clustering import kmeans as library
    from rayclust.clustering.row_stats import compute
    from rayclust.clustering.seeding import kmeans_plusplus
    from rayclust.settings import KMeansOptions

    rates = matmul_rates(small)
    shapes = ((2000, 16, 10),) if small else ((500_000, 256, 1000), (200_000, 768, 10_000))
    for count, width, clusters in shapes:
        x, _ = planted(count, width, clusters, 1.0)
        options = KMeansOptions(clusters=clusters, restarts=1, max_iterations=8, tolerance=0)
        start = time.perf_counter()
        population = compute(lambda x=x: [x], options.metric)
        wait()
        print(f"  N = {count:,}, D = {width}, K = {clusters:,}, cosine; statistics {time.perf_counter() - start:.3f} s")
        init = x[torch.randperm(count, device=x.device, generator=torch.Generator(x.device).manual_seed(1))[:clusters]]
        state = library.start(population, options, 0, init)
        found: list[float] = []
        with peak_memory() as memory:
            passes = library.advance(population, options, state)
            for _ in range(options.max_iterations):
                wait()
                start = time.perf_counter()
                if next(passes, None) is None:
                    break
                wait()
                found.append(time.perf_counter() - start)
        later = found[1:] or found
        operations = 2.0 * count * width * clusters
        print(f"  passes, ms: {', '.join(f'{1e3 * one:.1f}' for one in found)}")
        times = (min(later), statistics.median(later))
        print(f"  a later pass {milliseconds(times)} ms: {shares(operations, times[0], rates)}")
        print(f"  peak {memory[0]:.3f} GB, {memory[1]:.3f} held before")
        times = seconds_of(lambda x=x, init=init: library.assign(x, init), 3)
        print(f"  assign       {milliseconds(times)} ms: {shares(operations, times[0], rates)}", flush=True)
        sample = x[: max(65_536, 32 * clusters)]
        start = time.perf_counter()
        kmeans_plusplus(sample, clusters, [(0, 0)])
        wait()
        print(f"  k-means++ of {len(sample):,} rows, 1 restart: {time.perf_counter() - start:.2f} s", flush=True)


def knn(small: bool) -> None:
    """Exact nearest neighbours."""
    import torch

    from rayclust.search.knn import top_k

    rates, k = matmul_rates(small), 5 if small else 50
    for count, width, rounds in ((600, 16, 1),) if small else ((100_000, 512, 2), (300_000, 768, 1)):
        x, _ = planted(count, width, max(2, count // 200), 0.5)
        ids = torch.arange(count, device=x.device)
        top_k(x[:2048], x, k, query_ids=ids[:2048], database_ids=ids)
        with peak_memory() as memory:
            times = seconds_of(lambda x=x, ids=ids: top_k(x, x, k, query_ids=ids, database_ids=ids), rounds, warm_up=0)
        operations = 2.0 * count * count * width
        print(f"  N = {count:,}, D = {width}, k = {k}: {times[0]:.3f} ({times[1]:.3f}) s")
        print(f"  {shares(operations, times[0], rates)}")
        print(f"  peak {memory[0]:.3f} GB, {memory[1]:.3f} held before", flush=True)
        queries = x[:1024]
        block = x[:262_144]
        scores = queries @ block.T
        product = seconds_of(lambda q=queries, b=block: q @ b.T, 3)
        chosen = seconds_of(lambda s=scores: s.topk(k + 1, dim=1), 3)
        print(f"  of a block of {len(queries)} x {len(block):,}: product {milliseconds(product)} ms", end="")
        print(f", topk {milliseconds(chosen)} ms")
        some = torch.randperm(count, device=x.device)[: min(256, count)]
        found, similarity = top_k(x[some], x, k, query_ids=some, database_ids=ids)
        exact = x[some].double() @ x.double().T
        exact[torch.arange(len(some), device=x.device), some] = -torch.inf
        values, wanted = exact.topk(k, dim=1)
        same = (found[:, :, None] == wanted[:, None]).any(2).double().mean()
        apart = (similarity.double() - values).abs().max()
        print(f"  {len(some)} rows against float64: {float(same):.4%} of the neighbours are the same", end="")
        print(f", similarity to {float(apart):.1e}", flush=True)


def train(small: bool) -> None:
    """TEMI and CPP as an estimator fits them, on planted rows."""
    from rayclust import estimators
    from rayclust.metrics.external import accuracy

    count, width, clusters = (400, 32, 4) if small else (20_000, 768, 20)
    x, labels = (t.cpu().numpy() for t in planted(count, width, clusters, 1.0 if small else 0.2))
    print(f"  N = {count:,}, D = {width}, K = {clusters}, preset auto")
    spent = _timed_training(estimators)
    for estimator in (estimators.TEMI, estimators.CPP):
        for turn in ("first", "again"):
            with peak_memory() as memory:
                start = time.perf_counter()
                model = estimator(clusters, random_state=0, device=device().type).fit(x)
                wait()
                whole = time.perf_counter() - start
            score = accuracy(labels, model.labels_)
            print(
                f"  {estimator.__name__:5} {turn}: {whole:.2f} s, of which training and what follows it on the device "
                f"{spent[-1]:.2f} s; {model.n_steps_} steps; peak {memory[0]:.3f} GB; accuracy {score:.4f}",
                flush=True,
            )


def _timed_training(module: types.ModuleType) -> list[float]:
    """Let the module's `fit_arrays` say how many seconds it took."""
    spent, fit_arrays = list[float](), module.fit_arrays

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        found = fit_arrays(*arguments)
        wait()
        spent.append(time.perf_counter() - start)
        return found

    module.fit_arrays = timed
    return spent


def pixels(small: bool) -> None:
    """ProPos from pixels with ResNet-18, as published for CIFAR-10: steps and E-steps; see pixels_step.py."""
    import pixels_step as script

    shape = ("small", 256, 64, 1) if small else ("resnet18", 50_000, 512, 4)
    script.propos_epochs(*shape, device().type)


def encode(small: bool) -> None:
    """Decoding on the CPU, then CLIP's image towers on the device."""
    per_core = _decoding(small)
    import torch

    try:
        import ftfy  # noqa: F401
    except ImportError:  # open_clip's tokenizer wants it; no text is read here
        sys.modules["ftfy"] = types.ModuleType("ftfy")
    import open_clip

    from rayclust.encoders.clip import ClipEncoder
    from rayclust.encoders.decode import Preprocess
    from rayclust.encoders.settings import EncoderConfig

    rates = matmul_rates(small)
    batch, rounds = (2, 1) if small else (256, 5)
    colours = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    for name in ("ViT-S-32-alt",) if small else ("ViT-B-32", "ViT-L-14"):
        with device():
            network = open_clip.create_model(name, load_weights=False, pretrained_text=False, device=device())
        config = EncoderConfig(name=f"open_clip/{name}", batch_size=batch, threads=1)
        encoder = ClipEncoder(network, config, Preprocess(network.visual.image_size), device=device().type, **colours)
        images = torch.randint(256, (batch, *encoder.preprocess.shape), dtype=torch.uint8).numpy()
        operations = _operations(encoder, images[:1])
        print(f"  {name}, batch {batch}, {operations / 1e9:.1f} GFLOP an image")
        with peak_memory() as memory:
            ours = seconds_of(lambda e=encoder, i=images: e.encode_images(i), rounds, warm_up=2)
        _images(f"our encoder, from uint8 on the CPU, peak {memory[0]:.2f} GB", batch, ours, operations, rates)
        x = torch.randn(batch, 3, *encoder.preprocess.shape[:2], device=device())
        with torch.inference_mode():
            for title, layout in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
                pixels = x.contiguous(memory_format=layout)
                network.visual.to(memory_format=layout)
                with torch.autocast(device().type, torch.bfloat16):
                    bare = seconds_of(lambda n=network, p=pixels: n.encode_image(p), rounds, warm_up=2)
                _images(f"tower alone, autocast bf16, {title}", batch, bare, operations, rates)
            plain, pixels = network.visual.bfloat16(), x.bfloat16()
            for title, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
                some = pixels.contiguous(memory_format=layout)
                plain.to(memory_format=layout)
                bare = seconds_of(lambda n=plain, p=some: n(p), rounds, warm_up=2)
                _images(f"tower alone, bf16 weights, {title}", batch, bare, operations, rates)
        need = batch / ours[0] / per_core
        print(f"  cores that decode for one GPU: {need:.1f}", flush=True)


def _images(title: str, batch: int, times: tuple[float, float], operations: float, rates: dict[str, float]) -> None:
    rate = shares(batch * operations, times[0], rates)
    print(f"  {title:44} {batch / times[0]:9.0f} ({batch / times[1]:.0f}) images/s, {rate}", flush=True)


def _operations(encoder: Any, image: Any) -> float:
    """Of the image tower for one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.zeros(1, 3, *image.shape[1:3], device=device())
    torch.backends.mha.set_fastpath_enabled(False)  # it is one operation that nobody counts
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        encoder.network.encode_image(x)
    torch.backends.mha.set_fastpath_enabled(True)
    return float(counter.get_total_flops())


def _decoding(small: bool) -> float:
    """Images per second that one core decodes, all cores busy; before anything has touched the GPU."""
    from multiprocessing import get_context

    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    height, width = (60, 80) if small else (375, 500)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1.0
    channels = [np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / frequency).real for _ in range(3)]
    pixels = np.stack([128 + 50 * c / c.std() for c in channels], axis=2).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    data, seconds = buffer.getvalue(), 0.2 if small else 1.5
    alone = _decode_for(data, seconds)
    cores = len(os.sched_getaffinity(0))
    with get_context("fork").Pool(cores) as pool:
        together = sum(pool.starmap_async(_decode_for, [(data, seconds)] * cores).get(timeout=30)) / cores
    print(
        f"  JPEG {width} x {height}, {len(data) / 1e3:.0f} kB, to 224: {alone:.0f} images/s on one core alone, "
        f"{together:.0f} on each of {cores} at once",
        flush=True,
    )
    return together


def _decode_for(data: bytes, seconds: float) -> float:
    from rayclust.encoders.decode import Preprocess, decode

    preprocess = Preprocess(224)
    decode(data, preprocess)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        decode(data, preprocess)
        count += 1
    return count / (time.perf_counter() - start)


@dataclass(frozen=True)
class Part:
    """One table."""

    run: Callable[[bool], None]
    limit: float
    """Seconds after which it is stopped."""


PARTS = {
    "kernels": Part(kernels, 75),
    "temi_step": Part(temi_step, 75),
    "temi_overcluster": Part(temi_overcluster, 120),
    "temi_profile": Part(temi_profile, 60),
    "cpp": Part(cpp, 60),
    "kmeans": Part(kmeans, 60),
    "knn": Part(knn, 45),
    "train": Part(train, 75),
    "encode": Part(encode, 60),
    "pixels": Part(pixels, 75),
}


# The parent, which imports no torch and touches no GPU


class Process:
    """A part's process: it imports at once, and begins when told.

    Args:
        name: of the part.
        small: tiny sizes.
    """

    def __init__(self, name: str, small: bool) -> None:
        self.name, self.errors = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [sys.executable, __file__, "--one", name, *(["--small"] if small else [])]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
        paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)  # for processes that a part starts, too
        if small and not Path("/dev/nvidiactl").exists():
            environment["TRITON_INTERPRET"] = "1"
        self.process = subprocess.Popen(
            command, env=environment, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, process_group=0,
        )  # fmt: skip

    def stop(self) -> None:
        """Kill it and its children."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def begin(self, limit: float, say: Callable[[str], None]) -> None:
        """Run the part, hands on its lines, and says how it ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        start, late = time.monotonic(), threading.Event()
        timer = threading.Timer(limit, lambda: (late.set(), self.stop()))
        timer.start()
        try:
            try:
                self.process.stdin.write("begin\n")
                self.process.stdin.close()
            except OSError:
                pass  # it died while importing: its error follows
            for line in self.process.stdout:
                say(line.rstrip("\n"))
            code = self.process.wait()
        finally:
            timer.cancel()
            self.stop()
        if late.is_set():
            say(f"  STOPPED after its limit of {limit:.0f} s")
        elif code:
            say(f"  FAILED with exit status {code}:")
        self.errors.seek(0)
        lines = self.errors.read().splitlines()
        for line in lines[-12:] if code else [line for line in lines if "Error: " in line][-4:]:
            say(f"  | {line[:300]}")
        say(f"  [{self.name}: {time.monotonic() - start:.1f} s]")


def hardware(packages: Sequence[str] = VERSIONS) -> list[str]:
    """GPU, CPU and versions."""
    try:
        query = "--query-gpu=name,memory.total,driver_version,clocks.max.sm,power.limit"
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=False
        )
        gpu = done.stdout.strip() or "no GPU"
    except (OSError, subprocess.TimeoutExpired):
        gpu = "no GPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = []
    for name in packages:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} absent")
    return [
        gpu,
        f"{cpu}, {len(os.sched_getaffinity(0))} cores",
        f"Python {platform.python_version()}, {', '.join(versions)}",
    ]


def report(script: str, out: str | None, packages: Sequence[str] = VERSIONS) -> Callable[[str], None]:
    """Print the command and what it runs on; gives what prints further lines, to the file `out` too."""
    file = Path(out).open("w") if out else None  # noqa: SIM115

    def say(line: str) -> None:
        for place in filter(None, (sys.stdout, file)):
            print(line, file=place, flush=True)

    for line in (f"python {shlex.join([f'benchmarks/{script}', *sys.argv[1:]])}", *hardware(packages)):
        say(line)
    return say


def run_all(names: list[str], small: bool, budget: float, say: Callable[[str], None]) -> None:
    """Parts in order, within seconds in all."""
    began = time.monotonic()
    running: list[Process] = []

    def end(*_: object) -> None:
        for process in running:
            process.stop()
        raise SystemExit(1)

    signal.signal(signal.SIGTERM, end)
    try:
        running.append(Process(names[0], small))
        for i, name in enumerate(names):
            process = running[-1]
            if i + 1 < len(names):
                running.append(Process(names[i + 1], small))
            left = budget - (time.monotonic() - began)
            say(f"\n== {name}: {PARTS[name].run.__doc__}")
            if left < 5:
                say("  left out: the time is over")
                process.stop()
                continue
            process.begin(min(PARTS[name].limit, left), say)
    finally:
        for process in running:
            process.stop()
    say(f"\nall: {time.monotonic() - began:.1f} s")


def one(name: str, small: bool) -> None:
    """What a part's process does."""
    import torch  # noqa: F401 - while the part before runs

    import rayclust.methods  # noqa: F401

    sys.stdin.readline()
    PARTS[name].run(small)


def main() -> None:
    """Run all parts, or those that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", help="a file that gets the same lines")
    parser.add_argument("--budget", type=float, default=345.0, help="seconds for all parts")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--one", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        return one(arguments.one, arguments.small)
    say = report("gpu.py", arguments.out)
    run_all(arguments.parts, arguments.small, arguments.budget, say)
    return None


if __name__ == "__main__":
    main()
