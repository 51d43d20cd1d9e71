"""Whatever ends, stops or fills up, under load: nothing acknowledged is lost, nothing comes twice, and nobody is told a
gap but for a new router. A real service of three workers, and `tests.behaviour.swarm` as its clients, publishers and judge.

Each scenario is shorter in CI. In full, as `make chaos` runs them and prints what came of them:
``COMET_CHAOS=full``; ``COMET_CHAOS_SEED=7`` repeats one seed.
"""

import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import msgspec
import pytest
from gevent import subprocess as green

from comet.router import MAX_WAITING
from tests.behaviour.swarm import PATIENCE, Report
from tests.behaviour.test_supervisor import Service, alive, children, of
from tests.harness import ROOT, copy_code, wait_until

FULL = os.environ.get("COMET_CHAOS") == "full"

SEEDS = [int(os.environ["COMET_CHAOS_SEED"])] if "COMET_CHAOS_SEED" in os.environ else [1, 2]
"""The clients of odd ones sleep, those of even ones keep a greenlet each."""

WORKERS = 3
STOPPED = 5.0 if FULL else 2.5
"""Seconds that a worker is stopped."""


class Load(NamedTuple):
    """What the swarm does; about ten clients a channel."""

    clients: int
    channels: int
    publishers: int
    rate: float
    size: int
    seconds: float


LOAD = Load(3000, 300, 60, 500, 100, 30.0) if FULL else Load(300, 30, 30, 150, 100, 5.0)

MANY_BYTES = LOAD._replace(size=10_000)

HOSTILE = 20 if FULL else 2
"""Clients of each kind of `tests.behaviour.hostile`."""

LEAST_P99 = 0.02 if FULL else 0.2
"""Seconds. Below, the p99 of a direct message is the machine's own: what else runs on two cores, other tests in CI."""

FULL_QUEUE = MAX_WAITING if FULL else 1 << 20
"""Bytes that the router lets wait for a worker; in CI the code is changed, so that less load will do."""


class Swarm:
    """The process of `tests.behaviour.swarm`, obeying."""

    def __init__(self, addresses: Sequence[str], seed: int) -> None:
        self.process = green.Popen(
            [sys.executable, "-m", "tests.behaviour.swarm", ",".join(addresses), str(seed)], cwd=ROOT, stdin=green.PIPE, stdout=green.PIPE
        )

    def order(self, do: str, **more: Any) -> Any:
        """What it answers."""
        self.process.stdin.write(msgspec.json.encode({"do": do, **more}) + b"\n")
        self.process.stdin.flush()
        with gevent.Timeout(2 * PATIENCE):
            line = self.process.stdout.readline()
        assert line, f"the swarm ended at {do}"
        return msgspec.json.decode(line)

    def report(self, do: str) -> Report:
        """An order that is answered with one."""
        return msgspec.convert(self.order(do), Report)

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        try:
            self.process.wait(5)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self.process.stdout.close()


class Chaos:
    """A service under load. `go` on for so long; `done` judges."""

    def __init__(self, stack: ExitStack, name: str, seed: int, folder: Path, load: Load = LOAD, kind: type[Service] = Service) -> None:
        self.name = name
        self.random = random.Random(seed)
        self.load = load
        self.service = kind(
            folder / "service.log", "--workers", str(WORKERS), "--max-per-address", "10000", "--retry", "200", "--hang-limit", "30",
            "--history-size", "5000", "--history-bytes", str(2 << 30), "--max-keys", "1000000", "--grace", "5",
            "--hibernate", "on" if seed % 2 else "off",
        )  # fmt: skip
        stack.callback(self.service.close)
        self.swarm = Swarm([f"127.0.0.1:{self.service.port}"], seed)
        stack.callback(self.swarm.close)
        answer = self.swarm.order("begin", **{name: value for name, value in load._asdict().items() if name != "seconds"})
        assert answer == {"clients": load.clients}
        self._until = time.monotonic() + load.seconds
        gevent.sleep(0.5)

    def going(self) -> bool:
        """There is time left."""
        return time.monotonic() < self._until

    def left(self) -> float:
        """So many seconds."""
        return max(0.0, self._until - time.monotonic())

    def worker(self) -> int:
        """A random worker's process."""
        workers: dict[int, int] = wait_until(self.service.workers)
        return self.random.choice([workers[number] for number in sorted(workers)])

    def settle(self) -> Report:
        """What came of it when all has come; nothing may be lost or doubled whatever happened."""
        gevent.sleep(self.left())
        report = self.swarm.report("settle")
        self.show(report)
        assert report.wrong == [], report
        assert (report.lost, report.doubled) == (0, 0), report
        assert report.sent == report.acknowledged >= self.load.rate * self.load.seconds * 0.8, report
        return report

    def show(self, report: Report) -> None:
        """For whoever runs it."""
        gaps = ", ".join(f"{number} told {count}" for count, number in enumerate(report.gaps) if number)
        print(  # noqa: T201
            f"\n{self.name}: {report.clients} clients, {report.sent} messages sent in {report.seconds:.1f} s, {report.acknowledged} acknowledged; "
            f"received {report.received} (due {report.due}), lost {report.lost}, doubled {report.doubled}, gaps: {gaps}; "
            f"before a gap {report.covered}, in two epochs {report.twice}; longest outage of a client {report.outage:.2f} s, of a publisher {report.publishing:.2f} s; "
            f"came back {report.came_back} times; met {report.answers}; ended {report.endings}; "
            f"swarm: {100 * report.cpu:.0f} % of a core, late by at most {report.late:.2f} s",
            flush=True,
        )

    def end(self) -> None:
        """It stops cleanly and leaves nothing."""
        assert self.service.end(signal.SIGTERM) == 0, self.service.log.read_text()
        self.healthy()

    def healthy(self) -> None:
        """Nothing is left but a log without surprises."""
        log = self.service.log.read_text()
        assert not alive(self.service.mark)
        assert "Traceback" not in log, log
        assert "giving up" not in log, log


Begin = Callable[..., Chaos]


@pytest.fixture
def begin(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Begin]:
    with ExitStack() as stack:
        yield lambda seed, *more: Chaos(stack, request.node.name, seed, tmp_path, *more)


seeded = pytest.mark.parametrize("seed", SEEDS)


def no_gaps(report: Report) -> None:
    """Nobody was told one."""
    assert report.gaps == [report.clients], report
    assert report.received == report.due, report


@seeded
def test_workers_are_killed_every_second(begin: Begin, seed: int) -> None:
    chaos = begin(seed)
    kills = 0
    while chaos.going():
        os.kill(chaos.worker(), signal.SIGKILL)
        kills += 1
        gevent.sleep(1)
    report = chaos.settle()
    no_gaps(report)
    assert report.came_back > kills * LOAD.clients / WORKERS / 4
    assert chaos.service.counts()["worker_restarts"] == kills >= LOAD.seconds - 2
    chaos.end()


@seeded
def test_a_worker_is_stopped(begin: Begin, seed: int) -> None:
    chaos = begin(seed)
    while chaos.left() > STOPPED:
        pid = chaos.worker()
        os.kill(pid, signal.SIGSTOP)
        gevent.sleep(STOPPED)
        os.kill(pid, signal.SIGCONT)
        gevent.sleep(1)
    report = chaos.settle()
    no_gaps(report)
    assert report.outage > STOPPED - 0.5
    assert chaos.service.counts()["worker_restarts"] == 0
    chaos.end()


@seeded
def test_the_service_is_reloaded_twice(begin: Begin, seed: int) -> None:
    chaos = begin(seed)
    for count in (1, 2):
        chaos.service.process.send_signal(signal.SIGHUP)
        wait_until(lambda count=count: chaos.service.counts()["generation"] == 1 + count and not chaos.service.workers(count))  # type: ignore[misc]
    report = chaos.settle()
    no_gaps(report)
    assert chaos.service.counts()["failed_reloads"] == 0
    chaos.end()


@seeded
def test_too_much_waits_for_a_worker_that_does_not_read(begin: Begin, seed: int, tmp_path: Path) -> None:
    chaos = begin(seed, MANY_BYTES, of(changed(tmp_path)) if FULL_QUEUE != MAX_WAITING else Service)
    while chaos.left() > STOPPED:
        pid = chaos.worker()
        before = chaos.swarm.order("status")["acknowledged"]
        os.kill(pid, signal.SIGSTOP)
        gevent.sleep(STOPPED)
        after = chaos.swarm.order("status")["acknowledged"]
        os.kill(pid, signal.SIGCONT)
        assert (after - before) * MANY_BYTES.size > 1.1 * FULL_QUEUE, "not enough to fill it"
        gevent.sleep(2)
    no_gaps(chaos.settle())
    assert chaos.service.counts()["worker_restarts"] == 0
    chaos.end()


def changed(folder: Path) -> Path:
    """A copy of the code whose router lets less wait."""
    copy = copy_code(folder / "code")
    path = copy / "comet" / "router.py"
    text = path.read_text()
    assert "MAX_WAITING = 16 << 20\n" in text
    path.write_text(text.replace("MAX_WAITING = 16 << 20\n", f"MAX_WAITING = {FULL_QUEUE}\n"))
    return copy


@seeded
def test_the_router_is_killed(begin: Begin, seed: int) -> None:
    chaos = begin(seed)
    kills = 0
    while chaos.left() > 3:
        gevent.sleep(chaos.random.uniform(0, 2))
        os.kill(chaos.service.router(), signal.SIGKILL)
        kills += 1
        gevent.sleep(6)
    report = chaos.settle()
    assert report.gaps == [0] * kills + [report.clients], report
    assert report.covered < 0.2 * kills * LOAD.rate * LOAD.clients / LOAD.channels, "more than what was on its way when a router was killed"
    assert chaos.service.counts()["router_restarts"] == kills
    chaos.end()


@seeded
def test_all_that_leaves_the_router_alone_at_once(begin: Begin, seed: int) -> None:
    chaos = begin(seed)
    stopped: dict[int, float] = {}

    def go_on(until: float) -> None:
        for pid in [pid for pid, due in stopped.items() if due <= until]:
            del stopped[pid]
            with suppress(ProcessLookupError):  # it was killed meanwhile
                os.kill(pid, signal.SIGCONT)

    while chaos.going():
        match chaos.random.choice(["kill", "kill", "stop", "stop", "reload", "fork"]):
            case "kill":
                os.kill(chaos.worker(), signal.SIGKILL)
            case "stop":
                pid = chaos.worker()
                os.kill(pid, signal.SIGSTOP)
                stopped[pid] = time.monotonic() + chaos.random.uniform(0.1, STOPPED)
            case "reload":
                chaos.service.process.send_signal(signal.SIGHUP)
            case "fork":
                with suppress(OSError, IndexError):  # there may be none for a moment
                    os.kill(chaos.random.choice([pid for pid in children(chaos.service.process.pid) if children(pid)]), signal.SIGKILL)
        gevent.sleep(chaos.random.uniform(0, 2))
        go_on(time.monotonic())
    go_on(math.inf)
    no_gaps(chaos.settle())
    chaos.end()


def direct(service: Service, seconds: float) -> list[float]:
    """Seconds from publishing a message to one client to its arrival, again and again; in order of size."""
    times: list[float] = []
    ends = time.monotonic() + seconds
    with service.client() as publisher, service.events("direct") as events:
        while time.monotonic() < ends:
            began = time.monotonic()
            assert publisher.request("POST", "/publish/direct", b"x").status == 201
            assert events.next().data == "x"
            times.append(time.monotonic() - began)
            gevent.sleep(0.02)
    return sorted(times)


def p99(times: Sequence[float]) -> float:
    """The slowest but one in a hundred."""
    return times[int(0.99 * (len(times) - 1))]


@seeded
def test_hostile_clients_cost_the_others_little(begin: Begin, seed: int) -> None:
    chaos = begin(seed, LOAD._replace(seconds=2 * LOAD.seconds))
    before = direct(chaos.service, LOAD.seconds - 1)
    command = [sys.executable, "-m", "tests.behaviour.hostile", str(chaos.service.port), str(HOSTILE), str(seed)]
    # elsewhere they would have cores of their own: here the service's turn comes first
    hostile = green.Popen(["nice", "-n", "19", *command], cwd=ROOT, stdout=green.PIPE)
    try:
        assert hostile.stdout.readline() == b"begun\n"
        during = direct(chaos.service, max(chaos.left(), LOAD.seconds / 2))
    finally:
        hostile.kill()
        hostile.wait()
        hostile.stdout.close()
    no_gaps(chaos.settle())
    counts = chaos.service.counts()
    print(  # noqa: T201
        f"a direct message: p50 {1e3 * before[len(before) // 2]:.1f} ms, p99 {1e3 * p99(before):.1f} ms; beside {HOSTILE} hostile clients of each kind "
        f"p50 {1e3 * during[len(during) // 2]:.1f} ms, p99 {1e3 * p99(during):.1f} ms"
    )  # fmt: skip
    assert p99(during) <= 3 * max(p99(before), LEAST_P99)
    assert (counts["worker_restarts"], counts["router_restarts"], counts["hung"]) == (0, 0, 0)
    chaos.end()


@seeded
def test_the_service_is_told_to_stop(begin: Begin, seed: int) -> None:
    chaos = begin(seed)
    gevent.sleep(chaos.left() / 2)
    chaos.swarm.order("leave")
    chaos.service.process.send_signal(signal.SIGTERM)
    assert chaos.service.ended() == 0
    report = chaos.swarm.report("left")
    chaos.show(report)
    assert (report.lost, report.doubled, report.wrong) == (0, 0, []), report
    no_gaps(report)
    assert report.endings == {"clean": LOAD.clients + LOAD.publishers}, report
    chaos.healthy()
