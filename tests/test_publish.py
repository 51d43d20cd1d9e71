"""A batch of publications, where nothing can be published any more in the middle of it."""

import json
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from comet.errors import Refusal
from comet.message import Position, Publication, Receipt
from comet.settings import Settings
from handlers import publish
from handlers.publish import SLICE


class Hub:
    """Publishes so many messages, and then refuses."""

    def __init__(self, most: int) -> None:
        self.published: list[str] = []
        self._most = most

    def publish(self, publications: Sequence[Publication]) -> Sequence[Receipt | Refusal]:
        if len(self.published) + len(publications) > self._most:
            raise Refusal("backplane-full", "It is full.")
        self.published += [one.data.decode() for one in publications]
        return [Receipt(Position(1, 1), 0)] * len(publications)


def batch(hub: Hub, count: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Counter[str]]:
    """Publish so many lines; return the result of each, and what was counted as refused."""
    data = b"".join(b'{"channel": "a", "data": "%d"}\n' % number for number in range(count))
    monkeypatch.setattr(publish, "body", lambda most: data)
    monkeypatch.setattr(publish, "hold", lambda size: None)
    stats = SimpleNamespace(refused=Counter[str]())
    context: Any = SimpleNamespace(settings=Settings(), hub=hub, stats=stats)
    return [json.loads(line) for line in publish.batch(context).body.splitlines()], stats.refused


def test_what_was_published_before_a_refusal_is_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(2 * SLICE)
    results, refused = batch(hub, 4 * SLICE + 1, monkeypatch)
    assert ["id" in result for result in results] == [number < 2 * SLICE for number in range(4 * SLICE + 1)]
    assert {result["error"] for result in results[2 * SLICE :]} == {"backplane-full"}
    assert hub.published == [str(number) for number in range(2 * SLICE)]
    assert refused == {"backplane-full": 2 * SLICE + 1}


def test_a_batch_of_which_nothing_was_published_is_refused_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refusal, match="full"):
        batch(Hub(0), 4 * SLICE, monkeypatch)
