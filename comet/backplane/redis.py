"""The backplane of many machines: every worker talks to Redis (or Valkey), and there is no server of our own.

This module publishes and reads; `comet.backplane.redis_following` follows the channels, as long as its worker lives
(`redis_lease`). `redis_acknowledged` remembers what was published, `redis_scripts` is what Redis does at once and `redis_format` how
that is said, `redis_calls` how it is asked, `redis_shards` which server is, `redis_link` the connection to it, `redis_dial` how it
is made, `redis_outage` what the log says when it can't be, `redis_replicas` how replicas are waited for.

Where a promise of `comet.backplane` differs: what is bounded in all (bytes of history, idle channels, idempotency keys)
is bounded by Redis' own ``maxmemory``. With the policy ``noeviction`` publications are refused then; with one of
``volatile-…`` Redis forgets whole channels, which then begin another epoch.

That a log was rewound, as by a restart of a Redis that writes its disk once a second, is found out by who knows better: a
worker remembers how far each channel was that it follows, or has published to within the linger time. A log that
has not come so far any more, or has another message there, begins another epoch.
"""

import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final

import gevent
import hiredis

from comet.backplane import Deliver, Dropped, Lost
from comet.backplane.memory import EPOCH_BITS, Bounds, digest
from comet.backplane.redis_acknowledged import Acknowledged
from comet.backplane.redis_calls import AGAIN, Calls, Gather, away, unconfirmed
from comet.backplane.redis_dial import Target, dial, reason, service_title, title
from comet.backplane.redis_dial import read as read_url
from comet.backplane.redis_following import Following
from comet.backplane.redis_format import Names, Seen, piece, place, shares
from comet.backplane.redis_link import ANSWER, Call, Link
from comet.backplane.redis_malformed import Garbage
from comet.backplane.redis_outage import Outage
from comet.backplane.redis_replicas import Place, Replicas
from comet.backplane.redis_scripts import NOW, PAGE, PAGE_BYTES, Scripts
from comet.backplane.redis_shards import NAME, Cluster, Single
from comet.errors import Refusal
from comet.history import Joined
from comet.message import ChannelInfo, Position, Publication, Receipt, Sent, Since
from comet.turn import give_way

FEEDS: Final = 200
"""Feeds that one script sends to: a millisecond or two of Redis, which does nothing else meanwhile."""

FAREWELL: Final = 1.0
"""Seconds to say goodbye to Redis."""

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
        outage: Outage | None = None,
        garbage: Garbage | None = None,
    ) -> None:
        target = read_url(url)
        self._outage = outage or Outage()
        self._key_age = bounds.key_age
        self._timeout = timeout
        self._names = Names(prefix, target.cluster)
        self._scripts = Scripts(bounds, target.cluster, now)
        self._shards: Single | Cluster = (Cluster if target.cluster else Single)(
            target, self._scripts, silence, connect_timeout, self, self._outage
        )  # fmt: skip
        self._calls = Calls(self._shards)
        self._acknowledged = Acknowledged(self._shards, self._calls, self._scripts, self._names, bounds.linger, timeout)
        self._garbage = garbage or Garbage()
        self._following = Following(
            self._shards, self._calls, self._scripts, self._names, clock, self._acknowledged.seen, target.cluster, self._garbage
        )  # fmt: skip
        self._replicas = Replicas(replicas, replicas_timeout) if replicas else None
        self._greenlet: Any = None

    @classmethod
    def of(cls, settings: Any, outage: Outage | None = None, garbage: Garbage | None = None) -> "RedisBackplane":
        """Return one with those settings; `outage` says in the log that Redis is away, `garbage` that something there cannot be read.
        Raises ValueError for a URL that can't be read, and Denied when Redis does not let us in; that it can't be reached is no error,
        since it may come."""
        target = cls.target(settings.backplane)
        outage = outage or Outage()
        try:
            dial(target, target.address, settings.redis_connect_timeout, NAME).close()
        except OSError as error:
            why = f"{title(target.address)}: {reason(error)}" if target.cluster else reason(error)
            outage.away(service_title(target), why)
        return cls(
            settings.backplane, Bounds.of(settings), settings.backplane_timeout, settings.redis_timeout, settings.redis_connect_timeout,
            settings.redis_prefix, settings.redis_replicas, settings.redis_replicas_timeout, outage=outage, garbage=garbage,
        )  # fmt: skip

    @staticmethod
    def target(url: str) -> Target:
        """Return what the URL of --backplane leads to. Raises ValueError with a sentence if it can't be understood."""
        try:
            return read_url(url)
        except ValueError as error:
            raise ValueError(f"--backplane can't be understood: {error}.") from error

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
            self._following.tell()
            self._following.lease.end(partial(gather.put, 0))
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
        until = self._until()
        self._following.tell()
        groups: dict[str, list[int]] = {}
        for number, publication in enumerate(publications):
            groups.setdefault(publication.channel, []).append(number)
        held = self._places(groups, until)
        gather = Gather(len(groups))
        for number, (channel, places) in enumerate(groups.items()):
            those = [publications[place] for place in places]
            size = sum(len(one.data) for one in those) + 100
            gather.asked[number] = self._calls.ask(
                self._names.log(channel),
                self._ask_publish(channel, those),
                partial(gather.put, number),
                again=False,
                timeout=_left(until),
                size=size,
            )
        answers: list[Receipt | Refusal] = [_conflict()] * len(publications)  # each is replaced
        refusals = []
        replies = self._confirmed(gather.wait(self._calls, _left(until)), gather, held, until)
        for (channel, places), reply in zip(groups.items(), replies, strict=True):
            if isinstance(reply, Refusal):
                refusals.append(reply)
                receipts: Sequence[Receipt | Refusal] = [reply] * len(places)
            else:
                receipts = self._receipts(channel, reply, [publications[place] for place in places])
            for place_, receipt in zip(places, receipts, strict=True):
                answers[place_] = receipt
        if len(refusals) == len(groups):
            raise _doubtful(refusals) or refusals[0]
        return answers

    def _ask_publish(self, channel: str, those: Sequence[Publication]) -> Callable[[], Sequence[Any]]:
        log, stream = self._names.both(channel)
        pieces = [piece((one.type, one.data)) for one in those]
        epoch = random.getrandbits(EPOCH_BITS)
        if all(one.key is None for one in those):
            return lambda: self._scripts.publish.command((log, stream), (epoch, self._following.lease.dead, *pieces))
        keys = [self._names.key(channel, one.key) for one in those if one.key is not None]
        digests = [b"" if one.key is None else digest("publish", one.type, one.data).hex() for one in those]
        pairs = [each for pair in zip(pieces, digests, strict=True) for each in pair]
        return lambda: self._scripts.publish_keyed.command((log, stream, *keys), (epoch, self._following.lease.dead, *pairs))

    def _receipts(self, channel: str, reply: Any, those: Sequence[Publication]) -> Sequence[Receipt | Refusal]:
        if all(one.key is None for one in those):
            epoch, before, subscribers, ms = (int(one) for one in reply)
            self._acknowledged.note(channel, Seen(epoch, before + len(those), ms))
            return [Receipt(Position(epoch, before + count), subscribers) for count in range(1, len(those) + 1)]
        return [_conflict() if answer == b"!" else self._receipt(channel, answer) for answer in reply]

    def _receipt(self, channel: str, answer: bytes) -> Receipt:
        epoch, offset, subscribers, ms = map(int, answer.split())
        self._acknowledged.note(channel, Seen(epoch, offset, ms))
        return Receipt(Position(epoch, offset), subscribers)

    def send(self, channels: str, type: str, data: bytes, key: str | None = None) -> Sent:
        until = self._until()
        self._following.tell()
        names = channels.split(",")
        first = names[0]
        mine = "" if key is None else digest("send", type, data).hex()
        if key is not None:
            name = self._names.key(first, key)
            before = self._ask_one(name, lambda: self._scripts.claim.command((name,), (mine,)), until, again=False)
            if before == b"!":
                raise _conflict()
            if before:
                return _sent(before)
        sent = self._send(names, piece((type, data)), key, until)
        if key is not None:
            text = f"{mine}{sent.delivered} {sent.targets}" + (f" {sent.position.epoch} {sent.position.offset}" if sent.position else "")
            age = max(1, round(1000 * self._key_age))
            try:
                self._ask_one(name, lambda: (b"SET", name, text, b"PX", age), until)
            except Refusal as refusal:
                raise unconfirmed() from refusal
        return sent

    def _send(self, channels: Sequence[str], data: bytes, key: str | None, until: float) -> Sent:
        """Each feed that is held gets it, once however often that is asked under the key."""
        first = channels[0]
        slots: dict[int, list[str]] = {}
        for count, channel in enumerate(channels):
            if count % 1000 == 999:
                give_way()
            slots.setdefault(self._shards.slot(self._names.log(channel)), []).append(channel)
        lots = [those[start : start + FEEDS] for those in slots.values() for start in range(0, len(those), FEEDS)]
        held = self._places((lot[0] for lot in lots), until)
        gather = Gather(len(lots))
        for number, lot in enumerate(lots):
            keys = [
                name
                for channel in lot
                for name in self._names.both(channel) + (() if key is None else (self._names.mark(channel, first, key),))
            ]
            gather.asked[number] = self._calls.ask(
                self._names.log(lot[0]),
                lambda keys=keys: self._scripts.send.command(keys, (self._following.lease.dead, data, 2 if key is None else 3)),  # type: ignore[misc]
                partial(gather.put, number), again=False, timeout=_left(until), size=len(data) + 100 * len(lot),
            )  # fmt: skip
            if number % 5 == 4:
                give_way()
        position: Position | None = None
        delivered = 0
        replies = self._confirmed(gather.wait(self._calls, _left(until)), gather, held, until)
        refusals = [reply for reply in replies if isinstance(reply, Refusal)]
        if refusals:  # some feeds may have it
            raise _doubtful(refusals) or (refusals[0] if len(refusals) == len(lots) else unconfirmed())
        for lot, reply in zip(lots, replies, strict=True):
            for channel, answer in zip(lot, reply, strict=True):
                if answer:
                    receipt = self._receipt(channel, answer)
                    delivered += receipt.subscribers
                    if channel == first:
                        position = receipt.position
        return Sent(position, len(channels), delivered)

    # -- replicas

    def _places(self, channels: Iterable[str], until: float) -> dict[Link, Place]:
        """Where replicas are to be waited for. Raises Refusal when that can't be."""
        if self._replicas is None:
            return {}
        names = [self._names.log(channel) for channel in channels]
        while True:
            links = {self._shards.link(name) for name in names}
            found = {link: self._replicas.place(link, _left(until)) for link in links if link is not None}
            places = {link: place for link, place in found.items() if place is not None}
            if len(places) == len(links):
                return places
            if _left(until) < AGAIN:
                raise away()
            self._shards.refresh()
            gevent.sleep(AGAIN)

    def _confirmed(self, replies: Sequence[Any], gather: Gather, held: dict[Link, Place], until: float) -> Sequence[Any]:
        """The replies, or in the place of each that replicas have not confirmed a Refusal ``unconfirmed``."""
        if self._replicas is None:
            return replies
        logs: dict[Link, bytes] = {}
        for reply, asked in zip(replies, gather.asked, strict=True):
            if asked is not None and asked.link in held and not isinstance(reply, Refusal):
                logs[asked.link] = asked.key
        waits = {link: gevent.spawn(self._replicas.confirm, held[link], name) for link, name in logs.items()}
        gevent.joinall(list(waits.values()), timeout=_left(until))
        good = {link for link, greenlet in waits.items() if greenlet.value}
        return [
            reply if isinstance(reply, Refusal) or (asked is not None and asked.link in good) else _few()
            for reply, asked in zip(replies, gather.asked, strict=True)
        ]

    # -- joining and leaving

    def subscribe(self, channels: Sequence[str], since: Sequence[Since], size: int = PAGE_BYTES) -> Sequence[Joined]:
        until = self._until()
        self._following.tell()
        gather = Gather(len(channels), partial(self._undo, channels))
        each = shares(len(channels), PAGE, min(size, PAGE_BYTES))
        for number, (channel, start, (limit, room)) in enumerate(zip(channels, since, each, strict=True)):
            gather.asked[number] = self._following.join(channel, start, partial(gather.put, number), _left(until), limit, room)
        answers = gather.wait(self._calls, _left(until))
        for refusal in answers:
            if isinstance(refusal, Refusal):
                if not gather.over:
                    self._undo(channels, answers)
                raise refusal
        return [answer.joined for answer in answers]

    def _undo(self, channels: Sequence[str], answers: Sequence[Any]) -> None:
        """Nobody waits for these joins any more; those that failed have left by themselves."""
        for channel, answer in zip(channels, answers, strict=True):
            if not isinstance(answer, Refusal):
                self._following.undo(channel, answer)

    def rejoin(self, channel: str, since: Since) -> Position | None:
        return self._following.rejoin(channel, since)

    def subscribe_soon(
        self, channel: str, since: Since, done: Callable[[Joined], object], failed: Callable[[Refusal], object], size: int = PAGE_BYTES
    ) -> bool:
        return False

    def unsubscribe(self, channels: Sequence[str]) -> None:
        for channel in channels:
            self._following.leave(channel)

    # -- reading

    def peek(self, channels: Sequence[str], since: Sequence[Since], size: int = PAGE_BYTES) -> Sequence[Joined]:
        until = self._until()
        self._following.tell()
        gather = Gather(len(channels))
        each = shares(len(channels), PAGE, min(size, PAGE_BYTES))
        for number, (channel, start, (limit, room)) in enumerate(zip(channels, since, each, strict=True)):
            keys = self._names.read(channel)
            make = partial(self._scripts.peek.command, keys, (*place(start), limit, room))
            answer = ANSWER if start is None else abs(room)
            gather.asked[number] = self._calls.ask(keys[0], make, partial(gather.put, number), timeout=_left(until), answer=answer)
        answers = gather.wait(self._calls, _left(until))
        for refusal in answers:
            if isinstance(refusal, Refusal):
                raise refusal
        return [self._following.replayed(channel, answer).joined for channel, answer in zip(channels, answers, strict=True)]

    def read(self, channel: str, since: Since, limit: int | None = None, size: int = PAGE_BYTES) -> Joined | None:
        self._following.tell()
        keys = self._names.read(channel)
        arguments = (*place(since), PAGE if limit is None else min(limit, PAGE), min(size, PAGE_BYTES))
        reply = self._ask_one(keys[0], lambda: self._scripts.read.command(keys, arguments), self._until(), answer=min(size, PAGE_BYTES))
        return None if reply is None else self._following.replayed(channel, reply).joined

    def info(self, channel: str) -> ChannelInfo | None:
        self._following.tell()
        keys = self._names.both(channel)
        return _info(self._ask_one(keys[0], lambda: self._scripts.info.command(keys, (self._following.lease.dead,)), self._until()))

    def delete(self, channel: str) -> ChannelInfo | None:
        self._following.tell()
        keys = self._names.both(channel)
        make = partial(self._scripts.delete.command, keys, (self._following.lease.dead,))
        return _info(self._ask_one(keys[0], make, self._until(), again=False))

    def totals(self) -> dict[str, int]:
        return {"channels": self._following.followed}

    def _until(self) -> float:
        """When whoever asks now gives up, however many questions it takes."""
        return time.monotonic() + self._timeout

    def _ask_one(self, key: bytes, make: Callable[[], Sequence[Any]], until: float, again: bool = True, answer: int = ANSWER) -> Any:
        """What Redis says; raises Refusal."""
        gather = Gather(1)
        gather.asked[0] = self._calls.ask(
            key, make, lambda reply: gather.put(0, _Said(reply)), again=again, timeout=_left(until), answer=answer
        )
        (said,) = gather.wait(self._calls, _left(until))
        reply = said.reply if isinstance(said, _Said) else said
        if isinstance(reply, Refusal):
            raise reply
        return reply

    # -- what the links say

    def linked(self, link: Link) -> None:
        """See `comet.backplane.redis_link.Owner`."""
        self._following.linked(link)
        self._following.lease.beat()
        self._acknowledged.linked(link)
        link.call(Call(lambda: (b"INFO", b"server"), partial(_informed, link), again=False))

    def unlinked(self, link: Link) -> None:
        """See `comet.backplane.redis_link.Owner`."""
        self._acknowledged.unlinked(link)
        self._following.unlinked(link)
        if self._replicas is not None:
            self._replicas.unlinked(link)

    def published(self, name: bytes, payload: bytes) -> None:
        """See `comet.backplane.redis_link.Owner`."""
        self._following.published(name, payload)

    def thrown_out(self, name: bytes) -> None:
        """See `comet.backplane.redis_link.Owner`."""
        self._following.thrown_out(name)

    def moved(self) -> None:
        """See `comet.backplane.redis_shards.Keeper`."""
        self._following.moved()

    # -- each second

    def _every_second(self) -> None:
        while True:
            gevent.sleep(1.0)
            self._following.lease.beat()
            self.expire()

    def expire(self) -> None:
        """Leave and forget what is past its time here. Called about once a second."""
        self._following.expire()
        self._acknowledged.expire()
        self._garbage.expire()
        self._outage.expire()


def _informed(link: Link, reply: Any) -> None:
    """Say so where the scripts may not use INFO: see `comet.backplane.redis_scripts`."""
    if isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOPERM"):
        link.refuses(str(reply))


class _Said:
    """An answer, which may be None."""

    __slots__ = ("reply",)

    def __init__(self, reply: Any) -> None:
        self.reply = reply


def _left(until: float) -> float:
    return max(0.0, until - time.monotonic())


def _doubtful(refusals: Sequence[Refusal]) -> Refusal | None:
    """One of those that leave open whether something was published."""
    return next((refusal for refusal in refusals if refusal.slug == "unconfirmed"), None)


def _conflict() -> Refusal:
    return Refusal("key-conflict", "This idempotency key was used for another message on this channel; take a new key.")


def _few() -> Refusal:
    why = "Fewer replicas of Redis have this than --redis-replicas asks for, so it may be lost"
    return Refusal("unconfirmed", f"{why}; send it again under its key, or if twice is better than never.")


def _sent(answer: bytes) -> Sent:
    delivered, targets, *position = map(int, answer.split())
    return Sent(Position(*position) if position else None, targets, delivered)


def _info(reply: Any) -> ChannelInfo | None:
    return None if reply is None else ChannelInfo(int(reply[2]), Position(int(reply[0]), int(reply[1])), int(reply[3]))
