"""Locust users, without a server."""

import re
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from locust.exception import StopUser

from loadtest import users
from loadtest.client import Answer
from loadtest.options import target
from loadtest.users import DirectSender, FriendSender, StreamUser
from tests.loadtest.work import process


class Server:
    """Stands for the connections to one."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.made = self.closed = 0

    def connection(self, *_: Any, **__: Any) -> "Server":
        self.made += 1
        return self

    def post(self, *_: Any) -> Answer:
        return Answer(200, b'{"targets":1,"delivered":1}')

    def close(self) -> None:
        self.closed += 1

    def monotonic(self) -> float:
        return self.now


def test_a_sender_does_not_use_a_connection_that_the_server_may_have_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    monkeypatch.setattr(users, "Connection", server.connection)
    monkeypatch.setattr(users, "time", server)
    environment, worker, _ = process()
    sender = FriendSender(environment)
    for pause, made in ((0.0, 1), (29.0, 1), (74.0, 2), (1.0, 2)):
        server.now += pause
        sender.publish()
        assert (server.made, server.closed) == (made, made - 1)
    assert (worker.counts.begun, worker.counts.sent) == (4, 4)


def test_a_direct_message_is_for_one_with_a_feed_of_its_own() -> None:
    environment, worker, _ = process("--clients", "120", "--endpoints", "everyone:49,test:1")
    sender = DirectSender(environment)
    own = {user for user in range(120) if "{id}" in worker.endpoints[user % 50].path}
    assert 1 < len(own) < 4
    assert {sender.choose() for _ in range(200)} == own


@pytest.mark.parametrize(("clients", "endpoints"), [(100, "everyone"), (20, "everyone:49,test:1")])
def test_where_nobody_has_a_feed_of_its_own_there_are_no_direct_messages(clients: int, endpoints: str) -> None:
    environment, _, _ = process("--clients", str(clients), "--endpoints", endpoints)
    with pytest.raises(StopUser):
        DirectSender(environment).choose()


def test_an_answer_that_ends_before_its_first_chunk_is_no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ending(Server):
        def start(self) -> tuple[int, dict[bytes, bytes]]:
            return 200, {}

        def send(self, _: bytes) -> None: ...

        def chunks(self) -> Iterator[bytes]:
            return iter(())

    server = Ending()
    monkeypatch.setattr(users, "Connection", server.connection)
    monkeypatch.setattr(users, "AGAIN", 0)
    environment, worker, _ = process()
    StreamUser(environment).stay()
    assert worker.counts.failures == {("/test", "not opened: Malformed an answer that ended before it began"): 1}
    assert server.closed == 1


def test_the_host_header_has_the_name_that_was_given() -> None:
    assert target("http://localhost:8001", "").name == "localhost:8001"
    assert target("http://localhost:8001", "").host == "127.0.0.1"


@pytest.mark.parametrize("host", ["http://[::1]:8001", "http://[::1]:8001/", "[::1]:8001", "http://[0:0::1]:8001"])
def test_a_server_may_be_at_an_ipv6_address(host: str) -> None:
    there = target(host, "::1, [::1]")
    assert (there.host, there.port, there.family) == ("::1", 8001, socket.AF_INET6)
    assert there.name in ("[::1]:8001", "[0:0::1]:8001")
    assert there.sources == ("::1", "::1")
    assert [there.source(client) for client in (0, 2000, 10**6)] == ["::1"] * 3
    assert target(host, "").source(0) == "", "there is one loopback address: 127.1.0.1 is none of its kind"
    assert target("http://127.0.0.1:8001", "").family == socket.AF_INET


def test_a_name_with_addresses_of_both_kinds_is_its_ipv4_address(monkeypatch: pytest.MonkeyPatch) -> None:
    six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 0, 0, 0))
    four = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))
    for found, expected in (([six, four], "192.0.2.1"), ([four, six], "192.0.2.1"), ([six], "2001:db8::1")):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, found=found, **__: found)
        assert target("http://server.example:8000", "").host == expected


@pytest.mark.parametrize(
    ("host", "sources", "told"),
    [
        ("unix:/run/comet.sock", "", "not supported yet"),
        ("http://::1:8000", "", "http://[::1]:8000"),
        ("http://[::1:8000", "", "http://[::1]:8000"),
        ("http://127.0.0.1:x", "", "http://[::1]:8000"),
        ("https://127.0.0.1", "", "plain HTTP"),
        ("http://[::1]:8000", "127.0.0.2", "of its kind"),
        ("http://127.0.0.1:8000", "::1", "of its kind"),
        ("http://127.0.0.1:8000", "127.0.0.2,eth0", "eth0"),
        ("http://" + "a" * 70, "", "label"),
    ],
)
def test_what_can_be_no_target_is_told(host: str, sources: str, told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        target(host, sources)
