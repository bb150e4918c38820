"""The explorer's HTTP: who may ask, what may be asked, and the page itself.

A page of another site can make a browser send requests here, and with a name that it controls even as if it were this
site. So the Host must be one that is known, requests come from this site's own page, and whoever comes from another
machine needs a token.
"""

from __future__ import annotations

import ipaddress
import json
import secrets
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from itertools import chain
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayclust.config import RunConfig
from rayclust.errors import ArtefactError, ConfigError, DataError, RayclustError
from rayclust.runtime.api import load_run
from rayclust.store.lock import lock_owner
from rayclust.store.run import Run
from rayclust.web.explorer import Explorer
from rayclust.web.progress import progress

STATIC = {
    "": ("web/static/index.html", "text/html; charset=utf-8"),
    "app.js": ("web/static/app.js", "text/javascript; charset=utf-8"),
    "map.js": ("report/templates/map.js", "text/javascript; charset=utf-8"),
    "style.css": ("web/static/style.css", "text/css; charset=utf-8"),
    "icon.svg": ("web/static/icon.svg", "image/svg+xml"),
}
"""The package's files that are served, by name; there are no others."""
COOKIE = "rayclust_token"
OWN_PAGE = "x-rayclust"
"""Header that the page sends with whatever changes something: pages of other sites cannot."""
MAX_BODY = 64 << 20
"""Bytes of a request: an image to search with."""
PAGE = 500
"""Most items of one answer."""
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass
class Opening:
    """A run's explorer, opened when it is first asked for: a run that still works has none until it is labelled."""

    config: RunConfig
    """The run's."""
    against: RunConfig | None = None
    """Of a run to compare with."""
    opened: Explorer | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def explorer(self) -> Explorer:
        """Return it; raise `ArtefactError` while the run is not labelled."""
        with self.lock:
            if self.opened is None:
                self.opened = Explorer(load_run(self.config.run), self.against)
            return self.opened


def serve(
    config: RunConfig, *, host: str, port: int, show: Callable[[str], None], against: RunConfig | None = None
) -> None:
    """Serve a run's page until interrupted; of a run that still works it shows the progress until there are clusters.

    Args:
        config: the run's.
        host: name or address of this machine to listen on; one that other machines reach asks for a token.
        port: to listen on; 0 takes a free one.
        show: called with the address to open.
        against: config of a run over the same images to compare with.

    Raises:
        DataError: the port is taken, or the host is not this machine.
        ArtefactError: the run has no labelled clusters, and nobody works on it.
    """
    # 1. A host that other machines reach needs a token.
    try:
        is_alone = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_alone = host.lower() == "localhost"
    opening, token = Opening(config, against), None if is_alone else secrets.token_urlsafe(24)
    # 2. A run without clusters is shown while somebody works on it.
    try:
        opening.explorer()
    except ArtefactError:
        holder = lock_owner(Run(config.run))
        if holder is None or holder.has_ended():
            raise
    # 3. The server.
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise DataError(f"--host {host} --port {port}: cannot listen there ({error}); choose another port") from None
    known = {host.lower(), *(() if token is None else (socket.gethostname().lower(), socket.getfqdn().lower()))}
    shown = f"[{host}]" if ":" in host else host
    show(f"http://{shown}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else ""))
    application = create_app(opening, hosts=known, token=token)
    uvicorn.Server(uvicorn.Config(application, log_level="warning", access_log=False)).run(sockets=[listener])


def create_app(opening: Opening, *, hosts: set[str], token: str | None) -> ASGIApp:
    """Return the application.

    Args:
        opening: of the run.
        hosts: names that the machine is asked for by, besides localhost and bare addresses.
        token: that every request must carry; None asks for none.
    """
    none, page = dict[str, Any](), {"offset": 0, "limit": 100}
    sorting = {"sort": "size", "descending": True, "query": ""}
    # Method, what answers, and the keys of the query that it is given with their defaults, beside those of the path.
    paths: dict[str, tuple[str, Callable[..., Any], dict[str, Any]]] = {
        "/api/run": ("GET", Explorer.facts, none),
        "/api/clusters": ("GET", Explorer.clusters, sorting | page),
        "/api/clusters/{number:int}": ("GET", Explorer.cluster, none),
        "/api/clusters/{number:int}/images": ("GET", Explorer.images, {"odd_first": False} | page),
        "/api/records": ("GET", _records, {"rows": ""}),
        "/api/map": ("GET", Explorer.map, none),
        "/api/images/{row:int}": ("GET", Explorer.image, none),
        "/api/images/{row:int}/picture": ("GET", _picture, {"size": 160}),
        "/api/search": ("GET", Explorer.search, {"text": "", "top": 100}),
        "/api/search/image": ("POST", lambda explorer, body, top: explorer.search(data=body, top=top), {"top": 100}),
        "/api/edits": ("POST", lambda explorer, body: explorer.edit(_object(body)), none),
        "/api/edits/undo": ("POST", lambda explorer, body: explorer.undo(), none),
        "/api/table.csv": ("POST", _table, none),
        "/api/compare": ("GET", Explorer.compare, none),
        "/api/compare/{source:int}/{target:int}": ("GET", Explorer.flow, page),
        "/api/selections": ("GET", Explorer.selections, none),
        "/api/selections/{name}": ("GET", Explorer.selected, none),
        "/api/selections/{name}/set": ("POST", _select, none),
    }
    routes = [
        Route(path, partial(_answer, of=opening.explorer, work=work, keys=keys), methods=[method])
        for path, (method, work, keys) in paths.items()
    ]
    routes.append(Route("/api/progress", partial(_answer, of=lambda: opening.config.run, work=progress, keys=none)))
    routes += [Route(f"/{name}", _static, methods=["GET"]) for name in STATIC]
    return _Guard(Starlette(routes=routes), hosts | {"localhost"}, token)


@dataclass(frozen=True)
class _Guard:
    """Refuse requests that do not come from the page, by their headers; add the headers that bind the page."""

    app: ASGIApp
    hosts: set[str]
    token: str | None = field(repr=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        request = Request(scope)
        await (self._answer(request) or self.app)(scope, receive, send_with_headers)

    def _answer(self, request: Request) -> Response | None:
        """Return why a request is refused, or to the address with its token a cookie; None for one that is let in."""
        headers: Headers = request.headers
        host = headers.get("host", "")
        # 1. A Host that is a name of another's may lead here today and have led elsewhere when the page was loaded. An
        # address is nobody's name, so none that somebody else may point here.
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        try:
            ipaddress.ip_address(name.strip("[]"))
            is_known = True
        except ValueError:
            is_known = name.lower() in self.hosts
        if not is_known:
            return PlainTextResponse(f"rayclust: the host {host!r} is not this machine's\n", 421)
        # 2. Requests that another site's page makes.
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and request.url.path != "/":
            return PlainTextResponse("rayclust: only its own page may ask\n", 403)
        if request.method not in ("GET", "HEAD"):
            origin = headers.get("origin")
            if OWN_PAGE not in headers or origin not in (None, f"http://{host}", f"https://{host}"):
                return PlainTextResponse("rayclust: only its own page may change anything\n", 403)
        # 3. Requests from elsewhere need the token; the address with it becomes one without, and a cookie.
        if self.token is None:
            return None
        shown = request.query_params.get("token", "") if request.url.path == "/" else ""
        if secrets.compare_digest(shown.encode(), self.token.encode()):
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, self.token, httponly=True, samesite="strict")
            return answer
        given = request.cookies.get(COOKIE) or headers.get("authorization", "").removeprefix("Bearer ")
        if secrets.compare_digest(given.encode(), self.token.encode()):
            return None
        return PlainTextResponse("rayclust: open the address with its token, as the command showed it\n", 401)


async def _answer(
    request: Request, *, of: Callable[[], Any], work: Callable[..., Any], keys: Mapping[str, Any]
) -> Response:
    """Answer by a function that may take time, with its errors as JSON.

    Args:
        request: whose body the function is given where it is a POST.
        of: gives the function's first argument.
        work: the function.
        keys: of the query that it is given, with their defaults.
    """
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY:
            return JSONResponse({"error": f"more than {MAX_BODY >> 20} MB"}, 413)
    try:
        # Keys of the query as what their defaults are; numbers of items are at most a page.
        values = dict(keys)
        for name, given in request.query_params.items():
            if isinstance(keys.get(name), bool):
                values[name] = given == "1"
            elif isinstance(keys.get(name), str):
                values[name] = given
            elif name in keys and given:
                if not (given.isascii() and given.isdigit() and len(given) < 16):
                    raise ConfigError(f"{name} = {given}: must be a whole number")
                values[name] = min(PAGE, int(given)) if name in ("limit", "top") else int(given)
        values |= request.path_params | ({"body": body} if request.method == "POST" else {})
        found = await run_in_threadpool(lambda: work(of(), **values))
    except RayclustError as error:
        return JSONResponse({"error": str(error)}, 400)
    return found if isinstance(found, Response) else JSONResponse(found, headers={"cache-control": "no-store"})


async def _static(request: Request) -> Response:
    name, kind = STATIC[request.url.path.removeprefix("/")]
    text = resources.files("rayclust").joinpath(name).read_bytes()
    return Response(text, media_type=kind, headers={"cache-control": "no-cache"})


def _records(explorer: Explorer, rows: str) -> list[dict[str, Any]]:
    numbers = rows.split(",")
    if len(numbers) > PAGE or not all(row.isascii() and row.isdigit() and len(row) < 16 for row in numbers):
        raise ConfigError(f"rows: must be at most {PAGE} numbers, separated by commas")
    return explorer.records([int(row) for row in numbers])


def _picture(explorer: Explorer, row: int, size: int) -> Response:
    data = explorer.picture(row, size)
    return Response(data, media_type="image/webp", headers={"cache-control": "private, max-age=3600"})


def _table(explorer: Explorer, body: bytes) -> Response:
    asked = _object(body)
    clusters, rows = asked.get("clusters", []), asked.get("rows", [])
    if not all(isinstance(number, int) for number in [*clusters, *rows]):
        raise ConfigError("clusters and rows must be lists of numbers")
    name = quote(f"{'-'.join(map(str, clusters[:5])) or 'images'}.csv")
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    lines = explorer.table(clusters, rows)
    first = next(lines)  # raises what is refused, before the answer begins
    return StreamingResponse(chain([first], lines), media_type="text/csv; charset=utf-8", headers=headers)


def _select(explorer: Explorer, name: str, body: bytes) -> dict[str, int]:
    rows = _object(body).get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, int) for row in rows):
        raise ConfigError("rows must be a list of numbers")
    return explorer.select(name, rows)


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigError("a JSON object is needed")
    return found
