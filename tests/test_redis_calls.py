"""Asking Redis where nobody can be asked now: how often it is tried."""

from typing import Any

import gevent

from comet.backplane.redis_calls import Calls
from comet.errors import Refusal
from tests.harness import wait_until


class Nowhere:
    """A cluster in which nobody has any key; counts how often that is looked up."""

    def __init__(self) -> None:
        self.looks = 0

    def link(self, key: bytes) -> None:
        self.looks += 1

    def refresh(self) -> None: ...


def test_what_can_not_be_asked_is_tried_less_and_less_often() -> None:
    shards: Any = Nowhere()
    got: list[Any] = []
    Calls(shards).ask(b"key", lambda: (b"PING",), got.append, timeout=4.0)
    gevent.sleep(3.9)
    assert 10 <= shards.looks <= 45
    wait_until(lambda: got)
    assert isinstance(got[0], Refusal)
    assert got[0].slug == "backplane-away"
