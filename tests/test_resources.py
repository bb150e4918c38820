from __future__ import annotations

from typing import Any

import pytest

from rayclust.config import ResourcesConfig, validate
from rayclust.errors import ConfigError
from rayclust.runtime.pipeline import STAGES
from tests.stages.runs import tree


def config(method: dict[str, Any], rows: str = "cells") -> Any:
    return validate(tree("/run", "/images", method={"clusters": 3} | method, resources={"rows": rows}))


def test_every_worker_holds_all_rows_unless_asked():
    assert ResourcesConfig().rows == "whole"
    whole = config({"name": "temi", "parallel": "heads"}, "whole")
    assert whole.fitted() is whole.method
    assert "rows" not in STAGES["train"].settings(whole)


def test_workers_with_cells_divide_the_rows_of_a_batch():
    found = config({"name": "temi"})
    assert found.method.parallel == "auto"
    assert found.fitted().parallel == "data"
    assert config({"name": "temi", "parallel": "data"}).fitted().parallel == "data"
    assert config({"name": "cpp"}).fitted() == config({"name": "cpp"}).method
    assert STAGES["train"].settings(found)["rows"] == "cells"


@pytest.mark.parametrize("parallel", ["heads", "2x2", "clusters", "1x2x2"])
def test_heads_cannot_be_divided_as_well(parallel: str):
    with pytest.raises(ConfigError, match=f"method.parallel = {parallel}: with resources.rows = cells") as caught:
        config({"name": "temi", "parallel": parallel})
    assert "\n" not in str(caught.value)


def test_trials_need_all_rows():
    with pytest.raises(ConfigError, match=r"resources\.rows = cells: select-k's trials hold all rows") as caught:
        config({"name": "kmeans", "clusters": "auto"})
    assert "\n" not in str(caught.value)
