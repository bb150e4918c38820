"""Why bytes did not become an image."""

from __future__ import annotations

from typing import Literal, get_args

from rayclust.errors import DataError

Reason = Literal[
    "empty",
    "too_large",
    "not_an_image",
    "unsupported",
    "truncated",
    "corrupt",
    "zero_size",
    "too_many_pixels",
    "bomb",
    "not_finite",
    "out_of_memory",
]
"""The words that stand in `rejects/` and in counts; they do not change between versions.

empty             no bytes
too_large         more bytes than `max_bytes`
not_an_image      text, HTML, an archive or something else that is no picture
unsupported       a picture or document of a format that is not read: SVG, PDF, HEIC, PSD, JPEG XL, video
truncated         the file ends before its picture does
corrupt           the bytes contradict their own format
zero_size         the header gives no pixels
too_many_pixels   the header declares more than `max_pixels`
bomb              metadata or scans that cost far more than a picture does
not_finite        a floating picture without one finite value
out_of_memory     the decoder could not get its memory
"""

REASONS: tuple[Reason, ...] = get_args(Reason)


class Undecodable(DataError):  # noqa: N818 - it reads as what the bytes are
    """Bytes that are no image, or not a whole one within the limits.

    Args:
        reason: one of `REASONS`.
        detail: what was seen, one line, the same on every run.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"
