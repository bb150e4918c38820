"""The cases: each pair of format, storage, method and way to give the number of clusters occurs, most of them once.

Embeddings, neighbours and everything that is computed with whole numbers have the same bytes on every machine; what a
processor rounds in its own way has not. So digests are kept for each kind of processor, and on a kind that is not among
them nothing is compared (`is_known`).
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

import rayclust as rc

KEPT = Path(__file__).with_name("digests.json")
BUCKET = "golden-runs"


@dataclass(frozen=True)
class Case:
    """One run."""

    format: str
    storage: str
    method: dict[str, Any]
    """The group `method` of its RUN.yaml."""


_PRECISE = {"precision": "fp32"}
_TEMI = {"name": "temi", "heads": 2, "steps": 30, "batch_size": 16, "hidden": 16, "bottleneck": 8, **_PRECISE}
_CPP = {
    "name": "cpp",
    "steps": 12,
    "expansion_steps": 4,
    "batch_size": 16,
    "hidden": 16,
    "width": 8,
    "precision": "fp32",
}

CASES = {
    "folder-local-kmeans": Case("folder", "local", {"name": "kmeans", "clusters": 3}),
    "folder-s3-cpp-list": Case("folder", "s3", _CPP | {"clusters": [2, 3]}),
    "tar-local-temi": Case("tar", "local", _TEMI | {"clusters": 3}),
    "tar-s3-spectral-list": Case("tar", "s3", {"name": "spectral", "clusters": [2, 3]}),
    "parquet-local-cpp": Case("parquet", "local", _CPP | {"clusters": 3}),
    "parquet-s3-kmeans-list": Case("parquet", "s3", {"name": "kmeans", "clusters": [2, 3]}),
    "embeddings-local-spectral": Case("embeddings", "local", {"name": "spectral", "clusters": 3}),
    "embeddings-s3-temi-list": Case("embeddings", "s3", _TEMI | {"clusters": [2, 3]}),
}

_COLOURS = {"amber": (230, 160, 20), "blue": (30, 60, 220), "green": (20, 170, 60)}
_EACH = 12


def _picture(colour: tuple[int, int, int], seed: int) -> bytes:
    noise = np.random.default_rng(seed).normal(0, 25, (16, 16, 3))
    buffer = io.BytesIO()
    Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _pictures() -> list[tuple[str, str, bytes]]:
    """Class, name and content; one of them is broken."""
    found = [
        (name, f"{i:03d}.png", _picture(colour, 100 * number + i))
        for number, (name, colour) in enumerate(_COLOURS.items())
        for i in range(_EACH)
    ]
    return [*found, ("blue", "zzz.png", b"\x89PNG\r\n\x1a\n and no more")]


def _folder() -> dict[str, bytes]:
    return {f"{label}/{name}": content for label, name, content in _pictures()}


def _tar() -> dict[str, bytes]:
    files = {}
    for shard in range(2):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for i, (label, name, content) in enumerate(_pictures()):
                if i % 2 == shard:
                    for suffix, data in (("png", content), ("cls", label.encode())):
                        member = tarfile.TarInfo(f"{label}-{name[:-4]}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        files[f"shard-{shard:03d}.tar"] = buffer.getvalue()
    return files


def _parquet() -> dict[str, bytes]:
    labels, names, contents = zip(*_pictures(), strict=True)
    keys = [f"{label}-{name}" for label, name in zip(labels, names, strict=True)]
    table = pa.table({"key": keys, "image": pa.array(contents, pa.binary()), "label": list(labels)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=16)
    return {"images.parquet": buffer.getvalue()}


def _embeddings() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    rows = np.repeat(np.linalg.qr(rng.normal(size=(12, 12)))[0][:3], _EACH, axis=0)
    buffer = io.BytesIO()
    np.save(buffer, (rows + 0.05 * rng.normal(size=rows.shape)).astype(np.float32))
    return {"rows.npy": buffer.getvalue()}


FORMATS: dict[str, Callable[[], dict[str, bytes]]] = {
    "folder": _folder,
    "tar": _tar,
    "parquet": _parquet,
    "embeddings": _embeddings,
}


def run_case(name: str, scratch: Path) -> str:
    """Run a case and return its run's URI.

    Input and run lie at the same relative places in every case; the absolute ones are in no artefact but the tables of
    keys and URIs, which `digests_of` therefore reads without their URIs.
    """
    case = CASES[name]
    if case.storage == "local":
        base = str(scratch / name)
    else:
        base = f"s3://{BUCKET}/{name}"
        fsspec.filesystem("s3").mkdirs(BUCKET, exist_ok=True)
    for path, content in FORMATS[case.format]().items():
        with fsspec.open(f"{base}/input/{path}", "wb", auto_mkdir=True) as file:
            file.write(content)
    encoder = {"name": "pixels", "image_size": 8, "batch_size": 8}
    rc.run(
        ({} if case.format == "embeddings" else {"encoder": encoder})
        | {
            "run": f"{base}/run",
            "images": {"uri": f"{base}/input", "shard_size": 16},
            "features": {"center": True},
            "neighbors": {"k": 5},
            "method": case.method,
            "select_k": {"seeds": 2},
            "label": {"vocabulary": "none"},
        }
    )
    return f"{base}/run"


def digests_of(run: str) -> dict[str, str]:
    """Return the digest of every artefact of a run by its path, and of what each stage says besides.

    Tables are digested by their content without the column `uri`; the report, and what trackers get, which
    hold URIs, dates and times, are left out.
    """
    filesystem, root = fsspec.core.url_to_fs(run)
    found = {}
    for path in sorted(filesystem.find(root)):
        name = path[len(root.rstrip("/")) + 1 :]
        left_out = name.startswith(("manifests/", "report/", "checkpoints/", "tensorboard/", "."))
        if left_out or name in ("run.json", "config.json", "tracking.json"):  # with URIs, and an id of its own
            continue
        content = filesystem.cat_file(path)
        if name.endswith(".parquet"):
            table = pq.read_table(io.BytesIO(content))
            columns = [column for column in table.column_names if column != "uri"]
            sink = io.BytesIO()
            pq.write_table(table.select(columns).combine_chunks(), sink, compression="none", store_schema=False)
            content = sink.getvalue()
        found[name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def processor() -> str:
    """The kind of processor and library on which digests of rounded numbers hold."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.partition(":")[2].strip() for line in flags.splitlines() if line.startswith("model\t")), "")
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} model {model}, {capability}, torch {torch.__version__}"


def _kept() -> dict[str, dict[str, dict[str, str]]]:
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def is_known() -> bool:
    """Whether digests were kept on this kind of processor."""
    return processor() in _kept()


def keep(name: str, found: dict[str, str]) -> None:
    """Write a case's digests for this kind of processor."""
    kept = _kept()
    kept.setdefault(processor(), {})[name] = found
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def differences(name: str, found: dict[str, str]) -> list[str]:
    """Return a line for every artefact that is new, gone or other than it was.

    A digest that is null in the file counts as any: the artefact has changed since it was kept on this kind.
    """
    kept = _kept().get(processor(), {}).get(name, {})
    lines = [f"{path}: gone" for path in kept if path not in found]
    lines += [f"{path}: new" for path in found if path not in kept]
    return sorted(lines + [f"{path}: differs" for path in found if kept.get(path) not in (None, found[path])])
