"""A bad network before an S3 server: a proxy that, by a seed, answers with errors, breaks off, stalls or refuses.

Run as a process of its own: `python -m tests.chaos.proxy PORT UPSTREAM_PORT`. What it does is set by a POST of JSON to
`/-/faults`; a GET there tells how often each fault came.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
import sys
import threading
import time
import urllib.request
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CONTROL = "/-/faults"
KINDS = ("500", "503", "reset_before", "reset_after", "truncated", "flipped", "slow")
"""What can happen to one request. `reset_after`: the store has done what it was asked, and the answer is lost."""

_ERRORS = {
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "SlowDown", "Please reduce your request rate."),
}
_HOP = {"connection", "transfer-encoding", "keep-alive", "content-length"}


class Faults:
    """Which fault comes next; the n-th request's by the seed and n."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.set({})

    def set(self, plan: dict[str, Any]) -> None:
        """Begins a plan: seed, rate (share of requests), kinds, first_cut and cut (requests before the store is away,
        and seconds that it then stays away)."""
        with self._lock:
            self.plan = {"seed": 0, "rate": 0.0, "kinds": KINDS, "cut_at": None, "cut_seconds": 0.0} | plan
            self.count, self.happened, self.cut_until = 0, Counter[str](), 0.0

    def next(self, method: str) -> str | None:
        """The fault of the next request, or None."""
        with self._lock:
            plan, number = self.plan, self.count
            self.count += 1
            if number == plan["cut_at"]:
                self.cut_until = time.monotonic() + plan["cut_seconds"]
            draw = random.Random(f"{plan['seed']}-{number}")
            kind = draw.choice(plan["kinds"]) if draw.random() < plan["rate"] else None
            if time.monotonic() < self.cut_until:
                kind = "cut"
            if kind in ("truncated", "flipped") and method != "GET":
                kind = "reset_after"
            if kind:
                self.happened[kind] += 1
            return kind


class Handler(BaseHTTPRequestHandler):
    """Hands each request on, or has an accident."""

    protocol_version = "HTTP/1.1"
    faults: Faults
    upstream: int

    def _handle(self) -> None:
        body = self._body()
        if self.path == CONTROL:
            self._control(body)
            return
        fault = self.faults.next(self.command)
        if fault in ("reset_before", "cut"):
            self._reset()
        elif fault in _ERRORS:
            self._fail(*_ERRORS[fault])
        else:
            if fault == "slow":
                time.sleep(0.3)
            answer, data = self._forward(body)
            if fault == "reset_after":
                self._reset()
            else:
                self._answer(answer, data, fault)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815 - named by the server

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _control(self, body: bytes) -> None:
        if self.command == "POST":
            self.faults.set(json.loads(body))
        data = json.dumps({"requests": self.faults.count, "happened": self.faults.happened}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP | {"expect"}}
        connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer, data

    def _answer(self, answer: http.client.HTTPResponse, data: bytes, fault: str | None) -> None:
        if fault == "flipped" and data and answer.status == 200:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP:
                self.send_header(name, value)
        length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if fault == "truncated" and data:
            self.wfile.write(data[: len(data) // 2])
            self._reset()
        else:
            self.wfile.write(data)

    def _fail(self, status: int, code: str, message: str) -> None:
        data = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def handle(self) -> None:
        """Connections end as they like."""
        try:
            super().handle()
        except (OSError, ValueError):
            self.close_connection = True

    def finish(self) -> None:
        """After a reset there is nothing left to flush."""
        try:
            super().finish()
        except (OSError, ValueError):
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """Nor does the server."""

    def shutdown_request(self, request: Any) -> None:
        with suppress(OSError):
            super().shutdown_request(request)


def control(endpoint: str, plan: dict[str, Any] | None = None) -> dict[str, Any]:
    """Sets the plan of the proxy at `endpoint`, or asks what has happened."""
    data = None if plan is None else json.dumps(plan).encode()
    with urllib.request.urlopen(urllib.request.Request(endpoint + CONTROL, data), timeout=10) as answer:  # noqa: S310
        found: dict[str, Any] = json.load(answer)
        return found


def main(port: int, upstream: int) -> None:
    Handler.faults, Handler.upstream = Faults(), upstream
    _Server(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
