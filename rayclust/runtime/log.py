"""Log lines for people: the handler of the command line, which `rayclust.run` shows its progress with as well.

Apart from `progress`, which takes time to import: every command sets up its lines, and few have progress to show.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def new_handler() -> logging.Handler:
    """Return a handler that writes to standard error: beside the bars on a terminal, with dates in a log."""
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        from rayclust.runtime.progress import console

        rich = RichHandler(console=console, show_path=False, show_level=False, markup=False, highlighter=None)
        rich.setFormatter(logging.Formatter("%(message)s", datefmt="[%X]"))
        return rich
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    return handler


@contextmanager
def shown(is_wanted: bool = True) -> Iterator[None]:
    """Show the package's lines while the block runs, unless the program has handlers of its own."""
    package = logging.getLogger("rayclust")
    if not is_wanted or package.hasHandlers():
        yield
        return
    handler, level = new_handler(), package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
