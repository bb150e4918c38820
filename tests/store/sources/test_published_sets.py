"""Stand-ins of published data sets, laid out as docs/inputs.md says: what is read, and under which class."""

from __future__ import annotations

from collections import Counter

import pyarrow as pa
import pytest

from rayclust.errors import DataError
from rayclust.store.sources import plan_shards, read_records
from rayclust.store.sources.plan import read_classes
from tests.store.inputs import image, parquet, write

LAYOUTS: dict[str, tuple[list[str], dict[str, object], dict[str | None, int]]] = {
    "ImageNet": (
        [f"train/{wnid}/{wnid}_{i}.JPEG" for wnid in ("n01440764", "n01601694", "n02747177") for i in (1, 2)],
        {"classes": "imagenet-50"},
        {"n01601694": 2, "n02747177": 2},
    ),
    "ImageNet-Dogs": (
        ["train/n02085936/a.JPEG", "train/n02112137/b.JPEG", "val/n02112137/c.JPEG", "train/n01601694/d.JPEG"],
        {"classes": "imagenet-dogs"},
        {"n02085936": 1, "n02112137": 2},
    ),
    "Tiny ImageNet": (
        ["train/n02124075/images/n02124075_0.JPEG", "train/n02124075/n02124075_boxes.txt", "wnids.txt"],
        {},
        {"n02124075": 1},
    ),
    "DTD": (
        ["images/banded/banded_0002.jpg", "images/zigzagged/zigzagged_0064.jpg"],
        {},
        {"banded": 1, "zigzagged": 1},
    ),
    "UCF-101": (["Archery/v_Archery_g01_c01.jpg", "Archery/v_Archery_g01_c02.jpg"], {}, {"Archery": 2}),
    "COCO": (
        ["train2017/000000000009.jpg", "annotations/captions_train2017.json"],
        {"labels": "none"},
        {None: 1},
    ),
    "WikiArt": (
        ["Baroque/rembrandt_night-watch-1642.jpg", "Cubism/juan-gris_guitar.jpg", "style_class.txt"],
        {},
        {"Baroque": 1, "Cubism": 1},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_folders_of_published_sets(name: str, place: str) -> None:
    files, settings, classes = LAYOUTS[name]
    write(place, {file: image() if file.lower().endswith(("jpg", "jpeg")) else b"x" for file in files})
    found = [record for shard in plan_shards(place, **settings) for record in read_records(shard)]  # type: ignore[arg-type]
    assert Counter(record.label for record in found) == classes


def test_a_table_of_pictures_with_several_kinds_of_classes(place: str) -> None:
    """WikiArt as Hugging Face has it: a struct of bytes, and classes by number with their names in the schema."""
    pictures = pa.array([{"bytes": image(i), "path": f"{i}.jpg"} for i in range(3)])
    write(place, {"train.parquet": parquet({"image": pictures, "style": ["Baroque", "Cubism", "Cubism"]})})
    found = [record.label for shard in plan_shards(place, labels="style") for record in read_records(shard)]
    assert found == ["Baroque", "Cubism", "Cubism"]


def test_lists_of_published_subsets() -> None:
    sizes = {"imagenet-10": 10, "imagenet-dogs": 15, "imagenet-50": 50, "imagenet-100": 100, "imagenet-200": 200}
    lists = {name: read_classes(name) or frozenset() for name in sizes}
    assert {name: len(classes) for name, classes in lists.items()} == sizes
    assert lists["imagenet-50"] < lists["imagenet-100"] < lists["imagenet-200"]
    assert all(len(wnid) == 9 and wnid[0] == "n" and wnid[1:].isdigit() for each in lists.values() for wnid in each)


def test_an_unknown_subset_is_refused_with_those_that_are_known() -> None:
    known = "imagenet-10, imagenet-dogs, imagenet-50, imagenet-100, imagenet-200"
    with pytest.raises(DataError, match=f"imagenet-25: no such subset; known are {known}$"):
        read_classes("imagenet-25")
