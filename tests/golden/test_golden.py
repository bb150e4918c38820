"""Two of the golden runs, without a cluster; `python -m tests.golden` makes all of them, with one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.cases import CASES, differences, digests_of, is_known, processor, run_case

SHORT = ("folder-local-kmeans", "tar-local-temi")
"""Cases that every run of the tests makes."""


def test_each_pair_of_choices_occurs():
    lists = {name: name.endswith("-list") for name in CASES}
    for case in CASES.values():
        assert case.format in ("folder", "tar", "parquet", "embeddings")
    assert {(case.format, case.storage) for case in CASES.values()} == {
        (form, place) for form in ("folder", "tar", "parquet", "embeddings") for place in ("local", "s3")
    }
    assert {(case.method["name"], lists[name]) for name, case in CASES.items()} == {
        (method, is_list) for method in ("kmeans", "temi", "cpp", "spectral") for is_list in (False, True)
    }


@pytest.mark.parametrize("name", SHORT)
def test_artefacts_are_what_they_were(name: str, in_process: None, tmp_path: Path):
    if not is_known():
        pytest.skip(f"no digests were kept on a processor like this one: {processor()}")
    assert differences(name, digests_of(run_case(name, tmp_path))) == []
