from __future__ import annotations

import pickle

import pytest

from rayclust import errors
from rayclust.errors import ArtefactError, ConfigError, DataError, HeldError, RayclustError, ShapeError


@pytest.mark.parametrize(
    ("kind", "code"),
    [(RayclustError, 1), (ConfigError, 2), (DataError, 2), (ArtefactError, 2), (HeldError, 2), (ShapeError, 1)],
)
def test_a_users_mistake_ends_with_2_and_a_callers_with_1(kind: type[RayclustError], code: int):
    assert issubclass(kind, RayclustError)
    assert kind("line").exit_code == code


def test_errors_cross_process_borders_with_their_line():
    for kind in (ConfigError, DataError, ArtefactError, HeldError, ShapeError):
        again = pickle.loads(pickle.dumps(kind("photos: no such bucket")))  # noqa: S301 - as Ray sends it
        assert (type(again), str(again)) == (kind, "photos: no such bucket")


def test_wrong_values_are_value_errors_for_those_who_know_python_only():
    assert all(issubclass(kind, ValueError) for kind in (ConfigError, DataError, ShapeError))
    assert not issubclass(ArtefactError, ValueError)


def test_the_tree_at_the_top_of_the_module_names_every_error():
    named = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)]
    assert all(name in (errors.__doc__ or "") for name in named)
