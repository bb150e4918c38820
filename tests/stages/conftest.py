"""Names that tests of stages import; the fixtures are in `tests/conftest.py`."""

from tests.sealed import LABELS, VECTORS, Sealed, sealed_run

__all__ = ["LABELS", "VECTORS", "Sealed", "sealed_run"]
