"""Folder trees of image files; the folder that a file lies in names its class."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain

from rayclust.store import storage
from rayclust.store.manifest import digest_of
from rayclust.store.sources.base import (
    DECODED_SUFFIXES,
    RAW_SUFFIXES,
    TOO_LARGE,
    Member,
    Record,
    Shard,
    folder_label,
    log_once,
)
from rayclust.store.storage import CLOSED_FOLDER, FileStat, MissingError, UnreadableError, prefetch

log = logging.getLogger(__name__)

_CONCURRENT_READS = 16
"""Remote requests in flight: one by one, latency would hold a worker at some 30 images a second."""


def plan(files: Iterable[FileStat], template: Shard, shard_size: int) -> Iterator[Shard]:
    """Cut the image files of a listing by order of key into shards of `shard_size` images, as the listing comes.

    The template carries the folder's URI and what all shards share; with `classes`, only files below a folder of one of
    these names are kept, and those of which there is no file are named at the end.
    """
    classes = frozenset(template.classes or ())
    group, absent, has_any = list[FileStat](), set(classes), False
    for file in chain(_without_developed(files, template.uri), [None]):  # None closes the last shard
        if file is not None and (template.selects(file.key, None) or file.size == CLOSED_FOLDER):
            group.append(file)
            absent.difference_update(file.key.split("/")[:-1])
        if len(group) == shard_size or (group and file is None):
            stamp = digest_of([[each.key, each.stamp] for each in group])
            members = tuple(Member(each.key, each.uri, each.size) for each in group)
            name = group[0].key.rpartition(".")[0]
            yield replace(template, kind="folder", name=name, stamp=stamp, count=len(group), members=members)
            group, has_any = [], True
    if absent and has_any:
        few = f"{len(absent):,} of {len(classes):,} classes, such as {min(absent)}"
        log_once(logging.WARNING, f"{template.uri}: no image of {few} in images.classes")


def _without_developed(files: Iterable[FileStat], root: str) -> Iterator[FileStat]:
    """Leave out a camera's raw file where a picture of the same name lies beside it, and say so once.

    The two follow each other in order of key, but for files whose names go on behind the same word and a dot: only
    those are held.
    """
    held, left_out, example = list[FileStat](), 0, ""
    for file in chain(files, [None]):  # None lets the last go
        if held and (file is None or not file.key.startswith(_stem(held[0].key) + ".")):
            pictures = {_stem(each.key) for each in held if each.key.lower().rpartition(".")[2] in DECODED_SUFFIXES}
            for each in held:
                if each.key.lower().endswith(RAW_SUFFIXES) and _stem(each.key) in pictures:
                    left_out, example = left_out + 1, example or each.key
                else:
                    yield each
            held = []
        if file is not None:
            held.append(file)
    if left_out:
        words = "cameras' raw files, such as %s, lie beside pictures of the same name and were left out"
        log.info(f"%s: %d {words}", root, left_out, example)


def _stem(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return folder + slash + (name.rpartition(".")[0] or name)


def read(shard: Shard, max_bytes: int) -> Iterator[Record]:
    """Read the files of a folder shard in order of key, as `sources.read_records`; a remote input's several at once."""

    def read_member(member: Member) -> Record:
        label = None if shard.label_source is None else folder_label(member.key)
        reject = partial(Record, member.key, member.uri, None, label)
        if member.size == CLOSED_FOLDER:
            return reject("unreadable_folder", "permission denied to list it; what it holds is not known")
        if member.size > max_bytes:
            return reject("too_large", TOO_LARGE.format(member.size, max_bytes))
        try:
            return Record(member.key, member.uri, storage.read_bytes(member.uri), label)
        except MissingError:
            return reject("missing", "the file was listed but cannot be opened")
        except UnreadableError as error:
            return reject("unreadable_file", str(error))

    ahead = _CONCURRENT_READS if storage.is_remote(shard.uri) else 1
    for _, record in prefetch(read_member, shard.members, ahead):
        yield record
