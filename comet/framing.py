"""Messages to bytes, one framing an endpoint. Pure: no socket, no greenlet, no clock.

`Subscriber.encode` calls `Framing.encode` with what waits for a client and the client's cursor. The
bytes of a message are made once a framing and kept on the message; a client of several channels
gets these shared bytes joined with its own cursor. `Batch` does the same for what many sleeping
clients are sent, down to the bytes on the wire.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from functools import lru_cache
from typing import Any, Final, TypeVar

import msgspec

from comet.message import Cursor, Gap, Item, Message, Position

PORTION: Final = 1 << 20
"""Bytes (as `Message.cost` counts) that are encoded for one client at a time: a replay can be as large
as a channel's history, and must not be copied for every client that asks for it."""

FORM_COST: Final = 300
"""Bytes that a kept form has more than the message's data, at most: names of 128 characters fit."""

AnyItem = TypeVar("AnyItem", bound=Item)

_json = msgspec.json.Encoder().encode

_SEPARATORS: Final = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))
"""What `str.splitlines` splits at and msgspec leaves as it is (it escapes all below U+0020), in UTF-8 and as JSON escapes it."""


def chunk(piece: bytes) -> bytes:
    """A piece in chunked transfer coding."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


class Framing:
    """How one endpoint speaks.

    `one_shot`: a single call of `encode` makes the whole answer. Otherwise each call makes the next
    pieces of a stream; `heartbeat` is what a stream says when there is nothing to say.
    """

    name: str
    content_type: str
    one_shot = False
    heartbeat = b""
    names_cursor = True
    """The answer's headers say where it starts."""
    abort = False
    """A stream that ends because the service stops lacks its last chunk (``--events-end``)."""
    closes = True
    """The answer is the last of its connection."""
    _head: bytes | None = None
    _coded: Callable[[bytes], bytes] = staticmethod(chunk)
    _last = b"0\r\n\r\n"
    _unchunked: "Framing | None" = None

    def opening(self, cursor: Cursor) -> bytes:
        """What a stream says at once, so that the client has an answer before the first message."""
        return self.heartbeat

    def encode(self, items: Sequence[Item], cursor: Cursor) -> Sequence[bytes]:
        """The bytes of `items`, a piece each; moves `cursor` past them."""
        raise NotImplementedError

    def headers(self, cursor: Cursor | None) -> list[tuple[str, str]]:
        """Return the headers of an answer that starts at `cursor`, but for those that frame its body. The one that names the cursor
        is left out if `cursor` is None, or is none of ours."""
        headers = [("Content-Type", self.content_type), ("Cache-Control", "no-store"), ("X-Accel-Buffering", "no")]
        return [*headers, ("Comet-Cursor", str(cursor))] if self.names_cursor and cursor is not None and cursor.ours else headers

    # -- the same on the wire, for HTTP/1.1: what a sleeping client is sent

    def start(self, cursor: Cursor, date: bytes) -> bytes:
        """A stream's status, headers and opening. `date` is the Date header's line."""
        head = self._head
        if head is None:
            lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers(None))
            head = self._head = b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n" % lines.encode()
        named = b"Comet-Cursor: %b\r\n" % str(cursor).encode() if self.names_cursor and cursor.ours else b""
        return b"%b%b%b\r\n%b" % (head, named, date, chunk(self.opening(cursor)))

    def wire(self, pieces: Sequence[bytes], date: bytes) -> bytes:
        """`pieces`: a chunk each."""
        return b"".join(map(self._coded, pieces))

    def batch(self, batch: "Batch", date: bytes) -> bytes:
        """What a subscriber of the batch's channel alone gets who stands before it."""
        return self.wire(self.encode(batch.messages, Cursor([batch.channel], [Position(batch.epoch, batch.before)])), date)

    def end(self, cursor: Cursor, date: bytes, closing: bool) -> bytes:
        """What ends an answer that is under way: a stream's last chunk. `closing`: so does the connection."""
        return self._last

    def unchunked(self) -> "Framing":
        """The same framing for a client of HTTP/1.0: an answer whose length is not known is not in chunks, and ends with its connection."""
        twin = self._unchunked
        if twin is None:
            twin = self._unchunked = self._copy()
            twin._coded, twin._last = bytes, b""
        return twin

    def _copy(self) -> "Framing":
        return copy(self)

    def closing(self) -> "Framing":
        """The same framing for an answer that is the last of its connection."""
        return self

    def with_headers(self, more: Sequence[tuple[str, str]]) -> "Framing":
        """The same framing for an answer whose headers, not sent yet, have `more` than the usual ones."""
        return self


class Batch:
    """Messages of one channel that follow each other, on their way to its subscribers: behind the offset
    `before`, up to `last` of `epoch`. Their bytes are made once a framing,
    whoever asks first."""

    __slots__ = ("before", "channel", "epoch", "last", "messages", "wires")

    def __init__(self, messages: Sequence[Message]) -> None:
        last = messages[-1]
        self.messages = messages
        self.channel = last.channel
        self.epoch = last.epoch
        self.last = last.offset
        self.before = messages[0].offset - 1
        self.wires: dict[Framing, bytes] = {}

    @property
    def position(self) -> Position:
        """Where they end."""
        return Position(self.epoch, self.last)

    def wire(self, framing: Framing, date: bytes) -> bytes:
        """Make the bytes for a subscriber of this channel alone that stands at `before`, and leave them in
        `wires` for the others."""
        made = self.wires[framing] = framing.batch(self, date)
        return made


def batches(messages: Sequence[Message]) -> Iterable[Batch]:
    """Messages of one channel, in order, in runs that follow each other: a break is where this process
    missed some, or a log began anew."""
    return (Batch(messages),) if len(messages) == 1 else _runs(messages)


def _runs(messages: Sequence[Message]) -> Iterator[Batch]:
    start = 0
    while start < len(messages):
        first, stop = messages[start], len(messages)
        if messages[-1].epoch != first.epoch or messages[-1].offset - first.offset != stop - 1 - start:
            stop = start + 1
            while stop < len(messages) and messages[stop].position == (first.epoch, first.offset + stop - start):
                stop += 1
        yield Batch(messages[start:stop])
        start = stop


def portions(items: Sequence[AnyItem]) -> Iterator[Sequence[AnyItem]]:
    """`items` in runs of at most `PORTION` bytes, but at least one item; an empty run if there are none."""
    start = size = 0
    for index, item in enumerate(items):
        cost = item.cost if isinstance(item, Message) else 0
        if size + cost > PORTION and index > start:
            yield items[start:index]
            start, size = index, 0
        size += cost
    yield items[start:]


def _once(message: Message, name: str, make: Callable[[Message], bytes]) -> bytes:
    """The message's bytes in the form `name`, made the first time. Forms that are much larger than the
    data (all newlines, say) are not kept: `Message.cost` would not cover them."""
    frames = message.frames
    if frames is None:
        frames = message.frames = {}
    made = frames.get(name)
    if made is None:
        made = make(message)
        if len(made) <= len(message.data) + FORM_COST:
            frames[name] = made
    return made


def json_line(document: Any) -> bytes:
    """Return `document` as JSON on one line, whatever its reader calls a line.

    Many line readers (`str.splitlines`, so those of requests and httpx; Java's Scanner) end a line at U+0085, U+2028 and U+2029
    too. JSON allows these unescaped in a string; here they are escaped. In UTF-8 their bytes stand for nothing else.
    """
    made = _json(document)
    if not made.isascii():
        for raw, escaped in _SEPARATORS:
            made = made.replace(raw, escaped)
    return made


def message_json(message: Message) -> bytes:
    """``{"id", "channel", "type", "data"}``, the message as an object in poll, stream and history."""
    return _once(message, "json", _make_json)


def _make_json(message: Message) -> bytes:
    return json_line({"id": message.id, "channel": message.channel, "type": message.type, "data": message.data.decode()})


class Text(Framing):
    """metabrew's: the body of a message and a newline, a piece a message. It tells no cursors and no
    gaps, and no heartbeat either: TCP keepalive finds the dead."""

    name = "test"
    content_type = "text/plain; charset=utf-8"
    names_cursor = False

    def __init__(self) -> None:
        # the body made last, and its bytes; None at first: b"" would be taken for a body, an empty one, of which nothing is sent
        self._made: tuple[bytes | None, bytes] = None, b""

    def batch(self, batch: Batch, date: bytes) -> bytes:
        """Return the bytes of what was sent to many feeds, which are made once: nothing in them tells the feeds apart."""
        if len(batch.messages) > 1:
            return super().batch(batch, date)
        data = batch.messages[0].data
        made = self._made
        if made[0] is not data:
            made = self._made = data, self._coded(data + b"\n")
        return made[1]

    def _copy(self) -> Framing:
        return Text()

    def opening(self, cursor: Cursor) -> bytes:
        user = cursor.channels[0].partition(":")[2]
        return f"comet welcomes you! Your id: {user}\n".encode()

    def encode(self, items: Sequence[Item], cursor: Cursor) -> Sequence[bytes]:
        for item in items:
            cursor.advance(item)
        return [item.data + b"\n" for item in items if isinstance(item, Message)]


class ServerSentEvents(Framing):
    """SSE, as the WHATWG HTML standard has it (section 9.2, "Server-sent events").

    The opening block carries ``id:`` with no data: a browser remembers it without an event, so that
    even a client that never got a message resumes where it began. If the client's own cursor is none of ours there is no
    ``id:``: the client keeps what it came with until it has been told the gap. In every block ``id:`` is the last line: some
    clients remember it as they read it, before the block is whole, and would skip the message if the connection broke there.
    Some clients report a block without data, or an empty line alone, as an event of type "message". So blocks without data
    have a type of their own, ``comet``, and a heartbeat is a comment's line without the empty line that would end a block.
    CR and CRLF inside a body arrive as
    LF: the format knows only lines. `retry` is milliseconds before a browser reconnects. `abort` leaves out the last chunk
    of a stream that ends because the service stops.
    """

    name = "events"
    content_type = "text/event-stream; charset=utf-8"
    heartbeat = b":\n"

    def __init__(self, retry: int, abort: bool = False) -> None:
        self._retry = retry
        self.abort = abort

    def opening(self, cursor: Cursor) -> bytes:
        named = b"id: %b\n" % str(cursor).encode() if cursor.ours else b""
        return b"retry: %d\nevent: comet\n%b\n" % (self._retry, named)

    def encode(self, items: Sequence[Item], cursor: Cursor) -> Sequence[bytes]:
        pieces = []
        for item in items:
            cursor.advance(item)
            if isinstance(item, Gap):
                text = str(cursor).encode()
                pieces.append(b'event: gap\ndata: {"gap":true,"cursor":"%b"}\nid: %b\n\n' % (text, text))
            else:
                pieces.append(b"%bid: %b\n\n" % (_once(item, "sse", _make_event), str(cursor).encode()))
        return pieces

    def end(self, cursor: Cursor, date: bytes, closing: bool) -> bytes:
        """A server that stops tells each browser another time to come back, so that they don't all at once. With `abort` the last
        chunk is missing: some clients come back from a broken connection only, and a body that lacks it is one."""
        last = super().end(cursor, date, closing)
        if not closing:
            return last
        told = self._coded(b"retry: %d\nevent: comet\n\n" % random.randint(self._retry, 2 * self._retry))
        return told + (b"" if self.abort else last)


def _make_event(message: Message) -> bytes:
    """Return the lines of an event that stand before its ``id:``."""
    lines = message.data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return b"event: %b\ndata: %b\n" % (message.type.encode(), b"\ndata: ".join(lines))


class Lines(Framing):
    """NDJSON: `message_json` a line. On one channel a message's id is the cursor; with several each
    line carries the cursor as well."""

    name = "stream"
    content_type = "application/x-ndjson; charset=utf-8"
    heartbeat = b"\n"

    def encode(self, items: Sequence[Item], cursor: Cursor) -> Sequence[bytes]:
        pieces = []
        alone = len(cursor.positions) == 1
        for item in items:
            cursor.advance(item)
            if isinstance(item, Gap):
                pieces.append(b'{"gap":true,"cursor":"%b"}\n' % str(cursor).encode())
            elif alone:
                pieces.append(message_json(item) + b"\n")
            else:
                pieces.append(b'%b,"cursor":"%b"}\n' % (message_json(item)[:-1], str(cursor).encode()))
        return pieces


class Poll(Framing):
    """The long-poll answer: ``{"cursor", "gap", "messages"}``, with `more` headers than the usual ones; if it `closes`, they say so."""

    name = "poll"
    content_type = "application/json"
    one_shot = True
    names_cursor = False

    def __init__(self, more: Sequence[tuple[str, str]] = (), closes: bool = False) -> None:
        self.closes = closes
        self._more = tuple(pair for pair in more if not closes or pair[0] != "Connection")
        last = [("Connection", "close")] if closes else []
        head = "".join(f"{name}: {value}\r\n" for name, value in [*self.headers(None), *self._more, *last])
        self._answer = b"HTTP/1.1 200 OK\r\n" + head.encode()

    def opening(self, cursor: Cursor) -> bytes:
        return b""

    def encode(self, items: Sequence[Item], cursor: Cursor) -> Sequence[bytes]:
        gap = False
        messages = []
        for item in items:
            cursor.advance(item)
            if isinstance(item, Gap):
                gap = True
            else:
                messages.append(item)
        return [batch_json(str(cursor), gap, messages)]

    def wire(self, pieces: Sequence[bytes], date: bytes) -> bytes:
        """The whole response."""
        (body,) = pieces
        return b"%b%bContent-Length: %d\r\n\r\n%b" % (self._answer, date, len(body), body)

    def end(self, cursor: Cursor, date: bytes, closing: bool) -> bytes:
        """An answer without messages."""
        return (self.closing() if closing else self).wire(self.encode([], cursor), date)

    def closing(self) -> Framing:
        return _poll_with(self._more, closes=True)

    def with_headers(self, more: Sequence[tuple[str, str]]) -> Framing:
        return _poll_with(tuple(more), self.closes) if more else self


@lru_cache(maxsize=256)
def _poll_with(more: tuple[tuple[str, str], ...], closes: bool) -> Poll:
    """One framing for all polls whose answers have these headers: web origins, for example."""
    return Poll(more, closes)


def batch_json(cursor: str, gap: bool, messages: Sequence[Message]) -> bytes:
    """The document of a poll and of history."""
    return b'{"cursor":"%b","gap":%b,"messages":[%b]}' % (
        cursor.encode(),
        b"true" if gap else b"false",
        b",".join(map(message_json, messages)),
    )


TEXT: Final = Text()
LINES: Final = Lines()
POLL: Final = Poll()
