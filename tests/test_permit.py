"""Permits between processes: each as many at a time as there are places, whoever dies, stops or asks again."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import gevent
import pytest
from gevent.threadpool import ThreadPool

from comet import permit as module
from comet.permit import Permit
from comet.turn import Pace
from tests.harness import wait_until

OTHER = """
import fcntl, os, sys
fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX, 1, int(sys.argv[2]))
print("has it", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def memory() -> Iterator[int]:
    """As the board has it."""
    descriptor = os.memfd_create("board")
    yield descriptor
    os.close(descriptor)


class Other:
    """Another worker, which holds the permit of a place until it ends."""

    def __init__(self, descriptor: int, place: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER, str(descriptor), str(place)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[descriptor],
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"has it\n"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def held_by_others(descriptor: int, place: int) -> bool:
    """As a process of its own would see it: a lock is no obstacle to its owner."""
    test = "import fcntl, sys; fcntl.lockf(int(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, int(sys.argv[2]))"
    command = [sys.executable, "-c", test, str(descriptor), str(place)]
    return subprocess.run(command, pass_fds=[descriptor], capture_output=True, check=False).returncode != 0


def test_it_is_had_at_once_where_nobody_has_it(memory: int) -> None:
    granted: list[float] = []
    permit = Permit(memory, 0)
    permit.ask(lambda: granted.append(time.monotonic()))
    assert not granted, "the loop says it, later"
    wait_until(lambda: granted)
    assert held_by_others(memory, 0)
    assert not held_by_others(memory, 1)
    permit.give_back()
    assert not held_by_others(memory, 0)


def test_it_comes_when_who_has_it_dies(memory: int) -> None:
    other = Other(memory, 0)
    granted: list[None] = []
    permit = Permit(memory, 0)
    permit.ask(lambda: granted.append(None))
    gevent.sleep(0.2)  # the loop runs
    assert not granted
    other.end()
    wait_until(lambda: granted)
    permit.give_back()
    assert granted == [None]


def test_nobody_rests_while_it_is_asked_for(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of one that rests would hear of it late, and all behind it as well."""
    rests: list[float] = []
    pace = Pace(rests.append)
    pace.rest(0.05)
    monkeypatch.setattr(module, "PACE", pace)
    granted: list[list[float]] = []
    permit = Permit(memory, 0)
    permit.ask(lambda: granted.append(rests.copy()))
    assert rests == [0.05, 0.0]
    wait_until(lambda: granted)
    assert granted == [[0.05, 0.0, 0.05]]
    permit.give_back()


def test_a_place_of_its_own_is_free(memory: int) -> None:
    other = Other(memory, 0)
    granted: list[None] = []
    permit = Permit(memory, 1)
    permit.ask(lambda: granted.append(None))
    wait_until(lambda: granted)
    permit.give_back()
    other.end()


def test_who_waits_too_long_goes_ahead_without(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves the queue when it has come to its head."""
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    other = Other(memory, 0)
    granted: list[None] = []
    permit = Permit(memory, 0)
    permit.ask(lambda: granted.append(None))
    wait_until(lambda: granted)
    permit.give_back()
    permit.ask(lambda: granted.append(None))  # and again, while it is still in the queue
    wait_until(lambda: len(granted) == 2)
    permit.give_back()
    other.end()
    wait_until(lambda: not permit._locking)
    assert not held_by_others(memory, 0)
    assert len(granted) == 2


def test_asked_again_and_again_it_is_granted_each_time(memory: int) -> None:
    permit = Permit(memory, 0)
    granted: list[None] = []
    threads = len(os.listdir("/proc/self/task"))
    for count in range(1, 50):
        permit.ask(lambda: granted.append(None))
        wait_until(lambda: len(granted) == count)  # noqa: B023 - it is over before the next
        permit.give_back()
    assert not held_by_others(memory, 0)
    assert len(os.listdir("/proc/self/task")) <= threads + 1


def test_patience_is_for_each_time_anew(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 2.0)
    permit = Permit(memory, 0)
    granted: list[None] = []
    for count in range(1, 6):
        other = Other(memory, 0)
        began = time.monotonic()
        permit.ask(lambda: granted.append(None))
        gevent.sleep(0.5)
        assert len(granted) == count - 1 or time.monotonic() - began > 1.9, "without the lock, though there was time"
        other.end()
        wait_until(lambda: len(granted) == count)  # noqa: B023 - it is over before the next
        permit.give_back()


def test_without_a_thread_it_goes_ahead_and_asks_the_next_time(
    memory: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    permit = Permit(memory, 0)
    granted: list[None] = []
    with monkeypatch.context() as patched:
        patched.setattr(ThreadPool, "spawn", refuse)
        permit.ask(lambda: granted.append(None))
        wait_until(lambda: granted)
    assert "can't start new thread" in caplog.text
    permit.give_back()
    permit.ask(lambda: granted.append(None))
    wait_until(lambda: len(granted) == 2)
    assert held_by_others(memory, 0)
    permit.give_back()


def test_it_can_not_be_had_of_what_is_no_file(caplog: pytest.LogCaptureFixture) -> None:
    """Then the sweep goes on, and the log says why."""
    granted: list[None] = []
    descriptor = os.open("/dev/null", os.O_RDONLY)  # not to be written
    permit = Permit(descriptor, 0)
    permit.ask(lambda: granted.append(None))
    wait_until(lambda: granted)
    assert "a permit can't be had" in caplog.text
    os.close(descriptor)


def test_a_file_is_the_boards() -> None:
    """A lock goes with any descriptor of the file that its owner closes: nobody may close one in a worker that serves."""
    first = os.memfd_create("board")
    second = os.open(f"/proc/self/fd/{first}", os.O_RDWR)
    fcntl.lockf(first, fcntl.LOCK_EX, 1, 0)
    os.close(second)
    assert not held_by_others(first, 0)
    os.close(first)
