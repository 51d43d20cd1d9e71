"""How a channel stands in Redis, and how what Redis says of it is read: names of keys, messages, positions, answers.

Neighbours: `comet.backplane.redis_scripts`, which has what is kept; `comet.backplane.redis` and those below it, who read. Pure: no
socket and no greenlet.

Others may write to the same Redis. What cannot be read is `Malformed`, and costs those who wait for it a gap, nobody anything else.
"""

from binascii import crc_hqx
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from itertools import count, repeat
from typing import Any, Final, NamedTuple

import msgspec
from redis.crc import key_slot

from comet.errors import Refusal
from comet.history import Joined
from comet.message import Message, Position, Since, check_type

SLOTS: Final = 16384
"""Hash slots of a cluster."""


class Names:
    """The keys of a channel, behind a `prefix` that tells one service's from another's; `sharded`: in a cluster. Raises ValueError for
    a prefix that hides the hash tag."""

    def __init__(self, prefix: str, sharded: bool = False) -> None:
        if "{" in prefix or "}" in prefix:
            raise ValueError("--redis-prefix must have no braces: in a cluster they would say which keys belong together.")
        self._skip = len(prefix.encode()) + 1
        self._prefix = prefix
        self.nodes = f"{prefix}nodes".encode()
        self._whole = f"{prefix}whole".encode()
        self._tags = _tags() if sharded else None

    def log(self, channel: str) -> bytes:
        """Its hash; its messages are published under the same name."""
        return f"{self._prefix}{{{channel}}}".encode()

    def both(self, channel: str) -> tuple[bytes, bytes]:
        """Its hash and its stream."""
        log = self.log(channel)
        return log, log + b":log"

    def read(self, channel: str) -> tuple[bytes, bytes, bytes]:
        """Return the keys that a script reads a channel from: its hash, its stream, and since when their server has lost nothing."""
        log, stream = self.both(channel)
        return log, stream, self._whole if self._tags is None else b"%b:{%b}" % (self._whole, self._tags[key_slot(log)])

    def key(self, channel: str, key: str) -> bytes:
        """The answer under an idempotency key."""
        return f"{self._prefix}{{{channel}}}:key:{key}".encode()

    def mark(self, channel: str, first: str, key: str) -> bytes:
        """That a feed has had the message that was sent under a key of `first`."""
        return f"{self._prefix}{{{channel}}}:sent:{first}:{key}".encode()

    def channel(self, log: bytes) -> str:
        """Whose hash it is."""
        return log[self._skip : -1].decode()


@cache
def _tags() -> Sequence[bytes]:
    """Return for each slot of a cluster a hash tag that leads there."""
    tags: dict[int, bytes] = {}
    for number in count():
        tag = b"%d" % number
        tags.setdefault(crc_hqx(tag, 0) % SLOTS, tag)
        if len(tags) == SLOTS:
            break
    return [tags[slot] for slot in range(SLOTS)]


class Seen(NamedTuple):
    """How far somebody knows a log to have been: a position, and when Redis ordered the message there (milliseconds; 0: not known).
    A log that was rewound and came as far again has another one there."""

    epoch: int
    offset: int
    time: int


NOWHERE: Final = Seen(-1, 0, 0)
"""Of no log."""


class Malformed(ValueError):
    """Something in Redis is not as comet writes it: a stranger wrote it, or another version."""


class Told(NamedTuple):
    """What was published in Redis: messages of `epoch` from the offset `first` on, all of one `time`, or that a log was deleted
    (`what` is ``D``), or that it has to be looked at (``G``)."""

    what: str
    epoch: int = 0
    first: int = 0
    time: int = 0
    pieces: Sequence[tuple[str, bytes]] = ()


_piece = msgspec.msgpack.Decoder(tuple[str, bytes])
_pieces = msgspec.msgpack.Decoder(list[tuple[str, bytes]])
_type = lru_cache(maxsize=256)(check_type)
piece = msgspec.msgpack.Encoder().encode
"""A message as it is kept: type and data."""


def told(payload: bytes) -> Told:
    """Read what was published. Raises Malformed."""
    try:
        if payload[0] == 71:  # G
            return Told("G")
        if payload[0] == 68:  # D
            return Told("D", int(payload[2:]))
        head, _, rest = payload.partition(b"\n")
        epoch, first, count, ms = map(int, head.split())
        if count == 1:
            pieces = [_piece.decode(rest)]
        elif 1 < count <= len(rest):
            pieces = _pieces.decode(b"\xdd" + count.to_bytes(4, "big") + rest)  # an array32 of them
        else:
            raise Malformed(f"{count} messages in {len(rest)} bytes")
        for one in pieces:
            _check(one)
    except (ValueError, IndexError, OverflowError, msgspec.DecodeError) as error:
        raise Malformed(str(error)) from error
    return Told("M", epoch, first, ms, pieces)


def _check(one: tuple[str, bytes]) -> None:
    """Raises Malformed for what no publisher may send, and no framing could write."""
    kind, data = one
    try:
        _type(kind)
        if not data.isascii():
            data.decode()
    except (Refusal, ValueError) as error:
        raise Malformed(str(error)) from error


def _readable(entries: Sequence[bytes]) -> tuple[int, list[tuple[str, bytes]]]:
    """Return how many entries at the start cannot be read, and those that follow, up to the next that cannot."""
    skipped = 0
    pieces: list[tuple[str, bytes]] = []
    for entry in entries:
        try:
            one = _piece.decode(entry)
            _check(one)
        except (ValueError, msgspec.DecodeError):
            if pieces:
                break
            skipped += 1
        else:
            pieces.append(one)
    return skipped, pieces


def messages(channel: str, epoch: int, first: int, pieces: Sequence[tuple[str, bytes]]) -> list[Message]:
    """Those that follow each other from the offset `first` on."""
    return [Message(channel, Position(epoch, offset), kind, data) for offset, (kind, data) in enumerate(pieces, first)]


class Replay(NamedTuple):
    """What a join or a read was answered: the log's newest position, and a first page of what follows `since`. `life` is
    of a join: until its channel is deleted it counts. `malformed` is how many messages in front of the page could not be read; that is
    a gap. A page ends in front of the next such message."""

    head: Seen
    joined: Joined
    life: Any = None
    malformed: int = 0


def replay(channel: str, reply: Sequence[Any]) -> Replay:
    """Read the answer to a join or a read."""
    epoch, head, start, gap, ms = (int(one) for one in reply[:5])
    skipped, pieces = _readable(reply[5])
    start += skipped
    more = head - start - len(pieces)
    joined = Joined(Position(epoch, start), messages(channel, epoch, start + 1, pieces), bool(gap or skipped), more)
    return Replay(Seen(epoch, head, ms), joined, malformed=skipped)


def shares(count: int, messages: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield for each of `count` channels how many messages and how many bytes of them it may have of a page of so many in all.

    Only of the first the next message comes if it is larger than that: for the others the bytes are said as a negative number.
    """
    limit, room = max(1, messages // count), max(1, size // count)
    yield limit, room
    yield from repeat((limit, -room), count - 1)


def place(since: Since) -> tuple[Any, Any]:
    """Return how a script is told where to start."""
    if since is None:
        return b"", 0
    if isinstance(since, str):
        return b"oldest", 0
    return since
