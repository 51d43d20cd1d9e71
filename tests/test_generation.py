"""What a worker has of its generation."""

import json

import pytest

from comet.generation import HELD, VARIABLE, Orders, Unfit, held
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


ORDERS = Orders(3, 2, [0], 1, 2, 1, 2, "/nowhere/router")


def test_orders_are_taken_out_of_the_environment() -> None:
    environ = {VARIABLE: ORDERS.text(), "HOME": "/"}
    assert Orders.take(environ) == ORDERS
    assert environ == {"HOME": "/"}
    assert Orders.take(environ) is None


@pytest.mark.parametrize(
    "text", ["", "x", "{}", "[]", "7", "null", json.dumps({**ORDERS._asdict(), "more": 1}), ORDERS._replace(board=10**6).text()]
)
def test_what_no_supervisor_has_said_is_refused(text: str) -> None:
    with pytest.raises(Unfit, match="COMET_GENERATION"):
        Orders.take({VARIABLE: text})
