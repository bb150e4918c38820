"""Small real inputs and command lines for tests of whole runs."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

COLOURS = {"amber": (230, 160, 20), "blue": (30, 60, 220), "green": (20, 170, 60)}


def picture(colour: tuple[int, int, int], seed: int, size: int = 24) -> bytes:
    """A noisy patch of one colour."""
    noise = np.random.default_rng(seed).normal(0, 25, (size, size, 3))
    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder: Path, per_class: int, size: int = 24) -> Path:
    """A tree of class folders."""
    for number, (name, colour) in enumerate(COLOURS.items()):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            (folder / name / f"{i:04d}.png").write_bytes(picture(colour, 1000 * number + i, size))
    return folder


def write_tars(folder: Path, shards: int, per_shard: int) -> Path:
    """Webdataset shards with a .cls beside each image."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"shard-{shard:03d}.tar", "w") as tar:
            for i in range(per_shard):
                name, colour = list(COLOURS.items())[i % len(COLOURS)]
                for suffix, data in (("png", picture(colour, 1000 * shard + i)), ("cls", name.encode())):
                    member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def tree(run: str, source: str, **groups: Any) -> dict[str, Any]:
    """A small RUN.yaml, over pixels unless the source holds embeddings; `groups` replace or add groups of keys."""
    base: dict[str, Any] = {
        "run": run,
        "images": {"uri": source, "shard_size": 16},
        "encoder": {"name": "pixels", "image_size": 8, "batch_size": 8},
        "features": {"center": True},
        "neighbors": {"k": 5},
        "method": {"name": "kmeans", "clusters": 3},
        "label": {"vocabulary": "none"},
    }
    for name, group in groups.items():
        base[name] = {**base.get(name, {}), **group} if isinstance(group, dict) else group
    if _has_embeddings(Path(source)) and "encoder" not in groups:
        del base["encoder"]
    return base


def _has_embeddings(source: Path) -> bool:
    files = list(source.glob("*")) if source.is_dir() else [source]
    for file in files:
        if file.suffix == ".parquet":
            with suppress(pa.ArrowInvalid, OSError):
                return "embedding" in pq.read_schema(file).names
    return any(file.suffix in (".npy", ".pt") for file in files)


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def command(*arguments: str | Path, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command line to its end, in a process of its own."""
    line = [sys.executable, "-m", "rayclust", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False, **kwargs)


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Starts the command line as the leader of a process group."""
    line = [sys.executable, "-m", "rayclust", *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240) -> None:
    """Waits for a condition that must hold before the process ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended too early: {process.communicate()[0]}"
        assert time.monotonic() < deadline, "the awaited state never came"
        time.sleep(0.02)


def descendants(pid: int) -> dict[int, str]:
    """Process ids and titles below a process."""
    parents: dict[int, int] = {}
    titles: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text()
                titles[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ").strip()
            except OSError:
                continue
            parents[int(entry.name)] = int(status.rsplit(")", 1)[1].split()[1])
    found: set[int] = set()
    grown = True
    while grown:
        more = {child for child, parent in parents.items() if parent == pid or parent in found} - found
        found |= more
        grown = bool(more)
    return {child: titles[child] for child in found if child in titles}


def kill(*pids: int) -> None:
    """SIGKILL; one that is gone already is no error."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def embeddings(run: Path) -> pa.Table:
    """All embeddings of a run in order of their parts."""
    return pa.concat_tables(pq.read_table(path) for path in sorted((run / "embeddings").glob("part-*.parquet")))


def files(folder: Path, pattern: str) -> dict[str, bytes]:
    """Name to bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob(pattern))}
