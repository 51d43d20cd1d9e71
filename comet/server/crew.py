"""Greenlets that work for one client after the other.

A greenlet's first Python frame takes a 16 KiB chunk from the kernel and gives it back at the end:
at ten thousand short-lived greenlets a second that is a good part of the time. So a greenlet that has
finished its work waits for the next; while it works it is one client's alone.
"""

import logging
from collections.abc import Callable
from typing import Any

from gevent import get_hub
from greenlet import getcurrent, greenlet

MOST_WAITING = 32
"""Greenlets kept for the next work."""

log = logging.getLogger("comet.server")

Work = Callable[[Any], None]


class Crew:
    """Does `work(argument)`, which must not raise, in a greenlet."""

    def __init__(self) -> None:
        self._hub = get_hub()
        self._waiting: list[greenlet] = []

    def run(self, work: Work, argument: Any = None) -> None:
        """Soon, in its turn. Never blocks."""
        self._hub.loop.run_callback(self._worker().switch, work, argument)

    def begin(self, work: Work, argument: Any = None) -> None:
        """At once, up to where it first waits: for the callbacks of the event loop alone."""
        self._worker().switch(work, argument)

    def _worker(self) -> greenlet:
        return self._waiting.pop() if self._waiting else greenlet(self._live, self._hub)

    def _live(self, work: Work, argument: Any) -> None:
        while True:
            try:
                work(argument)
            except Exception:
                log.exception("a greenlet's work failed")
            del work, argument
            if len(self._waiting) >= MOST_WAITING:
                return
            self._waiting.append(getcurrent())
            work, argument = self._hub.switch()
