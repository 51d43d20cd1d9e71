"""What the log says of a Redis that is away: once a service, by name, and when it is back.

Neighbours: `comet.backplane.redis_link` and `comet.backplane.redis_shards`, which find out. Each worker finds it out for
itself. The first that does speaks (`comet.backplane.redis_speaker`), until all that it has told of is back. A worker that alone can't
reach Redis may speak at its next try.
"""

import logging
import time
from typing import Final

from comet.backplane.redis_speaker import Speaker

MOST: Final = 8
"""Different reasons that are told of one outage, at most."""

log = logging.getLogger("comet.backplane")


class Outage:
    """The outages of one process. `descriptor` is the board's and `place` a byte of it, the same in all workers of a service;
    None where there is one process alone."""

    def __init__(self, descriptor: int | None = None, place: int = 0) -> None:
        self._speaker = Speaker(descriptor, place)
        self._told: dict[str, set[str]] = {}
        self._since: dict[str, float] = {}

    def away(self, title: str, why: str) -> None:
        """Say that the server of this name can't be reached, unless that was said. Does not block."""
        told = self._told.get(title)
        if told is None:
            if not self._told and not self._speaker.speaks():
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

    def _be_silent(self) -> None:
        if not self._told:
            self._speaker.be_silent()
