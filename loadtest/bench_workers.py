"""Part of make bench: several workers behind one address, and what the router between them costs.

Connections are spread by the kernel; `/healthz` says which worker one has come to, and the
next request on the same connection comes there too. So a publisher on one worker and a subscriber on
another can be had.
"""

import http.client
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from loadtest.generator import MARK, body
from loadtest.process import cpu, descendants, memory, server, worker
from loadtest.publisher import worker_of
from loadtest.service import SETTLE, Figure, Service, comet

LINES = 500
"""Publications a batch."""
PUBLISHERS = 4
"""Batches under way at the same time: one waits for its answer while the next is read."""
MANY = 60


def workers(clients: int, rounds: int) -> list[Figure]:
    """All figures."""
    return [*_across(), *_shared(clients, rounds), *_many()]


@contextmanager
def _connected(port: int) -> Iterator[tuple[http.client.HTTPConnection, http.client.HTTPConnection]]:
    """Two kept-alive connections, to two workers."""
    first: tuple[int, http.client.HTTPConnection] | None = None
    opened = []
    try:
        for _ in range(200):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            opened.append(connection)
            number = worker_of(connection)
            if first is None:
                first = number, connection
            elif first[0] != number:
                yield first[1], connection
                return
        raise RuntimeError("all connections came to one worker")
    finally:
        for connection in opened:
            connection.close()


def _across() -> list[Figure]:
    """Measure from a publisher on one worker to a subscriber on the other."""
    with comet("--workers", "2") as service:
        return [_batches(service), *_delays(service)]


def _batches(service: Service, batches: int = 100) -> Figure:
    total = batches * LINES * PUBLISHERS
    with worker("loadtest.publisher", str(service.port)) as load, _connected(service.port) as (publisher, subscriber):
        subscriber.request("GET", "/stream/across")
        assert subscriber.getresponse().status == 200
        pids = descendants(service.pid)
        before = sum(map(cpu, pids))
        began = time.monotonic()
        load.tell(do="publish", number=worker_of(publisher), channel="across", lines=LINES, batches=batches, connections=PUBLISHERS)
        read(subscriber.sock, total)
        seconds = time.monotonic() - began
        spent = sum(map(cpu, pids)) - before
        load.answer()
    note = f"{LINES} a batch, {PUBLISHERS} batches under way; {spent / total * 1e6:.1f} us of CPU a message, all processes"
    return Figure("batches from one worker to a subscriber on another", total / seconds, "/s", 30_000, 100_000, beside=note)


def read(sock: Any, total: int) -> None:
    """Until so many messages have come."""
    got = 0
    last = b""
    sock.settimeout(60)
    while got < total:
        data = sock.recv(1 << 18)
        if not data:
            raise EOFError(f"{got} of {total} messages came")
        got += data.count(MARK) + (last[-1:] == MARK[:1] and data[:1] == MARK[1:])
        last = data


def _delays(service: Service, times: int = 1000) -> list[Figure]:
    delays = []
    with _connected(service.port) as (publisher, subscriber):
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
        Figure("publish to delivery across workers, idle, p50", delays[len(delays) // 2], "ms", 2, low=True),
        Figure("publish to delivery across workers, idle, p99", delays[int(len(delays) * 0.99)], "ms", 10, low=True),
    ]


def _shared(clients: int, rounds: int) -> list[Figure]:
    """Deliveries a CPU second of all processes, beside one process without a router."""
    spent: dict[str, list[float]] = {"one": [], "two": []}
    with (
        comet() as one,
        comet("--workers", "2") as two,
        worker("loadtest.generator", str(one.port)) as load_one,
        worker("loadtest.generator", str(two.port)) as load_two,
    ):
        both = (("one", one, load_one), ("two", two, load_two))
        for _, service, load in both:
            load.ask(do="open", count=clients, path="/test/all", first="elcomes")
            service.wait_for("user:all", clients)
        time.sleep(SETTLE)
        for _ in range(rounds):
            for name, service, load in both:
                pids = descendants(service.pid)
                before = sum(map(cpu, pids))
                load.tell(do="count", total=clients)
                service.publish("user:all")
                load.answer()
                spent[name].append(sum(map(cpu, pids)) - before)
        answered = sorted(_seconds(lambda: two.request("GET", "/stats")) * 1000 for _ in range(100))
    alone, shared = (clients / statistics.median(spent[name]) for name in ("one", "two"))
    note = f"{shared:,.0f} beside {alone:,.0f} of one process"
    return [
        Figure("2 workers: deliveries a CPU second of all processes", shared / alone, "x", 0.9, beside=note),
        Figure(f"2 workers: GET /stats with {clients} clients, p99", answered[98], "ms", 10, low=True),
    ]


def _seconds(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _many() -> list[Figure]:
    """Sixty workers that have nothing to do."""
    began = time.monotonic()
    with server(["app.py", "--port", "0", "--workers", str(MANY)], "http://") as (pid, port):
        seconds = time.monotonic() - began
        with socket.create_connection(("127.0.0.1", port)):
            pass
        time.sleep(SETTLE)
        stats = Service(pid, port).request("GET", "/stats")
        each = [memory(one["pid"]) for one in stats["workers"]]
        assert len(each) == MANY
        note = f"all processes together {sum(map(memory, descendants(pid))) / 2**20:,.0f} MiB"
    return [
        Figure(f"{MANY} workers: seconds until ready", seconds, "s", 10, low=True),
        Figure(f"{MANY} workers: own memory of one", statistics.mean(each) / 2**20, "MiB", 8, low=True, beside=note),
    ]
