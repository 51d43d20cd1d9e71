"""Who listens in this process: the registry and the backplane stay in step, whatever happens between."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import gevent
import pytest
from gevent.event import Event

from comet import replays
from comet.backplane import Deliver, Dropped, Lost
from comet.backplane.memory import MemoryBackplane
from comet.errors import Refusal
from comet.framing import LINES, POLL, TEXT, Batch, Framing, ServerSentEvents
from comet.history import PAGE, Joined
from comet.hub import Hub
from comet.message import Gap, Message, Position, Publication, Since, parse_cursor
from comet.stats import Stats
from comet.subscriber import Subscriber, Wish
from tests.harness import TIMEOUT, wait_until


class Backplane(MemoryBackplane):
    """As real as memory, with the seams of one that is asynchronous or fails: what else happens while a
    call is under way, and deliveries that are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.before: Callable[[], None] | None = None  # run once, as a subscribe or read begins
        self.after: Callable[[], None] | None = None  # run once, as its answer is on the way
        self.losing = False
        self.reads = 0

    def attach(self, deliver: Deliver, dropped: Dropped, lost: Lost = lambda answers: None) -> None:
        super().attach(lambda messages: None if self.losing else deliver(messages), dropped)

    def _run(self, name: str) -> None:
        hook = getattr(self, name)
        setattr(self, name, None)
        if hook is not None:
            hook()

    def subscribe(self, channels: Sequence[str], since: Sequence[Since], size: int = PAGE) -> Sequence[Joined]:
        self._run("before")
        answers = super().subscribe(channels, since, size)
        self._run("after")
        return answers

    def read(self, channel: str, since: Since, limit: int | None = None, size: int = PAGE) -> Joined | None:
        self.reads += 1
        self._run("before")
        answer = super().read(channel, since, limit, size)
        self._run("after")
        return answer


class World:
    """A hub on such a backplane."""

    def __init__(self, backlog: int = 1 << 20, replay_bytes: int = 64 << 20) -> None:
        self.backplane = Backplane()
        self.stats = Stats()
        self.swept: list[Callable[[], None]] = []
        """Sweeps that are to go on; a loop would run them."""
        self.hub = Hub(self.backplane, self.stats, backlog, self.swept.append, replay_bytes=replay_bytes)

    def join(self, *channels: str, since: Since = None, framing: Framing = LINES) -> Subscriber:
        return self.hub.subscribe(Wish(channels, [since] * len(channels), framing, None))

    def sweep(self) -> None:
        """Run what the hub has scheduled, until there is nothing more."""
        while self.swept:
            self.swept.pop(0)()

    def publish(self, channel: str, *bodies: str) -> None:
        self.hub.publish([Publication(channel, body.encode()) for body in bodies])
        self.sweep()

    def subscribers(self, channel: str) -> int | None:
        info = self.hub.info(channel)
        return None if info is None else info.subscribers

    def assert_empty(self, *channels: str) -> None:
        """Neither the registry nor the backplane counts anybody."""
        assert not self.hub._channels
        assert not +self.stats.clients
        assert [self.subscribers(channel) or 0 for channel in channels] == [0] * len(channels)


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def crashes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Exceptions that ended a greenlet; there must be none."""
    caught: list[Any] = []
    monkeypatch.setattr(gevent.get_hub(), "handle_error", lambda context, kind, error, trace: caught.append(error))
    yield caught
    assert not caught


def reason(subscriber: Subscriber) -> str | None:
    """What it is to end for, while somebody still takes."""
    return subscriber.awake.reason


def taken(subscriber: Subscriber) -> list[str]:
    """What waits: a body a message, GAP for a gap."""
    items = subscriber.take(0)
    assert items is not None
    return ["GAP" if isinstance(item, Gap) else item.data.decode() for item in items]


def whole(subscriber: Subscriber) -> list[str]:
    """What waits, and all that is read for it."""
    got: list[str] = []

    def up_to_date() -> bool:
        got.extend(taken(subscriber))
        return subscriber.awake.quiet

    wait_until(up_to_date)
    return got


# -- without a greenlet


def never(what: object) -> None:
    raise AssertionError(what)


class Bed:
    """Whose sleepers these are."""

    def __init__(self) -> None:
        self.got: list[str] = []

    def deliver(self, subscriber: Subscriber, batch: Batch) -> None:
        self.got += [message.data.decode() for message in batch.messages]

    def skip(self, subscriber: Subscriber, places: object) -> None:
        raise AssertionError

    def end(self, subscriber: Subscriber, reason: str) -> None:
        subscriber.close(reason)


def soon(world: World, bed: Bed, since: Since, framing: Framing = LINES, patience: float | None = None) -> Subscriber:
    """Who joins "a" without a greenlet."""
    those: list[Subscriber] = []
    assert world.hub.subscribe_soon(Wish(("a",), (since,), framing, patience), bed, those.append, never)
    (one,) = those
    return one


def test_who_joins_soon_sleeps_where_nothing_was_missed_and_gets_what_comes(world: World) -> None:
    bed = Bed()
    one = soon(world, bed, None)
    assert one.host is bed
    world.publish("a", "1")
    assert bed.got == ["1"]
    assert +world.stats.clients == {"stream": 1}
    one.close()
    world.assert_empty("a")


@pytest.mark.parametrize("framing", [LINES, POLL])
def test_who_joins_soon_and_has_missed_something_is_awake_and_has_it(world: World, framing: Framing) -> None:
    holder = world.join("a")
    world.publish("a", "1", "2")
    place = holder.cursor.at("a")
    one = soon(world, Bed(), place, framing, 5.0)
    world.publish("a", "3")
    assert taken(one) == ["1", "2", "3"]
    other = soon(world, Bed(), Position(place.epoch ^ 1, 7), framing, 5.0)
    assert taken(other) == ["GAP", "1", "2", "3"]
    for each in (holder, one, other):
        each.close()
    world.assert_empty("a")


def test_who_joins_soon_as_a_drain_begins_is_ended_like_the_others(world: World) -> None:
    world.backplane.after = world.hub.drain
    one = soon(world, Bed(), None)
    assert reason(one) == "shutdown"
    one.close()
    world.assert_empty("a")
    assert not world.hub.subscribe_soon(Wish(("a",), (None,), LINES, None), Bed(), never, never)
    assert world.subscribers("a") == 0


def test_who_would_not_wait_or_wants_several_channels_does_not_join_soon(world: World) -> None:
    for wish in (Wish(("a",), (None,), POLL, 0), Wish(("a", "b"), (None, None), LINES, None)):
        assert not world.hub.subscribe_soon(wish, Bed(), never, never)
    assert (world.subscribers("a"), world.subscribers("b")) == (None, None)


# -- in step


def test_a_published_message_reaches_each_of_the_channels_subscribers_here(world: World) -> None:
    first, second, other = world.join("a"), world.join("b", "a"), world.join("b")
    world.publish("a", "1", "2")
    assert [taken(first), taken(second)] == [["1", "2"], ["1", "2"]]
    assert other.take(0) == []
    assert (world.stats.offered, world.stats.published) == (4, 2)
    assert world.subscribers("a") == world.subscribers("b") == 2


def test_those_on_several_channels_share_the_names_and_where_they_stand(world: World) -> None:
    """Of 64 names of 128 characters a copy each client would be 11 KB, and 5 KB the positions. In all it is 3 KB."""

    def names() -> list[str]:
        return ["".join(("channel-", letter)) for letter in "abc"]  # strings of its own, as every request has

    def objects(subscriber: Subscriber) -> list[int]:
        cursor = subscriber.cursor
        assert cursor.channels is subscriber.channels
        return list(map(id, (*cursor.channels, *cursor.positions)))

    subscribers = [world.join(*names()) for _ in range(4)]
    assert objects(subscribers[2]) == objects(subscribers[3])
    for name in names():
        world.publish(name, "x")
    for subscriber in subscribers:
        assert taken(subscriber) == ["x"] * 3
    before = objects(subscribers[3])
    for subscriber in subscribers:
        subscriber.encode([Message(name, subscriber.awake.offered[name], "message", b"x") for name in names()])
    assert objects(subscribers[2]) == objects(subscribers[3]) != before
    late = [world.join(*reversed(names())) for _ in range(2)]
    assert set(objects(late[0])) == set(objects(late[1]))
    for subscriber in (*subscribers, *late):
        subscriber.close()
    world.assert_empty(*names())


def test_leaving_counts_out_once_however_often_it_is_said(world: World) -> None:
    first, second = world.join("a", "b"), world.join("a", framing=POLL)
    assert +world.stats.clients == {"stream": 1, "poll": 1}
    first.end("hang-up")
    for _ in range(3):
        first.close()
    assert (world.subscribers("a"), world.subscribers("b")) == (1, 0)
    second.close()
    world.assert_empty("a", "b")
    assert world.stats.closed == {"hang-up": 1, "answered": 1}


def test_who_left_gets_nothing_more(world: World) -> None:
    first, second = world.join("a"), world.join("a")
    first.close()
    world.publish("a", "1")
    assert (first.ended, taken(second)) == (True, ["1"])


def test_a_backplane_that_fails_to_join_leaves_nothing_behind(world: World) -> None:
    def fail() -> None:
        raise ConnectionError("the backplane is gone")

    other = world.join("b")
    world.backplane.before = fail
    with pytest.raises(ConnectionError):
        world.join("a", "b")
    assert list(world.hub._channels) == ["b"]
    assert +world.stats.clients == {"stream": 1}
    assert not world.stats.closed
    other.close()
    world.assert_empty("a", "b")


def test_a_send_counts_as_one_publication(world: World) -> None:
    subscriber = world.join("user:1", framing=TEXT)
    assert world.hub.send("user:1,user:2", "message", b"1", None).delivered == 1
    assert taken(subscriber) == ["1"]
    assert world.stats.published == 1


def test_refused_publications_are_not_counted(world: World) -> None:
    answers = world.hub.publish([Publication("a", body, "message", "k") for body in (b"1", b"2", b"1")])
    assert [isinstance(answer, Refusal) for answer in answers] == [False, True, False]
    assert world.stats.published == 2


# -- deleted


def test_a_delete_ends_the_channels_subscribers_and_no_others(world: World) -> None:
    both, one, other = world.join("a", "b"), world.join("a"), world.join("b")
    world.publish("b", "1")
    world.hub.delete("a")
    assert [reason(subscriber) for subscriber in (both, one, other)] == ["deleted", "deleted", None]
    assert taken(both) == ["1"]
    again = world.join("a")  # comes back before the others have left
    both.close()
    one.close()
    assert (world.subscribers("a"), world.subscribers("b")) == (1, 1)
    world.publish("a", "2")
    assert taken(again) == ["2"]
    for subscriber in (again, other):
        subscriber.close()
    world.assert_empty("a", "b")
    assert world.stats.closed == {"deleted": 2, "lost": 2}


@pytest.mark.parametrize("framing", [POLL, LINES, ServerSentEvents(3000)])
def test_what_waits_as_the_channel_is_deleted_is_told_with_a_cursor_that_can_be_used(world: World, framing: Framing) -> None:
    subscriber = world.join("a", framing=framing)
    answer = iter(subscriber)
    if not subscriber.one_shot:
        next(answer)
    world.publish("a", "1")
    world.hub.delete("a")
    told = b"".join(answer)
    assert b"1" in told
    for cursor in re.findall(rb'(?:id: |"id":"|"cursor":")([^"\n]+)', told):
        (position,) = parse_cursor(cursor.decode(), 1)
        assert isinstance(position, Position)
        assert position.offset == 1


def test_all_of_a_subscribers_channels_may_be_deleted(world: World) -> None:
    subscriber = world.join("a", "b", "c")
    for channel in "abc":
        world.hub.delete(channel)
    subscriber.close()
    world.assert_empty("a", "b", "c")
    assert world.stats.closed == {"deleted": 1}


def test_a_delete_that_overtakes_a_join_leaves_no_count_behind(world: World) -> None:
    world.publish("a", "1")
    world.backplane.before = lambda: world.hub.delete("a") and None  # the join is of the next log
    subscriber = world.join("a")
    subscriber.close()
    world.assert_empty("a")


def test_a_delete_right_behind_a_join_ends_it(world: World) -> None:
    world.backplane.after = lambda: world.hub.delete("a") and None
    subscriber = world.join("a", "b")
    assert reason(subscriber) == "deleted"
    subscriber.close()
    world.assert_empty("a", "b")


# -- replay and live


def test_messages_behind_the_replay_come_after_it(world: World) -> None:
    world.publish("a", "1", "2")
    world.backplane.after = lambda: world.publish("a", "3", "4")
    assert taken(world.join("a", since="oldest")) == ["1", "2", "3", "4"]
    assert world.backplane.reads == 0


def test_messages_that_the_replay_has_too_come_once(world: World) -> None:
    world.publish("a", "1")
    world.backplane.before = lambda: world.publish("a", "2", "3")
    world.backplane.after = lambda: world.publish("a", "4")
    assert taken(world.join("a", since="oldest")) == ["1", "2", "3", "4"]
    assert world.backplane.reads == 0


def lose(world: World, *bodies: str) -> None:
    world.backplane.losing = True
    world.publish("a", *bodies)
    world.backplane.losing = False


def test_after_lost_deliveries_history_is_read_and_nothing_is_lost_or_doubled(world: World, crashes: list[Any]) -> None:
    first, second = world.join("a", "b"), world.join("a")
    world.publish("a", "1")
    lose(world, "2", "3")
    world.backplane.before = lambda: world.publish("a", "5")
    world.backplane.after = lambda: world.publish("a", "6")
    world.publish("a", "4")
    assert (taken(first), taken(second)) == (["1"], ["1"])
    assert (taken(first), taken(second)) == ([], [])  # now they ask, for the same
    got = whole(first), whole(second)
    assert got == (list("23456"), list("23456"))
    world.publish("a", "7")
    assert (taken(first), taken(second)) == (["7"], ["7"])
    assert world.backplane.reads == 3  # the sixth came behind the answer that they shared: each read it


def test_who_stands_at_the_same_place_shares_what_is_read_and_holds_up_nobody(world: World, crashes: list[Any]) -> None:
    several = [world.join("a") for _ in range(1000)]
    lose(world, "1", "2")
    world.backplane.after = several[7].close
    world.publish("a", "3")  # which none can take
    turns = 0
    while any(len(one.awake._queue) < 3 for one in several if not one.ended):
        gevent.sleep(0)
        turns += 1  # gevent runs dozens of those before it looks at its timers, by which others have their turns
        assert turns < 100_000
    world.publish("a", "4")
    assert world.backplane.reads == 1
    assert all(taken(one) == list("1234") for one in several if one is not several[7])


def test_those_who_share_a_page_take_it_in_turns(world: World, crashes: list[Any]) -> None:
    several = [world.join("a") for _ in range(1000)]
    woken: list[int] = []
    for number, one in enumerate(several):
        one.awake.waker = partial(woken.append, number)
    lose(world, "1")
    world.publish("a", "2")
    turns = 0
    while len(woken) < len(several):
        gevent.sleep(0)
        turns += 1
        assert turns < 100_000
    assert turns > 5, "others had turns meanwhile"


def test_pages_are_read_as_they_are_taken_and_shared_by_who_comes_later(world: World, crashes: list[Any]) -> None:
    sent = [f"{number:030000}" for number in range(20)]  # four a page
    world.publish("a", *sent)
    first = world.join("a", since="oldest")
    assert taken(first) == sent[:4]
    assert world.backplane.reads == 0
    assert taken(first) == []
    gevent.sleep(0)
    assert len(first.awake._queue) == 4
    assert world.backplane.reads == 1
    assert whole(first) == sent[4:]
    assert world.backplane.reads == 4
    second = world.join("a", since="oldest")
    assert whole(second) == sent
    assert world.backplane.reads == 5  # the last page is read anew
    world.publish("a", "next")
    assert taken(first) == taken(second) == ["next"]


def test_pages_that_are_kept_are_bounded(crashes: list[Any]) -> None:
    world = World(replay_bytes=16 * 91_000)
    sent = [f"{number:030000}" for number in range(20)]
    world.publish("a", *sent)
    assert whole(world.join("a", since="oldest")) == sent
    assert world.hub._replays._bytes <= 4 * 91_000
    assert whole(world.join("a", since="oldest")) == sent
    assert world.backplane.reads == 8


def test_what_clients_hold_of_history_is_bounded_but_for_a_message_each(crashes: list[Any]) -> None:
    message = 31_000  # its cost
    world = World(replay_bytes=100 * message)
    sent = [f"{number:010000}" for number in range(220)]
    world.publish("a", *sent)
    epoch = world.backplane._open("a").epoch
    several = [world.join("a", since=Position(epoch, number)) for number in range(200)]  # who take nothing, each at a place of its own
    assert world.hub._replays.held <= (100 + 200) * message
    first, last = (len(one.awake._queue) for one in (several[0], several[-1]))
    assert (first, last) == (12, 1)
    assert whole(several[-1]) == sent[199:]  # a message at a time, if need be
    for one in several[:100]:
        one.close()
    for number, one in enumerate(several[100:-1], 100):
        assert (whole(one), taken(one)) == (sent[number:], [])
    taken(several[-1])
    assert (world.hub._replays.held, world.hub._replays._held) == (0, {})  # all was taken, and sent


def test_who_comes_to_the_same_place_holds_the_same_messages(world: World, crashes: list[Any]) -> None:
    sent = [f"{number:030000}" for number in range(20)]
    world.publish("a", *sent)
    several = [world.join("a", since="oldest") for _ in range(100)]
    world.publish("a", "next")
    several.append(world.hub.subscribe(Wish(("a",), ["oldest"], POLL, 0)))
    assert {tuple(map(id, one.awake._queue)) for one in several} == {tuple(map(id, several[0].awake._queue))}
    assert world.hub._replays.held == 4 * 91_000
    assert {tuple(whole(one)) for one in several} == {(*sent, "next")}


def test_what_a_client_holds_is_given_back_however_it_ends(world: World) -> None:
    world.publish("a", "1", "2")
    for end in (Subscriber.close, lambda one: one.sleep(one.host, 5)):
        subscriber = world.join("a", since="oldest")
        assert world.hub._replays.held == 2 * 1003
        assert taken(subscriber) == ["1", "2"]
        assert world.hub._replays.held == 2 * 1003  # they are being sent
        end(subscriber)
        assert world.hub._replays.held == 0


# -- who does not wait


def test_who_does_not_wait_has_what_is_kept_and_is_registered_nowhere(world: World) -> None:
    world.publish("a", "1")
    subscriber = world.hub.subscribe(Wish(("a", "b"), ["oldest", None], POLL, 0))
    assert (world.hub._channels, world.subscribers("a"), world.subscribers("b")) == ({}, 0, None)
    world.publish("a", "2")
    assert taken(subscriber) == ["1"]
    assert world.stats.clients["poll"] == 1
    assert subscriber.encode([])
    cursor = list(subscriber.cursor.positions)
    subscriber.close()
    world.assert_empty("a", "b")
    world.publish("b", "3")
    again = world.hub.subscribe(Wish(("a", "b"), cursor, POLL, 0))
    assert whole(again) == ["1", "2", "3"]  # nothing was encoded for it before
    again.close()


def test_who_does_not_wait_waits_for_a_page_that_is_kept(world: World, crashes: list[Any]) -> None:
    sent = [f"{number:070000}" for number in range(2)]
    world.publish("a", *sent)
    world.publish("b", "1")
    subscriber = world.hub.subscribe(Wish(("a", "b"), ["oldest", "oldest"], POLL, 0))
    assert [taken(subscriber) for _ in range(2)] == [[sent[0], "1"], [sent[1]]]


def test_a_page_that_can_not_be_read_now_is_asked_for_again(world: World, crashes: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "AGAIN", 0.01)
    subscriber = world.join("a")
    lose(world, "1")

    def refuse() -> None:
        raise Refusal("backplane-away", "It is away.")

    world.backplane.before = refuse
    world.publish("a", "2")
    assert whole(subscriber) == ["1", "2"]
    assert world.backplane.reads == 2


class Page:
    """One who reads a page of history."""

    def __init__(self) -> None:
        self.ended = False
        self.read = Event()

    def page(self, channel: str, answer: Joined) -> None:
        self.read.set()

    def go_on(self) -> None:
        """It takes it."""

    def end(self, reason: str) -> None:
        self.ended = True


def test_pages_that_hang_keep_those_waiting_alone_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replays, "AGAIN", 0.0)
    tried: Counter[str] = Counter()
    never = Event()

    def read(channel: str, position: Position) -> Joined:
        tried[channel] += 1
        if channel != "good":
            if tried[channel] > 1:
                never.wait()
            raise Refusal("backplane-away", "One of the servers hangs.")
        return Joined(position, (), False)

    several = replays.Replays(read, 0)
    hanging = [Page() for _ in range(3 * replays.READS)]
    for number, one in enumerate(hanging):
        several.ask(one, f"hangs{number}", Position(1, 0))
    wait_until(lambda: len(tried) == len(hanging))
    good = Page()
    several.ask(good, "good", Position(1, 0))
    assert good.read.wait(TIMEOUT)
    assert not any(one.read.is_set() for one in hanging)
    for one in hanging:
        one.ended = True
    never.set()


def test_a_loss_while_the_shared_answer_goes_round_is_told_to_all(world: World, crashes: list[Any]) -> None:
    several = [world.join("a") for _ in range(300)]
    lose(world, "1")

    def lose_the_log() -> None:
        log = world.backplane._open("a")
        world.hub.lost({"a": Joined(Position(log.epoch + 1, 5), (), True)})
        log.epoch += 1
        log.head = 5
        log.entries = None
        world.publish("a", "3")

    world.backplane.after = lambda: gevent.spawn(lose_the_log)
    world.publish("a", "2")
    wait_until(lambda: all(one.awake.offered["a"].offset == 6 for one in several))
    assert {tuple(whole(one)) for one in several} == {("1", "2", "GAP", "3")}
    assert world.backplane.reads == 1


def test_what_is_lost_and_no_longer_kept_is_told_once(world: World, crashes: list[Any]) -> None:
    subscriber = world.join("a")
    world.publish("a", "1")
    lose(world, *["2"] * 1500)
    world.publish("a", "3")
    got = whole(subscriber)
    world.publish("a", "4")
    got += whole(subscriber)
    assert (got[:2], got[-2:], got.count("GAP"), len(got)) == (["1", "GAP"], ["3", "4"], 1, 2 + 1000 + 1)


def test_a_new_epoch_seen_in_a_delivery_is_one_gap_and_all_it_keeps(world: World, crashes: list[Any]) -> None:
    subscriber = world.join("a")
    world.publish("a", "1")
    log = world.backplane._open("a")
    log.epoch += 1  # as a router that was restarted
    log.head = 0
    log.entries = None
    world.publish("a", "2")
    world.publish("a", "3")
    got = whole(subscriber)
    world.publish("a", "4")
    assert got + taken(subscriber) == ["1", "GAP", "2", "3", "4"]


def test_who_leaves_while_history_is_read_harms_nothing(world: World, crashes: list[Any]) -> None:
    subscriber = world.join("a", "b")
    lose(world, "1")
    world.backplane.after = subscriber.close
    world.publish("a", "2")
    wait_until(lambda: world.backplane.reads)
    gevent.sleep(0)
    world.assert_empty("a", "b")


def test_a_channel_deleted_while_history_is_read_harms_nothing(world: World, crashes: list[Any]) -> None:
    subscriber = world.join("a")
    lose(world, "1")
    world.publish("a", "2")  # the reading has been asked for, and comes too late
    world.hub.delete("a")
    wait_until(lambda: world.backplane.reads)
    assert subscriber.take(None) is None
    subscriber.close()
    world.assert_empty("a")


def test_history_that_cannot_be_read_does_not_leave_a_subscriber_deaf(world: World, crashes: list[Any]) -> None:
    def fail() -> None:
        raise ConnectionError("the backplane is gone")

    subscriber = world.join("a")
    lose(world, "1")
    world.backplane.before = fail
    world.publish("a", "2")
    wait_until(lambda: world.backplane.reads)
    gevent.sleep(0)
    crashes.clear()  # that it is reported is right
    world.publish("a", "3")
    gevent.sleep(0)
    assert reason(subscriber) is not None or taken(subscriber) == ["1", "2", "3"]


# -- many, and the end


def test_a_slow_client_is_closed_and_the_others_and_the_publisher_go_on() -> None:
    world = World(backlog=2000)
    slow, quick = world.join("a"), world.join("a")
    for number in range(20):
        world.publish("a", str(number))
        assert taken(quick) == [str(number)]
    assert (reason(slow), reason(quick)) == ("backlog-bytes", None)
    slow.close()
    assert world.subscribers("a") == 1
    assert world.stats.closed == {"backlog-bytes": 1}
    back = world.hub.subscribe(Wish(["a"], [slow.cursor.at("a")], LINES, None))
    assert taken(back) == [str(number) for number in range(20)]


def test_draining_ends_all_and_the_next_after_what_is_kept(world: World) -> None:
    poll, stream = world.join("a", framing=POLL), world.join("a", "b")
    world.publish("a", "1")
    world.hub.drain()
    late, later = world.join("a", framing=POLL, since="oldest"), world.join("a", framing=POLL)
    for subscriber in (poll, late):
        (answer,) = subscriber
        assert [message["data"] for message in json.loads(answer)["messages"]] == ["1"]
    assert json.loads(b"".join(later))["cursor"] == str(late.cursor)
    assert len(list(stream)) == 2  # the opening and what waited
    world.assert_empty("a", "b")
    assert world.stats.closed == {"shutdown": 4}


def test_a_drain_in_the_middle_of_a_join_ends_it(world: World) -> None:
    world.backplane.after = world.hub.drain
    subscriber = world.join("a")
    assert reason(subscriber) == "shutdown"
    subscriber.close()
    world.assert_empty("a")


def test_joining_and_leaving_during_a_delivery_disturbs_nobody(world: World) -> None:
    """Clients' greenlets run between deliveries, never inside one: whoever is woken leaves and comes back."""
    total, clients = 50, 10
    got: list[list[int]] = [[] for _ in range(clients)]

    def poller(number: int) -> None:
        since: Since = Position(epoch, 0)
        while len(got[number]) < total:
            subscriber = world.hub.subscribe(Wish(["a"], [since], POLL, None))
            (answer,) = subscriber
            document = json.loads(answer)
            assert not document["gap"]
            got[number] += [int(message["data"]) for message in document["messages"]]
            since = subscriber.cursor.at("a")

    (keeper := world.join("a")).close()
    epoch = keeper.cursor.at("a").epoch
    greenlets = [gevent.spawn(poller, number) for number in range(clients)]
    for number in range(total):
        world.publish("a", str(number))
        gevent.sleep(0)
    gevent.joinall(greenlets, timeout=TIMEOUT, raise_error=True)
    assert got == [list(range(total))] * clients
    world.assert_empty("a")


def test_deliveries_for_nobody_are_ignored(world: World) -> None:
    world.hub.deliver([Message("a", Position(1, 1), "message", b"1")])
    world.hub.dropped("a", 1)
    assert world.stats.offered == 0
    world.assert_empty("a")


def test_who_is_ended_gets_what_was_sent_to_thousands_first(world: World) -> None:
    subscribers = [world.join(f"user:{number}") for number in range(200)]
    everybody = ",".join(f"user:{number}" for number in range(200))
    assert world.hub.send(everybody, "message", b"1", None).delivered == 200
    assert subscribers[150].take(0) == []
    world.hub.delete("user:150")
    items = subscribers[150].take(0)
    assert [item.data for item in items or [] if isinstance(item, Message)] == [b"1"]
    late = world.join("user:199", since=None)  # knows it from the start: it is not to get it again
    world.hub.drain()
    for subscriber in [*subscribers[:150], *subscribers[151:]]:
        items = subscriber.take(0)
        assert [item.data for item in items or [] if isinstance(item, Message)] == [b"1"]
    assert late.take(0) is None
    world.sweep()
