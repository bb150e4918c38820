from __future__ import annotations

import socket

import pytest
from ray.exceptions import RayTaskError

from rayclust.errors import ConfigError, DataError, RayclustError
from rayclust.runtime.cluster import (
    _refuse_silent,
    connect,
    cores_per_worker,
    cpus,
    describe,
    encode_workers,
    plain_errors,
    run_remotely,
    train_workers,
    widest,
    worker_range,
)
from tests.stages.runs import tree


def raised(error: Exception) -> Exception:
    """What the block of `plain_errors` lets out."""
    with pytest.raises(Exception) as caught, plain_errors():
        raise error
    return caught.value


def wrapped(cause: Exception) -> Exception:
    """As Ray raises a worker's error in the driver."""
    return RayTaskError("work", f"Traceback (most recent call last):\n  ...\n{cause!r}", cause).as_instanceof_cause()


def test_an_error_raised_on_purpose_in_a_worker_keeps_its_one_line():
    error = wrapped(DataError("photos: no such bucket"))
    assert isinstance(error, DataError)
    assert str(error) != "photos: no such bucket"
    assert str(raised(error)) == "photos: no such bucket"
    assert type(raised(error)) is DataError


def test_an_error_deep_in_causes_and_contexts_is_found():
    try:
        try:
            raise wrapped(ConfigError("method.clusters = 9: too many"))
        except Exception as inner:
            raise RuntimeError("the job failed") from inner
    except RuntimeError as outer:
        error = outer
    assert str(raised(error)) == "method.clusters = 9: too many"


def test_failures_of_training_workers_are_looked_into():
    error = RuntimeError("training failed on 2 workers")
    error.worker_failures = {0: OSError("lost"), 1: wrapped(ConfigError("K above N"))}  # type: ignore[attr-defined]
    assert str(raised(error)) == "K above N"


def test_other_errors_pass_as_they_are():
    error = ValueError("a bug")
    assert raised(error) is error
    own = DataError("from the driver itself")
    assert raised(own) is own
    looped = RuntimeError("its own cause")
    looped.__cause__ = looped
    assert raised(looped) is looped


def test_an_interrupt_is_no_error():
    with pytest.raises(KeyboardInterrupt), plain_errors():
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("nodes", "workers", "cores"),
    [
        ([2], 1, 2), ([2], 2, 1), ([2], 5, 1), ([8, 8], 1, 8), ([8, 8], 2, 8), ([8, 8], 3, 4), ([8, 4], 2, 4),
        ([0, 16, 16], 4, 8), ([0], 1, 1), ([], 1, 1), ([7, 5], 4, 2),
    ],
)  # fmt: skip
def test_a_workers_cpus_lie_on_one_node(nodes: list[int], workers: int, cores: int):
    assert widest(nodes, workers) == cores


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nobody_answers_is_one_line_at_once(scheme: str):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound, so nobody else's; not listening, so nobody answers
        address = f"{scheme}127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS = {address}: no Ray cluster answers there"):
            _refuse_silent(address)


def test_an_address_that_is_none_is_refused_and_words_pass():
    with pytest.raises(ConfigError, match="is no address"):
        _refuse_silent("head:port")
    for word in (None, "", "auto", "local"):
        _refuse_silent(word)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        _refuse_silent(f"ray://127.0.0.1:{server.getsockname()[1]}")


def test_the_fewest_workers_are_all_unless_fewer_are_allowed():
    from rayclust.config import validate

    def wanted(**resources: int) -> tuple[int, int]:
        return worker_range(validate(tree("run", "images", resources=resources)))

    assert wanted(workers=4) == (4, 4)
    assert wanted(workers=4, min_workers=1) == (1, 4)
    assert wanted(workers=4, min_workers=4) == (4, 4)
    assert wanted(min_workers=2) == (2, 2)  # without GPUs `auto` asks for one


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_the_local_cluster_is_joined_described_and_used():
    from rayclust.config import validate

    connect()
    assert cpus() == 2
    assert describe() == "1 node(s), 2 CPUs, 0 GPUs"
    auto = validate(tree("run", "images"))
    assert (encode_workers(auto), train_workers(auto), cores_per_worker(1)) == (2, 1, 2)
    three = validate(tree("run", "images", resources={"workers": 3}))
    assert (encode_workers(three), train_workers(three)) == (3, 3)

    def fail(message: str) -> None:
        raise DataError(message)

    assert run_remotely(sum, [1, 2, 3]) == 6
    with pytest.raises(RayclustError) as caught:
        run_remotely(fail, "one line")
    assert str(caught.value) == "one line"
