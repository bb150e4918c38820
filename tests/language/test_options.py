from __future__ import annotations

import pytest

from rayclust.config import validate
from rayclust.errors import ConfigError
from rayclust.language.options import LabelConfig
from tests.stages.runs import tree


def test_one_name_is_a_list_of_one() -> None:
    assert LabelConfig().lists == ("auto",)
    assert LabelConfig(vocabulary="words.txt").lists == ("words.txt",)
    given = {"vocabulary": ["classes", "words.txt"]}
    assert validate(tree("/run", "/images", label=given)).label.lists == ("classes", "words.txt")


@pytest.mark.parametrize(
    ("label", "wanted"),
    [
        ({"voters": 0}, "label.voters = 0: must be at least 1, all or auto"),
        ({"vocabulary": []}, "a list needs at least one name"),
        ({"vocabulary": ["auto", "classes"]}, "neither auto nor none"),
    ],
)
def test_settings_that_mean_nothing_are_one_line(label: dict, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        validate(tree("/run", "/images", label=label))
