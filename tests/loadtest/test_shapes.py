"""What the shapes wait for and what they object to, tick by tick, with counts that the tests make up."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from locust.dispatch import UsersDispatcher
from locust.runners import Runner, WorkerNode

from loadtest import shapes
from loadtest.control import Master, Worker
from loadtest.counting import SENT, Send
from loadtest.shapes import Metabrew10k, Million, Phased, Tick
from loadtest.users import FriendSender, StreamUser
from loadtest.verify import FEED, number
from tests.loadtest.work import process, steps


class Shape(Phased):
    """Opens, drains, audits."""

    abstract = False

    def script(self) -> Iterator[Tick]:
        yield from self.until_open(5)
        self.master.order(rate=0.0)
        yield from self.drain()
        yield from self.audit()


class Run:
    """A shape, its master and its worker, all in this process."""

    def __init__(self, shape: type[Phased] = Shape, clients: int = 10) -> None:
        self.shape = shape()
        self.environment, self.worker, self.master = process("--clients", str(clients), shape=self.shape)
        self.shape.tick()  # the master forgets what was before

    def steps(self, seconds: int) -> int:
        return steps(self.shape, self.worker, seconds)

    def close(self) -> None:
        self.master._end()


@pytest.fixture
def run() -> Iterator[Run]:
    made = Run()
    yield made
    made.close()


def publish(worker: Worker, count: int) -> None:
    worker.counts.record(Send(FEED, SENT, number(1, count, FEED), 0, 0, 0, 0))


def test_a_drain_waits_for_clients_that_are_away(run: Run) -> None:
    run.worker.counts.open = 5
    assert run.steps(1) == 1
    run.worker.counts.open = 4  # it left
    assert run.steps(10) == 10
    run.worker.counts.open = 5
    assert run.steps(10) < 3
    assert run.master.verdict is not None
    assert not run.master.failures


def test_a_drain_waits_for_answers(run: Run) -> None:
    run.worker.counts.open = 5
    run.worker.counts.begun = 2
    publish(run.worker, 1)
    assert run.steps(10) == 10
    publish(run.worker, 2)
    assert run.steps(10) < 3


def test_a_drain_waits_until_senders_have_heard_of_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.worker.counts.open = 5
    heard: list[Any] = []
    monkeypatch.setattr(run.environment.runner, "send_message", lambda kind, data: heard.append(data) if "rate" in data else None)
    told = partial(reported, run.master)
    run.worker.runner = cast(Runner, SimpleNamespace(stats=run.environment.stats, send_message=told))
    assert run.steps(10) == 10
    run.worker._obey(run.environment, SimpleNamespace(data=heard[-1]))
    monkeypatch.undo()
    assert run.steps(10) < 3


def reported(master: Master, kind: str, data: Any) -> None:
    listener, _ = master.runner.custom_messages[kind]
    listener(master.environment, SimpleNamespace(data=data, node_id="one"))


def test_a_client_that_never_comes_back_is_a_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "DRAINED", 0.5)
    run.worker.counts.open = 5
    assert run.steps(1) == 1
    run.worker.counts.open = 3
    while run.steps(1):
        pass
    assert run.master.failures == {"audit: away": 2}


def test_a_load_process_that_dies_ends_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.steps(2) == 2
    monkeypatch.setattr(Master, "processes", 0)
    assert run.steps(2) == 0
    assert run.master.facts["failed"] == "a load process has ended, or gives no sign of life"
    assert run.environment.process_exit_code == 1


def test_as_many_of_each_kind_as_were_asked_for_with_the_senders_there_first() -> None:
    run = Run(Metabrew10k, clients=1000)
    dispatcher = UsersDispatcher([WorkerNode(str(one)) for one in range(2)], [FriendSender, StreamUser])
    run.environment.runner._users_dispatcher = dispatcher  # type: ignore[union-attr]
    had: Any = {}
    tick: Any = run.shape.now()
    for _ in range(2):
        dispatcher.new_dispatch(tick[0], 1e6, tick[2])
        had = list(dispatcher)[-1]
        tick = run.shape.tick()
    run.close()
    assert {kind: sum(one[kind] for one in had.values()) for kind in ("FriendSender", "StreamUser")} == {
        "FriendSender": 50,
        "StreamUser": 1000,
    }


def test_a_run_that_was_stopped_does_not_go_on_in_the_next(run: Run) -> None:
    run.worker.counts.open = 5
    run.master.facts["of"] = "the first"
    run.master._end()
    run.shape.tick()
    assert not run.master.facts


@pytest.mark.parametrize(("flags", "said"), [(("--then", "chrun"), "--then chrun"), (("--friends", "/nowhere"), "--friends /nowhere")])
def test_what_is_wrong_is_said_at_the_beginning(flags: tuple[str, str], said: str) -> None:
    shape = Shape()
    _, _, master = process(*flags, shape=shape)
    assert shape.tick() is None
    assert said in master.facts["failed"]
    master._end()


def test_the_master_makes_its_folder(tmp_path: Path) -> None:
    shape = Shape()
    _, _, master = process("--out", str(tmp_path / "a" / "run"), shape=shape)
    shape.tick()
    master._end()
    assert (tmp_path / "a" / "run" / "summary.json").exists()


class Searching(Million):
    """The search, with nothing sent: one step."""

    abstract = False

    def script(self) -> Iterator[Tick]:
        yield from self.search()
        yield self.now()


def test_nothing_is_late_in_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "STEP", 0.2)
    run = Run(Searching)
    began = time.monotonic()
    assert run.worker.counts.late > 1e14
    while "search" not in run.master.facts:
        assert run.steps(1) == 1
        assert time.monotonic() < began + 30
    assert run.worker.counts.late == 5_000_000
    assert run.master.facts["search"] == {"refused": 0, "unsure": 0}
    run.close()
