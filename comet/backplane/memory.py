"""The backplane of one process: dictionaries, and nothing that can fail but a key conflict.

Everything here is synchronous and switches no greenlet, which is what makes joining atomic: between
the answer of `subscribe` and its use nothing else can have run. Time comes from `clock`; `expire`
is called about once a second by whoever owns the backplane.

A channel that never had a message, with one subscriber or lingering, is only its epoch: an integer in
the place of the log. Most channels of a million users are like that.

Bounds, and how each is kept:

- *count, a channel*: on every append the oldest go.
- *age, a channel*: on every append and read the aged go; `expire` takes those of quiet channels.
- *bytes, in all*: `_warm` holds the channels that have messages, least recently used first. Over
  budget, the first of them gives up its oldest message, and so on.
- *channels without subscribers*: `_idle` holds those that had had a message when they began to linger, `_vacant` the others, the
  longest idle first. They go when the linger time is over, or early when there are more than `max_idle` of their kind: whoever listens
  to names that nobody publishes to pushes out others of these alone.

`peek` makes no channel. Of one that is not there it says a place of the backplane's own, `_own`: "nothing, as of this time". Whoever
goes on from there has missed nothing if no log that went since then can have had a message later than that (`_forgotten`), and the
channel's log, if there is one now, still has all its messages: it was made later.
- *idempotency keys*: `_keys`, oldest first, by age and number.
"""

import hashlib
import math
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from comet.backplane import Deliver, Dropped, Lost
from comet.errors import Refusal
from comet.history import PAGE, History, Joined
from comet.message import OLDEST, ChannelInfo, Message, Position, Publication, Receipt, Sent, Since

EPOCH_BITS = 48


class Bounds(NamedTuple):
    """What a memory backplane keeps at most; the defaults and their reasons stand in `comet.settings`.

    Times in seconds, `history_bytes` as `comet.message.Message.cost` counts them.
    """

    history_size: int = 1000
    history_age: float = 300.0
    history_bytes: int = 256 * 1024 * 1024
    linger: float = 60.0
    max_idle: int = 1_000_000
    key_age: float = 300.0
    max_keys: int = 100_000

    @classmethod
    def of(cls, settings: Any) -> "Bounds":
        """Those that `comet.settings` has under the same names."""
        return cls(*(getattr(settings, name) for name in cls._fields))


class _Channel(History):
    """A log and the number of its subscribers."""

    __slots__ = ("subscribers",)

    def __init__(self, epoch: int) -> None:
        super().__init__(epoch)
        self.subscribers = 0


class _Remembered(NamedTuple):
    """The first answer under an idempotency key, and a digest of what was asked."""

    digest: bytes
    answer: Receipt | Sent
    until: float


class MemoryBackplane:
    """See `comet.backplane` for what it promises."""

    def __init__(
        self,
        bounds: Bounds | None = None,
        clock: Callable[[], float] = time.monotonic,
        randbits: Callable[[int], int] = random.Random().getrandbits,  # noqa: B008 - seeded by the kernel, once
        lapsed: Callable[[str], None] = lambda channel: None,
    ) -> None:
        """`lapsed` is told of each channel that is forgotten because nobody has held it for the linger time."""
        self._bounds = bounds or Bounds()
        self._clock = clock
        self._randbits = randbits
        self._lapsed = lapsed
        self._channels: dict[str, _Channel | int] = {}
        self._warm: OrderedDict[str, _Channel] = OrderedDict()
        self._idle: OrderedDict[str, float] = OrderedDict()
        self._vacant: OrderedDict[str, float] = OrderedDict()
        self._own = randbits(EPOCH_BITS)
        """The epoch of places in no log; their offset is a time of the clock, in microseconds."""
        self._forgotten = -math.inf
        """No log that is gone had a message ordered later than this."""
        self._evicted = -math.inf
        """When the newest message was ordered that went to keep `history_bytes`."""
        self._keys: OrderedDict[tuple[str, str], _Remembered] = OrderedDict()
        self._bytes = 0
        self._kept = 0  # messages, of all channels: counting a million's would take the router a third of a second

    def attach(self, deliver: Deliver, dropped: Dropped, lost: Lost = lambda answers: None) -> None:
        self._deliver = deliver
        self._dropped = dropped

    def ready(self) -> bool:
        return True

    def close(self) -> None:
        """There is nothing to let go of."""

    # -- publishing

    def publish(self, publications: Sequence[Publication]) -> Sequence[Receipt | Refusal]:
        now = self._clock()
        answers: list[Receipt | Refusal] = []
        messages: list[Message] = []
        for channel, data, type, key in publications:
            if key is not None:
                asked = digest("publish", type, data)
                known = self._recall(channel, key, asked, now)
                if known is not None:
                    answers.append(known)
                    continue
            log = self._open(channel)
            message = self._append(channel, log, type, data, now)
            if not log.subscribers:
                self._rest(channel, now)
            messages.append(message)
            receipt = Receipt(message.position, log.subscribers)
            if key is not None:
                self._remember(channel, key, asked, receipt, now)
            answers.append(receipt)
        if messages:
            self._deliver(messages)
        return answers

    def send(self, channels: str, type: str, data: bytes, key: str | None = None) -> Sent:
        now = self._clock()
        names = channels.split(",")
        first = names[0]
        if key is not None:
            asked = digest("send", type, data)
            known = self._recall(first, key, asked, now)
            if isinstance(known, Refusal):
                raise known
            if known is not None:
                remembered: Sent = known
                return remembered
        messages: list[Message] = []
        delivered = 0
        for channel in filter(self._channels.__contains__, names):  # nearly all are away: 40 ns for each of those
            log = self._open(channel)
            messages.append(self._append(channel, log, type, data, now))
            delivered += log.subscribers
        position = messages[0].position if messages and messages[0].channel == first else None
        sent = Sent(position, len(names), delivered)
        if key is not None:
            self._remember(first, key, asked, sent, now)
        if messages:
            self._deliver(messages)
        return sent

    def _append(self, channel: str, log: _Channel, type: str, data: bytes, now: float) -> Message:
        bounds = self._bounds
        if log.entries is None:
            self._warm[channel] = log
        else:
            self._warm.move_to_end(channel)  # as `_use`
        message = log.append(channel, type, data, now)
        self._bytes += message.cost
        self._kept += 1
        entries = log.entries
        if entries and (len(entries) > bounds.history_size or entries[0].time < now - bounds.history_age):
            self._trim(channel, log, now)
        while self._bytes > bounds.history_bytes:
            coldest, victim = next(iter(self._warm.items()))
            assert victim.entries is not None, "those that are warm have messages"
            self._evicted = max(self._evicted, victim.entries[0].time)
            self._drop(victim, 1)
            if victim.entries is None:
                del self._warm[coldest]
        return message

    def _trim(self, channel: str, log: _Channel, now: float) -> None:
        """Drop what is over a channel's own bounds."""
        if log.entries is not None:
            kept = len(log.entries)
            self._bytes -= log.trim(self._bounds.history_size, now - self._bounds.history_age)
            self._kept -= kept - len(log.entries or ())
            if log.entries is None:
                del self._warm[channel]

    def _drop(self, log: _Channel, count: int) -> None:
        """Forget its `count` oldest messages, of which it has as many."""
        self._bytes -= log.drop(count)
        self._kept -= count

    def _use(self, channel: str) -> None:
        """The channel was used: it pays last."""
        if channel in self._warm:
            self._warm.move_to_end(channel)

    # -- idempotency keys

    def _recall(self, channel: str, key: str, digest: bytes, now: float) -> Any:
        """The first answer under this key (of the call that `digest` names), a Refusal if the key was
        used for something else, None if it is new."""
        known = self._keys.get((channel, key))
        if known is None or known.until <= now:
            return None
        if known.digest != digest:
            return Refusal("key-conflict", "This idempotency key was used for another message on this channel; take a new key.")
        return known.answer

    def _remember(self, channel: str, key: str, digest: bytes, answer: Receipt | Sent, now: float) -> None:
        keys = self._keys
        keys[channel, key] = _Remembered(digest, answer, now + self._bounds.key_age)
        keys.move_to_end((channel, key))
        if len(keys) > self._bounds.max_keys:
            keys.popitem(last=False)

    # -- joining and leaving

    def subscribe(self, channels: Sequence[str], since: Sequence[Since], size: int = PAGE) -> Sequence[Joined]:
        now = self._clock()
        answers: list[Joined | None] = []
        for channel, start in zip(channels, since, strict=True):
            if start is None and channel not in self._channels:
                epoch = self._channels[channel] = self._randbits(EPOCH_BITS)
                answers.append(Joined(Position(epoch, 0), (), False))
                continue
            log = self._open(channel)
            log.subscribers += 1
            self._settle(channel, log.subscribers)
            answers.append(None)
        return self._page(channels, since, answers, now, size)

    def rejoin(self, channel: str, since: Since) -> Position | None:
        log = self._channels.get(channel)
        if log is None:
            return None
        head = Position(log, 0) if isinstance(log, int) else log.position
        if since is not None and since != head:
            return None
        opened = self._open(channel) if isinstance(log, int) and channel not in self._vacant else log
        if isinstance(opened, int):
            self._vacant.pop(channel, None)
        else:
            opened.subscribers += 1
            self._settle(channel, opened.subscribers)
        return head

    def subscribe_soon(
        self, channel: str, since: Since, done: Callable[[Joined], object], failed: Callable[[Refusal], object], size: int = PAGE
    ) -> bool:
        done(self.subscribe((channel,), (since,), size)[0])
        return True

    def peek(self, channels: Sequence[str], since: Sequence[Since], size: int = PAGE) -> Sequence[Joined]:
        now = self._clock()
        answers: list[Joined | None] = []
        for channel, start in zip(channels, since, strict=True):
            if channel not in self._channels:
                gap = start is not None and start != OLDEST and self._lacks(start)
                answers.append(Joined(Position(self._own, int(now * 1e6)), (), gap))
                continue
            log = self._open(channel)
            if not log.subscribers:
                self._rest(channel, now)
            answers.append(None)
        return self._page(channels, since, answers, now, size)

    def unsubscribe(self, channels: Sequence[str]) -> None:
        for channel in channels:
            log = self._channels[channel]
            if not isinstance(log, int):
                log.subscribers -= 1
                if log.subscribers:
                    continue
            self._rest(channel, self._clock())

    def count(self, channel: str, epoch: int, change: int) -> bool:
        """So many subscribers more or fewer, of those who joined this `epoch` of a channel; whether there is
        such a log. What is told of a log may come before those whom it takes off: then there are fewer than none for a moment."""
        if self.epoch(channel) != epoch:
            return False
        log = self._channels[channel]
        if isinstance(log, int):
            total = int(channel not in self._vacant) + change
            if total not in (0, 1):
                self._open(channel).subscribers = total
        else:
            total = log.subscribers = log.subscribers + change
        self._settle(channel, total)
        return True

    def epoch(self, channel: str) -> int | None:
        """Of the channel's log, None when there is no such channel."""
        log = self._channels.get(channel)
        return log.epoch if isinstance(log, _Channel) else log

    # -- reading

    def read(self, channel: str, since: Since, limit: int | None = None, size: int = PAGE) -> Joined | None:
        log = self._known(channel)
        return None if log is None else self._since(channel, log, since, limit, self._clock(), size)

    def info(self, channel: str) -> ChannelInfo | None:
        log = self._known(channel)
        if log is None:
            return None
        self._trim(channel, log, self._clock())
        return ChannelInfo(log.subscribers, log.position, len(log.entries or ()))

    def totals(self) -> dict[str, int]:
        return {
            "channels": len(self._channels),
            "messages_kept": self._kept,
            "history_bytes": self._bytes,
            "idempotency_keys": len(self._keys),
        }

    def _page(
        self, channels: Sequence[str], since: Sequence[Since], answers: list[Joined | None], now: float, size: int
    ) -> Sequence[Joined]:
        """Return the answers, with a page of `size` bytes for those channels that have none yet.

        Each has an equal share of the room that those before it have left, and a message at least while there is room. Which is the first
        differs from time to time: a channel that is never caught up with must not keep the others out for ever.
        """
        lacking = [number for number, answer in enumerate(answers) if answer is None]
        if len(lacking) > 1:
            first = random.randrange(len(lacking))
            lacking = lacking[first:] + lacking[:first]
        for done, number in enumerate(lacking):
            share = max(1, size // (len(lacking) - done)) if size > 0 else 0
            answer = answers[number] = self._since(channels[number], self._open(channels[number]), since[number], None, now, share)
            size -= sum(message.size for message in answer.messages)
        return [answer for answer in answers if answer is not None]

    def _since(self, channel: str, log: _Channel, since: Since, limit: int | None, now: float, size: int = PAGE) -> Joined:
        self._trim(channel, log, now)
        self._use(channel)
        if isinstance(since, Position) and since.epoch == self._own:
            joined = log.since(OLDEST, limit, size)
            return joined._replace(gap=joined.position.offset > 0 or self._lacks(since))
        return log.since(since, limit, size)

    def _lacks(self, since: Position) -> bool:
        """Return whether a log that is gone may have had messages after `since`, a place in no log that is there."""
        return since.epoch != self._own or since.offset <= self._forgotten * 1e6

    # -- forgetting

    def delete(self, channel: str) -> ChannelInfo | None:
        info = self.info(channel)
        if info is not None:
            self._forget(channel)
            self._dropped(channel, info.position.epoch)
        return info

    def expire(self) -> None:
        """Forget what is past its time. Call it about once a second; bounded work a call is not needed,
        since each thing is forgotten once."""
        now = self._clock()
        warm, keys = self._warm, self._keys
        for lingering in (self._idle, self._vacant):
            while lingering and next(iter(lingering.values())) <= now:
                self._lapse(next(iter(lingering)))
        aged = now - self._bounds.history_age
        while warm:
            channel, log = next(iter(warm.items()))
            entries = log.entries or ()
            if entries and entries[-1].time >= aged:
                break
            self._drop(log, len(entries))
            del warm[channel]
        while keys and next(iter(keys.values())).until <= now:
            keys.popitem(last=False)

    def _known(self, channel: str) -> _Channel | None:
        return self._open(channel) if channel in self._channels else None

    def _open(self, channel: str) -> _Channel:
        """The channel's log, made now if it is new or was only an epoch."""
        log = self._channels.get(channel)
        if isinstance(log, _Channel):
            return log
        opened = self._channels[channel] = _Channel(self._randbits(EPOCH_BITS) if log is None else log)
        opened.subscribers = int(log is not None and channel not in self._vacant)
        return opened

    def _settle(self, channel: str, subscribers: int) -> None:
        """Have a channel linger if its count has become 0, and else not. Who joins may make it 0: see `count`."""
        if subscribers:
            self._idle.pop(channel, None)
            self._vacant.pop(channel, None)
        else:
            self._rest(channel, self._clock())

    def _rest(self, channel: str, now: float) -> None:
        """Begin (again) the linger time of a channel that has no subscriber."""
        log = self._channels[channel]
        lingering = self._vacant
        if isinstance(log, _Channel) and log.head:
            lingering.pop(channel, None)
            lingering = self._idle
        lingering[channel] = now + self._bounds.linger
        lingering.move_to_end(channel)
        if len(lingering) > self._bounds.max_idle:
            self._lapse(next(iter(lingering)))

    def _forget(self, channel: str) -> None:
        log = self._channels.pop(channel)
        if isinstance(log, _Channel) and log.head:
            self._forgotten = max(self._forgotten, self._newest(log))
            self._drop(log, len(log.entries or ()))
        self._warm.pop(channel, None)
        self._idle.pop(channel, None)
        self._vacant.pop(channel, None)

    def _newest(self, log: _Channel) -> float:
        """Return when the newest message of a log was ordered, or a time that was later."""
        if log.entries:
            return log.entries[-1].time
        now = self._clock()
        return max(now - self._bounds.history_age, self._evicted) if self._bounds.history_size else now

    def _lapse(self, channel: str) -> None:
        self._forget(channel)
        self._lapsed(channel)


def digest(call: str, type: str, data: bytes) -> bytes:
    """Of what was asked under an idempotency key."""
    return hashlib.blake2b(b"\0".join((call.encode(), type.encode(), data)), digest_size=16).digest()
