"""The same test on a local folder and on S3."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from rayclust.store import failures
from tests.store.inputs import s3_connection

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def shared_bucket(s3_endpoint: str) -> str:
    """A bucket that tests share: making one takes longer than most of them."""
    s3_connection().call_s3("create_bucket", Bucket="shared-by-tests")
    return "s3://shared-by-tests"


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder of the test's own, once as a local path and once below a bucket."""
    if request.param == "local":
        return str(tmp_path / "place")
    return f"{request.getfixturevalue('shared_bucket')}/place-{next(_NUMBERS)}"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds between tries."""
    monkeypatch.setattr(failures, "FIRST_PAUSE", 0.002)
    monkeypatch.setattr(failures, "LONGEST_PAUSE", 0.02)
