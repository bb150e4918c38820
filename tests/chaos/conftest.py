from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.chaos.nodes import Nodes


@pytest.fixture(scope="package")
def nodes() -> Iterator[Nodes]:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    found = Nodes()
    yield found
    found.cluster.shutdown()
