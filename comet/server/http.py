"""One strict reading of an HTTP/1 request. Pure: bytes in, `Head` and body bytes out.

llhttp (httptools) does the grammar; what it lets through is refused here, so that no proxy in front
can read a request otherwise than we do: a missing or doubled Host, HTTP/0.9 and 2.0, odd methods,
Transfer-Encoding on HTTP/1.0 or with anything but ``chunked``, doubled headers that have one value,
unlimited headers, bare CR or LF, obsolete folding. An Upgrade is not taken, as RFC 9110 section 7.8
allows: the request is answered as HTTP/1.1 (``curl --http2`` works).

`comet.server.connection` calls `split_head` with what it has read, and `comet.server.body` then reads
exactly the body: `Head.length` bytes, or what a `ChunkedBody` takes. llhttp tells neither
how far it came nor stops where a request ends; it is fed the head alone and then the body line by
line, because a chunked body can only end at a line feed. What follows stays in the caller's buffer.
"""

import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

import httptools

from comet.errors import Refusal

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"})
"""Methods that get as far as the URL table, which says which of them a path has."""

SINGLE = frozenset({"host", "content-type", "authorization", "origin", "last-event-id", "idempotency-key", "expect"})
"""Headers that are refused when doubled: two values would be two readings. llhttp does the same for
Content-Length and Transfer-Encoding."""

MAX_HEADERS = 100

_LINE = re.compile(rb"([!-~]{1,32}) ([!-~]+) HTTP/([0-9])\.([0-9])")
_METHOD = re.compile(rb"([A-Z]{1,32}) ")
_FOLD = re.compile(rb"\n[ \t]")
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
_SIZE = re.compile(rb"[0-9A-Fa-f]+")
_PLAIN = re.compile(rb"([1-9A-Fa-f][0-9A-Fa-f]{0,7})\r\n")
_EMPTY = re.compile(rb"(?:\r\n)+")
_ORIGIN = re.compile(rb"\r\norigin:[ \t]*+([!-~]*+)[ \t]*+\r\n", re.IGNORECASE)  # possessive: blanks by the thousand took seconds
_ABSOLUTE = re.compile(rb"[hH][tT][tT][pP][sS]?://([^/?#]*)")


class Head(NamedTuple):
    """A request up to its blank line. `path` is percent-decoded UTF-8; `headers` have lower-case names,
    no doubles (joined by a comma where that is allowed) and no name with an underscore, which WSGI
    could not tell from a dash. `length` is the body's bytes, None when it is chunked."""

    method: str
    target: str
    path: str
    query: str
    version: str
    headers: dict[str, str]
    keep_alive: bool
    length: int | None
    expects_continue: bool


def split_head(buffer: bytearray, limit: int) -> Head | None:
    """Take a complete head off the front of `buffer`; None when there is none yet.

    `limit` is the bytes a head may have. Raises Refusal: ``header-too-large``, or whatever is wrong,
    as soon as it can be seen; the bytes stay in the buffer and must not be read as a request.
    """
    if empty := _EMPTY.match(buffer):  # RFC 9112 section 2.2: ignore empty lines before a request
        del buffer[: empty.end()]
    end = buffer.find(b"\r\n\r\n", 0, limit + 4)
    block = bytes(buffer[: end + 4]) if end >= 0 else bytes(buffer[:limit])
    lines = block.count(b"\r\n")  # counted, which is faster than a pattern: who drips lines has all judged for each
    if block.count(b"\n") != lines or block.count(b"\r") != lines + block.endswith(b"\r") or b"\0" in block:
        raise Refusal("bad-request", "A header holds a NUL, or a CR or LF alone; end lines with CR LF.")
    if end < 0:
        line_end = block.find(b"\r\n")
        if line_end >= 0:
            _request_line(block[:line_end])  # a client that speaks no HTTP/1 is told so at once
        if len(buffer) > limit:
            raise Refusal("header-too-large", f"The request line and headers are over {limit} bytes; send fewer or shorter headers.")
        return None
    if _FOLD.search(block):
        raise Refusal("bad-request", "A header is folded over several lines; put it on one.")
    if lines > MAX_HEADERS + 2:  # before llhttp would tell of each of some thousand
        raise Refusal("header-too-large", f"A request has at most {MAX_HEADERS} headers.")
    head = _parse(block)
    del buffer[: end + 4]
    return head


def origin_in(data: bytes | bytearray) -> str:
    """Return the Origin header in `data`, a head that was refused or is not all there; "" for none. Only for the answer to a
    refusal, which tells the same to everybody: `split_head` is what judges a request."""
    end = data.find(b"\r\n\r\n")
    found = _ORIGIN.search(data, 0, len(data) if end < 0 else end + 2)
    return found[1].decode() if found else ""


def method_in(data: bytes | bytearray) -> str:
    """Return the method in `data`, a head that was refused or is not all there; "" for none that is known. Only for the answer to a
    refusal, as `origin_in`."""
    found = _METHOD.match(data)
    method = found[1].decode() if found else ""
    return method if method in METHODS else ""


def _request_line(line: bytes) -> tuple[str, bytes, str]:
    found = _LINE.fullmatch(line)
    if not found:
        raise Refusal("bad-request", "The first line is not 'METHOD target HTTP/1.1'.")
    method, target = found[1].decode(), found[2]
    if found[3] != b"1" or found[4] not in b"01":
        raise Refusal("http-version", "This server speaks HTTP/1.1 and HTTP/1.0; put a proxy in front for others.")
    if method not in METHODS:
        raise Refusal("method-unknown", f"The method {method} is not known here; the methods are {', '.join(sorted(METHODS))}.")
    return method, target, f"HTTP/1.{found[4].decode()}"


class _Events:
    """What llhttp calls back while it reads a head."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []
        self.keep_alive = False
        self.parser = httptools.HttpRequestParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.keep_alive = self.parser.should_keep_alive()  # wrong if asked later


def _parse(block: bytes) -> Head:
    method, target, version = _request_line(block[: block.index(b"\r\n")])
    events = _Events()
    try:
        events.parser.feed_data(block)
    except httptools.HttpParserUpgrade:
        pass  # complete, and asks to become another protocol: it stays this one
    except httptools.HttpParserError as error:
        slug = "bad-length" if "Content-Length" in str(error) else "bad-encoding" if "Transfer-Encoding" in str(error) else "bad-request"
        raise Refusal(slug, f"The request is not well-formed: {error}.") from None
    finally:
        del events.parser  # the parser holds its events: break the cycle
    headers = _merge(events.headers)
    if "host" not in headers and version == "HTTP/1.1":
        raise Refusal("bad-host", "A request of HTTP/1.1 carries a Host header.")
    host = headers.get("host", "")
    authority = _ABSOLUTE.match(target)
    if authority:  # RFC 9112 section 3.2.2: a server accepts the absolute form; its host counts
        host = headers["host"] = authority[1].decode()
        target = target[authority.end() :]
        if not target.startswith(b"/"):
            target = b"/" + target
    if not _HOST.fullmatch(host.encode("latin-1")):
        raise Refusal("bad-host", "The Host header is not a host and an optional port.")
    length, expects_continue = _body(headers, version)
    raw_path, _, query = target.partition(b"#")[0].partition(b"?")
    if not raw_path.startswith(b"/") and target != b"*":
        raise Refusal("bad-path", "The request target begins with a slash.")
    try:
        path = unquote_to_bytes(raw_path).decode()
    except UnicodeDecodeError:
        raise Refusal("bad-path", "The path, percent-decoded, is not UTF-8.") from None
    return Head(method, target.decode(), path, query.decode(), version, headers, events.keep_alive, length, expects_continue)


def _merge(pairs: list[tuple[bytes, bytes]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for raw_name, raw_value in pairs:
        name, value = raw_name.decode("latin-1"), raw_value.strip(b" \t").decode("latin-1")
        if "_" in name:
            continue
        if name in SINGLE and not value.isascii():
            raise Refusal("bad-request", f"The header {name} is not ASCII.")
        if name not in headers:
            headers[name] = value
        elif name == "host":
            raise Refusal("bad-host", "A request carries one Host header.")
        elif name in SINGLE:
            raise Refusal("bad-request", f"The header {name} stands there twice.")
        else:
            headers[name] += ("; " if name == "cookie" else ",") + value
    return headers


def _body(headers: dict[str, str], version: str) -> tuple[int | None, bool]:
    """The body's length (None: chunked) and whether the client waits for ``100 Continue``."""
    expect = headers.get("expect", "").lower()
    if expect not in ("", "100-continue"):
        raise Refusal("bad-expectation", "The only expectation met here is 100-continue.")
    encoding = headers.get("transfer-encoding")
    expects = expect != "" and version == "HTTP/1.1"
    if encoding is None:
        text = headers.get("content-length", "0")
        if not (text.isascii() and text.isdigit() and len(text) <= 18):
            raise Refusal("bad-length", "Content-Length is a decimal number of bytes.")
        return int(text), expects
    if encoding.lower() != "chunked" or version == "HTTP/1.0":
        raise Refusal("bad-encoding", "The only Transfer-Encoding taken is 'chunked', alone, in HTTP/1.1.")
    return None, expects


PIECES = 64
"""Chunks, or lines of chunks with extensions, that are read before others have a turn. A read of the socket may have 2,700 chunks of a
byte, and so may those of many clients in one turn of the loop."""

TINY = 64
"""Bytes of data: whose chunks have fewer on average is read slowly. A chunk costs two microseconds, and no library sends such ones."""


class ChunkedBody:
    """Takes a chunked body off a buffer, piece by piece, to its very end and no further.

    Raises Refusal ``bad-encoding`` for a malformed one, or one whose chunk lines, extensions and
    trailers are more than `overhead` bytes beyond sixteen times its data. Trailers are dropped.
    """

    def __init__(self, overhead: int) -> None:
        self.done = False
        self.tiny = False
        """The `PIECES` that were read last had hardly any data."""
        self._allowance = overhead
        self._data: list[bytes] = []
        self._left = 0  # of the present chunk's data, which is fed at once, newlines or not
        self._line = b""
        self._between = True  # a chunk begins
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self._parser.feed_data(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")

    def on_chunk_header(self) -> None:
        found = _SIZE.match(self._line)
        self._left = int(found[0], 16) if found else 0

    def on_chunk_complete(self) -> None:
        self._between = True

    def on_body(self, data: bytes) -> None:
        self._data.append(data)

    def on_message_complete(self) -> None:
        self.done = True

    def feed(self, buffer: bytearray) -> bytes:
        """Consume up to `PIECES` of what `buffer` has of the body and answer the data in them. Whatever stays there is to be fed again,
        unless the body is done."""
        taken = 0
        pieces = PIECES
        while buffer and pieces > 0 and self._parser is not None and not self.done:
            pieces -= 1
            if self._left:
                line = bytes(buffer[: self._left])
                self._left -= len(line)
            elif self._between and (run := self._run(buffer, pieces + 1))[1]:
                line, chunks = run
                pieces -= chunks - 1
                self._line = b""
            else:
                self._between = False
                line = bytes(buffer[: buffer.find(b"\n") + 1] or buffer)
                self._line = line if self._line.endswith(b"\n") else self._line + line
            del buffer[: len(line)]
            taken += len(line)
            try:
                self._parser.feed_data(line)
            except httptools.HttpParserError as error:
                raise Refusal("bad-encoding", f"The chunked body is not well-formed: {error}.") from None
        data = b"".join(self._data)
        self._data.clear()
        self.tiny = pieces == 0 and len(data) < PIECES * TINY
        self._allowance -= taken - 17 * len(data)
        if self._allowance < 0:
            raise Refusal("bad-encoding", "The chunks of the body are mostly framing; send larger ones, and short extensions and trailers.")
        if self.done:
            self._parser = None  # it holds its events: break the cycle
        return data

    @staticmethod
    def _run(buffer: bytearray, most: int) -> tuple[bytes, int]:
        """Return what stands at the front of `buffer` as whole plain chunks with data, and how many they are, at most `most`. None of
        them ends the body, so the parser may have them all at once."""
        end = chunks = 0
        while chunks < most and (found := _PLAIN.match(buffer, end)):
            after = found.end() + int(found[1], 16)
            if buffer[after : after + 2] != b"\r\n":
                break
            end = after + 2
            chunks += 1
        return bytes(buffer[:end]), chunks
