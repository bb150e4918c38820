"""Images that need no download: scikit-learn's scanned digits, written as webdataset shards."""

from __future__ import annotations

import io
import tarfile

import numpy as np
from PIL import Image

from rayclust.store import filesystem

SHARDS = 6
"""Tar files that the digits are spread over."""
SCALE = 4
"""Each of the 8 × 8 scanned values becomes a square of so many pixels, so that a person can see the digit."""


def write_digits(folder: str) -> None:
    """Writes scikit-learn's 1,797 scanned digits as webdataset shards of PNG images with their classes.

    The same bytes on every call, so that a second demo finds its work done.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    for shard in range(SHARDS):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard, len(digits.target), SHARDS):
                _add(tar, f"{number:06d}.png", _png(digits.images[number]))
                _add(tar, f"{number:06d}.cls", str(int(digits.target[number])).encode())
        filesystem.write_bytes(filesystem.join(folder, f"digits-{shard:02d}.tar"), buffer.getvalue())


def _png(values: np.ndarray) -> bytes:
    """White on black, as in most collections of digits; values 0 to 16 become 0 to 255."""
    pixels = np.kron(np.round(values * (255 / 16)).astype(np.uint8), np.ones((SCALE, SCALE), np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
