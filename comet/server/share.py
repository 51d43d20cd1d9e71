"""How many channels that nobody has published to each address has come to lately, for `--max-new-channels`.

A channel costs whoever orders messages memory until the linger time is over, and Redis a key, also if whoever came to it has left at
once. So an address that comes to ever new names would fill it. A channel that somebody comes to is new if no message was ever published
there; who comes back to one that this worker still knows joins without asking, and is not counted.

Counted in two spans of time, the one before and the one that runs: so what was counted is forgotten after one to two spans.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Final

from comet.errors import Refusal
from comet.server.parking import Sleeper

ADDRESSES: Final = 100_000
"""Addresses that are counted in a span. More make the next span begin: whoever has so many is bounded otherwise."""


class Share:
    """At most about `most` new channels an address in a `span` of seconds. `clock` is in seconds."""

    def __init__(self, most: int, span: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._span = span
        self._clock = clock
        self._ends = clock() + span
        self._now = Counter[str]()
        self._before = Counter[str]()

    def full(self, address: str) -> bool:
        """Return whether the address has had its share."""
        if not self._now and not self._before:
            return False
        self._turn()
        return self._now[address] + self._before[address] >= self._most

    def check(self, address: str) -> None:
        """Raise Refusal ``new-channels`` if the address has had its share."""
        if self.full(address):
            raise Refusal(
                "new-channels",
                f"{address} has come to {self._most} channels without messages in {self._span:g} s; come back later, to the same ones "
                "(--max-new-channels is the limit).",
            )

    def note(self, address: str, subscriber: Sleeper) -> None:
        """Count those channels of a new subscriber that are new."""
        places = subscriber.places
        new = int(not subscriber.offset) if places is None else sum(not position.offset for position in places.positions)
        if new:
            self._turn()
            self._now[address] += new

    def _turn(self) -> None:
        """Begin the next span if this one is over."""
        now = self._clock()
        if now >= self._ends or len(self._now) > ADDRESSES:
            self._before = self._now if now < self._ends + self._span else Counter()
            self._now = Counter()
            self._ends = now + self._span
