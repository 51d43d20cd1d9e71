"""Clients that mean harm, some of each kind, in a process of their own, until it is ended:
``python -m tests.behaviour.hostile <port> <of each kind> <seed>``.

Each kind is a function that does its worst on one connection, and is called again whenever that ends. It writes a line when all have
begun. `tests.behaviour.test_chaos` runs them beside its load.
"""

import random
import socket as plain
import sys
from collections.abc import Callable
from typing import Any, Final

import gevent
from gevent import socket

PIECE: Final = 1 << 16
BIG: Final = "hostile-history"
"""A channel with much history, which `fill` publishes."""

PAUSE: Final = 0.02
"""Seconds before a connection that was ended is made anew: so many a second are 50 a client."""


class Attacker:
    """One of a kind, on the service's port."""

    def __init__(self, port: int, rng: random.Random) -> None:
        self._port = port
        self.rng = rng

    def connect(self, receive: int = 0) -> Any:
        """A connection; `receive` is the bytes of the buffer of what it has not read."""
        sock = socket.socket()
        if receive:
            sock.setsockopt(plain.SOL_SOCKET, plain.SO_RCVBUF, receive)
        sock.connect(("127.0.0.1", self._port))
        return sock

    def name(self) -> str:
        """A channel that nobody else uses."""
        return f"h{self.rng.getrandbits(60):x}"


def get(path: str) -> bytes:
    """The head of a request."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def ends(sock: Any) -> None:
    """Read until the other side closes."""
    while sock.recv(PIECE):
        pass


def reads_nothing(one: Attacker) -> None:
    """Ask for all history, and never read."""
    sock = one.connect(4096)
    sock.sendall(get(f"/stream/{BIG}?since=oldest"))
    gevent.sleep(3600)


def drips_reads(one: Attacker) -> None:
    """Ask for all history, and read it a byte at a time."""
    sock = one.connect(4096)
    sock.sendall(get(f"/events/{BIG}?since=oldest"))
    while sock.recv(1):
        gevent.sleep(0.5)


def polls_all(one: Attacker) -> None:
    """Poll all history again and again."""
    sock = one.connect()
    sock.sendall(get(f"/poll/{BIG}?since=oldest&timeout=0"))
    sock.recv(PIECE)
    gevent.sleep(0.2)


def talks(one: Attacker) -> None:
    """Send on while it listens."""
    sock = one.connect()
    sock.sendall(get(f"/events/{one.name()}"))
    while True:
        sock.sendall(b"x" * 4096)
        gevent.sleep(0.01)


def drips_head(one: Attacker) -> None:
    """Send a head that never ends."""
    sock = one.connect()
    sock.sendall(b"GET /poll/a HTTP/1.1\r\n")
    while True:
        sock.sendall(b"X-A: b\r\n")
        gevent.sleep(0.2)


def drips_body(one: Attacker) -> None:
    """Send a large body slowly."""
    sock = one.connect()
    sock.sendall(b"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8000000\r\n\r\n")
    while True:
        sock.sendall(b"x" * 1000)
        gevent.sleep(0.05)


def sends_one_byte_chunks(one: Attacker) -> None:
    """Send a body in chunks of a byte."""
    sock = one.connect()
    sock.sendall(b"POST /publish/a HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        sock.sendall(b"1\r\nx\r\n" * 2000)
        gevent.sleep(0.05)


def makes_channels(one: Attacker) -> None:
    """Listen for a moment to names that nobody else has."""
    sock = one.connect()
    for _ in range(100):
        timeout = one.rng.choice(["0", "0.01"])
        sock.sendall(get("/poll/" + ",".join(one.name() for _ in range(64)) + f"?timeout={timeout}"))
        if not sock.recv(PIECE):
            return
        gevent.sleep(0.05)


def comes_and_goes(one: Attacker) -> None:
    """Open a stream and close it."""
    sock = one.connect()
    sock.sendall(get(f"/stream/{one.name()}"))
    sock.recv(PIECE)


def pipelines(one: Attacker) -> None:
    """Ask for much at once, and read nothing."""
    sock = one.connect(4096)
    sock.sendall(get("/healthz") * 2000)
    gevent.sleep(5)


def is_no_client(one: Attacker) -> None:
    """Send what is no request."""
    sock = one.connect()
    sock.sendall(one.rng.randbytes(2000))
    ends(sock)


KINDS: Final[tuple[Callable[[Attacker], None], ...]] = (
    reads_nothing, drips_reads, polls_all, talks, drips_head, drips_body, sends_one_byte_chunks, makes_channels, comes_and_goes, pipelines,
    is_no_client,
)  # fmt: skip


def fill(port: int) -> None:
    """Have much history on `BIG`: 20 MB."""
    sock = socket.create_connection(("127.0.0.1", port))
    body = b"y" * 60_000
    for _ in range(350):
        sock.sendall(b"POST /publish/%b HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (BIG.encode(), len(body), body))
        assert sock.recv(PIECE).startswith(b"HTTP/1.1 201"), "it is not published"
    sock.close()


def main(port: int, each: int, seed: int) -> None:
    """Do harm."""
    fill(port)

    def again(kind: Callable[[Attacker], None], rng: random.Random) -> None:
        while True:
            try:
                kind(Attacker(port, rng))
            except OSError:  # which is what they are there for
                pass
            gevent.sleep(PAUSE)

    several = [gevent.spawn(again, kind, random.Random(f"{seed} {kind.__name__} {number}")) for kind in KINDS for number in range(each)]
    gevent.sleep(0.1)
    print("begun", flush=True)  # noqa: T201
    gevent.joinall(several)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
