"""Messages to bytes, one framing an endpoint. Pure: no socket, no greenlet, no clock.

`Subscriber.encode` calls `Framing.encode` with what waits for a client and the client's cursor. The
bytes of a message are made once a framing and kept on the message; a client of several channels
gets these shared bytes joined with its own cursor. Chunked transfer coding is the server's.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol, TypeVar

import msgspec

from comet.message import Cursor, Gap, Item, Message

PORTION: Final = 1 << 20
"""Bytes (as `Message.cost` counts) that are encoded for one client at a time: a replay can be as large
as a channel's history, and must not be copied for every client that asks for it."""

FORM_COST: Final = 300
"""Bytes that a kept form has more than the message's data, at most: names of 128 characters fit."""

AnyItem = TypeVar("AnyItem", bound=Item)

_json = msgspec.json.Encoder().encode


class Framing(Protocol):
    """How one endpoint speaks.

    `one_shot`: a single call of `encode` makes the whole answer. Otherwise each call makes the next
    pieces of a stream; `heartbeat` is what a stream says when there is nothing to say, and `opening`
    what it says at once, so that the client has an answer before the first message.
    """

    name: str
    content_type: str
    one_shot: bool
    heartbeat: bytes

    def opening(self, cursor: Cursor) -> bytes: ...

    def encode(self, items: Sequence[Item], cursor: Cursor) -> Sequence[bytes]:
        """The bytes of `items`, a piece each; moves `cursor` past them, where the framing has cursors."""


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


def message_json(message: Message) -> bytes:
    """``{"id", "channel", "type", "data"}``, the message as an object in poll, stream and history."""
    return _once(message, "json", _make_json)


def _make_json(message: Message) -> bytes:
    return _json({"id": message.id, "channel": message.channel, "type": message.type, "data": message.data.decode()})


class Text:
    """metabrew's: the body of a message and a newline, a piece a message. It has no cursors and no
    gaps, and no heartbeat either: TCP keepalive finds the dead."""

    name = "test"
    content_type = "text/plain; charset=utf-8"
    one_shot = False
    heartbeat = b""

    def opening(self, cursor: Cursor) -> bytes:
        user = next(iter(cursor.positions)).partition(":")[2]
        return f"comet welcomes you! Your id: {user}\n".encode()

    def encode(self, items: Sequence[Item], cursor: Cursor) -> Sequence[bytes]:
        return [item.data + b"\n" for item in items if isinstance(item, Message)]


class ServerSentEvents:
    """SSE, as the WHATWG HTML standard has it (section 9.2, "Server-sent events").

    The opening block carries ``id:`` with no data: a browser remembers it without an event, so that
    even a client that never got a message resumes where it began. CR and CRLF inside a body arrive as
    LF: the format knows only lines. `retry` is milliseconds before a browser reconnects.
    """

    name = "events"
    content_type = "text/event-stream; charset=utf-8"
    one_shot = False
    heartbeat = b":\n\n"

    def __init__(self, retry: int) -> None:
        self._retry = retry

    def opening(self, cursor: Cursor) -> bytes:
        return b"retry: %d\n: comet\nid: %b\n\n" % (self._retry, str(cursor).encode())

    def encode(self, items: Sequence[Item], cursor: Cursor) -> Sequence[bytes]:
        pieces = []
        for item in items:
            cursor.advance(item)
            if isinstance(item, Gap):
                text = str(cursor).encode()
                pieces.append(b'id: %b\nevent: gap\ndata: {"gap":true,"cursor":"%b"}\n\n' % (text, text))
            else:
                pieces.append(b"id: %b\n%b" % (str(cursor).encode(), _once(item, "sse", _make_event)))
        return pieces


def _make_event(message: Message) -> bytes:
    """What follows the ``id:`` line."""
    lines = message.data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    return b"event: %b\ndata: %b\n\n" % (message.type.encode(), b"\ndata: ".join(lines))


class Lines:
    """NDJSON: `message_json` a line. On one channel a message's id is the cursor; with several each
    line carries the cursor as well."""

    name = "stream"
    content_type = "application/x-ndjson; charset=utf-8"
    one_shot = False
    heartbeat = b"\n"

    def opening(self, cursor: Cursor) -> bytes:
        return self.heartbeat

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


class Poll:
    """The long-poll answer: ``{"cursor", "gap", "messages"}``."""

    name = "poll"
    content_type = "application/json"
    one_shot = True
    heartbeat = b""

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


def batch_json(cursor: str, gap: bool, messages: Sequence[Message]) -> bytes:
    """The document of a poll and of history."""
    return b'{"cursor":"%b","gap":%b,"messages":[%b]}' % (
        cursor.encode(),
        b"true" if gap else b"false",
        b",".join(map(message_json, messages)),
    )


TEXT: Final[Framing] = Text()
LINES: Final[Framing] = Lines()
POLL: Final[Framing] = Poll()
