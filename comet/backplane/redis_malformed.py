"""A count in /stats, and a line in the log once a minute, of things in Redis that cannot be read.

Neighbours: `comet.backplane.redis_format`, which finds them (`Malformed`); `comet.backplane.redis_following` and
`comet.backplane.redis`, which tell of them here and go on. Every worker that follows a channel meets the same entry, and one of them
speaks for the service (`comet.backplane.redis_speaker`).
"""

import logging
import time
from collections.abc import Callable
from typing import Final

from comet.backplane.redis_speaker import Speaker

QUIET: Final = 60.0
"""Seconds between two lines of the log, however much cannot be read meanwhile: who writes garbage may do so often."""

log = logging.getLogger("comet.backplane")


class Garbage:
    """The things that one process has met. `count` adds to the counter in /stats; `descriptor` is the board's and `place` a byte of it,
    the same in all workers of a service, None where there is one process alone. Nothing here blocks."""

    def __init__(
        self,
        count: Callable[[int], None] = lambda number: None,
        descriptor: int | None = None,
        place: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._count = count
        self._speaker = Speaker(descriptor, place)
        self._clock = clock
        self._until: float | None = None
        """When this process may speak again, or has to let another one speak; None while it does not hold the lock."""

    def met(self, channel: str, number: int, why: str) -> None:
        """Count so many things of a channel that could not be read."""
        self._count(number)
        if self._until is None and self._speaker.speaks():
            self._until = self._clock() + QUIET
            log.warning(
                "Redis has something of channel %s that cannot be read (%s): its clients are told a gap. Who else writes to this Redis, "
                "under this prefix? The next line about it comes in %d s at the earliest; /stats counts on as malformed",
                channel, why, QUIET,
            )  # fmt: skip

    def expire(self) -> None:
        """Let the next one speak, after `QUIET`. Called about once a second."""
        if self._until is not None and self._clock() >= self._until:
            self._until = None
            self._speaker.be_silent()
