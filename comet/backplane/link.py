"""A worker's link to the router: the socket, what waits to be written to it, and the calls under way.

Neighbours: `comet.backplane.router`, the `Worker` whose link it is, and `comet.backplane.frames`. Calls
are numbered frames, written together with whatever else is ready at the end of the loop's turn. What
comes is read by the loop itself, one piece a turn: a greenlet that reads from a socket does not yield
while there is more, and a busy router would have the worker to itself.

Who asked goes on at the very place of the answer in the stream: what the router says behind it is taken
afterwards, so nothing comes between an answer and its use.

When the link breaks another is made. What was asked and not answered is asked again on it, but for
publications: of those nobody knows whether they were ordered, and their publishers are told so
(``unconfirmed``).
"""

import logging
import os
import random
import socket
import time
from collections.abc import Callable
from itertools import takewhile
from typing import Any, Protocol

import gevent
import msgspec
from gevent import get_hub
from gevent.event import Event
from gevent.hub import Waiter

from comet.backplane import frames
from comet.errors import Refusal
from comet.turn import PACE, Alarm

LOOKS = 20
"""Looks for calls that have waited too long, in that time: a timer each would cost as much as the call."""

MAX_WAITING = 64 << 20
"""Bytes of calls that wait for the router, or on their way to it: beyond it they are refused."""

READ_SIZE = 1 << 16
"""Bytes taken in one turn of the loop: a few milliseconds of deliveries, and then the clients' sockets have theirs."""
_READ, _WRITE = 1, 2

log = logging.getLogger("comet.backplane")

RENEW = "restart the service, or start it with --renew-router, so that a reload begins another router where it has to"
"""The advice about a router of other code."""

_told = msgspec.msgpack.Decoder(frames.Told)


class Worker(Protocol):
    """Whose link it is. Nothing here may block."""

    def linked(self) -> None:
        """There is a new link: what is sent now comes first on it, before what was asked earlier."""

    def unlinked(self) -> None:
        """There is none any more."""

    def ahead(self) -> bytes:
        """What has to be sent before anything else, b"" for nothing."""

    def told(self, told: frames.Told) -> None:
        """The router said this; answers to calls go to whoever asked."""


def _nothing() -> None:
    """What there is to undo about most calls."""


class _Call:
    """A question under way. `arrived` takes the answer, at its place among the deliveries; `again` says that
    it may be asked a second time. Where somebody waits, until `ends`, `done` is told what `arrived` has made of it, or
    `failed` why there is none; `undo` follows a late answer."""

    __slots__ = ("again", "arrived", "done", "ends", "failed", "frame", "sent", "undo")

    def __init__(self, frame: bytes, arrived: Callable[[msgspec.Raw], Any], again: bool) -> None:
        self.frame = frame
        self.arrived = arrived
        self.again = again
        self.sent = False
        self.ends = 0.0
        self.done: Callable[[Any], object] | None = None
        self.failed: Callable[[Refusal], object] | None = None
        self.undo: Callable[[], None] = _nothing


class Link:
    """`path` is the router's socket; `timeout` is how many seconds a call waits for its answer. Made and
    used in one process, after any fork."""

    def __init__(self, path: str, timeout: float, worker: Worker) -> None:
        self._path = path
        self._timeout = timeout
        self._expiry = Alarm(timeout / LOOKS, self._expire)
        self._worker = worker
        self._calls: dict[int, _Call] = {}
        """Under way, in the order in which they were asked."""
        self._late: dict[int, _Call] = {}
        """Those that were sent, and for which nobody waits any more."""
        self._last_call = 0
        self._asked = 0
        """Bytes of all of those."""
        self._sock: socket.socket | None = None
        self._cutter = frames.Cutter()
        self._heard = False
        """The router has said something on this link."""
        self.foreign = Event()
        """The router is of another version of the code, and there is no link to it."""
        self._broken = Event()
        self._out: list[bytes] = []
        self._queued = 0
        self._rest = memoryview(b"")
        self._flushing = False
        self._loop = get_hub().loop
        self._readable: Any = None
        self._writable: Any = None
        self._greenlet: Any = None

    def start(self) -> None:
        """Link up, and stay so until `close`."""
        self._greenlet = gevent.spawn(self._run)

    def close(self) -> None:
        """End the link, for good."""
        self._greenlet.kill()
        self._end()
        self._expiry.stop()
        for number, call in list(self._calls.items()):
            self._fail(number, call)

    # -- calls

    def ask(
        self,
        make: Callable[[int], frames.Asked],
        arrived: Callable[[msgspec.Raw], Any],
        again: bool = True,
        undo: Callable[[], None] = _nothing,
    ) -> Any:
        """Call the router and wait; what `arrived` makes of the answer.

        Raises Refusal ``backplane-busy``, ``backplane-away``, ``unconfirmed``; `undo`: see `ask_soon`."""
        waiter = Waiter()
        number = self.ask_soon(make, arrived, waiter.switch, waiter.throw, again, undo)
        try:
            return waiter.get()
        finally:
            self._give_up(number)  # where this greenlet is killed

    def ask_soon(
        self,
        make: Callable[[int], frames.Asked],
        arrived: Callable[[msgspec.Raw], Any],
        done: Callable[[Any], object],
        failed: Callable[[Refusal], object],
        again: bool = True,
        undo: Callable[[], None] = _nothing,
    ) -> int:
        """Call the router; the call's number. The loop calls `done` with what `arrived` makes of the answer, at its place among
        the deliveries, or `failed` with ``backplane-away`` or ``unconfirmed``; neither may raise. `undo` is done when an answer
        arrives after that.

        Raises Refusal ``backplane-busy``."""
        if max(self._asked, self._queued + len(self._rest)) > MAX_WAITING:
            raise Refusal("backplane-busy", "Too much waits for the router of this service; send it again, a little later.")
        number = self.call(make, arrived, again)
        call = self._calls[number]
        call.done, call.failed, call.undo = done, failed, undo
        call.ends = time.monotonic() + self._timeout
        if not self._expiry.active:
            self._expiry.set()
        return number

    def _give_up(self, number: int) -> None:
        """Nobody waits for this answer any more."""
        call = self._calls.get(number)
        if call is not None:
            if call.sent:
                self._late[number] = self._calls.pop(number)
            else:
                self._forget(number)

    def _expire(self) -> None:
        """Give up what has waited too long."""
        now = time.monotonic()
        waiting = ((number, call) for number, call in self._calls.items() if call.failed is not None)
        for number, call in list(takewhile(lambda one: one[1].ends <= now, waiting)):
            self._fail(number, call)
        if any(call.failed is not None for call in self._calls.values()):
            self._expiry.set()

    def _fail(self, number: int, call: _Call) -> None:
        """Tell who waits that there is no answer."""
        unsure = call.sent and not call.again
        self._give_up(number)
        if call.failed is not None:
            self._loop.run_callback(call.failed, unconfirmed() if unsure else _away())

    def call(self, make: Callable[[int], frames.Asked], arrived: Callable[[msgspec.Raw], Any], again: bool = False) -> int:
        """Call the router; `arrived` takes the answer, for which nobody waits. The call's number."""
        self._last_call = number = self._last_call + 1
        call = self._calls[number] = _Call(frames.frame(make(number)), arrived, again)
        self._asked += len(call.frame)
        if self._sock is not None:
            self._post(call)
        return number

    def _post(self, call: _Call) -> None:
        call.sent = True
        self.put(call.frame)

    def _forget(self, number: int) -> None:
        call = self._calls.pop(number, None) or self._late.pop(number, None)
        if call is not None:
            self._asked -= len(call.frame)

    def _answered(self, number: int, value: msgspec.Raw) -> None:
        late = number in self._late
        call = self._late[number] if late else self._calls.get(number)
        if call is None:  # it failed as the link before this one broke
            return
        answer = call.arrived(value)
        self._forget(number)
        if late:
            call.undo()
        elif call.done is not None:
            call.done(answer)

    # -- writing

    def put(self, frame: bytes) -> None:
        """Send `frame`, behind all that waits, where there is a link."""
        if self._sock is None:
            return
        self._append(self._worker.ahead())
        self._append(frame)
        if not self._flushing:
            self._flushing = True
            self._loop.run_callback(self.flush)

    def _append(self, frame: bytes) -> None:
        if frame:
            self._out.append(frame)
            self._queued += len(frame)

    def flush(self) -> None:
        """Write what there is, in one call. What the socket does not take waits for it."""
        self._flushing = False
        if self._sock is None or self._writable.active:
            return
        self._append(self._worker.ahead())
        while self._rest or self._out:
            if not self._rest:
                self._rest = memoryview(b"".join(self._out))
                self._out = []
                self._queued = 0
            try:
                self._rest = self._rest[os.write(self._sock.fileno(), self._rest) :]
            except BlockingIOError:
                self._writable.start(self._on_writable)
                return
            except OSError:  # whoever reads finds the end as well, and everything that came before it
                return

    def _on_writable(self) -> None:
        self._writable.stop()
        self.flush()

    # -- reading

    def _on_readable(self) -> None:
        assert self._sock is not None
        try:
            data = os.read(self._sock.fileno(), READ_SIZE)
            for body in self._cutter.feed(data):
                told = _told.decode(body)
                if isinstance(told, frames.Answer):
                    self._answered(told.call, told.value)
                    if self._sock is None:  # whoever got the answer has closed it
                        return
                elif isinstance(told, frames.Welcome):
                    self._greeted(told.version)
                else:
                    self._worker.told(told)
        except BlockingIOError:
            return
        except OSError as error:
            log.warning("the link to the router broke (%s); making another", error)
        except Exception:
            log.exception("the link to the router failed; making another")
        else:
            if data:
                self._heard = not self.foreign.is_set()
                if self._cutter.partial:  # what it lacks, which may be much, is sent as fast as it is read
                    PACE.hurry(self)
                else:
                    PACE.relax(self)
                return
            if not self.foreign.is_set():
                log.warning("the router has closed the link; making another")
        self._end()

    def _greeted(self, version: str) -> None:
        if version == frames.VERSION:
            self.foreign.clear()
        elif not self.foreign.is_set():
            self.foreign.set()
            log.error("the router is of another version of comet, and does not take this worker; %s", RENEW)

    # -- making and breaking

    def _run(self) -> None:
        wait = 0.0
        while True:
            gevent.sleep(wait * random.uniform(0.5, 1.0))
            try:
                sock = self._connect()
            except OSError as error:
                if not wait:
                    log.warning("the router can't be reached (%s); trying on", error)
                wait = min(1.0, 2 * wait + 0.01)
                continue
            try:
                self._begin(sock)
                self._broken.wait()
            except Exception:
                log.exception("the link to the router failed; making another")
                self._end()
            wait = 0.01 if self._heard else min(1.0, 2 * wait + 0.01)

    def _connect(self) -> socket.socket:
        """Return a connection to the router. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            sock.connect(self._path)  # which for a Unix socket is done at once, or not at all
        except OSError:
            sock.close()
            raise
        return sock

    def _begin(self, sock: socket.socket) -> None:
        self._sock = sock
        self._cutter = frames.Cutter()
        self._heard = False
        self._broken.clear()
        self._readable = self._loop.io(sock.fileno(), _READ)
        self._writable = self._loop.io(sock.fileno(), _WRITE)
        earlier = list(self._calls.values())
        self._append(frames.frame(frames.Hello(frames.VERSION)))
        self._worker.linked()
        for call in earlier:
            self._post(call)
        self._readable.start(self._on_readable)

    def _end(self) -> None:
        if self._sock is None:
            return
        for watcher in (self._readable, self._writable):
            watcher.stop()
            watcher.close()
        self._sock.close()
        self._sock = None
        PACE.relax(self)
        self._out = []
        self._queued = 0
        self._rest = memoryview(b"")
        for number in list(self._late):  # what the router has done went with the link
            self._forget(number)
        for number, call in list(self._calls.items()):
            if call.sent and not call.again:
                self._forget(number)
                if call.failed is not None:
                    self._loop.run_callback(call.failed, unconfirmed())
            call.sent = False
        self._worker.unlinked()
        self._broken.set()


def _away() -> Refusal:
    return Refusal("backplane-away", "The router of this service does not answer; send it again, a little later.")


def unconfirmed() -> Refusal:
    """What the publisher is told whose message may have been ordered, or not."""
    return Refusal(
        "unconfirmed", "The router ended before it confirmed this: it may have been published; send it again if twice is better than never."
    )
