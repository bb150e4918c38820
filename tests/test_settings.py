from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from rayclust.methods import AnyMethodConfig
from rayclust.methods.settings import KMeansConfig
from rayclust.settings import Config, format_error


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


class Tree(Config):
    """The whole."""

    run: str
    """Where."""
    group: Inner = Inner()
    """A group."""
    method: AnyMethodConfig = KMeansConfig(clusters=2)
    """A method."""


KNOWN = ["run", "group", "group.size", "group.workers", "method", "method.name", "method.init"]


def line(**tree: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Tree(**({"run": "r"} | tree))
    return format_error(caught.value, KNOWN)


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "a bound": ({"group": {"size": 0}}, "group.size = 0: should be greater than or equal to 1"),
    "nearest key": ({"group": {"sise": 1}}, "group.sise: unknown key; did you mean size?"),
    "a key from elsewhere": ({"init": 1}, "init: unknown key; did you mean method.init?"),
    "no key like it": ({"group": {"zzz": 1}}, "group.zzz: unknown key; known here: size, workers"),
    "a group's own check": ({"group": {"size": 13}}, "group.size = 13: must not be 13"),
    "a branch of a union": ({"group": {"workers": [1]}}, "group.workers = [1]: should be a valid integer, or 'auto'"),
    "a key of a method": (
        {"method": {"name": "cpp", "clusters": 2, "epochs": "x"}},
        "method.epochs = 'x': should",
    ),
    "another method's key": (
        {"method": {"name": "cpp", "clusters": 2, "init": 1}},
        "method.init: unknown key; only other",
    ),
    "a key that a method needs": ({"method": {"name": "cpp"}}, "method.clusters: this key is required"),
    "an unknown method": (
        {"method": {"name": "tmei"}},
        "method.name = 'tmei': must be one of auto, byol, cc, consensus, cpp, cpp_pixels, gmm, kmeans, moco, pcl, "
        "propos, simclr, simsiam, spectral, tac, temi, turtle; did you mean temi?",
    ),
    "a method that is text": ({"method": "temi"}, "method = 'temi': should be a group of keys"),
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
    assert format_error(caught.value, KNOWN) == "run: this key is required"


def test_a_long_value_is_cut():
    shown = line(group={"size": "x" * 1000})
    assert shown.startswith("group.size = 'xxx")
    assert len(shown) < 200


class Example(Config):
    """An example."""

    rate: float = Field(0.5, ge=0, le=1)
    """How much, from 0 to 1."""
    model_name: str = "x"
    """A name that pydantic would keep for itself."""


def test_settings_are_frozen_compared_by_value_and_described():
    example = Example(rate=0.25)
    with pytest.raises(ValidationError, match="frozen"):
        example.rate = 1
    assert example == Example(rate=0.25)
    assert Example.model_json_schema()["properties"]["rate"]["description"] == "How much, from 0 to 1."


@pytest.mark.parametrize("given", [{"rte": 1}, {"rate": 2}, {"rate": float("nan")}, {"rate": float("inf")}])
def test_unknown_keys_and_impossible_values_are_refused(given: dict[str, float]):
    with pytest.raises(ValidationError):
        Example(**given)


def test_a_default_must_hold_its_own_bound():
    class Wrong(Config):
        """Its default is below its bound."""

        count: int = Field(0, ge=1)
        """Too small."""

    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Wrong()
