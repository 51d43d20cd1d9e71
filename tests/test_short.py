"""The short way reads nothing otherwise than the strict parser, and nothing that the strict parser refuses."""

import random
from collections.abc import Mapping
from typing import Any

import pytest
from bottle import BaseRequest

from comet.errors import Refusal
from comet.server.blocks import MAX_REQUEST
from comet.server.http import Head, split_head
from comet.server.short import MAX_BLOCKS, MAX_PARAMETERS, MAX_WISHES, Shortcut

LIMIT = 16384
"""`--max-header`, by default."""

BLOCK = b"Host: x\r\nUser-Agent: test\r\n\r\n"
PLAIN = b"GET /poll/a,b?since=1f-7&timeout=5 HTTP/1.1\r\n" + BLOCK

Asked = tuple[str, Mapping[str, str], str | None]


class Wishes:
    """What makes wishes; it notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.refuses = False
        self.knows = True

    def __call__(self, path: str, query: Mapping[str, str], last_event_id: str | None) -> Any:
        self.asked.append((path, dict(query), last_event_id))
        if self.refuses:
            raise Refusal("bad-cursor", "A sentence.")
        return ["wish", path, dict(query), last_event_id] if self.knows else None


@pytest.fixture
def wishes() -> Wishes:
    return Wishes()


@pytest.fixture
def shortcut(wishes: Wishes) -> Shortcut:
    return Shortcut(wishes)


def strictly(data: bytes) -> tuple[Head, bytes] | None:
    """What the strict parser makes of it, and what it leaves; None when it refuses or waits for more."""
    buffer = bytearray(data)
    try:
        head = split_head(buffer, LIMIT)
    except Refusal:
        return None
    return None if head is None else (head, bytes(buffer))


def asked_of(head: Head) -> Asked:
    """As a handler behind bottle has it."""
    request = BaseRequest({"QUERY_STRING": head.query, "PATH_INFO": head.path, "REQUEST_METHOD": head.method})
    return head.path, {name: request.query.get(name) for name in request.query}, head.headers.get("last-event-id")


def agree(shortcut: Shortcut, data: bytes) -> bool:
    """Whether the short way takes it; then the strict parser must take it and read the same."""
    parsed = shortcut.parse(data)
    if parsed is None:
        return False
    strict = strictly(data)
    assert strict is not None, f"the strict parser refuses {data!r}"
    head, rest = strict
    assert (head.method, head.version, rest) == ("GET", "HTTP/1.1", b""), data
    assert head.keep_alive, data
    assert head.length == 0, data
    assert not head.expects_continue, data
    assert "origin" not in head.headers, data
    path, query, last_event_id = parsed
    assert (path, dict(query), last_event_id) == asked_of(head), data
    return True


# -- what is taken


def test_a_plain_get_is_read(shortcut: Shortcut) -> None:
    assert shortcut.parse(PLAIN) == ("/poll/a,b", {"since": "1f-7", "timeout": "5"}, None)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/events/a", "/events/a", {}),
        (b"/", "/", {}),
        (b"/poll/user:7@x_y-z.w", "/poll/user:7@x_y-z.w", {}),
        (b"/poll/a?", "/poll/a", {}),
        (b"/poll/a?since=", "/poll/a", {"since": ""}),
        (b"/poll/a?since=a=b", "/poll/a", {"since": "a=b"}),
        (b"/poll/a?since=1&since=2", "/poll/a", {"since": "2"}),
        (b"/poll/a?&&since=1&", "/poll/a", {"since": "1"}),
        (b"//poll/a", "//poll/a", {}),
    ],
)
def test_paths_and_queries_are_read_as_bottle_would(shortcut: Shortcut, target: bytes, path: str, query: dict[str, str]) -> None:
    data = b"GET %b HTTP/1.1\r\n" % target + BLOCK
    assert shortcut.parse(data) == (path, query, None)
    assert agree(shortcut, data)


@pytest.mark.parametrize("target", [b"/poll/a?timeout", b"/poll/a?timeout&since=1-1", b"/poll/a?=5", b"/poll/a?timeout=1&timeout"])
def test_a_parameter_without_a_value_is_read_as_bottle_would_or_not_at_all(shortcut: Shortcut, target: bytes) -> None:
    agree(shortcut, b"GET %b HTTP/1.1\r\n" % target + BLOCK)
    assert shortcut.parse(PLAIN) is not None


def test_last_event_id_is_read_of_each_block_its_own(shortcut: Shortcut) -> None:
    for value in ("1f-7", "1f-8", "1f-7"):
        data = b"GET /events/a HTTP/1.1\r\nHost: x\r\nLast-Event-ID: %b\r\n\r\n" % value.encode()
        assert shortcut.parse(data) == ("/events/a", {}, value)
    assert shortcut.parse(b"GET /events/a HTTP/1.1\r\n" + BLOCK) == ("/events/a", {}, None)


# -- what is left to the long way

OTHERS = {
    "an escape": b"GET /poll/a%20b HTTP/1.1\r\n" + BLOCK,
    "a plus": b"GET /poll/a?since=a+b HTTP/1.1\r\n" + BLOCK,
    "a fragment": b"GET /poll/a#b HTTP/1.1\r\n" + BLOCK,
    "the absolute form": b"GET http://x/poll/a HTTP/1.1\r\n" + BLOCK,
    "the asterisk form": b"GET * HTTP/1.1\r\n" + BLOCK,
    "HEAD": b"HEAD /poll/a HTTP/1.1\r\n" + BLOCK,
    "POST": b"POST /publish/a HTTP/1.1\r\n" + BLOCK,
    "a small get": b"get /poll/a HTTP/1.1\r\n" + BLOCK,
    "HTTP/1.0": b"GET /poll/a HTTP/1.0\r\n" + BLOCK,
    "HTTP/1.2": b"GET /poll/a HTTP/1.2\r\n" + BLOCK,
    "HTTP/0.9": b"GET /poll/a\r\n",
    "two spaces": b"GET  /poll/a HTTP/1.1\r\n" + BLOCK,
    "a space behind": b"GET /poll/a HTTP/1.1 \r\n" + BLOCK,
    "a bare LF": PLAIN.replace(b"\r\n", b"\n"),
    "a bare LF in the line": b"GET /poll/a\n HTTP/1.1\r\n" + BLOCK,
    "an empty line before": b"\r\n" + PLAIN,
    "two requests": PLAIN + PLAIN,
    "a byte behind": PLAIN + b"G",
    "an empty line behind": PLAIN + b"\r\n",
    "half": PLAIN[:-2],
    "a line alone": b"GET /poll/a HTTP/1.1\r\n",
    "no header at all": b"GET /poll/a HTTP/1.1\r\n\r\n",
    "nothing": b"",
    "very many parameters": b"GET /poll/a?%b HTTP/1.1\r\n" % b"&".join([b"a=1"] * (MAX_PARAMETERS + 1)) + BLOCK,
    "a body": b"GET /poll/a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
    "a body to come": b"GET /poll/a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n",
    "a chunked body": b"GET /poll/a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
    "an origin": b"GET /poll/a HTTP/1.1\r\nHost: x\r\nOrigin: https://example.org\r\n\r\n",
    "a close": b"GET /poll/a HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "an expectation": b"GET /poll/a HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n\r\n",
    "no host": b"GET /poll/a HTTP/1.1\r\nUser-Agent: x\r\n\r\n",
    "two hosts": b"GET /poll/a HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "a bad host": b"GET /poll/a HTTP/1.1\r\nHost: x/y\r\n\r\n",
    "a fold": b"GET /poll/a HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n",
    "a NUL": b"GET /poll/a HTTP/1.1\r\nHost: x\r\nA: b\x00c\r\n\r\n",
    "a large block": b"GET /poll/a HTTP/1.1\r\nHost: x\r\nA: %b\r\n\r\n" % (b"b" * MAX_REQUEST),
    "two ids": b"GET /poll/a HTTP/1.1\r\nHost: x\r\nLast-Event-ID: 1-1\r\nLast-Event-ID: 1-2\r\n\r\n",
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_rest_goes_the_long_way(shortcut: Shortcut, what: str) -> None:
    assert shortcut.parse(OTHERS[what]) is None
    assert shortcut.parse(OTHERS[what]) is None  # nor when it comes again
    assert shortcut.parse(PLAIN) is not None


@pytest.mark.parametrize("what", OTHERS)
def test_nothing_of_the_rest_is_remembered_as_a_plain_block(shortcut: Shortcut, what: str) -> None:
    """Whatever was seen before, a block is taken only behind a line with which the strict parser takes it."""
    shortcut.parse(OTHERS[what])
    for start in range(len(OTHERS[what])):
        agree(shortcut, b"GET /poll/a HTTP/1.1\r\n" + OTHERS[what][start:])
    assert shortcut.parse(PLAIN) is not None


def test_a_block_is_not_learned_behind_an_empty_line(shortcut: Shortcut) -> None:
    """The strict parser skips empty lines before a request; then the request's own line is no header."""
    request = b"GET /poll/a HTTP/1.1\r\nHost: x\r\n\r\n"
    assert shortcut.parse(b"\r\n" + request) is None
    assert shortcut.parse(b"GET /poll/b HTTP/1.1\r\n" + request) is None


def test_a_block_is_not_learned_behind_a_target_that_replaces_its_host(shortcut: Shortcut) -> None:
    """In the absolute form the target's host counts, and the header's is not looked at."""
    block = b"Host: not a host\r\n\r\n"
    assert shortcut.parse(b"GET http://x/poll/a HTTP/1.1\r\n" + block) is None
    assert shortcut.parse(b"GET /poll/a HTTP/1.1\r\n" + block) is None


def test_a_head_beyond_the_limit_is_not_taken(shortcut: Shortcut) -> None:
    for size in (LIMIT, 4 * LIMIT):
        data = b"GET /poll/a?since=%b HTTP/1.1\r\n" % (b"1" * size) + BLOCK
        agree(shortcut, data)
    assert shortcut.parse(PLAIN) is not None


# -- what is remembered


def test_a_known_block_is_not_parsed_again(shortcut: Shortcut, monkeypatch: pytest.MonkeyPatch) -> None:
    shortcut.parse(PLAIN)

    def fail(*arguments: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr("comet.server.blocks.split_head", fail)
    assert shortcut.parse(b"GET /poll/other HTTP/1.1\r\n" + BLOCK) == ("/poll/other", {}, None)
    with pytest.raises(AssertionError, match="parsed again"):
        shortcut.parse(b"GET /poll/other HTTP/1.1\r\nHost: new\r\n\r\n")


def test_what_is_remembered_is_bounded(shortcut: Shortcut) -> None:
    most = 0
    for number in range(3 * max(MAX_BLOCKS, MAX_WISHES)):
        assert shortcut.read(b"GET /poll/a HTTP/1.1\r\nHost: x%d\r\n\r\n" % number) is not None
        most = max(most, len(shortcut._blocks))
        assert len(shortcut._blocks) <= MAX_BLOCKS
        assert len(shortcut._wishes) <= MAX_WISHES
    assert most == MAX_BLOCKS


def test_the_bytes_that_are_remembered_are_bounded(shortcut: Shortcut) -> None:
    """2,000 requests of 64 KB would be 128 MB."""
    for number in range(500):
        shortcut.read(b"GET /poll/a?since=1-1&n=%b%d HTTP/1.1\r\n" % (b"1" * 60_000, number) + BLOCK)
    assert sum(map(len, shortcut._wishes)) <= MAX_WISHES * MAX_REQUEST


def test_a_request_that_many_send_is_read_once(shortcut: Shortcut, wishes: Wishes) -> None:
    first = shortcut.read(PLAIN)
    assert first == ["wish", "/poll/a,b", {"since": "1f-7", "timeout": "5"}, None]
    assert shortcut.read(PLAIN) is first
    assert len(wishes.asked) == 1
    assert shortcut.read(PLAIN.replace(b"1f-7", b"1f-8")) is not first
    assert len(wishes.asked) == 2


@pytest.mark.parametrize("how", ["refused", "unknown"])
def test_what_is_no_wish_is_asked_again(shortcut: Shortcut, wishes: Wishes, how: str) -> None:
    wishes.refuses, wishes.knows = how == "refused", how != "unknown"
    assert shortcut.read(PLAIN) is None
    wishes.refuses, wishes.knows = False, True
    assert shortcut.read(PLAIN) is not None


# -- at random

LINES = [
    b"GET /poll/a HTTP/1.1", b"GET /poll/a?since=1-1 HTTP/1.1", b"GET /poll/a?timeout HTTP/1.1", b"GET /events/a,b HTTP/1.1", b"", b"GET / HTTP/1.1",
    b"GET http://x/poll/a HTTP/1.1", b"GET /poll/a HTTP/1.0", b"POST /poll/a HTTP/1.1", b"HEAD /poll/a HTTP/1.1", b"GET /p%41 HTTP/1.1",
    b"GET /poll/a?a=1&a=2&b HTTP/1.1", b"GET * HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET //x/y HTTP/1.1",
]  # fmt: skip
HEADERS = [
    b"Host: x", b"Host: y", b"host: x:80", b"Host: a b", b"Host:", b"Accept: */*", b"Last-Event-ID: 1-1", b"last-event-id:  2-2 ", b"Last_Event_ID: 3-3",
    b"Content-Length: 0", b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Connection: close", b"Connection: keep-alive", b"Connection: upgrade",
    b"Upgrade: h2c", b"Origin: https://x", b"Expect: 100-continue", b"Cookie: a=b", b" folded", b"GET /poll/z HTTP/1.1", b"no colon", b"Bad Name: x",
    b"X: \xff", b"X: a\x00b", b"X:y\rz", b"Keep-Alive: 5", b"Proxy-Connection: close", b"X: " + b"y" * 5000,
]  # fmt: skip
ENDS = [b"\r\n\r\n", b"\r\n\r\n", b"\r\n\r\n", b"\r\n\r\n", b"\r\n", b"\n\n", b"\r\n\r\n\r\n", b"\r\n\r\nx", b""]


def request(rng: random.Random) -> bytes:
    """Something between a plain GET and nonsense."""
    headers = [b"Host: x"] * (rng.random() < 0.9)
    headers += rng.sample(HEADERS, rng.choice([0, 0, 1, 1, 2, 3]))
    if rng.random() < 0.3:
        rng.shuffle(headers)
    data = rng.choice([b"", b"", b"", b"", b"\r\n"]) + b"\r\n".join([rng.choice(LINES), *headers]) + rng.choice(ENDS)
    if rng.random() < 0.2:  # and a few bytes of it are others
        changed = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(changed) + 1)
            changed[place : place + rng.randint(0, 2)] = rng.choice(
                [b"", b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b"%", b"?", b"=", b"&", b"/", b"\x7f", b"\xe9"]
            )
        data = bytes(changed)
    return data


@pytest.mark.parametrize("seed", range(20))
def test_what_the_short_way_takes_the_strict_parser_reads_the_same(shortcut: Shortcut, wishes: Wishes, seed: int) -> None:
    rng = random.Random(seed)
    seen: list[bytes] = []
    taken = learned = 0
    for _ in range(3000):
        data = request(rng)
        if seen and rng.random() < 0.4:  # the tail of one behind the head of another
            one, other = rng.choice(seen).partition(b"\r\n"), data.partition(b"\r\n")
            data = rng.choice([other[0] + one[1] + one[2], one[0] + one[1] + other[2], other[0] + b"\r\n" + b"".join(one)])
        if len(seen) < 300:
            seen.append(data)
        if agree(shortcut, data):
            taken += 1
            wish = shortcut.read(data)
            assert wish == ["wish", *(asked_of(strictly(data)[0]))], data  # type: ignore[index]
        elif strictly(data) is not None:
            learned += 1
        assert strictly(data) is not None or shortcut.read(data) is None, data
    assert taken > 80, "the sequence met too little"
    assert learned > 80
