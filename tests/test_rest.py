"""How long a worker rests between two turns, by how long it has waited for a core."""

import os
import subprocess
import sys
import time

import pytest

from comet.kernel import processes
from comet.kernel.processes import waited
from comet.rest import MOST, Rest
from tests.harness import ROOT


class Worker:
    """One that waits `share` of its time for a core, and is looked at once a second."""

    def __init__(self) -> None:
        self.now = 50.0
        self.waited = 7.0
        self.rests: list[float] = []
        self.rest = Rest(lambda: self.waited, self.rests.append, lambda: self.now)

    def second(self, share: float, seconds: float = 1.0) -> float:
        """Another one; the rest after it."""
        self.now += seconds
        self.waited += share * seconds
        self.rest.look()
        return self.rests[-1]


def test_who_gets_its_core_at_once_does_not_rest() -> None:
    worker = Worker()
    assert [worker.second(0.0), worker.second(0.0)] == [0.0, 0.0]


def test_a_look_too_soon_after_another_says_nothing_yet() -> None:
    worker = Worker()
    worker.waited += 0.01
    worker.rest.look()
    assert worker.rests == []
    assert worker.second(0.19) == pytest.approx(0.05)  # what it waited before is of this second


def test_the_longer_it_waits_the_longer_it_rests_and_back() -> None:
    worker = Worker()
    assert worker.second(0.04) == pytest.approx(0.01)
    assert worker.second(0.2) == pytest.approx(0.05)
    assert worker.second(0.9) == MOST
    assert worker.second(0.04, seconds=5.0) == pytest.approx(0.01)  # a share, whenever it was looked at
    assert worker.second(0.0) == 0.0


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="this kernel does not count")
def test_the_wait_for_a_core_is_counted() -> None:
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})  # and so for the other one, which takes half of it
    other = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        before, until = waited(), time.monotonic() + 0.5
        while time.monotonic() < until:
            pass
        assert 0.05 < waited() - before < time.monotonic() - until + 0.6
    finally:
        os.sched_setaffinity(0, allowed)
        other.kill()
        other.wait()
        if other.stdout is not None:
            other.stdout.close()


def test_where_the_kernel_does_not_tell_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_schedstat", processes.Kept("/nowhere"))
    assert waited() == 0.0
