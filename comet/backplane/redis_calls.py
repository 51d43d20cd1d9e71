"""Asking Redis about a channel, whichever server has it by then; and waiting for several answers.

Neighbours: `comet.backplane.redis_shards` knows the servers, `comet.backplane.redis_link` is the way to one;
`comet.backplane.redis` and `comet.backplane.redis_following` ask. An answer is what Redis said, or a Refusal.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import gevent
import hiredis
from gevent import get_hub
from gevent.hub import Waiter

from comet.backplane.redis_link import ANSWER, AWAY, BROKEN, Call, Link
from comet.backplane.redis_shards import Cluster, Single
from comet.errors import Refusal

MAX_WAITING: Final = 64 << 20
"""Bytes of messages that wait for Redis: beyond it they are refused."""

AGAIN: Final = 0.05
"""Seconds before a question goes to another server, at first."""

PATIENCE: Final = 0.15
"""Of the time for which it has been tried: so long it is waited then, with jitter, since a cluster that is down refuses everybody at
once, and when it is back nobody comes much later."""

LONGEST_AGAIN: Final = 1.0
"""Seconds, at most."""

ELSEWHERE: Final = ("MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN")
"""Errors of a server that has not done it, because the slot is another's or on its way there."""

EXPECTED: Final = ("OOM", *AWAY, "MISCONF")
"""Errors of a server that its operator set so: the log of Redis, or an outage, has them."""

Answered = Callable[[Any], None]
Make = Callable[[], Sequence[Any]]


def away() -> Refusal:
    """Nothing was done."""
    return Refusal("backplane-away", "Redis, which orders the messages of this service, does not answer; send it again, a little later.")


def unconfirmed() -> Refusal:
    """What the publisher is told whose message may have been ordered, or not."""
    return Refusal("unconfirmed", "Redis did not confirm this: it may have been published; send it again if twice is better than never.")


class Asked:
    """A question under way. `make` says it when it is sent; `again`: it may be asked twice; `until` is when nobody waits for it
    any more."""

    __slots__ = ("again", "answer", "answered", "before", "call", "key", "link", "make", "since", "size", "until")

    def __init__(
        self, key: bytes, make: Make, answered: Answered, again: bool, until: float, size: int, answer: int, before: Callable[[Link], None]
    ) -> None:
        self.key = key
        self.make = make
        self.answered = answered
        self.again = again
        self.until = until
        self.size = size
        self.answer = answer
        self.before = before
        self.since = time.monotonic()
        self.link: Link | None = None
        self.call: Call | None = None


def _nothing(link: Link) -> None:
    """What most questions have sent before them."""


class Calls:
    """`shards` are the servers."""

    def __init__(self, shards: Single | Cluster) -> None:
        self._shards = shards
        self._loop = get_hub().loop
        self._size = 0

    def ask(
        self,
        key: bytes,
        make: Make,
        answered: Answered,
        again: bool = True,
        timeout: float = math.inf,
        size: int = 0,
        answer: int = ANSWER,
        before: Callable[[Link], None] = _nothing,
    ) -> Asked:
        """Ask whoever has `key`; `answered` is called once, at the answer's place in the stream. `size` is how many bytes are sent
        that count, `answer` how many the answer may have. `before` may have other things sent on the link, ahead of it. Where too
        much waits the answer is Refusal ``backplane-busy``."""
        asked = Asked(key, make, answered, again, time.monotonic() + timeout, size, answer, before)
        if size and self._size > MAX_WAITING:
            asked.size = 0
            self._loop.run_callback(
                self._finish, asked, Refusal("backplane-busy", "Too much waits for Redis; send it again, a little later.")
            )
            return asked
        self._size += size
        self._dispatch(asked)
        return asked

    def give_up(self, asked: Asked) -> None:
        """Nobody waits for it any more. If it was never sent it won't be, and is answered so."""
        asked.until = 0.0
        if asked.link is not None and asked.call is not None and asked.link.forget(asked.call):
            self._finish(asked, away())

    def _dispatch(self, asked: Asked) -> None:
        link = self._shards.link(asked.key)
        if link is None:
            self._later(asked)
            return
        asked.link = link
        asked.before(link)
        asked.call = Call(asked.make, partial(self._arrived, asked), asked.again, asked.answer)
        link.call(asked.call)

    def _later(self, asked: Asked) -> None:
        asked.link = asked.call = None
        self._shards.refresh()
        pause = min(max(AGAIN, PATIENCE * (time.monotonic() - asked.since)), LONGEST_AGAIN)
        gevent.spawn_later(pause * random.uniform(0.5, 1.0), self._try_again, asked)

    def _try_again(self, asked: Asked) -> None:
        if time.monotonic() < asked.until:
            self._dispatch(asked)
        else:
            self._loop.run_callback(self._finish, asked, away())

    def _arrived(self, asked: Asked, reply: Any) -> None:
        if reply is BROKEN:
            assert asked.call is not None
            if asked.again or not asked.call.at:
                self._later(asked)
            else:
                self._finish(asked, unconfirmed())
        elif isinstance(reply, hiredis.ReplyError):
            text = str(reply)
            if text.startswith(ELSEWHERE):
                self._later(asked)
            else:
                if not text.startswith(EXPECTED):
                    assert asked.link is not None
                    asked.link.refuses(text)
                self._finish(asked, _refusal(text))
        else:
            self._finish(asked, reply)

    def _finish(self, asked: Asked, answer: Any) -> None:
        self._size -= asked.size
        asked.size = 0
        asked.answered(answer)


def _refusal(text: str) -> Refusal:
    if text.startswith("OOM"):
        return Refusal("backplane-full", "Redis has no memory left, so nothing was published; send it again when there is room.")
    return Refusal("backplane-away", f"Redis can't order messages now ({text.split(' ')[0]}); send it again, a little later.")


class Gather:
    """Waits for `count` answers."""

    def __init__(self, count: int, late: Callable[[list[Any]], None] | None = None) -> None:
        self.answers: list[Any] = [None] * count
        self.asked: list[Asked | None] = [None] * count
        self._left = count
        self._late = late
        self._waiter: Any = None
        self.over = False
        """Nobody waits any more."""

    def put(self, number: int, answer: Any) -> None:
        """One of them."""
        self.answers[number] = answer
        self._left -= 1
        if self._left:
            return
        if self.over:
            if self._late is not None:
                self._late(self.answers)
        elif self._waiter is not None:
            hub = get_hub()
            if gevent.getcurrent() is hub:
                self._waiter.switch(None)
            else:
                hub.loop.run_callback(self._waiter.switch, None)

    def wait(self, calls: Calls, timeout: float) -> list[Any]:
        """The answers; in the place of what did not come in time a Refusal, ``unconfirmed`` where it was sent and must not be
        asked twice. `late` is given them all when the last has come, and nobody waits any more."""
        if self._left:
            self._waiter = Waiter()
            try:
                with gevent.Timeout(timeout, False):
                    self._waiter.get()
            finally:
                self._waiter = None
                if self._left:
                    self._give_up(calls)
        return [_in_time(answer, asked) for answer, asked in zip(self.answers, self.asked, strict=True)]

    def _give_up(self, calls: Calls) -> None:
        self.over = True
        for answer, asked in zip(list(self.answers), self.asked, strict=True):
            if answer is None and asked is not None:
                calls.give_up(asked)


def _in_time(answer: Any, asked: Asked | None) -> Any:
    if answer is not None or asked is None:
        return answer
    return away() if asked.again or asked.call is None else unconfirmed()
