"""docs/worst-cases.md held against measurement.

The rows are read from the page. For each of them as many clients as stand out from the noise do their worst at the same time, and
what they take of all processes of the service (PSS) and of the kernel (`tests.skmem`) must be no more than the row says. All stay open
until the end: what one kind gave back would be what the next one takes.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from itertools import count
from typing import NamedTuple

import gevent
import pytest
from gevent import socket

from comet.framing import PORTION
from comet.message import MAX_CHANNELS, MESSAGE_COST
from comet.settings import Settings, flag_of
from loadtest.process import descendants, memory
from tests.conftest import Start, only_asleep
from tests.harness import AMPLE, ROOT, TIMEOUT, Client, Server, wait_until
from tests.redis_server import needs_redis, redis_server
from tests.skmem import sizes

PAGE = ROOT / "docs" / "worst-cases.md"

PATIENT = [f"--{name}-timeout=300" for name in ("header", "body", "idle", "send")]
"""Flags of a service whose clients may go on until the end of the test: how long they may is another column of the page."""

NOISE = 500_000
"""Bytes that a service may take or give back meanwhile, whoever comes."""

BESIDE = 100
"""Bytes that a message which waits is counted for beside its data."""

MUCH = 1 << 40

MOST, LEAST = 300, 5
"""Clients of a kind."""

SHARED = {"stops-reading": 12_000 * MESSAGE_COST, "replays": 1000 * MESSAGE_COST, "polls-history": 1000 * MESSAGE_COST}
"""Bytes in each process of the messages that all clients of a kind wait for: they are there once, whoever waits."""


class Row(NamedTuple):
    """A row of the page: bytes of each client at most, of the service and of the kernel."""

    name: str
    service: int
    kernel: int
    address: str

    @property
    def clients(self) -> int:
        """How many show it above the noise."""
        return max(LEAST, min(MOST, 4 * NOISE // (self.service + self.kernel)), SHARED.get(self.name, 0) // self.service)


def rows() -> dict[str, Row]:
    """Return the rows of the page that are of a client, by name."""
    text = PAGE.read_text()
    found = re.findall(r"^\| `([a-z0-9-]+)` \| [^|]+ \| ([\d,]+) \| ([\d,]+) \| ([^|]+) \|", text, re.MULTILINE)
    return {name: Row(name, int(ours.replace(",", "")), int(kernel.replace(",", "")), address) for name, ours, kernel, address in found}


class Deaf(Client):
    """A client whose kernel takes and keeps as little as it can: what it does not read stays with the service."""

    def __init__(self, port: int) -> None:
        self.sock = socket.socket()
        self.sock.settimeout(TIMEOUT)
        for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            self.sock.setsockopt(socket.SOL_SOCKET, buffer, 4096)
        self.sock.connect(("127.0.0.1", port))
        self.buffer = b""


class Play:
    """A service, and the clients that it has."""

    def __init__(self, server: Server, clients: ExitStack) -> None:
        self.server = server
        self._clients = clients
        self._numbers = count()

    def own(self) -> str:
        """Return a channel that nobody else has, with a name as long as it may be."""
        return f"{next(self._numbers)}.".ljust(128, "x")

    def open(self, data: bytes, kind: type[Client] = Client) -> Client:
        """Return a client that has sent this."""
        client = self._clients.enter_context(kind(self.server.port))
        client.send(data)
        return client

    def listen(self, data: bytes) -> Client:
        """Return a client that has sent this, and that the service has let in."""
        client = self.open(data)
        client.read_until(b"\r\n\r\n")
        return client

    def taken(self, service: int, kernel: int) -> tuple[int, int]:
        """Return the bytes that the service and the kernel hold, once they stay the same and are no more than these; or after a while."""
        deadline = time.monotonic() + AMPLE
        before = self._measured()
        while True:
            gevent.sleep(0.1)
            now = self._measured()
            steady = all(abs(new - old) < NOISE / 10 for new, old in zip(now, before, strict=True))
            if (steady and now[0] <= service and now[1] <= kernel) or time.monotonic() > deadline:
                return now
            before = now

    def _measured(self) -> tuple[int, int]:
        return sum(map(memory, descendants(self.server.process.pid))), sum(sizes(self.server.port))

    def publish(self, lines: Iterable[tuple[str, int]], key: str = "") -> None:
        """Publish messages of so many bytes on these channels, each under a key that begins with its number and goes on with `key`."""
        keys = (f',"key":"{number}.{key}"' if key else "" for number in count())
        data = "\n".join(f'{{"channel":"{name}","data":"{"x" * size}"{one}}}' for (name, size), one in zip(lines, keys, strict=False))
        answer = self.server.request("POST", "/publish", data.encode())
        assert answer.status == 200 and b'"error"' not in answer.body, answer.body[:200]


def get(target: str, version: str = "1.1", *lines: str) -> bytes:
    """A request."""
    return "\r\n".join([f"GET {target} HTTP/{version}", "Host: h", *lines, "", ""]).encode()


def post(target: str, length: int) -> bytes:
    """A head, with a body of `length` bytes to come."""
    return f"POST {target} HTTP/1.1\r\nHost: h\r\nContent-Length: {length}\r\n\r\n".encode()


def idle(play: Play, clients: int) -> None:
    for _ in range(clients):
        assert play.open(get("/poll/a?timeout=0")).read().status == 200


def listens(play: Play, clients: int) -> None:
    for _ in range(clients):
        play.listen(get(f"/events/{play.own()}"))


def listens_oddly(play: Play, clients: int) -> None:
    forms: list[Callable[[str], bytes]] = [
        lambda channel: get(f"/events/{channel}", "1.0"),
        lambda channel: get(f"/stream/{channel}", "1.1", "Connection: close"),
        lambda channel: get(f"/events/{channel}") + b"G" * 15_000,
        lambda channel: get(f"/test/{channel[:100]}", "1.0"),
    ]
    for number in range(clients):
        play.listen(forms[number % len(forms)](play.own()))


def polls_and_sends(play: Play, clients: int) -> None:
    for _ in range(clients):
        play.open(get(f"/poll/{play.own()}?timeout=300") + b"G" * 4000)


def chatters(play: Play, clients: int) -> None:
    waiting = [play.listen(get(f"/events/{play.own()}")) for _ in range(clients)]
    for client in waiting:
        for _ in range(40):
            client.send(b"x")
        client.send(b"x" * 60_000)


def shares_64(play: Play, clients: int) -> None:
    channels = ",".join(f"shared.{number}.".ljust(128, "x") for number in range(64))
    for _ in range(clients):
        play.listen(get(f"/events/{channels}"))


def owns_64(play: Play, clients: int) -> None:
    for _ in range(clients):
        play.listen(get("/events/" + ",".join(play.own() for _ in range(64))))


def half_head(play: Play, clients: int) -> None:
    for _ in range(clients):
        play.open(b"GET /events/a HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 16_200)


def half_body(play: Play, clients: int) -> None:
    for _ in range(clients):
        play.open(post("/publish/a", Settings().max_body) + b"x" * (Settings().max_body - 1))


def half_follows(play: Play, clients: int) -> None:
    for number in range(clients):
        line = b"%d %b\n" % (number, b"x" * 100)
        play.open(post("/follows", 1 << 30) + line * ((1 << 20) // len(line) - 1))


def pipelines(play: Play, clients: int) -> None:
    request = get("/") * 100
    floods = [play.open(b"", Deaf) for _ in range(clients)]
    left = dict.fromkeys(floods, b"")
    for client in floods:
        client.sock.settimeout(0)
    with gevent.Timeout(TIMEOUT):
        idle = 0
        while idle < 20:
            idle += 1
            for client in floods:
                with contextlib.suppress(BlockingIOError):
                    data = left[client] or request
                    sent = client.sock.send(data)
                    left[client] = data[sent:]
                    idle = 0
            gevent.sleep(0.01)


def history(play: Play) -> list[str]:
    """Publish a page of messages that are as short as fill it, and return their cursors."""
    play.publish([("kept", 31)] * 1000)
    return [one["id"] for one in play.server.request("GET", "/channels/kept/history?limit=1000").json["messages"]]


def replays(play: Play, clients: int) -> None:
    cursors = history(play)
    for number in range(clients):
        play.open(get(f"/stream/kept?since={cursors[number]}"), Deaf)


def polls_history(play: Play, clients: int) -> None:
    cursors = history(play)
    for number in range(clients):
        play.open(get(f"/poll/kept?since={cursors[number]}"), Deaf)


def stops_reading(play: Play, clients: int) -> None:
    """Have each client wait for what is encoded for it alone, as much as is at once, and for as many messages as may wait behind."""
    waiting = [play.open(get("/events/busy")) for _ in range(clients)]
    for client in waiting:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        client.read_until(b"retry")
    play.publish([("busy", 1000)] * 300)
    play.publish([("busy", 1000)] * (PORTION // 1000 + 50))
    for client in waiting:
        client.read_until(b"-300\n")  # the last of those that are encoded for all
    play.publish([("busy", 0)] * (Settings().backlog // BESIDE - 100))


KINDS: dict[str, Callable[[Play, int], None]] = {
    "idle": idle,
    "listens": listens,
    "listens-oddly": listens_oddly,
    "polls-and-sends": polls_and_sends,
    "chatters": chatters,
    "shares-64": shares_64,
    "owns-64": owns_64,
    "half-head": half_head,
    "half-body": half_body,
    "half-follows": half_follows,
    "pipelines": pipelines,
    "replays": replays,
    "polls-history": polls_history,
    "stops-reading": stops_reading,
}


@only_asleep
@pytest.mark.parametrize("workers", ["0", "2"])
def test_no_client_takes_more_than_the_page_says(start: Start, workers: str) -> None:
    server = start("--workers", workers, *PATIENT)
    with ExitStack() as clients:
        play = Play(server, clients)
        listens(play, 100)  # what first ones take, once
        ours, kernel = play.taken(MUCH, MUCH)
        for row in rows().values():
            KINDS[row.name](play, row.clients)
            most = row.clients * row.service + NOISE + (1 + int(workers)) * SHARED.get(row.name, 0)
            was, (ours, kernel) = (ours, kernel), play.taken(ours + most, kernel + row.clients * row.kernel)
            assert ours - was[0] <= most, f"{row}: {(ours - was[0]) // row.clients}"
            assert kernel - was[1] <= row.clients * row.kernel, f"{row}: {(kernel - was[1]) // row.clients}"
        assert server.stats()["refused"] == {}


# -- what all clients have together


def amounts() -> dict[str, int]:
    """Return the rows of the page that are of a thing, by name: bytes of each at most."""
    found = re.findall(r"^\| `([a-z0-9-]+)` \| [^|]+ \| ([\d,]+) \| [^|]+ \|$", PAGE.read_text(), re.MULTILINE)
    return {name: int(size.replace(",", "")) for name, size in found}


def channels(play: Play) -> int:
    client = play.open(b"")
    for _ in range(50):
        client.send(get("/poll/" + ",".join(play.own() for _ in range(MAX_CHANNELS)) + "?timeout=0"))
        assert client.read().status == 200
    return 50 * MAX_CHANNELS


def keys(play: Play) -> int:
    play.publish([(play.own(), 0)] * 10_000, "k" * 190)
    return 10_000


def messages(play: Play) -> int:
    names = [play.own() for _ in range(10)]
    play.publish([(names[number % 10], 100) for number in range(10_000)])
    return 10_000


def millions(play: Play) -> int:
    """Have history in each form that it may have; return its millions of bytes, as they are counted."""
    names = [play.own() for _ in range(10)]
    readers = [play.listen(get(f"/{endpoint}/{','.join(names)}")) for endpoint in ("events", "stream")]
    draining = [gevent.spawn(drain, reader) for reader in readers]
    play.publish([(names[number % 10], 100) for number in range(10_000)])
    play.publish([(names[0], 101)])
    wait_until(lambda: all(b"x" * 101 in reader.buffer for reader in readers))
    gevent.killall(draining)
    return 10_000 * (MESSAGE_COST + 3 * 100) // 1_000_000


def drain(client: Client) -> None:
    """Read all that comes, and keep the last of it."""
    while client.more():
        client.buffer = client.buffer[-(1 << 16) :]


def bodies(play: Play) -> int:
    """Have more bodies under way than there is room for; return in how many processes."""

    def send() -> None:
        with contextlib.suppress(OSError):  # there is no room for it
            play.open(post("/publish", Settings().max_batch) + b"x" * (Settings().max_batch - 1))

    gevent.joinall([gevent.spawn(send) for _ in range(24)], raise_error=True)
    return max(1, len(play.server.stats().get("workers", ())))


THINGS: dict[str, Callable[[Play], int]] = {"channel": channels, "key": keys, "history": millions, "bodies": bodies}
"""Makes things of a kind, and returns how many."""

IN_REDIS: dict[str, Callable[[Play], int]] = {"redis-channel": channels, "redis-message": messages, "redis-key": keys}


@only_asleep
@pytest.mark.parametrize("workers", ["0", "2"])
def test_nothing_takes_more_than_the_page_says(start: Start, workers: str) -> None:
    server = start("--workers", workers, *PATIENT)
    with ExitStack() as clients:
        play = Play(server, clients)
        listens(play, 100)  # what first ones take, once
        ours, _ = play.taken(MUCH, MUCH)
        for name, make in THINGS.items():
            number = make(play)
            most = number * amounts()[name] + NOISE
            was, (ours, _) = ours, play.taken(ours + most, MUCH)
            assert ours - was <= most, f"{name}: {(ours - was) // number}"


@needs_redis
@only_asleep
def test_nothing_takes_more_of_redis_than_the_page_says(start: Start) -> None:
    with redis_server() as redis, ExitStack() as clients:
        play = Play(start("--backplane", redis.url), clients)
        used = 0
        for name, make in {"": channels, **IN_REDIS}.items():
            number = make(play)
            found = dict(line.split(b":") for line in redis.ask("INFO", "memory").split(b"\r\n") if b":" in line)
            was, used = used, int(found[b"used_memory"]) - int(found[b"mem_clients_normal"])
            assert not name or used - was <= number * amounts()[name], f"{name}: {(used - was) // number}"


# -- the page


def test_the_page_has_a_row_for_each_kind_of_client_and_of_thing() -> None:
    assert list(rows()) == list(KINDS)
    assert [*THINGS, *IN_REDIS] == list(amounts())


def test_what_an_address_takes_is_what_its_clients_take() -> None:
    for row in rows().values():
        together = Settings().max_per_address * (row.service + row.kernel) / 1e6
        assert row.address in (f"{together:,.0f}", "`bodies`"), row


def test_the_page_names_settings_that_there_are() -> None:
    flags = {flag_of(name) for name in Settings.__dataclass_fields__}
    assert set(re.findall(r"`(--[a-z-]+)`", PAGE.read_text())) <= flags
