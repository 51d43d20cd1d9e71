"""What is the memory backplane's own: its accounting, against a naive model, and that it is synchronous."""

import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest

from comet.backplane.memory import EPOCH_BITS, Bounds, MemoryBackplane, _Channel
from comet.errors import Refusal
from comet.history import Joined
from comet.message import OLDEST, ChannelInfo, Message, Position, Publication, Receipt, Since
from tests.contracts.suite import Clock

BOUNDS = Bounds(history_size=5, history_age=30.0, history_bytes=9000, linger=10.0, max_idle=4, key_age=20.0, max_keys=6)
CHANNELS = "abcdefgh"


def assert_sound(backplane: MemoryBackplane, bounds: Bounds) -> None:
    """The invariants that the module's docstring rests on."""
    warm, idle, vacant, keys = backplane._warm, backplane._idle, backplane._vacant, backplane._keys
    channels = logs(backplane)
    assert {name for name, log in channels.items() if log.entries is not None} == set(warm)
    assert all(channels[name] is log and log.entries for name, log in warm.items())
    assert {name for name, log in channels.items() if not log.subscribers} == idle.keys() | vacant.keys()
    assert not idle.keys() & vacant.keys()
    assert all(channels[name].head for name in idle)
    assert all(log.subscribers >= 0 for log in channels.values())
    assert list(idle.values()) == sorted(idle.values())
    assert list(vacant.values()) == sorted(vacant.values())
    assert [known.until for known in keys.values()] == sorted(known.until for known in keys.values())
    kept = [log.entries or [] for log in channels.values()]
    assert sum(message.cost for entries in kept for message in entries) == backplane._bytes <= bounds.history_bytes
    assert sum(map(len, kept)) == backplane.totals()["messages_kept"]
    assert all(len(entries) <= bounds.history_size for entries in kept)
    assert max(len(idle), len(vacant)) <= bounds.max_idle
    assert len(keys) <= bounds.max_keys


def logs(backplane: MemoryBackplane) -> dict[str, _Channel]:
    """Its logs; one that is only an epoch stands for an empty one, lingering or with one subscriber."""
    made: dict[str, _Channel] = {}
    for name, log in backplane._channels.items():
        if isinstance(log, int):
            made[name] = _Channel(log)
            made[name].subscribers = int(name not in backplane._vacant)
        else:
            made[name] = log
    return made


class Model:
    """Every log as it was ordered, whole, and who holds it; nothing is bounded but what lingers."""

    def __init__(self) -> None:
        self.logs: dict[str, list[bytes]] = {}
        self.epochs: dict[str, int] = {}
        self.subscribers: dict[str, int] = {}
        self.idle: OrderedDict[str, float] = OrderedDict()
        self.vacant: OrderedDict[str, float] = OrderedDict()

    def open(self, channel: str) -> None:
        if channel not in self.logs:
            self.logs[channel], self.subscribers[channel] = [], 0

    def forget(self, channel: str) -> None:
        for table in (self.logs, self.epochs, self.subscribers):
            table.pop(channel, None)
        self.hold(channel)

    def hold(self, channel: str) -> None:
        for lingering in (self.idle, self.vacant):
            lingering.pop(channel, None)

    def rest(self, channel: str, now: float) -> None:
        self.hold(channel)
        lingering = self.idle if self.logs[channel] else self.vacant
        lingering[channel] = now + BOUNDS.linger
        if len(lingering) > BOUNDS.max_idle:
            self.forget(next(iter(lingering)))

    def expire(self, now: float) -> None:
        for lingering in (self.idle, self.vacant):
            for channel in [name for name, until in lingering.items() if until <= now]:
                self.forget(channel)


class Run:
    """A seeded sequence of operations on both, compared after each."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.backplane = MemoryBackplane(BOUNDS, self.clock, self.rng.getrandbits)
        self.model = Model()
        self.delivered: list[Message] = []
        self.dropped: list[str] = []
        self.held: list[list[str]] = []
        self.answered: dict[tuple[str, str], tuple[bytes, Receipt, float]] = {}
        self.ever: dict[str, list[bytes]] = {channel: [] for channel in CHANNELS}
        """All that was ordered on a channel, in all its logs."""
        self.looked: list[tuple[str, Position, int]] = []
        """Places of channels that were not there, and how much had been ordered on each before."""
        self.conflicts = self.repeats = self.gaps = self.rejoined = self.lookers = 0
        self.backplane.attach(self.delivered.extend, lambda channel, _: self.dropped.append(channel))

    def some(self) -> list[str]:
        return self.rng.sample(CHANNELS, self.rng.randint(1, 3))

    def order(self, channel: str, data: bytes, position: Position) -> None:
        """Note in the model what the backplane says it ordered."""
        log = self.model.logs[channel]
        log.append(data)
        self.ever[channel].append(data)
        assert position == (self.model.epochs.setdefault(channel, position.epoch), len(log))
        message = self.delivered.pop(0)
        assert (message.channel, message.position, message.data) == (channel, position, data)

    def publish(self) -> None:
        now = self.clock.now
        asked = [
            Publication(
                channel, b"%x" % self.rng.getrandbits(4 * self.rng.randint(1, 1500)), "message", self.rng.choice([None, None, "k", "l"])
            )
            for channel in self.some()
        ]
        for publication, answer in zip(asked, self.backplane.publish(asked), strict=True):
            channel, data, _, key = publication
            first = self.answered.get((channel, key)) if key else None
            if first is not None and first[2] > now and (answer == first[1] or isinstance(answer, Refusal)):
                assert isinstance(answer, Refusal) == (data != first[0])
                self.conflicts += isinstance(answer, Refusal)
                continue  # or it was pushed out by the bound on their number, and is new
            assert isinstance(answer, Receipt)
            self.model.open(channel)
            self.order(channel, data, answer.position)
            if not self.model.subscribers[channel]:
                self.model.rest(channel, now)
            assert answer.subscribers == self.model.subscribers[channel]
            if key:
                self.answered[channel, key] = (data, answer, now + BOUNDS.key_age)

    def repeat(self) -> None:
        living = [(channel, key) for (channel, key), known in self.backplane._keys.items() if known.until > self.clock.now]
        if living:
            channel, key = self.rng.choice(living)
            data, receipt, _ = self.answered[channel, key]
            assert self.backplane.publish([Publication(channel, data, "message", key)]) == [receipt]
            self.repeats += 1

    def send(self) -> None:
        channels = self.some()
        held = [channel for channel in channels if channel in self.model.logs]
        heads = [len(self.model.logs[channel]) for channel in held]
        sent = self.backplane.send(",".join(channels), "message", b"sent")
        assert (sent.targets, sent.delivered) == (len(channels), sum(self.model.subscribers[channel] for channel in held))
        assert (sent.position is None) == (channels[0] not in held)
        for channel, head in zip(held, heads, strict=True):
            self.order(channel, b"sent", Position(self.delivered[0].position.epoch, head + 1))

    def since(self, channel: str) -> Since:
        epoch = self.model.epochs.get(channel, 7)
        return self.rng.choice([None, OLDEST, Position(epoch, self.rng.randint(0, 40)), Position(epoch ^ 1, 0)])

    def compare(self, channel: str, since: Since, answer: object) -> None:
        """An answer is a run of the whole log; it begins where asked or says so."""
        assert isinstance(answer, Joined)
        position, messages, gap, more = answer
        assert more == 0
        log = self.model.logs[channel]
        if log:
            assert position.epoch == self.model.epochs[channel]
        assert [message.data for message in messages] == log[position.offset :]
        if isinstance(since, Position):
            assert gap == (position != since)
        elif since is None:
            assert (position.offset, gap) == (len(log), False)
        if gap or since == OLDEST:
            assert len(messages) == len(logs(self.backplane)[channel].entries or ())
        assert all(message.time >= self.clock.now - BOUNDS.history_age for message in messages)
        self.gaps += gap

    def subscribe(self) -> None:
        channels = self.some()
        since = [self.since(channel) for channel in channels]
        for channel in channels:
            self.model.open(channel)
            self.model.subscribers[channel] += 1
            self.model.hold(channel)
        for channel, start, answer in zip(channels, since, self.backplane.subscribe(channels, since), strict=True):
            self.model.epochs.setdefault(channel, answer.position.epoch)
            self.compare(channel, start, answer)
        self.held.append(channels)

    def rejoin(self) -> None:
        channel = self.rng.choice(CHANNELS)
        log = self.model.logs.get(channel, [])
        epoch = self.model.epochs.get(channel, 7)
        since = Position(epoch ^ (self.rng.random() < 0.2), max(0, len(log) - (self.rng.random() < 0.2)))
        known = channel in self.model.logs
        joined = self.backplane.rejoin(channel, since)
        assert bool(joined) == (known and since == logs(self.backplane)[channel].position)
        assert not joined or since.offset == len(log)
        if joined:
            self.model.subscribers[channel] += 1
            self.model.hold(channel)
            self.held.append([channel])
            self.rejoined += 1

    def unsubscribe(self) -> None:
        if self.held:
            channels = self.held.pop(self.rng.randrange(len(self.held)))
            self.backplane.unsubscribe(channels)
            for channel in channels:
                self.model.subscribers[channel] -= 1
                if not self.model.subscribers[channel]:
                    self.model.rest(channel, self.clock.now)

    def look(self) -> None:
        """Look at channels without joining: as subscribing would answer, and of one that is not there a place, nothing else."""
        channels = self.some()
        since = [self.since(channel) for channel in channels]
        for channel, start, answer in zip(channels, since, self.backplane.peek(channels, since), strict=True):
            if channel in self.model.logs:
                self.model.epochs.setdefault(channel, answer.position.epoch)
                self.compare(channel, start, answer)
                if not self.model.subscribers[channel]:
                    self.model.rest(channel, self.clock.now)
            else:
                assert (answer.messages, answer.more, answer.gap) == ((), 0, isinstance(start, Position))
                self.looked.append((channel, answer.position, len(self.ever[channel])))
                if self.rng.random() < 0.3:
                    (receipt,) = self.backplane.publish([Publication(channel, b"came")])
                    assert isinstance(receipt, Receipt)
                    self.model.open(channel)
                    self.order(channel, b"came", receipt.position)
                    self.model.rest(channel, self.clock.now)

    def go_on(self) -> None:
        """Go on from where a channel was not there: told, or nothing is missing."""
        if not self.looked:
            return
        newest = self.rng.random() < 0.8
        channel, place, before = self.looked.pop(-1 if newest else self.rng.randrange(len(self.looked)))
        absent = channel not in self.model.logs
        if self.rng.random() < 0.5:
            (answer,) = self.backplane.peek([channel], [place])
            if not absent and not self.model.subscribers[channel]:
                self.model.rest(channel, self.clock.now)
        else:
            self.model.open(channel)
            self.model.subscribers[channel] += 1
            self.model.hold(channel)
            (answer,) = self.backplane.subscribe([channel], [place])
            self.held.append([channel])
        if channel in self.model.logs:
            self.model.epochs.setdefault(channel, answer.position.epoch)
        missed = self.ever[channel][before:]
        assert answer.gap or [message.data for message in answer.messages] == missed
        self.lookers += not answer.gap and bool(missed)

    def read(self) -> None:
        channel = self.rng.choice(CHANNELS)
        since = self.since(channel)
        answer = self.backplane.read(channel, since)
        assert (answer is None) == (channel not in self.model.logs)
        if answer is not None:
            self.compare(channel, since, answer)

    def info(self) -> None:
        for channel in CHANNELS:
            info = self.backplane.info(channel)
            assert (info is None) == (channel not in self.model.logs)
            if info is not None:
                assert (info.subscribers, info.position.offset) == (self.model.subscribers[channel], len(self.model.logs[channel]))

    def delete(self) -> None:
        if self.rng.random() < 0.2:
            channel = self.rng.choice(CHANNELS)
            known = channel in self.model.logs
            assert isinstance(self.backplane.delete(channel), ChannelInfo) == known
            assert self.dropped == [channel] * known
            self.dropped.clear()
            self.model.forget(channel)
            self.held = [[name for name in channels if name != channel] for channels in self.held]

    def wait(self) -> None:
        self.clock.now += self.rng.choice([0.1, 1.0, 5.0, 5.0, 31.0])
        if self.rng.random() < 0.7:
            self.expire()

    def expire(self) -> None:
        self.backplane.expire()
        self.model.expire(self.clock.now)

    def step(self) -> None:
        work: list[Callable[[], None]] = [
            self.publish, self.publish, self.publish, self.repeat, self.send, self.subscribe, self.rejoin, self.unsubscribe,
            self.read, self.info, self.delete, self.wait, *[self.look] * 4, *[self.go_on] * 4,
        ]  # fmt: skip
        self.clock.now += 0.001
        self.rng.choice(work)()
        assert_sound(self.backplane, BOUNDS)
        assert set(self.backplane._channels) == set(self.model.logs)
        assert not self.delivered


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_operations_agree_with_a_naive_model_and_leave_nothing_behind(seed: int) -> None:
    run = Run(seed)
    for _ in range(4000):
        run.step()
    assert min(run.conflicts, run.repeats, run.gaps, run.rejoined, 5 * run.lookers) > 20, "the sequence met too little"
    while run.held:
        run.unsubscribe()
    run.clock.now += 1000
    run.expire()
    backplane = run.backplane
    assert backplane._bytes == 0
    assert not (backplane._channels or backplane._warm or backplane._idle or backplane._vacant or backplane._keys)
    assert set(backplane.totals().values()) == {0}


@pytest.mark.parametrize("since", [None, OLDEST, "rejoin"])
def test_who_was_taken_off_before_joining_leaves_a_channel_that_is_forgotten(since: Any) -> None:
    clock = Clock()
    backplane = MemoryBackplane(BOUNDS, clock)
    backplane.attach(lambda messages: None, lambda channel, epoch: None)
    epoch = backplane.subscribe(["a"], [None])[0].position.epoch
    backplane.unsubscribe(["a"])
    assert backplane.count("a", epoch, -1)
    if since == "rejoin":
        backplane.rejoin("a", None)
    else:
        backplane.subscribe(["a"], [since])
    info = backplane.info("a")
    assert info is not None and info.subscribers == 0
    clock.now += BOUNDS.linger
    backplane.expire()
    assert backplane.info("a") is None


def test_expire_forgets_the_aged_messages_of_a_quiet_channel() -> None:
    clock = Clock()
    backplane = MemoryBackplane(BOUNDS, clock)
    backplane.attach(lambda messages: None, lambda channel, epoch: None)
    backplane.subscribe(["a"], [None])
    backplane.publish([Publication("a", b"1")])
    clock.now += BOUNDS.history_age + 1
    backplane.expire()
    assert (backplane._bytes, backplane.totals()["messages_kept"]) == (0, 0)
    assert_sound(backplane, BOUNDS)


def test_deliveries_come_before_the_answer_and_all_of_a_batch_at_once() -> None:
    batches: list[list[bytes]] = []
    backplane = MemoryBackplane()
    backplane.attach(lambda messages: batches.append([message.data for message in messages]), lambda channel, epoch: None)
    backplane.publish([Publication("a", b"1"), Publication("b", b"2")])
    assert batches == [[b"1", b"2"]]
    backplane.send("a,b,c", "message", b"3")
    assert batches == [[b"1", b"2"], [b"3", b"3"]]


def test_epochs_come_from_a_random_source_of_enough_bits() -> None:
    asked: list[int] = []

    def bits(count: int) -> int:
        asked.append(count)
        return len(asked)

    backplane = MemoryBackplane(randbits=bits)
    backplane.attach(lambda messages: None, lambda channel, epoch: None)
    answers = backplane.subscribe(["a", "b"], [None, None])
    assert [answer.position for answer in answers] == [(2, 0), (3, 0)]
    assert asked == [EPOCH_BITS] * 3 == [48] * 3


def test_publish_and_send_under_one_key_are_two_things() -> None:
    backplane = MemoryBackplane()
    backplane.attach(lambda messages: None, lambda channel, epoch: None)
    backplane.publish([Publication("a", b"1", "message", "k")])
    with pytest.raises(Refusal, match="key-conflict"):
        backplane.send("a", "message", b"1", "k")


def test_what_is_past_its_time_is_not_used_even_before_it_is_forgotten() -> None:
    clock = Clock()
    backplane = MemoryBackplane(BOUNDS, clock)
    backplane.attach(lambda messages: None, lambda channel, epoch: None)
    backplane.subscribe(["a"], [None])
    first = Publication("a", b"1", "message", "k")
    backplane.publish([first])
    clock.now += BOUNDS.key_age
    (again,) = backplane.publish([first])
    assert isinstance(again, Receipt)
    assert again.position.offset == 2
    clock.now += BOUNDS.history_age - BOUNDS.key_age + 1  # the first is aged now
    assert backplane.info("a") == ChannelInfo(1, again.position, 1)
    joined = backplane.read("a", OLDEST)
    assert joined is not None
    assert [message.position for message in joined.messages] == [again.position]


def test_each_of_several_channels_has_a_share_of_a_page() -> None:
    backplane = MemoryBackplane(Bounds(), Clock())
    backplane.attach(lambda messages: None, lambda channel, epoch: None)
    backplane.publish([Publication("busy", b"x" * 900) for _ in range(100)])
    backplane.publish([Publication("quiet", b"y" * 900) for _ in range(3)])
    for _ in range(20):
        for channels in (("busy", "quiet"), ("quiet", "busy")):
            page = dict(zip(channels, backplane.peek(channels, ["oldest"] * 2, 20_000), strict=True))
            assert len(page["quiet"].messages) == 3
            assert 10 <= len(page["busy"].messages) <= 17
            assert page["busy"].more == 100 - len(page["busy"].messages)
    tiny = [backplane.peek(("busy", "quiet"), ["oldest"] * 2, 1) for _ in range(50)]
    assert {tuple(len(joined.messages) for joined in page) for page in tiny} == {(1, 0), (0, 1)}, "now the one, now the other"
