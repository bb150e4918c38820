"""Submit a run as a job of a Ray cluster and follow it to its end; the same line again follows it, or goes on after it.

Ray's client does the requests. Added here: one name per config, so that a second submission finds the first; a log
that survives lost connections; the driver's exit code; and one line for each of the server's refusals.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from rayclust.config import RunConfig
from rayclust.errors import ConfigError, DataError
from rayclust.report.formats import duration
from rayclust.runtime.api import as_yaml, local_paths
from rayclust.runtime.cluster import unreachable
from rayclust.runtime.progress import LOG_INTERVAL
from rayclust.store import storage
from rayclust.store.lock import SUBMISSION_VARIABLE
from rayclust.store.manifest import digest_of

logger = logging.getLogger(__name__)

PORT = 8265
"""Default port of a Ray dashboard."""
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
STARTING_SECONDS = 60.0
"""How long a cluster that has just started may take until it accepts jobs."""
POLL_SECONDS = 1.0
"""Seconds between two polls of a job that waits or is being stopped."""
AWAY_SECONDS = 300.0
"""How long the job server may be away while a job is followed."""
STOP_SECONDS = 60.0
"""Seconds that a job may take to end once it is stopped."""
_PREAMBLE_WITHIN = 2000
"""Characters that Ray may write before the line with the entrypoint."""
_TOKEN_ADVICE = "set RAY_AUTH_MODE=token and the cluster's token as RAY_AUTH_TOKEN, or its file as RAY_AUTH_TOKEN_PATH"  # noqa: S105


def address_of(given: str | None) -> str:
    """Return the job server's URL, from HOST, HOST:PORT or a URL; None takes RAY_API_SERVER_ADDRESS or RAY_ADDRESS.

    Raise `ConfigError` if there is none, or it is no address of a job server.
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
    """Return whether an address is this machine's, which sees the same paths."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("localhost", socket.gethostname())


class JobServer:
    """Ray's client of the job server at a URL; raises `ConfigError` if none answers or it refuses the token."""

    def __init__(self, address: str) -> None:
        self.address = address
        # 1. The cluster's token as a header, found where Ray finds it; none leaves it to Ray's other modes.
        place, headers = urlsplit(address), None
        mode, token = os.environ.get("RAY_AUTH_MODE", "").lower(), os.environ.get("RAY_AUTH_TOKEN", "").strip()
        path = os.environ.get("RAY_AUTH_TOKEN_PATH")
        if mode == "token" or (not mode and (token or path)):
            if not token:
                with suppress(OSError):
                    token = Path(path or "~/.ray/auth_token").expanduser().read_text().strip()
            if not token:
                raise ConfigError(f"RAY_AUTH_MODE = token: no token is found; {_TOKEN_ADVICE}")
            if place.scheme == "http" and not is_here(address):
                logger.warning("%s: the token travels unencrypted: use https, or a tunnel", address)
            headers = {"Authorization": f"Bearer {token}"}
        # 2. Whether anybody answers, which the client would find out only after minutes.
        has_proxy = any(name.lower() in {"http_proxy", "https_proxy", "all_proxy"} for name in os.environ)
        error = None if has_proxy and not is_here(address) else unreachable(place.hostname or "", place.port or 443)
        if error is not None:
            raise ConfigError(
                f"--address {address}: nobody answers there ({error}); is the cluster up, and its dashboard's port "
                "open?"
            )
        # 3. The client.
        before = os.environ.get(ADDRESS_VARIABLE)
        os.environ[ADDRESS_VARIABLE] = address  # the client prefers the variable to its argument
        try:
            with self.plain_errors():
                from ray.job_submission import JobSubmissionClient

                logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.ERROR)
                self.client = JobSubmissionClient(address, headers=headers)
        finally:
            os.environ.pop(ADDRESS_VARIABLE)
            if before is not None:
                os.environ[ADDRESS_VARIABLE] = before

    @contextmanager
    def plain_errors(self) -> Iterator[None]:
        """Re-raise the errors of a request in one line: a `ConfigError` for the token, a `DataError` for others."""
        import requests
        from aiohttp import ClientError
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            is_missing = str(error).startswith("Authentication required")
            fault = "the cluster asks for a token" if is_missing else "the cluster has another token than this one"
            raise ConfigError(f"{self.address}: {fault}; {_TOKEN_ADVICE}") from None
        except (requests.RequestException, ClientError, OSError, RuntimeError, KeyError) as error:
            has_answered = isinstance(error, requests.JSONDecodeError | RuntimeError | KeyError)
            fault = "not what a Ray job server says" if has_answered else "the job server does not answer"
            text = " ".join(str(error).split()) or type(error).__name__
            text = text if len(text) <= 300 else text[:297] + "..."
            raise DataError(f"{self.address}: {fault}: {text}") from None

    def job(self, submission: str) -> Any:
        """Return the details of one job."""
        with self.plain_errors():
            return self.client.get_job_info(submission)

    def log(self, submission: str) -> Iterator[str]:
        """Yield the log of a job as it comes, until it ends; after a lost connection, go on behind what was seen.

        Raises:
            DataError: the server is away for longer than `AWAY_SECONDS`.
        """
        seen, lost = 0, None
        while True:
            skip = seen
            try:
                with self.plain_errors(), asyncio.Runner() as runner:
                    chunks = self.client.tail_job_logs(submission)
                    while (text := runner.get_loop().run_until_complete(anext(chunks, None))) is not None:
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

    def wait_for_end(self, submission: str) -> Any:
        """Return a job's details once it has ended, or after `STOP_SECONDS`."""
        deadline = time.monotonic() + STOP_SECONDS
        while not (info := self.job(submission)).status.is_terminal() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return info


class Submission:
    """Run as a job: the same config, with absolute paths, has the same name wherever it is submitted from."""

    def __init__(self, config: RunConfig, command: str = "run") -> None:
        self.config, self.command = config, command
        self.digest = digest_of({"command": command, "config": config.model_dump(mode="json", exclude_unset=True)})
        """Of the command and of everything that is set in the config."""
        word = re.sub(r"[^a-z0-9]+", "-", config.run.rstrip("/").rpartition("/")[2].lower()).strip("-")
        self.name = f"rayclust-{command}-{word[:40] or 'run'}-{self.digest[:12]}"
        """Of all attempts, whose ids are NAME-1, NAME-2 and so on: a cluster accepts each once."""

    def entrypoint(self, job: str) -> str:
        """Return the shell line for the head node; the RUN.yaml comes with it, so no directory has to be sent."""
        text, mark = as_yaml(self.config), "END_OF_RUN_YAML"
        while mark in text:  # no text may end itself and go on as a command
            mark += "_"
        return f"exec env {SUBMISSION_VARIABLE}={job} python -m rayclust {self.command} - <<'{mark}'\n{text}{mark}\n"

    def attempts(self, server: JobServer) -> dict[str, Any]:
        """Return the details of the attempts that a cluster knows by id, from the first to the last."""
        with server.plain_errors():
            jobs = {job.submission_id: job for job in server.client.list_jobs() if job.submission_id}
        pattern = re.compile(re.escape(self.name) + r"-([1-9]\d*)")
        numbers = sorted(int(match[1]) for job in jobs if (match := pattern.fullmatch(job)))
        return {f"{self.name}-{number}": jobs[f"{self.name}-{number}"] for number in numbers}


def submit(server: JobServer, submission: Submission) -> str:
    """Submit the run's next attempt, unless one is under way; return the id of the attempt that is under way now.

    Raises:
        DataError: the server refuses it; a cluster that has just started is given a while.
    """
    deadline = time.monotonic() + STARTING_SECONDS
    while True:
        attempts = submission.attempts(server)
        last = next(reversed(attempts), f"{submission.name}-0")
        before = attempts.get(last)
        if before is not None and not before.status.is_terminal():
            since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime((before.start_time or 0) / 1000))
            logger.info("job %s is under way since %s: followed", last, since)
            return last
        job = f"{submission.name}-{int(last.rpartition('-')[2]) + 1}"
        metadata = {"rayclust_run": submission.config.run, "rayclust_config": submission.digest}
        try:
            with server.plain_errors():
                entrypoint = submission.entrypoint(job)
                server.client.submit_job(entrypoint=entrypoint, submission_id=job, metadata=metadata)
        except DataError as error:
            # Somebody else has submitted it a moment ago, or the cluster is not ready yet.
            if "already exists" not in str(error):
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
            continue
        after = f", after {last} {before.status.lower()}" if before is not None else ""
        logger.info("job %s submitted to %s%s", job, server.address, after)
        return job


def newest(server: JobServer, submission: Submission) -> str:
    """Return the id of the last attempt, under way or not; raise `ConfigError` if the cluster knows of none."""
    attempts = submission.attempts(server)
    if not attempts:
        raise ConfigError(f"{submission.config.run}: no job with this config was submitted to {server.address}")
    return next(reversed(attempts))


def follow(server: JobServer, job: str, show: Callable[[str], None]) -> int:
    """Show the log of a job, piece by piece, until it ends; return the driver's exit code, 1 if it ended without one.

    Raises:
        DataError: the server is away for longer than `AWAY_SECONDS`.
    """
    # 1. Wait until the job starts.
    started = logged = time.monotonic()
    while (info := server.job(job)).status == "PENDING":
        if time.monotonic() - logged >= LOG_INTERVAL:
            logged = time.monotonic()
            logger.info("job %s: waits since %s: %s", job, duration(logged - started), info.message)
        time.sleep(POLL_SECONDS)

    # 2. Show its log without Ray's preamble: the whole entrypoint, and with it the RUN.yaml.
    preamble = f"Running entrypoint for job {job}: {info.entrypoint}\n"
    head: str | None = ""
    for text in server.log(job):
        if head is None:
            show(text)
            continue
        head += text
        if preamble in head or len(head) > len(preamble) + _PREAMBLE_WITHIN:
            show(head.replace(preamble, "", 1))
            head = None
    if head:
        show(head.replace(preamble, "", 1))

    # 3. Its exit code. The log may end a moment before the job does.
    info = server.wait_for_end(job)
    code = info.driver_exit_code
    if info.status == "SUCCEEDED":
        return 0
    if info.status == "FAILED" and code:
        logger.info("job %s: failed with exit code %d; the same line submits it again and goes on", job, code)
        return int(code) if code > 0 else 128 - int(code)
    message = (info.message or "").strip().splitlines()
    logger.info("job %s: %s%s", job, info.status.lower(), f": {message[0]}" if message else "")
    return 1


def submit_run(
    submission: Submission,
    address: str,
    show: Callable[[str], None],
    *,
    action: Literal["no-wait", "follow", "stop"] | None = None,
    shared_paths: bool = False,
) -> int:
    """Submit a run and follow its job.

    Args:
        submission: the run.
        address: URL of the job server, as `address_of` gives it.
        show: called with each piece of the job's log.
        action: instead of both. no-wait: submit alone. follow: follow the last attempt and submit nothing. stop: end
            the attempt that is under way and wait for its end; what it has finished stays.
        shared_paths: True if the nodes see this machine's paths.

    Returns:
        An exit code: the driver's own if it was followed.

    Raises:
        ConfigError: the config or the address cannot be used, or there is no attempt to follow or stop.
        DataError: the job server is away for too long, or the attempt does not end.
    """
    # 1. Local paths, which the nodes of a cluster elsewhere do not see.
    paths = {} if shared_paths or action in ("follow", "stop") else local_paths(submission.config)
    local = [(key, path) for key, path in paths.items() if not storage.is_remote(path)]
    if local:
        (key, path), *more = local
        others = f", like {', '.join(other for other, _ in more)}" if more else ""
        if not is_here(address):
            raise ConfigError(
                f"{key} = {path}: is local{others}, and the nodes of {address} do not see it: use s3://, or give "
                "--shared-paths if they mount the same file system"
            )
        logger.warning("%s = %s: is local%s: right if %s is this machine and no tunnel", key, path, others, address)
    # 2. The job: stopped, submitted, or the last one.
    server = JobServer(address)
    if action == "stop":
        job = newest(server, submission)
        if server.job(job).status.is_terminal():
            logger.info("%s: no job of this config is under way", address)
            return 0
        with server.plain_errors():
            server.client.stop_job(job)  # Ray kills it a few seconds after its signal to end
        if not server.wait_for_end(job).status.is_terminal():
            raise DataError(f"job {job}: has not ended within {STOP_SECONDS:g} s; look at {server.address}")
        logger.info("job %s stopped", job)
        return 0
    job = newest(server, submission) if action == "follow" else submit(server, submission)
    if action == "no-wait":
        return 0
    # 3. Its log.
    try:
        return follow(server, job, show)
    except KeyboardInterrupt:
        logger.info("job %s goes on; the same line follows it again, and with --stop ends it", job)
        return 1
