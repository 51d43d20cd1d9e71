"""Sweeps: fair, in slices, coalescing, in order; whoever joins, leaves or fails meanwhile. A clock and a schedule of its own."""

import random
from collections import deque
from collections.abc import Callable
from functools import partial

import pytest

from comet import fanout
from comet.fanout import DIRECT, SLICE, STRIDE, Fanout, Members
from comet.framing import Batch
from comet.message import MESSAGE_COST, Message, Position

EPOCH = 7
COST = SLICE / 20
"""Seconds that a delivery takes on the clock here: a slice is twenty of them."""


class World:
    """A fan-out, whose schedule waits for `turn`, and a clock that only deliveries move."""

    def __init__(self, permit: "Permit | None" = None) -> None:
        self.now = 0.0
        self.permit = permit
        self.scheduled: deque[Callable[[], None]] = deque()
        self.fanout = Fanout(self.scheduled.append, lambda: self.now, permit)
        self.trace: list[str] = []
        """Names of receivers, as they are served."""

    def turn(self) -> bool:
        """One turn of the loop: what was scheduled before it. Whether there was anything."""
        assert len(self.scheduled) <= 1, "the fan-out is scheduled twice"
        if self.scheduled:
            self.scheduled.popleft()()
            return True
        return False

    def run(self) -> int:
        """Turns until nothing is left; how many it took."""
        turns = 0
        while self.turn():
            turns += 1
            assert turns < 100_000, "it never ends"
        return turns

    def members(self, count: int, name: str = "r") -> "tuple[Members[Receiver], list[Receiver]]":
        receivers = [Receiver(self, f"{name}{number}") for number in range(count)]
        return Members(*receivers), receivers


class Permit:
    """Grants when the test says so."""

    def __init__(self) -> None:
        self.granted: Callable[[], None] | None = None
        self.held = False
        self.asked = 0

    def ask(self, granted: Callable[[], None]) -> None:
        assert self.granted is None, "asked twice"
        assert not self.held, "asked by who has it"
        self.asked += 1
        self.granted = granted

    def give_back(self) -> None:
        assert self.held, "given back by who has it not"
        self.held = False

    def grant(self) -> bool:
        """Whether somebody waited."""
        granted, self.granted = self.granted, None
        if granted is None:
            return False
        self.held = True
        granted()
        return True


class Host:
    """Where all receivers live."""

    def deliver(self, receiver: "Receiver", batch: Batch) -> None:
        receiver.deliver(batch)


HOST = Host()


class Receiver:
    """A subscriber that notes its batches."""

    def __init__(self, world: World, name: str = "r") -> None:
        self.world = world
        self.name = name
        self.ended = False
        self.host = HOST
        self.batches: list[Batch] = []
        self.on_delivery: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return self.name

    def deliver(self, batch: Batch) -> None:
        if self.ended:  # as a subscriber that has left does
            return
        self.world.now += COST
        self.world.trace.append(self.name)
        self.batches.append(batch)
        if self.on_delivery is not None:
            self.on_delivery()

    @property
    def offsets(self) -> list[int]:
        return [message.offset for batch in self.batches for message in batch.messages]

    @property
    def sizes(self) -> list[int]:
        return [len(batch.messages) for batch in self.batches]


def leave(members: "Members[Receiver]", receiver: Receiver) -> None:
    """As the hub has it."""
    receiver.ended = True
    members.leave()


class Channel:
    """Makes a channel's messages."""

    def __init__(self, name: str = "a") -> None:
        self.name = name
        self.head = 0

    def next(self, count: int = 1, data: bytes = b"x") -> list[Message]:
        first = self.head + 1
        self.head += count
        return [Message(self.name, Position(EPOCH, offset), "message", data) for offset in range(first, self.head + 1)]


@pytest.fixture
def world() -> World:
    return World()


# -- few, many


@pytest.mark.parametrize("count", [1, 2, DIRECT])
def test_few_are_served_inside_the_publish(world: World, count: int) -> None:
    members, receivers = world.members(count)
    world.fanout.deliver(members, Channel().next(2))
    assert [one.offsets for one in receivers] == [[1, 2]] * count
    assert not world.scheduled


def test_many_are_served_later(world: World) -> None:
    members, receivers = world.members(DIRECT + 1)
    world.fanout.deliver(members, Channel().next())
    assert not world.trace
    world.run()
    assert [one.offsets for one in receivers] == [[1]] * (DIRECT + 1)
    assert world.trace == [one.name for one in receivers]


def test_all_of_a_sweep_get_the_same_batch(world: World) -> None:
    members, receivers = world.members(100)
    world.fanout.deliver(members, Channel().next(3))
    world.run()
    assert len({id(one.batches[0]) for one in receivers}) == 1
    assert {one.batches[0].before for one in receivers} == {0}


def test_encoded_forms_are_let_go_at_the_end_of_a_sweep_and_of_a_direct_delivery(world: World) -> None:
    for count in (2, 100):
        members, _ = world.members(count)
        (message,) = Channel().next()
        members.present[0].on_delivery = partial(setattr, message, "frames", {"json": b""})
        world.fanout.deliver(members, [message])
        world.run()
        assert message.frames is None


# -- slices


def test_a_slice_is_bounded_in_time_and_everything_else_has_a_turn_between_two(world: World) -> None:
    members, receivers = world.members(1000)
    world.fanout.deliver(members, Channel().next())
    served: list[int] = []
    while world.scheduled:
        before = world.now
        world.turn()
        served.append(len(world.trace) - sum(served))
        assert world.now - before <= SLICE + STRIDE * COST
    assert sum(served) == 1000
    assert len(served) >= 1000 * COST / (SLICE + STRIDE * COST)
    assert all(one.offsets == [1] for one in receivers)


def test_a_slice_is_not_wasted_on_a_small_sweep(world: World) -> None:
    members, _ = world.members(DIRECT + 1)
    world.fanout.deliver(members, Channel().next())
    assert world.run() == 1


def test_a_direct_message_passes_a_broadcast(world: World) -> None:
    crowd, _ = world.members(10_000)
    one, (receiver,) = world.members(1, "direct")
    world.fanout.deliver(crowd, Channel("all").next())
    world.turn()
    world.fanout.deliver(one, Channel("one").next())
    assert receiver.offsets == [1]
    assert world.scheduled


def test_a_smaller_sweep_that_comes_later_ends_earlier(world: World) -> None:
    crowd, _ = world.members(10_000, "c")
    group, receivers = world.members(100, "g")
    world.fanout.deliver(crowd, Channel("all").next())
    for _ in range(5):
        world.turn()
    served = len(world.trace)
    world.fanout.deliver(group, Channel("group").next())
    while not receivers[-1].batches:
        world.turn()
    assert len(world.trace) - served <= 2 * 100 + 3 * STRIDE  # as many of the crowd as of the group, about


def test_channels_take_turns(world: World) -> None:
    crowds = [world.members(400, name) for name in "abcde"]
    for (members, _), name in zip(crowds, "abcde", strict=True):
        world.fanout.deliver(members, Channel(name).next())
    world.run()
    place = {name: [index for index, served in enumerate(world.trace) if served[0] == name] for name in "abcde"}
    for rank in range(400):
        places = [place[name][rank] for name in "abcde"]
        assert max(places) - min(places) <= 5 * STRIDE


def test_a_channel_that_never_falls_silent_does_not_keep_another_waiting(world: World) -> None:
    busy, _ = world.members(50, "b")
    calm, receivers = world.members(50, "c")
    flood = Channel("busy")
    busy.present[0].on_delivery = lambda: world.fanout.deliver(busy, flood.next())  # each sweep brings the next
    world.fanout.deliver(busy, flood.next())
    world.fanout.deliver(calm, Channel("calm").next())
    for _ in range(20):
        world.turn()
    assert all(one.offsets == [1] for one in receivers)
    assert world.scheduled


# -- coalescing and order


def test_what_comes_during_a_sweep_is_one_batch_of_the_next(world: World) -> None:
    members, receivers = world.members(1000)
    channel = Channel()
    world.fanout.deliver(members, channel.next())
    world.turn()
    for _ in range(9):
        world.fanout.deliver(members, channel.next(2))
        world.turn()
    assert world.scheduled
    world.run()
    assert {tuple(one.sizes) for one in receivers} == {(1, 18)}
    assert {tuple(one.offsets) for one in receivers} == {tuple(range(1, 20))}


def test_what_comes_before_a_sweep_begins_goes_with_it(world: World) -> None:
    members, receivers = world.members(100)
    channel = Channel()
    for _ in range(5):
        world.fanout.deliver(members, channel.next())
    world.run()
    assert {tuple(one.sizes) for one in receivers} == {(5,)}


def test_a_channel_that_shrinks_during_a_sweep_still_keeps_its_order(world: World) -> None:
    members, receivers = world.members(100)
    channel = Channel()
    world.fanout.deliver(members, channel.next())
    world.turn()
    for one in receivers[3:]:
        leave(members, one)
    world.fanout.deliver(members, channel.next())  # three are few, but one is still to come first
    world.run()
    world.fanout.deliver(members, channel.next())
    assert [one.offsets for one in receivers[:3]] == [[1, 2, 3]] * 3
    assert not world.scheduled


def test_a_batch_holds_only_offsets_that_follow_each_other(world: World) -> None:
    """A batch goes to sleepers as a whole, from `before` to `last`: a hole within would never be noticed."""
    for count in (3, 100):
        members, receivers = world.members(count)
        channel = Channel()
        first = channel.next()
        channel.next(2)  # lost on the way from the backplane
        world.fanout.deliver(members, first + channel.next(2))
        world.run()
        for batch in receivers[-1].batches:
            offsets = [message.offset for message in batch.messages]
            assert offsets == list(range(batch.before + 1, batch.last + 1)), count


def test_a_batch_is_of_one_epoch(world: World) -> None:
    """A router that begins anew begins another epoch, on the same channel with the same subscribers."""
    for count in (3, 100):
        members, receivers = world.members(count)
        world.fanout.deliver(members, [*Channel().next(), Message("a", Position(EPOCH + 1, 1), "message", b"x")])
        world.run()
        for batch in receivers[-1].batches:
            assert {message.epoch for message in batch.messages} == {batch.epoch}, count


# -- joins and leaves


def test_who_joins_during_a_sweep_has_what_is_swept_already_and_gets_the_next(world: World) -> None:
    """Its replay was answered after the swept messages were ordered. If sweeps went on to whoever joins,
    pollers that come back at once would keep one going for ever."""
    members, _ = world.members(100)
    channel = Channel()
    world.fanout.deliver(members, channel.next())
    world.turn()
    late = Receiver(world, "late")
    members.add(late)
    world.fanout.deliver(members, channel.next())
    world.run()
    assert late.offsets == [2]
    assert members.alive == 101


def test_who_joins_before_the_sweep_begins_is_part_of_it(world: World) -> None:
    members, _ = world.members(100)
    world.fanout.deliver(members, Channel().next())
    late = Receiver(world, "late")
    members.add(late)
    world.run()
    assert late.offsets == [1]


def test_pollers_that_come_back_at_once_do_not_keep_a_sweep_going(world: World) -> None:
    members, receivers = world.members(100)

    def again(receiver: Receiver) -> None:
        leave(members, receiver)
        members.add(Receiver(world))

    for one in receivers:
        one.on_delivery = partial(again, one)
    world.fanout.deliver(members, Channel().next())
    world.run()
    assert len(world.trace) == 100
    assert members.alive == 100
    assert len(members.present) <= 2 * members.alive + 16


def test_who_leaves_during_a_sweep_leaves_a_hole_and_nobody_is_passed_over(world: World) -> None:
    members, receivers = world.members(200)
    world.fanout.deliver(members, Channel().next())
    world.turn()
    served = len(world.trace)
    gone = [*receivers[: served - 1], *receivers[150:]]  # most of those before the sweep's place, and some behind
    for one in gone:
        leave(members, one)
    assert len(members.present) == 200
    world.run()
    assert all(one.offsets == [1] for one in receivers[:150])
    assert not any(one.batches for one in receivers[150:])
    assert members.alive == 200 - len(gone)


def test_holes_go_when_the_sweep_is_over(world: World) -> None:
    members, receivers = world.members(200)
    world.fanout.deliver(members, Channel().next())
    world.turn()
    for one in receivers[:150]:
        leave(members, one)
    assert len(members.present) == 200
    world.run()
    assert members.present == receivers[150:]


def test_without_a_sweep_holes_go_when_they_are_many(world: World) -> None:
    members, receivers = world.members(200)
    longest = 0
    for index, one in enumerate(receivers, 1):
        leave(members, one)
        longest = max(longest, len(members.present) - members.alive)
        assert members.alive == 200 - index
        assert [left for left in members.present if not left.ended] == receivers[index:]
        assert len(members.present) <= 2 * members.alive + 16
    assert longest > 50, "each leave would walk the whole channel"


def test_who_is_expelled_in_a_sweep_makes_nobody_be_passed_over(world: World) -> None:
    members, receivers = world.members(200)
    world.fanout.deliver(members, Channel().next())
    world.turn()
    for one in (receivers[3], receivers[150]):  # one that was served, one that was not
        members.expel(one)
    world.run()
    assert all(one.offsets == [1] for one in receivers if one is not receivers[150])
    assert not receivers[150].batches
    assert members.alive == 198


@pytest.mark.parametrize("count", [5, 200])
def test_who_leaves_at_its_delivery_disturbs_nobody(world: World, count: int) -> None:
    """A poll that has its answer, a client that is gone: they leave from inside the delivery."""
    members, receivers = world.members(count)
    for one in receivers[::2]:
        one.on_delivery = partial(leave, members, one)
    channel = Channel()
    world.fanout.deliver(members, channel.next())
    world.run()
    world.fanout.deliver(members, channel.next())
    world.run()
    assert [one.offsets for one in receivers] == [[1] if index % 2 == 0 else [1, 2] for index in range(count)]
    assert members.alive == count // 2


def test_a_channel_of_which_all_have_left_comes_to_an_end(world: World) -> None:
    members, receivers = world.members(100)
    channel = Channel()
    world.fanout.deliver(members, channel.next())
    world.turn()
    world.fanout.deliver(members, channel.next())
    for one in receivers:
        leave(members, one)
    world.run()
    assert not members.present
    assert members.batch is None
    assert not members.pending


# -- failures


@pytest.mark.parametrize("count", [3, 100])
def test_one_that_fails_harms_no_other(world: World, count: int, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError("it broke")

    members, receivers = world.members(count)
    receivers[0].on_delivery = receivers[count // 2].on_delivery = fail
    channel = Channel()
    for _ in range(2):
        world.fanout.deliver(members, channel.next())
        world.run()
    assert all(one.offsets == [1, 2] for one in receivers)
    assert len(caplog.records) == 4
    assert "it broke" in caplog.text


# -- the bound


def test_what_waits_is_bounded_and_the_newest_is_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "MAX_PENDING", 10 * (MESSAGE_COST + 3))
    members, receivers = world.members(100)
    channel = Channel()
    world.fanout.deliver(members, channel.next())
    world.turn()
    largest = 0
    for _ in range(25):
        world.fanout.deliver(members, channel.next())
        largest = max(largest, len(members.pending))
        assert members.pending[-1].offset == channel.head
        assert members.waiting == sum(message.cost for message in members.pending)
    world.run()
    assert largest == 10
    got = receivers[0].offsets
    assert got[0] == 1
    assert got[1:] == list(range(27 - len(got[1:]), 27))
    assert 1 <= len(got[1:]) <= 10


def test_what_comes_at_once_is_bounded_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "MAX_PENDING", 10 * (MESSAGE_COST + 3))
    members, receivers = world.members(100)
    world.fanout.deliver(members, Channel().next(1000))
    assert len(members.pending) <= 10
    world.run()
    assert receivers[0].offsets[-1] == 1000


def test_a_single_message_beyond_the_bound_is_delivered(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "MAX_PENDING", 100)
    members, receivers = world.members(100)
    world.fanout.deliver(members, Channel().next())
    world.run()
    assert all(one.offsets == [1] for one in receivers)


def test_the_bound_begins_anew_with_each_sweep(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "MAX_PENDING", 10 * (MESSAGE_COST + 3))
    members, receivers = world.members(100)
    channel = Channel()
    for _ in range(5):
        world.fanout.deliver(members, channel.next(8))
        world.run()
    assert receivers[0].offsets == list(range(1, 41))


# -- all of it at once


# -- by permit


@pytest.fixture
def crowd(monkeypatch: pytest.MonkeyPatch) -> World:
    """One of a service's many workers."""
    monkeypatch.setattr(fanout, "MANY", 100)
    monkeypatch.setattr(fanout, "HOLD", 20 * SLICE)
    return World(Permit())


def permit_of(world: World) -> Permit:
    assert world.permit is not None
    return world.permit


def test_a_sweep_of_very_many_waits_for_its_permit(crowd: World) -> None:
    members, receivers = crowd.members(100)
    crowd.fanout.deliver(members, Channel().next())
    crowd.run()
    assert not crowd.trace
    permit_of(crowd).grant()
    assert not crowd.trace, "it goes in slices"
    crowd.run()
    assert [one.offsets for one in receivers] == [[1]] * 100
    assert not permit_of(crowd).held


def test_others_are_served_while_it_waits(crowd: World) -> None:
    very_many, _ = crowd.members(100)
    many, receivers = crowd.members(99, "b")
    few, others = crowd.members(1, "c")
    crowd.fanout.deliver(very_many, Channel().next())
    crowd.fanout.deliver(many, Channel("b").next())
    crowd.fanout.deliver(few, Channel("c").next())
    crowd.run()
    assert [one.offsets for one in (*receivers, *others)] == [[1]] * 100
    assert permit_of(crowd).granted is not None


def test_what_is_published_while_it_waits_is_part_of_the_sweep(crowd: World) -> None:
    members, receivers = crowd.members(100)
    channel = Channel()
    crowd.fanout.deliver(members, channel.next())
    crowd.fanout.deliver(members, channel.next(2))
    permit_of(crowd).grant()
    crowd.run()
    assert [one.sizes for one in receivers] == [[3]] * 100
    assert permit_of(crowd).asked == 1


def test_two_channels_share_a_permit(crowd: World) -> None:
    first, receivers = crowd.members(100)
    second, others = crowd.members(100, "s")
    crowd.fanout.deliver(first, Channel().next())
    crowd.fanout.deliver(second, Channel("b").next())
    permit_of(crowd).grant()
    crowd.run()
    assert [one.offsets for one in (*receivers, *others)] == [[1]] * 200
    assert permit_of(crowd).asked == 1


def test_whose_time_is_over_waits_again(crowd: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "HOLD", 3 * SLICE)
    members, receivers = crowd.members(100)  # five slices
    crowd.fanout.deliver(members, Channel().next())
    permit_of(crowd).grant()
    crowd.run()
    served = len(crowd.trace)
    assert 0 < served < 100
    assert not permit_of(crowd).held
    permit_of(crowd).grant()
    crowd.run()
    assert [one.offsets for one in receivers] == [[1]] * 100
    assert permit_of(crowd).asked == 2


def test_a_channel_that_is_finished_gives_its_permit_back(crowd: World) -> None:
    waiting, receivers = crowd.members(100)
    crowd.fanout.deliver(waiting, Channel().next())
    crowd.fanout.finish(waiting)
    assert [one.offsets for one in receivers] == [[1]] * 100
    permit_of(crowd).grant()
    assert not permit_of(crowd).held
    sweeping, receivers = crowd.members(100)
    crowd.fanout.deliver(sweeping, Channel("b").next())
    permit_of(crowd).grant()
    crowd.turn()
    assert permit_of(crowd).held
    crowd.fanout.finish(sweeping)
    assert not permit_of(crowd).held
    assert [one.offsets for one in receivers] == [[1]] * 100
    crowd.run()


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("permitted", [False, True])
def test_any_interleaving_agrees_with_a_model(monkeypatch: pytest.MonkeyPatch, permitted: bool, seed: int) -> None:
    """With permits or without: whoever is there from a message's publication until nothing waits gets it once and in order; who
    joins may get what was waiting; who left gets nothing more; no channel is forgotten."""
    monkeypatch.setattr(fanout, "MANY", DIRECT + 8)
    monkeypatch.setattr(fanout, "HOLD", 3 * SLICE)
    permit = Permit() if permitted else None
    world = World(permit)
    rng = random.Random(seed)
    names = "abcd"
    channels = {name: Channel(name) for name in names}
    members: dict[str, Members[Receiver]] = {name: Members() for name in names}
    there: dict[str, list[Receiver]] = {name: [] for name in names}
    joined: dict[Receiver, int] = {}
    left: dict[Receiver, list[int]] = {}

    def join(name: str) -> None:
        receiver = Receiver(world, name)
        joined[receiver] = channels[name].head
        there[name].append(receiver)
        members[name].add(receiver)
        if rng.random() < 0.1:
            receiver.on_delivery = lambda: part(name, receiver)

    def part(name: str, receiver: Receiver) -> None:
        there[name].remove(receiver)
        leave(members[name], receiver)
        left[receiver] = receiver.offsets

    for _ in range(600):
        name = rng.choice(names)
        action = rng.random()
        if action < 0.3:
            for _ in range(rng.choice([1, 1, 1, 40])):
                join(name)
        elif action < 0.5 and there[name]:
            for receiver in rng.sample(there[name], min(len(there[name]), rng.choice([1, 1, 30]))):
                part(name, receiver)
        elif action < 0.75:
            world.fanout.deliver(members[name], channels[name].next(rng.randint(1, 3)))
        elif permit is not None and action < 0.8:
            permit.grant()
        elif action < 0.82:
            world.fanout.finish(members[name])
            assert not members[name].pending
        else:
            world.turn()
        for each in names:
            assert members[each].alive == len(there[each]), seed
    while world.run() or (permit is not None and permit.grant()):
        pass
    if permit is not None:
        assert not permit.held, "kept for ever"
        assert permit.asked > 5
    for name in names:
        head = channels[name].head
        for receiver in there[name]:
            offsets = receiver.offsets
            assert offsets == list(range(head - len(offsets) + 1, head + 1)), seed
            assert len(offsets) >= head - joined[receiver], seed
    for receiver, offsets in left.items():
        assert receiver.offsets == offsets, seed
        assert offsets == list(range(offsets[0], offsets[-1] + 1)) if offsets else True, seed
        assert not offsets or offsets[0] <= joined[receiver] + 1, seed
    assert left
    assert max(len(one.sizes) for those in there.values() for one in those) > (2 if permitted else 5)
