"""Lines of the log about a Redis that is away, or refuses what comet asks: once a service, by name, and when it is back.

Neighbours: `comet.backplane.redis_link` and `comet.backplane.redis_shards`, which find out. Each worker finds it out for
itself. The first that does speaks (`comet.backplane.redis_speaker`), until all that it has told of is back. A worker that alone can't
reach Redis may speak at its next try.
"""

import logging
import time
from collections.abc import Callable
from typing import Final

from comet.backplane.redis_speaker import Speaker

MOST: Final = 8
"""Different reasons that are told of one outage, at most."""

QUIET: Final = 60.0
"""Seconds without an error after which the same error is told again."""

RIGHTS: Final = "; its user needs the rights that README names (Many machines)"

log = logging.getLogger("comet.backplane")


class Outage:
    """The outages of one process. `descriptor` is the board's and `place` a byte of it, the same in all workers of a service;
    None where there is one process alone."""

    def __init__(self, descriptor: int | None = None, place: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._speaker = Speaker(descriptor, place)
        self._clock = clock
        self._told: dict[str, set[str]] = {}
        self._since: dict[str, float] = {}
        self._refused: set[str] = set()
        """The errors that were told."""
        self._until = 0.0
        """When those may be told again, unless another comes."""

    def away(self, title: str, why: str) -> None:
        """Say that the server of this name can't be reached, unless that was said. Does not block."""
        told = self._told.get(title)
        if told is None:
            if not self._speaks():
                return
            told = self._told[title] = set()
            self._since[title] = self._clock()
        if why not in told and len(told) < MOST:
            told.add(why)
            log.warning("%s can't be reached (%s); publishing is refused until it can, and comet keeps trying", title, why)

    def back(self, title: str) -> None:
        """Say that it is there again, if this process has said that it was away."""
        if self._told.pop(title, None) is not None:
            log.info("%s is reached again after %.1f s", title, self._clock() - self._since.pop(title))
            self._be_silent()

    def forget(self, title: str) -> None:
        """Nobody asks for this server any more."""
        if self._told.pop(title, None) is not None:
            del self._since[title]
            self._be_silent()

    def refuses(self, title: str, error: str) -> None:
        """Say that the server of this name answers with an error, unless that was said. Does not block."""
        error = error.partition(" script: ")[0]  # Redis 7 appends which script, and which line of it
        if not self._speaks():
            return
        self._until = self._clock() + QUIET
        if error not in self._refused and len(self._refused) < MOST:
            self._refused.add(error)
            log.error("%s refuses what comet asks (%s)%s", title, error, RIGHTS if error.startswith("NOPERM") else "")

    def expire(self) -> None:
        """Forget the errors that were told, after `QUIET`. Called about once a second."""
        if self._refused and self._clock() >= self._until:
            self._refused.clear()
            self._be_silent()

    def _speaks(self) -> bool:
        return bool(self._told or self._refused) or self._speaker.speaks()

    def _be_silent(self) -> None:
        if not self._told and not self._refused:
            self._speaker.be_silent()
