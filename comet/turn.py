"""When the event loop does what: a turn for everybody else in the middle of long work, the next turn, so many seconds later;
and how often it turns."""

import ctypes
import logging
from collections.abc import Callable

import gevent
from gevent import get_hub
from gevent.libev import corecext

_SOON = 1e-9

_libev = ctypes.CDLL(corecext.__file__)

log = logging.getLogger("comet")


def gather(seconds: float, timers: float = 0.0) -> None:
    """Have this process's loop rest before it looks at its sockets again, until so many `seconds` have passed since it last did:
    what has come meanwhile is found together, in one turn. A timer that rings is such a turn, on time, unless those are to be
    gathered as well (`timers`, in seconds); what another thread has done is found like everything else. 0 is libev's own way, to
    look at once (ev(3), "ev_set_io_collect_interval"). With gevent on libuv this does nothing."""
    loop = get_hub().loop
    if isinstance(loop, corecext.loop):
        _libev.ev_set_io_collect_interval(ctypes.c_void_p(loop.ptr), ctypes.c_double(seconds))
        _libev.ev_set_timeout_collect_interval(ctypes.c_void_p(loop.ptr), ctypes.c_double(timers))


class Pace:
    """How long the loop of a process rests between two turns (`gather`): `seconds`, but not at all while somebody is in a hurry."""

    def __init__(self, gather: Callable[[float], None] = gather) -> None:
        self._gather = gather
        self._seconds = 0.0
        self._hurried: set[object] = set()

    def rest(self, seconds: float) -> None:
        """From now on."""
        self._seconds = seconds
        if not self._hurried:
            self._gather(seconds)

    def hurry(self, who: object) -> None:
        """`who` waits for more, until `relax`."""
        if not self._hurried and self._seconds:
            self._gather(0.0)
        self._hurried.add(who)

    def relax(self, who: object) -> None:
        """It does not any more, or did not."""
        if who in self._hurried:
            self._hurried.remove(who)
            if not self._hurried and self._seconds:
                self._gather(self._seconds)


PACE = Pace()
"""Of this process."""


def give_way() -> None:
    """Let everything else that is ready run, and sockets be looked at. Not ``sleep(0)``: gevent runs up to fifty
    greenlets that do so before it looks at sockets again."""
    gevent.sleep(_SOON)


class Soon:
    """Runs functions in the loop's next turn, behind whatever is ready, for work that needs no greenlet."""

    def __init__(self) -> None:
        self._timer = get_hub().loop.timer(0)
        self._work: list[Callable[[], None]] = []

    def __call__(self, work: Callable[[], None]) -> None:
        """Run `work` soon, once."""
        if not self._work:
            self._timer.start(self._run)
        self._work.append(work)

    def _run(self) -> None:
        those, self._work = self._work, []
        for work in those:
            try:
                work()
            except Exception:  # the others are to be done as well
                log.exception("what was put off failed")


class Alarm:
    """Runs `work` once in the loop, `seconds` after it was last set, as often as it is set. libev's own timer for once would
    keep what was left of its time when it rang, nothing, or was stopped, and go on with that when it is started again."""

    def __init__(self, seconds: float, work: Callable[[], None]) -> None:
        self._timer = get_hub().loop.timer(seconds, seconds)
        self._work = work

    @property
    def active(self) -> bool:
        """It is set."""
        active: bool = self._timer.active
        return active

    def set(self) -> None:
        """From now on; one that is set begins anew."""
        self._timer.again(self._ring)

    def stop(self) -> None:
        """It does not ring, unless it is set again."""
        self._timer.stop()

    def _ring(self) -> None:
        self._timer.stop()
        self._work()
