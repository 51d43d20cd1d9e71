"""A connection that breaks after any byte of a real server's answer: what was published is delivered, or a gap is told.

What a client has read when its connection breaks is a prefix of the answer's bytes, head included. The answer is recorded
once; then for each prefix of its first 2 KB a client comes back with what it could parse. A few breaks, seeded, are made on
real connections. `tests/test_cuts.py` does the same without a server, for what is delivered, missed and lost meanwhile.
"""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from tests import readers
from tests.conftest import only_asleep
from tests.harness import Client, Server
from tests.readers import Read
from tests.redis_server import PROGRAM, RedisServer

FIRST = 2048
"""Bytes of an answer after each of which it is cut."""

HISTORY = ("--history-size", "5")


class Case(NamedTuple):
    """Channels, the cursor that a client comes with, whether something is gone, and the texts that are kept after it."""

    channels: str
    cursor: str
    gap: bool
    kept: list[str]


def texts(name: str, count: int) -> list[str]:
    """Bodies that no other case has."""
    return [f"{name} {number}" for number in range(count)]


def fill(server: Server, channel: str, bodies: list[str]) -> list[str]:
    """Publish these; their ids."""
    return [server.publish(channel, body) for body in bodies]


def elsewhere(server: Server, name: str) -> Case:
    """A cursor of another log."""
    bodies = texts(name, 3)
    fill(server, name, bodies)
    return Case(name, "abc123-7", True, bodies)


def trimmed(server: Server, name: str) -> Case:
    """A cursor of this log, from before what is kept."""
    bodies = texts(name, 12)
    ids = fill(server, name, bodies)
    return Case(name, ids[0], True, bodies[-5:])


def deleted(server: Server, name: str) -> Case:
    """A cursor of a log that was deleted; messages are in the next."""
    ids = fill(server, name, texts("before", 2))
    server.request("DELETE", f"/channels/{name}")
    bodies = texts(name, 2)
    fill(server, name, bodies)
    return Case(name, ids[0], True, bodies)


def whole(server: Server, name: str) -> Case:
    """A cursor after which nothing is gone."""
    bodies = texts(name, 4)
    ids = fill(server, name, bodies)
    return Case(name, ids[0], False, bodies[1:])


def several(server: Server, name: str) -> Case:
    """Two channels, of which one has lost something."""
    first, second = whole(server, name), trimmed(server, f"{name}-2")
    return Case(f"{first.channels},{second.channels}", f"{first.cursor}.{second.cursor}", True, first.kept + second.kept)


CASES: list[Callable[[Server, str], Case]] = [elsewhere, trimmed, deleted, whole, several]


@pytest.fixture(scope="module", params=["one process", "two workers", "Redis"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, hibernate: str) -> Iterator[Server]:
    """A server of each kind that keeps five messages a channel."""
    folder = tmp_path_factory.mktemp("served")
    with ExitStack() as stack:
        flags = [*HISTORY]
        if request.param != "one process":
            flags += ["--workers", "2"]
        if request.param == "Redis":
            if PROGRAM is None:
                pytest.skip("there is no redis-server here: apt-get install redis-server")
            redis = RedisServer(folder)
            stack.callback(redis.stop)
            flags += ["--backplane", redis.url]
        yield stack.enter_context(Server(folder / "server.log", *flags, COMET_HIBERNATE=hibernate))


def body_of(data: bytes) -> tuple[dict[str, str], bytes] | None:
    """Headers, and what has come of the body; None while the head is not whole."""
    head, blank, rest = data.partition(b"\r\n\r\n")
    if not blank:
        return None
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head.decode().split("\r\n")[1:])}
    if headers.get("transfer-encoding") != "chunked":
        return headers, rest
    body = b""
    while b"\r\n" in rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return headers, body


class Parsed(NamedTuple):
    """What a client knows: the cursor to come back with, the messages it has, and whether it was told of a gap."""

    cursor: str | None
    messages: int
    gap: bool


def parse(path: str, data: bytes) -> Parsed:
    """Read the part of an answer that has come."""
    found = body_of(data)
    if found is None:
        return Parsed(None, 0, False)
    headers, body = found
    if path == "events":
        read = readers.events(body, eager=False)
    elif path == "stream":
        read = readers.lines(body, headers.get("comet-cursor"))
    elif len(body) < int(headers["content-length"]):
        read = Read([], 0, None)
    else:
        document = json.loads(body)
        read = Read([one["id"] for one in document["messages"]], int(document["gap"]), document["cursor"])
    return Parsed(read.cursor, len(read.ids), bool(read.gaps))


def ask(client: Client, path: str, case: Case) -> None:
    """Come with the case's cursor."""
    client.ask("GET", f"/{path}/{case.channels}", headers={"Last-Event-ID": case.cursor})


def record(server: Server, path: str, case: Case) -> bytes:
    """All bytes of an answer up to the last message that is kept."""
    with server.client() as client:
        ask(client, path, case)
        while case.kept[-1].encode() not in client.buffer or not client.buffer.endswith((b"\n\r\n", b"}")):
            assert client.more()
        return client.buffer


class Kept:
    """What the service still has, by the cursor that is asked with; each is asked once."""

    def __init__(self, server: Server, case: Case) -> None:
        self._server = server
        self._case = case
        self._known: dict[str, tuple[bool, list[str]]] = {}

    def after(self, cursor: str | None) -> tuple[bool, list[str]]:
        """Whether a gap is told, and the texts that follow; None is a client that knows no more than it came with."""
        cursor = self._case.cursor if cursor is None else cursor
        if cursor not in self._known:
            answer = self._server.request("GET", f"/poll/{self._case.channels}?timeout=0", headers={"Last-Event-ID": cursor})
            assert answer.status == 200, answer
            self._known[cursor] = answer.json["gap"], [one["data"] for one in answer.json["messages"]]
        return self._known[cursor]


def check(case: Case, before: Parsed, after: tuple[bool, list[str]], note: str) -> None:
    """Told or delivered."""
    gap, rest = after
    assert before.gap or gap or not case.gap, f"not told: {note}"
    if gap:
        assert sorted(rest) == sorted(case.kept), note
    else:
        assert before.messages + len(rest) == len(case.kept), f"lost or doubled: {note}"
        assert set(rest) <= set(case.kept), note


@pytest.mark.parametrize("path", ["events", "stream", "poll"])
@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_told_or_delivered_after_every_byte(served: Server, make: Callable[[Server, str], Case], path: str) -> None:
    case = make(served, f"cut-{make.__name__}-{path}")
    answer, kept = record(served, path, case), Kept(served, case)
    for cut in range(min(FIRST, len(answer)) + 1):
        read = parse(path, answer[:cut])
        check(case, read, kept.after(read.cursor), f"cut after {cut} of {answer!r}")
    read = parse(path, answer)
    assert (read.messages, read.gap) == (len(case.kept), case.gap), answer
    assert (b"Comet-Cursor" in answer.partition(b"\r\n\r\n")[0]) == (path != "poll")


@only_asleep
@pytest.mark.parametrize("path", ["events", "stream", "poll"])
def test_told_or_delivered_on_connections_that_break(served: Server, path: str) -> None:
    seed = 17
    dice = random.Random(seed)
    for make in CASES:
        case = make(served, f"break-{make.__name__}-{path}")
        length = min(FIRST, len(record(served, path, case)))
        for cut in dice.sample(range(1, length), 8):
            note = f"{make.__name__}, seed {seed}, cut after {cut}"
            with served.client() as client:
                ask(client, path, case)
                read = parse(path, client.read_exactly(cut))
                client.go(dice.choice(("FIN", "RST")))
            with served.client() as client:
                ask(client, path, case._replace(cursor=read.cursor or case.cursor))
                if read.messages < len(case.kept):
                    while case.kept[-1].encode() not in client.buffer or not client.buffer.endswith((b"\n\r\n", b"}")):
                        assert client.more(), note
                    again = parse(path, client.buffer)
                    assert read.gap or again.gap or not case.gap, f"not told: {note}"
                    assert again.messages == len(case.kept) - (0 if again.gap else read.messages), note
