"""Long poll: an answer as soon as there is something to say."""

from comet.framing import POLL
from comet.message import parse_channels
from comet.subscriber import Wish
from handlers.params import Asked, Context, number, since

MAX_TIMEOUT = 300.0
"""Seconds a client may ask to wait."""


def poll(context: Context, asked: Asked, names: str) -> Wish:
    """GET /poll/<channels>: every message since the cursor, at once if there are any; an empty list
    after ``?timeout=`` seconds. Timeout 0 answers at once in any case: the way to get a cursor."""
    channels = parse_channels(names)
    timeout = number(asked, "timeout", context.settings.poll_timeout, MAX_TIMEOUT)
    return Wish(channels, since(asked, channels), POLL, timeout)
