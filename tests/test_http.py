"""The request parser alone: bytes in, heads, bodies and refusals out."""

import random
import re
from collections.abc import Sequence

import pytest

from comet.errors import Refusal
from comet.server.http import MAX_HEADERS, METHODS, PIECES, ChunkedBody, Head, method_in, split_head

LIMIT = 16384
OVERHEAD = 16384
REST = b"GET /next HTTP/1.1\r\nHost: n\r\n\r\n\x00\r\n\n rest"


def head_of(data: bytes, limit: int = LIMIT) -> Head:
    """The complete head that `data` is."""
    buffer = bytearray(data)
    head = split_head(buffer, limit)
    assert head is not None, data
    assert not buffer, buffer
    return head


def request(*headers: bytes, line: bytes = b"GET / HTTP/1.1", host: bytes | None = b"Host: h") -> bytes:
    """A head with these header lines."""
    lines = [line, *([] if host is None else [host]), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def slug_of(data: bytes, limit: int = LIMIT) -> str:
    """What `data` is refused with; nothing of it is consumed but empty lines in front."""
    buffer = bytearray(data)
    with pytest.raises(Refusal) as caught:
        split_head(buffer, limit)
    assert bytes(buffer) == data.lstrip(b"\r\n") or data[:1] in b"\r\n"
    assert caught.value.detail
    return caught.value.slug


# -- heads that are taken


def test_a_request_is_read_in_all_its_parts() -> None:
    head = head_of(b"POST /publish/a?type=t&x=%20 HTTP/1.1\r\nHost: h:80\r\nX-Thing:  some value \t\r\nContent-Length: 12\r\n\r\n")
    assert head == Head(
        "POST",
        "/publish/a?type=t&x=%20",
        "/publish/a",
        "type=t&x=%20",
        "HTTP/1.1",
        {"host": "h:80", "x-thing": "some value", "content-length": "12"},
        True,
        12,
        False,
    )


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_known_method_is_read(method: str) -> None:
    assert head_of(request(line=f"{method} /x HTTP/1.1".encode())).method == method


def test_what_follows_a_head_stays_in_the_buffer_byte_for_byte() -> None:
    buffer = bytearray(request(b"Content-Length: 4") + REST)
    assert split_head(buffer, LIMIT) is not None
    assert bytes(buffer) == REST


def test_pipelined_requests_come_out_one_after_the_other() -> None:
    buffer = bytearray(b"".join(request(line=b"GET /%d HTTP/1.1" % n) for n in range(50)))
    heads = [split_head(buffer, LIMIT) for _ in range(50)]
    assert [head.path for head in heads if head] == [f"/{n}" for n in range(50)]
    assert split_head(buffer, LIMIT) is None
    assert not buffer


def test_empty_lines_before_a_request_are_ignored() -> None:
    buffer = bytearray(b"\r\n\r\n\r\n" + request() + b"\r\n")
    assert split_head(buffer, LIMIT) is not None
    assert split_head(buffer, LIMIT) is None


@pytest.mark.parametrize(
    "data",
    [
        request(),
        b"\r\n" + request(b"X: 1", b"X: 2", line=b"PUT /%61?b#c HTTP/1.1"),
        request(b"Transfer-Encoding: chunked", line=b"POST /publish HTTP/1.1"),
        request(b"Connection: upgrade", b"Upgrade: h2c"),
        request(line=b"GET /x HTTP/1.0", host=None),
    ],
)
def test_byte_by_byte_gives_the_same_head_as_whole(data: bytes) -> None:
    buffer = bytearray()
    for index, byte in enumerate(data[:-1]):
        buffer.append(byte)
        assert split_head(buffer, LIMIT) is None, data[: index + 1]
    buffer.append(data[-1])
    assert split_head(buffer, LIMIT) == split_head(bytearray(data), LIMIT) is not None


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/a%20b%2Fc", "/a b/c", ""),
        (b"/%C3%A9", "/é", ""),
        (b"/a%00b", "/a\0b", ""),
        (b"/%", "/%", ""),
        (b"/%zz%4", "/%zz%4", ""),
        (b"/a+b?c+d", "/a+b", "c+d"),
        (b"/a?b?c=%41", "/a", "b?c=%41"),
        (b"/a?", "/a", ""),
        (b"//a/../b", "//a/../b", ""),
        (b"*", "*", ""),
        (b"http://h/p?q", "/p", "q"),
        (b"HTTP://h:80", "/", ""),
        (b"https://h/", "/", ""),
    ],
)
def test_the_target_is_split_and_its_path_decoded(target: bytes, path: str, query: str) -> None:
    head = head_of(request(line=b"OPTIONS " + target + b" HTTP/1.1"))
    assert (head.path, head.query) == (path, query)


def test_an_absolute_target_of_a_host_alone_may_have_a_query() -> None:
    head = head_of(request(line=b"GET http://h?q=1 HTTP/1.1"))
    assert (head.path, head.query) == ("/", "q=1")


def test_the_host_of_an_absolute_target_is_the_one_that_counts() -> None:
    assert head_of(request(line=b"GET http://real/p HTTP/1.1", host=b"Host: other")).headers["host"] == "real"


@pytest.mark.parametrize(
    ("lines", "name", "value"),
    [
        ([b"X-A: 1", b"x-a: 2"], "x-a", "1,2"),
        ([b"Cookie: a=1", b"Cookie: b=2"], "cookie", "a=1; b=2"),
        ([b"X-A:"], "x-a", ""),
        ([b"X-A:\t v \t "], "x-a", "v"),
        ([b"X-A: v\tw"], "x-a", "v\tw"),
        ([b"X-A: \xff\x80"], "x-a", "\xff\x80"),
        ([b"!#$%&'*+-.^`|~1: v"], "!#$%&'*+-.^`|~1", "v"),
    ],
)
def test_headers_are_lower_case_stripped_and_merged(lines: Sequence[bytes], name: str, value: str) -> None:
    assert head_of(request(*lines)).headers[name] == value


def test_names_with_an_underscore_are_dropped() -> None:
    head = head_of(request(b"Content_Length: 5", b"Transfer_Encoding: chunked", b"X_A: 1", b"X-A: 2", b"Last_Event-ID: 3"))
    assert head.headers == {"host": "h", "x-a": "2"}
    assert head.length == 0


@pytest.mark.parametrize(
    ("line", "connection", "stays"),
    [
        (b"GET / HTTP/1.1", None, True),
        (b"GET / HTTP/1.1", b"Connection: close", False),
        (b"GET / HTTP/1.1", b"Connection: CLOSE", False),
        (b"GET / HTTP/1.1", b"Connection: x, close", False),
        (b"GET / HTTP/1.1", b"Connection: keep-alive", True),
        (b"GET / HTTP/1.0", None, False),
        (b"GET / HTTP/1.0", b"Connection: close", False),
        (b"GET / HTTP/1.0", b"Connection: keep-alive", True),
    ],
)
def test_keep_alive_is_what_version_and_connection_say(line: bytes, connection: bytes | None, stays: bool) -> None:
    head = head_of(request(*([connection] if connection else []), line=line))
    assert head.keep_alive is stays
    assert head.version == line[-8:].decode()


def test_http_1_0_needs_no_host() -> None:
    assert head_of(request(line=b"GET / HTTP/1.0", host=None)).headers == {}


@pytest.mark.parametrize("more", [[], [b"Content-Length: 3"], [b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA"]])
def test_an_upgrade_is_ignored(more: list[bytes]) -> None:
    buffer = bytearray(request(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", *more) + REST)
    head = split_head(buffer, LIMIT)
    assert head is not None
    assert head.keep_alive
    assert head.length == (3 if more[:1] == [b"Content-Length: 3"] else 0)
    assert bytes(buffer) == REST


@pytest.mark.parametrize(
    ("line", "expect", "expects"),
    [
        (b"POST / HTTP/1.1", b"100-continue", True),
        (b"POST / HTTP/1.1", b"100-Continue", True),
        (b"POST / HTTP/1.0", b"100-continue", False),
        (b"POST / HTTP/1.1", b"", False),
    ],
)
def test_expect_counts_in_http_1_1_only(line: bytes, expect: bytes, expects: bool) -> None:
    assert head_of(request(b"Content-Length: 3", b"Expect: " + expect, line=line)).expects_continue is expects


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (b"Content-Length: 0", 0),
        (b"Content-Length: \t7 ", 7),
        (b"Content-Length: 007", 7),
        (b"Content-Length: 999999999999999999", 10**18 - 1),
        (b"Transfer-Encoding: chunked", None),
        (b"Transfer-Encoding: CHUNKED ", None),
    ],
)
def test_the_length_of_a_body_has_one_reading(header: bytes, length: int | None) -> None:
    assert head_of(request(header, line=b"POST / HTTP/1.1")).length == length


@pytest.mark.parametrize("host", [b"", b"h", b"h:8000", b"[::1]:80", b"a-b.example", b"127.0.0.1", b"a%41"])
def test_hosts_that_are_taken(host: bytes) -> None:
    assert head_of(request(host=b"Host: " + host)).headers["host"] == host.decode()


# -- heads that are refused

REFUSED = [
    # the request line
    ("bad-request", request(line=b"GET /")),
    ("bad-request", request(line=b"GET")),
    ("bad-request", request(line=b"GET  / HTTP/1.1")),
    ("bad-request", request(line=b" GET / HTTP/1.1")),
    ("bad-request", request(line=b"GET / HTTP/1.1 ")),
    ("bad-request", request(line=b"GET /  HTTP/1.1")),
    ("bad-request", request(line=b"GET\t/ HTTP/1.1")),
    ("bad-request", request(line=b"GET /a b HTTP/1.1")),
    ("bad-request", request(line=b"GET /\xc3\xa9 HTTP/1.1")),
    ("bad-request", request(line=b"GET /\x01 HTTP/1.1")),
    ("bad-request", request(line=b"GET /\x7f HTTP/1.1")),
    ("bad-request", request(line=b"GET / http/1.1")),
    ("bad-request", request(line=b"GET / HTTP/1.10")),
    ("bad-request", request(line=b"GET / HTTP/1")),
    ("bad-request", request(line=b"GET / HTTP/+1.1")),
    ("bad-request", request(line=b"GET / RTSP/1.0")),
    ("bad-request", request(line=b"SOURCE / ICE/1.0")),
    ("bad-request", request(line=b"GET x HTTP/1.1")),
    ("bad-request", request(line=b"GET ?x HTTP/1.1")),
    ("bad-request", request(line=b"A" * 33 + b" / HTTP/1.1")),
    ("bad-path", request(line=b"GET ftp://h/ HTTP/1.1")),
    ("bad-path", request(line=b"GET /%ff HTTP/1.1")),
    ("bad-path", request(line=b"GET /%C3 HTTP/1.1")),
    ("bad-path", request(line=b"GET /%ED%A0%80 HTTP/1.1")),
    ("http-version", request(line=b"GET / HTTP/0.9")),
    ("http-version", request(line=b"GET / HTTP/1.2")),
    ("http-version", request(line=b"GET / HTTP/2.0")),
    ("http-version", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    ("method-unknown", request(line=b"get / HTTP/1.1")),
    ("method-unknown", request(line=b"BREW / HTTP/1.1")),
    ("method-unknown", request(line=b"CONNECT h:80 HTTP/1.1")),
    # the host
    ("bad-host", request(host=None)),
    ("bad-host", request(b"Host: h")),
    ("bad-host", request(b"hOST: i")),
    ("bad-host", request(host=b"Host: a b")),
    ("bad-host", request(host=b"Host: a,b/")),
    ("bad-host", request(host=b"Host: a/b")),
    ("bad-host", request(host=b"Host: u@h")),
    ("bad-host", request(host=b"Host: a?")),
    ("bad-host", request(line=b"GET http://u@h/ HTTP/1.1")),
    # lines
    ("bad-request", b"GET / HTTP/1.1\nHost: h\n\n"),
    ("bad-request", b"GET / HTTP/1.1\r\nHost: h\n\r\n"),
    ("bad-request", b"\nGET / HTTP/1.1\r\nHost: h\r\n\r\n"),
    ("bad-request", b"\r\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n"),
    ("bad-request", request(b"X: a\rb")),
    ("bad-request", request(b"X: a\r")),
    ("bad-request", request(b"X: a\nContent-Length: 5")),
    ("bad-request", request(b"X: a\0b")),
    ("bad-request", request(b"X: a\r\n b")),
    ("bad-request", request(b"X: a\r\n\tb")),
    ("bad-request", request(b" X: a")),
    ("bad-request", b"GET / HTTP/1.1\r\n Host: h\r\n\r\n"),
    # headers
    ("bad-request", request(b"X")),
    ("bad-request", request(b": v")),
    ("bad-request", request(b"X : v")),
    ("bad-request", request(b"X\t: v")),
    ("bad-request", request(b"X(: v")),
    ("bad-request", request(b"X Y: v")),
    ("bad-request", request(b"X\xff: v")),
    *(("bad-request", request(b"X: a%cb" % code)) for code in (1, 8, 0x0B, 0x0C, 0x1F, 0x7F)),
    *(
        ("bad-request", request(name + b": a", name.upper() + b": a"))
        for name in (b"content-type", b"authorization", b"origin", b"last-event-id", b"idempotency-key")
    ),
    *(
        ("bad-request", request(name + b": \xff", host=None if name == b"host" else b"Host: h"))
        for name in (b"host", b"content-type", b"authorization", b"origin", b"last-event-id", b"idempotency-key")
    ),
    ("bad-expectation", request(b"Expect: 200-ok")),
    ("bad-expectation", request(b"Expect: 100-continue, x")),
    # lengths
    *(
        ("bad-length", request(b"Content-Length:" + value, line=b"POST / HTTP/1.1"))
        for value in (b"", b" ", b" +3", b" -1", b" 1_0", b" 3, 3", b" 3 3", b" 0x3", b" 3.0", b" 1e1", b" " + b"9" * 19, b" " + b"9" * 40)
    ),
    ("bad-length", request(b"Content-Length: 3", b"Content-Length: 3")),
    ("bad-length", request(b"Content-Length: 3", b"content-length: 4")),
    ("bad-length", request(b"Content-Length: 3", b"Transfer-Encoding: chunked")),
    ("bad-length", request(b"Transfer-Encoding: chunked", b"Content-Length: 3")),
    ("bad-request", request(b"Content-Length : 3")),
    ("bad-length", request(b"Content-Length: 3\x0b")),
    # encodings
    *(
        ("bad-encoding", request(b"Transfer-Encoding:" + value, line=b"POST / HTTP/1.1"))
        for value in (
            b"", b" gzip", b" identity", b" xchunked", b" chunkedx", b" gzip, chunked", b" chunked, gzip", b" chunked, chunked",
            b" chunked,", b" ,chunked", b' "chunked"', b" chunked;q=1", b" chunked foo",
        )
    ),
    ("bad-encoding", request(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked")),
    ("bad-encoding", request(b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked")),
    ("bad-encoding", request(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity")),
    ("bad-encoding", request(b"Transfer-Encoding: chunked", line=b"POST / HTTP/1.0")),
    ("bad-request", request(b"Transfer-Encoding : chunked")),
    ("bad-request", request(b"Transfer-Encoding: \x0bchunked")),
]  # fmt: skip


@pytest.mark.parametrize(("slug", "data"), REFUSED)
def test_a_bad_head_is_refused_by_name_and_not_consumed(slug: str, data: bytes) -> None:
    assert slug_of(data) == slug
    assert slug_of(data + REST) == slug


@pytest.mark.parametrize(("slug", "data"), REFUSED)
def test_a_bad_head_is_refused_in_pieces_too(slug: str, data: bytes) -> None:
    buffer = bytearray()
    with pytest.raises(Refusal) as caught:
        for byte in data:
            buffer.append(byte)
            assert split_head(buffer, LIMIT) is None
    assert caught.value.slug == slug


def test_a_doubled_expect_is_refused() -> None:
    assert slug_of(request(b"Expect: 100-continue", b"Expect: 100-continue")) == "bad-request"


def test_another_protocol_is_told_so_before_its_head_ends() -> None:
    assert slug_of(b"SSH-2.0-OpenSSH_9\r\n") == "bad-request"
    assert slug_of(b"PRI * HTTP/2.0\r\n") == "http-version"
    assert slug_of(b"HELO x\n") == "bad-request"


# -- limits


def padded(total: int) -> bytes:
    """A head whose lines before the blank one have `total` bytes, their line ends included."""
    start = b"GET / HTTP/1.1\r\nHost: h\r\nX: "
    return start + b"a" * (total - len(start) - 2) + b"\r\n\r\n"


def test_a_head_up_to_the_limit_is_taken_and_one_beyond_is_not() -> None:
    assert head_of(padded(1000), 1000).headers["x"].startswith("aaa")
    assert slug_of(padded(1010), 1000) == "header-too-large"


def test_an_endless_head_is_refused_as_soon_as_it_is_over_the_limit() -> None:
    buffer = bytearray(b"GET /" + b"a" * 995)
    assert split_head(buffer, 1000) is None
    buffer += b"a"
    with pytest.raises(Refusal) as caught:
        split_head(buffer, 1000)
    assert caught.value.slug == "header-too-large"


def test_a_body_behind_the_head_does_not_count_as_head() -> None:
    buffer = bytearray(request() + b"x" * 5000)
    assert split_head(buffer, 512) is not None
    assert len(buffer) == 5000


@pytest.mark.parametrize("seed", range(20))
def test_a_cr_or_lf_alone_is_refused_wherever_it_stands(seed: int) -> None:
    generator = random.Random(seed)
    bare = re.compile(rb"\r(?!\n|\Z)|(?<!\r)\n|\x00")
    for _ in range(500):
        rest = b"".join(generator.choices([b"\r\n", b"A: b", b"\r", b"\n", b"\0"], [20, 20, 1, 1, 1], k=generator.randrange(30)))
        buffer = bytearray(b"GET / HTTP/1.1\r\nHost: x\r\n" + rest)
        end = buffer.find(b"\r\n\r\n")
        wrong = bare.search(buffer[: end + 4] if end >= 0 else buffer)
        try:
            split_head(buffer, LIMIT)
        except Refusal as refusal:
            assert wrong or "CR or LF alone" not in refusal.detail
        else:
            assert not wrong, buffer


def test_the_number_of_headers_is_limited() -> None:
    most = [b"X-%d: 1" % n for n in range(MAX_HEADERS - 1)]  # the Host is one
    assert len(head_of(request(*most)).headers) == MAX_HEADERS
    assert slug_of(request(*most, b"Y: 1")) == "header-too-large"
    assert slug_of(request(*[b"X_Y: 1"] * MAX_HEADERS)) == "header-too-large"


# -- chunked bodies


def unchunk(data: bytes, step: int | None = None, overhead: int = OVERHEAD) -> tuple[bytes, bytes, bool]:
    """Data, rest and whether it ended, of a chunked body fed whole or `step` bytes at a time."""
    body, buffer, out = ChunkedBody(overhead), bytearray(), b""
    for start in range(0, len(data), step or len(data)):
        buffer += data[start : start + (step or len(data))]
        left = -1
        while not body.done and left != len(buffer):
            left = len(buffer)
            out += body.feed(buffer)
    return out, bytes(buffer), body.done


GOOD = [
    (b"0\r\n\r\n", b""),
    (b"3\r\nabc\r\n0\r\n\r\n", b"abc"),
    (b"1\r\na\r\n2\r\nbc\r\n000\r\n\r\n", b"abc"),
    (b"0003\r\nabc\r\n0\r\n\r\n", b"abc"),
    (b"A\r\n0123456789\r\na\r\n0123456789\r\n0\r\n\r\n", b"0123456789" * 2),
    (b'3;a;b=c;d="e;f"\r\nabc\r\n0;x\r\n\r\n', b"abc"),
    (b"3\r\nabc\r\n0\r\nTrailer: x\r\nOther: y\r\n\r\n", b"abc"),
    (b"0\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", b""),
    (b"7\r\n\n\n\r\n\r\n\n\r\n0\r\n\r\n", b"\n\n\r\n\r\n\n"),
    (b"5\r\n0\r\n\r\n\r\n0\r\n\r\n", b"0\r\n\r\n"),
    (b"3\r\n\0\xff\r\r\n0\r\n\r\n", b"\0\xff\r"),
]


@pytest.mark.parametrize(("data", "expected"), GOOD)
@pytest.mark.parametrize("step", [None, 1, 2, 3, 7])
def test_a_chunked_body_ends_exactly_where_it_ends(data: bytes, expected: bytes, step: int | None) -> None:
    assert unchunk(data + REST, step) == (expected, REST, True)


@pytest.mark.parametrize(("data", "expected"), GOOD)
def test_a_chunked_body_that_lacks_a_byte_is_not_done(data: bytes, expected: bytes) -> None:
    out, rest, done = unchunk(data[:-1])
    assert (out, rest, done) == (expected, b"", False)


def test_a_body_full_of_newlines_comes_through() -> None:
    lines = b"\n" * 20000 + b"\r\n" * 20000
    assert unchunk(b"%x\r\n%b\r\n0\r\n\r\n" % (len(lines), lines) + REST, 4096) == (lines, REST, True)


@pytest.mark.parametrize("unit", [b"1\r\na\r\n", b"1;x=y\r\na\r\n", b"01\r\na\r\n"], ids=["plain", "extension", "zero"])
def test_of_very_many_chunks_a_few_are_taken_at_a_time(unit: bytes) -> None:
    body, buffer, out, calls = ChunkedBody(OVERHEAD), bytearray(unit * 1000 + b"0\r\nTrailer: x\r\n\r\n" + REST), b"", 0
    while not body.done:
        data = body.feed(buffer)
        assert len(data) <= PIECES
        out += data
        calls += 1
    assert (out, bytes(buffer)) == (b"a" * 1000, REST)
    assert calls > 1000 / PIECES


def test_of_very_many_trailers_a_few_are_taken_at_a_time() -> None:
    body, buffer = ChunkedBody(OVERHEAD), bytearray(b"0\r\n" + b"X: y\r\n" * 200)
    body.feed(buffer)
    assert len(buffer) > 100 * 6


def test_plain_chunks_are_read_together_only_where_a_chunk_begins() -> None:
    """Data, extensions and trailers may look like chunks."""
    like = b"1\r\na\r\n" * 3
    assert unchunk(b"%x\r\n%b\r\n0\r\n\r\n" % (len(like), like)) == (like, b"", True)
    for bad in (b"1\r\naa\r\n", b"2\r\na\r\n1\r\na\r\n", b"1\r\na\r\n1\r\na1\r\n"):
        with pytest.raises(Refusal):
            unchunk(b"1\r\nb\r\n" * 10 + bad + b"0\r\n\r\n")


def test_a_request_after_a_chunked_body_is_the_next_head() -> None:
    buffer = bytearray(request(b"Transfer-Encoding: chunked", line=b"POST /1 HTTP/1.1") + b"3\r\nabc\r\n0\r\n\r\n" + REST)
    first = split_head(buffer, LIMIT)
    assert first is not None
    assert first.length is None
    body = ChunkedBody(OVERHEAD)
    assert body.feed(buffer) == b"abc"
    assert body.done
    second = split_head(buffer, LIMIT)
    assert second is not None
    assert second.path == "/next"


def test_feeding_a_body_that_is_done_takes_nothing() -> None:
    body = ChunkedBody(OVERHEAD)
    assert body.feed(bytearray(b"0\r\n\r\n")) == b""
    buffer = bytearray(REST)
    assert body.feed(buffer) == b""
    assert bytes(buffer) == REST


BAD_CHUNKS = [
    b"0x3\r\nabc\r\n", b"+3\r\nabc\r\n", b"-3\r\nabc\r\n", b"3 \r\nabc\r\n", b" 3\r\nabc\r\n", b"\t3\r\nabc\r\n", b"3_0\r\nabc\r\n",
    b"g\r\n", b"\r\n", b";a\r\n", b"3\nabc\r\n", b"3\r\nabc\n", b"3\r\nabcd\r\n", b"3\r\nab\r\n0\r\n\r\n", b"3\r\nabc0\r\n", b"3\r\nabc\rX",
    b"3\r\nabc\r\r\n", b"3\r\nabc\r\n\r\n0", b"1" + b"0" * 16 + b"\r\n", b"f" * 17 + b"\r\n", b"3;a\nabc\r\n", b"3;a\rb\r\n", b"3;a\0\r\n",
    b"3;\r\n", b"3; a\r\n", b"3 ;a\r\n", b"0\n\n", b"0\r\n\n", b"0\r\n\rX", b"0\r\nX\r\n", b"0\r\nX: a\n", b"0\r\nX: a\r\n b\r\n",
    b"0\r\nX: a\0\r\n", b"0\r\nX : a\r\n", b"0\r\nContent-Length: 5\r\n", b"0\r\nTransfer-Encoding: chunked\r\n",
]  # fmt: skip


@pytest.mark.parametrize("step", [None, 1])
@pytest.mark.parametrize("data", BAD_CHUNKS)
def test_a_malformed_chunked_body_is_refused(data: bytes, step: int | None) -> None:
    with pytest.raises(Refusal) as caught:
        unchunk(data + b"0\r\n\r\n" + REST, step)
    assert caught.value.slug == "bad-encoding"


@pytest.mark.parametrize(
    "data",
    [
        b"0\r\n" + b"X: 1\r\n" * 1000,
        b"0\r\nX: " + b"a" * 3000,
        b"0\r\n" + b"a" * 3000,
        b"1;" + b"a" * 3000,
        b"1;a=" + b"b" * 3000,
        b"0" * 3000,
        b"1;aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\na\r\n" * 100,
    ],
)
@pytest.mark.parametrize("step", [None, 1, 100])
def test_chunk_lines_extensions_and_trailers_are_bounded(data: bytes, step: int | None) -> None:
    with pytest.raises(Refusal) as caught:
        unchunk(data, step, overhead=1000)
    assert caught.value.slug == "bad-encoding"


def test_chunks_of_one_byte_are_no_excess() -> None:
    assert unchunk(b"1\r\na\r\n" * 5000 + b"0\r\n\r\n", 1000, overhead=100) == (b"a" * 5000, b"", True)


@pytest.mark.parametrize(
    ("data", "method"),
    [(b"HEAD / HTTP/1.1\r\n", "HEAD"), (b"GET ", "GET"), (b"HEAD", ""), (b"", ""), (b"head /", ""), (b"HEADER /", ""), (b"\xff /", "")],
)
def test_the_method_of_a_head_that_was_refused(data: bytes, method: str) -> None:
    assert method_in(data) == method_in(bytearray(data)) == method
