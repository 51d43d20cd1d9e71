"""What may be refused to a service that runs: processes, descriptors, its file of subscriptions, its disk, Redis. A test for each of its
processes: what is refused is a failed start, the others serve on, and all is as before once what was missing is there again."""

import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import subprocess as green

from comet import database
from comet.policy import MOST_DEATHS
from tests.behaviour.test_starting import may_mount
from tests.behaviour.test_supervisor import Begin, Callers, Service, answers, begin, code, of
from tests.harness import AMPLE, ROOT, TIMEOUT, Client, wait_until
from tests.redis_server import RedisServer, needs_redis

__all__ = ["begin", "code"]  # fixtures

REFUSED = "Resource temporarily unavailable"


@contextmanager
def no_descriptors(pid: int) -> Iterator[None]:
    """A process, and what it starts, opens nothing more meanwhile."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    taken = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(len(taken) + 1)) - taken), hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))


class Unfit:
    """Which workers of a service, a copy of the program, can't serve when they are started."""

    def __init__(self, code: Path) -> None:
        self._numbers = code / "unfit"
        path = code / "comet" / "generation.py"
        there = "            place = self._place(worker)\n"
        text = path.read_text()
        assert there in text
        path.write_text(text.replace(there, f"""{there}\
            if str(worker) in (Path({str(self._numbers)!r}).read_text() if os.path.exists({str(self._numbers)!r}) else "").split():
                raise Unfit("somebody must have changed a password")
"""))  # fmt: skip

    def say(self, *numbers: int) -> None:
        self._numbers.write_text(" ".join(map(str, numbers)))


class Forks:
    """Whether the generations of a service, a copy of the program, may fork."""

    def __init__(self, code: Path) -> None:
        self._refused = code / "no-forks"
        path = code / "comet" / "kernel" / "processes.py"
        text = path.read_text().replace(
            'fork: Callable[[], int] = stock(os, "fork")',
            "def fork() -> int:\n"
            f"    if os.path.exists({str(self._refused)!r}):\n"
            f"        raise BlockingIOError(11, {REFUSED!r})\n"
            '    return stock(os, "fork")()',
        )
        assert REFUSED in text
        path.write_text(text)

    def refuse(self) -> None:
        self._refused.touch()

    def allow(self) -> None:
        self._refused.unlink()


def failed_starts(service: Service, whose: str) -> list[str]:
    """What the log says of them: a line each."""
    return re.findall(rf"ERROR comet.supervisor: ({whose} can't be started .*)", service.log.read_text())


def orders(service: Service) -> bool:
    """Whether messages are ordered."""
    return service.request("POST", "/publish/faults", b"x").status == 201


# -- the supervisor


def test_a_router_that_can_not_be_started_is_tried_again(begin: Begin) -> None:
    service = begin("--workers", "2")
    workers = service.workers()
    with no_descriptors(service.process.pid):
        os.kill(service.router(), signal.SIGKILL)
        wait_until(lambda: len(failed_starts(service, "the router")) >= 2)
        answers(service)
    wait_until(lambda: orders(service))
    assert service.workers() == workers
    assert failed_starts(service, "the router")[0] == "the router can't be started (Too many open files); starting another in 0 s"


def test_a_reload_that_can_not_be_started_leaves_the_old_generation(begin: Begin) -> None:
    service = begin("--workers", "2")
    before = service.workers()
    callers = Callers(service)
    with no_descriptors(service.process.pid):
        service.process.send_signal(signal.SIGHUP)
        service.counted("failed_reloads", 1)
    wait_until(lambda: callers.answered > 100)
    callers.stop()
    assert service.workers() == before
    assert "the reload failed: generation 2 can't be started (Too many open files). The old one goes on" in service.log.read_text()
    service.process.send_signal(signal.SIGHUP)
    service.counted("generation", 3)
    service.gone(*before.values())
    answers(service)


def test_when_the_next_generation_can_not_be_started_the_workers_of_a_dead_one_serve_on(begin: Begin) -> None:
    service = begin("--workers", "2")
    before, forker = service.workers(), service.generation()
    callers = Callers(service)
    with no_descriptors(service.process.pid):
        os.kill(forker, signal.SIGKILL)
        wait_until(lambda: len(failed_starts(service, r"generation \d")) >= 2)
        assert service.workers() == before
    wait_until(lambda: service.counts()["generation"] > 2)
    service.gone(*before.values())
    wait_until(lambda: callers.answered > 100)
    callers.stop()


# -- a generation


def test_a_worker_that_can_not_be_forked_is_tried_again(begin: Begin, code: Path) -> None:
    forks = Forks(code)
    service = begin("--workers", "2", kind=of(code))
    before = service.workers()
    forks.refuse()
    os.kill(before[0], signal.SIGKILL)
    wait_until(lambda: len(failed_starts(service, "worker 0")) >= 3)
    assert service.workers() == {1: before[1]}
    forks.allow()
    wait_until(lambda: len(service.workers()) == 2)
    assert service.workers()[1] == before[1]
    assert failed_starts(service, "worker 0")[0] == f"worker 0 can't be started ({REFUSED}); starting another in 0 s"


def test_a_reload_whose_workers_can_not_be_forked_leaves_the_old_generation(begin: Begin, code: Path) -> None:
    forks = Forks(code)
    service = begin("--workers", "2", kind=of(code))
    before = service.workers()
    callers = Callers(service)
    forks.refuse()
    service.process.send_signal(signal.SIGHUP)
    service.counted("failed_reloads", 1)
    wait_until(lambda: callers.answered > 100)
    callers.stop()
    assert service.workers() == before
    assert f"generation 2 has a worker that can't be started ({REFUSED}) before all were ready" in service.log.read_text()


# -- a worker


def test_a_worker_that_starts_without_descriptors_is_tried_again(begin: Begin) -> None:
    service = begin("--workers", "2")
    before = service.workers()
    with no_descriptors(service.generation()):
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: service.counts()["worker_restarts"] >= 3)
        assert service.workers() == {1: before[1]}
    wait_until(lambda: len(service.workers()) == 2)
    assert service.workers()[1] == before[1]
    assert "Too many open files" in service.log.read_text()


# -- the router


def test_workers_that_the_router_has_no_descriptor_for_are_let_in_later(begin: Begin) -> None:
    service = begin("--workers", "2")
    workers, router = service.workers(), service.router()
    with no_descriptors(router):
        service.process.send_signal(signal.SIGHUP)  # two more links, while the old ones stay
        wait_until(lambda: "a worker can't be let in ([Errno 24] Too many open files)" in service.log.read_text())
    service.gone(*workers.values())
    wait_until(lambda: all(one["ready"] for one in service.stats()["workers"]))
    assert orders(service)
    assert service.router() == router


# -- one that can't start again


def missing(service: Service) -> dict[str, Any]:
    """What /stats says of workers that are missing."""
    found: dict[str, Any] = service.stats()["missing"]
    return found


def hopeless(service: Service, number: int) -> None:
    """Wait until this worker has failed so often that its connections go to others."""
    wait_until(lambda: service.log.read_text().count(f"ERROR comet.supervisor: worker {number} ") >= MOST_DEATHS + 1)


def test_one_worker_that_can_not_start_again_leaves_the_others_alone(begin: Begin, code: Path) -> None:
    unfit = Unfit(code)
    service = begin("--workers", "3", kind=of(code))
    assert service.request("GET", "/readyz").json == {"status": "ready"}
    assert missing(service) == {"workers": 0, "seconds": 0, "why": ""}
    before = service.workers()
    unfit.say(0, 1)
    for number in (0, 1):
        os.kill(before[number], signal.SIGKILL)
    began = time.monotonic()
    hopeless(service, 0)
    hopeless(service, 1)
    assert service.workers() == {2: before[2]}
    said = wait_until(lambda: missing(service)["seconds"] >= 2 and missing(service))
    why = "exited with status 1 (somebody must have changed a password)"
    assert said["workers"] == 2 and said["why"] in (f"worker 0 {why}", f"worker 1 {why}")
    assert said["seconds"] <= time.monotonic() - began + 1
    ready = service.request("GET", "/readyz")
    assert (ready.status, ready.json["status"], ready.json["missing"]["workers"]) == (200, "ready", 2)
    assert service.request("POST", "/publish/a", b"x").status == 201
    unfit.say(0)
    wait_until(lambda: missing(service)["workers"] == 1)
    unfit.say()
    wait_until(lambda: missing(service)["workers"] == 0 and len(service.workers()) == 3)
    assert service.workers()[2] == before[2]
    assert service.request("GET", "/readyz").json == {"status": "ready"}


def test_new_connections_go_to_those_that_serve(begin: Begin, code: Path) -> None:
    """The kernel spreads them over all that listen; in the queue of a worker that can't start they would wait for ever."""
    unfit = Unfit(code)
    service = begin("--workers", "3", kind=of(code))
    unfit.say(0, 1)
    for number in (0, 1):
        os.kill(service.workers()[number], signal.SIGKILL)
    for number in (0, 1):
        hopeless(service, number)
    for _ in range(60):
        answers(service)
    unfit.say()
    wait_until(lambda: len(service.workers()) == 3)
    wait_until(lambda: {service.request("GET", "/healthz").json["worker"] for _ in range(20)} == {0, 1, 2})


def test_a_service_in_which_nobody_serves_ends(begin: Begin, code: Path) -> None:
    unfit = Unfit(code)
    service = begin("--workers", "2", kind=of(code))
    before = service.workers()
    unfit.say(0, 1)
    os.kill(before[0], signal.SIGKILL)
    hopeless(service, 0)
    assert service.process.poll() is None
    os.kill(before[1], signal.SIGKILL)
    assert service.ended() == 1
    assert "giving up: worker " in service.log.read_text()


def test_a_reload_with_a_worker_missing_may_mend_it_or_leaves_what_there_is(begin: Begin, code: Path) -> None:
    unfit = Unfit(code)
    service = begin("--workers", "2", kind=of(code))
    before = service.workers()
    unfit.say(0)
    os.kill(before[0], signal.SIGKILL)
    hopeless(service, 0)
    service.process.send_signal(signal.SIGHUP)
    service.counted("failed_reloads", 1)
    assert service.workers() == {1: before[1]}
    unfit.say()
    service.process.send_signal(signal.SIGHUP)
    wait_until(lambda: service.counts()["generation"] > 1)
    wait_until(lambda: len(service.workers()) == 2 and not missing(service)["workers"])
    for _ in range(20):
        answers(service)


def test_a_generation_that_nobody_stands_in_for_serves_without_the_worker_that_can_not_start(begin: Begin, code: Path) -> None:
    unfit = Unfit(code)
    service = begin("--workers", "3", kind=of(code))
    unfit.say(1)
    for pid in (service.generation(), *service.workers().values()):
        os.kill(pid, signal.SIGKILL)
    service.counted("generation", 2)
    assert set(service.workers()) == {0, 2}
    assert "generation 2 is ready without 1 of its workers" in service.log.read_text()
    for _ in range(20):
        answers(service)
    unfit.say()
    wait_until(lambda: len(service.workers()) == 3)


def test_a_router_that_can_not_start_again_is_tried_on(begin: Begin, code: Path) -> None:
    service = begin("--workers", "2", kind=of(code))
    before = service.workers()
    path = code / "comet" / "router.py"
    good = path.read_text()
    path.write_text("raise SystemExit(3)")
    os.kill(service.router(), signal.SIGKILL)
    service.counted("router_restarts", MOST_DEATHS + 1)
    assert service.workers() == before
    answers(service)
    assert service.request("GET", "/readyz").status == 503
    path.write_text(good)
    wait_until(lambda: orders(service))
    assert service.workers() == before


@needs_redis
@pytest.mark.parametrize("change", [("requirepass", "another"), ("maxclients", "4")])
def test_a_redis_that_takes_nobody_new_costs_one_worker(begin: Begin, tmp_path: Path, change: tuple[str, str]) -> None:
    folder = tmp_path / "redis"
    folder.mkdir()
    redis = RedisServer(folder)
    try:
        service = begin("--workers", "2", COMET_BACKPLANE=redis.url)
        wait_until(lambda: orders(service))
        before = service.workers()
        redis.ask("CONFIG", "SET", *change)
        os.kill(before[0], signal.SIGKILL)
        if change[0] == "requirepass":
            hopeless(service, 0)
            assert "NOAUTH" in wait_until(lambda: missing(service)["why"])
        else:
            service.counted("worker_restarts", 1)
        assert service.workers()[1] == before[1]
        assert orders(service)
        redis.stop()
        redis = RedisServer(folder, port=redis.port)
        wait_until(lambda: len(service.workers()) == 2 and orders(service) and not missing(service)["workers"])
        assert service.workers()[1] == before[1]
    finally:
        redis.stop()


# -- the file of the subscriptions


def harmed(data: Path, how: str) -> None:
    """Damage the file under a running service, or take it away."""
    path = database.path_in(data)
    if how == "gone":
        for one in data.iterdir():
            one.unlink()
        return
    writer = database.open_writer(data)
    writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else the log still has it all, and would be written back
    writer.close()
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(path.stat().st_size - 4096))


def killed_worker(service: Service) -> None:
    os.kill(service.workers()[0], signal.SIGKILL)
    service.counted("worker_restarts", 1)
    wait_until(lambda: len(service.workers()) == 2)


def reloaded(service: Service) -> None:
    service.process.send_signal(signal.SIGHUP)
    service.counted("generation", 2)


def killed_generation(service: Service) -> None:
    os.kill(service.generation(), signal.SIGKILL)
    service.counted("generation", 2)


def undisturbed(service: Service) -> None:
    answers(service)


@pytest.mark.parametrize("then", [undisturbed, killed_worker, reloaded, killed_generation])
@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_messages_do_not_need_the_file_of_subscriptions(begin: Begin, tmp_path: Path, how: str, then: Callable[[Service], None]) -> None:
    data = tmp_path / "data"
    service = begin("--workers", "2", "--data", str(data))
    lines = b"".join(b"f%d user%d\n" % (number, number % 10) for number in range(2000))
    assert service.request("POST", "/follows", lines).json["added"] == 2000
    harmed(data, how)
    then(service)
    assert orders(service)
    with service.events("news") as events:
        service.publish("news", "goes on")
        assert events.next().data == "goes on"
    if how == "gone" and then in (reloaded, killed_generation):  # which make an empty one
        assert service.request("GET", "/users/user1/followers").json["followers"] == []
        return

    def away(method: str, path: str) -> bool:
        said = service.request(method, path, None if method == "GET" else b"")
        return said.status == 503 and said.json["error"] == "database-away" and "retry-after" in said.headers

    for method, path in (("GET", "/users/user1/followers"), ("PUT", "/users/a/following/b"), ("POST", "/send/user1")):
        wait_until(lambda method=method, path=path: all(away(method, path) for _ in range(10)))  # type: ignore[misc]
    assert service.stats()["errors"] == 0
    assert "database-away" in service.log.read_text()


@may_mount
def test_a_full_disk_stops_no_start_of_a_generation(begin: Begin, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], check=True)
    try:
        service = begin("--workers", "2", "--data", str(disk / "data"))
        assert service.request("PUT", "/users/a/following/b").status < 300
        with pytest.raises(OSError, match="No space left"), (disk / "fill").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        killed_worker(service)
        reloaded(service)
        assert orders(service)
        assert service.request("PUT", "/users/c/following/b").status in (503, 507)
        (disk / "fill").unlink()
        wait_until(lambda: service.request("PUT", "/users/c/following/b").status == 200, TIMEOUT)
        assert service.end(signal.SIGTERM) == 0
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


# -- what hangs, or stands still


def test_readyz_tells_of_a_router_that_hangs_before_it_is_killed(begin: Begin) -> None:
    service = begin("--workers", "2")
    wait_until(lambda: service.request("GET", "/readyz").status == 200)
    router = service.router()
    os.kill(router, signal.SIGSTOP)
    wait_until(lambda: all(service.request("GET", "/readyz").json.get("error") == "backplane-away" for _ in range(10)), AMPLE)
    os.kill(router, signal.SIGCONT)
    wait_until(lambda: service.request("GET", "/readyz").status == 200)
    assert service.router() == router
    assert service.counts()["hung"] == 0


def test_a_worker_without_a_descriptor_left_shows_that_it_lives(begin: Begin) -> None:
    service = begin("--workers", "1", "--hang-limit", "4")
    worker = service.workers()[0]
    with service.client() as client, no_descriptors(worker):
        ends = time.monotonic() + 7
        while time.monotonic() < ends:
            assert client.request("POST", "/publish/a", b"x").status == 201
            gevent.sleep(0.1)
        said = client.request("GET", "/stats").json
        assert said["resident_bytes"] > 0 and said["errors"] == 0
        assert client.request("GET", "/readyz").status == 200
    assert service.workers() == {0: worker}
    assert service.counts()["hung"] == 0


def test_a_reader_of_the_log_that_stands_still_stops_no_process() -> None:
    reader, writer = os.pipe()
    process = green.Popen(
        [sys.executable, "app.py", "--port", "0", "--workers", "2", "--log-clients", "--hang-limit", "4"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=writer, env={**os.environ, "COMET_HIBERNATE": "on"},
    )  # fmt: skip
    try:
        os.close(writer)
        port = int(process.stdout.readline().split(b"http://")[1].split()[0].rsplit(b":", 1)[1])
        asked = 0
        clients = [Client(port) for _ in range(8)]
        dropped = 0
        while not dropped:
            for client in clients:
                for _ in range(20):
                    assert client.request("GET", "/nothing/" + "x" * 1500).status == 404
                    asked += 1
            dropped = clients[0].request("GET", "/stats").json["log_dropped"]
            assert asked < 100_000
        ends = time.monotonic() + 7
        while time.monotonic() < ends:
            assert all(client.request("GET", "/healthz").status == 200 for client in clients)
            gevent.sleep(0.1)
        said = clients[0].request("GET", "/stats").json
        assert (said["restarts"]["hung"], said["restarts"]["worker_restarts"], said["errors"]) == (0, 0, 0)
        for client in clients:
            client.close()
        pieces: list[bytes] = []

        def read() -> None:
            while piece := os.read(reader, 1 << 16):
                pieces.append(piece)

        reading = threading.Thread(target=read)
        reading.start()
        wait_until(lambda: b"were dropped: nobody read them" in b"".join(pieces))
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0
        reading.join()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
        os.close(reader)
    log = b"".join(pieces).decode()
    lost = sum(map(int, re.findall(r" (\d+) lines of the log were dropped", log)))
    assert log.count("refused: not-found") + lost == asked, "a line is written, or counted"
    assert len(re.findall(r"INFO comet: stopped$", log, re.MULTILINE)) == 2
