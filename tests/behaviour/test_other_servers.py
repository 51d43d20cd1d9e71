"""The application on other WSGI servers: without ``environ["comet.park"]`` it is plain iterables.

Two stand for all: gevent's own pywsgi, and the standard library's wsgiref with a thread a request
behind its validator, which holds the application to PEP 3333. Both run in a process of their own
(``python -m tests.behaviour.test_other_servers NAME FOLDER``), since everything has to be patched there
before it is imported: bottle's request belongs to a thread, and must belong to a greenlet.
"""

from gevent import monkey

if __name__ == "__main__":
    monkey.patch_all()

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gevent import subprocess as green

from tests.harness import ROOT, TIMEOUT, Client, wait_until

HEARTBEAT = 0.2


def announce(port: int) -> None:
    """Tell the test where it listens."""
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()


def serve(name: str, data: Path) -> None:
    """Serve on a free port and print it, for ever."""
    import gevent
    from bottle import Bottle

    import handlers
    from comet import database
    from comet.backplane.memory import MemoryBackplane
    from comet.hub import Hub
    from comet.settings import Settings
    from comet.stats import Stats
    from comet.subscriptions import Subscriptions
    from handlers.params import Context

    settings, stats, backplane = Settings(heartbeat=HEARTBEAT, backlog=100_000_000), Stats(), MemoryBackplane()
    application = Bottle()
    hub = Hub(backplane, stats, settings.backlog, lambda work: work())  # few clients: there is nothing to put off
    database.prepare(data, whole=False)
    handlers.mount(application, Context(hub, Subscriptions(data), settings, stats, stats.document))

    if name == "pywsgi":
        from gevent.pywsgi import WSGIServer

        server = WSGIServer(("127.0.0.1", 0), application, log=None)
        server.start()
        announce(server.server_port)
        while True:
            gevent.sleep(60)

    from socketserver import ThreadingMixIn
    from wsgiref import simple_server, validate

    class Server(ThreadingMixIn, simple_server.WSGIServer):
        daemon_threads = True

    class Quiet(simple_server.WSGIRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with simple_server.make_server("127.0.0.1", 0, validate.validator(application), Server, Quiet) as threads:
        announce(threads.server_port)
        threads.serve_forever()


class Other:
    """One of these servers. It is asked in HTTP/1.0: bodies are plain and end with the connection."""

    def __init__(self, name: str, log: Path) -> None:
        self.log = log
        with log.open("wb") as errors:
            self.process = green.Popen(
                [sys.executable, "-m", "tests.behaviour.test_other_servers", name, str(log.parent)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        line = self.process.stdout.readline()
        assert line, log.read_text()
        self.port = int(line)

    def stop(self) -> None:
        """End it: there is nothing orderly about these two."""
        self.process.kill()
        self.process.wait(TIMEOUT)
        self.process.stdout.close()

    def open(self, method: str, target: str, body: bytes | None = None) -> tuple[int, dict[str, str], Client]:
        """Status and headers, and the connection, from which the body comes."""
        client = Client(self.port)
        length = "" if body is None else f"Content-Length: {len(body)}\r\nContent-Type: text/plain\r\n"
        client.send(f"{method} {target} HTTP/1.0\r\nHost: test\r\n{length}\r\n".encode() + (body or b""))
        try:
            first, *lines = client.read_until(b"\r\n\r\n").decode().strip().split("\r\n")
        except BaseException:
            client.close()
            raise
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return int(first.split(" ")[1]), headers, client

    def request(self, method: str, target: str, body: bytes | None = None) -> tuple[int, Any]:
        """Status and JSON of a whole answer."""
        status, _, client = self.open(method, target, body)
        with client:
            while client.more():
                pass
            return status, json.loads(client.buffer)

    def publish(self, channel: str, data: str) -> str:
        """The id."""
        status, document = self.request("POST", f"/publish/{channel}", data.encode())
        assert status == 201, document
        return str(document["id"])

    def subscribers(self, channel: str) -> int:
        """How many listen."""
        status, document = self.request("GET", f"/channels/{channel}")
        return int(document["subscribers"]) if status == 200 else 0

    def stats(self) -> Any:
        """The counters."""
        return self.request("GET", "/stats")[1]


@pytest.fixture(scope="module", params=["pywsgi", "wsgiref"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Other]:
    """Each server in turn. Whatever it wrote to its log would be an exception."""
    running = Other(request.param, tmp_path_factory.mktemp("other") / f"{request.param}.log")
    yield running
    assert running.stats()["errors"] == 0, running.log.read_text()
    running.stop()
    assert "Traceback" not in running.log.read_text(), running.log.read_text()


def test_publish_history_and_refusals_work(other: Other) -> None:
    name = other.publish("plain", "one")
    assert other.request("GET", "/channels/plain/history")[1]["messages"] == [
        {"id": name, "channel": "plain", "type": "message", "data": "one"}
    ]
    status, document = other.request("POST", "/publish", b'{"channel": "plain", "data": "two"}')
    assert (status, set(document)) == (200, {"id", "subscribers"})
    assert other.request("POST", "/publish/plain?type=gap", b"x")[1]["error"] == "bad-type"
    assert other.request("POST", "/publish/plain", b"x" * 65537)[0] == 413
    assert other.request("POST", "/publish/plain", b"")[0] == 201
    assert other.request("DELETE", "/channels/plain")[1]["messages"] == 3
    assert other.request("GET", "/channels/plain")[0] == 404


@pytest.mark.parametrize("path", ["/poll/headed", "/events/headed", "/stream/headed", "/test/headed"])
def test_head_of_what_waits_subscribes_nobody(other: Other, path: str) -> None:
    before = other.stats()["clients"]
    status, headers, client = other.open("HEAD", path)
    with client:
        assert (status, headers["cache-control"]) == (200, "no-store")
        assert client.at_end(), client.buffer
    assert other.stats()["clients"] == before
    assert other.request("GET", "/channels/headed")[0] == 404


def test_a_body_with_a_content_encoding_is_refused(other: Other) -> None:
    with Client(other.port) as client:
        client.send(b"POST /publish/coded HTTP/1.0\r\nHost: test\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello")
        assert client.read_until(b"\r\n").split(b" ")[1] == b"415"
    assert other.request("GET", "/channels/coded")[0] == 404


def test_poll_waits_and_answers(other: Other) -> None:
    status, empty = other.request("GET", "/poll/waits?timeout=0")
    assert (status, empty["messages"]) == (200, [])
    with Client(other.port) as client:
        client.send(f"GET /poll/waits?since={empty['cursor']} HTTP/1.0\r\nHost: test\r\n\r\n".encode())
        wait_until(lambda: other.subscribers("waits") == 1)
        name = other.publish("waits", "here")
        assert client.read_until(b"\r\n\r\n").split(b" ")[1] == b"200"
        while client.more():
            pass
        document = json.loads(client.buffer)
    assert (document["cursor"], [message["data"] for message in document["messages"]]) == (name, ["here"])
    wait_until(lambda: other.subscribers("waits") == 0)


def test_a_poll_whose_client_went_is_freed_when_its_time_is_up(other: Other) -> None:
    client = Client(other.port)
    client.send(b"GET /poll/gone?timeout=0.5 HTTP/1.0\r\nHost: test\r\n\r\n")
    wait_until(lambda: other.subscribers("gone") == 1)
    client.close()
    wait_until(lambda: other.subscribers("gone") == 0)


@pytest.mark.parametrize(
    ("path", "opening", "line"),
    [
        ("/stream/{}", b"\n", b'{{"id":"{id}","channel":"{channel}","type":"message","data":"{data}"}}\n'),
        ("/events/{}", b"retry: 2000\nevent: comet\nid: ", b"event: message\ndata: {data}\nid: {id}\n\n"),
    ],
)
def test_streams_are_plain_iterables_and_freed_at_a_heartbeat_after_the_client_went(
    other: Other, path: str, opening: bytes, line: bytes
) -> None:
    channel = path[1:4]
    status, headers, client = other.open("GET", path.format(channel))
    with client:
        assert status == 200
        assert headers["cache-control"] == "no-store"
        assert "comet-cursor" in headers
        client.read_until(opening)
        for number in range(5):
            name = other.publish(channel, f"m{number}")
            expected = line.decode().format(id=name, channel=channel, data=f"m{number}").encode()
            assert client.read_until(expected).endswith(expected)
        assert other.subscribers(channel) == 1
        began = time.monotonic()
        heartbeat = b":\n" if path.startswith("/events") else b"\n"
        for _ in range(3):
            client.read_until(heartbeat)
        assert time.monotonic() - began > 2 * HEARTBEAT
    wait_until(lambda: other.subscribers(channel) == 0)


def test_a_test_client_is_freed_at_the_next_write_after_it_went(other: Other) -> None:
    status, _, client = other.open("GET", "/test/7")
    assert status == 200
    assert client.read_until(b"\n") == b"comet welcomes you! Your id: 7\n"
    assert other.request("POST", "/send/7", b"hello")[1]["delivered"] == 1
    assert client.read_until(b"\n") == b"hello\n"
    client.reset()

    def freed() -> bool:
        return bool(other.request("POST", "/send/7", b"anyone?")[1]["delivered"] == 0)

    wait_until(freed)


def test_a_replay_joins_the_live_messages(other: Other) -> None:
    for number in range(200):
        assert other.publish("seam", str(number))
    _, _, client = other.open("GET", "/stream/seam?since=oldest")
    with client:
        client.read_until(b"\n")
        for number in range(200, 220):
            other.publish("seam", str(number))
        seen: list[str] = []
        while len(seen) < 220:
            line = client.read_until(b"\n").strip()
            if line:
                seen.append(json.loads(line)["data"])
    assert seen == [str(number) for number in range(220)]


def test_a_deleted_channel_ends_its_streams(other: Other) -> None:
    _, _, client = other.open("GET", "/events/ends")
    with client:
        client.read_until(b"\n\n")
        assert other.request("DELETE", "/channels/ends")[0] == 200
        while client.more():
            pass
        assert set(client.buffer.split(b"\n")) <= {b":", b""}
    wait_until(lambda: other.stats()["closed"].get("deleted") == 1)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
