"""nginx with deploy/nginx.conf in front of comet, as a user's process: without TLS, and on ports of its own.

`deploy/verify` has the whole of it on a machine of its own; here is what nginx answers by itself.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import gevent
import pytest
from gevent import socket

from comet.server.proxies import network_of
from comet.settings import Settings
from tests.conftest import Start, only_asleep
from tests.harness import AMPLE, HALF_A_POST, ROOT, Client, Response, free_port, wait_until
from tests.test_framing import event_stream

PROGRAM = shutil.which("nginx") or "/usr/sbin/nginx"
pytestmark = pytest.mark.skipif(not os.path.exists(PROGRAM), reason="no nginx: apt-get install nginx-light")

EVENT_SOURCE = {"Accept": "text/event-stream"}

Front = Callable[..., int]
"""A service's port, and changes of deploy/nginx.conf as pairs of pattern and text, to the port of an nginx."""


MAIN = """\
{user}
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 512; }}
http {{
    client_body_temp_path {folder};
    proxy_temp_path {folder};
    fastcgi_temp_path {folder};
    uwsgi_temp_path {folder};
    scgi_temp_path {folder};
    include {folder}/site.conf;
}}
"""
"""An nginx of the test's own; the site is ours."""


def site(port: int, upstream: int, *changes: tuple[str, str]) -> str:
    """deploy/nginx.conf on `port`, without TLS and with `changes`; every other line is as it is there."""
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    for pattern, instead in (
        (r"^server \{\n[^{}]*listen 80;[^{}]*\}\n", ""),
        (r"^ *listen 443 .*$", f"listen 127.0.0.1:{port};"),
        (r"^ *(listen \[::\]:443|ssl_certificate).*$", ""),
        (r"server 127\.0\.0\.1:8000", f"server 127.0.0.1:{upstream}"),
        (r"proxy_read_timeout .*", "proxy_read_timeout 1s;"),
        *changes,
    ):
        text, count = re.subn(pattern, instead, text, flags=re.MULTILINE)
        assert count, pattern
    return text


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    """Starts an nginx for a service on a port; its own port."""
    processes = []

    def begin(upstream: int, *changes: tuple[str, str]) -> int:
        port = free_port()
        file = tmp_path / "nginx.conf"
        file.write_text(MAIN.format(folder=tmp_path, user="user root;" if os.geteuid() == 0 else ""))
        (tmp_path / "site.conf").write_text(site(port, upstream, *changes))
        process = subprocess.Popen([PROGRAM, "-c", str(file), "-e", str(tmp_path / "nginx.log"), "-g", "daemon off;"])
        processes.append(process)

        def listening() -> bool:
            assert process.poll() is None, (tmp_path / "nginx.log").read_text()
            with socket.socket() as one:
                return bool(one.connect_ex(("127.0.0.1", port)) == 0)

        wait_until(listening)
        return port

    yield begin
    for process in processes:
        process.terminate()
        process.wait(10)


def told_to_come_back(port: int, headers: dict[str, str], target: str = "/events/news.html?since=1-1") -> int:
    """What nginx says for comet to an EventSource; the milliseconds after which it comes back."""
    with Client(port) as client:
        answer = client.request("GET", target, headers={**EVENT_SOURCE, **headers})
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), answer
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["vary"] == "Origin"
    assert answer.headers.get("access-control-allow-origin") == headers.get("Origin")
    assert answer.headers.get("access-control-allow-credentials") == ("true" if "Origin" in headers else None)
    assert answer.body.startswith(b": away: "), "a comment that says why"
    events, _, retry = event_stream(answer.body)
    assert events == []
    assert b"\nevent: comet\n" in answer.body
    assert retry is not None
    assert 2000 <= retry < 4000
    return retry


def test_where_comet_is_away_an_event_source_is_told_when_to_come_back(front: Front) -> None:
    port = front(free_port())
    assert len({told_to_come_back(port, {}) for _ in range(20)}) > 10, "all would come back at once"
    told_to_come_back(port, {"Origin": "https://a.example"})
    for accept in ("text/event-stream, */*", "text/html,Text/Event-Stream;q=0.5", "*/* , text/event-stream ;charset=utf-8;q=1"):
        told_to_come_back(port, {"Accept": accept}, "/events/a,b")


def test_where_comet_is_away_everyone_else_is_told_the_status(front: Front) -> None:
    port = front(free_port())
    for method, target, accept in (
        ("GET", "/events/a", "*/*"),
        ("GET", "/events/a", "text/event-stream;q=0"),
        ("GET", "/events/a", "text/event-stream; charset=utf-8; q=0.00, */*"),
        ("GET", "/events/a", "text/event-streams"),
        ("GET", "/poll/a", "text/event-stream"),
        ("GET", "/stream/a", "text/event-stream"),
        ("GET", "/poll/a?/events/b", "text/event-stream"),
        ("POST", "/events/a", "text/event-stream"),
    ):
        with Client(port) as client:
            answer = client.request(method, target, b"x" if method == "POST" else None, {"Accept": accept})
        assert answer.status == 502, (method, target, accept)


def test_where_comet_does_not_answer_in_time_it_is_the_same(front: Front) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(64)
        port = front(silent.getsockname()[1])
        told_to_come_back(port, {})
        with Client(port) as client:
            assert client.request("GET", "/poll/a", headers=EVENT_SOURCE).status == 504


@only_asleep
def test_what_comet_says_passes_as_it_is(front: Front, start: Start) -> None:
    server = start("--trusted-proxies", "127.0.0.0/8", "--heartbeat", "0.2")
    port = front(server.port)
    with Client(port) as client:
        client.ask("GET", "/events/a", headers=EVENT_SOURCE)
        head = client.read_head()
        assert (head.status, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        client.read_until(b"\n\n")
        with gevent.Timeout(5):  # less than a buffer's worth comes through
            server.publish("a", "hello")
            client.read_until(b"data: hello\n")
    for target, status in (("/events/a?since=rubbish", 400), ("/events/a%20b", 400), ("/events", 404)):
        with Client(port) as client:
            answer = client.request("GET", target, headers=EVENT_SOURCE)
            assert (answer.status, answer.headers["content-type"]) == (status, "application/json")


# -- what one client may have


OPEN = (r"limit_conn comet_open \d+;", "limit_conn comet_open 3;")
RATE = (r"rate=\d+r/s;", "rate=1r/m;"), (r"burst=\d+ nodelay;", "burst=4 nodelay;")


def too_many(answer: Response) -> None:
    """Refused as comet itself would refuse it."""
    assert (answer.status, answer.headers["content-type"], answer.headers["retry-after"]) == (429, "application/json", "5"), answer
    assert (answer.json["error"], answer.json["detail"].endswith(".")) == ("address-full", True)
    assert (answer.headers["cache-control"], answer.headers["vary"]) == ("no-store", "Origin")


@only_asleep
def test_a_client_may_have_so_many_requests_open(front: Front, start: Start) -> None:
    server = start("--trusted-proxies", "127.0.0.0/8")
    port = front(server.port, OPEN)
    waiting = [Client(port) for _ in range(3)]
    for client in waiting:
        client.ask("GET", "/poll/a")
    wait_until(lambda: server.clients() == 3)
    page = {"Origin": "https://a.example"}
    for method, target, body in (("GET", "/poll/a?timeout=0", None), ("POST", "/publish/a", b"x"), ("POST", "/follows", b"1 2\n")):
        with Client(port) as fourth:
            answer = fourth.request(method, target, body, page)
            too_many(answer)
            assert answer.headers["access-control-allow-origin"] == page["Origin"]
    told_to_come_back(port, page)  # who gives up at any other status
    with Client(port, source="127.0.0.99") as other:
        assert other.request("GET", "/poll/a?timeout=0").status == 200
    waiting.pop().close()
    wait_until(lambda: server.clients() == 2)
    with Client(port) as third:
        assert third.request("GET", "/poll/a?timeout=0").status == 200
    for client in waiting:
        client.close()


@only_asleep
def test_a_client_may_ask_so_often(front: Front, start: Start) -> None:
    server = start("--trusted-proxies", "127.0.0.0/8")
    port = front(server.port, *RATE)
    with Client(port) as client:
        for _ in range(5):  # one, and the burst
            assert client.request("GET", "/poll/a?timeout=0").status == 200
        too_many(client.request("GET", "/poll/a?timeout=0"))
    told_to_come_back(port, {})
    with Client(port, source="127.0.0.99") as other:
        assert other.request("GET", "/poll/a?timeout=0").status == 200


@pytest.mark.parametrize(
    ("one", "same", "other"),
    [
        ("192.0.2.1", "192.0.2.1", "192.0.2.2"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::1", "2001:db8:1:3::1"),
        ("2001:db8:1::1", "2001:db8:1::2:3", "2001:db8:2::1"),
        ("2001:db8::1", "2001:db8::2", "2001:db9::1"),
        ("::1", "::2", "fe80::1"),
    ],
)
def test_a_client_is_an_address_or_an_ipv6_64_as_in_comet(one: str, same: str, other: str) -> None:
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    lines = re.search(r"^map \$remote_addr \$comet_client \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    assert lines
    patterns = re.findall(r'"~(.*)" \$1;', lines[1])
    assert len(patterns) == 2

    def key(address: str) -> str:
        return next((found[1] for pattern in patterns if (found := re.search(pattern, address))), address)

    assert key(one) == key(same) != key(other)
    assert (network_of(one) == network_of(same)) and all(map(key, (one, other)))


# -- bodies, and those who are slow


@only_asleep
def test_follows_alone_takes_a_body_of_any_length(front: Front, start: Start) -> None:
    server = start("--trusted-proxies", "127.0.0.0/8", "--max-batch", str(1 << 24))
    port = front(server.port, (r"proxy_read_timeout 1s;", "proxy_read_timeout 60s;"))
    pair = b"%b %b\n" % (b"a" * 120, b"b" * 120)
    most = Settings().max_batch
    many = pair * (most // len(pair) + 1)
    with Client(port) as client:
        answer = client.request("POST", "/follows", many)
        assert (answer.status, answer.json["added"]) == (200, 1), answer
        assert answer.json["present"] == len(many) // len(pair) - 1
    for target in ("/publish", "/publish/a", "/send/a", "/follows/", "/Follows"):
        with Client(port) as client:
            client.send(f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {most + 1}\r\n\r\n".encode())
            assert client.read_head().status == 413, target


@only_asleep
def test_a_list_of_follows_is_passed_on_before_it_is_whole(front: Front, start: Start) -> None:
    """So the key is asked for first, and no disk is filled by who has none."""
    server = start("--trusted-proxies", "127.0.0.0/8", COMET_PUBLISH_KEY="s3cret")
    with Client(front(server.port)) as client:
        client.send(b"POST /follows HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n1 2\n")
        assert client.read().status == 401


@only_asleep
def test_who_sends_slowly_is_cut_off(front: Front, start: Start) -> None:
    server = start("--trusted-proxies", "127.0.0.0/8")
    port = front(server.port, (r"client_(header|body)_timeout 10s;", r"client_\1_timeout 1s;"))
    with Client(port) as client:
        client.send(b"GET /poll/a HTTP/1.1\r\nHost: local")
        with gevent.Timeout(AMPLE):
            assert client.at_end()
    with Client(port) as client:
        client.send(HALF_A_POST)
        with gevent.Timeout(AMPLE):
            while client.more():
                pass
        assert client.buffer.startswith(b"HTTP/1.1 408 ") or not client.buffer, client.buffer
    assert server.request("GET", "/channels/a").status == 404


@only_asleep
def test_a_page_through_nginx_may_publish_if_it_is_the_services_own(front: Front, start: Start) -> None:
    """By what nginx says of the scheme."""
    server = start("--trusted-proxies", "127.0.0.0/8")
    port = front(server.port)
    for origin, status in (("http://test", 201), ("https://test", 403), (f"http://test:{port}", 403)):
        with Client(port) as client:
            assert client.request("POST", "/publish/a", b"x", {"Origin": origin}).status == status, origin
