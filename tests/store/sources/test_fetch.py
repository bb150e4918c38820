from __future__ import annotations

import pytest

from rayclust.errors import DataError
from rayclust.store import filesystem
from rayclust.store.sources import fetch, fetch_many, plan_shards, read_records
from tests.store.inputs import gz, image, npy, parquet, samples, tar, vectors, write

INPUTS = {
    "folder": {"a#1/b%20 c.png": image(1), "x.tar#2.png": image(2)},
    "tar": {"d.v1/x.tar": tar([*samples(3), ("a#b.png", image(9))]), "y.tgz": gz(tar(samples(2)))},
    "parquet": {
        "x.parquet": parquet({"image": [image(i) for i in range(5)]}, groups=2),
        "y.parquet": parquet({"image": [{"bytes": image(7), "path": "p"}]}),
    },
}


@pytest.mark.parametrize("kind", INPUTS)
def test_every_record_is_found_again_by_its_uri(place: str, kind: str) -> None:
    write(place, INPUTS[kind])
    found = {r.uri: r.data for shard in plan_shards(place) for r in read_records(shard)}
    assert len(found) >= 2
    assert all(fetch(uri) == data for uri, data in found.items())
    assert dict(fetch_many([*found, *found])) == found


def test_what_is_not_there(place: str) -> None:
    write(place, INPUTS["tar"] | INPUTS["parquet"] | {"e.npy": npy(vectors(2)), "bad.parquet": b"x"})
    missing = ["none.png", "d.v1/x.tar#none.png", "none.tar#a.png", "x.parquet#99", "x.parquet#x", "e.npy#0"]
    missing += ["bad.parquet#0", "d.v1/x.tar#", "x.parquet#-1"]
    uris = [filesystem.join(place, name) for name in missing]
    assert dict(fetch_many(uris)) == dict.fromkeys(uris)
    for uri in uris:
        with pytest.raises(DataError, match="no such image"):
            fetch(uri)


def test_each_file_is_opened_once(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place, INPUTS["tar"])
    uris = [r.uri for shard in plan_shards(place) for r in read_records(shard)]
    opened = []
    open_whole = filesystem.open_whole
    monkeypatch.setattr(filesystem, "open_whole", lambda uri: (opened.append(uri), open_whole(uri))[1])
    assert all(data is not None for _, data in fetch_many(reversed(uris)))
    assert len(opened) == 2
