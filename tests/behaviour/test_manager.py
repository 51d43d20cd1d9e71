"""A service under a manager that speaks as systemd does: what it is told, and sockets that the manager holds."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from comet.supervisor import MARGIN
from tests.behaviour.test_faults import no_descriptors
from tests.behaviour.test_supervisor import alive
from tests.harness import AMPLE, ROOT, TIMEOUT, Client, wait_until
from tests.test_systemd import fill

ENTER = "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
"""Becomes the service in the process that was started, as a manager does."""


class Managed:
    """`python app.py` with the sockets, at 3 and on, and a datagram socket that hears what it says."""

    def __init__(self, folder: Path, sockets: list[socket.socket], *flags: str, watchdog: float = 0.0, **environment: str) -> None:
        self.mark = f"managed-{os.getpid()}-{time.monotonic_ns()}"
        self.heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.heard.bind(f"\0{self.mark}")
        self.heard.settimeout(TIMEOUT)
        self.log = folder / f"{self.mark}.log"
        environ = {**os.environ, "NOTIFY_SOCKET": f"@{self.mark}", "LISTEN_FDS": str(len(sockets)), "TEST_MARK": self.mark, **environment}
        if watchdog:
            environ["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
        numbers = [os.dup2(one.fileno(), 200 + at) for at, one in enumerate(sockets)]
        moves = " ".join(f"{3 + at}<&{number} {number}<&-" for at, number in enumerate(numbers))
        command = [
            "bash",
            "-c",
            f'exec "$@" {moves}',
            "x",
            sys.executable,
            "-c",
            ENTER,
            "app.py",
            "--host",
            "192.0.2.1",
            "--port",
            "1",
            *flags,
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environ, pass_fds=numbers, stdout=subprocess.DEVNULL, stderr=log)
        for number in numbers:
            os.close(number)

    def told(self) -> list[str]:
        """The next of what it says, but signs of life."""
        while True:
            said = self.heard.recv(4096).decode().split("\n")
            if said != ["WATCHDOG=1"]:
                return said

    def ready(self) -> str:
        """Wait until it says so; its line of status."""
        said = self.told()
        assert said[0] == "READY=1", (said, self.log.read_text())
        return said[1]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        while "STOPPING=1" not in self.told():
            pass
        return self.process.wait(TIMEOUT)

    def close(self) -> None:
        """Whatever happened."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        wait_until(lambda: not alive(self.mark))
        self.heard.close()


Begin = Callable[..., Managed]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    services: list[Managed] = []

    def begin(sockets: list[socket.socket], *flags: str, **more: object) -> Managed:
        service = Managed(tmp_path, sockets, *flags, **more)  # type: ignore[arg-type]
        services.append(service)
        return service

    yield begin
    for service in services:
        service.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=512) as one:
        yield one


def port(listener: socket.socket) -> int:
    return int(listener.getsockname()[1])


def test_a_service_of_several_says_how_it_is(begin: Begin, listener: socket.socket) -> None:
    service = begin([listener], "--workers", "2", watchdog=3.0)
    assert re.fullmatch(r"STATUS=2 workers, 0 of [\d,]+ clients", service.ready())
    with Client(port(listener)) as client:
        client.ask("GET", "/events/a")
        assert client.read_head().status == 200
        (status,) = service.told()
        assert status.startswith("STATUS=2 workers, 1 of ")
        service.process.send_signal(signal.SIGHUP)
        said = service.told()
        assert (said[0], said[1].partition("=")[0], said[2]) == ("RELOADING=1", "MONOTONIC_USEC", "STATUS=reloading")
        assert service.ready().startswith("STATUS=2 workers, ")
    assert service.stop() == 0


def test_one_process_alone_does_too(begin: Begin, listener: socket.socket) -> None:
    service = begin([listener], watchdog=3.0)
    assert re.fullmatch(r"STATUS=one process, 0 of [\d,]+ clients", service.ready())
    with Client(port(listener)) as client:
        assert client.request("GET", "/healthz").status == 200
    service.process.send_signal(signal.SIGHUP)  # nothing to reload, and no reason to end
    assert service.told()[0] == "RELOADING=1"
    service.ready()
    assert service.stop() == 0


@pytest.mark.parametrize("workers", ["0", "2"])
def test_signs_of_life_come_as_often_as_is_asked(begin: Begin, listener: socket.socket, workers: str) -> None:
    service = begin([listener], "--workers", workers, watchdog=0.6)
    service.ready()
    times: list[float] = []
    while len(times) < 6:
        if service.heard.recv(4096) == b"WATCHDOG=1":
            times.append(time.monotonic())
    pauses = sorted(after - before for before, after in pairwise(times))
    assert pauses[2] < 0.6, pauses  # one or the other may be late where the machine has other work
    os.kill(service.process.pid, signal.SIGSTOP)
    service.heard.settimeout(0.2)
    with pytest.raises(TimeoutError):  # what was under way comes, then nothing
        while True:
            service.heard.recv(4096)
    os.kill(service.process.pid, signal.SIGCONT)
    service.heard.settimeout(TIMEOUT)
    assert service.stop() == 0


def test_a_manager_that_does_not_read_holds_nothing_up(begin: Begin, listener: socket.socket) -> None:
    """Its socket takes no more (net.unix.max_dgram_qlen). A dead worker is replaced, and SIGTERM is heard."""
    service = begin([listener], "--workers", "2", watchdog=0.9)
    service.ready()
    fill(f"@{service.mark}")
    wait_until(lambda: "can't be told" in service.log.read_text())

    def serving() -> dict[str, int]:
        with Client(port(listener)) as client:
            return {str(one["worker"]): int(one["pid"]) for one in client.request("GET", "/stats").json["workers"]}

    wait_until(lambda: len(serving()) == 2)
    before = serving()["1"]
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: serving().get("1", before) != before, timeout=AMPLE)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(AMPLE) == 0
    assert "does not answer" not in service.log.read_text()


def test_nobody_but_the_main_process_inherits_what_systemd_said(begin: Begin, listener: socket.socket) -> None:
    service = begin([listener], "--workers", "2", watchdog=3.0)
    service.ready()
    others = [pid for pid in alive(service.mark) if pid != service.process.pid]
    assert len(others) == 4  # the router, a generation, its two workers
    for pid in others:
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"NOTIFY_SOCKET" not in environ and b"WATCHDOG_" not in environ and b"LISTEN_" not in environ
    assert service.stop() == 0


def test_workers_share_a_socket(begin: Begin, listener: socket.socket) -> None:
    """Only that one, and all of them accept from it."""
    service = begin([listener], "--workers", "3", "--max-per-address", "1000")
    service.ready()
    seen: Counter[int] = Counter()
    deadline = time.monotonic() + TIMEOUT
    while len(seen) < 3:
        assert time.monotonic() < deadline, seen
        clients = [Client(port(listener)) for _ in range(60)]
        for client in clients:
            client.ask("GET", "/healthz")
        for client in clients:
            seen[client.read().json["worker"]] += 1
            client.close()
    assert service.stop() == 0
    assert "Traceback" not in service.log.read_text()


def test_a_socket_each(begin: Begin) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        service = begin([one, two], "--workers", "2")
        service.ready()
        said = []
        for listener in (one, two):
            with Client(port(listener)) as client:
                said.append(client.request("GET", "/healthz").json["worker"])
        assert said == [0, 1]
        assert service.stop() == 0


@pytest.mark.parametrize(("workers", "count"), [("0", 2), ("2", 3)])
def test_a_socket_that_nobody_would_serve_is_refused(begin: Begin, workers: str, count: int) -> None:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    service = begin(listeners, "--workers", workers)
    assert service.process.wait(TIMEOUT) == 1
    assert f"set --workers to {count}" in service.log.read_text()
    for one in listeners:
        one.close()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_socket_that_does_not_listen_is_a_wrong_setting(begin: Begin, workers: str) -> None:
    with socket.socket() as one:
        service = begin([one], "--workers", workers)
        assert service.process.wait(TIMEOUT) == 2
        assert "is no listening TCP socket" in service.log.read_text()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_socket_beyond_loopback_needs_a_key(begin: Begin, workers: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        service = begin([listener], "--workers", workers)
        assert service.process.wait(TIMEOUT) == 2
        assert "0.0.0.0 is not loopback" in service.log.read_text()
        service = begin([listener], "--workers", workers, COMET_PUBLISH_KEY="secret")
        service.ready()
        assert service.stop() == 0


@pytest.mark.parametrize("workers", ["0", "2"])
def test_who_connects_while_it_is_away_is_served_by_the_next(begin: Begin, listener: socket.socket, workers: str) -> None:
    for _ in range(2):
        with Client(port(listener)) as early:
            early.ask("GET", "/poll/a?timeout=0")
            service = begin([listener], "--workers", workers)
            service.ready()
            assert early.read().status == 200
            assert service.stop() == 0


def test_what_it_can_set_on_a_socket_it_sets(begin: Begin, listener: socket.socket) -> None:
    """Accepted sockets inherit it, whoever bound the listener."""
    service = begin([listener], "--send-buffer", "8192", "--send-timeout", "7")
    service.ready()
    assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) > 3600, "probes go at the service's own pace"
    assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 300_000, "as long as the probes take"
    assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 2 * 8192
    assert service.stop() == 0


def test_the_key_is_in_a_file(begin: Begin, listener: socket.socket, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("first\n")
    service = begin([listener], "--workers", "2", "--publish-key-file", str(key))
    service.ready()

    def publish(word: str) -> int:
        with Client(port(listener)) as client:
            return client.request("POST", "/publish/a", b"x", {"Authorization": f"Bearer {word}"}).status

    assert (publish("first"), publish("second")) == (201, 401)
    key.write_text("second\n")
    service.process.send_signal(signal.SIGHUP)  # it is read again
    assert service.told()[0] == "RELOADING=1"
    service.ready()
    wait_until(lambda: (publish("first"), publish("second")) == (401, 201))
    assert service.stop() == 0


@pytest.mark.parametrize(
    ("content", "said"), [(None, "can't be read"), ("", "holds no publish key"), ("two words", "holds no publish key")]
)
def test_a_file_without_a_key_is_told(begin: Begin, listener: socket.socket, tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "key").write_text(content)
    service = begin([listener], "--publish-key-file", str(tmp_path / "key"))
    assert service.process.wait(TIMEOUT) == 2
    assert said in service.log.read_text()


def test_a_key_twice_is_told(begin: Begin, listener: socket.socket, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("one")
    service = begin([listener], "--publish-key-file", str(tmp_path / "key"), "--publish-key", "two")
    assert service.process.wait(TIMEOUT) == 2
    assert "not both" in service.log.read_text()


def test_the_routers_socket_is_in_the_runtime_folder(begin: Begin, listener: socket.socket, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    service = begin([listener], "--workers", "1", RUNTIME_DIRECTORY=str(folder))
    service.ready()
    assert [path.name for path in folder.rglob("router")] == ["router"]
    assert service.stop() == 0
    assert list(folder.iterdir()) == []


def test_without_a_router_of_its_own_it_is_ready_too(begin: Begin, listener: socket.socket) -> None:
    """Messages are ordered by Redis, which may be away: that is for /readyz to say."""
    service = begin([listener], "--workers", "2", "--backplane", "redis://127.0.0.1:1")
    service.ready()
    with Client(port(listener)) as client:
        assert client.request("GET", "/readyz").status == 503
    assert service.stop() == 0


def test_a_worker_that_can_not_start_again_is_told_and_is_no_reason_to_end_the_others(begin: Begin, listener: socket.socket) -> None:
    service = begin([listener], "--workers", "2", "--hang-limit", "3", watchdog=3.0)
    service.ready()
    forker = next(
        pid for pid in alive(service.mark) if Path(f"/proc/{pid}/task/{pid}/children").read_text().split() and pid != service.process.pid
    )
    worker = int(Path(f"/proc/{forker}/task/{forker}/children").read_text().split()[0])
    with no_descriptors(forker):
        os.kill(worker, signal.SIGKILL)
        while "1 missing: worker " not in (said := service.told())[-1]:
            assert said[0].startswith("STATUS="), said
        began = time.monotonic()
        while time.monotonic() - began < 2 * (3 + MARGIN) + 3:  # longer than a place may be empty that nobody is known to be missing in
            beat = service.heard.recv(4096)
            if beat == b"WATCHDOG=1":
                last = time.monotonic()
    assert time.monotonic() - last < 3
    while "missing" in service.told()[-1]:
        pass
    assert service.stop() == 0
