"""The channels that this worker follows in Redis: how it joins, what is published there, and how it catches up.

Neighbours: `comet.backplane.redis`, whose part this is. The same idea as `comet.backplane.router`: the worker stays
subscribed for `LINGER` seconds after its last subscriber on a channel, knows the newest position of each, and so has most
who come join without asking (`rejoin`).

Redis tells nobody what was missed. So each message says its epoch and offset, and where they do not follow on, or when
the connection was broken, the worker reads what is kept (`resume`): that is the same script as a join, and says by the way
how many subscribers are here. What is published meanwhile its answer has as well. If the log is not what this worker has seen
(`redis_scripts.Seen`), Redis was rewound: the script begins another, and subscribers are told a gap.

Counts are told as they are, not as differences, so telling one twice does no harm. They stand under this worker's id, and as
long as it lives (`comet.backplane.redis_lease`).
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, takewhile
from typing import Any, Final

import gevent
import msgspec

from comet.backplane import Deliver, Dropped, Lost
from comet.backplane.memory import EPOCH_BITS
from comet.backplane.redis_calls import Asked, Calls
from comet.backplane.redis_format import NOWHERE, Malformed, Names, Replay, Seen, Told, messages, place, replay, told
from comet.backplane.redis_lease import Lease
from comet.backplane.redis_link import ANSWER, Link
from comet.backplane.redis_malformed import Garbage
from comet.backplane.redis_scripts import HOLD, PAGE, PAGE_BYTES, Scripts
from comet.backplane.redis_shards import Cluster, Single
from comet.errors import Refusal
from comet.message import Position, Since
from comet.turn import Alarm, give_way

LINGER: Final = 5.0
"""Seconds that the worker stays subscribed to a channel that has lost its last subscriber here."""

INTEREST: Final = 0.02
"""Seconds that changes of counts wait for each other, or for a call, which they precede."""

LOT: Final = 500
"""Channels that are resumed between two turns for others."""

LOOK: Final = 0.5
"""Seconds before it is looked where the channels are whose subscriptions Redis has ended."""

RETRIED: Final = 2000
"""Channels about which Redis is asked again in a second, of all for which it could do nothing: a disk may be full for hours."""

_UNKNOWN: Final = -1


class _Channel(msgspec.Struct, gc=False):
    """A channel: the newest position that came here (`epoch` is -1 before there is one; `time` as in `Seen`), the subscribers
    here, those of them whose join is under way, and how many Redis was told of; `stale` while it is being resumed, for the
    `turn`-th time: only the answer to the last question, `asked`, counts."""

    link: Any = None
    epoch: int = _UNKNOWN
    offset: int = 0
    time: int = 0
    count: int = 0
    joining: int = 0
    told: int = 0
    stale: bool = False
    turn: int = 0
    asked: Asked | None = None
    lives: int = 0
    """How often it was deleted: that ends all subscriptions but those whose join is under way."""


class Following:
    """`vouched` answers what Redis has acknowledged to this worker, if it knows of that; `garbage` is told what cannot be read."""

    def __init__(
        self,
        shards: Single | Cluster,
        calls: Calls,
        scripts: Scripts,
        names: Names,
        clock: Callable[[], float],
        vouched: Callable[[str], Seen | None],
        sharded: bool,
        garbage: Garbage,
    ) -> None:
        self._shards = shards
        self._calls = calls
        self._scripts = scripts
        self._names = names
        self._clock = clock
        self._vouched = vouched
        self._garbage = garbage
        self._subscribe, self._unsubscribe = (b"SSUBSCRIBE", b"SUNSUBSCRIBE") if sharded else (b"SUBSCRIBE", b"UNSUBSCRIBE")
        self._together = 1 if sharded else LOT
        """Channels that one subscription may name: in a cluster they have a slot each."""
        self._channels: dict[str, _Channel] = {}
        self._changed: dict[str, None] = {}
        self._resting: dict[str, float] = {}
        self._refused: dict[str, None] = {}
        """Those for which Redis could do nothing; the first to go first."""
        self._recovering: set[str] = set()
        """Those whose connection was broken, and that have not caught up yet."""
        self._interest = Alarm(INTEREST, self.tell)
        self._moving = Alarm(LOOK, self.moved)
        self._touching: list[str] = []
        self.lease = Lease(calls, scripts, names.nodes, self.count_again, self.look_again)

    def attach(self, deliver: Deliver, dropped: Dropped, lost: Lost) -> None:
        """See `comet.backplane.Backplane`."""
        self._deliver, self._dropped, self._lost = deliver, dropped, lost

    def ready(self) -> bool:
        """Redis is in reach, and nothing that was missed is still to come."""
        whole = self._shards.whole and all(link.up for link in self._shards.links)
        return whole and not self._recovering and self.lease.well

    @property
    def followed(self) -> int:
        """How many channels."""
        return len(self._channels)

    def close(self) -> None:
        """For good."""
        self._interest.stop()
        self._moving.stop()

    # -- joining and leaving

    def join(self, channel: str, since: Since, done: Callable[[Replay | Refusal], None], timeout: float, limit: int, size: int) -> Any:
        """Have one subscriber more; `done` has the answer, at its place in the stream, with at most `limit` messages and `size` bytes (see
        `comet.backplane.redis_format.share`)."""
        state = self._channels.get(channel)
        if state is None:
            state = self._channels[channel] = _Channel()
        state.count += 1
        state.joining += 1
        self._resting.pop(channel, None)
        return self._calls.ask(
            self._names.log(channel),
            lambda: self._ask_join(channel, state, since, limit, size),
            partial(self._joined, channel, state, done),
            timeout=timeout,
            answer=ANSWER if since is None else abs(size),
            before=lambda link: self._have(link, channel, state),
        )

    def _ask_join(
        self, channel: str, state: _Channel, since: Since, limit: int, size: int, time: int = 0, vouched: Seen = NOWHERE
    ) -> Sequence[Any]:
        state.told = state.count
        lease = self.lease
        gone = f"{lease.dead} {lease.former}"
        arguments = (random.getrandbits(EPOCH_BITS), gone, lease.node, state.count, *place(since), limit, time, *vouched, size)
        return self._scripts.join.command(self._names.read(channel), arguments)

    def _have(self, link: Link, channel: str, state: _Channel) -> None:
        """Be subscribed on this link. One that is not up will see to that when it is."""
        if link.up and state.link is not link:
            state.link = link
            link.subscribe(self._subscribe, [self._names.log(channel)])

    def _joined(self, channel: str, state: _Channel, done: Callable[[Replay | Refusal], None], reply: Any) -> None:
        state.joining -= 1
        if isinstance(reply, Refusal):
            self.leave(channel)
            done(reply)
            return
        answer = self.replayed(channel, reply)
        if state.epoch == _UNKNOWN:
            state.epoch, state.offset, state.time = answer.head
        elif state.stale:
            if state.asked is None:  # it was to be, behind a subscription that Redis has ended before that
                self.resume(channel)
        elif (state.epoch, state.offset, state.time) != answer.head:
            self.resume(channel)  # something was missed before this
        if state.count != state.told:
            self._change(channel)
        done(answer._replace(life=(state, state.lives)))

    def replayed(self, channel: str, reply: Any) -> Replay:
        """Read the answer to a join or a read."""
        answer = replay(channel, reply)
        if answer.malformed:
            self._garbage.met(channel, answer.malformed, f"in front of offset {answer.joined.position.offset + 1}")
        return answer

    def undo(self, channel: str, answer: Replay) -> None:
        """One subscriber less, of those who joined with this answer; a deletion has ended it already."""
        state, lives = answer.life
        present = self._channels.get(channel)
        if present is not None and present is state and present.lives == lives:
            self.leave(channel)

    def rejoin(self, channel: str, since: Since) -> Position | None:
        """See `comet.backplane.Backplane`."""
        state = self._channels.get(channel)
        if state is None or state.stale or state.epoch == _UNKNOWN or state.link is None or not state.link.up:
            return None
        head = Position(state.epoch, state.offset)
        if since is not None and since != head:
            return None
        state.count += 1
        self._resting.pop(channel, None)
        self._change(channel)
        return head

    def leave(self, channel: str) -> None:
        """One subscriber less."""
        state = self._channels[channel]
        state.count -= 1
        if not state.count:
            self._rest(channel)
        self._change(channel)

    # -- counts

    def _rest(self, channel: str) -> None:
        self._resting[channel] = self._clock() + LINGER

    def _change(self, channel: str) -> None:
        self._changed[channel] = None
        if not self._interest.active:
            self._interest.set()

    def tell(self) -> None:
        """Changes of counts stand before what is asked later."""
        changed, self._changed = self._changed, {}
        for channel in changed:
            state = self._channels.get(channel)
            if state is not None and state.count != state.told and not state.stale and state.epoch != _UNKNOWN:
                self._ask_hold(channel, state)

    def _ask_hold(self, channel: str, state: _Channel) -> None:
        def make() -> Sequence[Any]:
            state.told = state.count
            return self._scripts.hold.command(self._names.both(channel), (self.lease.node, state.count, state.epoch, self.lease.former))

        state.told = state.count
        self._calls.ask(self._names.log(channel), make, partial(self._held, channel, state))

    def _held(self, channel: str, state: _Channel, reply: Any) -> None:
        if isinstance(reply, Refusal):
            state.told = _UNKNOWN
            if self._channels.get(channel) is state:
                self._refused[channel] = None
        elif reply != state.offset and state.count and not state.stale and self._channels.get(channel) is state:
            self.resume(channel)  # the log is gone, or another; or something was missed

    def count_again(self) -> None:
        """Redis knows none of the counts any more, or won't for long."""
        for channel, state in self._channels.items():
            state.told = _UNKNOWN
            self._change(channel)

    def expire(self) -> None:
        """Leave what nobody here has held for some time; ask again what was refused, and prolong the rest, some at a time. Called
        about once a second."""
        for channel in list(islice(self._refused, RETRIED)):
            del self._refused[channel]
            state = self._channels[channel]
            if not state.stale:
                self._change(channel)
            elif state.asked is None:
                self.resume(channel)
        now = self._clock()
        for channel in [channel for channel, _ in takewhile(lambda one: one[1] <= now, self._resting.items())]:
            state = self._channels[channel]
            self.tell()
            if not (state.joining or state.stale or state.told):  # else Redis would count its subscribers on
                self._forget(channel, state)
        self.prolong(max(1, math.ceil(3 * len(self._channels) / HOLD)))

    def prolong(self, most: int | None = None) -> None:
        """Have so many of the channels outlive the next `HOLD`; all of them without `most`."""
        if not self._touching or most is None:
            self._touching = list(self._channels)
        due, self._touching = self._touching[:most], self._touching[len(self._touching) if most is None else most :]
        for channel in due:
            state = self._channels.get(channel)
            if state is None or not state.count or state.epoch == _UNKNOWN:
                continue
            if not state.stale:
                self._ask_hold(channel, state)
            elif state.asked is None and state.link is not None and channel not in self._refused:
                self.resume(channel)

    def _forget(self, channel: str, state: _Channel) -> None:
        del self._channels[channel]
        self._resting.pop(channel, None)
        self._changed.pop(channel, None)
        self._refused.pop(channel, None)
        self._recovering.discard(channel)
        if state.link is not None and state.link.up:
            state.link.subscribe(self._unsubscribe, [self._names.log(channel)])

    # -- catching up

    def linked(self, link: Link) -> None:
        """A server is there (again): what was followed on it has to catch up."""
        self.lease.returned()
        self._recover([name for name, state in self._channels.items() if self._shards.link(self._names.log(name)) is link], link)

    def unlinked(self, link: Link) -> None:
        """Nothing of it is sure any more."""
        self._shards.refresh()

    def moved(self) -> None:
        """Some channels may have gone to another server."""
        there: dict[Link, list[str]] = {}
        for name, state in self._channels.items():
            link = self._shards.link(self._names.log(name))
            if link is not None and link.up and link is not state.link:
                there.setdefault(link, []).append(name)
        for link, names in there.items():
            self._recover(names, link)

    def thrown_out(self, name: bytes) -> None:
        """Redis has ended a subscription."""
        state = self._channels.get(self._names.channel(name))
        if state is not None:
            state.link = None
            self._shards.refresh()
            if not self._moving.active:  # thousands may be thrown out together
                self._moving.set()

    def _recover(self, names: Sequence[str], link: Link) -> None:
        """Subscribe at once, ahead of joins that are asked again; read on in lots."""
        held = []
        for name in names:
            state = self._channels[name]
            state.link = None
            if not state.count and not state.joining:
                if state.told and state.epoch != _UNKNOWN:  # else Redis would count its subscribers on
                    self._ask_hold(name, state)
                self._forget(name, state)
                continue
            state.link = link
            state.told = _UNKNOWN
            held.append(name)
            if state.epoch != _UNKNOWN:
                state.stale = True
                self._recovering.add(name)
        for start in range(0, len(held), self._together):
            lot = [self._names.log(name) for name in held[start : start + self._together]]
            link.subscribe(self._subscribe, lot)
        gevent.spawn(self._resume_all, held, link)

    def _resume_all(self, names: Sequence[str], link: Link) -> None:
        rest = iter(names)
        while lot := list(islice(rest, LOT)):
            for name in lot:
                state = self._channels.get(name)
                if state is not None and state.stale and state.link is link and link.up and not _waits(state, link):
                    self.resume(name)
            give_way()

    def look_again(self) -> None:
        """Redis has lost what it knew."""
        for channel, state in list(self._channels.items()):
            if not state.stale and state.epoch != _UNKNOWN:
                self.resume(channel)

    def resume(self, channel: str) -> None:
        """Have made good what was missed."""
        state = self._channels[channel]
        state.stale = True
        state.turn += 1
        since = Position(state.epoch, state.offset)
        seen = Seen(state.epoch, state.offset, state.time)
        known = self._vouched(channel)
        vouched = known if known is not None and known.epoch == seen.epoch and known.offset > seen.offset else seen
        state.asked = self._calls.ask(
            self._names.log(channel),
            lambda: self._ask_join(channel, state, since, PAGE, PAGE_BYTES, seen.time, vouched),
            partial(self._resumed, channel, state, state.turn),
            answer=PAGE_BYTES,
            before=lambda link: self._have(link, channel, state),
        )

    def _resumed(self, channel: str, state: _Channel, turn: int, reply: Any) -> None:
        if state.turn != turn:
            return
        state.asked = None  # in any case: it leads back here, and the collector does not see it
        if self._channels.get(channel) is not state:
            return
        if isinstance(reply, Refusal):
            self._refused[channel] = None
            return
        replayed = self.replayed(channel, reply)
        head, answer = replayed.head, replayed.joined
        state.epoch, state.offset = answer.messages[-1].position if answer.messages else answer.position
        state.time = head.time if state.offset == head.offset else 0
        if state.offset < head.offset:  # a page, and more of them
            self.resume(channel)
        else:
            state.stale = False
            self._recovering.discard(channel)
            if not state.count and not state.joining and channel not in self._resting:  # deleted meanwhile; this is the next log
                self._rest(channel)
            if state.count != state.told:
                self._change(channel)
        if answer.gap:
            self._lost({channel: answer})
        elif answer.messages:
            self._deliver(answer.messages)

    # -- what is published

    def published(self, name: bytes, payload: bytes) -> None:
        """Take what Redis says, at its place in the stream."""
        channel = self._names.channel(name)
        state = self._channels.get(channel)
        if state is None:
            return
        try:
            what, epoch, first, time, pieces = told(payload)
        except Malformed as error:
            self._garbage.met(channel, 1, str(error))
            what, epoch, first, time, pieces = Told("G")  # it may have been a message: the log will tell
        if what == "D":
            self._deleted(channel, state, epoch)
        elif state.stale or state.epoch == _UNKNOWN:
            return  # the answer that is under way has it as well
        elif what == "G" or epoch != state.epoch or first > state.offset + 1:
            self.resume(channel)
        elif first + len(pieces) > state.offset + 1:
            new = pieces[state.offset + 1 - first :]
            first, state.offset, state.time = state.offset + 1, state.offset + len(new), time
            self._deliver(messages(channel, epoch, first, new))

    def _deleted(self, channel: str, state: _Channel, epoch: int) -> None:
        state.count = state.joining  # those are in the next log
        state.lives += 1
        if state.stale or state.joining:
            if not state.stale:
                state.epoch = _UNKNOWN
            self._resting.pop(channel, None)
            self._change(channel)
        else:
            self._forget(channel, state)
        self._dropped(channel, epoch)


def _waits(state: _Channel, link: Link) -> bool:
    """What makes it good waits on this link already (behind the subscription), or will be asked again."""
    return state.asked is not None and state.asked.link in (link, None)
