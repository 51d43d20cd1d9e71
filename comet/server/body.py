"""A request's body, read from its connection as the application asks for it: a file, as WSGI wants one.

`comet.server.http` says where a body ends; `comet.server.transport` is what it is read from.
"""

import io
import time
from typing import Any

from comet.errors import Refusal
from comet.server.http import ChunkedBody, Head
from comet.server.transport import Transport
from comet.turn import give_way

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class RequestBody(io.RawIOBase):
    """`wsgi.input`: exactly one request's body, and nothing of what follows.

    Raises Refusal: ``body-timeout``, ``bad-encoding``, ``bad-body`` when the client stops short. The
    deadline is absolute, from the end of the head or the last `more_time`.
    """

    def __init__(self, transport: Transport, head: Head, timeout: float, overhead: int) -> None:
        self._transport = transport
        self._left = head.length
        self._chunks = ChunkedBody(overhead) if head.length is None else None
        self._pending = b""
        self._began = False
        self._timeout = timeout
        self.more_time()
        self._expected = head.expects_continue

    @property
    def finished(self) -> bool:
        """Nothing of it is left on the connection."""
        return self._chunks.done if self._chunks else self._left == 0

    def more_time(self) -> None:
        """``environ["comet.more_time"]``: the deadline begins anew, for an application that works on a long body
        while it comes."""
        self._deadline = time.monotonic() + self._timeout

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
            give_way()  # as `receive` does: others have a turn between two pieces
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
