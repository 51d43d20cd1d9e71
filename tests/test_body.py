"""A request's body: exactly its bytes, whatever comes in which pieces, and why it ends early."""

import io
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from comet.errors import Refusal
from comet.server import body as module
from comet.server.body import RequestBody
from comet.server.http import PIECES, Head
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


def body(transport: Transport, length: int | None, expects: bool = False, timeout: float = 5.0) -> RequestBody:
    head = Head("POST", "/", "/", "", "HTTP/1.1", {}, True, length, expects)
    return RequestBody(transport, head, timeout, 1000)


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


def test_between_two_pieces_of_a_body_in_very_many_chunks_others_have_a_turn(
    pair: tuple[Transport, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, _ = pair
    turns: list[int] = []
    monkeypatch.setattr(module, "give_way", lambda: turns.append(len(transport.buffer)))
    transport.buffer[:] = b"1\r\na\r\n" * (10 * PIECES) + b"0\r\n\r\nnext"
    assert io.BufferedReader(body(transport, None)).read() == b"a" * (10 * PIECES)
    assert len(turns) >= 10
    assert turns == sorted(turns, reverse=True)
    assert transport.buffer == b"next"


def test_a_body_that_stops_is_refused(pair: tuple[Transport, socket.socket]) -> None:
    transport, peer = pair
    peer.sendall(b"a")
    one = body(transport, 2, timeout=0.05)
    reader = io.BufferedReader(one)
    with pytest.raises(Refusal) as late:
        reader.read()
    assert (late.value.slug, one.finished) == ("body-timeout", False)
    one.more_time()
    peer.sendall(b"b")
    assert reader.read(1) == b"b"
    assert one.finished
    peer.close()
    with pytest.raises(Refusal) as short:
        io.BufferedReader(body(transport, 2)).read()
    assert short.value.slug == "bad-body"
