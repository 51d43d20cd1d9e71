"""The URL table: every path of the service, and which function answers it.

`mount` puts the table on a bottle application, with what holds for all of it: the publish key, web
origins, HEAD and OPTIONS, and refusals as JSON.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from bottle import Bottle, HTTPError, HTTPResponse, request, response

from comet.errors import Refusal
from comet.origins import Origins
from comet.subscriber import Wish
from handlers import channels, health, metabrew, page, poll, publish, stream, users
from handlers.params import (
    NO_STORE,
    Asked,
    Context,
    answer,
    check_origin,
    check_publish_key,
    encode,
    from_event_source,
    headers_of,
    origin,
    refuse,
    wait,
)

Handler = Callable[..., Any]


class Route(NamedTuple):
    """One row. `secret`: needs the publish key although it is a GET. `waits`: its handler only reads an
    `Asked` into a `Wish`, and the hub subscribes; to HEAD it answers the headers alone, and nobody does. `brief`: its
    handler takes no more than an `Asked`, and answers a document."""

    method: str
    path: str
    handler: Handler
    secret: bool = False
    waits: bool = False
    brief: bool = False


ROUTES = (
    Route("GET", "/", page.show),
    Route("GET", "/test/<user>", metabrew.test, waits=True),
    Route("POST", "/send/<user>", metabrew.send, brief=True),
    Route("GET", "/poll/<names>", poll.poll, waits=True),
    Route("GET", "/events/<names>", stream.events, waits=True),
    Route("GET", "/stream/<names>", stream.lines, waits=True),
    Route("POST", "/publish/<channel>", publish.one),
    Route("POST", "/publish", publish.batch),
    Route("GET", "/channels/<channel>", channels.show),
    Route("GET", "/channels/<channel>/history", channels.history),
    Route("DELETE", "/channels/<channel>", channels.delete),
    Route("GET", "/users/<user>/followers", users.followers),
    Route("GET", "/users/<user>/following", users.following),
    Route("PUT", "/users/<user>/following/<other>", users.follow),
    Route("DELETE", "/users/<user>/following/<other>", users.unfollow),
    Route("POST", "/follows", users.load),
    Route("GET", "/healthz", health.alive),
    Route("GET", "/readyz", health.ready),
    Route("GET", "/stats", health.stats, secret=True),
)

Reply = tuple[str, Sequence[tuple[str, str]], bytes]
"""As `comet.server.posts` has it."""

_OK: Final = "200 OK"
_HEADERS: Final = (("Content-Type", "application/json"), *NO_STORE.items())

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"})
"""Every method that gets here; the server refuses the rest."""

log = logging.getLogger("handlers")

_SLUGS = {404: "not-found", 500: "internal"}
_DETAILS = {
    "not-found": "There is nothing at this path; README.md lists the paths.",
    "internal": "The server failed at this request; its log says how.",
    "bad-request": "The request could not be read.",
}


def mount(application: Bottle, context: Context) -> None:
    """Put the URL table on `application`."""
    origins = Origins(context.settings.origins)
    methods: dict[str, set[str]] = {}
    for route in ROUTES:
        names = methods.setdefault(route.path, {"OPTIONS"})
        names.add(route.method)
        if route.method == "GET":
            names.add("HEAD")  # bottle runs the GET and drops the body
        short = {"waiter": route.handler} if route.waits else {"brief": route.handler} if route.brief else {}
        application.route(route.path, route.method, _guarded(route, context, origins), **short)
    for path, names in methods.items():
        allow = ", ".join(sorted(names))
        application.route(path, "OPTIONS", _options(allow))
        application.route(path, sorted(METHODS - names), _wrong_method(allow, context))
    application.default_error_handler = lambda error: _error(error, context)
    if origins:
        application.add_hook("after_request", lambda: _tell_browser(origins))


def reader(application: Bottle, context: Context) -> Callable[[str, Mapping[str, str], str | None], Wish | None]:
    """The short way to the handlers that wait, past bottle's request: path, query and Last-Event-ID to
    what the client wishes; None where bottle has to answer. Raises Refusal, changes nothing."""
    look_up = _short(application, "GET", "waiter")

    def read(path: str, query: Mapping[str, str], last_event_id: str | None) -> Wish | None:
        found = look_up(path)
        if found is None:
            return None
        waiter, arguments = found
        wish: Wish = waiter(context, Asked(query, last_event_id), **arguments)
        return wish

    return read


def caller(application: Bottle, context: Context) -> Callable[[str, str, bytes], Callable[[], Reply] | None]:
    """The short way to the handlers that are brief, past bottle's request: path, Authorization and body to what
    answers; None where bottle has to."""
    look_up = _short(application, "POST", "brief")
    settings = context.settings
    plain = not Origins(settings.origins)  # else there are headers to add

    def call(path: str, authorization: str, body: bytes) -> Callable[[], Reply] | None:
        found = look_up(path)
        if found is None or len(body) > settings.max_body or not plain:
            return None
        handler, arguments = found

        def reply() -> Reply:
            try:
                check_publish_key(settings, authorization)
                return _OK, _HEADERS, encode(handler(context, Asked({}, None, body), **arguments))
            except Refusal as refusal:
                refused = refuse(refusal, context.stats, None)  # the server gives it an id
                return refused.status_line, refused.headerlist, refused.body

        return reply

    return call


def _short(application: Bottle, method: str, kind: str) -> Callable[[str], tuple[Handler, dict[str, str]] | None]:
    """Looks up the handler of a path, and its one argument, the path's last part, among those that have a short way."""
    match = application.router.match
    known: dict[str, tuple[Handler, str]] = {}

    def look_up(path: str) -> tuple[Handler, dict[str, str]] | None:
        folder, _, last = path.rpartition("/")
        if not last:
            return None
        found = known.get(folder)
        if found is None:
            try:
                route, arguments = match({"PATH_INFO": path, "REQUEST_METHOD": method})
            except HTTPError:
                return None
            handler = route.config.get(kind)
            if handler is None:
                return None
            (name,) = arguments
            found = known[folder] = handler, name  # as many as there are routes of the kind
        return found[0], {found[1]: last}

    return look_up


def _guarded(route: Route, context: Context, origins: Origins) -> Handler:
    """The route's handler behind its checks; what it refuses becomes an answer."""
    writes = route.method != "GET"
    needs_key = writes or route.secret
    handler = route.handler

    def call(**arguments: str) -> Any:
        try:
            if writes:
                check_origin(origins)
            if needs_key:
                check_publish_key(context.settings, request.headers.get("Authorization", ""))
            if route.waits:
                wish: Wish = handler(context, Asked.now(), **arguments)
                return headers_of(wish.framing) if request.method == "HEAD" else wait(context.hub, wish)
            if route.brief:
                return answer(handler(context, Asked.now(), **arguments))
            return handler(context, **arguments)
        except Refusal as refusal:
            return refuse(refusal, context.stats, origin(), from_event_source(), context.settings.events_end == "abort")
        except HTTPResponse:
            raise  # an answer, in bottle's way
        except Exception:
            who = origin()
            if who is None:
                raise  # another server's to log
            context.stats.errors += 1
            log.exception("a handler failed", extra=who.fields())
            return refuse(Refusal("internal", _DETAILS["internal"]), context.stats, who)

    return call


def _wrong_method(allow: str, context: Context) -> Handler:
    refusal = Refusal("method-not-allowed", f"This path has the methods {allow}.")
    return lambda **_: refuse(refusal, context.stats, origin(), Allow=allow)


def _options(allow: str) -> Handler:
    return lambda **_: HTTPResponse("", 204, {"Allow": allow})


def _error(error: HTTPError, context: Context) -> bytes:
    """What bottle itself refuses (no such path) or catches, in our words."""
    slug = _SLUGS.get(error.status_code, "bad-request")
    if slug == "internal":
        context.stats.errors += 1  # bottle has written the traceback to wsgi.errors
    refused = refuse(Refusal(slug, _DETAILS[slug]), context.stats, origin())
    for name, value in refused.headerlist:
        response.set_header(name, value)
    body: bytes = refused.body
    return body


def _tell_browser(origins: Origins) -> None:
    """Set the CORS headers of every answer, a refusal included."""
    for name, value in origins.headers(request.headers.get("Origin", ""), preflight=request.method == "OPTIONS"):
        response.set_header(name, value)
