"""Manifests: what a stage read, wrote and counted. Written last, so that its presence means the stage is whole."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import platform
from typing import Any

from pydantic import Field, ValidationError

from rayclust.errors import ArtefactError
from rayclust.settings import Config
from rayclust.store import checked, filesystem
from rayclust.store.layout import Run

log = logging.getLogger(__name__)

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
    """A group of workers while a stage ran: how many, for how long, and what they were busy with."""

    name: str
    """What they did."""
    workers: int = Field(ge=0)
    """How many there were."""
    seconds: float = Field(ge=0)
    """Wall time that the group was there for."""
    busy: dict[str, float] = Field(default_factory=dict)
    """Seconds of work by kind, summed over the workers."""
    done: float = Field(0, ge=0)
    """Units of work done in that time; what an earlier call had finished is left out."""
    unit: str = "rows"
    """What is counted."""


class Manifest(Config):
    """The seal of a stage, or of one input shard within it."""

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
    """Versions of what did the work."""
    seconds: float = Field(0.0, ge=0)
    """Wall time."""
    measured: tuple[Section, ...] = ()
    """Where the time went in the call that sealed the stage. Like `seconds` it differs from call to call, and enters no
    digest."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """What only this stage has to say."""


def digest_of(value: Any) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of a JSON-able value's canonical text."""
    return checked.digest_of(value)


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide about results."""
    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def seal(run: Run, manifest: Manifest, shard: int | None = None) -> None:
    """Writes the manifest of a stage, or of input shard `shard` of it; call it after everything else is written.

    Raises:
        DataError: it cannot be written.
    """
    checked.write(_uri(run, manifest.stage, shard), manifest.model_dump(mode="json"))


def read_manifest(run: Run, stage: str, shard: int | None = None) -> Manifest | None:
    """The manifest of a stage, or of one shard of it.

    Returns:
        None where there is none, or none that can be read: the work counts as not done.

    Raises:
        DataError: the storage cannot be read.
    """
    uri = _uri(run, stage, shard)
    try:
        return Manifest.model_validate(checked.read(uri))
    except filesystem.MissingError:
        return None
    except (ArtefactError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        log.warning("%s: is not a manifest (%s); the work that it sealed counts as not done", uri, reason)
        return None


def read_output(run: Run, stage: str, uri: str) -> bytes:
    """A file that a stage wrote, compared with its manifest: bits that turn on a disk change no stamp.

    Args:
        run: the run.
        stage: who wrote the file.
        uri: the file, below the run.

    Raises:
        MissingError: there is no such file.
        ArtefactError: its checksum is another than was written. Where the stage is not sealed, nobody can tell.
    """
    sealed = read_manifest(run, stage)
    written = sealed.outputs.get(run.path(uri)) if sealed else None
    return read_unchanged(uri, written.digest if written else None, stage)


def read_json_output(run: Run, stage: str, uri: str) -> Any:
    """The value in a JSON file that a stage wrote; see `read_output`."""
    return filesystem.parse_json(read_output(run, stage, uri), uri)


def read_unchanged(uri: str, digest: str | None, stage: str) -> bytes:
    """A file's bytes, whose SHA-256 must be `digest`, where it is known; `stage` makes the file.

    Raises:
        MissingError: there is no such file.
        ArtefactError: they have another.
    """
    data = filesystem.read_bytes(uri)
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise ArtefactError(
            f"{uri}: is damaged (its checksum is another than was written); "
            f"remove it and run `rayclust {stage} RUN.yaml`, which makes it again"
        )
    return data


def _uri(run: Run, stage: str, shard: int | None) -> str:
    return run.manifest(stage) if shard is None else run.shard_manifest(shard, stage)
