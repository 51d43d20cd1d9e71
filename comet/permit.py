"""Permission to send to very many clients: no more workers have it at a time than there are cores.

When sixty workers on two cores all send a message to their sixteen thousand clients, whoever has a message for one client
waits for a core behind the others. So a worker asks before such a sweep (`comet.fanout`), and those that wait sleep
meanwhile: their loops are free for everything else, and who sweeps has its caches for itself.

A permit is a lock on a byte of the board's memory (POSIX record locks, fcntl(2)): all workers of a service have that open
whatever their backplane is, the kernel gives the lock back when a worker dies, and wakes one that waits, not all. The
waiting is a thread's, made the first time that one is needed.
"""

import fcntl
import logging
from collections.abc import Callable
from typing import Any

from gevent import get_hub
from gevent.threadpool import ThreadPool

from comet.turn import PACE, Alarm

PATIENCE = 10.0
"""Seconds after which a worker goes ahead without: whoever holds the permit may be stopped, and is replaced only after
`--hang-limit`. Sixty workers of 17,000 clients are done in half of it."""

log = logging.getLogger("comet")


class Permit:
    """One worker's place in the queue for byte `place` of the file `descriptor`. Ask once, give back once."""

    def __init__(self, descriptor: int, place: int) -> None:
        self._descriptor = descriptor
        self._place = place
        self._pool: Any = None
        self._patience = Alarm(PATIENCE, self._go_ahead)
        self._granted: Callable[[], None] | None = None
        self._locking = False
        """The thread waits for the lock."""
        self._wanted = False
        """Between `ask` and `give_back`."""

    def ask(self, granted: Callable[[], None]) -> None:
        """Have the loop call `granted` when it is this worker's turn."""
        self._wanted = True
        self._granted = granted
        self._patience.set()
        PACE.hurry(self)  # the lock may be here at any time, and others wait for it
        if self._locking:  # it has gone ahead without, and is still in the queue
            return
        if self._pool is None:  # and not `or`: one that has nothing to do is false
            self._pool = ThreadPool(1)
        try:
            self._pool.spawn(fcntl.lockf, self._descriptor, fcntl.LOCK_EX, 1, self._place).rawlink(self._locked)
        except RuntimeError as error:  # there is no thread to be had
            log.error("a permit can't be asked for, so this worker goes without: %s", error)
            get_hub().loop.run_callback(self._go_ahead)
        else:
            self._locking = True

    def give_back(self) -> None:
        """Let the next one have it."""
        self._wanted = False
        if not self._locking:
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, self._place)
            except OSError as error:
                log.error("a permit can't be given back: %s", error)

    def _locked(self, result: Any) -> None:
        self._locking = False
        if not result.successful():
            log.error("a permit can't be had, so this worker goes without: %s", result.exception)
        if self._wanted:
            self._go_ahead()
        else:
            self.give_back()

    def _go_ahead(self) -> None:
        self._patience.stop()
        PACE.relax(self)
        granted, self._granted = self._granted, None
        if granted is not None:
            granted()
