"""Bytes to and from one connection that is awake: its descriptor, and what was read from it and not used yet.

`comet.server.connection` is one, with requests and answers on top: a base class rather than an object, since there is one
a request. `comet.server.body` reads from it; `comet.server.parking` has the descriptor while the connection sleeps.
"""

import socket
import time
from typing import Any, Protocol

from gevent.socket import socket as GeventSocket

from comet.server.parking import Parking, os_close, os_read, os_write
from comet.settings import Settings
from comet.turn import give_way, wait_for_input

READ_SIZE = 16384
LINGER_BYTES = 65536
LINGER_SECONDS = 1.0


class Host(Protocol):
    """The server, as far as a transport knows it."""

    settings: Settings
    parking: Parking
    family: int


class Transport:
    """Of a descriptor that does not block."""

    server: Host
    descriptor: int
    """The connection, -1 once it is given away or closed. A gevent socket is made for it only when
    something has to wait: most requests are read and answered without."""
    network = ""
    """The address that it is of, for taking turns."""
    buffer: bytearray
    """Read from the socket and not used yet: the front of the next request."""

    def __init__(self, descriptor: int, server: Host) -> None:
        self.descriptor = descriptor
        self._waiting_socket: Any = None
        self.server = server
        self.buffer = bytearray()
        self._has_read = False
        self._widened = False
        """Its kernel buffer is `Settings.busy_send_buffer`."""

    @property
    def socket(self) -> Any:
        """A gevent socket of the descriptor, for what may have to wait."""
        if self._waiting_socket is None:
            self._waiting_socket = GeventSocket(self.server.family, socket.SOCK_STREAM, 0, fileno=self.descriptor)
        return self._waiting_socket

    def receive(self, timeout: float) -> bytes:
        """What the client sends next, b"" at its end. Raises TimeoutError after `timeout` seconds."""
        if timeout <= 0:
            raise TimeoutError
        deadline = time.monotonic() + timeout
        if self._has_read:
            give_way(self.network)  # reading does not yield while there is data: a flood would stop everyone else
        self._has_read = True
        while True:
            try:
                return os_read(self.descriptor, READ_SIZE)
            except BlockingIOError:
                pass
            if not wait_for_input(self.descriptor, deadline - time.monotonic(), self.network):
                raise TimeoutError
            self._has_read = False  # it has waited for its turn just now

    def send(self, data: bytes | memoryview) -> None:
        """Raises TimeoutError when the client has taken nothing for the send time-out."""
        try:
            try:
                sent = os_write(self.descriptor, data)
            except BlockingIOError:
                sent = 0
            if sent < len(data):
                self.stalled()
                self.socket.settimeout(self.server.settings.send_timeout)
                view = memoryview(data)[sent:]
                while view := view[self.socket.send(view) :]:
                    self.progress()
        except TimeoutError:
            self.abandon("backlog-time")
            raise
        except OSError:
            self.abandon("lost")
            raise

    def stalled(self) -> None:
        """What is being sent has to wait for the client."""

    def progress(self) -> None:
        """The client has taken some of what is being sent, and more waits: let the kernel hold more for it. Of a small buffer
        a replay is sent at a fiftieth of the speed: each acknowledgement lets a packet go."""
        if not self._widened and self.server.settings.busy_send_buffer > self.server.settings.send_buffer > 0:
            self._widened = True
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.server.settings.busy_send_buffer)

    def abandon(self, reason: str) -> None:
        """Nothing more can be sent, for this reason: `send` says so before it raises, for whoever has something to end."""

    def linger(self) -> None:
        """Let the client read the answer although it still sends: closing with unread bytes would reset
        the connection, and the reset would overtake the answer."""
        self.socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER_SECONDS
        left = LINGER_BYTES
        try:
            while left > 0 and (data := self.receive(deadline - time.monotonic())):
                left -= len(data)
        except TimeoutError:
            pass  # it had its second

    def detach(self) -> int:
        """Let go of the descriptor, which another has."""
        if self._widened:
            self._widened = False
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.server.settings.send_buffer)
        descriptor, self.descriptor = self.descriptor, -1
        if self._waiting_socket is not None:
            self._waiting_socket.detach()  # never dropped: that would close the number under its next owner
            self._waiting_socket = None
        return descriptor

    def close(self) -> None:
        """Close the connection, unlinked from the parking before."""
        self.server.parking.take(self.descriptor)
        if self._waiting_socket is not None:
            self._waiting_socket.close()
            self._waiting_socket = None
        else:
            os_close(self.descriptor)
        self.descriptor = -1

    def cut(self) -> None:
        """End it from outside: whatever it waits for fails or finds the end."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed or reset already, which is what was wanted
