"""A client with a greenlet of its own: one HTTP connection, blocking, from a source address of its choice.

Locust's FastHttpUser takes descriptors above 1023 for dead and has no source address; this is what remains of a client
when the answer's form is known. It runs on whatever `socket` is: under Locust gevent's. Neighbours: `loadtest.wire`, the
bytes; `loadtest.users`.
"""

import socket
from collections.abc import Iterator
from typing import NamedTuple

from loadtest.swarm import IP_BIND_ADDRESS_NO_PORT, Target
from loadtest.wire import Ended, Malformed, head, pieces


class Answer(NamedTuple):
    """A whole one."""

    status: int
    body: bytes


class Connection:
    """To the server, as client number `client` of the test. Raises OSError."""

    def __init__(self, target: Target, client: int, timeout: float = 60.0) -> None:
        self._target = target
        self._sock = socket.socket(target.family)
        self._data = b""
        try:
            self._sock.settimeout(timeout)
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            source = target.source(client)
            if source:
                self._sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                self._sock.bind((source, 0))
            self._sock.connect((target.host, target.port))
        except OSError:
            self._sock.close()
            raise

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    def wait_on(self) -> None:
        """The next bytes may take for ever: a message comes when it comes."""
        self._sock.settimeout(None)

    def send(self, data: bytes) -> None:
        """All of it."""
        self._sock.sendall(data)

    def post(self, path: str, body: bytes, key: str = "") -> Answer:
        """POST and its answer; `key` is the publish key. Raises OSError, Malformed, EOFError."""
        authorization = f"Authorization: Bearer {key}\r\n" if key else ""
        first = f"POST {path} HTTP/1.1\r\nHost: {self._target.name}\r\n{authorization}Content-Length: {len(body)}\r\n\r\n"
        self.send(first.encode() + body)
        return self.whole()

    def start(self) -> tuple[int, dict[bytes, bytes]]:
        """Status and headers of the next answer."""
        while (found := head(self._data)) is None:
            self._more()
        status, headers, at = found
        self._data = self._data[at:]
        return status, headers

    def whole(self) -> Answer:
        """The next answer, which has a length."""
        status, headers = self.start()
        if b"content-length" not in headers:
            raise Malformed("an answer without a length")
        length = int(headers[b"content-length"])
        while len(self._data) < length:
            self._more()
        body, self._data = self._data[:length], self._data[length:]
        return Answer(status, body)

    def chunks(self) -> Iterator[bytes]:
        """Those of a chunked answer, until the server ends it. Raises OSError, EOFError, Malformed."""
        try:
            while True:
                told, self._data = pieces(self._data)
                yield from told
                self._more()
        except Ended:
            return

    def _more(self) -> None:
        data = self._sock.recv(65536)
        if not data:
            raise EOFError("the server closed the connection")
        self._data += data
