"""The router at the level of frames: a worker here is a bare socket that says what it likes."""

import gc
import logging
import resource
import socket
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec.inspect
import pytest

from comet import router as router_module
from comet.backplane import frames
from comet.backplane.memory import Bounds
from comet.history import PAGE
from comet.kernel import limits
from comet.message import Position, Publication
from comet.router import Router
from tests.contracts.suite import Clock
from tests.harness import TIMEOUT

_told = msgspec.msgpack.Decoder(frames.Told)


class Peer:
    """A worker's end of a link. If its `version` is not empty, that is what it says first."""

    def __init__(self, path: str, version: str = frames.VERSION) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.sock.setblocking(False)
        self.cutter = frames.Cutter()
        if version:
            self.say(frames.Hello(version))

    def say(self, *bodies: Any) -> None:
        self.sock.sendall(b"".join(map(frames.frame, bodies)))

    def heard(self) -> list[frames.Told]:
        """All that has come but for the greeting; raises EOFError at the end of the link."""
        told: list[frames.Told] = []
        while True:
            try:
                data = self.sock.recv(1 << 16)
            except BlockingIOError:
                return told
            if not data:
                raise EOFError
            told += [one for one in map(_told.decode, self.cutter.feed(data)) if not isinstance(one, frames.Welcome)]

    def answer(self) -> Any:
        """What the last answer that has come says."""
        *_, last = [one for one in self.heard() if isinstance(one, frames.Answer)]
        return msgspec.msgpack.decode(last.value)


class Served:
    """A router, and the way to it."""

    def __init__(self, folder: Path, **bounds: Any) -> None:
        self.path = str(folder / "router")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.clock = Clock()
        self.router = Router(self.listener, Bounds(**bounds), self.clock)
        self.peers: list[Peer] = []

    def peer(self) -> Peer:
        self.peers.append(Peer(self.path))
        self.turn()
        return self.peers[-1]

    def turn(self, count: int = 4) -> None:
        for _ in range(count):
            assert self.router.turn(0)

    def close(self) -> None:
        for peer in self.peers:
            peer.sock.close()
        self.router.close()
        self.listener.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    service = Served(tmp_path, linger=10.0)
    yield service
    service.close()


SAID: list[frames.Asked] = [
    frames.Subscribe(1, ["a", "b"], [None, "oldest"], PAGE),
    frames.Publish(2, [Publication("a", b"1"), Publication("b", b"2", "kind", "key")]),
    frames.Send(3, "a,b", "message", b"3", None),
    frames.Info(4, "a"),
    frames.Resume(5, [("c", 2, Position(1, 7))]),
    frames.Read(6, "a", "oldest", 1, PAGE),
    frames.Totals(7),
    frames.Peek(8, ["a", "d"], [None, "oldest"], PAGE),
]


@pytest.mark.parametrize("version", ["1-0123456789abcdef", ""])
def test_a_worker_of_another_version_is_told_which_the_router_has_and_turned_away(served: Served, version: str) -> None:
    peer = Peer(served.path, version)
    peer.sock.setblocking(True)
    peer.sock.settimeout(TIMEOUT)
    if not version:
        peer.say(frames.Totals(1))  # as before there were greetings
    served.turn()
    data = peer.sock.recv(1 << 16)
    assert [_told.decode(body) for body in peer.cutter.feed(data)] == [frames.Welcome(frames.VERSION)]
    assert peer.sock.recv(1) == b""
    assert not served.router.links
    served.peer().say(frames.Totals(1))
    served.turn()
    assert served.peers[0].answer()["channels"] == 0
    peer.sock.close()


def test_a_worker_of_another_version_that_has_gone_before_it_is_greeted_ends_its_own_link_alone(served: Served) -> None:
    good, gone = served.peer(), Peer(served.path, "1-0123456789abcdef")
    gone.sock.close()
    served.turn()
    good.say(frames.Totals(1))
    served.turn()
    assert good.answer()["channels"] == 0
    assert len(served.router.links) == 1


def test_the_version_tells_frames_apart_and_nothing_else() -> None:
    assert frames._version() == frames.VERSION
    assert "object at" not in repr(msgspec.inspect.multi_type_info([frames.Asked, frames.Told]))


def test_frames_may_be_cut_anywhere(served: Served) -> None:
    wire = b"".join(map(frames.frame, SAID))
    for cut in range(1, len(wire)):
        peer = served.peer()
        peer.sock.sendall(wire[:cut])
        served.turn(1)
        peer.sock.sendall(wire[cut:])
        served.turn(2)
        assert [one.call for one in peer.heard() if isinstance(one, frames.Answer)] == [1, 2, 3, 4, 5, 6, 7, 8], cut
        peer.sock.close()
        served.turn(1)
    assert not served.router.links
    assert not served.router._interest


def test_with_more_workers_than_cores_what_comes_within_a_rest_is_handled_together(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher, other, subscriber = served.peer(), served.peer(), served.peer()
    subscriber.say(frames.Subscribe(1, ["a"], [None], PAGE))
    served.turn()
    subscriber.heard()
    monkeypatch.setattr(served.router, "_cores", 0)  # the publisher and the subscriber are two too many
    monkeypatch.setattr(router_module, "REST_A_WORKER", 0.25)
    monkeypatch.setattr(router_module, "MOST_REST", 1.0)
    time.sleep(0.55)
    publisher.say(frames.Publish(2, [Publication("a", b"1")]))
    began = time.monotonic()
    served.turn(1)
    assert time.monotonic() - began < 0.4, "after a silence it is handled at once"
    assert len(subscriber.heard()) == 1
    publisher.say(frames.Publish(3, [Publication("a", b"2")]))
    other.say(frames.Publish(4, [Publication("a", b"3")]))
    served.turn(1)
    assert time.monotonic() - began >= 0.5
    assert len(subscriber.heard()) == 1, "both in one frame"
    assert publisher.answer()
    assert other.answer()


def test_who_has_woken_few_does_not_rest_and_a_rest_is_short_whatever_was_done(served: Served) -> None:
    few = 2 * limits.cores()
    assert served.router.rest(0) == served.router.rest(few) == 0
    assert 0 < served.router.rest(few + 1) < served.router.rest(few + 10) < router_module.MOST_REST
    assert served.router.rest(10_000) == router_module.MOST_REST


def test_what_is_sent_byte_by_byte_is_whole_in_the_end() -> None:
    wire = b"".join(map(frames.frame, SAID))
    for size in (1, 2, 3, 5, 64):
        cutter = frames.Cutter()
        bodies = [bytes(body) for start in range(0, len(wire), size) for body in cutter.feed(wire[start : start + size])]
        assert bodies == [frames.encode(one) for one in SAID]


@pytest.mark.parametrize(
    "garbage",
    [b"\xff" * 64, b"\0" * 8, frames.frame(frames.Info(1, "a"))[:-1] + b"\xc1", b"\x03\0\0\0\x91\x63\x00"],
)
def test_garbage_closes_that_link_only_and_is_logged(served: Served, garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    good, bad = served.peer(), served.peer()
    for peer in (good, bad):
        peer.say(frames.Subscribe(1, ["a"], [None], PAGE))
    served.turn()
    bad.heard()
    bad.sock.sendall(garbage)
    served.turn()
    with pytest.raises((EOFError, ConnectionResetError)):
        bad.heard()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    good.say(frames.Info(2, "a"))
    served.turn()
    assert good.answer()[0] == 1


def test_a_link_that_ends_in_the_middle_of_a_frame_is_over(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    one, other = served.peer(), served.peer()
    one.say(frames.Subscribe(1, ["a"], [None], PAGE))
    one.sock.sendall(frames.frame(frames.Totals(2))[:3])
    served.turn()
    one.sock.close()
    served.turn()
    assert not caplog.records
    other.say(frames.Info(1, "a"))
    served.turn()
    assert other.answer()[0] == 0
    served.clock.now += 11
    served.router.backplane.expire()
    assert served.router.backplane.totals()["channels"] == 0


def test_answers_to_a_worker_that_does_not_take_them_are_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "MAX_WAITING", 1 << 20)
    peer = served.peer()
    peer.say(frames.Publish(0, [Publication("a", b"x" * 100_000)]))
    served.turn()
    peer.heard()
    peer.say(*(frames.Read(number, "a", "oldest", None, PAGE) for number in range(1, 1001)))  # which come in one piece
    most = 0
    for _ in range(10):
        served.turn()
        (link,) = served.router.links.values()
        most = max(most, link.waiting)
    assert most < 1_400_000
    answered: list[int] = []
    for _ in range(10_000):
        answered += [one.call for one in peer.heard() if isinstance(one, frames.Answer)]
        if len(answered) == 1000:
            break
        served.turn(1)
    assert answered == list(range(1, 1001))
    peer.say(frames.Totals(2000))
    served.turn()
    assert peer.answer()["channels"] == 1


def test_a_link_that_ends_where_channels_rest_at_the_bound_harms_nothing(tmp_path: Path) -> None:
    service = Served(tmp_path, max_idle=2)
    one, other = service.peer(), service.peer()
    one.say(frames.Subscribe(1, [f"c{number}" for number in range(10)], [None] * 10, PAGE))
    other.say(frames.Subscribe(1, ["c0", "d"], [None] * 2, PAGE))
    service.turn()
    one.sock.close()
    service.turn()
    other.say(frames.Totals(2))
    service.turn()
    assert other.answer()["channels"] == 4  # two held, two at rest
    service.close()


def test_counts_are_of_the_log_they_were_said_for(served: Served) -> None:
    one, other = served.peer(), served.peer()
    one.say(frames.Subscribe(1, ["a"], [None], PAGE))
    served.turn()
    epoch = one.answer()[0][0][0]
    other.say(frames.Delete(1, "a"))
    served.turn()
    one.say(
        frames.Interest([("a", epoch, 5)]),
        frames.Subscribe(2, ["a"], [None], PAGE),
        frames.Interest([("a", epoch, 5)]),
        frames.Info(3, "a"),
    )
    served.turn()
    assert one.answer()[0] == 1
    one.say(frames.Logout(["a"]), frames.Publish(4, [Publication("a", b"1")]))  # it has subscribed again: no logout
    served.turn()
    assert any(isinstance(told, frames.Deliver) for told in one.heard())


def test_what_a_turn_has_for_a_worker_is_one_frame(served: Served) -> None:
    one, other = served.peer(), served.peer()
    one.say(frames.Subscribe(1, ["a", "b", "c"], [None] * 3, PAGE))
    served.turn()
    one.heard()
    other.say(frames.Publish(1, [Publication("a", b"1"), Publication("b", b"2")]), frames.Send(2, "a,c,d", "greeting", b"3", None))
    served.turn()
    (told,) = one.heard()
    assert isinstance(told, frames.Deliver)
    found = [(item.kind, item.data, [(channel, offset) for channel, _, offset in item.places]) for item in told.items]
    assert found == [("message", b"1", [("a", 1)]), ("message", b"2", [("b", 1)]), ("greeting", b"3", [("a", 2), ("c", 1)])]


def test_a_frame_of_messages_is_never_much_longer_than_one_of_them(served: Served) -> None:
    one, other = served.peer(), served.peer()
    one.say(frames.Subscribe(1, ["a"], [None], PAGE))
    served.turn()
    one.heard()
    other.say(frames.Publish(1, [Publication("a", b"%04d" % number * 250) for number in range(200)]))
    served.turn(1)
    sizes: list[int] = []
    data: list[bytes] = []
    while len(data) < 200:
        served.turn(1)
        for body in one.cutter.feed(one.sock.recv(1 << 16)):
            told = _told.decode(body)
            assert isinstance(told, frames.Deliver)
            sizes.append(len(body))
            data += [item.data for item in told.items]
    assert data == [b"%04d" % number * 250 for number in range(200)]
    assert max(sizes) <= router_module.FRAME + 1100
    assert len(sizes) == pytest.approx(200_000 / router_module.FRAME, abs=2)


def test_a_channel_with_one_subscriber_costs_little(served: Served) -> None:
    peer = served.peer()
    count = 20_000
    wires = [
        frames.frame(frames.Subscribe(start, [f"user:{number:07}" for number in range(start, start + 50)], [None] * 50, PAGE))
        for start in range(0, count, 50)
    ]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for wire in wires:
            peer.sock.sendall(wire)
            served.turn(1)
            peer.heard()
        cost = (tracemalloc.get_traced_memory()[0] - before) / count
    finally:
        tracemalloc.stop()
    assert served.router.backplane.totals()["channels"] == count
    assert cost < 500, cost


def test_nothing_that_is_said_leaves_a_cycle(served: Served) -> None:
    """What the router holds is frozen each second (`collector.keep`): a cycle would stay for ever."""
    times = 50

    def all_of_it() -> None:
        for _ in range(times):
            peer = served.peer()
            peer.sock.sendall(b"".join(map(frames.frame, SAID)))
            served.turn()
            peer.heard()
            peer.sock.close()
            served.turn(1)

    all_of_it()
    gc.collect()
    gc.disable()
    try:
        all_of_it()
        assert gc.collect() < times
    finally:
        gc.enable()


# -- out of descriptors


def test_who_can_not_be_let_in_waits_and_the_others_are_served(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    peer = served.peer()
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    late = Peer(served.path)
    resource.setrlimit(resource.RLIMIT_NOFILE, (late.sock.fileno(), hard))
    try:
        for _ in range(3):
            served.turn()
            assert served.router.turn(0.05), "it goes round for nothing"
            served.router.accept_again()
        peer.say(frames.Totals(1))
        served.turn()
        assert peer.answer()["channels"] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    assert [one.message for one in caplog.records] == [
        "a worker can't be let in ([Errno 24] Too many open files); trying again each second"
    ]
    late.say(frames.Totals(2))
    served.router.accept_again()
    served.turn()
    assert late.answer()["channels"] == 0
    late.sock.close()
