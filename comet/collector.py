"""Python's garbage collector, and the C library's heap, in a process that holds very many small objects for long.

The collector stays on: cyclic garbage from clients that come and go must not pile up. What it costs is
its walk over everything that may be garbage, all clients included, with the loop held. So what exists
after start-up is frozen out of its sight, and it walks seldom: see the thresholds. `stats` counts the
longest stop.
"""

import gc
import time

from comet.kernel import processes
from comet.stats import Stats

THRESHOLDS = (10_000, 20, 50)
"""Young objects before the youngest generation is walked; such walks before the
middle one is; and those before all is. The last also waits, in CPython, until a quarter of all that
survived so far is new, which keeps full walks rare when there are many clients."""

TIDYING = 10.0
"""Seconds between two calls of `processes.give_back`. Messages and answers of every size come and go for hours, between clients
that stay, and the C library's heap, which has what is larger than 512 bytes, would grow by the holes."""


def set_up(stats: Stats) -> None:
    """Freeze what is there, set the thresholds, measure the stops. Call it once all is built."""
    began = 0.0

    def measure(phase: str, info: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.perf_counter()
            return
        stats.gc_longest_seconds = max(stats.gc_longest_seconds, time.perf_counter() - began)
        stats.gc_full_collections += info["generation"] == 2

    gc.collect()
    gc.freeze()
    processes.give_back()
    gc.set_threshold(*THRESHOLDS)
    gc.callbacks.append(measure)


def keep() -> None:
    """Freeze what is there by now, which costs nothing: no walk is over more than what came since. For the router, each second:
    it holds an object or two for each of a million channels and each message kept, and a walk over them takes most of a second.
    It makes no cycles of them; what is frozen goes with the last reference to it, as ever."""
    gc.freeze()
