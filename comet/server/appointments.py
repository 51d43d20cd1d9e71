"""Numbers that are to be looked at on time: a timer wheel that costs nothing while it is empty.

`comet.server.parking` keeps most deadlines to a second or two, by a look once a second. The end of a short wait is kept here:
one timer of the event loop is set for the first of them, and for nothing while there are none. (Twenty looks a second by each of
sixty workers took 0.27 of a core.) A number stands here once: if its time was put off meanwhile, whoever is called says so.
"""

import time
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

AT_ONCE = 256
"""Calls in one turn of the loop: each ends a poll, which takes some 15 microseconds."""

TICK = 50
"""Milliseconds by which a call is late at most, beside what holds the loop up."""


class Appointments:
    """Calls `keep` with each number, at its time or up to `TICK` later. `keep` must not raise; it may make the next appointment.

    `loop` is gevent's; `clock` answers milliseconds.
    """

    def __init__(self, keep: Callable[[int], None], loop: Any, clock: Callable[[], int] = lambda: int(time.monotonic() * 1000)) -> None:
        self._keep = keep
        self._loop = loop
        self._clock = clock
        self._ticks: dict[int, int] = {}
        """Number -> its tick."""
        self._numbers: dict[int, list[int]] = {}
        """Tick -> numbers, some of which may have moved to an earlier one."""
        self._order: list[int] = []
        """A heap of the ticks."""
        self._timer: Any = None

    def __len__(self) -> int:
        return len(self._ticks)

    def make(self, number: int, time: int) -> None:
        """Have `number` looked at as soon as it is `time`, in milliseconds of the clock, or before, if that was agreed on already."""
        tick = time // TICK + 1
        before = self._ticks.get(number)
        if before is not None and before <= tick:
            return
        self._ticks[number] = tick
        numbers = self._numbers.get(tick)
        if numbers is not None:
            numbers.append(number)
            return
        self._numbers[tick] = [number]
        heappush(self._order, tick)
        if self._order[0] == tick:
            self._set(tick)

    def close(self) -> None:
        """Stop for good."""
        self._stop()
        self._ticks.clear()
        self._numbers.clear()
        self._order.clear()

    def _set(self, tick: int) -> None:
        self._stop()
        self._timer = self._loop.timer(max(0.0, (tick * TICK - self._clock()) / 1000))
        self._timer.start(self._ring)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()
            self._timer = None

    def _ring(self) -> None:
        """Look at those whose time has come, a few in each turn of the loop."""
        now = self._clock()
        order = self._order
        left = AT_ONCE
        while left and order and order[0] * TICK <= now:
            tick = heappop(order)
            numbers = self._numbers.pop(tick)
            for number in numbers[:left]:
                if self._ticks.get(number) == tick:
                    del self._ticks[number]
                    self._keep(number)
            later = numbers[left:]
            left = max(0, left - len(numbers))
            if later:
                if tick not in self._numbers:
                    heappush(order, tick)
                self._numbers[tick] = later + self._numbers.get(tick, [])
        self._stop()
        if order:
            self._set(order[0])
