"""What is pushed: messages, their positions, and the cursors clients resume with.

A leaf that everything else speaks in. `Message` is made once, by a backplane, when it orders a
publication; `comet.framing` leaves the bytes it makes of a message on the message itself, so that
a broadcast to a million clients is encoded once per framing and not once per client.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, Literal, NamedTuple

from comet.errors import Refusal

MAX_CHANNELS: Final = 64
"""Channels in one request, after doubles are merged."""

_CHANNEL = re.compile(r"[A-Za-z0-9_.:@-]{1,128}", re.ASCII)
_RULE: Final = "1 to 128 characters of A-Z a-z 0-9 _ . : @ -"
_POSITION = re.compile(r"([0-9a-f]{1,12})-(0|[1-9][0-9]{0,15})", re.ASCII)

USER_PREFIX: Final = "user:"
"""A user's feed is the channel ``user:<id>``."""

MESSAGE_COST: Final = 1000
"""Bytes a message may cost beside three times its data: the Message and what it refers to, its place in
a list, and what its two encoded forms have more than the data; from sys.getsizeof, rounded up."""

FRAMING: Final = 100
"""Bytes that a message is counted for, beside its data, while it waits to be sent: about what its framing adds. What waits is shared
with the history and other clients, so this is what it will be on the wire, not in memory."""

DEFAULT_TYPE: Final = "message"
RESERVED_TYPES: Final = frozenset({"gap", "error", "open", "comet"})
"""Types no publisher may use. A client must be able to trust that a gap is a gap, and to drop the blocks without data that
`comet.framing` names ``comet``. An EventSource would take the others for its own events."""

MAX_CURSOR: Final = MAX_CHANNELS * 30
"""Characters of the longest cursor: 12 of an epoch, 16 of an offset, and what stands between."""


class Position(NamedTuple):
    """A place in one channel's log: `epoch` (random, 48 bits, one per log) and `offset` (the number
    of messages ordered in that epoch so far, from 0)."""

    epoch: int
    offset: int

    def __str__(self) -> str:
        return f"{self.epoch:x}-{self.offset}"


FOREIGN: Final = Position(-1, 0)
"""The place of a client that came with a cursor of another server, or with none that can be read: no log has it, since no epoch is
negative. So such a client is told a gap, and then gets everything that is kept. It is never sent to a client."""

OLDEST: Final = "oldest"
"""Where a subscriber starts to get everything that is kept."""

Oldest = Literal["oldest"]
Since = Position | Oldest | None
"""Where a subscriber starts: after a position, at the oldest message kept, or (None) now."""


class Publication(NamedTuple):
    """What a publisher asks for, before it has an order.

    `data` is UTF-8, already checked; `key` is the idempotency key, unique per channel.
    """

    channel: str
    data: bytes
    type: str = DEFAULT_TYPE
    key: str | None = None


class Receipt(NamedTuple):
    """A publication was ordered at `position`, for so many `subscribers`, counted in all processes."""

    position: Position
    subscribers: int


class Sent(NamedTuple):
    """A message went to those of `targets` channels that are held; `delivered` counts the subscribers of
    those. `position` is its place in the first target, or None when nobody holds that."""

    position: Position | None
    targets: int
    delivered: int


class ChannelInfo(NamedTuple):
    """What is known of a channel: subscribers in all processes, newest position, messages kept."""

    subscribers: int
    position: Position
    messages: int


class Message:
    """One ordered message of one channel. Immutable but for `frames`.

    `time` is the backplane's clock in seconds when it was ordered; history ages by it.
    `frames` caches the message's bytes per framing (see `comet.framing`).
    """

    __slots__ = ("channel", "data", "epoch", "frames", "offset", "time", "type")

    def __init__(self, channel: str, position: tuple[int, int], type: str, data: bytes, time: float = 0.0) -> None:
        self.channel = channel
        self.epoch, self.offset = position  # a Position; kept apart: it would cost 72 bytes a message
        self.type = type
        self.data = data
        self.time = time
        self.frames: dict[str, bytes] | None = None

    @property
    def position(self) -> Position:
        """Its place in the channel's log."""
        return Position(self.epoch, self.offset)

    @property
    def id(self) -> str:
        """The text of its position; on a subscription to this channel alone it is the cursor."""
        return str(self.position)

    @property
    def cost(self) -> int:
        """Bytes it is charged against a bound on kept or waiting messages: its data, the two encoded forms
        that `comet.framing` may keep, and the objects around them."""
        return MESSAGE_COST + 3 * len(self.data)

    @property
    def size(self) -> int:
        """Bytes that it takes to be sent, about."""
        return FRAMING + len(self.data)

    def __repr__(self) -> str:
        return f"<Message {self.channel} {self.id} {self.type} {len(self.data)} bytes>"


class Gap(NamedTuple):
    """What a subscriber is told in the place of messages that are gone: it now stands at `positions`,
    one for each of its channels, and everything that is kept follows."""

    positions: Sequence[Position]


Item = Message | Gap
"""What waits for a subscriber, in order."""


@lru_cache(maxsize=1024)
def _position(epoch: int, offset: int) -> Position:
    """One object for all clients that are delivered the same message: of 64 channels they would be 4.6 KB a client."""
    return Position(epoch, offset)


class Cursor:
    """Position of one subscriber on each of its channels, in the request's order.

    Two rows rather than a dictionary, which would be twice as large for 64 channels; and several subscribers may have the same
    `channels`. To look one up there takes less than to write the new cursor, which follows.
    """

    __slots__ = ("channels", "positions")

    def __init__(self, channels: Sequence[str], positions: Sequence[Position]) -> None:
        if len(channels) != len(positions):
            raise ValueError(f"{len(channels)} channels and {len(positions)} positions")
        self.channels = channels
        self.positions = list(positions)

    def at(self, channel: str) -> Position:
        """Return the position on one of the channels."""
        return self.positions[self.channels.index(channel)]

    def by_channel(self) -> dict[str, Position]:
        """Return the positions by channel."""
        return dict(zip(self.channels, self.positions, strict=True))

    def advance(self, item: Item) -> None:
        """Move past `item`."""
        if isinstance(item, Gap):
            self.positions = list(item.positions)
        else:
            self.positions[self.channels.index(item.channel)] = _position(item.epoch, item.offset)

    @property
    def ours(self) -> bool:
        """Whether each position is one that comet has given out. If not, an answer must not name this cursor as its start."""
        return FOREIGN not in self.positions

    def __str__(self) -> str:
        return ".".join(map(str, self.positions))


def check_channel(name: str) -> str:
    """`name` itself, or Refusal ``bad-channel``."""
    if not _CHANNEL.fullmatch(name):
        raise Refusal("bad-channel", f"A channel name is {_RULE}; {name[:80]!r} is not.")
    return name


def check_type(name: str) -> str:
    """`name` itself, or Refusal ``bad-type``: types follow the channel rule and are not reserved."""
    if not _CHANNEL.fullmatch(name):
        raise Refusal("bad-type", f"A message type is {_RULE}; {name[:80]!r} is not.")
    if name in RESERVED_TYPES:
        raise Refusal("bad-type", f"The type {name!r} has a meaning of its own to clients; use another.")
    return name


def parse_channels(text: str) -> tuple[str, ...]:
    """The channels of ``a,b,c`` in order of first appearance, doubles merged.

    Raises Refusal ``bad-channel`` for an ill-formed name or more than `MAX_CHANNELS`.
    """
    names = tuple(dict.fromkeys(check_channel(name) for name in text.split(",", MAX_CHANNELS * 2)))
    if len(names) > MAX_CHANNELS:
        raise Refusal("bad-channel", f"A request joins at most {MAX_CHANNELS} channels; open a second one for the rest.")
    return names


def parse_cursor(text: str, channels: int) -> Sequence[Since]:
    """The text of a `Cursor`, for a request of so many `channels`; ``oldest`` is the start of each.

    Raises Refusal ``bad-cursor``. A cursor of other channels is well-formed but meets other epochs:
    its reader is told a gap.
    """
    if text == OLDEST:
        return [OLDEST] * channels
    parts = text.split(".", MAX_CHANNELS)
    if len(parts) != channels:
        raise Refusal(
            "bad-cursor",
            f"This cursor is for {len(parts)} channel(s), the request names {channels}: "
            "send back a cursor with the same channels that it came from, or since=oldest.",
        )
    positions = []
    for part in parts:
        found = _POSITION.fullmatch(part)
        if not found:
            raise Refusal("bad-cursor", "A cursor is text that comet sent, or 'oldest'; start without one, or with since=oldest.")
        positions.append(Position(int(found[1], 16), int(found[2])))
    return positions


def resume_from(text: str, channels: int) -> Sequence[Since]:
    """Return where a client goes on that sends `text` as the id of its last event, for a request of so many `channels`.

    As `parse_cursor`, but a text that is no cursor for these channels is `FOREIGN` for each. A browser sends what the server
    before this one sent it as an id, and could not be told otherwise: an EventSource gives up at a refusal.
    """
    if len(text) <= MAX_CURSOR:
        try:
            return parse_cursor(text, channels)
        except Refusal:
            pass  # the gap tells it
    return [FOREIGN] * channels
