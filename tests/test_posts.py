"""The short way of a POST reads nothing otherwise than the strict parser, and nothing that the strict parser refuses."""

import random

import pytest

from comet.errors import Refusal
from comet.server.blocks import MAX_REQUEST
from comet.server.http import split_head
from comet.server.posts import MAX_BLOCKS, Posts, Reply

Asked = tuple[str, str, bytes]

BLOCK = b"Host: x\r\nContent-Length: 5\r\n\r\n"
PLAIN = b"POST /send/7 HTTP/1.1\r\n" + BLOCK + b"hello"


def reply() -> Reply:
    return "200 OK", (), b""


@pytest.fixture
def posts() -> Posts:
    return Posts(lambda path, authorization, body: reply if path.startswith("/send/") else None)


def strictly(data: bytes) -> Asked | None:
    """What the strict parser makes of one whole plain request; None when it refuses, waits for more, or leaves some."""
    buffer = bytearray(data)
    try:
        head = split_head(buffer, 16384)
    except Refusal:
        return None
    if head is None or head.length != len(buffer) or (head.method, head.version) != ("POST", "HTTP/1.1") or not head.keep_alive:
        return None
    if head.query or head.expects_continue or {"origin", "idempotency-key", "content-encoding"} & set(head.headers):
        return None
    return head.path, head.headers.get("authorization", ""), bytes(buffer)


def test_a_plain_post_is_read(posts: Posts) -> None:
    assert posts.parse(PLAIN) == ("/send/7", "", b"hello")
    assert posts.read(PLAIN) is reply
    assert posts.read(PLAIN.replace(b"/send/", b"/other/")) is None


def test_the_key_is_read_of_each_block_its_own(posts: Posts) -> None:
    for key in ("Bearer a", "Bearer b", "Bearer a"):
        data = PLAIN.replace(b"Host: x", f"Host: x\r\nAuthorization: {key}".encode())
        assert posts.parse(data) == ("/send/7", key, b"hello")
    assert posts.parse(PLAIN) == ("/send/7", "", b"hello")


@pytest.mark.parametrize("body", [b"", b"\r\n\r\n", b"a\r\n\r\nb", b"\x00\xff", b"POST / HTTP/1.1\r\n\r\n"])
def test_a_body_may_be_anything(posts: Posts, body: bytes) -> None:
    data = b"POST /send/7 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    assert posts.parse(data) == strictly(data) == ("/send/7", "", body)


OTHERS = {
    "GET": PLAIN.replace(b"POST", b"GET"),
    "PUT": PLAIN.replace(b"POST", b"PUT"),
    "a query": PLAIN.replace(b"/7 ", b"/7?type=a "),
    "an escape": PLAIN.replace(b"/7 ", b"/%37 "),
    "a list": PLAIN.replace(b"/7 ", b"/7,8 "),
    "the absolute form": PLAIN.replace(b"/send/7", b"http://y/send/7"),
    "HTTP/1.0": PLAIN.replace(b"1.1", b"1.0"),
    "a bare LF": PLAIN.replace(b"\r\n", b"\n"),
    "an empty line before": b"\r\n" + PLAIN,
    "a body to come": PLAIN[:-1],
    "a byte behind": PLAIN + b"x",
    "two requests": PLAIN + PLAIN,
    "half a head": PLAIN[:30],
    "a head without its end": b"POST /send/7 HTTP/1.1\r\nHost: x",
    "two lengths": PLAIN.replace(b"Host: x", b"Host: x\r\nContent-Length: 5"),
    "a bad length": PLAIN.replace(b": 5", b": +5"),
    "chunks": PLAIN.replace(b"Content-Length: 5", b"Transfer-Encoding: chunked"),
    "chunks and a length": PLAIN.replace(b"Host: x", b"Host: x\r\nTransfer-Encoding: chunked"),
    "an expectation": PLAIN.replace(b"Host: x", b"Host: x\r\nExpect: 100-continue"),
    "an origin": PLAIN.replace(b"Host: x", b"Host: x\r\nOrigin: https://x"),
    "an idempotency key": PLAIN.replace(b"Host: x", b"Host: x\r\nIdempotency-Key: k"),
    "a coding": PLAIN.replace(b"Host: x", b"Host: x\r\nContent-Encoding: gzip"),
    "a coding in capitals": PLAIN.replace(b"Host: x", b"Host: x\r\nCONTENT-ENCODING: identity"),
    "a close": PLAIN.replace(b"Host: x", b"Host: x\r\nConnection: close"),
    "no host": PLAIN.replace(b"Host: x", b"A: b"),
    "a fold": PLAIN.replace(b"Host: x", b"Host: x\r\nA: b\r\n c"),
    "a large body": b"POST /send/7 HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (MAX_REQUEST, b"x" * MAX_REQUEST),
    "nothing": b"",
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_rest_goes_the_long_way(posts: Posts, what: str) -> None:
    for _ in range(2):
        assert posts.parse(OTHERS[what]) is None
    for start in range(len(OTHERS[what])):  # whatever was remembered, it is read as the strict parser does
        data = b"POST /send/7 HTTP/1.1\r\n" + OTHERS[what][start:]
        assert posts.parse(data) in (None, strictly(data))
    assert posts.parse(PLAIN) is not None


def test_a_known_block_is_not_parsed_again_and_what_is_remembered_is_bounded(posts: Posts, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2 * MAX_BLOCKS + 10):
        assert posts.parse(PLAIN.replace(b"Host: x", b"Host: x%d" % number)) is not None
        assert len(posts._blocks) <= MAX_BLOCKS
    posts.parse(PLAIN)
    monkeypatch.setattr("comet.server.blocks.split_head", None)
    assert posts.parse(PLAIN.replace(b"/7 ", b"/8 ").replace(b"hello", b"world")) == ("/send/8", "", b"world")


LINES = [
    b"POST /send/7 HTTP/1.1",
    b"POST /send/7?a=b HTTP/1.1",
    b"GET /send/7 HTTP/1.1",
    b"POST * HTTP/1.1",
    b"POST http://y/ HTTP/1.1",
    b"",
]
HEADERS = [
    b"Host: x", b"Host: a b", b"Content-Length: 0", b"Content-Length: 3", b"Content-Length: 03", b"content-length:3", b"Transfer-Encoding: chunked",
    b"Connection: close", b"Connection: upgrade", b"Upgrade: h2c", b"Origin: x", b"Expect: 100-continue", b"Authorization: Bearer k", b" folded",
    b"Idempotency-Key: k", b"Content-Encoding: br", b"no colon", b"X: \xff", b"X: a\x00b", b"X:y\rz", b"POST /x HTTP/1.1",
]  # fmt: skip
BODIES = [b"", b"abc", b"abcd", b"\r\n\r\n", b"POST /send/7 HTTP/1.1\r\nHost: x\r\n\r\n"]


@pytest.mark.parametrize("seed", range(10))
def test_what_the_short_way_takes_the_strict_parser_reads_the_same(posts: Posts, seed: int) -> None:
    rng = random.Random(seed)
    taken = 0
    for _ in range(5000):
        headers = (
            [b"Host: x"] * (rng.random() < 0.9)
            + [b"Content-Length: 3"] * (rng.random() < 0.5)
            + rng.sample(HEADERS, rng.choice([0, 0, 1, 2]))
        )
        line = LINES[0] if rng.random() < 0.7 else rng.choice(LINES)
        data = b"\r\n".join([line, *headers]) + rng.choice([b"\r\n\r\n"] * 6 + [b"\r\n", b"\n\n"]) + rng.choice(BODIES)
        if rng.random() < 0.1:
            place = rng.randrange(len(data) + 1)
            data = data[:place] + rng.choice([b"\r", b"\n", b" ", b"\t", b":", b"\x7f", b"%"]) + data[place + rng.randint(0, 1) :]
        asked = posts.parse(data)
        if asked is not None:
            taken += 1
            assert asked == strictly(data), data
    assert taken > 200, "the sequence met too little"
