"""The backplane of several processes on one machine: a worker's side of the router (`comet.router`).

`comet.backplane.link` has the socket and the calls; here stands what this worker is logged in to: the
channels that it has subscribers of, and for `LINGER` seconds longer, since a poller comes back. Of these
it knows the newest position, so most who come to one, or come back, join without asking (`rejoin`); the
router hears of it as a change of the count, many in one frame.

When the link breaks, all that is known here may be stale. Then the worker resumes: it tells its
channels, counts and positions, and is answered with what it has missed, or that this can't be known
(another router, another epoch), which `lost` tells the subscribers, once. The same for channels of
which the router had to drop messages, because this worker did not read (`Missed`), and for those that
it had forgotten as a subscriber came (`Lapsed`).

How the counts stay right. The router holds, per link and channel, the sum of what the link has told it;
`_Known.told` is that sum as far as it is known here, `count` what it should be. Whatever is told is a
difference, so what is under way adds up in any order; and what the router forgets, it forgets at a place
in the stream that the worker is told of (`Dropped`, `Lapsed`, the link's end), where `told` is zero
again. An Interest that was under way then says an epoch that is gone, and counts nothing; a Subscribe or
a Resume counts in the next log, and its answer, behind that place, adds to `told`.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import Any

import gevent
import msgspec
from gevent.event import Event

from comet.backplane import Deliver, Dropped, Lost, frames
from comet.backplane.link import Link
from comet.errors import Refusal
from comet.history import PAGE, Joined
from comet.message import ChannelInfo, Message, Position, Publication, Receipt, Sent, Since
from comet.turn import Alarm

LINGER = 5.0
"""Seconds that the worker stays logged in to a channel that has lost its last subscriber here."""

INTEREST = 0.1
"""Seconds that changes of subscriber counts wait for each other, or for a call, which they precede: a
poll that ends and the next one cancel out."""

_receipts = msgspec.msgpack.Decoder(list[Receipt | str])
_sent = msgspec.msgpack.Decoder(Sent | str)
_replays = msgspec.msgpack.Decoder(list[frames.Replay])
_replay = msgspec.msgpack.Decoder(frames.Replay | None)
_info = msgspec.msgpack.Decoder(ChannelInfo | None)
_totals = msgspec.msgpack.Decoder(dict[str, int])

_Places = Sequence[tuple[str, int, Position]]


class _Known(msgspec.Struct, gc=False):
    """A channel that this worker is logged in to: the newest position that came here, the subscribers here,
    and how many of them the router has been told of."""

    epoch: int
    offset: int
    count: int
    told: int


class RouterBackplane:
    """See `comet.backplane` for what it promises. `path` is the router's socket; `timeout` is how many
    seconds a request waits for an answer; `lives` answers whether the router shows signs of life. Made and used in one process, after
    any fork."""

    def __init__(
        self, path: str, timeout: float, clock: Callable[[], float] = time.monotonic, lives: Callable[[], bool] = lambda: True
    ) -> None:
        self._clock = clock
        self._lives = lives
        self._link = Link(path, timeout, self)
        self._channels: dict[str, _Known] = {}
        self._changed: dict[str, None] = {}
        """Channels whose `count` may not be what was told."""
        self._resting: dict[str, float] = {}
        """Channels without subscribers here, and until when they are kept; the first to go first."""
        self._stale: set[str] = set()
        """Channels that are being resumed, each by one call: what is delivered of them before its answer the
        answer has as well. They stay logged in to until then, even if they are deleted meanwhile."""
        self._up = Event()
        """There is a link, and it has resumed."""
        self._interest = Alarm(INTEREST, self._link.flush)
        self._greenlet: Any = None

    def attach(self, deliver: Deliver, dropped: Dropped, lost: Lost) -> None:
        self._deliver = deliver
        self._dropped = dropped
        self._lost = lost

    def start(self) -> None:
        """Link up, and stay so until `close`."""
        self._link.start()
        self._greenlet = gevent.spawn(self._every_second)

    def close(self) -> None:
        """End the link; for good."""
        self._greenlet.kill()
        self._link.close()
        self._interest.stop()

    def ready(self) -> bool:
        return self._up.is_set() and self._lives()

    def wait(self, timeout: float | None) -> bool:
        """Wait until it is ready, at most `timeout` seconds, or until the router turns out to be of another version; return whether it is
        ready."""
        gevent.wait([self._up, self._link.foreign], timeout, 1)
        return self.ready()

    @property
    def foreign(self) -> bool:
        """The router is of another version of the code: there will be no link to it."""
        foreign: bool = self._link.foreign.is_set()
        return foreign

    # -- what the hub asks

    def publish(self, publications: Sequence[Publication]) -> Sequence[Receipt | Refusal]:
        if not publications:
            return []
        answers = self._link.ask(lambda call: frames.Publish(call, publications), _receipts.decode, again=False)
        return [Refusal("key-conflict", one) if isinstance(one, str) else one for one in answers]

    def send(self, channels: str, type: str, data: bytes, key: str | None = None) -> Sent:
        answer = self._link.ask(lambda call: frames.Send(call, channels, type, data, key), _sent.decode, again=False)
        if isinstance(answer, str):
            raise Refusal("key-conflict", answer)
        sent: Sent = answer
        return sent

    def subscribe(self, channels: Sequence[str], since: Sequence[Since], size: int = PAGE) -> Sequence[Joined]:
        joined: dict[str, _Known] = {}
        answers: Sequence[Joined] = self._link.ask(
            lambda call: frames.Subscribe(call, channels, since, size),
            partial(self._joined, channels, joined),
            undo=partial(self._leave_again, joined),
        )
        return answers

    def subscribe_soon(
        self, channel: str, since: Since, done: Callable[[Joined], object], failed: Callable[[Refusal], object], size: int = PAGE
    ) -> bool:
        joined: dict[str, _Known] = {}
        self._link.ask_soon(
            lambda call: frames.Subscribe(call, (channel,), (since,), size),
            lambda value: self._joined((channel,), joined, value)[0],
            done,
            failed,
            undo=partial(self._leave_again, joined),
        )
        return True

    def rejoin(self, channel: str, since: Since) -> Position | None:
        known = self._channels.get(channel)
        if known is None or channel in self._stale or not self._up.is_set():
            return None
        head = Position(known.epoch, known.offset)
        if since is not None and since != head:
            return None
        known.count += 1
        self._resting.pop(channel, None)
        self._change(channel)
        return head

    def unsubscribe(self, channels: Sequence[str]) -> None:
        for channel in channels:
            known = self._channels[channel]
            known.count -= 1
            if not known.count:
                self._rest(channel)
            self._change(channel)

    def peek(self, channels: Sequence[str], since: Sequence[Since], size: int = PAGE) -> Sequence[Joined]:
        answers = self._link.ask(lambda call: frames.Peek(call, channels, since, size), _replays.decode)
        return [_joined(channel, replay) for channel, replay in zip(channels, answers, strict=True)]

    def read(self, channel: str, since: Since, limit: int | None = None, size: int = PAGE) -> Joined | None:
        answer = self._link.ask(lambda call: frames.Read(call, channel, since, limit, size), _replay.decode)
        return None if answer is None else _joined(channel, answer)

    def info(self, channel: str) -> ChannelInfo | None:
        info: ChannelInfo | None = self._link.ask(lambda call: frames.Info(call, channel), _info.decode)
        return info

    def delete(self, channel: str) -> ChannelInfo | None:
        info: ChannelInfo | None = self._link.ask(lambda call: frames.Delete(call, channel), _info.decode)
        return info

    def totals(self) -> dict[str, int]:
        totals: dict[str, int] = self._link.ask(frames.Totals, _totals.decode)
        return totals

    # -- what the link asks

    def linked(self) -> None:
        """Resume what the router, which may be another one, does not know of."""
        for channel in self._resting:
            del self._channels[channel]
        self._resting = {}
        self._changed = {}
        for known in self._channels.values():
            known.told = 0
        self._resume(list(self._channels))

    def unlinked(self) -> None:
        """Nothing is sure until the next link has resumed."""
        self._up.clear()
        self._stale = set()

    def ahead(self) -> bytes:
        """Changes of counts stand before what is asked later."""
        if not self._changed:
            return b""
        changes = []
        for channel in self._changed:
            known = self._channels[channel]
            if known.count != known.told and channel not in self._stale:  # those follow when they are resumed
                changes.append((channel, known.epoch, known.count - known.told))
                known.told = known.count
        self._changed = {}
        return frames.frame(frames.Interest(changes)) if changes else b""

    def told(self, told: frames.Told) -> None:
        """Take what the router says, at its place in the stream."""
        _TAKE[type(told)](self, told)

    # -- counts

    def _change(self, channel: str) -> None:
        self._changed[channel] = None
        if not self._interest.active:
            self._interest.set()

    def _rest(self, channel: str) -> None:
        """The channel has nobody here."""
        self._resting[channel] = self._clock() + LINGER

    def _every_second(self) -> None:
        while True:
            gevent.sleep(1.0)
            self.expire()

    def expire(self) -> None:
        """Log out of what nobody here has held for some time. Called about once a second."""
        now = self._clock()
        self._leave([channel for channel, _ in takewhile(lambda one: one[1] <= now, self._resting.items())])

    def _leave(self, channels: Sequence[str]) -> None:
        """Log out of channels that nobody here holds."""
        leaving = [channel for channel in channels if channel not in self._stale]
        if leaving and self._up.is_set():
            self._link.put(frames.frame(frames.Logout(leaving)))  # behind the changes of their counts
            for channel in leaving:
                self._forget(channel)

    def _forget(self, channel: str) -> None:
        self._channels.pop(channel, None)
        self._changed.pop(channel, None)
        self._resting.pop(channel, None)

    # -- joining and resuming

    def _joined(self, channels: Sequence[str], joined: dict[str, _Known], value: msgspec.Raw) -> Sequence[Joined]:
        answers = [_joined(channel, replay) for channel, replay in zip(channels, _replays.decode(value), strict=True)]
        for channel, answer in zip(channels, answers, strict=True):
            known = joined[channel] = self._known(channel, answer)
            known.count += 1
            known.told += 1
            self._resting.pop(channel, None)
        return answers

    def _leave_again(self, joined: Mapping[str, _Known]) -> None:
        """Nobody waits any more for those to be joined; one that was deleted since, or came anew, does not count that subscriber."""
        self.unsubscribe([channel for channel, known in joined.items() if self._channels.get(channel) is known])

    def _known(self, channel: str, answer: Joined) -> _Known:
        known = self._channels.get(channel)
        if known is None:
            known = self._channels[channel] = _Known(*answer.head, 0, 0)
        return known

    def _resume(self, channels: Sequence[str]) -> None:
        """Have made good what was missed of these, of which none is being resumed."""
        places = []
        for channel in channels:
            known = self._channels[channel]
            places.append((channel, known.count - known.told, Position(known.epoch, known.offset)))
        self._stale.update(channels)
        self._link.call(lambda call: frames.Resume(call, places), partial(self._resumed, places))

    def _resumed(self, places: _Places, value: msgspec.Raw) -> None:
        messages: list[Message] = []
        lost: dict[str, Joined] = {}
        further: list[str] = []
        for (channel, more, _), replay in zip(places, _replays.decode(value), strict=True):
            answer = _joined(channel, replay)
            known = self._known(channel, answer)
            known.told += more
            if known.count != known.told:
                self._change(channel)
            if not known.count and channel not in self._resting:  # deleted meanwhile; this is the next log
                self._rest(channel)
            known.epoch, known.offset = answer.end
            if answer.more:
                further.append(channel)
            else:
                self._stale.discard(channel)
            if answer.gap:
                lost[channel] = answer
            else:
                messages += answer.messages
        self._up.set()
        if messages:
            self._deliver(messages)
        if lost:
            self._lost(lost)
        if further:
            self._resume(further)

    # -- what the router tells

    def _on_deliver(self, told: frames.Deliver) -> None:
        self._arrived([
            Message(channel, (epoch, offset), item.kind, item.data) for item in told.items for channel, epoch, offset in item.places
        ])  # fmt: skip

    def _arrived(self, messages: Sequence[Message]) -> None:
        if self._stale:
            messages = [message for message in messages if message.channel not in self._stale]
        look_up = self._channels.get
        for message in messages:
            known = look_up(message.channel)
            if known is not None:
                if known.epoch != message.epoch:  # else the number that is there stays: an object less for each channel
                    known.epoch = message.epoch
                known.offset = message.offset
        if messages:
            self._deliver(messages)

    def _on_dropped(self, told: frames.Dropped) -> None:
        self._forget(told.channel)
        self._dropped(told.channel, told.epoch)

    def _on_missed(self, told: frames.Missed) -> None:
        # the answer to a Resume that is under way was made after these were missed
        known = [channel for channel in told.channels if channel in self._channels and channel not in self._stale]
        self._leave([channel for channel in known if channel in self._resting])
        self._resume_held(known)

    def _on_lapsed(self, told: frames.Lapsed) -> None:
        known = [channel for channel in told.channels if channel in self._channels]
        for channel in known:
            self._channels[channel].told = 0
            if channel in self._resting and channel not in self._stale:
                self._forget(channel)
        self._resume_held([channel for channel in known if channel not in self._stale])

    def _resume_held(self, channels: Sequence[str]) -> None:
        held = [channel for channel in channels if channel in self._channels and channel not in self._resting]
        if held:
            self._resume(held)


_TAKE: Mapping[type, Callable[[RouterBackplane, Any], None]] = {
    frames.Deliver: RouterBackplane._on_deliver,
    frames.Dropped: RouterBackplane._on_dropped,
    frames.Missed: RouterBackplane._on_missed,
    frames.Lapsed: RouterBackplane._on_lapsed,
}


def _joined(channel: str, replay: frames.Replay) -> Joined:
    epoch, offset = replay.position
    messages = [Message(channel, Position(epoch, offset + index), kind, data) for index, (kind, data) in enumerate(replay.messages, 1)]
    return Joined(replay.position, messages, replay.gap, replay.more)
