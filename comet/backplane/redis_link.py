"""A worker's connection to one Redis server: what waits to be written, the calls under way, and what is published.

Neighbours: `comet.backplane.redis`, the `Owner`; `comet.backplane.redis_dial`, which connects. One connection has
all: subscriptions, scripts, their answers and what is published (RESP3). Redis does one thing after the other, so
an answer's place among the deliveries says what came before it: that is what joining rests on.

Calls go out together at the end of the loop's turn; while many answers are owed, only when the next one comes: so what is
ready meanwhile makes one round trip. No more of them are under way than have room for their answers in Redis (`ROOM`). What comes is
read by the loop itself, a piece a turn (see `comet.backplane.link`).

When the connection breaks, or Redis leaves a call unanswered for `timeout`, another is made, with back-off. What was asked
and not answered is asked again on it if the call says `again`; of the others nobody knows whether they were done, and
their `done` is given BROKEN.
"""

import logging
import random
import ssl
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import gevent
import hiredis
from gevent import get_hub
from gevent.event import Event

from comet.backplane.redis_dial import NOTHING, Connection, Denied, reason, stranger
from comet.backplane.redis_outage import Outage
from comet.backplane.redis_scripts import Scripts

READ_SIZE: Final = 1 << 17
"""Bytes taken in one turn of the loop."""

LOOK: Final = 0.25
"""Seconds between two looks at whether Redis answers."""

QUIET: Final = 1.0
"""Seconds of silence after which Redis is asked whether it is there."""

ROUND: Final = 64
"""Calls under way beyond which what is ready waits for the next answer."""

ROOM: Final = 16 << 20
"""Bytes that the answers to the calls under way may have in all. Redis does the commands of a connection that it has read before it
writes the answers, and cuts a connection off that has subscriptions and 32 MB waiting (client-output-buffer-limit pubsub): many who
come back to long histories would be cut off again and again."""

OVER: Final = b"comet-over"
"""A reply that no script gives."""

FENCE: Final = b"*2\r\n$4\r\nECHO\r\n$%d\r\n%b\r\n" % (len(OVER), OVER)
"""What is asked behind each (un)subscription. That is confirmed by a push, as is what a cluster ends by itself, when a slot goes, in
the middle of anything; and refused by an answer. So only what is answered behind it says that it is over. If Redis refuses this as
well (ACL, a script that runs too long), nobody knows which answer is whose, and another connection is made."""

ANSWER: Final = 256
"""Bytes of most answers."""

LONGEST_PAUSE: Final = 1.0
"""Seconds between two tries to connect, at most."""

AWAY: Final = ("LOADING", "READONLY", "MASTERDOWN", "NOREPLICAS")
"""Errors of a server that is there and can't be used now."""

IN_A_SCRIPT: Final = "ERR Error running script"
"""How Redis 6 begins what a command in a script was refused for; Redis 7 says that as it is."""

_READ, _WRITE = 1, 2
_MESSAGES: Final = frozenset({b"message", b"smessage"})

log = logging.getLogger("comet.backplane")


class Broken:
    """In the place of an answer: the connection broke before it came."""


BROKEN: Final = Broken()

Done = Callable[[Any], None]
"""Takes an answer, which may be a hiredis.ReplyError or BROKEN, at its place in the stream. Must not raise or block."""


def _nothing(reply: Any) -> None:
    """Of an answer that nobody needs."""


class Call:
    """`make` says what is asked, when it is sent; `again` that it may be asked twice; `size` is how many bytes its answer may have;
    `names` are the channels of a (un)subscription, behind which comes a `FENCE`."""

    __slots__ = ("again", "at", "done", "make", "names", "refused", "size")

    def __init__(
        self,
        make: Callable[[], Sequence[Any]],
        done: Done = _nothing,
        again: bool = True,
        size: int = ANSWER,
        names: Sequence[bytes] = (),
    ) -> None:
        self.make = make
        self.done = done
        self.again = again
        self.size = size
        self.names = names
        self.refused = ""
        """Why Redis refused the subscription, if it did."""
        self.at = 0.0
        """When it was sent; 0 where it was not."""


class Owner(Protocol):
    """Whose link it is. Nothing here may block."""

    def linked(self, link: "Link") -> None:
        """There is a new connection: what is called now comes first on it."""

    def unlinked(self, link: "Link") -> None:
        """There is none any more."""

    def published(self, name: bytes, payload: bytes) -> None:
        """Redis says this on a channel of its own."""

    def thrown_out(self, name: bytes) -> None:
        """Redis has ended a subscription, or refused it: its slot went to another server."""


class Link:
    """`connect` makes a connection, `timeout` is how many seconds an answer may take. Made and used in one process, after
    any fork."""

    def __init__(
        self, title: str, connect: Callable[[], Connection], timeout: float, scripts: Scripts, owner: Owner, outage: Outage | None = None
    ) -> None:
        self.title = title
        self.connect = connect
        """Makes a connection, waiting."""
        self._timeout = timeout
        self._scripts = scripts
        self._owner = owner
        self._outage = outage or Outage()
        self._connection: Connection | None = None
        self._sent: deque[Call] = deque()
        self._owed = 0
        """Bytes that the answers to those may have."""
        self._ready: deque[Call] = deque()
        self._first: deque[Call] | None = None
        """Where `linked` puts its calls, while it does."""
        self._rest = memoryview(b"")
        self._flushing = False
        self._heard = 0.0
        self._healthy = False
        self._broken = Event()
        self._hub = get_hub()
        self._loop = self._hub.loop
        self._readable: Any = None
        self._writable: Any = None
        self._timer = self._loop.timer(LOOK, LOOK)
        self._greenlet: Any = None

    def start(self) -> None:
        """Connect, and stay so until `close`."""
        self._greenlet = gevent.spawn(self._run)

    def close(self) -> None:
        """For good. What waits is not answered any more."""
        self._greenlet.kill()
        self._end("closed", quiet=True)
        self._outage.forget(self.title)
        self._timer.stop()
        for call in [*self._ready]:
            call.done(BROKEN)
        self._ready.clear()

    @property
    def up(self) -> bool:
        """There is a connection."""
        return self._connection is not None

    @property
    def waiting(self) -> int:
        """Calls that have no answer yet."""
        return len(self._sent) + len(self._ready)

    # -- asking

    def call(self, call: Call) -> None:
        """Have this asked, behind all that waits."""
        if self._first is not None:
            self._first.append(call)
        else:
            self._ready.append(call)
        self._soon()

    def subscribe(self, verb: bytes, names: Sequence[bytes]) -> None:
        """(Un)subscribe, as `verb` says, behind all that waits. Who is refused is thrown out."""
        self.call(Call(lambda: (verb, *names), again=False, names=names))

    def forget(self, call: Call) -> bool:
        """Whether it was not sent yet; then it won't be."""
        if call.at:
            return False
        try:
            self._ready.remove(call)
        except ValueError:
            return False
        return True

    def _soon(self) -> None:
        if self._connection is not None and not self._flushing:
            self._flushing = True
            self._loop.run_callback(self.flush)

    def flush(self) -> None:
        """Write what is ready, in one piece. What the socket does not take waits for it."""
        self._flushing = False
        if self._connection is None or self._writable.active or (len(self._sent) > ROUND and not self._rest):
            return
        while self._rest or (self._ready and self._owed < ROOM):
            if not self._rest:
                self._rest = memoryview(self._pack())
            try:
                self._rest = self._rest[self._connection.sock.send(self._rest) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                self._writable.start(self._on_writable)
                return
            except OSError:  # whoever reads finds the end as well, and everything that came before it
                return

    def _pack(self) -> bytes:
        now = time.monotonic()
        parts = []
        for _ in range(min(len(self._ready), 4096)):
            if self._owed >= ROOM:
                break
            call = self._ready.popleft()
            call.at = now
            self._sent.append(call)
            self._owed += call.size
            parts.append(hiredis.pack_command(tuple(call.make())))
            if call.names:
                parts.append(FENCE)
        return b"".join(parts)

    def _on_writable(self) -> None:
        self._writable.stop()
        self.flush()

    # -- answers

    def _on_readable(self) -> None:
        connection = self._connection
        assert connection is not None
        try:
            data = connection.sock.recv(READ_SIZE)
            while connection.sock.pending() if isinstance(connection.sock, ssl.SSLSocket) else False:
                data += connection.sock.recv(READ_SIZE)
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except OSError as error:
            self._end(reason(error))
            return
        if not data:
            self._end("it closed the connection")
            return
        self._heard = time.monotonic()
        try:
            connection.reader.feed(data)
            while (reply := connection.reader.gets()) is not NOTHING:
                self._take(reply)
                if self._connection is not connection:  # whoever got the answer has ended it
                    return
        except hiredis.ProtocolError as error:
            self._healthy = False
            self._end(stranger(error))
            return
        except Exception:
            log.exception("what %s said could not be taken", self.title)
            self._end("what it said could not be taken")
            return
        if self._ready:
            self._soon()

    def _take(self, reply: Any) -> None:
        if isinstance(reply, hiredis.PushNotification):
            kind = reply[0]
            if kind in _MESSAGES:
                self._owner.published(reply[1], reply[2])
            elif kind == b"sunsubscribe" and (not self._sent or reply[1] not in self._sent[0].names):
                self._owner.thrown_out(reply[1])
            return
        if not self._sent:
            self._end("it answers what nobody asked")
            return
        first = self._sent[0]
        if first.names and reply != OVER:
            if isinstance(reply, hiredis.ReplyError) and not first.refused:  # the fence is still to come
                first.refused = str(reply)
            else:
                self._healthy = False
                self._end(first.refused or "it does not say when a subscription is over")
            return
        call = self._answered()
        if call.refused:
            self._thrown_out(call.names, call.refused)
            return
        if isinstance(reply, hiredis.ReplyError):
            text = str(reply)
            if text.startswith(IN_A_SCRIPT):
                text = text.rpartition(": -")[2]
                reply = hiredis.ReplyError(text)
            if text.startswith("NOSCRIPT"):
                self._load(call)
                return
            if text.startswith(AWAY):
                self._healthy = False
                if call.again:
                    self._sent.appendleft(call)
                else:
                    call.done(reply)
                self._end(text)
            else:
                call.done(reply)
            return
        if not self._healthy:  # one that takes us in and then is no use is still away
            self._healthy = True
            self._outage.back(self.title)
        call.done(reply)

    def _answered(self) -> Call:
        call = self._sent.popleft()
        self._owed -= call.size
        return call

    def _thrown_out(self, names: Sequence[bytes], why: str) -> None:
        if not why.startswith("MOVED"):
            self.refuses(why)
        for name in names:
            self._owner.thrown_out(name)

    def _load(self, call: Call) -> None:
        """Redis has forgotten its scripts: ask with the whole of it, which it keeps then."""
        make = call.make

        def whole() -> Sequence[Any]:
            _, digest, *rest = make()
            return (b"EVAL", self._scripts.by_digest[digest].text, *rest)

        self.call(Call(whole, call.done, call.again, call.size))

    # -- making and breaking

    def _run(self) -> None:
        pause = 0.0
        while True:
            gevent.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(LONGEST_PAUSE, 2 * pause + 0.02)
            try:
                connection = self.connect()
                try:
                    connection.exchange([("SCRIPT", "LOAD", one.text) for one in self._scripts.all], self._timeout)
                except BaseException:
                    connection.close()
                    raise
            except (OSError, Denied, hiredis.HiredisError) as error:
                self._outage.away(self.title, reason(error))
                continue
            try:
                self._begin(connection)
                self._broken.wait()
            except Exception:
                log.exception("the connection to %s failed; making another", self.title)
                self._end("it failed")
            if self._healthy:
                pause = 0.02

    def _begin(self, connection: Connection) -> None:
        self._connection = connection
        self._healthy = False
        self._heard = time.monotonic()
        self._broken.clear()
        connection.sock.settimeout(0.0)
        self._readable = self._loop.io(connection.sock.fileno(), _READ)
        self._writable = self._loop.io(connection.sock.fileno(), _WRITE)
        self._first = deque()
        try:
            self._owner.linked(self)
        finally:
            first, self._first = self._first, None
        self._ready.extendleft(reversed(first))
        self._readable.start(self._on_readable)
        self._timer.start(self._look)
        self._soon()

    def _look(self) -> None:
        """Whether Redis answers."""
        now = time.monotonic()
        if self._sent:
            if now - max(self._sent[0].at, self._heard) > self._timeout:
                self._end(f"no answer within {self._timeout:g} s")
        elif now - self._heard > QUIET:
            self.call(Call(lambda: (b"PING",)))

    def refuses(self, error: str) -> None:
        """Say in the log that Redis answers with this error."""
        self._outage.refuses(self.title, error)

    def fail(self, why: str) -> None:
        """This connection is of no use: make another."""
        self._end(why)

    def _end(self, why: str, quiet: bool = False) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if not quiet:
            self._outage.away(self.title, f"the connection broke: {why}")
        self._timer.stop()
        for watcher in (self._readable, self._writable):
            watcher.stop()
            watcher.close()
        connection.close()
        self._rest = memoryview(b"")
        sent, self._sent = self._sent, deque()
        self._owed = 0
        self._owner.unlinked(self)
        again = []
        for call in sent:
            if call.again:
                call.at = 0.0
                again.append(call)
            else:
                call.done(BROKEN)
        self._ready.extendleft(reversed(again))
        self._broken.set()
