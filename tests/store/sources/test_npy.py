from __future__ import annotations

import numpy as np
import pytest

from rayclust.errors import DataError
from rayclust.store.sources.npy import DamagedError, read_header, read_rows
from tests.store.inputs import npy, write


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4", "i1", "<u8", "U5"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_every_type_and_order(place: str, dtype: str, order: str) -> None:
    array = np.asarray(np.arange(60).reshape(20, 3).astype(dtype), order=order)  # type: ignore[call-overload]
    uri = f"{write(place, {'x.npy': npy(array)})}/x.npy"
    assert read_header(uri).shape == (20, 3)
    for start, count in ((0, None), (0, 20), (5, 7), (18, 9), (20, 3)):
        stop = None if count is None else start + count
        assert np.array_equal(read_rows(uri, start, count), array[start:stop])


def test_vectors_and_nothing(place: str) -> None:
    write(place, {"v.npy": npy(np.arange(9)), "n.npy": npy(np.zeros((0, 4))), "s.npy": npy(np.array(3))})
    assert read_rows(f"{place}/v.npy", 2, 3).tolist() == [2, 3, 4]
    assert read_rows(f"{place}/n.npy").shape == (0, 4)
    with pytest.raises(DataError, match="single number"):
        read_rows(f"{place}/s.npy")


def test_a_cut_file_keeps_its_whole_rows(place: str) -> None:
    array = np.arange(30, dtype=np.float32).reshape(10, 3)
    data = npy(array)
    write(place, {"x.npy": data[:-30], "f.npy": npy(np.asfortranarray(array))[:-1]})
    assert np.array_equal(read_rows(f"{place}/x.npy"), array[:7])
    assert np.array_equal(read_rows(f"{place}/x.npy", 5, 5), array[5:7])
    with pytest.raises(DamagedError):
        read_rows(f"{place}/f.npy")


@pytest.mark.parametrize(
    "data", [b"", b"\x93NUMPY", b"x" * 200, npy(np.zeros(3))[:20], b"\x93NUMPY\x09\x00" + bytes(90)]
)
def test_what_is_no_npy_file(place: str, data: bytes) -> None:
    write(place, {"x.npy": data})
    with pytest.raises(DamagedError):
        read_header(f"{place}/x.npy")


def test_objects_are_never_unpickled(place: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (pytest.fail, ("unpickled",))

    write(place, {"x.npy": npy(np.array([Trap(), 1], dtype=object), allow_pickle=True)})
    with pytest.raises(DataError, match="Python objects"):
        read_rows(f"{place}/x.npy")
    write(place, {"x.npy": npy(np.zeros(3, [("a", "f4"), ("b", "i4")]))})
    with pytest.raises(DataError, match="records of 2 fields"):
        read_rows(f"{place}/x.npy")
