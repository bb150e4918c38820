"""Small inputs as bytes: images, tars, tables and arrays."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rayclust.store import storage


def image(number: int = 0, form: str = "PNG") -> bytes:
    """A tiny picture, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def tar(members: Sequence[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """An archive of these members in this order; names may repeat."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def special_tar(infos: Sequence[tarfile.TarInfo], members: Sequence[tuple[str, bytes]]) -> bytes:
    """An archive of entries without content (links, devices, folders), then members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for info in infos:
            archive.addfile(info)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def entry(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    """A link, device or folder of an archive."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def samples(count: int) -> list[tuple[str, bytes]]:
    """Members of `count` webdataset samples, `00000.png` with `00000.cls`."""
    return [
        member for i in range(count) for member in ((f"{i:05d}.png", image(i)), (f"{i:05d}.cls", str(i % 3).encode()))
    ]


def parquet(columns: Mapping[str, Any], groups: int | None = None, metadata: Mapping[str, Any] | None = None) -> bytes:
    """A table; `groups` rows per row group, `metadata` as JSON in the schema."""
    table = pa.table(dict(columns))
    if metadata:
        table = table.replace_schema_metadata({key: json.dumps(value) for key, value in metadata.items()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=groups)
    return buffer.getvalue()


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    """An array as a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def vectors(count: int, width: int = 4, seed: int = 0) -> np.ndarray:
    """Float32[count width], ordinary rows."""
    return np.random.default_rng(seed).standard_normal((count, width)).astype(np.float32)


def gz(data: bytes) -> bytes:
    """`data` compressed, the same bytes every time."""
    return gzip.compress(data, mtime=0)


def write(base: str, files: Mapping[str, bytes]) -> str:
    """Writes files below a folder or URI, and returns it."""
    for key, data in files.items():
        storage.write_bytes(storage.join(base, key), data)
    return base


def s3_connection() -> Any:
    """This process's connection by the AWS variables, for what `storage` does not do."""
    return storage.filesystem("s3://any")[0]
