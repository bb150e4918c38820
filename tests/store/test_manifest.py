from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayclust.errors import ArtefactError
from rayclust.store import storage
from rayclust.store.manifest import (
    AssignOutputs,
    EncodeOutputs,
    IndexOutputs,
    LabelOutputs,
    Manifest,
    NeighborsOutputs,
    Output,
    SelectKOutputs,
    StageOutputs,
    digest_of,
    read_checked,
    read_json_output,
    read_manifest,
    read_output,
    versions,
    write_checked,
    write_manifest,
)
from rayclust.store.run import Run

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
    write_manifest(run, MANIFEST)
    assert read_manifest(run, "encode") == MANIFEST
    assert read_manifest(run, "train") is None


def test_writing_twice_gives_the_same_bytes(place: str) -> None:
    run = Run(place)
    write_manifest(run, MANIFEST)
    first = storage.read_bytes(run.manifest("encode"))
    write_manifest(run, Manifest.model_validate(MANIFEST.model_dump()))
    assert storage.read_bytes(run.manifest("encode")) == first


@pytest.mark.parametrize("content", [b"", b"{}", b'{"stage": 1', b"[]", b'{"stage": "encode", "digest": 3}', b"\xff"])
def test_a_damaged_manifest_counts_as_none_and_says_so(
    place: str, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run(place)
    storage.write_bytes(run.manifest("encode"), content)
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
    storage.write_bytes(run.metrics, data)
    assert read_output(run, "evaluate", run.metrics) == data, "nothing is sealed, nothing can be compared"
    output = Output(digest=hashlib.sha256(data).hexdigest(), size=len(data))
    write_manifest(run, Manifest(stage="evaluate", digest="d", outputs={"metrics.json": output}))
    assert read_json_output(run, "evaluate", run.metrics) == {"a": 1}
    storage.write_bytes(run.metrics, b'{"a": 2}')
    with pytest.raises(
        ArtefactError, match=r"metrics.json: is damaged .* remove it and run `rayclust evaluate RUN.yaml`"
    ):
        read_json_output(run, "evaluate", run.metrics)
    storage.write_bytes(run.selection, b"no JSON")
    with pytest.raises(ArtefactError, match=r"selection.json: is not readable JSON"):
        read_json_output(run, "evaluate", run.selection)


def test_checked_json_comes_back_as_it_was_given(place: str) -> None:
    content = {"a": [1, 2.5, None, "ü"], "b": {"c": True}}
    write_checked(f"{place}/x.json", content)
    assert read_checked(f"{place}/x.json") == content


def test_every_changed_character_is_found(tmp_path: Path) -> None:
    uri = str(tmp_path / "x.json")
    content = {"digest": "ab", "moments": "AAAA", "rows": 10}
    write_checked(uri, content)
    whole = storage.read_bytes(uri)
    for i, byte in enumerate(whole):
        for other in (byte ^ 1, ord("7")):
            damaged = whole[:i] + bytes([other]) + whole[i + 1 :]
            if damaged == whole or damaged.split() == whole.split():
                continue  # another blank means the same
            Path(uri).write_bytes(damaged)
            try:
                found = read_checked(uri)
            except ArtefactError:
                continue
            assert {key: found[key] for key in content} == content  # it hit the name of the checksum


@pytest.mark.parametrize("content", ["[]", "3", "{", '{"a": 1, "checksum": "x"}', '{"checksum": 3}'])
def test_json_without_its_checksum_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ArtefactError):
        read_checked(str(tmp_path / "x.json"))


def test_json_of_before_there_were_checksums_is_taken(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert read_checked(str(tmp_path / "x.json")) == {"a": 1}


MOMENTS = {"count": 3, "total": "AAAAAAAA8D8=", "squares": "AAAAAAAA8D8="}


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        (EncodeOutputs, {"dimension": 1, "parts": [2, 1], "moments": MOMENTS, "reasons": {"empty": 1}}),
        (NeighborsOutputs, {"method": "exact", "k": 5}),
        (NeighborsOutputs, {"method": "ivf", "k": 5, "recall": 0.99, "nlist": 4, "nprobe": 2, "halo": 0.5}),
        (
            SelectKOutputs,
            {"chosen": {"clusters": 3, "steps": 0, "outputs": {"a": "d"}}, "rule": "vote", "reason": "why"},
        ),
        (AssignOutputs, {"sizes": [2, 1]}),
        (AssignOutputs, {"sizes": [2, 1], "levels": [1]}),
        (LabelOutputs, {"confidence": [0, 3], "mean_confidence": [0.5, None]}),
        (
            LabelOutputs,
            {"confidence": [3], "mean_confidence": [0.5], "words": 9, "voters": 3, "true_names": False}
            | {"name_accuracy": None, "name_accuracy_without_classes": 0.5},
        ),
        (IndexOutputs, {"kind": "flat", "recall": None}),
        (IndexOutputs, {"kind": "flat", "recall": None, "z": {"kind": "ivf", "recall": 0.98}}),
        (StageOutputs, {}),
    ],
)
def test_typed_outputs_are_written_as_the_same_json(
    place: str, kind: type[StageOutputs], extra: dict[str, Any]
) -> None:
    run = Run(place)
    write_manifest(run, Manifest(stage="x", digest="d", extra=extra))
    before = storage.read_bytes(run.manifest("x"))
    sealed = read_manifest(run, "x")
    assert sealed is not None
    found = sealed.outputs_of(kind)
    write_manifest(run, Manifest(stage="x", digest="d", extra=found.model_dump(mode="json", exclude_unset=True)))
    assert storage.read_bytes(run.manifest("x")) == before


def test_a_manifest_of_another_version_says_what_to_do() -> None:
    with pytest.raises(ArtefactError, match=r"manifest of assign .*\(sizes\): run `rayclust assign RUN.yaml --force`"):
        Manifest(stage="assign", digest="d", extra={}).outputs_of(AssignOutputs)
