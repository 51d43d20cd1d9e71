"""What the supervisor decides, without its processes: how many workers there are, when what died is started
again, and whether the service as a whole is alive. Pure; `comet.supervisor` does what is decided here.
"""

import math
import signal
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from comet.kernel import limits
from comet.settings import AUTO

FILL = limits.FILL / 100
"""Of its capacity that a service is planned for."""

FIRST_DELAY, MOST_DELAY = 0.5, 60.0
"""Seconds before something that died before it was ready is started again: the first time at once, then
so long, doubled each time, up to the most."""

MOST_DEATHS = 5
"""Deaths in a row, each before it was ready, that are a crash loop. If nobody serves, the service is given up; if somebody does, what is
missing is tried again, and told (`/readyz`, `/stats`)."""

LEAST_LIFE = 1.0
"""Seconds between two starts, at least, of something that was ready before it died."""


class Restarts:
    """How long to wait before something that died is started again.

    Only who dies before it is ready, again and again, is `hopeless`: something that it needs is wrong (Redis' password was changed,
    no process is left), and may be right again later. Who was ready has served, and will again. Whatever kills it (a request, the
    kernel short of memory, a person), to wait long would keep those waiting whose connections are in its queue. After two brief lives
    it is only not started more often than once in `LEAST_LIFE`.
    """

    def __init__(self) -> None:
        self._deaths = 0
        self._delay = 0.0
        self._brief = False

    def after(self, lived: float, ready: bool) -> float:
        """It has died `lived` seconds after its start: the seconds to wait."""
        again, self._brief = self._brief, lived < LEAST_LIFE
        if ready:
            self._deaths = 0
            return LEAST_LIFE - lived if again and self._brief else 0.0
        self._deaths += 1
        self._delay = min(MOST_DELAY, 2 * self._delay or FIRST_DELAY) if self._deaths > 1 else 0.0
        return self._delay

    @property
    def hopeless(self) -> bool:
        """Whether it has died `MOST_DEATHS` times in a row before it was ready."""
        return self._deaths >= MOST_DEATHS


def stand_ins(unserved: Iterable[int], held: Mapping[int, Collection[int]], turn: int) -> dict[int, list[int]]:
    """Return which workers accept from listeners that no worker serves: their slots, and the listeners of each.

    `held` are the listeners that each worker which serves has open, by its slot. Each `turn` it is another worker, so that the connections
    are spread over all."""
    able: dict[int, list[int]] = {listener: [] for listener in unserved}
    for slot, listeners in sorted(held.items()):
        for listener in listeners:
            if listener in able:
                able[listener].append(slot)
    found: dict[int, list[int]] = {}
    for listener, slots in able.items():
        if slots:
            found.setdefault(slots[(turn + listener) % len(slots)], []).append(listener)
    return found


class Vigil:
    """Whether the supervisor still keeps the service alive, for whoever watches over the supervisor.

    One process that dies or hangs is the supervisor's to replace, and no reason to restart all the others: only if one
    place (the router's, a worker's) has had no sign of life from anybody for `patience` seconds, which is longer
    than replacing whoever hangs takes, it has failed.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._signs: dict[int, float] = {}

    def alive(self, now: float, beats: Mapping[int, float]) -> bool:
        """`beats` are the last signs of life, by place, of those who live. A place is known from its first sign on."""
        for place, beat in beats.items():
            self._signs[place] = max(beat, self._signs.get(place, 0.0))
        return all(now - sign <= self._patience for sign in self._signs.values())


class Plan(NamedTuple):
    """How many `workers`, how many connections `each` holds, how many clients to plan for in all, and what
    an operator should know, a sentence each."""

    workers: int
    each: int
    clients: int
    warnings: list[str]


def plan(workers: int, clients: int, max_connections: int, file_limit: int, system_files: int, cores: int) -> Plan:
    """`workers` as asked for (or AUTO), `clients` the service shall hold (0: not said); `file_limit` is a
    process's, `system_files` that of all together."""
    warnings = []
    allowed = max(1, file_limit - limits.RESERVE)
    each = min(allowed, max_connections or allowed)
    if max_connections > allowed:
        warnings.append(
            f"{max_connections} connections a worker were asked for; the limit of {file_limit} open files allows {allowed}: "
            "raise it (ulimit -n, LimitNOFILE)."
        )
    needed = math.ceil(clients / (FILL * each))
    if workers == AUTO:
        workers = max(cores, needed)
    fits = max(1, int(workers * each * FILL))
    if fits < clients:
        more = math.ceil(clients / (FILL * workers))
        capped = 0 < max_connections < allowed
        what = f"--max-connections to {more}" if capped else f"the limit on open files (ulimit -Hn, LimitNOFILE) to {more + limits.RESERVE}"
        warnings.append(
            f"{clients} clients were asked for; {workers} workers of {each} connections are good for {fits}: "
            f"set --workers {needed} (or auto), or raise {what}."
        )
    if min(fits, clients or fits) > system_files:
        warnings.append(
            f"the system's limit of {system_files} open files is less than the {min(fits, clients or fits)} clients: "
            "raise it (sysctl fs.file-max)."
        )
    return Plan(workers, each, min(fits, system_files), warnings)


def alone(clients: int, max_connections: int, allowed: int) -> list[str]:
    """What an operator should know of one process that is asked to hold `clients` (0: not said), and is allowed so many
    connections by its limit on open files; a sentence each."""
    fits = min(allowed, max_connections or allowed)
    if clients <= fits:
        return []
    workers = math.ceil(clients / (FILL * fits))
    if 0 < max_connections < allowed:
        what = f"--max-connections to {clients}"
    else:
        what = f"the limit on open files (ulimit -Hn, LimitNOFILE) to {clients + limits.RESERVE}"
    return [f"{clients} clients were asked for; one process holds {fits}: set --workers {workers} (or auto), or raise {what}."]


def describe(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
