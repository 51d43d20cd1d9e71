"""The first request of a connection, read as it is accepted.

Most newcomers of a push server ask to wait, and have missed nothing: they are asleep (`comet.server.parking`) before the
next one is accepted, or as soon as the router has answered for their channel, and no greenlet is made for them. Everyone
else gets one (`comet.server.connection`) at once, with what was read. All of it runs in callbacks of the event loop, which
must not see an exception: the others who were accepted with that one are to be served as well.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from comet.errors import Refusal
from comet.server.connection import Connection, Owner
from comet.server.crew import Crew
from comet.server.parking import Sleeper, os_close, os_read
from comet.server.proxies import Proxy
from comet.server.transport import READ_SIZE

log = logging.getLogger("comet.server")


class Subscribers(Protocol):
    """The hub, as far as the server knows it: what an application wishes becomes a subscriber."""

    def subscribe(self, wish: Any) -> Any: ...
    def subscribe_asleep(self, wish: Any, bed: Any) -> Any: ...
    def subscribe_soon(self, wish: Any, bed: Any, done: Callable[[Any], object], failed: Callable[[Refusal], object]) -> bool: ...


class Newcomers:
    """Of a `server`, whose `crew` has the greenlets."""

    def __init__(self, server: Owner, hub: Subscribers, crew: Crew) -> None:
        self._server = server
        self._hub = hub
        self._crew = crew
        self._reads = server.hibernate and server.roll is None  # which wants to know of each what it is called
        self._joining: dict[int, str] = {}
        """Descriptors of those whose channel is being joined, and their networks: no one else has them, or watches them, meanwhile."""

    def serve(self, descriptor: int, network: str) -> None:
        """Serve who was let in."""
        try:
            self._serve(descriptor, network)
        except Exception as error:
            self._fail(descriptor, network, error)

    def attend_asleep(self, descriptor: int, network: str, wish: Any) -> bool:
        """Answer who has missed nothing, asleep from now on: the descriptor is no longer the caller's. False: nothing was done."""
        sleeper = self._hub.subscribe_asleep(wish, self._server.parking)
        if sleeper is None:
            return False
        self._begin(descriptor, network, sleeper, wish.patience)
        return True

    def cut(self) -> None:
        """Close those whose channel is still being joined."""
        joining, self._joining = self._joining, {}
        for descriptor, network in joining.items():
            self._close(descriptor, network)

    def _serve(self, descriptor: int, network: str) -> None:
        server = self._server
        data, asked = b"", None
        if self._reads and not isinstance(network, Proxy):
            try:
                data = os_read(descriptor, READ_SIZE)
            except BlockingIOError:
                pass  # its request is still on its way
            except OSError:
                self._close(descriptor, network)
                return
            else:
                if not data:
                    self._close(descriptor, network)
                    return
                asked = server.shortcut.read(data)
                if asked is None:
                    asked = server.posts.read(data)
                elif self._attend(descriptor, network, asked, data):
                    return
        connection = Connection(descriptor, server, network)
        connection.fresh = True
        connection.asked = asked
        if asked is None:
            connection.buffer += data
        else:
            connection.plain = data
        self._crew.begin(connection.handle, b"")

    def _attend(self, descriptor: int, network: str, wish: Any, data: bytes) -> bool:
        """Answer without a greenlet, now or when the channel has been joined; False: nothing was done. `data` is the request."""
        if not self.attend_asleep(descriptor, network, wish):
            if self._server.share.full(network):
                return False  # which the greenlet's way puts into words
            self._joining[descriptor] = network
            done, failed = partial(self._joined, descriptor, wish.patience), partial(self._refused, descriptor, data)
            try:
                soon = self._hub.subscribe_soon(wish, self._server.parking, done, failed)
            except Refusal:
                soon = False  # the greenlet's way meets it again, and answers
            if not soon:
                del self._joining[descriptor]
                return False
        self._server.stats.requests += 1
        return True

    def _joined(self, descriptor: int, patience: float | None, subscriber: Sleeper) -> None:
        """The channel has been joined."""
        network = self._joining.pop(descriptor, None)
        if network is None:  # it was cut
            subscriber.close("shutdown")
            return
        self._server.share.note(network, subscriber)
        if subscriber.host is self._server.parking:
            self._begin(descriptor, network, subscriber, patience)
        else:  # there is something to be sent, which may have to wait
            try:
                start = b"" if subscriber.one_shot else subscriber.framing.start(subscriber.cursor, self._server.date())
            except Exception as error:
                subscriber.close("lost")
                self._fail(descriptor, network, error)
                return
            connection = Connection(descriptor, self._server, network)
            connection.parked = subscriber
            self._crew.begin(connection.handle, start)

    def _refused(self, descriptor: int, data: bytes, refusal: Refusal) -> None:
        """It can't be joined."""
        network = self._joining.pop(descriptor, None)
        if network is not None:
            connection = Connection(descriptor, self._server, network)
            connection.plain = data
            self._crew.begin(connection.refuse, refusal)

    def _begin(self, descriptor: int, network: str, sleeper: Sleeper, patience: float | None) -> None:
        """Put it to sleep, and begin its answer; where that fails, the connection is closed."""
        try:
            self._server.parking.put(descriptor, sleeper, network, patience)
            if not sleeper.one_shot:
                self._server.parking.write(sleeper, sleeper.framing.start(sleeper.cursor, self._server.date()))
        except Exception as error:
            sleeper.close("lost")
            self._fail(descriptor, network, error)

    def _fail(self, descriptor: int, network: str, error: Exception) -> None:
        self._server.stats.errors += 1
        # the kernel may have no room to watch another (fs.epoll.max_user_watches): a line a client is enough then
        log.error("a newcomer could not be served: %s", error, exc_info=None if isinstance(error, OSError) else error)
        self._joining.pop(descriptor, None)
        self._server.parking.take(descriptor)
        self._close(descriptor, network)

    def _close(self, descriptor: int, network: str) -> None:
        os_close(descriptor)
        self._server.gone(network)
