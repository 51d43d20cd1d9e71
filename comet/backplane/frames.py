"""What router and workers say to each other over their Unix socket: length-prefixed msgpack frames.

Neighbours: `comet.router` and `comet.backplane.link`. Both trust each other (one user, one machine), so a frame that can't be read is a
bug: it raises, and the link is made anew. But a reload brings workers of newer code to the router that is there. So a worker's first frame
is `Hello`, with the `VERSION` of these frames, and the router answers `Welcome`, with its own; if they differ, it ends the link.

A worker calls and is answered (`Answer` carries the number of the call); all else is told one way.
Everything on a link stays in order, which is what joining rests on: see `comet.backplane`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec.inspect
from msgspec import Raw, Struct

from comet.message import ChannelInfo, Position, Publication, Receipt, Sent, Since

MAX_FRAME: Final = 1 << 30
"""Bytes. A frame is as large as what a worker may publish or read at once; more is a broken link."""

_LENGTH: Final = 4

encode = msgspec.msgpack.Encoder().encode


# -- worker to router


class Hello(Struct, tag=0, array_like=True, gc=False):
    """The first frame of a link: which `VERSION` the worker speaks. Answered with `Welcome`. These two stay as they are for ever."""

    version: str


class Publish(Struct, tag=1, array_like=True, gc=False):
    """Answered with a list of `Receipt`, or the sentence of a Refusal ``key-conflict``, the only one there is."""

    call: int
    publications: Sequence[Publication]


class Send(Struct, tag=2, array_like=True, gc=False):
    """Answered with a `Sent`, or as `Publish`. `channels` are joined by commas."""

    call: int
    channels: str
    kind: str
    data: bytes
    key: str | None


class Subscribe(Struct, tag=3, array_like=True, gc=False):
    """Log in to each channel, and count one subscriber more. Answered with a `Replay` a channel, of one page in all."""

    call: int
    channels: Sequence[str]
    since: Sequence[Since]
    size: int


class Peek(Struct, tag=11, array_like=True, gc=False):
    """Answered as `Subscribe`, without logging in."""

    call: int
    channels: Sequence[str]
    since: Sequence[Since]
    size: int


class Resume(Struct, tag=4, array_like=True, gc=False):
    """Log in (again) to channels on which this worker stands at a position, and has so many subscribers
    more than the router knows of: a new router knows of none, and one that dropped deliveries has to
    make them good. Answered as `Subscribe`."""

    call: int
    places: Sequence[tuple[str, int, Position]]


class Interest(Struct, tag=5, array_like=True, gc=False):
    """So many subscribers more or fewer, by channel and the epoch that they joined."""

    changes: Sequence[tuple[str, int, int]]


class Logout(Struct, tag=6, array_like=True, gc=False):
    """No messages of these any more; where the worker has subscribed again meanwhile, it does not count."""

    channels: Sequence[str]


class Read(Struct, tag=7, array_like=True, gc=False):
    """Answered with a `Replay` of one page, or None."""

    call: int
    channel: str
    since: Since
    limit: int | None
    size: int


class Info(Struct, tag=8, array_like=True, gc=False):
    """Answered with a `ChannelInfo` or None."""

    call: int
    channel: str


class Delete(Struct, tag=9, array_like=True, gc=False):
    """Answered as `Info`."""

    call: int
    channel: str


class Totals(Struct, tag=10, array_like=True, gc=False):
    """Answered with counters by name."""

    call: int


Asked = Hello | Publish | Send | Subscribe | Peek | Resume | Interest | Logout | Read | Info | Delete | Totals

# -- router to worker


class Welcome(Struct, tag=0, array_like=True, gc=False):
    """Which `VERSION` the router speaks. If the worker's is another, the link ends behind this."""

    version: str


class Item(Struct, array_like=True, gc=False):
    """A message, and where it belongs: `places` are channel, epoch and offset, several where it was sent to many feeds."""

    kind: str
    data: bytes
    places: Sequence[tuple[str, int, int]]


class Deliver(Struct, tag=1, array_like=True, gc=False):
    """Messages of channels that the worker is logged in to: what there was for it in a turn of the router."""

    items: Sequence[Item]


class Answer(Struct, tag=2, array_like=True, gc=False):
    """What a call asked for; see there."""

    call: int
    value: Raw


class Dropped(Struct, tag=3, array_like=True, gc=False):
    """The channel's log was deleted, and the worker is logged out of it."""

    channel: str
    epoch: int


class Missed(Struct, tag=4, array_like=True, gc=False):
    """Messages of these channels were not sent, because too much waited for the worker: resume, or log out."""

    channels: Sequence[str]


class Lapsed(Struct, tag=5, array_like=True, gc=False):
    """The logs of these channels were forgotten, since nobody had subscribed for the linger time. The worker
    is logged out of them, and counts nobody there."""

    channels: Sequence[str]


Told = Welcome | Deliver | Answer | Dropped | Missed | Lapsed


class Replay(Struct, array_like=True, gc=False):
    """A `Joined`: the messages, as type and data, follow `position` without a hole."""

    position: Position
    messages: Sequence[tuple[str, bytes]]
    gap: bool
    more: int


MEANING: Final = 1
"""Part of the version: raise it when frames mean something else and look as they did."""


def _version() -> str:
    """Return what tells these frames from those of other versions of the code: a digest of their types, with all that is in them."""
    types = repr(msgspec.inspect.multi_type_info([Asked, Told, Replay, Publication, Receipt, Sent, ChannelInfo]))
    return f"{MEANING}-{hashlib.blake2b(types.encode(), digest_size=8).hexdigest()}"


VERSION: Final = _version()


def frame(body: Asked | Told) -> bytes:
    """On the wire."""
    data = encode(body)
    return len(data).to_bytes(_LENGTH, "little") + data


def item(kind: str, data: bytes, places: Sequence[tuple[str, int, int]]) -> bytes:
    """An `Item`, encoded: see `deliver`."""
    return encode((kind, data, places))


def deliver(items: Sequence[bytes]) -> bytes:
    """A `Deliver` frame of encoded items: a msgpack array of the tag and an array32 of them."""
    data = b"\x92\x01\xdd%b%b" % (len(items).to_bytes(4, "big"), b"".join(items))
    return len(data).to_bytes(_LENGTH, "little") + data


class Cutter:
    """Cuts what is received into frames' bodies."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._have = 0
        self._need = _LENGTH
        """Bytes with which there may be a frame: a long one is put together once, not with every piece."""

    @property
    def partial(self) -> bool:
        """Part of a frame is here."""
        return self._have > 0

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """The frames that are whole now; all must be taken. Raises ValueError when the other side does not
        speak this."""
        self._pieces.append(data)
        self._have += len(data)
        if self._have < self._need:
            return
        view = memoryview(data if len(self._pieces) == 1 else b"".join(self._pieces))
        at, end = 0, len(view)
        self._need = _LENGTH
        while at + _LENGTH <= end:
            size = int.from_bytes(view[at : at + _LENGTH], "little")
            if size > MAX_FRAME:
                raise ValueError(f"a frame of {size} bytes")
            stop = at + _LENGTH + size
            if stop > end:
                self._need = stop - at
                break
            yield view[at + _LENGTH : stop]
            at = stop
        self._pieces = [bytes(view[at:])] if at < end else []
        self._have = end - at
