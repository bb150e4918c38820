"""submit: a run as a job of a Ray cluster, followed to its end. The same line again follows it, or goes on after it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from rayclust.config import RunConfig
from rayclust.errors import ConfigError, DataError
from rayclust.runtime.api import as_yaml, local_paths
from rayclust.runtime.progress import LOG_INTERVAL, duration
from rayclust.store import filesystem
from rayclust.store.holder import SUBMISSION_VARIABLE
from rayclust.store.manifest import digest_of

# The job server of a Ray cluster: how it is reached, and what its refusals mean to the person who asked.


if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

logger = logging.getLogger(__name__)

PORT = 8265
"""Where a Ray dashboard listens unless told otherwise."""
PATIENCE_SECONDS = 10.0
"""How long the server may take to let itself be called."""
STARTING_SECONDS = 60.0
"""How long a cluster that has just started may take until it takes jobs."""
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
_TOKEN_ADVICE = "set RAY_AUTH_MODE=token and the cluster's token as RAY_AUTH_TOKEN, or its file as RAY_AUTH_TOKEN_PATH"  # noqa: S105


def address_of(given: str | None) -> str:
    """The server's URL, from what was given or else from the environment.

    Raises:
        ConfigError: there is none, or it is no address of a job server.
    """
    address = given or os.environ.get(ADDRESS_VARIABLE) or os.environ.get("RAY_ADDRESS")
    if not address:
        raise ConfigError(
            f"--address: give the cluster's dashboard, such as http://HOST:{PORT}, or set {ADDRESS_VARIABLE}"
        )
    place = urlsplit(address if "://" in address else f"http://{address}")
    try:
        host, port = place.hostname, place.port
    except ValueError:
        host, port = None, None
    if place.scheme not in ("http", "https") or not host:
        raise ConfigError(f"--address {address}: give the cluster's dashboard, http://HOST:{PORT}")
    if port is None and place.scheme == "http":
        place = place._replace(netloc=f"{place.netloc}:{PORT}")
    return place.geturl().rstrip("/")


def is_here(address: str) -> bool:
    """Whether an address is this machine's own, so that its paths can mean something there."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", socket.gethostname())


class JobServer:
    """Jobs of one cluster.

    Args:
        address: URL of its dashboard, as `address_of` gives it.

    Raises:
        ConfigError: nobody answers there, or not to this token.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        headers = _auth_headers(address)
        _refuse_silent(address)
        with self._explained(), _only_this(address):
            from ray.job_submission import JobSubmissionClient

            logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)
            self._client: JobSubmissionClient = JobSubmissionClient(address, headers=headers)

    def jobs(self) -> dict[str, JobDetails]:
        """Every job that was submitted to the cluster, by its submission id."""
        with self._explained():
            return {job.submission_id: job for job in self._client.list_jobs() if job.submission_id}

    def job(self, submission: str) -> JobDetails:
        """What is known of one job now."""
        with self._explained():
            return self._client.get_job_info(submission)

    def submit(self, submission: str, entrypoint: str, metadata: Mapping[str, str]) -> bool:
        """Submits a job that runs on the head; False where the id has been used before.

        Raises:
            DataError: the server does not take it; a cluster that has just started is given a while.
        """
        deadline = time.monotonic() + STARTING_SECONDS
        while True:
            try:
                with self._explained():
                    self._client.submit_job(entrypoint=entrypoint, submission_id=submission, metadata=dict(metadata))
                return True
            except DataError as error:
                if "already exists" in str(error):
                    return False
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(1.0)

    def stop(self, submission: str) -> None:
        """Asks a job to end; it is given a few seconds."""
        with self._explained():
            self._client.stop_job(submission)

    def tail(self, submission: str) -> Iterator[str]:
        """What a job writes, from its first line on and as it comes, until it ends.

        Raises:
            DataError: the connection is lost.
        """
        chunks: AsyncIterator[str] = self._client.tail_job_logs(submission)
        loop = asyncio.new_event_loop()
        try:
            with self._explained():
                while True:
                    try:
                        yield loop.run_until_complete(anext(chunks))
                    except StopAsyncIteration:
                        return
        finally:
            loop.run_until_complete(_cancel())
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        import requests
        from aiohttp import ClientError
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ConfigError(_refused(self.address, str(error))) from None
        except (requests.JSONDecodeError, RuntimeError, KeyError) as error:
            raise DataError(f"{self.address}: not what a Ray job server says: {_line(error)}") from None
        except (requests.RequestException, ClientError, OSError) as error:
            raise DataError(f"{self.address}: the job server does not answer: {_line(error)}") from None


def _auth_headers(address: str) -> dict[str, str] | None:
    """The token as a header, where this environment has one to show; None leaves it to Ray's own modes.

    Raises:
        ConfigError: a token is asked for and there is none.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "").lower()
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if mode not in ("", "token") or (not mode and not named):
        return None
    token = _token()
    if not token:
        raise ConfigError(f"RAY_AUTH_MODE = token: no token is found; {_TOKEN_ADVICE}")
    if urlsplit(address).scheme == "http" and not is_here(address):
        logger.warning("%s: the token travels unencrypted: use https, or a tunnel", address)
    return {"Authorization": f"Bearer {token}"}


def _token() -> str:
    """The token in the order in which Ray looks for it; empty where there is none."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _refused(address: str, text: str) -> str:
    if text.startswith("Authentication required"):
        return f"{address}: the cluster asks for a token; {_TOKEN_ADVICE}"
    return f"{address}: the cluster has another token than this one; {_TOKEN_ADVICE}"


def _refuse_silent(address: str) -> None:
    """Ray's client itself waits for minutes where nobody answers."""
    place = urlsplit(address)
    if any(name.lower() in {"http_proxy", "https_proxy", "all_proxy"} for name in os.environ) and not is_here(address):
        return
    try:
        socket.create_connection((place.hostname or "", place.port or 443), PATIENCE_SECONDS).close()
    except OSError as error:
        raise ConfigError(
            f"--address {address}: nobody answers there ({error}); is the cluster up, and its dashboard's port open?"
        ) from None


@contextmanager
def _only_this(address: str) -> Iterator[None]:
    """Ray's client takes what stands in its environment variable before what it is given."""
    before = os.environ.get(ADDRESS_VARIABLE)
    os.environ[ADDRESS_VARIABLE] = address
    try:
        yield
    finally:
        if before is None:
            del os.environ[ADDRESS_VARIABLE]
        else:
            os.environ[ADDRESS_VARIABLE] = before


async def _cancel() -> None:
    """Ends what the loop still waits for, such as the next line of a log that nobody reads any more."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _line(error: Any) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


if TYPE_CHECKING:
    from ray.job_submission import JobDetails


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
    local = {key: place for key, place in local_paths(config).items() if not filesystem.is_remote(place)}
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
