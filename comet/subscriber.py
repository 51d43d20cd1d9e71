"""One client's open request: what waits for it, and the greenlet that takes it.

The hub offers messages (`offer` never blocks); the client's greenlet takes them (`take`), or simply
iterates: a Subscriber is the body of its own WSGI answer. It ends with a named reason
(`comet.errors.CLOSINGS`), told by whoever knows it: the hub, the server, or itself when its backlog
is full.

Joining. A subscriber is registered before the backplane answers, so messages may be offered while
the replay is still under way. They are held until `join` has queued the replay; then those at or
below its position are dropped as known. An offer that skips an offset means that this process
missed something: the subscriber holds again and asks `resync` for the same kind of answer.
"""

from collections.abc import Callable, Iterator, Sequence

from gevent.event import Event

from comet.framing import Framing, portions
from comet.history import Joined
from comet.message import Cursor, Gap, Item, Message, Position


class Subscriber:
    """`channels` as requested; `framing` turns what waits into bytes; `patience` is how many seconds a
    silence lasts before a heartbeat (a stream) or an empty answer (a poll), None for ever.

    At most `backlog` bytes of messages wait (as `Message.cost` counts; a replay is not counted, since
    history bounds it). `reason` is None while it is open.
    """

    __slots__ = (
        "_backlog", "_bytes", "_close", "_cursor", "_event", "_held", "_offered", "_queue", "_resync",
        "channels", "framing", "patience", "reason",
    )  # fmt: skip

    def __init__(
        self,
        channels: Sequence[str],
        framing: Framing,
        patience: float | None,
        backlog: int,
        close: Callable[["Subscriber"], None],
        resync: Callable[["Subscriber"], None],
    ) -> None:
        self.channels = channels
        self.framing = framing
        self.patience = patience
        self.reason: str | None = None
        self._backlog = backlog
        self._bytes = 0
        self._close = close
        self._resync = resync
        self._event = Event()
        self._queue: list[Item] = []
        self._held: list[Message] | None = []
        self._offered: dict[str, Position] = {}
        self._cursor: Cursor | None = None

    @property
    def cursor(self) -> Cursor:
        """Where the client stands: past everything that `encode` has made bytes of."""
        assert self._cursor is not None, "not joined yet"
        return self._cursor

    @property
    def one_shot(self) -> bool:
        """It has one answer, a long poll's, rather than a stream."""
        return self.framing.one_shot

    @property
    def offered(self) -> Sequence[Position]:
        """Where the queue ends, a position a channel: what a resync reads on from."""
        return [self._offered[channel] for channel in self.channels]

    # -- the hub's side: nothing here blocks

    def join(self, answers: Sequence[Joined]) -> None:
        """Queue the replay, one answer a channel, then what was held meanwhile."""
        starts = [answer.position for answer in answers]
        if self._cursor is None:
            self._cursor = Cursor(self.channels, starts)
        if any(answer.gap for answer in answers):
            self._queue.append(Gap(starts))
        for channel, (position, messages, _) in zip(self.channels, answers, strict=True):
            self._queue.extend(messages)
            self._offered[channel] = messages[-1].position if messages else position
        held, self._held = self._held or [], None
        self._bytes -= sum(message.cost for message in held)  # offered again below, and charged then
        for message in held:
            self.offer(message)
        if self._queue:
            self._event.set()

    def offer(self, message: Message) -> None:
        """Take note of a message; never blocks. Known ones are dropped, a skipped one is fetched."""
        if self.reason is not None:
            return
        if self._held is not None:
            if self._fits(message):
                self._held.append(message)
            return
        epoch, offset = self._offered[message.channel]
        if message.position.epoch != epoch or message.position.offset > offset + 1:
            if self._fits(message):
                self._held = [message]
                self._resync(self)
        elif message.position.offset == offset + 1 and self._fits(message):
            self._offered[message.channel] = message.position
            self._queue.append(message)
            self._event.set()

    def _fits(self, message: Message) -> bool:
        self._bytes += message.cost
        if self._bytes <= self._backlog:
            return True
        self._queue.clear()
        self.end("backlog-bytes")
        return False

    def end(self, reason: str) -> None:
        """Nothing more is offered; the greenlet finishes what waits and closes. The first reason stays."""
        if self.reason is None:
            self.reason = reason
            self._event.set()

    # -- the client's side: in its greenlet

    def take(self, timeout: float | None) -> list[Item] | None:
        """All that waits, as soon as something does; [] after `timeout` seconds; None at the end."""
        if not self._queue and self.reason is None:
            self._event.wait(timeout)
        items, self._queue = self._queue, []
        self._bytes = sum(message.cost for message in self._held or ())
        if self.reason is None:
            self._event.clear()
        elif not items:
            return None
        return items

    def encode(self, items: Sequence[Item]) -> Sequence[bytes]:
        """The bytes of `items` for this client, in its framing; a heartbeat where a stream has none."""
        if not items and not self.one_shot:
            return [self.framing.heartbeat]
        return self.framing.encode(items, self.cursor)

    def __iter__(self) -> Iterator[bytes]:
        """The body of the answer, in the plain style that any WSGI server can run."""
        try:
            opening = self.framing.opening(self.cursor)
            if opening:
                yield opening
            while True:
                items = self.take(self.patience)
                if self.one_shot:  # what does not fit is in the history, after the cursor of this answer
                    yield from self.encode(next(portions(items or [])))
                    return
                if items is None:
                    return
                for portion in portions(items):
                    yield from self.encode(portion)
        finally:
            self.close()

    def close(self) -> None:
        """Leave the hub. WSGI calls it however the answer ends; a second call does nothing."""
        self._close(self)
