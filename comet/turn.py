"""A turn for everybody else, in the middle of work that would hold the event loop for too long."""

import gevent

_SOON = 1e-9


def give_way() -> None:
    """Let everything else that is ready run, and sockets be looked at. Not ``sleep(0)``: gevent runs up to fifty
    greenlets that do so before it looks at sockets again."""
    gevent.sleep(_SOON)
