"""The server: gevent's pywsgi with another way to read a request and to write an answer.

What is kept of pywsgi is its accept loop, a greenlet a connection, and `start_response`. Replaced:

- reading: `comet.server.http` reads strictly from a buffer of our own, under absolute deadlines;
- writing: head and body leave in one send, and no send waits longer than the send time-out;
- the end: refusals are answered so that the client can read them, and `drain` ends it all in order.

An application may wait for long. It hands what it waits on to ``environ["comet.park"]``, as it would
a file to ``wsgi.file_wrapper``, and returns what it gets back; on another server it returns the
thing itself, which is an iterable with a `close`.
"""

import io
import ipaddress
import json
import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import gevent
from gevent.event import Event
from gevent.pywsgi import WSGIHandler, WSGIServer

from comet.errors import Refusal
from comet.server.http import ChunkedBody, Head, split_head
from comet.server.parking import Hangups
from comet.settings import Settings
from comet.stats import Stats

READ_SIZE = 16384
LINGER_BYTES = 65536
LINGER_SECONDS = 1.0
MAX_REFUSING = 100
"""Connections that are being told at the same time that there is no room; more are just closed."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_NO_BODY = io.BytesIO()

log = logging.getLogger("comet.server")


class Parked(Protocol):
    """What an application may wait on: a subscriber, as far as the server knows one."""

    @property
    def one_shot(self) -> bool:
        """It has one piece, the whole body."""

    def __iter__(self) -> Iterator[bytes]: ...
    def end(self, reason: str) -> None: ...
    def close(self) -> None: ...


class RequestBody(io.RawIOBase):
    """`wsgi.input`: exactly one request's body, read from its connection as it is asked for.

    Raises Refusal: ``body-timeout``, ``bad-encoding``, ``bad-body`` when the client stops short. The
    deadline is absolute, from the end of the head.
    """

    def __init__(self, handler: "Handler", head: Head, timeout: float, overhead: int) -> None:
        self._handler = handler
        self._left = head.length
        self._chunks = ChunkedBody(overhead) if head.length is None else None
        self._pending = b""
        self._deadline = time.monotonic() + timeout
        self._expected = head.expects_continue

    @property
    def finished(self) -> bool:
        """Nothing of it is left on the connection."""
        return self._chunks.done if self._chunks else self._left == 0

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
        handler, buffer = self._handler, self._handler.buffer
        if not buffer:
            if self._expected:
                self._expected = False
                handler.send(_CONTINUE)
            try:
                data = handler.receive(self._deadline - time.monotonic())
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


class Handler(WSGIHandler):
    """One connection, in its greenlet: requests are read and answered one after the other."""

    server: "CometServer"
    status: bytes | None
    buffer: bytearray
    """Read from the socket and not used yet: the front of the next request."""

    def __init__(self, sock: socket.socket, address: Any, server: "CometServer") -> None:
        self.socket = sock
        self.client_address = address
        self.server = server
        self.buffer = bytearray()
        self._body: RequestBody | None = None
        self._parked: Parked | None = None

    # -- the connection

    def handle(self) -> None:
        """Serve this connection to its end. Lets no exception out: pywsgi would stop accepting."""
        try:
            refusal = self.server.enter(self)
            if refusal is None:
                try:
                    if self._serve():
                        self._linger()  # still counted: who lingers holds a descriptor
                finally:
                    self.server.leave(self)
            else:
                self.server.refuse_entry(self, refusal)
        except OSError:
            pass  # the peer is gone, and with it whoever could be told; what was open is counted where it ends
        except Exception:
            self.server.stats.errors += 1
            log.exception("a connection failed")
        finally:
            self.socket.close()

    def _serve(self) -> bool:
        """Answer requests until the connection is to be closed; whether it still has unread bytes."""
        fresh = True
        while True:
            try:
                head = self._read_head(fresh)
            except Refusal as refusal:
                self.answer_refusal(refusal)
                return True
            if head is None:
                return False
            fresh = False
            self._respond(head)
            if not self.close_connection and self.buffer:
                gevent.sleep(1e-9)  # who pipelines takes turns with the others
            if self.close_connection:
                return bool(self.buffer) or not (self._body is None or self._body.finished)

    def _read_head(self, fresh: bool) -> Head | None:
        """The next request's head; None when the client has none. Raises Refusal."""
        settings, buffer = self.server.settings, self.buffer
        deadline = time.monotonic() + (settings.header_timeout if fresh or buffer else settings.idle_timeout)
        look = bool(buffer)
        idle = not fresh and not buffer
        while True:
            if look or len(buffer) > settings.max_header:
                head = split_head(buffer, settings.max_header)
                if head is not None:
                    return head
            began = bool(buffer)
            try:
                if not began:
                    self.server.idle.add(self)
                data = self.receive(deadline - time.monotonic())
            except TimeoutError:
                if not buffer:
                    return None
                raise Refusal("header-timeout", "The request's headers did not arrive in time; send them faster.") from None
            finally:
                self.server.idle.discard(self)
            if not data or (not began and self.server.draining):
                return None
            if idle:  # once: empty lines must not begin it again
                idle = False
                deadline = time.monotonic() + settings.header_timeout
            buffer += data
            look = b"\n" in data

    def receive(self, timeout: float) -> bytes:
        """What the client sends next, b"" at its end. Raises TimeoutError after `timeout` seconds."""
        if timeout <= 0:
            raise TimeoutError
        gevent.sleep(1e-9)  # recv does not yield while there is data: a flood would stop everyone else
        self.socket.settimeout(timeout)
        return self.socket.recv(READ_SIZE)

    def send(self, data: bytes) -> None:
        """Raises TimeoutError when the client has taken nothing for the send time-out."""
        self.socket.settimeout(self.server.settings.send_timeout)
        view = memoryview(data)
        try:
            while view:
                view = view[self.socket.send(view) :]
        except TimeoutError:
            self._abandon("backlog-time")  # before the result is closed, which counts the reason
            raise
        except OSError:
            self._abandon("lost")
            raise

    def _linger(self) -> None:
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

    def answer_refusal(self, refusal: Refusal) -> None:
        """Answer, outside of any application, why this connection is closed."""
        self.server.stats.refused[refusal.slug] += 1
        body = json.dumps(refusal.document()).encode() + b"\n"
        lines = [
            f"HTTP/1.1 {refusal.status} {refusal.slug}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Cache-Control: no-store",
            "Connection: close",
            *(f"{name}: {value}" for name, value in refusal.headers.items()),
        ]
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    # -- one request

    def _respond(self, head: Head) -> None:
        """Run the application for one request and write what it answers."""
        self.server.stats.requests += 1
        self.command, self.path, self.request_version = head.method, head.target, head.version
        self.close_connection = not head.keep_alive
        self.status = None
        self.result = None
        self.headers_sent = self.response_use_chunked = False
        self.response_length = 0
        settings = self.server.settings
        self._body = None if head.length == 0 else RequestBody(self, head, settings.body_timeout, settings.max_header)
        self.environ = self._environ(head)
        self.application = self.server.application
        try:
            self.run_application()
        except TimeoutError:
            self._abandon("backlog-time")
        except OSError:
            self._abandon("lost")
        except Exception:
            self.server.stats.errors += 1
            log.exception("%s %r failed", head.method, head.path)
            self._abandon("lost")
            if not self.headers_sent:
                self.answer_refusal(Refusal("internal", "The server failed at this request; its log says how."))
        finally:
            self.server.hangups.remove(self.socket.fileno())
            if self._parked is not None:
                if not self._parked.one_shot:
                    self.close_connection = True  # its client may have stopped reading
                self._parked.close()
                self._parked = None
            self.environ = {}  # the old one holds `park`, which holds this handler: break the cycle
        if self._body is not None and not self._body.finished:
            self.close_connection = True

    def _abandon(self, reason: str) -> None:
        """The answer can't be finished: end whoever waited behind it, and the connection."""
        self.close_connection = True
        if self._parked is not None:
            self._parked.end(reason)

    def park(self, parked: Parked) -> Iterable[bytes]:
        """Wait on `parked` from now on: it is told when the peer hangs up, and is closed at the end."""
        self._parked = parked
        self.server.hangups.add(self.socket.fileno(), parked)
        return list(parked) if parked.one_shot else parked

    def _environ(self, head: Head) -> dict[str, Any]:
        environ: dict[str, Any] = self.server.get_environ()
        environ["REQUEST_METHOD"] = head.method
        environ["PATH_INFO"] = head.path.encode().decode("latin-1")
        environ["QUERY_STRING"] = head.query
        environ["SERVER_PROTOCOL"] = head.version
        if isinstance(self.client_address, tuple):
            environ["REMOTE_ADDR"] = self.client_address[0]
            environ["REMOTE_PORT"] = str(self.client_address[1])
        for name, value in head.headers.items():
            environ["HTTP_" + name.upper().replace("-", "_")] = value
        if (kind := environ.pop("HTTP_CONTENT_TYPE", None)) is not None:
            environ["CONTENT_TYPE"] = kind
        if (length := environ.pop("HTTP_CONTENT_LENGTH", None)) is not None:
            environ["CONTENT_LENGTH"] = length
        environ["wsgi.input"] = io.BufferedReader(self._body) if self._body is not None else _NO_BODY
        environ["wsgi.input_terminated"] = True
        environ["comet.park"] = self.park
        return environ

    # -- writing, called by pywsgi

    def finalize_headers(self) -> None:
        super().finalize_headers()
        unframed = self.provided_content_length is None and not self.response_use_chunked and not hasattr(self.result, "__len__")
        if self.server.draining or (unframed and self.code not in (204, 304)) or not (self._body is None or self._body.finished):
            self.close_connection = True
        if self.close_connection:
            headers = self.response_headers
            headers[:] = [pair for pair in headers if pair[0].lower() != b"connection"]
            headers.append((b"Connection", b"close"))

    def _write_with_headers(self, data: bytes) -> None:
        self.headers_sent = True
        self.finalize_headers()
        assert self.status is not None, "the application did not call start_response"
        head = b"".join(b"%b: %b\r\n" % pair for pair in self.response_headers)
        self._sendall(b"HTTP/1.1 %b\r\n%b\r\n%b" % (self.status, head, self._framed(data)))

    def _write(self, data: bytes) -> None:
        if data:
            self._sendall(self._framed(data))

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if data and self.response_use_chunked else data

    def _sendall(self, data: bytes) -> None:
        self.send(data)
        self.response_length += len(data)


class CometServer(WSGIServer):
    """Accepts on a bound `listener` and serves a WSGI `application` (bottle's).

    `capacity` is how many connections it holds at most; the rest are told so and closed.
    """

    handler_class = Handler

    def __init__(
        self,
        listener: socket.socket,
        application: Callable[..., Iterable[bytes]],
        settings: Settings,
        stats: Stats,
        capacity: int,
    ) -> None:
        super().__init__(listener, application, log=None, error_log=log)
        self.settings = settings
        self.stats = stats
        self.capacity = capacity
        self.hangups = Hangups()
        self.draining = False
        self.idle: set[Handler] = set()
        """Connections that wait for a request to begin."""
        self._open: set[Handler] = set()
        self._addresses: Counter[str] = Counter()
        self._refusing = 0
        self._empty = Event()

    # -- admission

    def enter(self, handler: Handler) -> Refusal | None:
        """Count a new connection in, or say why not."""
        if self.draining:
            return Refusal("draining", "This server is stopping; connect again, to another one or a little later.")
        if len(self._open) >= self.capacity:
            return Refusal(
                "worker-full", f"This process holds its {self.capacity} connections; try again later, or start more (--max-connections)."
            )
        address = _network(handler.client_address)
        if self._addresses[address] >= self.settings.max_per_address:
            return Refusal(
                "address-full",
                f"{address} has {self.settings.max_per_address} connections open; close some (--max-per-address is the limit).",
            )
        self._addresses[address] += 1
        self._open.add(handler)
        self.stats.accepted += 1
        self.stats.connections = len(self._open)
        return None

    def leave(self, handler: Handler) -> None:
        """Count a connection out again."""
        address = _network(handler.client_address)
        self._addresses[address] -= 1
        if not self._addresses[address]:
            del self._addresses[address]
        self._open.discard(handler)
        self.stats.connections = len(self._open)
        if not self._open:
            self._empty.set()

    def refuse_entry(self, handler: Handler, refusal: Refusal) -> None:
        """Tell a connection why it is not let in, unless too many are being told already."""
        if self._refusing >= MAX_REFUSING:
            self.stats.refused[refusal.slug] += 1
            return
        self._refusing += 1
        try:
            handler.answer_refusal(refusal)
            handler._linger()
        finally:
            self._refusing -= 1

    # -- stopping

    def drain(self) -> None:
        """Take no more connections, and close each as soon as its answer is out; those that wait for a
        request have nothing to finish."""
        self.draining = True
        self.close()
        for handler in list(self.idle):
            _shut(handler)
        self._empty.clear()
        if not self._open:
            self._empty.set()

    def join(self, timeout: float) -> int:
        """Wait for the last connection after `drain`; what is still open after `timeout` seconds is cut
        off. Answers how many were."""
        self._empty.wait(timeout)
        late = list(self._open)
        for handler in late:
            _shut(handler)
        self._empty.wait(1.0)
        self.hangups.close()
        return len(late)


def _shut(handler: Handler) -> None:
    try:
        handler.socket.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed or reset already, which is what was wanted


def _network(address: Any) -> str:
    """What counts as one address: an IPv4 address, or an IPv6 /64, which is what one user is given."""
    if not isinstance(address, tuple):
        return "unix"
    host: str = address[0].partition("%")[0]
    if ":" not in host:
        return host
    parsed = ipaddress.IPv6Address(host)
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(parsed) >> 64 << 64, 64)))
