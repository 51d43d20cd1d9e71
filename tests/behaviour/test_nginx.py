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

from tests.conftest import Start, only_asleep
from tests.harness import ROOT, Client, free_port, wait_until
from tests.test_framing import event_stream

PROGRAM = shutil.which("nginx") or "/usr/sbin/nginx"
pytestmark = pytest.mark.skipif(not os.path.exists(PROGRAM), reason="no nginx: apt-get install nginx-light")

EVENT_SOURCE = {"Accept": "text/event-stream"}

Front = Callable[[int], int]


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


def site(port: int, upstream: int) -> str:
    """deploy/nginx.conf on `port`, without TLS; every other line is as it is there."""
    text = (ROOT / "deploy" / "nginx.conf").read_text()
    for pattern, instead in (
        (r"^server \{\n[^{}]*listen 80;[^{}]*\}\n", ""),
        (r"^ *listen 443 .*$", f"listen 127.0.0.1:{port};"),
        (r"^ *(listen \[::\]:443|ssl_certificate).*$", ""),
        (r"server 127\.0\.0\.1:8000", f"server 127.0.0.1:{upstream}"),
        (r"proxy_read_timeout .*", "proxy_read_timeout 1s;"),
    ):
        text, count = re.subn(pattern, instead, text, flags=re.MULTILINE)
        assert count, pattern
    return text


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    """Starts an nginx for a service on a port; its own port."""
    processes = []

    def begin(upstream: int) -> int:
        port = free_port()
        file = tmp_path / "nginx.conf"
        file.write_text(MAIN.format(folder=tmp_path, user="user root;" if os.geteuid() == 0 else ""))
        (tmp_path / "site.conf").write_text(site(port, upstream))
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
