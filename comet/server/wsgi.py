"""The server: gevent's pywsgi with another way to read a request and to write an answer.

What is kept of pywsgi is its accept loop, and a greenlet a connection while it is awake
(`comet.server.connection`). Here is what is not one connection's: who is let in (and served first by
`comet.server.newcomers`), the way between sleep (`comet.server.parking`) and greenlet, and `drain`, which ends it all in
order.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any

import gevent
from gevent.event import Event
from gevent.pywsgi import WSGIServer, format_date_time

from comet.errors import Refusal
from comet.hosts import Hosts
from comet.log import Roll
from comet.origins import Origins
from comet.server.addresses import Addresses
from comet.server.blocks import MAX_REQUEST, STAND_INS, Lifted, lift
from comet.server.body import Room
from comet.server.connection import Connection
from comet.server.crew import Crew
from comet.server.newcomers import Newcomers, Subscribers
from comet.server.parking import Parking, Sleeper, os_close
from comet.server.posts import Call, Posts
from comet.server.proxies import Behind, Proxies, Proxy, network_of
from comet.server.share import Share
from comet.server.short import LongWay, Shortcut
from comet.settings import Settings, networks
from comet.stats import Stats

MAX_REFUSING = 100
"""Connections that are being told at the same time that there is no room; more are just closed."""

MOST_ACCEPTED = 16
"""Connections that are accepted at once. To serve them takes no longer than about the turn that the others have next (5 ms),
where each needs a greenlet, and less where they fall asleep."""

MOST_WOKEN = 8
"""Connections that are woken in one turn and go on at once. A request may take two milliseconds (a page of history), and each of three
hundred that come at the same moment would be served in that turn."""

FIRST_REQUEST = 0.5
"""Seconds that a drain waits for the first requests of new connections: about the longest way there is."""

NEXT_REQUEST = 0.5
"""Seconds that a drain leaves idle connections open: the next request of who was just answered is on its way, and
would meet a closed door. Pollers do that all the time."""

log = logging.getLogger("comet.server")


class CometServer(WSGIServer):
    """Accepts on a bound `listener` and serves a WSGI `application` (bottle's).

    `wishes` is the application's short way for a GET that waits (see `Shortcut`), and `hub` answers a
    wish with a subscriber. `capacity` is how many connections the server holds at most; the rest are
    told so and closed. `addresses` counts them by address; without it this server counts alone. `roll` keeps who waits, with
    ``--log-clients``.
    """

    max_accept = 1
    """Calls of `do_read` that pywsgi makes at once."""

    def __init__(
        self,
        listener: socket.socket,
        application: Callable[..., Iterable[bytes]],
        wishes: Callable[[str, Mapping[str, str], str | None], Any],
        calls: Callable[[str, str, bytes], Call | None],
        hub: Subscribers,
        settings: Settings,
        stats: Stats,
        capacity: int,
        addresses: Addresses | None = None,
        roll: Roll | None = None,
    ) -> None:
        super().__init__(listener, application, log=None, error_log=log)
        self._standing_in: dict[int, Any] = {}
        """Descriptors of the listeners of others that are accepted from, and what watches them."""
        self.settings = settings
        self.stats = stats
        self.capacity = capacity
        self.hibernate = settings.hibernate
        self.draining = False
        """Each answer is the last of its connection."""
        self.closing = False
        """Who waits for a request is closed."""
        self.roll = roll
        self.origins = Origins(settings.origins)
        self.hosts = Hosts(settings.hosts, settings.host, keyed=bool(settings.publish_key))
        self.proxies = Proxies(networks(settings.trusted_proxies)) if settings.trusted_proxies else None
        self.parking = Parking(self, settings.idle_timeout, settings.heartbeat, self.date, self.proxies is not None)
        self.awake: set[Connection] = set()
        """Connections that have a greenlet."""
        self.idle: set[Connection] = set()
        """Those of them that wait for a request to begin."""
        # these read of a request only what is asked for: not what it is called, which the roll keeps, nor whose it is
        stand_ins = STAND_INS if self.proxies is not None else {}
        self.shortcut = Shortcut(wishes, settings.max_header, stand_ins, self.hosts) if roll is None else LongWay()
        self.posts = Posts(calls, settings.max_header, stand_ins, self.hosts) if roll is None else LongWay()
        self.share = Share(settings.max_new_channels, settings.linger)
        self.subscribe = hub.subscribe
        self._subscribe_asleep = hub.subscribe_asleep
        self._crew = Crew()
        self._newcomers = Newcomers(self, hub, self._crew)
        self.attend_asleep = self._newcomers.attend_asleep
        self.addresses = addresses or Addresses(settings.max_per_address)
        self.bodies = Room(settings.max_bodies)
        self.refusing = 0
        """Connections that are being turned away."""
        self._empty = Event()
        self._woken = 0
        """Connections that were woken in this turn of the loop."""
        self._date = (0, b"")
        random = os.urandom(6).hex()
        self._ids = (f"{random}-{number:x}" for number in count(1))

    def date(self) -> bytes:
        """The Date header's line, made once a second."""
        now = int(time.time())
        if now != self._date[0]:
            self._date = (now, b"Date: %b\r\n" % format_date_time(now))
        return self._date[1]

    def update_environ(self) -> None:
        """What each request's environ starts from. pywsgi would look the address's name up, for which it
        starts a thread, waits for DNS, and takes 2 MB."""
        self.environ.update(SERVER_NAME=str(self.address[0]), SERVER_PORT=str(self.address[1]))

    # -- admission

    def do_read(self) -> tuple[list[tuple[int, str]]] | None:
        """Accept, for pywsgi's loop."""
        accepted = _accept(self.socket)
        return (accepted,) if accepted else None

    def stand_in(self, listeners: Iterable[socket.socket]) -> None:
        """Accept from these listeners too, whose workers do not serve, and no longer from those that were named before."""
        wanted = {listener.fileno(): listener for listener in listeners}
        for descriptor in self._standing_in.keys() - wanted.keys():
            self._stop_standing_in(descriptor)
        for descriptor in wanted.keys() - self._standing_in.keys():
            watcher = self._standing_in[descriptor] = self.loop.io(descriptor, 1)
            watcher.start(self._accept_instead, wanted[descriptor])

    def _accept_instead(self, listener: socket.socket) -> None:
        try:
            accepted = _accept(listener)
        except OSError as error:  # no descriptor is left, say; `stand_in` is called each second
            log.warning("can't accept in the place of a worker that is missing: %s", error)
            self._stop_standing_in(listener.fileno())
        else:
            self.do_handle(accepted)

    def _stop_standing_in(self, descriptor: int) -> None:
        watcher = self._standing_in.pop(descriptor)
        watcher.stop()
        watcher.close()

    def do_handle(self, accepted: list[tuple[int, str]]) -> None:
        """Serve new connections, each at once up to where it first waits: behind the requests of all who are in already they
        would wait for seconds where those never cease, and the queue of the kernel is cheaper than one of greenlets. None is
        accepted meanwhile: whoever closes one and opens another is noticed in this order."""
        for descriptor, host in accepted:
            self._admit(descriptor, host)

    def _admit(self, descriptor: int, host: str) -> None:
        """Serve a new connection, or say why not."""
        network = (None if self.proxies is None else self.proxies.proxy(host)) or network_of(host)
        refusal = self._count(network)
        if refusal is None:
            self.stats.accepted += 1
            self.stats.connections += 1
            self._newcomers.serve(descriptor, network)
        elif self.refusing < MAX_REFUSING:
            self.refusing += 1
            self._crew.begin(Connection(descriptor, self, network).turn_away, refusal)
        else:
            self.stats.refused[refusal.slug] += 1
            os_close(descriptor)

    def lifted(self, data: bytes) -> Lifted:
        """What came through a proxy as the short ways read it, and what the proxy says of it."""
        return lift(data, min(self.settings.max_header, MAX_REQUEST))

    def lend(self, client: str, proxy: Proxy) -> Behind:
        """A request of `client` has come through this proxy. The network that its connection is of, until `rested`.
        Raises Refusal ``address-full``."""
        network = Behind(network_of(client))
        network.proxy = proxy
        refusal = self._count_address(network)
        if refusal is not None:
            raise refusal
        return network

    def rested(self, network: str) -> str:
        """An answer is over: the network that its connection is of between two requests."""
        if not isinstance(network, Behind):
            return network
        self.addresses.remove(network)
        return network.proxy

    def new_id(self) -> str:
        """Of a request that was given none."""
        return next(self._ids)

    def _count(self, network: str) -> Refusal | None:
        """Count a new connection by its address, or return why it is not let in."""
        if self.draining:
            return Refusal("draining", "This server is stopping; connect again, to another one or a little later.")
        if self.stats.connections >= self.capacity:
            return Refusal(
                "worker-full", f"This process holds its {self.capacity} connections; try again later, or start more (--max-connections)."
            )
        return None if isinstance(network, Proxy) else self._count_address(network)

    def _count_address(self, network: str) -> Refusal | None:
        if self.addresses.add(network):
            return None
        most = self.settings.max_per_address
        return Refusal("address-full", f"{network} has {most} connections open; close some (--max-per-address is the limit).")

    def gone(self, network: str) -> None:
        """A connection that was let in has been closed."""
        if isinstance(network, Behind):
            self.rested(network)
        elif not isinstance(network, Proxy):
            self.addresses.remove(network)
        self.stats.connections -= 1
        if not self.stats.connections:
            self._empty.set()

    # -- between sleep and greenlet

    def again(self, descriptor: int, network: str, data: bytes) -> bool:
        """See `Floor`."""
        forwarded = ""
        if isinstance(network, Proxy):
            data, forwarded, _ = self.lifted(data)
        wish = self.shortcut.read(data)
        if wish is None or not wish.framing.one_shot:
            return False
        if isinstance(network, Proxy) and self.proxies is not None:
            try:
                network = self.lend(self.proxies.client(network, forwarded), network)
            except Refusal:
                return False  # which the long way puts into words
        subscriber = self._subscribe_asleep(wish, self.parking)
        if subscriber is None:
            self.rested(network)
            return False
        self.stats.requests += 1
        self.parking.again(descriptor, network, subscriber, wish.patience)
        return True

    def resume(self, descriptor: int, network: str, said: bytes, subscriber: Sleeper | None = None, rest: bytes | memoryview = b"") -> None:
        """See `Floor`."""
        connection = Connection(descriptor, self, network)
        connection.buffer += said
        connection.parked = subscriber
        if not self._woken:
            self.loop.run_callback(self._turn_over)
        self._woken += 1
        connection.crowded = self._woken > MOST_WOKEN
        self._crew.run(connection.handle, rest)

    def _turn_over(self) -> None:
        self._woken = 0

    # -- stopping

    def drain(self) -> None:
        """Take no more connections, and close each as soon as its answer is out; `join` closes those that wait
        for a request."""
        self.close()
        self._let_in()
        self.draining = True
        self.parking.drain()
        self._empty.clear()
        if not self.stats.connections:
            self._empty.set()

    def _let_in(self) -> None:
        """Serve those who were accepted a moment ago and whose first request is still on its way: where
        other processes go on, nobody who connects may find a closed door."""
        ends = time.monotonic() + FIRST_REQUEST
        while any(connection.fresh for connection in self.idle) and time.monotonic() < ends:
            gevent.sleep(0.01)

    def join(self, timeout: float) -> int:
        """Wait for the last connection after `drain`; what is still open after `timeout` seconds is cut
        off. Answers how many were."""
        if not self._empty.wait(min(timeout, NEXT_REQUEST)):
            self.closing = True
            for connection in list(self.idle):
                connection.cut()
            self.parking.close_idle()
            self._empty.wait(max(0.0, timeout - NEXT_REQUEST))
        late: int = self.stats.connections
        self._newcomers.cut()
        for connection in list(self.awake):
            connection.cut()
        self.parking.evict()
        self._empty.wait(1.0)
        self.parking.close()
        return late


def _accept(listener: socket.socket) -> list[tuple[int, str]]:
    """Return connections that wait: bare descriptors, since most need no more, and their hosts. Raises OSError."""
    accepted: list[tuple[int, str]] = []
    try:
        while len(accepted) < MOST_ACCEPTED:
            descriptor, address = listener._accept()  # type: ignore[attr-defined]
            os.set_blocking(descriptor, False)
            accepted.append((descriptor, address[0]))
    except BlockingIOError:
        pass
    except OSError:
        if not accepted:  # else it will be met again
            raise
    return accepted
