"""What is published and kept in Redis, as it is read; and what a stranger may have written there."""

import pytest
from redis.crc import key_slot

from comet.backplane.redis_format import SLOTS, Malformed, Names, Seen, Told, _tags, piece, replay, told
from comet.message import Position

ONE, TWO = piece(("message", b"one")), piece(("news", "zwö".encode()))


def test_what_comet_publishes_is_read() -> None:
    assert told(b"7 3 1 99\n" + ONE) == Told("M", 7, 3, 99, [("message", b"one")])
    assert told(b"7 3 2 99\n" + ONE + TWO) == Told("M", 7, 3, 99, [("message", b"one"), ("news", "zwö".encode())])
    assert told(b"G") == Told("G")
    assert told(b"D 7") == Told("D", 7)


def test_a_script_names_keys_of_one_slot_alone() -> None:
    assert [key_slot(b"c:{%b}" % tag) for tag in _tags()] == list(range(SLOTS))
    names = Names("c:", sharded=True)
    for channel in "a", "user:x", "y" * 128:
        assert len({key_slot(key) for key in names.read(channel)}) == 1


GARBAGE = [
    piece(("message", b"\xff")), piece(("a\nb", b"x")), piece(("gap", b"x")), piece(("", b"x")), piece(("t" * 129, b"x")), piece("message"),
    piece(("message", b"x", b"y")), piece(("message", 5)), b"", b"x", b"\x92\xa1a\xc4\x05", b"\x92\xa2\xff\xff\xc4\x00", ONE + b"x",
]  # fmt: skip
"""Entries that no publisher of comet's could have made."""


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"!", b"garbage", b"D", b"D x", b"1 2 3 4\n\x93", b"1 1 1000000000 5\n", b"-1 -1 -1 -1\n", b"1 1 0 5\n", b"1 1 1 1 1\n" + ONE,
        b"1 1 2 5\n" + ONE, b"1 1 1 5\n" + ONE + TWO, b"1 1 99999999999999999999 5\n" + ONE, b"1 1 1 " + b"5" * 5000 + b"\n" + ONE,
        *(b"1 1 1 5\n" + entry for entry in GARBAGE), *(b"1 1 2 5\n" + ONE + entry for entry in GARBAGE),
    ],
)  # fmt: skip
def test_what_a_stranger_publishes_is_malformed_and_nothing_else(payload: bytes) -> None:
    with pytest.raises(Malformed):
        told(payload)


@pytest.mark.parametrize("bad", GARBAGE)
def test_a_page_ends_in_front_of_what_can_not_be_read_and_the_next_one_begins_with_a_gap(bad: bytes) -> None:
    first = replay("a", [b"7", b"5", b"0", 0, b"99", [ONE, ONE, bad, bad, TWO]])
    assert (first.head, first.joined.position, first.joined.gap, first.malformed) == (Seen(7, 5, 99), Position(7, 0), False, 0)
    assert [message.offset for message in first.joined.messages] == [1, 2]
    second = replay("a", [b"7", b"5", b"2", 0, b"99", [bad, bad, TWO]])
    assert (second.joined.position, second.joined.gap, second.malformed) == (Position(7, 4), True, 2)
    assert [(message.offset, message.type) for message in second.joined.messages] == [(5, "news")]
    last = replay("a", [b"7", b"5", b"4", 0, b"99", [bad]])
    assert (last.joined.position, last.joined.messages, last.joined.gap) == (Position(7, 5), [], True)
