"""An address's share of channels that nobody has published to."""

from types import SimpleNamespace
from typing import Any

import pytest

from comet.errors import Refusal
from comet.message import Cursor, Position
from comet.server import share as module
from comet.server.share import Share
from tests.contracts.suite import Clock


def one(offset: int) -> Any:
    """A subscriber of one channel, as far as it is known here."""
    return SimpleNamespace(places=None, offset=offset)


def several(*offsets: int) -> Any:
    names = [f"c{number}" for number in range(len(offsets))]
    return SimpleNamespace(places=Cursor(names, [Position(7, offset) for offset in offsets]), offset=0)


def test_new_channels_are_counted_by_address_and_those_with_messages_are_not() -> None:
    share = Share(5, 60.0, Clock())
    share.check("a")
    share.note("a", one(0))
    share.note("a", several(0, 3, 0, 0))
    share.note("a", one(4))
    share.note("b", one(0))
    assert not share.full("a")
    share.note("a", one(0))
    assert (share.full("a"), share.full("b"), share.full("c")) == (True, False, False)
    with pytest.raises(Refusal, match="new-channels"):
        share.check("a")


@pytest.mark.parametrize(("seconds", "full"), [(59, True), (61, True), (119, True), (121, False), (1000, False)])
def test_what_was_counted_is_forgotten_after_one_to_two_spans(seconds: float, full: bool) -> None:
    clock = Clock()
    share = Share(2, 60.0, clock)
    clock.now += 1
    share.note("a", several(0, 0))
    for _ in range(10):
        clock.now += seconds / 10
        share.note("b", one(0))
    assert share.full("a") is full


def test_nothing_is_left_of_who_has_not_come_for_two_spans() -> None:
    clock = Clock()
    share = Share(2, 60.0, clock)
    share.note("a", several(0, 0))
    clock.now += 121
    assert not share.full("a")


def test_addresses_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ADDRESSES", 100)
    share = Share(2, 60.0, Clock())
    for number in range(1000):
        share.note(f"a{number}", one(0))
        assert len(share._now) + len(share._before) <= 202
