"""Messages of many channels: few are handed out at once, many in slices, and each channel's in order."""

import random
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import pytest

from comet import fanout
from comet.fanout import AT_ONCE, SLICE, Feeds
from comet.message import Message, Position

COST = SLICE / 20
"""Seconds that a channel takes on the clock here: a slice is twenty of them."""


class World:
    """Feeds whose schedule waits for `turn`; what they hand out, and a clock that only that moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.scheduled: deque[Callable[[], None]] = deque()
        self.feeds = Feeds(self.hand_out, self.scheduled.append, lambda: self.now)
        self.heads: defaultdict[str, int] = defaultdict(int)
        self.got: defaultdict[str, list[int]] = defaultdict(list)
        self.trace: list[str] = []

    def hand_out(self, channel: str, messages: Sequence[Message]) -> None:
        assert {message.channel for message in messages} == {channel}
        self.now += COST
        self.trace.append(channel)
        self.got[channel] += [message.offset for message in messages]

    def send(self, *channels: str, data: bytes = b"x") -> None:
        messages = []
        for channel in channels:
            self.heads[channel] += 1
            messages.append(Message(channel, Position(7, self.heads[channel]), "message", data))
        self.feeds.deliver(messages)

    def turn(self) -> bool:
        """One turn of the loop; whether there was anything."""
        assert len(self.scheduled) <= 1, "scheduled twice"
        if self.scheduled:
            self.scheduled.popleft()()
            return True
        return False

    def check(self) -> None:
        """All that was sent has come, once and in order."""
        assert self.got == {channel: list(range(1, head + 1)) for channel, head in self.heads.items()}


@pytest.fixture
def world() -> World:
    return World()


def names(count: int) -> list[str]:
    return [f"user:{number}" for number in range(count)]


@pytest.mark.parametrize("count", [1, 2, AT_ONCE])
def test_few_are_handed_out_where_they_arrive(world: World, count: int) -> None:
    world.send(*names(count))
    assert world.trace == names(count)
    world.turn()
    assert not world.scheduled


def test_what_is_handed_out_where_it_arrives_is_bounded_in_a_turn_of_the_loop(world: World) -> None:
    """However many frames a read of the router's link has brought."""
    for name in names(1000):
        world.send(name)
    assert world.trace == names(AT_ONCE)
    turns = 0
    while world.turn():
        turns += 1
    assert turns > 900 // 21
    assert world.trace == names(1000)
    world.send(*names(AT_ONCE))
    assert len(world.trace) == 1000 + AT_ONCE
    world.check()


def test_many_go_in_slices_and_each_message_once(world: World) -> None:
    world.send(*names(1000))
    assert world.trace == []
    turns = 0
    while world.turn():
        turns += 1
        assert len(world.trace) <= turns * 21
    assert turns >= 1000 // 21
    assert world.trace == names(1000)
    world.check()


def test_others_pass_what_waits_but_for_messages_of_the_same_channel(world: World) -> None:
    world.send(*names(1000))
    world.send("user:a")
    assert world.trace == ["user:a"]
    world.send("user:999")  # behind the one that waits, and together with it
    assert world.trace == ["user:a"]
    while world.turn():
        pass
    assert world.trace.count("user:999") == 1
    world.check()


def test_several_messages_of_a_channel_are_handed_out_together(world: World) -> None:
    world.send("a", "b", "a", "a")
    assert world.trace == ["a", "b"]
    world.check()


def test_what_waits_of_a_channel_can_be_finished(world: World) -> None:
    world.send(*names(100))
    world.feeds.finish("user:70")
    assert world.trace == ["user:70"]
    world.feeds.finish("user:70")
    world.feeds.finish("nobody")
    assert world.trace == ["user:70"]
    for name in names(100):
        world.feeds.finish(name)
    world.send(*names(100))  # while a slice is scheduled that finds nothing of the first
    while world.turn():
        pass
    world.check()


def test_what_waits_is_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "MAX_PENDING", 100_000)
    world.send(*names(200), data=b"x" * 1000)
    waiting = 200 - len(world.trace)
    assert 0 < waiting * 4000 <= 100_000
    while world.turn():
        pass
    world.check()


def test_a_failure_keeps_nothing_from_the_others(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def fail(channel: str, messages: Sequence[Message]) -> None:
        if channel in ("user:7", "user:77"):
            raise RuntimeError("a bug")
        hand_out(channel, messages)

    hand_out, world.feeds._hand_out = world.hand_out, fail
    world.send(*names(8))
    world.send(*names(100))
    while world.turn():
        pass
    assert world.trace == names(7) + [name for name in names(100) if name not in ("user:7", "user:77")]
    assert [record.getMessage() for record in caplog.records] == [
        f"messages of {name} could not be delivered" for name in ("user:7", "user:7", "user:77")
    ]


def test_order_holds_whatever_comes_when(world: World) -> None:
    numbers = random.Random(3)
    for _ in range(2000):
        kind = numbers.random()
        if kind < 0.3:
            world.turn()
        elif kind < 0.4:
            world.feeds.finish(f"user:{numbers.randrange(200)}")
        elif kind < 0.6:
            world.send(*(f"user:{numbers.randrange(200)}" for _ in range(numbers.randrange(AT_ONCE, 150))))
        else:
            world.send(*(f"user:{numbers.randrange(200)}" for _ in range(numbers.randrange(1, 5))))
    while world.turn():
        pass
    world.check()
