"""Bad arrays and tensors of embeddings."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.store.bad_inputs import BadInput
from tests.store.bad_tables import rows
from tests.store.inputs import image, npy, parquet, vectors

VALUES = vectors(4, 3)


def cases() -> Iterator[BadInput]:
    yield from _arrays()
    yield from _damaged()
    yield from _labels()
    yield from _tensors()


def _arrays() -> Iterator[BadInput]:
    for name, array, error in [
        ("one_axis", np.arange(5.0), r"shape \(5,\)"), ("three_axes", np.zeros((2, 2, 2)), r"shape \(2, 2, 2\)"),
        ("no_width", np.zeros((4, 0)), r"shape \(4, 0\)"), ("one_number", np.array(1.0), r"shape \(\)"),
        ("complex", VALUES.astype(complex), "complex"), ("text", VALUES.astype(str), "real numbers"),
        ("booleans", VALUES > 0, "bool"), ("records", np.zeros(3, [("a", "f4")]), "records"),
        ("dates", np.zeros((2, 2), "M8[s]"), "real numbers"),
    ]:  # fmt: skip
        yield BadInput(f"array/{name}", lambda array=array: {"x.npy": npy(array)}, error=error)
    objects = npy(np.array([[1, {}]], dtype=object), allow_pickle=True)
    yield BadInput("array/objects", lambda: {"x.npy": objects}, error="Python objects")
    odd = VALUES.astype(np.float64)
    odd[1, 0], odd[2], odd[3, 2] = np.nan, 0, 1e39
    lost = tuple(zip(rows("x", 1, 2, 3), ("not_finite", "zero_vector", "overflow"), strict=True))
    yield BadInput("array/bad_rows", lambda: {"x.npy": npy(odd)}, rows("x", 0), lost)
    for name, array in [
        ("big_endian", VALUES.astype(">f8")), ("fortran", np.asfortranarray(VALUES)),
        ("whole_numbers", np.ones((4, 3), int)),
    ]:  # fmt: skip
        yield BadInput(f"array/{name}", lambda array=array: {"x.npy": npy(array)}, rows("x", 0, 1, 2, 3))
    widths = {"x.npy": npy(VALUES), "y.npy": npy(vectors(1, 5))}
    yield BadInput("array/another_width", lambda: widths, rows("x", 0, 1, 2, 3), (("y/00000000", "wrong_width"),))


def _damaged() -> Iterator[BadInput]:
    whole = npy(VALUES)
    for name, data in [
        ("empty_file", b""), ("text", b"1 2 3\n"), ("magic_only", whole[:6]), ("half_a_header", whole[:60]),
        ("noise", np.random.default_rng(0).bytes(300)), ("image", image()), ("pickle", pickle.dumps([1.0])),
        ("absurd_width", whole.replace(b"(4, 3), }" + b" " * 9, b"(4, 9999999999), }", 1)),
        ("negative", whole.replace(b"(4, 3), }", b"(4,-3), }", 1)),
        ("version", whole[:6] + b"\x09" + whole[7:]), ("header_code", whole.replace(b"'<f4'", b"exit(", 1)),
    ]:  # fmt: skip
        files = {"x.npy": data, "y.npy": whole}
        lost = (("x", "unreadable_file"),)
        yield BadInput(f"array/damaged_{name}", lambda files=files: files, rows("y", 0, 1, 2, 3), lost)
    absurd = whole.replace(b"(4, 3), }" + b" " * 15, b"(4000000000000000, 3), }", 1)
    yield BadInput("array/absurd_rows", lambda: {"x.npy": absurd}, rows("x", 0, 1, 2, 3), (("x", "truncated"),))
    for cut, kept in ((1, 3), (12, 3), (13, 2), (48, 0)):
        files = {"x.npy": whole[:-cut], "y.npy": whole}
        keys = rows("x", *range(kept)) + rows("y", 0, 1, 2, 3)
        yield BadInput(f"array/cut_{cut:02d}", lambda files=files: files, keys, (("x", "truncated"),))


def _labels() -> Iterator[BadInput]:
    for name, labels, error in [
        ("too_few", npy(np.arange(3)), "3 labels for the 4 rows"), ("too_many", npy(np.arange(9)), "9 labels"),
        ("one_hot", npy(np.eye(4)), "one label per row"), ("no_npy", b"0 1 2 3", "no readable npy file"),
        ("objects", npy(np.array([{}] * 4), allow_pickle=True), "Python objects"), ("one", npy(np.array(3)), "labels"),
    ]:  # fmt: skip
        files = {"x.npy": npy(VALUES), "labels.npy": labels}
        yield BadInput(f"array/labels_{name}", lambda files=files: files, error=error)
        yield BadInput(
            f"array/labels_{name}_unused", lambda files=files: files, rows("x", 0, 1, 2, 3), settings={"labels": "none"}
        )
    for name, array in [("fractions", np.array([0.5, np.nan, 1, -1])), ("text", np.array(["a", "", "b", "c"]))]:
        files = {"x.npy": npy(VALUES), "labels.npy": npy(array)}
        yield BadInput(f"array/labels_{name}", lambda files=files: files, rows("x", 0, 1, 2, 3))
    clip = {"img_emb/img_emb_0.npy": npy(VALUES), "metadata/metadata_0.parquet": parquet({"key": ["a"]})}
    yield BadInput("array/metadata_too_short", lambda: clip, error="1 lines for the 4 rows")
    broken = clip | {"metadata/metadata_0.parquet": b"PAR1"}
    yield BadInput("array/metadata_damaged", lambda: broken, error=r"metadata_0\.parquet: cannot be read")


def saved(value: Any) -> bytes:
    """A file as torch writes it."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code from a data file ran')",))


def _tensors() -> Iterator[BadInput]:
    import torch

    values = torch.from_numpy(VALUES)
    for name, data, error in [
        ("empty_file", b"", "empty"), ("text", b"no tensor", "neither"), ("cut", saved(values)[:300], "."),
        ("code", saved({"embeddings": values, "x": Trap()}), "exec"), ("pickle", pickle.dumps(Trap()), "."),
        ("no_matrix", saved({"a": values[0]}), "no tensor `embeddings`"), ("two", saved([values, values]), "no tensor"),
        ("one_axis", saved(values[0]), "no tensor"), ("nothing", saved({}), "no tensors"),
        ("labels", saved({"embeddings": values, "labels": torch.arange(3)}), "one label per row"),
        ("booleans", saved(values > 0), "real numbers"),
    ]:  # fmt: skip
        yield BadInput(f"tensor/{name}", lambda data=data: {"x.pt": data}, error=error)
    odd = values.clone()
    odd[1, 0] = float("nan")
    for name, value in [
        ("nan", odd),
        ("bfloat16", odd.bfloat16()),
        ("listed", [odd, torch.arange(4)]),
        ("with_gradient", torch.nn.Parameter(odd)),
    ]:
        lost = (("x/00000001", "not_finite"),)
        yield BadInput(f"tensor/{name}", lambda value=value: {"x.pt": saved(value)}, rows("x", 0, 2, 3), lost)
