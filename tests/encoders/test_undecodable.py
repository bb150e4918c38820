from __future__ import annotations

import inspect
import pickle

import pytest

from rayclust.encoders import undecodable
from rayclust.encoders.undecodable import REASONS, Undecodable
from rayclust.errors import DataError


def test_it_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(Undecodable("empty", "0 bytes")))  # noqa: S301 - our own bytes
    assert (error.reason, error.detail, str(error)) == ("empty", "0 bytes", "empty: 0 bytes")


def test_it_is_an_error_of_the_data() -> None:
    with pytest.raises(DataError):
        raise Undecodable("corrupt", "x")


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_is_explained(reason: str) -> None:
    assert f"\n{reason} " in inspect.getsource(undecodable)
