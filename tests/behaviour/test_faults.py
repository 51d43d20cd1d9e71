"""What may be refused to a service: processes, descriptors, its disk, its file of subscriptions, Redis. A table of who is refused what when
it is started: that is a failed start, the others serve on, and all is as before once what was missing is there again."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import gevent
import pytest
from gevent import subprocess as green

from comet import database
from comet.policy import MOST_DEATHS
from comet.subscriptions import Subscriptions
from tests.behaviour.test_starting import may_mount
from tests.behaviour.test_supervisor import Begin, Callers, Service, alive, answers, begin, code, of
from tests.harness import AMPLE, ROOT, TIMEOUT, Client, Response, free_port, wait_until
from tests.redis_server import needs_redis, redis_server

__all__ = ["begin", "code"]  # fixtures

REFUSED = "Resource temporarily unavailable"


@contextmanager
def no_descriptors(*pids: int) -> Iterator[None]:
    """These processes, and what they start, open nothing more meanwhile."""
    limits = {pid: resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids}
    for pid, (_, hard) in limits.items():
        taken = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(set(range(len(taken) + 1)) - taken), hard))
    try:
        yield
    finally:
        for pid, limit in limits.items():
            with suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)


def sooner(code: Path) -> None:
    """Have a copy of the program try again five times sooner what could not be started."""
    path = code / "comet" / "policy.py"
    there = "FIRST_DELAY, MOST_DELAY = 0.5, 60.0"
    text = path.read_text()
    assert there in text
    path.write_text(text.replace(there, "FIRST_DELAY, MOST_DELAY = 0.1, 12.0"))


class Unfit:
    """Which workers of a service, a copy of the program, can't serve when they are started."""

    def __init__(self, code: Path) -> None:
        sooner(code)
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
    """Whether the processes of a service, a copy of the program, may fork: as the kernel says it, that has no process left."""

    def __init__(self, code: Path) -> None:
        self._refused = code / "no-forks"
        refusal = f"    if os.path.exists({str(self._refused)!r}):\n        raise BlockingIOError(11, {REFUSED!r})\n"
        path = code / "comet" / "kernel" / "processes.py"
        there = 'fork: Callable[[], int] = stock(os, "fork")\n'
        text = path.read_text()
        assert there in text
        path.write_text(text.replace(there, f'def fork() -> int:\n{refusal}    return stock(os, "fork")()\n'))
        path = code / "comet" / "children.py"
        text = path.read_text()
        assert "subprocess.Popen(" in text
        path.write_text(f"{text.replace('subprocess.Popen(', '_popen(')}\n\ndef _popen(*said, **more):\n{refusal}"
                        "    return subprocess.Popen(*said, **more)\n")  # fmt: skip

    @contextmanager
    def refused(self) -> Iterator[None]:
        self._refused.touch()
        try:
            yield
        finally:
            self._refused.unlink()


def orders(service: Service) -> bool:
    """Whether messages are ordered."""
    return service.request("POST", "/publish/faults", b"x").status == 201


def missing(service: Service) -> dict[str, Any]:
    """What /stats says of workers that are missing."""
    found: dict[str, Any] = service.stats()["missing"]
    return found


# -- the table: what is refused, and who is started then


class Faulty(NamedTuple):
    """A service that is whole, and what befalls it for as long as the block lasts."""

    service: Service
    fault: Callable[[], AbstractContextManager[None]]


class Tools(NamedTuple):
    """What a fault is made with."""

    begin: Begin
    code: Path
    folder: Path


Made = Callable[[Tools], AbstractContextManager[Faulty]]


@contextmanager
def no_process(tools: Tools) -> Iterator[Faulty]:
    forks = Forks(tools.code)
    yield Faulty(tools.begin("--workers", "2", kind=of(tools.code)), forks.refused)


@contextmanager
def no_descriptor(tools: Tools) -> Iterator[Faulty]:
    service = tools.begin("--workers", "2")
    yield Faulty(service, lambda: no_descriptors(service.process.pid, service.generation()))


@contextmanager
def disk(folder: Path, options: str = "size=1m") -> Iterator[Path]:
    """A small disk of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave no room on the disk of this folder."""
    with pytest.raises(OSError, match="No space left"), (folder / "fill").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return folder / "fill"


@contextmanager
def full_disk(tools: Tools) -> Iterator[Faulty]:
    @contextmanager
    def full() -> Iterator[None]:
        filling = fill(folder)
        yield
        filling.unlink()
        wait_until(lambda: service.request("PUT", "/users/c/following/b").status == 200)

    with disk(tools.folder / "disk") as folder:
        service = tools.begin("--workers", "2", "--data", str(folder / "data"))
        assert service.request("PUT", "/users/a/following/b").status == 200
        yield Faulty(service, full)
        assert service.end(signal.SIGTERM) == 0


def redis_refuses(*change: str) -> Made:
    @contextmanager
    def made(tools: Tools) -> Iterator[Faulty]:
        with redis_server() as redis:

            @contextmanager
            def refused() -> Iterator[None]:
                redis.ask("CONFIG", "SET", *change)
                yield
                redis.stop()
                redis.start()

            service = tools.begin("--workers", "2", COMET_BACKPLANE=redis.url)
            wait_until(lambda: orders(service))
            yield Faulty(service, refused)

    return made


def file_harmed(how: str) -> Made:
    @contextmanager
    def made(tools: Tools) -> Iterator[Faulty]:
        data, copy = tools.folder / "data", tools.folder / "copy"
        service = tools.begin("--workers", "2", "--data", str(data))
        assert service.request("POST", "/follows", b"".join(b"f%d user%d\n" % (n, n % 10) for n in range(2000))).json["added"] == 2000

        @contextmanager
        def harmed() -> Iterator[None]:
            harm(data, how, copy)
            yield
            for one in data.iterdir():
                one.unlink()
            shutil.copy(copy, database.path_in(data))
            wait_until(lambda: all(len(followers(service).json.get("followers", ())) == 200 for _ in range(10)))

        yield Faulty(service, harmed)

    return made


def harm(data: Path, how: str, copy: Path) -> None:
    """Damage the file of subscriptions, or take it away; what it was is in `copy` then."""
    path = database.path_in(data)
    writer = database.open_writer(data)
    writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # else the log still has it all, and would be written back
    writer.close()
    shutil.copy(path, copy)
    if how == "gone":
        for one in data.iterdir():
            one.unlink()
        return
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))


def followers(service: Service) -> Response:
    return service.request("GET", "/users/user1/followers?limit=1000")


# what is started


def nobody(service: Service) -> None:
    """Nothing is started."""


def router(service: Service) -> None:
    os.kill(service.router(), signal.SIGKILL)


def worker(service: Service) -> None:
    os.kill(service.workers()[0], signal.SIGKILL)


def generation(service: Service) -> None:
    os.kill(service.generation(), signal.SIGKILL)


def reload(service: Service) -> None:
    service.process.send_signal(signal.SIGHUP)


# what holds meanwhile, where the start goes well


def all_but_redis(service: Service) -> None:
    """A worker that Redis refuses for now tries on."""
    wait_until(lambda: {service.request("GET", "/readyz").status for _ in range(10)} == {200, 503})


def all_but_writes(service: Service) -> None:
    assert orders(service)
    assert service.request("PUT", "/users/c/following/b").status in (503, 507)


def all_but_subscriptions(service: Service) -> None:
    def away(method: str, path: str) -> bool:
        said = service.request(method, path, None if method == "GET" else b"")
        return said.status == 503 and said.json["error"] == "database-away" and "retry-after" in said.headers

    with service.events("news") as events:
        service.publish("news", "goes on")
        assert events.next().data == "goes on"
    for method, path in (("GET", "/users/user1/followers"), ("PUT", "/users/a/following/b"), ("POST", "/send/user1")):
        wait_until(lambda method=method, path=path: all(away(method, path) for _ in range(10)))  # type: ignore[misc]
    assert "database-away" in service.log.read_text()


def an_empty_file(service: Service) -> None:
    """A generation makes one where there is none."""
    assert orders(service)
    assert followers(service).json["followers"] == []


PASSWORD, TOO_MANY = redis_refuses("requirepass", "another"), redis_refuses("maxclients", "1")
DAMAGED, GONE = file_harmed("damaged"), file_harmed("gone")
NO_FILES = "Too many open files"

TABLE: dict[str, tuple[Made, Callable[[Service], None], str | Callable[[Service], None]]] = {
    "no process: router": (no_process, router, rf"the router can't be started \({REFUSED}\); starting another in"),
    "no process: generation": (no_process, generation, rf"generation \d can't be started \({REFUSED}\); starting another in"),
    "no process: reload": (no_process, reload, rf"the reload failed: generation 2 can't be started \({REFUSED}\)"),
    "no process: worker": (no_process, worker, rf"worker 0 can't be started \({REFUSED}\); starting another in"),
    "no descriptor: router": (no_descriptor, router, rf"the router can't be started \({NO_FILES}\); starting another in"),
    "no descriptor: generation": (no_descriptor, generation, rf"generation \d can't be started \({NO_FILES}\); starting another in"),
    "no descriptor: reload": (no_descriptor, reload, rf"the reload failed: generation 2 can't be started \({NO_FILES}\)"),
    "no descriptor: worker": (no_descriptor, worker, rf"worker 0 .* exited with status 1 .*{NO_FILES}.*; starting another in"),
    "full disk: generation": (full_disk, generation, all_but_writes),
    "full disk: reload": (full_disk, reload, all_but_writes),
    "full disk: worker": (full_disk, worker, all_but_writes),
    "Redis' password: generation": (PASSWORD, generation, r"generation \d has a worker that exited with status 1 \(.*NOAUTH.*starting another in"),
    "Redis' password: reload": (PASSWORD, reload, r"the reload failed: generation 2 has a worker that exited with status 1 \(.*NOAUTH"),
    "Redis' password: worker": (PASSWORD, worker, r"worker 0 .* exited with status 1 \(.*NOAUTH.*; starting another in"),
    "Redis is full: worker": (TOO_MANY, worker, all_but_redis),
    "file damaged: nobody": (DAMAGED, nobody, all_but_subscriptions),
    "file damaged: generation": (DAMAGED, generation, all_but_subscriptions),
    "file damaged: reload": (DAMAGED, reload, all_but_subscriptions),
    "file damaged: worker": (DAMAGED, worker, all_but_subscriptions),
    "file gone: nobody": (GONE, nobody, all_but_subscriptions),
    "file gone: generation": (GONE, generation, an_empty_file),
    "file gone: reload": (GONE, reload, an_empty_file),
    "file gone: worker": (GONE, worker, all_but_subscriptions),
}  # fmt: skip
"""What is refused, and who is started then. If that fails, what the log says of it; else what holds meanwhile. The router needs no disk, no
Redis and no file."""

NEEDS = {"full disk": may_mount, "Redis' password": needs_redis, "Redis is full": needs_redis}


def row_of(name: str, *more: str) -> Any:
    """A test's parameters, with what this row needs of the machine."""
    return pytest.param(name, *more, marks=NEEDS.get(name.partition(":")[0], ()))


@pytest.mark.parametrize("row", [row_of(name) for name in TABLE])
def test_a_fault_at_a_start_costs_that_start_alone(begin: Begin, code: Path, tmp_path: Path, row: str) -> None:
    made, start, expected = TABLE[row]
    with made(Tools(begin, code, tmp_path)) as (service, fault):
        before = service.workers()
        with fault():
            start(service)
            callers = Callers(service, 1)
            if isinstance(expected, str):
                wait_until(lambda: len(re.findall(expected, service.log.read_text())) >= (1 if start in (reload, generation) else 2))
            else:
                if start is worker:
                    service.counted("worker_restarts", 1)
                    wait_until(lambda: len(service.workers()) == 2)
                elif start is not nobody:
                    service.counted("generation", 2)
                expected(service)
            wait_until(lambda: callers.answered > 50)
            callers.stop()
        if start is generation:
            wait_until(lambda: service.counts()["generation"] > 1)
            service.gone(*before.values())
        wait_until(lambda: len(service.workers()) == 2 and not missing(service)["workers"])
        wait_until(lambda: all(orders(service) and service.request("GET", "/readyz").json == {"status": "ready"} for _ in range(10)))
        if start is worker:
            same = {1}
        elif start in (nobody, router) or (start is reload and isinstance(expected, str)):
            same = {0, 1}
        else:
            same = set()
        assert {number for number, pid in service.workers().items() if pid == before[number]} == same
        assert service.stats()["errors"] == 0


FIRST = {
    "no process": rf"giving up: generation 1, the first, can't be started \({REFUSED}\)",
    "no descriptor: beyond 8": r"Too many open files|unable to open database file",
    "no descriptor: beyond 12": r"Too many open files",
    "no descriptor: beyond 16": r"Too many open files|No usable temporary directory",  # Python tries several, and says no more
    "full disk: its runtime folder": r"can't start: .*No space left on device",
    "full disk: its subscriptions": r"follows\.db can't be used: ",
    "Redis' password": r"NOAUTH",
    "file damaged": r"follows\.db is damaged",
}
"""What is refused to a service that starts for the first time, and what it says before it ends."""

SUPERVISORS = {"no process", "no descriptor: beyond 12", "no descriptor: beyond 16", "full disk: its runtime folder"}
"""What one process alone does not need."""


@pytest.mark.parametrize(
    ("row", "workers"), [row_of(name, workers) for name in FIRST for workers in ("0", "2") if workers == "2" or name not in SUPERVISORS]
)
def test_a_fault_at_the_first_start_ends_it_with_a_sentence(code: Path, tmp_path: Path, row: str, workers: str) -> None:
    environment = {**os.environ, "TEST_MARK": uuid.uuid4().hex}
    before: list[str] = []
    flags = ["--port", "0", "--workers", workers]
    with ExitStack() as stack:
        environment["TMPDIR"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="t-"))
        fault, _, which = row.partition(": ")
        match fault:
            case "no process":
                stack.enter_context(Forks(code).refused())
            case "no descriptor":
                before = ["sh", "-c", f'ulimit -n {which.split()[-1]}; exec "$@"', "sh"]
            case "full disk" if which == "its runtime folder":
                environment["RUNTIME_DIRECTORY"] = str(stack.enter_context(disk(tmp_path / "disk", "nr_inodes=1")))
            case "full disk":
                folder = stack.enter_context(disk(tmp_path / "disk"))
                fill(folder)
                flags += ["--data", str(folder)]
            case "Redis' password":
                redis = stack.enter_context(redis_server("--requirepass", "another"))
                environment["COMET_BACKPLANE"] = redis.url
            case "file damaged":
                database.prepare(tmp_path / "data", whole=False)
                with closing(Subscriptions(tmp_path / "data")) as known:
                    known.add_subscriptions([(f"f{number}", "user") for number in range(2000)])
                harm(tmp_path / "data", "damaged", tmp_path / "copy")
                flags += ["--data", str(tmp_path / "data")]
        done = subprocess.run(
            [*before, sys.executable, "app.py", *flags],
            cwd=code,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, ""), done.stderr
        assert re.search(FIRST[row], done.stderr), done.stderr
        assert "Traceback" not in done.stderr
        assert not alive(environment["TEST_MARK"])
        if workers == "2" or fault != "no descriptor":  # to remove a folder takes one
            assert list(Path(environment["TMPDIR"]).iterdir()) == []


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


def hopeless(service: Service, number: int) -> None:
    """Wait until this worker is in a crash loop."""
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


def test_whoever_is_in_the_queue_of_a_worker_that_can_not_start_is_answered_by_the_others(begin: Begin, code: Path) -> None:
    """The kernel spreads connections over all that listen, and resets none."""
    unfit = Unfit(code)
    service = begin("--workers", "4", kind=of(code))
    before = service.workers()
    unfit.say(0, 1)
    for number in (0, 1):
        os.kill(before[number], signal.SIGSTOP)  # nothing is under way there when it is killed, but connections wait
    clients = [service.holds(service.client()) for _ in range(60)]
    for client in clients:
        client.ask("GET", "/healthz")
    for number in (0, 1):
        os.kill(before[number], signal.SIGKILL)
    callers = Callers(service, 4)
    assert {client.read().json["worker"] for client in clients} == {2, 3}
    unfit.say()
    wait_until(lambda: len(service.workers()) == 4)
    wait_until(lambda: {service.request("GET", "/healthz").json["worker"] for _ in range(20)} == {0, 1, 2, 3})
    callers.stop()


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
    sooner(code)
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
    service = begin("--workers", "1", "--hang-limit", "3")
    worker = service.workers()[0]
    with service.client() as client:
        assert client.request("GET", "/healthz").status == 200  # it has been let in
        with no_descriptors(worker):
            ends = time.monotonic() + 5
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
        [sys.executable, "app.py", "--port", "0", "--workers", "2", "--log-clients", "--hang-limit", "3"],
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
        ends = time.monotonic() + 5
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


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_standard_output_that_nobody_reads_stops_no_start(tmp_path: Path, workers: str) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    port = free_port()
    with (tmp_path / "log").open("wb") as log:
        process = green.Popen(
            [sys.executable, "app.py", "--port", str(port), "--workers", workers], cwd=ROOT, stdout=writer, stderr=log
        )  # fmt: skip
    try:

        def answered() -> bool:
            try:
                with Client(port) as client:
                    return client.request("GET", "/readyz").status == 200
            except ConnectionRefusedError:
                return False

        wait_until(answered)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(reader)
        os.close(writer)
