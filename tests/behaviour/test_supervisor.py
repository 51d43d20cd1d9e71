"""Many processes behind one address: what dies is replaced, a reload drops nobody, and nothing is ever left
behind. Real processes; each is known by a mark in its environment, which all of a service inherit."""

import contextlib
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gevent
import pytest
from gevent import subprocess as green

from comet.board import Board, Slot
from comet.fanout import MANY
from comet.kernel.processes import FIRST
from comet.permit import PATIENCE
from comet.policy import MOST_DEATHS
from comet.server.addresses import SLACK
from tests.harness import AMPLE, HALF_A_POST, ROOT, TIMEOUT, Client, Events, Server, copy_code, wait_until

AnyClient = TypeVar("AnyClient", bound=Client)


def alive(mark: str) -> list[int]:
    """Processes that have the mark; one that has ended and is not reaped has no environment."""
    found = []
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has ended, or is not ours
            if path.name.isdigit() and mark.encode() in (path / "environ").read_bytes():
                found.append(int(path.name))
    return found


def children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Service(Server):
    """A supervisor and its processes. Their folder of temporary files is `folder`."""

    def __init__(self, log: Path, *flags: str, **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="t-"))  # pytest's would be too long for a Unix socket
        self._clients: list[Client] = []
        super().__init__(log, *flags, TEST_MARK=self.mark, TMPDIR=str(self.folder), COMET_HIBERNATE="on", **environment)
        link = next(path for path in Path(f"/proc/{self.process.pid}/fd").iterdir() if "comet-board" in str(path.readlink()))
        self._board = Board.open(os.open(link, os.O_RDWR))

    def holds(self, client: AnyClient) -> AnyClient:
        """A client that stays until the test has ended."""
        self._clients.append(client)
        return client

    def said(self) -> list[Slot]:
        return self._board.read()

    def by_role(self, role: str) -> list[dict[str, Any]]:
        """What those say who live."""
        living = alive(self.mark)
        return [said.document for said in self.said() if said.document["role"] == role and said.pid in living]

    def workers(self, generation: int | None = None) -> dict[int, int]:
        """Worker -> pid of the generation that is the service's, or of this one."""
        them = self.by_role("worker")
        newest = max((document["generation"] for document in them), default=0) if generation is None else generation
        return {document["worker"]: document["pid"] for document in them if document["generation"] == newest}

    def router(self) -> int:
        (document,) = wait_until(lambda: self.by_role("router"))
        return int(document["pid"])

    def generation(self) -> int:
        """The process that forks."""
        (pid,) = (pid for pid in children(self.process.pid) if children(pid))
        return pid

    def counts(self) -> dict[str, Any]:
        document: dict[str, Any] = wait_until(lambda: self.by_role("supervisor"))[0]
        return document

    def counted(self, name: str, value: int) -> None:
        """Wait for what the supervisor says."""
        wait_until(lambda: self.counts()[name] == value)

    def gone(self, *pids: int) -> None:
        """Wait until these have ended."""
        wait_until(lambda: not set(alive(self.mark)) & set(pids))

    def end(self, number: int, timeout: float = TIMEOUT) -> int:
        """Its exit status; nothing may be left."""
        self.process.send_signal(number)
        return self.ended(timeout)

    def ended(self, timeout: float = TIMEOUT) -> int:
        status = self.process.wait(timeout)
        assert status is not None, self.log.read_text()
        wait_until(lambda: not alive(self.mark))
        assert list(self.folder.iterdir()) == []
        return int(status)

    def close(self) -> None:
        """Whatever happened."""
        for client in self._clients:
            client.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in alive(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.process.stdout.close()
        self._board.close()


Begin = Callable[..., Service]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Start services with flags of their own; afterwards each that still runs must stop cleanly."""
    services: list[Service] = []

    def begin(*flags: str, kind: type[Service] = Service, **environment: str) -> Service:
        service = kind(tmp_path / f"service-{len(services)}.log", *flags, **environment)
        services.append(service)
        return service

    try:
        yield begin
        for service in services:
            if service.process.poll() is None:
                assert service.end(signal.SIGTERM) == 0, service.log.read_text()
            assert not alive(service.mark)
            assert "Traceback" not in service.log.read_text(), service.log.read_text()
    finally:
        for service in services:
            service.close()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the program, to be changed."""
    return copy_code(tmp_path / "code")


def of(code: Path) -> type[Service]:
    return type("Copy", (Service,), {"root": code})


def answers(service: Service) -> None:
    assert service.request("GET", "/healthz").json["status"] == "alive"


def ends(events: Events) -> None:
    """It was told when to come back, and closed."""
    said = events.next()
    assert (said.data, 2000 <= int(said.retry or 0) <= 4000) == (None, True)
    with pytest.raises(EOFError):
        events.next()
    assert events.at_end()


class Callers:
    """Greenlets that connect and ask all the time, until `stop`: each must be answered."""

    def __init__(self, service: Service, count: int = 4) -> None:
        self.service = service
        self.answered = 0
        self.failed: list[str] = []
        self._going = True
        self._greenlets = [gevent.spawn(self._call) for _ in range(count)]

    def _call(self) -> None:
        while self._going:
            try:
                assert self.service.request("GET", "/healthz").status == 200
                self.answered += 1
            except (OSError, AssertionError) as error:
                self.failed.append(repr(error))
            gevent.sleep(0.002)

    def stop(self) -> None:
        self._going = False
        gevent.joinall(self._greenlets, raise_error=True)
        assert self.answered
        assert self.failed == []


# -- running


def test_workers_share_one_port_and_the_connections(begin: Begin) -> None:
    service = begin("--workers", "3")
    workers = service.workers()
    assert sorted(workers) == [0, 1, 2]
    assert len({service.process.pid, service.generation(), service.router(), *workers.values()}) == 6
    assert set(alive(service.mark)) == {service.process.pid, service.generation(), service.router(), *workers.values()}
    clients = [service.holds(service.client()) for _ in range(60)]
    for client in clients:
        assert client.request("GET", "/healthz").status == 200
    wait_until(lambda: sum(document["connections"] for document in service.by_role("worker")) == 60)
    assert all(document["connections"] >= 3 for document in service.by_role("worker"))
    for document in service.by_role("worker"):
        assert document["capacity"] > 0
        assert document["growth_bytes"] < 4 << 20
        assert not document["draining"]
    counts = service.counts()
    assert (counts["generation"], counts["workers"], counts["worker_restarts"], counts["hung"]) == (1, 3, 0, 0)
    (folder,) = service.folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "router").stat().st_mode & 0o777 == 0o600


def test_a_worker_has_no_descriptor_but_its_own_and_the_listeners_it_may_stand_in_at(begin: Begin) -> None:
    service = begin("--workers", "4")
    for pid in service.workers().values():
        links = [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
        listening = service_sockets(pid, service.port)
        assert listening == 4, links
        assert len(os.listdir(f"/proc/{pid}/task")) == 1, "a thread"


def service_sockets(pid: int, port: int) -> int:
    """Sockets of a process that listen on the port."""
    inodes = {
        line.split()[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
    }
    return sum(str(path.readlink()).strip("socket:[]") in inodes for path in Path(f"/proc/{pid}/fd").iterdir())


def test_auto_says_what_it_plans(begin: Begin) -> None:
    service = begin("--workers", "auto", "--clients", "300", "--max-connections", "100", "--max-per-address", "10")
    assert len(service.workers()) == max(4, len(os.sched_getaffinity(0)))
    log = service.log.read_text()
    assert "workers of up to 100 connections each" in log
    assert "WARNING" not in log
    little = begin("--workers", "2", "--clients", "300", "--max-connections", "100")
    assert "300 clients were asked for; 2 workers of 100 connections are good for 170: set --workers 4" in little.log.read_text()


# -- connections by address


def streams(service: Service, wanted: int, **headers: str) -> list[Client]:
    """Ask for so many streams from 127.0.0.2, and return those that are held. The others must be refused."""
    held = []
    for _ in range(wanted):
        client = service.holds(Client(service.port, source="127.0.0.2"))
        client.ask("GET", "/stream/a", headers=headers)
        head = client.read_head()
        if head.status == 200:
            held.append(client)
        else:
            assert (head.status, b"address-full" in client.read_body()) == (429, True)
    return held


MOST = 40
SHARE = range(MOST, MOST + MOST // SLACK + 1)
"""What an address may get of two workers."""


def test_an_address_has_its_share_in_all_workers_and_who_dies_gives_back(begin: Begin) -> None:
    service = begin("--workers", "2", "--max-per-address", str(MOST))
    held = streams(service, 3 * MOST)
    assert len(held) in SHARE
    assert service.request("GET", "/healthz").status == 200, "another address"
    wait_until(lambda: service.stats()["refused"] == {"address-full": 3 * MOST - len(held)})
    wait_until(lambda: service.clients() == len(held))
    killed = service.workers()[0]
    os.kill(killed, signal.SIGKILL)
    service.counted("worker_restarts", 1)
    wait_until(lambda: len(service.workers()) == 2 and killed not in service.workers().values())
    lost = len(held) - wait_until(service.clients)
    assert 0 < lost < len(held)
    again = streams(service, 2 * MOST)
    assert len(held) - lost + len(again) in SHARE
    for client in (*held, *again):
        client.close()
    wait_until(lambda: service.clients() == 0)
    assert len(streams(service, 2 * MOST)) in SHARE


def test_behind_proxies_a_client_has_its_share_in_all_workers(begin: Begin) -> None:
    service = begin("--workers", "2", "--max-per-address", str(MOST), "--trusted-proxies", "127.0.0.2")
    held = streams(service, 2 * MOST, **{"X-Forwarded-For": "198.51.100.1"})
    assert len(held) in SHARE
    assert len(streams(service, 5, **{"X-Forwarded-For": "198.51.100.2"})) == 5
    assert not streams(service, 3, **{"X-Forwarded-For": "198.51.100.1"})
    for client in held:
        client.close()
    wait_until(lambda: service.clients() == 5)
    assert len(streams(service, 2 * MOST, **{"X-Forwarded-For": "198.51.100.1"})) in SHARE


def test_a_generation_that_drains_counts_until_its_connections_are_gone(begin: Begin) -> None:
    service = begin("--workers", "2", "--max-per-address", str(MOST), "--grace", str(TIMEOUT))
    slow = [service.holds(Client(service.port, source="127.0.0.2")) for _ in range(MOST - 10)]
    for client in slow:
        client.send(HALF_A_POST)
    wait_until(lambda: service.stats()["requests"] >= len(slow))
    before = service.workers()
    service.process.send_signal(signal.SIGHUP)
    service.counted("generation", 2)
    held = streams(service, 2 * MOST)
    assert len(slow) + len(held) in SHARE
    for client in slow:
        client.send(b"dy")
        assert client.read().status == 201
    service.gone(*before.values())
    assert len(held) + len(streams(service, 2 * MOST)) in SHARE


# -- deaths


def test_a_killed_worker_is_replaced_and_its_queue_served(begin: Begin) -> None:
    service = begin("--workers", "2")
    before = service.workers()
    os.kill(before[0], signal.SIGSTOP)
    clients = [service.holds(service.client()) for _ in range(20)]  # some of them wait in its queue
    for client in clients:
        client.ask("GET", "/healthz")
    os.kill(before[0], signal.SIGKILL)
    for client in clients:
        assert client.read().json["status"] == "alive"
    wait_until(lambda: len(service.workers()) == 2)
    after = service.workers()
    assert after[0] != before[0]
    assert after[1] == before[1]
    service.counted("worker_restarts", 1)
    assert f"worker 0 (process {before[0]}) was ended by SIGKILL; starting another in 0 s" in service.log.read_text()


def test_a_killed_router_is_replaced(begin: Begin) -> None:
    service = begin("--workers", "1")
    before = service.router()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: service.by_role("router") and service.router() != before)
    service.counted("router_restarts", 1)
    answers(service)


def test_without_the_folder_of_the_router_who_is_started_anew_finds_it(begin: Begin) -> None:
    service = begin("--workers", "2")
    (folder,) = service.folder.iterdir()
    shutil.rmtree(folder)  # as a cleaner of /tmp does
    router, before = service.router(), service.workers()
    for pid in (router, before[0]):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: service.by_role("router") and service.router() != router)
    wait_until(lambda: len(service.workers()) == 2 and service.workers()[0] != before[0])
    wait_until(lambda: all(document["ready"] for document in service.by_role("worker")))
    publishes(service, "a")
    service.process.send_signal(signal.SIGHUP)
    service.counted("generation", 2)
    publishes(service, "a")


def test_when_the_process_of_a_generation_is_killed_its_workers_serve_on_until_the_next(begin: Begin) -> None:
    service = begin("--workers", "2")
    before, forker = service.workers(), service.generation()
    callers = Callers(service)
    with service.events("a") as events:
        os.kill(forker, signal.SIGKILL)
        service.counted("generation", 2)
        service.gone(forker, *before.values())
        ends(events)
    gevent.sleep(0.1)
    callers.stop()
    assert len(service.workers(2)) == 2
    assert service.counts()["generation_restarts"] == 1
    assert service.counts()["worker_restarts"] == 0


def test_generation_and_workers_killed_at_once_come_back(begin: Begin) -> None:
    service = begin("--workers", "3")
    before = service.workers()
    for pid in (before[0], service.generation(), before[1]):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(service.workers(2)) == 3 and not set(alive(service.mark)) & set(before.values()))
    answers(service)
    for pid in (service.generation(), *service.workers().values()):
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: len(service.workers(3)) == 3)
    answers(service)


def test_who_is_born_behind_the_end_of_its_generation_is_killed(begin: Begin, code: Path) -> None:
    path = code / "comet" / "generation.py"
    text = path.read_text()
    said = '        _say(orders.events, f"born'
    assert text.count(said) == 1
    path.write_text(text.replace(said, "        time.sleep(0.5 if orders.number == 2 else 0)\n" + said))
    service = begin("--workers", "2", kind=of(code))
    before = {service.router(), service.generation(), *service.workers().values()}
    service.process.send_signal(signal.SIGHUP)
    (forker,) = wait_until(lambda: {pid for pid in children(service.process.pid) if len(children(pid)) == 2} - before)
    strays = children(forker)
    os.kill(forker, signal.SIGKILL)
    service.counted("failed_reloads", 1)
    service.gone(forker, *strays)
    assert set(alive(service.mark)) == {service.process.pid, *before}
    assert service.log.read_text().count("was born behind the end of its generation") == 2


def test_who_shows_no_sign_of_life_is_killed_and_replaced(begin: Begin) -> None:
    service = begin("--workers", "2", "--hang-limit", "6")
    before, router = service.workers(), service.router()
    os.kill(before[1], signal.SIGSTOP)
    os.kill(router, signal.SIGSTOP)
    wait_until(lambda: before[1] not in alive(service.mark) and len(service.workers()) == 2)
    wait_until(lambda: service.by_role("router") and service.router() != router)
    assert service.workers()[0] == before[0]
    service.counted("hung", 2)
    assert f"worker 1 (process {before[1]}) showed no sign of life for 6 s: killing it" in service.log.read_text()


def test_a_generation_that_does_not_obey_is_killed_too(begin: Begin) -> None:
    service = begin("--workers", "2", "--hang-limit", "6", "--grace", "1")
    before, forker = service.workers(), service.generation()
    os.kill(forker, signal.SIGSTOP)
    os.kill(before[1], signal.SIGSTOP)
    service.gone(forker, *before.values())
    wait_until(lambda: len(service.workers(2)) == 2)
    answers(service)


def test_the_workers_of_a_generation_whose_process_is_stopped_drain_in_order(begin: Begin) -> None:
    service = begin("--workers", "2")
    events = [service.holds(service.events("a")) for _ in range(4)]
    os.kill(service.generation(), signal.SIGSTOP)
    service.process.send_signal(signal.SIGTERM)
    for one in events:
        ends(one)
    assert service.ended() == 0
    assert "killing 2 workers" not in service.log.read_text()


def test_a_supervisor_that_was_stopped_blames_nobody(begin: Begin) -> None:
    service = begin("--workers", "2", "--hang-limit", "6")
    before = service.workers()
    everybody = alive(service.mark)
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    gevent.sleep(7)  # as when a machine sleeps
    for pid in [service.process.pid, *everybody]:
        os.kill(pid, signal.SIGCONT)
        gevent.sleep(0.05)
    looked = service.said()[0].beat
    wait_until(lambda: service.said()[0].beat > looked + 1)
    assert service.counts()["hung"] == 0
    assert service.workers() == before


def test_what_workers_have_counted_outlives_them(begin: Begin) -> None:
    service = begin("--workers", "2", "--grace", "1")
    for number in range(10):
        service.publish("a", str(number))
    before = service.workers()
    service.process.send_signal(signal.SIGHUP)
    service.counted("generation", 2)
    service.gone(*before.values())
    wait_until(lambda: service.stats()["published"] == 10)
    for pid in service.workers().values():
        os.kill(pid, signal.SIGKILL)
    service.counted("worker_restarts", 2)
    wait_until(lambda: service.stats()["published"] == 10)


# -- reloads


def test_a_reload_loads_new_code_and_refuses_nobody(begin: Begin, code: Path) -> None:
    service = begin("--workers", "2", "--grace", "3", kind=of(code))
    before, forker, router = service.workers(), service.generation(), service.router()
    health = code / "handlers" / "health.py"
    text = health.read_text()
    callers = Callers(service)
    client = service.holds(service.client())
    client.ask("GET", "/poll/a?timeout=60")
    events = service.holds(service.events("a"))
    for round in (2, 3):
        # another length each time: within a second, Python could not tell that the source has changed
        health.write_text(text.replace('{"status": "alive"', f'{{"code": {10**round}, "status": "alive"'))
        service.process.send_signal(signal.SIGHUP)
        service.counted("generation", round)
        service.gone(forker, *before.values())
        assert service.request("GET", "/healthz").json["code"] == 10**round
        before, forker = service.workers(), service.generation()
        assert len(before) == 2
        if round == 2:
            assert client.read().json["messages"] == []
            assert client.at_end()
            ends(events)
    callers.stop()
    assert (service.counts()["reloads"], service.counts()["failed_reloads"]) == (2, 0)
    assert service.router() == router


def test_a_reload_that_is_told_to_all_processes_is_one_and_loses_nothing(begin: Begin) -> None:
    """As `systemctl kill -s HUP` does."""
    service = begin("--workers", "2")
    router = service.router()
    publishes(service, "a")
    for pid in alive(service.mark):
        os.kill(pid, signal.SIGHUP)
    os.kill(router, signal.SIGUSR1)
    service.counted("generation", 2)
    assert service.router() == router
    assert service.counts()["router_restarts"] == 0
    publishes(service, "a")


def test_the_old_generation_stops_accepting_at_once_and_has_its_grace_time(begin: Begin) -> None:
    service = begin("--workers", "1", "--grace", "8")
    before = service.workers()[0]
    with service.client() as slow:
        slow.send(HALF_A_POST)
        wait_until(lambda: service.stats()["requests"] >= 2)
        service.process.send_signal(signal.SIGHUP)
        service.counted("generation", 2)
        service.process.send_signal(signal.SIGHUP)  # while the old one drains: later
        wait_until(lambda: service_sockets(before, service.port) == 0)
        burnt = ticks(before)
        for _ in range(20):
            answers(service)
        assert ticks(before) - burnt < 5, "it spins"
        assert service.counts()["reloads"] == 1
        slow.send(b"dy")
        assert slow.read().status == 201
    service.gone(before)
    service.counted("generation", 3)
    wait_until(lambda: len(service.workers(3)) == 1 and not service.workers(2))
    assert service.counts()["reloads"] == 2


def ticks(pid: int) -> int:
    """Processor time it has used, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.mark.parametrize("broken", ["import", "start"])
def test_a_reload_with_broken_code_leaves_the_old_generation(begin: Begin, code: Path, broken: str) -> None:
    service = begin("--workers", "2", kind=of(code))
    before = service.workers()
    path = code / ("handlers/health.py" if broken == "import" else "handlers/__init__.py")
    good = path.read_text()
    path.write_text(
        "this is no Python" if broken == "import" else good.replace("    methods: dict", "    raise SystemExit(7)\n    methods: dict", 1)
    )
    callers = Callers(service)
    for count in (1, 2):
        service.process.send_signal(signal.SIGHUP)
        service.counted("failed_reloads", count)
        wait_until(lambda: len(alive(service.mark)) == 5)
    assert service.workers() == before
    callers.stop()
    assert "the reload failed: generation" in service.log.read_text()
    path.write_text(good)
    service.process.send_signal(signal.SIGHUP)
    service.counted("generation", 4)
    service.gone(*before.values())
    answers(service)
    service.log.write_text("")  # the traceback was meant


def change_frames(code: Path) -> None:
    """Have new code whose workers and router say one thing more to each other than the code that runs."""
    for file, before, after in (
        ("backplane/frames.py", "    publications: Sequence[Publication]\n", "    publications: Sequence[Publication]\n    origin: str\n"),
        ("backplane/router.py", "frames.Publish(call, publications)", "frames.Publish(call, publications, 'here')"),
        ("router.py", "asked.publications)", "asked.publications if asked.origin else [])"),
    ):
        path = code / "comet" / file
        text = path.read_text()
        assert text.count(before) == 1, file
        path.write_text(text.replace(before, after))


def publishes(service: Service, channel: str) -> None:
    """Every worker orders messages."""
    for _ in range(8):
        assert service.request("POST", f"/publish/{channel}", b"x").status == 201
        assert service.request("GET", "/readyz").status == 200


def test_a_reload_whose_workers_speak_otherwise_than_the_router_fails_and_says_so(begin: Begin, code: Path) -> None:
    service = begin("--workers", "2", kind=of(code))
    before, router = service.workers(), service.router()
    change_frames(code)
    service.process.send_signal(signal.SIGHUP)
    service.counted("failed_reloads", 1)
    wait_until(lambda: len(alive(service.mark)) == 5)
    assert (service.workers(), service.router()) == (before, router)
    publishes(service, "a")
    log = service.log.read_text()
    assert "the reload failed" in log
    assert "--renew-router" in log


def test_with_renew_router_such_a_reload_starts_another_router_and_tells_one_gap(begin: Begin, code: Path) -> None:
    service = begin("--workers", "2", "--renew-router", kind=of(code))
    before, router = service.workers(), service.router()
    publishes(service, "a")
    events = service.holds(service.events("a"))
    change_frames(code)
    service.process.send_signal(signal.SIGHUP)
    service.counted("generation", 2)
    service.gone(router, *before.values())
    publishes(service, "a")
    with pytest.raises(EOFError):
        while True:
            events.next()
    again = service.holds(service.events("a", events.cursor))
    assert (again.next().type, again.next().data) == ("gap", "x")
    assert (service.counts()["failed_reloads"], service.counts()["reloads"]) == (0, 1)


def test_with_renew_router_a_reload_whose_router_can_not_be_started_fails_and_the_old_one_orders_on(begin: Begin, code: Path) -> None:
    service = begin("--workers", "2", "--renew-router", kind=of(code))
    before, router = service.workers(), service.router()
    change_frames(code)
    path = code / "comet" / "router.py"
    path.write_text("raise SystemExit(7)\n" + path.read_text())
    service.process.send_signal(signal.SIGHUP)
    service.counted("failed_reloads", 1)
    wait_until(lambda: len(alive(service.mark)) == 5)
    assert (service.workers(), service.router()) == (before, router)
    publishes(service, "a")
    assert "needs a router of its own code, which exited with status 7 when it was tried" in service.log.read_text()


@pytest.mark.parametrize("dies", ["router", "generation"])
def test_what_dies_after_an_update_and_comes_back_as_new_code_takes_the_rest_with_it(begin: Begin, code: Path, dies: str) -> None:
    service = begin("--workers", "2", kind=of(code))
    before, router = service.workers(), service.router()
    change_frames(code)
    os.kill(router if dies == "router" else service.generation(), signal.SIGKILL)
    service.counted("generation", 2)
    service.gone(router, *before.values())
    wait_until(lambda: service.request("GET", "/readyz").status == 200)
    publishes(service, "a")


def test_behind_a_router_of_code_that_can_not_serve_the_old_code_mends_the_service_when_it_is_put_back(begin: Begin, code: Path) -> None:
    service = begin("--workers", "2", kind=of(code))
    good = code.with_name("good")
    shutil.copytree(code, good)
    before, router = service.workers(), service.router()
    change_frames(code)
    (code / "handlers" / "health.py").write_text("import a_module_that_was_not_installed")
    os.kill(router, signal.SIGKILL)
    wait_until(lambda: service.counts()["generation_restarts"] >= 1)  # it is tried again, with back-off
    assert service.workers() == before
    assert service.request("GET", "/readyz").status == 503
    shutil.copytree(good, code, dirs_exist_ok=True)
    service.process.send_signal(signal.SIGHUP)
    service.gone(*before.values())
    publishes(service, "a")
    assert len(wait_until(service.workers)) == 2
    service.log.write_text("")  # the traceback was meant


# -- crash loops


def ends_by_itself(code: Path, folder: Path, *flags: str) -> tuple[int, str, str]:
    """Status, standard output and log of a service that gives up; nothing may be left."""
    mark = uuid.uuid4().hex
    temporary = Path(tempfile.mkdtemp(prefix="t-"))
    try:
        done = green.run(
            [sys.executable, "app.py", "--port", "0", *flags],
            cwd=code, capture_output=True, text=True, timeout=TIMEOUT, check=False, env={**os.environ, "TEST_MARK": mark, "TMPDIR": str(temporary)},
        )  # fmt: skip
        assert alive(mark) == []
        assert list(temporary.iterdir()) == []
        return done.returncode, done.stdout, done.stderr
    finally:
        for pid in alive(mark):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(temporary)


def test_code_that_can_not_be_loaded_is_told_at_once(code: Path, tmp_path: Path) -> None:
    (code / "handlers" / "health.py").write_text("this is no Python")
    status, out, log = ends_by_itself(code, tmp_path, "--workers", "2")
    assert (status, out) == (1, "")
    assert "giving up: generation 1, the first, exited with status 1" in log
    assert "SyntaxError" in log


def test_workers_that_die_again_and_again_end_the_service(code: Path, tmp_path: Path) -> None:
    path = code / "handlers" / "__init__.py"
    path.write_text(path.read_text().replace("    methods: dict", "    raise OSError('out of everything')\n    methods: dict", 1))
    status, out, log = ends_by_itself(code, tmp_path, "--workers", "1")
    assert (status, out) == (1, "")
    assert f"giving up: worker 0 exited with status 1 (out of everything), as it did {MOST_DEATHS - 1} times before" in log
    assert log.count("OSError: out of everything") == MOST_DEATHS


def test_a_router_that_dies_again_and_again_ends_the_service(begin: Begin, code: Path) -> None:
    (code / "comet" / "router.py").write_text("raise SystemExit(3)")
    status, _, log = ends_by_itself(code, code, "--workers", "1")
    assert status == 1
    assert "giving up: the router exited with status 3" in log


def test_a_generation_that_never_gets_ready_is_given_up(code: Path, tmp_path: Path) -> None:
    path = code / "handlers" / "__init__.py"
    path.write_text(path.read_text().replace("    methods: dict", "    __import__('time').sleep(60)\n    methods: dict", 1))
    settings = code / "comet" / "settings.py"
    settings.write_text(settings.read_text().replace("least=2,", "least=1,"))  # less than a start may take, which this one never does
    status, out, log = ends_by_itself(code, tmp_path, "--workers", "1", "--hang-limit", "1")
    assert (status, out) == (1, "")
    assert "giving up: generation 1, the first, was not ready after 2 s" in log


# -- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_drains_and_leaves_nothing(begin: Begin, number: int) -> None:
    service = begin("--workers", "2")
    polls = [service.holds(service.client()) for _ in range(10)]
    for poll in polls:
        poll.ask("GET", "/poll/a?timeout=60")
    events = [service.holds(service.events("a")) for _ in range(10)]
    wait_until(lambda: sum(document["connections"] for document in service.by_role("worker")) == 20)
    service.process.send_signal(number)
    for poll in polls:
        assert poll.read().json["messages"] == []
        assert poll.at_end()
    for one in events:
        ends(one)
    assert service.ended() == 0
    with pytest.raises(ConnectionRefusedError):
        service.client()


def test_many_streams_are_closed_spread_over_the_grace_time_and_get_what_is_published(begin: Begin) -> None:
    service = begin("--workers", "1", "--grace", "4")
    events = [service.holds(service.events("a")) for _ in range(300)]
    with service.client() as publisher:
        service.request("GET", "/healthz")
        publisher.send(HALF_A_POST)
        wait_until(lambda: service.by_role("worker")[0]["connections"] == 301)
        began = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping: 301" in service.log.read_text())
        publisher.send(b"dy")
        published = publisher.read()
        assert published.status == 201
    got = 0
    ended = []
    for one in events:
        try:
            while True:
                got += one.next().data == "body"
        except EOFError:
            ended.append(time.monotonic() - began)
    assert got == published.json["subscribers"] > 0, "those that were still there"
    assert 0.5 < max(ended) < AMPLE  # properly, so not by the end of the grace time
    assert ended[100] < max(ended) - 0.2
    assert service.ended() == 0


def test_a_signal_to_the_whole_group_of_processes_is_as_good(begin: Begin) -> None:
    """As service managers send it."""
    service = begin("--workers", "2")
    with service.client() as slow:
        slow.send(HALF_A_POST)
        wait_until(lambda: sum(document["requests"] for document in service.by_role("worker")) == 1)
        for pid in {service.process.pid, service.generation(), *service.workers().values()}:
            with contextlib.suppress(ProcessLookupError):  # the idle worker may have been told before, and have ended
                os.kill(pid, signal.SIGTERM)
        gevent.sleep(0.3)
        slow.send(b"dy")
        assert slow.read().status == 201
    assert service.ended() == 0


def test_a_second_signal_ends_everything_at_once(begin: Begin) -> None:
    service = begin("--workers", "2", "--grace", "60")
    with service.client() as slow:
        slow.send(HALF_A_POST)
        wait_until(lambda: sum(document["requests"] for document in service.by_role("worker")) == 1)
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping" in service.log.read_text())
        assert service.end(signal.SIGTERM, AMPLE) == 1


def test_who_does_not_drain_in_time_is_killed(begin: Begin) -> None:
    service = begin("--workers", "2", "--grace", "0.5")
    os.kill(service.workers()[0], signal.SIGSTOP)
    began = time.monotonic()
    assert service.end(signal.SIGTERM) == 0
    assert 2 < time.monotonic() - began < AMPLE


def test_a_signal_while_it_starts_or_reloads_leaves_nothing(begin: Begin) -> None:
    for delay in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3):
        service = begin("--workers", "2")
        service.process.send_signal(signal.SIGHUP)
        gevent.sleep(delay)
        assert service.end(signal.SIGTERM) == 0


@pytest.mark.parametrize("stopped", [False, True], ids=["all well", "a worker hangs"])
def test_without_the_supervisor_everything_ends_itself(begin: Begin, stopped: bool) -> None:
    service = begin("--workers", "3", "--grace", "60")
    with service.client() as slow, service.client() as idle:
        slow.send(HALF_A_POST)
        assert idle.request("GET", "/healthz").status == 200
        if stopped:
            os.kill(service.workers()[0], signal.SIGSTOP)
        assert service.end(signal.SIGKILL) == -signal.SIGKILL


def test_no_order_of_deaths_leaves_anything(begin: Begin) -> None:
    service = begin("--workers", "2", "--grace", "2")
    for pid in (service.generation(), service.process.pid):
        os.kill(pid, signal.SIGKILL)
    assert service.ended() == -signal.SIGKILL


# -- starting


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    done: subprocess.CompletedProcess[str] = green.run(
        [sys.executable, "app.py", *flags], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("flags", "status", "sentence"),
    [
        (("--host", "0.0.0.0"), 2, "COMET_PUBLISH_KEY"),
        (("--host", "192.0.2.1", "--open"), 1, "can't listen on 192.0.2.1"),
        (("--workers", "some"), 2, "--workers"),
    ],
)
def test_what_can_not_be_is_told_in_a_sentence(flags: Sequence[str], status: int, sentence: str) -> None:
    done = run("--workers", "2", "--port", "0", *flags)
    assert (done.returncode, done.stdout) == (status, "")
    assert sentence in done.stderr


def test_a_port_that_another_service_has_is_not_shared_with_it(begin: Begin) -> None:
    service = begin("--workers", "2")
    done = run("--workers", "2", "--port", str(service.port))
    assert done.returncode == 1
    assert f"can't listen on 127.0.0.1 port {service.port}" in done.stderr


def test_a_service_can_be_started_again_on_its_port_at_once(begin: Begin) -> None:
    first = begin("--workers", "2")
    clients = [first.holds(first.client()) for _ in range(5)]
    for client in clients:
        client.request("GET", "/healthz")
    assert first.end(signal.SIGTERM) == 0
    second = begin("--workers", "2", "--port", str(first.port))
    assert second.port == first.port
    answers(second)


def test_a_worker_that_is_told_to_stop_is_replaced(begin: Begin) -> None:
    service = begin("--workers", "2")
    before = service.workers()[1]
    os.kill(before, signal.SIGTERM)
    wait_until(lambda: len(service.workers()) == 2 and before not in service.workers().values())
    answers(service)


# -- more workers than cores


def test_workers_that_are_too_many_for_the_cores_let_others_finish_and_the_router_goes_first(begin: Begin) -> None:
    cores = len(os.sched_getaffinity(0))
    few, many = begin("--workers", str(2 * cores)), begin("--workers", str(2 * cores + 1))
    may = subprocess.run(
        [sys.executable, "-c", "from comet.kernel.processes import go_first; go_first()"], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    first = 0 if may.returncode else FIRST
    own = os.nice(0)
    for service, policy, nice in ((few, os.SCHED_OTHER, own), (many, os.SCHED_BATCH, own + first)):
        pids = wait_until(lambda service=service: len(service.workers()) > 2 * cores - 1 and service.workers())  # type: ignore[misc]
        assert {os.sched_getscheduler(pid) for pid in pids.values()} == {policy}
        assert os.sched_getscheduler(service.router()) == os.SCHED_OTHER
        assert os.getpriority(os.PRIO_PROCESS, service.router()) == nice


def test_a_sweep_of_very_many_waits_for_its_turn_and_nothing_else_does(begin: Begin) -> None:
    """Somebody else has all the permits: what was published to all waits, and a message to one, or a request, does not."""
    cores = len(os.sched_getaffinity(0))
    workers = cores + 1
    service = begin("--workers", str(workers))
    board = service._board.descriptor
    clients = [service.holds(service.client()) for _ in range(workers * (MANY + 200))]
    for client in clients:
        client.ask("GET", "/test/all")
    for client in clients:
        assert client.read_head().status == 200
        assert client.read_chunk().startswith(b"comet welcomes you!")
    one = service.holds(service.client())
    one.ask("GET", "/test/one")
    one.read_head()
    one.read_chunk()
    fcntl.lockf(board, fcntl.LOCK_EX, cores, 0)
    began = time.monotonic()
    service.publish("user:all", "to all")
    service.publish("user:one", "to one")
    assert one.read_chunk() == b"to one\n"
    answers(service)
    poll = select.poll()
    for client in clients:
        poll.register(client.sock.fileno(), select.POLLIN)
    served = len(poll.poll(0))
    taken = time.monotonic() - began
    fcntl.lockf(board, fcntl.LOCK_UN, cores, 0)
    assert {client.read_chunk() for client in clients} == {b"to all\n"}
    if taken < PATIENCE:  # a worker that has fewer than it takes may have been served
        assert served < MANY
    service.publish("user:all", "again")
    assert {client.read_chunk() for client in clients} == {b"again\n"}
