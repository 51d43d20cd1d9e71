"""Thousands of clients on one epoll: as raw sockets, in a Locust process, without a greenlet each.

A Locust user with a greenlet and a socket object takes 12 to 47 KB; a client here is an integer in three arrays. It
is opened at a rate, from a range of source addresses (`Target`), reads its answer's head and first chunk, and counts as
open then. After that each message is parsed out of its chunk, and counted (`loadtest.counting`): nothing is counted that
was not read from the client's own socket and parsed. Bytes that equal the last client's to the last one are not parsed
again, which is what makes messages to everybody cheap; clients whose messages carry ids are never served that way.

A client that is closed, refused or fails to connect is a failure, and comes back a second later: with its cursor, if it
is one of those that know their place. `churn` has those leave and come back on purpose.

It runs in greenlets of its own (`run`), but its sockets are not gevent's: what it calls is the standard library as it was
before the patch. Neighbour: `loadtest.users`, whose SwarmUser has one.
"""

import _socket  # the class that socket.socket, and gevent's, are made of: without their Python part
import errno
import heapq
import os
import random
import select
import socket
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from time import monotonic
from typing import Any

from gevent import get_hub
from gevent.event import AsyncResult

from comet.kernel.limits import raise_file_limit
from comet.kernel.processes import close
from comet.kernel.stock import stock
from loadtest.counting import SAMPLE, Counts
from loadtest.histogram import index
from loadtest.verify import EVERYONE, KIND_MASK, WRAP, Place, read
from loadtest.wire import Ended, Endpoint, Malformed, head, pieces

PER_ADDRESS = 2000
"""Connections from one source address: connect looks for a free port one by one, and must not have to look far."""

UNDER_WAY = 256
"""Connections of a process that are being opened at a time, at most."""

NAP = 0.002
"""Seconds between two looks at the epoll. The event loop does not watch it: an epoll that another one watches has the kernel
walk all its sockets whenever it is added, and holds a lock of the whole machine meanwhile."""

BURST = 32
"""Connections that are opened together."""

TICK = 0.02
"""Seconds between two looks at what is to be opened."""

AGAIN = 1.0
"""Seconds after which one that failed comes back."""

AWAY = 0.2, 2.0
"""Seconds that one stays away on purpose."""

TRIES = 20
"""Clients that are looked at for one that can leave: most of them may be away."""

BATCH = 512
TURN = 8
"""Batches before everything else in the process has its turn."""

READ_SIZE = 4096
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h; Python has a name for it from 3.12 on
_WATCHED = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET  # told once: the kernel need not look again at what was read
_ENDING = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_AT_ONCE = frozenset((0, errno.EINPROGRESS))


@dataclass(frozen=True)
class Target:
    """Where clients connect to, and from which addresses. None given: on loopback 127.1.0.1 and on, `per_address` clients
    each; else what the system chooses. IPv6 has one loopback address, ::1, for all clients."""

    host: str
    port: int
    sources: tuple[str, ...] = ()
    per_address: int = PER_ADDRESS
    called: str = ""
    """The name that `host` was resolved from."""

    @cached_property
    def name(self) -> str:
        """For the Host header."""
        host = self.called or self.host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @cached_property
    def family(self) -> socket.AddressFamily:
        """AF_INET6 or AF_INET, as `host` is."""
        return socket.AF_INET6 if ":" in self.host else socket.AF_INET

    def source(self, client: int) -> str:
        """The address of the client with this number in the whole test; "" where the system may choose."""
        place = client // self.per_address
        if self.sources:
            return self.sources[place % len(self.sources)]
        if not self.host.startswith("127."):
            return ""
        return f"127.{1 + place // 64770}.{place // 254 % 255}.{place % 254 + 1}"


class _Opening:
    """A client that has no answer yet."""

    __slots__ = ("began", "client", "data")

    def __init__(self, client: int, began: float) -> None:
        self.client = client
        self.began = began
        self.data = b""


class Swarm:
    """Clients that are logged in as `users`, endpoint by endpoint in turn. `rate` is how many are opened
    a second. `nap` seconds pass between two looks for what has come: with many processes on few cores each message would
    wake one of them otherwise, which costs more than to read it; latencies have that time in them."""

    def __init__(self, target: Target, users: range, endpoints: Sequence[Endpoint], counts: Counts, rate: float, nap: float = NAP) -> None:
        self.target = target
        self.counts = counts
        self.rate = rate
        self.churning = 0.0
        """Clients that leave a second."""
        self._users = users
        self._endpoints = endpoints
        self._base = len(counts.ledger.ids)
        for user in users:
            counts.ledger.add(user)
        raise_file_limit()
        self._clients = array("i")  # by descriptor, which are small numbers
        self._descriptors = array("i", [-1]) * len(users)
        self._epoll: Any = stock(select, "epoll")()
        self._new = deque(range(len(users)))
        self._later: list[tuple[float, int]] = []
        self._opening: dict[int, _Opening] = {}
        self._rests: dict[int, bytes] = {}
        self._places: dict[int, Place] = {}
        self._known: list[int] = []  # clients that know their place
        self._back: dict[int, int] = {}  # and when those came back that were away, by `counts.clock`
        self._timer: Any = get_hub().loop.timer(max(nap, 0.001), max(nap, 0.001))  # 0 would be once
        self._over = AsyncResult()
        self._looked = monotonic()
        self._budget = self._leaving = 0.0
        self._same = b"\0"  # no answer is that, and the end of a connection is none
        self._same_number = self._same_sent = 0

    def __len__(self) -> int:
        return len(self._users)

    def run(self) -> None:
        """Until it is killed; then all are closed."""
        self._timer.start(self._look)
        try:
            self._over.get()
        finally:
            self._timer.close()
            self.close()

    def _look(self) -> None:
        """Called by the event loop itself, since a greenlet's turn costs more than to find nothing."""
        try:
            for _ in range(TURN):
                events = self._epoll.poll(0, BATCH)
                if events:
                    self._batch(events)
                if self._opening or monotonic() - self._looked >= TICK:
                    self._open_some()
                if len(events) < BATCH:
                    return
        except Exception as error:
            self._over.set_exception(error)

    def close(self) -> None:
        """All connections."""
        for descriptor, client in enumerate(self._clients):
            if client >= 0:
                close(descriptor)
        self._epoll.close()
        self.counts.open = 0

    # -- opening

    def _open_some(self) -> None:
        """Have those leave and come that are due."""
        now = monotonic()
        passed, self._looked = now - self._looked, now
        self._budget = min(self._budget + self.rate * passed, max(1.0, self.rate * 0.2))
        self._leaving += self.churning * passed
        while self._leaving >= 1 and self._known:
            self._leaving -= 1
            for _ in range(TRIES):
                if self._leave(random.choice(self._known), now):
                    break
        if self._budget < BURST and self._budget < self.rate * 0.2:
            return  # a few at a time would wake the server, and this process, for each
        while self._budget >= 1 and len(self._opening) < UNDER_WAY:
            if self._new:
                client = self._new.popleft()
            elif self._later and self._later[0][0] <= now:
                client = heapq.heappop(self._later)[1]
            else:
                return
            self._budget -= 1
            self._connect(client)

    def _connect(self, client: int) -> None:
        try:
            sock = self._socket(client)
        except OSError as error:  # no descriptor is left, or the address is not this machine's
            self._again(client, f"not opened: {_name(error)}")
            return
        opening = _Opening(client, monotonic())
        status = sock.connect_ex((self.target.host, self.target.port))
        descriptor = sock.detach()
        if descriptor >= len(self._clients):
            self._clients.extend([-1] * (descriptor + 1024 - len(self._clients)))
        self._clients[descriptor] = client
        self._descriptors[client] = descriptor
        self._opening[descriptor] = opening
        if status not in _AT_ONCE:
            self._lost(descriptor, errno.errorcode.get(status, str(status)))
            return
        if self._request(descriptor, client):  # on loopback it is connected by now
            self._epoll.register(descriptor, _WATCHED)
        elif descriptor in self._opening:
            self._epoll.register(descriptor, _WATCHED | select.EPOLLOUT)

    def _socket(self, client: int) -> _socket.socket:
        """One that is bound to the client's address. Raises OSError."""
        sock = _socket.socket(self.target.family, _socket.SOCK_STREAM | _socket.SOCK_NONBLOCK)
        source = self.target.source(self._users[client])
        try:
            if source:
                sock.setsockopt(_socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)  # in force for IPv6 too
                sock.bind((source, 0))
        except OSError:
            sock.close()
            raise
        return sock

    def _request(self, descriptor: int, client: int) -> bool:
        """Ask; whether that was possible already."""
        endpoint = self._endpoint(client)
        place = self._places.get(client)
        try:
            os.write(descriptor, endpoint.request(self._users[client], self.target.name, place.text() if place else b""))
        except BlockingIOError:
            return False
        except OSError as error:
            self._lost(descriptor, _name(error))
            return False
        return True

    def _endpoint(self, client: int) -> Endpoint:
        return self._endpoints[self._users[client] % len(self._endpoints)]

    def _answer(self, descriptor: int, event: int) -> None:
        """Something has happened to one that is being opened."""
        opening = self._opening[descriptor]
        if event & select.EPOLLOUT:
            if self._request(descriptor, opening.client):
                self._epoll.modify(descriptor, _WATCHED)
            return
        data = self._read(descriptor)
        if not data:
            return
        opening.data += data
        where = self._endpoint(opening.client)
        found = head(opening.data)
        if found is None:
            return
        status, headers, at = found
        if status != 200:
            self._lost(descriptor, f"answered {status}")
            return
        if where.id_mark and b"comet-cursor" not in headers:
            raise Malformed("no Comet-Cursor")
        told, rest = pieces(opening.data[at:])
        if not told:
            return
        del self._opening[descriptor]
        self.counts.opened += 1
        self.counts.open += 1
        self.counts.opening.add(int((monotonic() - opening.began) * 1e6))
        client = opening.client
        if where.id_mark:
            if client in self._places:
                self._back[client] = self.counts.clock()
            else:
                self._places[client] = Place.read(headers[b"comet-cursor"])
                self._known.append(client)
        # whatever came along behind the opening piece
        self._take(client, told[1:])
        if rest:
            self._rests[descriptor] = rest

    # -- ending

    def _leave(self, client: int, now: float) -> bool:
        """One goes away on purpose; what it has not read it gets by its cursor. False where it is away."""
        descriptor = self._descriptors[client]
        if descriptor < 0 or descriptor in self._opening:
            return False
        self.counts.left += 1
        self._forget(descriptor)
        heapq.heappush(self._later, (now + random.uniform(*AWAY), client))
        return True

    def _lost(self, descriptor: int, why: str) -> None:
        """One is gone that should not be. It comes back."""
        client = self._clients[descriptor]
        if client < 0:
            return
        opening = descriptor in self._opening
        self._forget(descriptor)
        self._again(client, f"not opened: {why}" if opening else f"closed: {why}")

    def _again(self, client: int, why: str) -> None:
        """It is not connected that should be: a failure, and it comes back."""
        self.counts.fail(self._endpoint(client).name, why)
        heapq.heappush(self._later, (monotonic() + AGAIN, client))

    def _forget(self, descriptor: int) -> None:
        if self._opening.pop(descriptor, None) is None:
            self.counts.open -= 1
        self._rests.pop(descriptor, None)
        self._descriptors[self._clients[descriptor]] = -1
        self._clients[descriptor] = -1
        close(descriptor)  # it leaves the epoll by that

    # -- messages

    def _read(self, descriptor: int) -> bytes:
        """What has come; b"" where nothing has, or the connection has ended."""
        found = b""
        try:
            while True:
                data = os.read(descriptor, READ_SIZE)
                if not data and not found:
                    self._lost(descriptor, "by the server")
                found += data
                if len(data) < READ_SIZE:
                    break
        except BlockingIOError:
            pass  # that was all
        except OSError as error:
            self._lost(descriptor, _name(error))
            return b""
        self.counts.bytes += len(found)
        return found

    def _batch(self, events: list[tuple[int, int]]) -> None:
        """What has come for up to `BATCH` clients. The hot loop: `Counts.take` stands in it once more, for one
        whole message in one read; everything else goes the long way."""
        counts, opening, rests, clients = self.counts, self._opening, self._rests, self._clients
        clock, late, base = counts.clock, counts.late, self._base
        tallies, sums, latencies = counts.ledger.counts, counts.ledger.sums, [one.buckets for one in counts.latencies]
        same, number, sent = self._same, self._same_number, self._same_sent
        received = size = 0
        for descriptor, event in events:
            try:
                if descriptor in opening:
                    self._answer(descriptor, event)
                    if event & _ENDING and not event & select.EPOLLOUT and clients[descriptor] >= 0:
                        # its end is behind what was read, and is not told again
                        events.append((descriptor, event))
                    continue
                try:
                    data = os.read(descriptor, READ_SIZE)
                except BlockingIOError:
                    continue
                client = clients[descriptor]
                if data and (len(data) == READ_SIZE or event & _ENDING):
                    events.append((descriptor, event))  # there is more, or its end, and it is not told again
                if data != same or descriptor in rests:
                    if not data:
                        self._lost(descriptor, "by the server")
                        continue
                    counts.bytes += len(data)
                    found = self._parse(descriptor, client, data)
                    if found is None:
                        continue
                    same, (number, sent) = data, found
                else:
                    size += len(data)
                received += 1
                client += base
                tallies[client] += 1
                sums[client] = sums[client] + number & WRAP
                now = clock()
                microseconds = (now - sent) // 1000
                kind = number & KIND_MASK
                latencies[kind][index(microseconds)] += 1
                if kind == EVERYONE:
                    counts.spread(number, now)
                elif microseconds > late:
                    counts.fail(self._endpoint(client - base).name, "late")
                if not client % SAMPLE and (problem := counts.order.take(client, number)):
                    counts.fail(self._endpoint(client - base).name, problem)
            except OSError as error:
                self._lost(descriptor, _name(error))
            except Ended:
                self._lost(descriptor, "the answer ended")
            except (Malformed, ValueError) as error:
                self._lost(descriptor, f"malformed: {error}"[:120])
        self._same, self._same_number, self._same_sent = same, number, sent
        counts.received += received
        counts.bytes += size

    def _parse(self, descriptor: int, client: int, data: bytes) -> tuple[int, int] | None:
        """Number and time of the one message that `data` is. Anything else is done here, and None."""
        endpoint = self._endpoint(client)
        if descriptor in self._rests:
            data = self._rests.pop(descriptor) + data
        elif not endpoint.id_mark:
            end = data.find(b"\r\n")
            if end > 0 and len(data) == end + int(data[:end], 16) + 4 > end + 4 and data.endswith(b"\r\n"):
                text = endpoint.text(data[end + 2 :])
                if text is not None:
                    return read(text)
        told, rest = pieces(data)
        if rest:
            self._rests[descriptor] = rest
        self._take(client, told)
        return None

    def _take(self, client: int, told: Sequence[bytes]) -> None:
        """Chunks for one client."""
        counts, endpoint = self.counts, self._endpoint(client)
        places = []
        for piece in told:
            text = endpoint.text(piece)
            if text is None:
                if b'"gap":true' in piece or b"event: gap" in piece:
                    counts.fail(endpoint.name, "gap")
                continue
            counts.take(endpoint.name, self._base + client, *read(text), counts.clock(), self._back.get(client, 0))
            if endpoint.id_mark:
                places.append(Place.read(endpoint.id(piece)))
        if places:
            for before, after in pairwise([self._places[client], *places]):
                counts.step(endpoint.name, before, after)
            self._places[client] = places[-1]


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))


def resolve(host: str) -> str:
    """Return an address of `host`, a name or an address: IPv4 where it has one, else IPv6. Raises OSError, and ValueError for
    what can't be a name. May block."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return str(min(found, key=lambda one: one[0] != socket.AF_INET)[4][0])
