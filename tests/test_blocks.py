"""What a proxy says is taken off a request only where the strict parser reads the same, and the rest is judged as if it were there."""

import random

import pytest

from comet.errors import Refusal
from comet.server.blocks import MAX_REQUEST, STAND_INS, judge, lift
from comet.server.http import MAX_HEADERS, Head, split_head
from comet.server.posts import Posts, Reply
from comet.server.short import Shortcut

LINE = b"GET /poll/a?since=1f-7 HTTP/1.1\r\n"
SAID = b"X-Forwarded-For: 203.0.113.9\r\nX-Request-ID: 5c0f\r\n"
PLAIN = LINE + b"Host: x\r\n" + SAID + b"Accept: */*\r\n\r\n"
BARE = PLAIN.replace(SAID, b"")


def reply() -> Reply:
    return "200 OK", (), b""


@pytest.fixture
def shortcut() -> Shortcut:
    return Shortcut(lambda path, query, last_event_id: (path, dict(query), last_event_id), MAX_REQUEST, STAND_INS)


@pytest.fixture
def posts() -> Posts:
    return Posts(lambda path, authorization, body: reply, MAX_REQUEST, STAND_INS)


# -- lifting


@pytest.mark.parametrize(
    "said",
    [
        SAID,
        b"X-Request-ID: 5c0f\r\nX-Forwarded-For: 203.0.113.9\r\n",
        b"x-forwarded-for: 203.0.113.9\r\nX-REQUEST-ID: 5c0f\r\n",
    ],
)
def test_what_a_proxy_says_is_lifted_wherever_it_stands(said: bytes) -> None:
    for data in (
        LINE + said + b"Host: x\r\nAccept: */*\r\n\r\n",
        PLAIN.replace(SAID, said),
        LINE + b"Host: x\r\nAccept: */*\r\n" + said + b"\r\n",
    ):
        assert lift(data, MAX_REQUEST) == (BARE, "203.0.113.9", "5c0f")


@pytest.mark.parametrize(
    ("forwarded", "known"),
    [
        (b"198.51.100.7, 203.0.113.9,10.0.0.1", True),
        (b"2001:db8::1", True),
        (b"[2001:db8::1]:4711", True),
        (b"unknown", False),
        (b"a" * 257, False),
        (b"203.0.113.9\t", False),
        (b"", False),
    ],
)
def test_a_list_of_addresses_is_lifted_and_nothing_else(forwarded: bytes, known: bool) -> None:
    data = PLAIN.replace(b"203.0.113.9", forwarded)
    assert lift(data, MAX_REQUEST).forwarded == (forwarded.decode() if known else "")
    assert (b"X-Forwarded-For" in lift(data, MAX_REQUEST).data) is not known


@pytest.mark.parametrize("request_id", [b'bad "id"', b"a" * 129, b"a b", b"\xe9", b""])
def test_an_id_that_would_not_be_taken_stays(request_id: bytes) -> None:
    data = PLAIN.replace(b"5c0f", request_id)
    assert lift(data, MAX_REQUEST).request_id == ""
    assert request_id in lift(data, MAX_REQUEST).data


@pytest.mark.parametrize(
    "data", [BARE, b"", LINE, PLAIN[:-2], b"\r\n\r\n" + PLAIN, b"POST / HTTP/1.1\r\nHost: x\r\n\r\n" + b"\r\n" + SAID + b"\r\n"]
)
def test_a_head_without_it_or_without_its_end_stays_as_it_is(data: bytes) -> None:
    assert lift(data, MAX_REQUEST) == (data, "", "")


def test_a_body_stays_as_it_is() -> None:
    body = b"\r\n" + SAID + b"\r\n\r\n" + SAID
    data = b"POST / HTTP/1.1\r\nHost: x\r\n" + SAID + b"\r\n" + body
    assert lift(data, MAX_REQUEST) == (b"POST / HTTP/1.1\r\nHost: x\r\n\r\n" + body, "203.0.113.9", "5c0f")


def test_what_is_over_the_limit_stays_so() -> None:
    assert lift(PLAIN, len(PLAIN)).data == BARE
    assert lift(PLAIN, len(PLAIN) - 1).data == PLAIN


# -- what is left, by the short ways


def test_requests_of_all_clients_are_one_block(shortcut: Shortcut, posts: Posts, monkeypatch: pytest.MonkeyPatch) -> None:
    send = b"POST /send/7 HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n" + SAID + b"\r\nhello"
    for number in range(3):
        for data in (PLAIN, send):
            data = data.replace(b".9", b".%d" % number).replace(b"5c0f", b"%032x" % number)
            found, forwarded, request_id = lift(data, MAX_REQUEST)
            assert (forwarded, request_id) == (f"203.0.113.{number}", f"{number:032x}")
            assert shortcut.read(found) == ("/poll/a", {"since": "1f-7"}, None) if data.startswith(b"G") else posts.read(found) is reply
        monkeypatch.setattr("comet.server.blocks.split_head", None)  # from here on nothing is parsed


@pytest.mark.parametrize("said", [SAID, SAID[:30], SAID[30:], b""])
def test_what_is_not_lifted_is_not_plain(shortcut: Shortcut, posts: Posts, said: bytes) -> None:
    """Such as the second of two, of which the strict parser makes one."""
    for more in (b"X-Forwarded-For: 198.51.100.1\r\n", b"x-request-id: 1\r\n", b"X-Forwarded-For: unknown\r\n", b'X-Request-ID: "\r\n'):
        data = PLAIN.replace(SAID, said + more + more)
        assert shortcut.read(lift(data, MAX_REQUEST).data) is None
        data = b"POST /send/7 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n" + more + more + said + b"\r\n"
        assert posts.read(lift(data, MAX_REQUEST).data) is None


def test_a_block_with_one_header_too_many_is_not_remembered(shortcut: Shortcut) -> None:
    """Though without what was lifted it would have few enough."""
    for count in range(MAX_HEADERS - 4, MAX_HEADERS + 2):
        data = LINE + b"Host: x\r\n" + b"".join(b"A%d: b\r\n" % number for number in range(count - 3)) + SAID + b"\r\n"
        assert (shortcut.read(lift(data, MAX_REQUEST).data) is not None) is (count <= MAX_HEADERS)


def test_without_stand_ins_such_lines_are_like_any_other() -> None:
    block = PLAIN.partition(b"\r\n")[2]
    assert judge("GET", block, MAX_REQUEST, {}) is not None
    assert judge("GET", block, MAX_REQUEST, STAND_INS) is None


# -- at random

HEADERS = [
    b"X-Forwarded-For: 203.0.113.9", b"x-forwarded-for: 10.0.0.1, 203.0.113.8", b"X-Forwarded-For: unknown", b"X-Forwarded-For:203.0.113.9",
    b"X-Request-ID: 5c0f", b"X-Request-ID: 5c10", b"x-request-id:  5c11 ", b'X-Request-ID: "', b"X_Request_ID: 7", b"X-Request-ID : 8", b"X-Request-ID:",
    b" folded", b"Host: y", b"Last-Event-ID: 1-1", b"Content-Length: 3", b"Connection: close", b"Origin: x", b"no colon", b"X: a\x00b", b"X:y\rz", b"A: b",
    b"Connection: X-Request-ID", b"",
]  # fmt: skip
LINES = [b"GET /poll/a HTTP/1.1", b"GET /poll/a?since=1-1 HTTP/1.1", b"POST /send/7 HTTP/1.1", b"GET http://x/ HTTP/1.1", b""]
ENDS = [b"\r\n\r\n"] * 5 + [b"\r\n", b"\n\n", b"\r\n\r\nabc", b"\r\n\r\nX-Request-ID: 9\r\n\r\n", b"\r\n\r\n\r\nX-Request-ID: 9\r\n"]


def strictly(data: bytes) -> tuple[Head, bytes] | None:
    """What the strict parser makes of it, and what it leaves."""
    buffer = bytearray(data)
    try:
        head = split_head(buffer, 16384)
    except Refusal:
        return None
    return None if head is None else (head, bytes(buffer))


@pytest.mark.parametrize("seed", range(20))
def test_what_was_lifted_and_what_is_left_is_what_the_strict_parser_reads(shortcut: Shortcut, posts: Posts, seed: int) -> None:
    rng = random.Random(seed)
    taken = lifted = 0
    for _ in range(4000):
        headers = (
            [b"Host: x"] * (rng.random() < 0.95)
            + rng.sample(HEADERS[:7], rng.choice([0, 1, 2, 2]))
            + rng.sample(HEADERS, rng.choice([0, 0, 1, 2]))
        )
        if rng.random() < 0.5:
            rng.shuffle(headers)
        data = b"\r\n".join([rng.choice(LINES), *headers]) + rng.choice(ENDS)
        if rng.random() < 0.1:
            place = rng.randrange(len(data) + 1)
            data = data[:place] + rng.choice([b"\r", b"\n", b"\r\n", b" ", b"\t", b":"]) + data[place + rng.randint(0, 2) :]
        left, forwarded, request_id = lift(data, MAX_REQUEST)
        wish, asked = shortcut.read(left), posts.parse(left)
        if wish is None and asked is None:
            continue
        taken += 1
        lifted += left != data
        strict = strictly(data)
        assert strict is not None, f"the strict parser refuses {data!r}"
        head, body = strict
        assert head.headers.get("x-forwarded-for", "") == forwarded.strip(), data
        assert head.headers.get("x-request-id", "") == request_id, data
        if wish is not None:
            query = dict(pair.partition("=")[::2] for pair in head.query.split("&") if pair)
            assert (wish, body) == ((head.path, query, head.headers.get("last-event-id")), b""), data
        else:
            assert asked == (head.path, head.headers.get("authorization", ""), body), data
        assert head.keep_alive and "origin" not in head.headers, data
    assert taken > 200, "the sequence met too little"
    assert lifted > 100
