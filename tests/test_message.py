"""The channel rule, types, lists of channels, and cursors to text and back."""

import random

import pytest

from comet.errors import Refusal
from comet.message import (
    DEFAULT_TYPE,
    FOREIGN,
    MAX_CHANNELS,
    MAX_CURSOR,
    MESSAGE_COST,
    OLDEST,
    RESERVED_TYPES,
    Cursor,
    Gap,
    Message,
    Position,
    check_channel,
    check_type,
    parse_channels,
    parse_cursor,
    resume_from,
)

GOOD = ["a", "user:7", "A.b_c-d@e:0", "x" * 128, ".", "..", "-", "gap2"]
BAD = ["", " ", "a b", "a,b", "a/b", "x" * 129, "gr\u00fcn", "a\n", "\na", "a\0", "%61", "a*", "\u0661", "\U0001f600", "a+b"]


@pytest.mark.parametrize("name", GOOD)
def test_a_name_within_the_rule_is_a_channel_and_a_type(name: str) -> None:
    assert check_channel(name) == check_type(name) == name


@pytest.mark.parametrize("name", BAD)
def test_a_name_out_of_the_rule_is_neither(name: str) -> None:
    with pytest.raises(Refusal, match="bad-channel"):
        check_channel(name)
    with pytest.raises(Refusal, match="bad-type"):
        check_type(name)


def test_a_refused_name_is_not_repeated_at_length() -> None:
    with pytest.raises(Refusal) as caught:
        check_channel("\n" * 100_000)
    assert len(caught.value.detail) < 300


@pytest.mark.parametrize("name", sorted(RESERVED_TYPES))
def test_a_reserved_type_is_a_channel_but_no_type(name: str) -> None:
    assert check_channel(name) == name
    assert check_type(DEFAULT_TYPE) == DEFAULT_TYPE
    with pytest.raises(Refusal, match="bad-type"):
        check_type(name)


def test_doubled_channels_merge_in_order_of_first_appearance() -> None:
    assert parse_channels("b,a,b,c,a") == ("b", "a", "c")
    assert parse_channels("a") == ("a",)


@pytest.mark.parametrize("text", ["", ",", "a,", ",a", "a,,b", "a, b", "a b,c"])
def test_a_list_with_a_bad_or_empty_name_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="bad-channel"):
        parse_channels(text)


def test_a_request_joins_at_most_64_channels_after_doubles_are_merged() -> None:
    names = [f"c{number}" for number in range(MAX_CHANNELS)]
    assert parse_channels(",".join(names)) == tuple(names)
    assert parse_channels(",".join(names + names)) == tuple(names)
    for text in (",".join([*names, "one-more"]), "a," * 100_000 + "a"):
        with pytest.raises(Refusal, match="bad-channel"):
            parse_channels(text)


def test_cursors_survive_the_way_to_text_and_back() -> None:
    rng = random.Random(7)
    for _ in range(500):
        positions = [
            Position(rng.getrandbits(rng.randint(1, 48)), rng.choice([0, 1, rng.getrandbits(20), 10**16 - 1]))
            for _ in range(rng.randint(1, MAX_CHANNELS))
        ]
        text = str(Cursor([f"c{index}" for index in range(len(positions))], positions))
        assert parse_cursor(text, len(positions)) == positions
        assert text.isascii()
        assert text.isprintable()


def test_oldest_is_the_start_of_each_channel() -> None:
    assert parse_cursor("oldest", 3) == [OLDEST] * 3


STRANGE = [
        "", "-", "a", "1", "1-", "-1", "1--1", "1-1.", ".1-1", "g-1", "A-1", "0x1-1", "1-01", "1-00", "1-+1", "1- 1", " 1-1", "1-1 ",
        "1-1\n", "1-a", "1-1_0", "1000000000000-1"[:12] + "0-1", "1-10000000000000000", "\u0661-1", "1-\u0661", "OLDEST", "oldest ",
]  # fmt: skip


@pytest.mark.parametrize("text", STRANGE)
def test_a_text_that_comet_never_sent_is_no_cursor(text: str) -> None:
    with pytest.raises(Refusal, match="bad-cursor"):
        parse_cursor(text, 1)


OF_OTHERS = [("1-1", 2), ("1-1.2-2", 1), ("oldest.1-1", 2), ("1-1." * 100_000 + "1-1", 64)]


@pytest.mark.parametrize(("text", "channels"), OF_OTHERS)
def test_a_cursor_of_another_number_of_channels_is_refused(text: str, channels: int) -> None:
    with pytest.raises(Refusal, match="bad-cursor"):
        parse_cursor(text, channels)


@pytest.mark.parametrize(
    ("text", "channels"), [*((text, 1) for text in STRANGE), *OF_OTHERS, ("x" * 1_000_000, 64), ("1-1" + "0" * 2000, 1)]
)
def test_an_id_that_is_no_cursor_is_a_foreign_place_on_each_channel(text: str, channels: int) -> None:
    assert resume_from(text, channels) == [FOREIGN] * channels


def test_an_id_that_is_a_cursor_is_read_as_one() -> None:
    longest = ".".join([f"{2**48 - 1:x}-{10**16 - 1}"] * MAX_CHANNELS)
    assert len(longest) <= MAX_CURSOR
    for text, channels in (("1f-7", 1), ("1-1.2-2", 2), ("oldest", 3), ("0-0", 1), (longest, MAX_CHANNELS)):
        assert resume_from(text, channels) == parse_cursor(text, channels)


def test_no_cursor_is_the_foreign_place() -> None:
    assert FOREIGN.epoch < 0, "epochs are drawn from 0 on"
    with pytest.raises(Refusal, match="bad-cursor"):
        parse_cursor(str(FOREIGN), 1)


def test_a_cursor_moves_past_messages_and_gaps() -> None:
    cursor = Cursor(["b", "a"], [Position(1, 0), Position(0xABC, 5)])
    assert str(cursor) == "1-0.abc-5"
    cursor.advance(Message("a", Position(0xABC, 6), "message", b""))
    assert str(cursor) == "1-0.abc-6"
    cursor.advance(Gap([Position(2, 9), Position(0xABC, 6)]))
    assert str(cursor) == "2-9.abc-6"


def test_a_messages_id_is_its_position_and_its_cost_counts_its_encoded_forms() -> None:
    message = Message("a", Position(0xABC, 6), "message", b"12345")
    assert (message.id, message.cost) == ("abc-6", MESSAGE_COST + 15)
    assert repr(message) == "<Message a abc-6 message 5 bytes>"
