"""The same test on a local folder and on S3."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from rayclust.store.s3 import client

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def shared_bucket(s3_endpoint: str) -> str:
    """A bucket that tests share: making one takes longer than most of them."""
    client().call_s3("create_bucket", Bucket="shared-by-tests")
    return "s3://shared-by-tests"


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of the test's own, once as a local path and once below a bucket."""
    if request.param == "local":
        return str(tmp_path / "place")
    return f"{request.getfixturevalue('shared_bucket')}/place-{next(_NUMBERS)}"
