"""Refusals on the wire: the answer that a client reads.

Neighbours: `handlers.params` and `comet.server.connection`, which send it. Most clients get JSON with the
status of the slug. A browser's EventSource gives up for ever on any status but 200 (WHATWG HTML, section 9.2.3,
"fail the connection"), so it gets a refusal that will pass as a stream that ends at once and says when to come back.
"""

import random
import re
from typing import Final, NamedTuple

import msgspec

from comet.errors import Refusal

EVENTS_PATH: Final = "/events/"
"""Where server-sent events are: everywhere else an EventSource could not read the answer of a request that is let in, either."""

MOST_PARTS: Final = 32
"""Media ranges of an Accept header that are read, and parameters of one: a browser's EventSource sends one or a few, and 16 KiB of
commas would take six milliseconds."""

_WEIGHT = re.compile(r"0(\.0{0,3})?", re.ASCII)
"""A quality value of zero, "not acceptable" (RFC 9110, section 12.4.2)."""


class Answer(NamedTuple):
    """A whole answer, but for the headers that say how its body is framed."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


def wants_events(method: str, path: str, accept: str) -> bool:
    """Return whether a request is an EventSource's: a GET under `EVENTS_PATH` whose Accept header names text/event-stream itself."""
    return method == "GET" and path.startswith(EVENTS_PATH) and any(map(_names_events, accept.split(",", MOST_PARTS)[:MOST_PARTS]))


def _names_events(media_range: str) -> bool:
    kind, *parameters = media_range.split(";", MOST_PARTS)[: MOST_PARTS + 1]
    if kind.strip().lower() != "text/event-stream":
        return False
    pairs = (parameter.partition("=") for parameter in parameters)
    return not any(name.strip().lower() == "q" and _WEIGHT.fullmatch(value.strip()) for name, _, value in pairs)


def answer(refusal: Refusal, events: bool) -> Answer:
    """Return what a refused client reads; `events` says that it `wants_events`."""
    more = tuple(refusal.headers.items())
    wait = refusal.headers.get("Retry-After")
    if events and wait is not None:
        status, kind, body = 200, "text/event-stream; charset=utf-8", _stream(refusal, int(wait))
    else:
        status, kind, body = refusal.status, "application/json", msgspec.json.encode(refusal.document()) + b"\n"
    return Answer(status, (("Content-Type", kind), ("Cache-Control", "no-store"), *more), body)


def _stream(refusal: Refusal, wait: int) -> bytes:
    """Make a block without data, which is no event to a browser. All who were refused together come back at different times: after
    `wait` seconds, or up to twice that."""
    detail = " ".join(refusal.detail.split())  # a comment ends with its line
    return f": {refusal.slug}: {detail}\nevent: comet\nretry: {random.randint(1000 * wait, 2000 * wait)}\n\n".encode()
