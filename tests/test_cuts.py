"""A connection that breaks after any byte: whoever resumes by what it has read is told of every message, or of a gap.

Seeded histories happen to one subscriber: what it came with, what is published, lost and read anew. Then its answer is cut
after every single byte. Pure: no socket, no server (`tests/behaviour/test_cuts.py` has both). More histories than the usual:
``COMET_SEEDS=1000 pytest tests/test_cuts.py``.
"""

import json
import os
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest

from comet.framing import LINES, POLL, Framing, ServerSentEvents
from comet.history import History, Joined
from comet.message import FOREIGN, Position, Since, parse_cursor
from tests import readers
from tests.readers import Read
from tests.test_subscriber import Client

SEEDS = range(int(os.environ.get("COMET_SEEDS", "40")))

EVENTS = ServerSentEvents(2000)

Reader = Callable[[bytes, bytes], Read]
"""Makes of an answer's headers and the part of its body that arrived what a client knows."""


def _start(headers: bytes) -> str | None:
    return headers.decode() or None


def _poll(headers: bytes, body: bytes) -> Read:
    if not body.endswith(b"}"):
        return Read([], 0, None)
    try:
        document = json.loads(body)
    except ValueError:
        return Read([], 0, None)
    return Read([message["id"] for message in document["messages"]], int(document["gap"]), document["cursor"])


def _ends_with_id(body: bytes) -> bool:
    return body.endswith(b"\n") and body[:-1].rpartition(b"\n")[2].startswith(b"id: ")


def _eager(headers: bytes, body: bytes) -> Read:
    """Read as npm's eventsource 1 and 2 do. In front of a block's last newline nothing helps such a reader: that byte is granted."""
    return readers.events(body + b"\n" if _ends_with_id(body) else body, eager=True)


READERS: dict[str, tuple[Framing, Reader]] = {
    "events, by the standard": (EVENTS, lambda headers, body: readers.events(body, eager=False)),
    "events, eagerly": (EVENTS, _eager),
    "stream": (LINES, lambda headers, body: readers.lines(body, _start(headers))),
    "poll": (POLL, _poll),
}


class World:
    """The logs of some channels, and one client of them."""

    def __init__(self, seed: int, framing: Framing, channels: Sequence[str]) -> None:
        self.dice = random.Random(seed)
        self.epochs = 1
        self.logs = {channel: self._log() for channel in channels}
        self.lost = self.shortened = False
        """Messages after the client's start can't be had any more."""
        for channel in channels:
            self._publish(channel, self.dice.randint(0, 6))
            self.logs[channel].drop(self.dice.randint(0, 3))
        self.client = Client(*channels, framing=framing)
        self.since = self._since()
        self.body = b""
        self._begin()

    def _log(self) -> History:
        self.epochs += 1
        return History(self.epochs)

    def _publish(self, channel: str, count: int) -> list[Position]:
        log = self.logs[channel]
        return [log.append(channel, "message", b"%d" % number, 0.0).position for number in range(count)]

    def _since(self) -> list[Since]:
        kind = self.dice.choice(("now", "oldest", "ours", "ours", "gone", "foreign"))
        if kind == "now":
            return [None] * len(self.logs)
        if kind == "oldest":
            return ["oldest"] * len(self.logs)
        if kind == "foreign":
            return [FOREIGN] * len(self.logs)
        places: list[Since] = [Position(log.epoch, self.dice.randint(0, log.head)) for log in self.logs.values()]
        if kind == "gone":  # on one channel, which is enough
            places[self.dice.randrange(len(places))] = Position(1, 5)
        return places

    def _begin(self) -> None:
        """Answer the client, with messages that are delivered before the answer."""
        for channel in self.logs:
            before = self.logs[channel].head
            self._publish(channel, self.dice.randint(0, 2))
            self._offer(channel, before)
        answers = [log.since(place, self.dice.choice((None, 1, 3))) for log, place in zip(self.logs.values(), self.since, strict=True)]
        self.first = [answer.position for answer in answers]
        self.told = any(answer.gap for answer in answers)
        self.client.join(answers, *self.since)
        subscriber = self.client.subscriber
        self.headers = dict(subscriber.framing.headers(subscriber.cursor)).get("Comet-Cursor", "").encode()
        self.body = subscriber.framing.opening(subscriber.cursor)
        if not subscriber.one_shot:
            for _ in range(self.dice.randint(0, 8)):
                self.dice.choice((self.write, self.write, self.live, self.live, self.lose, self.miss, self.shorten))()
        self.write()

    def _offer(self, channel: str, after: int) -> None:
        entries = [message for message in self.logs[channel].entries or [] if message.offset > after]
        if entries:
            self.client.offer(*entries)

    def write(self) -> None:
        """Send what waits, or what a page that is asked for then has."""
        subscriber = self.client.subscriber
        items = self.client.take(0)
        if items == [] and self.client.asked:
            channel, position = self.client.asked.pop()
            self.client.page(self.logs[channel].since(position, self.dice.choice((None, 1, 3))), channel)
            items = self.client.take(0)
        if items or subscriber.one_shot:
            self.body += b"".join(subscriber.encode(items or []))

    def live(self) -> None:
        """Publish something, which is delivered."""
        channel = self.dice.choice(list(self.logs))
        before = self.logs[channel].head
        self._publish(channel, self.dice.randint(1, 3))
        self._offer(channel, before)

    def lose(self) -> None:
        """Begin another log, as a router that was restarted does, and tell."""
        channel = self.dice.choice(list(self.logs))
        self.logs[channel] = log = self._log()
        self.lost = True
        self.client.subscriber.skip({channel: log.position})

    def miss(self) -> None:
        """Let a delivery be missed; the client reads it from history."""
        channel = self.dice.choice(list(self.logs))
        self._publish(channel, 2)
        self._offer(channel, self.logs[channel].head - 1)

    def shorten(self) -> None:
        """Forget what the history of a channel has, but for the newest; who still has to read it is told."""
        log = self.logs[self.dice.choice(list(self.logs))]
        self.shortened = log.drop(len(log.entries or ()) - 1) > 0 or self.shortened


class Outcome(NamedTuple):
    """What a client got in all, before the cut and after it."""

    ids: list[str]
    gaps: int


def resume(world: World, read: Read) -> Outcome | None:
    """Let the client come back with what it knows; None if it has no claim: it knows not even where it began, and asks as before."""
    channels = list(world.logs)
    places: Sequence[Since] = world.since if read.cursor is None else parse_cursor(read.cursor, len(channels))
    if read.cursor is None and (world.since[0] is None or (world.since[0] == "oldest" and (world.lost or world.shortened))):
        return None
    joined: list[Joined] = [log.since(place) for log, place in zip(world.logs.values(), places, strict=True)]
    ids = [name.split(".") for name in read.ids]
    return Outcome(
        [part for parts in ids for part in parts] + [message.id for answer in joined for message in answer.messages],
        read.gaps + any(answer.gap for answer in joined),
    )


@pytest.mark.parametrize("channels", [("a",), ("a", "b")], ids=["one channel", "two channels"])
@pytest.mark.parametrize("reader", READERS)
def test_told_or_delivered_wherever_the_answer_breaks(reader: str, channels: Sequence[str]) -> None:
    framing, read = READERS[reader]
    gaps = wholes = 0
    for seed in SEEDS:
        world = World(seed, framing, channels)
        due = {
            f"{log.epoch:x}-{offset}"
            for log, first in zip(world.logs.values(), world.first, strict=True)
            for offset in range((first.offset if first.epoch == log.epoch else 0) + 1, log.head + 1)
        }
        for cut in range(len(world.body) + 1):
            outcome = resume(world, read(world.headers, world.body[:cut]))
            if outcome is None:
                continue
            note = f"seed {seed}, cut after {cut} of {world.body!r}"
            if world.told or world.lost:
                gaps += 1
                assert outcome.gaps, f"not told: {note}"
            elif not outcome.gaps:
                wholes += 1
                assert due <= set(outcome.ids), f"lost {due - set(outcome.ids)}: {note}"
                if len(channels) == 1:
                    assert len(outcome.ids) == len(set(outcome.ids)), f"doubled: {note}"
    assert gaps > 3 * len(SEEDS) and wholes > 3 * len(SEEDS), "the seeds are no test"
