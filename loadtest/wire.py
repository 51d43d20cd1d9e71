"""Answers of the server as bytes, read strictly: heads, chunks, and the messages of each endpoint. Pure.

Neighbours: `loadtest.swarm` and `loadtest.client`, which have the sockets; `loadtest.verify`, which knows messages.
"""

from typing import NamedTuple

MOST_SIZE = 16
"""Characters of a chunk's size line."""


class Malformed(Exception):
    """Not HTTP/1.1, or not what these endpoints answer."""


class Ended(Exception):
    """The answer's last chunk: the server has ended it."""


class Endpoint(NamedTuple):
    """How one kind of client asks, and where the messages are in what it is told."""

    name: str
    path: str
    """`{id}` is the user."""
    mark: bytes
    """Stands in front of a message's text."""
    id_mark: bytes = b""
    """Stands in front of a message's id, up to `id_end`; b"" where messages have none."""
    id_end: bytes = b""

    def request(self, user: int, host: str, cursor: bytes = b"") -> bytes:
        """What a client sends."""
        since = f"?since={cursor.decode()}" if cursor else ""
        return f"GET {self.path.replace('{id}', str(user))}{since} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()

    def text(self, piece: bytes) -> bytes | None:
        """The message in a chunk, from its start; None for heartbeats and the like."""
        if not self.mark:
            return piece
        at = piece.find(self.mark)
        return None if at < 0 else piece[at + len(self.mark) :]

    def id(self, piece: bytes) -> bytes:
        """The id of the message in a chunk. Raises Malformed."""
        at = piece.find(self.id_mark)
        end = piece.find(self.id_end, at + len(self.id_mark))
        if at < 0 or end < 0:
            raise Malformed(f"no id in {piece[:200]!r}")
        return piece[at + len(self.id_mark) : end]


TEST = Endpoint("/test", "/test/{id}", b"")
STREAM = Endpoint("/stream", "/stream/user:{id}", b'"data":"', b'{"id":"', b'"')
EVENTS = Endpoint("/events", "/events/user:{id}", b"\ndata: ", b"\nid: ", b"\n")
EVERYONE = Endpoint("/test/everyone", "/test/everyone", b"")
"""All on one channel."""
BOTH = Endpoint("/stream of two", "/stream/user:{id},user:everyone", b'"data":"')
"""A feed each, and the channel of all."""

ENDPOINTS = {"test": TEST, "stream": STREAM, "events": EVENTS, "everyone": EVERYONE, "both": BOTH}


def head(data: bytes) -> tuple[int, dict[bytes, bytes], int] | None:
    """Status, headers by lower-case name, and where the body begins; None while it is not all here. Raises Malformed."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        if len(data) > 16384:
            raise Malformed("a head without an end")
        return None
    first, *lines = data[:end].split(b"\r\n")
    words = first.split(b" ", 2)
    if words[0] != b"HTTP/1.1" or not words[1:] or not words[1].isdigit():
        raise Malformed(f"no status line: {first[:100]!r}")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    return int(words[1]), headers, end + 4


def pieces(data: bytes) -> tuple[list[bytes], bytes]:
    """The whole chunks in `data`, and what is here of the next. Raises Ended at the last one when nothing stands before it,
    and Malformed."""
    found: list[bytes] = []
    at = 0
    while (end := data.find(b"\r\n", at)) >= 0:
        try:
            size = int(data[at:end], 16)
        except ValueError:
            raise Malformed(f"no chunk size: {data[at : at + 40]!r}") from None
        stop = end + 2 + size
        if len(data) < stop + 2:
            break
        if data[stop : stop + 2] != b"\r\n":
            raise Malformed(f"a chunk without an end: {data[stop - 20 : stop + 20]!r}")
        if size == 0:
            if not found:
                raise Ended
            break
        found.append(data[end + 2 : stop])
        at = stop + 2
    if end < 0 and len(data) - at > MOST_SIZE:
        raise Malformed(f"no chunk size: {data[at : at + 40]!r}")
    return found, data[at:]
