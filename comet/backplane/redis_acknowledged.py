"""What Redis has acknowledged to this worker, which nobody else may know: it vouches for that when Redis is back.

Neighbours: `comet.backplane.redis` notes what was published; `comet.backplane.redis_following` asks for it when it resumes a channel,
and this module looks after all others. A log that has lost what was acknowledged begins another epoch (`redis_scripts`).
"""

import random
import time
from collections import OrderedDict
from functools import partial
from typing import Any, Final

import gevent

from comet.backplane.memory import EPOCH_BITS
from comet.backplane.redis_calls import Calls, Gather
from comet.backplane.redis_format import NOWHERE, Names, Seen
from comet.backplane.redis_link import Link
from comet.backplane.redis_scripts import Scripts
from comet.backplane.redis_shards import Cluster, Single

REMEMBERED: Final = 200_000
"""Channels published to whose position is remembered; the oldest go first."""

LOT: Final = 500
"""Channels that are asked about together: a connection that breaks again and again must not pile them up."""


class Acknowledged:
    """Remembers for `linger` seconds: so long a log without subscribers stays. A lot without answers within `timeout` is passed over."""

    def __init__(self, shards: Single | Cluster, calls: Calls, scripts: Scripts, names: Names, linger: float, timeout: float) -> None:
        self._shards = shards
        self._calls = calls
        self._scripts = scripts
        self._names = names
        self._linger = linger
        self._timeout = timeout
        self._known: OrderedDict[str, tuple[Seen, float]] = OrderedDict()
        """And until when; the first to go first."""
        self._greenlets: dict[Link, Any] = {}

    def note(self, channel: str, seen: Seen) -> None:
        """The channel was published to from here, and is so far."""
        known = self._known.pop(channel, None)
        if known is not None and known[0].epoch == seen.epoch and known[0].offset > seen.offset:
            seen = known[0]
        self._known[channel] = seen, time.monotonic() + self._linger
        if len(self._known) > REMEMBERED:
            self._known.popitem(last=False)

    def seen(self, channel: str) -> Seen | None:
        """How far it was."""
        known = self._known.get(channel)
        return None if known is None else known[0]

    def linked(self, link: Link) -> None:
        """A server is there (again)."""
        self._greenlets[link] = gevent.spawn(self._vouch, link)

    def unlinked(self, link: Link) -> None:
        """It is not any more."""
        greenlet = self._greenlets.pop(link, None)
        if greenlet is not None:
            greenlet.kill(block=False)

    def _vouch(self, link: Link) -> None:
        rest = [channel for channel in list(self._known) if self._shards.link(self._names.log(channel)) is link]
        while rest:
            lot, rest = rest[:LOT], rest[LOT:]
            gather = Gather(len(lot))
            for number, channel in enumerate(lot):
                keys = self._names.both(channel)
                arguments = (random.getrandbits(EPOCH_BITS), *(self.seen(channel) or NOWHERE))
                make = partial(self._scripts.vouch.command, keys, arguments)
                gather.asked[number] = self._calls.ask(keys[0], make, partial(gather.put, number), timeout=self._timeout)
            gather.wait(self._calls, self._timeout)

    def expire(self) -> None:
        """Forget what is past its time. Called about once a second."""
        now = time.monotonic()
        while self._known and next(iter(self._known.values()))[1] <= now:
            self._known.popitem(last=False)
