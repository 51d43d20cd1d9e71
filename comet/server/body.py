"""A request's body, read from its connection as the application asks for it: a file, as WSGI wants one.

`comet.server.http` says where a body ends; `comet.server.transport` is what it is read from.
"""

import io
import time
from typing import Any

from comet.errors import Refusal
from comet.server.http import ChunkedBody, Head
from comet.server.transport import READ_SIZE, Transport
from comet.turn import give_way, trickle

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

OWN = READ_SIZE
"""Bytes of a body that are not charged to the room of all: a connection may hold as much of a head. So small messages are taken while
large bodies have all the room."""

LEAST = 16384
"""Bytes that have to come within the time-out of a body that may have any length: 550 a second by default."""


class Room:
    """The bytes that all bodies under way hold together, beyond the first `OWN` of each: at most `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0

    def take(self, size: int) -> None:
        """Charge `size` bytes. Raises Refusal ``bodies-full``: nobody waits, since those who have a part of the room would wait for each
        other."""
        if self.taken + size > self.most:
            raise Refusal("bodies-full", f"Bodies under way have all their {self.most} bytes (--max-bodies); send it again, later.")
        self.taken += size


class RequestBody(io.RawIOBase):
    """`wsgi.input`: exactly one request's body, and nothing of what follows. What was read is charged to `room`; see `hold`.

    Raises Refusal: ``body-timeout``, ``bad-encoding``, ``bodies-full``, ``bad-body`` when the client stops short. The
    deadline is absolute, `timeout` seconds from the end of the head; see `more_time`.
    """

    def __init__(self, transport: Transport, head: Head, timeout: float, overhead: int, room: Room) -> None:
        self._transport = transport
        self._left = head.length
        self._chunks = ChunkedBody(overhead) if head.length is None else None
        self._pending = b""
        self._began = False
        self._timeout = timeout
        self._came = time.monotonic()
        """When the last piece came."""
        self._deadline = self._came + timeout
        self._renewed = 0
        """Bytes that have come since the deadline began anew."""
        self._room = room
        self._held = 0
        """Bytes that the application holds of it."""
        self._taken = 0
        """Bytes of the room that it has."""
        self._expected = head.expects_continue

    @property
    def finished(self) -> bool:
        """Nothing of it is left on the connection."""
        return self._chunks.done if self._chunks else self._left == 0

    def more_time(self) -> None:
        """Put the deadline off, ``environ["comet.more_time"]``, for an application that works on a long body while it comes.

        The time since the last piece came was the application's. Once `LEAST` bytes have come, the deadline begins anew: a client that
        drips is cut.
        """
        now = time.monotonic()
        if self._renewed >= LEAST:
            self._renewed = 0
            self._deadline = now + self._timeout
        else:
            self._deadline += now - self._came
        self._came = now

    def hold(self, size: int) -> None:
        """Charge `size` bytes instead of all that has come, ``environ["comet.hold"]``, for an application that works on a long body while
        it comes. Raises Refusal ``bodies-full``."""
        self._held = size
        more = max(0, size - OWN) - self._taken
        if more > 0:
            self._room.take(more)
        else:
            self._room.taken += more
        self._taken += more

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._pending and not self.finished:
            self._receive()
        part = self._pending[: len(target)]
        self._pending = self._pending[len(part) :]
        target[: len(part)] = part
        return len(part)

    def _receive(self) -> None:
        transport, buffer = self._transport, self._transport.buffer
        if buffer and self._began:
            if self._chunks and self._chunks.tiny:
                trickle(transport.network)
                if time.monotonic() > self._deadline:
                    raise Refusal("body-timeout", "The body's chunks are too small to be read in time; send larger ones.")
            else:
                give_way(transport.network)  # as `receive` does: others have a turn between two pieces of a body
        self._began = True
        if not buffer:
            if self._expected:
                self._expected = False
                transport.send(_CONTINUE)
            try:
                data = transport.receive(self._deadline - time.monotonic())
            except TimeoutError:
                raise Refusal("body-timeout", "The body did not arrive in time; send it faster, or in parts.") from None
            except OSError:  # reset, or cut off by us: nobody is left to read the answer
                data = b""
            if not data:
                raise Refusal("bad-body", "The connection ended in the middle of the body.")
            buffer += data
        if self._chunks:
            self._pending = self._chunks.feed(buffer)
        else:
            assert self._left is not None
            self._pending = bytes(buffer[: self._left])
            del buffer[: self._left]
            self._left -= len(self._pending)
        self._renewed += len(self._pending)
        self._came = time.monotonic()
        self.hold(self._held + len(self._pending))
