"""What a client knows of what it got, and the audit at the end: lost, doubled, other, out of order."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtest import verify
from loadtest.audit import Outgoing, audit, edges
from loadtest.control import SENDERS_A_PROCESS
from loadtest.counting import RECORD, REFUSED, SENT, UNSURE, Counts, Send
from loadtest.verify import DIRECT, EVERYONE, FEED, KIND_MASK, SENDER_SHIFT, SIZE, Order, Place, body, number, read

FOLLOWS = {(1, 0), (2, 0), (2, 1), (3, 1)}
"""Follower, followee."""


def graph() -> list[Any]:
    rows = np.array(sorted(FOLLOWS), np.int64)
    return [(rows[:, 0], rows[:, 1])]


def message(count: int, user: int, kind: int = FEED, outcome: int = SENT, sender: int = 3) -> Send:
    targets = 1 + sum(followee == user for _, followee in FOLLOWS)
    return Send(kind, outcome, number(sender, count, kind), user, targets, targets, 0)


def told(sends: Sequence[Send], clients: int = 4) -> Outgoing:
    """The master's sums, of reports of two records."""
    outgoing = Outgoing(clients)
    for start in range(0, len(sends), 2):
        outgoing.add(b"".join(RECORD.pack(*one) for one in sends[start : start + 2]))
    return outgoing


def got(*clients: list[Send], logins: tuple[int, ...] = (0, 1, 2, 3)) -> list[dict[str, bytes]]:
    """The account of one process whose clients got these."""
    counts = Counts()
    for user, those in zip(logins, clients, strict=True):
        client = counts.ledger.add(user)
        for one in those:
            counts.ledger.take(client, one.number)
    return [counts.account()]


def test_a_message_says_who_sent_it_when_and_which_it_is() -> None:
    text = body(number(41, 7, DIRECT), 123_456_789)
    assert len(text) == SIZE
    told, sent = read(text)
    assert (told >> SENDER_SHIFT, told & KIND_MASK, sent) == (41, DIRECT, 123_456_789)
    assert read(text + b"\n") == (told, sent)


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(ValueError):
        read(b"comet welcomes you! Your id: 5\n")


def test_numbers_are_unique() -> None:
    made = {number(sender, count, kind) for sender in range(20) for count in range(50) for kind in (FEED, DIRECT, EVERYONE)}
    assert len(made) == 20 * 50 * 3


def test_numbers_of_senders_of_all_processes_and_of_days_are_unique_and_fit() -> None:
    first = SENDERS_A_PROCESS
    made = {number(sender, count, FEED) for sender in (0, 1, 9_999, first, first + 9_999) for count in (1, 86_400_000)}
    assert len(made) == 10
    assert number(1 << 13 << 16, 1, FEED) == 1 << 63 | 4, "8,192 processes"


def test_sums_wrap_on_both_sides() -> None:
    large = [Send(kind, SENT, number(1 << 28, count, kind), 0, 1, 1, 0) for count in range(1, 6) for kind in (FEED, EVERYONE)]
    verdict = audit([], told(large, 1), got(large, logins=(0,)), shared=[True])
    assert (verdict["due"], verdict["lost"], verdict["doubled"], verdict["other"]) == (10, 0, 0, 0)


def test_the_order_of_a_sender() -> None:
    order = Order()
    assert [order.take(0, number(1, count, FEED)) for count in (1, 5, 5, 2, 6)] == ["", "", "doubled", "out of order", ""]
    assert order.take(0, number(2, 1, FEED)) == ""
    assert order.take(1, number(1, 1, FEED)) == ""


def test_the_order_of_so_many_is_remembered_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "PAIRS", 2)
    order = Order()
    assert [order.take(client, number(1, 5, FEED)) for client in range(4)] == [""] * 4
    assert [order.take(client, number(1, 4, FEED)) for client in range(4)] == ["out of order"] * 2 + [""] * 2


def test_steps_from_place_to_place() -> None:
    here = Place.read(b"abc-7")
    assert here.text() == b"abc-7"
    steps = {b"abc-8": ("", 0), b"abc-11": ("lost", 3), b"abc-7": ("doubled", 1), b"abc-5": ("out of order", 1), b"def-8": ("gap", 1)}
    assert {text: here.step(Place.read(text)) for text in steps} == steps


def test_all_that_was_due_was_got() -> None:
    first, second = message(1, 0), message(2, 1)
    verdict = audit(graph(), told([first, second]), got([first], [first, second], [second, first], [second]))
    assert (verdict["due"], verdict["received"], verdict["targets"]) == (6, 6, 6)
    assert (verdict["lost"], verdict["doubled"], verdict["other"]) == (0, 0, 0)


def test_what_one_client_missed_is_lost_although_another_had_it_twice() -> None:
    first = message(1, 0)
    verdict = audit(graph(), told([first]), got([first], [], [first, first], []))
    assert (verdict["lost"], verdict["doubled"], verdict["short"]) == (1, 1, 1)


def test_another_message_than_was_sent() -> None:
    first, second = message(1, 0), message(2, 3)
    verdict = audit(graph(), told([first, second]), got([first], [second], [first], [second]))
    assert (verdict["lost"], verdict["doubled"], verdict["other"]) == (0, 0, 1)


def test_who_is_logged_in_twice_is_due_it_twice() -> None:
    first = message(1, 3)
    verdict = audit(graph(), told([first]), got([], [first], [first], logins=(0, 3, 3)))
    assert (verdict["due"], verdict["lost"], verdict["doubled"], verdict["clients"]) == (2, 0, 0, 3)


def test_who_is_not_connected_is_due_nothing() -> None:
    verdict = audit(graph(), told([message(1, 0)]), got([], logins=(3,)))
    assert (verdict["due"], verdict["lost"]) == (0, 0)


def test_an_unconfirmed_message_may_have_come_or_not() -> None:
    doubtful = message(1, 3, outcome=UNSURE)
    for those in ([], [doubtful]):
        verdict = audit(graph(), told([doubtful]), got([], [], [], those))
        assert (verdict["lost"], verdict["doubled"], verdict["unsure"]) == (0, 0, 1)
    assert audit(graph(), told([doubtful]), got([], [], [], [doubtful, doubtful]))["doubled"] == 1


def test_a_refused_message_must_not_come() -> None:
    refused = message(1, 3, outcome=REFUSED)
    assert audit(graph(), told([refused]), got([], [], [], [refused]))["doubled"] == 1


def test_a_direct_message_is_for_one_and_one_to_everyone_for_whom_the_endpoint_has_it() -> None:
    direct, everyone = message(1, 0, DIRECT), message(2, 0, EVERYONE)
    verdict = audit(graph(), told([direct, everyone]), got([direct], [everyone], [], [everyone]), own=[True, False], shared=[False, True])
    assert (verdict["due"], verdict["lost"], verdict["doubled"], verdict["other"]) == (3, 0, 0, 0)


def test_while_clients_still_come_sums_are_compared() -> None:
    first = Send(FEED, SENT, number(1, 1, FEED), 0, 3, 1, 0)
    verdict = audit(graph(), told([first]), got([], [first], [], []), complete=False)
    assert (verdict["due"], verdict["lost"], verdict["doubled"]) == (1, 0, 0)
    assert audit(graph(), told([first]), got([], [], [], []), complete=False)["lost"] == 1


def test_a_random_history_with_each_kind_of_damage(tmp_path: Path) -> None:
    numbers = random.Random(5)
    users = 200
    follows = {(numbers.randrange(users), numbers.randrange(users)) for _ in range(2000)}
    path = tmp_path / "friends.txt"
    path.write_text("".join(f"{follower} {followee}\n" for follower, followee in follows if follower != followee))
    sent = [Send(FEED, SENT, number(count % 7, count, FEED), numbers.randrange(users), 1, 1, 0) for count in range(500)]
    due: list[list[Send]] = [[] for _ in range(users)]
    for one in sent:
        for user in {one.user, *(follower for follower, followee in follows if followee == one.user and follower != followee)}:
            due[user].append(one)
    logins = tuple(range(users))
    assert audit(edges(path), told(sent, users), got(*due, logins=logins))["received"] == sum(map(len, due))
    lost = [those[1:] if user % 10 == 0 else those for user, those in enumerate(due)]
    assert audit(edges(path), told(sent, users), got(*lost, logins=logins))["lost"] == sum(bool(due[user]) for user in range(0, users, 10))


def test_records_survive_the_way_to_the_master() -> None:
    counts = Counts()
    made = [message(1, 0), message(2, 3, DIRECT, UNSURE), message(3, 1, outcome=REFUSED), message(4, 0, EVERYONE)]
    for one in made:
        counts.record(one)
    outgoing = Outgoing(4)
    outgoing.add(counts.report()["sends"])
    assert outgoing.outcomes == {"sent": 2, "unsure": 1, "refused": 1, "targets": 6, "delivered": 6}
    assert outgoing.everyone == [made[3]]
    assert list(outgoing.sums[FEED].total) == [made[0].number, 0, 0, 0]
    assert list(outgoing.sums[DIRECT].doubt) == [0, 0, 0, 1]
    assert counts.sent == 2
    assert counts.report()["sends"] == b""


def test_what_is_late_is_a_failure() -> None:
    counts = Counts(late=0.5)
    client = counts.ledger.add(9)
    counts.take("/test", client, number(1, 1, FEED), 0, 400_000_000)
    counts.take("/test", client, number(1, 2, FEED), 0, 600_000_000)
    assert counts.failures == {("/test", "late"): 1}


def test_what_waited_for_a_client_that_was_away_is_not_late_by_that() -> None:
    counts = Counts(late=0.5)
    client = counts.ledger.add(9)
    counts.take("/stream", client, number(1, 1, FEED), 0, 5_000_000_000, back=4_600_000_000)
    assert not counts.failures
    counts.take("/stream", client, number(1, 2, FEED), 0, 5_200_000_000, back=4_600_000_000)
    assert counts.failures == {("/stream", "late"): 1}
