"""The contract of comet/backplane/__init__.py, promise by promise, for every backplane in `FACTORIES`."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import gevent
import pytest

from comet.backplane.memory import Bounds
from comet.errors import Refusal
from comet.history import PAGE, Joined
from comet.message import FOREIGN, MESSAGE_COST, OLDEST, ChannelInfo, Message, Position, Publication, Receipt, Since
from tests.contracts.suite import FACTORIES, OWN_BOUNDS, Harness, bodies
from tests.harness import wait_until

Open = Callable[..., Harness]


@pytest.fixture(params=FACTORIES)
def start(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Start a backplane with bounds of its own."""
    with ExitStack() as stack:

        def begin(**bounds: Any) -> Harness:
            return stack.enter_context(FACTORIES[request.param](Bounds(**bounds)))

        yield begin


own_bounds = pytest.mark.parametrize("start", OWN_BOUNDS, indirect=True)
"""For what is bounded in all."""


@pytest.fixture
def h(start: Open) -> Harness:
    """A backplane with the default bounds."""
    return start()


def keyed(data: str, key: str, channel: str = "a", type: str = "message") -> Publication:
    return Publication(channel, data.encode(), type, key)


def only(answer: Any) -> Position:
    """The position of a call's single receipt."""
    (receipt,) = answer
    assert isinstance(receipt, Receipt), receipt
    return receipt.position


def conflict(answer: Any) -> bool:
    return isinstance(answer, Refusal) and answer.slug == "key-conflict"


# -- 1. order


def test_offsets_count_from_one_and_deliveries_follow_them(h: Harness) -> None:
    (now,) = h.join("a")
    assert now.offset == 0
    positions = h.publish("a", "1", "2") + h.publish("a", "3")
    assert positions == [Position(now.epoch, offset) for offset in (1, 2, 3)]
    h.until_got("a", "1", "2", "3")
    assert [message.position for message in h.delivered] == positions


def test_a_message_arrives_as_it_was_published(h: Harness) -> None:
    h.join("a")
    h.backplane.publish([Publication("a", "gr\u00fc\u00df\0\r\n".encode(), "kind")])
    h.until_got("a", "gr\u00fc\u00df\0\r\n")
    assert [(message.channel, message.type, message.data) for message in h.delivered] == [("a", "kind", "gr\u00fc\u00df\0\r\n".encode())]


def test_channels_of_one_batch_have_each_their_own_order(h: Harness) -> None:
    starts = dict(zip("ab", h.join("a", "b"), strict=True))
    answers = h.backplane.publish([Publication(channel, body.encode()) for channel, body in zip("abaab", "12345", strict=True)])
    expected = [(channel, offset) for channel, offset in zip("abaab", (1, 1, 2, 3, 2), strict=True)]
    assert answers == [Receipt(Position(starts[channel].epoch, offset), 1) for channel, offset in expected]
    h.until_got("a", "1", "3", "4")
    h.until_got("b", "2", "5")


def test_concurrent_publishers_get_each_a_place_of_their_own(h: Harness) -> None:
    h.join("a")

    def publisher(name: int) -> list[tuple[int, str]]:
        ordered = []
        for count in range(20):
            body = f"{name}.{count}"
            (position,) = h.publish("a", body)
            ordered.append((position.offset, body))
            gevent.sleep(0)
        return ordered

    greenlets = [gevent.spawn(publisher, name) for name in range(5)]
    places = sorted(place for greenlet in greenlets for place in greenlet.get())
    assert [offset for offset, _ in places] == list(range(1, 101))
    h.until_got("a", *(body for _, body in places))


# -- 2. epochs


def test_each_log_has_an_epoch_of_its_own(h: Harness) -> None:
    positions = h.join("a", "b")
    assert positions[0].epoch != positions[1].epoch
    assert all(0 <= position.epoch < 1 << 48 for position in positions)


@pytest.mark.parametrize("held", [True, False])
def test_after_a_delete_a_log_begins_anew_and_old_cursors_are_told(h: Harness, held: bool) -> None:
    if held:
        h.join("a")
    old = h.publish("a", "1", "2")
    h.backplane.delete("a")
    new = h.publish("a", "3", "4")
    assert new == [Position(new[0].epoch, 1), Position(new[0].epoch, 2)]
    assert new[0].epoch != old[0].epoch
    for cursor in old:  # the same offsets are in the new log: only the epoch tells them apart
        (joined,) = h.backplane.subscribe(["a"], [cursor])
        assert (joined.position, bodies(joined.messages), joined.gap) == (Position(new[0].epoch, 0), ["3", "4"], True)


def test_after_the_linger_time_a_log_begins_anew_and_old_cursors_are_told(start: Open) -> None:
    h = start(linger=60.0)
    (old,) = h.publish("a", "1")
    h.advance(61)
    (joined,) = h.backplane.subscribe(["a"], [old])
    assert joined.position.epoch != old.epoch
    assert (joined.position.offset, joined.messages, joined.gap) == (0, [], True)


def test_a_cursor_that_cannot_be_vouched_for_is_a_gap_and_then_all_that_is_kept(start: Open) -> None:
    h = start(history_size=3)
    (epoch, _), *_, head = h.publish("a", "1", "2", "3", "4", "5")
    everything = (Position(epoch, 2), ["3", "4", "5"], True)
    for cursor in (
        Position(epoch, 6),  # beyond the head
        Position(epoch, 10**15),
        Position(epoch ^ 1, 4),  # another epoch
        Position(epoch ^ 1, 0),
        Position(epoch, 1),  # from before what is kept
        Position(epoch, 0),
        FOREIGN,
    ):
        (joined,) = h.backplane.subscribe(["a"], [cursor])
        assert (joined.position, bodies(joined.messages), joined.gap) == everything, cursor
    for offset, rest in ((2, ["3", "4", "5"]), (4, ["5"]), (5, [])):
        (joined,) = h.backplane.subscribe(["a"], [Position(epoch, offset)])
        assert (joined.position, bodies(joined.messages), joined.gap) == (Position(epoch, offset), rest, False)
    assert head == Position(epoch, 5)


def test_a_place_in_no_log_is_a_gap_on_every_channel_and_on_every_way(h: Harness) -> None:
    head = h.publish("a", "1", "2")[-1]
    for channels in (["a"], ["a", "new"]):
        first, *others = h.backplane.subscribe(channels, [FOREIGN] * len(channels))
        assert (first.position, bodies(first.messages), first.gap) == (Position(head.epoch, 0), ["1", "2"], True)
        for other in others:
            assert (other.position.offset, other.messages, other.gap) == (0, [], True)
            assert other.position.epoch >= 0
    answers: list[Joined] = []
    if h.backplane.subscribe_soon("a", FOREIGN, answers.append, never):
        wait_until(lambda: answers)
        assert (bodies(answers[0].messages), answers[0].gap) == (["1", "2"], True)
    read = h.backplane.read("a", FOREIGN)
    assert read is not None
    assert (bodies(read.messages), read.gap) == (["1", "2"], True)


# -- 3. joining


@pytest.mark.parametrize(
    ("since", "place", "rest"),
    [(None, 3, []), (OLDEST, 0, ["1", "2", "3"]), (0, 0, ["1", "2", "3"]), (2, 2, ["3"]), (3, 3, [])],
)
def test_a_subscriber_gets_what_follows_its_place(h: Harness, since: Any, place: int, rest: list[str]) -> None:
    (epoch, _), *_ = h.publish("a", "1", "2", "3")
    (joined,) = h.backplane.subscribe(["a"], [Position(epoch, since) if isinstance(since, int) else since])
    assert (joined.position, bodies(joined.messages), joined.gap) == (Position(epoch, place), rest, False)


def test_joining_several_channels_answers_each_in_order(h: Harness) -> None:
    h.publish("a", "1", "2")
    (second,) = h.publish("b", "3")
    joined = h.backplane.subscribe(["c", "b", "a"], [Position(1, 1), None, OLDEST])
    assert [bodies(whole(h, channel, answer)) for channel, answer in zip("cba", joined, strict=True)] == [[], [], ["1", "2"]]
    assert [answer.gap for answer in joined] == [True, False, False]
    assert joined[1].position == second


def whole(h: Harness, channel: str, answer: Joined) -> list[Message]:
    """The messages of an answer, and those of the pages behind it."""
    messages = list(answer.messages)
    while answer.more:
        page = h.backplane.read(channel, answer.end)
        assert page is not None and page.messages and not page.gap
        assert page.position == answer.end
        answer = page
        messages += page.messages
    return messages


def size(answers: Sequence[Joined]) -> int:
    return sum(message.size for answer in answers for message in answer.messages)


def test_an_answer_holds_one_page_and_says_how_much_is_behind_it(h: Harness) -> None:
    sent = [f"{number:020000}" for number in range(30)]
    last = h.publish("a", *sent)[-1]
    (joined,) = h.backplane.subscribe(["a"], [OLDEST])
    assert 0 < size([joined]) <= PAGE
    assert len(joined.messages) + joined.more == len(sent)
    assert joined.head == last
    assert bodies(whole(h, "a", joined)) == sent
    read = h.backplane.read("a", OLDEST)
    assert read is not None and size([read]) <= PAGE
    assert bodies(whole(h, "a", read)) == sent


def test_several_channels_share_a_page(h: Harness) -> None:
    sent = [f"{number:020000}" for number in range(12)]
    for channel in "abc":
        h.publish(channel, *sent)
    joined = h.backplane.subscribe(["a", "b", "c"], [OLDEST] * 3)
    assert size(joined) <= PAGE + joined[0].messages[0].size
    for channel, answer in zip("abc", joined, strict=True):
        assert bodies(whole(h, channel, answer)) == sent
    (told,) = h.publish("b", "next")
    assert told == Position(joined[1].head.epoch, joined[1].head.offset + 1)


def test_a_message_that_is_larger_than_a_page_comes_alone(h: Harness) -> None:
    sent = ["1", "2" * 2 * PAGE, "3"]
    h.publish("a", *sent)
    (joined,) = h.backplane.subscribe(["a"], [OLDEST])
    assert len(joined.messages) == 1
    assert bodies(whole(h, "a", joined)) == sent


def test_a_page_is_as_large_as_was_asked_for(h: Harness) -> None:
    sent = [f"{number:01000}" for number in range(10)]
    h.publish("a", *sent)
    (joined,) = h.backplane.subscribe(["a"], [OLDEST], 2500)
    assert (bodies(joined.messages), joined.more) == (sent[:2], 8)
    read = h.backplane.read("a", joined.end, size=1)
    assert read is not None and (bodies(read.messages), read.more) == (sent[2:3], 7)
    (seen,) = h.backplane.peek(["a"], [read.end], 2500)
    assert (bodies(seen.messages), seen.more) == (sent[3:5], 5)


# -- looking without joining


def test_who_looks_sees_what_a_subscriber_would_get_and_counts_nowhere(h: Harness) -> None:
    sent = h.publish("a", "1", "2")
    h.join("b")
    starts: list[list[Since]] = [[None, None], [OLDEST, None], [sent[0], None], [Position(sent[0].epoch, 9), FOREIGN]]
    for since in starts:
        seen = h.backplane.peek(["a", "b"], since)
        joined = h.backplane.subscribe(["a", "b"], since)
        for one, other in zip(seen, joined, strict=True):
            assert (one.position, bodies(one.messages), one.gap) == (other.position, bodies(other.messages), other.gap)
        h.backplane.unsubscribe(["a", "b"])
    wait_until(lambda: [info and info.subscribers for info in map(h.backplane.info, "ab")] == [0, 1])


def test_who_looks_at_a_channel_that_is_not_there_makes_none_and_misses_nothing_that_comes(h: Harness) -> None:
    (seen,) = h.backplane.peek(["a"], [None])
    assert (list(seen.messages), seen.gap, seen.more) == ([], False, 0)
    assert h.backplane.info("a") is None
    assert h.totals()["channels"] == 0
    (again,) = h.backplane.peek(["a"], [seen.position])
    assert not again.gap
    h.publish("a", "1", "2")
    for place in (seen.position, again.position):
        (joined,) = h.backplane.subscribe(["a"], [place])
        assert (bodies(joined.messages), joined.gap) == (["1", "2"], False)


@pytest.mark.parametrize("how", ["deleted", "lapsed", "trimmed"])
def test_who_has_looked_is_told_when_something_came_and_is_gone(start: Open, how: str) -> None:
    h = start(linger=60.0, history_size=2)
    (seen,) = h.backplane.peek(["a"], [None])
    h.publish("a", *("123" if how == "trimmed" else "1"))
    if how == "deleted":
        h.backplane.delete("a")
    elif how == "lapsed":
        h.advance(61)
    for since in (seen.position, seen.position):
        (joined,) = h.backplane.peek(["a"], [since])
        assert joined.gap
    (joined,) = h.backplane.subscribe(["a"], [seen.position])
    assert joined.gap


def test_who_looks_keeps_a_channel_lingering(start: Open) -> None:
    h = start(linger=60.0)
    h.publish("a", "1")
    for _ in range(3):
        h.advance(40)
        h.backplane.peek(["a"], [None])
    assert h.kept("a") == ["1"]


def test_a_place_in_no_log_is_another_for_another_service(h: Harness) -> None:
    (joined,) = h.backplane.subscribe(["a"], [Position(12345, 5)])
    assert joined.gap
    (joined,) = h.backplane.peek(["b"], [Position(12345, 5)])
    assert joined.gap


# -- 3. joining, with others


@pytest.mark.parametrize("seed", range(5))
def test_joining_while_others_publish_leaves_no_hole_and_no_double(h: Harness, seed: int) -> None:
    rng = random.Random(seed)
    (start,) = h.join("a")
    total = 200

    def publisher() -> None:
        for offset in range(1, total + 1):
            h.publish("a", str(offset))
            gevent.sleep(0)

    joins: list[tuple[int, list[int], int]] = []

    def joiner() -> None:
        for _ in range(rng.randrange(100)):
            gevent.sleep(0)
        since = Position(start.epoch, rng.randrange(h.delivered[-1].position.offset + 1)) if h.delivered else start
        (joined,) = h.backplane.subscribe(["a"], [since])
        assert not joined.gap
        joins.append((since.offset, [message.position.offset for message in joined.messages], len(h.delivered)))

    gevent.joinall([gevent.spawn(publisher), *(gevent.spawn(joiner) for _ in range(10))], raise_error=True)
    wait_until(lambda: len(h.delivered) >= total)
    offsets = [message.position.offset for message in h.delivered]
    assert offsets == list(range(1, total + 1))  # each once, in order, whatever joined meanwhile
    assert len(joins) == 10
    for since_offset, replay, seen in joins:
        point = replay[-1] if replay else since_offset
        assert replay == list(range(since_offset + 1, point + 1))
        assert all(offset > point for offset in offsets[seen:]), "delivered after the answer although the answer has it"


def never(what: object) -> None:
    raise AssertionError(what)


@pytest.mark.parametrize("seed", range(5))
def test_joining_soon_is_answered_at_its_place_among_the_deliveries(h: Harness, seed: int) -> None:
    rng = random.Random(seed)
    (start,) = h.join("a")
    answers: list[tuple[int, Joined, int]] = []
    for offset in range(1, 101):
        h.publish("a", str(offset))
        if rng.random() < 0.2:
            since = rng.randrange(offset + 1)

            def done(joined: Joined, since: int = since) -> None:
                answers.append((since, joined, len(h.delivered)))

            if not h.backplane.subscribe_soon("a", Position(start.epoch, since), done, never):
                info = h.backplane.info("a")
                assert info is not None
                assert info.subscribers == 1
                return  # it has no such way, and did nothing
            if rng.random() < 0.5:
                gevent.sleep(0)
    wait_until(lambda: len(h.delivered) == 100)
    offsets = [message.position.offset for message in h.delivered]
    for since, joined, seen in answers:
        replay = [message.position.offset for message in joined.messages]
        assert (replay, joined.gap) == (list(range(since + 1, offsets[seen - 1] + 1)), False)  # all before it, none after it
    info = h.backplane.info("a")
    assert info is not None
    assert info.subscribers == 1 + len(answers) > 1


# -- 4. acknowledged is kept


def test_what_was_acknowledged_can_be_read_at_once(h: Harness) -> None:
    for number in range(1, 6):
        h.publish("a", str(number))
        assert h.kept("a") == [str(one) for one in range(1, number + 1)]


def test_in_a_batch_a_refused_item_fails_alone(h: Harness) -> None:
    h.join("a")
    first, refused, last = h.backplane.publish([keyed("1", "k"), keyed("2", "k"), keyed("3", "other")])
    assert conflict(refused)
    assert (only([first]).offset, only([last]).offset) == (1, 2)
    h.until_got("a", "1", "3")


def test_an_empty_batch_has_an_empty_answer(h: Harness) -> None:
    assert list(h.backplane.publish([])) == []


# -- idempotency (publish, and 7)


def test_a_repeat_under_a_key_answers_what_the_first_did_and_publishes_nothing(h: Harness) -> None:
    h.join("a")
    first = h.backplane.publish([keyed("1", "k")])
    h.join("a")  # the second answer would count two
    h.publish("a", "2")
    assert h.backplane.publish([keyed("1", "k")]) == first == [Receipt(only(first), 1)]
    assert [only([one]).offset for one in h.backplane.publish([keyed("3", "l"), keyed("3", "l")])] == [3, 3]
    h.publish("a", "4")
    h.until_got("a", "1", "2", "3", "4")


def test_another_body_or_type_under_a_key_is_a_conflict(h: Harness) -> None:
    first = h.backplane.publish([keyed("1", "k")])
    for other in (keyed("2", "k"), keyed("1", "k", type="kind"), keyed("", "k")):
        (answer,) = h.backplane.publish([other])
        assert conflict(answer), other
    assert h.backplane.publish([keyed("1", "k")]) == first  # a conflict leaves the first answer as it was
    assert h.kept("a") == ["1"]


def test_keys_are_each_channels_own(h: Harness) -> None:
    h.backplane.publish([keyed("1", "k"), keyed("2", "k", "b")])
    assert (h.kept("a"), h.kept("b")) == (["1"], ["2"])


def test_without_a_key_equal_messages_are_two(h: Harness) -> None:
    assert [position.offset for position in h.publish("a", "1", "1")] == [1, 2]


def test_a_key_is_forgotten_when_its_time_is_over(start: Open) -> None:
    h = start(key_age=300.0, history_age=10000.0, linger=10000.0)
    h.backplane.publish([keyed("1", "k")])
    h.advance(299)
    assert only(h.backplane.publish([keyed("1", "k")])).offset == 1  # a repeat does not prolong it
    h.advance(2)
    assert only(h.backplane.publish([keyed("2", "k")])).offset == 2


@own_bounds
def test_keys_are_bounded_in_number_and_the_oldest_goes_first(start: Open) -> None:
    h = start(max_keys=2)
    h.backplane.publish([keyed(str(number), str(number)) for number in (1, 2, 3)])
    assert h.totals()["idempotency_keys"] == 2
    assert [only(h.backplane.publish([keyed(str(number), str(number))])).offset for number in (2, 3, 1)] == [2, 3, 4]


# -- 5. counting


def test_each_subscribe_counts_one_on_each_of_its_channels(h: Harness) -> None:
    h.join("a")
    h.join("a", "b")
    answers = h.backplane.publish([Publication(channel, b"1") for channel in "abc"])
    assert [isinstance(answer, Receipt) and answer.subscribers for answer in answers] == [2, 1, 0]
    h.backplane.unsubscribe(["a", "b"])
    infos = [h.backplane.info(channel) for channel in "abc"]
    assert [info and (info.subscribers, info.messages) for info in infos] == [(1, 1), (0, 1), (0, 1)]


def test_nobody_has_used_it_means_no_info(h: Harness) -> None:
    assert h.backplane.info("a") is None


# -- 6. lingering


def test_a_poller_between_two_polls_loses_nothing(start: Open) -> None:
    h = start(linger=60.0)
    cursor = h.join("a")
    h.backplane.unsubscribe(["a"])
    h.advance(59)
    h.publish("a", "1")  # a publication is a use: the time begins again
    h.advance(59)
    (joined,) = h.backplane.subscribe(["a"], cursor)
    assert (joined.position, bodies(joined.messages), joined.gap) == (cursor[0], ["1"], False)


@pytest.mark.parametrize("published", [0, 3])
def test_who_has_missed_nothing_may_join_again_without_an_answer(start: Open, published: int) -> None:
    h = start(linger=60.0)
    (position,) = h.join("a")
    if published:
        position = h.publish("a", *"123"[:published])[-1]
    for others in (0, 1):  # with nobody there, and beside somebody
        h.backplane.unsubscribe(["a"])
        h.advance(30)
        if others:
            h.join("a")
        assert h.backplane.rejoin("a", position)
        info = h.backplane.info("a")
        assert info is not None
        assert info.subscribers == 1 + others
    h.advance(100)  # it is held again
    assert h.publish("a", "last") == [Position(position.epoch, position.offset + 1)]
    h.until_got("a", *"123"[:published], "last")
    h.backplane.unsubscribe(["a"])
    h.backplane.unsubscribe(["a"])
    h.advance(100)
    assert h.backplane.info("a") is None


def test_who_may_have_missed_something_does_not_join_again_without_an_answer(h: Harness) -> None:
    (first,) = h.join("a")
    (position,) = h.publish("a", "1")
    (other,) = h.join("quiet")
    for channel, wrong in [
        ("a", first),  # behind
        ("a", Position(position.epoch, 2)),  # beyond
        ("a", Position(position.epoch ^ 1, 1)),
        ("quiet", Position(other.epoch ^ 1, 0)),
        ("quiet", Position(other.epoch, 1)),
        ("unknown", Position(1, 0)),
        ("a", FOREIGN),
        ("unknown", FOREIGN),
    ]:
        assert not h.backplane.rejoin(channel, wrong)
    infos = [h.backplane.info(channel) for channel in ("a", "quiet", "unknown")]
    assert [info and info.subscribers for info in infos] == [1, 1, None]


def test_a_held_channel_outlives_the_linger_time(start: Open) -> None:
    h = start(linger=60.0)
    (position,) = h.join("a")
    h.join("a")
    h.backplane.unsubscribe(["a"])
    h.advance(1000)
    assert h.backplane.info("a") == ChannelInfo(1, position, 0)
    h.backplane.unsubscribe(["a"])
    h.advance(59)
    assert h.join("a") == [position]  # someone came back in time
    h.advance(1000)
    assert h.backplane.info("a") == ChannelInfo(1, position, 0)


def test_a_forgotten_channel_costs_nothing(start: Open) -> None:
    h = start(linger=60.0)
    h.publish("a", "1")
    h.join("b")
    h.backplane.unsubscribe(["b"])
    h.advance(61)
    assert (h.backplane.info("a"), h.backplane.read("a", OLDEST), h.backplane.info("b")) == (None, None, None)
    assert h.totals() == {"channels": 0, "messages_kept": 0, "history_bytes": 0, "idempotency_keys": 0}


def test_a_message_for_nobody_waits_for_a_subscriber(h: Harness) -> None:
    h.publish("a", "1")
    (joined,) = h.backplane.subscribe(["a"], [OLDEST])
    assert bodies(joined.messages) == ["1"]


@own_bounds
def test_who_listens_to_names_without_messages_pushes_out_no_history(start: Open) -> None:
    h = start(max_idle=2)
    (position, *_) = h.publish("a", "1")
    for number in range(10):
        h.join(f"vacant{number}")
        h.backplane.unsubscribe([f"vacant{number}"])
    wait_until(lambda: h.totals()["channels"] == 3)
    (joined,) = h.backplane.peek(["a"], [Position(position.epoch, 0)])
    assert (bodies(joined.messages), joined.gap) == (["1"], False)


@own_bounds
def test_beyond_max_idle_the_longest_idle_channel_is_forgotten(start: Open) -> None:
    h = start(max_idle=2)
    h.join("held")
    h.publish("a", "1")
    h.publish("b", "2")
    h.publish("a", "3")
    h.publish("c", "4")
    assert [h.kept(channel) for channel in ("held", "a", "b", "c")] == [[], ["1", "3"], None, ["4"]]


# -- 7. bounds of history


def test_history_is_bounded_in_count(start: Open) -> None:
    h = start(history_size=3)
    h.publish("a", *map(str, range(10)))
    assert h.kept("a") == ["7", "8", "9"]
    assert h.totals()["messages_kept"] == 3


def test_history_is_bounded_in_age_and_a_held_channel_keeps_its_place(start: Open) -> None:
    h = start(history_age=300.0)
    h.join("a")
    (early,) = h.publish("a", "1")
    h.advance(200)
    (late,) = h.publish("a", "2")
    h.advance(101)
    assert h.kept("a") == ["2"]
    h.advance(200)
    assert h.backplane.info("a") == ChannelInfo(1, late, 0)
    assert h.totals()["history_bytes"] == 0
    (at_head, from_before) = h.backplane.subscribe(["a"], [late])[0], h.backplane.subscribe(["a"], [early])[0]
    assert (at_head.gap, from_before.gap, from_before.position) == (False, True, late)
    assert h.publish("a", "3") == [Position(late.epoch, 3)]


@own_bounds
def test_history_is_bounded_in_all_and_the_least_recently_used_channel_pays_first(start: Open) -> None:
    room = MESSAGE_COST + 3
    h = start(history_bytes=4 * room)
    h.publish("a", "1", "2")
    h.publish("b", "3", "4")
    h.join("a")  # a use
    h.publish("c", "5")
    assert [h.kept(channel) for channel in "abc"] == [["1", "2"], ["4"], ["5"]]  # b paid; reading was a use of each, c's the last
    h.publish("d", "6", "7", "8")
    assert [h.kept(channel) for channel in "abcd"] == [[], [], ["5"], ["6", "7", "8"]]
    assert h.totals()["history_bytes"] == 4 * room


@own_bounds
def test_a_message_larger_than_all_history_is_delivered_and_not_kept(start: Open) -> None:
    h = start(history_bytes=1000)
    h.join("a")
    h.publish("a", "small")
    (position,) = h.publish("a", "x" * 1000)
    h.until_got("a", "small", "x" * 1000)
    assert h.backplane.info("a") == ChannelInfo(1, position, 0)
    assert h.totals()["history_bytes"] == 0


def test_without_history_messages_are_delivered_and_not_kept(start: Open) -> None:
    h = start(history_size=0)
    (start_position,) = h.join("a")
    (position,) = h.publish("a", "1")
    h.until_got("a", "1")
    assert h.backplane.info("a") == ChannelInfo(1, position, 0)
    assert h.backplane.subscribe(["a"], [start_position])[0].gap


# -- send


def test_send_goes_to_held_feeds_alone(h: Harness) -> None:
    h.join("a")
    h.join("a", "c")
    sent = h.backplane.send("a,b,c", "kind", b"1")
    info = h.backplane.info("a")
    assert info is not None
    assert (sent.position, sent.targets, sent.delivered) == (info.position, 3, 3)
    h.until_got("a", "1")
    h.until_got("c", "1")
    assert {message.type for message in h.delivered} == {"kind"}
    assert h.backplane.info("b") is None


def test_send_without_its_first_feed_has_no_position(h: Harness) -> None:
    h.join("b")
    assert h.backplane.send("a,b", "message", b"1") == (None, 2, 1)
    assert h.backplane.send("c", "message", b"1") == (None, 1, 0)


def test_send_reaches_a_lingering_feed_and_does_not_keep_it_alive(start: Open) -> None:
    h = start(linger=60.0)
    cursor = h.join("a")
    h.backplane.unsubscribe(["a"])
    h.advance(40)
    assert h.backplane.send("a", "message", b"1").position == Position(cursor[0].epoch, 1)
    assert h.kept("a") == ["1"]
    h.advance(21)
    assert h.backplane.info("a") is None


def test_a_repeated_send_answers_what_the_first_did(h: Harness) -> None:
    first = h.backplane.send("a,b", "message", b"1", "k")  # nobody was there
    h.join("a", "b")
    assert h.backplane.send("a,b", "message", b"1", "k") == first == (None, 2, 0)
    for type, data in (("message", b"2"), ("kind", b"1")):
        with pytest.raises(Refusal, match="key-conflict"):
            h.backplane.send("a,b", type, data, "k")
    h.settle()
    assert h.got("a") == h.got("b") == []
    assert h.backplane.send("b,a", "message", b"2", "k").delivered == 2  # a key of the first feed alone


# -- delete


def test_delete_answers_what_went_and_tells_once(h: Harness) -> None:
    h.join("a")
    h.join("a", "b")
    (position,) = h.publish("a", "1")
    assert h.backplane.delete("a") == ChannelInfo(2, position, 1)
    wait_until(lambda: h.dropped)
    assert h.backplane.delete("a") is None
    assert h.backplane.info("a") is None
    h.settle()
    assert h.dropped == ["a"]


def test_delete_ends_subscriptions_so_that_nobody_unsubscribes_twice(h: Harness) -> None:
    h.join("a", "b")
    h.backplane.delete("a")
    wait_until(lambda: h.dropped)
    h.join("a")  # of the next log
    h.backplane.unsubscribe(["b"])
    infos = [h.backplane.info(channel) for channel in "ab"]
    assert [info and info.subscribers for info in infos] == [1, 0]
    assert h.publish("a", "1")[0].offset == 1
    h.until_got("a", "1")


# -- read


@pytest.mark.parametrize(
    ("since", "limit", "place", "rest"),
    [
        (OLDEST, None, 1, ["2", "3", "4"]),
        (OLDEST, 2, 1, ["2", "3"]),
        (OLDEST, 0, 1, []),
        (2, 1, 2, ["3"]),
        (2, 100, 2, ["3", "4"]),
        (4, 5, 4, []),
        (None, None, 4, []),
        (None, 5, 4, []),
    ],
)
def test_read_answers_like_joining_up_to_its_limit(start: Open, since: Any, limit: int | None, place: int, rest: list[str]) -> None:
    h = start(history_size=3)
    (epoch, _), *_ = h.publish("a", "1", "2", "3", "4")
    joined = h.backplane.read("a", Position(epoch, since) if isinstance(since, int) else since, limit)
    assert joined is not None
    assert (joined.position, bodies(joined.messages), joined.gap) == (Position(epoch, place), rest, False)


def test_read_from_a_lost_place_is_a_gap_and_pages_from_the_oldest(start: Open) -> None:
    h = start(history_size=3)
    (epoch, _), *_ = h.publish("a", "1", "2", "3", "4")
    for cursor in (Position(epoch, 0), Position(epoch, 9), Position(epoch ^ 1, 2)):
        joined = h.backplane.read("a", cursor, 2)
        assert joined is not None
        assert (joined.position, bodies(joined.messages), joined.gap) == (Position(epoch, 1), ["2", "3"], True)


def test_read_neither_joins_nor_makes_a_channel(h: Harness) -> None:
    places: list[Since] = [None, OLDEST, Position(1, 1)]
    assert [h.backplane.read("a", since) for since in places] == [None] * 3
    assert h.totals()["channels"] == 0
    h.publish("a", "1")
    h.backplane.read("a", OLDEST)
    info = h.backplane.info("a")
    assert info is not None
    assert info.subscribers == 0
