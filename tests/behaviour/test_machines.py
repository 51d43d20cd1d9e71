"""Several machines on one Redis, under load, while machines and Redis are killed, cut off and slowed down: nothing
acknowledged is lost, nothing comes twice, and nobody is told a gap.

Each machine is a network namespace with an address of its own on a bridge, so this needs root and ``ip``; it is skipped
where that is not allowed. The clients, publishers and judge are those of `tests.behaviour.swarm`. Shorter in CI; in full, as
``make chaos`` runs it, with ``COMET_CHAOS=full``.
"""

import itertools
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket

from tests.behaviour.swarm import Report
from tests.behaviour.test_chaos import FULL, SEEDS, Load, Swarm
from tests.harness import ROOT, Client, wait_until
from tests.redis_server import RedisServer, create_cluster, needs_redis

pytestmark = needs_redis

LOAD = Load(2000, 200, 60, 300, 100, 60.0) if FULL else Load(200, 20, 20, 100, 100, 5.0)

CUT = 5.0 if FULL else 1.5
"""Seconds that a machine is cut off."""

SLOW = 0.03
"""Seconds that the slow way takes, each way."""

NODES = 3
PORT, REDIS_PORT, SLOW_PORT = 8000, 6379, 6380


def ip(*arguments: str) -> None:
    """Run it; an error is raised."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Machines:
    """Namespaces on a bridge; the one that runs the tests has an address there too."""

    def __init__(self, names: Sequence[str], number: int) -> None:
        self._net = f"10.213.{number}"
        self._bridge = f"cometbr{number}"
        self._tag = f"comet{number}"
        self.names = list(names)
        self._made: list[tuple[str, ...]] = []
        try:
            self._make("link", self._bridge, "type", "bridge")
            ip("addr", "add", f"{self._net}.1/24", "dev", self._bridge)
            ip("link", "set", self._bridge, "up")
            for name in names:
                space, near, far = f"{self._tag}{name}", f"{self._tag}{name}", f"{self._tag}{name}x"
                self._make("netns", space)
                self._make("link", near, "type", "veth", "peer", "name", far)
                ip("link", "set", far, "netns", space)
                ip("link", "set", near, "master", self._bridge, "up")
                for command in (
                    ("addr", "add", f"{self.address(name)}/24", "dev", far),
                    ("link", "set", far, "up"),
                    ("link", "set", "lo", "up"),
                ):
                    ip("-n", space, *command)
        except BaseException:
            self.close()
            raise

    def _make(self, what: str, name: str, *more: str) -> None:
        ip(what, "add", name, *more)
        self._made.append((what, "del", name))

    def address(self, name: str) -> str:
        """Of a machine."""
        return f"{self._net}.{10 + self.names.index(name)}"

    def on(self, name: str) -> list[str]:
        """What is put before a command to run it there."""
        return ["ip", "netns", "exec", f"{self._tag}{name}"]

    def cut(self, name: str, cut: bool) -> None:
        """From everybody."""
        ip("link", "set", f"{self._tag}{name}", "down" if cut else "up")

    def close(self) -> None:
        """Remove them."""
        for command in reversed(self._made):
            subprocess.run(["ip", *command], check=False, capture_output=True)
        self._made = []


@pytest.fixture
def machines() -> Iterator[Machines]:
    if shutil.which("ip") is None:
        pytest.skip("there is no ip here: apt-get install iproute2")
    for number in random.sample(range(250), 20):
        try:
            made = Machines(["r", *(f"n{number}" for number in range(NODES))], number)
        except subprocess.CalledProcessError as error:
            if "exists" in error.stderr:  # others test here as well
                continue
            pytest.skip(f"network namespaces are not allowed here: {error.stderr}")
        yield made
        made.close()
        return
    raise AssertionError("what other tests have left behind is in the way: see ip netns")


class Node:
    """A machine that serves."""

    def __init__(self, machines: Machines, name: str, log: Path, backplane: str, *flags: str) -> None:
        self._command = [
            *machines.on(name), sys.executable, "app.py", "--host", machines.address(name), "--port", str(PORT), "--open",
            "--backplane", backplane, "--max-per-address", "10000", "--retry", "200", "--history-size", "5000", "--grace", "5", *flags,
        ]  # fmt: skip
        self.name = name
        self.host = machines.address(name)
        self.log = log
        self.process: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        """Begin (again)."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, cwd=ROOT, stdout=log, stderr=log)

    def ready(self) -> bool:
        """It says so."""
        try:
            with gevent.Timeout(2, socket.timeout), Client(PORT, self.host) as client:
                return client.request("GET", "/readyz").status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """As a power cut would; `ip netns exec` became the program, so this is its process."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """In order."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Chaos:
    """Machines under load."""

    def __init__(self, stack: ExitStack, name: str, seed: int, nodes: Sequence[Node]) -> None:
        self.name = name
        self.random = random.Random(seed)
        self.nodes = nodes
        wait_until(lambda: all(node.ready() for node in nodes))
        self.swarm = Swarm([f"{node.host}:{PORT}" for node in nodes], seed)
        stack.callback(self.swarm.close)
        answer = self.swarm.order("begin", **{name: value for name, value in LOAD._asdict().items() if name != "seconds"})
        assert answer == {"clients": LOAD.clients}
        self._until = time.monotonic() + LOAD.seconds

    def left(self) -> float:
        """So many seconds."""
        return max(0.0, self._until - time.monotonic())

    def settle(self, events: Any, least: float = 0.5) -> Report:
        """What came of it, of which `least` of the rate must have been sent: while Redis is away publishers wait."""
        gevent.sleep(self.left())
        report = self.swarm.report("settle")
        gaps = ", ".join(f"{number} told {count}" for count, number in enumerate(report.gaps) if number)
        print(  # noqa: T201
            f"\n{self.name}: {events}; {report.clients} clients, {report.sent} messages sent in {report.seconds:.1f} s, "
            f"{report.acknowledged} acknowledged; received {report.received} (due {report.due}), lost {report.lost}, doubled {report.doubled}, "
            f"gaps: {gaps}; longest outage of a client {report.outage:.2f} s, of a publisher {report.publishing:.2f} s; "
            f"came back {report.came_back} times; met {report.answers}; swarm: {100 * report.cpu:.0f} % of a core",
            flush=True,
        )
        logs = "".join(node.log.read_text()[-3000:] for node in self.nodes)
        assert report.wrong == [], (report, logs)
        assert (report.lost, report.doubled) == (0, 0), (report, logs)
        assert report.sent == report.acknowledged, (report, logs)
        assert report.sent > LOAD.rate * LOAD.seconds * least, report
        for node in self.nodes:
            assert "Traceback" not in node.log.read_text(), node.log.read_text()
        return report


@pytest.mark.parametrize("seed", SEEDS)
def test_three_machines_on_one_redis(request: pytest.FixtureRequest, machines: Machines, tmp_path: Path, seed: int) -> None:
    with ExitStack() as stack:
        host = machines.address("r")
        redis = RedisServer(
            tmp_path, "--appendonly", "yes", "--appendfsync", "always", port=REDIS_PORT, host=host, prefix=machines.on("r")
        )  # fmt: skip
        stack.callback(redis.stop)
        slow = subprocess.Popen(
            [*machines.on("r"), sys.executable, "-m", "tests.behaviour.slow", f"{host}:{SLOW_PORT}", f"{host}:{REDIS_PORT}", str(SLOW)],
            cwd=ROOT,
        )
        stack.callback(slow.wait)
        stack.callback(slow.kill)
        ports = [REDIS_PORT, REDIS_PORT, SLOW_PORT]  # the last has a slow link
        nodes = []
        for number, port in enumerate(ports):
            flags = ("--hibernate", "on" if seed % 2 else "off", *(("--workers", "2") if FULL and number == 0 else ()))
            node = Node(machines, f"n{number}", tmp_path / f"n{number}.log", f"redis://{host}:{port}", *flags)
            stack.callback(node.end)
            nodes.append(node)
        chaos = Chaos(stack, request.node.name, seed, nodes)
        events: dict[str, int] = {"redis": 0, "cut": 0, "kill": 0}
        order = itertools.cycle(chaos.random.sample(sorted(events), 3))
        while chaos.left() > CUT + 0.5:
            what = next(order)
            events[what] += 1
            if what == "redis":
                redis.kill()
                gevent.sleep(chaos.random.uniform(0, 0.5))
                redis.start()
            elif what == "cut":
                name = chaos.random.choice(nodes).name
                machines.cut(name, True)
                gevent.sleep(CUT)
                machines.cut(name, False)
            else:
                node = chaos.random.choice(nodes)
                node.kill()
                gevent.sleep(chaos.random.uniform(0, 0.5))
                node.start()
            gevent.sleep(chaos.random.uniform(0, 3 if FULL else 0.5))
        assert sum(events.values()) >= 2
        report = chaos.settle(events)
        assert report.gaps == [report.clients], report
        assert report.received == report.due, report


@pytest.mark.parametrize("seed", SEEDS[:1])
def test_three_machines_on_a_cluster_that_fails_over(request: pytest.FixtureRequest, machines: Machines, tmp_path: Path, seed: int) -> None:
    with ExitStack() as stack:
        host = machines.address("r")
        servers = []
        for number in range(6):
            folder = tmp_path / f"r{number}"
            folder.mkdir()
            options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--appendonly", "yes")
            server = RedisServer(folder, *options, port=7000 + number, host=host, prefix=machines.on("r"))
            stack.callback(server.stop)
            servers.append(server)
        create_cluster(servers, 1)
        nodes = []
        for number in range(NODES):
            url = f"redis+cluster://{host}:{7000 + number}"
            node = Node(machines, f"n{number}", tmp_path / f"n{number}.log", url, "--redis-replicas", "1", "--redis-timeout", "1")
            stack.callback(node.end)
            nodes.append(node)
        chaos = Chaos(stack, request.node.name, seed, nodes)
        gevent.sleep(chaos.left() / 4)
        master = chaos.random.choice([server for server in servers if server.ask("ROLE")[0] == b"master"])
        master.kill()
        others = [server for server in servers if server is not master]
        wait_until(lambda: sum(server.ask("ROLE")[0] == b"master" for server in others) == 3)
        master.start()  # else there would be no replica to confirm
        report = chaos.settle("a failover", 0.25)  # Redis takes its time for it, and nobody can confirm meanwhile
        assert report.gaps[0] >= 0.5 * report.clients, report  # only who saw what no replica has may be told one
