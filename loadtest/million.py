"""make million, make soak: a whole load test with everything around it, on one machine.

Checks what the machine allows, makes and loads the friends, starts the service with as many workers as its file limit
asks for, runs Locust with as many processes as theirs does, samples, shows how it goes, judges, writes the report, and ends
all that it started, whatever happens. With --host the service is somebody else's, on another machine.

Neighbours: `loadtest.plan`, `loadtest.locustfile` (which Locust runs), `loadtest.sampler`, `loadtest.report`.
"""

import http.client
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from loadtest import plan as plans
from loadtest.options import endpoints, sequels, target
from loadtest.process import ROOT, program
from loadtest.report import report
from loadtest.sampler import Sampler

READY = 120.0
"""Seconds that the service has to start."""

WEDGED = 120.0
"""Seconds without a line of Locust's master after which the test is over."""

SCARCE = 400_000_000
"""Bytes of memory: with less available the test is over, before the kernel ends whatever is largest."""

LINE = 10.0
"""Seconds between two lines of progress where there is no terminal."""


class Refused(Exception):
    """The test can't be run; the text says what to do."""


@dataclass(frozen=True)
class Order:
    """What is to be done; the flags of `python -m loadtest million`."""

    clients: int
    duration: float
    rate: float
    shape: str = "Million"
    then: str = ""
    endpoints: str = "test:49,stream:1"
    open_rate: float = 15_000.0
    senders: int = 1000
    churn: float = 0.001
    nap: float = 0.0
    """Of a swarm; 0: so that all processes together look a thousand times a second."""
    port: int = 8000
    apply: bool = False
    each: int = 15
    out: Path = Path(".million")
    host: str = ""
    friends: str = ""
    sources: str = ""
    service: str = ""
    """More flags for the service."""


def run(order: Order) -> int:
    """The exit status: 0 passed, 1 failed, 2 refused, 130 interrupted."""
    console = Console(highlight=False, soft_wrap=True)
    planned = plans.plan(order.clients, order.port, here=not order.host, senders=order.senders)
    console.print(planned.text())
    # SIGTERM ends it as Ctrl-C does, which a shell's background jobs inherit as ignored
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)
    try:
        prepare(planned, order, console)
        folder = order.out / time.strftime(f"run-%Y%m%d-%H%M%S-{order.clients}")
        folder.mkdir(parents=True)
        friends = data(order, console) if not order.host else order.friends
        failed = carry_out(order, planned, folder, friends, console)
    except Refused as refused:
        console.print(f"refused: {refused}", style="red")
        return 2
    except KeyboardInterrupt:
        console.print("interrupted: all that was started has ended", style="red")
        return 130
    except subprocess.CalledProcessError as error:
        console.print(f"{shlex.join(map(str, error.cmd))} failed: {error.stderr or f'status {error.returncode}'}", style="red")
        return 1
    document = report(folder)
    objections = [*failed, *document["objections"]]
    console.print(f"report: {folder / 'report.html'}")
    console.print("\n".join(["FAILED", *objections]) if objections else "PASSED", style="red" if objections else "green")
    return int(bool(objections))


def prepare(planned: plans.Plan, order: Order, console: Console) -> None:
    """See that it fits and that the kernel allows it. Raises Refused."""
    if planned.objections:
        raise Refused("; ".join(planned.objections))
    try:
        sequels(order.then)
        endpoints(order.endpoints)
        target(order.host, order.sources)
    except (ValueError, OSError) as error:
        raise Refused(str(error)) from None
    if order.host and order.friends and not Path(order.friends).is_file():
        raise Refused(f"--friends {order.friends}: there is no such file")
    if not order.host:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", order.port)) == 0:
                raise Refused(f"something listens on port {order.port} already")
    rows = plans.unmet(planned)
    if rows and order.apply:
        for line in plans.apply(rows):
            console.print(f"set: {line}")
        rows = plans.unmet(planned)
    for row in rows:
        line = f"{row.name} is {row.found}, wanted {row.wanted}: {row.why}. To set it: {' or '.join(row.set)}"
        console.print(line, style="red" if row.at_start else "yellow")
    if any(row.at_start for row in rows):
        raise Refused("the kernel does not allow it: set what is red, or have it set with APPLY=1 (--apply), as root")


def data(order: Order, console: Console) -> str:
    """The edge list, made and loaded once for each number of users."""
    folder = order.out / f"friends-{order.clients}-{order.each}"
    loaded, edges = folder / "loaded", folder / "friends.txt"
    if not loaded.exists():
        console.print(f"making the friends of {order.clients:,} users in {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        each = max(1, min(order.each, order.clients - 1))
        for command in (
            ["loadtest", "friends", "--users", str(order.clients), "--each", str(each), "--out", str(edges)],
            ["comet", "load-friends", str(edges), "--data", str(folder)],
        ):
            subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
        loaded.touch()
    return str(edges)


def carry_out(order: Order, planned: plans.Plan, folder: Path, friends: str, console: Console) -> list[str]:
    """The test; what went wrong with the programs themselves, a sentence each."""
    url = order.host or f"http://127.0.0.1:{order.port}"
    command = locust(order, planned, folder, friends, url)
    facts = {
        "command": f"python -m loadtest {shlex.join(sys.argv[1:])}",
        "locust": shlex.join(command),
        "plan": vars(planned),
        "shape": order.shape,
        "began": time.time(),
        "machine": machine(),
    }
    (folder / "run.json").write_text(json.dumps(facts, indent=1, default=str) + "\n")
    failed = []
    with ExitStack() as started:
        roots = {}
        if not order.host:
            service = started.enter_context(program(served(order, planned, Path(friends).parent), folder / "service.log"))
            wait_until_ready(service, order.port, folder)
            roots["service"] = service.pid
        # it is told the name of its shape by the environment: Locust loads the file before it reads flags
        load = started.enter_context(program(command, folder / "locust.log", COMET_SHAPE=order.shape))
        sampler = Sampler(folder / "samples.jsonl")
        sampler.roots |= roots | {"load": load.pid}
        started.callback(sampler.stop)
        sampler.start()
        seen = time.monotonic()
        with display(console, folder, sampler) as show:
            while load.poll() is None:
                time.sleep(1)
                if show():
                    seen = time.monotonic()
                if roots and service.poll() is not None:
                    failed.append(f"the service ended with status {service.returncode}: see {folder / 'service.log'}")
                    break
                if sampler.last and sampler.last["kernel"]["MemAvailable"] < SCARCE:
                    failed.append(f"less than {SCARCE / 1e6:.0f} MB of memory were left: fewer clients fit")
                    break
                if time.monotonic() - seen > WEDGED:
                    failed.append(f"Locust's master has said nothing for {WEDGED:.0f} s: see {folder / 'locust.log'}")
                    break
        console.print("ending what was started")
    if not (folder / "summary.json").exists():  # Locust writes it as it ends, also where it is ended
        raise Refused("; ".join(failed) or f"Locust did not run: see {folder / 'locust.log'}")
    return failed


def served(order: Order, planned: plans.Plan, folder: Path) -> list[str]:
    """The service's command line."""
    flags = ["--port", str(order.port), "--workers", "auto", "--clients", str(planned.clients), "--data", str(folder), "--grace", "3"]
    return ["app.py", *flags, *shlex.split(order.service)]


def locust(order: Order, planned: plans.Plan, folder: Path, friends: str, url: str) -> list[str]:
    """Locust's command line."""
    asked = {
        "clients": order.clients, "message-rate": order.rate, "seconds": order.duration, "senders": order.senders,
        "open-rate": order.open_rate, "endpoints": order.endpoints, "churn": order.churn, "nap": order.nap or plans.nap(planned.processes),
        "sources": order.sources,
        "then": order.then, "friends": friends, "out": folder,
    }  # fmt: skip
    flags = [word for name, value in asked.items() if value != "" for word in (f"--{name}", str(value))]
    port = str(free_port())
    meet = ["--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--master-host", "127.0.0.1", "--master-port", port]
    own = ["--headless", "--only-summary", "--processes", str(planned.processes), *meet, "--host", url]
    files = ["--csv", str(folder / "locust"), "--html", str(folder / "locust.html")]
    return ["-m", "locust", "-f", "loadtest/locustfile.py", *own, *files, *flags]


def free_port() -> int:
    """Return a port for Locust's master that nobody has. Any of a thousand: two runs that are started
    together would both find the first one free."""
    for port in random.sample(range(5557, 6557), 1000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise Refused("no port from 5557 to 6556 is free for Locust's master")


def wait_until_ready(service: "subprocess.Popen[bytes]", port: int, folder: Path) -> None:
    """Raises Refused."""
    until = time.monotonic() + READY
    while time.monotonic() < until and service.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/readyz")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass  # it does not listen yet, or ends
        finally:
            connection.close()
        time.sleep(0.2)
    last = (folder / "service.log").read_text().splitlines()[-5:]
    raise Refused("the service did not start:\n" + "\n".join(last))


def machine() -> str:
    """What it ran on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    system = os.uname()
    return f"{len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB, Linux {system.release}, Python {sys.version.split()[0]}"


@contextmanager
def display(console: Console, folder: Path, sampler: Sampler) -> Iterator[Any]:
    """Shows how it goes each time it is called; answers whether the master has said something new."""
    path = folder / "timeline.jsonl"
    at = 0
    lines: list[Mapping[str, Any]] = []
    told = 0.0

    def show() -> bool:
        nonlocal at, told
        if path.exists():
            with path.open() as file:
                file.seek(at)
                new = [line for line in file if line.endswith("\n")]
                at += sum(len(line) for line in new)
            lines[:] = [*lines[-1:], *map(json.loads, new)][-2:]
        else:
            new = []
        table = screen(lines, sampler.last)
        if console.is_terminal:
            live.update(table, refresh=True)
        elif time.monotonic() - told > LINE and lines:
            told = time.monotonic()
            console.print(" ".join(f"{name} {value}" for name, value in facts(lines, sampler.last)))
        return bool(new)

    with Live(Table.grid(), console=console, auto_refresh=False, transient=False) as live:
        yield show


def facts(lines: list[Mapping[str, Any]], sample: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is shown, name and text."""
    if not lines:
        return [("starting", "")]
    first, last = lines[0], lines[-1]
    seconds = max(0.5, last["time"] - first["time"])
    rates = {name: (last[name] - first[name]) / seconds for name in ("opened", "received", "sent")}
    shown = [
        ("section", last["section"]),
        ("clients", f"{last['open']:,} ({rates['opened']:,.0f}/s)"),
        ("messages/s", f"{rates['sent']:,.0f}"),
        ("deliveries/s", f"{rates['received']:,.0f}"),
    ]
    shown += [(f"p99 {kind}", f"{one['p99']:,.0f} ms") for kind, one in last["latencies"].items()]
    shown.append(("failures", f"{last['failures']:,}"))
    if "kernel" in sample:
        shown += [(name, f"{sample[name]['memory'] / 2**30:.2f} GiB") for name in ("service", "load") if name in sample]
        kernel = sample["kernel"]
        shown += [("slabs", f"{kernel['Slab'] / 2**30:.2f} GiB"), ("available", f"{kernel['MemAvailable'] / 2**30:.2f} GiB")]
    return shown


def screen(lines: list[Mapping[str, Any]], sample: Mapping[str, Any]) -> Table:
    """The same for a terminal."""
    table = Table.grid(padding=(0, 3))
    for name, text in facts(lines, sample):
        table.add_row(name, text)
    return table
