"""One client, awake: joining, holding, skipping, its backlog, and the greenlet that takes; and asleep: who hosts it."""

import json
from collections.abc import Iterator, Mapping, Sequence

import gevent
import pytest

from comet.framing import LINES, POLL, PORTION, TEXT, Batch, Framing, ServerSentEvents
from comet.history import History, Joined
from comet.message import FRAMING, Gap, Item, Message, Position, Since
from comet.subscriber import CATCHING_UP, TAKING, Awake, Subscriber
from tests.harness import TIMEOUT, wait_until

EPOCH = 5
NOW = Position(EPOCH, 0)


class Client:
    """A subscriber, and the home that it asks."""

    def __init__(
        self, *channels: str, framing: Framing = LINES, patience: float | None = None, backlog: int = 1 << 20, busy_backlog: int = 0
    ) -> None:
        self.asked: list[tuple[str, Position]] = []
        """Pages that it was asked for: what follows a position of a channel."""
        self.closes: list[tuple[Subscriber, str]] = []
        self.backlog = backlog
        self.busy_backlog = busy_backlog or backlog
        self.held: list[Sequence[Message]] = []
        self.subscriber = Subscriber(channels or ("a",), framing, self, Awake(patience, {}))

    def leave(self, subscriber: Subscriber, reason: str) -> None:
        self.closes.append((subscriber, reason))

    def read_on(self, subscriber: Subscriber, channel: str, position: Position) -> None:
        self.asked.append((channel, position))

    def hold(self, page: Sequence[Message]) -> None:
        self.held.append(page)

    def release(self, page: Sequence[Message]) -> None:
        self.held.remove(page)

    def join(self, answers: Sequence[Joined], *since: Since) -> None:
        """What the hub does with a backplane's answers, one a channel; `since` is what the client came with."""
        self.subscriber.begin(dict(zip(self.subscriber.channels, answers, strict=True)), since or [None] * len(answers))

    def page(self, answer: Joined, channel: str = "a") -> None:
        """What the hub does with a page that it was asked for."""
        self.subscriber.page(channel, answer)
        self.subscriber.go_on()

    def offer(self, *messages: Message) -> None:
        """What the hub delivers."""
        self.subscriber.deliver(Batch(messages))

    @property
    def reason(self) -> str | None:
        """Why it is to end, while somebody still takes."""
        return self.subscriber.awake.reason

    def take(self, timeout: float | None) -> list[Item] | None:
        return self.subscriber.take(timeout)

    def join_now(self) -> "Client":
        self.join([Joined(NOW, [], False)] * len(self.subscriber.channels))
        return self

    def taken(self) -> list[str]:
        """What waits: a body a message, GAP@offset."""
        items = self.take(0)
        assert items is not None
        return [f"GAP@{','.join(map(str, item.positions))}" if isinstance(item, Gap) else item.data.decode() for item in items]


def log(count: int, channel: str = "a", epoch: int = EPOCH) -> list[Message]:
    """Messages whose bodies are their offsets, 1 to `count`."""
    history = History(epoch)
    return [history.append(channel, "message", b"%d" % offset, 0.0) for offset in range(1, count + 1)]


def lines(pieces: Iterator[bytes]) -> list[str]:
    return [json.loads(piece)["data"] for piece in pieces if piece != LINES.heartbeat]


# -- joining


def test_live_messages_that_come_before_the_replay_follow_it() -> None:
    client, messages = Client(), log(4)
    for message in messages[2:]:
        client.offer(message)
    client.join([Joined(NOW, messages[:2], False)])
    assert client.taken() == ["1", "2", "3", "4"]
    assert not client.asked


def test_live_messages_that_the_replay_has_too_come_once() -> None:
    client, messages = Client(), log(4)
    for message in messages[1:]:
        client.offer(message)
    client.join([Joined(NOW, messages[:3], False)])
    assert client.taken() == ["1", "2", "3", "4"]
    assert not client.asked


def test_nothing_can_be_taken_before_the_replay_is_there() -> None:
    client, messages = Client(), log(2)
    client.offer(messages[1])
    assert client.take(0) == []
    client.join([Joined(NOW, messages[:1], False)])
    assert client.taken() == ["1", "2"]


def test_a_known_message_is_dropped() -> None:
    client, messages = Client().join_now(), log(3)
    for index in (0, 0, 1, 0, 1, 2):
        client.offer(messages[index])
    assert client.taken() == ["1", "2", "3"]
    client.offer(messages[1])
    assert client.take(0) == []


def test_several_channels_are_held_and_replayed_each_by_its_own_position() -> None:
    client = Client("a", "b")
    a, b = log(3, "a"), log(3, "b", 9)
    client.offer(b[2])
    client.offer(a[1])
    client.join([Joined(NOW, a[:2], False), Joined(Position(9, 1), [b[1]], False)])
    client.offer(a[2])
    assert client.taken() == ["1", "2", "2", "3", "3"]
    assert client.subscriber.awake.offered == {"a": Position(EPOCH, 3), "b": Position(9, 3)}


# -- losses


def test_a_loss_is_one_gap_after_what_waits() -> None:
    client, messages = Client().join_now(), log(2)
    client.offer(messages[0])
    client.subscriber.skip({"a": Position(7, 3)})
    assert client.taken() == ["1", "GAP@7-3"]
    client.subscriber.skip({"a": Position(7, 3)})  # it stands there already
    assert client.taken() == []


def test_who_has_passed_a_loss_is_not_told() -> None:
    client, messages = Client().join_now(), log(3)
    client.offer(*messages)
    client.subscriber.skip({"a": Position(EPOCH, 2), "elsewhere": Position(1, 1)})
    assert client.taken() == ["1", "2", "3"]


def test_a_loss_on_one_of_several_channels_leaves_the_others_where_they_are() -> None:
    client = Client("a", "b").join_now()
    client.offer(*log(2, "b"))
    client.subscriber.skip({"a": Position(7, 0)})
    assert client.taken() == ["1", "2", "GAP@7-0,5-2"]


def test_a_loss_before_the_first_answer_is_in_that_answer() -> None:
    client, messages = Client(), log(2)
    client.offer(messages[0])
    client.subscriber.skip({"a": Position(7, 0)})
    client.offer(*log(1, epoch=7))
    client.join([Joined(Position(7, 0), log(1, epoch=7), True)])
    assert client.taken() == ["GAP@7-0", "1"]
    assert not client.asked


def test_a_loss_behind_an_answer_while_another_is_awaited_is_a_gap() -> None:
    client = Client("a", "b")
    client.offer(*log(2)[1:])
    client.subscriber.skip({"a": Position(7, 1), "elsewhere": Position(1, 1)})
    client.offer(*log(2, epoch=7)[1:])
    client.join([Joined(NOW, log(1), False), Joined(NOW, [], False)])
    assert client.taken() == ["1", "GAP@7-1,5-0", "2"]
    assert not client.asked
    assert client.subscriber.awake.quiet


@pytest.mark.parametrize("answered", [False, True])
def test_a_loss_while_history_is_read_is_one_gap(answered: bool) -> None:
    client, messages = Client("a", "b").join_now(), log(3)
    client.offer(messages[2])
    assert client.asked == [("a", NOW)]
    place, new = Position(7, 1), log(2, epoch=7)[1:]
    client.subscriber.skip({"a": place})
    client.page(Joined(NOW, messages[:2], False) if answered else Joined(place, new, True))  # by the log before
    client.offer(*new)
    assert client.taken() == ["GAP@7-1,5-0"]
    assert client.take(0) == []
    client.page(Joined(place, new, False))
    assert client.taken() == ["2"]
    assert client.asked == [("a", NOW), ("a", place)]
    assert client.subscriber.awake.quiet


def test_asleep_a_loss_is_a_gap_and_what_is_past_it_is_nothing() -> None:
    client = Client("a", "b").join_now()
    subscriber = client.subscriber
    assert [json.loads(piece)["cursor"] for piece in subscriber.gap({"b": Position(7, 0)})] == ["5-0.7-0"]
    assert not subscriber.gap({"b": Position(7, 0), "a": NOW})


# -- skips


def test_after_a_skip_the_rest_is_read_from_history() -> None:
    client, messages = Client().join_now(), log(6)
    for index in (0, 3, 4):  # 2 and 3 were lost on the way
        client.offer(messages[index])
    assert client.subscriber.awake.offered == {"a": Position(EPOCH, 1)}
    assert client.taken() == ["1"]
    assert client.asked == []
    assert client.take(0) == []
    assert client.asked == [("a", Position(EPOCH, 1))]
    client.page(Joined(Position(EPOCH, 1), messages[1:5], False))
    client.offer(messages[5])
    assert client.taken() == ["2", "3", "4", "5", "6"]
    assert client.subscriber.awake.quiet
    assert len(client.asked) == 1


def test_what_came_behind_a_page_is_read_too() -> None:
    client, messages = Client().join_now(), log(7)
    for index in (2, 5, 6):
        client.offer(messages[index])
    client.page(Joined(NOW, messages[:3], False))
    assert client.taken() == ["1", "2", "3"]
    assert client.take(0) == []
    client.page(Joined(messages[2].position, messages[3:], False))
    assert client.taken() == ["4", "5", "6", "7"]
    assert client.asked == [("a", NOW), ("a", messages[2].position)]
    assert client.subscriber.awake.quiet


def test_another_epoch_is_told_as_exactly_one_gap() -> None:
    client, old, new = Client().join_now(), log(2), log(3, epoch=6)
    client.offer(old[0])
    for message in new[1:]:
        client.offer(message)
    assert client.taken() == ["1"]
    assert client.take(0) == []
    client.page(Joined(Position(6, 0), new, True))
    assert client.taken() == ["GAP@6-0", "1", "2", "3"]
    assert len(client.asked) == 1


# -- pages


def pages(messages: Sequence[Message], size: int, start: Position = NOW) -> list[Joined]:
    """`messages` in pages of so many."""
    made = []
    for index in range(0, len(messages), size):
        page = messages[index : index + size]
        made.append(Joined(start, page, False, len(messages) - index - len(page)))
        start = page[-1].position
    return made


def test_a_page_is_asked_for_when_the_last_was_taken() -> None:
    client, messages = Client(), log(6)
    first, second, third = pages(messages, 2)
    client.join([first])
    assert client.asked == []
    assert client.taken() == ["1", "2"]
    assert client.take(0) == [] and client.take(0) == []  # twice, and it is asked for once
    assert client.asked == [("a", first.end)]
    assert not client.subscriber.awake.quiet
    client.page(second)
    assert client.taken() == ["3", "4"]
    assert client.take(0) == []
    client.page(third)
    assert client.taken() == ["5", "6"]
    assert client.take(0) == []
    assert client.asked == [("a", first.end), ("a", second.end)]
    assert client.subscriber.awake.quiet


def test_what_is_delivered_during_a_replay_costs_nothing_and_is_read() -> None:
    client, messages = Client(backlog=3 * (FRAMING + 1)), log(9)
    client.join([Joined(NOW, messages[:2], False, 2)])
    for message in messages[4:]:
        client.offer(message)
    assert client.reason is None
    assert client.taken() == ["1", "2"]
    assert client.take(0) == []
    client.page(Joined(messages[1].position, messages[2:7], False, 1))
    assert client.taken() == ["3", "4", "5", "6", "7"]
    assert client.take(0) == []
    client.page(Joined(messages[6].position, messages[7:8], False))  # from before the ninth was ordered
    assert client.taken() == ["8"]
    assert client.take(0) == []
    client.page(Joined(messages[7].position, messages[8:], False))
    assert client.taken() == ["9"]
    assert client.subscriber.awake.quiet


def test_channels_are_replayed_one_after_the_other_and_those_that_are_not_go_on() -> None:
    client, a, b, c = Client("a", "b", "c"), log(2), log(2, "b"), log(1, "c")
    client.join([Joined(NOW, [], False, 2), Joined(NOW, [], False, 2), Joined(NOW, [], False)])
    assert client.take(0) == []
    client.offer(c[0])
    assert client.taken() == ["1"]
    client.page(Joined(NOW, a, False))
    assert client.taken() == ["1", "2"]
    assert client.take(0) == []
    client.page(Joined(NOW, b, False), "b")
    assert client.taken() == ["1", "2"]
    assert client.asked == [("a", NOW), ("b", NOW)]
    assert client.subscriber.awake.quiet


def test_a_channel_that_is_never_caught_up_with_keeps_no_other_waiting() -> None:
    client, busy, quiet = Client("busy", "quiet"), log(100, "busy"), log(2, "quiet")
    client.join([Joined(NOW, busy[:2], False, 98), Joined(NOW, [], False, 1)])
    assert client.taken() == ["1", "2"]
    assert client.take(0) == []
    client.page(Joined(NOW, busy[2:4], False, 96), "busy")
    client.offer(quiet[1])
    assert client.taken() == ["3", "4"]
    assert client.take(0) == []
    client.page(Joined(NOW, quiet, False), "quiet")
    assert client.taken() == ["1", "2"]
    assert [channel for channel, _ in client.asked] == ["busy", "quiet"]


def test_history_that_is_gone_before_it_was_read_is_a_gap() -> None:
    client, messages = Client("a", "b"), log(9)
    client.join([Joined(NOW, messages[:2], False, 3), Joined(Position(9, 4), [], False)])
    assert client.taken() == ["1", "2"]
    assert client.take(0) == []
    client.page(Joined(Position(EPOCH, 6), messages[6:], True))
    assert client.taken() == ["GAP@5-6,9-4", "7", "8", "9"]
    assert client.subscriber.awake.quiet


def test_a_replay_ends_with_its_reason() -> None:
    client, messages = Client(), log(4)
    client.join([Joined(NOW, messages[:2], False, 2)])
    client.subscriber.end("shutdown")
    assert client.taken() == ["1", "2"]
    assert client.take(0) is None
    assert client.asked == []


def test_a_gap_on_one_of_several_channels_keeps_the_place_on_the_others() -> None:
    client = Client("a", "b")
    client.join([Joined(NOW, log(1), False), Joined(Position(9, 4), [], True)])
    items = client.take(0)
    assert items is not None
    assert items[0] == Gap([NOW, Position(9, 4)])
    client.subscriber.encode(items)
    assert str(client.subscriber.cursor) == "5-1.9-4"


def test_gaps_on_several_channels_are_told_as_one() -> None:
    client = Client("a", "b")
    client.join([Joined(NOW, log(1), True), Joined(Position(9, 4), [], True)])
    assert client.taken() == ["GAP@5-0,9-4", "1"]


# -- the backlog


def test_a_client_that_takes_nothing_is_closed_when_its_backlog_is_full() -> None:
    client, messages = Client(backlog=3 * (FRAMING + 1)).join_now(), log(5)
    for message in messages[:3]:
        client.offer(message)
    assert client.reason is None
    client.offer(messages[3])
    assert client.reason == "backlog-bytes"
    client.offer(messages[4])
    assert client.take(0) is None
    assert str(client.subscriber.cursor) == "5-0"  # it resumes where it stood


def test_a_client_that_keeps_taking_may_have_more_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("comet.subscriber.monotonic", lambda: now[0])
    client, messages = Client(backlog=3 * (FRAMING + 1), busy_backlog=6 * (FRAMING + 1)).join_now(), log(8)
    client.offer(*messages[:5])
    now[0] += TAKING + 1
    client.subscriber.took()  # its connection has taken some of what is being sent
    client.offer(messages[5])
    assert client.reason is None
    client.offer(messages[6])
    assert client.reason == "backlog-bytes"


def test_a_client_that_took_something_long_ago_may_not(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("comet.subscriber.monotonic", lambda: now[0])
    client, messages = Client(backlog=3 * (FRAMING + 1), busy_backlog=6 * (FRAMING + 1)).join_now(), log(8)
    client.offer(*messages[:3])
    now[0] += TAKING + 1
    client.offer(messages[3])
    assert client.reason == "backlog-bytes"


def test_a_client_that_keeps_taking_and_never_catches_up_may_not_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("comet.subscriber.monotonic", lambda: now[0])
    client, messages = Client(backlog=3 * (FRAMING + 1), busy_backlog=6 * (FRAMING + 1)).join_now(), log(20)
    for start in (0, 4):  # what it takes in the end counts anew
        client.offer(*messages[start : start + 4])
        now[0] += CATCHING_UP - 1
        client.subscriber.took()
        assert client.reason is None
        assert client.taken() == [message.data.decode() for message in messages[start : start + 4]]
    client.offer(*messages[8:12])
    for _ in range(int(CATCHING_UP / TAKING) + 1):
        now[0] += TAKING
        client.subscriber.took()
    client.offer(messages[12])
    assert client.reason == "backlog-bytes"


def test_a_client_that_takes_has_its_backlog_back() -> None:
    client, messages = Client(backlog=3 * (FRAMING + 1)).join_now(), log(9)
    for start in (0, 3, 6):
        for message in messages[start : start + 3]:
            client.offer(message)
        assert client.taken() == [message.data.decode() for message in messages[start : start + 3]]
    assert client.reason is None


def test_a_replay_is_not_charged_to_the_backlog() -> None:
    client, messages = Client(backlog=FRAMING + 1), log(9)
    client.join([Joined(NOW, messages[:8], False)])
    client.offer(messages[8])
    assert client.taken() == list("123456789")


def test_what_is_held_is_bounded_too() -> None:
    client, messages = Client(backlog=3 * (FRAMING + 1)), log(4)
    for message in messages:
        client.offer(message)
    assert client.reason == "backlog-bytes"
    client.join([Joined(NOW, messages, False)])  # the answer comes nevertheless
    assert client.taken() == ["1", "2", "3", "4"]  # of the history, in order
    assert client.take(0) is None


def test_what_was_held_is_charged_once() -> None:
    client, messages = Client(backlog=3 * (FRAMING + 1)), log(3)
    for message in messages:
        client.offer(message)
    client.join_now()
    assert client.reason is None
    assert client.taken() == ["1", "2", "3"]


# -- the end


def test_the_first_reason_stays_and_what_waits_is_still_taken() -> None:
    client, messages = Client().join_now(), log(2)
    client.offer(messages[0])
    client.subscriber.end("shutdown")
    client.subscriber.end("hang-up")
    client.offer(messages[1])
    assert client.reason == "shutdown"
    assert client.taken() == ["1"]
    assert client.take(None) is None


# -- the client's greenlet


@pytest.mark.parametrize("how", ["offer", "join", "end"])
def test_a_waiting_greenlet_is_woken(how: str) -> None:
    client, (message,) = Client(), log(1)
    if how != "join":
        client.join_now()
    greenlet = gevent.spawn(client.take, None)
    gevent.sleep(0)
    assert not greenlet.dead
    if how == "offer":
        client.offer(message)
    elif how == "join":
        client.join([Joined(NOW, [message], False)])
    else:
        client.subscriber.end("hang-up")
    assert greenlet.get(timeout=TIMEOUT) == (None if how == "end" else [message])


def test_a_known_message_wakes_nobody() -> None:
    client, (message,) = Client().join_now(), log(1)
    client.offer(message)
    client.taken()
    client.offer(message)
    greenlet = gevent.spawn(client.take, None)
    gevent.sleep(0)
    assert not greenlet.dead
    client.subscriber.end("hang-up")
    assert greenlet.get(timeout=TIMEOUT) is None


def test_a_stream_goes_on_until_its_end_and_closes_once() -> None:
    client, messages = Client().join_now(), log(4)
    got: list[bytes] = []
    greenlet = gevent.spawn(lambda: got.extend(client.subscriber) or "ended")  # type: ignore[func-returns-value]
    for message in messages:
        client.offer(message)
        gevent.sleep(0)
    client.subscriber.end("deleted")
    assert greenlet.get(timeout=TIMEOUT) == "ended"
    assert got[0] == LINES.heartbeat
    assert lines(iter(got)) == ["1", "2", "3", "4"]
    assert client.closes == [(client.subscriber, "deleted")]
    assert str(client.subscriber.cursor) == "5-4"


def test_a_silent_stream_has_heartbeats() -> None:
    client, (message,) = Client(framing=ServerSentEvents(1), patience=0.001).join_now(), log(1)
    stream = iter(client.subscriber)
    assert next(stream).startswith(b"retry: 1\n")
    assert [next(stream) for _ in range(3)] == [b":\n"] * 3
    client.offer(message)
    assert b"data: 1\n" in next(stream)
    assert next(stream) == b":\n"


def test_a_stream_that_is_given_up_is_closed() -> None:
    client = Client().join_now()
    stream = iter(client.subscriber)
    next(stream)
    del stream  # as WSGI does when a client is gone in the middle of a write
    assert client.closes == [(client.subscriber, "lost")]


@pytest.mark.parametrize(("messages", "ended"), [(2, False), (0, False), (2, True), (0, True)])
def test_a_poll_is_one_answer(messages: int, ended: bool) -> None:
    client = Client(framing=POLL, patience=0.001).join_now()
    for message in log(messages):
        client.offer(message)
    if ended:
        client.subscriber.end("shutdown")
    (answer,) = client.subscriber
    document = json.loads(answer)
    assert [message["data"] for message in document["messages"]] == ["1", "2"][:messages]
    assert document["cursor"] == f"5-{messages}"
    assert client.closes == [(client.subscriber, "shutdown" if ended else "answered")]


def test_a_poll_whose_replay_is_huge_answers_a_part_and_its_cursor() -> None:
    history = History(EPOCH)
    big: list[Item] = [history.append("a", "message", b"x" * 200_000, 0.0) for _ in range(9)]
    client = Client(framing=POLL, patience=0)
    client.join([history.since("oldest")])
    (answer,) = client.subscriber
    document = json.loads(answer)
    assert 1 <= len(document["messages"]) < len(big)
    assert len(answer) <= PORTION
    assert document["cursor"] == document["messages"][-1]["id"]


def test_text_streams_begin_with_a_welcome() -> None:
    client = Client("user:7", framing=TEXT)
    client.join([Joined(NOW, log(1, "user:7"), False)])
    client.subscriber.end("shutdown")
    assert list(client.subscriber) == [b"comet welcomes you! Your id: 7\n", b"1\n"]


def test_many_waiting_clients_wake_each_on_its_own() -> None:
    clients = [Client().join_now() for _ in range(50)]
    greenlets = [gevent.spawn(client.take, None) for client in clients]
    gevent.sleep(0)
    (message,) = log(1)
    clients[7].offer(message)
    wait_until(lambda: greenlets[7].dead)
    assert [greenlet.dead for greenlet in greenlets].count(True) == 1
    for client in clients:
        client.subscriber.end("shutdown")
    gevent.joinall(greenlets, timeout=TIMEOUT, raise_error=True)
    assert all(greenlet.dead for greenlet in greenlets)


# -- who acts for it


class Bed:
    """A host that notes what it is handed."""

    def __init__(self) -> None:
        self.delivered: list[Batch] = []
        self.ends: list[str] = []

    def deliver(self, subscriber: Subscriber, batch: Batch) -> None:
        self.delivered.append(batch)

    def skip(self, subscriber: Subscriber, places: Mapping[str, Position]) -> None:
        raise AssertionError("nothing is lost here")

    def end(self, subscriber: Subscriber, reason: str) -> None:
        self.ends.append(reason)


def test_asleep_its_bed_gets_what_is_delivered_and_its_end() -> None:
    client, bed, messages = Client().join_now(), Bed(), log(2)
    assert client.subscriber.awake.quiet
    client.subscriber.sleep(bed, 7)
    client.offer(*messages)
    client.subscriber.end("deleted")
    assert [batch.messages for batch in bed.delivered] == [tuple(messages)]
    assert (bed.ends, client.subscriber.descriptor, client.closes) == (["deleted"], 7, [])


def test_woken_it_goes_on_where_it_stood() -> None:
    client, messages = Client().join_now(), log(5)
    client.offer(messages[0])
    assert client.take(0) == [messages[0]]
    client.subscriber.encode([messages[0]])
    client.subscriber.sleep(Bed(), 7)
    client.subscriber.offset = 3  # what a bed does that has written 2 and 3
    client.subscriber.wake(1.5)
    assert (client.subscriber.descriptor, client.subscriber.awake.patience) == (-1, 1.5)
    client.offer(*messages[1:])
    assert client.taken() == ["4", "5"]
    assert not client.asked


def test_woken_on_several_channels_it_goes_on_where_it_stood_on_each() -> None:
    client = Client("a", "b").join_now()
    a, b = log(2, "a"), log(2, "b")
    client.offer(a[0])
    items = client.take(0)
    assert items is not None
    client.subscriber.encode(items)
    client.subscriber.sleep(Bed(), 7)
    client.subscriber.encode([b[0]])
    client.subscriber.wake(None)
    client.offer(*a)
    client.offer(*b)
    assert client.taken() == ["2", "2"]
    assert not client.asked


@pytest.mark.parametrize("state", ["joining", "waiting", "skipped", "ended"])
def test_it_may_not_sleep_while_anything_is_to_do(state: str) -> None:
    client, messages = Client(), log(3)
    assert not client.subscriber.awake.quiet  # its replay is not there yet
    if state != "joining":
        client.join_now()
        assert client.subscriber.awake.quiet
    if state == "waiting":
        client.offer(messages[0])
    elif state == "skipped":
        client.offer(messages[1])
    elif state == "ended":
        client.subscriber.end("deleted")
    assert not client.subscriber.awake.quiet


def test_once_closed_nothing_reaches_it_any_more() -> None:
    client, bed = Client().join_now(), Bed()
    client.subscriber.sleep(bed, 7)
    client.subscriber.close("hang-up")
    client.offer(*log(1))
    client.subscriber.end("deleted")
    client.subscriber.close("lost")
    assert client.subscriber.ended
    assert (bed.delivered, bed.ends, client.closes) == ([], [], [(client.subscriber, "hang-up")])


def test_the_reason_it_was_ended_for_wins_over_how_its_answer_ended() -> None:
    client = Client().join_now()
    client.subscriber.end("deleted")
    client.subscriber.close("lost")
    assert client.closes == [(client.subscriber, "deleted")]


def test_a_poll_of_a_deleted_channel_is_still_answered() -> None:
    """The hub takes the channel off it before it ends."""
    client = Client(framing=POLL).join_now()
    client.subscriber.drop("a")
    client.subscriber.end("deleted")
    (answer,) = client.subscriber
    assert json.loads(answer) == {"cursor": "5-0", "gap": False, "messages": []}


def test_on_the_wire_a_poll_is_one_portion_and_a_stream_is_all() -> None:
    history = History(EPOCH)
    big: list[Item] = [history.append("a", "message", b"x" * 200_000, 0.0) for _ in range(9)]
    poll, stream = Client(framing=POLL).join_now(), Client(framing=TEXT).join_now()
    assert len(list(poll.subscriber.wires(big, b""))) == 1
    assert poll.subscriber.offset < 9
    assert b"".join(stream.subscriber.wires(big, b"")).count(b"x") == 9 * 200_000
    assert stream.subscriber.offset == 9
