"""What a process of a load test has been told, and by whom."""

from typing import Any

import pytest
from locust.runners import WorkerRunner

from comet.kernel import limits
from loadtest import control
from loadtest.control import Worker
from tests.loadtest.work import environment


class Runner(WorkerRunner):
    """Of a process without a master."""

    worker_index = 0

    def __init__(self) -> None: ...

    def register_message(self, *_: Any, **__: Any) -> None:
        """Nobody sends any."""


def test_a_worker_keeps_the_addresses_and_the_key_of_its_own_machine() -> None:
    made = environment("--sources", "10.0.0.11", "--key", "own", "--clients", "5")
    worker = Worker(made, Runner())
    vars(made.parsed_options).update(sources="", key="", clients=7, expect_workers=2)  # as Locust does
    worker._begin()  # its listener
    assert (worker.target.sources, worker.asked.key, worker.asked.clients) == (("10.0.0.11",), "own", 7)
    worker._reporter.kill()


def test_without_any_it_has_the_masters() -> None:
    made = environment("--clients", "5")
    worker = Worker(made, Runner())
    vars(made.parsed_options).update(sources="10.0.0.1", key="all", expect_workers=2)
    worker._begin()  # its listener
    assert (worker.target.sources, worker.asked.key) == (("10.0.0.1",), "all")
    worker._reporter.kill()


@pytest.mark.parametrize(("processes", "gives_way"), [(None, False), (4, False), (5, True)])
def test_a_process_among_more_than_two_a_core_gives_way(monkeypatch: pytest.MonkeyPatch, processes: int | None, gives_way: bool) -> None:
    done: list[str] = []
    monkeypatch.setattr(control, "die_with_parent", lambda: None)  # which is pytest here
    monkeypatch.setattr(control, "give_way", lambda: done.append("gave way"))
    monkeypatch.setattr(limits, "cores", lambda: 2)
    made = environment()
    vars(made.parsed_options).update(processes=processes)
    control.set_up(made, Runner())
    assert bool(done) == gives_way
