"""Pillow, the TIFF library below it, and open_clip, without their warnings."""

from __future__ import annotations

import ctypes
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from PIL import _imaging

_lock = threading.Lock()
_depth = 0
_exit: Any = None


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Warnings, log lines and libtiff's own writing to stderr are silent inside; safe when several threads decode.

    `warnings.catch_warnings` alone restores the wrong filters when threads overlap, so the first thread in sets them
    and the last one out restores them.
    """
    global _depth, _exit
    with _lock:
        _depth += 1
        if _depth == 1:
            _exit = _silence()
            _exit.__enter__()
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _exit.__exit__(None, None, None)


@contextmanager
def _silence() -> Iterator[None]:
    logger = logging.getLogger("PIL")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL + 1)
        handlers = [set_handler(None) for set_handler in _libtiff_handlers()]
        try:
            yield
        finally:
            for set_handler, handler in zip(_libtiff_handlers(), handlers, strict=True):
                set_handler(handler)
            logger.setLevel(level)


@cache
def _libtiff_handlers() -> tuple[Any, ...]:
    """The two functions with which libtiff takes a place to complain to; none where Pillow is built without it."""
    try:
        library = ctypes.CDLL(_imaging.__file__)
        functions = library.TIFFSetErrorHandler, library.TIFFSetWarningHandler
    except (AttributeError, OSError):
        return ()
    for function in functions:
        function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
    return functions


@contextmanager
def quiet_root() -> Iterator[None]:
    """Log lines of all kinds are silent inside, for libraries that log to the root logger.

    Such a call would also configure logging, which only the command line may do, unless a handler is there.
    """
    root, handler, disabled = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.removeHandler(handler)
