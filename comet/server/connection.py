"""One connection while it is awake, in its greenlet: reads requests, runs the application, writes answers.

A pywsgi handler of which `start_response` and little more is left. Replaced:

- reading: `comet.server.http` reads strictly from a buffer of our own, under absolute deadlines, and `comet.server.body`
  what follows the head;
- writing: head and body leave in one send, and no send waits longer than the send time-out (`comet.server.transport`);
- the end: refusals are answered so that the client can read them.

An application may wait for long. It hands its subscriber to ``environ["comet.park"]``, as it would a
file to ``wsgi.file_wrapper``, and returns what it gets back; on another server it returns the
subscriber itself, which is an iterable with a `close`. Here the answer's headers and what waits are
sent, and when there is nothing more to do the connection goes to sleep (`comet.server.parking`) and
its greenlet ends. What wakes it calls `CometServer.resume` (`comet.server.wsgi`): a greenlet again.
"""

import io
import logging
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from gevent.pywsgi import WSGIHandler

from comet import log as logs
from comet import refusals
from comet.errors import Refusal
from comet.hosts import Hosts
from comet.log import Origin, Roll
from comet.origins import Origins
from comet.server.blocks import Lifted
from comet.server.body import RequestBody, Room
from comet.server.http import Head, method_in, origin_in, split_head
from comet.server.parking import REQUEST_SIZE, Sleeper
from comet.server.posts import Call, Posts
from comet.server.proxies import Behind, Proxies, Proxy
from comet.server.share import Share
from comet.server.short import LongWay, Shortcut
from comet.server.transport import Host, Transport
from comet.stats import Stats
from comet.turn import give_way

_NO_BODY = io.BytesIO()
_ID = re.compile(r"[A-Za-z0-9._:+/=@-]{1,128}")
"""An X-Request-ID that goes on into logs and answers."""

REFUSED_HEAD = 0.5
"""Seconds that a connection which is not let in has for its request's head, which tells whether it is an EventSource's. Most heads come
with the connection; one that sends nothing must not hold a place among those that are being refused for long."""

log = logging.getLogger("comet.server")


class Owner(Host, Protocol):
    """The server (`comet.server.wsgi`), as far as a connection knows it."""

    stats: Stats
    shortcut: Shortcut | LongWay
    posts: Posts | LongWay
    proxies: Proxies | None
    roll: Roll | None
    origins: Origins
    hosts: Hosts
    hibernate: bool
    draining: bool
    closing: bool
    awake: set["Connection"]
    idle: set["Connection"]
    refusing: int
    bodies: Room
    application: Any
    subscribe: Callable[[Any], Any]
    share: Share

    def date(self) -> bytes: ...
    def gone(self, network: str) -> None: ...
    def attend_asleep(self, descriptor: int, network: str, wish: Any) -> bool: ...
    def lifted(self, data: bytes) -> Lifted: ...
    def lend(self, client: str, proxy: Proxy) -> Behind: ...
    def rested(self, network: str) -> str: ...
    def new_id(self) -> str: ...
    def get_environ(self) -> dict[str, Any]: ...


class Connection(Transport, WSGIHandler):
    """Requests are read and answered one after the other, until it is closed or goes to sleep."""

    server: Owner
    status: bytes | None
    result: Any
    response_headers: list[tuple[bytes, bytes]]

    def __init__(self, descriptor: int, server: Owner, network: str) -> None:
        super().__init__(descriptor, server)
        self.network = network
        self._body: RequestBody | None = None
        self.fresh = False
        """Its first request is still to be read; where some of it was, a short way did not lead there."""
        self.crowded = False
        """It was woken with many others, and takes turns with them from the start."""
        self.asked: Any = None
        """What its first request is, where that was read elsewhere: a wish or a `Call`."""
        self.plain = b""
        """The request that a short way has read, until it is answered: what to say where it is refused stands in its headers."""
        self.parked: Sleeper | None = None
        """Whose answer is under way, when it is a subscriber's."""
        self._watched = False
        """The parking watches the client meanwhile."""
        self.command = self.path = ""
        self._address = self._request_id = ""
        self._web_origin = ""
        """The Origin header of the request that was read last, as far as it was read."""

    # -- the connection

    def handle(self, rest: bytes | memoryview) -> None:
        """Serve this connection until it ends or sleeps; where a subscriber slept, send `rest` and go on from
        there. Lets no exception out."""
        self.server.awake.add(self)
        try:
            if self.crowded:
                give_way(self.network)
            if self.parked is not None:
                self.headers_sent = True
                self._guard(self._go_on, rest)
                self._release()
            if self.descriptor >= 0 and not self.close_connection and self._serve():
                self.linger()
        except OSError:
            pass  # the peer is gone, and with it whoever could be told; what was open is counted where it ends
        except Exception:
            self.server.stats.errors += 1
            log.exception("a connection failed")
        finally:
            self._over()

    def _over(self) -> None:
        self.server.awake.discard(self)
        if self._body is not None:
            self._body.hold(0)
        self._body = None  # it holds this connection: another cycle, with the body's buffer
        if self.descriptor >= 0:
            self.close()
            self.server.gone(self.network)

    def _serve(self) -> bool:
        """Answer requests until the connection is to be closed, or sleeps; whether it still has unread bytes."""
        server = self.server
        while True:
            if not self.fresh and not self.buffer:
                if server.closing:
                    return False
                if server.hibernate:
                    server.parking.idle(self.descriptor, self.network)
                    self.detach()
                    return False
            try:
                head = self.asked or self._read_head(self.fresh)
            except Refusal as refusal:
                self._read_refused()
                self.answer_refusal(refusal)
                return True
            self.fresh = False
            self.asked = None
            if head is None:
                return False
            if isinstance(head, Head):
                self._respond(head)
            elif callable(head):
                self._guard(self._call_shortly, head)
                self._release()
            else:
                self._guard(self._attend_shortly, head)
                self._release()
            if self.descriptor < 0:
                return False
            if not self.close_connection and self.buffer:
                give_way(self.network)  # who pipelines takes turns with the others
            if self.close_connection:
                return bool(self.buffer) or self._body_is_left

    def _read_refused(self) -> None:
        """Read in the buffer what the answer to a refused request depends on, whose head was not taken off there."""
        self.command, self.path = method_in(self.buffer), ""
        self._web_origin = origin_in(self.buffer)

    def _read_head(self, fresh: bool) -> Any:
        """The next request's `Head`, or where a short way led there its wish or `Call`; None when the client has
        none. Raises Refusal."""
        settings, buffer = self.server.settings, self.buffer
        deadline = time.monotonic() + (settings.header_timeout if fresh or buffer else settings.idle_timeout)
        look = bool(buffer)
        idle = not fresh and not buffer
        if look and not fresh:
            short = self._read_shortly(bytes(buffer))
            if short is not None:
                buffer.clear()
                return short
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
            if not data or (not began and self.server.closing):
                return None  # what came as it was cut can't be answered
            if not began:
                short = self._read_shortly(data)
                if short is not None:
                    return short
            if idle:  # once: empty lines must not begin it again
                idle = False
                deadline = time.monotonic() + settings.header_timeout
            buffer += data
            look = b"\n" in data

    def _read_shortly(self, data: bytes) -> Any:
        """The wish or `Call` of one whole request, where a short way leads there; else None, and nothing was done."""
        server = self.server
        if not isinstance(self.network, Proxy):
            short = server.shortcut.read(data) or server.posts.read(data)
            if short is not None:
                self.plain = data
            return short
        data, forwarded, request_id = server.lifted(data)
        short = server.shortcut.read(data) or server.posts.read(data)
        if short is not None:
            self.plain = data
            try:
                self._borrow(self.network, forwarded, request_id)
            except Refusal:
                return None  # which the long way puts into words
        return short

    def turn_away(self, refusal: Refusal) -> None:
        """Answer a connection that is not let in, and close it."""
        try:
            head = self._head_soon()
            if head is None:
                self._read_refused()
            self.answer_refusal(refusal, head)
            self.linger()
        except OSError:
            pass  # it has gone by itself
        finally:
            self.close()
            self.server.refusing -= 1

    def _head_soon(self) -> Head | None:
        """Return the head of a request that is refused whatever it is; None if it is not there within `REFUSED_HEAD`, or not well-formed.
        Blocks."""
        deadline, most = time.monotonic() + REFUSED_HEAD, self.server.settings.max_header
        try:
            while data := self.receive(deadline - time.monotonic()):
                self.buffer += data
                if (b"\n" in data or len(self.buffer) > most) and (head := split_head(self.buffer, most)) is not None:
                    return head
        except (OSError, Refusal):
            pass  # too slow, gone or ill-formed: it is refused, and counted, for the reason that it had before
        return None

    def refuse(self, refusal: Refusal) -> None:
        """Answer one that was let in and whose whole request, `plain`, was read elsewhere, and close it."""
        self.server.awake.add(self)
        try:
            self.answer_refusal(refusal, self._plain_head())
        except OSError:
            pass  # it has gone by itself
        finally:
            self._over()

    def _plain_head(self) -> Head | None:
        """Return the head of the request that a short way has read."""
        plain, self.plain = self.plain, b""
        return split_head(bytearray(plain), self.server.settings.max_header)

    def answer_refusal(self, refusal: Refusal, head: Head | None = None) -> None:
        """Answer, outside of any application, why this connection is closed; `head` is the request's, where it could be read."""
        self.server.stats.refused[refusal.slug] += 1
        if head is not None:
            self.command, self.path = head.method, head.target
            self._web_origin = head.headers.get("origin", "")
        origin = self.origin()
        logs.refused(refusal.slug, origin)
        events = head is not None and refusals.wants_events(head.method, head.path, head.headers.get("accept", ""))
        status, headers, body = refusals.answer(refusal, events)
        missing = 1 if status == 200 and self.server.settings.events_end == "abort" else 0
        lines = [
            f"HTTP/1.1 {status} {refusal.slug}",
            *(f"{name}: {value}" for name, value in headers),
            f"Content-Length: {len(body) + missing}",  # of a stream that is to end without its end, one byte never comes
            "Connection: close",
            f"X-Request-ID: {origin.request}",
            *(f"{name}: {value}" for name, value in self.server.origins.headers(self._web_origin)),
        ]
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if self.command == "HEAD" else body))

    # -- one request

    def _respond(self, head: Head) -> None:
        """Run the application for one request and write what it answers."""
        self.server.stats.requests += 1
        self.command, self.path, self.request_version = head.method, head.target, head.version
        self._web_origin = head.headers.get("origin", "")
        self.close_connection = not head.keep_alive
        self.status = None
        self.result = None
        self.headers_sent = self.response_use_chunked = False
        self.response_length = 0
        settings = self.server.settings
        self._body = None if head.length == 0 else RequestBody(self, head, settings.body_timeout, settings.max_header, self.server.bodies)
        try:
            if isinstance(self.network, Proxy):
                self._borrow(self.network, head.headers.get("x-forwarded-for", ""), head.headers.get("x-request-id", ""))
            self._check_host(head)
        except Refusal as refusal:
            self.close_connection = True
            self.answer_refusal(refusal, head)
            return
        self.environ = self._environ(head)
        self.application = self.server.application
        self._guard(self._run, None)
        self.environ.clear()  # it holds `park`, which holds this handler, and bottle's headers, which hold it: break the cycles
        self._release()
        if self._body is not None:
            self._body.hold(0)
        if self._body_is_left:
            self.close_connection = True

    def _borrow(self, proxy: Proxy, forwarded: str, request_id: str) -> None:
        """This proxy's connection is a client's until the answer is over. Raises Refusal ``address-full``."""
        assert self.server.proxies is not None
        self._address = self.server.proxies.client(proxy, forwarded)
        if _ID.fullmatch(request_id):
            self._request_id = request_id
        self.network = self.server.lend(self._address, proxy)

    def _check_host(self, head: Head) -> None:
        """Raise Refusal ``host-refused`` if the service is asked for by a name that is none of its own. A short way has asked the same
        when it learned the headers (`comet.server.blocks`)."""
        host = head.headers.get("host", "")
        if not self.server.hosts.allow(host):
            raise Refusal(
                "host-refused",
                f"This service answers to addresses, localhost and the names in --hosts, and {host[:200]} is none of them: ask for one "
                "of those, or name it there.",
            )

    def origin(self) -> Origin:
        """Whose request is under way, for the log and in answers to what went wrong: ``environ["comet.origin"]``."""
        if not self._request_id:
            self._request_id = self.server.new_id()
        return Origin(self._request_id, self._address or self.network, f"{self.command} {self.path}".strip())

    @property
    def _body_is_left(self) -> bool:
        """The request has a body of which something is still to come: the connection can't go on."""
        return not (self._body is None or self._body.finished)

    def _run(self, _: None) -> None:
        self.run_application()

    def _guard(self, work: Callable[[Any], None], argument: Any) -> None:
        """Do what may fail while an answer is under way: it ends the answer and the connection. (No star:
        CPython would run `work` deeper in the C stack, which greenlets save, half a kilobyte a client.)"""
        try:
            work(argument)
        except TimeoutError:
            self.abandon("backlog-time")
        except OSError:
            self.abandon("lost")
        except Exception:
            self.server.stats.errors += 1
            log.exception("a request failed", extra=self.origin().fields())
            self.abandon("lost")
            if not self.headers_sent:
                try:
                    self.answer_refusal(Refusal("internal", "The server failed at this request; its log says how."))
                except OSError:
                    pass  # the client has gone as well, and who was to wait for it has to be released

    def progress(self) -> None:
        super().progress()
        if self.parked is not None:
            self.parked.took()

    def abandon(self, reason: str) -> None:
        """The answer can't be finished: end whoever waited behind it, and the connection. Before the subscriber is closed,
        which counts the reason."""
        self.close_connection = True
        if self.parked is not None:
            self.parked.end(reason)

    # -- a subscriber's answer

    def park(self, subscriber: Sleeper) -> Iterable[bytes]:
        """``environ["comet.park"]``: answer with what `subscriber` gets, in place of what is returned here."""
        self.parked = subscriber
        if not isinstance(self.network, Proxy):
            self.server.share.note(self.network, subscriber)
        if self.server.roll is not None:
            self.server.roll.came(subscriber, self.origin())
        return []

    def admit(self) -> None:
        """``environ["comet.admit"]``: raise Refusal ``new-channels`` if whose request this is may come to no more of them."""
        if not isinstance(self.network, Proxy):
            self.server.share.check(self.network)

    def _release(self) -> None:
        """The answer is over, or goes on without this greenlet: then the socket is gone."""
        if self.parked is not None and self.descriptor >= 0:
            self.buffer += self.server.parking.take(self.descriptor)
            self._watched = False
            if self.parked.framing.closes:
                self.close_connection = True  # a stream's connection ends with it: its client may not be reading
            self.parked.close()
        self.parked = None
        self._request_id = self._address = self._web_origin = self.command = self.path = ""  # the next one is another's
        self.plain = b""
        if self.server.proxies is not None and self.descriptor >= 0:
            self.network = self.server.rested(self.network)

    def process_result(self) -> None:
        """Called by pywsgi with the application's answer."""
        if self.parked is None:
            super().process_result()
            return
        self.response_headers = [pair for pair in self.response_headers if pair[0] != b"Content-Length"]
        self.provided_content_length = None
        framing = self.parked.framing.with_headers(self._more_headers())
        if self.close_connection or self._body_is_left or self.server.draining:
            framing = framing.closing()
        self.parked.framing = framing.unchunked() if self.request_version == "HTTP/1.0" and not self.parked.one_shot else framing
        self._attend()

    def _more_headers(self) -> list[tuple[str, str]]:
        """What the application's answer has beyond the framing's own headers, such as a web origin's."""
        usual = {name for name, _ in self.parked.framing.headers(self.parked.cursor)} if self.parked else set()
        pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.response_headers]
        return [pair for pair in pairs if pair[0] not in usual]

    def _attend(self) -> None:
        """Answer with the headers that the application gave, and what its subscriber gets."""
        parked = self.parked
        assert parked is not None
        if not parked.one_shot:
            self.result = iter(())  # so that pywsgi frames it as a stream
            self.write(parked.framing.opening(parked.cursor))
        self._go_on(b"")

    def _call_shortly(self, call: Call) -> None:
        """Answer a POST that came the short way."""
        server = self.server
        server.stats.requests += 1
        self.headers_sent = False
        self.command = "POST"
        status, headers, body = call()
        if not status.startswith("2"):
            headers = [*headers, ("X-Request-ID", self.origin().request)]
        self.close_connection = server.draining
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        last = "Connection: close\r\n" if self.close_connection else ""
        head = f"HTTP/1.1 {status}\r\n{lines}Content-Length: {len(body)}\r\n{last}".encode("latin-1")
        self.headers_sent = True
        self.send(b"%b%b\r\n%b" % (head, server.date(), body))

    def _attend_shortly(self, wish: Any) -> None:
        """Answer a request that came the short way."""
        server = self.server
        server.stats.requests += 1
        if server.hibernate and not self.buffer and server.attend_asleep(self.descriptor, self.network, wish):
            self.detach()
            return
        try:
            if wish.patience != 0:  # else nothing is made
                self.admit()
            parked = server.subscribe(wish)
        except Refusal as refusal:
            self.close_connection = True
            self.answer_refusal(refusal, self._plain_head())
            return
        self.park(parked)
        self.plain = b""  # with --hibernate off this goes on for as long as the client stays
        self.headers_sent = True
        self._go_on(b"" if parked.one_shot else parked.framing.start(parked.cursor, self.server.date()))

    def _go_on(self, rest: bytes | memoryview) -> None:
        """Send `rest`, then what waits; then sleep, or with ``--hibernate off`` wait here, until it ends."""
        parked, server = self.parked, self.server
        assert parked is not None
        if rest:
            self.send(rest)
            if parked.one_shot:
                return
        awake = parked.awake
        while True:
            items = awake.take(parked, 0)
            if items == [] and parked.framing.closes:
                self.buffer.clear()  # nobody will read it
            if items == [] and not (parked.one_shot and (awake.patience == 0 or len(self.buffer) >= REQUEST_SIZE)):
                if server.hibernate and awake.quiet:
                    self.buffer += server.parking.take(self.descriptor)  # where it was watched
                    server.parking.sleep(self.descriptor, self.network, parked, awake.patience, bytes(self.buffer))
                    self.detach()
                    return
                self._watch()
                while ready := server.parking.wait(self.descriptor, awake):
                    self.send(ready)
                    if not awake.quiet:
                        break
                if ready:
                    continue
                items = awake.take(parked, 0)
            if items is None:
                self.send(parked.framing.end(parked.cursor, server.date(), server.draining))
                self.close_connection = server.draining
                return
            date = server.date()
            if server.draining:
                parked.framing = parked.framing.closing()
            for data in parked.wires(items, date):
                self.send(data)
            if parked.one_shot:
                return

    def _watch(self) -> None:
        """Have the parking notice what a subscriber's client does while this greenlet waits. Raises OSError."""
        if self.parked is not None and not self._watched:
            self.server.parking.watch(self.descriptor, self.parked)
            self._watched = True

    def stalled(self) -> None:
        self._watch()

    def _environ(self, head: Head) -> dict[str, Any]:
        environ: dict[str, Any] = self.server.get_environ()
        environ["REQUEST_METHOD"] = head.method
        environ["PATH_INFO"] = head.path.encode().decode("latin-1")
        environ["QUERY_STRING"] = head.query
        environ["SERVER_PROTOCOL"] = head.version
        environ["REMOTE_ADDR"], environ["REMOTE_PORT"] = self.socket.getpeername()[:2]
        if self._address:
            environ["REMOTE_ADDR"] = self._address
            environ["comet.scheme"] = head.headers.get("x-forwarded-proto", "")
        for name, value in head.headers.items():
            environ["HTTP_" + name.upper().replace("-", "_")] = value
        if (kind := environ.pop("HTTP_CONTENT_TYPE", None)) is not None:
            environ["CONTENT_TYPE"] = kind
        if (length := environ.pop("HTTP_CONTENT_LENGTH", None)) is not None:
            environ["CONTENT_LENGTH"] = length
        environ["wsgi.input"] = io.BufferedReader(self._body) if self._body is not None else _NO_BODY
        if self._body is not None:
            environ["comet.more_time"] = self._body.more_time
            environ["comet.hold"] = self._body.hold
        environ["wsgi.input_terminated"] = True
        environ["comet.admit"] = self.admit
        environ["comet.park"] = self.park
        environ["comet.origin"] = self.origin
        return environ

    # -- writing, called by pywsgi

    def finalize_headers(self) -> None:
        super().finalize_headers()
        if self.command == "HEAD" and self.provided_content_length is None:  # pywsgi has measured what was left out
            self.response_headers = [pair for pair in self.response_headers if pair[0] != b"Content-Length"]
        unframed = self.provided_content_length is None and not self.response_use_chunked and not hasattr(self.result, "__len__")
        if self.server.draining or (unframed and self.code not in (204, 304)) or self._body_is_left:
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
