"""Streams that stay open: server-sent events, and lines of JSON."""

from collections.abc import Iterable

from comet.framing import LINES, Framing, ServerSentEvents
from comet.message import parse_channels
from handlers.params import Context, since, subscribe


def events(context: Context, names: str) -> Iterable[bytes]:
    """GET /events/<channels>: for EventSource."""
    return _open(context, names, ServerSentEvents(context.settings.retry))


def lines(context: Context, names: str) -> Iterable[bytes]:
    """GET /stream/<channels>: NDJSON."""
    return _open(context, names, LINES)


def _open(context: Context, names: str, framing: Framing) -> Iterable[bytes]:
    channels = parse_channels(names)
    return subscribe(context, channels, since(channels), framing, context.settings.heartbeat)
