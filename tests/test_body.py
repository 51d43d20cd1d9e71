"""A request's body: exactly its bytes, whatever comes in which pieces, and why it ends early."""

import io
import random
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from comet.errors import Refusal
from comet.server import body as module
from comet.server.body import LEAST, OWN, RequestBody, Room
from comet.server.http import PIECES, TINY, Head
from comet.server.transport import Transport
from comet.settings import Settings


class Alone:
    """A server without anything."""

    settings = Settings(send_timeout=1.0)
    parking: Any = None
    family: int = socket.AF_UNIX


@pytest.fixture
def pair() -> Iterator[tuple[Transport, socket.socket]]:
    """A transport, and who is at the other end."""
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    with ours, peer:
        transport = Transport(ours.fileno(), Alone())
        yield transport, peer
        transport.detach()


def body(transport: Transport, length: int | None, expects: bool = False, timeout: float = 5.0, room: Room | None = None) -> RequestBody:
    head = Head("POST", "/", "/", "", "HTTP/1.1", {}, True, length, expects)
    return RequestBody(transport, head, timeout, 1000, room or Room(1 << 20))


@pytest.mark.parametrize("chunked", [False, True])
def test_what_follows_a_body_stays_with_the_connection(pair: tuple[Transport, socket.socket], chunked: bool) -> None:
    transport, peer = pair
    generator = random.Random(20081103)
    for _ in range(50):
        data = generator.randbytes(generator.randrange(1, 300))
        sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if chunked else data
        cut = generator.randrange(len(sent))
        transport.buffer[:] = sent[:cut]
        peer.sendall(sent[cut:] + b"next")
        one = body(transport, None if chunked else len(data))
        assert io.BufferedReader(one).read() == data
        assert one.finished
        assert transport.buffer == b"next"


def test_who_waits_to_be_asked_is_asked_once_and_not_when_the_body_is_here(pair: tuple[Transport, socket.socket]) -> None:
    transport, peer = pair
    transport.buffer[:] = b"ab"
    assert io.BufferedReader(body(transport, 2, expects=True)).read() == b"ab"
    peer.sendall(b"cd")
    assert io.BufferedReader(body(transport, 2, expects=True)).read() == b"cd"
    peer.shutdown(socket.SHUT_WR)
    transport.socket.shutdown(socket.SHUT_WR)
    assert peer.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert peer.recv(1000) == b""


@pytest.mark.parametrize(("size", "way"), [(1, "trickle"), (TINY, "give_way")])
def test_between_two_pieces_of_a_body_in_very_many_chunks_others_have_a_turn(
    pair: tuple[Transport, socket.socket], monkeypatch: pytest.MonkeyPatch, size: int, way: str
) -> None:
    transport, _ = pair
    turns: dict[str, list[int]] = {"trickle": [], "give_way": []}
    for name, lengths in turns.items():
        monkeypatch.setattr(module, name, partial(lambda lengths, whose: lengths.append(len(transport.buffer)), lengths))
    data = b"a" * size
    transport.buffer[:] = (b"%x\r\n%b\r\n" % (size, data)) * (10 * PIECES) + b"0\r\n\r\nnext"
    assert io.BufferedReader(body(transport, None)).read() == data * (10 * PIECES)
    assert {name: len(lengths) for name, lengths in turns.items()} == {"trickle": 0, "give_way": 0, way: 10}
    assert turns[way] == sorted(turns[way], reverse=True)
    assert transport.buffer == b"next"


def test_a_body_in_tiny_chunks_has_its_time_as_well(pair: tuple[Transport, socket.socket]) -> None:
    transport, _ = pair
    transport.buffer[:] = b"1\r\na\r\n" * (100 * PIECES)
    with pytest.raises(Refusal) as late:
        io.BufferedReader(body(transport, None, timeout=0.05)).read()
    assert late.value.slug == "body-timeout"
    assert len(transport.buffer) > 6 * PIECES


def test_a_body_that_stops_is_refused(pair: tuple[Transport, socket.socket]) -> None:
    transport, peer = pair
    peer.sendall(b"a")
    one = body(transport, 2, timeout=0.05)
    reader = io.BufferedReader(one)
    with pytest.raises(Refusal) as late:
        reader.read()
    assert (late.value.slug, one.finished) == ("body-timeout", False)
    peer.close()
    with pytest.raises(Refusal) as short:
        io.BufferedReader(body(transport, 2)).read()
    assert short.value.slug == "bad-body"


def test_bodies_have_room_together_beyond_a_part_of_each_and_give_it_back(pair: tuple[Transport, socket.socket]) -> None:
    transport, _ = pair
    room = Room(10_000)

    def read(one: RequestBody, count: int) -> bytes:
        transport.buffer += b"x" * count
        data = b""
        while len(data) < count:
            data += one.read(count - len(data)) or b""
        return data

    small = [body(transport, 1 << 20, room=room) for _ in range(5)]
    for one in small:
        assert len(read(one, OWN)) == OWN
    assert room.taken == 0, "whatever the others have"
    assert len(read(small[0], 10_000)) == 10_000
    assert room.taken == 10_000
    with pytest.raises(Refusal) as full:
        read(small[1], 1)
    assert full.value.slug == "bodies-full"
    transport.buffer.clear()
    small[1].hold(0)
    assert room.taken == 10_000, "it had none of it"
    small[0].hold(0)
    small[0].hold(0)
    assert room.taken == 0
    assert len(read(small[0], OWN + 10_000)) == OWN + 10_000, "what was used is held no more"
    small[0].hold(OWN + 4000)
    assert room.taken == 4000, "of which that much is"
    small[2].hold(OWN + 6000)
    assert room.taken == 10_000, "it may be more than what came"
    with pytest.raises(Refusal) as more:
        small[0].hold(OWN + 4001)
    assert more.value.slug == "bodies-full"
    for one in small:
        one.hold(0)
    assert room.taken == 0


@pytest.mark.parametrize("fast", [True, False])
def test_a_body_of_any_length_has_more_time_where_enough_of_it_comes(
    pair: tuple[Transport, socket.socket], monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    transport, _ = pair
    now = 1000.0
    monkeypatch.setattr("comet.server.body.time.monotonic", lambda: now)
    one = body(transport, 1 << 30, timeout=5.0)
    reader = io.BufferedReader(one)
    for _ in range(10):
        now += 3.0  # until it comes
        transport.buffer += b"x" * (LEAST if fast else LEAST // 10)
        while transport.buffer:
            reader.read1(1000)
        now += 100.0  # that the application takes
        one.more_time()
    left = one._deadline - now
    assert left == (5.0 if fast else 5.0 - 10 * 3.0)
