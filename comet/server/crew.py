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
    """`run` starts `work(argument)` in a greenlet soon; it must not raise."""

    def __init__(self) -> None:
        self._hub = get_hub()
        self._waiting: list[greenlet] = []
        self.starting = 0
        """Works that were asked for and have not begun."""

    def run(self, work: Work, argument: Any = None) -> None:
        """Never blocks."""
        self.starting += 1
        worker = self._waiting.pop() if self._waiting else greenlet(self._live, self._hub)
        self._hub.loop.run_callback(worker.switch, work, argument)

    def _live(self, work: Work, argument: Any) -> None:
        while True:
            self.starting -= 1
            try:
                work(argument)
            except Exception:
                log.exception("a greenlet's work failed")
            del work, argument
            if len(self._waiting) >= MOST_WAITING:
                return
            self._waiting.append(getcurrent())
            work, argument = self._hub.switch()
