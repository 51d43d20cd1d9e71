"""A turn for everybody else, in the middle of work that would hold the event loop for too long."""

from collections.abc import Callable

import gevent
from gevent import get_hub

_SOON = 1e-9


def give_way() -> None:
    """Let everything else that is ready run, and sockets be looked at. Not ``sleep(0)``: gevent runs up to fifty
    greenlets that do so before it looks at sockets again."""
    gevent.sleep(_SOON)


class Soon:
    """Runs functions in the loop's next turn, behind whatever is ready, for work that needs no greenlet. None may raise."""

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
            work()
