"""The order in which many clients get what was published: fair, coalescing, in slices.

The hub hands `Fanout.deliver` the ordered messages of a channel. Few subscribers get them at once,
inside the publish; many get them in a sweep, a slice of about a millisecond at a time, round-robin
with the other channels that have something pending. So a direct message passes a broadcast to a
million, and new requests are read between slices. What is published while a sweep is under way waits
for the next sweep, in one batch: one write a client however many messages it holds, which is what
makes falling behind self-limiting. Where a service has more workers than cores, a sweep of very many waits for its
turn among the workers (`comet.permit`).

Pure but for the `schedule` it is given (the loop's) and the subscribers' hosts, whose `deliver` does not
block. Joins append to a channel; leaves leave holes, which go when no sweep is under way.
"""

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar, cast

from comet.framing import Batch, batches
from comet.message import Message, Position

DIRECT = 16
"""Subscribers of a channel that are served inside the publish: a system call each."""

SLICE = 0.0005
"""Seconds that sweeps hold the loop before everything else has its turn."""

MANY = 512
"""Subscribers of a channel, here, whose sweeps ask for a permit: some milliseconds."""

HOLD = 0.25
"""Seconds that a permit is kept at most: about 17,000 deliveries, all clients of a full worker."""

MAX_PENDING = 80 << 20
"""Bytes (as `Message.cost` counts) that wait for a channel's next sweep: the largest batch that the default settings let in, 8 MiB
in 50,000 lines. Beyond it all but the newest are let go: subscribers notice the skip and read them from history, or are told a gap."""

AT_ONCE = 64
"""Channels whose messages are handed out where they arrive, in one turn of the loop: most have a subscriber or none."""

STRIDE = 16
"""Subscribers between two looks at the clock."""

log = logging.getLogger("comet")


class Receiver(Protocol):
    """A subscriber, as far as a sweep knows one; `host.deliver(subscriber, batch)` takes what is for it."""

    host: Any

    @property
    def ended(self) -> bool: ...


Anyone = TypeVar("Anyone", bound=Receiver)


class Permit(Protocol):
    """See `comet.permit`."""

    def ask(self, granted: Callable[[], None]) -> None:
        """Have `granted` called when it is this worker's turn."""

    def give_back(self) -> None:
        """Let the next one have it."""


class _Hole:
    """Where somebody was."""

    ended = True

    @property
    def host(self) -> "_Hole":
        return self

    def deliver(self, subscriber: object, batch: Batch) -> None:
        """Nobody is there."""


HOLE = _Hole()


class Members(Generic[Anyone]):
    """The subscribers of one channel here, in order of joining, and the sweep that is under way.

    `present` may hold some that have ended; `alive` does not count them. `name`, the channel's, and `place`, where the last one joined,
    are for those to share who are on several channels.
    """

    __slots__ = ("alive", "batch", "end", "index", "name", "pending", "place", "present", "waiting")

    def __init__(self, *first: Anyone, name: str = "") -> None:
        self.name = name
        self.place: Position | None = None
        self.present: list[Anyone] = list(first)
        self.alive = len(first)
        self.pending: list[Message] = []
        self.waiting = 0  # bytes pending
        self.batch: Batch | None = None
        self.index = 0
        self.end = 0  # who joins behind it, while a sweep is under way, knows what is swept

    def add(self, subscriber: Anyone) -> None:
        """A subscriber joins."""
        self.present.append(subscriber)
        self.alive += 1

    def leave(self) -> None:
        """One has ended."""
        self.alive -= 1
        if self.batch is None:
            self.compact()

    def expel(self, subscriber: Anyone) -> None:
        """One that has not ended is taken off: a hole stays, since a sweep may be under way."""
        self.present[self.present.index(subscriber)] = cast(Anyone, HOLE)
        self.leave()

    def compact(self) -> None:
        """Let go of the ended, when they are many enough to pay for the walk."""
        if len(self.present) > 2 * self.alive + 16:
            self.present = [one for one in self.present if not one.ended]


class Fanout:
    """`schedule` runs a function soon, behind whatever else is ready to run; `clock` is in seconds. Without a `permit`
    none is asked for."""

    def __init__(
        self,
        schedule: Callable[[Callable[[], None]], None],
        clock: Callable[[], float] = time.perf_counter,
        permit: Permit | None = None,
    ) -> None:
        self._schedule = schedule
        self._clock = clock
        self._permit = permit
        self._pending: deque[Members[Any]] = deque()
        self._scheduled = False
        self._waiting: list[Members[Any]] = []
        """Those whose sweep needs a permit that is not here."""
        self._asked = False
        self._permitted: set[Members[Any]] = set()
        """Those of `_pending` that are swept by permit."""
        self._until = 0.0
        """When that is given back at the latest."""

    def deliver(self, members: Members[Any], messages: Sequence[Message]) -> None:
        """Send `messages` of one channel on their way, behind those that are."""
        idle = members.batch is None and not members.pending
        if idle and len(members.present) <= DIRECT:
            for batch in batches(messages):
                _serve(members.present, batch)
                _forget(batch)
            return
        members.pending += messages
        members.waiting += sum(message.cost for message in messages)
        if members.waiting > MAX_PENDING:
            del members.pending[:-1]
            members.waiting = members.pending[0].cost
        if idle:
            if self._permit is not None and len(members.present) >= MANY:
                self._wait_for_turn(members)
            else:
                self._begin(members)

    def finish(self, members: Members[Any]) -> None:
        """Deliver now all that is pending on a channel, whose subscribers are about to be ended."""
        for those in (self._pending, self._waiting):
            if members in those:
                those.remove(members)
                while self._stride(members):
                    pass
        if members in self._permitted:
            self._leave_turn(members)

    def _begin(self, members: Members[Any]) -> None:
        self._pending.append(members)
        if not self._scheduled:
            self._scheduled = True
            self._schedule(self._slice)

    # -- by permit

    def _wait_for_turn(self, members: Members[Any]) -> None:
        if self._permitted:  # it is this worker's turn
            self._permitted.add(members)
            self._begin(members)
        else:
            self._waiting.append(members)
            self._ask()

    def _ask(self) -> None:
        assert self._permit is not None
        if not self._asked:
            self._asked = True
            self._permit.ask(self._take_turn)

    def _take_turn(self) -> None:
        """The permit is here."""
        assert self._permit is not None
        self._asked = False
        self._until = self._clock() + HOLD
        waiting, self._waiting = self._waiting, []
        self._permitted.update(waiting)
        for members in waiting:
            self._begin(members)
        if not waiting:  # they were finished meanwhile
            self._permit.give_back()

    def _leave_turn(self, members: Members[Any]) -> None:
        """One of those that are swept by permit needs it no more."""
        assert self._permit is not None
        self._permitted.remove(members)
        if not self._permitted:
            self._permit.give_back()

    def _end_turn(self) -> None:
        """The permit's time is over: who has more to do waits for the next."""
        assert self._permit is not None
        for members in self._permitted:
            self._pending.remove(members)
        self._waiting += self._permitted
        self._permitted.clear()
        self._permit.give_back()
        self._ask()

    # -- slices

    def _slice(self) -> None:
        """About `SLICE` seconds of sweeping, a stride of each channel in turn."""
        self._scheduled = False
        pending = self._pending
        until = self._clock() + SLICE
        while pending:
            members = pending.popleft()
            if self._stride(members):
                pending.append(members)
            elif members in self._permitted:
                self._leave_turn(members)
            if self._clock() >= until:
                break
        if self._permitted and self._clock() >= self._until:
            self._end_turn()
        if pending and not self._scheduled:
            self._scheduled = True
            self._schedule(self._slice)

    def _stride(self, members: Members[Any]) -> bool:
        """Serve the next few of a channel; whether it has more to do."""
        batch = members.batch
        if batch is None:
            batch = members.batch = next(iter(batches(members.pending)))
            members.pending = members.pending[len(batch.messages) :]
            members.waiting = sum(message.cost for message in members.pending)
            members.index = 0
            members.end = len(members.present)
        start = members.index
        stop = members.index = min(start + STRIDE, members.end)
        _serve(members.present[start:stop], batch)
        if stop < members.end:
            return True
        _forget(batch)
        members.batch = None
        members.compact()
        return bool(members.pending)


class Feeds:
    """Messages of many channels, each of which mostly has one subscriber: what is sent to a user's followers,
    or a batch. `hand_out` gives a channel's messages to its subscribers, which for each is a system call; so
    more than a few channels are handed out in slices, in order a channel. `schedule` and `clock` as above."""

    def __init__(
        self,
        hand_out: Callable[[str, Sequence[Message]], None],
        schedule: Callable[[Callable[[], None]], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._hand_out = hand_out
        self._schedule = schedule
        self._clock = clock
        self._waiting: OrderedDict[str, list[Message]] = OrderedDict()
        self._bytes = 0
        self._left = AT_ONCE
        self._scheduled = False

    def deliver(self, messages: Sequence[Message]) -> None:
        """Send them on their way, behind those of their channels that are."""
        if len(messages) == 1 and self._left and not self._waiting:
            self._left -= 1
            self._give(messages[0].channel, messages)
        else:
            self._spread(messages)
        if not self._scheduled:
            self._scheduled = True
            self._schedule(self._slice)

    def _spread(self, messages: Sequence[Message]) -> None:
        channels: dict[str, list[Message]] = {}
        for message in messages:
            those = channels.get(message.channel)
            if those is None:
                channels[message.channel] = [message]
            else:
                those.append(message)
        waiting = self._waiting
        at_once = len(channels) <= self._left
        if at_once:
            self._left -= len(channels)
        for channel, those in channels.items():
            before = waiting.get(channel)
            if before is None and at_once:
                self._give(channel, those)
                continue
            if before is None:
                waiting[channel] = those
            else:
                before += those
            self._bytes += _cost(those)
        while self._bytes > MAX_PENDING:  # then this takes its time, and who sends more is not read from
            self._next()

    def finish(self, channel: str) -> None:
        """Hand out now what waits of a channel, whose subscribers are about to be ended."""
        if channel in self._waiting:
            self._waiting.move_to_end(channel, last=False)
            self._next()

    def _slice(self) -> None:
        """Once in a turn of the loop in which there was something."""
        self._left = AT_ONCE
        until = self._clock() + SLICE
        while self._waiting and self._clock() < until:
            self._next()
        self._scheduled = bool(self._waiting)
        if self._scheduled:
            self._schedule(self._slice)

    def _next(self) -> None:
        channel, messages = self._waiting.popitem(last=False)
        self._bytes -= _cost(messages)
        self._give(channel, messages)

    def _give(self, channel: str, messages: Sequence[Message]) -> None:
        try:
            self._hand_out(channel, messages)
        except Exception:  # as in `_serve`
            log.exception("messages of %s could not be delivered", channel)


def _cost(messages: Sequence[Message]) -> int:
    return messages[0].cost if len(messages) == 1 else sum(message.cost for message in messages)


def _serve(those: Iterable[Receiver], batch: Batch) -> None:
    for one in those:
        try:
            one.host.deliver(one, batch)  # `one.deliver` would be the same, by one call more
        except Exception:  # a failure at one client must not keep the message from the others
            log.exception("a message could not be delivered to %r", one)


def _forget(batch: Batch) -> None:
    """Let go of encoded forms that few will ask for again: history would keep them."""
    for message in batch.messages:
        message.frames = None
