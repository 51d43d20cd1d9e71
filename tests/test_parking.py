"""Deadlines of what sleeps, as the parking keeps them: on socket pairs, with a floor that writes down what it is told."""

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import gevent
import pytest

from comet.server import parking as module
from comet.server.parking import BLOCK, Parking
from tests.harness import wait_until


class Floor:
    """Of connections: which were closed, and when."""

    def __init__(self) -> None:
        self.closed: list[float] = []

    def again(self, descriptor: int, network: str, data: bytes) -> bool:
        return False

    def resume(self, descriptor: int, network: str, said: bytes, subscriber: Any = None, rest: Any = b"") -> None:
        raise AssertionError("nothing here wakes")

    def gone(self, network: str) -> None:
        self.closed.append(time.monotonic())

    def rested(self, network: str) -> str:
        return network


class Framing:
    """Of a stream: with heartbeats or without."""

    one_shot = False

    def __init__(self, heartbeat: bytes) -> None:
        self.heartbeat = heartbeat

    def wire(self, pieces: Any, date: bytes) -> bytes:
        return self.heartbeat


class Sleeper:
    """What the parking asks of a subscriber that is sent nothing."""

    one_shot = False

    def __init__(self, framing: Framing) -> None:
        self.framing = framing
        self.descriptor = -1
        self.host: Any = None
        self.awake: Any = None
        self.ended = False

    def sleep(self, bed: Parking, descriptor: int) -> None:
        self.host, self.descriptor = bed, descriptor

    def encode(self, items: Any) -> list[bytes]:
        return []


Sleep = Callable[[str, float | None], socket.socket]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Parking]]:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(module, "WALK_SECONDS", 0.01)
    parkings: list[Parking] = []
    yield parkings
    for parking in parkings:
        parking.evict = lambda: None  # type: ignore[method-assign]
        parking.close()


@pytest.fixture
def floor() -> Floor:
    return Floor()


@pytest.fixture
def parking(made: list[Parking], floor: Floor) -> Parking:
    made.append(Parking(floor, idle_timeout=0.5, heartbeat=0.3, date=lambda: b""))
    return made[0]


def pair() -> tuple[socket.socket, int]:
    """A client, and the server's descriptor."""
    client, server = socket.socketpair()
    client.setblocking(False)
    server.setblocking(False)
    return client, server.detach()


def tcp_pair() -> tuple[socket.socket, int]:
    """The same over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        server, _ = listener.accept()
    client.setblocking(False)
    server.setblocking(False)
    return client, server.detach()


def test_an_idle_connection_is_closed_at_its_time(parking: Parking, floor: Floor) -> None:
    client, descriptor = pair()
    began = time.monotonic()
    parking.idle(descriptor, "")
    wait_until(lambda: floor.closed)
    assert floor.closed[0] - began >= 0.45
    wait_until(lambda: ended(client))
    client.close()


def ended(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False


def test_a_deadline_that_comes_sooner_than_the_others_of_its_block_is_kept(parking: Parking, floor: Floor) -> None:
    late, at = pair()
    parking.sleep(at, "", Sleeper(Framing(b"")), 3600.0)  # type: ignore[arg-type]
    soon, descriptor = pair()
    assert at // BLOCK == descriptor // BLOCK
    parking.idle(descriptor, "")
    wait_until(lambda: floor.closed)
    assert len(floor.closed) == 1
    parking.take(at)
    os.close(at)
    late.close()
    soon.close()


def test_heartbeats_go_on_and_on(parking: Parking) -> None:
    client, descriptor = pair()
    parking.sleep(descriptor, "", Sleeper(Framing(b":\n")), 0.3)  # type: ignore[arg-type]
    told = b""

    def three() -> bool:
        nonlocal told
        try:
            told += client.recv(100)
        except BlockingIOError:
            pass
        return len(told) >= 6

    began = time.monotonic()
    wait_until(three)
    assert time.monotonic() - began > 0.8
    parking.take(descriptor)
    os.close(descriptor)
    client.close()


def test_who_has_no_heartbeat_is_asked_for_a_sign_of_life(parking: Parking, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once in a silence, so that those who came together are not asked together; but for who has just given one."""
    asked: list[tuple[int, float]] = []
    monkeypatch.setattr(module, "SILENCE", 0.6)
    monkeypatch.setattr(module, "GRAIN", 10)
    monkeypatch.setattr(module, "probe", lambda descriptor: asked.append((descriptor, time.monotonic())))
    began = time.monotonic()  # the kernel counts a silence from the beginning of a connection
    pairs = [tcp_pair() for _ in range(50)]
    for _, descriptor in pairs:
        parking.sleep(descriptor, "", Sleeper(Framing(b"")), None)  # type: ignore[arg-type]
    speaker, heard = tcp_pair()
    parking.sleep(heard, "", Sleeper(Framing(b"")), None)  # type: ignore[arg-type]
    while len(counts := Counter(descriptor for descriptor, _ in asked)) < 50 or min(counts.values()) < 2:
        os.write(heard, b"x")  # which is acknowledged
        gevent.sleep(0.01)
    assert heard not in counts
    times: dict[int, list[float]] = {descriptor: [] for _, descriptor in pairs}
    for descriptor, when in asked:
        times[descriptor].append(when - began)
    firsts = sorted(those[0] for those in times.values())
    assert firsts[0] > 0.19
    assert firsts[-1] - firsts[0] > 0.3, "all at once"
    assert all(second - first > 0.5 for first, second, *_ in (those for those in times.values() if len(those) > 1))
    for client, descriptor in (*pairs, (speaker, heard)):
        parking.take(descriptor)
        os.close(descriptor)
        client.close()


def test_who_is_awake_and_watched_is_asked_for_a_sign_of_life_where_nothing_is_ever_sent_by_itself(
    parking: Parking, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With ``--hibernate off``, or while something is being sent."""
    asked: list[int] = []
    monkeypatch.setattr(module, "SILENCE", 0.6)
    monkeypatch.setattr(module, "GRAIN", 10)
    monkeypatch.setattr(module, "probe", asked.append)
    pairs = {patience: tcp_pair() for patience in (None, 5.0)}
    watched = {}
    for patience, (_, descriptor) in pairs.items():
        watched[patience] = Sleeper(Framing(b""))
        watched[patience].host = watched[patience].awake = SimpleNamespace(patience=patience)
        parking.watch(descriptor, watched[patience])  # type: ignore[arg-type]
    wait_until(lambda: len(asked) == 2)
    watched[None].ended = True  # and its last bytes are being sent
    wait_until(lambda: len(asked) == 3)
    assert set(asked) == {pairs[None][1]}
    assert not caplog.text
    for client, descriptor in pairs.values():
        parking.take(descriptor)
        os.close(descriptor)
        client.close()


def test_silences_of_a_block_end_together_but_not_those_of_all_blocks(parking: Parking) -> None:
    """Then it is walked for them seldom, and the blocks one after the other."""
    sleepers = {}
    for descriptor in (5, 6, 7, BLOCK + 5, 2 * BLOCK + 5):
        sleepers[descriptor] = Sleeper(Framing(b""))
        parking._epoll = NoEpoll(parking._epoll)  # those descriptors are nobody's
        parking.sleep(descriptor, "", sleepers[descriptor], None)  # type: ignore[arg-type]
    phases = {descriptor: parking._deadlines[descriptor] % module.GRAIN for descriptor in sleepers}
    assert phases[5] == phases[6] == phases[7]
    assert len(set(phases.values())) == 3


class NoEpoll:
    """Registers nobody."""

    def __init__(self, epoll: Any) -> None:
        self._epoll = epoll

    def register(self, descriptor: int, events: int) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


def test_without_anything_due_nothing_is_walked(parking: Parking, monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[float] = []
    monkeypatch.setattr(parking, "_walk", lambda: walks.append(time.monotonic()))
    client, descriptor = pair()
    parking.sleep(descriptor, "", Sleeper(Framing(b"")), 3600.0)  # type: ignore[arg-type]
    gevent.sleep(0.5)  # five looks
    assert walks == []
    parking.take(descriptor)
    os.close(descriptor)
    client.close()


def test_a_wait_beyond_ten_seconds_takes_no_appointment(parking: Parking) -> None:
    for one_shot, patience, appointments in (
        (False, None, 0), (False, 0.1, 0), (True, module.SHORT + 1, 0), (True, module.SHORT, 1), (True, 0.1, 1),
    ):  # fmt: skip
        client, descriptor = pair()
        sleeper = Sleeper(Framing(b":\n"))
        sleeper.one_shot = one_shot
        parking.sleep(descriptor, "", sleeper, patience)  # type: ignore[arg-type]
        assert len(parking._appointments) == appointments
        parking.take(descriptor)
        os.close(descriptor)
        client.close()
