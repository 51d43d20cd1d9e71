"""What a worker has of its generation."""

from comet.generation import HELD, held
from comet.kernel.limits import RESERVE
from comet.server.wsgi import MAX_REFUSING


def test_a_worker_holds_its_own_listener_first_and_all_others() -> None:
    assert held(0, 1) == [0]
    assert [held(worker, 3) for worker in range(3)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
    assert held(5, 3)[0] == 2  # where workers share


def test_of_very_many_it_holds_the_next_and_each_is_held_by_as_many() -> None:
    assert held(998, 1000)[:4] == [998, 999, 0, 1]
    holders = [sum(listener in held(worker, 1000) for worker in range(1000)) for listener in (0, 500, 999)]
    assert holders == [HELD] * 3
    assert HELD + MAX_REFUSING < RESERVE - 32, "beside what a worker has open itself"
