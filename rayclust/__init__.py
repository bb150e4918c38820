"""rayclust: from a bucket of unlabelled images to named, measured clusters."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "Auto": "rayclust.estimators",
    "CPP": "rayclust.estimators",
    "Consensus": "rayclust.estimators",
    "KMeans": "rayclust.estimators",
    "TAC": "rayclust.estimators",
    "TEMI": "rayclust.estimators",
    "TURTLE": "rayclust.estimators",
    "run": "rayclust.runtime.results",
    "load": "rayclust.runtime.results",
}
"""Names that are imported when first asked for, so that `import rayclust` stays free of torch."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        try:
            return getattr(import_module(_LAZY[name]), name)
        except ModuleNotFoundError as error:  # the base installation has what arrays need, and no more
            raise ImportError(f"rayclust.{name} needs {error.name}: pip install 'rayclust[ray]'") from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
