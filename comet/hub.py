"""The channels of this process: who listens here, and what is delivered to them.

Handlers talk to the hub alone. It passes publications to the backplane, which orders them and calls
`deliver` here; `deliver` offers each message to the channel's subscribers. Registry and backplane
are kept in step in `subscribe`, `_leave` and `dropped`, and nowhere else.
"""

from collections.abc import Sequence

import gevent

from comet.backplane import Backplane, ChannelInfo, Receipt, Sent
from comet.errors import Refusal
from comet.framing import Framing
from comet.history import Joined
from comet.message import Message, Publication, Since
from comet.stats import Stats
from comet.subscriber import Subscriber


class Hub:
    """`backlog` is the bytes of messages that may wait for one client (see `Subscriber`)."""

    def __init__(self, backplane: Backplane, stats: Stats, backlog: int) -> None:
        self._backplane = backplane
        self._stats = stats
        self._backlog = backlog
        self._channels: dict[str, dict[Subscriber, None]] = {}  # in order of joining
        self._joining: dict[Subscriber, set[tuple[str, int]]] = {}  # and what was dropped before the answer
        self.draining = False
        """Set by `drain`: new subscribers are refused."""
        backplane.attach(self.deliver, self.dropped)

    # -- subscribing

    def subscribe(self, channels: Sequence[str], since: Sequence[Since], framing: Framing, patience: float | None) -> Subscriber:
        """A new subscriber that has everything after `since`, and will have everything to come.

        Raises Refusal ``draining`` once `drain` was called.
        """
        if self.draining:
            raise Refusal("draining", "This server is stopping; connect again, to another one or a little later.")
        subscriber = Subscriber(channels, framing, patience, self._backlog, self._leave, self._resync)
        for channel in channels:
            self._channels.setdefault(channel, {})[subscriber] = None
        dropped = self._joining[subscriber] = set()
        try:
            answers = self._backplane.subscribe(channels, since)
        except BaseException:
            self._unregister(subscriber)
            raise
        finally:
            del self._joining[subscriber]
        for channel, answer in zip(channels, answers, strict=True):
            if (channel, answer.position.epoch) in dropped:  # the log it has joined, not the one before
                self._discard(channel, subscriber)
                subscriber.end("deleted")
        self._stats.clients[framing.name] += 1
        subscriber.join(answers)
        return subscriber

    def _leave(self, subscriber: Subscriber) -> None:
        left = self._unregister(subscriber)
        if left is None:
            return
        self._stats.clients[subscriber.framing.name] -= 1
        self._stats.closed[subscriber.reason or ("answered" if subscriber.one_shot else "lost")] += 1
        if left:
            self._backplane.unsubscribe(left)

    def _unregister(self, subscriber: Subscriber) -> list[str] | None:
        """The channels it was registered on; those deleted under it are not among them. None the
        second time."""
        if not subscriber.channels:
            return None
        left = []
        for channel in subscriber.channels:
            if self._discard(channel, subscriber):
                left.append(channel)
        subscriber.channels = ()
        return left

    def _discard(self, channel: str, subscriber: Subscriber) -> bool:
        """Take it off the channel; whether it was there."""
        members = self._channels.get(channel)
        if members is None or subscriber not in members:
            return False
        del members[subscriber]
        if not members:
            del self._channels[channel]
        return True

    def _resync(self, subscriber: Subscriber) -> None:
        gevent.spawn(self._catch_up, subscriber)

    def _catch_up(self, subscriber: Subscriber) -> None:
        """Read what this process missed, for a subscriber that was offered a later message."""
        answers = []
        try:
            for channel, position in zip(subscriber.channels, subscriber.offered, strict=True):
                answer = self._backplane.read(channel, position)
                if answer is None:  # deleted meanwhile: `dropped` has ended it, or is about to
                    return
                answers.append(answer)
        except Exception:
            subscriber.end("unreadable")  # it would hold for ever; it resumes by its cursor
            raise
        if subscriber.channels:  # it may have left while the backplane read
            subscriber.join(answers)

    # -- what the backplane calls

    def deliver(self, messages: Sequence[Message]) -> None:
        """Offer ordered messages to this process's subscribers. Does not block."""
        offers = 0
        for message in messages:
            members = self._channels.get(message.channel)
            if members is not None:
                for subscriber in members:
                    subscriber.offer(message)
                offers += len(members)
        self._stats.offered += offers

    def dropped(self, channel: str, epoch: int) -> None:
        """The channel's log is gone: end its subscribers, who may come back to the next one. One that is
        still joining may be of the next already: the epoch of its answer will tell."""
        for subscriber in list(self._channels.get(channel, ())):
            if subscriber in self._joining:
                self._joining[subscriber].add((channel, epoch))
            else:
                self._discard(channel, subscriber)
                subscriber.end("deleted")

    # -- what handlers pass on

    def publish(self, publications: Sequence[Publication]) -> Sequence[Receipt | Refusal]:
        """See `Backplane.publish`."""
        answers = self._backplane.publish(publications)
        self._stats.published += sum(isinstance(answer, Receipt) for answer in answers)
        return answers

    def send(self, channels: Sequence[str], type: str, data: bytes, key: str | None) -> Sent:
        """See `Backplane.send`."""
        sent = self._backplane.send(channels, type, data, key)
        self._stats.published += 1
        return sent

    def read(self, channel: str, since: Since, limit: int) -> Joined | None:
        """See `Backplane.read`."""
        return self._backplane.read(channel, since, limit)

    def info(self, channel: str) -> ChannelInfo | None:
        """See `Backplane.info`."""
        return self._backplane.info(channel)

    def delete(self, channel: str) -> ChannelInfo | None:
        """See `Backplane.delete`."""
        return self._backplane.delete(channel)

    def totals(self) -> dict[str, int]:
        """See `Backplane.totals`."""
        return self._backplane.totals()

    # -- stopping

    def drain(self) -> None:
        """Refuse new subscribers and end the present ones: polls are answered with their cursor,
        streams finish."""
        self.draining = True
        for members in self._channels.values():
            for subscriber in members:
                subscriber.end("shutdown")
