"""Noticing that a waiting client is gone.

The greenlet of a waiting client blocks on its subscriber and not on its socket, so nobody would see
the peer close until the next write. One private epoll a process watches all waiting sockets for
just that, edge-triggered; the event loop watches the epoll itself. A peer that closes its sending
side counts as gone (README says so): a browser that leaves looks no different.

`comet.server.wsgi` adds a descriptor while a subscriber has it and removes it before the socket can
be closed, so that a number that is used again never ends a stranger.
"""

import logging
import select
from typing import Protocol

from gevent import get_hub

from comet.kernel.sockets import epoll

_GONE = select.EPOLLRDHUP | select.EPOLLET  # EPOLLHUP and EPOLLERR are always reported
_READ = 1

log = logging.getLogger("comet.server")


class Endable(Protocol):
    """Who waits behind a descriptor."""

    def end(self, reason: str) -> None: ...


class Hangups:
    """Tells whoever waits behind a descriptor that its peer is gone: ``end("hang-up")``."""

    def __init__(self) -> None:
        self._epoll = epoll()
        self._waiting: dict[int, Endable] = {}
        self._watcher = get_hub().loop.io(self._epoll.fileno(), _READ)
        self._watcher.start(self._notice)

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, descriptor: int, who: Endable) -> None:
        """Watch a connected socket. A peer that is already gone is noticed too."""
        self._waiting[descriptor] = who
        self._epoll.register(descriptor, _GONE)

    def remove(self, descriptor: int) -> None:
        """Stop watching; a descriptor that is not watched is no error."""
        if self._waiting.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def close(self) -> None:
        """Stop for good."""
        self._watcher.stop()
        self._watcher.close()
        self._epoll.close()

    def _notice(self) -> None:
        for descriptor, _ in self._epoll.poll(0):
            who = self._waiting.get(descriptor)
            try:
                if who is not None:
                    who.end("hang-up")
            except Exception:  # an edge is told once: one failure must not lose the others of the batch
                log.exception("a hang-up could not be told")
