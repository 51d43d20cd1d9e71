"""The loop of a process without greenlets, as far as it is not what the process does: it waits for signals, for what is
said on a pipe, and for what is due. `comet.supervisor` goes round in it.

Signals arrive as numbers on a pipe of the loop's own: nothing runs in the middle of something else.
"""

import heapq
import math
import os
import select
import signal
import time
from collections.abc import Callable, Iterable
from itertools import count


class Loop:
    """From now on these `signals` are kept for `wait`; so are `pipes`, descriptors that others write to. One a process."""

    def __init__(self, signals: Iterable[int], pipes: Iterable[int]) -> None:
        self._wakeup, self._wake = os.pipe()
        self._poll = select.poll()
        for descriptor in (self._wakeup, self._wake):
            os.set_blocking(descriptor, False)
        for descriptor in (self._wakeup, *pipes):
            self._poll.register(descriptor, select.POLLIN)
        signal.set_wakeup_fd(self._wake)
        for number in signals:
            signal.signal(number, lambda number, frame: None)  # its number arrives at the other end of `_wake`
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = count()

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        """Have `run_due` do this in so many seconds."""
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._sequence), work))

    def wait(self, most: float) -> bytes:
        """Until there is a signal, something on a pipe, or something due, `most` seconds where nothing ever is; the signals
        that came, by number. Several of one kind may have merged into one."""
        timeout = max(0.0, self._due[0][0] - time.monotonic()) if self._due else most
        self._poll.poll(math.ceil(timeout * 1000))
        try:
            return os.read(self._wakeup, 4096)
        except BlockingIOError:
            return b""

    def run_due(self) -> None:
        """Do what is due now, the earliest first. What becomes due meanwhile waits for the next call: signals come first."""
        now = time.monotonic()
        while self._due and self._due[0][0] <= now:
            heapq.heappop(self._due)[2]()
