"""A page elsewhere whose name leads to the service (DNS rebinding): its browser says that name in Host, and so it is refused."""

import pytest

from tests.conftest import Start
from tests.harness import Client, Server, wait_until

EVIL = "evil.example"
REQUESTS = [
    ("POST", "/publish/ch", "x"),
    ("POST", "/publish", '{"channel": "ch", "data": "x"}'),
    ("POST", "/send/alice", "x"),
    ("POST", "/follows", "alice mallory"),
    ("PUT", "/users/alice/following/mallory", ""),
    ("DELETE", "/channels/ch", ""),
    ("GET", "/channels/ch/history", ""),
    ("GET", "/poll/ch?timeout=0", ""),
    ("GET", "/poll/ch%20?timeout=0", ""),
    ("GET", "/events/ch", ""),
    ("GET", "/stream/ch", ""),
    ("GET", "/test/alice", ""),
    ("GET", "/stats", ""),
    ("GET", "/healthz", ""),
    ("GET", "/", ""),
    ("GET", "/nowhere", ""),
    ("HEAD", "/stats", ""),
    ("OPTIONS", "/publish/ch", ""),
    ("TRACE", "/", ""),
]


def request(method: str, target: str, body: str, host: str | None, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"{method} {target} HTTP/{version}", *([] if host is None else [f"Host: {host}"]), *headers]
    return "\r\n".join([*lines, *([f"Content-Length: {len(body)}"] if body else []), "", body]).encode()


def status_of(server: Server, data: bytes, source: str | None = None) -> int:
    """The status of the answer to one request."""
    with Client(server.port, source=source) as client:
        client.send(data)
        return client.read_head().status


def plain(server: Server, host: str | None, *headers: str, target: str = "/publish/ch", version: str = "1.1") -> int:
    return status_of(server, request("POST", target, "x", host, *headers, version=version))


@pytest.mark.parametrize("kept", [False, True], ids=["first", "kept"])
def test_whatever_a_page_asks_by_its_own_name_is_refused_and_not_done(start: Start, kept: bool) -> None:
    server = start()
    server.publish("ch", "before")
    for method, target, body in REQUESTS:
        with server.client() as client:
            if kept:
                assert client.request("GET", "/poll/ch?timeout=0").status == 200
            client.send(request(method, target, body, f"{EVIL}:{server.port}", f"Origin: http://{EVIL}:{server.port}"))
            answer = client.read_head()
            assert answer.status == 421, (method, target)
            if method != "HEAD":
                answer = answer._replace(body=client.read_body())
                assert answer.json["error"] == "host-refused" and EVIL in answer.json["detail"] and "--hosts" in answer.json["detail"]
            assert client.at_end()
    assert server.stats()["refused"] == {"host-refused": len(REQUESTS)}
    assert [one["data"] for one in server.request("GET", "/channels/ch/history").json["messages"]] == ["before"]
    assert server.request("GET", "/users/mallory/followers").json["count"] == 0


@pytest.mark.parametrize("headers", [(), ("Origin: http://localhost",), ("Connection: close",)], ids=["short", "long", "close"])
def test_each_way_asks_for_the_host(start: Start, headers: tuple[str, ...]) -> None:
    """Short ways and bottle's, at the accept and later, for what was learned and what was not, and none for another's sake."""
    server = start(COMET_HOSTS="push.example.org,test")
    for _ in range(3):
        for host, expected in ((EVIL, 421), ("localhost", 200), ("push.example.org:80", 200)):
            for method, target, body in (("GET", "/poll/ch?timeout=0", ""), ("POST", "/send/1", "x")):
                data = request(method, target, body, host, *(one for one in headers if expected == 200 or "Origin" not in one))
                if "Origin" in "".join(headers) and host.startswith("push"):
                    data = data.replace(b"http://localhost", b"http://push.example.org")
                assert status_of(server, data) == expected, (host, method)
                with server.client() as client:
                    assert client.request("POST", "/send/1", b"x").status == 200
                    client.send(data)
                    assert client.read_head().status == expected, (host, method)


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST", "localhost.", "localhost:{port}", "a.localhost:1", "127.0.0.1:{port}", "[::1]:{port}", "[::1]", "192.0.2.1", "10.0.0.7:{port}"],
)  # fmt: skip
def test_addresses_and_localhost_are_answered(start: Start, host: str) -> None:
    """As health checks ask, and whoever forwards a port."""
    server = start()
    host = host.format(port=server.port)
    for target, version in (("/readyz", "1.1"), ("/stats", "1.1"), ("/readyz", "1.0"), (f"http://{host}/readyz", "1.1")):
        assert status_of(server, request("GET", target, "", host, version=version)) == 200, target
    assert plain(server, host, f"Origin: http://{host.lower()}") == 201


def test_a_request_without_a_host_is_answered_as_no_browser_sends_it(start: Start) -> None:
    server = start()
    assert status_of(server, request("GET", "/readyz", "", None, version="1.0")) == 200
    assert status_of(server, request("GET", "/readyz", "", "")) == 200
    assert status_of(server, request("GET", "/readyz", "", None)) == 400, "HTTP/1.1 has one"
    assert status_of(server, request("GET", "/readyz", "", EVIL, version="1.0")) == 421
    for origin in ("null", "http://", "https://evil.example"):
        assert plain(server, "", f"Origin: {origin}") == 403, origin


def test_the_host_of_an_absolute_target_counts(start: Start) -> None:
    server = start(COMET_HOSTS="push.example.org")
    for named, host, expected in (
        (EVIL, "127.0.0.1", 421),
        ("127.0.0.1", EVIL, 201),
        ("Push.example.org:80", EVIL, 201),
        ("[::1]", EVIL, 201),
    ):
        assert plain(server, host, target=f"http://{named}/publish/ch") == expected, (named, host)
    assert plain(server, "127.0.0.1", f"Origin: http://{EVIL}", target=f"http://{EVIL}/publish/ch") == 421


@pytest.mark.parametrize("hosts", ["push.example.org", "*"])
def test_further_names_are_a_setting(start: Start, hosts: str) -> None:
    server = start("--hosts", hosts)
    for host in ("push.example.org", "PUSH.example.org.:8000"):
        assert plain(server, host) == 201
    for host in (EVIL, "server"):
        assert plain(server, host) == (201 if hosts == "*" else 421)


def test_with_a_publish_key_every_name_is_answered_unless_some_are_named(start: Start) -> None:
    right = "Authorization: Bearer s3cret"
    server = start(COMET_PUBLISH_KEY="s3cret")
    assert (plain(server, EVIL), plain(server, EVIL, right)) == (401, 201)
    assert status_of(server, request("GET", "/stats", "", EVIL)) == 401
    strict = start(COMET_HOSTS="push.example.org", COMET_PUBLISH_KEY="s3cret")
    assert (plain(strict, EVIL, right), plain(strict, "push.example.org", right)) == (421, 201)


def test_a_service_that_is_open_to_a_network_is_asked_for_by_its_names_too(start: Start) -> None:
    """Whoever is in that network may publish, and not every page that is visited from there."""
    server = start("--host", "0.0.0.0", "--open")
    assert [plain(server, host) for host in (EVIL, "server", "server.:8000", "10.0.0.1:8000")] == [421, 201, 201, 201]


def test_behind_a_proxy_the_public_name_is_to_be_named_too(start: Start) -> None:
    """A page can reach the service past the proxy, and from its address: on one machine both are on loopback."""
    server = start("--trusted-proxies", "127.0.0.0/8", "--max-per-address", "1", COMET_HOSTS="push.example.org,test")
    said = ("X-Forwarded-For: 198.51.100.1", "X-Request-ID: r-1")
    with server.client() as proxy:
        for _ in range(3):
            proxy.send(request("POST", "/send/1", "x", "push.example.org", *said))
            assert proxy.read().status == 200
        proxy.send(request("POST", "/send/1", "x", EVIL, *said))
        answer = proxy.read()
        assert (answer.status, answer.headers["x-request-id"]) == (421, "r-1")
        assert proxy.at_end()

    def answered() -> bool:
        with server.client() as proxy:
            proxy.send(request("POST", "/send/1", "x", "push.example.org", *said))
            return proxy.read().status == 200

    wait_until(answered)  # the client that was refused is soon no longer counted
    wait_until(lambda: server.stats()["connections"] == 1)


def test_a_refused_body_is_not_run_as_a_request(start: Start) -> None:
    server = start()
    inner = request("POST", "/publish/smuggled", "x", "localhost").decode()
    with server.client() as client:
        client.send(request("POST", "/publish/ch", inner, EVIL) + inner.encode())
        assert client.read().status == 421
        assert client.at_end()
    assert server.request("GET", "/channels/smuggled").status == 404


# -- origins


@pytest.mark.parametrize(
    ("host", "origin", "said", "allowed"),
    [
        # nobody says which scheme the browser speaks: whoever ends TLS in front may not
        ("push.example.org", "http://push.example.org", "", True),
        ("push.example.org", "https://push.example.org", "", True),
        ("push.example.org:80", "http://push.example.org", "", True),
        ("push.example.org:443", "https://push.example.org", "", True),
        ("push.example.org:443", "http://push.example.org", "", False),
        ("push.example.org:8000", "http://push.example.org", "", False),
        ("push.example.org", "http://push.example.org:8000", "", False),
        ("push.example.org", "ftp://push.example.org", "", False),
        ("push.example.org", "null", "", False),
        ("push.example.org", "http://push.example.org.", "", False),
        ("PUSH.example.org:8000", "http://push.example.org:8000", "", True),
        ("[0::1]:8000", "http://[::1]:8000", "", True),
        # a trusted proxy does
        ("push.example.org", "https://push.example.org", "https", True),
        ("push.example.org", "https://push.example.org", "HTTPS", True),
        ("push.example.org", "http://push.example.org", "https", False),
        ("push.example.org", "https://push.example.org", "http", False),
        ("push.example.org", "http://push.example.org", "http", True),
        ("push.example.org", "https://push.example.org", "gopher", True),
    ],
)
def test_an_origin_is_compared_by_scheme_host_and_port(start: Start, host: str, origin: str, said: str, allowed: bool) -> None:
    server = start("--trusted-proxies", "127.0.0.2", COMET_HOSTS="*")
    headers = [f"Origin: {origin}", *([f"X-Forwarded-Proto: {said}"] if said else [])]
    data = request("POST", "/publish/ch", "x", host, *headers)
    assert status_of(server, data, source="127.0.0.2") == (201 if allowed else 403)


def test_anybody_elses_word_for_the_scheme_is_ignored(start: Start) -> None:
    server = start("--trusted-proxies", "127.0.0.2", COMET_HOSTS="*")
    for origin in ("http://push.example.org", "https://push.example.org"):
        assert plain(server, "push.example.org", f"Origin: {origin}", "X-Forwarded-Proto: gopher") == 201
        assert plain(server, "push.example.org", f"Origin: {origin}", "X-Forwarded-Proto: http") == 201


def test_the_page_may_be_in_nobodys_frame(server: Server) -> None:
    assert "frame-ancestors 'none'" in server.request("GET", "/").headers["content-security-policy"]
