"""Locust users, without a server."""

import logging
import re
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from locust.exception import StopUser

from loadtest import control, users
from loadtest.client import Answer
from loadtest.control import ALONE, Master, Worker
from loadtest.options import target
from loadtest.users import Churn, DirectSender, EventsUser, EveryoneSender, FriendSender, LongTailSender, StreamUser, SwarmUser
from tests.loadtest.work import environment, process


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


class ByHand:
    """A run without a shape of some classes of users, in this process; it reports when a test says so."""

    def __init__(self, *classes: type[Any], flags: tuple[str, ...] = ()) -> None:
        self.environment = environment(*flags, classes=classes)
        assert self.environment.runner is not None
        self.master, self.worker = Master(self.environment, self.environment.runner), Worker(self.environment, self.environment.runner)
        self.environment.events.test_start.fire(environment=self.environment)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.environment.events.test_stop.fire(environment=self.environment)  # type: ignore[no-untyped-call]

    def user(self, kind: type[Any]) -> Any:
        """One that has started."""
        made = kind(self.environment)
        made.on_start()
        return made


@pytest.fixture
def by_hand() -> Iterator[Any]:
    """Makes such runs, and ends them."""
    made: list[ByHand] = []

    def make(*classes: type[Any], flags: tuple[str, ...] = ()) -> ByHand:
        made.append(ByHand(*classes, flags=flags))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_by_hand_ids_follow_the_number_of_clients(by_hand: Any) -> None:
    run = by_hand(StreamUser, EventsUser, FriendSender, flags=("--clients", "3"))
    clients = [run.user(kind) for kind in (StreamUser, EventsUser) * 5]
    assert [one.number for one in clients] == list(range(10))
    for leaves in (7, 2):
        clients[leaves].on_stop()
    assert [run.user(StreamUser).number for _ in range(3)] == [2, 7, 10]


@pytest.mark.parametrize("kind", [FriendSender, LongTailSender, DirectSender])
def test_by_hand_a_sender_sends_to_those_who_are_connected(by_hand: Any, kind: type[Any]) -> None:
    run = by_hand(StreamUser, kind)
    sender = run.user(kind)
    run.worker._report()
    assert sender.pace() == 0, "nobody is there yet"
    for number in (0, 1, 4, 9):
        run.worker.connected(number)
    run.worker._report()
    assert sender.pace() == 100
    assert {sender.choose() for _ in range(500)} == {0, 1, 4, 9}
    run.worker.disconnected(4)
    run.worker._report()
    assert {sender.choose() for _ in range(500)} == {0, 1, 9}
    for number in (0, 1, 9):
        run.worker.disconnected(number)
    run.worker._report()
    assert sender.pace() == 0


def test_by_hand_those_who_are_connected_in_another_process_are_sent_to_as_well(by_hand: Any) -> None:
    run = by_hand(StreamUser, FriendSender)
    sender = run.user(FriendSender)
    run.worker.connected(0)
    run.worker._report()
    run.master._reported(
        run.environment,
        SimpleNamespace(node_id="other", data=run.worker.counts.report() | {"obeyed": 0, "senders": 3, "connected": [1, 3]}),
    )
    assert {sender.choose() for _ in range(200)} == {0, 1, 3}
    assert sender.pace() == 100 / 4


def test_by_hand_senders_share_the_rate_whoever_comes_or_goes(by_hand: Any) -> None:
    run = by_hand(StreamUser, FriendSender, LongTailSender, flags=("--message-rate", "60"))
    run.worker.connected(0)
    senders = [run.user(kind) for kind in (FriendSender, LongTailSender, FriendSender)]
    run.worker._report()
    assert [one.pace() for one in senders] == [20, 20, 20]
    senders.pop().on_stop()
    run.worker._report()
    assert [one.pace() for one in senders] == [30, 30]


def test_without_clients_senders_send_to_all_ids(by_hand: Any) -> None:
    run = by_hand(FriendSender, flags=("--clients", "4"))
    sender = run.user(FriendSender)
    run.worker._report()
    assert sender.pace() == 100
    assert {sender.choose() for _ in range(200)} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("targets", "warnings"), [([1] * 3 * ALONE, 1), ([1] * (ALONE - 1) + [5] + [1] * ALONE, 0), ([1] * (ALONE - 1), 0)]
)
def test_by_hand_it_is_said_once_that_no_friends_are_loaded(
    by_hand: Any, caplog: pytest.LogCaptureFixture, targets: list[int], warnings: int
) -> None:
    run = by_hand(StreamUser, FriendSender)
    with caplog.at_level(logging.WARNING):
        for count in targets:
            run.worker.followed(count)
    assert sum("make friends" in record.getMessage() for record in caplog.records) == warnings


def failures(run: ByHand) -> dict[str, int]:
    return {str(error.error): error.occurrences for error in run.environment.stats.errors.values()}


@pytest.mark.parametrize(("kind", "task"), [(SwarmUser, "hold"), (Churn, "hold"), (EveryoneSender, "send")])
def test_by_hand_a_class_that_wants_a_shape_says_so_once(
    by_hand: Any, caplog: pytest.LogCaptureFixture, kind: type[Any], task: str
) -> None:
    run = by_hand(StreamUser, kind)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with pytest.raises(StopUser):
                getattr(run.user(kind), task)()
    ((said, count),) = failures(run).items()
    assert (count, "COMET_SHAPE" in said) == (1, True)
    assert caplog.text.count(f"{kind.__name__}: ") == 1


def test_a_swarm_by_hand_is_alone_in_its_process(by_hand: Any) -> None:
    run = by_hand(SwarmUser, FriendSender)
    run.worker.swarm = object()  # as it has while it runs
    with pytest.raises(StopUser):
        run.user(SwarmUser).hold()
    assert ["one swarm" in said for said in failures(run)] == [True]


@pytest.mark.parametrize(("flags", "left_out"), [((), True), (("SwarmUser",), False), (("--class-picker",), False)])
def test_by_hand_what_wants_a_shape_is_left_out_unless_it_was_named(
    caplog: pytest.LogCaptureFixture, flags: tuple[str, ...], left_out: bool
) -> None:
    made = environment(*flags, classes=(StreamUser, SwarmUser, EveryoneSender))
    made.host = None
    with caplog.at_level(logging.WARNING):
        control.set_up(made, made.runner)  # type: ignore[arg-type]
    assert made.user_classes == ([StreamUser] if left_out else [StreamUser, SwarmUser, EveryoneSender])
    assert ("EveryoneSender, SwarmUser left out: " in caplog.text) == left_out
    assert made.host == control.HOST
