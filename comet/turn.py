"""When the event loop does what: a turn for everybody else in the middle of long work, the next turn, so many seconds later;
and how often it turns."""

import ctypes
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final, NamedTuple
from weakref import WeakKeyDictionary

from gevent import get_hub
from gevent.hub import Hub, Waiter
from gevent.libev import corecext

_SOON: Final = 1e-9

SHARE: Final = 0.001
"""Seconds of a turn of the loop after which no more of those who gave way go on."""

TRICKLE: Final = 0.002
"""Seconds from one of those who `trickle` to the next: what they do then takes a tenth of that."""

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


class _Place(Waiter):  # type: ignore[misc]
    """A greenlet's place in a line; `whose` work it does."""

    __slots__ = ("ready", "whose")

    def __init__(self, whose: str) -> None:
        super().__init__()
        self.whose = whose
        self.ready = True


class _Line:
    """Greenlets that gave way. `rest` seconds after one came, or after the last that went on, some go on: at least one, and more until
    `share` seconds are used up. Addresses take turns, and those of an address go on in order: so one with a thousand connections holds up
    the others no more than one with a single connection."""

    def __init__(self, rest: float, share: float) -> None:
        self._alarm = Alarm(rest, self._run)
        self._share = share
        self._waiting: OrderedDict[str, deque[_Place]] = OrderedDict()
        self._running = False
        self._later: list[_Place] = []
        """Those who came while some went on: there has to be a turn of the loop before they do."""

    def wait(self, whose: str) -> None:
        """Let the others run until it is this greenlet's turn."""
        place = _Place(whose)
        self.put(place)
        place.get()

    def put(self, place: _Place) -> None:
        """Have whoever waits at `place` go on when it is its turn. If it was told to end by then, that is nothing."""
        if self._running:
            self._later.append(place)
            return
        those = self._waiting.get(place.whose)
        if those is None:
            those = self._waiting[place.whose] = deque()
        those.append(place)
        if not self._alarm.active:
            self._alarm.set()

    def _run(self) -> None:
        ends = time.monotonic() + self._share
        self._running = True
        while self._waiting:
            whose, those = next(iter(self._waiting.items()))
            place = those.popleft()
            if those:
                self._waiting.move_to_end(whose)
            else:
                del self._waiting[whose]
            place.switch(None)
            if time.monotonic() >= ends:
                break
        self._running = False
        later, self._later = self._later, []
        for place in later:
            self.put(place)
        if self._waiting and not self._alarm.active:
            self._alarm.set()


class _Lines(NamedTuple):
    """What a thread's loop has."""

    way: _Line
    trickle: _Line


_LINES: Final[WeakKeyDictionary[Hub, _Lines]] = WeakKeyDictionary()


def _lines() -> _Lines:
    hub = get_hub()
    lines = _LINES.get(hub)
    if lines is None:
        lines = _LINES[hub] = _Lines(_Line(_SOON, SHARE), _Line(TRICKLE, 0.0))
    return lines


def give_way(whose: str = "") -> None:
    """Let everything else that is ready run, and sockets be looked at. However many give way, they go on for little more than `SHARE` of a
    turn in all, and addresses take turns: `whose` is the one for which work is done, if that is known. Not ``sleep(0)``: gevent runs up to
    fifty greenlets that do so before it looks at sockets again."""
    _lines().way.wait(whose)


def trickle(whose: str = "") -> None:
    """As `give_way`, for what nobody needs to have done fast: one greenlet in `TRICKLE` seconds goes on, however many there are."""
    _lines().trickle.wait(whose)


def wait_for_input(descriptor: int, seconds: float, whose: str = "") -> bool:
    """Wait until there is something to read from a descriptor, and then for one's turn, as `give_way`: when thousands of clients send a
    byte at the same moment, or have kept silent for too long, they have a share of a turn in all. Return False after `seconds` without."""
    line, loop = _lines().way, get_hub().loop
    place = _Place(whose)
    readable, late = loop.io(descriptor, 1), loop.timer(max(0.0, seconds))

    def come(ready: bool) -> None:
        readable.stop()
        late.stop()
        place.ready = ready
        line.put(place)

    readable.start(come, True)
    late.start(come, False)
    try:
        place.get()
        return place.ready
    finally:
        readable.stop()
        readable.close()
        late.stop()
        late.close()
