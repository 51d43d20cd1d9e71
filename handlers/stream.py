"""Streams that stay open: server-sent events, and lines of JSON."""

from functools import cache

from comet.framing import LINES, Framing, ServerSentEvents
from comet.message import parse_channels
from comet.subscriber import Subscriber
from handlers.params import Asked, Context, since

_sse = cache(ServerSentEvents)


def events(context: Context, asked: Asked, names: str) -> Subscriber:
    """GET /events/<channels>: for EventSource."""
    return _open(context, asked, names, _sse(context.settings.retry))


def lines(context: Context, asked: Asked, names: str) -> Subscriber:
    """GET /stream/<channels>: NDJSON."""
    return _open(context, asked, names, LINES)


def _open(context: Context, asked: Asked, names: str, framing: Framing) -> Subscriber:
    channels = parse_channels(names)
    return context.hub.subscribe(channels, since(asked, channels), framing, context.settings.heartbeat)
