"""The judge finds what it is there to find; the documentation says what is asserted."""

import pytest

from tests.clients.judge import Line, judge
from tests.clients.table import DOCUMENT, document


def lines(*said: int | str) -> list[Line]:
    """Numbers are messages, anything else is an event."""
    return [{"event": "message", "data": str(one)} if isinstance(one, int) else {"event": one} for one in said]


@pytest.mark.parametrize(
    ("said", "lost", "doubled"),
    [
        ([1, 2, 3], [], []),
        ([7, 8, "restart", 9], [], []),
        ([1, 2, 5], [3, 4], []),
        ([1, 2, "restart", 5], [3, 4], []),
        ([1, 2, "gap", 5], [], []),
        ([1, "gap", 2, 5], [3, 4], []),
        ([1, 2, 2, 3], [], [2]),
        ([1, 2, "gap", 2, 3], [], [2]),
        ([1, 3, 2], [2], [2]),
    ],
)
def test_what_is_lost_or_doubled_untold(said: list[int | str], lost: list[int], doubled: list[int]) -> None:
    verdict = judge(lines(*said))
    assert (verdict.lost, verdict.doubled) == (lost, doubled)
    assert verdict.faultless == (not lost and not doubled)


def test_a_doubtful_one_may_come_again_behind_a_gap() -> None:
    assert judge(lines(1, 2, "gap", 2, 3), {2}).faultless
    assert not judge(lines(1, 2, 2, 3), {2}).faultless


def test_no_message_is_a_fault() -> None:
    assert not judge(lines("open", "gap")).faultless


def test_messages_that_nobody_published_are_phantoms() -> None:
    verdict = judge([{"event": "message", "data": ""}, {"event": "other", "name": "comet", "data": ""}, *lines(1, 2)])
    assert verdict.phantoms == [""]
    assert verdict.others == {"comet"}
    assert verdict.faultless


def test_the_document_says_what_is_asserted() -> None:
    assert DOCUMENT.read_text() == document(), "run python -m tests.clients.table"
