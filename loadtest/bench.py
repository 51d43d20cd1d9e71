"""make bench: what a client costs and how fast it is served, beside two baselines, in one run.

    python -m loadtest.bench [--clients 15000] [--rounds 25] [--json FILE]

The baselines run on the same machine in the same minutes: stock gevent.pywsgi with bottle
(`loadtest.baseline_pywsgi`), and the plain loop, Python's `socket.send` over as many sockets with no
server at all (`loadtest.plain_loop`). Deliveries are timed in turn with the plain loop, round by
round, and their medians compared: only ratios within one run mean anything on a shared machine.

Memory is the difference of the server's proportional set size, 5 s after the last connect. A
delivery is timed from before the publish until the load generator has read the last copy out of the
last socket. The generator is a process of its own on the other core; `load` is its share of a CPU
while it counted, and near 1.0 it is the limit and not the server.
"""

import argparse
import dataclasses
import http.client
import json
import os
import platform
import statistics
import sys
import threading
import time
from pathlib import Path

from comet.kernel.limits import raise_file_limit
from loadtest.baseline_nchan import installed, nchan
from loadtest.bench_friends import friends
from loadtest.bench_redis import over_redis
from loadtest.bench_workers import workers
from loadtest.generator import MARK, body
from loadtest.process import cpu, memory, server, worker
from loadtest.service import SETTLE, Figure, Service, comet, held

HEARTBEAT, DEFAULT_HEARTBEAT = 2.0, 40.0
"""Seconds between two on a silent stream: in this bench, and by default."""

BEAT = "\r\n:\n\r\n"
"""Ends each on /events: a chunk's size, a comment, its end."""


def sleeping(clients: int, *flags: str) -> list[Figure]:
    """Bytes a waiting client, by endpoint, each on a channel of its own."""
    figures = []
    rates = []
    for path, first in (("/test/{i}", "elcomes"), ("/events/c{i}", "retry"), ("/poll/c{i}?timeout=300", "")):
        with comet(*flags) as service, worker("loadtest.generator", str(service.port)) as load:
            each, rate = held(service, load, clients, path, first)
            name = path.split("/")[1]
            figures.append(Figure(f"bytes a sleeping client on /{name}", each, "bytes", 700, 350, low=True))
            if first:
                rates.append(rate)
            if name == "test":
                before = memory(service.pid) - each * clients
                load.tell(do="count", total=clients)
                line = body().decode()
                for start in range(0, clients, 1000):
                    lines = [json.dumps({"channel": f"user:{i}", "data": line}) for i in range(start, min(start + 1000, clients))]
                    service.request("POST", "/publish", "\n".join(lines).encode())
                load.answer()
                time.sleep(SETTLE)
                after = (memory(service.pid) - before) / clients
                figures.append(Figure("the same on /test after a message each", after, "bytes", 1500, 800, low=True))
    figures.append(Figure("clients opened a second", statistics.median(rates), "/s", 10_000, 18_000))
    return figures


def stock(clients: int, rounds: int) -> list[Figure]:
    """What stock pywsgi with bottle needs for the same."""
    with (
        server(["-m", "loadtest.baseline_pywsgi"], "listening on ") as (pid, port),
        worker("loadtest.generator", str(port)) as load,
    ):
        service = Service(pid, port)
        each, rate = held(service, load, clients, "/test/{i}", "welcome")
        speeds = []
        for _ in range(rounds):
            load.tell(do="count", total=clients)
            began = time.monotonic()
            service.request("POST", "/all", body())
            speeds.append(clients / (load.answer()["at"] - began))
    return [
        Figure("stock pywsgi + bottle: bytes a client", each, "bytes"),
        Figure("stock pywsgi + bottle: deliveries", statistics.median(speeds), "/s"),
        Figure("stock pywsgi + bottle: opened a second", rate, "/s"),
    ]


def in_c(clients: int, rounds: int) -> list[Figure]:
    """What nchan (nginx, C) needs for the same, where it is installed."""
    if not installed():
        print("  nginx with nchan is not installed: apt-get install nginx-light libnginx-mod-nchan", file=sys.stderr)
        return []
    with nchan(19_000) as (pids, port), worker("loadtest.generator", str(port)) as load:
        service = Service(pids[0], port)
        before = sum(map(memory, pids))
        seconds = load.ask(do="open", count=clients, path="/sub/c{i}", first="HTTP/1.1 200")["seconds"]
        time.sleep(SETTLE)
        each = (sum(map(memory, pids)) - before) / clients
        load.ask(do="close")
        load.ask(do="open", count=clients, path="/sub/all", first="HTTP/1.1 200")
        speeds = []
        for _ in range(rounds):
            load.tell(do="count", total=clients)
            began = time.monotonic()
            service.post("/pub/all", body())
            speeds.append(clients / (load.answer()["at"] - began))
    return [
        Figure("nchan: bytes a client", each, "bytes"),
        Figure("nchan: deliveries", statistics.median(speeds), "/s"),
        Figure("nchan: opened a second", clients / seconds, "/s"),
    ]


def deliveries(clients: int, rounds: int, off: bool = False) -> list[Figure]:
    """One message to all, against the plain loop, in turn; then twenty together."""
    flags = ["--hibernate", "off"] if off else []
    chunk = b"%x\r\n%b\n\r\n" % (len(body()) + 1, body())
    ours: list[float] = []
    plain: list[float] = []
    twenty: list[float] = []
    load_share: list[float] = []
    figures = []
    with comet(*flags) as service, worker("loadtest.generator", str(service.port)) as load, worker("loadtest.plain_loop") as loop:
        port = loop.answer()["port"]
        with worker("loadtest.generator", str(port)) as plain_load:
            each, _rate = held(service, load, clients, "/test/all", "elcomes")
            loop.tell(do="accept", count=clients)
            plain_load.ask(do="open", count=clients, path="/{i}", first="welcome")
            loop.answer()
            for _ in range(rounds):
                plain_load.tell(do="count", total=clients)
                began = loop.ask(do="send", times=1, data=chunk.decode())["began"]
                plain.append(clients / (plain_load.answer()["at"] - began))
                load.tell(do="count", total=clients)
                began = time.monotonic()
                service.publish("user:all")
                answer = load.answer()
                ours.append(clients / (answer["at"] - began))
                load_share.append(answer["cpu"] / (answer["at"] - began))
                if not off:
                    load.tell(do="count", total=clients * 20)
                    began = time.monotonic()
                    service.publish("user:all", times=20)
                    twenty.append(clients * 20 / (load.answer()["at"] - began))
    speed, base = statistics.median(ours), statistics.median(plain)
    note = f"{speed:,.0f}/s beside {base:,.0f}/s; load {statistics.median(load_share):.2f}"
    if off:
        figures.append(Figure("--hibernate off: bytes a client", each, "bytes", 9000, 7500, low=True))
        figures.append(Figure("--hibernate off: deliveries against the plain loop", speed / base, "x", 0.6, 0.75, beside=note))
    else:
        figures.append(Figure("deliveries against the plain loop", speed / base, "x", 0.85, 0.95, beside=note))
        ratio = statistics.median(twenty) / speed
        figures.append(
            Figure("20 messages together, against one", ratio, "x", 10, 18, beside=f"{statistics.median(twenty):,.0f} messages/s")
        )
    return figures


def cycles(clients: int, rounds: int) -> list[Figure]:
    """Long-poll cycles (deliver, answer, re-poll parked) a CPU second of the server, against the plain
    loop's sends a CPU second."""
    with comet() as service, worker("loadtest.generator", str(service.port)) as load, worker("loadtest.plain_loop") as loop:
        port = loop.answer()["port"]
        with worker("loadtest.generator", str(port)) as plain_load:
            loop.tell(do="accept", count=clients)
            plain_load.ask(do="open", count=clients, path="/{i}", first="welcome")
            loop.answer()
            load.ask(do="open", count=clients, path="/poll/all", first="")
            service.wait_for("all", clients)
            spent = plain_spent = 0.0
            for _ in range(rounds):
                plain_load.tell(do="count", total=clients)
                plain_spent += loop.ask(do="send", times=1, data=body().decode())["cpu"]
                plain_load.answer()
                before = cpu(service.pid)
                load.tell(do="cycle", total=clients)
                service.publish("all")
                load.answer()
                service.wait_for("all", clients)
                spent += cpu(service.pid) - before
    ours, plain = clients * rounds / spent, clients * rounds / plain_spent
    note = f"{ours:,.0f} beside {plain:,.0f} sends a CPU second; nchan reaches 0.79"
    return [Figure("long-poll cycles a CPU second, against the plain loop", ours / plain, "x", 0.4, 0.8, beside=note)]


def direct(clients: int, seconds: float) -> list[Figure]:
    """The delay of a message to one client while broadcasts to all others are asked 100 times a second."""
    delays: list[float] = []
    with comet() as service, worker("loadtest.generator", str(service.port)) as load:
        load.ask(do="open", count=clients, path="/test/all", first="elcomes")
        listener = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        listener.request("GET", "/test/one")
        stream = listener.getresponse()
        stream.readline()
        publisher = Service(service.pid, service.port)
        over = threading.Event()
        broadcasts = 0

        def broadcast() -> None:
            nonlocal broadcasts
            following = time.monotonic()
            while not over.is_set():
                service.publish("user:all")
                broadcasts += 1
                following += 0.01
                over.wait(max(0.0, following - time.monotonic()))

        thread = threading.Thread(target=broadcast)
        thread.start()
        ended = time.monotonic() + seconds
        load.tell(do="drain", seconds=seconds + 1)
        while time.monotonic() < ended:
            began = time.monotonic()
            publisher.publish("user:one")
            stream.readline()
            delays.append((time.monotonic() - began) * 1000)
            time.sleep(0.005)
        over.set()
        thread.join()
        drained = load.answer()["count"]
    delays.sort()
    p99 = delays[int(len(delays) * 0.99)]
    note = f"p50 {statistics.median(delays):.2f} ms; {broadcasts / seconds:.0f} broadcasts/s taken, {drained / seconds:,.0f} deliveries/s"
    return [Figure("a direct message during broadcasts, p99", p99, "ms", 6, 2.5, low=True, beside=note)]


def heartbeats(clients: int, seconds: float) -> list[Figure]:
    """The server's CPU for a heartbeat on /events, while nothing is published."""
    with comet("--heartbeat", str(HEARTBEAT)) as service, worker("loadtest.generator", str(service.port)) as load:
        load.ask(do="open", count=clients, path="/events/c{i}", first="retry")
        load.ask(do="drain", seconds=2 * HEARTBEAT)
        before = cpu(service.pid)
        beats = load.ask(do="drain", seconds=seconds, mark=BEAT)["count"]
        each = (cpu(service.pid) - before) / beats
    million = 1_000_000 / DEFAULT_HEARTBEAT
    note = (
        f"{beats / seconds:,.0f}/s to {clients} sleepers at --heartbeat {HEARTBEAT:g}; "
        f"a million at {DEFAULT_HEARTBEAT:g}: {million:,.0f}/s, {each * million:.2f} of a core"
    )
    return [Figure("a heartbeat on /events, CPU", each * 1e6, "us", 30, 15, low=True, beside=note)]


def collections(clients: int) -> list[Figure]:
    """The longest stop for garbage collection, with clients that have each had a message."""
    with comet() as service, worker("loadtest.generator", str(service.port)) as load:
        load.ask(do="open", count=clients, path="/test/{i}", first="elcomes")
        load.tell(do="count", total=clients)
        for start in range(0, clients, 1000):
            lines = [json.dumps({"channel": f"user:{i}", "data": body().decode()}) for i in range(start, min(start + 1000, clients))]
            service.request("POST", "/publish", "\n".join(lines).encode())
        load.answer()
        longest = service.request("GET", "/stats")["gc_longest_seconds"]
    return [Figure(f"longest stop for garbage collection, {clients} clients", longest * 1000, "ms", 20, 8, low=True)]


def table(figures: list[Figure]) -> str:
    """The figures as a Markdown table."""
    lines = ["| figure | value | at least | aim | | |", "| --- | ---: | ---: | ---: | --- | --- |"]
    for one in figures:
        digits = 2 if abs(one.value) < 100 else 0
        bounds = ["" if bound is None else f"{bound:,g}" for bound in (one.least, one.aim)]
        lines.append(f"| {one.name} | {one.value:,.{digits}f} {one.unit} | {bounds[0]} | {bounds[1]} | {one.verdict} | {one.beside} |")
    return "\n".join(lines)


def main() -> int:
    """Run all parts and print; the exit status is 1 when a bound was missed."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure comet beside its baselines.")
    parser.add_argument("--clients", type=int, default=15000, help="clients of each part (default 15000)")
    parser.add_argument("--rounds", type=int, default=25, help="broadcasts of each kind (default 25)")
    parser.add_argument(
        "--parts",
        default="sleeping,deliveries,cycles,direct,heartbeats,collections,off,stock,nchan,workers,friends,redis",
        help="which, comma-separated",
    )
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    options = parser.parse_args()
    raise_file_limit()
    clients, rounds = options.clients, options.rounds
    parts = {
        "sleeping": lambda: sleeping(clients),
        "deliveries": lambda: deliveries(clients, rounds),
        "cycles": lambda: cycles(clients, rounds),
        "direct": lambda: direct(clients, 10.0),
        "heartbeats": lambda: heartbeats(clients, 20.0),
        "collections": lambda: collections(min(19_000, clients + 4000)),
        "off": lambda: deliveries(clients, rounds, off=True),
        "stock": lambda: stock(clients, rounds),
        "nchan": lambda: in_c(clients, rounds),
        "workers": lambda: workers(clients, rounds),
        "friends": lambda: friends(clients, rounds),
        "redis": lambda: over_redis(clients, rounds),
    }
    figures: list[Figure] = []
    for name in options.parts.split(","):
        print(f"… {name}", file=sys.stderr, flush=True)
        figures += parts[name]()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"
    print(f"{clients} clients, messages of {len(body())} bytes (ending in {MARK.decode()}); {machine}\n\n{table(figures)}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "figures": [dataclasses.asdict(one) for one in figures]}, indent=1) + "\n")
    return int(any(one.verdict == "MISSED" for one in figures))


if __name__ == "__main__":
    sys.exit(main())
