from __future__ import annotations

import hashlib
import logging

import numpy as np
import pytest

from rayclust.errors import ArtefactError
from rayclust.store import filesystem
from rayclust.store.layout import Run
from rayclust.store.manifest import (
    Manifest,
    Output,
    digest_of,
    read_json_output,
    read_manifest,
    read_output,
    seal,
    versions,
)

MANIFEST = Manifest(
    stage="encode",
    digest="d1",
    inputs={"images": "abc"},
    counts={"rows": 3},
    outputs={"embeddings/part-00000.parquet": Output(digest="e", size=5)},
    versions={"rayclust": "0.1.0"},
    seconds=1.5,
    extra={"reasons": {"empty": 1}},
)


def test_a_sealed_stage_is_read_back(place: str) -> None:
    run = Run(place)
    assert read_manifest(run, "encode") is None
    seal(run, MANIFEST)
    assert read_manifest(run, "encode") == MANIFEST
    assert read_manifest(run, "train") is None


def test_shards_are_sealed_one_by_one(place: str) -> None:
    run = Run(place)
    seal(run, MANIFEST, shard=4)
    assert read_manifest(run, "encode", shard=4) == MANIFEST
    assert read_manifest(run, "encode", shard=5) is None
    assert read_manifest(run, "encode") is None


def test_sealing_twice_gives_the_same_bytes(place: str) -> None:
    run = Run(place)
    seal(run, MANIFEST)
    first = filesystem.read_bytes(run.manifest("encode"))
    seal(run, Manifest.model_validate(MANIFEST.model_dump()))
    assert filesystem.read_bytes(run.manifest("encode")) == first


@pytest.mark.parametrize("content", [b"", b"{}", b'{"stage": 1', b"[]", b'{"stage": "encode", "digest": 3}', b"\xff"])
def test_a_damaged_manifest_counts_as_none_and_says_so(
    place: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(place)
    filesystem.write_bytes(run.manifest("encode"), content)
    with caplog.at_level(logging.WARNING):
        assert read_manifest(run, "encode") is None
    assert run.manifest("encode") in caplog.text


def test_a_digest_tells_values_apart_and_not_their_order() -> None:
    assert digest_of({"a": 1, "b": (2, 3)}) == digest_of({"b": [2, 3], "a": np.int64(1)})
    others = [{"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": None}, {"a": True}, {"b": 1}, [], {}]
    assert len({digest_of(value) for value in others}) == len(others)
    assert len(digest_of({})) == 32
    assert digest_of({"ü": 1}) == digest_of({"ü": 1})


def test_versions_name_what_decides_about_results() -> None:
    found = versions()
    assert {"python", "rayclust", "numpy", "pyarrow"} <= set(found)


def test_a_file_is_compared_with_its_checksum_while_it_is_read(place: str) -> None:
    run, data = Run(place), b'{"a": 1}'
    filesystem.write_bytes(run.metrics, data)
    assert read_output(run, "evaluate", run.metrics) == data, "nothing is sealed, nothing can be compared"
    output = Output(digest=hashlib.sha256(data).hexdigest(), size=len(data))
    seal(run, Manifest(stage="evaluate", digest="d", outputs={"metrics.json": output}))
    assert read_json_output(run, "evaluate", run.metrics) == {"a": 1}
    filesystem.write_bytes(run.metrics, b'{"a": 2}')
    with pytest.raises(
        ArtefactError, match=r"metrics.json: is damaged .* remove it and run `rayclust evaluate RUN.yaml`"
    ):
        read_json_output(run, "evaluate", run.metrics)
    filesystem.write_bytes(run.selection, b"no JSON")
    with pytest.raises(ArtefactError, match=r"selection.json: is not readable JSON"):
        read_json_output(run, "evaluate", run.selection)
