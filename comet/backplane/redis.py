"""The backplane of many machines: every worker talks to Redis (or Valkey), and there is no server of our own.

This module publishes and reads; `comet.backplane.redis_following` follows the channels. `redis_scripts` is what Redis does
at once, `redis_calls` how it is asked, `redis_shards` which server is, `redis_link` the connection to it, `redis_dial`
how it is made, `redis_replicas` how replicas are waited for.

Where a promise of `comet.backplane` differs: what is bounded in all (bytes of history, idle channels, idempotency keys)
is bounded by Redis' own ``maxmemory``. With the policy ``noeviction`` publications are refused then; with one of
``volatile-…`` Redis forgets whole channels, which then begin another epoch.

That a log was rewound, as by a restart of a Redis that writes its disk once a second, is found out by who knows better: a
worker remembers how far each channel was that it follows, or has published to within the linger time. A log that
has not come so far any more begins another epoch.
"""

import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import gevent

from comet.backplane import Deliver, Dropped, Lost
from comet.backplane.memory import EPOCH_BITS, Bounds, digest
from comet.backplane.redis_calls import Calls, Gather, away
from comet.backplane.redis_dial import dial
from comet.backplane.redis_dial import read as read_url
from comet.backplane.redis_following import LOT, Following
from comet.backplane.redis_link import Link
from comet.backplane.redis_replicas import Place, Replicas
from comet.backplane.redis_scripts import NOW, PAGE, Names, Replay, Scripts, piece, place, replay
from comet.backplane.redis_shards import NAME, Cluster, Single
from comet.errors import Refusal
from comet.history import Joined
from comet.message import ChannelInfo, Position, Publication, Receipt, Sent, Since
from comet.turn import give_way

FEEDS: Final = 200
"""Feeds that one script sends to: a millisecond or two of Redis, which does nothing else meanwhile."""

FAREWELL: Final = 1.0
"""Seconds to say goodbye to Redis."""

REMEMBERED: Final = 200_000
"""Channels published to whose position is remembered; the oldest go first."""

log = logging.getLogger("comet.backplane")


class RedisBackplane:
    """See `comet.backplane` for what it promises. `timeout` is how many seconds a request waits for an answer, `silence`
    how many Redis may leave a question unanswered before it is taken for gone, `connect_timeout` for a connection. Made
    and used in one process, after any fork. `now` is for tests."""

    def __init__(
        self,
        url: str,
        bounds: Bounds,
        timeout: float,
        silence: float = 3.0,
        connect_timeout: float = 1.0,
        prefix: str = "c:",
        replicas: int = 0,
        replicas_timeout: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        now: str = NOW,
    ) -> None:
        target = read_url(url)
        self._linger, self._key_age = bounds.linger, bounds.key_age
        self._timeout = timeout
        self._names = Names(prefix)
        self._scripts = Scripts(bounds, target.cluster, now)
        self._shards: Single | Cluster = (Cluster if target.cluster else Single)(target, self._scripts, silence, connect_timeout, self)
        self._calls = Calls(self._shards)
        self._acknowledged: OrderedDict[str, tuple[Position, float]] = OrderedDict()
        """How far the channels are that were published to from here, and until when that matters; the first to go first."""
        self._following = Following(self._shards, self._calls, self._scripts, self._names, clock, self._vouched, target.cluster)
        self._replicas = Replicas(replicas, replicas_timeout) if replicas else None
        self._greenlet: Any = None

    @classmethod
    def of(cls, settings: Any) -> "RedisBackplane":
        """With those settings. Raises ValueError for a URL that can't be read, and Denied when Redis does not let us in; that it
        can't be reached is no error, since it may come."""
        try:
            target = read_url(settings.backplane)
        except ValueError as error:
            raise ValueError(f"--backplane can't be understood: {error}.") from error
        try:
            dial(target, target.address, settings.redis_connect_timeout, NAME).close()
        except OSError as error:
            log.warning("Redis can't be reached (%s); publishing is refused until it can", error)
        return cls(
            settings.backplane, Bounds.of(settings), settings.backplane_timeout, settings.redis_timeout, settings.redis_connect_timeout,
            settings.redis_prefix, settings.redis_replicas, settings.redis_replicas_timeout,
        )  # fmt: skip

    def attach(self, deliver: Deliver, dropped: Dropped, lost: Lost) -> None:
        self._following.attach(deliver, dropped, lost)

    def start(self) -> None:
        """Connect, and stay so until `close`."""
        self._shards.start()
        self._greenlet = gevent.spawn(self._every_second)

    def close(self) -> None:
        """End it; for good. Who is counted here is not counted any more, as far as that can be said at once."""
        self._greenlet.kill()
        if self._following.ready():
            gather = Gather(1)
            self._following.farewell(partial(gather.put, 0))
            gather.wait(self._calls, FAREWELL)
        self._following.close()
        self._shards.close()
        if self._replicas is not None:
            self._replicas.close()

    def ready(self) -> bool:
        return self._following.ready()

    # -- publishing

    def publish(self, publications: Sequence[Publication]) -> Sequence[Receipt | Refusal]:
        if not publications:
            return []
        self._following.tell()
        groups: dict[str, list[int]] = {}
        for number, publication in enumerate(publications):
            groups.setdefault(publication.channel, []).append(number)
        held = self._places(groups)
        gather = Gather(len(groups))
        for number, (channel, places) in enumerate(groups.items()):
            those = [publications[place] for place in places]
            size = sum(len(one.data) for one in those) + 100
            gather.asked[number] = self._calls.ask(
                self._names.log(channel),
                self._ask_publish(channel, those),
                partial(gather.put, number),
                again=False,
                timeout=self._timeout,
                size=size,
            )
        answers: list[Receipt | Refusal] = [_conflict()] * len(publications)  # each is replaced
        refusals = []
        replies = self._confirmed(gather.wait(self._calls, self._timeout), gather, held)
        for (channel, places), reply in zip(groups.items(), replies, strict=True):
            if isinstance(reply, Refusal):
                refusals.append(reply)
                receipts: Sequence[Receipt | Refusal] = [reply] * len(places)
            else:
                receipts = self._receipts(channel, reply, [publications[place] for place in places])
            for place_, receipt in zip(places, receipts, strict=True):
                answers[place_] = receipt
        if len(refusals) == len(groups):
            raise refusals[0]
        return answers

    def _ask_publish(self, channel: str, those: Sequence[Publication]) -> Callable[[], Sequence[Any]]:
        log, stream = self._names.both(channel)
        pieces = [piece((one.type, one.data)) for one in those]
        epoch = random.getrandbits(EPOCH_BITS)
        if all(one.key is None for one in those):
            return lambda: self._scripts.publish.command((log, stream), (epoch, self._following.dead, *pieces))
        keys = [self._names.key(channel, one.key) for one in those if one.key is not None]
        digests = [b"" if one.key is None else digest("publish", one.type, one.data).hex() for one in those]
        pairs = [each for pair in zip(pieces, digests, strict=True) for each in pair]
        return lambda: self._scripts.publish_keyed.command((log, stream, *keys), (epoch, self._following.dead, *pairs))

    def _receipts(self, channel: str, reply: Any, those: Sequence[Publication]) -> Sequence[Receipt | Refusal]:
        if all(one.key is None for one in those):
            epoch, before, subscribers = int(reply[0]), int(reply[1]), int(reply[2])
            self._acknowledge(channel, Position(epoch, before + len(those)))
            return [Receipt(Position(epoch, before + count), subscribers) for count in range(1, len(those) + 1)]
        receipts = [_conflict() if answer == b"!" else _receipt(answer) for answer in reply]
        for receipt in receipts:
            if isinstance(receipt, Receipt):
                self._acknowledge(channel, receipt.position)
        return receipts

    def send(self, channels: str, type: str, data: bytes, key: str | None = None) -> Sent:
        self._following.tell()
        names = channels.split(",")
        first = names[0]
        mine = "" if key is None else digest("send", type, data).hex()
        if key is not None:
            name = self._names.key(first, key)
            before = self._ask_one(name, lambda: self._scripts.claim.command((name,), (mine,)), again=False)
            if before == b"!":
                raise _conflict()
            if before:
                return _sent(before)
        sent = self._send(names, piece((type, data)), key)
        if key is not None:
            text = f"{mine}{sent.delivered} {sent.targets}" + (f" {sent.position.epoch} {sent.position.offset}" if sent.position else "")
            age = max(1, round(1000 * self._key_age))
            self._ask_one(name, lambda: (b"SET", name, text, b"PX", age), again=True)
        return sent

    def _send(self, channels: Sequence[str], data: bytes, key: str | None) -> Sent:
        """Each feed that is held gets it, once however often that is asked under the key."""
        first = channels[0]
        slots: dict[int, list[str]] = {}
        for count, channel in enumerate(channels):
            if count % 1000 == 999:
                give_way()
            slots.setdefault(self._shards.slot(self._names.log(channel)), []).append(channel)
        lots = [those[start : start + FEEDS] for those in slots.values() for start in range(0, len(those), FEEDS)]
        held = self._places(lot[0] for lot in lots)
        gather = Gather(len(lots))
        for number, lot in enumerate(lots):
            keys = [
                name
                for channel in lot
                for name in self._names.both(channel) + (() if key is None else (self._names.mark(channel, first, key),))
            ]
            gather.asked[number] = self._calls.ask(
                self._names.log(lot[0]),
                lambda keys=keys: self._scripts.send.command(keys, (self._following.dead, data, 2 if key is None else 3)),  # type: ignore[misc]
                partial(gather.put, number), again=False, timeout=self._timeout, size=len(data) + 100 * len(lot),
            )  # fmt: skip
            if number % 5 == 4:
                give_way()
        position: Position | None = None
        delivered = 0
        replies = self._confirmed(gather.wait(self._calls, self._timeout), gather, held)
        for lot, reply in zip(lots, replies, strict=True):
            if isinstance(reply, Refusal):
                raise reply
            for channel, answer in zip(lot, reply, strict=True):
                if answer:
                    receipt = _receipt(answer)
                    self._acknowledge(channel, receipt.position)
                    delivered += receipt.subscribers
                    if channel == first:
                        position = receipt.position
        return Sent(position, len(channels), delivered)

    # -- replicas

    def _places(self, channels: Iterable[str]) -> dict[Link, Place]:
        """Where replicas are to be waited for. Raises Refusal when that can't be."""
        if self._replicas is None:
            return {}
        links = {self._shards.link(self._names.log(channel)) for channel in channels}
        places = {link: self._replicas.place(link) for link in links if link is not None}
        if any(place is None for place in places.values()):
            raise away()
        return {link: place for link, place in places.items() if place is not None}

    def _confirmed(self, replies: Sequence[Any], gather: Gather, held: dict[Link, Place]) -> Sequence[Any]:
        """The replies, or in the place of each that replicas have not confirmed a Refusal ``unconfirmed``."""
        if self._replicas is None:
            return replies
        logs: dict[Link, bytes] = {}
        for reply, asked in zip(replies, gather.asked, strict=True):
            if asked is not None and asked.link in held and not isinstance(reply, Refusal):
                logs[asked.link] = asked.key
        waits = {link: gevent.spawn(self._replicas.confirm, held[link], name) for link, name in logs.items()}
        good = {link for link, greenlet in waits.items() if greenlet.get()}
        return [
            reply if isinstance(reply, Refusal) or (asked is not None and asked.link in good) else _few()
            for reply, asked in zip(replies, gather.asked, strict=True)
        ]

    # -- what this worker can vouch for

    def _acknowledge(self, channel: str, position: Position) -> None:
        known = self._acknowledged.pop(channel, None)
        if known is not None and known[0].epoch == position.epoch and known[0].offset > position.offset:
            position = known[0]
        self._acknowledged[channel] = position, time.monotonic() + self._linger
        if len(self._acknowledged) > REMEMBERED:
            self._acknowledged.popitem(last=False)

    def _vouched(self, channel: str) -> Position | None:
        known = self._acknowledged.get(channel)
        return None if known is None else known[0]

    # -- joining and leaving

    def subscribe(self, channels: Sequence[str], since: Sequence[Since]) -> Sequence[Joined]:
        self._following.tell()
        gather = Gather(len(channels), partial(self._undo, channels))
        for number, (channel, start) in enumerate(zip(channels, since, strict=True)):
            gather.asked[number] = self._following.join(channel, start, partial(gather.put, number), self._timeout)
        answers = gather.wait(self._calls, self._timeout)
        for refusal in answers:
            if isinstance(refusal, Refusal):
                if not gather.over:
                    self._undo(channels, answers)
                raise refusal
        try:
            return [self._whole(channel, answer) for channel, answer in zip(channels, answers, strict=True)]
        except BaseException:
            self._undo(channels, answers)
            raise

    def _undo(self, channels: Sequence[str], answers: Sequence[Any]) -> None:
        """Nobody waits for these joins any more; those that failed have left by themselves."""
        for channel, answer in zip(channels, answers, strict=True):
            if not isinstance(answer, Refusal):
                self._following.undo(channel, answer)

    def _whole(self, channel: str, answer: Replay) -> Joined:
        """With the pages that follow the first, up to where the join was: what is later is delivered."""
        head, joined, _ = answer
        position, kept, gap = joined
        while (kept[-1].position if kept else position) != head and len(kept) % PAGE == 0 and kept:
            following = self._read(channel, kept[-1].position, PAGE)
            if following is None or following.joined.gap:  # deleted, or overtaken by what is published: it resumes by its cursor
                raise Refusal("backplane-busy", "More is published than can be read; subscribe again.")
            kept = [*kept, *(one for one in following.joined.messages if one.offset <= head.offset)]
        return Joined(position, kept, gap)

    def rejoin(self, channel: str, since: Since) -> Position | None:
        return self._following.rejoin(channel, since)

    def unsubscribe(self, channels: Sequence[str]) -> None:
        for channel in channels:
            self._following.leave(channel)

    # -- reading

    def read(self, channel: str, since: Since, limit: int | None = None) -> Joined | None:
        self._following.tell()
        answer = self._read(channel, since, PAGE if limit is None else min(limit, PAGE))
        if answer is None:
            return None
        position, kept, gap = answer.joined
        while kept and len(kept) % PAGE == 0 and (limit is None or len(kept) < limit) and kept[-1].offset < answer.head.offset:
            more = self._read(channel, kept[-1].position, PAGE if limit is None else min(limit - len(kept), PAGE))
            if more is None or more.joined.gap:
                break
            kept = [*kept, *more.joined.messages]
        return Joined(position, kept, gap)

    def _read(self, channel: str, since: Since, limit: int) -> Replay | None:
        keys = self._names.both(channel)
        reply = self._ask_one(keys[0], lambda: self._scripts.read.command(keys, (*place(since), limit)))
        return None if reply is None else replay(channel, reply)

    def info(self, channel: str) -> ChannelInfo | None:
        self._following.tell()
        keys = self._names.both(channel)
        return _info(self._ask_one(keys[0], lambda: self._scripts.info.command(keys, (self._following.dead,))))

    def delete(self, channel: str) -> ChannelInfo | None:
        self._following.tell()
        keys = self._names.both(channel)
        return _info(self._ask_one(keys[0], lambda: self._scripts.delete.command(keys, (self._following.dead,)), again=False))

    def totals(self) -> dict[str, int]:
        return {"channels": self._following.followed}

    def _ask_one(self, key: bytes, make: Callable[[], Sequence[Any]], again: bool = True) -> Any:
        """The answer; raises Refusal."""
        gather = Gather(1)
        gather.asked[0] = self._calls.ask(key, make, lambda reply: gather.put(0, _Said(reply)), again=again, timeout=self._timeout)
        (answer,) = gather.wait(self._calls, self._timeout)
        reply = answer.reply if isinstance(answer, _Said) else answer
        if isinstance(reply, Refusal):
            raise reply
        return reply

    # -- what the links say

    def linked(self, link: Link) -> None:
        """See `comet.backplane.redis_link.Owner`."""
        self._following.linked(link)
        self._following.beat()
        gevent.spawn(self._vouch, link)

    def unlinked(self, link: Link) -> None:
        """See `comet.backplane.redis_link.Owner`."""
        self._following.unlinked(link)

    def published(self, name: bytes, payload: bytes) -> None:
        """See `comet.backplane.redis_link.Owner`."""
        self._following.published(name, payload)

    def thrown_out(self, name: bytes) -> None:
        """See `comet.backplane.redis_link.Owner`."""
        self._following.thrown_out(name)

    def moved(self) -> None:
        """See `comet.backplane.redis_shards.Keeper`."""
        self._following.moved()

    def _vouch(self, link: Link) -> None:
        """Have logs that are not followed here begin anew if they have lost what was acknowledged to this worker."""
        for count, (channel, (position, _)) in enumerate(list(self._acknowledged.items())):
            keys = self._names.both(channel)
            if self._shards.link(keys[0]) is link:
                epoch = random.getrandbits(EPOCH_BITS)
                arguments = (epoch, position.epoch, position.offset)
                self._calls.ask(keys[0], lambda keys=keys, arguments=arguments: self._scripts.vouch.command(keys, arguments), _nothing)  # type: ignore[misc]
            if count % LOT == LOT - 1:
                give_way()

    # -- each second

    def _every_second(self) -> None:
        while True:
            gevent.sleep(1.0)
            self._following.beat()
            self.expire()

    def expire(self) -> None:
        """Leave and forget what is past its time here. Called about once a second."""
        self._following.expire()
        now = time.monotonic()
        while self._acknowledged and next(iter(self._acknowledged.values()))[1] <= now:
            self._acknowledged.popitem(last=False)


class _Said:
    """An answer, which may be None."""

    __slots__ = ("reply",)

    def __init__(self, reply: Any) -> None:
        self.reply = reply


def _nothing(reply: Any) -> None:
    """Of an answer that nobody needs."""


def _conflict() -> Refusal:
    return Refusal("key-conflict", "This idempotency key was used for another message on this channel; take a new key.")


def _few() -> Refusal:
    why = "Fewer replicas of Redis have this than --redis-replicas asks for, so it may be lost"
    return Refusal("unconfirmed", f"{why}; send it again under its key, or if twice is better than never.")


def _receipt(answer: bytes) -> Receipt:
    epoch, offset, subscribers = answer.split()
    return Receipt(Position(int(epoch), int(offset)), int(subscribers))


def _sent(answer: bytes) -> Sent:
    delivered, targets, *position = map(int, answer.split())
    return Sent(Position(*position) if position else None, targets, delivered)


def _info(reply: Any) -> ChannelInfo | None:
    return None if reply is None else ChannelInfo(int(reply[2]), Position(int(reply[0]), int(reply[1])), int(reply[3]))
