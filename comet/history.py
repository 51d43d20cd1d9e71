"""The bounded log of one channel. Pure: no clock, no socket, no greenlet.

A backplane owns one `History` a channel: it appends what it orders and answers "what came after
this position?". An offset is never used twice within an epoch; whatever forgets or rewinds one
must make a new `History`, whose epoch is another. That is what lets a cursor be trusted: equal
epoch means that the offset still counts the same messages.

Entries are a plain list, absent until the first message: most channels of a million users have no
history, and a deque (600 bytes empty) would cost more than the channel.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from comet.message import OLDEST, Message, Position, Since

PAGE: Final = 128 << 10
"""Bytes of messages in one page, as `Message.size` counts them; one that is larger comes alone. A thousand short messages, or two of the
largest: what a client holds that takes nothing while it is replayed to."""


class Joined(NamedTuple):
    """Position of a reader, and the first page of what it has missed.

    Apply `messages` to `position` to get as far as the page; `more` messages are kept behind it, up to the newest. `gap` is true when
    something between the asked position and `messages` is gone, or can't be vouched for because the position belongs to another epoch.
    """

    position: Position
    messages: Sequence[Message]
    gap: bool
    more: int = 0

    @property
    def end(self) -> Position:
        """Position of the reader after this page."""
        return self.messages[-1].position if self.messages else self.position

    @property
    def head(self) -> Position:
        """The newest position of the log."""
        epoch, offset = self.end
        return Position(epoch, offset + self.more)


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

    def since(self, since: Since, limit: int | None = None, size: int = PAGE) -> Joined:
        """Return a page of what follows `since`, oldest first: at most `limit` messages, and at most `size` bytes of them, but at least one
        if `size` is not 0.

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
        stop = len(entries) if limit is None else min(len(entries), index + limit)
        messages = entries[index : _page_end(entries, index, stop, size)]
        return Joined(Position(self.epoch, start), messages, gap, len(entries) - index - len(messages))


def _page_end(entries: Sequence[Message], start: int, stop: int, size: int) -> int:
    """Return where a page of `entries` ends that begins at `start` and must not go beyond `stop`."""
    if size <= 0:
        return start
    for index in range(start, stop):
        size -= entries[index].size
        if size < 0:
            return max(index, start + 1)
    return stop
