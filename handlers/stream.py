"""Streams that stay open: server-sent events, and lines of JSON."""

from functools import cache

from comet.framing import LINES, Framing, ServerSentEvents
from comet.message import parse_channels
from comet.subscriber import Wish
from handlers.params import Asked, Context, since

_sse = cache(ServerSentEvents)


def events(context: Context, asked: Asked, names: str) -> Wish:
    """GET /events/<channels>: for EventSource."""
    return _open(context, asked, names, _sse(context.settings.retry, context.settings.events_end == "abort"))


def lines(context: Context, asked: Asked, names: str) -> Wish:
    """GET /stream/<channels>: NDJSON."""
    return _open(context, asked, names, LINES)


def _open(context: Context, asked: Asked, names: str, framing: Framing) -> Wish:
    channels = parse_channels(names)
    return Wish(channels, since(asked, channels), framing, context.settings.heartbeat)
