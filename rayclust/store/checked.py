"""JSON that carries its own checksum: manifests and markers, whose damage would pass for truth."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from rayclust.errors import ArtefactError
from rayclust.store import filesystem

CHECKSUM = "checksum"
"""Key of the digest of everything else."""


def digest_of(value: Any) -> str:
    """The first 32 hexadecimal digits of the SHA-256 of a JSON-able value's canonical text."""
    text = json.dumps(json.loads(filesystem.canonical_json(value)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write(uri: str, content: dict[str, Any]) -> None:
    """Writes `content` with its checksum.

    Raises:
        DataError: it cannot be written.
    """
    filesystem.write_json(uri, content | {CHECKSUM: digest_of(content)})


def read(uri: str) -> dict[str, Any]:
    """What `write` was given; JSON without a checksum, of before there was one, is taken as it is.

    Raises:
        MissingError: there is no such file.
        ArtefactError: it is damaged.
    """
    content = filesystem.read_json(uri)
    checksum = content.pop(CHECKSUM, None) if isinstance(content, dict) else ""
    if checksum is not None and checksum != digest_of(content):
        raise ArtefactError(f"{uri}: is damaged (its checksum is another); remove it and run its stage again")
    found: dict[str, Any] = content
    return found
