"""The contract between processes: what orders, keeps and hands out messages.

A backplane joins the processes of a service; a hub (`comet.hub`) lives in one of them and knows its
clients. The backplane never imports the hub: it is given three functions, `deliver`, `dropped`, `lost`.
`memory.py` is the backplane of one process, `router.py` that of several on one machine, `redis.py` that of many
machines; every backplane passes tests/contracts.

Whatever may have to wait for another process raises Refusal ``backplane-away`` when it does not answer
in time, and ``unconfirmed`` where it may have been published all the same.

What every backplane promises

1. *Order.* The messages of a channel get the offsets 1, 2, 3 … of the log's epoch, and `deliver`
   sees them in that order, each once, on every process that has joined the channel.
2. *Epochs.* A log has a random epoch of its own. Say a client holds the cursor (e, 7), the service
   restarts, nine new messages are ordered and the client comes back: were there no epoch, 7 would
   look like a place in the new log, and messages 1 to 7 of it would be lost in silence. Whatever
   forgets or rewinds an offset begins another epoch, so the client is told a gap instead.
3. *Joining is atomic.* `subscribe` answers with what follows `since` up to one point of the log, or the first page of that; every
   message after that point reaches `deliver`, and none before it does so later than the
   answer. So the caller registers its subscriber first, holds back what is delivered meanwhile, and
   drops what the answer already has; or registers it at the answer's place (`subscribe_soon`).
4. *Acknowledged is kept.* When `publish` answers, the message has its place in the log and is on its
   way to every process that has joined the channel. Refusals are answers too, one an item.
5. *Counting.* Each `subscribe` counts one subscriber on each of its channels until `unsubscribe`,
   or until `dropped` says that the channel was deleted: that ends every subscription to it, and
   whoever is told must not unsubscribe from it as well.
6. *Lingering.* A channel without subscribers keeps its epoch, offset and history for the linger time
   after its last use (a subscriber leaving, a `publish`), so that a poller between two polls
   loses nothing. Then it is forgotten, and costs nothing.
7. *Nothing is lost in silence.* When the way between processes breaks, what was missed is delivered
   from history; where that can't be vouched for, `lost` says so, once for each break.
8. *Bounds.* History is bounded a channel (count and age) and in all (bytes; the channel that was
   least recently published to or read pays first). Channels that linger are bounded in number, and
   idempotency keys in age and number. What is bounded in all is bounded by Redis itself, where that is
   the backplane.
9. *Pages.* An answer holds one page of messages at most: so many bytes as were asked for (`comet.history.PAGE` if nothing is said), over
   all channels, and at most one message more; and it says how many are kept behind it. `read` goes on from its end. So whoever reads
   holds one page, however long the history is.
10. *Asking makes nothing.* `peek`, `read` and `info` leave no channel behind that was not there.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from comet.errors import Refusal
from comet.history import PAGE, Joined
from comet.message import ChannelInfo, Message, Position, Publication, Receipt, Sent, Since

Deliver = Callable[[Sequence[Message]], None]
"""Takes ordered messages to this process's clients. Must not block and must not raise."""

Dropped = Callable[[str, int], None]
"""Tells this process that a channel's log, of this epoch, was deleted: its subscribers are ended. As `Deliver`."""

Lost = Callable[[Mapping[str, Joined]], None]
"""Tells this process that messages of these channels can't be had any more, or that their logs began
anew: its subscribers are told a gap, and go on with the `Joined`. As `Deliver`."""


class Backplane(Protocol):
    """See the module: this is the whole boundary."""

    def attach(self, deliver: Deliver, dropped: Dropped, lost: Lost) -> None:
        """Where deliveries go. Called once, before anything else."""

    def ready(self) -> bool:
        """What orders the messages is in reach."""

    def publish(self, publications: Sequence[Publication]) -> Sequence[Receipt | Refusal]:
        """Order these, one after the other; an answer each, in the same order.

        A channel that nobody holds comes into being: its history waits for a subscriber. A repeated
        key answers what it answered first, also after a `delete`; with another body or type it is Refusal
        ``key-conflict``.
        """

    def send(self, channels: str, type: str, data: bytes, key: str | None = None) -> Sent:
        """One message to many feeds, no feed twice, each in its own order, only where the feed is held.

        `channels` are joined by commas, which is how a database gives thousands of them without touching
        each. Feeds that nobody has held within the linger time cost nothing and keep nothing. `key` is an
        idempotency key of the first channel. Raises Refusal ``key-conflict``.
        """

    def subscribe(self, channels: Sequence[str], since: Sequence[Since], size: int = PAGE) -> Sequence[Joined]:
        """Join each channel, after its `since`; one answer a channel, in order, and one page of `size` bytes in all."""

    def rejoin(self, channel: str, since: Since) -> Position | None:
        """`subscribe` at once, where nothing has to be read: whoever starts now, or stands at the newest
        position, has missed nothing. That position, or None: then nothing was done. It makes no channel. Never blocks."""

    def subscribe_soon(
        self, channel: str, since: Since, done: Callable[[Joined], object], failed: Callable[[Refusal], object], size: int = PAGE
    ) -> bool:
        """`subscribe` for a caller who has no greenlet to wait with: `done` is called at the answer's place among the
        deliveries, so that nothing has to be held back, or `failed` with what `subscribe` would raise later; by the loop, or before this
        returns. Neither may raise or block. False where that is not to be had, and then nothing was done. Raises Refusal
        ``backplane-busy``."""

    def unsubscribe(self, channels: Sequence[str]) -> None:
        """Undo one `subscribe` of these channels."""

    def peek(self, channels: Sequence[str], since: Sequence[Since], size: int = PAGE) -> Sequence[Joined]:
        """Answer as `subscribe` would, without joining, and without making a channel.

        Of a channel that is not there the answer's position is in no log: it says "nothing, as of now". Whoever goes on from there
        gets everything that is published later, without a gap while that is kept.
        """

    def read(self, channel: str, since: Since, limit: int | None = None, size: int = PAGE) -> Joined | None:
        """A page of history, of at most `limit` messages, without joining; None when there is no such channel."""

    def info(self, channel: str) -> ChannelInfo | None:
        """None when there is no such channel."""

    def delete(self, channel: str) -> ChannelInfo | None:
        """Forget the channel's log and tell every process `dropped`; answers what went, None if nothing."""

    def totals(self) -> dict[str, int]:
        """``channels``, ``messages_kept``, ``history_bytes``, ``idempotency_keys`` of the whole service."""
