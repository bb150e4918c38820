"""Webdataset tars: members that share a path up to the first dot of their name are one sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import BinaryIO

from rayclust.store import filesystem
from rayclust.store.filesystem import FileStat, UnreadableError
from rayclust.store.sources import tar
from rayclust.store.sources.labels import clean, folder_label, json_label, label_text
from rayclust.store.sources.shard import IMAGE_SUFFIXES, Record, Shard
from rayclust.store.sources.tar import Damage, TarMember
from rayclust.store.storage import is_hidden

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_SIDECARS = frozenset({"json", "txt", "cls"})
_SIDECAR_LIMIT = 1 << 20
"""Bytes read of a member that may hold a label."""


def plan(files: Iterable[FileStat], template: Shard) -> Iterator[Shard]:
    """One shard per tar of a listing, as the listing comes; `template` carries the settings that all share."""
    for file in files:
        suffix = next((suffix for suffix in TAR_SUFFIXES if file.key.lower().endswith(suffix)), None)
        if suffix is not None:
            name = file.key[: -len(suffix)]
            yield replace(template, kind="webdataset", uri=file.uri, name=name, stamp=file.stamp)


@dataclass(frozen=True)
class _Entry:
    """What one row or reject is made from."""

    key: str
    uri: str
    image: TarMember | None
    sidecars: dict[str, TarMember]
    """By suffix."""
    reason: str | None = None
    detail: str = ""


def read(shard: Shard, max_bytes: int) -> Iterator[Record]:
    """The images of a tar in order of key; what is damaged, doubled or without an image is a reject.

    A remote tar is fetched whole first.

    Raises:
        DataError: the storage as a whole cannot be read.
    """
    try:
        archive = filesystem.open_whole(shard.uri)
    except UnreadableError as error:
        yield from shard.rejects("unreadable_file", str(error))
        return
    with archive:
        plain, damage = tar.unpacked(archive)
        with plain:
            entries = _entries(shard, plain, damage)
            for entry in sorted(entries, key=lambda entry: (entry.key, entry.uri)):
                yield _record(shard, plain, entry, max_bytes)


def member_uri(archive: str, name: str) -> str:
    """The URI of a member of an archive."""
    return f"{archive}#{clean(name)}"


def _entries(shard: Shard, archive: BinaryIO, damage: Damage | None) -> list[_Entry]:
    samples: dict[str, list[tuple[str, TarMember]]] = {}
    entries = []
    for member in tar.members(archive):
        if isinstance(member, Damage):
            entries.append(_Entry(shard.name, shard.uri, None, {}, member.reason, member.detail))
        elif not is_hidden(member.name):
            key, suffix = _split(member.name)
            samples.setdefault(key, []).append((suffix, member))
    if damage is not None:
        # Said once, with the better reason.
        entries = [entry for entry in entries if entry.reason not in ("tar_truncated", "empty")]
        entries.append(_Entry(shard.name, shard.uri, None, {}, damage.reason, damage.detail))
    for key, sample in samples.items():
        entries += _sample(shard, clean(f"{shard.name}/{key}"), sample)
    return entries


def _split(name: str) -> tuple[str, str]:
    """Key and lower-case suffix of a member: its path up to the first dot of its last part, and what follows."""
    while name.startswith("./"):
        name = name[2:]
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _sample(shard: Shard, key: str, sample: list[tuple[str, TarMember]]) -> Iterator[_Entry]:
    """One row for the sample's image; images whose suffixes have dots are rows where no plain one exists."""
    images = [(suffix, member) for suffix, member in sample if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
    sidecars = {suffix: member for suffix, member in reversed(sample) if suffix not in IMAGE_SUFFIXES}
    plain = [(suffix, member) for suffix, member in images if "." not in suffix]
    if plain:
        chosen = min(plain, key=lambda image: IMAGE_SUFFIXES.index(image[0]))  # the first of equals
        for image in plain:
            uri = member_uri(shard.uri, image[1].name)
            if image is chosen:
                yield _Entry(key, uri, image[1], sidecars)
            else:
                yield _Entry(key, uri, None, sidecars, "duplicate_key", "another image in the archive has this key")
    elif images:
        yield from _dotted(shard, key, images, sidecars)
    elif not _SIDECARS.isdisjoint(sidecars):
        member = next(iter(sidecars.values()))
        found = ", ".join(sorted(sidecars))
        yield _Entry(
            key, member_uri(shard.uri, member.name), None, sidecars, "no_image", f"only {found} beside no image"
        )


def _dotted(
    shard: Shard, key: str, images: list[tuple[str, TarMember]], sidecars: dict[str, TarMember]
) -> Iterator[_Entry]:
    """Rows of images named like `scan.v2.jpg`: one alone has its sample's key, several keep what tells them apart."""
    seen = set()
    for suffix, member in images:
        uri = member_uri(shard.uri, member.name)
        name = key if len(images) == 1 else f"{key}.{suffix.rpartition('.')[0]}"
        if suffix in seen:
            yield _Entry(name, uri, None, sidecars, "duplicate_key", "another image in the archive has this name")
        else:
            yield _Entry(name, uri, member, sidecars)
        seen.add(suffix)


def _record(shard: Shard, archive: BinaryIO, entry: _Entry, max_bytes: int) -> Record:
    label = None if shard.label_source is None else _label(shard.label_source, archive, entry)
    if entry.reason is not None or entry.image is None:
        return Record.reject(entry.key, entry.uri, entry.reason or "no_image", clean(entry.detail), label)
    if entry.image.size > max_bytes:
        detail = f"{entry.image.size} bytes, above the bound of {max_bytes}"
        return Record.reject(entry.key, entry.uri, "too_large", detail, label)
    return Record(entry.key, entry.uri, _content(archive, entry.image, entry.image.size), label)


def _content(archive: BinaryIO, member: TarMember, limit: int) -> bytes:
    archive.seek(member.offset)
    return archive.read(min(member.size, limit))


def _label(source: str, archive: BinaryIO, entry: _Entry) -> str | None:
    """`auto` takes .cls, else a field of .json; a .txt is mostly a caption, so it must be asked for by its suffix."""
    if source == "folder":
        return folder_label(entry.uri.partition("#")[2])
    texts = {"cls"} if source == "auto" else {source} - {"json"}
    for suffix in texts & set(entry.sidecars):
        return label_text(_content(archive, entry.sidecars[suffix], _SIDECAR_LIMIT))
    if "json" in entry.sidecars:
        field = None if source in ("auto", "json") else source
        return json_label(_content(archive, entry.sidecars["json"], _SIDECAR_LIMIT), field)
    return None
