"""The encoder of a server's queries, in a process of its own that ends when it has been idle."""

from __future__ import annotations

import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context

import numpy as np

from rayclust.config import RunConfig
from rayclust.errors import DataError
from rayclust.stages.search import Searcher

IDLE_SECONDS = 300.0
"""Time without a query after which the process ends."""


@dataclass
class QueryEncoder:
    """Encodes words and images as a run's encoder does.

    torch and the encoder take hundreds of MB: they live in a process that the first query starts, and that is ended
    `idle` seconds after the last one. A program that has torch in memory already encodes in its own process.
    """

    config: RunConfig
    """The run's."""
    idle: float = IDLE_SECONDS
    """Seconds."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    process: ProcessPoolExecutor | None = None
    timer: threading.Timer | None = None

    def encode(self, query: str | bytes, space: str) -> np.ndarray:
        """Return the embedding of words or of an encoded image, Float32[1 D].

        Raises:
            ConfigError: the encoder reads no text.
            DataError: the data is no image, or the process was killed.
        """
        config = self.config.model_dump_json(exclude_unset=True)
        if "torch" in sys.modules:
            return _encode(config, query, space)
        with self.lock:  # one query at a time: the encoder has one thread
            if self.timer is not None:
                self.timer.cancel()
            if self.process is None:
                self.process = ProcessPoolExecutor(
                    1,
                    mp_context=get_context("spawn"),
                    initializer=signal.signal,
                    initargs=(signal.SIGINT, signal.SIG_IGN),
                )
            try:
                return self.process.submit(_encode, config, query, space).result()
            except BrokenProcessPool:
                self.process = None
                raise DataError("the encoder's process has ended, perhaps for want of memory; ask again") from None
            finally:
                self.timer = threading.Timer(self.idle, self.close)
                self.timer.daemon = True
                self.timer.start()

    def close(self) -> None:
        """End the process, if there is one; the next query starts another."""
        with self.lock:
            process, self.process = self.process, None
        if process is not None:
            process.shutdown()


@lru_cache(1)
def _searcher(config: str) -> Searcher:
    return Searcher(RunConfig.model_validate_json(config))


def _encode(config: str, query: str | bytes, space: str) -> np.ndarray:
    searcher = _searcher(config)
    if isinstance(query, str):
        return searcher.encode_text(query, space)
    return searcher.encode_image(query, space, "the image")
