"""The backplane of several processes on one machine: a worker's link to the router (`comet.router`).

One Unix socket a worker. Calls are numbered frames, written together with whatever else is ready at the
end of the loop's turn; deliveries and answers come back in the router's order, and are applied in it.

The worker is logged in to the channels that it has subscribers of, and for `LINGER` seconds longer:
a poller comes back. Of these it knows the newest position, so most who come to one, or come back,
join without asking (`rejoin`); the router hears of it as a change of the count, many in one frame.

When the link breaks, all that is known here may be stale. Then the worker resumes: it tells its
channels, counts and positions, and is answered with what it has missed, or that this can't be known
(another router, another epoch), which `lost` tells the subscribers, once. The same for channels of
which the router had to drop messages, because this worker did not read (`Missed`). What was asked and
not answered is asked again, but for publications: of those nobody knows whether they were ordered, and
their publishers are told so (``unconfirmed``).
"""

import logging
import os
import random
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gevent
import msgspec
from gevent import get_hub
from gevent.event import AsyncResult, Event
from gevent.socket import socket as GeventSocket

from comet.backplane import Deliver, Dropped, Lost, frames
from comet.errors import Refusal
from comet.history import Joined
from comet.message import ChannelInfo, Message, Position, Publication, Receipt, Sent, Since

LINGER = 5.0
"""Seconds that the worker stays logged in to a channel that has lost its last subscriber here."""

INTEREST = 0.02
"""Seconds that changes of subscriber counts wait for each other, or for a call, which they precede: a
poll that ends and the next one cancel out."""

MAX_WAITING = 64 << 20
"""Bytes of calls that wait for the router, or on their way to it: beyond it they are refused."""

READ_SIZE = 1 << 18
A_TURN = 1e-9
"""Seconds; not 0, see `comet.server.connection`."""

log = logging.getLogger("comet.backplane")

_told = msgspec.msgpack.Decoder(frames.Told)

_receipts = msgspec.msgpack.Decoder(list[Receipt | str])
_sent = msgspec.msgpack.Decoder(Sent | str)
_replays = msgspec.msgpack.Decoder(list[frames.Replay])
_replay = msgspec.msgpack.Decoder(frames.Replay | None)
_info = msgspec.msgpack.Decoder(ChannelInfo | None)
_totals = msgspec.msgpack.Decoder(dict[str, int])


class _Known:
    """A channel that this worker is logged in to: the newest position that came here, the subscribers here,
    and how many of them the router has been told of."""

    __slots__ = ("count", "epoch", "offset", "told")

    def __init__(self, epoch: int, offset: int, count: int, told: int) -> None:
        self.epoch = epoch
        self.offset = offset
        self.count = count
        self.told = told


class _Call:
    """A question under way: `arrived` takes the answer, at its place among the deliveries; `again` says that
    it may be asked a second time."""

    __slots__ = ("again", "arrived", "frame", "result", "sent")

    def __init__(self, frame: bytes, arrived: Callable[[msgspec.Raw], Any], again: bool) -> None:
        self.frame = frame
        self.arrived = arrived
        self.again = again
        self.sent = False
        self.result: AsyncResult = AsyncResult()


class RouterBackplane:
    """See `comet.backplane` for what it promises. `path` is the router's socket; `timeout` is how many
    seconds a request waits for an answer. Made and used in one process, after any fork."""

    def __init__(self, path: str, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._timeout = timeout
        self._clock = clock
        self._channels: dict[str, _Known] = {}
        self._changed: dict[str, None] = {}
        """Channels whose `count` is not what was told."""
        self._resting: dict[str, float] = {}
        """Channels without subscribers here, and until when they are kept; the first to go first."""
        self._stale: dict[str, int] = {}
        """Channels that are being resumed, by which call: what is delivered of them its answer has as well."""
        self._calls: dict[int, _Call] = {}
        self._last_call = 0
        self._asked = 0
        """Bytes of `_calls`."""
        self._sock: Any = None
        self._up = Event()
        """There is a link, and it has resumed."""
        self._out: list[bytes] = []
        self._queued = 0
        self._rest = memoryview(b"")
        self._loop = get_hub().loop
        self._flushing = False
        self._interest = self._loop.timer(INTEREST)
        self._writable: Any = None
        self._greenlets: list[Any] = []

    def attach(self, deliver: Deliver, dropped: Dropped, lost: Lost) -> None:
        self._deliver = deliver
        self._dropped = dropped
        self._lost = lost

    def start(self) -> None:
        """Link up, and stay so until `close`."""
        self._greenlets = [gevent.spawn(self._run), gevent.spawn(self._every_second)]

    def close(self) -> None:
        """End the link; for good."""
        gevent.killall(self._greenlets)
        self._interest.close()

    def ready(self) -> bool:
        up: bool = self._up.is_set()
        return up

    def wait(self, timeout: float) -> bool:
        """Until it is ready, at most `timeout` seconds; whether it is."""
        self._up.wait(timeout)
        return self.ready()

    # -- what the hub asks

    def publish(self, publications: Sequence[Publication]) -> Sequence[Receipt | Refusal]:
        if not publications:
            return []
        answers = self._ask(lambda call: frames.Publish(call, publications), _receipts.decode, again=False)
        return [Refusal("key-conflict", one) if isinstance(one, str) else one for one in answers]

    def send(self, channels: Sequence[str], type: str, data: bytes, key: str | None = None) -> Sent:
        answer = self._ask(lambda call: frames.Send(call, channels, type, data, key), _sent.decode, again=False)
        if isinstance(answer, str):
            raise Refusal("key-conflict", answer)
        sent: Sent = answer
        return sent

    def subscribe(self, channels: Sequence[str], since: Sequence[Since]) -> Sequence[Joined]:
        answers: Sequence[Joined] = self._ask(
            lambda call: frames.Subscribe(call, channels, since), partial(self._joined, channels), undo=partial(self.unsubscribe, channels)
        )
        return answers

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
                self._resting[channel] = self._clock() + LINGER
            self._change(channel)

    def read(self, channel: str, since: Since, limit: int | None = None) -> Joined | None:
        answer = self._ask(lambda call: frames.Read(call, channel, since, limit), _replay.decode)
        return None if answer is None else _joined(channel, answer)

    def info(self, channel: str) -> ChannelInfo | None:
        info: ChannelInfo | None = self._ask(lambda call: frames.Info(call, channel), _info.decode)
        return info

    def delete(self, channel: str) -> ChannelInfo | None:
        info: ChannelInfo | None = self._ask(lambda call: frames.Delete(call, channel), _info.decode)
        return info

    def totals(self) -> dict[str, int]:
        totals: dict[str, int] = self._ask(frames.Totals, _totals.decode)
        return totals

    # -- calls

    def _ask(
        self,
        make: Callable[[int], frames.Asked],
        arrived: Callable[[msgspec.Raw], Any],
        again: bool = True,
        undo: Callable[[], None] = lambda: None,
    ) -> Any:
        """Call the router and wait. `undo` is for an answer that comes when nobody waits for it any more.

        Raises Refusal ``backplane-busy``, ``backplane-away``, ``unconfirmed``."""
        if self._asked > MAX_WAITING or self._queued + len(self._rest) > MAX_WAITING:
            raise Refusal("backplane-busy", "Too much waits for the router of this service; send it again, a little later.")
        number, call = self._call(make, arrived, again)
        try:
            return call.result.get(timeout=self._timeout)
        except gevent.Timeout:
            if call.sent and not again:
                raise _unconfirmed() from None
            raise Refusal("backplane-away", "The router of this service does not answer; send it again, a little later.") from None
        finally:
            if number in self._calls:  # nobody waits any more
                if call.sent:

                    def too_late(value: msgspec.Raw) -> None:
                        arrived(value)
                        undo()

                    call.arrived = too_late
                else:
                    self._forget(number)

    def _call(self, make: Callable[[int], frames.Asked], arrived: Callable[[msgspec.Raw], Any], again: bool) -> tuple[int, _Call]:
        self._last_call = number = self._last_call + 1
        call = self._calls[number] = _Call(frames.frame(make(number)), arrived, again)
        self._asked += len(call.frame)
        if self._sock is not None:
            self._post(call)
        return number, call

    def _post(self, call: _Call) -> None:
        call.sent = True
        self._put(call.frame)

    def _forget(self, number: int) -> _Call | None:
        call = self._calls.pop(number, None)
        if call is not None:
            self._asked -= len(call.frame)
        return call

    # -- writing

    def _change(self, channel: str) -> None:
        """A count has changed."""
        self._changed[channel] = None
        if not self._interest.active:
            self._interest.start(self._flush)

    def _put(self, frame: bytes) -> None:
        self._seal()
        self._out.append(frame)
        self._queued += len(frame)
        if not self._flushing:
            self._flushing = True
            self._loop.run_callback(self._flush)

    def _seal(self) -> None:
        """Changes of counts stand before what is asked later."""
        if self._changed:
            changes = []
            for channel in self._changed:
                known = self._channels[channel]
                if known.count != known.told and channel not in self._stale:  # those follow when they are resumed
                    changes.append((channel, known.epoch, known.count - known.told))
                    known.told = known.count
            self._changed = {}
            if changes:
                self._out.append(frames.frame(frames.Interest(changes)))
                self._queued += len(self._out[-1])

    def _flush(self) -> None:
        """Write what there is, in one call. What the socket does not take waits for it."""
        self._flushing = False
        if self._sock is None or self._writable.active:
            return
        self._seal()
        while self._rest or self._out:
            if not self._rest:
                self._rest = memoryview(b"".join(self._out))
                self._out = []
                self._queued = 0
            try:
                self._rest = self._rest[os.write(self._sock.fileno(), self._rest) :]
            except BlockingIOError:
                self._writable.start(self._on_writable)
                return
            except OSError:  # whoever reads finds the end as well, and links up anew
                return

    def _on_writable(self) -> None:
        self._writable.stop()
        self._flush()

    # -- the link

    def _run(self) -> None:
        wait = 0.0
        while True:
            gevent.sleep(wait * random.uniform(0.5, 1.0))
            sock = GeventSocket(socket.AF_UNIX)
            try:
                sock.connect(self._path)
            except OSError as error:
                sock.close()
                if not wait:
                    log.warning("the router can't be reached (%s); trying on", error)
                wait = min(1.0, 2 * wait + 0.01)
                continue
            wait = 0.01
            try:
                self._begin(sock)
                self._receive(sock)
                log.warning("the router has closed the link; making another")
            except OSError as error:
                log.warning("the link to the router broke (%s); making another", error)
            except Exception:
                log.exception("the link to the router failed; making another")
            finally:
                self._end()
                sock.close()

    def _receive(self, sock: Any) -> None:
        cutter = frames.Cutter()
        while data := sock.recv(READ_SIZE):
            for body in cutter.feed(data):
                told = _told.decode(body)
                _TAKE[type(told)](self, told)
            if len(data) == READ_SIZE:
                gevent.sleep(A_TURN)  # reading does not yield while there is more

    def _begin(self, sock: Any) -> None:
        """Resume what the router, which may be another one, does not know of; then ask what was not answered."""
        self._sock = sock
        self._writable = self._loop.io(sock.fileno(), 2)
        for channel in self._resting:
            del self._channels[channel]
        self._resting = {}
        for known in self._channels.values():
            known.told = 0
        calls = list(self._calls.values())
        self._resume(list(self._channels))
        for call in calls:
            self._post(call)

    def _end(self) -> None:
        if self._sock is None:
            return
        self._up.clear()
        self._sock = None
        self._writable.stop()
        self._writable.close()
        self._out = []
        self._queued = 0
        self._rest = memoryview(b"")
        self._changed = {}
        self._stale = {}
        for number, call in list(self._calls.items()):
            if call.sent and not call.again:
                self._forget(number)
                call.result.set_exception(_unconfirmed())
            call.sent = False

    def _resume(self, channels: Sequence[str]) -> None:
        """Have made good what was missed of these; also the first call on a link, which is never asked twice."""
        places = []
        for channel in channels:
            known = self._channels[channel]
            places.append((channel, known.count - known.told, Position(known.epoch, known.offset)))
            known.told = known.count
        number, _ = self._call(lambda call: frames.Resume(call, places), lambda value: self._resumed(number, places, value), again=False)
        self._stale.update(dict.fromkeys(channels, number))

    def _every_second(self) -> None:
        while True:
            gevent.sleep(1.0)
            now = self._clock()
            channels = []
            for channel, until in self._resting.items():
                if until > now:
                    break
                channels.append(channel)
            self._leave(channels)

    def _leave(self, channels: Sequence[str]) -> None:
        """Log out of channels that nobody here holds."""
        leaving = [channel for channel in channels if channel not in self._stale]
        if leaving and self._up.is_set():
            self._put(frames.frame(frames.Logout(leaving)))  # behind the changes of their counts
            for channel in leaving:
                del self._resting[channel]
                del self._channels[channel]

    # -- what the router tells

    def _joined(self, channels: Sequence[str], value: msgspec.Raw) -> Sequence[Joined]:
        answers = [_joined(channel, replay) for channel, replay in zip(channels, _replays.decode(value), strict=True)]
        for channel, answer in zip(channels, answers, strict=True):
            known = self._channels.get(channel)
            if known is None:
                self._channels[channel] = _Known(*_head(answer), 1, 1)
                continue
            known.count += 1
            known.told += 1
            self._resting.pop(channel, None)
        return answers

    def _resumed(self, call: int, places: Sequence[tuple[str, int, Position]], value: msgspec.Raw) -> None:
        messages: list[Message] = []
        lost: dict[str, Joined] = {}
        for (channel, more, _), replay in zip(places, _replays.decode(value), strict=True):
            resumed_by = self._stale.get(channel)
            if resumed_by is not None and resumed_by != call:
                continue  # resumed once more, from the same place: that answer has all of this one
            answer = _joined(channel, replay)
            if resumed_by is None:  # deleted meanwhile, and then resumed: the router counts some who were ended
                if channel not in self._channels:
                    self._channels[channel] = _Known(*_head(answer), 0, 0)
                    self._resting[channel] = self._clock() + LINGER
                self._channels[channel].told += more
                self._change(channel)
                continue
            del self._stale[channel]
            known = self._channels[channel]
            known.epoch, known.offset = _head(answer)
            if known.count != known.told:
                self._change(channel)
            if answer.gap:
                lost[channel] = answer
            else:
                messages += answer.messages
        self._up.set()
        if messages:
            self._deliver(messages)
        if lost:
            self._lost(lost)

    def _on_answer(self, told: frames.Answer) -> None:
        call = self._forget(told.call)
        if call is not None:
            call.result.set(call.arrived(told.value))

    def _on_deliver(self, told: frames.Deliver) -> None:
        self._arrived([Message(one.channel, Position(one.epoch, one.offset), one.kind, one.data) for one in told.items])

    def _on_feeds(self, told: frames.Feeds) -> None:
        self._arrived([Message(channel, Position(epoch, offset), told.kind, told.data) for channel, epoch, offset in told.places])

    def _arrived(self, messages: Sequence[Message]) -> None:
        channels = self._channels
        if self._stale:
            messages = [message for message in messages if message.channel not in self._stale]
        for message in messages:
            known = channels.get(message.channel)
            if known is not None:
                known.epoch = message.epoch
                known.offset = message.offset
        if messages:
            self._deliver(messages)

    def _on_dropped(self, told: frames.Dropped) -> None:
        self._forget_channel(told.channel)
        self._dropped(told.channel, told.epoch)

    def _on_missed(self, told: frames.Missed) -> None:
        known = [channel for channel in told.channels if channel in self._channels]
        self._leave([channel for channel in known if channel in self._resting])
        held = [channel for channel in known if channel not in self._resting]
        if held:
            self._seal()
            self._resume(held)

    def _on_lapsed(self, told: frames.Lapsed) -> None:
        held = []
        for channel in told.channels:
            known = self._channels.get(channel)
            if channel in self._resting:
                self._forget_channel(channel)
            elif known is not None:
                known.told = 0
                held.append(channel)
        if held:
            self._resume(held)

    def _forget_channel(self, channel: str) -> None:
        self._channels.pop(channel, None)
        self._changed.pop(channel, None)
        self._resting.pop(channel, None)
        self._stale.pop(channel, None)


_TAKE: Mapping[type, Callable[[RouterBackplane, Any], None]] = {
    frames.Deliver: RouterBackplane._on_deliver,
    frames.Feeds: RouterBackplane._on_feeds,
    frames.Answer: RouterBackplane._on_answer,
    frames.Dropped: RouterBackplane._on_dropped,
    frames.Missed: RouterBackplane._on_missed,
    frames.Lapsed: RouterBackplane._on_lapsed,
}


def _joined(channel: str, replay: frames.Replay) -> Joined:
    epoch, offset = replay.position
    messages = [Message(channel, Position(epoch, offset + index), kind, data) for index, (kind, data) in enumerate(replay.messages, 1)]
    return Joined(replay.position, messages, replay.gap)


def _head(answer: Joined) -> Position:
    return answer.messages[-1].position if answer.messages else answer.position


def _unconfirmed() -> Refusal:
    return Refusal(
        "unconfirmed", "The router ended before it confirmed this: it may have been published; send it again if twice is better than never."
    )
