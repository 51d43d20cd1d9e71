"""Requests leave no cycles behind: the collector comes by seldom, and until then each would keep what it held, a body's
buffer of 8 KiB among it. With sixty workers that was half a gigabyte."""

import signal
from pathlib import Path

import pytest

from tests.harness import Server, wait_until

TIMES = 50

PROGRAM = """
import gc, os, signal, sys
import app

def begin(*_):
    gc.disable()
    gc.collect()
    open(os.environ["GARBAGE"] + ".begun", "w").close()

def end(*_):
    found = gc.collect()
    with open(os.environ["GARBAGE"] + ".new", "w") as file:
        file.write(str(found))
    os.rename(os.environ["GARBAGE"] + ".new", os.environ["GARBAGE"])

signal.signal(signal.SIGUSR1, begin)
signal.signal(signal.SIGUSR2, end)
sys.exit(app.main(sys.argv[1:]))
"""


class Counted(Server):
    """A server that counts, between two signals, what it leaves to the collector, into the file $GARBAGE."""

    program = ("-c", PROGRAM)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/publish/news?type=headline", b"hello"),
        ("POST", "/publish/news", b"hello"),
        ("POST", "/send/5", b"hello"),
        ("POST", "/publish", b'{"channel":"news","data":"hello"}'),
        ("GET", "/channels/news", None),
        ("GET", "/poll/news?timeout=0", None),
    ],
)
def test_a_request_leaves_nothing_for_the_collector(tmp_path: Path, method: str, path: str, body: bytes | None) -> None:
    told = tmp_path / "garbage"
    with Counted(tmp_path / "log", GARBAGE=str(told)) as server, server.client() as client:
        client.request(method, path, body)
        server.process.send_signal(signal.SIGUSR1)
        wait_until(Path(f"{told}.begun").exists)
        for _ in range(TIMES):
            assert client.request(method, path, body).status < 500
        server.process.send_signal(signal.SIGUSR2)
        wait_until(told.exists)
        assert int(told.read_text()) < TIMES  # one request may be under way, in the collector's eyes
