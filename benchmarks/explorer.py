"""A query of the explorer over a million rows; `explorer_scroll.py` scrolls.

Claims: with index and encoder in memory a query over 1 M × 512 rows takes less than 100 ms on one core, with the
encoding of the words, or of the image by OpenVINO.

    python benchmarks/explorer.py query [--rows 1000000] [--width 512] [--lists 4000]

`query`: rows lie around as many planted centres as an inverted file of the stage index has lists (4·√N); the centres
stand for those that its k-means finds, which is not measured here. Times are those of the processor for one query on
one thread, which other programs beside it hardly change, the median of 30, through `VectorIndex.search` as the
explorer calls it, by the number of lists that are probed; the flat index is what `index.kind: auto` takes up to
200,000 rows. Recall is that of the ten nearest rows by the flat index, for queries beside rows and for such in random
directions: words lie far from all images, and their neighbours in many lists. The words go through the text tower of
ViT-B/32 with random weights, which take as long as trained ones; the image, a JPEG of 640 × 480, is decoded and goes
through the image tower, by torch and by OpenVINO in bfloat16, as the run chose.
"""

from __future__ import annotations

import argparse
import io
import platform
import time
from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import open_clip
import torch
from PIL import Image

from rayclust.config import IndexConfig
from rayclust.encoders.clip import ClipEncoder
from rayclust.encoders.decode import Preprocess, decode
from rayclust.encoders.openvino import GraphEncoder
from rayclust.encoders.settings import EncoderConfig
from rayclust.search.index import VectorIndex

FLAT_ROWS = IndexConfig().flat_rows


def seconds_of_a_query(index: Any, queries: np.ndarray) -> float:
    """Median over single queries, the first ones left out."""
    found, taken = VectorIndex(index), []
    for query in queries:
        started = time.process_time()
        found.search(query[None], 100)
        taken.append(time.process_time() - started)
    return float(np.median(taken[3:]))


def seconds_of_encoding() -> dict[str, float]:
    """Median over queries, the first ones left out, of the encoding of words and of an image."""
    network = open_clip.create_model("ViT-B-32", pretrained=None)
    look = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "device": "cpu"}
    config = EncoderConfig(name="open_clip/ViT-B-32", threads=1)
    encoder = ClipEncoder(network, config, Preprocess(224), **look)
    graph = GraphEncoder(encoder.to_graph(), config.model_copy(update={"precision": "bf16"}), lambda: encoder)
    picture = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(noise).resize((640, 480)).save(picture, "JPEG")
    data = picture.getvalue()
    queries: dict[str, Callable[[int], Any]] = {
        "words": lambda number: encoder.encode_texts([f"a photo of {number} dogs on a red sofa"]),
        "an image, torch": lambda _: encoder.encode_images(decode(data, encoder.preprocess)[None]),
        "an image, OpenVINO": lambda _: graph.encode_images(decode(data, encoder.preprocess)[None]),
    }
    found = dict[str, float]()
    for name, ask in queries.items():
        taken = []
        for number in range(33):
            started = time.process_time()
            ask(number)
            taken.append(time.process_time() - started)
        found[name] = float(np.median(taken[3:]))
    return found


def query(rows: int, width: int, lists: int) -> None:
    """One query over a flat index and over an inverted file, and the encoding of words before it."""
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(lists, width)).astype(np.float32)
    faiss.normalize_L2(centers)
    quantizer = faiss.IndexFlatIP(width)
    quantizer.add(centers)
    kinds = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    ivf = faiss.IndexIVFScalarQuantizer(quantizer, width, lists, *kinds)
    ivf.by_residual = False
    ivf.train(centers)  # the quantizer holds them: only marks it as trained
    flat, small = faiss.IndexFlatIP(width), faiss.IndexFlatIP(width)
    for start in range(0, rows, 50_000):
        own = rng.integers(0, lists, min(50_000, rows - start))
        x = centers[own] + 0.05 * rng.standard_normal((len(own), width), np.float32)
        faiss.normalize_L2(x)
        flat.add(x)
        if small.ntotal < FLAT_ROWS:
            small.add(x)
        ids = np.arange(start, start + len(own))
        ivf.add_core(len(own), faiss.swig_ptr(x), faiss.swig_ptr(ids), faiss.swig_ptr(own))
    queries = centers[:33] + 0.05 * rng.standard_normal((33, width), np.float32)
    far = rng.standard_normal((33, width)).astype(np.float32)
    faiss.normalize_L2(queries)
    faiss.normalize_L2(far)
    wanted = [flat.search(asked, 10)[1] for asked in (queries, far)]
    encoding = seconds_of_encoding()
    print("; ".join(f"{name} to a row: {1e3 * taken:.1f} ms" for name, taken in encoding.items()))
    heads = " | ".join(f"with {name}, ms" for name in encoding)
    print(f"| {rows:,} × {width}, index | memory, GB | ms | {heads} | recall@10 | of far queries |")
    print(f"|---|---|---|{'---|' * len(encoding)}---|---|")

    def line(name: str, index: Any, memory: float, recalls: list[float]) -> None:
        taken = seconds_of_a_query(index, queries)
        shares = " | ".join(f"{recall:.3f}" for recall in recalls)
        whole = " | ".join(f"{1e3 * (taken + each):.1f}" for each in encoding.values())
        print(f"| {name} | {memory / 1e9:.1f} | {1e3 * taken:.1f} | {whole} | {shares} |", flush=True)

    line(f"flat, float32, its first {small.ntotal:,} rows", small, small.ntotal * width * 4, [1.0, 1.0])
    line("flat, float32", flat, rows * width * 4, [1.0, 1.0])
    for probes in (16, 64, 256, 1024):
        ivf.nprobe = probes
        found = [ivf.search(asked, 10)[1] for asked in (queries, far)]
        recalls = [
            float(np.mean([np.isin(a, b).mean() for a, b in zip(*pair, strict=True)]))
            for pair in zip(wanted, found, strict=True)
        ]
        line(f"{lists:,} lists of float16, {probes} probed", ivf, rows * width * 2, recalls)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["query"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--lists", type=int, default=4000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    versions = f"faiss {faiss.__version__}, numpy {np.__version__}, torch {torch.__version__}"
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}, one thread")
    query(given.rows, given.width, given.lists)


if __name__ == "__main__":
    main()
