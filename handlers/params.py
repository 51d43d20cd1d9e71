"""What handlers take from a request and how they answer: parsing, checking, refusing, once for all.

Handlers receive a `Context` and plain arguments and raise `Refusal`; `handlers.mount` turns that
into the JSON answer. The current request is bottle's `request`, which is the greenlet's own.
"""

import hmac
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bottle import HTTPResponse, request, response

from comet import log as logs
from comet import refusals
from comet.errors import Refusal
from comet.framing import Framing, json_line
from comet.hub import Hub
from comet.log import Origin
from comet.message import Since, parse_cursor, resume_from
from comet.origins import Origins, is_own
from comet.refusals import wants_events
from comet.settings import Settings
from comet.stats import Stats
from comet.subscriber import Wish
from comet.subscriptions import Subscriptions

if TYPE_CHECKING:  # it brings Redis' client, which only those load who have it
    from comet.subscriptions_redis import RedisSubscriptions

_NUMBER = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)
_KEY = re.compile(r"[!-~]{1,200}")

MAX_PARAMETERS = 100
"""Query parameters of a request: bottle takes 13 ms for the 8,000 that a head has room for."""

NO_STORE = {"Cache-Control": "no-store"}

LAST_EVENT_IDS = ("lastEventId", "last_event_id", "lastEventID", "Last-Event-ID")
"""Query parameters under which clients that can't set a header send the id of their last event. event-source-polyfill sends the
first; for Mercure it is set to one of the last two."""


class Asked(NamedTuple):
    """What a handler that waits, pages or is brief may want of its request; it has nothing else. So the same
    handler serves bottle and the server's short ways (`handlers.reader`, `handlers.caller`). A `body` of None
    is still to be read."""

    query: Mapping[str, str]
    last_event_id: str | None = None
    body: bytes | None = None

    @classmethod
    def now(cls) -> "Asked":
        """Of bottle's current request. Raises Refusal ``bad-parameter``."""
        return cls(query(), request.headers.get("Last-Event-ID"))

    def text(self, most: int) -> bytes:
        """As `text_body`."""
        return text_body(most) if self.body is None else check_text(self.body)

    @property
    def key(self) -> str | None:
        """As `idempotency_key`; who sends one does not come the short way."""
        return idempotency_key() if self.body is None else None


class Context(NamedTuple):
    """What handlers work with; `service` answers what `/stats` says, `worker` is this process's number, and `missing` answers how many
    workers can't be started."""

    hub: Hub
    subscriptions: "Subscriptions | RedisSubscriptions"
    settings: Settings
    stats: Stats
    service: Callable[[], Mapping[str, Any]]
    worker: int = 0
    missing: Callable[[], Mapping[str, Any]] = lambda: {"workers": 0}


def encode(document: Any) -> bytes:
    """A JSON document and a newline, on one line (`json_line`)."""
    return json_line(document) + b"\n"


def answer(document: Any, status: int = 200) -> HTTPResponse:
    """As `encode` has it."""
    return answer_bytes(encode(document), status)


def answer_bytes(body: bytes, status: int = 200, content_type: str = "application/json") -> HTTPResponse:
    """A whole body of bytes."""
    return HTTPResponse(body, status, {"Content-Type": content_type, **NO_STORE})


def origin() -> Origin | None:
    """Whose bottle's current request is; None on another server than comet's."""
    known = request.environ.get("comet.origin")
    return None if known is None else known()


def from_event_source() -> bool:
    """Return whether bottle's current request is an EventSource's."""
    return wants_events(request.method, request.path, request.headers.get("Accept", ""))


def refuse(
    refusal: Refusal, stats: Stats, origin: Origin | None, events: bool = False, abort: bool = False, **headers: str
) -> HTTPResponse:
    """The answer to a refused request; counts it. Where `origin` is known it has the request's id. `events` says that the
    client is an EventSource, `abort` that a stream ends without its end."""
    stats.refused[refusal.slug] += 1
    status, fields, body = refusals.answer(refusal, events)
    refused = HTTPResponse(_cut(body) if abort and status == 200 else body, status, dict(fields))
    if origin is not None:
        logs.refused(refusal.slug, origin)
        refused.set_header("X-Request-ID", origin.request)
    for name, value in headers.items():
        refused.set_header(name, value)
    return refused


def _cut(body: bytes) -> Iterator[bytes]:
    """Yield `body`, and then break the connection off, as a client sees it: the server can send no more."""
    yield body
    raise ConnectionAbortedError("a stream ends without its end (--events-end abort)")


def wait(hub: Hub, wish: Wish) -> Iterable[bytes]:
    """The body of bottle's answer to a request that waits for messages.

    Comet's server parks the subscriber, if it lets its client come to more channels; any other WSGI server iterates it, and notices at the
    next write that a client is gone.
    """
    admit = request.environ.get("comet.admit")
    if admit is not None and wish.patience != 0:  # who does not wait makes no channel
        admit()
    subscriber = hub.subscribe(wish)
    for name, value in subscriber.framing.headers(subscriber.cursor):
        response.set_header(name, value)
    park = request.environ.get("comet.park")
    return subscriber if park is None else park(subscriber)


def headers_of(framing: Framing) -> Iterable[bytes]:
    """The answer to a HEAD of a request that would wait: the headers of its answer, without where it starts, since nothing is
    subscribed to."""
    for name, value in framing.headers(None):
        response.set_header(name, value)
    return iter((b"\n",))  # which bottle drops; of an answer that is empty it would say a length, 0


def since(asked: Asked, channels: Sequence[str]) -> Sequence[Since]:
    """Where the client wants to start. Its last event's id wins over ?since=, because an EventSource that
    reconnects sends its first URL again: the header, then `LAST_EVENT_IDS`. None of them: now. Raises Refusal ``bad-cursor`` for a
    ``?since=``, which somebody wrote; an id may be of another server, and is then `comet.message.FOREIGN`."""
    query = asked.query
    last = asked.last_event_id
    if not last and query:
        last = next(filter(None, map(query.get, LAST_EVENT_IDS)), None)
    if last:
        return resume_from(last, len(channels))
    text = query.get("since")
    return parse_cursor(text, len(channels)) if text else [None] * len(channels)


def query() -> Mapping[str, str]:
    """Return the query parameters of bottle's current request. Raises Refusal ``bad-parameter``."""
    if request.query_string.count("&") >= MAX_PARAMETERS:
        raise Refusal("bad-parameter", f"A request has at most {MAX_PARAMETERS} query parameters.")
    parameters: Mapping[str, str] = request.query
    return parameters


def number(asked: Asked, name: str, default: float, most: float, least: float = 0) -> float:
    """The query parameter `name`, from `least` to `most`. Raises Refusal ``bad-parameter``."""
    text = asked.query.get(name)
    if text is None:
        return default
    value = float(text) if _NUMBER.fullmatch(text) else -1.0
    if not least <= value <= most:
        raise Refusal("bad-parameter", f"?{name}= is a number from {least:g} to {most:g}.")
    return value


def check_content_encoding() -> None:
    """Raises Refusal ``bad-content-encoding`` if the request's body is compressed, or else not what it stands for. Whoever reads
    a body asks this first: such bytes may be valid text by chance, and a small body may decode to a very large one."""
    codings = {one.strip().lower() for one in request.headers.get("Content-Encoding", "").split(",")}
    if codings - {"", "identity"}:
        raise Refusal("bad-content-encoding", "A body is taken as it is: send it without Content-Encoding (or as 'identity').")


def body(most: int) -> bytes:
    """The request's body, at most `most` bytes. Raises Refusal ``bad-content-encoding``, and ``body-too-large`` before reading it
    where its length is known."""
    check_content_encoding()
    too_large = Refusal("body-too-large", f"A body here has at most {most} bytes; send less, or in parts.")
    if request.content_length > most:
        raise too_large
    # a server may leave the end of the input to us (PEP 3333): then a body has a length
    size = most + 1 if request.environ.get("wsgi.input_terminated") else max(0, request.content_length)
    data: bytes = request.environ["wsgi.input"].read(size)
    if len(data) > most:
        raise too_large
    return data


def pieces(size: int) -> Iterator[bytes]:
    """Yield the request's body of any length, as it comes, in pieces of at most `size` bytes. Say by `hold` how much is kept of it.

    It has more time than another body, since who sends much is kept waiting by who takes it. Raises Refusal ``bad-content-encoding``.
    """
    check_content_encoding()
    environ = request.environ
    left = None if environ.get("wsgi.input_terminated") else max(0, request.content_length)
    again = environ.get("comet.more_time", lambda: None)
    while piece := environ["wsgi.input"].read1(size if left is None else min(size, left)):
        if left is not None:
            left -= len(piece)
        yield piece
        again()


def hold(size: int) -> None:
    """Tell the server how many bytes are held of what has come of the body, in whatever form. Raises Refusal ``bodies-full``."""
    request.environ.get("comet.hold", lambda _: None)(size)


def text_body(most: int) -> bytes:
    """As `body`, checked to be UTF-8. Raises Refusal ``bad-body``."""
    return check_text(body(most))


def check_text(data: bytes) -> bytes:
    """`data` itself. Raises Refusal ``bad-body`` where it is not UTF-8."""
    try:
        data.decode()
    except UnicodeDecodeError:
        raise Refusal("bad-body", "A message is UTF-8 text; encode other things, for example as base64.") from None
    return data


def idempotency_key() -> str | None:
    """The Idempotency-Key header. Raises Refusal ``bad-key``."""
    key = request.headers.get("Idempotency-Key")
    return None if key is None else check_key(key)


def check_key(key: str) -> str:
    """`key` itself. Raises Refusal ``bad-key``."""
    if not _KEY.fullmatch(key):
        raise Refusal("bad-key", "An idempotency key is 1 to 200 printable ASCII characters without spaces.")
    return key


def check_publish_key(settings: Settings, authorization: str) -> None:
    """Raises Refusal ``unauthorized`` unless this Authorization carries the publish key, if there is one."""
    if not settings.publish_key:
        return
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), settings.publish_key.encode()):
        raise Refusal("unauthorized", "This needs the publish key: send it as 'Authorization: Bearer KEY'.")


def check_origin(origins: Origins) -> None:
    """Raises Refusal ``origin-refused`` for a page of an origin that may not write here: a browser
    would send a simple POST to any address its user can reach, loopback included. The service's own is that of its Host, with the
    scheme that a trusted proxy names, or either where none does."""
    origin = request.headers.get("Origin")
    if origin is None or origins.allow(origin):
        return
    if not is_own(origin, request.headers.get("Host", ""), request.environ.get("comet.scheme", "")):
        raise Refusal("origin-refused", f"Pages of {origin[:200]} may not publish here; --origins names those that may.")
