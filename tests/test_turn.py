"""Work that is put off to the loop's next turn."""

import time

import gevent
import pytest

from comet.turn import Alarm, Soon, give_way
from tests.harness import wait_until


def test_all_that_is_put_off_runs_once_and_in_order() -> None:
    soon = Soon()
    done: list[str] = []
    soon(lambda: done.append("a"))
    soon(lambda: done.append("b"))
    assert done == []
    give_way()
    assert done == ["a", "b"]
    give_way()
    assert done == ["a", "b"]


def test_work_that_puts_itself_off_lets_others_have_their_turns() -> None:
    soon = Soon()
    turns = {"first": 0, "second": 0, "greenlet": 0}

    def again(name: str) -> None:
        turns[name] += 1
        if turns[name] < 100:
            soon(lambda: again(name))

    def live() -> None:
        while turns["second"] < 100:
            turns["greenlet"] += 1
            give_way()

    soon(lambda: again("first"))
    soon(lambda: again("second"))
    gevent.spawn(live).join(10)
    assert turns["first"] == turns["second"] == 100
    assert turns["greenlet"] > 50


def test_what_fails_keeps_nothing_else_from_being_done(caplog: pytest.LogCaptureFixture) -> None:
    soon = Soon()
    done: list[str] = []

    def fail() -> None:
        raise RuntimeError("as a test has it")

    soon(fail)
    soon(lambda: done.append("a"))
    give_way()
    assert done == ["a"]
    assert "as a test has it" in caplog.text
    soon(lambda: done.append("b"))
    give_way()
    assert done == ["a", "b"]


def test_an_alarm_takes_its_whole_time_whenever_it_is_set() -> None:
    rung: list[float] = []
    alarm = Alarm(0.1, lambda: rung.append(time.monotonic()))
    for count in range(1, 4):
        began = time.monotonic()
        alarm.set()
        assert alarm.active
        wait_until(lambda: len(rung) == count)  # noqa: B023 - it is over before the next
        assert 0.095 < rung[-1] - began < 1
        assert not alarm.active
    alarm.set()
    gevent.sleep(0.06)
    alarm.stop()
    began = time.monotonic()
    alarm.set()
    wait_until(lambda: len(rung) == 4)
    assert rung[-1] - began > 0.095
    gevent.sleep(0.15)
    assert len(rung) == 4
