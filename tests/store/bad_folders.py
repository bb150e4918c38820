"""Bad folders of images, and settings that fit no input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.store.bad_inputs import BadInput
from tests.store.inputs import gz, image, npy, parquet, tar, vectors

GOOD = {"cat/good.png": image(1)}


def cases() -> Iterator[BadInput]:
    yield from _files()
    yield from _names()
    yield from _nothing()
    yield from _settings()
    yield from _mixtures()


def _files() -> Iterator[BadInput]:
    png = image(5)
    for name, data in [
        ("empty", b""), ("page", b"<html></html>"), ("text", b"text"), ("half", png[: len(png) // 2]), ("gz", gz(png)),
        ("one_byte", b"\x89"), ("zeros", bytes(300)), ("svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ]:  # fmt: skip
        rows = ("cat/bad.jpg", "cat/good.png")
        yield BadInput(f"folder/{name}", lambda data=data: {"cat/bad.jpg": data, **GOOD}, rows, undecodable=rows[:1])
    yield BadInput("folder/wrong_extension", lambda: {"a.jpg": image(1), "b.gif": image(2, "JPEG")}, ("a.jpg", "b.gif"))


def _names() -> Iterator[BadInput]:
    for name, key in [
        ("no_extension", "image"), ("other_extension", "a.mp4"), ("hidden", ".a.png"), ("hidden_folder", ".git/a.png"),
        ("resource_fork", "__MACOSX/cat/._a.png"), ("thumbs", "Thumbs.db"), ("appended", "a.png.part"),
        ("notes", "a.txt"),
    ]:  # fmt: skip
        yield BadInput(f"folder/left_out_{name}", lambda key=key: {key: image(2), **GOOD}, ("cat/good.png",))
    for name, key in [
        ("upper_case", "A.PNG"), ("space", "a b .png"), ("percent", "a%20b%.png"), ("hash", "a#b.png"),
        ("plus", "a+b.png"),
        ("unicode", "ü/日本.png"), ("emoji", "\U0001f600.png"), ("brackets", "[a]*?.png"), ("quote", "a'\"b.png"),
        ("tar_folder", "a.tar#b/c.png"), ("dotted", "a.b.c.png"), ("dash", "-rf.png"), ("long", "n" * 240 + ".png"),
    ]:  # fmt: skip
        rows = tuple(sorted([key, "cat/good.png"], key=str.encode))
        yield BadInput(
            f"folder/name_{name}", lambda key=key: {key: image(2), **GOOD}, rows, settings={"format": "folder"}
        )


def _nothing() -> Iterator[BadInput]:
    yield BadInput("nothing/no_such_folder", dict, error="no such")
    yield BadInput("nothing/only_text", lambda: {"a.txt": b"x"}, error="holds no images")
    yield BadInput("nothing/only_hidden", lambda: {".a.png": image()}, error="holds no images")
    yield BadInput("nothing/only_labels", lambda: {"labels.npy": npy(vectors(3))}, error="holds no images")


def _settings() -> Iterator[BadInput]:
    def case(name: str, error: str, **settings: Any) -> BadInput:
        return BadInput(f"settings/{name}", lambda: GOOD, error=error, settings=settings)

    yield case("format_unknown", r"images\.format = zip", format="zip")
    yield case("format_of_another_input", "in the format webdataset", format="webdataset")
    yield case("shard_size", r"images\.shard_size = 0", shard_size=0)
    yield case("labels_of_a_table", r"images\.labels = breed", labels="breed")
    yield case("classes_not_there", "in the 1 classes asked for", classes=["dog"])
    yield case("classes_empty", "names no class", classes=[])
    yield case("classes_file_missing", "no such file", classes="/no/such/list.txt")
    yield BadInput("settings/some_classes", lambda: GOOD, ("cat/good.png",), settings={"classes": ["cat", "dog"]})


def _mixtures() -> Iterator[BadInput]:
    archive = {"x.tar": tar([("a.png", image())])}
    table = {"x.parquet": parquet({"image": [image()]})}

    def case(name: str, *parts: Mapping[str, bytes]) -> BadInput:
        files = {key: data for part in parts for key, data in part.items()}
        return BadInput(f"mixed/{name}", lambda: files, error=r"set images\.format")

    yield case("images_and_tars", GOOD, archive)
    yield case("images_and_tables", GOOD, table)
    yield case("tars_and_tables", archive, table)
    yield BadInput("mixed/told", lambda: GOOD | archive, ("x/a",), settings={"format": "webdataset"})
