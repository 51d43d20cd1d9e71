"""Order, once, no silent loss: what every client of a channel may rely on, whatever it does.

The model is simple: what the publisher was told. `Publisher` notes the offset of each message it
published; a `Reader` notes, for each of its channels, where it began and what it got since. At the
end these must agree. Readers poll or stream, and are cut off, by FIN or RST, at random; they then
resume with the cursor of the last thing they got, like a browser does.

Every random choice comes from a seed that stands in the assertion message. More seeds than the
usual few: ``COMET_SEEDS=20 pytest tests/behaviour/test_delivery.py``.
"""

import contextlib
import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import gevent
import pytest
from gevent import socket

from tests.conftest import Start
from tests.harness import AMPLE, TIMEOUT, Client, Server, wait_until

SEEDS = range(int(os.environ.get("COMET_SEEDS", "2")))
KINDS = ("poll", "events", "stream")
LATE = 2 * TIMEOUT
"""Seconds after which a whole scenario has failed."""

OPEN: list[Client] = []
"""Connections that the present test made."""


@pytest.fixture(autouse=True)
def _close_connections(start: Start) -> Iterator[None]:
    """At the end of each test, before `start` stops its servers."""
    yield
    while OPEN:
        OPEN.pop().close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, hibernate: str) -> Iterator[Start]:
    """As `start`, but the same flags are the same server: a test uses channels of its own."""
    servers: dict[tuple[str, ...], Server] = {}

    def begin(*flags: str) -> Server:
        if flags not in servers:
            servers[flags] = Server(tmp_path_factory.mktemp("shared") / "server.log", *flags, COMET_HIBERNATE=hibernate)
        return servers[flags]

    yield begin
    for server in servers.values():
        server.assert_healthy()
        assert server.stop() == 0, server.log.read_text()


def connection(server: Server) -> Client:
    """A new connection, closed at the test's end if not before."""
    client = server.client()
    OPEN.append(client)
    return client


class Publisher:
    """Publishes batches over one kept-alive connection and notes what was acknowledged.

    `sent` is channel -> epoch -> offset -> data.
    """

    def __init__(self, server: Server, sent: "Log | None" = None) -> None:
        self.client = connection(server)
        self.sent: Log = defaultdict(lambda: defaultdict(dict)) if sent is None else sent

    def publish(self, *pairs: tuple[str, str]) -> list[str]:
        """Publish (channel, data) pairs in one batch; their ids."""
        body = b"\n".join(json.dumps({"channel": channel, "data": data}).encode() for channel, data in pairs)
        answer = self.client.request("POST", "/publish", body)
        assert answer.status == 200, answer
        ids = [json.loads(line)["id"] for line in answer.body.splitlines()]
        for (channel, data), name in zip(pairs, ids, strict=True):
            epoch, offset = parse(name)
            assert offset not in self.sent[channel][epoch], f"{name} of {channel} was given twice"
            self.sent[channel][epoch][offset] = data
        return ids

    def head(self, channel: str) -> int:
        """The newest offset of a channel that had one epoch only, or none yet."""
        return max((offset for messages in self.sent[channel].values() for offset in messages), default=0)

    def finish(self, names: Iterable[str], goal: dict[str, int]) -> None:
        """Publish a last message on each channel when all others are out. The goal is set before, so
        that no reader waits for more when it has this one."""
        names = list(names)
        goal.update({channel: self.head(channel) + 1 for channel in names})
        self.publish(*((channel, "last") for channel in names))


Log = defaultdict[str, defaultdict[str, dict[int, str]]]


def parse(position: str) -> tuple[str, int]:
    """Epoch and offset."""
    epoch, _, offset = position.partition("-")
    return epoch, int(offset)


class Reader:
    """One client that follows `channels`, and everything it was given.

    `starts` has a position for each channel, the first cursor; `got` the messages since, (epoch,
    offset, data), in the order of arrival; `gaps` how often it was told one.
    """

    def __init__(self, server: Server, kind: str, channels: Sequence[str], cursor: str | None = None) -> None:
        self.server = server
        self.kind = kind
        self.channels = channels
        self.cursor = cursor
        self.starts: dict[str, tuple[str, int]] = {}
        self.got: dict[str, list[tuple[str, int, str]]] = {channel: [] for channel in channels}
        self.gaps = 0
        self.connections = 0
        self.client: Client | None = None
        self._text = b""

    def __repr__(self) -> str:
        return f"{self.kind} of {','.join(self.channels)} at {self.cursor} after {self.connections} connections"

    # -- one connection

    def connect(self) -> None:
        """Open a connection; a stream's first answer is awaited."""
        self.connections += 1
        self.client = connection(self.server)
        self._text = b""
        if self.kind == "poll":
            if self.cursor is None:
                self.take(0.001)  # who does not wait would stand in no log where there is none yet
            return
        headers = {} if self.cursor is None else {"Last-Event-ID": self.cursor}
        self.client.ask("GET", f"/{self.kind}/{','.join(self.channels)}", headers=headers)
        head = self.client.read_head()
        assert head.status == 200, head
        if self.cursor is None or self.cursor == "oldest":
            self.begin(head.headers["comet-cursor"])

    def begin(self, cursor: str) -> None:
        """Note the first cursor."""
        self.cursor = cursor
        self.starts = {channel: parse(part) for channel, part in zip(self.channels, cursor.split("."), strict=True)}

    def disconnect(self, reset: bool = False) -> None:
        """Close or reset; what was not taken yet is thrown away."""
        if self.client is not None:
            OPEN.remove(self.client)
            self.client.reset() if reset else self.client.close()
            self.client = None

    def take(self, timeout: float = 15) -> None:
        """One poll, or what the next chunk of a stream completes."""
        assert self.client is not None
        if self.kind == "poll":
            query = f"?timeout={timeout}" + (f"&since={self.cursor}" if self.cursor else "")
            answer = self.client.request("GET", f"/poll/{','.join(self.channels)}{query}")
            assert answer.status == 200, answer
            document = answer.json
            if self.cursor is None:  # what came while it was answered is past the cursor already
                before = {message["channel"]: message["id"] for message in reversed(document["messages"])}
                self.begin(document["cursor"])
                for channel, first in before.items():
                    self.starts[channel] = (parse(first)[0], parse(first)[1] - 1)
            self.gaps += document["gap"]
            for message in document["messages"]:
                self.note(message["channel"], message["id"], message["data"])
            self.cursor = document["cursor"]
            return
        end = b"\n" if self.kind == "stream" else b"\n\n"
        while end not in self._text:
            chunk = self.client.read_chunk()
            if not chunk:
                raise EOFError
            self._text += chunk
        *parts, self._text = self._text.split(end)
        for part in parts:
            if self.kind == "stream":
                self._line(part)
            else:
                self._event(part)

    def _line(self, line: bytes) -> None:
        if not line:
            return
        document = json.loads(line)
        if "gap" in document:
            self.gaps += 1
        else:
            self.note(document["channel"], document["id"], document["data"])
        self.cursor = document.get("cursor", document.get("id"))

    def _event(self, block: bytes) -> None:
        fields = dict(line.split(": ", 1) for line in block.decode().split("\n") if not line.startswith(":"))
        if fields.get("event") == "gap":
            self.gaps += 1
        elif "data" in fields:
            before = self.cursor.split(".") if self.cursor else []
            after = fields["id"].split(".")
            moved = [index for index, part in enumerate(after) if before[index] != part]
            assert len(moved) == 1, f"an event moves the cursor of one channel: {before} {after}"
            self.note(self.channels[moved[0]], after[moved[0]], fields["data"])
        self.cursor = fields.get("id", self.cursor)

    def note(self, channel: str, name: str, data: str) -> None:
        """A message arrived."""
        self.got[channel].append((*parse(name), data))

    # -- many connections

    def at(self, heads: dict[str, int]) -> bool:
        """Whether its cursor has reached these offsets, where there are any: the goal of a scenario."""
        if not heads or not self.cursor or self.cursor == "oldest":
            return False
        here = dict(zip(self.channels, map(parse, self.cursor.split(".")), strict=True))
        return all(here[channel][1] >= heads[channel] for channel in self.channels)

    def run(self, goal: dict[str, int], dice: random.Random, patience: float, pause: float) -> None:
        """Read until `goal` is set and reached, being cut off every `patience` seconds or so, and away
        for `pause` or so."""
        while not self.at(goal):
            try:
                with gevent.Timeout(dice.expovariate(1 / patience), False):
                    if self.client is None:
                        self.connect()
                    while not self.at(goal):
                        self.take()
            finally:
                self.disconnect(reset=dice.random() < 0.5)
            gevent.sleep(dice.expovariate(1 / pause))

    def check(self, sent: Log, note: str) -> None:
        """Everything since the start, once, in order, and nothing else; no gaps."""
        assert self.gaps == 0, f"{note}: {self} was told {self.gaps} gaps"
        for channel in self.channels:
            epoch, start = self.starts[channel]
            offsets = [offset for _, offset, _ in self.got[channel]]
            messages = sent[channel][epoch] if channel in sent else {}
            expected = [(epoch, offset, data) for offset, data in sorted(messages.items()) if offset > start]
            assert self.got[channel] == expected, (
                f"{note}: {self} began {channel} at {start} and should have {start + 1} to {max(messages, default=0)}: "
                f"{len(offsets)} of {len(expected)}, missing {sorted({one[1] for one in expected} - set(offsets))[:5]}, "
                f"doubled {sorted({one for one in offsets if offsets.count(one) > 1})[:5] if len(offsets) < 2000 else '?'}, "
                f"first unlike {next((pair for pair in zip(self.got[channel], expected, strict=False) if pair[0] != pair[1]), None)}"
            )


@contextlib.contextmanager
def readers(*them: Reader) -> Iterator[tuple[Reader, ...]]:
    """Connect them, and disconnect them at the end."""
    try:
        for reader in them:
            reader.connect()
        yield them
    finally:
        for reader in them:
            reader.disconnect()


def history(server: Server, channel: str, since: str = "oldest") -> Any:
    """The document of /history, as much as one answer has."""
    answer = server.request("GET", f"/channels/{channel}/history?since={since}&limit=1000")
    assert answer.status == 200, answer
    return answer.json


def finish(greenlets: Iterable[gevent.Greenlet], note: str) -> None:
    """Wait for all; the first failure is raised, and lateness is one."""
    greenlets = list(greenlets)
    gevent.joinall(greenlets, timeout=LATE, raise_error=True)
    late = [one for one in greenlets if not one.ready()]
    gevent.killall(late)
    assert not late, f"{note}: {len(late)} greenlets did not end within {LATE} s"


# -- one client, ten thousand messages


@pytest.mark.parametrize("kind", KINDS)
def test_one_client_that_comes_and_goes_sees_ten_thousand_messages_once_and_in_order(start: Start, kind: str) -> None:
    count, seed = 10_000, 42
    server = start("--history-size", str(count), "--backlog", str(100 << 20))
    dice = random.Random(seed)
    reader, goal = Reader(server, kind, ["ten"]), {"ten": count}
    reader.connect()
    publisher = Publisher(server)

    def publish() -> None:
        made = 0
        while made < count:
            size = min(count - made, dice.randint(1, 25))
            publisher.publish(*(("ten", f"{made + number} é") for number in range(size)))
            made += size
            gevent.sleep(dice.uniform(0, 0.003))

    def follow() -> None:
        if kind != "poll":
            return reader.run(goal, random.Random(seed + 1), 0.04, 0.01)
        delays = random.Random(seed + 2)
        while not reader.at(goal):
            reader.take()
            gevent.sleep(delays.choice((0, 0, 0.001, 0.01, 0.05)))
        reader.disconnect()
        return None

    finish([gevent.spawn(publish), gevent.spawn(follow)], f"seed {seed}")
    reader.check(publisher.sent, f"seed {seed}")
    assert [data for _, _, data in reader.got["ten"]] == [f"{number} é" for number in range(count)]
    assert kind == "poll" or reader.connections > 20, f"it was cut off only {reader.connections} times"


# -- many clients


@pytest.mark.parametrize("seed", SEEDS)
def test_two_hundred_clients_on_fifty_channels_match_the_model(server: Server, seed: int) -> None:
    dice = random.Random(seed)
    names = [f"crowd-{seed}-{number}-{time.monotonic_ns()}" for number in range(50)]
    crowd = [Reader(server, dice.choice(KINDS), dice.sample(names, dice.randint(1, 3))) for _ in range(200)]
    goal: dict[str, int] = {}
    publishers = [Publisher(server)]
    publishers += [Publisher(server, publishers[0].sent) for _ in range(3)]

    def publish(one: Publisher, dice: random.Random) -> None:
        until, made = time.monotonic() + 2, 0
        while time.monotonic() < until or made < 150:
            favourite = dice.choice(names)
            size = dice.choice((1, 1, 2, 5, 30))
            one.publish(*((favourite if dice.random() < 0.5 else dice.choice(names), f"{seed} {dice.random()}") for _ in range(size)))
            made += size
            gevent.sleep(dice.uniform(0, 0.02))

    def follow(reader: Reader, dice: random.Random) -> None:
        gevent.sleep(dice.uniform(0, 1))
        reader.run(goal, dice, dice.choice((0.1, 0.5, 5)), 0.05)

    followers = [gevent.spawn(follow, reader, random.Random(f"{seed} {number}")) for number, reader in enumerate(crowd)]
    finish([gevent.spawn(publish, one, random.Random(f"{seed} p{number}")) for number, one in enumerate(publishers)], f"seed {seed}")
    last = Publisher(server, publishers[0].sent)  # a connection that was not idle meanwhile
    last.finish(names, goal)
    finish(followers, f"seed {seed}")
    for reader in crowd:
        reader.check(last.sent, f"seed {seed}")
    assert sum(len(messages) for reader in crowd for messages in reader.got.values()) > 1000, f"seed {seed}: too little happened"
    assert sum(reader.connections for reader in crowd) > 400, f"seed {seed}: too little happened"
    wait_until(lambda: server.clients() == 0)


# -- what is gone is told


def resumed(server: Server, kind: str, channels: Sequence[str], cursor: str) -> Reader:
    """A reader that was away and comes back with `cursor`; it has what was there for it at once."""
    reader = Reader(server, kind, channels, cursor)
    reader.starts = {channel: parse(part) for channel, part in zip(channels, cursor.split("."), strict=True)}
    reader.connect()
    return reader


def settle(server: Server, reader: Reader, channel: str, mark: str) -> None:
    """Publish `mark` and read until it arrives: everything before it has then been told."""
    name = parse(server.publish(channel, mark))
    while (*name, mark) not in reader.got[channel]:
        reader.take()


def assert_gap_once(server: Server, kind: str, channel: str, cursor: str) -> None:
    """Resuming with `cursor` tells one gap, then all that is kept; resuming from there tells none."""
    # (what is kept is read after the reader has it: reading counts as a use of the channel)
    reader = resumed(server, kind, [channel], cursor)
    settle(server, reader, channel, "mark")
    kept = [(*parse(message["id"]), message["data"]) for message in history(server, channel)["messages"]]
    reader.disconnect()
    assert reader.gaps == 1, f"{reader}: {reader.gaps} gaps"
    # the mark may itself have pushed the oldest out
    assert reader.got[channel][-len(kept) :] == kept
    assert len(reader.got[channel]) - len(kept) in (0, 1), (reader.got[channel], kept)
    offsets = [offset for _, offset, _ in reader.got[channel]]
    assert offsets == list(range(offsets[0], offsets[0] + len(offsets)))
    assert reader.cursor is not None
    again = resumed(server, kind, [channel], reader.cursor)
    settle(server, again, channel, "mark again")
    again.disconnect()
    assert again.gaps == 0, f"{again} was told a gap again"
    assert [data for _, _, data in again.got[channel]] == ["mark again"]


@pytest.mark.parametrize("kind", KINDS)
def test_eviction_by_count_is_told_once_and_all_that_is_kept_follows(shared: Start, kind: str) -> None:
    server = shared("--history-size", "5")
    a = f"count-{kind}"
    publisher = Publisher(server)
    first, *_ = publisher.publish(*((a, str(number)) for number in range(4)))
    epoch, _ = parse(first)
    publisher.publish(*((a, str(number)) for number in range(4, 8)))
    # offsets 4 to 8 are kept: a reader that stands at 3 misses nothing, one at 2 does
    whole = resumed(server, kind, [a], f"{epoch}-3")
    while not whole.at({a: 8}):
        whole.take()
    whole.disconnect()
    assert (whole.gaps, [offset for _, offset, _ in whole.got[a]]) == (0, [4, 5, 6, 7, 8])
    assert_gap_once(server, kind, a, f"{epoch}-2")


@pytest.mark.parametrize("kind", KINDS)
def test_eviction_by_bytes_is_told_once_and_all_that_is_kept_follows(start: Start, kind: str) -> None:
    server = start("--history-bytes", "20000")
    publisher = Publisher(server)
    first, *_ = publisher.publish(("a", "x" * 500), ("a", "y" * 500))
    publisher.publish(*((f"other-{number % 3}", "z" * 500) for number in range(9)))
    publisher.publish(*(("a", "w" * 500) for _ in range(3)))
    publisher.publish(*((f"other-{number % 3}", "z" * 500) for number in range(9)))
    kept = server.request("GET", "/channels/a").json
    assert kept["messages"] < 5, "nothing was evicted: the test is wrong"
    assert server.stats()["history_bytes"] <= 20000
    assert_gap_once(server, kind, "a", first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_keeps_nothing_is_still_true(shared: Start, kind: str) -> None:
    server = shared("--history-size", "0")
    a = f"nothing-{kind}"
    with readers(Reader(server, kind, [a])) as (reader,):
        if kind == "poll":
            cursor = reader.cursor
            name = server.publish(a, "lost")
            reader.take()
            assert (reader.gaps, reader.got[a], reader.cursor) == (1, [], name)
            assert cursor != name
            waiting = gevent.spawn(reader.take)
            wait_until(lambda: server.request("GET", f"/channels/{a}").json["subscribers"] == 1)
            server.publish(a, "live")
            finish([waiting], kind)
            assert (reader.gaps, [data for _, _, data in reader.got[a]]) == (1, ["live"])
        else:
            for number in range(10):
                server.publish(a, str(number))
            while len(reader.got[a]) < 10:
                reader.take()
            assert reader.gaps == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_deleted_log_is_told_once(server: Server, kind: str) -> None:
    channel = f"deleted-under-{kind}"
    cursor = server.publish(channel, "old")
    server.request("DELETE", f"/channels/{channel}")
    assert_gap_once(server, kind, channel, cursor)
    cursor = server.publish(channel, "newer")
    server.request("DELETE", f"/channels/{channel}")
    for number in range(10):
        server.publish(channel, f"new {number}")
    assert_gap_once(server, kind, channel, cursor)


@pytest.mark.parametrize("kind", KINDS)
def test_aged_messages_are_a_gap_for_who_missed_them_and_none_for_who_did_not(shared: Start, kind: str) -> None:
    server = shared("--history-age", "1")
    a = f"aged-{kind}"
    first = server.publish(a, "one")
    last = server.publish(a, "two")
    wait_until(lambda: server.request("GET", f"/channels/{a}").json["messages"] == 0)
    assert_gap_once(server, kind, a, first)
    there = resumed(server, kind, [a], server.request("GET", f"/channels/{a}").json["position"])
    settle(server, there, a, "three")
    there.disconnect()
    assert there.gaps == 0, f"{there}: it had {last} and everything after"


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_freed_after_lingering_is_a_gap(shared: Start, kind: str) -> None:
    server = shared("--linger", "1")
    a = f"lingers-{kind}"
    reader = Reader(server, kind, [a])
    reader.connect()
    cursor = reader.cursor
    server.publish(a, "seen")
    reader.disconnect()
    wait_until(lambda: server.request("GET", f"/channels/{a}").status == 404)
    assert cursor is not None
    assert_gap_once(server, kind, a, cursor)


def test_a_connected_client_keeps_its_channel_beyond_linger_and_age(start: Start) -> None:
    server = start("--linger", "0.2", "--history-age", "0.2")
    with readers(*(Reader(server, kind, ["a"]) for kind in ("events", "stream"))) as them:
        name = server.publish("a", "one")
        wait_until(lambda: server.request("GET", "/channels/a").json["messages"] == 0)
        gone = f"linger-{time.monotonic_ns()}"
        server.publish(gone, "x")
        wait_until(lambda: server.request("GET", f"/channels/{gone}").status == 404)
        assert parse(server.publish("a", "two")) == (parse(name)[0], 2)
        for reader in them:
            while len(reader.got["a"]) < 2:
                reader.take()
            assert (reader.gaps, [data for _, _, data in reader.got["a"]]) == (0, ["one", "two"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_gap_on_one_of_several_channels_neither_doubles_nor_loses_on_the_others(shared: Start, kind: str) -> None:
    server = shared("--history-size", "5")
    a, b, c = names = [f"several-{kind}-{letter}" for letter in "abc"]
    publisher = Publisher(server)
    away = Reader(server, "poll", names)
    away.connect()
    publisher.publish((a, "a1"), (b, "b1"), (c, "c1"))
    while not away.at(dict.fromkeys(names, 1)):
        away.take()
    away.disconnect()
    assert away.cursor is not None
    publisher.publish(*((b, f"b{number}") for number in range(2, 12)), (a, "a2"), (c, "c2"))
    reader = resumed(server, kind, names, away.cursor)
    heads = {channel: publisher.head(channel) for channel in names}
    while not reader.at(heads):
        reader.take()
    reader.disconnect()
    assert reader.gaps == 1
    got = {channel: [data for _, _, data in messages] for channel, messages in reader.got.items()}
    assert got == {a: ["a2"], b: ["b7", "b8", "b9", "b10", "b11"], c: ["c2"]}
    assert reader.cursor is not None
    again = resumed(server, kind, names, reader.cursor)
    settle(server, again, b, "b12")
    again.disconnect()
    assert again.gaps == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_with_a_tiny_history_every_hole_is_told(start: Start, seed: int) -> None:
    """Readers that are away too long lose messages; each hole has a gap in it, and nothing else has."""
    server = start("--history-size", "20", "--history-bytes", "60000")
    dice = random.Random(seed)
    names = [f"tiny-{number}" for number in range(6)]
    goal: dict[str, int] = {}
    publisher = Publisher(server)

    class Careful(Reader):
        """Notes gaps in place, as (epoch, -1, "") in every channel."""

        def note(self, channel: str, name: str, data: str) -> None:
            super().note(channel, name, data)
            epoch, offset = parse(name)
            here = self.places.setdefault(channel, self.starts[channel])
            if (epoch, offset) != (here[0], here[1] + 1):
                self.holes.append((channel, here, (epoch, offset), self.gaps))
            self.places[channel] = (epoch, offset)

        def begin(self, cursor: str) -> None:
            super().begin(cursor)
            self.places: dict[str, tuple[str, int]] = {}
            self.holes: list[tuple[str, tuple[str, int], tuple[str, int], int]] = []

    crowd = [Careful(server, KINDS[number % 3], dice.sample(names, dice.randint(1, 2))) for number in range(30)]

    def publish() -> None:
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            publisher.publish(*((dice.choice(names), "x" * dice.choice((1, 300))) for _ in range(dice.choice((1, 5, 40)))))
            gevent.sleep(dice.uniform(0, 0.03))
        publisher.finish(names, goal)

    def follow(reader: Reader, dice: random.Random) -> None:
        reader.connect()
        reader.run(goal, dice, 0.2, dice.choice((0.001, 0.3)))

    finish(
        [gevent.spawn(publish), *(gevent.spawn(follow, reader, random.Random(f"{seed} {number}")) for number, reader in enumerate(crowd))],
        f"seed {seed}",
    )
    for reader in crowd:
        for channel, here, there, gaps in reader.holes:
            assert there[0] == here[0], f"seed {seed}: {reader} changed epoch on {channel}"
            assert there[1] > here[1], f"seed {seed}: {reader} went from {here} back to {there} on {channel}"
            assert gaps > 0, f"seed {seed}: {reader} lost {here} to {there} of {channel} in silence"
        holes = len({gaps for *_, gaps in reader.holes})
        assert holes <= reader.gaps, f"seed {seed}: {reader} has {holes} holes and {reader.gaps} gaps"
        for channel in reader.channels:
            for epoch, offset, data in reader.got[channel]:
                assert publisher.sent[channel][epoch][offset] == data, f"seed {seed}: {reader}"
    assert any(reader.holes for reader in crowd), f"seed {seed}: nothing was evicted: the test is wrong"


# -- joining while messages run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("since", ["oldest", "cursor", "now"])
def test_joining_while_a_publisher_runs_leaves_no_seam(shared: Start, kind: str, since: str) -> None:
    size = 400 if since == "oldest" else 100_000  # the oldest are taken away while it starts from there
    server = shared("--history-size", str(size), "--backlog", str(100 << 20))
    seam = f"seam-{since}-{kind}"
    publisher = Publisher(server)
    goal: dict[str, int] = {}
    first_id, *_ = publisher.publish(*((seam, str(number)) for number in range(100)))
    epoch, _ = parse(first_id)
    pipeline = 40
    stopped = False

    def publish() -> None:
        while not stopped:
            publisher.publish(*((seam, str(number)) for number in range(pipeline)))

    def join(reader: Reader) -> None:
        before = publisher.head(seam)
        if since == "oldest":
            reader.cursor = "oldest"
        elif since == "cursor":
            reader.begin(f"{epoch}-{max(0, before - 100)}")
        reader.connect()
        if since == "oldest" and kind == "poll":
            reader.take()
            reader.starts[seam] = (epoch, reader.got[seam][0][1] - 1)
        first = reader.starts[seam][1] + 1
        # at most one batch more is ordered and not acknowledged to the publisher yet
        after = publisher.head(seam) + pipeline
        if since == "oldest":
            assert max(1, before - size + 1) <= first <= max(1, after - size + 1), (before, first, after)
        elif since == "now":
            assert before < first <= after + 1, (before, first, after)
        while not reader.at(goal):
            reader.take()
        reader.disconnect()

    running = gevent.spawn(publish)
    crowd = [Reader(server, kind, [seam]) for _ in range(40)]
    joining = []
    for number, reader in enumerate(crowd):
        joining.append(gevent.spawn(join, reader))
        gevent.sleep(0.005 if number % 10 else 0.03)
    stopped = True
    finish([running], since)
    # polls must not be left behind by more than is kept: they have caught up before the last message
    heads = {seam: publisher.head(seam)}
    wait_until(lambda: all(reader.at(heads) for reader in crowd) or any(one.ready() for one in joining))
    publisher.finish([seam], goal)
    finish(joining, since)
    if kind == "poll" and since == "oldest":  # one that was slower than the publisher may have lost some, and is then told
        for reader in crowd:
            offsets = [offset for _, offset, _ in reader.got[seam]]
            holes = sum(second != first + 1 for first, second in zip([reader.starts[seam][1], *offsets], offsets, strict=False))
            assert holes <= reader.gaps, f"{reader}: {holes} holes, {reader.gaps} gaps"
            assert offsets == sorted(set(offsets)), f"{reader}: doubled or out of order"
    else:
        for reader in crowd:
            reader.check(publisher.sent, f"{kind} since {since}")


# -- one slow reader


def test_a_slow_reader_delays_neither_the_others_nor_the_publisher(start: Start) -> None:
    server = start("--backlog", "300000", "--busy-backlog", "300000", "--history-size", "5000", "--send-timeout", "300")
    publisher = Publisher(server)
    slow = Reader(server, "stream", ["wide"])
    slow.client = connection(server)
    slow.client.ask("GET", "/stream/wide")
    slow.begin(slow.client.read_head().headers["comet-cursor"])
    body = "x" * 20_000
    others = [Reader(server, kind, ["wide"]) for kind in ("events", "stream", "poll")]
    with readers(*others):
        slowest = slowest_delivery = 0.0
        count = 600  # 12 MB: more than the socket buffers of the slow one and its backlog
        for number in range(1, count + 1):
            began = time.monotonic()
            publisher.publish(("wide", f"{number} {body}"))
            slowest = max(slowest, time.monotonic() - began)
            for reader in others:
                while not reader.at({"wide": number}):
                    reader.take()
            slowest_delivery = max(slowest_delivery, time.monotonic() - began)
        for reader in others:
            reader.check(publisher.sent, "beside a slow reader")
        assert slowest_delivery < AMPLE, f"a publish took up to {slowest:.2f} s, a delivery up to {slowest_delivery:.2f} s"
        # the slow one reads on now: a prefix in order, then a proper end, and the rest by its cursor
        with pytest.raises(EOFError):
            while True:
                slow.take()
        had = len(slow.got["wide"])
        assert 0 < had < count
        assert server.stats()["closed"]["backlog-bytes"] == 1
        slow.disconnect()
        slow.connect()
        while not slow.at({"wide": count}):
            slow.take()
        slow.disconnect()
        slow.check(publisher.sent, "the slow reader itself")


def test_a_client_that_never_reads_is_closed_in_time_and_counted(start: Start) -> None:
    server = start("--send-timeout", "0.5")
    publisher = Publisher(server)
    with Client(server.port) as stuck, readers(Reader(server, "events", ["w"])) as (other,):
        stuck.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.ask("GET", "/stream/w")
        stuck.read_head()
        wait_until(lambda: server.clients() == 2)
        number = 0
        while server.stats()["clients"]["stream"]:
            publisher.publish(("w", f"{number} " + "x" * 50_000))
            number += 1
            while len(other.got["w"]) < number:
                other.take()
            assert number < 2000, "it is never closed"
        closed = server.stats()["closed"]
        assert sum(closed.values()) == 1
        assert set(closed) <= {"backlog-time", "backlog-bytes"}, closed
        assert [data.split(" ")[0] for _, _, data in other.got["w"]] == [str(one) for one in range(number)]
