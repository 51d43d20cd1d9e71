"""Seeded fuzz: a hundred thousand mutated requests against the real server, and the parser alone.

What must hold is little and hard: the server lives, nothing unexpected is logged or counted, and
everything is given back.
"""

import errno
import random
import sys
from pathlib import Path

import gevent
import pytest
from gevent import socket
from gevent.lock import BoundedSemaphore

from comet.errors import Refusal
from comet.server.http import ChunkedBody, Head, split_head
from tests.conftest import Start
from tests.harness import TIMEOUT, wait_until

SEED = 20081103
REQUESTS = 50_000
"""Mutated requests for each of the two ways that clients wait (``--hibernate``)."""
BURST = 20
"""Mutated requests that a connection sends at most; the server stops reading at the first bad one."""

CORPUS = [
    b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n",
    b"HEAD /stats HTTP/1.1\r\nHost: h\r\nConnection: keep-alive\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: h\r\nOrigin: https://example.org\r\n\r\n",
    b"GET /poll/a,b?timeout=0&since=oldest HTTP/1.1\r\nHost: h\r\nCookie: a=1\r\nCookie: b=2\r\n\r\n",
    b"GET /poll/fuzz?timeout=0.001 HTTP/1.1\r\nHost: h\r\nLast-Event-ID: 1f-0\r\n\r\n",
    b"GET /channels/fuzz/history?limit=2&since=oldest HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"GET http://h:80/channels/f%75zz?x=%20y HTTP/1.1\r\nHost: h\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
    b"POST /publish/fuzz?type=t HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\nIdempotency-Key: k1\r\n\r\nhello",
    b"POST /publish/fuzz HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\n\r\n\r\n0\r\nX: y\r\n\r\n",
    b"POST /publish/fuzz HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\nhi",
    b'POST /publish HTTP/1.1\r\nHost: h\r\nContent-Length: 60\r\n\r\n{"channel":"fuzz","data":"1"}\n{"channel":"fuzz","data":"2","k',
    b"POST /send/7 HTTP/1.1\r\nHost: [::1]:8000\r\nAuthorization: Bearer x\r\nContent-Length: 1\r\n\r\nx",
    b"DELETE /channels/fuzz HTTP/1.1\r\nHost: h\r\n\r\n",
    b"GET /events/fuzz HTTP/1.1\r\nHost: h\r\nLast-Event-ID: oldest\r\n\r\n",
    b"GET /stream/a,a,fuzz HTTP/1.0\r\n\r\n",
    b"GET /test/1 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n",
]

SPECIAL = [
    b"\r\n", b"\r", b"\n", b"\r\n\r\n", b"\n\n", b"\0", b"\t", b" ", b":", b",", b";", b"%", b"%00", b"%ff", b"?", b"#", b"\xff", b"\xc3\xa9",
    b"\r\n ", b"0", b"-1", b"+", b"_", b"ffffffffffffffff", b"0\r\n\r\n", b"HTTP/1.0", b"HTTP/2.0", b"chunked", b"Host: h\r\n",
    b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n", b"X_Y: 1\r\n",
    b"Last-Event-ID: 0-0.0-0\r\n", b"Origin: null\r\n",
]  # fmt: skip


def mutated(random: random.Random) -> bytes:
    """A request of the corpus after one to four accidents; some stay as they are."""
    data = bytearray(random.choice(CORPUS))
    for _ in range(random.choice((0, 1, 1, 1, 2, 2, 3, 4))):
        at = random.randrange(len(data) + 1)
        match random.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << random.randrange(8)
            case 1:
                del data[at : at + random.choice((1, 1, 2, 5, 20))]
            case 2:
                data[at:at] = random.choice(SPECIAL)
            case 3:
                data[at:at] = random.randbytes(random.choice((1, 2, 8)))
            case 4:  # a line doubled, elsewhere
                lines = bytes(data).split(b"\r\n")
                lines.insert(random.randrange(len(lines) + 1), random.choice(lines))
                data[:] = b"\r\n".join(lines)
            case 5:
                del data[at:]
            case 6:
                other = random.choice(CORPUS)
                data[at:] = other[random.randrange(len(other)) :]
            case 7:
                data[at:at] = bytes(data[at : at + 30]) * random.choice((1, 2, 50))
    return bytes(data)


def burst(port: int, data: bytes, random: random.Random) -> int:
    """Send `data` on a connection of its own, in one or some pieces, and read what comes; the bytes."""
    got = 0
    source = (f"127.0.1.{random.randrange(1, 250)}", 0)  # one address has too few ports for all of them
    with socket.create_connection(("127.0.0.1", port), 20, source) as sock:
        try:
            pieces = random.choice((1, 1, 1, 3, 10))
            size = len(data) // pieces + 1
            for start in range(0, len(data), size):
                sock.sendall(data[start : start + size])
            if random.random() < 0.2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                return got  # a reset, perhaps in the middle of an answer
            sock.shutdown(socket.SHUT_WR)  # a stream ends too: it counts as gone
            while part := sock.recv(65536):
                got += len(part)
        except OSError as error:  # it had enough of us, which is its right
            assert error.errno in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN), error
    return got


def test_a_hundred_thousand_mutated_requests_leave_the_server_well(start: Start) -> None:
    server = start("--header-timeout", "0.3", "--body-timeout", "0.3", "--max-per-address", "10000", "--origins", "https://example.org")
    assert server.request("GET", "/healthz").status == 200
    wait_until(lambda: server.stats()["connections"] == 1)
    before = server.descriptors()
    memory = server.stats()["peak_memory_bytes"]
    source = random.Random(SEED)
    slots = BoundedSemaphore(64)
    got = 0

    def one(data: bytes, seed: int) -> None:
        nonlocal got
        try:
            read = burst(server.port, data, random.Random(seed))
            got += read  # not in one: others run meanwhile
        finally:
            slots.release()

    greenlets = []
    sent = 0
    while sent < REQUESTS:
        # a whole burst would end at its first bad request: the server has to see most of them
        count = min(source.choice((1, 1, 1, 2, 3, 5, BURST)), REQUESTS - sent)
        data = b"".join(mutated(source) for _ in range(count))
        sent += count
        slots.acquire()
        greenlets.append(gevent.spawn(one, data, source.getrandbits(32)))
    gevent.joinall(greenlets, raise_error=True, timeout=2 * TIMEOUT)
    assert all(greenlet.ready() for greenlet in greenlets), "a connection hangs"
    assert got > 500_000

    server.assert_healthy()
    wait_until(lambda: server.stats()["connections"] == 1)
    wait_until(lambda: server.clients() == 0)
    wait_until(lambda: server.descriptors() <= before)
    stats = server.stats()
    assert stats["requests"] > 2_500, "too few were good enough to get to a handler"
    assert sum(stats["refused"].values()) > 5_000
    assert "internal" not in stats["refused"]
    assert stats["peak_memory_bytes"] - memory < 150 << 20
    assert Path(server.log).stat().st_size < 10_000
    with server.client() as client:
        assert client.request("POST", "/publish/after", b"still here").status == 201
        assert client.request("GET", "/channels/after/history").json["messages"][0]["data"] == "still here"


# -- the parser alone


def test_the_parser_refuses_by_name_or_takes_exactly_one_head() -> None:
    source = random.Random(SEED)
    taken = refused = 0
    for _ in range(60_000):
        data = mutated(source)
        buffer = bytearray(data)
        try:
            head = split_head(buffer, 4096)
        except Refusal as refusal:
            refused += 1
            assert refusal.status >= 400
            assert data.endswith(buffer)
            continue
        assert data.endswith(buffer), "what is left is not the end of what was given"
        if head is None:
            assert not data[: len(data) - len(buffer)].strip(b"\r\n"), "it waits for more and has taken something"
            continue
        taken += 1
        used = data[: len(data) - len(buffer)]
        assert used.endswith(b"\r\n\r\n")
        assert b"\r\n\r\n" not in used.lstrip(b"\r\n")[:-4], "it went past the blank line"
        check(head)
    assert taken > 5000
    assert refused > 5000


def check(head: Head) -> None:
    """What handlers and proxies may rely on."""
    assert head.path.startswith("/") or head.path == "*"
    assert head.version in ("HTTP/1.0", "HTTP/1.1")
    assert head.version == "HTTP/1.0" or "host" in head.headers
    assert head.length is None or head.length >= 0
    assert (head.length is None) == ("transfer-encoding" in head.headers)
    for name, value in head.headers.items():
        assert name == name.lower()
        assert "_" not in name
        assert not set(name + value) & set("\r\n\0"), (name, value)


def test_a_head_is_read_alike_however_it_is_cut() -> None:
    source = random.Random(SEED + 1)
    for _ in range(10_000):
        data = mutated(source)[:600]
        whole = outcome(data, [len(data)])
        pieces = sorted(source.randrange(len(data) + 1) for _ in range(3)) if data else []
        assert outcome(data, [*pieces, len(data)]) == whole, data


def outcome(data: bytes, ends: list[int]) -> object:
    """The head, None, or that it is refused (a piece may show another fault first)."""
    buffer = bytearray()
    fed = 0
    for end in ends:
        buffer += data[fed:end]
        fed = end
        try:
            head = split_head(buffer, 4096)
        except Refusal:
            return "refused"
        if head is not None:
            return head
    return None


@pytest.mark.parametrize("step", [None, 1, 5])
def test_a_chunked_body_is_refused_by_name_or_ends_where_it_ends(step: int | None) -> None:
    source = random.Random(SEED + 2)
    good = b"3;x=y\r\nabc\r\n5\r\n\r\n0\r\n\r\na\r\n" + b"0123456789\r\n1\r\n\n\r\n0\r\nX: y\r\nZ: 1\r\n\r\n"
    done = refused = 0
    for _ in range(15_000):
        data = bytearray(good + b"GET / HTTP/1.1\r\nHost: h\r\n\r\n")
        for _ in range(source.choice((0, 1, 1, 2, 3))):
            at = source.randrange(60)
            if source.random() < 0.4:
                data[at : at + 1] = source.randbytes(1)
            else:
                data[at:at] = source.choice(SPECIAL)
        body, buffer, whole = ChunkedBody(4096), bytearray(), bytes(data)
        try:
            for start in range(0, len(whole), step or len(whole)):
                if body.done:
                    break
                buffer += whole[start : start + (step or len(whole))]
                assert len(body.feed(buffer)) <= len(whole)
        except Refusal as refusal:
            assert refusal.slug == "bad-encoding"
            refused += 1
            continue
        if body.done:
            done += 1
            assert buffer == b"" or whole.find(bytes(buffer)) > 0
        else:
            assert not buffer, "it waits for more and has not taken what there is"
    assert done > 1000
    assert refused > 1000


def test_bodies_cut_at_random_give_the_same_bytes() -> None:
    source = random.Random(SEED + 3)
    for _ in range(1000):
        data = source.randbytes(source.randrange(300)).replace(b"a", b"\n")
        framed = b""
        rest = data
        while rest:
            count = source.randrange(1, len(rest) + 1)
            framed += b"%x\r\n%b\r\n" % (count, rest[:count])
            rest = rest[count:]
        framed += b"0\r\n\r\n"
        body, buffer, out = ChunkedBody(sys.maxsize), bytearray(), b""
        at = 0
        while at < len(framed):
            step = source.randrange(1, 40)
            buffer += framed[at : at + step]
            at += step
            out += body.feed(buffer)
        assert body.done
        assert out == data
        assert not buffer
