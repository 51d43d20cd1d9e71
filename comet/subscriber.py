"""One client's open request, awake or asleep; and what waits for it while it is awake.

The hub delivers batches to a `Subscriber` (`deliver` never blocks), which passes them to its `host`:

- awake, an `Awake`: a queue that the client's greenlet takes from;
- asleep, a `Bed` (`comet.server.parking`): the bytes are written straight to the socket, and what the
  socket does not take wakes the client, who is then `Awake` with a backlog;
- ended, `_ENDED`: nothing more is delivered.

A sleeper is this one small object and a place in the parking's table; everything that a greenlet
needs is in `Awake` and goes with it.

Joining. A subscriber is registered before the backplane answers (but for one who needs no greenlet to wait, at its answer), so
messages may be delivered before. They are held until `join` has queued the first page of the replay; then those at or
below its position are dropped as known. What is behind that page is read when the client has taken it, page by page (`Awake`). A message
that skips an offset means that this process missed something: the subscriber reads on in the same way.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import monotonic
from typing import NamedTuple, Protocol

from gevent.event import Event

from comet.framing import Batch, Framing, portions
from comet.history import Joined
from comet.message import FOREIGN, Cursor, Gap, Item, Message, Position, Since

TAKING = 5.0
"""Seconds since a client took something last, within which it keeps taking. Three hundred readers of one burst on a busy machine each
wait for seconds for their turn."""

CATCHING_UP = 60.0
"""Seconds that more than a `Home.backlog` may wait for a client that keeps taking, between two times that it has taken all. So what waits
beyond backlogs is at most what was published in a minute, however many clients read a little now and then to keep much waiting."""


PAGE_WAIT = 5.0
"""Seconds that a poll which is to be answered at once waits for a page of history. After that it is answered with its cursor alone."""


class Wish(NamedTuple):
    """What a client asks for: `channels`, after `since` on each, in a `framing`; `patience` is how many
    seconds a silence lasts before a heartbeat (a stream) or an empty answer (a poll), None for ever."""

    channels: Sequence[str]
    since: Sequence[Since]
    framing: Framing
    patience: float | None


class Home(Protocol):
    """The hub, as far as a subscriber knows it.

    `backlog` is the bytes of messages that may wait for one client, `busy_backlog` those that may wait for one that keeps taking
    (as `Message.size` counts them; a page of a replay is not counted, since one waits at a time). `hold` says that a client has the
    messages of a page, as the same object for all who share it, until `release`.
    """

    backlog: int
    busy_backlog: int

    def leave(self, subscriber: "Subscriber", reason: str) -> None: ...
    def read_on(self, subscriber: "Subscriber", channel: str, position: Position) -> None: ...
    def hold(self, page: Sequence[Message]) -> None: ...
    def release(self, page: Sequence[Message]) -> None: ...


class Host(Protocol):
    """Who acts for a subscriber now."""

    def deliver(self, subscriber: "Subscriber", batch: Batch) -> None: ...
    def skip(self, subscriber: "Subscriber", places: Mapping[str, Position]) -> None: ...
    def end(self, subscriber: "Subscriber", reason: str) -> None: ...


class Subscriber:
    """`channels` until it ends; `framing` turns what waits into bytes; `descriptor` is its socket's while
    it sleeps, else -1.

    Where the client stands, past everything that was made bytes of: `epoch` and `offset` on its one
    channel, or `places`, a cursor, on several.
    """

    __slots__ = ("_names", "descriptor", "epoch", "framing", "home", "host", "offset", "places")

    def __init__(self, channels: Sequence[str], framing: Framing, home: Home, host: "Host") -> None:
        self._names: str | Sequence[str] = channels[0] if len(channels) == 1 else channels  # a tuple of one is 48 bytes
        self.framing = framing
        self.home = home
        self.host = host
        self.descriptor = -1
        self.epoch = self.offset = 0
        self.places: Cursor | None = None

    # -- the hub's side: nothing here blocks

    @property
    def channels(self) -> Sequence[str]:
        """Those it is registered on."""
        return (self._names,) if isinstance(self._names, str) else self._names

    def drop(self, channel: str) -> None:
        """It is no longer registered there."""
        if isinstance(self._names, str) and self.places is None:  # what still waits is told with its place there
            self.places = self.cursor
        self._names = [name for name in self.channels if name != channel]

    def begin(self, answers: Mapping[str, Joined], since: Sequence[Since]) -> None:
        """Start where the first answers, one a channel, say; then `join`. `since` is what the client came with, for each channel.

        If something is gone, the client stands at `since` until it has been told the gap: a cursor from behind the gap would let
        it resume past what it was never told of.
        """
        starts = [answer.position for answer in answers.values()]
        if any(answer.gap for answer in answers.values()):
            starts = [place if isinstance(place, Position) else FOREIGN for place in since]
        if len(starts) == 1 and self.places is None:
            self.epoch, self.offset = starts[0]
        else:
            self.places = Cursor(self.channels if len(self.channels) == len(answers) else list(answers), starts)
        self.join(answers)

    def join(self, answers: Mapping[str, Joined]) -> None:
        """Queue the first page of the replay, one answer a channel, then what was held meanwhile."""
        self.awake.join(self, answers)

    def take(self, timeout: float | None) -> list[Item] | None:
        """Return all that waits, as soon as something does; [] after `timeout` seconds; None at the end. Asks for the next page of a replay
        if nothing waits. Blocks."""
        return self.awake.take(self, timeout)

    def page(self, channel: str, answer: Joined) -> None:
        """Queue a page of history that its home was asked for; then `go_on`."""
        self.awake.page(self, channel, answer)

    def go_on(self) -> None:
        """Have its greenlet take what `page` has queued."""
        self.awake.go_on(self)

    def deliver(self, batch: Batch) -> None:
        """Messages of one of its channels."""
        self.host.deliver(self, batch)

    def skip(self, places: Mapping[str, Position]) -> None:
        """Messages of these channels before these places are gone: unless it is past them, it is told a gap,
        and goes on from there."""
        self.host.skip(self, places)

    def end(self, reason: str) -> None:
        """Nothing more is delivered; what waits is still written, and the answer finished."""
        self.host.end(self, reason)

    # -- the client's side

    @property
    def awake(self) -> "Awake":
        """Its host, which must be `Awake`."""
        host = self.host
        assert isinstance(host, Awake), "asleep, or ended"
        return host

    @property
    def ended(self) -> bool:
        """It has left the hub."""
        return self.host is _ENDED

    @property
    def one_shot(self) -> bool:
        """It has one answer, a long poll's, rather than a stream."""
        return self.framing.one_shot

    @property
    def cursor(self) -> Cursor:
        """Where the client stands."""
        return self.places or Cursor(("",) if not self._names else self.channels, [Position(self.epoch, self.offset)])

    def encode(self, items: Sequence[Item]) -> Sequence[bytes]:
        """The bytes of `items` for this client, in its framing; a heartbeat where a stream has none."""
        if not items and not self.one_shot:
            return [self.framing.heartbeat]
        cursor = self.cursor
        pieces = self.framing.encode(items, cursor)
        if self.places is None:
            self.epoch, self.offset = cursor.positions[0]
        return pieces

    def gap(self, places: Mapping[str, Position]) -> Sequence[bytes]:
        """The bytes that tell it a gap, up to those of `places` that it has not passed; none if it has passed all."""
        positions = self.cursor.by_channel()
        ahead = _ahead(positions, places)
        return self.encode([Gap(list({**positions, **ahead}.values()))]) if ahead else []

    def wires(self, items: Sequence[Item], date: bytes) -> Iterator[bytes]:
        """The bytes of `items` on the wire, a portion at a time; of a poll the first portion: what does not
        fit is in the history, after the cursor of this answer."""
        for portion in portions(items):
            yield self.framing.wire(self.encode(portion), date)
            if self.one_shot:
                return

    def takes_as_it_is(self, batch: Batch) -> bool:
        """It gets the very bytes that others of this channel alone get, in a stream."""
        return self.places is None and self.offset == batch.before and self.epoch == batch.epoch and not self.one_shot

    def wake(self, patience: float | None) -> None:
        """From now on a greenlet takes."""
        cursor = self.cursor
        self.descriptor = -1
        self.host = Awake(patience, cursor.by_channel())

    def sleep(self, bed: Host, descriptor: int) -> None:
        """From now on `bed` writes to `descriptor`. Nothing may be waiting."""
        self.awake.give_back(self.home)
        self.descriptor = descriptor
        self.host = bed

    def __iter__(self) -> Iterator[bytes]:
        """The body of the answer, in the plain style that any WSGI server can run."""
        try:
            opening = self.framing.opening(self.cursor)
            if opening:
                yield opening
            while True:
                items = self.take(self.awake.patience)
                if self.one_shot:  # what does not fit is in the history, after the cursor of this answer
                    yield from self.encode(next(portions(items or [])))
                    return
                if items is None:
                    return
                for portion in portions(items):
                    yield from self.encode(portion)
        finally:
            self.close()

    def took(self) -> None:
        """Note that the client's connection has taken some of what is being sent."""
        if isinstance(self.host, Awake):
            self.host.took = monotonic()

    def close(self, reason: str | None = None) -> None:
        """Leave the hub, for good; the reason it was ended for comes first. WSGI calls this however an
        answer ends; a second call does nothing."""
        if self.host is _ENDED:
            return
        ended_for = None
        if isinstance(self.host, Awake):
            ended_for = self.host.reason
            self.host.give_back(self.home)
        self.host = _ENDED
        self.home.leave(self, ended_for or reason or ("answered" if self.one_shot else "lost"))


class Awake:
    """What waits for a client that has a greenlet.

    `patience` is how many seconds a silence lasts before a heartbeat (a stream) or an empty answer (a poll), None for ever. `offered` is
    where the queue ends, by channel. `reason` is None until it is ended. `took` is when the client took something last, and `behind`
    since when more waits than the backlog, 0.0 while it does not, in seconds of the monotonic clock.

    On a channel it is *live*, and gets what is delivered, or *replayed*: then it reads history by pages, the next one when the client has
    taken the last, and what is delivered meanwhile is dropped, since a later page has it. It is live again after the page that has the
    newest message it has dropped.
    """

    __slots__ = (
        "_bytes", "_held", "_queue", "_reading", "_replayed", "_sending", "_skipped", "_waiting", "behind", "offered", "patience",
        "ready", "reason", "took", "waker",
    )  # fmt: skip

    def __init__(self, patience: float | None, offered: dict[str, Position]) -> None:
        self.patience = patience
        self.offered = offered
        self.reason: str | None = None
        self.took = monotonic()
        self.behind = 0.0
        self._bytes = 0
        self.ready: bytes | None = None
        """Bytes to be sent before all that can be taken, as a batch has made them for others like this one:
        b"" while a greenlet waits that would send them."""
        self.waker: Callable[[], object] | None = None
        """Called once, when there is something to take or it has ended."""
        self._queue: list[Item] = []
        self._held: list[Message] | None = None if offered else []
        """What was delivered before it has joined."""
        self._skipped: dict[str, Position] = {}
        """Places up to which something was lost before it has joined."""
        self._replayed: dict[str, Position | None] = {}
        """Channels that are replayed, and the newest message that was dropped of each."""
        self._reading: Position | None = None
        """A page is on its way, of what follows this."""
        self._waiting: tuple[Sequence[Message], ...] = ()
        """Pages that wait to be taken, and those that were taken and are being sent: its home knows that it holds them."""
        self._sending: tuple[Sequence[Message], ...] = ()

    def join(self, subscriber: Subscriber, answers: Mapping[str, Joined]) -> None:
        """See `Subscriber.join`."""
        if any(answer.gap for answer in answers.values()):
            self._queue.append(Gap([answer.position for answer in answers.values()]))
        for channel, answer in answers.items():
            if answer.messages:
                self._queue.extend(answer.messages)
                self._hold(subscriber.home, answer.messages)
            self.offered[channel] = answer.end
            if answer.more:
                self._replayed[channel] = None
        held, self._held = self._held or (), None
        skipped, self._skipped = self._skipped, {}
        self.skip(subscriber, skipped)  # what was lost behind an answer while another one was still to come
        self._bytes -= sum(message.size for message in held)  # offered again below, and charged then
        for message in held:
            if message.epoch == self.offered[message.channel].epoch:  # else of the log before: the next one comes with `skip`
                self._offer(subscriber, message)
        if self._queue:
            self.notify()

    def page(self, subscriber: Subscriber, channel: str, answer: Joined) -> None:
        """See `Subscriber.page`."""
        asked, self._reading = self._reading, None
        if asked != self.offered[channel]:  # it has skipped something meanwhile
            return
        self._hold(subscriber.home, answer.messages)
        end = self.offered[channel] = answer.end
        if answer.gap:
            self.offered[channel] = answer.position
            self._queue.append(Gap(list(self.offered.values())))
            self.offered[channel] = end
        self._queue.extend(answer.messages)
        dropped = self._replayed.pop(channel)
        self._replayed[channel] = dropped  # behind the others: else one that is never caught up with would keep them waiting for ever
        if answer.more or (dropped is not None and dropped.epoch == end.epoch and dropped.offset > end.offset):
            return
        if dropped is not None and dropped.epoch != end.epoch:
            self._replayed[channel] = None  # one of the two logs is gone: the next page tells which
        else:
            del self._replayed[channel]

    def _hold(self, home: Home, page: Sequence[Message]) -> None:
        home.hold(page)
        self._waiting += (page,)

    def give_back(self, home: Home) -> None:
        """It holds no page any more."""
        for page in (*self._waiting, *self._sending):
            home.release(page)
        self._waiting = self._sending = ()

    def go_on(self, subscriber: Subscriber) -> None:
        """See `Subscriber.go_on`."""
        if self._queue:
            self.notify()
        else:
            self._read_on(subscriber)

    def skip(self, subscriber: Subscriber, places: Mapping[str, Position]) -> None:
        """See `Subscriber.skip`. What was held of these channels is from before the loss. So is a page that is on its way: it is read anew.
        Before it has joined, the loss is told after the answers, unless they tell it themselves."""
        if self._held is not None:
            self._bytes -= sum(message.size for message in self._held if message.channel in places)
            self._held = [message for message in self._held if message.channel not in places]
            self._skipped.update(places)
            return
        ahead = _ahead(self.offered, places)
        if ahead:
            for channel in self._replayed.keys() & ahead.keys():
                self._replayed[channel] = None
            self.offered.update(ahead)
            self._queue.append(Gap(list(self.offered.values())))
            self.notify()

    def deliver(self, subscriber: Subscriber, batch: Batch) -> None:
        """Take note of messages; never blocks."""
        waker = self.waker
        if waker is not None and self.ready == b"" and self.quiet and subscriber.takes_as_it_is(batch):
            framing = subscriber.framing
            self.ready = batch.wires.get(framing) or batch.wire(framing, b"")
            subscriber.offset = batch.last
            self.offered[batch.channel] = batch.position
            self.waker = None
            waker()
            return
        for message in batch.messages:
            self._offer(subscriber, message)

    def _offer(self, subscriber: Subscriber, message: Message) -> None:
        """Known ones are dropped; one that does not follow on is read from history, with what stands before it."""
        if self.reason is not None:
            return
        if self._held is not None:
            if self._fits(subscriber, message):
                self._held.append(message)
            return
        channel = message.channel
        epoch, offset = self.offered[channel]
        if channel in self._replayed or message.epoch != epoch or message.offset > offset + 1:
            self._replayed[channel] = message.position
            self._read_on(subscriber)
        elif message.offset == offset + 1 and self._fits(subscriber, message):
            self.offered[channel] = message.position
            self._queue.append(message)
            self.notify()

    def _read_on(self, subscriber: Subscriber) -> None:
        """Ask for the next page, if there is one, and nothing else waits."""
        if self._replayed and not self._queue and self._reading is None and self.reason is None:
            channel = next(iter(self._replayed))
            self._reading = self.offered[channel]
            subscriber.home.read_on(subscriber, channel, self._reading)

    def _fits(self, subscriber: Subscriber, message: Message) -> bool:
        self._bytes += message.size
        home = subscriber.home
        if self._bytes <= home.backlog or (self._bytes <= home.busy_backlog and self._catches_up()):
            return True
        self._queue.clear()
        self.end(subscriber, "backlog-bytes")
        return False

    def _catches_up(self) -> bool:
        now = monotonic()
        self.behind = self.behind or now
        return now - self.took <= TAKING and now - self.behind <= CATCHING_UP

    def end(self, subscriber: Subscriber, reason: str) -> None:
        """The greenlet finishes what waits and closes. The first reason stays."""
        if self.reason is None:
            self.reason = reason
            self.notify()

    def notify(self) -> None:
        """Wake whoever waits to take."""
        waker, self.waker = self.waker, None
        if waker is not None:
            waker()

    @property
    def quiet(self) -> bool:
        """Nothing waits, nothing is on its way from a replay, and it has not ended: it could sleep."""
        return not self._queue and not self._replayed and self._held is None and self.reason is None

    def take(self, subscriber: Subscriber, timeout: float | None) -> list[Item] | None:
        """See `Subscriber.take`."""
        sent, self._sending = self._sending, ()  # first: this greenlet may be ended while it waits
        for page in sent:
            subscriber.home.release(page)
        self._read_on(subscriber)
        if self._reading is not None and self.patience == 0:  # a poll waits for what there is, if not for what comes
            timeout = PAGE_WAIT
        if not self._queue and self.reason is None and timeout != 0:
            event = Event()
            self.waker = event.set
            event.wait(timeout)
            self.waker = None
        items, self._queue = self._queue, []
        self._sending, self._waiting = self._waiting, ()
        self.took = monotonic()
        self.behind = 0.0
        self._bytes = 0
        return items if items or self.reason is None else None


def _ahead(positions: Mapping[str, Position], places: Mapping[str, Position]) -> dict[str, Position]:
    """Those of `places` that somebody at `positions` has not passed."""
    return {
        channel: place
        for channel, place in places.items()
        if channel in positions and (positions[channel].epoch != place.epoch or positions[channel].offset < place.offset)
    }


class _Ended:
    """The host of a subscriber that has left."""

    def deliver(self, subscriber: Subscriber, batch: Batch) -> None:
        """Nobody is there."""

    def skip(self, subscriber: Subscriber, places: Mapping[str, Position]) -> None:
        """Nobody is there."""

    def end(self, subscriber: Subscriber, reason: str) -> None:
        """It has ended before."""


_ENDED = _Ended()
