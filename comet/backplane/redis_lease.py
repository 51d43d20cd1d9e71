"""A worker's signs of life in Redis, and who gives none any more.

Neighbours: `comet.backplane.redis_following`, whose counts stand under this worker's `node`: an id for which it gives a sign of
life each second. Who gives none for `LEASE` seconds is dead to the others, who take off its counts, and comes back under another id.
"""

import logging
import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from comet.backplane.redis_calls import Calls
from comet.backplane.redis_scripts import HOLD, Scripts
from comet.errors import Refusal

LEASE: Final = 10.0
"""Seconds without a sign of life after which a worker's counts are nobody's."""

KEEP: Final = 4 * HOLD
"""Seconds that it is remembered who has died: longer than any log can have its counts."""

FORMER: Final = 4
"""Former ids of its own that a worker remembers, at most: each has `LEASE` seconds until Redis calls it dead."""

log = logging.getLogger("comet.backplane")


class Lease:
    """`key` is where the signs are in Redis. `came_back` is called when this worker has another id, `emptied` when Redis has
    forgotten who lives, and so everything."""

    def __init__(self, calls: Calls, scripts: Scripts, key: bytes, came_back: Callable[[], None], emptied: Callable[[], None]) -> None:
        self._calls = calls
        self._scripts = scripts
        self._key = key
        self._came_back = came_back
        self._emptied = emptied
        self.node = _name()
        self.dead = ""
        """Ids of workers that have died, lately."""
        self.former = ""
        """Former ids of this worker that Redis does not call dead yet: whatever is counted under the present one replaces their counts."""
        self._given = -math.inf
        """When the last sign that was acknowledged was given, or before: the others may count from then on."""
        self._refused = False
        """Redis would not take the last one: it can't order anything, either."""
        self._under_way: tuple[str, float] | None = None
        """The one that is: of whom, and when it was given."""
        self._since = time.monotonic()

    @property
    def valid(self) -> bool:
        """This worker lives, as far as Redis has said."""
        return time.monotonic() - self._given < LEASE

    @property
    def well(self) -> bool:
        """This worker lives, and Redis did what it was asked last."""
        return self.valid and not self._refused

    def returned(self) -> None:
        """A connection was made: just after an outage everybody seems dead."""
        self._since = time.monotonic()

    def beat(self) -> None:
        """Say that this worker lives, and hear who does not. Called about once a second."""
        if self._given > 0 and not self.valid:
            self._come_back()
        if self._under_way is None:
            self._under_way = self.node, time.monotonic()

            def make() -> Sequence[Any]:  # after an outage it is given when it is sent
                self._under_way = self.node, time.monotonic()
                return self._sign(0.0)

            self._calls.ask(self._key, make, self._answered, timeout=1.0)

    def end(self, answered: Callable[[Any], None]) -> None:
        """Let this worker be dead at once, so that nobody counts its subscribers."""
        self._calls.ask(self._key, lambda: self._sign(LEASE), answered, timeout=1.0)

    def _sign(self, ago: float) -> Sequence[Any]:
        arguments = (self.node, *(round(1000 * seconds) for seconds in (LEASE, KEEP, ago)))
        return self._scripts.heartbeat.command((self._key,), arguments)

    def _come_back(self) -> None:
        self.former = " ".join([*self.former.split(), self.node][-FORMER:])
        self.node = _name()
        self._given = -math.inf
        self._came_back()

    def _answered(self, reply: Any) -> None:
        assert self._under_way is not None
        (node, given), self._under_way = self._under_way, None
        self._refused = isinstance(reply, Refusal)
        if self._refused or node != self.node:
            return
        was, dead = reply
        if was == b"dead":  # to the others, though not to itself: the clock of Redis' machine was set
            self._come_back()
            self.beat()  # before the counts: those of an id that never gave a sign are nobody's to take off
            return
        if was == b"new" and self._given > 0:
            log.warning("Redis has lost what it knew: every channel begins anew")
            self._emptied()
        self._given = given
        self.dead = dead.decode() if time.monotonic() - self._since > LEASE else ""
        self.former = " ".join(node for node in self.former.split() if node not in self.dead)


def _name() -> str:
    """Of a worker: short, since it stands in the log of each channel that it holds."""
    return "".join(random.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", k=5))
