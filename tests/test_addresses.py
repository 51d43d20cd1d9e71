"""Connections by address, counted in several workers. They are all in one process here, which makes no difference to the memory."""

import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest

from comet.counts import ROWS, Counts, Spot
from comet.server.addresses import SLACK, Addresses


@pytest.fixture
def shared() -> Iterator[Counts]:
    made = Counts.create(12)
    made.use(12)
    yield made
    made.close()


def grab(addresses: Addresses, address: str, most: int = 1 << 20) -> int:
    """Connect until there is no more room, and return how often that was."""
    for number in range(most):
        if not addresses.add(address):
            return number
    return most


def leave(addresses: Addresses, address: str, number: int) -> None:
    for _ in range(number):
        addresses.remove(address)


def test_a_worker_alone_lets_in_as_many_as_it_may() -> None:
    alone = Addresses(5)
    assert grab(alone, "a") == 5
    assert grab(alone, "b") == 5
    alone.remove("a")
    assert grab(alone, "a") == 1
    for address in "ab":
        leave(alone, address, 5)
    assert not alone.own


@pytest.mark.parametrize(("most", "workers"), [(1, 1), (1, 4), (3, 4), (50, 2), (50, 4), (1000, 4), (5000, 3)])
@pytest.mark.parametrize("leaving", [0.05, 0.3])
def test_an_address_has_its_share_in_all_workers_never_less_and_at_most_a_tenth_or_one_a_worker_more(
    shared: Counts, most: int, workers: int, leaving: float
) -> None:
    rng = random.Random(most)
    those = [Addresses(most, shared, column, workers) for column in range(workers)]
    total: Counter[str] = Counter()
    held: list[tuple[Addresses, str]] = []
    highest = 0
    crowd = ["192.0.2.1"] * 8 + ["192.0.2.2", "2001:db8::/64"]
    for _ in range(max(2000, 5 * most)):
        if held and rng.random() < (0.6 if total["192.0.2.1"] >= most else leaving):
            worker, address = held.pop(rng.randrange(len(held)))
            worker.remove(address)
            total[address] -= 1
            continue
        worker, address = rng.choice(those), rng.choice(crowd)
        if worker.add(address):
            held.append((worker, address))
            total[address] += 1
            highest = max(highest, total[address])
        else:
            assert total[address] >= most, "nobody is refused who has room"
        assert worker.own[address] <= total[address]
    assert most <= highest <= most + max(most // SLACK, workers - 1)
    for worker, address in held:
        worker.remove(address)
    for worker in those:
        assert not worker.own
        assert not worker._shared
    assert grab(those[0], "192.0.2.1") == most
    assert sum(grab(worker, "192.0.2.1") for worker in those) <= max(most // SLACK, workers - 1), "the worst order"


def test_what_a_worker_that_has_ended_had_counted_is_void(shared: Counts) -> None:
    one, two = (Addresses(100, shared, column, 2) for column in (0, 1))
    step = 100 // (SLACK * 2)
    assert grab(one, "a") == 100
    assert grab(two, "a") == step, "those that are let in without a reading"
    shared.clear(0)
    assert grab(two, "a") == 100 - step
    one = Addresses(100, shared, 0, 2)
    assert grab(one, "a") == step
    leave(two, "a", 60)
    assert grab(one, "a") == 60 - step
    shared.clear(1)
    assert grab(one, "a") == 40


def test_of_a_column_every_row_is_cleared_and_of_the_others_none(shared: Counts) -> None:
    rng = random.Random(1)
    for rows in (range(ROWS), rng.sample(range(ROWS), 50), [0], [ROWS - 1]):
        for row in rows:
            for number in range(shared._width):
                shared._rows[row * shared._width + number] = number + 1
        before = os.stat(shared.descriptor).st_blocks
        for column in rng.sample(range(12), 12):
            shared.clear(column)
            assert all(shared._rows[row * shared._width + 2 * column + probe] == 0 for row in rows for probe in (0, 1))
            left = sum(word != 0 for word in shared._rows[rows[-1] * shared._width : (rows[-1] + 1) * shared._width])
            shared.clear(column)
            assert left == sum(word != 0 for word in shared._rows[rows[-1] * shared._width : (rows[-1] + 1) * shared._width])
        assert not any(shared._rows)
        assert os.stat(shared.descriptor).st_blocks == before


def test_two_addresses_of_a_row_are_told_apart_and_a_third_is_counted_by_its_worker_alone(
    shared: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = (ROWS - 1) * shared._width
    monkeypatch.setattr(shared, "spot", lambda address: Spot(last, ord(address) << 32))
    one, two = (Addresses(10, shared, column, 2) for column in (0, 11))
    for address in "abc":
        assert grab(one, address) == 10
    assert [grab(two, address) for address in "abc"] == [1, 1, 10]
    leave(one, "a", 10)
    assert grab(two, "b") == 0, "it stands behind a free word"
    assert grab(two, "a") == 9
    leave(one, "c", 10)
    assert grab(one, "d") == 10
    assert grab(two, "d") == 1, "it has the word that was of a"
    spots = [shared.spot(address) for address in "abcd"]
    assert [shared.total(spot) for spot in spots] == [10] * 4
    assert [shared.bound(spot) for spot in spots] == [40] * 4


def test_columns_that_nobody_has_are_not_read(shared: Counts) -> None:
    one, two, three = (Addresses(100, shared, column, 1) for column in (0, 4, 8))
    shared.use(1)
    assert [grab(worker, "a", 30) for worker in (one, two, three)] == [30, 30, 30]
    shared.use(5)
    assert grab(one, "a") == 100 - 30 - 30
    shared.use(9)
    one.remove("a")
    assert grab(one, "a") == 1
    assert grab(one, "a") == 0


def test_nobody_can_choose_a_row(shared: Counts) -> None:
    other = Counts.create(12)
    assert shared.spot("192.0.2.1") == shared.spot("192.0.2.1") != other.spot("192.0.2.1")
    other.close()


def test_another_process_sees_what_is_counted(shared: Counts) -> None:
    child = os.fork()
    if child == 0:
        grab(Addresses(50, Counts(os.dup(shared.descriptor)), 3, 2), "a", 30)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert grab(Addresses(50, shared, 0, 2), "a") == 20


def test_the_table_is_bounded_and_who_has_one_connection_is_not_told_of() -> None:
    large = Counts.create(3 * 60)
    large.use(60)
    assert os.stat(large.descriptor).st_size <= 60 * 1.6 * (1 << 20)
    before = os.stat(large.descriptor).st_blocks
    assert before * 512 <= 1 << 16
    worker = Addresses(5000, large, 7, 60)
    for number in range(20_000):
        assert worker.add(f"10.0.{number >> 8}.{number & 255}")
    assert os.stat(large.descriptor).st_blocks == before, "pages that nobody has touched take no memory"
    large.close()
