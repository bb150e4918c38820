from __future__ import annotations

import pytest

from rayclust.errors import DataError
from rayclust.store.sources import Shard, plan_shards, read_records, read_rows
from tests.store.inputs import image, npy, parquet, tar, vectors, write


def test_images_and_rows_are_not_mixed_up(place: str) -> None:
    write(place, {"i/a.png": image(), "v/x.npy": npy(vectors(2))})
    (images,) = plan_shards(f"{place}/i")
    (rows,) = plan_shards(f"{place}/v")
    assert (images.has_embeddings, rows.has_embeddings) == (False, True)
    with pytest.raises(DataError, match="ready embeddings"):
        list(read_records(rows))
    with pytest.raises(DataError, match="holds images"):
        read_rows(images)


@pytest.mark.parametrize("form", ["folder", "webdataset", "parquet"])
def test_the_same_images_in_every_format(place: str, form: str) -> None:
    images = {f"n{i % 2}/{i}.png": image(i) for i in range(6)}
    table = parquet({"image": list(images.values()), "path": list(images)})
    files = {"folder": images, "webdataset": {"x.tar": tar(list(images.items()))}, "parquet": {"x.parquet": table}}
    write(place, files[form])
    (shard,) = plan_shards(place, labels="folder")
    found = list(read_records(Shard.from_json(shard.to_json())))
    assert [record.data for record in found] == [images[key] for key in sorted(images)]
    assert [record.label for record in found] == ["n0"] * 3 + ["n1"] * 3
    (shard,) = plan_shards(place, classes=["n1"], labels="none")
    kept = list(read_records(shard))
    assert [record.data for record in kept] == [image(i) for i in (1, 3, 5)]
    assert {record.label for record in kept} == {None}


def test_reading_stops_where_the_reader_does(place: str) -> None:
    write(place, {f"{i}.png": image(i) for i in range(100)})
    (shard,) = plan_shards(place)
    records = read_records(shard)
    assert next(iter(records)).key == "0.png"
    records.close()  # type: ignore[attr-defined]
