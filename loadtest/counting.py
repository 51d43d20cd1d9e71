"""What one process of a load test counts, whoever in it is the client: one `Counts`, told to the master once a second.

Neighbours: `loadtest.swarm` and `loadtest.users`, which count; `loadtest.control`, which tells and sums; `loadtest.tally`,
which makes Locust's statistics of it.
"""

import struct
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from loadtest.histogram import Histogram
from loadtest.verify import EVERYONE, KIND_MASK, KINDS, Ledger, Order, Place, number

RECORD = struct.Struct("<BBQIIIQ")
"""A message sent: kind, outcome, number, user, targets, delivered (as the answer says), and when, in nanoseconds."""

REFUSED, SENT, UNSURE = 0, 1, 2
"""Outcomes: answered with an error that says it was not published; acknowledged; anything else."""

SAMPLE = 16
"""One client in so many has the order of each sender's messages checked."""

FOLLOWED = 64
"""Messages to everyone whose progress is told at a time."""


class Send(NamedTuple):
    """A `RECORD`, read."""

    kind: int
    outcome: int
    number: int
    user: int
    targets: int
    delivered: int
    sent: int


class Counts:
    """`late` is in seconds; `first_sender` the first number of a sender in this process. `clock` is in nanoseconds."""

    def __init__(self, late: float = 5.0, first_sender: int = 0, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.clock = clock
        self.judge(late)
        self.ledger = Ledger()
        self.order = Order()
        self.latencies = [Histogram() for _ in KINDS]
        self.opening = Histogram()
        self.open = 0
        """Clients that are connected and have had the start of their answer."""
        self.opened = self.received = self.bytes = self.sent = self.left = 0
        self.begun = 0
        """Publications, with those whose answer is not here yet."""
        self.failures: Counter[tuple[str, str]] = Counter()
        """By endpoint and what it was."""
        self.everyone: dict[int, list[int]] = {}
        """A message to everyone: how many have it, and when the last got it."""
        self._records = bytearray()
        self._next_sender = first_sender

    def judge(self, late: float) -> None:
        """A message that took so many seconds is a failure from now on."""
        self.late = int(min(late, 1e9) * 1e6)

    def sender(self) -> "Sender":
        """A new one."""
        self._next_sender += 1
        return Sender(self, self._next_sender - 1)

    def fail(self, where: str, what: str, count: int = 1) -> None:
        """Something that must not be."""
        self.failures[where, what] += count

    def take(self, where: str, client: int, number: int, sent: int, now: int, back: int = 0) -> None:
        """A client got a message. It has been `back` since then: what waited for it meanwhile is late by as much less."""
        self.received += 1
        self.ledger.take(client, number)
        microseconds = (now - sent) // 1000
        kind = number & KIND_MASK
        self.latencies[kind].add(microseconds)
        if kind == EVERYONE:  # how late the last has it is what is measured
            self.spread(number, now)
        elif min(microseconds, (now - back) // 1000) > self.late:
            self.fail(where, "late")
        if not client % SAMPLE:
            problem = self.order.take(client, number)
            if problem:
                self.fail(where, problem)

    def spread(self, number: int, now: int) -> None:
        """One more has this message to everyone."""
        seen = self.everyone.get(number)
        if seen is None:
            self.everyone[number] = [1, now]
            if len(self.everyone) > FOLLOWED:
                del self.everyone[next(iter(self.everyone))]
        else:
            seen[0] += 1
            seen[1] = now

    def step(self, where: str, place: Place, to: Place) -> None:
        """A client that knows its place got the message at another."""
        problem, count = place.step(to)
        if problem:
            self.fail(where, problem, count)

    def record(self, send: Send) -> None:
        """A message was sent."""
        self.sent += send.outcome == SENT
        self._records += RECORD.pack(*send)

    def report(self) -> dict[str, Any]:
        """All that is new since the last one, and the totals; plain values, for a message to another machine."""
        failures, self.failures = self.failures, Counter()
        records, self._records = bytes(self._records), bytearray()
        return {
            "open": self.open, "opened": self.opened, "received": self.received, "bytes": self.bytes, "sent": self.sent, "left": self.left,
            "begun": self.begun, "clients": len(self.ledger.ids),
            "latencies": [one.take() for one in self.latencies],
            "opening": self.opening.take(),
            "failures": [[*key, count] for key, count in failures.items()],
            "everyone": [[number, *seen] for number, seen in self.everyone.items()],
            "sends": records,
        }  # fmt: skip

    def account(self) -> dict[str, bytes]:
        """What each client got."""
        return {name: getattr(self.ledger, name).tobytes() for name in ("ids", "counts", "sums")}


class Sender:
    """Numbers the messages of one who waits for each answer."""

    def __init__(self, counts: Counts, sender: int) -> None:
        self.counts = counts
        self._sender = sender
        self._count = 0

    def number(self, kind: int) -> int:
        """The next message's."""
        self._count += 1
        return number(self._sender, self._count, kind)
