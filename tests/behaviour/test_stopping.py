"""Stopping and starting: SIGTERM and SIGINT end everything in order and in time; start-up refuses
what would be unsafe or impossible, in a sentence."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gevent
import pytest
from gevent import socket
from gevent import subprocess as green

from tests.conftest import Start
from tests.harness import AMPLE, HALF_A_POST, HAS_IPV6, ROOT, TIMEOUT, Client, Server, wait_until

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


class Ended(NamedTuple):
    """How a server ended: its exit status, the seconds since the signal, its log."""

    status: int
    seconds: float
    log: str


class Stopping:
    """Sends a signal at once; `wait` for the end. (A second signal would mean something else.)"""

    def __init__(self, server: Server, number: int = signal.SIGTERM) -> None:
        self.server = server
        self._began = time.monotonic()
        server.process.send_signal(number)

    def begun(self) -> "Stopping":
        """Come back when the server has noticed."""
        wait_until(lambda: "stopping" in self.server.log.read_text())
        return self

    def wait(self) -> Ended:
        """The end; nothing unexpected may have been logged."""
        status = self.server.process.wait(TIMEOUT)
        ended = Ended(status, time.monotonic() - self._began, self.server.log.read_text())
        assert status is not None, f"it did not stop: {ended.log}"
        assert "Traceback" not in ended.log, ended.log
        return ended


@pytest.fixture
def clients() -> Iterator[list[Client]]:
    """Clients that stay connected until the test has ended, whatever the server does: it must not
    depend on them to close."""
    them: list[Client] = []
    yield them
    for client in them:
        client.close()


@pytest.fixture
def many(start: Start, clients: list[Client]) -> Iterator[Server]:
    """A server with a minute of grace; a test that needs more than `AMPLE` of it has failed."""
    yield start("--grace", "60")
    for client in clients:
        client.close()


# -- in order


@BOTH
def test_waiting_polls_are_answered_with_their_cursor(many: Server, clients: list[Client], number: int) -> None:
    cursor = many.publish("a", "before")
    for _ in range(20):
        client = many.client()
        clients.append(client)
        client.ask("GET", f"/poll/a?since={cursor}&timeout=300")
    wait_until(lambda: many.clients() == 20)
    stopping = Stopping(many, number)
    for client in clients:
        answer = client.read()
        assert answer.status == 200
        assert answer.json == {"cursor": cursor, "gap": False, "messages": []}
        assert answer.headers["connection"] == "close"
        assert client.at_end()
    ended = stopping.wait()
    assert (ended.status, ended.seconds < AMPLE) == (0, True), ended


@BOTH
@pytest.mark.parametrize("path", ["/events/a", "/stream/a", "/test/a"])
def test_streams_end_with_a_proper_last_chunk_and_the_server_closes(many: Server, clients: list[Client], path: str, number: int) -> None:
    for _ in range(5):
        client = many.client()
        clients.append(client)
        client.ask("GET", path)
        assert client.read_head().status == 200
        client.read_chunk()
    wait_until(lambda: many.clients() == 5)
    began = time.monotonic()
    stopping = Stopping(many, number)
    for client in clients:
        if path == "/events/a":
            assert re.fullmatch(rb"retry: ([23][0-9]{3}|4000)\nevent: comet\n\n", client.read_chunk())
        assert client.read_chunk() == b"", "the last chunk"
        assert client.at_end()
    seconds = time.monotonic() - began
    assert seconds < AMPLE, f"the connections stayed open for {seconds:.1f} s after their last chunk"
    assert stopping.wait().status == 0


@pytest.mark.parametrize("headers", [{}, {"Connection": "close"}], ids=["kept-alive", "close"])
@pytest.mark.parametrize("path", ["/events/a", "/stream/a"])
def test_events_end_without_a_last_chunk_where_that_is_set(start: Start, clients: list[Client], path: str, headers: dict[str, str]) -> None:
    server = start("--events-end", "abort")
    for _ in range(5):
        client = server.client()
        clients.append(client)
        client.ask("GET", path, headers=headers)
        assert client.read_head().status == 200
        client.read_chunk()
    wait_until(lambda: server.clients() == 5)
    server.publish("a", "before")
    stopping = Stopping(server)
    for client in clients:
        client.read_until(b"before")  # what is due comes first
        rest = client.read_until(b"\r\n")
        while client.more():
            pass
        rest += client.buffer
        assert rest.endswith(b"0\r\n\r\n") == (path == "/stream/a"), rest
    assert stopping.wait().status == 0


def test_a_channel_that_is_deleted_ends_in_order_whatever_is_set(start: Start) -> None:
    server = start("--events-end", "abort")
    events = server.events("a")
    server.publish("a", "before")
    assert events.next().data == "before"
    assert server.request("DELETE", "/channels/a").status in (200, 204)
    with pytest.raises(EOFError):
        events.next()
    events.close()


def test_what_was_acknowledged_before_the_signal_is_still_delivered(many: Server, clients: list[Client]) -> None:
    client = many.client()
    clients.append(client)
    client.ask("GET", "/stream/a")
    client.read_head()
    client.read_chunk()
    lines = b"\n".join(json.dumps({"channel": "a", "data": str(number)}).encode() for number in range(2000))
    assert many.request("POST", "/publish", lines).status == 200
    stopping = Stopping(many)
    got = [json.loads(line)["data"] for line in client.read_body().splitlines() if line]
    assert got == [str(number) for number in range(2000)]
    assert stopping.wait().status == 0


@BOTH
def test_idle_connections_are_closed(many: Server, clients: list[Client], number: int) -> None:
    fresh = many.client()
    used = many.client()
    assert used.request("GET", "/healthz").status == 200
    clients += [fresh, used]
    wait_until(lambda: many.stats()["connections"] == 3)
    stopping = Stopping(many, number)
    assert fresh.at_end()
    assert used.at_end()
    ended = stopping.wait()
    assert (ended.status, ended.seconds < AMPLE) == (0, True), ended


def test_a_server_without_clients_stops_at_once(start: Start) -> None:
    ended = Stopping(start()).wait()
    assert ended.status == 0
    assert ended.seconds < AMPLE


def test_new_connections_are_refused_while_it_stops(start: Start) -> None:
    server = start("--grace", "60")
    with server.client() as under_way:
        under_way.send(HALF_A_POST)
        wait_until(lambda: server.stats()["requests"] >= 2 and server.stats()["connections"] == 2)
        stopping = Stopping(server).begun()

        def refused() -> bool:
            try:
                server.client().close()
            except ConnectionRefusedError:
                return True
            return False

        wait_until(refused, AMPLE)
        under_way.send(b"dy")
        answer = under_way.read()
        assert answer.status == 201
        assert answer.headers["connection"] == "close"
        assert under_way.at_end()
    assert stopping.wait().status == 0


def test_a_request_under_way_is_finished(start: Start) -> None:
    server = start("--grace", "60")
    with server.client() as body, server.client() as head, server.client() as batch:
        body.send(b"POST /publish/a HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\n")
        head.send(b"GET /channels/a HTTP/1.1\r\nHost:")
        batch.send(b"POST /publish HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n")
        wait_until(lambda: server.stats()["requests"] >= 3 and server.stats()["connections"] == 4)
        stopping = Stopping(server).begun()
        body.send(b"body")
        assert body.read().status == 201
        batch.send(b'20\r\n{"channel": "a", "data": "more"}\r\n0\r\n\r\n')
        answer = batch.read()
        assert (answer.status, list(answer.json)) == (200, ["id", "subscribers"])
        head.send(b" test\r\n\r\n")
        answer = head.read()
        assert (answer.status, answer.json["messages"]) == (200, 2)
        assert answer.headers["connection"] == "close"
        for client in (body, head, batch):
            assert client.at_end()
    ended = stopping.wait()
    assert (ended.status, ended.seconds < AMPLE) == (0, True)


def test_who_was_just_answered_may_ask_once_more(start: Start) -> None:
    """Its next request may have been on its way."""
    server = start("--grace", "60")
    with server.client() as polls, server.client() as publishes, server.client() as idles:
        cursor = polls.request("GET", "/poll/a?timeout=0.001").json["cursor"]
        for client in (publishes, idles):
            assert client.request("GET", "/healthz").status == 200
        stopping = Stopping(server).begun()
        published = publishes.request("POST", "/publish/a", b"last")
        polled = polls.request("GET", f"/poll/a?since={cursor}")
        assert (published.status, polled.status) == (201, 200)
        assert polled.json == {
            "cursor": published.json["id"], "gap": False,
            "messages": [{"id": published.json["id"], "channel": "a", "type": "message", "data": "last"}],
        }  # fmt: skip
        for client, answer in ((polls, polled), (publishes, published)):
            assert answer.headers["connection"] == "close"
            assert client.at_end()
        assert idles.at_end()
    ended = stopping.wait()
    assert (ended.status, ended.seconds < AMPLE) == (0, True)


@pytest.mark.parametrize("more", ["", "X-Plain: no\r\nOrigin: http://test\r\n"], ids=["short way", "bottle's"])
@pytest.mark.parametrize(
    ("path", "ends"),
    [
        ("/events/a?since=oldest", rb"retry: 2000\n.*\ndata: kept\nid: [0-9a-f]+-1\n\nretry: [0-9]+\n.*\n"),
        ("/stream/a?since=oldest", rb'\n\{.*"data":"kept"\}\n'),
        ("/poll/a?since=oldest", rb'\{"cursor":"[0-9a-f]+-1","gap":false,"messages":\[.*"data":"kept"\}\]\}'),
        ("/poll/b?timeout=20", rb'\{"cursor":"[0-9a-f]+-0","gap":false,"messages":\[\]\}'),
        ("/test/a", rb"comet welcomes you! Your id: a\n"),
    ],
)
def test_a_subscriber_that_comes_while_it_stops_gets_what_is_kept_and_ends(start: Start, path: str, ends: bytes, more: str) -> None:
    server = start("--grace", "60")
    server.publish("a", "kept")
    with server.client() as late:
        late.request("GET", "/healthz")  # a connection that was just answered
        stopping = Stopping(server).begun()
        late.send(f"GET {path} HTTP/1.1\r\nHost: test\r\n{more}\r\n".encode())
        answer = late.read()
        assert answer.status == 200
        assert re.fullmatch(ends, answer.body, re.DOTALL), answer.body
        assert late.at_end()
        if path.startswith("/poll"):
            assert answer.headers["connection"] == "close"
    assert stopping.wait().status == 0


def test_who_asks_whether_it_is_ready_while_it_stops_is_refused(start: Start) -> None:
    server = start("--grace", "60")
    with server.client() as asks:
        asks.send(b"GET /readyz HTTP/1.1\r\nHost:")
        wait_until(lambda: server.stats()["connections"] == 2)
        gevent.sleep(0.05)  # the bytes must have been read, which nothing shows
        stopping = Stopping(server).begun()
        asks.send(b" test\r\n\r\n")
        answer = asks.read()
        assert (answer.status, answer.json["error"]) == (503, "draining")
        assert int(answer.headers["retry-after"]) >= 1
        assert asks.at_end()
    assert stopping.wait().status == 0


# -- in time


def test_a_stuck_client_does_not_keep_it_beyond_the_grace_time(start: Start) -> None:
    server = start("--grace", "1", "--backlog", str(100 << 20))
    with server.client() as stuck, server.client() as other:
        stuck.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.ask("GET", "/stream/a")
        other.ask("GET", "/stream/a")
        wait_until(lambda: server.clients() == 2)
        other.read_head()
        other.read_chunk()
        for _ in range(200):
            server.publish("a", "x" * 50_000)
            other.read_chunk()
        stopping = Stopping(server)
        assert other.read_chunk() == b""
        ended = stopping.wait()
    assert ended.status == 0
    assert 0.8 < ended.seconds < AMPLE, ended
    assert re.search(r"cut off after [0-9.]+ s: 1$", ended.log, re.MULTILINE), ended.log


def test_a_request_that_never_ends_does_not_keep_it_beyond_the_grace_time(start: Start) -> None:
    server = start("--grace", "0.5")
    with server.client() as client:
        client.send(HALF_A_POST)
        wait_until(lambda: server.stats()["requests"] >= 2 and server.stats()["connections"] == 2)
        ended = Stopping(server).wait()
        assert client.at_end()
    assert ended.status == 0
    assert ended.seconds < AMPLE, ended


@BOTH
def test_a_second_signal_stops_at_once(tmp_path: Path, number: int) -> None:
    server = Server(tmp_path / "server.log", "--grace", "60")
    with server.client() as client:
        client.send(HALF_A_POST)
        wait_until(lambda: server.stats()["requests"] >= 2 and server.stats()["connections"] == 2)
        Stopping(server, number).begun()
        assert server.process.poll() is None
        ended = Stopping(server, number).wait()
    assert ended.status == 1
    assert ended.seconds < AMPLE
    assert "second signal" in ended.log


# -- starting


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python app.py` that is expected to end by itself."""
    done: subprocess.CompletedProcess[str] = green.run(
        [sys.executable, "app.py", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False, env={**os.environ, **environment},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_a_port_in_use_is_told_in_a_sentence(server: Server) -> None:
    done = run("--port", str(server.port))
    assert done.returncode == 1
    assert f"can't listen on 127.0.0.1 port {server.port}" in done.stderr
    assert "in use" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_a_host_that_is_not_ours_is_told_in_a_sentence() -> None:
    done = run("--port", "0", "--host", "192.0.2.1")
    assert done.returncode == 2, "not loopback, and no key"
    for host in ("192.0.2.1", "no-such-host.invalid", "a" * 70, "a..b", "[::1"):
        done = run("--port", "0", "--host", host, "--open")
        assert done.returncode == 1, host
        assert f"can't listen on {host}" in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")
@pytest.mark.parametrize("flags", [(), ("--workers", "2")], ids=["alone", "workers"])
def test_an_ipv6_address_may_be_written_as_in_a_url(start: Start, flags: tuple[str, ...]) -> None:
    server = start("--host", "[::1]", *flags)
    assert server.url == f"[::1]:{server.port}"
    with Client(server.port, "::1") as client:
        assert client.request("POST", "/publish/a", b"x").status == 201


def test_a_bad_origin_or_a_unix_socket_is_told_with_status_2() -> None:
    for flags, told in (
        (("--origins", "https://*.example"), "wildcard"),
        (("--origins", "a.example", "--workers", "2"), "such as https://example.org"),
        (("--host", "unix:/run/comet.sock"), "not supported yet"),
    ):
        done = run("--port", "0", *flags)
        assert (done.returncode, done.stdout) == (2, ""), flags
        assert told in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_listening_beyond_loopback_without_a_key_is_refused(host: str) -> None:
    done = run("--port", "0", "--host", host)
    assert done.returncode == 2
    assert "COMET_PUBLISH_KEY" in done.stderr
    assert "--open" in done.stderr
    assert done.stdout == ""


def test_open_or_a_key_allows_listening_everywhere(start: Start) -> None:
    opened = start("--host", "0.0.0.0", "--open")
    assert opened.request("POST", "/publish/a", b"x").status == 201
    keyed = start("--host", "0.0.0.0", COMET_PUBLISH_KEY="k")
    assert keyed.request("POST", "/publish/a", b"x").status == 401
    assert keyed.request("POST", "/publish/a", b"x", {"Authorization": "Bearer k"}).status == 201
    variable = start("--host", "0.0.0.0", COMET_OPEN="yes")
    assert variable.request("POST", "/publish/a", b"x").status == 201


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost"])
def test_loopback_needs_no_key(start: Start, host: str) -> None:
    server = start("--host", host)
    address = "127.0.0.1" if host == "localhost" and "[::1]" not in server.url else host
    if "[::1]" not in server.url:
        with Client(server.port, address) as client:
            assert client.request("POST", "/publish/a", b"x").status == 201
    assert "WARNING" not in server.log.read_text()


@pytest.mark.parametrize(
    "flags",
    [("--port", "70000"), ("--grace", "x"), ("--backlog", "1"), ("--nothing",), ("--heartbeat", "nan"), ("--max-body", "-1")],
    ids=" ".join,
)
def test_a_bad_flag_is_told_with_status_2(flags: tuple[str, ...]) -> None:
    done = run(*flags)
    assert done.returncode == 2
    assert flags[0] in done.stderr


def test_a_bad_variable_is_told_with_status_2() -> None:
    done = run(COMET_OPEN="perhaps")
    assert (done.returncode, "COMET_OPEN" in done.stderr) == (2, True)
    done = run(COMET_MAX_BODY="big")
    assert (done.returncode, "max-body" in done.stderr) == (2, True)


# -- again


def test_after_a_restart_the_old_cursor_is_told_one_gap(start: Start) -> None:
    first = start()
    first.publish("a", "one")
    cursor = first.publish("a", "two")
    with first.events("a,b") as events:
        both = events.cursor
    assert Stopping(first).wait().status == 0
    second = start("--port", str(first.port))
    assert second.port == first.port
    new = second.publish("a", "new")
    told = second.request("GET", f"/poll/a?since={cursor}").json
    assert (told["gap"], [message["id"] for message in told["messages"]]) == (True, [new])
    again = second.request("GET", f"/poll/a?since={told['cursor']}&timeout=0").json
    assert (again["gap"], again["messages"]) == (False, [])
    with second.events("a,b", both) as events:
        assert events.next().type == "gap"
        assert events.next().id is not None
        resumed = events.cursor
    with second.events("a,b", resumed) as events:
        live = second.publish("b", "live")
        event = events.next()
        assert (event.type, event.data) == ("message", "live")
        assert live in str(event.id)
