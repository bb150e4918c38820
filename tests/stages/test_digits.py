from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from rayclust.runtime import datasets
from tests.stages.runs import files


def test_the_digits_are_written_the_same_every_time_and_as_they_are(tmp_path: Path):
    datasets.write_digits(str(tmp_path))
    before = files(tmp_path, "*.tar")
    datasets.write_digits(str(tmp_path))
    assert files(tmp_path, "*.tar") == before
    assert len(before) == datasets.SHARDS
    scans, seen = load_digits(), 0
    for data in before.values():
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in [name for name in members if name.endswith(".png")]:
            number = int(name[:6])
            assert members[f"{number:06d}.cls"] == str(scans.target[number]).encode()
            pixels = np.asarray(Image.open(io.BytesIO(members[name])))
            assert pixels.shape == (8 * datasets.SCALE, 8 * datasets.SCALE)
            np.testing.assert_allclose(
                pixels[:: datasets.SCALE, :: datasets.SCALE] / 255 * 16, scans.images[number], atol=0.04
            )
            seen += 1
    assert seen == len(scans.target) == 1797
