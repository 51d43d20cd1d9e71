"""Who is let in, and when. (The rest of the server is tested whole: tests/behaviour.)"""

import errno
import os
import resource
import struct
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import gevent
import pytest
from gevent import socket

from comet.backplane.memory import MemoryBackplane
from comet.errors import Refusal
from comet.framing import POLL, TEXT
from comet.hub import Hub
from comet.message import Position, Publication, Receipt
from comet.server import short, transport
from comet.server.connection import Connection
from comet.server.wsgi import MOST_ACCEPTED, MOST_WOKEN, CometServer
from comet.settings import Settings
from comet.stats import Stats
from comet.subscriber import Subscriber, Wish
from tests.harness import TIMEOUT, Client, wait_until


class Nobody:
    """A hub without subscribers."""

    def subscribe(self, wish: object) -> object:
        raise AssertionError

    def subscribe_asleep(self, wish: object, bed: object) -> object:
        raise AssertionError

    def subscribe_soon(self, wish: object, bed: object, done: object, failed: object) -> bool:
        raise AssertionError


@pytest.fixture
def server() -> Iterator[CometServer]:
    def application(environ: object, start_response: Callable[..., object]) -> list[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    one = CometServer(listener, application, lambda *_: None, lambda *_: None, Nobody(), Settings(), Stats(), 1000)
    one.start()
    yield one
    one.drain()
    assert one.join(5) == 0


def test_a_newcomer_is_served_while_those_who_are_in_never_cease(server: CometServer) -> None:
    """Behind a proxy every request wakes its connection. Where there were always some to be woken, nobody was accepted."""
    with Client(server.server_port) as client:
        assert client.request("GET", "/").body == b"ok"
    going = True

    def again(_: object) -> None:
        if going:
            server._crew.run(again)

    for _ in range(10 * MOST_ACCEPTED):
        server._crew.run(again)
    try:
        with gevent.Timeout(TIMEOUT):
            for _ in range(20):
                with Client(server.server_port) as client:
                    assert client.request("GET", "/").body == b"ok"
    finally:
        going = False


def test_more_than_are_accepted_at_once_are_served(server: CometServer) -> None:
    clients = [Client(server.server_port) for _ in range(5 * MOST_ACCEPTED)]
    for client in clients:
        client.ask("GET", "/")
    for client in clients:
        assert client.read().body == b"ok"
        client.close()
    assert server.stats.accepted == len(clients)


def listening() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(16)
    return listener


def test_it_accepts_in_the_place_of_others_as_long_as_it_is_told_to(server: CometServer) -> None:
    with listening() as one, listening() as other:
        server.stand_in([one, other])
        server.stand_in([other])
        server.stand_in([other])
        for _ in range(3):
            with Client(other.getsockname()[1]) as client:
                assert client.request("GET", "/").body == b"ok"
        assert server.stats.accepted == 3
        server.stand_in([])
        for listener in (one, other):
            with Client(listener.getsockname()[1]) as client, Client(server.server_port) as own:
                client.ask("GET", "/")
                assert own.request("GET", "/").body == b"ok"
                listener.accept()[0].close()  # it waits for whose queue it is


def test_without_descriptors_it_accepts_in_nobodys_place_until_it_is_told_again(
    server: CometServer, caplog: pytest.LogCaptureFixture
) -> None:
    with listening() as other, Client(other.getsockname()[1]) as client:
        client.ask("GET", "/")
        taken, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            server.stand_in([other])
            wait_until(lambda: caplog.records)
            gevent.sleep(0.1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (taken, hard))
        assert [one.message for one in caplog.records] == [
            "can't accept in the place of a worker that is missing: [Errno 24] Too many open files"
        ]
        server.stand_in([other])
        assert client.read().body == b"ok"
        server.stand_in([])


def test_who_is_refused_is_told_so_and_does_not_count(server: CometServer) -> None:
    server.capacity = 1
    with Client(server.server_port) as first:
        assert first.request("GET", "/").status == 200
        with Client(server.server_port) as second:
            answer = second.request("GET", "/")
            assert (answer.status, answer.json["error"]) == (503, "worker-full")
            assert second.at_end()
        assert server.stats.connections == 1


def test_who_was_to_wait_is_released_where_the_answer_fails_and_the_client_has_gone(
    server: CometServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """So that a failure can't be told either."""

    class Waiting:
        one_shot = True
        offset = 1
        places = None
        framing = POLL
        said: ClassVar[list[str]] = []

        def end(self, reason: str) -> None:
            self.said.append(reason)

        def close(self) -> None:
            self.said.append("closed")

    def application(environ: dict[str, Any], start_response: object) -> object:
        environ["comet.park"](Waiting())
        raise RuntimeError("as a test has it")

    def gone(connection: Connection, data: object) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(server, "application", application)
    monkeypatch.setattr(Connection, "send", gone)
    with Client(server.server_port) as client:
        client.ask("GET", "/")
        wait_until(lambda: server.stats.accepted and not server.stats.connections)
    assert Waiting.said == ["lost", "closed"]
    assert "as a test has it" in caplog.text


class Asking:
    """A hub whose backplane has not answered yet: `done` and `failed` are what it would call."""

    def __init__(self, server: CometServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hub = Hub(MemoryBackplane(), server.stats, 1 << 20, gevent.get_hub().loop.run_callback)
        self.done: Callable[[Any], object] | None = None
        self.failed: Callable[[Refusal], object] | None = None
        self.wish = Wish(("a",), (None,), TEXT, None)
        self.subscribe = self.hub.subscribe
        self.asleep = self.soon = True
        monkeypatch.setattr(server.shortcut, "_make", lambda *_: self.wish)
        monkeypatch.setattr(server, "subscribe", self.hub.subscribe)
        monkeypatch.setattr(server._newcomers, "_hub", self)

    def subscribe_asleep(self, wish: Wish, bed: Any) -> Subscriber | None:
        return None if self.soon or not self.asleep else self.hub.subscribe_asleep(wish, bed)

    def subscribe_soon(self, wish: Wish, bed: Any, done: Callable[[Any], object], failed: Callable[[Refusal], object]) -> bool:
        if not self.soon:
            return False

        def later(subscriber: Any) -> None:
            self.done = lambda _: done(subscriber)

        self.failed = failed
        return self.hub.subscribe_soon(wish, bed, later, failed)


def test_a_first_request_waits_for_its_channel_without_a_greenlet(server: CometServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking(server, monkeypatch)
    with Client(server.server_port) as client:
        client.ask("GET", "/test/1")
        wait_until(lambda: asking.done)
        assert not server.awake
        assert server.stats.connections == server.stats.requests == 1
        assert asking.done is not None
        asking.done(None)
        client.read_head()
        client.read_chunk()
        asking.hub.publish([Publication("a", b"x")])
        assert b"x" in client.read_chunk()
        assert not server.awake
    wait_until(lambda: not server.stats.connections)
    assert server.stats.closed == {"hang-up": 1}


def test_one_newcomer_that_fails_costs_the_others_nothing(server: CometServer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = 0

    def make(*_: object) -> Wish:
        nonlocal made
        made += 1
        if made == 3:
            raise RuntimeError("as a test has it")
        return asking.wish

    asking = Asking(server, monkeypatch)
    asking.soon = False
    monkeypatch.setattr(server.shortcut, "_make", make)
    server.stop_accepting()
    clients = [Client(server.server_port) for _ in range(8)]
    for number, client in enumerate(clients):
        client.ask("GET", f"/test/{number}")
    server.start_accepting()
    for number, client in enumerate(clients):
        if number == 2:
            assert client.at_end()
        else:
            assert client.read_head().status == 200
    assert (server.stats.errors, server.stats.connections) == (1, 7)
    for client in clients:
        client.close()
    wait_until(lambda: not server.stats.connections)
    assert not server.addresses.own


@pytest.mark.parametrize("seen", [0, 2])
def test_a_newcomer_is_served_at_its_accept_whether_it_has_missed_something_or_not(
    server: CometServer, monkeypatch: pytest.MonkeyPatch, seen: int
) -> None:
    """Its greenlet, if it needs one, is not one more callback, behind those of others who never cease."""
    asking = Asking(server, monkeypatch)
    (first, _) = asking.hub.publish([Publication("a", body) for body in (b"one", b"two")])
    assert isinstance(first, Receipt)
    asking.wish = Wish(("a",), (Position(first.position.epoch, seen),), POLL, 0.1)
    begun: list[Any] = []
    begin = server._crew.begin

    def run(*_: object) -> None:
        raise AssertionError("it was put off")

    def begin_noted(*arguments: Any) -> None:
        begun.append(arguments)
        begin(*arguments)

    monkeypatch.setattr(server._newcomers, "_hub", asking.hub)
    monkeypatch.setattr(server._crew, "run", run)
    monkeypatch.setattr(server._crew, "begin", begin_noted)
    with Client(server.server_port) as client:
        client.ask("GET", "/poll/a")
        if seen:
            wait_until(lambda: server.stats.clients["poll"])
            asking.hub.publish([Publication("a", b"three")])
        messages = client.read().json["messages"]
    assert [message["data"] for message in messages] == (["three"] if seen else ["one", "two"])
    assert len(begun) == (not seen)


def test_a_newcomer_that_joins_at_the_end_of_a_drain_is_cut_off(server: CometServer, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking(server, monkeypatch)
    with Client(server.server_port) as client:
        client.ask("GET", "/test/1")
        wait_until(lambda: asking.done)
        server.drain()
        assert server.join(0.6) == 1
        assert client.at_end()
    assert server.stats.connections == 0
    assert asking.done is not None
    asking.done(None)  # late
    assert +server.stats.clients == {}


@pytest.mark.parametrize("headers", [{"Origin": "http://a"}, {"Connection": "close"}])
def test_a_first_request_is_judged_once_before_it_goes_the_long_way(
    server: CometServer, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    judged: list[bytes] = []
    monkeypatch.setattr(short, "judge", lambda method, block, *rest: judged.append(block))
    with Client(server.server_port) as client:
        assert client.request("GET", "/", headers=headers).body == b"ok"
    assert len(judged) == 1


@pytest.mark.parametrize("accept", ["text/event-stream", "*/*"])
@pytest.mark.parametrize("way", ["at its accept", "in a greenlet", "on a kept connection"])
def test_an_event_source_whose_channel_cannot_be_joined_is_told_when_to_come_back(
    server: CometServer, monkeypatch: pytest.MonkeyPatch, way: str, accept: str
) -> None:
    """On each of the short ways, which have thrown the headers away by then."""

    def refuse(wish: Wish) -> Subscriber:
        raise Refusal("backplane-away", "Nobody answers.")

    asking = Asking(server, monkeypatch)
    asking.soon = asking.asleep = way == "at its accept"
    monkeypatch.setattr(server, "subscribe", refuse)
    with Client(server.server_port) as client:
        if way == "on a kept connection":
            assert client.request("POST", "/").body == b"ok"
        client.ask("GET", "/events/1", headers={"Accept": accept})
        if way == "at its accept":
            wait_until(lambda: asking.failed)
            assert asking.failed is not None
            gevent.get_hub().loop.run_callback(asking.failed, Refusal("backplane-away", "Nobody answers."))
        answer = client.read()
        assert client.at_end()
    if accept == "*/*":
        assert (answer.status, answer.json["error"]) == (503, "backplane-away")
    else:
        assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert answer.body.startswith(b": backplane-away: Nobody answers.\nevent: comet\nretry: ")
    wait_until(lambda: not server.stats.connections)
    assert server.stats.refused == {"backplane-away": 1}
    assert not server.awake


def test_a_first_request_whose_channel_cannot_be_joined_is_told_why(server: CometServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "LINGER_SECONDS", 2 * TIMEOUT)
    asking = Asking(server, monkeypatch)
    with Client(server.server_port) as client:
        client.ask("GET", "/test/1")
        wait_until(lambda: asking.failed)
        assert asking.failed is not None
        gevent.get_hub().loop.run_callback(asking.failed, Refusal("backplane-away", "Nobody answers."))
        answer = client.read()
        assert (answer.status, answer.json["error"]) == (503, "backplane-away")
        wait_until(lambda: not server.stats.connections)  # it does not wait for the client
        assert client.at_end()
    assert server.stats.refused == {"backplane-away": 1}
    assert not server.awake


@pytest.mark.parametrize("way", ["answered", "at once", "in a greenlet", "idle"])
def test_who_cannot_be_watched_is_closed_and_counts_no_more(server: CometServer, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """As where fs.epoll.max_user_watches is met."""

    class Full:
        def register(self, descriptor: int, events: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    asking = Asking(server, monkeypatch)
    asking.soon = way == "answered"
    asking.asleep = way == "at once"
    if asking.asleep:
        asking.hub.publish([Publication("a", b"x")])  # of a channel that is there
    with Client(server.server_port) as client, monkeypatch.context() as patch:
        if way == "answered":
            client.ask("GET", "/test/1")
            wait_until(lambda: asking.done)
        patch.setattr(server.parking, "_epoll", Full())
        if way == "answered":
            assert asking.done is not None
            asking.done(None)
        elif way == "idle":
            client.ask("POST", "/")
            assert client.read().body == b"ok"
        else:
            client.ask("GET", "/test/1")
            if way == "in a greenlet":
                client.read_head()
                client.read_chunk()
        assert client.at_end()
    wait_until(lambda: not server.stats.connections)
    assert not server.awake
    assert +server.stats.clients == {}
    assert server.stats.closed == ({} if way == "idle" else {"lost": 1})
    assert server.stats.errors == (way in ("answered", "at once"))


def test_who_hangs_up_before_a_first_request_is_forgotten(server: CometServer) -> None:
    server.stop_accepting()
    for reset in (False, True):
        client = Client(server.server_port)
        if reset:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    server.start_accepting()
    wait_until(lambda: server.stats.accepted)
    wait_until(lambda: not server.stats.connections)
    assert server.stats.requests == 0


def test_a_failing_accept_loses_nobody_who_was_accepted_before(server: CometServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the limit on open files is met in the middle of a batch."""
    listener, calls = server.socket, 0

    class Failing:
        def _accept(self) -> object:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise OSError(errno.EMFILE, "Too many open files")
            return listener._accept()

    server.stop_accepting()
    clients = [Client(server.server_port) for _ in range(4)]
    server.start_accepting()
    with monkeypatch.context() as patch:
        patch.setattr(server, "socket", Failing())
        for client in clients:
            client.ask("GET", "/")
        for client in clients:
            assert client.read().status == 200
            client.close()
    assert calls > 4


def test_who_is_woken_with_many_others_takes_turns_with_them(server: CometServer, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[Connection] = []
    monkeypatch.setattr(server._crew, "run", lambda work, rest: woken.append(work.__self__))
    crowded = [False] * MOST_WOKEN + [True] * 5
    for _ in range(2):
        woken.clear()
        for descriptor in range(1000, 1000 + len(crowded)):
            server.resume(descriptor, "192.0.2.1", b"")
        assert [connection.crowded for connection in woken] == crowded
        gevent.sleep(0.001)  # another turn of the loop


def test_who_takes_turns_from_the_start_is_answered(server: CometServer) -> None:
    with Client(server.address[1]) as client:
        assert client.request("GET", "/healthz").status == 200
        server._woken = MOST_WOKEN  # as if others had been
        client.ask("GET", "/healthz")
        assert client.read().status == 200
