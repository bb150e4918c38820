"""Folder trees of image files; the folder that a file lies in names its class."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

from rayclust.store import filesystem
from rayclust.store.filesystem import FileStat, MissingError, UnreadableError
from rayclust.store.manifest import digest_of
from rayclust.store.prefetch import prefetch
from rayclust.store.sources.labels import folder_label
from rayclust.store.sources.shard import IMAGE_SUFFIXES, Member, Record, Shard

log = logging.getLogger(__name__)

_REMOTE_READS = 16
"""Requests under way at once: one by one, latency would hold a worker at some 30 images a second."""


def is_image(key: str) -> bool:
    """Whether a file's name says that it holds an image."""
    return key.rpartition("/")[2].lower().rpartition(".")[2] in IMAGE_SUFFIXES and "." in key


def plan(files: Iterable[FileStat], template: Shard, shard_size: int) -> Iterator[Shard]:
    """Cuts the image files of a listing into shards, as the listing comes.

    Args:
        files: of a folder, in order of key.
        template: carries the folder's URI and the settings that all shards share; with `classes`, only files below a
            folder of one of these names are kept.
        shard_size: images per shard.
    """
    ignored, group = 0, list[FileStat]()
    template = replace(template, kind="folder")
    for file in files:
        if not is_image(file.key):
            ignored += 1
        elif template.wants(file.key, None):
            group.append(file)
        if len(group) == shard_size:
            yield _shard(template, group)
            group = []
    if group:
        yield _shard(template, group)
    if ignored:
        log.info("%s: %d files are not images by their names and were left out", template.uri, ignored)


def _shard(template: Shard, group: list[FileStat]) -> Shard:
    stamp = digest_of([[file.key, file.stamp] for file in group])
    members = tuple(Member(file.key, file.uri, file.size) for file in group)
    return replace(template, name=group[0].key.rpartition(".")[0], stamp=stamp, count=len(group), members=members)


def read(shard: Shard, max_bytes: int) -> Iterator[Record]:
    """The files of a folder shard, in order of key; what cannot be read is a reject.

    Raises:
        DataError: the storage as a whole cannot be read.
    """
    ahead = _REMOTE_READS if filesystem.is_remote(shard.uri) else 1
    for member, (data, reason, detail) in prefetch(lambda member: _read(member, max_bytes), shard.members, ahead):
        label = None if shard.label_source is None else folder_label(member.key)
        yield Record(member.key, member.uri, data, label, reason, detail)


def _read(member: Member, max_bytes: int) -> tuple[bytes | None, str | None, str]:
    if member.size > max_bytes:
        return None, "too_large", f"{member.size} bytes, above the bound of {max_bytes}"
    try:
        return filesystem.read_bytes(member.uri), None, ""
    except MissingError:
        return None, "missing", "the file was listed but cannot be opened"
    except UnreadableError as error:
        return None, "unreadable_file", str(error)
