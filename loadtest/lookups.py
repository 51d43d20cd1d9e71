"""Looks up who follows whom, in a process of its own: how long it takes, and how long it holds the loop.

The one module of load tests that imports what it measures: over HTTP a look-up of 20 us would be lost in
the request around it. `loadtest.bench_friends` starts it with the folder of the data.

- ``random``: `times` look-ups of the followers of random users, of `users`. Answers p50 and p99 in seconds.
- ``holds``: the same `times`, and the user with the most followers `stars` times; meanwhile another greenlet
  takes a turn as often as it gets one. Answers the longest time between two of its turns: `clock`, in all, and
  `held`, without what this thread has waited for a CPU that others had (the kernel counts that).
- ``star``: the user with the most followers, and how many.
"""

import json
import random
import sqlite3
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import gevent

from comet.subscriptions import Subscriptions
from comet.turn import give_way


class Lookups:
    """Those of the file in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known = Subscriptions(folder)
        self._numbers = random.Random(1)

    def random(self, users: int, times: int) -> dict[str, Any]:
        """See the module."""
        took = []
        for _ in range(times):
            user = str(self._numbers.randrange(users))
            began = time.perf_counter()
            self._known.get_subscribers(user)
            took.append(time.perf_counter() - began)
        took.sort()
        return {"p50": took[times // 2], "p99": took[int(times * 0.99)]}

    def holds(self, users: int, times: int, star: str, stars: int) -> dict[str, Any]:
        """See the module."""
        looking = gevent.spawn(self._look, [str(self._numbers.randrange(users)) for _ in range(times)] + [star] * stars)
        clock = held = 0.0
        turns = 0
        with Path("/proc/thread-self/schedstat").open("rb", buffering=0) as schedstat:
            while not looking.ready():
                waited, began = _waited(schedstat), time.perf_counter()
                give_way()
                took = time.perf_counter() - began
                clock = max(clock, took)
                held = max(held, took - (_waited(schedstat) - waited))
                turns += 1
        looking.get()
        assert turns >= times + stars, "each look-up is to be seen"
        return {"clock": clock, "held": held}

    def _look(self, users: Sequence[str]) -> None:
        for user in users:
            self._known.get_subscribers(user)
            give_way()

    def star(self) -> dict[str, Any]:
        """See the module."""
        with closing(sqlite3.connect(self._folder / "follows.db")) as database:
            most = "SELECT followee, count(*) AS followers FROM follows GROUP BY followee ORDER BY followers DESC LIMIT 1"
            ((user, followers),) = database.execute(most)
        return {"user": str(user), "followers": followers}


def _waited(schedstat: IO[bytes]) -> float:
    """Seconds that a thread has waited for a CPU."""
    schedstat.seek(0)
    return int(schedstat.read().split()[1]) / 1e9


def main() -> None:
    """Obey orders from standard input until it ends."""
    lookups = Lookups(Path(sys.argv[1]))
    calls: dict[str, Callable[..., dict[str, Any]]] = {"random": lookups.random, "holds": lookups.holds, "star": lookups.star}
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(calls[order.pop("do")](**order)), flush=True)


if __name__ == "__main__":
    main()
