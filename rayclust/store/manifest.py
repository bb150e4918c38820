"""Manifests: inputs, outputs and counts of a stage; and its artefacts, written with their checksums and looked for.

A manifest is written last, so that a stage with one is complete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BufferedReader
from itertools import accumulate
from typing import Any, Literal, TypeVar, cast

import numpy as np
import pyarrow as pa
from pydantic import Field, ValidationError

from rayclust.errors import ArtefactError
from rayclust.settings import Config
from rayclust.store import storage, tables
from rayclust.store.run import Run, parts
from rayclust.store.storage import FileStat

logger = logging.getLogger(__name__)

Outputs = dict[str, dict[str, Any]]
"""Path below the run → {digest, size, stamp}."""
CHECKSUM = "checksum"
"""Key, in JSON that carries its own checksum, of the digest of everything else."""

_RECORDED = ("rayclust", "ray", "torch", "torchvision", "open_clip_torch", "timm", "numpy", "pyarrow", "faiss-cpu")


class Output(Config):
    """One file that a stage wrote."""

    digest: str
    """SHA-256 of its bytes, hexadecimal."""
    size: int = Field(ge=0)
    """Bytes."""
    stamp: str = ""
    """As `FileStat.stamp` had it when it was written; a file with another one is read to see whether it is the same."""


class Section(Config):
    """A group of workers while a stage ran: their number, wall time and work."""

    name: str
    """Name of their work."""
    workers: int = Field(ge=0)
    """Number of workers."""
    seconds: float = Field(ge=0)
    """Wall time that the group was there for."""
    busy: dict[str, float] = Field(default_factory=dict)
    """Seconds of work by kind, summed over the workers."""
    done: float = Field(0, ge=0)
    """Units of work done in that time, without those that an earlier call had finished."""
    unit: str = "rows"
    """Name of the unit."""


class StageOutputs(Config):
    """Results of a stage beside counts and files; the base class is for stages without any.

    Only fields that were set are written (`exclude_unset`), so that a manifest keeps its bytes when a field is added.
    """


class PackedMoments(Config):
    """Count, sum and sum of squares of rows."""

    count: int = Field(ge=0)
    """N."""
    total: str
    """Float64[D], little-endian, in base64."""
    squares: str
    """Float64[D], little-endian, in base64."""


class EncodedSpace(Config):
    """One of the spaces of a run with several encoders."""

    name: str
    dimension: int = Field(ge=1)
    """D."""


class EncodeOutputs(StageOutputs):
    """Of encode: the shape of the embeddings."""

    dimension: int = Field(ge=1)
    """D; of all spaces side by side, if there are several."""
    spaces: tuple[EncodedSpace, ...] = ()
    """In this order side by side; empty in a run with one encoder."""
    parts: tuple[int, ...]
    """Rows of each part."""
    test: tuple[int, ...] = ()
    """Rows of each part that are kept aside; empty in a run without a split."""
    moments: PackedMoments
    """Of all embeddings that are not kept aside, the spaces side by side."""
    reasons: dict[str, int]
    """Rejects by reason."""

    @property
    def starts(self) -> list[int]:
        """The row at which each part begins, and N at the end."""
        return [0, *accumulate(self.parts)]


class NeighborsOutputs(StageOutputs):
    """Of neighbors: how they were searched."""

    method: str
    """exact or ivf."""
    k: int = Field(ge=1)
    """Neighbours of each row."""
    recall: float | None = None
    """recall@k of inverted lists, 0 to 1, on a sample."""
    nlist: int | None = None
    """Inverted lists."""
    nprobe: int | None = None
    """Lists that a row is searched in."""
    halo: float | None = None
    """Rows read from other shards for each row."""


class CounterpartsOutputs(StageOutputs):
    """Of counterparts: the choice of nouns."""

    words: int = Field(ge=1)
    """Nouns to choose from."""
    centers: int = Field(ge=1)
    """Semantic centres that chose."""
    nouns: int = Field(ge=1)
    """Nouns that were chosen."""


class ChosenModel(Config):
    """The chosen candidate of select-k: all that train reads."""

    clusters: int = Field(ge=1)
    """K."""
    steps: int = Field(ge=0)
    """Of its training."""
    outputs: dict[str, str]
    """SHA-256 of each of its files, by path relative to the run."""


class SelectKOutputs(StageOutputs):
    """Of select-k: the choice."""

    chosen: ChosenModel
    rule: str
    """That decided."""
    reason: str
    """One line for people."""


class AssignOutputs(StageOutputs):
    """Of assign: the clusters' sizes, and how their confidence is calibrated."""

    sizes: tuple[int, ...]
    """Rows of each cluster."""
    calibration: dict[Literal["probabilities", "shares"], tuple[float, ...]] | None = None
    """From the method's probability to confidence, linear between these; None where confidence is the former."""
    levels: tuple[int, ...] = ()
    """Numbers of clusters of the coarser levels."""


class LabelOutputs(StageOutputs):
    """Of label: how certain images and names are. Without a vocabulary only the first two are set."""

    confidence: tuple[int, ...]
    """Images by confidence, in equal bins of [0, 1]."""
    mean_confidence: tuple[float | None, ...]
    """Of each cluster, 0 to 1; None for an empty one."""
    words: int | None = None
    """Words in the vocabulary."""
    voters: int | None = None
    """Images that voted."""
    true_names: bool | None = None
    """Whether the data set's own class names were among the words."""
    name_accuracy: float | None = None
    """Share of labelled images whose cluster carries their class's name; None without labels."""
    name_accuracy_without_classes: float | None = None
    """The same where the class names are left out of the words."""
    zero_shot_accuracy: float | None = None
    """Share of labelled images to which of all class names their own is nearest; None unless these are words."""


class CurateOutputs(StageOutputs):
    """Of curate: the search for near-duplicates."""

    epsilon: float
    """ε, as given or found for a share."""
    recall: float | None
    """Share of the near pairs of a sample that was found, 0 to 1; None where it has none, or was not measured."""


class MapOutputs(StageOutputs):
    """Of map: how it came about."""

    rows: int = Field(ge=1)
    """Rows that were laid out together; all others lie among these."""


class IndexOutputs(StageOutputs):
    """Of index: the index over the encoder's space, and over the method's own."""

    kind: str
    """flat or ivf."""
    recall: float | None
    """recall@10, 0 to 1; None where it was not measured."""
    z: IndexOutputs | None = None
    """Of the index over the method's own space."""
    spaces: dict[str, IndexOutputs] = Field(default_factory=dict)
    """Of the indexes over the spaces of a run with several encoders, but the first."""


AnyOutputs = TypeVar("AnyOutputs", bound=StageOutputs)


class Manifest(Config):
    """Inputs, outputs and counts of a stage; a stage with a manifest is complete."""

    stage: str
    """Name of the stage."""
    digest: str
    """Digest of the settings and inputs; work with the same digest need not be done again."""
    inputs: dict[str, str] = Field(default_factory=dict)
    """Digest of each input by name."""
    counts: dict[str, int] = Field(default_factory=dict)
    """Rows, rejects and whatever else the stage counts."""
    outputs: dict[str, Output] = Field(default_factory=dict)
    """Files written, by path relative to the run."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of Python and of the packages used."""
    seconds: float = Field(0.0, ge=0)
    """Wall time."""
    measured: tuple[Section, ...] = ()
    """Work and time of the call that completed the stage. Like `seconds` they differ from call to call and are in no
    digest."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """The JSON of the stage's `StageOutputs`."""

    def outputs_of(self, kind: type[AnyOutputs]) -> AnyOutputs:
        """Return the results of the stage.

        Args:
            kind: the stage's class.

        Raises:
            ArtefactError: the manifest does not hold it.
        """
        try:
            return kind.model_validate(self.extra)
        except ValidationError as error:
            wrong = ", ".join(".".join(map(str, each["loc"])) for each in error.errors())
            raise ArtefactError(
                f"the manifest of {self.stage} is of another version ({wrong}): "
                f"run `rayclust {self.stage} RUN.yaml --force`"
            ) from error


def digest_of(value: Any) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of a value as JSON on one line, keys sorted."""
    text = json.dumps(storage.as_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that decide about results."""
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_checked(uri: str, content: dict[str, Any]) -> None:
    """Write JSON with its own checksum: a manifest or mark, whose damage would pass for truth.

    Raises:
        DataError: it cannot be written.
    """
    storage.write_json(uri, content | {CHECKSUM: digest_of(content)})


def read_checked(uri: str) -> dict[str, Any]:
    """Return JSON that `write_checked` wrote; a file of earlier versions, without a checksum, is returned unchecked.

    Raises:
        MissingError: there is no such file.
        ArtefactError: it is damaged.
    """
    content = storage.read_json(uri)
    checksum = content.pop(CHECKSUM, None) if isinstance(content, dict) else ""
    if checksum is not None and checksum != digest_of(content):
        raise ArtefactError(f"{uri}: is damaged (its checksum is another); remove it and run its stage again")
    found: dict[str, Any] = content
    return found


def write_manifest(run: Run, manifest: Manifest) -> None:
    """Write the manifest of a stage, which marks it as complete; call it after everything else is written.

    Raises:
        DataError: it cannot be written.
    """
    write_checked(run.manifest(manifest.stage), manifest.model_dump(mode="json"))


def read_manifest(run: Run, stage: str) -> Manifest | None:
    """Return the manifest of a stage.

    Returns:
        None where there is none, or none that can be read: the work counts as not done.

    Raises:
        DataError: the storage cannot be read.
    """
    uri = run.manifest(stage)
    try:
        return Manifest.model_validate(read_checked(uri))
    except storage.MissingError:
        return None
    except (ArtefactError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        logger.warning("%s: is not a manifest (%s); the stage counts as not done", uri, reason)
        return None


def read_output(run: Run, stage: str, uri: str) -> bytes:
    """Return a file that a stage wrote, compared with its manifest: bits that turn on a disk change no stamp.

    Args:
        run: the run.
        stage: that wrote the file.
        uri: the file, below the run.

    Raises:
        MissingError: there is no such file.
        ArtefactError: its checksum is another than was written. A stage without a manifest is not compared.
    """
    manifest = read_manifest(run, stage)
    written = manifest.outputs.get(run.path(uri)) if manifest else None
    return read_unchanged(uri, written.digest if written else None, stage)


def read_json_output(run: Run, stage: str, uri: str) -> Any:
    """Return the value in a JSON file that a stage wrote; see `read_output`."""
    return storage.read_json(uri, read_output(run, stage, uri))


def read_unchanged(uri: str, digest: str | None, stage: str) -> bytes:
    """Return a file's bytes, whose SHA-256 must be `digest`, where it is known; `stage` makes the file.

    Raises:
        MissingError: there is no such file.
        ArtefactError: they have another.
    """
    data = storage.read_bytes(uri)
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise ArtefactError(
            f"{uri}: is damaged (its checksum is another than was written); "
            f"remove it and run `rayclust {stage} RUN.yaml`, which makes it again"
        )
    return data


def put_bytes(run: Run, uri: str, data: bytes) -> Outputs:
    """Write `data` at `uri`, which lies below the run."""
    stamp = storage.write_bytes(uri, data)
    return {run.path(uri): {"digest": hashlib.sha256(data).hexdigest(), "size": len(data), "stamp": stamp}}


def put_table(run: Run, uri: str, table: pa.Table) -> Outputs:
    """Write a table as Parquet at `uri`, which lies below the run."""
    return put_bytes(run, uri, tables.encode_table(table))


def put_json(run: Run, uri: str, value: Any) -> Outputs:
    """Write canonical JSON at `uri`, which lies below the run."""
    return put_bytes(run, uri, storage.canonical_json(value).encode())


def put_neighbors(
    run: Run, uris: Mapping[int, str], starts: Sequence[int], neighbors: np.ndarray, similarity: np.ndarray
) -> Outputs:
    """Write the neighbours of consecutive parts, a table for each.

    Args:
        run: the run.
        uris: of the tables, by part, such as `run.neighbors(part)`.
        starts: first row of each part of the run, and N.
        neighbors: Int[B M], neighbours of all rows of these parts.
        similarity: Float[B M], cosines; stored as float16.
    """
    outputs, first = Outputs(), starts[min(uris)]
    for part, uri in uris.items():
        start, stop = starts[part : part + 2]
        columns = [
            pa.array(np.arange(start, stop)),
            tables.fixed_list(neighbors[start - first : stop - first].astype(np.int64)),
            tables.fixed_list(similarity[start - first : stop - first].astype(np.float16)),
        ]
        outputs |= put_table(run, uri, pa.table(columns, schema=tables.NEIGHBORS(neighbors.shape[1])))
    return outputs


def drop_stale_parts(folder: str, count: int) -> None:
    """Remove the parts from `count` on from a folder of tables: readers take every part that is there."""
    for index, uri in parts(folder):
        if index >= count:
            storage.remove(uri)


def remove_damaged(run: Run, stages: Iterable[str], message: str) -> tuple[str, str]:
    """Remove the file that an error's message names if its checksum is not the manifest's, so that it is made again.

    Returns:
        URI of the file and name of the stage that writes it; "" and "" if no file of a complete stage is both named and
        damaged.
    """
    for stage in stages:
        manifest = read_manifest(run, stage)
        for path, written in manifest.outputs.items() if manifest else ():
            uri = run.at(path)
            if uri in message and _digest(uri) != written.digest:
                logger.warning("%s: is damaged, its checksum is another than was written: made again", uri)
                storage.remove(uri)
                return uri, stage
    return "", ""


@dataclass
class FileListing:
    """Files of a run as they are now; each folder is listed once, on first use.

    A file with the stamp of its manifest is taken as unchanged. One with another stamp, because it was copied or
    edited, is read and its digest decides.
    """

    run: Run
    _found: dict[str, dict[str, FileStat]] = field(default_factory=dict, init=False)
    """By folder of the run, its files by their path below it."""

    def has(self, path: str, written: Mapping[str, Any]) -> bool:
        """Return whether the file at `path` below the run is the one that was written; log a warning if not."""
        found = self.find(path)
        if found is None or found.size != written["size"]:
            fault = "is missing" if found is None else f"has {found.size:,} bytes instead of {written['size']:,}"
            logger.warning("%s: %s: made again", self.run.at(path), fault)
            return False
        if found.stamp == written.get("stamp") or _digest(found.uri) == written["digest"]:
            return True
        logger.warning("%s: is damaged, its checksum is another than was written: made again", self.run.at(path))
        return False

    def has_all(self, outputs: Outputs) -> bool:
        """Return whether every file of a mark or manifest is there as it was written."""
        return all(self.has(path, written) for path, written in outputs.items())

    def find(self, path: str) -> FileStat | None:
        """Return size and stamp of the file at `path` below the run; None if there is none."""
        folder, _, name = path.partition("/")
        if not name:
            return storage.stat(self.run.at(path))
        if folder not in self._found:
            files = storage.walk(self.run.at(folder), missing_ok=True)
            self._found[folder] = {file.key: file for file in files}
        return self._found[folder].get(name)


def _digest(uri: str) -> str:
    """Return the SHA-256 of a file, "" if it is missing."""
    try:
        with storage.open_input(uri) as file:
            return hashlib.file_digest(cast(BufferedReader, file), "sha256").hexdigest()
    except storage.MissingError:
        return ""
