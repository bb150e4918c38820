"""The explorer's measures: a query over a million rows, and scrolling through a cluster of 100,000 images.

Claims: with index and encoder in memory a query by words over 1 M × 512 rows takes less than 100 ms on one core, with
the encoding of the words; while every image of a cluster of 100,000 is scrolled past, the server grows by less than
300 MB, and stays there.

    python benchmarks/explorer.py query [--rows 1000000] [--width 512] [--lists 4000]
    python benchmarks/explorer.py scroll [--images 100000]

`query`: rows lie around as many planted centres as an inverted file of the stage index has lists (4·√N); the centres
stand for those that its k-means finds, which is not measured here. Times are of one query on one thread, the median
of 30, through `VectorIndex.search` as the explorer calls it, by the number of lists that are probed; the flat index is
what `index.kind: auto` takes up to 200,000 rows. Recall is that of the ten nearest rows by the flat index, for queries
beside rows and for such in random directions: words lie far from all images, and their neighbours in many lists. The
words go through the text tower of ViT-B/32 with random weights, which take as long as trained ones.

`scroll`: a run of ready embeddings, whose pictures are placeholders, made up to the stage label; all pages of its
largest cluster are asked for in order, with every tenth picture, as a page that is scrolled fast does.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import open_clip
import torch

from rayclust.config import IndexConfig
from rayclust.encoders.clip import ClipEncoder
from rayclust.encoders.decode import Preprocess
from rayclust.encoders.settings import EncoderConfig
from rayclust.search.index import VectorIndex

FLAT_ROWS = IndexConfig().flat_rows


def seconds_of_a_query(index: Any, queries: np.ndarray) -> float:
    """Median over single queries, the first ones left out."""
    found, taken = VectorIndex(index), []
    for query in queries:
        started = time.perf_counter()
        found.search(query[None], 100)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[3:]))


def seconds_of_words() -> float:
    """Median over phrases, the first ones left out, of their encoding."""
    network = open_clip.create_model("ViT-B-32", pretrained=None)
    look = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "device": "cpu"}
    encoder = ClipEncoder(network, EncoderConfig(name="open_clip/ViT-B-32"), Preprocess(224), **look)
    taken = []
    for number in range(33):
        started = time.perf_counter()
        encoder.encode_texts([f"a photo of {number} dogs on a red sofa"])
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[3:]))


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
    words = seconds_of_words()
    print(f"words to a row: {1e3 * words:.1f} ms")
    print(f"| {rows:,} × {width}, index | memory, GB | ms | with words, ms | recall@10 | of far queries |")
    print("|---|---|---|---|---|---|")

    def line(name: str, index: Any, memory: float, recalls: list[float]) -> None:
        taken = seconds_of_a_query(index, queries)
        shares = " | ".join(f"{recall:.3f}" for recall in recalls)
        print(
            f"| {name} | {memory / 1e9:.1f} | {1e3 * taken:.1f} | {1e3 * (taken + words):.1f} | {shares} |", flush=True
        )

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


def resident() -> dict[str, int]:
    """Memory of this process in MB: all of it, and what is its own and no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {
        line.split(":")[0]: int(line.split()[1]) // 1024 for line in lines if line.startswith(("VmRSS", "RssAnon"))
    }
    return {"all": found["VmRSS"], "own": found["RssAnon"]}


def scroll(images: int) -> None:
    """Ask for every page of a large cluster and for the pictures on it."""
    from rayclust.config import validate
    from rayclust.runtime.api import load_run
    from rayclust.runtime.pipeline import run_all
    from rayclust.web.explorer import Explorer

    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        x = np.concatenate([np.eye(8)[np.zeros(images, int)], np.eye(8)[np.full(images // 100, 4)]])
        np.save(f"{folder}/rows.npy", (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32))
        groups = {"method": {"name": "kmeans", "clusters": 2}, "neighbors": {"k": 2}, "label": {"vocabulary": "none"}}
        config = validate({"run": f"{folder}/run", "images": {"uri": f"{folder}/rows.npy"}, **groups})
        run_all(config, stop_after="label")
        gc.collect()
        before = resident()
        explorer = Explorer(load_run(config.run))
        [first, *_] = explorer.clusters()["clusters"]
        opened, started, most = resident(), time.perf_counter(), 0
        slowest = 0.0
        for offset in range(0, first["size"], 100):
            asked = time.perf_counter()
            page = explorer.images(first["number"], offset=offset, limit=100)
            slowest = max(slowest, time.perf_counter() - asked)
            for image in page["images"][:: 10 if offset else 1]:
                explorer.picture(image["row"], 160)
            most = max(most, resident()["all"]) if offset % 5000 == 0 else most
        taken, after = time.perf_counter() - started, resident()
        print(f"{first['size']:,} images in the cluster; MB of the process, all (its own):")
        for name, found in (("before it opens the run", before), ("opened", opened), ("all scrolled", after)):
            print(f"  {name}: {found['all']:,} ({found['own']:,})")
        print(f"  most while scrolling: {most:,}; grown by {most - opened['all']:,}")
        print(f"{taken:.1f} s for all pages; the slowest took {1e3 * slowest:.0f} ms")
        print(json.dumps({"images": first["size"], "grown_mb": most - opened["all"]}))


def main() -> None:
    """Run one of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["query", "scroll"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--lists", type=int, default=4000)
    parser.add_argument("--images", type=int, default=100_000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    versions = f"faiss {faiss.__version__}, numpy {np.__version__}, torch {torch.__version__}"
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}, one thread")
    if given.part == "query":
        query(given.rows, given.width, given.lists)
    else:
        scroll(given.images)


if __name__ == "__main__":
    main()
