"""Part of make bench: two services with a Redis between them, all on this machine.

Each is one process, as a machine of its own would have several. What is published on the one is read by
subscribers on the other. Skipped where there is no ``redis-server``.
"""

import contextlib
import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from loadtest.bench_workers import LINES, PUBLISHERS, read
from loadtest.generator import body
from loadtest.process import cpu, worker
from loadtest.service import SETTLE, Figure, Service, comet

CHANNELS = 50_000
"""New ones that are joined together, as after a reconnect of everybody."""
EACH = 50
"""Channels a request joins."""


@contextlib.contextmanager
def redis() -> Iterator[tuple[int, int]]:
    """A redis-server that keeps nothing on disk: its process and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with TemporaryDirectory() as folder:
        process = subprocess.Popen(
            ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder], stdout=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 10
            while True:
                try:
                    memory(port)
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.02)
            yield process.pid, port
        finally:
            process.terminate()
            process.wait()


def memory(port: int) -> int:
    """Bytes that Redis has allocated."""
    with socket.create_connection(("127.0.0.1", port), 10) as sock:
        sock.sendall(b"INFO memory\r\n")
        text = b""
        while b"used_memory:" not in text or b"\r\n" not in text.split(b"used_memory:")[1]:
            data = sock.recv(65536)
            if not data:
                raise ConnectionResetError
            text += data
    return int(text.split(b"used_memory:")[1].split(b"\r\n")[0])


def over_redis(_clients: int, _rounds: int) -> list[Figure]:
    """All figures."""
    if shutil.which("redis-server") is None:
        print("  redis-server is not installed: apt-get install redis-server", file=sys.stderr)
        return []
    figures = []
    with redis() as (pid, port):
        flags = ("--backplane", f"redis://127.0.0.1:{port}")
        with comet(*flags) as near, comet(*flags) as far:
            figures += [_batches(near, far, pid), *_delays(near, far)]
        with comet(*flags) as near, comet(*flags) as far:
            figures += _joins(near, far, port)
    return figures


def _batches(near: Service, far: Service, pid: int, batches: int = 100) -> Figure:
    total = batches * LINES * PUBLISHERS
    subscriber = http.client.HTTPConnection("127.0.0.1", far.port, timeout=60)
    with worker("loadtest.publisher", str(near.port)) as load, contextlib.closing(subscriber):
        subscriber.request("GET", "/stream/across")
        assert subscriber.getresponse().status == 200
        before = [cpu(one) for one in (near.pid, far.pid, pid)]
        began = time.monotonic()
        load.tell(do="publish", number=0, channel="across", lines=LINES, batches=batches, connections=PUBLISHERS)
        read(subscriber.sock, total)
        seconds = time.monotonic() - began
        spent = [(cpu(one) - then) / total * 1e6 for one, then in zip((near.pid, far.pid, pid), before, strict=True)]
        load.answer()
    note = f"us of CPU a message: publisher's node {spent[0]:.1f}, subscriber's {spent[1]:.1f}, Redis {spent[2]:.1f}"
    return Figure("Redis: batches from one node to a subscriber on another", total / seconds, "/s", 20_000, 60_000, beside=note)


def _delays(near: Service, far: Service, times: int = 1000) -> list[Figure]:
    delays = []
    publisher, subscriber = (http.client.HTTPConnection("127.0.0.1", one.port, timeout=60) for one in (near, far))
    with contextlib.closing(publisher), contextlib.closing(subscriber):
        subscriber.request("GET", "/stream/one")
        stream = subscriber.getresponse()
        stream.readline()
        for _ in range(times):
            began = time.monotonic()
            publisher.request("POST", "/publish/one", body())
            stream.readline()
            delays.append((time.monotonic() - began) * 1000)
            publisher.getresponse().read()
            time.sleep(0.002)
    delays.sort()
    return [
        Figure("Redis: publish to delivery across nodes, idle, p50", delays[len(delays) // 2], "ms", 3, low=True),
        Figure("Redis: publish to delivery across nodes, idle, p99", delays[int(len(delays) * 0.99)], "ms", 15, low=True),
    ]


def _joins(near: Service, far: Service, port: int) -> list[Figure]:
    """Half of the channels on each node, many requests at once; until the last has its answer."""
    before = memory(port)
    waiting: list[socket.socket] = []
    began = time.monotonic()
    for start in range(0, CHANNELS, EACH):
        sock = socket.create_connection(("127.0.0.1", (near, far)[start // EACH % 2].port))
        names = ",".join(f"user:{number}" for number in range(start, start + EACH))
        sock.sendall(f"GET /stream/{names} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
        waiting.append(sock)
    for sock in waiting:
        sock.settimeout(60)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200"), "refused"
    seconds = time.monotonic() - began
    time.sleep(SETTLE)
    each = (memory(port) - before) / CHANNELS
    for sock in waiting:
        sock.close()
    return [
        Figure(f"Redis: {CHANNELS:,} new channels joined, {EACH} a request", seconds, "s", 5, low=True),
        Figure("Redis: its memory a channel with a subscriber and no history", each, "bytes", 400, low=True),
    ]


if __name__ == "__main__":
    for one in over_redis(0, 0):
        print(json.dumps(vars(one) | {"verdict": one.verdict}))
    print(Path(__file__).name, "done", file=sys.stderr)
