"""Long poll: an answer as soon as there is something to say."""

from collections.abc import Iterable

from comet.framing import POLL
from comet.message import parse_channels
from handlers.params import Context, number, since, subscribe

MAX_TIMEOUT = 300.0
"""Seconds a client may ask to wait."""


def poll(context: Context, names: str) -> Iterable[bytes]:
    """GET /poll/<channels>: every message since the cursor, at once if there are any; an empty list
    after ``?timeout=`` seconds. Timeout 0 answers at once in any case: the way to get a cursor."""
    channels = parse_channels(names)
    timeout = number("timeout", context.settings.poll_timeout, MAX_TIMEOUT)
    return subscribe(context, channels, since(channels), POLL, timeout)
