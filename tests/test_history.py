"""The log of one channel, against a naive model that never forgets."""

import random

import pytest

from comet.history import History, Joined
from comet.message import MESSAGE_COST, OLDEST, Position, Since

EPOCH = 5


@pytest.mark.parametrize("seed", range(3))
def test_any_sequence_of_appends_and_trims_agrees_with_a_naive_model(seed: int) -> None:
    rng = random.Random(seed)
    history = History(EPOCH)
    log: list[tuple[float, bytes]] = []  # everything ever ordered
    first = 0  # how many of it are forgotten
    charged = 0
    for now in range(2000):
        if rng.random() < 0.6:
            data = b"x" * rng.randrange(10)
            message = history.append("a", "message", data, now)
            log.append((now, data))
            charged += message.cost
            assert message.position == history.position == Position(EPOCH, len(log))
        elif rng.random() < 0.5:
            count = rng.choice([0, 1, 1, 3, 100])
            charged -= history.drop(count)
            first = min(len(log), first + count)
        else:
            most, before = rng.choice([0, 5, 50]), now - rng.randrange(60)
            charged -= history.trim(most, before)
            first = max(first, len(log) - most)
            while first < len(log) and log[first][0] < before:
                first += 1
        assert charged == sum(MESSAGE_COST + 3 * len(data) for _, data in log[first:])
        assert (history.entries is None) == (first == len(log))
        since: Since = rng.choice([None, OLDEST, Position(EPOCH, rng.randrange(len(log) + 3)), Position(EPOCH + 1, len(log))])
        limit = rng.choice([None, 0, 1, 3, 1000])
        answer = history.since(since, limit)
        known = isinstance(since, Position) and since.epoch == EPOCH and first <= since.offset <= len(log)
        start = len(log) if since is None else since.offset if known and isinstance(since, Position) else first
        assert answer.position == (EPOCH, start)
        assert answer.gap == (isinstance(since, Position) and not known)
        assert [message.data for message in answer.messages] == [data for _, data in log[start:][:limit]]
        assert [message.position.offset for message in answer.messages] == list(range(start + 1, len(log) + 1))[:limit]


def test_an_answer_stays_as_it_was_when_the_log_goes_on() -> None:
    history = History(EPOCH)
    history.append("a", "message", b"1", 0.0)
    answer = history.since(OLDEST)
    history.append("a", "message", b"2", 0.0)
    history.drop(2)
    assert [message.data for message in answer.messages] == [b"1"]


def test_a_log_without_messages_keeps_no_list() -> None:
    history = History(EPOCH)
    assert history.entries is None
    assert history.since(OLDEST) == Joined(Position(EPOCH, 0), [], False)
    assert (history.drop(3), history.trim(0, 1.0)) == (0, 0)


def test_a_log_whose_clock_stands_still_ages_nothing() -> None:
    history = History(EPOCH)
    history.append("a", "message", b"1", 10.0)
    assert history.trim(5, 10.0) == 0  # ordered at the limit, not before it
    assert history.trim(5, 10.1) == MESSAGE_COST + 3
