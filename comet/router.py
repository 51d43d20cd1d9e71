"""The router: one process in which all workers of a machine meet. It is the memory backplane, served.

metabrew's router of 2008: *login* (a worker has the first subscriber of a channel), *logout* (it lost
the last), *send*. Order, offsets, epochs, history, subscriber counts and idempotency keys are in one
place, `MemoryBackplane`; here stands only who is logged in where, and the links to the workers
(`comet.backplane.router`, frames in `comet.backplane.frames`).

One thread, one epoll, no greenlets: every frame is handled at once, and what a turn of the loop has for
a worker leaves in one write. What waits for a worker that does not read is bounded: beyond it its
messages are dropped, and it is told of which channels, so that it reads them from history (`Missed`);
its own calls are not handled before it has taken the answers.

Started by `comet.supervisor`, as ``python -m comet.router``; ends when that is gone.
"""

import argparse
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from comet import collector
from comet import log as logs
from comet import settings as knobs
from comet.backplane import frames
from comet.backplane.memory import Bounds, MemoryBackplane
from comet.board import Board
from comet.errors import Refusal
from comet.history import Joined
from comet.kernel import limits, processes
from comet.message import Message
from comet.stats import Stats

MAX_WAITING = 16 << 20
"""Bytes that wait for a worker: some seconds of a busy service. Beyond it, see the module."""

READ_SIZE = 1 << 18
"""Bytes taken of a link before the others have their turn."""

FRAME = 1 << 15
"""Bytes of messages from which on a frame is full: a worker takes a frame at once, and everything else there waits meanwhile."""

RESUMED = 4 << 20
"""Bytes of messages in one answer to a worker that catches up on its channels, which may be tens of thousands."""

REST_A_WORKER = 0.002
"""Seconds between two turns of the loop, for each worker that the first has woken and that is one too many
(`limits.crowding`). Their caches are cold, and to wake one costs 100 us and more, whatever for: 60 on two cores are woken 600
times a second then, for many messages each. Who has woken few, as a message to one client does, does not rest."""

MOST_REST = 0.1

TICK = 1.0
"""Seconds between two looks at what is past its time, and two beats."""

IGNORED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that mean the supervisor, or nobody here, and may be sent to all processes of a service (`systemctl kill`)."""

log = logging.getLogger("comet.router")

_asked = msgspec.msgpack.Decoder(frames.Asked)
_hello = msgspec.msgpack.Decoder(frames.Hello)


class _Foreign(ConnectionError):
    """A worker speaks another version of `comet.backplane.frames`: its link ends, as if it had broken."""


class Link:
    """The connection to one worker. `channels` are those it is logged in to, with its subscribers on each;
    `missed` are those of which it has not been sent everything."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.cutter = frames.Cutter()
        self.channels: dict[str, int] = {}
        self.missed: dict[str, None] = {}
        self.unread: Iterator[memoryview] | None = None
        """Frames that came with others and wait until it has taken the answers to those."""
        self.greeted = False
        """It speaks as this router does."""
        self.watched = select.EPOLLIN
        """What the epoll tells of it: EPOLLOUT while its socket is full."""
        self._items: list[bytes] = []
        self._size = 0
        """Bytes of those."""
        self._out: list[bytes] = []
        self._queued = 0
        self._rest = memoryview(b"")

    @property
    def waiting(self) -> int:
        """Bytes that are to be sent."""
        return self._queued + len(self._rest)

    @property
    def full(self) -> bool:
        """More waits than may."""
        return self.waiting > MAX_WAITING

    def put(self, frame: bytes) -> None:
        """Send `frame`, behind all that waits."""
        self._seal()
        self._out.append(frame)
        self._queued += len(frame)

    def message(self, item: bytes) -> None:
        """Send a message that `frames.item` has encoded: of channels whose messages it `takes`."""
        self._items.append(item)
        self._size += len(item)
        self._queued += len(item)
        if self._size > FRAME:
            self._seal()

    def takes(self, channel: str) -> bool:
        """Whether a message of the channel may be sent; if not, it is noted as missed."""
        if self._queued + len(self._rest) > MAX_WAITING or channel in self.missed:  # `full`
            self.missed[channel] = None
            return False
        return True

    def _seal(self) -> None:
        if self._items:
            self._out.append(frames.deliver(self._items))
            self._items = []
            self._size = 0

    def flush(self) -> bool:
        """Send what the socket takes; whether that was all. Raises OSError."""
        while True:
            if not self._rest:
                if self.missed and self.waiting <= MAX_WAITING // 2:
                    self.put(frames.frame(frames.Missed(list(self.missed))))
                    self.missed = {}
                self._seal()
                if not self._out:
                    return True
                self._rest = memoryview(b"".join(self._out))
                self._out = []
                self._queued = 0
            try:
                sent = self.sock.send(self._rest)
            except BlockingIOError:
                return False
            self._rest = self._rest[sent:]


class Router:
    """Serves workers that connect to `listener`, a bound Unix socket; `turn` is its loop's body."""

    def __init__(self, listener: socket.socket, bounds: Bounds, clock: Callable[[], float] = time.monotonic) -> None:
        self._cores = limits.cores()
        self.links: dict[int, Link] = {}
        self.backplane = MemoryBackplane(bounds, clock, lapsed=self._lapsed)
        self.backplane.attach(self._deliver, self._dropped)
        self._interest: dict[str, Link | list[Link]] = {}
        self._dirty: set[Link] = set()
        """Those that something is to be sent to."""
        self._rests_until = 0.0
        self._listener = listener
        self._short = self._paused = False
        listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(listener.fileno(), select.EPOLLIN)
        self._handle: dict[type, Callable[[Link, Any], None]] = {
            frames.Publish: self._publish,
            frames.Send: self._send,
            frames.Subscribe: self._subscribe,
            frames.Peek: self._peek,
            frames.Resume: self._resume,
            frames.Interest: self._count,
            frames.Logout: self._logout,
            frames.Read: self._read,
            frames.Info: self._info,
            frames.Delete: self._delete,
            frames.Totals: self._totals,
        }

    # -- the loop

    def watch(self, descriptor: int) -> None:
        """Have `turn` answer False once `descriptor` has something to read, or has ended."""
        self._epoll.register(descriptor, select.EPOLLIN)

    def turn(self, timeout: float) -> bool:
        """Wait for at most `timeout` seconds and do what there is to do; False when a watched descriptor
        says that it is over."""
        going = True
        rest = 0 if self._dirty else self._rests_until - time.monotonic()
        if rest > 0:
            time.sleep(rest)
        events = self._epoll.poll(0 if self._dirty else timeout)
        began = time.monotonic()
        for descriptor, event in events:
            link = self.links.get(descriptor)
            if link is not None:
                self._dirty.add(link)
                if event & select.EPOLLOUT:
                    self._watch(link, link.watched & ~select.EPOLLOUT)
                if event & ~select.EPOLLOUT:
                    self._serve(link)
            elif descriptor == self._listener.fileno():
                self._accept()
            else:
                going = False
        if self._dirty:
            self._rests_until = began + self.rest(len(self._dirty))
        self._flush()
        return going

    def rest(self, woken: int) -> float:
        """Seconds from the beginning of a turn that has something for so many workers to the next: see `REST_A_WORKER`."""
        return min(MOST_REST, limits.crowding(woken, self._cores) * REST_A_WORKER)

    def close(self) -> None:
        """End all links."""
        for link in list(self.links.values()):
            self._end(link)
        self._epoll.close()

    def _accept(self) -> None:
        """Let a worker in. If the kernel is short of something, who is in is served on, and the others wait for `accept_again`."""
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            self._pause(error)
            return
        try:
            sock.setblocking(False)
            self._epoll.register(sock.fileno(), select.EPOLLIN)
        except OSError as error:
            sock.close()  # the worker tries again
            self._pause(error)
            return
        self.links[sock.fileno()] = Link(sock)
        self._short = False

    def _pause(self, error: OSError) -> None:
        """Accept nobody until `accept_again`: the listener stays readable, and the loop would go round for nothing."""
        if not self._short:
            self._short = True
            log.error("a worker can't be let in (%s); trying again each second", error)
        self._paused = True
        self._epoll.modify(self._listener.fileno(), 0)

    def accept_again(self) -> None:
        """Try again to let workers in, after a shortage. Called about once a second."""
        if self._paused:
            self._paused = False
            self._epoll.modify(self._listener.fileno(), select.EPOLLIN)

    def _serve(self, link: Link) -> None:
        try:
            if link.unread is None:
                data = link.sock.recv(READ_SIZE)
                if not data:
                    self._end(link)
                    return
                link.unread = link.cutter.feed(data)
            for body in link.unread:
                if not link.greeted:
                    self._greet(link, body)
                    continue
                asked = _asked.decode(body)
                self._handle[type(asked)](link, asked)
                if link.full:
                    return
            link.unread = None
        except OSError:  # the worker has gone, or was turned away
            self._end(link)
        except Exception:
            log.exception("a worker's frame failed; its link is closed, and it makes another")
            self._end(link)

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, set()
        for link in dirty:
            if link.sock.fileno() < 0:
                continue  # ended meanwhile
            try:
                # where the socket is full, the epoll will tell
                done = not link.watched & select.EPOLLOUT and link.flush()
                if link.unread is not None and not link.full:
                    self._dirty.add(link)
                    self._serve(link)
            except OSError:
                self._end(link)
            if link.sock.fileno() < 0:
                continue
            # who lets too much wait is not read from: each call would add to it
            reads = 0 if link.full else select.EPOLLIN
            self._watch(link, reads if done else reads | select.EPOLLOUT)

    def _watch(self, link: Link, events: int) -> None:
        if link.watched != events:
            link.watched = events
            self._epoll.modify(link.sock.fileno(), events)

    def _end(self, link: Link) -> None:
        """A worker is gone, or comes back: it counts nothing any more."""
        del self.links[link.sock.fileno()]
        self._dirty.discard(link)
        self._epoll.unregister(link.sock.fileno())
        link.sock.close()
        channels, link.channels = link.channels, {}
        for channel in channels:
            self._part(link, channel)
        for channel, count in channels.items():  # with nobody there a channel rests, and then another may lapse
            self._change(channel, -count)

    # -- who is logged in where

    def _login(self, link: Link, channel: str) -> None:
        """The link may be logged in already."""
        if channel in link.channels:
            return
        link.channels[channel] = 0
        present = self._interest.get(channel)
        if present is None:
            self._interest[channel] = link
        elif isinstance(present, list):
            present.append(link)
        else:
            self._interest[channel] = [present, link]

    def _part(self, link: Link, channel: str) -> None:
        present = self._interest[channel]
        if isinstance(present, list) and len(present) > 1:
            present.remove(link)
        else:
            del self._interest[channel]

    def _links(self, channel: str) -> Sequence[Link]:
        present = self._interest.get(channel)
        return () if present is None else present if isinstance(present, list) else (present,)

    def _logged_out(self, channel: str) -> Sequence[Link]:
        """Log everybody out of a channel whose log is gone; who that was."""
        links = self._links(channel)
        self._interest.pop(channel, None)
        for link in links:
            del link.channels[channel]
            link.missed.pop(channel, None)
            self._dirty.add(link)
        return links

    def _change(self, channel: str, change: int) -> None:
        epoch = self.backplane.epoch(channel)
        if change and epoch is not None:
            self.backplane.count(channel, epoch, change)

    # -- what the backplane calls

    def _deliver(self, messages: Sequence[Message]) -> None:
        first = messages[0]
        if len(messages) > 1 and all(one.data is first.data and one.type == first.type for one in messages):
            self._feed(messages)
            return
        for message in messages:
            links = self._links(message.channel)
            if links:
                item = frames.item(message.type, message.data, ((message.channel, message.epoch, message.offset),))
                for link in links:
                    if link.takes(message.channel):
                        link.message(item)
                    self._dirty.add(link)

    def _feed(self, messages: Sequence[Message]) -> None:
        """One message for many channels: its data goes once to each worker."""
        places: dict[Link, list[tuple[str, int, int]]] = {}
        look_up = self._interest.get
        for message in messages:
            channel = message.channel
            present = look_up(channel)
            if present is None:
                continue
            for link in present if isinstance(present, list) else (present,):
                if link.takes(channel):
                    those = places.get(link)
                    if those is None:
                        those = places[link] = []
                    those.append((channel, message.epoch, message.offset))
                else:
                    self._dirty.add(link)
        self._dirty.update(places)
        for link, those in places.items():
            link.message(frames.item(messages[0].type, messages[0].data, those))

    def _dropped(self, channel: str, epoch: int) -> None:
        for link in self._logged_out(channel):
            link.put(frames.frame(frames.Dropped(channel, epoch)))

    def _lapsed(self, channel: str) -> None:
        for link in self._logged_out(channel):
            link.put(frames.frame(frames.Lapsed([channel])))

    # -- what workers ask

    @staticmethod
    def _greet(link: Link, body: memoryview) -> None:
        """Answer the first frame of a link. Raises _Foreign if its worker is of code that speaks otherwise, and OSError if that worker
        has gone before it could be told."""
        link.put(frames.frame(frames.Welcome(frames.VERSION)))
        try:
            version = _hello.decode(body).version
        except msgspec.MsgspecError:
            version = "none"
        if version != frames.VERSION:
            log.error("a worker of another version of comet was turned away: it speaks %s, the router %s", version, frames.VERSION)
            link.flush()
            raise _Foreign
        link.greeted = True

    @staticmethod
    def _answer(link: Link, call: int, value: Any) -> None:
        link.put(frames.frame(frames.Answer(call, msgspec.Raw(frames.encode(value)))))

    def _publish(self, link: Link, asked: frames.Publish) -> None:
        answers = self.backplane.publish(asked.publications)
        self._answer(link, asked.call, [one.detail if isinstance(one, Refusal) else one for one in answers])

    def _send(self, link: Link, asked: frames.Send) -> None:
        try:
            value: Any = self.backplane.send(asked.channels, asked.kind, asked.data, asked.key)
        except Refusal as refusal:
            value = refusal.detail
        self._answer(link, asked.call, value)

    def _subscribe(self, link: Link, asked: frames.Subscribe) -> None:
        answers = self.backplane.subscribe(asked.channels, asked.since, asked.size)
        for channel in asked.channels:
            self._login(link, channel)
            link.channels[channel] += 1
        self._answer(link, asked.call, [_replay(answer) for answer in answers])

    def _peek(self, link: Link, asked: frames.Peek) -> None:
        answers = self.backplane.peek(asked.channels, asked.since, asked.size)
        self._answer(link, asked.call, [_replay(answer) for answer in answers])

    def _resume(self, link: Link, asked: frames.Resume) -> None:
        answers = []
        channels, since = [channel for channel, _, _ in asked.places], [position for _, _, position in asked.places]
        for (channel, more, _), answer in zip(asked.places, self.backplane.subscribe(channels, since, RESUMED), strict=True):
            self.backplane.count(channel, answer.position.epoch, more - 1)
            self._login(link, channel)
            link.channels[channel] += more
            answers.append(_replay(answer))
        self._answer(link, asked.call, answers)

    def _count(self, link: Link, asked: frames.Interest) -> None:
        for channel, epoch, change in asked.changes:
            # where it is logged out meanwhile, or of another log, what it counted went with the old one
            if channel in link.channels and self.backplane.count(channel, epoch, change):
                link.channels[channel] += change

    def _logout(self, link: Link, asked: frames.Logout) -> None:
        for channel in asked.channels:
            if link.channels.get(channel) == 0:
                self._part(link, channel)
                del link.channels[channel]
                link.missed.pop(channel, None)

    def _read(self, link: Link, asked: frames.Read) -> None:
        joined = self.backplane.read(asked.channel, asked.since, asked.limit, asked.size)
        self._answer(link, asked.call, None if joined is None else _replay(joined))

    def _info(self, link: Link, asked: frames.Info) -> None:
        self._answer(link, asked.call, self.backplane.info(asked.channel))

    def _delete(self, link: Link, asked: frames.Delete) -> None:
        self._answer(link, asked.call, self.backplane.delete(asked.channel))

    def _totals(self, link: Link, asked: frames.Totals) -> None:
        self._answer(link, asked.call, self.backplane.totals())


def _replay(joined: Joined) -> frames.Replay:
    return frames.Replay(joined.position, [(message.type, message.data) for message in joined.messages], joined.gap, joined.more)


def main(arguments: Sequence[str]) -> int:
    """Run until SIGTERM, or until the supervisor is gone; the exit status."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="comet.router", description="Started by comet's supervisor.")
    for name in ("listener", "lifeline", "board"):
        parser.add_argument(f"--{name}-fd", type=int, required=True)
    parser.add_argument("--slot", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--trial", action="store_true", help="end where it would begin to serve")
    parser.add_argument("rest", nargs="*", help="the service's own flags")
    options = parser.parse_args(arguments)
    settings = knobs.parse(options.rest)
    logs.set_up(settings.log, pid=True)
    if limits.crowding(options.workers, limits.cores()):  # each message waits for this process, behind sixty others
        try:
            processes.go_first()
        except OSError as error:
            log.info("the router waits for its turn as the workers do: %s (LimitNICE=-10 in a unit allows it to go first)", error)
    board = Board.open(options.board_fd)
    router = Router(socket.socket(fileno=options.listener_fd), Bounds.of(settings))
    stats = Stats()
    collector.set_up(stats)
    stop, stopped = os.pipe()
    os.set_blocking(stopped, False)
    signal.set_wakeup_fd(stopped)
    for number in (signal.SIGTERM, signal.SIGINT):  # a terminal sends SIGINT to all; the supervisor decides
        signal.signal(number, (lambda *_: None) if number == signal.SIGTERM else signal.SIG_IGN)
    router.watch(options.lifeline_fd)
    router.watch(stop)
    next_tick = next_tidying = time.monotonic()
    while not options.trial and router.turn(max(0.0, next_tick - time.monotonic())):
        if time.monotonic() >= next_tick:
            next_tick = time.monotonic() + TICK
            router.backplane.expire()
            router.accept_again()
            logs.tend()
            collector.keep()
            if next_tick >= next_tidying:
                next_tidying = next_tick + collector.TIDYING
                processes.give_back()
            board.write(options.slot, {
                "role": "router",
                "speaks": frames.VERSION,
                "pid": os.getpid(),
                "workers": len(router.links),
                "gc_longest_seconds": stats.gc_longest_seconds,
                "log_dropped": logs.dropped(),
                **router.backplane.totals(),
            })  # fmt: skip
    router.close()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
