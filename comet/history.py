"""The bounded log of one channel. Pure: no clock, no socket, no greenlet.

A backplane owns one `History` a channel: it appends what it orders and answers "what came after
this position?". An offset is never used twice within an epoch; whatever forgets or rewinds one
must make a new `History`, whose epoch is another. That is what lets a cursor be trusted: equal
epoch means that the offset still counts the same messages.

Entries are a plain list, absent until the first message: most channels of a million users have no
history, and a deque (600 bytes empty) would cost more than the channel.
"""

from collections.abc import Sequence
from typing import NamedTuple

from comet.message import OLDEST, Message, Position, Since


class Joined(NamedTuple):
    """Where a reader stands and what it has missed: apply `messages` to `position` to reach the head.

    `gap` is true when something between the asked position and `messages` is gone, or can't be
    vouched for because the position belongs to another epoch.
    """

    position: Position
    messages: Sequence[Message]
    gap: bool


class History:
    """`epoch` and `head` (the newest offset) of a log, and the messages that are kept of it."""

    __slots__ = ("entries", "epoch", "head")

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.head = 0
        self.entries: list[Message] | None = None

    @property
    def position(self) -> Position:
        """The newest position."""
        return Position(self.epoch, self.head)

    def append(self, channel: str, type: str, data: bytes, time: float) -> Message:
        """Order a message: it gets the next offset and is kept."""
        self.head += 1
        message = Message(channel, (self.epoch, self.head), type, data, time)
        if self.entries is None:
            self.entries = [message]
        else:
            self.entries.append(message)
        return message

    def drop(self, count: int) -> int:
        """Forget the `count` oldest messages; answers the bytes this frees (see `Message.cost`)."""
        entries = self.entries
        if entries is None or count <= 0:
            return 0
        if count >= len(entries):
            gone, self.entries = entries, None
        else:
            gone = entries[:count]
            del entries[:count]
        return gone[0].cost if len(gone) == 1 else sum(message.cost for message in gone)

    def trim(self, most: int, before: float) -> int:
        """Keep at most `most` messages and none ordered earlier than `before`; answers the bytes freed."""
        entries = self.entries
        if entries is None:
            return 0
        count = max(0, len(entries) - most)
        while count < len(entries) and entries[count].time < before:
            count += 1
        return self.drop(count)

    def since(self, since: Since, limit: int | None = None) -> Joined:
        """What follows `since`, at most `limit` messages of it, oldest first.

        A position of another epoch, beyond the head, or from before what is kept is a gap; then
        everything kept follows.
        """
        entries = self.entries or []
        first = self.head - len(entries)  # the offset before the oldest entry: entries are contiguous
        gap = False
        if since is None:
            start = self.head
        elif since == OLDEST:
            start = first
        else:
            epoch, start = since
            if epoch != self.epoch or not first <= start <= self.head:
                gap, start = True, first
        index = start - first
        messages = entries[index:] if limit is None else entries[index : index + limit]
        return Joined(Position(self.epoch, start), messages, gap)
