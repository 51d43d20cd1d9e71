"""Work that is put off to the loop's next turn."""

import gevent

from comet.turn import Soon, give_way


def test_all_that_is_put_off_runs_once_and_in_order() -> None:
    soon = Soon()
    done: list[str] = []
    soon(lambda: done.append("a"))
    soon(lambda: done.append("b"))
    assert done == []
    give_way()
    assert done == ["a", "b"]
    give_way()
    assert done == ["a", "b"]


def test_work_that_puts_itself_off_lets_others_have_their_turns() -> None:
    soon = Soon()
    turns = {"first": 0, "second": 0, "greenlet": 0}

    def again(name: str) -> None:
        turns[name] += 1
        if turns[name] < 100:
            soon(lambda: again(name))

    def live() -> None:
        while turns["second"] < 100:
            turns["greenlet"] += 1
            give_way()

    soon(lambda: again("first"))
    soon(lambda: again("second"))
    gevent.spawn(live).join(10)
    assert turns["first"] == turns["second"] == 100
    assert turns["greenlet"] > 50
