"""Request smuggling: a request that two parties could read differently is refused, its sender can read
why, its connection ends, and the bytes behind it are never run as a request of their own.

What stands behind each is a complete ``POST /publish/<marker>``: had it been run, the marker's channel
would exist.
"""

import itertools

import pytest

from tests.conftest import Start
from tests.harness import Client, Server, wait_until

_numbers = itertools.count()

GET = b"GET /healthz HTTP/1.1\r\n"
HOST = b"Host: h\r\n"


def new_marker() -> str:
    """A channel nobody has used."""
    return f"marker-{next(_numbers)}"


def publishing(channel: str) -> bytes:
    """A complete request that publishes to `channel`."""
    return f"POST /publish/{channel} HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nevil".encode()


def exists(server: Server, channel: str) -> bool:
    """Whether `channel` was ever published to."""
    answer = server.request("GET", f"/channels/{channel}")
    assert answer.status == 200 or (answer.status, answer.json["error"]) == (404, "no-channel")
    return answer.status == 200


def post(*headers: bytes, body: bytes = b"", version: bytes = b"HTTP/1.1") -> bytes:
    """A publication to the channel ``victim``, with these headers."""
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"POST /publish/victim " + version + b"\r\n" + HOST + lines + b"\r\n" + body


def get(*headers: bytes) -> bytes:
    """A GET with these headers beside Host."""
    return GET + HOST + b"".join(header + b"\r\n" for header in headers) + b"\r\n"


def chunked(body: bytes) -> bytes:
    """A chunked publication to ``victim`` with this raw body."""
    return post(b"Transfer-Encoding: chunked", body=body)


CHUNK = b"3\r\nabc\r\n0\r\n\r\n"

FORMS: dict[str, tuple[int, str, bytes]] = {
    # Transfer-Encoding
    "te-gzip-chunked": (400, "bad-encoding", post(b"Transfer-Encoding: gzip, chunked", body=CHUNK)),
    "te-chunked-gzip": (400, "bad-encoding", post(b"Transfer-Encoding: chunked, gzip", body=CHUNK)),
    "te-chunked-chunked": (400, "bad-encoding", post(b"Transfer-Encoding: chunked, chunked", body=CHUNK)),
    "te-doubled": (400, "bad-encoding", post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=CHUNK)),
    "te-doubled-identity": (400, "bad-encoding", post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", body=CHUNK)),
    "te-doubled-x": (400, "bad-encoding", post(b"Transfer-Encoding: x", b"Transfer-Encoding: chunked", body=CHUNK)),
    "te-xchunked": (400, "bad-encoding", post(b"Transfer-Encoding: xchunked", body=CHUNK)),
    "te-chunkedx": (400, "bad-encoding", post(b"Transfer-Encoding: chunkedx", body=CHUNK)),
    "te-identity": (400, "bad-encoding", post(b"Transfer-Encoding: identity", body=CHUNK)),
    "te-empty": (400, "bad-encoding", post(b"Transfer-Encoding:", body=CHUNK)),
    "te-comma-before": (400, "bad-encoding", post(b"Transfer-Encoding: ,chunked", body=CHUNK)),
    "te-comma-after": (400, "bad-encoding", post(b"Transfer-Encoding: chunked,", body=CHUNK)),
    "te-quoted": (400, "bad-encoding", post(b'Transfer-Encoding: "chunked"', body=CHUNK)),
    "te-parameter": (400, "bad-encoding", post(b"Transfer-Encoding: chunked;q=1", body=CHUNK)),
    "te-space-before-colon": (400, "bad-request", post(b"Transfer-Encoding : chunked", body=CHUNK)),
    "te-tab-before-colon": (400, "bad-request", post(b"Transfer-Encoding\t: chunked", body=CHUNK)),
    "te-space-in-front": (400, "bad-request", post(b" Transfer-Encoding: chunked", body=CHUNK)),
    "te-vertical-tab": (400, "bad-request", post(b"Transfer-Encoding: \x0bchunked", body=CHUNK)),
    "te-form-feed-after": (400, "bad-request", post(b"Transfer-Encoding: chunked\x0c", body=CHUNK)),
    "te-high-byte": (400, "bad-encoding", post(b"Transfer-Encoding: chunked\xa0", body=CHUNK)),
    "te-folded": (400, "bad-request", post(b"Transfer-Encoding:\r\n chunked", body=CHUNK)),
    "te-name-folded": (400, "bad-request", post(b"X: 1\r\n Transfer-Encoding: chunked", body=CHUNK)),
    "te-behind-bare-lf": (400, "bad-request", post(b"X: 1\nTransfer-Encoding: chunked", body=CHUNK)),
    "te-behind-bare-cr": (400, "bad-request", post(b"X: 1\rTransfer-Encoding: chunked", body=CHUNK)),
    "te-on-1.0": (400, "bad-encoding", post(b"Transfer-Encoding: chunked", version=b"HTTP/1.0", body=CHUNK)),
    "te-on-1.0-kept-alive": (
        400,
        "bad-encoding",
        post(b"Transfer-Encoding: chunked", b"Connection: keep-alive", version=b"HTTP/1.0", body=CHUNK),
    ),
    "te-then-cl": (400, "bad-length", post(b"Transfer-Encoding: chunked", b"Content-Length: 13", body=CHUNK)),
    "cl-then-te": (400, "bad-length", post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n")),
    "cl-0-then-te": (400, "bad-length", post(b"Content-Length: 0", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n")),
    "te-on-get": (400, "bad-encoding", get(b"Transfer-Encoding: gzip")),
    # Content-Length
    "cl-doubled": (400, "bad-length", post(b"Content-Length: 3", b"Content-Length: 3", body=b"abc")),
    "cl-doubled-other": (400, "bad-length", post(b"Content-Length: 3", b"Content-Length: 0", body=b"abc")),
    "cl-list": (400, "bad-length", post(b"Content-Length: 3, 3", body=b"abc")),
    "cl-space-before-colon": (400, "bad-request", post(b"Content-Length : 3", body=b"abc")),
    "cl-space-in-front": (400, "bad-request", post(b" Content-Length: 3", body=b"abc")),
    "cl-underscore-in-number": (400, "bad-length", post(b"Content-Length: 1_0", body=b"0123456789")),
    "cl-plus": (400, "bad-length", post(b"Content-Length: +3", body=b"abc")),
    "cl-minus": (400, "bad-length", post(b"Content-Length: -1", body=b"abc")),
    "cl-minus-zero": (400, "bad-length", post(b"Content-Length: -0")),
    "cl-empty": (400, "bad-length", post(b"Content-Length:", body=b"abc")),
    "cl-hexadecimal": (400, "bad-length", post(b"Content-Length: 0x3", body=b"abc")),
    "cl-space-inside": (400, "bad-length", post(b"Content-Length: 3 0", body=b"abc")),
    "cl-decimal-point": (400, "bad-length", post(b"Content-Length: 3.0", body=b"abc")),
    "cl-other-digits": (400, "bad-length", post("Content-Length: \u0663".encode(), body=b"abc")),
    "cl-overflow": (400, "bad-length", post(b"Content-Length: 18446744073709551619", body=b"abc")),
    "cl-nul": (400, "bad-request", post(b"Content-Length: 3\0", body=b"abc")),
    "cl-folded": (400, "bad-request", post(b"Content-Length:\r\n 3", body=b"abc")),
    # chunks
    "chunk-hexadecimal": (400, "bad-encoding", chunked(b"0x3\r\nabc\r\n0\r\n\r\n")),
    "chunk-plus": (400, "bad-encoding", chunked(b"+3\r\nabc\r\n0\r\n\r\n")),
    "chunk-space-after": (400, "bad-encoding", chunked(b"3 \r\nabc\r\n0\r\n\r\n")),
    "chunk-space-before": (400, "bad-encoding", chunked(b" 3\r\nabc\r\n0\r\n\r\n")),
    "chunk-negative": (400, "bad-encoding", chunked(b"-3\r\nabc\r\n0\r\n\r\n")),
    "chunk-underscore": (400, "bad-encoding", chunked(b"0_3\r\nabc\r\n0\r\n\r\n")),
    "chunk-overflow": (400, "bad-encoding", chunked(b"10000000000000003\r\nabc\r\n0\r\n\r\n")),
    "chunk-no-size": (400, "bad-encoding", chunked(b"\r\nabc\r\n0\r\n\r\n")),
    "chunk-size-lf": (400, "bad-encoding", chunked(b"3\nabc\r\n0\r\n\r\n")),
    "chunk-data-lf": (400, "bad-encoding", chunked(b"3\r\nabc\n0\r\n\r\n")),
    "chunk-data-cr": (400, "bad-encoding", chunked(b"3\r\nabc\r0\r\n\r\n")),
    "chunk-data-no-end": (400, "bad-encoding", chunked(b"3\r\nabc0\r\n\r\n")),
    "chunk-data-too-long": (400, "bad-encoding", chunked(b"3\r\nabcd\r\n0\r\n\r\n")),
    "chunk-extension-lf": (400, "bad-encoding", chunked(b"3;a\nabc\r\n0\r\n\r\n")),
    "chunk-extension-cr": (400, "bad-encoding", chunked(b"3;a\rb\r\nabc\r\n0\r\n\r\n")),
    "chunk-extension-nul": (400, "bad-encoding", chunked(b"3;\0\r\nabc\r\n0\r\n\r\n")),
    "chunk-last-lf": (400, "bad-encoding", chunked(b"3\r\nabc\r\n0\n\n")),
    "chunk-end-lf": (400, "bad-encoding", chunked(b"3\r\nabc\r\n0\r\n\n")),
    "trailer-lf": (400, "bad-encoding", chunked(b"0\r\nX: 1\n\r\n")),
    "trailer-folded": (400, "bad-encoding", chunked(b"0\r\nX: 1\r\n 2\r\n\r\n")),
    "trailer-cl": (400, "bad-encoding", chunked(b"0\r\nContent-Length: 70\r\n\r\n")),
    "trailer-te": (400, "bad-encoding", chunked(b"0\r\nTransfer-Encoding: chunked\r\n\r\n")),
    "trailer-no-colon": (400, "bad-encoding", chunked(b"0\r\nGET / HTTP/1.1\r\n\r\n")),
    # line ends
    "lf-everywhere": (400, "bad-request", GET[:-2] + b"\nHost: h\n\n"),
    "lf-after-request-line": (400, "bad-request", GET[:-2] + b"\nHost: h\r\n\r\n"),
    "lf-at-the-end": (400, "bad-request", GET + b"Host: h\n\r\n"),
    "lf-lf-then-crlf": (400, "bad-request", GET + b"Host: h\r\n\n"),
    "lf-before": (400, "bad-request", b"\n" + get()),
    "cr-in-value": (400, "bad-request", get(b"X: a\rb")),
    "cr-cr-lf": (400, "bad-request", get(b"X: a\r")),
    "cr-alone-as-end": (400, "bad-request", GET + b"Host: h\r\rX: 1\r\n\r\n"),
    "cr-before": (400, "bad-request", b"\r\r\n" + get()),
    "folded": (400, "bad-request", get(b"X: a\r\n b")),
    "folded-by-tab": (400, "bad-request", get(b"X: a\r\n\tb")),
    "folded-first": (400, "bad-request", GET + b" " + HOST + HOST + b"\r\n"),
    # header names and values
    "no-colon": (400, "bad-request", get(b"X")),
    "no-name": (400, "bad-request", get(b": v")),
    "space-after-name": (400, "bad-request", get(b"X : v")),
    "space-in-name": (400, "bad-request", get(b"X Y: v")),
    "high-byte-in-name": (400, "bad-request", get(b"X\xff: v")),
    "nul-in-name": (400, "bad-request", get(b"X\0: v")),
    "nul-in-value": (400, "bad-request", get(b"X: a\0b")),
    "control-in-value": (400, "bad-request", get(b"X: a\x01b")),
    "delete-in-value": (400, "bad-request", get(b"X: a\x7fb")),
    "authorization-doubled": (400, "bad-request", get(b"Authorization: a", b"Authorization: b")),
    "type-doubled": (400, "bad-request", get(b"Content-Type: a", b"content-type: a")),
    # the request line
    "http-0.9": (400, "bad-request", b"GET /healthz\r\n"),
    "http-0.9-named": (505, "http-version", b"GET /healthz HTTP/0.9\r\n" + HOST + b"\r\n"),
    "http-1.2": (505, "http-version", b"GET /healthz HTTP/1.2\r\n" + HOST + b"\r\n"),
    "http-2.0": (505, "http-version", b"GET /healthz HTTP/2.0\r\n" + HOST + b"\r\n"),
    "http-2-preface": (505, "http-version", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "http-1.10": (400, "bad-request", b"GET /healthz HTTP/1.10\r\n" + HOST + b"\r\n"),
    "http-lower-case": (400, "bad-request", b"GET /healthz http/1.1\r\n" + HOST + b"\r\n"),
    "two-spaces": (400, "bad-request", b"GET  /healthz HTTP/1.1\r\n" + HOST + b"\r\n"),
    "tab-for-space": (400, "bad-request", b"GET\t/healthz\tHTTP/1.1\r\n" + HOST + b"\r\n"),
    "space-after-version": (400, "bad-request", b"GET /healthz HTTP/1.1 \r\n" + HOST + b"\r\n"),
    "space-before-method": (400, "bad-request", b" GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n"),
    "space-in-target": (400, "bad-request", b"GET /healthz HTTP/1.1 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "high-byte-in-target": (400, "bad-request", b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n"),
    "control-in-target": (400, "bad-request", b"GET /\x1b HTTP/1.1\r\n" + HOST + b"\r\n"),
    "not-utf-8": (400, "bad-path", b"GET /%80 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "method-lower-case": (501, "method-unknown", b"get /healthz HTTP/1.1\r\n" + HOST + b"\r\n"),
    "method-connect": (501, "method-unknown", b"CONNECT h:80 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "method-unheard-of": (501, "method-unknown", b"BREW /healthz HTTP/1.1\r\n" + HOST + b"\r\n"),
    # the host
    "no-host": (400, "bad-host", GET + b"\r\n"),
    "two-hosts": (400, "bad-host", get(b"Host: h")),
    "two-hosts-other": (400, "bad-host", get(b"HOST: other")),
    "host-with-space": (400, "bad-host", GET + b"Host: a b\r\n\r\n"),
    "host-with-path": (400, "bad-host", GET + b"Host: a/b\r\n\r\n"),
    "host-with-user": (400, "bad-host", GET + b"Host: a@b\r\n\r\n"),
    "host-not-ascii": (400, "bad-request", GET + b"Host: \xe9\r\n\r\n"),
    "host-of-absolute-target": (400, "bad-host", b"GET http://a@b/healthz HTTP/1.1\r\n" + HOST + b"\r\n"),
    # the rest
    "expectation": (417, "bad-expectation", post(b"Expect: 200-ok", b"Content-Length: 3", body=b"abc")),
    "expectation-doubled": (
        400,
        "bad-request",
        post(b"Expect: 100-continue", b"Expect: 100-continue", b"Content-Length: 3", body=b"abc"),
    ),
}
"""Name -> status, slug, the request."""


def refused(client: Client, status: int, slug: str) -> None:
    """The client can read the refusal, and then the connection is at its end."""
    answer = client.read()
    assert (answer.status, answer.json["error"]) == (status, slug), answer
    assert answer.json["detail"]
    assert answer.headers["connection"] == "close"
    assert client.at_end(), client.buffer


@pytest.mark.parametrize("name", FORMS)
def test_a_smuggling_form_is_refused_and_what_follows_it_is_not_run(server: Server, name: str) -> None:
    status, slug, data = FORMS[name]
    marker = new_marker()
    with server.client() as client:
        client.send(data + publishing(marker) + publishing(marker))
        refused(client, status, slug)
    assert not exists(server, marker)
    assert not exists(server, "victim")


@pytest.mark.parametrize("name", FORMS)
def test_a_request_sent_after_the_refusal_is_not_run(server: Server, name: str) -> None:
    status, slug, data = FORMS[name]
    marker = new_marker()
    with server.client() as client:
        client.send(data)
        answer = client.read()
        assert (answer.status, answer.json["error"]) == (status, slug), answer
        client.send(publishing(marker))
        assert client.at_end(), client.buffer
    assert not exists(server, marker)
    assert not exists(server, "victim")


@pytest.mark.parametrize("name", [name for name in FORMS if not name.startswith("cr-before") and FORMS[name][2][:1] not in b"\n"])
def test_a_smuggling_form_is_refused_on_a_kept_connection_as_well(server: Server, name: str) -> None:
    status, slug, data = FORMS[name]
    marker = new_marker()
    with server.client() as client:
        client.send(get() + data + publishing(marker))
        assert client.read().status == 200
        refused(client, status, slug)
    assert not exists(server, marker)


CONTROLS: dict[str, tuple[int, bytes]] = {
    "get": (200, get()),
    "head": (200, b"HEAD /healthz HTTP/1.1\r\n" + HOST + b"\r\n"),
    "options": (204, b"OPTIONS /healthz HTTP/1.1\r\n" + HOST + b"\r\n"),
    "not-found": (404, b"GET /nothing HTTP/1.1\r\n" + HOST + b"\r\n"),
    "wrong-method": (405, b"PUT /healthz HTTP/1.1\r\n" + HOST + b"\r\n"),
    "empty-lines-before": (200, b"\r\n\r\n" + get()),
    "kept-1.0": (200, b"GET /healthz HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"),
    "absolute-target": (200, b"GET http://h/healthz HTTP/1.1\r\n" + HOST + b"\r\n"),
    "upgrade": (200, get(b"Connection: Upgrade", b"Upgrade: websocket")),
    "underscores": (200, get(b"Content_Length: 100", b"Transfer_Encoding: chunked")),
    "poll": (200, b"GET /poll/control?timeout=0 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "length": (201, b"POST /publish/control HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc"),
    "length-spaced": (201, b"POST /publish/control HTTP/1.1\r\nHost: h\r\nContent-Length: \t3 \r\n\r\nabc"),
    "no-length": (201, b"POST /publish/control HTTP/1.1\r\nHost: h\r\n\r\n"),
    "chunked": (201, b"POST /publish/control HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: Chunked\r\n\r\n" + CHUNK),
    "chunked-trailer": (
        201,
        b"POST /publish/control HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nHost: evil\r\nX: y\r\n\r\n",
    ),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_behind_a_good_request_the_next_one_is_run(server: Server, name: str) -> None:
    status, data = CONTROLS[name]
    marker = new_marker()
    with server.client() as client:
        client.send(data + publishing(marker))
        head = client.read_head()
        assert head.status == status
        if name != "head":
            client.read_body()
        assert client.read().status == 201
    assert exists(server, marker)


UNREAD: dict[str, tuple[int, str]] = {
    "GET /healthz": (200, ""),
    "HEAD /healthz": (200, ""),
    "OPTIONS /publish/a": (204, ""),
    "GET /poll/unread?timeout=0": (200, ""),
    "DELETE /channels/unheard-of": (404, "no-channel"),
    "GET /nothing": (404, "not-found"),
    "POST /nothing": (404, "not-found"),
    "POST /healthz": (405, "method-not-allowed"),
    "TRACE /healthz": (405, "method-not-allowed"),
    "POST /publish/bad!name": (400, "bad-channel"),
    "POST /publish/a?type=gap": (400, "bad-type"),
}
"""Requests whose body nobody asks for."""


@pytest.mark.parametrize("coding", ["length", "chunked"])
@pytest.mark.parametrize("name", UNREAD)
def test_a_body_that_nobody_reads_is_not_run_as_a_request(server: Server, name: str, coding: str) -> None:
    status, slug = UNREAD[name]
    marker = new_marker()
    body = publishing(marker)
    if coding == "length":
        data = b"Content-Length: %d\r\n\r\n" % len(body) + body
    else:
        data = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    with server.client() as client:
        client.send(f"{name} HTTP/1.1\r\nHost: h\r\n".encode() + data + publishing(marker))
        head = client.read_head()
        answer = head if name.startswith("HEAD") else head._replace(body=client.read_body())
        assert answer.status == status, answer
        assert not slug or answer.json["error"] == slug
        assert answer.headers["connection"] == "close"
        assert client.at_end()
    assert not exists(server, marker)


def test_a_request_in_a_body_is_data(server: Server) -> None:
    marker, outer = new_marker(), new_marker()
    inner = publishing(marker)
    with server.client() as client:
        client.ask("POST", f"/publish/{outer}", inner)
        assert client.read().status == 201
        chunked_inner = b"%x\r\n%b\r\n0\r\n\r\n" % (len(inner), inner)
        client.send(f"POST /publish/{outer} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunked_inner)
        assert client.read().status == 201
        messages = client.request("GET", f"/channels/{outer}/history").json["messages"]
    assert [message["data"].encode() for message in messages] == [inner, inner]
    assert not exists(server, marker)


def test_nothing_behind_a_close_is_run(server: Server) -> None:
    for line, connection in ((b"HTTP/1.1", b"Connection: close\r\n"), (b"HTTP/1.0", b"")):
        marker = new_marker()
        with server.client() as client:
            client.send(b"GET /healthz " + line + b"\r\n" + HOST + connection + b"\r\n" + publishing(marker))
            assert client.read().status == 200
            assert client.at_end()
        assert not exists(server, marker)


def test_what_a_waiting_client_sends_is_run_only_after_its_answer(server: Server) -> None:
    marker, channel = new_marker(), new_marker()
    with server.client() as client:
        client.ask("GET", f"/poll/{channel}")
        client.send(publishing(marker))
        wait_until(lambda: exists(server, channel))
        assert not exists(server, marker)
        server.publish(channel, "go")
        assert client.read().json["messages"][0]["data"] == "go"
        assert client.read().status == 201
    assert exists(server, marker)


def test_what_a_streaming_client_sends_is_not_run_before_the_stream_ended(server: Server) -> None:
    marker, channel = new_marker(), new_marker()
    with server.client() as client:
        client.ask("GET", f"/stream/{channel}")
        assert client.read_head().status == 200
        client.send(publishing(marker))
        assert not exists(server, marker)
        assert server.request("DELETE", f"/channels/{channel}").status == 200
        assert b"".join(client.chunks()) == b"\n"
        answered = client.more()
    # the stream had a proper end, so the connection may go on: then the request is run, and answered
    assert exists(server, marker) is answered


def test_a_publish_key_is_asked_for_before_the_body_and_the_body_is_not_run(start: Start) -> None:
    server = start("--publish-key", "secret")
    marker = new_marker()
    body = publishing(marker).replace(b"Host: h", b"Host: h\r\nAuthorization: Bearer secret")
    with server.client() as client:
        client.ask("POST", "/publish/a", body)
        refused(client, 401, "unauthorized")
    assert not exists(server, marker)


def test_a_header_that_is_not_utf_8_is_refused_or_ignored_but_no_failure(start: Start) -> None:
    server = start("--origins", "https://example.org")
    for name in ("Origin", "Last-Event-ID", "Idempotency-Key", "Authorization", "Content-Type", "X-Anything", "Cookie"):
        for first in (b"POST /publish/utf HTTP/1.1\r\nContent-Length: 1\r\n", b"GET /poll/utf?timeout=0 HTTP/1.1\r\n"):
            with server.client() as client:
                client.send(first + HOST + name.encode() + b": \xff\xc3\r\n\r\n" + (b"x" if first.startswith(b"POST") else b""))
                assert client.read().status < 500, (name, first)
    server.assert_healthy()


def test_a_refusal_is_counted_under_its_slug(server: Server) -> None:
    before = server.stats()["refused"].get("bad-encoding", 0)
    with server.client() as client:
        client.send(FORMS["te-doubled"][2])
        refused(client, 400, "bad-encoding")
    assert server.stats()["refused"]["bad-encoding"] == before + 1
