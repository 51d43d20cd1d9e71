"""Answers as bytes: cut anywhere they say the same, and what is malformed is refused."""

import pytest

from loadtest.options import endpoints, masks, target
from loadtest.wire import EVENTS, STREAM, TEST, Ended, Malformed, head, pieces


def chunked(*those: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in those)


def test_chunks_say_the_same_wherever_they_are_cut() -> None:
    those = [b"a\n", b"with \r\n in it", b"~" * 300]
    data = chunked(*those)
    for cut in range(len(data) + 1):
        first, rest = pieces(data[:cut])
        second, rest = pieces(rest + data[cut:])
        assert first + second == those
        assert rest == b""


def test_the_last_chunk_ends_the_answer() -> None:
    told, rest = pieces(chunked(b"a") + b"0\r\n\r\n")
    assert told == [b"a"]
    with pytest.raises(Ended):
        pieces(rest)


@pytest.mark.parametrize("data", [b"zz\r\nabc", b"3\r\nabcXX", b"x" * 40, b"\r\n"])
def test_what_is_no_chunk_is_refused(data: bytes) -> None:
    with pytest.raises(Malformed):
        pieces(data)


def test_a_head() -> None:
    data = b"HTTP/1.1 200 OK\r\nComet-Cursor: ab-3\r\nX: y\r\n\r\nrest"
    assert head(data) == (200, {b"comet-cursor": b"ab-3", b"x": b"y"}, len(data) - 4)
    assert head(data[:30]) is None
    with pytest.raises(Malformed):
        head(b"SSH-2.0\r\n\r\n")


def test_where_a_message_and_its_id_are() -> None:
    assert TEST.text(b"17 99 ~\n") == b"17 99 ~\n"
    line = b'{"id":"ab-4","channel":"user:5","type":"message","data":"17 99 ~"}\n'
    assert STREAM.text(line) == b'17 99 ~"}\n'
    assert STREAM.id(line) == b"ab-4"
    assert STREAM.text(b"\n") is None
    event = b"event: message\ndata: 17 99 ~\nid: ab-4\n\n"
    assert EVENTS.text(event) == b"17 99 ~\nid: ab-4\n\n"
    assert EVENTS.id(event) == b"ab-4"


def test_endpoints_take_turns_by_their_shares() -> None:
    those = endpoints("test:3,stream:1")
    assert sorted(one.name for one in those) == ["/stream", "/test", "/test", "/test"]
    assert masks(those) == ([True] * 4, [False] * 4)
    with pytest.raises(ValueError):
        endpoints("nothing:3")


def test_source_addresses_of_loopback_go_round_by_themselves() -> None:
    here = target("http://127.0.0.1:8000", "")
    assert here.source(0) == "127.1.0.1"
    assert here.source(1999) == "127.1.0.1"
    assert here.source(2000) == "127.1.0.2"
    made = {here.source(client) for client in range(0, 4_000_000, 2000)}
    assert len(made) == 2000
    given = target("http://127.0.0.1:8000", "127.0.0.2,127.0.0.3")
    assert [given.source(client) for client in (0, 2000, 4000)] == ["127.0.0.2", "127.0.0.3", "127.0.0.2"]
