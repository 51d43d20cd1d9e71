"""What a URL of Redis says, and how long it takes to find out that nobody is there; and that no password gets into a sentence."""

import time
from collections.abc import Iterator
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.server import StreamServer

from comet.backplane.redis import RedisBackplane
from comet.backplane.redis_dial import Denied, dial, read, split
from comet.settings import Settings
from tests.harness import AMPLE


@pytest.fixture
def deaf() -> Iterator[list[Any]]:
    """Two addresses at which a connection is never accepted: their queues are full."""
    held: list[Any] = []
    listeners = []
    for host in ("127.0.0.1", "127.0.0.2"):
        listener = socket.socket()
        listener.bind((host, 0))
        listener.listen(0)
        listeners.append(listener)
        for _ in range(4):
            one = socket.socket()
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
            held.append(one)
    gevent.sleep(0.05)
    yield listeners
    for one in (*held, *listeners):
        one.close()


def test_all_addresses_of_a_host_together_have_one_time_out(deaf: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "gevent.socket.getaddrinfo", lambda *_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", one.getsockname()) for one in deaf] * 50
    )
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no connection within"):
        dial(read("redis://both"), ("both", 6379), 0.3, "test")
    assert 0.25 < time.monotonic() - began < AMPLE  # with a time-out each it would be half a minute


@pytest.mark.parametrize(
    "url", ["redis://:sec/ret@h", "redis://me:sec?ret@h", "redis://:sec#ret@h", "redis://:sec[ret@h", "rediss://h:sec"]
)
def test_a_password_that_is_not_encoded_is_not_said_again(url: str) -> None:
    with pytest.raises(ValueError, match="written %3A %2F") as error:
        RedisBackplane.of(Settings(backplane=url))
    assert "sec" not in str(error.value)


def test_a_redis_that_is_too_old_does_not_get_the_password_into_the_log() -> None:
    def serve(sock: Any, _: Any) -> None:
        sock.recv(1 << 16)
        sock.sendall(b"-ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `me`, `secret`, `SETNAME`, `comet`, \r\n")
        sock.recv(1)

    server = StreamServer(("127.0.0.1", 0), serve)
    server.start()
    with pytest.raises(Denied, match=r"Redis 6\.2") as error:
        target = read(f"redis://me:secret@127.0.0.1:{server.server_port}")
        dial(target, target.address, 1.0, "test")
    assert "secret" not in str(error.value)
    server.stop()


@pytest.mark.parametrize("url", ["", "h:6379", "http://h", "Redis://h", "unix+cluster:///path", "redis+cluster+cluster://h"])
def test_a_url_that_is_none_of_redis_is_told_what_there_is(url: str) -> None:
    with pytest.raises(ValueError, match=r"begins with one of redis://, .* rediss\+cluster://"):
        read(url)


@pytest.mark.parametrize("query", ["ssl_ca_certs=/nowhere", "ssl_certfile=/nowhere", f"ssl_ca_certs={__file__}"])
def test_a_file_of_tls_that_can_not_be_used_is_named(query: str) -> None:
    with pytest.raises(ValueError, match=f"{query} can't be used: "):
        read(f"rediss://:secret@h?{query}")


def test_a_cluster_is_said_by_the_scheme_alone() -> None:
    assert split("rediss+cluster://h") == (True, "rediss://h")
    assert split("redis://:a+cluster@h") == (False, "redis://:a+cluster@h")


def test_a_look_up_of_a_name_that_gets_no_thread_is_a_redis_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("gevent.socket.create_connection", no_thread)
    with pytest.raises(OSError, match="can't start new thread"):
        dial(read("redis://h"), ("h", 6379), 1.0, "test")


def test_what_is_no_redis_is_a_redis_that_is_away() -> None:
    def serve(sock: Any, _: Any) -> None:
        sock.recv(1 << 16)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    server = StreamServer(("127.0.0.1", 0), serve)
    server.start()
    try:
        with pytest.raises(OSError, match="does not speak the protocol of Redis"):
            dial(read(f"redis://127.0.0.1:{server.server_port}"), ("127.0.0.1", server.server_port), 5.0, "test")
    finally:
        server.stop()
