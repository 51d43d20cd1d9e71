"""Pages of history for the subscribers of this process: each read once for all who stand at the same place.

Neighbours: `comet.hub`, which has one; `comet.subscriber`, whose `Awake` asks for the next page when its client has taken the last. A page
that has more behind it never changes: nothing is put between two offsets of an epoch. So it is kept, within a bound in bytes, for those
who come to the same place later. The last page is not: what it lacks is what is delivered.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import gevent
from gevent.lock import BoundedSemaphore

from comet.errors import Refusal
from comet.history import Joined
from comet.message import Message, Position
from comet.turn import give_way

AT_ONCE: Final = 100
"""Subscribers that go on together: half a millisecond."""

READS: Final = 4
"""Pages that are read at a time: so many are in the memory of whoever orders the messages, for this process, beside live messages."""

AGAIN: Final = 0.5
"""Seconds until a page is asked for again that could not be read."""

Read = Callable[[str, Position], Joined | None]
"""Reads the page that follows a position, as large as it may be now; None if there is no such channel. Blocks, and raises Refusal."""

log = logging.getLogger("comet.replays")


class Reader(Protocol):
    """A subscriber, as far as it is known here."""

    @property
    def ended(self) -> bool: ...
    def page(self, channel: str, answer: Joined) -> None: ...
    def go_on(self) -> None: ...
    def end(self, reason: str) -> None: ...


class Replays:
    """Reads pages by `read`, and keeps at most `most` bytes of them (as `Message.cost` counts)."""

    def __init__(self, read: Read, most: int) -> None:
        self._read = read
        self._most = most
        self._waiting: dict[tuple[str, Position], list[Reader]] = {}
        self._kept: OrderedDict[tuple[str, Position], Joined] = OrderedDict()
        """The one that was used last at the end."""
        self._bytes = 0
        self._held: dict[int, _Held] = {}
        """Pages that readers hold, by the `id` of their messages."""
        self.held = 0
        """Bytes of those, as `Message.cost` counts: a page that several hold counts once."""
        self._slots = BoundedSemaphore(READS)
        self._retries = BoundedSemaphore(READS)
        """Slots for further tries of a page: pages that can't be read must not keep those waiting that can."""

    def ask(self, reader: Reader, channel: str, position: Position) -> None:
        """Have `reader` given the page that follows `position`, soon. Does not block."""
        place = channel, position
        waiting = self._waiting.get(place)
        if waiting is None:
            self._waiting[place] = [reader]
            gevent.spawn(self._serve, place)
        else:
            waiting.append(reader)

    def hold(self, page: Sequence[Message]) -> None:
        """Note that one reader more has these messages, until `release`."""
        known = self._held.get(id(page))
        if known is None:
            known = self._held[id(page)] = _Held(page)
            self.held += known.cost
        known.readers += 1

    def release(self, page: Sequence[Message]) -> None:
        """Note that one reader fewer has these messages."""
        known = self._held[id(page)]
        known.readers -= 1
        if not known.readers:
            del self._held[id(page)]
            self.held -= known.cost

    def share(self, channel: str, answer: Joined) -> Joined:
        """Return the answer to a subscription with the messages of the page that is kept of the same place, if one is; else keep it."""
        if not answer.more or not answer.messages:
            return answer
        place = channel, answer.position
        kept = self._kept.get(place)
        if kept is None:
            self._keep(place, answer._replace(gap=False))
            return answer
        self._kept.move_to_end(place)
        return answer._replace(messages=kept.messages, more=answer.more + len(answer.messages) - len(kept.messages))

    def _serve(self, place: tuple[str, Position]) -> None:
        channel, _ = place
        waiting = self._waiting[place]
        try:
            page = self._page(place, waiting)
            del self._waiting[place]
            for reader in waiting:  # at the answer's place among the deliveries, where it is read just now
                if page is not None and not reader.ended:
                    reader.page(channel, page)
        except BaseException:
            for reader in self._waiting.pop(place, waiting):
                reader.end("unreadable")  # they would wait for ever; they resume by their cursors
            raise
        for index, reader in enumerate(waiting):
            if index % AT_ONCE == AT_ONCE - 1:
                give_way()
            if reader.ended:
                continue
            if page is None:  # deleted meanwhile: `Hub.dropped` has ended them; or else forgotten
                reader.end("unreadable")
            else:
                reader.go_on()

    def _page(self, place: tuple[str, Position], waiting: list[Reader]) -> Joined | None:
        """Return the page, kept or read; an empty one when nobody waits for it any more."""
        page = self._kept.get(place)
        if page is not None:
            self._kept.move_to_end(place)
            return page
        slots = self._slots
        while not all(reader.ended for reader in waiting):
            try:
                with slots:
                    page = self._read(*place)
            except Refusal as refusal:
                log.debug("a page of history can't be read: %s", refusal.detail)
                slots = self._retries
                gevent.sleep(AGAIN)
                continue
            if page is not None and page.more and not page.gap and place not in self._kept:  # `share` may have had it meanwhile
                self._keep(place, page)
            return page
        return Joined(place[1], (), False)

    def _keep(self, place: tuple[str, Position], page: Joined) -> None:
        self._kept[place] = page
        self._bytes += _cost(page.messages)
        while self._bytes > self._most:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _cost(oldest.messages)


class _Held:
    """The messages of a page, what they cost, and how many readers have them."""

    __slots__ = ("cost", "page", "readers")

    def __init__(self, page: Sequence[Message]) -> None:
        self.page = page
        self.cost = _cost(page)
        self.readers = 0


def _cost(messages: Sequence[Message]) -> int:
    return sum(message.cost for message in messages)
