"""What clients of a load test are sent, and how each knows what it got: pure, no socket, no Locust.

A message is text: its *number*, which no other message of the run has, the time at which it was sent in nanoseconds,
and a filling. The number holds who sent it, the how-manieth of that sender it is, and what kind of message.

What is known of each client:

- *Ledger*, all clients: how many messages it got, and the sum of their numbers. At the end that is compared, client by
  client, with what was sent to whom it follows (`loadtest.audit`): one that is missing is *lost*, one too many *doubled*,
  and a sum that differs although the count is right is another message than was sent.
- *Order*, a sample of the clients: a sender waits for each answer before it sends again, so its numbers ascend.
- *Place*, clients of `/stream`, `/events` and `/poll`: ids are positions in the channel's log; each is one more than the
  last. That finds what is lost, doubled or out of order at once.

Times are `time.monotonic_ns`, one clock for all processes of a machine. With --wall-clock, for clients and senders on
several machines, they are `time.time_ns`, and latencies are as good as the clocks agree.
"""

from array import array
from typing import Final, Literal, NamedTuple

FEED: Final = 0
"""Kinds: to a user and the followers (POST /send),"""
DIRECT: Final = 1
"""to one user alone (POST /publish/user:<id>),"""
EVERYONE: Final = 2
"""to all clients (POST /publish of a channel that all have)."""

KINDS: Final = ("feed", "direct", "everyone")

KIND_MASK: Final = 3
SENDER_SHIFT: Final = 34
"""A number: 32 bits of count above the kind, and 29 of sender above them, so that 63 are enough."""

WRAP: Final = (1 << 64) - 1
"""Sums of numbers are what remains in 64 bits."""

SIZE: Final = 100
"""Bytes of a message, unless asked otherwise."""

Problem = Literal["", "lost", "doubled", "out of order", "gap"]


def number(sender: int, count: int, kind: int) -> int:
    """The number of a sender's message."""
    return sender << SENDER_SHIFT | count << 2 | kind


def body(number: int, sent: int, size: int = SIZE) -> bytes:
    """The message; `sent` in nanoseconds."""
    head = b"%d %d " % (number, sent)
    return head + b"~" * (size - len(head))


def read(text: bytes) -> tuple[int, int]:
    """Number and time of a message that starts with them. Raises ValueError."""
    first, second, _ = text.split(b" ", 2)
    return int(first), int(second)


class Ledger:
    """What each client of this process got, by index. `counts` and `sums` may be added to from outside."""

    def __init__(self) -> None:
        self.ids = array("Q")
        self.counts = array("L")
        self.sums = array("Q")

    def add(self, user: int) -> int:
        """A client that is logged in as `user`; its index."""
        self.ids.append(user)
        self.counts.append(0)
        self.sums.append(0)
        return len(self.ids) - 1

    def take(self, client: int, number: int) -> None:
        """It got this message."""
        self.counts[client] += 1
        self.sums[client] = self.sums[client] + number & WRAP


PAIRS: Final = 200_000
"""Of client and sender, whose order a process remembers: of hours with many senders it would be gigabytes otherwise."""


class Order:
    """The last number of each sender that each client of a sample got, for the first `PAIRS` of the two."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}  # a number for both: a tuple would be three objects more

    def take(self, client: int, number: int) -> Problem:
        """It got this message."""
        key = client << 64 - SENDER_SHIFT | number >> SENDER_SHIFT
        last = self._last.get(key, -1)
        if last < 0 and len(self._last) >= PAIRS:
            return ""
        self._last[key] = number
        return "" if number > last else "doubled" if number == last else "out of order"


class Place(NamedTuple):
    """Where a client stands in its channel's log."""

    epoch: bytes
    offset: int

    @classmethod
    def read(cls, text: bytes) -> "Place":
        """Of a message's id, or a cursor of one channel. Raises ValueError."""
        epoch, _, offset = text.partition(b"-")
        return cls(epoch, int(offset))

    def text(self) -> bytes:
        """As a cursor."""
        return b"%b-%d" % self

    def step(self, to: "Place") -> tuple[Problem, int]:
        """From here to the next message: what is wrong, and of how many messages."""
        if to.epoch != self.epoch:
            return "gap", 1
        if to.offset == self.offset + 1:
            return "", 0
        if to.offset > self.offset:
            return "lost", to.offset - self.offset - 1
        return ("doubled" if to.offset == self.offset else "out of order"), 1
