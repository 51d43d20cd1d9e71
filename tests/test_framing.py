"""Bytes of each framing, read back by parsers of our own."""

import json
import random
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from comet.framing import LINES, POLL, PORTION, TEXT, Batch, Framing, ServerSentEvents, Text, batch_json, json_line, message_json, portions
from comet.history import History
from comet.message import Cursor, Gap, Item, Message, Position, parse_cursor

EVENTS = ServerSentEvents(2000)
BODIES = [
    "", "hello", " leading", "\n", "\n\n", "a\nb", "a\nb\n", "a\rb", "a\r\nb", "\r", "\r\n", "\n\r", "a\r\r\nb\n\rc", ":", "data: x", "id: 9",
    "event: gap", "x\n\nid: 9\ndata: injected\n\n", "gr\u00fc\u00df \U0001f600 \u2028 \u2029 \x85 \x0b \x0c", "\ufeffbom", "\0", '"\\\x01', "x" * 70_000,
]  # fmt: skip


class Event(NamedTuple):
    id: str
    type: str
    data: str


def event_stream(stream: bytes) -> tuple[list[Event], str, int | None]:
    """What a browser makes of a stream: the events, its last event id at the end, its reconnection time.

    To the letter of the WHATWG HTML standard, sections 9.2.5 and 9.2.6.
    """
    text = stream.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    events: list[Event] = []
    buffers = {"data": "", "event": ""}
    id_buffer = last_id = ""
    retry = None
    for line in text.split("\n")[:-1]:
        if not line:
            last_id = id_buffer
            if buffers["data"]:
                events.append(Event(last_id, buffers["event"] or "message", buffers["data"].removesuffix("\n")))
            buffers = {"data": "", "event": ""}
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            buffers["data"] += value + "\n"
        elif name == "event":
            buffers["event"] = value
        elif name == "id" and "\0" not in value:
            id_buffer = value
        elif name == "retry" and value.isascii() and value.isdigit():
            retry = int(value)
        else:
            assert name == "", f"a field that browsers ignore: {line!r}"
    return events, last_id, retry


def log(channel: str, epoch: int, *bodies: str, type: str = "message") -> list[Message]:
    history = History(epoch)
    return [history.append(channel, type, body.encode(), 0.0) for body in bodies]


def at(*positions: Position, channels: str = "ab") -> Cursor:
    return Cursor(channels[: len(positions)], positions)


def joined(framing: Framing, items: Sequence[Item], cursor: Cursor) -> bytes:
    return b"".join(framing.encode(items, cursor))


# -- server-sent events


@pytest.mark.parametrize("several", [False, True])
def test_a_browser_reads_every_body_line_by_line(several: bool) -> None:
    messages = log("a", 0xABC, *BODIES)
    cursor = at(Position(0xABC, 0), Position(7, 7)) if several else at(Position(0xABC, 0))
    pieces = EVENTS.encode(messages, cursor)
    assert len(pieces) == len(messages)
    events, last_id, _ = event_stream(b"".join(pieces))
    assert [event.data for event in events] == [body.replace("\r\n", "\n").replace("\r", "\n") for body in BODIES]
    assert {event.type for event in events} == {"message"}
    assert [event.id for event in events] == [message.id + (".7-7" if several else "") for message in messages]
    assert last_id == str(cursor)


def test_each_message_is_a_whole_event_of_its_own() -> None:
    for piece, body in zip(EVENTS.encode(log("a", 1, *BODIES), at(Position(1, 0))), BODIES, strict=True):
        events, _, _ = event_stream(piece)
        assert len(events) == 1, body
        assert piece.endswith(b"\n\n")


def test_a_type_becomes_the_event_name() -> None:
    events, _, _ = event_stream(joined(EVENTS, log("a", 1, "x", type="chat.line"), at(Position(1, 0))))
    assert events == [Event("1-1", "chat.line", "x")]


def test_the_opening_gives_a_browser_its_cursor_without_an_event() -> None:
    opening = EVENTS.opening(at(Position(0xABC, 4), Position(2, 0)))
    assert event_stream(opening) == ([], "abc-4.2-0", 2000)
    assert event_stream(opening + EVENTS.heartbeat * 3) == ([], "abc-4.2-0", 2000)


def test_what_is_no_event_is_none_and_no_message_to_clients_that_report_blocks_without_data() -> None:
    """As httpx-sse and aiosseclient do: the first reports at each empty line once it has seen an id, the other each block."""
    cursor = at(Position(0xABC, 4))
    end = EVENTS.end(cursor, b"", closing=True).split(b"\r\n")[1]
    stream = EVENTS.opening(cursor) + EVENTS.heartbeat * 3 + joined(EVENTS, log("a", 0xABC, "x"), cursor) + EVENTS.heartbeat + end
    *blocks, rest = stream.split(b"\n\n")
    assert rest == b""
    assert [b"\ndata: " in block for block in blocks] == [False, True, False]
    assert [re.findall(rb"^event: (.*)$", block, re.MULTILINE) for block in blocks] == [[b"comet"], [b"message"], [b"comet"]]
    events, last_id, retry = event_stream(stream)
    assert (events, last_id) == ([Event("abc-1", "message", "x")], "abc-1")
    assert retry is not None
    assert 2000 <= retry <= 4000
    assert EVENTS.heartbeat == b":\n"


def test_a_gap_is_an_event_whose_cursor_is_where_the_client_stands_then() -> None:
    cursor = at(Position(1, 1))
    events, last_id, _ = event_stream(joined(EVENTS, [Gap([Position(2, 0)]), *log("a", 2, "x")], cursor))
    assert events == [Event("2-0", "gap", '{"gap":true,"cursor":"2-0"}'), Event("2-1", "message", "x")]
    assert json.loads(events[0].data) == {"gap": True, "cursor": "2-0"}
    assert last_id == str(cursor) == "2-1"


# -- several channels


def test_on_several_channels_every_piece_names_the_whole_cursor() -> None:
    a, b = log("a", 1, "1", "2", "3"), log("b", 2, "4", "5")
    items: list[Item] = [a[0], b[0], a[1], Gap([Position(1, 2), Position(9, 0)]), a[2]]
    expected = ["1-1.2-0", "1-1.2-1", "1-2.2-1", "1-2.9-0", "1-3.9-0"]
    start = (Position(1, 0), Position(2, 0))
    events, _, _ = event_stream(joined(EVENTS, items, at(*start)))
    assert [event.id for event in events] == expected
    lines = [json.loads(piece) for piece in LINES.encode(items, at(*start))]
    assert [line["cursor"] for line in lines] == expected
    assert [line.get("id") for line in lines] == ["1-1", "2-1", "1-2", None, "1-3"]
    assert [parse_cursor(text, 2) for text in expected][-1] == [Position(1, 3), Position(9, 0)]


# -- lines and polls


def document(message: Message) -> dict[str, str]:
    return {"id": message.id, "channel": message.channel, "type": message.type, "data": message.data.decode()}


def test_every_body_survives_as_json_on_one_line() -> None:
    messages = log("a", 0xABC, *BODIES, type="kind")
    pieces = LINES.encode(messages, at(Position(0xABC, 0)))
    assert [json.loads(piece) for piece in pieces] == [document(message) for message in messages]
    assert all(piece.count(b"\n") == 1 and piece.endswith(b"\n") and b"\r" not in piece for piece in pieces)
    several = LINES.encode(messages, at(Position(0xABC, 0), Position(7, 7)))
    assert [json.loads(piece) for piece in several] == [{**document(message), "cursor": f"{message.id}.7-7"} for message in messages]
    assert all(piece.count(b"\n") == 1 and piece.endswith(b"}\n") for piece in several)


SEPARATORS = [chr(point) for point in range(sys.maxunicode + 1) if len(f"a{chr(point)}b".splitlines()) > 1]
"""Every character at which Python's line readers end a line, those of requests and httpx among them."""


def test_line_readers_split_at_what_this_file_thinks_they_do() -> None:
    assert [ord(one) for one in SEPARATORS] == [10, 11, 12, 13, 0x1C, 0x1D, 0x1E, 0x85, 0x2028, 0x2029]


@pytest.mark.parametrize("seed", range(20))
def test_no_reader_finds_a_line_end_within_a_line(seed: int) -> None:
    rng = random.Random(seed)
    # among them what has a separator's bytes in part: U+00C2, U+2027, U+202A, U+0145 (its second byte is 85), U+1F4A8
    others = ["a", "\\", '"', "\u2027", "\u202a", "\xc2", "\u0145", "\U0001f4a8", "\x84", "\x86", "\x7f", "\ufeff"]
    bodies = SEPARATORS + ["".join(rng.choices(SEPARATORS + others, k=rng.randrange(1, 40))) for _ in range(50)]
    messages = log("a", 1, *bodies)
    expected = [document(message) for message in messages]
    start = Position(1, 0)
    for cursor in (at(start), at(start, Position(7, 7))):
        lines = joined(LINES, messages, cursor).decode().splitlines()
        assert [{name: json.loads(line)[name] for name in expected[0]} for line in lines] == expected
    (answer,) = POLL.encode(messages, at(start))
    for one in (answer, batch_json("1-1", False, messages), json_line({"messages": expected})):
        (line,) = one.decode().splitlines()
        assert json.loads(line)["messages"] == expected


def test_a_line_says_a_gap_and_heartbeats_are_empty_lines() -> None:
    (line,) = LINES.encode([Gap([Position(2, 3)])], at(Position(1, 1)))
    assert json.loads(line) == {"gap": True, "cursor": "2-3"}
    assert LINES.opening(at(Position(1, 1))) == LINES.heartbeat == b"\n"


def test_a_poll_is_one_document_with_the_cursor_after_its_messages() -> None:
    messages = log("a", 1, *BODIES)
    cursor = at(Position(1, 0), Position(2, 5))
    (answer,) = POLL.encode(messages, cursor)
    assert json.loads(answer) == {"cursor": f"1-{len(BODIES)}.2-5", "gap": False, "messages": [document(message) for message in messages]}
    (answer,) = POLL.encode([], cursor)
    assert json.loads(answer) == {"cursor": f"1-{len(BODIES)}.2-5", "gap": False, "messages": []}


def test_a_poll_tells_a_gap_and_stands_after_it() -> None:
    messages = log("a", 2, "x")
    (answer,) = POLL.encode([Gap([Position(2, 0)]), *messages], at(Position(1, 4)))
    assert json.loads(answer) == {"cursor": "2-1", "gap": True, "messages": [document(messages[0])]}
    (answer,) = POLL.encode([Gap([Position(2, 0)])], at(Position(1, 4)))
    assert json.loads(answer) == {"cursor": "2-0", "gap": True, "messages": []}


def test_history_is_the_same_document() -> None:
    messages = log("a", 1, "x", "y")
    assert json.loads(batch_json("1-2", True, messages)) == {
        "cursor": "1-2",
        "gap": True,
        "messages": [document(message) for message in messages],
    }


# -- metabrew's text


def test_text_is_a_body_and_a_newline_a_piece() -> None:
    messages = log("user:7", 1, "hello", "", "a\nb")
    cursor = Cursor(["user:7"], [Position(1, 0)])
    assert TEXT.encode([messages[0], Gap([Position(1, 1)]), *messages[1:]], cursor) == [b"hello\n", b"\n", b"a\nb\n"]
    assert TEXT.opening(cursor) == b"comet welcomes you! Your id: 7\n"
    assert TEXT.opening(Cursor(["user:a:b"], [Position(1, 0)])) == b"comet welcomes you! Your id: a:b\n"
    assert TEXT.heartbeat == b""


@pytest.mark.parametrize("framing", [LINES, EVENTS, POLL], ids=lambda framing: framing.name)  # text has no cursor
def test_encoding_moves_the_cursor_past_what_was_encoded(framing: Framing) -> None:
    messages = log("a", 2, "x", "y")
    cursor = at(Position(1, 0))
    framing.encode([Gap([Position(2, 0)]), *messages], cursor)
    assert str(cursor) == "2-2"


# -- once a framing, not once a client


def test_clients_of_several_channels_share_all_but_their_cursor() -> None:
    (message,) = log("a", 1, "x" * 1000)
    for framing in (EVENTS, LINES, POLL):
        framing.encode([message], at(Position(1, 0), Position(2, 0)))
    assert message.frames is not None
    made = dict(message.frames)
    assert set(made) == {"json", "sse"}
    for framing in (EVENTS, LINES, POLL):
        framing.encode([message], at(Position(1, 0), Position(3, 1)))
    assert {name: id(data) for name, data in message.frames.items()} == {name: id(data) for name, data in made.items()}
    assert message_json(message) is made["json"]


def test_forms_much_larger_than_the_data_are_not_kept() -> None:
    (message,) = log("a", 1, "\n" * 10_000)
    for framing in (EVENTS, LINES, POLL):
        framing.encode([message], at(Position(1, 0)))
    assert not message.frames


# -- portions


def test_portions_are_whole_runs_within_their_bound() -> None:
    items: list[Item] = [Gap([Position(1, 0)]), *log("a", 1, *["x" * 100_000] * 30), *log("b", 1, "y" * PORTION, "z")]
    runs = list(portions(items))
    assert [item for run in runs for item in run] == items
    costs = [sum(item.cost for item in run if isinstance(item, Message)) for run in runs]
    assert all(cost <= PORTION or len(run) == 1 for cost, run in zip(costs, runs, strict=True))
    assert all(left + run[0].cost > PORTION for left, run in zip(costs, runs[1:], strict=False) if isinstance(run[0], Message)), (
        "a run ended early"
    )


def test_portions_of_nothing_are_one_empty_run() -> None:
    assert list(portions([])) == [[]]


def test_an_empty_body_is_sent_also_as_the_first_that_a_process_sends() -> None:
    message = log("user:7", 1, "")[0]
    assert Text().batch(Batch([message]), b"") == b"1\r\n\n\r\n"


@pytest.mark.parametrize("framing", [Text(), ServerSentEvents(2000), LINES])
def test_for_http_1_0_the_same_pieces_are_not_in_chunks_and_nothing_ends_them(framing: Framing) -> None:
    message = Message("a", (5, 1), "message", b"x")
    batch, cursor = Batch([message]), Cursor(["a"], [Position(5, 0)])
    plain = framing.unchunked()
    assert plain is framing.unchunked(), "what is sent to many is made once"
    chunked, bare = framing.batch(batch, b""), plain.batch(batch, b"")  # in this order: the bytes of one body are remembered
    (piece,) = framing.encode([message], cursor)
    assert (chunked, bare) == (b"%x\r\n%b\r\n" % (len(piece), piece), piece)
    assert (framing.end(cursor, b"", False), plain.end(cursor, b"", False)) == (b"0\r\n\r\n", b"")
    assert not plain.end(cursor, b"", True).endswith(b"\r\n")
    assert plain.closes
    assert plain.closing() is plain


def test_a_poll_that_is_the_last_of_its_connection_says_so_once() -> None:
    cursor = Cursor(["a"], [Position(5, 1)])
    kept = POLL.with_headers([("Vary", "Origin"), ("Connection", "keep-alive")])
    for framing in (POLL, kept, kept.closing(), kept.closing().closing()):
        answer = framing.end(cursor, b"", True)
        assert answer.count(b"Connection: ") == answer.count(b"Connection: close\r\n") == 1
        assert framing.closing().closes
        assert framing.closing() is framing.closing()
    assert b"Vary: Origin\r\n" in kept.closing().end(cursor, b"", True)
    assert b"Connection: keep-alive\r\n" in kept.end(cursor, b"", False)
    assert not kept.closes
