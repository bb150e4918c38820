"""Encoding on CPUs: engines beside torch, decoders, and the stage beside a bare loop of the same engine.

    python benchmarks/encode_cpu.py [--images 400] [--rounds 3] [--networks mobilenetv2 vit_b_32] [--report FILE]

Images are the photographs of ../shared/data where they are at hand, else drawn; networks have random weights, which
take as long as others. Contenders take turns. Rates are images a CPU second of this process, which other programs
beside it change less than seconds; the stage's are also told by the second. They are the slope between a small and a
large input, so that what it takes to start is left out.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rayclust.config import validate
from rayclust.encoders.base import Encoder
from rayclust.encoders.decode import Preprocess, decode
from rayclust.encoders.network import TorchEncoder
from rayclust.encoders.openvino import GraphEncoder
from rayclust.encoders.settings import EncoderConfig
from rayclust.runtime.pipeline import run_stage

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenette_val3k" / "images.parquet"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENGINES = {"torch eager": {}, "torch": {}, "openvino": {}}
ENGINES |= {f"{name}, bf16": {"precision": "bf16"} for name in ("torch", "openvino")}
SMALL = 40
FLOORS = {"mobilenetv2": 2.5, "vit_b_32": 1.5}
"""Times the rate of torch with the network as its library builds it, that OpenVINO reaches at least, in float32."""
STAGE_FLOOR = 0.95
"""Share of the bare loop's rate that the stage reaches with one worker."""


def photographs(count: int) -> list[bytes]:
    """JPEG files."""
    if SHARED.exists():
        import pyarrow.parquet as pq

        table = pq.read_table(SHARED, columns=["image"])
        return table["image"].take(np.linspace(0, len(table) - 1, count).astype(int)).to_pylist()
    draw, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(draw.integers(0, 256, (28, 28, 3), np.uint8)).resize((224, 224))
        buffer = io.BytesIO()
        coarse.save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def network(name: str) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A network with random weights, as its library builds it and as rayclust runs it: with batch norms folded."""
    torch.manual_seed(0)
    if name == "mobilenetv2":
        import timm

        from rayclust.encoders.timm import fold_batch_norms

        plain = timm.create_model("mobilenetv2_100", num_classes=0).eval()
        return plain, fold_batch_norms(plain, torch.randn(1, 3, 224, 224))
    import open_clip

    built: torch.nn.Module = open_clip.create_model("ViT-B-32").visual
    return built, built


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and CPU seconds."""
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu


def engines(name: str, files: list[bytes], rounds: int) -> tuple[list[str], bool]:
    """Images a CPU second of each engine, one thread, and the least cosine to torch in float32."""
    preprocess, (plain, built) = Preprocess(224), network(name)
    pixels = np.stack([decode(file, preprocess) for file in files])
    encoders, rates, rows = dict[str, Encoder](), dict[str, list[float]](), {}
    for engine, settings in ENGINES.items():
        config = EncoderConfig(name=f"timm/{name}", **settings)
        run = plain if engine == "torch eager" else built
        encoder = TorchEncoder(run, config, preprocess, mean=MEAN, std=STD, device="cpu")
        is_graph = engine.startswith("openvino")
        encoders[engine] = GraphEncoder(encoder.to_graph(), config, lambda e=encoder: e) if is_graph else encoder
        rows[engine] = encoders[engine].encode_images(pixels)
    for _ in range(rounds):
        for engine, encoder in encoders.items():
            _, cpu = measured(lambda encoder=encoder: encoder.encode_images(pixels))
            rates.setdefault(engine, []).append(len(pixels) / cpu)
    lines, eager = [], float(np.median(rates["torch eager"]))
    for engine, found in rates.items():
        cosine = (rows[engine] * rows["torch eager"]).sum(1).min()
        low, middle, high = min(found), float(np.median(found)), max(found)
        lines.append(
            f"{name:<14}{engine:<18}{low:>9.1f}{middle:>9.1f}{high:>9.1f}{middle / eager:>9.2f}{cosine:>14.7f}"
        )
    return lines, np.median(rates["openvino"]) >= FLOORS[name] * eager


def decoders(files: list[bytes], rounds: int) -> list[str]:
    """Images a CPU second of decoders, for the files and for large photographs, and how far pixels are apart."""
    large = io.BytesIO()
    Image.open(io.BytesIO(files[0])).resize((4000, 3000)).save(large, "JPEG", quality=90)
    lines = []
    for kind, some in (("224 pixels", files), ("12 megapixels", [large.getvalue()] * 4)):
        ways = {"Pillow": Preprocess(224), "Pillow, jpeg_draft": Preprocess(224, jpeg_draft=True)}
        plain = decode(some[0], ways["Pillow"]).astype(float)
        for way, preprocess in ways.items():
            cpu = min(measured(lambda p=preprocess, s=some: [decode(f, p) for f in s])[1] for _ in range(rounds))
            apart = np.abs(decode(some[0], preprocess) - plain).mean()
            lines.append(f"{kind:<14}{way:<28}{len(some) / cpu:>9.1f} images/CPU s, mean difference {apart:.2f} of 255")
    return lines


def stage(files: list[bytes], rounds: int) -> tuple[list[str], bool]:
    """The stage with one and two workers beside the bare loop: decode, encode, one image after the other.

    Two bare loops at once say what two cores of the machine give.
    """
    import timm
    from safetensors.torch import save_file

    lines, fair = [], True
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, count in (("small", SMALL), ("large", len(files))):
            (folder / name).mkdir()
            for number, file in enumerate(files[:count]):
                (folder / name / f"{number:05d}.jpg").write_bytes(file)
        torch.manual_seed(0)
        save_file(timm.create_model("mobilenetv2_100", num_classes=0).state_dict(), folder / "net.safetensors")
        encoder = {"name": "timm/mobilenetv2_100", "pretrained": str(folder / "net.safetensors")}
        for engine in ("torch", "openvino"):
            slopes = dict[str, list[tuple[float, float]]]()
            for number in range(rounds):
                for way in ("bare loop", "1 worker", "two bare loops", "2 workers"):
                    costs = []
                    for size in ("small", "large"):
                        run = str(folder / f"{engine}-{way}-{size}-{number}")
                        tree = {
                            "run": run,
                            "images": {"uri": str(folder / size)},
                            "encoder": encoder | {"engine": engine},
                        }
                        tree |= {"method": {"name": "kmeans", "clusters": 2}, "label": {"vocabulary": "none"}}
                        tree["resources"] = {"workers": 1 if way == "1 worker" else "auto"}
                        config = validate(tree)
                        loops = {"bare loop": 1, "two bare loops": 2}.get(way, 0)
                        work = (
                            partial(_bare, config, folder / size, loops)
                            if loops
                            else partial(run_stage, "encode", config)
                        )
                        costs.append(measured(work))
                    seconds, cpu = (large - small for small, large in zip(*costs, strict=True))
                    slopes.setdefault(way, []).append(((len(files) - SMALL) / seconds, (len(files) - SMALL) / cpu))
            plain = np.median(slopes["bare loop"], axis=0)
            for way, found in slopes.items():
                by_second, by_cpu = np.median(found, axis=0)
                lines.append(
                    f"{engine:<14}{way:<18}{by_second:>12.1f}{by_second / plain[0]:>9.2f}{by_cpu:>12.1f}"
                    f"{by_cpu / plain[1]:>9.2f}"
                )
                fair &= way != "1 worker" or by_cpu >= STAGE_FLOOR * plain[1]
    return lines, bool(fair)


def _bare(config: Any, folder: Path, loops: int) -> None:
    """What a user would write: one file after the other through decoder and network, in one thread or two."""
    from rayclust.runtime.encoder import RunEncoders

    encoders, files = RunEncoders(config, "cpu"), sorted(folder.iterdir())
    encoders.encoders[0].callers = loops

    def loop(own: list[Path]) -> None:
        for path in own:
            encoders.encode([pixels[None] for pixels in encoders.decode(path.read_bytes())])

    with ThreadPoolExecutor(loops) as threads:
        list(threads.map(loop, (files[start::loops] for start in range(loops))))


def main() -> None:
    """Print the tables, and write them; exit code 1 below a floor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", nargs="*", default=list(FLOORS), choices=list(FLOORS))
    parser.add_argument("--no-stage", action="store_true")
    parser.add_argument("--no-decoders", action="store_true")
    parser.add_argument("--report", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    files, good = photographs(arguments.images), True
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    names = ("torch", "openvino", "timm", "pillow")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    lines = [
        f"{model.partition(':')[2].strip()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}",
        f"python benchmarks/encode_cpu.py {' '.join(sys.argv[1:])}".partition(" --report")[0],
        f"{'photographs' if SHARED.exists() else 'drawn images'} as JPEG of 224 pixels, networks of random weights",
        "",
        f"{'one thread':<32}{'min':>9}{'median':>9}{'max':>9}{'× torch':>9}{'least cosine':>14}   images/CPU s",
    ]
    print("\n".join(lines), flush=True)
    for name in arguments.networks:
        table, is_met = engines(name, files[: 64 if name == "mobilenetv2" else 12], arguments.rounds)
        lines, good = lines + table, good and is_met
        print("\n".join(table), flush=True)
    if not arguments.no_decoders:
        lines += ["", *decoders(files[:64], arguments.rounds)]
    if not arguments.no_stage:
        table, is_met = stage(files, arguments.rounds)
        heads = f"{'encode, MobileNetV2':<32}{'images/s':>12}{'× bare':>9}{'by CPU s':>12}{'× bare':>9}"
        lines, good = [*lines, "", heads, *table], good and is_met
    lines += ["", f"load {os.getloadavg()[0]:.1f} at the end; floors {'met' if good else 'MISSED'}"]
    text = "\n".join(lines) + "\n"
    print(text[text.index("images/CPU s") :])
    if arguments.report:
        arguments.report.write_text(text)
    sys.exit(not good)


if __name__ == "__main__":
    main()
