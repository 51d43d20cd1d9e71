"""A worker that has to wait for a core looks at its sockets less often, and finds more each time.

Sixty workers on two cores are woken by each request and each message, several thousand times a second in all, and each time
their part of the core's caches is cold: that costs more than what there is to do. Who has waited for a core is late by that
anyway; if it rests between two turns of its loop meanwhile, it does in one turn what would have been several, and the machine
gets more done. So the slower the machine, the fewer turns. A worker that gets its core at once never rests.

Neighbours: `comet.turn`, whose `PACE` it sets; `app.py` has a worker `look` once a second. The router does the same in its own
way (`Router.rest`): it knows how many it has woken.
"""

import time
from collections.abc import Callable

from comet.kernel.processes import waited
from comet.turn import PACE

OF_WAIT = 0.25
"""Seconds of rest for each second that it has waited in one: of sixty workers that are woken together each waits a quarter of
the time where two cores are busy to nine tenths, and three fifths where they are busy altogether."""

MOST = 0.1
"""Seconds from one turn to the next: a message passes two workers and the router, and each may have just begun to rest."""

SOON = 0.1
"""Seconds within which a wait says nothing yet."""


class Rest:
    """Of this process. `waited` answers the seconds that it has waited for a core so far; `rest` has the loop rest so long."""

    def __init__(
        self,
        waited: Callable[[], float] = waited,
        rest: Callable[[float], None] = PACE.rest,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._waited = waited
        self._rest = rest
        self._clock = clock
        self._looked = clock()
        self._before = waited()

    def look(self) -> None:
        """Rest as its wait since the last look suggests."""
        now, waited = self._clock(), self._waited()
        passed = now - self._looked
        if passed >= SOON:
            self._rest(min(MOST, OF_WAIT * (waited - self._before) / passed))
            self._looked, self._before = now, waited
