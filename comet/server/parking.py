"""Where connections sleep: no greenlet, no timer, no buffer; a place in a table, and one epoll.

The table is indexed by descriptor. In it stands who owns the connection while it waits: a sleeping
`Subscriber`, `IDLE` for a kept-alive connection between two requests, or a subscriber that is awake
and only watched for a hang-up. One private epoll a process watches them all, edge-triggered, and the
event loop watches the epoll. What can happen to a sleeper:

- *a message* (`deliver`): its bytes go straight to the socket. What the socket does not take wakes it.
- *input*: an idle connection has a request. `Server.again` may answer it here (a poll that only waits
  again); otherwise it wakes in a greenlet. Who waits is heard (`_hear`): what comes behind a poll is kept for when the poll
  is over, what comes behind a stream is dropped, so that the kernel keeps neither.
- *a hang-up*: everything it had is freed.
- *a deadline* (`_walk`): a poll is answered empty, a stream gets a heartbeat, an idle one is closed; the peer of one
  that has no heartbeats (`/test`) is asked by the kernel for a sign of life.

Deadlines are a number a descriptor, and none needs a timer. Of each block of descriptors a bound is kept that
none of its deadlines is before; a look at the bounds once a second finds the blocks with something due, and
they are walked one by one over that second, so a million heartbeats never fire together. A process of which
nobody has something due wakes once a second for it, and looks at twenty numbers. That is up to two seconds late, which is
much for a poll of `SHORT` or less: those stand in `comet.server.appointments` instead, and one timer rings for the first.

A descriptor has one owner. `take` unlinks it before a greenlet may have it, `_close` before it is
closed; the close itself waits until the events at hand are done (`_bury`), so that the kernel can't
give the number to a new connection while an old event or write for it is still in our hands.
"""

import logging
import os
import random
import select
import time
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from gevent import get_hub, monkey
from greenlet import getcurrent

from comet.kernel.sockets import SILENCE, epoll, probe, silent
from comet.server.appointments import Appointments

_EVENTS = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET  # EPOLLHUP and EPOLLERR are always told
_GONE = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_READ = 1
_BATCH = 512
REQUEST_SIZE = 4096
"""Bytes read of a request to an idle connection: larger ones are read on in a greenlet. A poll with so much behind it is over: it
is answered, and what is behind it read on."""

CHATTER = 65536
"""Bytes that a client may send behind a request whose answer is the last of its connection. No client has anything to say there: so
much is what a connection may send that is about to be closed, too (`comet.server.transport`)."""

BLOCK = 1024
"""Descriptors that share a bound on their deadlines, and are walked together."""

SHORT = 10.0
"""Seconds of a poll's wait that ends on time."""

LOOK_SECONDS = 1.0
"""Between two looks for blocks with something due: a deadline is kept to this, and as much again while they are walked."""

WALK_SECONDS = 0.05
"""Between two walks, each of a twentieth of those blocks: everything else has its turn."""

GRAIN = 8192
"""Milliseconds: the silences of a block end together, this often. Each walk for them wakes the process, and of blocks that
always have one that ends there would be twenty a second."""

NEVER = 2**62

os_write, os_read = os.write, os.read
os_close: Callable[[int], None] = monkey.get_original("os", "close") if monkey.is_module_patched("os") else os.close

log = logging.getLogger("comet.server")


class Sleeper(Protocol):
    """A subscriber, as far as the server knows one. See `comet.subscriber`."""

    descriptor: int
    epoch: int
    offset: int
    places: Any
    framing: Any
    host: Any
    home: Any

    @property
    def one_shot(self) -> bool: ...
    @property
    def ended(self) -> bool: ...
    @property
    def cursor(self) -> Any: ...
    @property
    def awake(self) -> Any: ...
    def encode(self, items: Any) -> Any: ...
    def wires(self, items: Any, date: bytes) -> Any: ...
    def wake(self, patience: float | None) -> None: ...
    def sleep(self, bed: Any, descriptor: int) -> None: ...
    def deliver(self, batch: Any) -> None: ...
    def gap(self, places: Any) -> Any: ...
    def took(self) -> None: ...
    def end(self, reason: str) -> None: ...
    def close(self, reason: str | None = None) -> None: ...
    def __iter__(self) -> Iterator[bytes]: ...


class Floor(Protocol):
    """The server: who takes over what can't be done asleep."""

    def again(self, descriptor: int, network: str, data: bytes) -> bool:
        """An idle connection of `network` sent this: answer it without a greenlet, or say False."""

    def resume(self, descriptor: int, network: str, said: bytes, subscriber: Sleeper | None = None, rest: bytes | memoryview = b"") -> None:
        """Wake a connection in a greenlet: `said` is what it sent and nobody has used; `rest` what `subscriber`, if it is one's, still
        has to be sent."""

    def gone(self, network: str) -> None:
        """A connection from `network` was closed here."""

    def rested(self, network: str) -> str:
        """An answer to `network` is over; the network that its connection is of from now on."""


class _Idle:
    """The owner of a kept-alive connection between two requests."""


IDLE = _Idle()


class Parking:
    """`idle_timeout` and `heartbeat` in seconds; `date` answers the Date header's line. `proxied`: connections may
    change their network from one request to the next."""

    def __init__(self, floor: Floor, idle_timeout: float, heartbeat: float, date: Callable[[], bytes], proxied: bool = False) -> None:
        self._floor = floor
        self._proxied = proxied
        self._idle_timeout = int(idle_timeout * 1000)
        self._heartbeat = int(heartbeat * 1000)
        self._date = date
        self._owners: list[Sleeper | _Idle | None] = []
        self._networks: list[str] = []
        self._deadlines = array("q")  # milliseconds of time.monotonic
        self._soonest = array("q")  # a block of those: none is before it
        self._due_blocks: list[int] = []
        self._at_once = 0  # blocks a walk
        self._phases: list[int] = []  # a block: when in every `GRAIN` its silences end
        self._buried: list[int] = []
        self._now = _milliseconds()
        """As of the last look, walk or events: for heartbeats, where asking the time at each delivery would cost more."""
        self._early: dict[int, bytes] = {}
        """Descriptors of polls -> what came behind the poll: the beginning of the next request."""
        self._chatter: dict[int, int] = {}
        """Descriptors of those whose answer is the last of their connection -> bytes that came behind the request, and were dropped."""
        self._draining = False
        self._epoll = epoll()
        self._hub = get_hub()
        self._loop = self._hub.loop
        self._watcher = self._loop.io(self._epoll.fileno(), _READ, priority=self._loop.MAXPRI)
        self._watcher.start(self._notice)
        self._appointments = Appointments(self._keep, self._loop)
        self._looker = self._loop.timer(LOOK_SECONDS, LOOK_SECONDS)
        self._looker.start(self._look_for_due)
        self._walker = self._loop.timer(WALK_SECONDS, WALK_SECONDS)

    # -- coming and going: whoever comes may be refused by the kernel, an OSError, and has nothing changed then

    def watch(self, descriptor: int, subscriber: Sleeper) -> None:
        """Tell an awake subscriber when its peer hangs up, until `take`. The peer of one that is never sent anything by itself is
        asked for a sign of life, as a sleeper's is."""
        self._put(descriptor, subscriber, "")
        if subscriber.awake.patience is None:
            self._wait_for(descriptor, subscriber, None)

    def wait(self, descriptor: int, awake: Any) -> bytes:
        """Block the greenlet of a watched subscriber until it has something to take, has ended, or its
        patience is over: its deadline stands in the table like a sleeper's, and costs no timer. Answers
        what is to be sent first."""
        if awake.patience is not None or self._deadlines[descriptor] == NEVER:  # a silence goes on
            owner = self._owners[descriptor]
            assert owner is not None and not isinstance(owner, _Idle), "it is watched"
            self._wait_for(descriptor, owner, awake.patience)
        awake.waker = partial(self._loop.run_callback, getcurrent().switch)
        awake.ready = b""
        self._hub.switch()
        ready: bytes = awake.ready
        awake.ready = None
        return ready

    def sleep(self, descriptor: int, network: str, subscriber: Sleeper, patience: float | None, said: bytes = b"") -> None:
        """A subscriber with nothing waiting sleeps here from now on; it owns the descriptor. `said` is what came behind its request,
        less than `REQUEST_SIZE`."""
        self._put(descriptor, subscriber, network)
        if said:
            self._early[descriptor] = said
        subscriber.sleep(self, descriptor)
        self._wait_for(descriptor, subscriber, patience)

    def put(self, descriptor: int, subscriber: Sleeper, network: str, patience: float | None) -> None:
        """As `sleep`, for a subscriber whose host this has been from its start."""
        self._put(descriptor, subscriber, network)
        subscriber.descriptor = descriptor
        self._wait_for(descriptor, subscriber, patience)

    def idle(self, descriptor: int, network: str) -> None:
        """A kept-alive connection waits here for its next request."""
        self._put(descriptor, IDLE, network)
        self._set_deadline(descriptor, _milliseconds() + self._idle_timeout)

    def again(self, descriptor: int, network: str, subscriber: Sleeper, patience: float | None) -> None:
        """An idle connection sleeps again as `subscriber`, whose host this is."""
        subscriber.descriptor = descriptor
        self._owners[descriptor] = subscriber
        self._networks[descriptor] = network
        self._wait_for(descriptor, subscriber, patience)

    def _put(self, descriptor: int, owner: Sleeper | _Idle, network: str) -> None:
        owners = self._owners
        if descriptor >= len(owners):
            blocks = descriptor // BLOCK + 1 - len(self._soonest)
            owners.extend([None] * blocks * BLOCK)
            self._networks.extend([""] * blocks * BLOCK)
            self._deadlines.extend([NEVER] * blocks * BLOCK)
            self._soonest.extend([NEVER] * blocks)
            self._phases.extend(random.randrange(GRAIN) for _ in range(blocks))
        self._epoll.register(descriptor, _EVENTS)  # first: it may fail
        owners[descriptor] = owner
        self._networks[descriptor] = network

    def _set_deadline(self, descriptor: int, deadline: int) -> None:
        """What only ever puts a deadline off may write it to the table alone: the bound stays one."""
        self._deadlines[descriptor] = deadline
        if deadline < self._soonest[descriptor // BLOCK]:
            self._soonest[descriptor // BLOCK] = deadline

    def _wait_for(self, descriptor: int, subscriber: Sleeper, patience: float | None) -> None:
        """Set a subscriber's deadline so many seconds ahead; without an end, at the end of a silence: any shorter one at first, so
        that those who came in the same minute are looked at all through the next silences, not together."""
        if patience is None:
            self._set_deadline(descriptor, self._silence(descriptor, random.random() * SILENCE))
        elif patience <= SHORT and subscriber.one_shot:
            deadline = self._deadlines[descriptor] = _milliseconds() + int(patience * 1000)
            self._appointments.make(descriptor, deadline)
        else:
            self._set_deadline(descriptor, _milliseconds() + int(patience * 1000))

    def _keep(self, descriptor: int) -> None:
        """End a short wait whose time has come. If another one began meanwhile, or something else, take note of its deadline."""
        now = self._now = _milliseconds()
        owner = self._owners[descriptor]
        if owner is not None and self._deadlines[descriptor] <= now:
            self._do_due(descriptor, owner)
            owner = self._owners[descriptor]
        deadline = self._deadlines[descriptor]
        if isinstance(owner, _Idle) or owner is None or not owner.one_shot or deadline > now + SHORT * 1000:
            self._set_deadline(descriptor, deadline)
        else:
            self._appointments.make(descriptor, deadline)

    def _silence(self, descriptor: int, seconds: float) -> int:
        """The end of one that lasts so long, or up to a grain less."""
        phase = self._phases[descriptor // BLOCK]
        return (_milliseconds() + int(seconds * 1000) - phase) // GRAIN * GRAIN + phase

    def take(self, descriptor: int) -> bytes:
        """Nobody sleeps or is watched there any more; the caller owns the descriptor. What came behind its request, if that was a
        poll, and belongs to the next."""
        if descriptor >= len(self._owners) or self._owners[descriptor] is None:
            return b""
        self._owners[descriptor] = None
        self._deadlines[descriptor] = NEVER
        self._epoll.unregister(descriptor)
        self._chatter.pop(descriptor, None)
        return self._early.pop(descriptor, b"")

    def _close(self, descriptor: int, reason: str) -> None:
        owner = self._owners[descriptor]
        network = self._networks[descriptor]
        self.take(descriptor)
        self._bury(descriptor)
        self._floor.gone(network)
        if owner is not None and not isinstance(owner, _Idle):
            owner.close(reason)

    def _bury(self, descriptor: int) -> None:
        if not self._buried:
            self._loop.run_callback(self._close_buried)
        self._buried.append(descriptor)

    def _close_buried(self) -> None:
        buried, self._buried = self._buried, []
        for descriptor in buried:
            try:
                os_close(descriptor)
            except OSError:  # the kernel has let go of it all the same (close(2)); what matters is the rest
                log.exception("a close failed")

    # -- a sleeper's host

    def deliver(self, subscriber: Sleeper, batch: Any) -> None:
        """Write a batch to a sleeper's socket."""
        if subscriber.places is None and subscriber.offset == batch.before and subscriber.epoch == batch.epoch:
            framing = subscriber.framing
            data = batch.wires.get(framing) or batch.wire(framing, self._date())
            # what follows is `write`, in place: it runs once a delivery
            try:
                sent = os_write(subscriber.descriptor, data)
            except BlockingIOError:
                sent = 0
            except OSError:
                self._close(subscriber.descriptor, "lost")
                return
            subscriber.offset = batch.last
            if framing.heartbeat:
                self._deadlines[subscriber.descriptor] = self._now + self._heartbeat
            if sent != len(data):
                self._rouse(subscriber, memoryview(data)[sent:])
            elif framing.one_shot:
                self._answered(subscriber)
        else:
            self._deliver_odd(subscriber, batch)

    def _deliver_odd(self, subscriber: Sleeper, batch: Any) -> None:
        """To a subscriber of several channels, or one that knows some of the batch or misses some before."""
        if subscriber.places is None:
            epoch, offset = subscriber.epoch, subscriber.offset
        else:
            epoch, offset = subscriber.places.at(batch.channel)
        if epoch == batch.epoch and batch.before <= offset:
            items = batch.messages[offset - batch.before :]
            if items:
                self.write(subscriber, subscriber.framing.wire(subscriber.encode(items), self._date()))
            return
        self._rouse(subscriber, b"")  # a skip: it has to read history, which takes a greenlet
        subscriber.deliver(batch)

    def skip(self, subscriber: Sleeper, places: Any) -> None:
        """Tell a sleeper that it has lost messages, unless it has passed these places."""
        gap = subscriber.gap(places)
        if gap:
            self.write(subscriber, subscriber.framing.wire(gap, self._date()))

    def write(self, subscriber: Sleeper, data: bytes) -> None:
        """Send what completes the answer of a poll or goes on in a stream."""
        try:
            sent = os_write(subscriber.descriptor, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close(subscriber.descriptor, "lost")
            return
        if subscriber.framing.heartbeat:
            self._deadlines[subscriber.descriptor] = self._now + self._heartbeat
        if sent != len(data):
            self._rouse(subscriber, memoryview(data)[sent:])
        elif subscriber.framing.one_shot:
            self._answered(subscriber)

    def _answered(self, subscriber: Sleeper) -> None:
        """A poll has its answer."""
        descriptor = subscriber.descriptor
        if subscriber.framing.closes:
            self._close(descriptor, "answered")
            return
        self._rest(descriptor)
        subscriber.close()

    def _rest(self, descriptor: int) -> None:
        """An answer is over: what stays is a kept-alive connection, perhaps with a request that came early."""
        self._owners[descriptor] = IDLE
        self._set_deadline(descriptor, _milliseconds() + self._idle_timeout)
        if self._proxied:
            self._networks[descriptor] = self._floor.rested(self._networks[descriptor])
        if descriptor in self._early:  # its edge was told already and will not be told again
            self._loop.run_callback(self._look, descriptor)

    def _look(self, descriptor: int) -> None:
        if self._owners[descriptor] is IDLE:
            self._request(descriptor, 0)

    def _rouse(self, subscriber: Sleeper, rest: bytes | memoryview) -> None:
        """Wake a sleeper in a greenlet, to be sent `rest` first."""
        descriptor = subscriber.descriptor
        if len(rest) > subscriber.home.busy_backlog:  # until now it has taken everything
            self._close(descriptor, "backlog-bytes")
            return
        patience: float | None = None
        if subscriber.one_shot:
            patience = max(0.0, (self._deadlines[descriptor] - _milliseconds()) / 1000)
        elif subscriber.framing.heartbeat:
            patience = self._heartbeat / 1000
        network = self._networks[descriptor]
        said = self.take(descriptor)
        subscriber.wake(patience)
        self._floor.resume(descriptor, network, said, subscriber, rest)

    def end(self, subscriber: Sleeper, reason: str) -> None:
        """Finish a sleeper's answer."""
        data = subscriber.framing.end(subscriber.cursor, self._date(), self._draining)
        descriptor = subscriber.descriptor
        try:
            complete = os_write(descriptor, data) == len(data)
        except BlockingIOError:
            self._rouse(subscriber, b"")  # it still has to be sent what the socket holds: then it is told
            subscriber.end(reason)
            return
        except OSError:
            self._close(descriptor, reason)
            return
        if complete and not subscriber.framing.closes and not self._draining:
            self._rest(descriptor)
            subscriber.close(reason)
        else:
            self._close(descriptor, reason)

    # -- what happens to sleepers

    def _notice(self) -> None:
        owners = self._owners
        self._now = _milliseconds()
        for descriptor, event in self._epoll.poll(0, _BATCH):
            owner = owners[descriptor]
            if owner is None:
                continue  # closed or woken by an earlier event of this batch
            try:
                if isinstance(owner, _Idle):
                    self._request(descriptor, event)
                elif event & _GONE:
                    self._end(descriptor, "hang-up", owner)
                else:
                    self._hear(descriptor, owner)
            except Exception:  # an edge is told once: one failure must not lose the others of the batch
                log.exception("an event of a sleeping connection failed")
                self._give_up(descriptor, owner)

    def _give_up(self, descriptor: int, owner: Sleeper | _Idle) -> None:
        """After a failure of ours: close what sleeps here, and end who is awake."""
        if self._owners[descriptor] is owner:
            if isinstance(owner, _Idle) or owner.host is self:
                self._close(descriptor, "lost")
            else:
                owner.end("lost")

    def _end(self, descriptor: int, reason: str, subscriber: Sleeper) -> None:
        """End who waits, asleep or awake, because of what its client did."""
        if subscriber.host is self:
            self._close(descriptor, reason)
        else:
            subscriber.end(reason)

    def _hear(self, descriptor: int, subscriber: Sleeper) -> None:
        """Take what the client of one who waits has sent. Left to the kernel it would cost twice as much and more: a packet of a byte
        takes as much memory as a large one."""
        last = subscriber.framing.closes
        early = self._early.get(descriptor, b"")
        if len(early) >= REQUEST_SIZE:
            self._due(descriptor, subscriber)
            return  # the rest is read with the next request
        try:
            data = os_read(descriptor, CHATTER if last else REQUEST_SIZE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._end(descriptor, "hang-up", subscriber)
        elif last:
            sent = self._chatter[descriptor] = self._chatter.get(descriptor, 0) + len(data)
            if sent >= CHATTER:
                self._end(descriptor, "chatty", subscriber)
        else:
            self._early[descriptor] = early + data
            if len(early) + len(data) >= REQUEST_SIZE:
                self._due(descriptor, subscriber)

    def _request(self, descriptor: int, event: int) -> None:
        """An idle connection sent something, or ended."""
        early = self._early.pop(descriptor, b"")
        try:
            data = early + os_read(descriptor, REQUEST_SIZE)
        except BlockingIOError:
            if not early:
                return
            data = early
        except OSError:
            data = b""
        if not data:
            self._close(descriptor, "hang-up")
        elif event & _GONE or len(data) >= REQUEST_SIZE or not self._floor.again(descriptor, self._networks[descriptor], data):
            network = self._networks[descriptor]
            self.take(descriptor)
            self._floor.resume(descriptor, network, data)

    def _look_for_due(self) -> None:
        now = self._now = _milliseconds()
        if not self._due_blocks:
            self._due_blocks = [block for block, soonest in enumerate(self._soonest) if soonest <= now]
            if self._due_blocks:
                self._at_once = 1 + int(len(self._due_blocks) * WALK_SECONDS / LOOK_SECONDS)
                self._walker.start(self._walk)

    def _walk(self) -> None:
        """Do what is due in the next of the blocks."""
        now = self._now = _milliseconds()
        deadlines, owners = self._deadlines, self._owners
        for block in self._due_blocks[: self._at_once]:
            start, stop = block * BLOCK, (block + 1) * BLOCK
            for descriptor, deadline in enumerate(deadlines[start:stop], start):
                owner = owners[descriptor]
                if deadline <= now and owner is not None:
                    self._do_due(descriptor, owner)
            self._soonest[block] = min(deadlines[start:stop])
        del self._due_blocks[: self._at_once]
        if not self._due_blocks:
            self._walker.stop()

    def _do_due(self, descriptor: int, owner: Sleeper | _Idle) -> None:
        try:
            self._due(descriptor, owner)
        except Exception:  # the others are due as well
            log.exception("a deadline of a sleeping connection failed")
            self._give_up(descriptor, owner)

    def _due(self, descriptor: int, owner: Sleeper | _Idle) -> None:
        if isinstance(owner, _Idle):
            self._close(descriptor, "idle")
        elif owner.host is self and (owner.one_shot or owner.framing.heartbeat):
            self.write(owner, owner.framing.wire(owner.encode([]), self._date()))
        elif owner.host is not self and not owner.ended and owner.awake.patience is not None:
            self._deadlines[descriptor] = NEVER
            owner.awake.notify()
        else:
            if silent(descriptor) >= SILENCE / 3:
                probe(descriptor)
            self._deadlines[descriptor] = self._silence(descriptor, SILENCE)

    # -- stopping

    def drain(self) -> None:
        """Sleeping subscribers are about to be ended by their hub, and close as they end."""
        self._draining = True

    def close_idle(self) -> None:
        """Close what waits for a request; one that has just come is answered."""
        for descriptor, owner in enumerate(self._owners):
            if owner is IDLE:
                self._request(descriptor, 0)
                if self._owners[descriptor] is IDLE:
                    self._close(descriptor, "shutdown")
                    self._close_buried()  # now, as no batch is under way: a request that came meanwhile would be reset

    def evict(self) -> None:
        """Close what still sleeps."""
        for descriptor, owner in enumerate(self._owners):
            if owner is not None and (isinstance(owner, _Idle) or owner.host is self):
                self._close(descriptor, "shutdown")
        self._close_buried()

    def close(self) -> None:
        """Stop for good; nobody sleeps or is watched any more."""
        self._appointments.close()
        for watcher in (self._watcher, self._looker, self._walker):
            watcher.stop()
            watcher.close()
        self._epoll.close()


def _milliseconds() -> int:
    return int(time.monotonic() * 1000)
