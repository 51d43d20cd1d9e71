"""Who is let in, and when. (The rest of the server is tested whole: tests/behaviour.)"""

import errno
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import gevent
import pytest
from gevent import socket

from comet.server.connection import Connection
from comet.server.wsgi import MOST_ACCEPTED, CometServer
from comet.settings import Settings
from comet.stats import Stats
from tests.harness import Client, wait_until


class Nobody:
    """A hub without subscribers."""

    def subscribe(self, wish: object) -> object:
        raise AssertionError

    def subscribe_asleep(self, wish: object, bed: object) -> object:
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
        with gevent.Timeout(10):
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
