"""Work that is put off to the loop's next turn."""

import os
import time
from collections.abc import Iterator

import gevent
import pytest
from gevent import get_hub
from gevent.event import Event

from comet import turn
from comet.kernel.processes import waited
from comet.turn import SHARE, TRICKLE, Alarm, Pace, Soon, gather, give_way, trickle, wait_for_input
from tests.harness import AMPLE, TIMEOUT, wait_until


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


class Clock:
    """Seconds, as far as they are used up."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """What a module takes for `time.monotonic`."""
        return self.now


def test_those_who_give_way_take_a_share_of_a_turn_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(turn, "time", clock)
    went_on: list[list[int]] = [[]]
    turns = get_hub().loop.prepare()

    def work(number: int) -> None:
        give_way()
        went_on[-1].append(number)
        clock.now += 0.6 * SHARE

    several = [gevent.spawn(work, number) for number in range(7)]
    gevent.sleep(0)
    turns.start(lambda: went_on.append([]))
    gevent.joinall(several, timeout=AMPLE)
    turns.stop()
    turns.close()
    assert [those for those in went_on if those] == [[0, 1], [2, 3], [4, 5], [6]]


def test_one_goes_on_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(turn, "time", clock)
    done: list[int] = []

    def work(number: int) -> None:
        for _ in range(3):
            give_way()
            clock.now += 10 * SHARE
            done.append(number)

    gevent.joinall([gevent.spawn(work, number) for number in range(2)], timeout=AMPLE)
    assert done == [0, 1, 0, 1, 0, 1]


def test_addresses_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(turn, "time", clock)
    done: list[str] = []

    def work(whose: str) -> None:
        for _ in range(3):
            give_way(whose)
            clock.now += 0.6 * SHARE
            done.append(whose)

    gevent.joinall([gevent.spawn(work, whose) for whose in ["many"] * 10 + ["one"]], timeout=AMPLE)
    assert len(done) == 33
    assert [index for index, whose in enumerate(done) if whose == "one"] == [1, 3, 5]


def test_who_goes_on_and_gives_way_again_does_so_in_another_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "time", Clock())
    turns = 0
    watcher = get_hub().loop.prepare()

    def count() -> None:
        nonlocal turns
        turns += 1

    def work(whose: str) -> None:
        for _ in range(20):
            give_way(whose)

    watcher.start(count)
    gevent.joinall([gevent.spawn(work, whose) for whose in "ab"], timeout=AMPLE)
    watcher.stop()
    watcher.close()
    assert turns >= 20


def test_who_is_told_to_end_holds_nobody_up() -> None:
    several = [gevent.spawn(give_way) for _ in range(3)]
    gevent.sleep(0)
    several[0].kill(block=False)
    several[2].kill(block=False)
    gevent.joinall(several, timeout=AMPLE)
    assert [one.successful() and one.value is None for one in several] == [False, True, False]
    give_way()


def test_they_trickle_one_by_one() -> None:
    began = time.monotonic()
    several = [gevent.spawn(trickle) for _ in range(20)]
    gevent.sleep(0)
    give_way()
    assert not all(several[number].ready() for number in range(20))
    gevent.joinall(several, timeout=AMPLE)
    assert all(one.successful() for one in several)
    assert time.monotonic() - began >= 20 * TRICKLE


@pytest.fixture
def pipes() -> Iterator[list[tuple[int, int]]]:
    """Ends to read from and to write to."""
    several = [os.pipe() for _ in range(7)]
    yield several
    for reader, writer in several:
        os.close(reader)
        os.close(writer)


def test_input_is_waited_for(pipes: list[tuple[int, int]]) -> None:
    reader, writer = pipes[0]
    began = time.monotonic()
    assert not wait_for_input(reader, 0.05)
    assert 0.045 < time.monotonic() - began < AMPLE
    assert not wait_for_input(reader, -1.0)
    waits = gevent.spawn(wait_for_input, reader, TIMEOUT)
    gevent.sleep(0)
    os.write(writer, b"x")
    assert waits.get(timeout=AMPLE) is True
    assert wait_for_input(reader, TIMEOUT)  # it is still there


def test_what_comes_to_many_at_once_is_looked_at_in_turns(pipes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(turn, "time", clock)
    went_on: list[list[int]] = [[]]
    turns = get_hub().loop.prepare()

    def work(reader: int) -> None:
        assert wait_for_input(reader, TIMEOUT)
        went_on[-1].append(reader)
        clock.now += 0.6 * SHARE

    several = [gevent.spawn(work, reader) for reader, _ in pipes]
    gevent.sleep(0)
    turns.start(lambda: went_on.append([]))
    for _, writer in pipes:
        os.write(writer, b"x")
    gevent.joinall(several, timeout=AMPLE)
    turns.stop()
    turns.close()
    assert [len(those) for those in went_on if those] == [2, 2, 2, 1]


def test_who_is_told_to_end_waits_for_no_input_any_more(pipes: list[tuple[int, int]]) -> None:
    reader, writer = pipes[0]
    waits = gevent.spawn(wait_for_input, reader, TIMEOUT)
    comes = gevent.spawn(wait_for_input, reader, TIMEOUT)
    gevent.sleep(0)
    waits.kill()
    os.write(writer, b"x")
    assert comes.get(timeout=AMPLE) is True


def test_an_alarm_takes_its_whole_time_whenever_it_is_set() -> None:
    rung: list[float] = []
    alarm = Alarm(0.1, lambda: rung.append(time.monotonic()))
    for count in range(1, 4):
        began = time.monotonic()
        alarm.set()
        assert alarm.active
        wait_until(lambda: len(rung) == count)  # noqa: B023 - it is over before the next
        assert 0.095 < rung[-1] - began < AMPLE
        assert not alarm.active
    alarm.set()
    gevent.sleep(0.06)
    alarm.stop()
    count = len(rung)  # it has rung if that took long
    began = time.monotonic()
    alarm.set()
    wait_until(lambda: len(rung) == count + 1)
    assert rung[-1] - began > 0.095
    gevent.sleep(0.15)
    assert len(rung) == count + 1


def turns_to_find(pieces: int, apart: float) -> tuple[int, float]:
    """How many turns of the loop it takes to find so many pieces in a pipe, of which another process puts in one every `apart`
    seconds; and how long."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        for _ in range(pieces):
            time.sleep(apart)
            os.write(writer, b".")
        os._exit(0)
    found: list[int] = []
    whole = Event()
    watcher = get_hub().loop.io(reader, 1)

    def find() -> None:
        found.append(len(os.read(reader, 100)))
        if sum(found) == pieces:
            whole.set()

    began = time.monotonic()
    watcher.start(find)
    try:
        assert whole.wait(20)  # one timer: each that rings is a turn, in which the pipe is looked at as well
    finally:
        watcher.stop()
        watcher.close()
        os.close(reader)
        os.close(writer)
        os.waitpid(pid, 0)
    return len(found), time.monotonic() - began


def test_what_comes_while_the_loop_rests_is_found_together() -> None:
    gather(0.1)
    try:
        turns, seconds = turns_to_find(40, apart=0.005)
    finally:
        gather(0)
    assert turns <= seconds / 0.1 + 2
    assert any(turns_to_find(40, apart=0.005)[0] > 10 for _ in range(20))  # some, if this process had to wait for a core


def test_timers_ring_on_time_though_the_loop_rests_unless_they_are_gathered() -> None:
    def took() -> float:
        gevent.sleep(0)
        began = time.monotonic() - waited()
        for _ in range(10):
            gevent.sleep(0.002)
        return time.monotonic() - waited() - began

    gather(0.1)
    try:
        assert any(took() < 0.5 for _ in range(20))
        gather(0.1, timers=0.1)
        assert took() > 0.8
    finally:
        gather(0)
    assert any(took() < 0.5 for _ in range(20))


def test_nobody_rests_while_one_is_in_a_hurry() -> None:
    rests: list[float] = []
    pace = Pace(rests.append)
    pace.rest(0.02)
    pace.hurry("a")
    pace.hurry("a")
    pace.hurry("b")
    assert rests == [0.02, 0.0]
    pace.rest(0.05)
    pace.relax("a")
    pace.relax("nobody")
    assert rests == [0.02, 0.0]
    pace.relax("b")
    pace.relax("b")
    assert rests == [0.02, 0.0, 0.05]


def test_who_never_rests_is_not_told_of_hurry() -> None:
    rests: list[float] = []
    pace = Pace(rests.append)
    pace.hurry("a")
    pace.relax("a")
    assert rests == []
    pace.hurry("a")
    pace.rest(0.0)
    pace.relax("a")
    assert rests == []
