"""Clients that sleep, and what wakes them: messages too large for a socket, requests, deadlines, ends.

Everything here must hold with ``--hibernate off`` too; `only_asleep` marks what is about sleep itself.
``COMET_FULL=1`` runs the large scenarios in full: 5,000 clients, 20,000 connections.
"""

import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket

from comet.server.parking import CHATTER
from tests.conftest import Start, only_asleep
from tests.harness import AMPLE, TIMEOUT, Client, Response, Server, wait_until

FULL = bool(os.environ.get("COMET_FULL"))
STREAMS = ("test", "stream", "events")
MANY = ("--max-per-address", "15000")
LATE = 2 * TIMEOUT if not FULL else 600.0
"""Seconds after which a whole scenario has failed."""

OPEN: list[Client] = []
"""Connections that the present test made."""


@pytest.fixture(autouse=True)
def _close_connections(start: Start) -> Iterator[None]:
    """At the end of each test, before `start` stops its servers."""
    yield
    while OPEN:
        OPEN.pop().close()


class Narrow(Client):
    """A client with a receive buffer so small that it does not take what it does not read."""

    def __init__(self, port: int) -> None:
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(("127.0.0.1", port))
        self.buffer = b""
        self._chunked = False
        self._left = 0


PROBE = """
import json, signal, sys
import app
import gevent
from comet.server import wsgi

servers = []
begin = wsgi.CometServer.__init__

def note(self, *arguments):
    servers.append(self)
    begin(self, *arguments)

def probe():
    (server,) = servers
    owned = sum(owner is not None for owner in server.parking._owners)
    print("probe", json.dumps({"awake": len(server.awake), "parked": owned, "networks": dict(server.addresses.own)}), flush=True)

wsgi.CometServer.__init__ = note
gevent.signal_handler(signal.SIGUSR1, probe)
sys.exit(app.main(sys.argv[1:]))
"""


class Probed(Server):
    """A server that tells, at a signal, what it holds; no connection is needed to ask."""

    program = ("-c", PROBE)

    def probe(self) -> dict[str, Any]:
        self.process.send_signal(signal.SIGUSR1)
        while True:
            line = self.process.stdout.readline().decode()
            assert line, self.log.read_text()
            if line.startswith("probe "):
                answer: dict[str, Any] = json.loads(line[6:])
                return answer

    def awake(self) -> int:
        """Connections that have a greenlet."""
        return int(self.probe()["awake"])


class Forgetful(Server):
    """A server of which a channel may have little pending, one mebibyte."""

    program = ("-c", "import sys, app; from comet import fanout; fanout.MAX_PENDING = 1 << 20; sys.exit(app.main(sys.argv[1:]))")


def connect(server: Server, kind: type[Client] = Client) -> Client:
    """A new connection, closed at the test's end if not before."""
    client = kind(server.port)
    OPEN.append(client)
    return client


def subscribe(server: Server, kind: str, user: str, type: type[Client] = Client, cursor: str | None = None) -> Client:
    """A client of `user`'s feed; of a stream, head and opening are read."""
    client = connect(server, type)
    path = f"/test/{user}" if kind == "test" else f"/{kind}/user:{user}"
    client.ask("GET", path, headers={} if cursor is None else {"Last-Event-ID": cursor})
    if kind != "poll":
        assert client.read_head().status == 200
        client.read_chunk()
    return client


class Reader:
    """What a stream's client gets: data of messages, in order; heartbeats are counted."""

    def __init__(self, client: Client, kind: str) -> None:
        self.client = client
        self.kind = kind
        self.text = b""
        self.got: list[str] = []
        self.heartbeats = 0
        self.ended = False

    def read(self) -> None:
        """One chunk."""
        chunk = self.client.read_chunk()
        if not chunk:
            self.ended = True
            return
        if self.kind == "events" and chunk == b":\n":
            self.heartbeats += 1
            return
        self.text += chunk
        mark = b"\n\n" if self.kind == "events" else b"\n"
        *blocks, self.text = self.text.split(mark)
        for block in blocks:
            if not block:
                self.heartbeats += 1
            elif block.startswith(b"retry: "):
                retry, name = block.split(b"\n")  # of a server that stops: when to come back
                assert 2000 <= int(retry[7:]) <= 4000
                assert name == b"event: comet"
            elif self.kind == "test":
                self.got.append(block.decode())
            elif self.kind == "stream":
                document = json.loads(block)
                self.got.append("GAP" if document.get("gap") else document["data"])
            else:
                fields = dict(line.split(": ", 1) for line in block.decode().split("\n"))
                self.got.append("GAP" if fields["event"] == "gap" else fields["data"])

    def until(self, count: int) -> list[str]:
        """Everything so far, once it is at least `count` messages."""
        while len(self.got) < count and not self.ended:
            self.read()
        return self.got


def publish_batch(server: Server, channel: str, bodies: Sequence[str]) -> list[dict[str, Any]]:
    """All of them in one request."""
    lines = b"".join(json.dumps({"channel": channel, "data": body}).encode() + b"\n" for body in bodies)
    answer = server.request("POST", "/publish", lines)
    assert answer.status == 200
    results = [json.loads(line) for line in answer.body.splitlines()]
    assert not any("error" in result for result in results), results
    return results


def big(number: int, size: int = 16384) -> str:
    """A message that can't be taken for another."""
    return f"{number}:".ljust(size, chr(97 + number % 26))


def settled(server: Server, count: int) -> None:
    """Wait until the server counts so many subscribers."""
    wait_until(lambda: server.clients() == count)


def joined(server: Server, channel: str, count: int = 1) -> None:
    """Wait until a channel has so many subscribers."""
    wait_until(lambda: server.request("GET", f"/channels/{channel}").json.get("subscribers") == count)


def closed(server: Server) -> dict[str, int]:
    """Subscribers by the reason they ended."""
    reasons: dict[str, int] = server.stats()["closed"]
    return reasons


def data_of(answer: Response) -> list[str]:
    """The bodies in a poll's answer."""
    assert answer.status == 200, answer
    assert not answer.json["gap"], answer.json
    return [message["data"] for message in answer.json["messages"]]


# -- messages that a socket does not take at once


@pytest.mark.parametrize("kind", STREAMS)
def test_who_reads_late_gets_everything_in_order_and_sleeps_again(start: Start, hibernate: str, kind: str) -> None:
    server = start("--send-buffer", "4608", kind=Probed)
    assert isinstance(server, Probed)
    reader = Reader(subscribe(server, kind, "late", Narrow), kind)
    sent: list[str] = []
    for _ in range(3):
        if hibernate == "on":
            wait_until(lambda: server.awake() == 0)
        for _ in range(8):
            sent.append(big(len(sent)))
            server.publish("user:late", sent[-1])
        if hibernate == "on":
            assert server.awake() == 1, "the messages did not fill its socket: the test proves nothing"
        assert reader.until(len(sent)) == sent
        sent.append(f"small {len(sent)}")
        server.publish("user:late", sent[-1])
        assert reader.until(len(sent)) == sent
    server.assert_healthy()
    assert closed(server) == {}


def test_a_poll_whose_answer_is_large_is_complete_and_its_connection_goes_on(start: Start, hibernate: str) -> None:
    server = start("--send-buffer", "4608", kind=Probed)
    assert isinstance(server, Probed)
    client = connect(server, Narrow)
    cursor = client.request("GET", "/poll/a?timeout=0.001").json["cursor"]
    for number in range(5):
        client.ask("GET", f"/poll/a?since={cursor}")
        settled(server, 1)
        server.publish("a", big(number, 60_000))
        answer = client.read()
        assert data_of(answer) == [big(number, 60_000)]
        cursor = answer.json["cursor"]
        settled(server, 0)
        assert client.request("GET", "/healthz").status == 200
    if hibernate == "on":
        wait_until(lambda: server.awake() == 0)
    server.assert_healthy()
    assert closed(server) == {"answered": 6}


def test_what_is_published_while_a_large_answer_leaves_comes_with_the_next_poll(start: Start) -> None:
    server = start("--send-buffer", "4608")
    client = connect(server, Narrow)
    cursor = client.request("GET", "/poll/a?timeout=0.001").json["cursor"]
    client.ask("GET", f"/poll/a?since={cursor}")
    settled(server, 1)
    sent = [big(number, 50_000) for number in range(6)]
    for body in sent:
        server.publish("a", body)
    got: list[str] = []
    while len(got) < 6:
        answer = client.read()
        got += data_of(answer)
        client.ask("GET", f"/poll/a?since={answer.json['cursor']}")
    assert got == sent
    server.assert_healthy()


@pytest.mark.parametrize("kind", STREAMS)
def test_a_burst_beyond_what_may_wait_is_read_from_history_and_complete(start: Start, kind: str) -> None:
    """More than a channel may have pending in one publish: its many subscribers notice the skip."""
    server = start("--backlog", str(64 << 20), kind=Forgetful)
    readers = [Reader(subscribe(server, kind, "all"), kind) for _ in range(20)]
    sent = ["first", *(big(number, 60_000) for number in range(100)), "between", "last"]
    server.publish("user:all", sent[0])
    publish_batch(server, "user:all", sent[1:-2])
    server.publish("user:all", sent[-2])
    greenlets = [gevent.spawn(reader.until, len(sent) - 1) for reader in readers]
    gevent.joinall(greenlets, timeout=LATE, raise_error=True)
    server.publish("user:all", sent[-1])  # and they are still there for the next
    for reader in readers:
        assert [body[:20] for body in reader.until(len(sent))] == [body[:20] for body in sent]
    server.assert_healthy()
    assert closed(server) == {}


@pytest.mark.parametrize("workers", [(), ("--workers", "2")], ids=["one process", "two workers"])
@pytest.mark.parametrize("kind", STREAMS)
def test_a_batch_closes_nobody_who_keeps_reading(start: Start, kind: str, workers: Sequence[str]) -> None:
    """5 MB of one request: five times `--backlog`, and five times what history keeps."""
    server = start(*workers)
    readers = [Reader(subscribe(server, kind, "all"), kind) for _ in range(8)]
    sent = [big(number, 1000) for number in range(5000)]
    greenlets = [gevent.spawn(reader.until, len(sent)) for reader in readers]
    publish_batch(server, "user:all", sent)
    gevent.joinall(greenlets, timeout=LATE, raise_error=True)
    for reader in readers:
        assert reader.got == sent
    assert closed(server) == {}


@pytest.mark.parametrize("kind", ["stream", "events"])
def test_a_replay_is_not_held_up_by_a_sleepers_small_buffer(start: Start, kind: str) -> None:
    seconds: list[float] = []
    for flags in ((), ("--busy-send-buffer", "0")):
        server = start("--max-batch", str(64 << 20), "--max-bodies", str(96 << 20), *flags)
        sent = [big(number, 8000) for number in range(1000)]
        publish_batch(server, "user:all", sent)
        client, end = connect(server), b""
        begun = time.monotonic()
        client.ask("GET", f"/{kind}/user:all?since=oldest")
        while sent[-1].encode() not in end:  # of what has come: this reader is to cost nothing
            end = end[-2 * len(sent[-1]) :] + client.sock.recv(1 << 20)
        seconds.append(time.monotonic() - begun)
    assert seconds[0] < seconds[1] / 2, seconds


# -- who does not read at all


def test_stuck_clients_are_closed_while_the_others_get_everything_and_memory_returns(start: Start) -> None:
    stuck_count, count, messages = (1000, 5000, 60) if FULL else (100, 500, 40)
    server = start("--send-timeout", "5", *MANY)
    readers = [Reader(subscribe(server, "stream", "all"), "stream") for _ in range(count - stuck_count)]
    sent: list[str] = []
    memory: list[int] = []
    for wave in range(3):
        stuck = [subscribe(server, "stream", "all", Narrow) for _ in range(stuck_count)]
        settled(server, count)
        for _ in range(messages):
            sent.append(big(len(sent)))
            server.publish("user:all", sent[-1])
            if len(sent) % 4 == 0:  # so that who reads has the time to
                gevent.joinall([gevent.spawn(reader.until, len(sent)) for reader in readers], timeout=LATE, raise_error=True)
        assert all(reader.got == sent for reader in readers), wave
        wait_until(lambda: server.clients() == len(readers), LATE)
        memory.append(server.memory())
        for client in stuck:
            client.close()
        for reader in readers:
            reader.got.clear()
        sent.clear()
    reasons = closed(server)
    assert set(reasons) <= {"backlog-bytes", "backlog-time"}
    assert sum(reasons.values()) == 3 * stuck_count
    assert memory[2] < memory[0] + (32 << 20), memory
    server.assert_healthy()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [(("--backlog", "100000", "--busy-backlog", "100000"), "backlog-bytes"), (("--backlog", "50000000"), "backlog-time")],
)
@pytest.mark.parametrize("kind", STREAMS)
def test_a_stuck_client_is_closed_with_the_reason_and_resumes(start: Start, kind: str, flags: Sequence[str], reason: str) -> None:
    server = start("--send-timeout", "1", *flags)
    stuck, reader = subscribe(server, kind, "a", Narrow), Reader(subscribe(server, kind, "a"), kind)
    sent = [big(number) for number in range(20)]
    for number, body in enumerate(sent, 1):
        server.publish("user:a", body)
        reader.until(number)
    assert reader.got == sent
    wait_until(lambda: closed(server) == {reason: 1})
    settled(server, 1)
    while stuck.more():  # what it still reads is a clean beginning
        pass
    server.assert_healthy()


def test_a_large_batch_is_not_copied_for_every_client_that_is_stuck(start: Start) -> None:
    """A client that can't keep up has a backlog that is bounded in bytes: 1 MiB by default."""
    stuck = 100
    server = start(*MANY)
    clients = [subscribe(server, "stream", "all", Narrow) for _ in range(stuck)]
    settled(server, stuck)
    before = server.memory()
    publish_batch(server, "user:all", [big(number, 60_000) for number in range(80)])  # 4.8 MB
    server.request("POST", "/publish/user:all", b"and one more")
    peak = max(server.memory() for _ in range(20) if server.request("GET", "/healthz").status == 200)
    assert (peak - before) / stuck < (1 << 20), f"{(peak - before) >> 20} MB for {stuck} clients"
    assert len(clients) == stuck


# -- requests on a connection that slept


@pytest.mark.parametrize("wait", ["idle", "poll"])
def test_a_connection_wakes_for_whatever_comes_next(server: Server, wait: str) -> None:
    client = connect(server)
    for number in range(5):
        if wait == "poll":
            cursor = client.request("GET", f"/poll/wakes-{wait}?timeout=0.001").json["cursor"]
            client.ask("GET", f"/poll/wakes-{wait}?since={cursor}")
            server.publish(f"wakes-{wait}", str(number))
            assert data_of(client.read()) == [str(number)]
        assert client.request("GET", "/healthz").json == {"status": "alive", "worker": 0}
        assert client.request("POST", "/publish/elsewhere", b"x" * 50_000).status == 201
        assert client.request("POST", "/publish/elsewhere", b"", {"Expect": "100-continue"}).status == 201
        assert client.request("HEAD", "/healthz").status == 200
        assert client.request("GET", "/nowhere").status == 404
        assert client.request("GET", "/poll/%20").status == 400
        assert client.request("GET", "/poll/a%2Cb?timeout=0").status == 200
    server.assert_healthy()


def test_a_request_that_comes_byte_by_byte_to_a_sleeping_connection_is_read(server: Server) -> None:
    client = connect(server)
    assert client.request("GET", "/healthz").status == 200
    for byte in b"GET /poll/bytes?timeout=0 HTTP/1.1\r\nHost: x\r\n\r\n":
        client.send(bytes([byte]))
        gevent.sleep(0.002)
    assert client.read().json["messages"] == []
    assert client.request("GET", "/healthz").status == 200


def test_a_head_that_stops_half_way_on_a_sleeping_connection_is_told_so(start: Start) -> None:
    server = start("--header-timeout", "0.5")
    client = connect(server)
    assert client.request("GET", "/healthz").status == 200
    client.send(b"GET /healthz HT")
    answer = client.read()
    assert (answer.status, answer.json["error"]) == (408, "header-timeout")
    assert client.at_end()


@pytest.mark.parametrize("before", [True, False], ids=["again", "at-first"])
@pytest.mark.parametrize("behind", ["healthz", "poll", "publish", "many"])
def test_a_poll_and_another_request_in_one_packet_are_answered_in_order(server: Server, before: bool, behind: str) -> None:
    channel = f"packet-{before}-{behind}"
    client = connect(server)
    if before:
        assert client.request("GET", "/healthz").status == 200
    host = b"HTTP/1.1\r\nHost: x\r\n"
    others = {
        "healthz": b"GET /healthz %b\r\n" % host,
        "poll": b"GET /poll/%b?timeout=0 %b\r\n" % (channel.encode(), host),
        "publish": b"POST /publish/other %bContent-Length: 3\r\n\r\nabc" % host,
        "many": b"GET /healthz %b\r\n" % host * 20,
    }
    client.send(b"GET /poll/%b?timeout=10 %b\r\n" % (channel.encode(), host) + others[behind])
    joined(server, channel)
    server.publish(channel, "message")
    assert data_of(client.read()) == ["message"]
    for _ in range(20 if behind == "many" else 1):
        assert client.read().status == (201 if behind == "publish" else 200)
    assert client.request("GET", "/healthz").status == 200
    server.assert_healthy()


@pytest.mark.parametrize("early", [1, 3])
def test_a_request_that_comes_while_a_poll_sleeps_is_answered_after_it(server: Server, early: int) -> None:
    channel = f"early-{early}"
    client = connect(server)
    cursor = client.request("GET", f"/poll/{channel}?timeout=0.001").json["cursor"]
    for number in range(10):
        client.ask("GET", f"/poll/{channel}?since={cursor}")
        joined(server, channel)
        for _ in range(early):
            client.ask("GET", "/healthz")
        with pytest.raises(TimeoutError):
            client.sock.settimeout(0.02)
            client.more()
        client.sock.settimeout(TIMEOUT)
        server.publish(channel, str(number))
        answer = client.read()
        assert data_of(answer) == [str(number)]
        cursor = answer.json["cursor"]
        for _ in range(early):
            assert client.read().json == {"status": "alive", "worker": 0}
    server.assert_healthy()


def test_a_poll_that_comes_while_a_poll_sleeps_is_answered_after_it(server: Server) -> None:
    client = connect(server)
    cursor = client.request("GET", "/poll/two-polls?timeout=0.001").json["cursor"]
    for _ in range(2):
        client.ask("GET", f"/poll/two-polls?since={cursor}")
    joined(server, "two-polls")
    server.publish("two-polls", "1")
    assert [data_of(client.read()) for _ in range(2)] == [["1"], ["1"]]  # both asked after the same place


def unread(client: Client) -> int:
    """Bytes that the client has sent and the kernel of this machine keeps for the server."""
    ends = [f"0100007F:{port:04X}" for port in (client.sock.getpeername()[1], client.sock.getsockname()[1])]
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, ours, theirs, _, queues, *_ = line.split()
        if [ours, theirs] == ends:
            return int(queues.partition(":")[2], 16)
    raise AssertionError("there is no such connection")


def test_what_a_client_sends_while_it_waits_is_not_left_to_the_kernel(server: Server) -> None:
    clients = {kind: subscribe(server, kind, f"says-{kind}") for kind in ("poll", *STREAMS)}
    for kind, client in clients.items():
        joined(server, f"user:says-{kind}")
        for _ in range(50):
            client.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            gevent.sleep(0.001)  # a packet each
    wait_until(lambda: not any(map(unread, clients.values())))
    for kind, client in clients.items():
        server.publish(f"user:says-{kind}", "message")
        if kind == "poll":
            assert data_of(client.read()) == ["message"]
            for _ in range(50):
                assert client.read().json == {"status": "alive", "worker": 0}
        else:
            assert b"message" in client.read_chunk()
    server.assert_healthy()


@pytest.mark.parametrize("kind", STREAMS)
def test_a_client_that_sends_on_behind_a_stream_is_ended(server: Server, kind: str) -> None:
    before = closed(server).get("chatty", 0)
    user = f"chatty-{kind}"
    client = subscribe(server, kind, user)
    joined(server, f"user:{user}")
    for _ in range(CHATTER // 1024 - 1):
        client.send(b"x" * 1024)
    wait_until(lambda: unread(client) == 0)
    server.publish(f"user:{user}", "message")
    assert b"message" in client.read_chunk(), "so much is borne"
    assert closed(server).get("chatty", 0) == before
    with contextlib.suppress(OSError):  # it may be cut off in the middle
        client.send(b"x" * 1024)
    wait_until(lambda: closed(server).get("chatty", 0) == before + 1)
    joined(server, f"user:{user}", 0)
    server.assert_healthy()


@pytest.mark.parametrize("at_once", [True, False], ids=["in a packet", "while it waits"])
def test_a_poll_with_much_behind_it_does_not_wait(server: Server, at_once: bool) -> None:
    channel = f"much-{at_once}"
    client = connect(server)
    poll = b"GET /poll/%b?timeout=300 HTTP/1.1\r\nHost: x\r\n\r\n" % channel.encode()
    post = b"POST /publish/%b HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\n%b" % (channel.encode(), b"x" * 10000)
    if at_once:
        client.send(poll + post)
    else:
        client.send(poll)
        joined(server, channel)
        client.send(post)
    answer = client.read()
    assert (answer.status, data_of(answer)) == (200, [])
    assert client.read().status == 201
    assert data_of(client.request("GET", f"/poll/{channel}?since={answer.json['cursor']}")) == ["x" * 10000]
    server.assert_healthy()


def test_a_request_that_came_behind_a_poll_is_answered_although_the_poll_had_to_wait_for_its_client(start: Start) -> None:
    server = start("--send-buffer", "4096", "--busy-send-buffer", "0")
    client = connect(server, Narrow)
    client.ask("GET", "/poll/large")
    joined(server, "large")
    client.ask("GET", "/healthz")
    wait_until(lambda: unread(client) == 0)
    server.publish("large", big(1, 60_000))
    assert data_of(client.read()) == [big(1, 60_000)]
    assert client.read().json == {"status": "alive", "worker": 0}


def test_a_request_behind_a_stream_is_not_answered(server: Server) -> None:
    reader = Reader(subscribe(server, "stream", "input"), "stream")
    reader.client.ask("GET", "/healthz")
    for number in range(3):
        server.publish("user:input", str(number))
        reader.until(number + 1)
    assert server.request("DELETE", "/channels/user:input").status == 200
    reader.read()
    assert reader.ended
    assert reader.client.at_end()


@pytest.mark.parametrize("path", ["/poll/body?timeout=0", "/poll/body?timeout=1", "/stream/body"])
def test_a_body_that_nobody_reads_is_not_taken_for_a_request(server: Server, path: str) -> None:
    """Behind a proxy it would be answered to somebody else's request."""
    client = connect(server)
    inner = b"POST /publish/smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx"
    client.send(b"GET %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(inner)))
    head = client.read_head()
    assert head.status == 200
    client.send(inner)
    if path.startswith("/stream"):
        joined(server, "body")
        assert server.request("DELETE", "/channels/body").status == 200
    client.read_body()
    assert client.at_end()
    assert server.request("GET", "/channels/smuggled").status == 404


def test_long_series_of_polls_on_one_connection_miss_and_double_nothing(start: Start) -> None:
    seed, total = 7, 3000 if FULL else 600
    server = start()
    rng = random.Random(seed)
    got: list[list[str]] = [[] for _ in range(20)]

    def poller(number: int) -> None:
        client = connect(server)
        cursor = start_cursor
        pause = random.Random(number)
        while len(got[number]) < total:
            if pause.random() < 0.1:
                gevent.sleep(pause.random() / 50)
            answer = client.request("GET", f"/poll/series?since={cursor}")
            got[number] += data_of(answer)
            cursor = answer.json["cursor"]

    start_cursor = server.request("GET", "/poll/series?timeout=0.001").json["cursor"]
    greenlets = [gevent.spawn(poller, number) for number in range(len(got))]
    sent = 0
    with server.client() as publisher:
        while sent < total:
            for _ in range(min(rng.choice([1, 1, 1, 2, 5]), total - sent)):
                assert publisher.request("POST", "/publish/series", b"%d" % sent).status == 201
                sent += 1
            gevent.sleep(rng.choice([0, 0, 0.001, 0.01]))
    gevent.joinall(greenlets, timeout=LATE, raise_error=True)
    assert got == [list(map(str, range(total)))] * len(got), seed
    server.assert_healthy()
    assert set(closed(server)) == {"answered"}


# -- ends


@pytest.mark.parametrize("how", ["FIN", "RST", "half-close"])
@pytest.mark.parametrize("kind", ["poll", *STREAMS])
def test_a_sleeping_client_that_goes_is_noticed_at_once(server: Server, kind: str, how: str) -> None:
    before = server.clients()
    count = closed(server).get("hang-up", 0)
    client = subscribe(server, kind, "goes")
    settled(server, before + 1)
    client.go(how)
    wait_until(lambda: server.clients() == before)
    assert closed(server)["hang-up"] == count + 1
    if how == "half-close":
        client.close()
    OPEN.remove(client)


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("kind", ["poll", *STREAMS])
def test_a_client_that_dies_in_mid_write_is_cleared_away(start: Start, kind: str, how: str) -> None:
    server = start("--send-buffer", "4608", "--max-body", "4000000")
    client = subscribe(server, kind, "dies", Narrow)
    settled(server, 1)
    descriptors = server.descriptors()
    for number in range(6):  # the first one alone is more than the kernel takes
        server.publish("user:dies", big(number, 1_000_000))
    client.go(how)
    settled(server, 0)
    wait_until(lambda: server.descriptors() < descriptors)
    assert set(closed(server)) <= {"lost", "hang-up"}
    server.assert_healthy()


def test_nothing_is_left_of_connections_that_end_at_any_stage(start: Start) -> None:
    total = 20_000 if FULL else 2_000
    server = start("--send-buffer", "8192", "--heartbeat", "1", *MANY)
    first = server.stats()
    descriptors = server.descriptors()
    met: Counter[str] = Counter()

    def life(number: int) -> None:
        rng = random.Random(number)
        feed = f"user:{number % 50}"
        kind = rng.choice(["poll", "poll", *STREAMS, "events-two", "healthz", "nothing", "half-a-head", "half-a-body", "nonsense"])
        stage = rng.choice(["asked", "answered", "slept", "delivered", "again", "full"])
        how = rng.choice(["FIN", "RST", "half-close"])
        client = Narrow(server.port) if stage == "full" else Client(server.port)
        with contextlib.suppress(ConnectionError, AssertionError, TimeoutError):
            client.sock.settimeout(2)
            path = {"test": f"/test/{number % 50}", "events-two": f"/events/{feed},other"}.get(kind, f"/{kind}/{feed}")
            if kind == "half-a-head":
                client.send(b"GET /poll/x HTTP/1.1\r\nHo")
            elif kind == "half-a-body":
                client.send(b"POST /publish/x HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
            elif kind == "nonsense":
                client.send(rng.randbytes(50) + b"\r\n\r\n")
            elif kind != "nothing":
                client.ask("GET", "/healthz" if kind == "healthz" else path)
            if stage != "asked" and kind in (*STREAMS, "events-two"):
                client.read_head()
                client.read_chunk()
            if stage in ("slept", "delivered", "again"):
                gevent.sleep(rng.random() / 20)
            if stage in ("delivered", "full", "again"):
                body = b"x" * (60_000 if stage == "full" else 10)
                for _ in range(rng.choice([1, 3])):
                    server.request("POST", f"/publish/{feed}", body)
            if stage == "again" and kind in ("poll", "healthz"):
                client.read()
                client.ask("GET", path)
            met[f"{kind} {stage} {how}"] += 1
        with contextlib.suppress(OSError):
            client.go(how)
        if how == "half-close":
            with contextlib.suppress(OSError, TimeoutError):
                while client.more() and len(client.buffer) < 1 << 20:
                    pass
            client.close()

    for begin in range(0, total, 200):
        greenlets = [gevent.spawn(life, number) for number in range(begin, begin + 200)]
        gevent.joinall(greenlets, timeout=LATE, raise_error=True)
    assert len(met) > 150
    settled(server, 0)
    wait_until(lambda: server.stats()["connections"] == first["connections"])
    wait_until(lambda: server.descriptors() <= descriptors)
    last = server.stats()
    assert not any(last["clients"].values())
    assert set(last["closed"]) <= {"answered", "hang-up", "lost"}
    server.assert_healthy()


def test_a_descriptor_that_is_used_again_at_once_brings_nobody_anothers_bytes(start: Start) -> None:
    """The kernel gives the lowest free number, so each new connection has one that was just closed."""
    seconds = 30.0 if FULL else 4.0
    server = start("--send-buffer", "8192", *MANY)
    began = time.monotonic()
    numbers = iter(range(10**9))
    living: dict[str, float] = {}
    wrong: list[str] = []
    lives: Counter[str] = Counter()

    def going_on() -> bool:
        """Until its time is up and enough has happened."""
        return time.monotonic() - began < seconds or lives["with messages"] <= 200

    def check(name: str, text: bytes) -> None:
        """Each message is its client's name, over and over: a byte of another's shows."""
        for body in text.replace(b'"', b"\n").replace(b":\n", b"\n").split():
            if body.startswith(b"id-") and not all(name.encode().startswith(part) for part in body.split(b"|")):  # the last may be cut
                wrong.append(f"{name} got {body[:60]!r}")

    def client(seed: int) -> None:
        rng = random.Random(seed)
        while going_on():
            name = f"id-{next(numbers)}"
            kind = rng.choice(["poll", *STREAMS])
            one = (Narrow if rng.random() < 0.2 else Client)(server.port)
            received = b""
            try:
                one.sock.settimeout(1)
                one.ask("GET", f"/test/{name}" if kind == "test" else f"/{kind}/user:{name}")
                living[name] = 1
                end = time.monotonic() + rng.random() / 5
                while time.monotonic() < end:
                    with contextlib.suppress(TimeoutError):
                        one.sock.settimeout(0.05)
                        if not one.more():
                            break
                        if kind == "poll" and b'"messages":[{' in one.buffer and rng.random() < 0.5:
                            one.ask("GET", f"/poll/user:{name}")
                received = one.buffer
            except ConnectionError:
                pass
            finally:
                living.pop(name, None)
                if rng.random() < 0.5:
                    one.reset()
                else:
                    one.close()
            check(name, received)
            lives["with messages" if name.encode() + b"|" in received else "without"] += 1

    def publisher(seed: int) -> None:
        rng = random.Random(seed)
        with server.client() as connection:
            while going_on():
                targets = rng.sample(sorted(living), min(50, len(living))) if living else []
                lines = [
                    json.dumps({"channel": f"user:{name}", "data": f"{name}|" * rng.choice([3, 3, 3000])}).encode() + b"\n"
                    for name in targets
                ]
                connection.request("POST", "/publish", b"".join(lines))

    greenlets = [gevent.spawn(client, seed) for seed in range(100)] + [gevent.spawn(publisher, seed) for seed in range(2)]
    gevent.joinall(greenlets, timeout=LATE, raise_error=True)
    assert not wrong, wrong[:5]
    assert lives["with messages"] > 200
    settled(server, 0)
    server.assert_healthy()


# -- deadlines


def test_a_poll_is_answered_when_its_time_is_up(server: Server) -> None:
    client = connect(server)
    cursor = client.request("GET", "/poll/up?timeout=0.001").json["cursor"]
    for timeout in (0.3, 1.0, 2.0):
        began = time.monotonic()
        answer = client.request("GET", f"/poll/up?since={cursor}&timeout={timeout}")
        assert timeout - 0.05 <= time.monotonic() - began < AMPLE
        assert answer.json == {"cursor": cursor, "gap": False, "messages": []}
        assert "connection" not in answer.headers
    server.assert_healthy()


@pytest.mark.parametrize("kind", ["stream", "events"])
def test_silent_streams_have_heartbeats(start: Start, kind: str) -> None:
    server = start("--heartbeat", "1")
    readers = [Reader(subscribe(server, kind, "beats"), kind) for _ in range(10)]
    began = time.monotonic()
    for reader in readers:
        while reader.heartbeats < 3:
            reader.read()
    assert 2.5 <= time.monotonic() - began < AMPLE
    server.publish("user:beats", "message")
    assert [reader.until(1) for reader in readers] == [["message"]] * 10
    server.assert_healthy()


def test_a_test_stream_has_no_heartbeat(start: Start) -> None:
    server = start("--heartbeat", "0.1", "--poll-timeout", "1")
    reader = Reader(subscribe(server, "test", "silent"), "test")
    server.request("GET", "/poll/other")  # a second and more
    server.publish("user:silent", "message")
    assert reader.until(1) == ["message"]
    assert reader.heartbeats == 0


@pytest.mark.parametrize("kind", ["stream", "events"])
def test_a_stream_that_was_woken_when_its_heartbeat_was_due_does_not_flood(start: Start, kind: str) -> None:
    server = start("--heartbeat", "0.3", "--send-buffer", "4608")
    reader = Reader(subscribe(server, kind, "flood", Narrow), kind)
    began = time.monotonic()
    for number in range(8):
        reader.client.sock.settimeout(0.4 + number / 20)
        with contextlib.suppress(TimeoutError):  # a heartbeat becomes due; it may or may not be sent by now
            while True:
                reader.read()
                assert reader.heartbeats <= 20 + 10 * (time.monotonic() - began), f"{reader.heartbeats} heartbeats"
        reader.client.sock.settimeout(TIMEOUT)
        server.publish("user:flood", big(number, 60_000))
        reader.until(number + 1)
    assert reader.got == [big(number, 60_000) for number in range(8)]
    server.assert_healthy()


@pytest.mark.parametrize("path", ["/healthz", "/poll/idle?timeout=0", "/poll/idle?timeout=0.2"])
def test_an_idle_connection_is_closed_in_time(start: Start, path: str) -> None:
    server = start("--idle-timeout", "1.5")
    client = connect(server)
    for _ in range(3):
        assert client.request("GET", path).status == 200
    began = time.monotonic()
    assert client.at_end()
    assert 1.4 <= time.monotonic() - began < AMPLE
    assert closed(server) == ({} if path == "/healthz" else {"answered": 3})


# -- deleted, drained


@pytest.mark.parametrize("count", [1, 40], ids=["one", "many"])
def test_deleting_a_channel_ends_those_who_sleep_on_it(start: Start, count: int) -> None:
    server = start()
    cursor = server.request("GET", "/poll/user:gone?timeout=0.001").json["cursor"]
    polls = [connect(server) for _ in range(count)]
    for poll in polls:
        assert poll.request("GET", "/healthz").status == 200  # so that the poll below wakes an idle one
        poll.ask("GET", f"/poll/user:gone?since={cursor}")
    readers = [Reader(subscribe(server, kind, "gone"), kind) for kind in STREAMS for _ in range(count)]
    both = [connect(server) for _ in range(count)]
    for client in both:
        client.ask("GET", "/stream/user:gone,user:kept")
        assert client.read_head().status == 200
        assert client.read_chunk() == b"\n"
    other = Reader(subscribe(server, "events", "kept"), "events")
    settled(server, 5 * count + 1)
    assert server.request("DELETE", "/channels/user:gone").json["subscribers"] == 5 * count
    for poll in polls:
        assert poll.read().json == {"cursor": cursor, "gap": False, "messages": []}
        assert poll.request("GET", "/healthz").status == 200
    for reader in readers:
        reader.read()
        assert reader.ended
    for client in both:
        assert list(client.chunks()) == []
    settled(server, 1)
    assert closed(server) == {"answered": 1, "deleted": 5 * count}
    server.publish("user:gone", "next")
    server.publish("user:kept", "message")
    assert other.until(1) == ["message"]
    server.assert_healthy()


@only_asleep
@pytest.mark.parametrize("kind", STREAMS)
def test_a_stream_whose_socket_is_full_when_its_channel_is_deleted_ends_properly(start: Start, kind: str) -> None:
    """It sleeps because the kernel has taken everything; the last chunk may find no room there."""
    server = start("--send-buffer", "4608", kind=Probed)
    assert isinstance(server, Probed)
    for _ in range(10):
        reader = Reader(subscribe(server, kind, "full", Narrow), kind)
        settled(server, 1)
        sent: list[str] = []
        while not server.awake():  # in small steps, until one does not fit
            sent.append(f"{len(sent)}".ljust(150, "x"))
            server.publish("user:full", sent[-1])
        server.request("DELETE", "/channels/user:full")
        assert reader.until(len(sent) + 1) == sent
        assert reader.ended
    server.assert_healthy()


def test_a_drain_answers_and_ends_all_who_sleep(start: Start) -> None:
    server = start("--grace", "60")
    cursor = server.request("GET", "/poll/a?timeout=0.001").json["cursor"]
    polls, again, idle = ([connect(server) for _ in range(20)] for _ in range(3))
    for poll in polls:
        poll.ask("GET", f"/poll/a?since={cursor}")
    for client in [*again, *idle]:
        assert client.request("GET", "/healthz").status == 200
    for client in again:
        client.ask("GET", f"/poll/a?since={cursor}")
    readers = [Reader(subscribe(server, kind, "a"), kind) for kind in STREAMS for _ in range(20)]
    settled(server, 100)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    for client in [*polls, *again]:
        answer = client.read()
        assert answer.json == {"cursor": cursor, "gap": False, "messages": []}
        assert answer.headers["connection"] == "close"
        assert client.at_end()
    for reader in readers:
        assert reader.until(1) == []
        assert reader.ended
        assert reader.client.at_end()
    assert all(client.at_end() for client in idle)
    assert server.process.wait(TIMEOUT) == 0
    assert time.monotonic() - began < AMPLE
    assert "cut off" not in server.log.read_text()


@pytest.mark.parametrize("kind", ["poll", *STREAMS])
def test_a_drain_while_something_is_being_written_waits_for_that_and_no_longer(start: Start, kind: str) -> None:
    server = start("--grace", "60", "--send-buffer", "4608")
    client = subscribe(server, kind, "a", Narrow)
    settled(server, 1)
    for number in range(1 if kind == "poll" else 3):
        server.publish("user:a", big(number, 60_000))
    server.process.send_signal(signal.SIGTERM)
    wait_until(lambda: "stopping" in server.log.read_text())
    began = time.monotonic()
    if kind == "poll":
        assert data_of(client.read()) == [big(0, 60_000)]
    else:
        reader = Reader(client, kind)
        assert reader.until(4) == [big(number, 60_000) for number in range(3)]
        assert reader.ended
    assert client.at_end()
    assert server.process.wait(TIMEOUT) == 0
    assert time.monotonic() - began < AMPLE
    assert "cut off" not in server.log.read_text()


@pytest.mark.parametrize("what", ["acknowledged", "early request"])
def test_a_drain_loses_nothing_that_was_asked_or_acknowledged(start: Start, what: str) -> None:
    server = start("--grace", "60")
    cursor = server.request("GET", "/poll/a?timeout=0.001").json["cursor"]
    clients = [connect(server) for _ in range(40)]
    for client in clients:
        client.ask("GET", f"/poll/a?since={cursor}")
    settled(server, 40)
    if what == "acknowledged":
        server.publish("a", "message")
    else:
        for client in clients:
            client.ask("GET", "/healthz")
        server.request("GET", "/healthz")
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    for client in clients:
        answer = client.read()
        assert [message["data"] for message in answer.json["messages"]] == (["message"] if what == "acknowledged" else [])
    assert server.process.wait(TIMEOUT) == 0
    assert time.monotonic() - began < AMPLE


# -- what an answer carries


def test_a_poll_that_slept_has_the_headers_of_its_own_origin(start: Start) -> None:
    origins = ["https://a.example", "https://b.example:8443"]
    server = start("--origins", ",".join(origins))
    asked: list[str | None] = [*origins, None, "https://evil.example"]
    clients = [connect(server) for _ in asked]
    cursor = server.request("GET", "/poll/a?timeout=0.001").json["cursor"]
    for number in range(3):  # the first on a fresh connection, the others on one that slept
        for client, origin in zip(clients, asked, strict=True):
            client.ask("GET", f"/poll/a?since={cursor}", headers={} if origin is None else {"Origin": origin})
        settled(server, len(asked))
        server.publish("a", str(number))
        for client, origin in zip(clients, asked, strict=True):
            answer = client.read()
            assert data_of(answer) == [str(number)]
            assert answer.headers.get("access-control-allow-origin") == (origin if origin in origins else None)
            assert ("access-control-expose-headers" in answer.headers) == (origin in origins)
            assert answer.headers["cache-control"] == "no-store"
            cursor = answer.json["cursor"]
        settled(server, 0)
    for origin in origins:
        for kind in ("stream", "events"):
            client = connect(server)
            client.ask("GET", f"/{kind}/a", headers={"Origin": origin})
            assert client.read_head().headers["access-control-allow-origin"] == origin
    server.assert_healthy()


@pytest.mark.parametrize("path", ["/poll/same?timeout=0", "/poll/same?timeout=0.1", "/stream/same", "/events/same", "/test/same"])
@pytest.mark.parametrize("flags", [(), ("--origins", "https://a.example")], ids=["plain", "origins"])
def test_the_short_way_answers_like_the_long_way(start: Start, path: str, flags: Sequence[str]) -> None:
    """An escape makes the same request go the long way."""
    server = start(*flags)
    heads = []
    for target in (path, path.replace("same", "s%61me")):
        client = connect(server)
        for request in ("/healthz", target):
            client.ask("GET", request)
            head = client.read_head()
            if request == "/healthz" or target.startswith("/poll"):
                client.read_body()
        head.headers.pop("date")
        head.headers.pop("vary", None)  # without an Origin it only speaks to caches, and no-store has done that
        heads.append((head.status, head.headers))
    assert heads[0] == heads[1]


def test_a_request_line_beyond_the_limit_is_refused_on_a_sleeping_connection_too(start: Start) -> None:
    server = start("--max-header", "1000")
    for fresh in (True, False):
        client = connect(server)
        if not fresh:
            assert client.request("GET", "/poll/a?timeout=0").status == 200
        answer = client.request("GET", "/poll/a?timeout=0&x=" + "1" * 2000)
        assert (answer.status, answer.json["error"]) == (431, "header-too-large"), fresh


@pytest.mark.parametrize(
    "target", ["/poll/a?timeout", "/poll/a?timeout=x", "/poll/a?since=x", "/poll/a?timeout=1&timeout", "/poll/!", "/poll/"]
)
def test_what_is_refused_is_refused_on_a_sleeping_connection_too(server: Server, target: str) -> None:
    statuses = []
    client = connect(server)
    for _ in range(2):
        statuses.append(client.request("GET", target).status)
        assert client.request("GET", "/healthz").status == 200
    assert statuses in ([400, 400], [404, 404])


@pytest.mark.parametrize("kind", ["poll", "stream", "events"])
def test_on_several_channels_sleepers_get_each_message_and_a_cursor_that_resumes(server: Server, kind: str) -> None:
    names = ",".join(f"several-{kind}-{letter}" for letter in "abc")
    rng = random.Random(5)
    first = server.request("GET", f"/poll/{names}?timeout=0.001").json["cursor"]
    sent: list[str] = []
    got: list[str] = []
    cursor = first
    client = connect(server)
    if kind == "poll":
        client.ask("GET", f"/poll/{names}?since={cursor}")
    else:
        client.ask("GET", f"/{kind}/{names}")
        assert client.read_head().status == 200
        client.read_chunk()
    reader = Reader(client, kind)
    for number in range(30):
        channel = f"several-{kind}-{rng.choice('abc')}"
        joined(server, channel)
        sent.append(str(number))
        server.publish(channel, sent[-1])
        if kind == "poll":
            answer = client.read()
            got += data_of(answer)
            cursor = answer.json["cursor"]
            assert cursor.count(".") == 2
            client.ask("GET", f"/poll/{names}?since={cursor}")
        else:
            got = reader.until(number + 1)
        assert got == sent
    replay = server.request("GET", f"/poll/{names}?since={first}")
    assert sorted(data_of(replay), key=int) == sent
    server.assert_healthy()


@pytest.mark.parametrize("way", ["HTTP/1.0", "close"])
@pytest.mark.parametrize("kind", ["poll", *STREAMS])
def test_clients_that_close_after_one_answer_are_served(server: Server, kind: str, way: str) -> None:
    user = f"plain-{way[-1]}-{kind}"
    path = f"/test/{user}" if kind == "test" else f"/{kind}/user:{user}"
    version = "HTTP/1.0" if way == "HTTP/1.0" else "HTTP/1.1"
    clients = [connect(server) for _ in range(20)]
    for client in clients:
        client.send(f"GET {path} {version}\r\nHost: x\r\n{'Connection: close' if way == 'close' else 'X: y'}\r\n\r\n".encode())
    joined(server, f"user:{user}", 20)
    server.publish(f"user:{user}", "message")
    if kind != "poll":
        assert server.request("DELETE", f"/channels/user:{user}").status == 200
    for client in clients:
        head = client.read_head()
        assert (head.status, head.headers["connection"]) == (200, "close")
        assert b"message" in client.read_body()
        assert client.at_end()
    server.assert_healthy()


FORMS = {
    "HTTP/1.0": b"GET %b HTTP/1.0\r\n\r\n",
    "HTTP/1.0, kept": b"GET %b HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    "close": b"GET %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "a byte behind": b"GET %b HTTP/1.1\r\nHost: x\r\n\r\nG",
    "a body": b"GET %b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhe",
}
"""Requests that wait, in forms that are not the usual one."""


@only_asleep
def test_in_whatever_form_it_asked_who_sleeps_has_no_greenlet(start: Start) -> None:
    server = start(kind=Probed)
    assert isinstance(server, Probed)
    asked = 0
    for form in (*FORMS.values(), b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" + b"G" * 15_000):
        for path in (b"/poll/forms?timeout=300", b"/events/forms", b"/stream/forms", b"/test/forms"):
            if len(form) < 15_000 or b"poll" not in path:
                connect(server).send(form % path)
                asked += 1
    settled(server, asked)
    wait_until(lambda: server.awake() == 0)
    assert server.probe()["parked"] >= asked
    server.assert_healthy()


@only_asleep
def test_what_a_client_that_waits_costs_is_small_whatever_it_sent(start: Start) -> None:
    server = start()
    names = ",".join(f"{number}.".ljust(128, "x") for number in range(64)).encode()
    usual = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n"
    count = 0

    def come(form: bytes, path: bytes, clients: int) -> int:
        nonlocal count
        for _ in range(clients):
            connect(server).send(form % path)
            count += 1
            if not count % 10:
                server.request("GET", "/healthz")  # which comes after them
        settled(server, count)
        return server.memory()

    for form, path in [*((form, b"/events/costs") for form in FORMS.values()), (usual + b"G" * 15_000, b"/events/costs"), (usual, names)]:
        path = b"/poll/%b?timeout=300" % names if path is names else path
        before = come(form, path, 30)
        each = (come(form, path, 300) - before) / 300
        assert each < 3000, f"{each:.0f} bytes a client for {(form % path)[:200]!r}"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("end", ["message", "deleted", "shutdown"])
def test_a_poll_in_whatever_form_says_truly_whether_its_connection_goes_on(start: Start, form: str, end: str) -> None:
    server = start()
    client = connect(server)
    client.send(FORMS[form] % b"/poll/a?timeout=300")
    joined(server, "a")
    if end == "message":
        server.publish("a", "message")
    elif end == "deleted":
        server.request("DELETE", "/channels/a")
    else:
        server.process.send_signal(signal.SIGTERM)
    answer = client.read()  # no header is there twice
    assert (answer.status, data_of(answer)) == (200, ["message"] if end == "message" else [])
    goes_on = end != "shutdown" and form in ("HTTP/1.0, kept", "a byte behind")
    assert (answer.headers.get("connection") == "close") == (not goes_on)
    if not goes_on:
        assert client.at_end()
    elif form == "a byte behind":
        client.send(b"ET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.read().status == 200
    else:
        assert answer.headers["connection"] == "keep-alive"
        client.send(FORMS[form] % b"/healthz")
        assert client.read().status == 200
    if end == "shutdown":
        assert server.process.wait(TIMEOUT) == 0


@only_asleep
def test_who_sleeps_has_no_greenlet(start: Start) -> None:
    server = start(kind=Probed)
    assert isinstance(server, Probed)
    for kind in ("poll", *STREAMS):
        for number in range(25):
            subscribe(server, kind, str(number))
    for _ in range(25):
        assert connect(server).request("GET", "/healthz").status == 200
    settled(server, 100)
    wait_until(lambda: server.awake() == 0)
    assert server.probe()["parked"] >= 125
    for number in range(25):
        server.publish(f"user:{number}", "message")
    settled(server, 75)
    wait_until(lambda: server.awake() == 0)
    while OPEN:
        OPEN.pop().close()
    wait_until(lambda: server.probe() == {"awake": 0, "parked": 0, "networks": {}})
    server.assert_healthy()
