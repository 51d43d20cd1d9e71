"""The channels of this process: who listens here, and what is delivered to them.

Handlers talk to the hub alone. It passes publications to the backplane, which orders them and calls
`deliver` here; `deliver` hands each channel's messages to its subscribers, by way of `fanout` where
there are many. Registry and backplane are kept in step in the three ways to subscribe, `leave` and `dropped`,
and nowhere else.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import gevent

from comet.backplane import Backplane
from comet.errors import Refusal
from comet.fanout import Fanout, Feeds, Members, Permit
from comet.framing import batches
from comet.history import PAGE, Joined
from comet.message import ChannelInfo, Message, Position, Publication, Receipt, Sent, Since
from comet.replays import Replays
from comet.stats import Stats
from comet.subscriber import Awake, Host, Subscriber, Wish

ENDING_PAUSE = 0.05
"""Seconds between two lots of streams that a drain ends."""

LEAST_PAGE = 4 << 10
"""Bytes of a page while clients that take nothing hold all that may be held: some twenty short messages, so that those who do take come
forward."""

ENDED_AT_ONCE = 20
"""Streams a lot at least: few need no spreading."""


class Hub:
    """The subscribers of this process, by channel.

    `backlog` is the bytes of messages that may wait for one client, `busy_backlog`, if it is more, for one that keeps taking.
    `schedule` runs a function soon, of which several may be pending, and `permit` is asked before a sweep of many (see `Fanout`,
    `Feeds`). `replay_bytes` is what may be held of history for clients that catch up, as `Message.cost` counts: pages that they have
    not taken yet, and, a quarter of it, pages for others who come to the same place (see `Replays`).
    """

    def __init__(
        self,
        backplane: Backplane,
        stats: Stats,
        backlog: int,
        schedule: Callable[[Callable[[], None]], None],
        permit: Permit | None = None,
        busy_backlog: int = 0,
        replay_bytes: int = 64 << 20,
    ) -> None:
        self._replay_bytes = replay_bytes
        self.backlog = backlog
        self.busy_backlog = max(backlog, busy_backlog)
        self.draining = False
        """Set by `drain`: a new subscriber gets what is kept, and ends."""
        self._backplane = backplane
        self._stats = stats
        self._fanout = Fanout(schedule, permit=permit)
        self._feeds = Feeds(self._deliver, schedule)
        # a channel's only subscriber stands there itself: most channels are one user's feed
        self._channels: dict[str, Subscriber | Members[Subscriber]] = {}
        # those whose backplane has not answered yet, and what was dropped meanwhile: (channel, epoch)
        self._joining: dict[Subscriber, set[tuple[str, int]]] = {}
        self._replays = Replays(self._read_page, replay_bytes // 4)
        self.hold, self.release = self._replays.hold, self._replays.release
        backplane.attach(self.deliver, self.dropped, self.lost)
        self.left: Callable[[Subscriber, str], None] | None = None
        """Is told of each subscriber that has ended, and why."""

    # -- subscribing

    def subscribe(self, wish: Wish) -> Subscriber:
        """Return a new subscriber that has everything after `since`, and will have everything to come; once `drain` was called
        it has what is kept, and ends.

        Whoever was answered a moment ago may have asked again before the answer could say that the server stops: to be refused
        would end a browser's EventSource for good. Raises Refusal where the backplane does.
        """
        channels, since, framing, patience = wish
        if patience == 0:
            return self._look(wish)
        if len(channels) > 1:
            channels = self._shared_names(channels)
        subscriber = Subscriber(channels, framing, self, Awake(patience, {}))
        for channel in channels:
            self._register(channel, subscriber)
        dropped = self._joining[subscriber] = set()
        try:
            answers = self._backplane.subscribe(channels, since, self._page_size())
        except BaseException:
            for channel in channels:
                self._expel(channel, subscriber)
            raise
        finally:
            del self._joining[subscriber]
        for channel, answer in zip(channels, answers, strict=True):
            if (channel, answer.position.epoch) in dropped:  # the log it has joined, not the one before
                self._expel(channel, subscriber)
                subscriber.end("deleted")
        self._stats.clients[framing.name] += 1
        answers = list(map(self._replays.share, channels, answers))
        if len(channels) > 1:
            answers = list(map(self._shared_place, channels, answers))
        subscriber.begin(dict(zip(channels, answers, strict=True)), since)
        if self.draining:
            subscriber.end("shutdown")
        return subscriber

    def _look(self, wish: Wish) -> Subscriber:
        """Return a subscriber that does not wait: it has what is kept, and nothing is made of a channel that is not there."""
        channels, since, framing, patience = wish
        answers = list(map(self._replays.share, channels, self._backplane.peek(channels, since, self._page_size())))
        subscriber = Subscriber(channels, framing, self, Awake(patience, {}))
        self._stats.clients[framing.name] += 1
        subscriber.begin(dict(zip(channels, answers, strict=True)), since)
        for channel in channels:
            subscriber.drop(channel)
        return subscriber

    def subscribe_asleep(self, wish: Wish, bed: Host) -> Subscriber | None:
        """As `subscribe`, for a client who has missed nothing, asleep in `bed` from the start: who starts now,
        or a poller who has it all. None where there is something to read, and then nothing was done."""
        channels, since, framing, patience = wish
        if len(channels) != 1 or self.draining or patience == 0:
            return None
        channel = channels[0]
        head = self._backplane.rejoin(channel, since[0])
        if head is None:
            return None
        subscriber = Subscriber(channels, framing, self, bed)
        subscriber.epoch, subscriber.offset = head
        self._stats.clients[framing.name] += 1
        self._register(channel, subscriber)
        return subscriber

    def subscribe_soon(self, wish: Wish, bed: Host, done: Callable[[Subscriber], object], failed: Callable[[Refusal], object]) -> bool:
        """As `subscribe`, for a caller in the loop: `done` is called with the subscriber, asleep in `bed` where it has missed nothing,
        or `failed` with why there is none; soon, or before this returns. False where that can't be, and then nothing was done. Raises
        Refusal ``backplane-busy``."""
        channels, since, framing, patience = wish
        if len(channels) != 1 or self.draining or patience == 0:
            return False
        channel = channels[0]

        def joined(answer: Joined) -> None:
            missed = answer.messages or answer.more or answer.gap or self.draining
            subscriber = Subscriber(channels, framing, self, Awake(patience, {}) if missed else bed)
            self._stats.clients[framing.name] += 1
            self._register(channel, subscriber)
            if missed:
                subscriber.begin({channel: self._replays.share(channel, answer)}, since)
                if self.draining:
                    subscriber.end("shutdown")
            else:
                subscriber.epoch, subscriber.offset = answer.position
            done(subscriber)

        return self._backplane.subscribe_soon(channel, since[0], joined, failed, self._page_size())

    def _register(self, channel: str, subscriber: Subscriber) -> None:
        present = self._channels.get(channel)
        if present is None:
            self._channels[channel] = subscriber
        elif isinstance(present, Members):
            present.add(subscriber)
        else:
            self._channels[channel] = Members(present, subscriber, name=channel)

    def _shared_names(self, channels: Sequence[str]) -> Sequence[str]:
        """Return the names of several channels as others hold them: 64 of its own would be 11 KB a client."""
        present = self._channels.get(channels[0])
        last = present.present[-1] if isinstance(present, Members) else None
        if isinstance(last, Subscriber) and last.channels == channels:
            return last.channels
        return tuple(map(self._shared_name, channels))

    def _shared_name(self, channel: str) -> str:
        """Return the name of a channel as others hold it, if there are any."""
        present = self._channels.get(channel)
        return present.name if isinstance(present, Members) else channel

    def _shared_place(self, channel: str, answer: Joined) -> Joined:
        """Return the answer with the position that the last one who joined has, if it is equal."""
        present = self._channels.get(channel)
        if not isinstance(present, Members):
            return answer
        if present.place != answer.position:
            present.place = answer.position
        return answer._replace(position=present.place)

    def _expel(self, channel: str, subscriber: Subscriber) -> None:
        """Take one off a channel that it will not unsubscribe from."""
        subscriber.drop(channel)
        present = self._channels[channel]
        if isinstance(present, Members) and present.alive > 1:
            present.expel(subscriber)
        else:
            del self._channels[channel]

    def _unregister(self, channel: str) -> None:
        """One that is registered there has ended."""
        present = self._channels[channel]
        if isinstance(present, Members) and present.alive > 1:
            present.leave()
        else:
            del self._channels[channel]

    def leave(self, subscriber: Subscriber, reason: str) -> None:
        """Called once by each subscriber, when it has ended."""
        self._stats.clients[subscriber.framing.name] -= 1
        self._stats.closed[reason] += 1
        if self.left is not None:
            self.left(subscriber, reason)
        for channel in subscriber.channels:
            self._unregister(channel)
        if subscriber.channels:
            self._backplane.unsubscribe(subscriber.channels)

    def read_on(self, subscriber: Subscriber, channel: str, position: Position) -> None:
        """Have a subscriber given the page of the channel's history that follows `position`, soon."""
        self._replays.ask(subscriber, channel, position)

    def _page_size(self) -> int:
        """Return how many bytes the next page may have: the fewer the more its clients hold, and at the bound `LEAST_PAGE`."""
        return max(LEAST_PAGE, min(PAGE, (self._replay_bytes - self._replays.held) // 8))

    def _read_page(self, channel: str, position: Position) -> Joined | None:
        return self._backplane.read(channel, position, None, self._page_size())

    # -- what the backplane calls

    def deliver(self, messages: Sequence[Message]) -> None:
        """Hand ordered messages to this process's subscribers. Does not block."""
        self._feeds.deliver(messages)

    def _deliver(self, channel: str, messages: Sequence[Message]) -> None:
        present = self._channels.get(channel)
        if present is None:
            return
        if isinstance(present, Members):
            self._stats.offered += present.alive * len(messages)
            self._fanout.deliver(present, messages)
        else:
            self._stats.offered += len(messages)
            for batch in batches(messages):
                present.host.deliver(present, batch)  # `present.deliver` would be the same, by one call more

    def dropped(self, channel: str, epoch: int) -> None:
        """The channel's log is gone: end its subscribers, who may come back to the next one. One that is
        still joining may be of the next already: the epoch of its answer will tell."""
        self._finish(channel)
        for subscriber in self._members(self._channels.pop(channel, None)):
            if subscriber in self._joining:
                self._joining[subscriber].add((channel, epoch))
                self._register(channel, subscriber)
            else:
                subscriber.drop(channel)
                subscriber.end("deleted")

    def lost(self, answers: Mapping[str, Joined]) -> None:
        """Tell the subscribers of these channels one gap each, and go on with what is kept."""
        theirs: dict[Subscriber, dict[str, Position]] = {}
        for channel, answer in answers.items():
            for subscriber in self._members(self._finish(channel)):
                theirs.setdefault(subscriber, {})[channel] = answer.position
        for subscriber, places in theirs.items():
            subscriber.skip(places)
        for channel, answer in answers.items():
            if answer.messages:
                self._deliver(channel, answer.messages)

    def _finish(self, channel: str) -> "Subscriber | Members[Subscriber] | None":
        """Deliver now all that waits for a channel's subscribers; who they are."""
        self._feeds.finish(channel)
        present = self._channels.get(channel)
        if isinstance(present, Members):
            self._fanout.finish(present)
        return present

    @staticmethod
    def _members(present: Subscriber | Members[Subscriber] | None) -> list[Subscriber]:
        if present is None:
            return []
        if isinstance(present, Members):
            return [one for one in present.present if not one.ended]
        return [present]

    # -- what handlers pass on

    def publish(self, publications: Sequence[Publication]) -> Sequence[Receipt | Refusal]:
        """See `Backplane.publish`."""
        answers = self._backplane.publish(publications)
        self._stats.published += sum(isinstance(answer, Receipt) for answer in answers)
        return answers

    def send(self, channels: str, type: str, data: bytes, key: str | None) -> Sent:
        """See `Backplane.send`."""
        sent = self._backplane.send(channels, type, data, key)
        self._stats.published += 1
        return sent

    def ready(self) -> bool:
        """See `Backplane.ready`."""
        return self._backplane.ready()

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

    def drain(self, seconds: float = 0.0) -> None:
        """End all subscribers, also those who still come: polls are answered with their cursor, at once;
        streams finish, spread over about `seconds` where they are many, so that their clients don't come
        back all at once. Until then they get what is published."""
        self.draining = True
        streams: dict[Subscriber, None] = {}  # each once, though it may be on several channels
        for channel in list(self._channels):
            for subscriber in self._members(self._finish(channel)):
                if seconds and not subscriber.one_shot:
                    streams[subscriber] = None
                else:
                    subscriber.end("shutdown")
        if streams:
            gevent.spawn(self._end_spread, list(streams), seconds)

    def _end_spread(self, streams: Sequence[Subscriber], seconds: float) -> None:
        count = max(ENDED_AT_ONCE, math.ceil(len(streams) * ENDING_PAUSE / seconds))
        for start in range(0, len(streams), count):
            if start:
                gevent.sleep(ENDING_PAUSE)
            those = [subscriber for subscriber in streams[start : start + count] if not subscriber.ended]
            channels = {channel for subscriber in those for channel in subscriber.channels}
            for channel in channels:
                self._finish(channel)
            for subscriber in those:
                subscriber.end("shutdown")
