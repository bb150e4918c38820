"""The job server of a Ray cluster: how it is reached, and what its refusals mean to the person who asked."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rayclust.errors import ConfigError, DataError

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
