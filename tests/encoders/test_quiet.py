from __future__ import annotations

import logging
import threading
import warnings

import pytest

from rayclust.encoders.quiet import quiet_pillow


def test_warnings_and_log_lines_are_silent_inside_only(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet_pillow():
            warnings.warn("inside", stacklevel=1)
            logging.getLogger("PIL.TiffImagePlugin").error("inside")
        warnings.warn("outside", stacklevel=1)
        logging.getLogger("PIL.TiffImagePlugin").error("outside")
    assert [str(warning.message) for warning in seen] == ["outside"]
    assert caplog.messages == ["outside"]


def test_overlapping_threads_leave_the_filters_as_they_were() -> None:
    before = list(warnings.filters)
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with quiet_pillow():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with quiet_pillow():
            second_in.set()
            first_out.wait(10)

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert list(warnings.filters) == before


def test_errors_pass_through() -> None:
    before = list(warnings.filters)
    with pytest.raises(KeyError), quiet_pillow():
        raise KeyError("x")
    assert list(warnings.filters) == before
