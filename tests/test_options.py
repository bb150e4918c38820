from __future__ import annotations

import pytest
from pydantic import Field, ValidationError

from rayclust.options import Config


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
