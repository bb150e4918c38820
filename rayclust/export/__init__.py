"""Take a finished run home: its rows with their clusters, in the formats of other tools."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rayclust.errors import ConfigError

if TYPE_CHECKING:
    from rayclust.config import RunConfig
    from rayclust.export.rows import RunRows

FORMATS = {
    "atlas": "one parquet for embedding-atlas: a place on the plane, cluster, name, neighbours",
    "table": "one .parquet or .csv, a line per image",
    "keys": "a list of keys per cluster",
    "fiftyone": "a FiftyOneDataset folder",
    "hf": "a folder that Hugging Face's datasets loads, with a card",
    "webdataset": "tars of images, the cluster in a .json beside each",
    "clip-retrieval": "embeddings as npy, metadata as parquet",
}
"""Formats of `rayclust export`, each in a line."""


def export(config: RunConfig, to: str, out: str, *, images: bool = False, push: str | None = None) -> dict[str, Any]:
    """Write the rows of a run with their clusters as edited, part by part.

    Args:
        config: the run's.
        to: one of `FORMATS`.
        out: file (`atlas`, `table`) or folder, a path or URI.
        images: put the images in: thumbnails for `atlas`, the files for `hf`; `webdataset` always has them.
        push: OWNER/NAME of a data set of Hugging Face's hub to which `hf` is uploaded as well, private where it is new.

    Returns:
        `format`, `out`, `rows`, `files` written, `missing` images where some were asked for, what the format adds, and
        `pushed`, the address on the hub.

    Raises:
        ArtefactError: the run has no clusters yet.
        ConfigError: there is no such format, or `out` does not suit it.
        DataError: the images cannot be read, none of them, or the hub refuses them.
    """
    # The command line names the formats before anything heavy is loaded.
    from rayclust.export import datasets, tables
    from rayclust.export.rows import RunRows
    from rayclust.settings import closest
    from rayclust.store import storage

    writers: dict[str, Callable[[RunRows, str, bool], dict[str, Any]]] = {
        "atlas": tables.write_atlas,
        "table": tables.write_table,
        "keys": tables.write_keys,
        "fiftyone": datasets.write_fiftyone,
        "hf": datasets.write_hf,
        "webdataset": datasets.write_webdataset,
        "clip-retrieval": datasets.write_clip_retrieval,
    }
    if to not in writers:
        raise ConfigError(f"--to {to}: must be one of {', '.join(FORMATS)}{closest(to, FORMATS)}")
    if images and to not in ("atlas", "hf", "webdataset"):
        raise ConfigError(f"--images: the format {to} holds none; use atlas, hf or webdataset")
    if push is not None and (to != "hf" or storage.is_remote(out)):
        raise ConfigError("--push: uploads what --to hf writes to a local folder")
    rows = RunRows(config)
    found = writers[to](rows, storage.absolute(out), images)
    pushed = {} if push is None else {"pushed": datasets.push(storage.absolute(out), push)}
    return {"format": to, "out": storage.absolute(out), "rows": rows.count} | found | pushed
