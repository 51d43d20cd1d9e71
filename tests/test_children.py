"""The processes of a service as the supervisor knows them: told, signalled, found to live. With stand-ins for real ones."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from comet.board import FIRST_WORKER
from comet.children import Generation, Reports, Worker
from comet.generation import VARIABLE, Orders

REPEATS = f"""
import json, os, sys
orders = json.loads(os.environ["{VARIABLE}"])
for line in sys.stdin:
    os.write(orders["events"], line.encode())
"""
"""A generation that says what it is told."""

Start = Callable[[str], Generation]


@pytest.fixture
def reports() -> Iterator[Reports]:
    made = Reports()
    yield made
    os.close(made.descriptor)
    os.close(made.inherited)


@pytest.fixture
def start(reports: Reports) -> Iterator[Start]:
    """Generations of this code, with the third bank of two workers."""
    begun: list[Generation] = []

    def start(code: str) -> Generation:
        descriptor = reports.inherited
        orders = Orders(7, 2, [descriptor], descriptor, FIRST_WORKER + 4, descriptor, descriptor, "/nowhere")
        begun.append(Generation.start([sys.executable, "-c", code], orders))
        return begun[-1]

    yield start
    for one in begun:
        one.kill_and_reap()


def test_orders_of_an_older_comet_say_nothing_of_the_counts_of_addresses_and_of_the_file_of_the_router() -> None:
    orders = Orders(7, 2, [3, 4], 5, FIRST_WORKER, 6, 7, "/nowhere", 8, 9)
    assert orders.descriptors() == [3, 4, 5, 6, 7, 8, 9]
    assert Orders.take({VARIABLE: orders.text()}) == orders
    older = {name: value for name, value in json.loads(orders.text()).items() if name not in ("counts", "router_file")}
    taken = Orders.take({VARIABLE: json.dumps(older)})
    assert taken == orders._replace(counts=None, router_file=None)
    assert taken.descriptors() == [3, 4, 5, 6, 7]


def until(reports: Reports, count: int) -> list[tuple[str, int, list[int]]]:
    """So many reports."""
    os.set_blocking(reports.descriptor, True)
    reading = reports.read()
    return [next(reading) for _ in range(count)]


def test_a_generation_is_told_what_to_do_and_reports_in_order(start: Start, reports: Reports) -> None:
    one = start(REPEATS)
    assert (str(one), len(one.restarts), one.slot(0), one.slot(1)) == ("generation 7", 2, FIRST_WORKER + 4, FIRST_WORKER + 5)
    one.fork(1)
    one.signal(one.workers[1], signal.SIGTERM)
    assert until(reports, 2) == [("fork", 1, []), ("signal", 1, [signal.SIGTERM])]
    assert one.workers[1].pid == 0


def test_reports_may_come_in_pieces(reports: Reports) -> None:
    os.write(reports.inherited, b"loaded 1\nborn 1 0 ")
    assert list(reports.read()) == [("loaded", 1, [])]
    os.write(reports.inherited, b"4711\ndied 1 0 4711 -9\n")
    assert list(reports.read()) == [("born", 1, [0, 4711]), ("died", 1, [0, 4711, -9])]
    assert list(reports.read()) == []


def test_one_that_does_not_read_is_killed_and_one_that_has_died_is_told_nothing(start: Start) -> None:
    one = start("import time; time.sleep(600)")
    for _ in range(10_000):  # more than a pipe holds
        one.fork(0)
    status = one.process.wait(30)
    one.fork(0)
    one.died(status)
    assert status == -signal.SIGKILL


def test_whether_one_has_read_what_it_was_told_is_seen(start: Start, reports: Reports) -> None:
    one = start(REPEATS)
    one.fork(1)
    until(reports, 1)
    assert one.reads
    os.kill(one.process.pid, signal.SIGSTOP)
    one.fork(1)
    assert not one.reads
    one.kill_and_reap()


def test_who_is_killed_as_it_dies_is_still_there_to_be_reaped(start: Start) -> None:
    one = start("")
    os.waitid(os.P_PID, one.process.pid, os.WEXITED | os.WNOWAIT)
    one.kill()
    assert os.waitpid(one.process.pid, os.WNOHANG) == (one.process.pid, 0)
    one.died(0)
    one.kill()  # its number may be a stranger's


def test_the_workers_of_one_that_has_died_are_signalled_by_the_supervisor(start: Start) -> None:
    one = start(REPEATS)
    one.kill_and_reap()
    assert (one.orphaned, one.process.returncode) == (True, -signal.SIGKILL)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    worker = one.workers[0] = Worker(0, 0.0, process.pid)
    assert worker.lives()
    one.signal(Worker(1, 0.0), signal.SIGKILL)  # nobody yet
    assert worker.lives()
    one.signal(worker, signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not worker.lives()
