"""The timer wheel of short waits: on time, each number once, and no timer while there are none."""

import random
import time

import gevent
from gevent import get_hub

from comet.server.appointments import AT_ONCE, TICK, Appointments


class Timer:
    """A timer of `Loop`."""

    def __init__(self, loop: "Loop", seconds: float) -> None:
        self.loop = loop
        self.at = loop.now + seconds * 1000

    def start(self, ring: object) -> None:
        self.loop.timers.append((self, ring))

    def stop(self) -> None:
        self.loop.timers = [pair for pair in self.loop.timers if pair[0] is not self]

    def close(self) -> None:
        """Nothing is left."""


class Loop:
    """A loop whose time the test tells, in milliseconds."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[Timer, object]] = []
        self.rings = 0

    def timer(self, seconds: float) -> Timer:
        return Timer(self, seconds)

    def until(self, now: float) -> None:
        """Let time go on, and ring what is due on the way."""
        while due := [pair for pair in self.timers if pair[0].at <= now]:
            timer, ring = min(due, key=lambda pair: pair[0].at)
            self.now = max(self.now, timer.at)
            self.rings += 1
            assert callable(ring)
            ring()
        self.now = now


class World:
    """Appointments whose calls are noted, with their time."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.kept: list[tuple[int, float]] = []
        self.appointments = Appointments(lambda number: self.kept.append((number, self.loop.now)), self.loop, lambda: int(self.loop.now))


def test_each_is_called_once_within_a_tick_of_its_time() -> None:
    dice = random.Random(3)
    world = World()
    due = {number: 1000 + dice.randint(0, 10_000) for number in range(500)}
    for number, when in due.items():
        world.appointments.make(number, when)
    world.loop.until(12_000)
    assert sorted(number for number, _ in world.kept) == sorted(due)
    assert all(due[number] < now <= due[number] + TICK for number, now in world.kept)
    assert world.loop.rings <= 10_000 / TICK + 1


def test_without_any_there_is_no_timer() -> None:
    world = World()
    assert not world.loop.timers
    world.appointments.make(1, 1500)
    assert len(world.loop.timers) == 1
    world.loop.until(2000)
    assert not world.loop.timers
    assert len(world.appointments) == 0


def test_an_earlier_time_counts_and_a_later_one_is_looked_at_at_the_earlier() -> None:
    world = World()
    world.appointments.make(1, 9000)
    world.appointments.make(1, 2000)
    world.appointments.make(1, 5000)
    world.loop.until(10_000)
    assert [number for number, _ in world.kept] == [1]
    assert 2000 < world.kept[0][1] <= 2000 + TICK


def test_a_number_that_is_asked_for_again_and_again_stands_there_once() -> None:
    world = World()
    for when in range(5000, 9000):
        world.appointments.make(7, when)
    assert len(world.appointments) == 1
    assert sum(map(len, world.appointments._numbers.values())) == 1


def test_the_next_may_be_made_in_a_call() -> None:
    world = World()
    appointments = world.appointments

    def keep(number: int) -> None:
        world.kept.append((number, world.loop.now))
        if len(world.kept) < 5:
            appointments.make(number, int(world.loop.now) + 500)

    appointments._keep = keep
    appointments.make(1, 1500)
    world.loop.until(10_000)
    assert len(world.kept) == 5
    assert not world.loop.timers


def test_very_many_are_called_in_several_turns_of_the_loop() -> None:
    world = World()
    for number in range(3 * AT_ONCE):
        world.appointments.make(number, 1500)
    world.loop.until(2000)
    assert sorted(number for number, _ in world.kept) == list(range(3 * AT_ONCE))
    assert world.loop.rings >= 3


def test_closed_it_calls_nobody() -> None:
    world = World()
    world.appointments.make(1, 1500)
    world.appointments.close()
    world.loop.until(5000)
    assert not world.kept


def test_on_gevents_loop() -> None:
    kept: list[int] = []
    appointments = Appointments(kept.append, get_hub().loop)
    now = int(time.monotonic() * 1000)
    for number, wait in ((1, 300), (2, 100), (3, 200), (4, 100)):
        appointments.make(number, now + wait)
    with gevent.Timeout(20):
        while len(kept) < 4:
            gevent.sleep(0.01)
    assert kept == [2, 4, 3, 1]
    appointments.close()
