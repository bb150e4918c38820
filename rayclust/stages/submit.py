"""submit: a run as a job of a Ray cluster, followed to its end. The same line again follows it, or goes on after it."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rayclust.config import RunConfig
from rayclust.errors import ConfigError, DataError
from rayclust.stages.job_server import JobServer, is_here
from rayclust.stages.progress import LOG_INTERVAL, duration
from rayclust.stages.quick import as_yaml, places
from rayclust.store import filesystem
from rayclust.store.holder import SUBMISSION_VARIABLE
from rayclust.store.manifest import digest_of

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""Between two looks at a job that waits or is asked to end."""
AWAY_SECONDS = 300.0
"""How long the job server may be away while a job is followed."""
STOP_SECONDS = 60.0
"""How long a job that is asked to end may take."""
_BEFORE_PREAMBLE = 2000
"""Characters that Ray may write before it says what it runs."""
_MARK = "END_OF_RUN_YAML"


Action = Literal["submit", "send", "follow", "stop"]
"""What is asked of the job server."""


@dataclass(frozen=True)
class Submission:
    """A run as a job: the same config has the same name, whoever submits it from wherever."""

    config: RunConfig
    """Paths in it are absolute."""
    command: str = "run"
    """`run`, or the name of one stage."""

    @property
    def text(self) -> str:
        """The RUN.yaml that travels with the job."""
        return as_yaml(self.config)

    @property
    def digest(self) -> str:
        """Of the command and everything that is set in the config."""
        return digest_of({"command": self.command, "config": self.config.model_dump(mode="json", exclude_unset=True)})

    @property
    def name(self) -> str:
        """What the ids of all attempts begin with: the run's last part for people, the digest for the rest."""
        word = re.sub(r"[^a-z0-9]+", "-", self.config.run.rstrip("/").rpartition("/")[2].lower()).strip("-")
        return f"rayclust-{self.command}-{word[:40] or 'run'}-{self.digest[:12]}"

    def id(self, attempt: int) -> str:
        """Submission id; a cluster takes each once."""
        return f"{self.name}-{attempt}"

    def entrypoint(self, attempt: int) -> str:
        """The shell's line on the head node: the config comes with it, so no directory has to be sent."""
        command = f"exec env {SUBMISSION_VARIABLE}={self.id(attempt)} python -m rayclust {self.command} -"
        mark = _MARK
        while mark in self.text:  # no text may end itself and go on as a command
            mark += "_"
        return f"{command} <<'{mark}'\n{self.text}{mark}\n"

    def attempts(self, jobs: dict[str, JobDetails]) -> list[int]:
        """Numbers of the attempts that the cluster knows, ascending."""
        pattern = re.compile(re.escape(self.name) + r"-([1-9]\d*)")
        return sorted(int(found[1]) for job in jobs if (found := pattern.fullmatch(job)))


def refuse_far_paths(config: RunConfig, address: str, *, shared_paths: bool = False) -> None:
    """Makes sure that a cluster can see what a config names.

    Args:
        config: with absolute paths.
        address: URL of the job server.
        shared_paths: whether the cluster's nodes see this machine's paths.

    Raises:
        ConfigError: it names local paths, which the nodes do not see.
    """
    local = {key: place for key, place in places(config).items() if not filesystem.is_remote(place)}
    if not local or shared_paths:
        return
    key, place = next(iter(local.items()))
    others = f", like {', '.join(list(local)[1:])}" if len(local) > 1 else ""
    if not is_here(address):
        raise ConfigError(
            f"{key} = {place}: is local{others}, and the nodes of {address} do not see it: use s3://, or give "
            "--shared-paths if they mount the same file system"
        )
    logger.warning("%s = %s: is local%s: right if %s is this machine and no tunnel", key, place, others, address)


def submit(server: JobServer, submission: Submission) -> str:
    """Submits the run's next attempt, unless one is under way.

    Returns:
        Id of the attempt that is under way now.
    """
    while True:
        jobs = server.jobs()
        attempts = submission.attempts(jobs)
        last = submission.id(attempts[-1]) if attempts else None
        if last is not None and not jobs[last].status.is_terminal():
            logger.info("job %s is under way since %s: followed", last, _since(jobs[last]))
            return last
        attempt = attempts[-1] + 1 if attempts else 1
        metadata = {"rayclust_run": submission.config.run, "rayclust_config": submission.digest}
        if server.submit(submission.id(attempt), submission.entrypoint(attempt), metadata):
            before = f", after {last} {jobs[last].status.lower()}" if last is not None else ""
            logger.info("job %s submitted to %s%s", submission.id(attempt), server.address, before)
            return submission.id(attempt)


def submit_run(
    submission: Submission, address: str, action: Action, show: Callable[[str], None], *, shared_paths: bool = False
) -> int:
    """What the command line does: `submit` and follow, only `send`, only `follow`, or `stop`.

    Args:
        submission: what to run.
        address: URL of the job server, as `address_of` gives it.
        action: which of the four.
        show: takes the job's log, piece by piece.
        shared_paths: as `refuse_far_paths` takes it.

    Returns:
        An exit code: the driver's own where it was followed.

    Raises:
        ConfigError: the config or the address cannot be used.
        DataError: the job server is away for too long.
    """
    if action in ("submit", "send"):
        refuse_far_paths(submission.config, address, shared_paths=shared_paths)
    server = JobServer(address)
    if action == "stop":
        job = stop(server, submission)
        logger.info("job %s stopped" if job else "%s no job of this config is under way", job or f"{address}:")
        return 0
    job = newest(server, submission) if action == "follow" else submit(server, submission)
    if action == "send":
        return 0
    try:
        return follow(server, job, show)
    except KeyboardInterrupt:
        logger.info("job %s goes on; the same line follows it again, and with --stop ends it", job)
        return 1


def newest(server: JobServer, submission: Submission) -> str:
    """Id of the last attempt, under way or not.

    Raises:
        ConfigError: the cluster knows of none.
    """
    attempts = submission.attempts(server.jobs())
    if not attempts:
        raise ConfigError(f"{submission.config.run}: no job with this config was submitted to {server.address}")
    return submission.id(attempts[-1])


def stop(server: JobServer, submission: Submission) -> str | None:
    """Ends the attempt that is under way and waits for it; what it has finished stays.

    Returns:
        Its id; None where none was under way.

    Raises:
        DataError: it does not end.
    """
    job = newest(server, submission)
    if server.job(job).status.is_terminal():
        return None
    server.stop(job)
    deadline = time.monotonic() + STOP_SECONDS
    while not server.job(job).status.is_terminal():
        if time.monotonic() > deadline:
            raise DataError(f"job {job}: has not ended within {STOP_SECONDS:g} s; look at {server.address}")
        time.sleep(POLL_SECONDS)
    return job


def follow(server: JobServer, job: str, show: Callable[[str], None]) -> int:
    """Shows what a job writes until it ends, over lost connections.

    Args:
        server: of the cluster.
        job: submission id.
        show: takes the text, piece by piece.

    Returns:
        The driver's exit code; 1 where the job ended without one.

    Raises:
        DataError: the server is away for longer than anybody waits.
    """
    _wait_for_start(server, job)
    preamble = f"Running entrypoint for job {job}: {server.job(job).entrypoint}\n"
    for text in _without(preamble, _lines(server, job)):
        show(text)
    return _exit_code(job, _ended(server, job))


def _wait_for_start(server: JobServer, job: str) -> None:
    started = said = time.monotonic()
    while (info := server.job(job)).status == "PENDING":
        if time.monotonic() - said >= LOG_INTERVAL:
            said = time.monotonic()
            logger.info("job %s: waits since %s: %s", job, duration(said - started), info.message)
        time.sleep(POLL_SECONDS)


def _lines(server: JobServer, job: str) -> Iterator[str]:
    """The job's log; after a lost connection it goes on behind what has been seen."""
    seen, lost = 0, None
    while True:
        skip = seen
        try:
            for text in server.tail(job):
                lost = None
                fresh = text[skip:]
                skip = max(0, skip - len(text))
                seen += len(fresh)
                if fresh:
                    yield fresh
            return
        except DataError as error:
            lost = lost or time.monotonic()
            if time.monotonic() - lost > AWAY_SECONDS:
                raise
            logger.info("%s; trying again", error)
            time.sleep(5 * POLL_SECONDS)


def _without(preamble: str, texts: Iterable[str]) -> Iterator[str]:
    """The texts without what Ray writes at the start: the whole entrypoint, and with it the RUN.yaml."""
    start, waiting = "", True
    for text in texts:
        if not waiting:
            yield text
            continue
        start += text
        if preamble in start or len(start) > len(preamble) + _BEFORE_PREAMBLE:
            yield start.replace(preamble, "", 1)
            waiting = False
    if waiting and start:
        yield start.replace(preamble, "", 1)


def _ended(server: JobServer, job: str) -> JobDetails:
    """The job's details once they say how it ended: the log may end a moment earlier."""
    deadline = time.monotonic() + STOP_SECONDS
    while not (info := server.job(job)).status.is_terminal() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return info


def _exit_code(job: str, info: JobDetails) -> int:
    code = info.driver_exit_code
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "FAILED" and code:
        logger.info("job %s: failed with exit code %d; the same line submits it again and goes on", job, code)
        return int(code) if code > 0 else 128 - int(code)
    said = (info.message or "").strip().splitlines()
    logger.info("job %s: %s%s", job, info.status.lower(), f": {said[0]}" if said else "")
    return 1


def _since(info: JobDetails) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime((info.start_time or 0) / 1000))
