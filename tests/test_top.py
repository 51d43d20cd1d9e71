"""python -m comet top: what it shows, and what it says when there is nothing to show."""

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from rich.console import Console

from comet import __main__ as command
from comet import top
from comet.service import summary
from tests.test_service import worker

DOCUMENT = summary(
    [worker(0, connections=12_000, clients={"events": 12_000}), worker(1, connections=5, draining=True, generation=2)],
    {"channels": 77, "history_bytes": 3 << 20, "messages_kept": 9},
    {"worker_restarts": 3},
    {"in_use": 5, "allocated": 5, "memory_bytes": 4096, "memory_limit_bytes": 1 << 30},
)


@contextmanager
def service(status: int, body: bytes) -> Iterator[str]:
    """A server that answers everything so, and remembers who asked."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers.get("Authorization") in (None, "Bearer sesame")
            self.send_response(status if allowed else 401)
            self.end_headers()
            self.wfile.write(body if allowed else b'{"detail": "the key is wrong"}')

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def shown(document: object = DOCUMENT) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(top.screen(DOCUMENT, "http://here"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_it_shows_the_service_and_each_worker() -> None:
    text = shown()
    for part in ("12,005 of 2,000", "events 12,000", "77", "3M in 9 messages", "worker_restarts 3", "4K of 1G", "draining", "100", "101"):
        assert part in text, (part, text)


def test_once_prints_one_look(capsys: pytest.CaptureFixture[str]) -> None:
    with service(200, json.dumps(DOCUMENT).encode()) as url:
        assert command.main(["top", "--once", "--url", url, "--key", "sesame"]) == 0
    assert "12,005" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "body", "key", "said"), [
    (200, b"not json", "", "can't be read"),
    (503, b'{"detail": "away"}', "", "503: away"),
    (200, b"{}", "wrong", "401: the key is wrong"),
    (200, b"[1]", "", "is no service of comet"),
    (404, b"null", "", "is no service of comet"),
    (200, b"{}", "", "/stats of another form"),
    (200, json.dumps({**DOCUMENT, "clients": 7}).encode(), "", "/stats of another form"),
    (200, json.dumps({**DOCUMENT, "workers": [7]}).encode(), "", "/stats of another form"),
    (200, json.dumps({**DOCUMENT, "missing": {"workers": 1, "seconds": 1, "why": 7}}).encode(), "", "/stats of another form"),
    (503, b'{"detail": "[/red]"}', "", "503: [/red]"),
])  # fmt: skip
def test_what_can_not_be_shown_is_said(capsys: pytest.CaptureFixture[str], status: int, body: bytes, key: str, said: str) -> None:
    with service(status, body) as url:
        assert command.main(["top", "--once", "--url", url, "--key", key]) == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("url", ["http://127.0.0.1:x", "http://127.0.0.1:99999", "http://[::1", "http://127.0.0.1:1/a b"])
def test_an_address_that_is_none_is_said(capsys: pytest.CaptureFixture[str], url: str) -> None:
    assert command.main(["top", "--once", "--url", url]) == 1
    assert f"{url} can't be read: " in capsys.readouterr().out


@pytest.mark.parametrize("every", ["nan", "inf", "-1", "0", "x"])
def test_looks_come_at_an_interval_that_can_be_waited_for(capsys: pytest.CaptureFixture[str], every: str) -> None:
    with pytest.raises(SystemExit):
        command.main(["top", "--once", "--every", every])
    assert every in capsys.readouterr().err


def test_nobody_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["top", "--once", "--url", "http://127.0.0.1:1"]) == 1
    assert "Is the service there?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1023, "0.999K"), (1024, "1K"), (1 << 20, "1M"), (5 << 40, "5T"), (5 << 60, "5,120P")]
)
def test_sizes(number: int, text: str) -> None:
    assert top.size(number) == text
