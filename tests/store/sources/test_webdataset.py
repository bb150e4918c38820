from __future__ import annotations

from typing import Any

import pytest

from rayclust.store.sources import Record, plan_shards, read_records
from tests.store.inputs import gz, image, tar, write


def records(place: str, members: list[tuple[str, bytes]], **settings: Any) -> list[Record]:
    write(place, {"x.tar": tar(members)})
    (shard,) = plan_shards(place, **settings)
    return list(read_records(shard))


def told(found: list[Record]) -> list[tuple[str, str | None]]:
    return [(record.key, record.reason) for record in found]


def test_samples_come_in_order_of_key_with_their_labels(place: str) -> None:
    members = [
        ("b.cls", b"1"), ("sub/a.jpeg", image(1)), ("b.JPG", image(2)), ("sub/a.json", b'{"label": "cat"}'),
        ("c.webp", image(3)), ("c.txt", b"a caption"), ("readme.md", b"x"),
    ]  # fmt: skip
    found = records(place, members)
    assert [(record.key, record.label) for record in found] == [("x/b", "1"), ("x/c", None), ("x/sub/a", "cat")]
    assert [record.data for record in found] == [image(2), image(3), image(1)]
    assert found[0].uri == f"{place}/x.tar#b.JPG"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ("auto", "cls"), ("cls", "cls"), ("txt", "txt"), ("json", "json"), ("breed", "pug"), ("deep.er", "yes"),
        ("none", None), ("folder", "dir"), ("nothing", None),
    ],
)  # fmt: skip
def test_labels_come_from_where_they_are_asked_for(place: str, labels: str, expected: str | None) -> None:
    content = b'{"label": "json", "breed": "pug", "deep": {"er": "yes"}}'
    members = [("dir/a.png", image()), ("dir/a.cls", b"cls"), ("dir/a.txt", b"txt"), ("dir/a.json", content)]
    (record,) = records(place, members, labels=labels)
    assert record.label == expected


def test_images_with_dots_in_their_suffix(place: str) -> None:
    masks = [("a.jpg", image(1)), ("a.mask.png", image(2))]
    assert told(records(place, masks)) == [("x/a", None)]
    scans = [("s.v1.jpg", image(1)), ("s.v2.jpg", image(2)), ("t.v1.jpg", image(3))]
    assert told(records(place, scans)) == [("x/s.v1", None), ("x/s.v2", None), ("x/t", None)]


def test_classes_are_picked_by_label_even_when_labels_are_not_kept(place: str) -> None:
    members = [
        (f"{i}.{suffix}", data) for i in range(4) for suffix, data in (("png", image(i)), ("cls", b"%d" % (i % 2)))
    ]
    found = records(place, members, classes=["1"], labels="none")
    assert [(record.key, record.label) for record in found] == [("x/1", None), ("x/3", None)]


def test_large_members_are_rejected_unread(place: str) -> None:
    write(place, {"x.tar": tar([("a.png", image()), ("b.png", bytes(3000))])})
    (shard,) = plan_shards(place)
    assert told(list(read_records(shard, max_bytes=2000))) == [("x/a", None), ("x/b", "too_large")]


def test_a_gzipped_archive_whatever_its_name(place: str) -> None:
    data = gz(tar([("a.png", image())]))
    write(place, {"1.tar.gz": data, "2.tgz": data, "3.tar": data})
    shards = list(plan_shards(place))
    assert [shard.name for shard in shards] == ["1", "2", "3"]
    assert [record.key for shard in shards for record in read_records(shard)] == ["1/a", "2/a", "3/a"]


def test_names_never_touch_the_disk(place: str) -> None:
    members = [("../../up.png", image(1)), ("/abs.png", image(2)), ("./dot.png", image(3)), ("a/../b.png", image(4))]
    assert told(records(place, members)) == [
        ("x/../../up", None),
        ("x//abs", None),
        ("x/a/../b", None),
        ("x/dot", None),
    ]


def test_a_file_that_is_gone_is_one_reject(place: str) -> None:
    from rayclust.store import filesystem

    write(place, {"x.tar": tar([])})
    (shard,) = plan_shards(place, "webdataset")
    filesystem.remove(shard.uri)
    assert told(list(read_records(shard))) == [("x", "unreadable_file")]
