"""What the log says of a Redis that is away: once a service, by name, and when it is back.

Neighbours: `comet.backplane.redis_link` and `comet.backplane.redis_shards`, which find out. Each worker finds it out for
itself; sixty lines of it would say no more than one. So the first that does takes a lock and speaks, until all that it has
told of is back. The lock is on a byte of the board's memory, as a permit's is (`comet.permit`): the kernel gives it back
when a worker dies. A worker that alone can't reach Redis finds the lock free at its next try, and speaks then.
"""

import fcntl
import logging
import time
from typing import Final

MOST: Final = 8
"""Different reasons that are told of one outage, at most."""

log = logging.getLogger("comet.backplane")


class Outage:
    """The outages of one process. `descriptor` is the board's and `place` a byte of it, the same in all workers of a service;
    None where there is one process alone."""

    def __init__(self, descriptor: int | None = None, place: int = 0) -> None:
        self._descriptor = descriptor
        self._place = place
        self._told: dict[str, set[str]] = {}
        self._since: dict[str, float] = {}

    def away(self, title: str, why: str) -> None:
        """Say that the server of this name can't be reached, unless that was said. Does not block."""
        told = self._told.get(title)
        if told is None:
            if not self._told and not self._speaks():
                return
            told = self._told[title] = set()
            self._since[title] = time.monotonic()
        if why not in told and len(told) < MOST:
            told.add(why)
            log.warning("%s can't be reached (%s); publishing is refused until it can, and comet keeps trying", title, why)

    def back(self, title: str) -> None:
        """Say that it is there again, if this process has said that it was away."""
        if self._told.pop(title, None) is not None:
            log.info("%s is reached again after %.1f s", title, time.monotonic() - self._since.pop(title))
            self._be_silent()

    def forget(self, title: str) -> None:
        """Nobody asks for this server any more."""
        if self._told.pop(title, None) is not None:
            del self._since[title]
            self._be_silent()

    def _speaks(self) -> bool:
        if self._descriptor is None:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._place)
        except OSError:  # another worker has it
            return False
        return True

    def _be_silent(self) -> None:
        if self._descriptor is not None and not self._told:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, self._place)
