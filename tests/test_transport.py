"""Bytes to and from one connection: what waits and what does not, how it ends, and who has the descriptor."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import gevent
import pytest

from comet.server import transport as module
from comet.server.transport import Transport
from comet.settings import Settings
from tests.harness import AMPLE, TIMEOUT, wait_until

MUCH = b"x" * (4 << 20)
"""More than the buffers of a socket take."""


class Parking:
    """Remembers who was taken from it."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def take(self, descriptor: int) -> bytes:
        os.fstat(descriptor)  # it is open still
        self.taken.append(descriptor)
        return b""


class Alone:
    """A server without anything."""

    def __init__(self) -> None:
        self.settings = Settings(send_timeout=0.2)
        self.parking: Any = Parking()
        self.family: int = socket.AF_UNIX


class Telling(Transport):
    """Remembers why it was given up."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, Alone())
        self.reasons: list[str] = []

    def abandon(self, reason: str) -> None:
        self.reasons.append(reason)


@pytest.fixture
def pair() -> Iterator[tuple[Telling, socket.socket]]:
    """A transport, and who is at the other end, who does not block."""
    ours, peer = socket.socketpair()
    with peer:
        ours.setblocking(False)
        peer.setblocking(False)
        transport = Telling(ours.detach())
        yield transport, peer
        if transport.descriptor >= 0:
            transport.close()


def drained(peer: socket.socket) -> Callable[[], bytes]:
    """What the peer has been sent, as it is called until there is something."""

    def more() -> bytes:
        try:
            return peer.recv(1 << 20)
        except BlockingIOError:
            return b""

    return more


def test_what_does_not_wait_needs_no_gevent_socket(pair: tuple[Telling, socket.socket]) -> None:
    transport, peer = pair
    transport.send(b"hello")
    assert peer.recv(100) == b"hello"
    peer.sendall(b"world")
    assert transport.receive(1) == b"world"
    assert transport._waiting_socket is None


def test_what_the_socket_does_not_take_waits_for_the_peer(pair: tuple[Telling, socket.socket]) -> None:
    transport, peer = pair
    transport.server.settings = Settings(send_timeout=TIMEOUT)
    sending = gevent.spawn(transport.send, MUCH)
    got = b""
    while len(got) < len(MUCH):
        got += wait_until(drained(peer))
    sending.get(timeout=TIMEOUT)
    assert got == MUCH
    assert transport.reasons == []


def test_a_peer_that_takes_nothing_is_given_up_by_name_before_the_error(pair: tuple[Telling, socket.socket]) -> None:
    transport, peer = pair
    with pytest.raises(TimeoutError):
        transport.send(MUCH)
    assert transport.reasons == ["backlog-time"]
    peer.close()
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        transport.send(b"x")
    assert transport.reasons == ["backlog-time", "lost"]


def test_reading_ends_in_time_and_at_the_end(pair: tuple[Telling, socket.socket]) -> None:
    transport, peer = pair
    for timeout in (0.02, 0.0, -1.0):
        with pytest.raises(TimeoutError):
            transport.receive(timeout)
    peer.shutdown(socket.SHUT_WR)
    assert transport.receive(1) == b""


@pytest.mark.parametrize("waited", [False, True])
def test_a_descriptor_that_is_given_away_stays_open(pair: tuple[Telling, socket.socket], waited: bool) -> None:
    transport, peer = pair
    if waited:
        assert transport.socket.fileno() == transport.descriptor
    descriptor = transport.detach()
    try:
        assert transport.descriptor == -1
        os.write(descriptor, b"still")
        assert peer.recv(100) == b"still"
        assert transport.server.parking.taken == []  # type: ignore[attr-defined]
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("waited", [False, True])
def test_it_is_unlinked_from_the_parking_and_then_closed(pair: tuple[Telling, socket.socket], waited: bool) -> None:
    transport, peer = pair
    descriptor = transport.descriptor
    if waited:
        assert transport.socket.fileno() == descriptor
    transport.close()
    assert transport.server.parking.taken == [descriptor]  # type: ignore[attr-defined]
    assert transport.descriptor == -1
    assert wait_until(lambda: peer.recv(100) == b"")


def test_who_lingers_reads_so_much_and_so_long_and_not_more(pair: tuple[Telling, socket.socket], monkeypatch: pytest.MonkeyPatch) -> None:
    transport, peer = pair
    begun = time.monotonic()
    transport.linger()  # a peer that does not end
    assert 0.9 < time.monotonic() - begun < AMPLE
    assert peer.recv(100) == b""  # it was told the end at once
    peer.setblocking(True)
    flood = gevent.get_hub().threadpool.spawn(peer.sendall, MUCH)
    monkeypatch.setattr(module, "LINGER_SECONDS", 60.0)
    begun = time.monotonic()
    transport.linger()
    assert time.monotonic() - begun < AMPLE
    transport.close()
    with pytest.raises(OSError, match=r"Broken pipe|reset"):
        flood.get(timeout=TIMEOUT)


def test_who_is_cut_fails_or_finds_the_end_and_may_be_cut_again(pair: tuple[Telling, socket.socket]) -> None:
    transport, peer = pair

    def wait() -> bytes:
        try:
            return transport.receive(10)
        except OSError:
            return b""

    waiting = gevent.spawn(wait)
    gevent.sleep(0)
    transport.cut()
    assert waiting.get(timeout=TIMEOUT) == b""
    peer.close()
    transport.cut()
