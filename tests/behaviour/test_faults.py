"""What the machine may refuse a service that runs: processes and descriptors. A test for each of its processes: what is refused is a
failed start, the others serve on, and all is as before once the machine has room again."""

import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.behaviour.test_supervisor import Begin, Callers, Service, answers, begin, code, of
from tests.harness import wait_until

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
