"""Limits and ends: sizes, times, counts, and what a client sees when it meets one.

In each case the client that is still sending can read the answer, and afterwards everything is given
back: connections, subscribers, descriptors.
"""

import contextlib
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent import socket

from comet.server.connection import REFUSED_HEAD
from comet.settings import BATCH_ANSWER
from comet.subscriber import TAKING
from handlers import ROUTES
from handlers.params import MAX_PARAMETERS
from handlers.publish import MAX_LINES
from tests.conftest import Start
from tests.harness import AMPLE, TIMEOUT, Client, Response, Server, wait_until

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"


def refused(client: Client, status: int, slug: str) -> Response:
    """The client can read the refusal, and then the connection is at its end."""
    answer = client.read()
    assert (answer.status, answer.json["error"]) == (status, slug), answer
    assert answer.headers["connection"] == "close"
    assert client.at_end(), client.buffer
    return answer


def drip(client: Client, data: bytes, pause: float) -> None:
    """Send `data` byte by byte until the server has had enough."""
    with contextlib.suppress(OSError):
        for index in range(len(data)):
            client.send(data[index : index + 1])
            gevent.sleep(pause)


@contextlib.contextmanager
def dripping(client: Client, data: bytes, pause: float = 0.05) -> Iterator[None]:
    """While in the block, `client` sends slowly."""
    greenlet = gevent.spawn(drip, client, data, pause)
    try:
        yield
    finally:
        greenlet.kill()


def took(start: float) -> float:
    """Seconds since `start`."""
    return time.monotonic() - start


# -- heads


def test_a_header_that_is_too_large_is_told_so(start: Start) -> None:
    server = start("--max-header", "1000")
    for data in (
        b"GET /healthz HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 2000 + b"\r\n\r\n",
        b"GET /" + b"a" * 2000 + b" HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /" + b"a" * 2000,
        b"GET /healthz HTTP/1.1\r\nHost: h\r\n" + b"X: a\r\n" * 5000,
    ):
        with server.client() as client:
            client.send(data)
            refused(client, 431, "header-too-large")
    with server.client() as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 900 + b"\r\n\r\n")
        assert client.read().status == 200


def test_too_many_headers_are_told_so(server: Server) -> None:
    with server.client() as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost: h\r\n" + b"X: a\r\n" * 99 + b"\r\n")
        assert client.read().status == 200
        client.send(b"GET /healthz HTTP/1.1\r\nHost: h\r\n" + b"X: a\r\n" * 100 + b"\r\n")
        refused(client, 431, "header-too-large")


@pytest.mark.parametrize("before", [b"", HEALTH])
def test_a_head_that_drips_is_cut_at_an_absolute_time(start: Start, before: bytes) -> None:
    server = start("--header-timeout", "0.5", "--idle-timeout", "5")
    with server.client() as client:
        if before:
            client.send(before)
            assert client.read().status == 200
        begun = time.monotonic()
        with dripping(client, b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 1000):
            refused(client, 408, "header-timeout")
        assert 0.4 < took(begun) < AMPLE


def test_a_head_that_drips_in_lines_is_cut_as_well(start: Start) -> None:
    server = start("--header-timeout", "0.5")
    with server.client() as client:
        begun = time.monotonic()
        with dripping(client, b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X:a\r\n" * 200):
            refused(client, 408, "header-timeout")
        assert 0.4 < took(begun) < AMPLE


def test_empty_lines_do_not_keep_a_connection(start: Start) -> None:
    server = start("--header-timeout", "0.5", "--idle-timeout", "0.5")
    for before in (b"", HEALTH):
        with server.client() as client:
            if before:
                client.send(before)
                assert client.read().status == 200
            begun = time.monotonic()
            with dripping(client, b"\r\n" * 500):
                client.at_end()
            assert 0.3 < took(begun) < AMPLE, before


def test_a_connection_that_sends_nothing_is_closed_silently(start: Start) -> None:
    server = start("--header-timeout", "0.3")
    with server.client() as client:
        begun = time.monotonic()
        assert client.at_end()
        assert 0.2 < took(begun) < AMPLE
    assert server.stats()["refused"] == {}


def test_an_idle_connection_is_closed_silently_after_the_idle_time_out(start: Start) -> None:
    server = start("--header-timeout", "0.1", "--idle-timeout", "1.5")
    with server.client() as client:
        for _ in range(2):
            assert client.request("GET", "/healthz").status == 200
            gevent.sleep(0.3)  # longer than a head may take, shorter than idleness
        assert client.request("GET", "/healthz").status == 200
        begun = time.monotonic()
        assert client.at_end()
        assert 1.4 < took(begun) < AMPLE
    assert server.stats()["refused"] == {}


# -- bodies


@pytest.mark.parametrize("coding", [b"Content-Length: 500", b"Transfer-Encoding: chunked"])
def test_a_body_that_drips_is_cut_at_an_absolute_time(start: Start, coding: bytes) -> None:
    server = start("--body-timeout", "0.5")
    with server.client() as client:
        begun = time.monotonic()
        client.send(b"POST /publish/slow HTTP/1.1\r\nHost: h\r\n" + coding + b"\r\n\r\n1f0\r\n")
        with dripping(client, b"a" * 1000):
            refused(client, 408, "body-timeout")
        assert 0.4 < took(begun) < AMPLE
    assert server.request("GET", "/channels/slow").status == 404


def test_a_body_that_never_comes_is_cut(start: Start) -> None:
    server = start("--body-timeout", "0.3")
    with server.client() as client:
        client.send(b"POST /publish/slow HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nab")
        refused(client, 408, "body-timeout")


def test_a_body_that_ends_early_is_told_so_to_a_client_that_still_reads(server: Server) -> None:
    for coding in (b"Content-Length: 5", b"Transfer-Encoding: chunked"):
        with server.client() as client:
            client.send(b"POST /publish/short HTTP/1.1\r\nHost: h\r\n" + coding + b"\r\n\r\n3\r\n")
            client.sock.shutdown(socket.SHUT_WR)
            refused(client, 400, "bad-body")
    assert server.request("GET", "/channels/short").status == 404


def test_a_body_that_is_announced_too_large_is_refused_before_it_is_sent(server: Server) -> None:
    for length in (65537, 10**12, 10**17):
        with server.client() as client:
            client.send(b"POST /publish/large HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % length)
            refused(client, 413, "body-too-large")


def test_a_body_that_is_too_large_is_not_asked_for(server: Server) -> None:
    with server.client() as client:
        client.ask("POST", "/publish/large", headers={"Content-Length": "65537", "Expect": "100-continue"})
        client.read_until(b"HTTP/1.1 ")
        assert client.read_exactly(3) == b"413"


def test_a_chunked_body_is_refused_when_it_gets_too_large(start: Start) -> None:
    server = start("--max-body", "1000")
    with server.client() as client:
        client.send(b"POST /publish/large HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + b"64\r\n" + b"a" * 100 + b"\r\n")
        for _ in range(10):
            client.send(b"64\r\n" + b"a" * 100 + b"\r\n")
        refused(client, 413, "body-too-large")
    assert server.request("GET", "/channels/large").status == 404


@pytest.mark.parametrize("coding", ["length", "chunked"])
def test_a_body_of_exactly_the_limit_is_taken(server: Server, coding: str) -> None:
    body = b"a" * 65536
    with server.client() as client:
        if coding == "length":
            client.ask("POST", "/publish/exact", body)
        else:
            client.send(b"POST /publish/exact HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n10000\r\n" + body + b"\r\n0\r\n\r\n")
        assert client.read().status == 201


@pytest.mark.parametrize("size", [1, 30_000, 60_000])
@pytest.mark.parametrize(
    ("head", "status", "slug"),
    [
        (b"POST /publish/drained HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999\r\n\r\n", 413, "body-too-large"),
        (b"POST /nothing HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999\r\n\r\n", 404, "not-found"),
        (b"POST /publish/a HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n", 400, "bad-encoding"),
        (b"POST /publish/a HTTP/1.1\r\n\r\n", 400, "bad-host"),
    ],
)
def test_who_still_sends_can_read_why_it_was_refused(server: Server, head: bytes, status: int, slug: str, size: int) -> None:
    for _ in range(5):
        with server.client() as client:
            client.send(head)
            for start in range(0, size, 10_000):
                client.send(b"x" * min(10_000, size - start))
            refused(client, status, slug)


def test_who_never_stops_sending_is_cut_off_soon(server: Server) -> None:
    before = server.descriptors()
    begun = time.monotonic()
    with server.client() as client:
        client.send(b"POST /nothing HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999\r\n\r\n")
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            while took(begun) < TIMEOUT:
                client.send(b"x" * 65536)
    assert took(begun) < AMPLE
    wait_until(lambda: server.descriptors() <= before)


def test_who_drips_after_its_refusal_is_cut_off_after_a_second(server: Server) -> None:
    before = server.descriptors()
    begun = time.monotonic()
    with server.client() as client:
        client.send(b"X\r\n")
        with dripping(client, b"x" * 1000):
            assert client.read().status == 400
            wait_until(lambda: server.descriptors() <= before)
        assert 0.9 < took(begun) < AMPLE


def test_all_bodies_together_are_bounded_and_small_ones_are_taken_all_the_same(start: Start) -> None:
    room, size = 10 << 20, 1 << 20
    server = start("--max-body", str(size), "--max-batch", str(size), "--max-bodies", str(room))
    before = server.memory()
    head = b"POST /publish/a HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % size
    clients = [server.client() for _ in range(30)]
    for client in clients:
        with contextlib.suppress(OSError):  # it may be refused in the middle
            client.send(head + b"x" * (size - 1))
    wait_until(lambda: server.stats()["refused"].get("bodies-full", 0) >= 20)
    assert server.memory() - before < 2 * room, "of three times as much that was sent"
    assert server.request("POST", "/publish/b", b"x" * 16_000).status == 201

    def another() -> Response | None:
        with server.client() as client:
            client.send(head + b"x" * size)
            answer = client.read()
            return answer if answer.status == 503 else None

    answer = wait_until(another)  # once the others have all that they sent
    assert answer.json["error"] == "bodies-full"
    assert int(answer.headers["retry-after"]) > 0
    for client in clients:
        client.close()
    wait_until(lambda: server.stats()["connections"] == 1)
    for _ in range(30):  # what is answered has given its room back
        assert server.request("POST", "/publish/b", b"x" * size).status == 201


def test_a_batch_takes_room_for_its_answer_until_that_is_taken(start: Start) -> None:
    server = start("--max-bodies", str(17 << 20), "--send-buffer", "4096", "--busy-send-buffer", "0")
    bad = b"\n" * MAX_LINES
    with server.client() as slow:
        slow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.ask("POST", "/publish", bad)
        wait_until(lambda: server.stats()["refused"].get("bad-line", 0) == MAX_LINES)
        with server.client() as second, server.client() as third:
            second.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            second.ask("POST", "/publish", bad)
            wait_until(lambda: server.stats()["refused"].get("bad-line", 0) == 2 * MAX_LINES)
            answer = third.request("POST", "/publish", bad)
            assert (answer.status, answer.json["error"]) == (503, "bodies-full")
    wait_until(lambda: server.stats()["connections"] == 1)
    answer = server.request("POST", "/publish", bad)
    assert answer.status == 200
    assert len(answer.body) < BATCH_ANSWER


# -- counts


def test_connections_of_one_address_are_limited_and_freed(start: Start) -> None:
    server = start("--max-per-address", "3")
    clients = [Client(server.port, source="127.0.0.2") for _ in range(3)]
    for client in clients:
        assert client.request("GET", "/healthz").status == 200
    with Client(server.port, source="127.0.0.2") as fourth:
        fourth.send(HEALTH)
        answer = refused(fourth, 429, "address-full")
        assert int(answer.headers["retry-after"]) > 0
    with Client(server.port, source="127.0.0.2") as curious:
        head = curious.request("HEAD", "/healthz")
        assert head.status == 429 and int(head.headers["content-length"]) > 0
        assert curious.at_end(), "an answer to HEAD has no body"
    with Client(server.port, source="127.0.0.3") as other:
        assert other.request("GET", "/healthz").status == 200
    clients.pop().close()
    wait_until(lambda: server.stats()["connections"] == 3)  # two, and the one that asks, from another address
    with Client(server.port, source="127.0.0.2") as again:
        assert again.request("GET", "/healthz").status == 200
    for client in clients:
        assert client.request("GET", "/healthz").status == 200
        client.close()
    assert server.stats()["refused"] == {"address-full": 2}


@pytest.mark.parametrize("way", ["short", "long"])
@pytest.mark.parametrize("path", ["/poll/{}?timeout=0.01", "/stream/{}"])
def test_new_channels_of_one_address_are_limited_and_those_with_messages_are_not(start: Start, path: str, way: str) -> None:
    server = start("--max-new-channels", "10")
    assert server.request("POST", "/publish/news", b"1").status == 201
    headers = {} if way == "short" else {"Cookie": "a=b"}

    def ask(names: str) -> Any:
        with Client(server.port, source="127.0.0.2") as client:
            client.ask("GET", path.format(names), headers=headers)
            return client.read() if "poll" in path else client.read_head()

    assert ask(",".join(f"a{number}" for number in range(6))).status == 200
    assert ask("b").status == 200
    assert ask("news").status == 200
    assert ask(",".join(f"c{number}" for number in range(3))).status == 200
    with Client(server.port, source="127.0.0.2") as client:
        client.ask("GET", path.format("d"), headers=headers)
        answer = client.read()
        assert (answer.status, answer.json["error"], answer.headers["retry-after"]) == (429, "new-channels", "30")
    with Client(server.port, source="127.0.0.2") as client:
        client.send(EVENT_SOURCE)
        told_to_come_back(client, "new-channels", 30)
    with Client(server.port, source="127.0.0.3") as other:
        assert other.request("GET", "/poll/d?timeout=0.01").status == 200
    with Client(server.port, source="127.0.0.2") as client:  # which makes none
        assert client.request("GET", "/poll/d?timeout=0", headers=headers).status == 200
    assert server.stats()["refused"] == {"new-channels": 2}


def test_a_full_process_says_so_and_the_rest_goes_on(start: Start) -> None:
    server = start("--max-connections", "5")
    clients = [server.client() for _ in range(5)]
    for client in clients:
        assert client.request("GET", "/healthz").status == 200
    begun = time.monotonic()
    silent = [server.client() for _ in range(20)]
    for more in silent:
        answer = refused(more, 503, "worker-full")  # although it has sent nothing
        assert int(answer.headers["retry-after"]) > 0
        more.close()
    assert took(begun) > REFUSED_HEAD - 0.1, "it might still have sent what tells an EventSource"
    for client in clients:
        assert client.request("GET", "/healthz").status == 200
    assert clients[0].request("GET", "/stats").json["refused"] == {"worker-full": 20}
    clients.pop().close()
    wait_until(lambda: clients[0].request("GET", "/stats").json["connections"] == 4)
    with server.client() as again:
        assert again.request("GET", "/healthz").status == 200
    for client in clients:
        client.close()


PAGE = b"Origin: https://a.example\r\n"


def shown(answer: Response) -> bool:
    """Whether a page of the origin that `PAGE` names is shown this answer by its browser."""
    assert answer.headers["vary"] == "Origin"
    if "access-control-allow-origin" not in answer.headers:
        return False
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert "Retry-After" in answer.headers["access-control-expose-headers"]
    return True


def test_a_page_is_shown_what_the_server_refuses_at_its_door(start: Start) -> None:
    server = start("--max-per-address", "2", "--origins", "https://a.example", "--max-header", "2000")
    clients = [Client(server.port, source="127.0.0.2") for _ in range(2)]
    for client in clients:
        assert client.request("GET", "/healthz").status == 200
    get = b"GET /events/a HTTP/1.1\r\nHost: h\r\n"
    for told, data in (
        (True, get + PAGE + b"\r\n"),
        (True, b"POST /publish/a HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n" + PAGE + b"\r\nabc"),
        (True, b"junk\r\n" + PAGE + b"\r\n"),
        (True, get + PAGE + b"X: " + b"a" * 5000),  # more than is read of a head
        (True, get + PAGE),  # the rest does not come
        (False, get + PAGE[:20]),
        (False, get + b"Origin: https://evil.example\r\n\r\n"),
        (False, get + b"\r\n" + PAGE + b"\r\n"),
        (False, b""),
    ):
        begun = time.monotonic()
        with Client(server.port, source="127.0.0.2") as more:
            more.send(data)
            assert shown(refused(more, 429, "address-full")) is told, data
        assert took(begun) < 10
    with Client(server.port, source="127.0.0.2") as more:  # a head may come in pieces
        more.send(get)
        gevent.sleep(0.1)
        more.send(PAGE + b"\r\n")
        assert shown(refused(more, 429, "address-full"))
    for client in clients:
        client.close()


def test_who_says_nothing_at_the_door_is_refused_within_a_second_or_so_and_leaves_nothing(start: Start) -> None:
    server = start("--max-per-address", "1")
    with Client(server.port, source="127.0.0.2") as first:
        assert first.request("GET", "/healthz").status == 200
        before = server.descriptors()
        for way in ("FIN", "RST", "half-close"):
            gone = Client(server.port, source="127.0.0.2")
            gone.go(way)
            if way == "half-close":
                refused(gone, 429, "address-full")
                gone.close()
        with Client(server.port, source="127.0.0.2") as dripped, dripping(dripped, b"GET / HTTP/1.1\r\nX: " + b"a" * 10_000):
            assert dripped.read().status == 429
        wait_until(lambda: server.descriptors() <= before)
        stats = first.request("GET", "/stats").json
        assert (stats["refused"], stats["errors"]) == ({"address-full": 4}, 0)


@pytest.mark.parametrize("before", [b"", HEALTH], ids=["first", "kept-alive"])
def test_a_page_is_shown_what_is_refused_before_any_handler(start: Start, before: bytes) -> None:
    server = start("--origins", "https://a.example", "--max-header", "1000", "--header-timeout", "0.5")
    get = b"GET /healthz HTTP/1.1\r\nHost: h\r\n"
    for status, slug, data in (
        (431, "header-too-large", get + PAGE + b"X: " + b"a" * 2000 + b"\r\n\r\n"),
        (431, "header-too-large", get + PAGE + b"X:\r\n" * 101 + b"\r\n"),
        (400, "bad-request", get + PAGE + b"no colon\r\n\r\n"),
        (400, "bad-host", b"GET /healthz HTTP/1.1\r\n" + PAGE + b"\r\n"),
        (400, "bad-length", get + PAGE + b"Content-Length: x\r\n\r\n"),
        (417, "bad-expectation", get + PAGE + b"Expect: x\r\n\r\n"),
        (501, "method-unknown", b"BREW / HTTP/1.1\r\n" + PAGE + b"\r\n"),
        (408, "header-timeout", get + PAGE),
    ):
        for page in (True, False):
            with server.client() as client:
                if before:  # a page's own request comes first, and tells nothing of the next
                    client.send(before.replace(b"\r\n\r\n", b"\r\n" + PAGE + b"\r\n"))
                    assert shown(client.read())
                client.send(data if page else data.replace(PAGE, b""))
                assert shown(refused(client, status, slug)) is page, (slug, page)


EVENT_SOURCE = b"GET /events/a HTTP/1.1\r\nHost: h\r\nCache-Control: no-cache\r\nAccept: text/event-stream\r\n\r\n"


def told_to_come_back(client: Client, slug: str, least: int, closes: bool = True) -> Response:
    """An EventSource can read the refusal as a stream that ends: no event, and a time between once and twice `least` seconds."""
    answer = client.read()
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), answer
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-request-id"]
    comment, name, retry, *rest = answer.body.decode().split("\n")
    assert comment.startswith(f": {slug}: ")
    assert (name, rest) == ("event: comet", ["", ""])
    assert least * 1000 <= int(retry.removeprefix("retry: ")) <= least * 2000
    assert (answer.headers.get("connection") == "close") == closes
    if closes:
        assert client.at_end(), client.buffer
    return answer


def test_a_full_process_tells_an_event_source_when_to_come_back(start: Start) -> None:
    server = start("--max-connections", "2")
    held = [server.client() for _ in range(2)]
    for client in held:
        assert client.request("GET", "/healthz").status == 200
    cut = [1, 5, len(EVENT_SOURCE) // 2, len(EVENT_SOURCE) - 1, len(EVENT_SOURCE)]
    for size in cut:  # however its head comes
        with server.client() as client:
            client.send(EVENT_SOURCE[:size])
            gevent.sleep(0.02)
            client.send(EVENT_SOURCE[size:])
            told_to_come_back(client, "worker-full", 5)
    others = {
        "it does not ask for events": EVENT_SOURCE.replace(b"text/event-stream", b"*/*"),
        "another path": EVENT_SOURCE.replace(b"/events/", b"/poll/"),
        "lines": EVENT_SOURCE.replace(b"/events/", b"/stream/"),
        "another method": EVENT_SOURCE.replace(b"GET", b"POST"),
        "no host": EVENT_SOURCE.replace(b"Host: h\r\n", b""),
        "half a head": EVENT_SOURCE[:-2],
        "no HTTP": b"\r\nX\r\n\r\n",
        "a large head": EVENT_SOURCE[:-2] + b"X: y\r\n" * 5000 + b"\r\n",
    }
    for what, data in others.items():
        with server.client() as client:
            client.send(data)
            assert refused(client, 503, "worker-full").headers["retry-after"] == "5", what
    assert held[0].request("GET", "/stats").json["refused"] == {"worker-full": len(cut) + len(others)}
    for client in held:
        client.close()


def test_the_log_says_what_was_asked_of_a_full_process(start: Start) -> None:
    server = start("--max-connections", "1", "--log-clients")
    with server.client() as held, server.client() as client:
        assert held.request("GET", "/healthz").status == 200
        client.send(EVENT_SOURCE)
        answer = told_to_come_back(client, "worker-full", 5)
    line = f"refused: worker-full request={answer.headers['x-request-id']} address=127.0.0.1 asked=GET /events/a"
    wait_until(lambda: line in server.log.read_text())


def test_who_drips_its_head_while_it_is_refused_is_not_waited_for(start: Start) -> None:
    server = start("--max-connections", "1")
    with server.client() as held, server.client() as client:
        assert held.request("GET", "/healthz").status == 200
        begun = time.monotonic()
        with dripping(client, b"GET /events/a HTTP/1.1\r\nHost: h\r\n" + b"X:a\r\n" * 1000, pause=0.01):
            refused(client, 503, "worker-full")
        assert REFUSED_HEAD - 0.1 < took(begun) < 3  # and a second that it has for the answer
        assert held.request("GET", "/stats").json["refused"] == {"worker-full": 1}


def test_who_goes_while_it_is_refused_is_counted(start: Start) -> None:
    server = start("--max-connections", "1")
    with server.client() as held:
        assert held.request("GET", "/healthz").status == 200
        for how in ("FIN", "RST"):
            with server.client() as client:
                client.go(how)
        wait_until(lambda: held.request("GET", "/stats").json["refused"] == {"worker-full": 2})


def test_a_full_address_tells_an_event_source_when_to_come_back(start: Start) -> None:
    server = start("--max-per-address", "1")
    with Client(server.port, source="127.0.0.2") as held, Client(server.port, source="127.0.0.2") as client:
        assert held.request("GET", "/healthz").status == 200
        client.send(EVENT_SOURCE)
        told_to_come_back(client, "address-full", 5)


def test_a_full_address_behind_a_proxy_tells_an_event_source_when_to_come_back(start: Start) -> None:
    server = start("--trusted-proxies", "127.0.0.2", "--max-per-address", "1")
    of_one = EVENT_SOURCE[:-2] + b"X-Forwarded-For: 198.51.100.1\r\n\r\n"
    with Client(server.port, source="127.0.0.2") as held, Client(server.port, source="127.0.0.2") as client:
        held.send(of_one)
        assert held.read_head().status == 200
        client.send(of_one)
        told_to_come_back(client, "address-full", 5)
    wait_until(lambda: server.clients() == 0)


@pytest.mark.parametrize("way", ["short", "long", "HTTP/1.0"])
def test_an_event_source_that_meets_no_backplane_is_told_when_to_come_back(start: Start, way: str) -> None:
    server = start(
        "--backplane", "redis://127.0.0.1:1", "--backplane-timeout", "0.3", "--redis-timeout", "0.2", "--redis-connect-timeout", "0.1"
    )
    data = {
        "short": EVENT_SOURCE,
        "long": EVENT_SOURCE[:-2] + b"Origin: https://a.example\r\n\r\n",  # by way of bottle, which keeps the connection
        "HTTP/1.0": EVENT_SOURCE.replace(b"HTTP/1.1", b"HTTP/1.0"),
    }[way]
    for first in (True, False):
        with server.client() as client:
            if not first:  # one that was kept alive
                assert client.request("GET", "/healthz").status == 200
            client.send(data)
            told_to_come_back(client, "backplane-away", 1, closes=way != "long")
        with server.client() as client:
            client.send(data.replace(b"text/event-stream", b"*/*"))
            answer = client.read()
            assert (answer.status, answer.json["error"], answer.headers["retry-after"]) == (503, "backplane-away", "1")
    assert server.stats()["refused"] == {"backplane-away": 4}


def test_a_refusal_that_passes_lacks_its_end_where_that_is_set(start: Start) -> None:
    server = start("--max-connections", "1", "--events-end", "abort")
    with server.client() as held, server.client() as client:
        assert held.request("GET", "/healthz").status == 200
        client.send(EVENT_SOURCE)
        head = client.read_head()
        while client.more():
            pass
        assert (head.status, int(head.headers["content-length"])) == (200, len(client.buffer) + 1)
        assert client.buffer.startswith(b": worker-full: ") and client.buffer.endswith(b"\n\n")
        with server.client() as other:
            refused(other, 503, "worker-full")  # which is no stream, and has its end


@pytest.mark.parametrize("version", [b"HTTP/1.1", b"HTTP/1.0"])
@pytest.mark.parametrize("origin", [b"", b"Origin: https://a.example\r\n"], ids=["short", "long"])
def test_a_refusal_without_a_backplane_lacks_its_end_where_that_is_set(start: Start, origin: bytes, version: bytes) -> None:
    server = start(
        "--backplane", "redis://127.0.0.1:1", "--backplane-timeout", "0.3", "--redis-timeout", "0.2", "--redis-connect-timeout", "0.1",
        "--events-end", "abort",
    )  # fmt: skip
    with server.client() as client:
        client.send(EVENT_SOURCE[:-2].replace(b"HTTP/1.1", version) + origin + b"\r\n")
        assert client.read_head().status == 200
        while client.more():
            pass
        assert b": backplane-away: " in client.buffer
        assert not client.buffer.endswith(b"0\r\n\r\n")


def test_a_final_refusal_stays_what_it_is_to_an_event_source(server: Server) -> None:
    accept = {"Accept": "text/event-stream"}
    for target, status, slug in (
        ("/events/a%20b", 400, "bad-channel"),
        ("/events/a?since=x", 400, "bad-cursor"),
        ("/events", 404, "not-found"),
    ):
        answer = server.request("GET", target, headers=accept)
        assert (answer.status, answer.json["error"]) == (status, slug), target


@pytest.mark.parametrize("data", [b"X\r\n\r\n", b"POST /nothing HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\n"])
def test_connections_that_linger_after_a_refusal_are_bounded_as_well(start: Start, data: bytes) -> None:
    """What `comet.kernel.limits` reserves beside the connections must do for everything else."""
    server = start("--max-connections", "50")
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (50 + 256, 50 + 256))
    most = 0
    lingering = []
    for number in range(600):
        client = server.client()
        with contextlib.suppress(OSError):  # it may be refused and closed before it has sent
            client.send(data)
        lingering.append(client)
        if number % 20 == 0:
            most = max(most, server.descriptors())
    for client in lingering:
        client.close()

    def serves() -> bool:
        with contextlib.suppress(AssertionError, OSError):  # closed without a word, while as many as may be are being told
            return server.request("GET", "/healthz").status == 200
        return False

    wait_until(serves)
    assert "Too many open files" not in server.log.read_text()
    assert most < 50 + 256


# -- one connection does not stop the others


def flood(port: int, opening: bytes, data: bytes, read: bool) -> subprocess.Popen[bytes]:
    """Another process that sends `opening`, reads its answer if there is one, and then `data` again and
    again as fast as it can, reading and dropping all answers."""
    script = f"""
import socket, threading
s = socket.create_connection(("127.0.0.1", {port}))
if {opening!r}:
    s.sendall({opening!r})
    if {read}:
        s.recv(65536)
def drop():
    try:
        while s.recv(1 << 20):
            pass
    except OSError:
        pass
threading.Thread(target=drop, daemon=True).start()
data = {data!r} * (200000 // {len(data)} + 1)
print("sending", flush=True)
try:
    while True:
        s.sendall(data)
except OSError:
    pass
"""
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    ("opening", "data", "read"),
    [
        pytest.param(b"", HEALTH, False, id="pipelined requests"),
        pytest.param(HEALTH, b"\r\n", True, id="empty lines"),
        pytest.param(b"", b"\r\n", False, id="empty lines first"),
        pytest.param(
            b"POST /publish HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n700000\r\n", b"\n", False, id="a body of newlines"
        ),
        pytest.param(b"POST /publish HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n", False, id="tiny chunks"),
    ],
)
def test_a_flood_on_one_connection_does_not_starve_the_others(start: Start, opening: bytes, data: bytes, read: bool) -> None:
    server = start()
    process = flood(server.port, opening, data, read)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"sending\n"
        costs: list[float] = []
        while len(costs) < 20:
            begun = server.cpu_seconds()
            assert server.request("GET", "/healthz").status == 200
            costs.append(server.cpu_seconds() - begun)
        # what the server does for the flood before it answers another; a busy machine may delay the one or the other answer
        assert sorted(costs)[len(costs) // 2] < 0.25, costs
    finally:
        process.kill()
        process.communicate()


def test_a_batch_of_very_many_lines_costs_bounded_memory(start: Start) -> None:
    """8 MiB in must not become a gigabyte out."""
    server = start()
    before = server.stats()["peak_memory_bytes"]
    with server.client() as client:
        client.ask("POST", "/publish", b"\n" * (2 << 20))
        answer = client.read_head()
        assert answer.status in (200, 400, 413), answer
        length = int(answer.headers["content-length"])
    assert length < 16 << 20, length
    assert server.stats()["peak_memory_bytes"] - before < 100 << 20


@pytest.mark.parametrize(
    ("head", "data"),
    [
        (b"POST /publish", b"\n" * (8 << 20)),
        (b"POST /publish", b'{"channel":"a","data":"%b"}\n' % (b"\\u00e9" * 10_900) * 120),
        (b"POST /follows", b"\n" * (1 << 20)),
        (b"POST /follows", b"a b\n" * (1 << 18)),
    ],
    ids=["empty lines", "long lines", "bad follows", "follows"],
)
def test_a_body_of_very_many_or_very_long_lines_does_not_hold_up_the_others(start: Start, head: bytes, data: bytes) -> None:
    server = start()
    slowest = 0.0
    with server.client() as sender, server.client() as other:
        sending = gevent.spawn(sender.send, b"%b HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (head, len(data), data))
        answer = gevent.spawn(sender.read)
        while not answer.ready():
            begun = server.cpu_seconds()
            assert other.request("GET", "/healthz").status == 200
            slowest = max(slowest, server.cpu_seconds() - begun)  # a busy machine may delay it
        assert answer.get().status in (200, 413)
        sending.get()
    assert slowest < 0.1, "all of it at once takes longer"


@pytest.mark.parametrize("path", [b"/poll/a", b"/channels/a/history", b"/users/a/followers", b"/events/a"])
def test_very_many_query_parameters_are_refused(server: Server, path: bytes) -> None:
    with server.client() as client:
        for number, status in ((MAX_PARAMETERS, 200), (MAX_PARAMETERS + 1, 400), (4000, 400)):
            if status == 400 or b"poll" in path:
                client.send(b"GET %b?timeout=0%b HTTP/1.1\r\nHost: h\r\n\r\n" % (path, b"&a" * (number - 1)))
                answer = client.read()
                assert answer.status == status, answer
                assert status == 200 or answer.json["error"] == "bad-parameter"


# -- keep-alive, pipelining, one write


def test_many_pipelined_requests_are_answered_in_order(server: Server) -> None:
    with server.client() as client:
        count = 500
        gevent.spawn(
            client.send, b"".join(b"POST /publish/pipe%d HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\n\r\nx" % n for n in range(count))
        )
        epochs = [client.read().json["id"] for _ in range(count)]
        kept = [client.request("GET", f"/channels/pipe{n}").json["position"] for n in range(0, count, 50)]
    assert kept == epochs[::50]


def test_a_connection_serves_many_requests(server: Server) -> None:
    with server.client() as client:
        for _ in range(300):
            answer = client.request("GET", "/healthz")
            assert answer.status == 200
            assert "connection" not in answer.headers
    wait_until(lambda: server.stats()["connections"] == 1)


def test_a_client_that_pipelines_and_never_reads_is_closed(start: Start) -> None:
    server = start("--send-timeout", "0.5")
    with server.client() as client:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"reset|[Bb]roken pipe"):
            while took(begun) < TIMEOUT:
                client.send(HEALTH * 1000)
    wait_until(lambda: server.stats()["connections"] == 1)


def test_http_1_0_gets_an_unchunked_body_ended_by_close(server: Server) -> None:
    for connection in (b"", b"Connection: keep-alive\r\n"):
        with server.client() as client:
            client.send(b"GET /stream/ten HTTP/1.0\r\n" + connection + b"\r\n")
            head = client.read_head()
            assert head.status == 200
            assert "transfer-encoding" not in head.headers
            assert "content-length" not in head.headers
            assert head.headers["connection"] == "close"
            assert client.read_exactly(1) == b"\n"
            server.publish("ten", "hello")
            assert b'"data":"hello"' in client.read_until(b"}\n")
            assert server.request("DELETE", "/channels/ten").status == 200
            assert client.at_end()


def test_http_1_0_may_keep_its_connection_where_the_length_is_known(server: Server) -> None:
    with server.client() as client:
        for _ in range(3):
            client.send(b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            answer = client.read()
            assert answer.status == 200
            assert answer.headers["connection"].lower() == "keep-alive"
        client.send(b"GET /healthz HTTP/1.0\r\n\r\n")
        answer = client.read()
        assert answer.headers["connection"] == "close"
        assert client.at_end()


def test_head_and_body_leave_in_one_write(server: Server) -> None:
    for request, ends in (
        (HEALTH, b'{"status":"alive","worker":0}\n'),
        (b"GET /poll/single?timeout=0 HTTP/1.1\r\nHost: h\r\n\r\n", b'"messages":[]}'),
        (b"GET /stream/single HTTP/1.1\r\nHost: h\r\n\r\n", b"\r\n\r\n1\r\n\n\r\n"),
        (b"GET /nothing HTTP/1.1\r\nHost: h\r\n\r\n", b"}\n"),
        (b"nonsense\r\n\r\n", b"}\n"),
    ):
        for _ in range(50):
            with server.client() as client:
                client.send(request)
                assert client.sock.recv(65536).endswith(ends), request


def test_an_answer_on_a_kept_connection_is_not_delayed(server: Server) -> None:
    """Nagle's algorithm against delayed acknowledgements would cost 40 ms each, but for the first ones."""
    with server.client() as client:
        times: list[float] = []
        for _ in range(50):
            begun = time.monotonic()
            assert client.request("POST", "/publish/nodelay", b"x" * 5000).status == 201
            times.append(took(begun))
        assert sorted(times[25:])[4] < 0.04, times


# -- Expect, Upgrade, HEAD, OPTIONS, Allow


def test_expect_100_continue_is_honoured(server: Server) -> None:
    with server.client() as client:
        for _ in range(2):
            client.ask("POST", "/publish/expect", headers={"Content-Length": "5", "Expect": "100-continue"})
            assert client.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.send(b"hello")
            assert client.read().status == 201
        client.send(b"POST /publish/expect HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nhi")
        assert client.read_until(b" ") == b"HTTP/1.1 "
        assert client.read_exactly(3) == b"201"  # the body was there: nothing to ask for


def test_a_body_is_not_asked_for_by_who_does_not_want_it(server: Server) -> None:
    for target in ("/nothing", "/publish/bad!name"):
        with server.client() as client:
            client.ask("POST", target, headers={"Content-Length": "5", "Expect": "100-continue"})
            assert client.read_until(b"\r\n") in (b"HTTP/1.1 404 Not Found\r\n", b"HTTP/1.1 400 Bad Request\r\n")


def test_curl_that_offers_http_2_is_answered_in_http_1(server: Server) -> None:
    run = subprocess.run(
        ["curl", "-sS", "-m", "10", "--http2", "-w", "%{http_code} %{http_version}", "-o", "-", f"http://{server.url}/healthz"],
        capture_output=True,
        check=True,
    )
    assert run.stdout == b'{"status":"alive","worker":0}\n200 1.1'


@pytest.mark.parametrize(
    "rest",
    [b"Expect: x\r\n\r\n", b"Content-Length: x\r\n\r\n", b"X: y\r\n" * 101 + b"\r\n", b"X: " + b"y" * 20_000],
    ids=["expectation", "length", "many headers", "long header"],
)
def test_a_refusal_of_head_has_no_body_however_soon_it_is_refused(server: Server, rest: bytes) -> None:
    answers = {}
    for method, before in (("HEAD", "GET"), ("GET", "HEAD")):
        with server.client() as client:
            assert client.request(before, "/healthz").status == 200
            client.send(b"\r\n" + method.encode() + b" /healthz HTTP/1.1\r\nHost: h\r\n" + rest)
            head = client.read_head()
            body = b"" if method == "HEAD" else client.read_body()
            assert client.at_end(), (method, client.buffer)
            answers[method] = head.status, head.headers["content-length"], body
    status, length, body = answers["GET"]
    assert answers["HEAD"] == (status, length, b"")
    assert status >= 400 and len(body) == int(length) > 0


def test_head_has_the_headers_of_get_and_no_body(server: Server) -> None:
    server.publish("head", "x")
    for target in ("/", "/healthz", "/readyz", "/channels/head", "/channels/head/history", "/nothing"):
        with server.client() as client:
            got = client.request("GET", target)
            head = client.request("HEAD", target)
            assert head.status == got.status
            for name in ("content-type", "content-length", "cache-control"):
                assert head.headers.get(name) == got.headers.get(name), target
            assert client.request("GET", "/healthz").status == 200  # no stray byte in between
            assert not client.buffer


ALLOWED: dict[str, set[str]] = {
    "/": {"GET", "HEAD", "OPTIONS"},
    "/test/x": {"GET", "HEAD", "OPTIONS"},
    "/poll/x": {"GET", "HEAD", "OPTIONS"},
    "/events/x": {"GET", "HEAD", "OPTIONS"},
    "/stream/x": {"GET", "HEAD", "OPTIONS"},
    "/send/x": {"POST", "OPTIONS"},
    "/publish/x": {"POST", "OPTIONS"},
    "/publish": {"POST", "OPTIONS"},
    "/channels/x": {"GET", "HEAD", "DELETE", "OPTIONS"},
    "/channels/x/history": {"GET", "HEAD", "OPTIONS"},
    "/healthz": {"GET", "HEAD", "OPTIONS"},
    "/readyz": {"GET", "HEAD", "OPTIONS"},
    "/stats": {"GET", "HEAD", "OPTIONS"},
}


def test_the_table_of_methods_below_knows_every_path() -> None:
    table = {path.replace("/x", "/<>") for path in ALLOWED}
    for route in ROUTES:
        plain = "/".join("<>" if part.startswith("<") else part for part in route.path.split("/"))
        if not plain.startswith(("/users", "/follows")):  # these have tests of their own
            assert plain in table, f"add {route.path} to ALLOWED"


@pytest.mark.parametrize("path", ALLOWED)
def test_other_methods_are_refused_with_the_exact_allow(server: Server, path: str) -> None:
    allowed = ALLOWED[path]
    with server.client() as client:
        options = client.request("OPTIONS", path)
        assert options.status == 204
        assert {name.strip() for name in options.headers["allow"].split(",")} == allowed
        for method in sorted({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE"} - allowed):
            answer = client.request(method, path)
            assert answer.status == 405, method
            assert {name.strip() for name in answer.headers["allow"].split(",")} == allowed
            assert method == "HEAD" or answer.json["error"] == "method-not-allowed"


def test_an_unknown_path_is_not_found(server: Server) -> None:
    with server.client() as client:
        for path in ("/nothing", "/publish/a/b", "/poll", "/poll/", "/events/", "/healthz/", "/HEALTHZ", "/publish%2Fa%2Fb", "/%00", "/.."):
            answer = client.request("GET", path)
            assert (answer.status, answer.json["error"]) == (404, "not-found"), path
            assert answer.headers["content-type"] == "application/json"


def test_options_for_the_whole_server_is_answered(server: Server) -> None:
    answer = server.request("OPTIONS", "*")
    assert answer.status < 500


# -- clients that stop reading, hang up, or half-close


def stuck(server: Server, path: str, receive_buffer: int = 4096) -> Client:
    """A subscriber that reads the head and no more, with a small buffer."""
    client = Client.__new__(Client)
    client.sock = socket.socket()
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.sock.settimeout(TIMEOUT)
    client.sock.connect(("127.0.0.1", server.port))
    client.buffer = b""
    client.ask("GET", path)
    assert client.read_head().status == 200
    return client


def closed(server: Server) -> dict[str, Any]:
    """Why subscribers were closed."""
    reasons: dict[str, Any] = server.stats()["closed"]
    return reasons


@pytest.mark.parametrize("path", ["/stream/stuck", "/events/stuck"])
def test_a_client_that_takes_nothing_for_long_is_closed(start: Start, path: str) -> None:
    server = start("--send-timeout", "0.5", "--backlog", str(1 << 28))
    with stuck(server, path), server.client() as publisher:
        for _ in range(200):  # more than the kernel's buffers take
            assert publisher.request("POST", "/publish/stuck", b"x" * 65000).status == 201
        wait_until(lambda: server.clients() == 0)
        assert closed(server) == {"backlog-time": 1}
        wait_until(lambda: server.stats()["connections"] == 2)  # the publisher, and the one that asks


@pytest.mark.parametrize("path", ["/stream/stuck", "/events/stuck"])
def test_a_client_whose_backlog_is_full_is_closed(start: Start, path: str) -> None:
    server = start("--send-timeout", str(2 * TAKING), "--backlog", "300000")
    with stuck(server, path), server.client() as publisher:
        for _ in range(30):  # 2 MB, which one that keeps taking may have waiting
            assert publisher.request("POST", "/publish/stuck", b"x" * 65000).status == 201
        wait_until(lambda: publisher.request("POST", "/publish/stuck", b"x").status == 201 and server.clients() == 0)
        assert closed(server) == {"backlog-bytes": 1}
        wait_until(lambda: server.stats()["connections"] == 2)


@pytest.mark.parametrize("path", ["/stream/stuck", "/events/stuck"])
def test_more_than_a_client_that_takes_may_have_waiting_closes_it_at_once(start: Start, path: str) -> None:
    server = start("--send-timeout", "4", "--backlog", "300000", "--busy-backlog", "1000000")
    with stuck(server, path), server.client() as publisher:
        for _ in range(200):
            assert publisher.request("POST", "/publish/stuck", b"x" * 65000).status == 201
        wait_until(lambda: server.clients() == 0)
        assert closed(server) == {"backlog-bytes": 1}


def test_a_client_that_reads_slowly_but_steadily_is_not_closed(start: Start) -> None:
    """The send time-out is for who takes nothing, not for who takes long."""
    server = start("--send-timeout", "2.5", "--max-body", "16000000", "--backlog", "100000000")
    size = 15_000_000
    with stuck(server, "/stream/steady", 200_000) as client:
        server.publish("steady", b"x" * size)
        got = 0
        begun = time.monotonic()
        while got < size:
            data = client.sock.recv(200_000)
            assert data, f"closed after {got} bytes and {took(begun):.1f} s: {closed(server)}"
            got += len(data)
            gevent.sleep(max(0.0, got / size * 3.0 - took(begun)))
        assert took(begun) > 2.6, "too quick to tell"


@pytest.mark.parametrize("how", ["FIN", "RST", "half-close"])
@pytest.mark.parametrize("path", ["/poll/gone", "/stream/gone", "/events/gone", "/test/gone"])
def test_a_waiting_client_that_goes_is_noticed_at_once(server: Server, path: str, how: str) -> None:
    wait_until(lambda: server.stats()["connections"] == 1)
    before = server.descriptors()
    counted = closed(server).get("hang-up", 0)
    clients = [server.client() for _ in range(50)]
    for client in clients:
        client.ask("GET", path)
    wait_until(lambda: server.clients() == 50)
    begun = time.monotonic()
    for client in clients:
        client.go(how)
    wait_until(lambda: server.clients() == 0)
    assert took(begun) < AMPLE
    wait_until(lambda: server.stats()["connections"] == 1)
    wait_until(lambda: server.descriptors() <= before)
    assert closed(server)["hang-up"] == counted + 50
    for client in clients:
        client.close()


def test_a_client_that_sent_more_and_went_is_noticed_too(server: Server) -> None:
    client = server.client()
    client.ask("GET", "/poll/more")
    wait_until(lambda: server.clients() == 1)
    client.send(b"x" * 100_000)
    client.close()
    wait_until(lambda: server.clients() == 0)


def test_half_close_after_a_request_still_gets_the_answer(server: Server) -> None:
    with server.client() as client:
        client.send(HEALTH * 3 + b"POST /publish/half HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi")
        client.sock.shutdown(socket.SHUT_WR)
        assert [client.read().status for _ in range(4)] == [200, 200, 200, 201]
        assert client.at_end()


def test_half_close_in_a_head_closes_silently(server: Server) -> None:
    with server.client() as client:
        client.send(b"GET /healthz HTTP/1.1\r\nHost:")
        client.sock.shutdown(socket.SHUT_WR)
        assert client.at_end()


def test_connections_that_go_in_the_middle_of_anything_leave_nothing(start: Start) -> None:
    server = start()
    wait_until(lambda: server.stats()["connections"] == 1)
    before = server.descriptors()
    whole = b"POST /publish/mid HTTP/1.1\r\nHost: h\r\nContent-Length: 10\r\n\r\n0123456789GET /events/mid HTTP/1.1\r\nHost: h\r\n\r\n"
    for length in range(len(whole) + 1):
        for reset in (False, True):
            client = server.client()
            client.send(whole[:length])
            if reset:
                client.reset()
            else:
                client.close()
    wait_until(lambda: server.stats()["connections"] == 1)
    wait_until(lambda: server.descriptors() <= before)
    assert server.clients() == 0
    server.assert_healthy()
