"""The swarm against a server that does what a test tells it: what is counted, what is a failure, and who comes back how."""

import socket as stdlib
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.server import StreamServer

from loadtest.client import Connection
from loadtest.counting import Counts
from loadtest.swarm import Swarm, Target
from loadtest.verify import FEED, body, number
from loadtest.wire import BOTH, STREAM, TEST, Endpoint
from tests.harness import HAS_IPV6, wait_until

HEAD = b"HTTP/1.1 200 OK\r\nComet-Cursor: ab-0\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(text: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(text), text)


def line(count: int) -> bytes:
    return chunk(body(number(1, count, FEED), 0) + b"\n")


def stream_message(count: int, offset: int, epoch: str = "ab") -> bytes:
    text = body(number(1, count, FEED), 0).decode()
    return chunk(f'{{"id":"{epoch}-{offset}","channel":"user:0","type":"message","data":"{text}"}}\n'.encode())


class Play:
    """A server whose `answer` is called for each connection with its socket and what it was asked; and a swarm on it."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
        self.requests: list[str] = []
        self.hosts: set[str] = set()
        self.sockets: list[Any] = []
        self.answer: Callable[[Any], None] = lambda sock: sock.sendall(HEAD + chunk(b"welcome\n"))
        self.server = StreamServer((host, 0), self._serve)
        self.server.start()
        self.counts = Counts(clock=lambda: 1_000_000)
        self.swarm: Swarm | None = None
        self.greenlet: Any = None

    def _serve(self, sock: Any, _: Any) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += sock.recv(4096)
        self.requests.append(data.decode().split(" ")[1])
        self.hosts.add(data.decode().split("Host: ")[1].split("\r\n")[0])
        self.sockets.append(sock)
        self.answer(sock)
        gevent.sleep(60)  # the handler's end would close it

    def start(self, clients: int, endpoint: Endpoint = TEST, sources: tuple[str, ...] = ()) -> Swarm:
        target = Target(self.host, self.server.server_port, sources)
        self.swarm = Swarm(target, range(clients), [endpoint], self.counts, rate=1e6)
        self.greenlet = gevent.spawn(self.swarm.run)
        return self.swarm

    def failures(self) -> dict[str, int]:
        return {what: count for (_, what), count in self.counts.failures.items()}

    def close(self) -> None:
        if self.greenlet is not None:
            self.greenlet.kill()
        self.server.stop()


@pytest.fixture
def play() -> Iterator[Play]:
    made = Play()
    yield made
    made.close()


def test_clients_open_each_as_its_own_user_and_messages_are_counted(play: Play) -> None:
    play.start(20)
    wait_until(lambda: play.counts.open == 20)
    assert sorted(play.requests) == sorted(f"/test/{user}" for user in range(20))
    for sock in play.sockets:
        sock.sendall(line(1))
    wait_until(lambda: play.counts.received == 20)
    assert list(play.counts.ledger.counts) == [1] * 20
    assert set(play.counts.ledger.sums) == {number(1, 1, FEED)}
    assert play.counts.opening.total == 20
    assert not play.failures()


@pytest.mark.skipif(not HAS_IPV6, reason="no IPv6 here")
@pytest.mark.parametrize("sources", [(), ("::1",)], ids=["the system's", "its own"])
def test_clients_reach_an_ipv6_address(sources: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.client.socket", socket)  # as under Locust
    play = Play("::1")
    try:
        play.start(20, sources=sources)
        wait_until(lambda: play.counts.open == 20)
        for sock in play.sockets:
            sock.sendall(line(1))
        wait_until(lambda: play.counts.received == 20)
        assert play.hosts == {f"[::1]:{play.server.server_port}"}
        assert not play.failures()
        with closing(Connection(Target("::1", play.server.server_port, sources), 0)) as alone:  # a client with a greenlet
            alone.send(TEST.request(7, "x"))
            assert alone.start()[0] == 200
            assert next(alone.chunks()) == b"welcome\n"
    finally:
        play.close()


def test_messages_may_come_cut_joined_or_with_the_opening(play: Play) -> None:
    wire = HEAD + chunk(b"welcome\n") + line(1) + line(2) + line(3)

    def answer(sock: Any) -> None:
        sock.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
        for start in range(0, len(wire), 97):
            sock.sendall(wire[start : start + 97])
            gevent.sleep(0.005)

    play.answer = answer
    play.start(1)
    wait_until(lambda: play.counts.received == 3)
    assert play.counts.ledger.sums[0] == sum(number(1, count, FEED) for count in (1, 2, 3))
    assert not play.failures()


def test_more_than_is_read_at_once_is_read_to_its_end(play: Play) -> None:
    play.start(1)
    wait_until(lambda: play.counts.open == 1)
    play.sockets[0].sendall(b"".join(line(count) for count in range(1, 2001)))
    wait_until(lambda: play.counts.received == 2000)
    assert not play.failures()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "closed: by the server"),
        (b"0\r\n\r\n", "closed: the answer ended"),
        (b"zz\r\n\r\n", "closed: malformed: "),
        (chunk(b"no message\n"), "closed: malformed: "),
        (line(1), "closed: by the server"),
    ],
)
def test_a_client_that_is_closed_is_a_failure_and_comes_back(play: Play, data: bytes, said: str) -> None:
    play.start(1)
    wait_until(lambda: play.counts.open == 1)
    play.sockets[0].sendall(data)
    play.sockets[0].shutdown(socket.SHUT_WR)
    wait_until(lambda: play.failures())
    assert [what for what in play.failures() if what.startswith(said)]
    wait_until(lambda: play.counts.open == 1 and len(play.requests) == 2)
    assert play.counts.received == (data == line(1))


def test_a_client_that_is_refused_is_a_failure_and_tries_again(play: Play) -> None:
    play.answer = lambda sock: sock.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
    play.start(3)
    wait_until(lambda: play.failures() == {"not opened: answered 503": 3})
    assert play.counts.open == 0
    wait_until(lambda: len(play.requests) == 6)


def test_an_answer_that_ends_in_its_middle_is_a_failure(play: Play) -> None:
    swarm = play.start(1)
    epoll = swarm._epoll
    ended: list[bool] = []

    class Later:
        """Tells of what has come when the connection has ended."""

        def __getattr__(self, name: str) -> Any:
            return getattr(epoll, name)

        def poll(self, *arguments: Any) -> Any:
            return epoll.poll(*arguments) if ended else []

    def answer(sock: Any) -> None:
        sock.sendall(HEAD[:40])
        sock.shutdown(socket.SHUT_WR)
        ended.append(True)

    swarm._epoll = Later()
    play.answer = answer
    wait_until(lambda: play.failures().get("not opened: by the server"))


def test_an_answer_without_a_cursor_is_a_failure(play: Play) -> None:
    play.answer = lambda sock: sock.sendall(HEAD.replace(b"Comet-Cursor: ab-0\r\n", b"") + chunk(b"\n"))
    play.start(1, STREAM)
    wait_until(lambda: play.failures().get("not opened: malformed: no Comet-Cursor"))


def test_nobody_listens(play: Play) -> None:
    play.server.stop()
    play.start(2)
    wait_until(lambda: play.failures().get("not opened: ECONNREFUSED", 0) >= 2)


def test_an_address_of_another_machine_is_a_failure_of_those_that_have_it(play: Play) -> None:
    play.start(2, sources=("192.0.2.1",))
    wait_until(lambda: play.failures().get("not opened: EADDRNOTAVAIL", 0) >= 3)
    assert not play.greenlet.ready()
    assert list(play.counts.ledger.ids) == [0, 1]


def test_places_find_what_is_lost_doubled_or_out_of_order(play: Play) -> None:
    play.start(1, STREAM)
    wait_until(lambda: play.counts.open == 1)
    for count, offset in enumerate((1, 2, 5, 5, 4), 1):
        play.sockets[0].sendall(stream_message(count, offset))
        wait_until(partial(lambda count: play.counts.received == count, count))
    play.sockets[0].sendall(chunk(b'{"gap":true,"cursor":"cd-0"}\n'))
    wait_until(lambda: play.failures() == {"lost": 2, "doubled": 1, "out of order": 1, "gap": 1})


def test_a_gap_is_told_to_those_without_places_too(play: Play) -> None:
    play.start(1, BOTH)
    wait_until(lambda: play.counts.open == 1)
    play.sockets[0].sendall(chunk(b'{"gap":true,"cursor":"cd-0,ef-0"}\n'))
    wait_until(lambda: play.failures() == {"gap": 1})


def test_who_leaves_comes_back_with_the_cursor_of_the_last_message(play: Play) -> None:
    swarm = play.start(1, STREAM)
    wait_until(lambda: play.counts.open == 1)
    play.sockets[0].sendall(stream_message(1, 1) + stream_message(2, 2))
    wait_until(lambda: play.counts.received == 2)
    play.answer = lambda sock: sock.sendall(HEAD + chunk(b"\n") + stream_message(3, 3))
    swarm.churning = 1000.0
    wait_until(lambda: play.counts.left == 1)
    swarm.churning = 0.0
    wait_until(lambda: play.counts.received == 3)
    assert play.requests == ["/stream/user:0", "/stream/user:0?since=ab-2"]
    assert not play.failures()


def test_an_error_of_its_own_ends_it_loudly(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    swarm = play.start(1)
    wait_until(lambda: play.counts.open == 1)

    def fail(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(swarm, "_batch", fail)
    play.sockets[0].sendall(line(1))
    with pytest.raises(ZeroDivisionError):
        play.greenlet.get(timeout=10)
