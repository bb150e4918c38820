from __future__ import annotations

from rayclust.store import storage
from rayclust.store.run import PART, Run, parts


def test_names_of_artefacts() -> None:
    run = Run("s3://bucket/runs/photos")
    base = "s3://bucket/runs/photos/"
    assert run.embeddings(7) == base + "embeddings/part-00007.parquet"
    assert run.rejects(0) == base + "rejects/part-00000.parquet"
    assert run.neighbors(1) == base + "neighbors/part-00001.parquet"
    assert run.assignments(2) == base + "assignments/part-00002.parquet"
    assert run.clusters == base + "clusters.parquet"
    assert run.metrics == base + "metrics.json"
    assert run.selection == base + "selection.json"
    assert run.candidate(5) == base + "selection/k-00005"
    assert run.report == base + "report/index.html"
    assert run.model_folder == base + "model"
    assert run.index_folder == base + "index"
    assert run.checkpoints("abc") == base + "checkpoints/abc"
    assert run.manifest("train") == base + "manifests/train.json"
    assert run.mark(3) == base + "manifests/encode/part-00003.json"
    assert run.path(run.embeddings(7)) == "embeddings/part-00007.parquet"


def test_no_two_artefacts_share_a_place() -> None:
    run = Run("run")
    names = [run.config, run.lease, run.clusters, run.metrics, run.selection, run.report, run.rejects(0)]
    names += [run.embeddings(0), run.neighbors(0), run.assignments(0)]
    names += [run.model_folder, run.index_folder, run.checkpoints("x"), run.candidate(2), run.selection_fit]
    names += [run.manifest(stage) for stage in ("encode", "train")] + [run.mark(0)]
    assert len(names) == len(set(names))


def test_parts_come_by_number(place: str) -> None:
    for index in (0, 2, 10, 99_999, 100_000):
        storage.write_bytes(storage.join(place, PART.format(index)), b"")
    for other in ("part-x.parquet", "notes.txt", "part-00001.parquet.bak"):
        storage.write_bytes(storage.join(place, other), b"")
    assert [index for index, _ in parts(place)] == [0, 2, 10, 99_999, 100_000]
    assert dict(parts(place))[2] == storage.join(place, "part-00002.parquet")
    assert list(parts(storage.join(place, "none"))) == []
