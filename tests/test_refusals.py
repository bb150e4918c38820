from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from rayclust.options import Config
from rayclust.refusals import one_line


class Inner(Config):
    """A group."""

    size: int = Field(3, ge=1)
    """A size."""
    workers: int | Literal["auto"] = "auto"
    """A number or a word."""

    @model_validator(mode="after")
    def _check(self) -> Inner:
        if self.size == 13:
            raise ValueError("size = 13: must not be 13")
        return self


class One(Config):
    """A method."""

    name: Literal["one"] = "one"
    """Its name."""
    beta: float = 1.0
    """A number."""


class Two(Config):
    """Another."""

    name: Literal["two"] = "two"
    """Its name."""


class Tree(Config):
    """The whole."""

    run: str
    """Where."""
    group: Inner = Inner()
    """A group."""
    method: Annotated[One | Two, Field(discriminator="name")] = One()
    """A method."""


KNOWN = ["run", "group", "group.size", "group.workers", "method", "method.name", "method.beta"]


def line(**tree: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Tree(**({"run": "r"} | tree))
    return one_line(caught.value, KNOWN, ["one", "two"])


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "a bound": ({"group": {"size": 0}}, "group.size = 0: should be greater than or equal to 1"),
    "nearest key": ({"group": {"sise": 1}}, "group.sise: unknown key; did you mean size?"),
    "a key from elsewhere": ({"beta": 1}, "beta: unknown key; did you mean method.beta?"),
    "no key like it": ({"group": {"zzz": 1}}, "group.zzz: unknown key; known here: size, workers"),
    "a group's own check": ({"group": {"size": 13}}, "group.size = 13: must not be 13"),
    "a branch of a union": ({"group": {"workers": [1]}}, "group.workers = [1]: should be a valid integer (and 1 more)"),
    "a key of a method": ({"method": {"name": "one", "beta": "x"}}, "method.beta = 'x': should be a valid number"),
    "an unknown method": (
        {"method": {"name": "tow"}},
        "method.name = 'tow': must be one of one, two; did you mean two?",
    ),
    "a method that is text": ({"method": "one"}, "method = 'one': "),
    "an unknown key comes first": (
        {"group": {"size": 0}, "rnu": 1},
        "rnu: unknown key; did you mean run? (and 1 more)",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_line_names_key_value_and_bound(name: str):
    tree, wanted = CASES[name]
    shown = line(**tree)
    assert shown.startswith(wanted), shown
    assert "\n" not in shown


def test_a_missing_key_is_required():
    with pytest.raises(ValidationError) as caught:
        Tree()  # type: ignore[call-arg]
    assert one_line(caught.value, KNOWN, []) == "run: this key is required"


def test_a_long_value_is_cut():
    shown = line(group={"size": "x" * 1000})
    assert shown.startswith("group.size = 'xxx")
    assert len(shown) < 200
