"""Fetch named data sets, `dataset:cifar10` and the like, once; keep them in a cache as Parquet with images and labels.

The archives are the authors' binary versions, plain records of pixels. The Python versions, which torchvision reads,
are pickles, and nothing that is read from storage is unpickled here.
"""

from __future__ import annotations

import io
import logging
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
from PIL import Image

from rayclust.errors import DataError
from rayclust.store import storage, tables
from rayclust.store.run import PART

logger = logging.getLogger(__name__)

SCHEME = "dataset:"
DIGITS = "digits"
"""Name of the one that needs no archive."""
SHARDS = 6
"""Tar files that the digits are spread over."""
SCALE = 4
"""Side of the square, in pixels, that each of the 8 × 8 scanned values of a digit becomes, large enough to read."""
PART_IMAGES = 1000
"""Images per Parquet file, each of which becomes one shard."""
_FORMAT = 1
"""Raised when the content of an export changes, so that older ones are made again."""

_TORONTO = "https://www.cs.toronto.edu/~kriz"


@dataclass(frozen=True)
class Dataset:
    """Published archive of a data set, and the form of the records in it."""

    url: str
    md5: str
    """As its authors state it."""
    splits: dict[str, tuple[str, ...]]
    """By split, the members of the archive that hold it."""
    names: str | tuple[str, ...]
    """The classes, or the member that lists them, one a line."""
    side: int = 32
    """Of the images, pixels."""
    label_bytes: int = 1
    """Bytes before the pixels of a record. 0: labels lie in a separate file, counted from 1, and pixels by column."""
    label: int = 0
    """The one of these bytes that holds the class."""


_cifar100 = partial(
    Dataset,
    f"{_TORONTO}/cifar-100-binary.tar.gz",
    "03b5dce01913d631647c71ecec9e9cb8",
    {"train": ("cifar-100-binary/train.bin",), "test": ("cifar-100-binary/test.bin",)},
)
DATASETS = {
    "cifar10": Dataset(
        f"{_TORONTO}/cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        {
            "train": tuple(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)),
            "test": ("cifar-10-batches-bin/test_batch.bin",),
        },
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar20": _cifar100(names="cifar-100-binary/coarse_label_names.txt", label_bytes=2),
    "cifar100": _cifar100(names="cifar-100-binary/fine_label_names.txt", label_bytes=2, label=1),
    "stl10": Dataset(
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        "91f7769df0f17e558f3565bffb0c7dfb",
        {"train": ("stl10_binary/train_X.bin",), "test": ("stl10_binary/test_X.bin",)},
        "stl10_binary/class_names.txt",
        side=96,
        label_bytes=0,
    ),
}


def _read(archive: tarfile.TarFile, member: str, dataset: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield UInt8[n H W 3] pixels and Int64[n] labels of a member."""
    head, size = dataset.label_bytes, dataset.label_bytes + 3 * dataset.side**2
    stream, start = _open(archive, member), 0
    if not head:
        classes = np.frombuffer(_open(archive, member.replace("_X", "_y")).read(), np.uint8).astype(np.int64) - 1
    while data := stream.read(PART_IMAGES * size):
        if len(data) % size:
            raise DataError(f"{member}: ends within a record; fetch the archive again")
        block = np.frombuffer(data, np.uint8).reshape(-1, size)
        planes = block[:, head:].reshape(-1, 3, dataset.side, dataset.side)
        if head:
            yield planes.transpose(0, 2, 3, 1), block[:, dataset.label].astype(np.int64)
        else:
            yield planes.transpose(0, 3, 2, 1), classes[start : start + len(block)]
        start += len(block)


def _open(archive: tarfile.TarFile, member: str) -> IO[bytes]:
    stream = archive.extractfile(member)
    if stream is None:
        raise KeyError(member)
    return stream


def local_folder(uri: str) -> str:
    """Return the folder of an input: that of a named data set in the cache, any other as it is.

    Args:
        uri: an input; `dataset:NAME` holds all labelled images, `dataset:NAME/train` and `dataset:NAME/test` one split.

    Raises:
        DataError: there is no such data set, or it can be neither found nor fetched.
    """
    if not uri.startswith(SCHEME):
        return uri
    name, _, split = uri.removeprefix(SCHEME).partition("/")
    if name == DIGITS and not split:
        folder = storage.join(cache_root(), DIGITS)
        marker = storage.join(folder, "dataset.json")
        if not storage.exists(marker):
            write_digits(folder)
            storage.write_json(marker, {"format": _FORMAT, "name": DIGITS})
        return folder
    if name not in DATASETS or split not in ("", *DATASETS[name].splits):
        known = ", ".join(f"{SCHEME}{known}" for known in DATASETS)
        raise DataError(
            f"images.uri = {uri}: no such data set; known are {SCHEME}{DIGITS} and {known}, the latter also with "
            "/train or /test"
        )
    folder = export(name)
    return storage.join(folder, split) if split else folder


def cache_root() -> str:
    """Return the cache: RAYCLUST_CACHE, else `~/.cache/rayclust`. On a cluster every node must see it."""
    return storage.absolute(os.environ.get("RAYCLUST_CACHE") or "~/.cache/rayclust")


def export(name: str, cache: str | None = None) -> str:
    """Write a data set as Parquet with key, image (PNG) and label, unless the cache holds it; return the folder.

    It has one folder per split. Every export writes the same bytes. None as cache is `cache_root()`.

    Raises:
        DataError: the archive is missing and cannot be fetched, or does not hold what it should.
    """
    cache = cache or cache_root()
    dataset, folder = DATASETS[name], storage.join(cache, name)
    marker = storage.join(folder, "dataset.json")
    if storage.exists(marker) and storage.read_json(marker).get("format") == _FORMAT:
        return folder
    # 1. The archive on this machine, checked against its MD5; it is downloaded if it is missing.
    from torchvision.datasets.utils import check_integrity, download_url

    local, file = cache, dataset.url.rpartition("/")[2]
    if storage.is_remote(cache):
        local = storage.absolute("~/.cache/rayclust")
    path = Path(local) / "archives" / file
    if not check_integrity(str(path), dataset.md5):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            download_url(dataset.url, str(path.parent), file, dataset.md5)
        except (OSError, RuntimeError) as error:
            advice = f"put {file} (MD5 {dataset.md5}) into {path.parent} and run again"
            raise DataError(f"{SCHEME}{name}: cannot fetch {dataset.url} ({error}); {advice}") from error
    # 2. Its images as Parquet.
    logger.info("%s%s: writing its images to %s", SCHEME, name, folder)
    counts = {}
    try:
        with tarfile.open(path) as archive:
            names = dataset.names
            if isinstance(names, str):
                names = tuple(_open(archive, names).read().decode().split())
            for split, members in dataset.splits.items():
                counts[split] = 0
                blocks = (block for member in members for block in _read(archive, member, dataset))
                for part, (pixels, labels) in enumerate(blocks):
                    columns = {
                        "key": [f"{split}/{counts[split] + i:06d}" for i in range(len(pixels))],
                        "image": pa.array([_png(image) for image in pixels], pa.binary()),
                        "label": [names[label] for label in labels],
                    }
                    tables.write_table(storage.join(folder, split, PART.format(part)), pa.table(columns))
                    counts[split] += len(pixels)
    except (KeyError, tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: does not hold {name} as published ({error}); remove it and run again") from error
    storage.write_json(marker, {"format": _FORMAT, "name": name, "images": counts})
    return folder


def write_digits(folder: str) -> None:
    """Write scikit-learn's 1,797 scanned digits as webdataset shards of PNG images with their classes.

    Every call writes the same bytes, so that a second demo finds its work done.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    for shard in range(SHARDS):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard, len(digits.target), SHARDS):
                # White on black, as in most collections of digits; values 0 to 16 become 0 to 255.
                values = np.round(digits.images[number] * (255 / 16)).astype(np.uint8)
                image = _png(np.kron(values, np.ones((SCALE, SCALE), np.uint8)))
                for suffix, data in (("png", image), ("cls", str(int(digits.target[number])).encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        storage.write_bytes(storage.join(folder, f"digits-{shard:02d}.tar"), buffer.getvalue())


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()
