"""Embeddings of a run as features, without torch; `tensors.py` has them as methods train on them."""

from __future__ import annotations

import base64
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from rayclust.errors import ConfigError
from rayclust.features import FeaturesConfig, FeatureTransform, SpaceTransforms
from rayclust.methods.settings import EMBEDDINGS
from rayclust.store import tables
from rayclust.store.manifest import EncodeOutputs, Manifest
from rayclust.store.run import Run
from rayclust.store.storage import prefetch

READ_AHEAD = 8
"""Parts that are read at once."""


def space_widths(encode: EncodeOutputs) -> dict[str, int]:
    """Return D of each of a run's spaces by name; the only one of a run with one encoder is called `embeddings`."""
    return {space.name: space.dimension for space in encode.spaces} or {EMBEDDINGS: encode.dimension}


def transform_of(encode: Manifest, features: FeaturesConfig) -> SpaceTransforms:
    """Return the transform from embeddings to features, by the moments in encode's manifest."""
    outputs = encode.outputs_of(EncodeOutputs)
    moments, found, start = outputs.moments, dict[str, FeatureTransform](), 0
    total, squares = (np.frombuffer(base64.b64decode(text), "<f8") for text in (moments.total, moments.squares))
    for name, width in space_widths(outputs).items():
        of, some = features.of(name), slice(start, start + width)
        options = {"center": of.center, "standardize": of.standardize, "normalize": of.normalize}
        found[name] = FeatureTransform.from_moments(moments.count, total[some], squares[some], **options)
        start += width
    return SpaceTransforms(found, tuple(space_widths(outputs).values()))


def unit_transform(encode: EncodeOutputs, space: str | None = None) -> SpaceTransforms:
    """Return the transform to the encoders' own unit rows: of all spaces, or of the one that is named."""
    widths = {name: width for name, width in space_widths(encode).items() if space in (None, name)}
    return SpaceTransforms(dict.fromkeys(widths, FeatureTransform(normalize=True)), tuple(widths.values()))


def row_starts(encode: Manifest) -> list[int]:
    """Return the row at which each part begins, and N at the end."""
    return encode.outputs_of(EncodeOutputs).starts


def filled_parts(starts: Sequence[int]) -> list[int]:
    """Return the parts that hold rows."""
    return [part for part, (start, stop) in enumerate(pairwise(starts)) if stop > start]


def fitted_count(encode: Manifest) -> int:
    """Return the number of rows that methods are fitted on: all but those kept aside."""
    outputs = encode.outputs_of(EncodeOutputs)
    return sum(outputs.parts) - sum(outputs.test)


def kept_aside(run: Run, encode: EncodeOutputs) -> np.ndarray | None:
    """Return which rows are kept aside as the test split, Bool[N]; None in a run without one."""
    if not encode.test:
        return None
    aside = []
    for part, (rows, test) in enumerate(zip(encode.parts, encode.test, strict=True)):
        if test in (0, rows):
            aside.append(np.full(rows, test > 0))
        else:
            column = tables.read_table(run.rows(part), ["split"])["split"]
            aside.append(column.to_numpy() == "test")
    return np.concatenate(aside)


def part_embeddings(run: Run, index: int, spaces: Iterable[str] = ()) -> np.ndarray:
    """Return Float[B ΣD], the embeddings of the rows of one part; the named spaces side by side, by default all."""
    names = tuple(spaces) or run.spaces
    uris = [run.embeddings(index, name) for name in names] if run.spaces else [run.embeddings(index)]
    found = [tables.matrix(tables.read_table(uri, ["embedding"])["embedding"]) for uri in uris]
    return found[0] if len(found) == 1 else np.concatenate(found, axis=1)


def part_features(run: Run, index: int, transform: SpaceTransforms) -> np.ndarray:
    """Return Float32[B D], the features of the rows of one part in the transform's spaces, side by side."""
    return transform(part_embeddings(run, index, transform.transforms))


def row_keys(run: Run, parts: int) -> pa.ChunkedArray:
    """Return the keys of all rows of a run with so many parts, in order."""
    columns = [tables.read_table(run.rows(part), ["key"])["key"] for part in range(parts)]
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())


def rows_by_part(starts: list[int], rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each part that holds some of the rows, Int64[n] sorted, with their positions in it."""
    for part, (first, end) in enumerate(pairwise(np.searchsorted(rows, starts).tolist())):
        if end > first:
            yield part, rows[first:end] - starts[part]


def table_at(uri_of: Callable[[int], str], starts: list[int], rows: np.ndarray, columns: Sequence[str]) -> pa.Table:
    """Return some rows, Int64[n] sorted, of a folder of tables, such as `run.rows`; parts are read ahead."""

    def read(place: tuple[int, np.ndarray]) -> pa.Table:
        part, local = place
        return tables.read_table(uri_of(part), columns).take(pa.array(local))

    found = [table for _, table in prefetch(read, rows_by_part(starts, rows), READ_AHEAD)]
    return pa.concat_tables(found).combine_chunks() if found else tables.read_table(uri_of(0), columns).slice(0, 0)


def features_at(run: Run, starts: list[int], transform: SpaceTransforms, rows: np.ndarray) -> np.ndarray:
    """Return Float32[n D], the features of some rows, Int64[n] sorted; only the parts that hold them are read."""
    parts = rows_by_part(starts, rows)
    return np.concatenate([transform(part_embeddings(run, part, transform.transforms)[local]) for part, local in parts])


def part_clusters(run: Run, part: int) -> np.ndarray:
    """Return the clusters of the rows of one part, Int32[B]."""
    return tables.read_table(run.assignments(part), ["cluster"])["cluster"].to_numpy()


def all_clusters(run: Run, starts: list[int]) -> np.ndarray:
    """Return the clusters of all rows, Int32[N]."""
    clusters = np.empty(starts[-1], np.int32)
    for part, (start, stop) in enumerate(pairwise(starts)):
        clusters[start:stop] = part_clusters(run, part)
    return clusters


def cache_folder(digest: str) -> Path:
    """Return this user's folder on this node for the files of one training; see `scratch_folder`."""
    return scratch_folder() / "rows" / digest


def scratch_folder() -> Path:
    """Return this user's folder on this node, `RAYCLUST_SCRATCH` where it is set.

    Raises:
        ConfigError: it lies below the shared temporary folder, and other users own it or can write to it.
    """
    root = os.environ.get("RAYCLUST_SCRATCH")
    if root:
        return Path(root)
    path = Path(tempfile.gettempdir()) / f"rayclust-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"{path}: belongs to somebody else, or others may write there: set RAYCLUST_SCRATCH")
    return path


def drop_cache(digest: str) -> None:
    """Remove the files of one training from this node."""
    shutil.rmtree(cache_folder(digest), ignore_errors=True)
