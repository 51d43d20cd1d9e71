"""Several workers on one router: order, counts, and what happens when a link breaks, a worker does not read, or
the router ends.

`Service` is a router that a greenlet turns, and workers with a real hub each, all in this process and over real
sockets. A `Reader` is a client that notes what it was sent and checks it against what the router ordered.

Every random choice comes from a seed that stands in the assertion message. More seeds than the usual few:
``COMET_SEEDS=500 pytest tests/test_backplane_router.py``.
"""

import json
import logging
import os
import random
import select
import signal
import socket
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gevent
import msgspec
import pytest
from gevent.event import AsyncResult

from comet import router as router_module
from comet.backplane import frames
from comet.backplane import link as link_module
from comet.backplane.memory import Bounds
from comet.backplane.router import INTEREST, LINGER, RouterBackplane
from comet.errors import Refusal
from comet.framing import LINES, Batch
from comet.hub import Hub
from comet.kernel.processes import waited
from comet.message import Message, Position, Publication, Receipt, Since
from comet.router import Router
from comet.stats import Stats
from comet.subscriber import Subscriber, Wish
from comet.turn import PACE
from tests.contracts.suite import Clock
from tests.harness import TIMEOUT, wait_until

SEEDS = range(int(os.environ.get("COMET_SEEDS", "12")))


class Counting(Router):
    """A router that leaves a truth: what it has ordered, by channel, epoch and offset."""

    def __init__(self, service: "Service", listener: socket.socket) -> None:
        self.service = service
        super().__init__(listener, service.bounds, service.clock)

    def _deliver(self, messages: Sequence[Message]) -> None:
        for message in messages:
            place = self.service.truth[message.channel][message.epoch]
            assert message.offset == len(place) + 1
            place.append(message.data.decode())
            self.service.generation[message.epoch] = len(self.service.routers)
        super()._deliver(messages)

    def _accept(self) -> None:
        super()._accept()
        for one in self.links.values():
            if self.service.narrow:
                one.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


class Worker:
    """A process: its backplane and its hub."""

    def __init__(self, service: "Service") -> None:
        self.backplane = RouterBackplane(service.path, service.timeout, service.clock)
        self.link = self.backplane._link
        self.stats = Stats()
        self.hub = Hub(self.backplane, self.stats, 1 << 20, gevent.get_hub().loop.run_callback)
        self.received: list[frames.Told] = []
        """What came on the link but for answers."""
        told = self.backplane.told

        def note(one: frames.Told) -> None:
            self.received.append(one)
            told(one)

        self.backplane.told = note  # type: ignore[method-assign, assignment]
        self.backplane.start()

    def sever(self) -> None:
        """The link breaks."""
        if self.link._sock is not None:
            self.link._sock.shutdown(socket.SHUT_RDWR)

    def deaf(self, deaf: bool) -> None:
        """Do not read, or read again."""
        if self.link._sock is not None:
            if deaf:
                self.link._readable.stop()
            elif not self.link._readable.active:
                self.link._readable.start(self.link._on_readable)

    def messages(self) -> list[str]:
        """The bodies of what was delivered to this worker."""
        got = []
        for one in self.received:
            if isinstance(one, frames.Deliver):
                got += [item.data.decode() for item in one.items for _ in item.places]
        return got


class Nobody:
    """Has no channels, only a link."""

    def linked(self) -> None:
        """Nothing is to be resumed."""

    def unlinked(self) -> None:
        """Nothing was sure."""

    def ahead(self) -> bytes:
        """No counts have changed."""
        return b""

    def told(self, told: frames.Told) -> None:
        """Nothing should be."""
        raise AssertionError(told)


class Service:
    """A router and its workers. `narrow` sockets hold next to nothing."""

    def __init__(self, folder: Path, workers: int = 2, timeout: float = TIMEOUT, narrow: bool = False, **bounds: Any) -> None:
        self.path = str(folder / "router")
        self.timeout = timeout
        self.narrow = narrow
        self.bounds = Bounds(**bounds)
        self.clock = Clock()
        self.truth: defaultdict[str, defaultdict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
        self.generation: dict[int, int] = {}
        self.routers: list[Counting] = []
        self.turning: Any = None
        self.listener: socket.socket | None = None
        self.open()
        self.workers = [self.work() for _ in range(workers)]

    @property
    def router(self) -> Counting:
        return self.routers[-1]

    def work(self) -> Worker:
        """One worker more."""
        worker = Worker(self)
        if self.listener is not None:
            assert worker.backplane.wait(TIMEOUT)
        return worker

    def open(self) -> None:
        """A router begins."""
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.routers.append(Counting(self, self.listener))
        self.turning = gevent.spawn(self._turn, self.router)

    def _turn(self, router: Router) -> None:
        while True:
            router.turn(0)
            gevent.sleep(0)

    def stop(self) -> None:
        """The router ends."""
        if self.listener is not None:
            self.turning.kill()
            self.router.close()
            self.listener.close()
            os.unlink(self.path)
            self.listener = None

    def restart(self) -> None:
        """Another router comes in its place, and the workers find it."""
        self.stop()
        self.open()
        self.until_ready()

    def until_ready(self) -> None:
        wait_until(lambda: not any(worker.link._sock and not worker.link._readable.active for worker in self.workers))
        wait_until(lambda: len(self.router.links) == len(self.workers) and all(worker.backplane.ready() for worker in self.workers))

    def advance(self, seconds: float) -> None:
        """Time passes, on all clocks."""
        self.clock.now += seconds
        self.router.backplane.expire()
        for worker in self.workers:
            worker.backplane.expire()

    def quiet(self) -> bool:
        """Nothing is under way."""
        return all(
            worker.backplane.ready()
            and not (worker.link._calls or worker.link._late or worker.backplane._changed or worker.backplane._stale)
            and not (worker.link._out or worker.link._rest)
            for worker in self.workers
        ) and not any(one.waiting or one.missed or one.unread for one in self.router.links.values())

    def state(self) -> Any:
        """What is under way, for a message."""
        return [
            (
                one.backplane.ready(),
                one.link._calls,
                one.link._late,
                one.backplane._changed,
                one.backplane._stale,
                one.link._out,
                len(one.link._rest),
            )
            for one in self.workers
        ], [(one.waiting, one.missed, one.unread, one.watched, one in self.router._dirty) for one in self.router.links.values()]

    def check_counts(self) -> None:
        """Wait until nothing is under way: then the router has counted what the workers have."""
        try:
            wait_until(self.quiet)
        except AssertionError:
            raise AssertionError(self.state()) from None
        for worker in self.workers:  # what a link has told before this is behind it
            worker.backplane.totals()
        wait_until(self.quiet)
        known = [{name: (one.count, one.told) for name, one in worker.backplane._channels.items()} for worker in self.workers]
        there = [dict(one.channels) for one in self.router.links.values()]
        for mine in known:
            expected = {name: count for name, (count, told) in mine.items() if count == told}
            assert len(expected) == len(mine), mine
            assert expected in there, (known, there)
            there.remove(expected)
        assert not there, (known, there)
        held: dict[str, int] = defaultdict(int)
        for worker in self.workers:
            held_here = {name: one.count for name, one in worker.backplane._channels.items() if one.count}
            registered = {name: getattr(present, "alive", 1) for name, present in worker.hub._channels.items()}
            assert held_here == registered
            for name, count in held_here.items():
                held[name] += count
        for name in self.router.backplane._channels:
            info = self.router.backplane.info(name)
            assert info is not None
            assert info.subscribers == held[name], name
            lingers = name in self.router.backplane._idle or name in self.router.backplane._vacant
            assert lingers == (not held[name]), name

    def check_empty(self) -> None:
        """All have left: after the linger times nothing is left anywhere."""
        self.check_counts()
        for worker in self.workers:
            assert not worker.hub._channels
        self.advance(LINGER + 1)
        self.check_counts()
        for worker in self.workers:
            assert not worker.backplane._channels
            assert not worker.backplane._resting
            assert worker.link._asked == 0
        assert not any(one.channels for one in self.router.links.values())
        assert not self.router._interest
        self.advance(10_000)
        assert self.router.backplane.totals() == {"channels": 0, "messages_kept": 0, "history_bytes": 0, "idempotency_keys": 0}

    def close(self) -> None:
        for worker in self.workers:
            worker.backplane.close()
        self.stop()


class Reader:
    """A client of `worker`, on `channels`; in whatever state it is, `got` is checked as it comes: each
    message once, in order, as the router ordered it, and a gap only where something is gone.

    `gaps` has for each gap the channels that went on elsewhere."""

    def __init__(self, service: Service, worker: Worker, channels: Sequence[str]) -> None:
        self.service = service
        self.worker = worker
        self.channels = channels
        self.stands: dict[str, Position] = {}
        self.got: list[str] = []
        self.gaps: list[dict[str, tuple[Position, Position]]] = []
        self.subscriber: Subscriber | None = None
        self.greenlet: Any = None
        self.ended: list[str] = []
        self.told = 0

    # -- coming and going

    def join(self, since: Sequence[Since] | None = None, asleep: bool = True) -> "Reader":
        """Subscribe, from where it stands unless `since` says otherwise."""
        stands = [self.stands.get(channel) for channel in self.channels]
        wish = Wish(self.channels, stands if since is None else since, LINES, None)
        subscriber = self.worker.hub.subscribe_asleep(wish, self) if asleep else None
        if subscriber is not None:
            self._begin(wish, subscriber)
        elif not asleep or not self._join_soon(wish):
            self._begin(wish, self.worker.hub.subscribe(wish))
        return self

    def _join_soon(self, wish: Wish) -> bool:
        """As the server does for who has no greenlet; here one waits for it, and may be killed."""
        answer: AsyncResult[None] = AsyncResult()
        waits = True

        def done(subscriber: Subscriber) -> None:
            if waits:
                self._begin(wish, subscriber)
                answer.set()
            else:
                subscriber.close()

        if not self.worker.hub.subscribe_soon(wish, self, done, answer.set_exception):
            return False
        try:
            answer.get()
        finally:
            waits = False
        return True

    def _begin(self, wish: Wish, subscriber: Subscriber) -> None:
        self.subscriber = subscriber
        for channel, since_there, begin in zip(self.channels, wish.since, subscriber.cursor.positions, strict=True):
            if not isinstance(since_there, Position):
                self.stands[channel] = begin
        if subscriber.host is not self:
            self.greenlet = gevent.spawn(self._run, subscriber)

    def leave(self) -> None:
        """Hang up."""
        subscriber, self.subscriber = self.subscriber, None
        if subscriber is not None:
            subscriber.close()
        if self.greenlet is not None:
            self.greenlet.kill(block=False)
            self.greenlet = None

    def _run(self, subscriber: Subscriber) -> None:
        awake = subscriber.awake
        while items := awake.take(subscriber, None):
            for piece in subscriber.encode(items):
                self._note(json.loads(piece))
        if subscriber.host is not awake:
            return  # it sleeps, or has left
        self.ended.append(awake.reason or "")
        subscriber.close()
        self.subscriber = None
        self.greenlet = None

    def doze(self) -> None:
        """Sleep, if nothing waits."""
        subscriber = self.subscriber
        if subscriber is not None and subscriber.host is not self and subscriber.awake.quiet:
            self.greenlet.kill(block=False)
            self.greenlet = None
            subscriber.sleep(self, 1)

    # -- as its host while it sleeps: what the parking does, without a socket

    def deliver(self, subscriber: Subscriber, batch: Batch) -> None:
        epoch, offset = subscriber.cursor.at(batch.channel)
        if epoch == batch.epoch and batch.before <= offset:
            for piece in subscriber.encode(batch.messages[offset - batch.before :]):
                if piece != LINES.heartbeat:
                    self._note(json.loads(piece))
        else:
            subscriber.wake(None)
            self.greenlet = gevent.spawn(self._run, subscriber)
            subscriber.deliver(batch)

    def skip(self, subscriber: Subscriber, places: Mapping[str, Position]) -> None:
        for piece in subscriber.gap(places):
            self._note(json.loads(piece))

    def end(self, subscriber: Subscriber, reason: str) -> None:
        self.ended.append(reason)
        self.subscriber = None
        subscriber.close(reason)

    # -- what it was sent

    def _note(self, line: dict[str, Any]) -> None:
        if "gap" in line:
            places = [Position(int(epoch, 16), int(offset)) for epoch, offset in (one.split("-") for one in line["cursor"].split("."))]
            moved = {}
            for channel, place in zip(self.channels, places, strict=True):
                stood = self.stands[channel]
                if stood != place:
                    moved[channel] = (stood, place)
                    assert stood.epoch != place.epoch or place.offset > stood.offset, ("back", moved)
            assert moved, ("a gap, and nothing is gone", self.channels, self.stands, self.gaps)
            self.stands.update(zip(self.channels, places, strict=True))
            self.gaps.append(moved)
            self.got.append("GAP")
            return
        channel = line["channel"]
        epoch, offset = int(line["id"].split("-")[0], 16), int(line["id"].split("-")[1])
        stood = self.stands[channel]
        assert (epoch, offset) == (stood.epoch, stood.offset + 1), ("not the next one", channel, stood, (epoch, offset), self.got[-5:])
        assert self.service.truth[channel][epoch][offset - 1] == line["data"]
        self.stands[channel] = Position(epoch, offset)
        self.got.append(line["data"])

    def at_head(self) -> bool:
        """It has all that there is of its channels."""
        channels = self.service.router.backplane._channels
        return all(
            channel in channels and self.service.router.backplane._open(channel).position == self.stands.get(channel)
            for channel in self.channels
        )


@pytest.fixture
def opened() -> Iterator[list[Service]]:
    services: list[Service] = []
    yield services
    for service in services:
        service.close()


Open = Callable[..., Service]


@pytest.fixture
def start(tmp_path: Path, opened: list[Service], crashes: list[Any]) -> Open:
    """Start a service with bounds and workers of its own."""

    def begin(**options: Any) -> Service:
        folder = tmp_path / str(len(opened))
        folder.mkdir()
        opened.append(Service(folder, **options))
        return opened[-1]

    return begin


@pytest.fixture
def crashes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[list[Any]]:
    """Exceptions that ended a greenlet or a link; there must be none."""
    caught: list[Any] = []
    monkeypatch.setattr(
        gevent.get_hub(), "handle_error", lambda context, kind, error, trace: caught.append("".join(traceback.format_exception(error)))
    )
    yield caught
    assert not caught, "".join(caught)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


# -- anything may happen


class Chaos:
    """A random history of one service."""

    def __init__(self, service: Service, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.service = service
        self.rng = random.Random(seed)
        self.names = [f"c{number}" for number in range(self.rng.choice((1, 2, 6)))]
        self.readers: list[Reader] = []
        self.busy: list[Any] = []
        self.count = 0
        self.breaking = self.rng.random() < 0.7
        self.forgetting = self.rng.random() < 0.5
        self.padding = "x" * self.rng.choice((1, 300))

    def spawn(self, what: Callable[..., Any], *arguments: Any) -> None:
        """Do this in a greenlet of its own; what the router can't do is said, not lost."""

        def run() -> None:
            try:
                what(*arguments)
            except Refusal as refusal:
                assert refusal.slug in ("backplane-away", "backplane-busy", "unconfirmed"), refusal

        self.busy = [one for one in self.busy if not one.dead]
        self.busy.append(gevent.spawn(run))

    def step(self) -> None:
        rng = self.rng
        worker = rng.choice(self.service.workers)
        some = rng.sample(self.names, rng.randrange(1, min(4, len(self.names) + 1)))
        idle = [one for one in self.readers if one.subscriber is None and one not in self.coming]
        here = [one for one in self.readers if one.subscriber is not None]
        what = rng.random()
        if what < 0.1 and len(self.readers) < 12:
            reader = Reader(self.service, worker, some)
            self.readers.append(reader)
            self.come(reader)
        elif what < 0.25 and idle:
            reader = rng.choice(idle)
            reader.worker = worker  # perhaps another one
            self.come(reader)
        elif what < 0.35 and here:
            rng.choice(here).leave()
        elif what < 0.42 and here:
            rng.choice(here).doze()
        elif what < 0.68:
            self.spawn(self.publish, worker, some, rng.randrange(1, 6))
        elif what < 0.76:
            self.spawn(worker.hub.send, some, "message", self.body(), None)
        elif what < 0.79:
            self.spawn(worker.hub.info, some[0])
            self.spawn(worker.hub.read, some[0], "oldest", 3)
        elif what < 0.82 and self.forgetting:
            self.spawn(worker.hub.delete, some[0])
        elif what < 0.86 and self.forgetting:
            self.service.advance(rng.choice((0.5, 3, 20)))
        elif what < 0.92:
            worker.deaf(rng.random() < 0.5)
        elif what < 0.94 and self.coming:
            rng.choice(list(self.coming.values())).kill(block=False)
        elif what < 0.97 and self.breaking:
            if rng.random() < 0.5:
                worker.sever()
            elif self.service.router.links:
                self.service.router._end(rng.choice(list(self.service.router.links.values())))
        elif self.breaking and what < 0.985:
            self.service.stop()
            gevent.sleep(rng.choice((0, 0.001, 0.01)))
            self.service.open()

    coming: dict[Reader, Any]

    def come(self, reader: Reader) -> None:
        since: list[Since] | None = None
        if not reader.stands:
            since = [self.rng.choice((None, "oldest"))] * len(reader.channels)
        asleep = self.rng.random() < 0.6

        def run() -> None:
            try:
                reader.join(since, asleep)
            except Refusal as refusal:
                assert refusal.slug in ("backplane-away", "backplane-busy"), refusal

        self.coming[reader] = greenlet = gevent.spawn(run)
        greenlet.rawlink(lambda _: self.coming.pop(reader, None))  # where it was killed before it began

    def body(self) -> bytes:
        self.count += 1
        return f"{self.count}{self.padding}".encode()

    def publish(self, worker: Worker, channels: Sequence[str], count: int) -> None:
        batch = [Publication(self.rng.choice(channels), self.body()) for _ in range(count)]
        for publication, answer in zip(batch, worker.hub.publish(batch), strict=True):
            assert isinstance(answer, Receipt)
            epoch, offset = answer.position
            assert self.service.truth[publication.channel][epoch][offset - 1] == publication.data.decode()

    def run(self, steps: int) -> None:
        self.coming = {}
        for _ in range(steps):
            self.step()
            pause = self.rng.random()
            if pause < 0.7:
                gevent.sleep(0 if pause < 0.4 else 0.001)
        self.settle()

    def settle(self) -> None:
        """Let all be well again: each who is there gets all there is, and counts are right."""
        service = self.service
        for worker in service.workers:
            worker.deaf(False)
        service.until_ready()
        gevent.joinall([*self.busy, *self.coming.values()], timeout=TIMEOUT, raise_error=True)
        for name in self.names:
            service.workers[0].hub.publish([Publication(name, b"last")])
        here = [one for one in self.readers if one.subscriber is not None]
        wait_until(lambda: all(one.at_head() or one.subscriber is None for one in here))
        for one in here:
            assert one.subscriber is not None or one.ended[-1] in ("deleted",), one.ended
        service.check_counts()
        for one in self.readers:
            self.check_gaps(one)
            one.leave()
        service.check_empty()

    def check_gaps(self, reader: Reader) -> None:
        """One gap at most for each router that came; and what was kept was not skipped."""
        generation = self.service.generation
        seen: set[int] = set()
        for moved in reader.gaps:
            born = set()
            for channel, (stood, place) in moved.items():
                kept = max(0, len(self.service.truth[channel][place.epoch]) - self.service.bounds.history_size)
                assert place.offset <= kept, ("what was kept was skipped", channel, place, kept)
                if stood.epoch != place.epoch and generation.get(stood.epoch, 0) < generation.get(place.epoch, 0):
                    born.add(generation[place.epoch])
            if not self.forgetting and len(born & seen):
                raise AssertionError(("more than one gap for one router", reader.channels, reader.gaps))
            seen |= born


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_nothing_is_lost_in_silence_and_the_counts_are_right(
    start: Open, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    if rng.random() < 0.5:
        monkeypatch.setattr(router_module, "MAX_WAITING", rng.choice((300, 3000)))
    service = start(
        workers=rng.choice((1, 2, 3)),
        narrow=rng.random() < 0.7,
        history_size=rng.choice((3, 10, 10_000)),
        linger=rng.choice((1.0, 60.0)),
        history_age=1e9,
    )
    try:
        Chaos(service, seed, monkeypatch).run(rng.choice((30, 120, 200)))
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


# -- two workers


def publish(worker: Worker, channel: str, *bodies: str) -> list[int]:
    """The counts of the receipts."""
    answers = worker.hub.publish([Publication(channel, body.encode()) for body in bodies])
    return [answer.subscribers for answer in answers if isinstance(answer, Receipt)]


def slug(what: Callable[..., Any], *arguments: Any) -> str | None:
    """What it is refused for."""
    try:
        what(*arguments)
    except Refusal as refusal:
        return refusal.slug
    return None


def subscribers(worker: Worker, channel: str) -> int | None:
    info = worker.hub.info(channel)
    return None if info is None else info.subscribers


def test_all_workers_see_the_same_order_and_only_what_they_are_logged_in_to(start: Open) -> None:
    service = start(workers=3)
    one, two, three = service.workers
    readers = [Reader(service, worker, ["a"]).join() for worker in (one, two)]
    Reader(service, three, ["b"]).join()
    greenlets = [
        gevent.spawn(publish, worker, "a", f"{worker_name}.{number}")
        for number in range(20)
        for worker_name, worker in enumerate(service.workers)
    ]
    gevent.joinall(greenlets, raise_error=True)
    wait_until(lambda: all(len(reader.got) == 60 for reader in readers))
    assert readers[0].got == readers[1].got
    assert three.messages() == []


def test_a_send_to_many_feeds_of_one_worker_is_one_frame(start: Open) -> None:
    service = start()
    one, two = service.workers
    readers = [Reader(service, two, [f"user:{number}"]).join() for number in range(50)]
    sent = one.hub.send(",".join(f"user:{number}" for number in range(60)), "message", b"hello", None)
    assert (sent.targets, sent.delivered) == (60, 50)
    wait_until(lambda: all(reader.got == ["hello"] for reader in readers))
    (told,) = two.received
    assert isinstance(told, frames.Deliver)
    assert [len(item.places) for item in told.items] == [50]
    assert not one.received


def test_a_long_answer_is_read_without_rests(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "router"))
    listener.listen()
    pid = os.fork()  # a router of its own process: turned by this loop it would have the loop turn as well
    if not pid:
        sock, _ = listener.accept()
        while True:
            for body in frames.Cutter().feed(sock.recv(1 << 16)):
                kind, call = msgspec.msgpack.decode(body)
                if kind:  # else it greets
                    sock.sendall(frames.frame(frames.Answer(call, msgspec.Raw(frames.encode({"x" * 2_000_000: 1})))))
    link = link_module.Link(str(tmp_path / "router"), TIMEOUT, Nobody())
    PACE.rest(0.3)
    try:
        link.start()
        began = time.monotonic() - waited()
        for _ in range(3):
            assert len(next(iter(link.ask(frames.Totals, msgspec.msgpack.decode)))) == 2_000_000
        took = time.monotonic() - waited() - began
    finally:
        PACE.rest(0.0)
        link.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        listener.close()
    assert took < 6.0  # a rest each, and no more; with one for each 64 KiB it takes twelve seconds


def test_receipts_count_the_subscribers_of_all_workers(start: Open) -> None:
    service = start()
    one, two = service.workers
    readers = [Reader(service, worker, ["a"]).join() for worker in (one, two, two)]
    service.check_counts()
    assert publish(one, "a", "1") == [3]
    two.sever()
    wait_until(lambda: not two.backplane.ready())
    service.until_ready()
    assert publish(one, "a", "2") == [3]
    readers[2].leave()
    two.backplane.totals()  # a call goes behind what was told before
    assert publish(one, "a", "3") == [2]
    two.backplane.close()  # the worker ends
    service.workers.remove(two)
    wait_until(lambda: len(service.router.links) == 1)
    assert publish(one, "a", "4") == [1]
    wait_until(lambda: readers[0].got == ["1", "2", "3", "4"])


def test_a_poll_that_ends_and_the_next_one_cancel_out(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    service = start(workers=1)
    (worker,) = service.workers
    reader = Reader(service, worker, ["a"]).join()
    asked: list[Any] = []
    count = service.router._handle[frames.Interest]
    monkeypatch.setitem(service.router._handle, frames.Interest, lambda one, what: (asked.append(what), count(one, what)))  # type: ignore[func-returns-value]
    for _ in range(4):  # whenever it is: the time for it begins anew
        for _ in range(50):
            reader.leave()
            reader.join()
        reader.leave()
        gevent.sleep(INTEREST / 5)
        reader.join()
        gevent.sleep(2 * INTEREST)
    assert not asked
    reader.leave()
    wait_until(lambda: subscribers(worker, "a") == 0)
    assert [what.changes[0][2] for what in asked] == [-1]
    service.check_empty()


# -- another router


def state_of(service: Service, worker: Worker, state: str) -> Reader:
    """A reader of "a", and perhaps "b", as it is when the router goes."""
    reader = Reader(service, worker, ["a", "b"] if "several" in state else ["a"])
    if state.endswith("asleep"):
        reader.join()
        reader.doze()
        return reader
    reader.join(asleep=False)
    return reader


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("state", ["asleep", "awake", "several asleep", "several awake", "one of many"])
def test_a_new_router_is_one_gap_and_then_everything(start: Open, state: str, before: int) -> None:
    service = start()
    one, two = service.workers
    reader = state_of(service, one, state)
    others = [Reader(service, two, ["a"]).join() for _ in range(40 if state == "one of many" else 1)]
    for number in range(before):
        publish(two, "a", f"old {number}")
        publish(two, "b", f"old b {number}")
    mine = before * (2 if "several" in state else 1)
    wait_until(lambda: len(reader.got) == mine)
    service.restart()
    assert publish(two, "a", "1", "2") == [1 + len(others)] * 2
    wait_until(lambda: reader.got[mine:] == ["GAP", "1", "2"])
    wait_until(lambda: all(other.got[before:] == ["GAP", "1", "2"] for other in others))
    publish(one, "a", "3")
    wait_until(lambda: all(other.got[before:] == ["GAP", "1", "2", "3"] for other in others))
    for one_reader in (reader, *others):
        one_reader.leave()
    service.check_empty()


def test_messages_pending_in_a_sweep_come_before_the_gap(start: Open) -> None:
    service = start()
    one, two = service.workers
    readers = [Reader(service, one, ["a"]).join() for _ in range(60)]
    held: list[Callable[[], None]] = []
    one.hub._fanout._schedule = held.append
    publish(two, "a", "1", "2")
    wait_until(lambda: held)
    assert not any(reader.got for reader in readers)
    service.restart()
    publish(two, "a", "3")
    wait_until(lambda: one.hub._fanout._pending)
    one.hub._fanout._schedule = gevent.get_hub().loop.run_callback
    for sweep in held:
        sweep()
    publish(two, "a", "4")
    wait_until(lambda: all(reader.got[-1:] == ["4"] for reader in readers))
    assert {tuple(reader.got) for reader in readers} == {("1", "2", "GAP", "3", "4")}


@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize("since", [None, "cursor"])
def test_who_is_joining_as_the_router_goes_is_answered_by_the_next_one(
    start: Open, since: str | None, asleep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = start()
    one, _ = service.workers
    holder = Reader(service, one, ["a"]).join()
    publish(one, "a", "1")
    wait_until(lambda: holder.got)
    service.turning.kill()  # asked, and never answered
    reader = Reader(service, one, ["a"])
    if since is not None:
        reader.stands = dict(holder.stands)
    monkeypatch.setattr(one.backplane, "rejoin", lambda *_: None)  # so that it can't be done at once
    joining = gevent.spawn(reader.join, asleep=asleep)
    reading = gevent.spawn(one.hub.read, "a", "oldest", 10)
    gevent.sleep(0.01)
    service.restart()
    joining.get(timeout=TIMEOUT)
    assert reading.get(timeout=TIMEOUT).messages == []
    publish(one, "a", "2")
    wait_until(lambda: reader.got == (["2"] if since is None else ["GAP", "2"]))
    wait_until(lambda: holder.got == ["1", "GAP", "2"])
    service.check_counts()


@pytest.mark.parametrize("channels", [["a"], ["a", "b"]])
def test_who_reads_history_as_the_router_goes_is_told_one_gap(start: Open, channels: list[str]) -> None:
    service = start()
    one, two = service.workers
    reader = Reader(service, one, channels).join(asleep=False)
    assert reader.subscriber is not None
    publish(two, "a", "1", "2")
    wait_until(lambda: len(reader.got) == 2)
    service.turning.kill()
    head = reader.stands["a"]
    # as if deliveries 3 and 4 had been let go by a sweep: the next one makes it read
    reader.subscriber.deliver(Batch([Message("a", Position(head.epoch, 5), "message", b"5")]))
    wait_until(lambda: one.link._calls)
    service.restart()
    publish(two, "a", "6")
    wait_until(lambda: reader.got == ["1", "2", "GAP", "6"])
    publish(two, "a", "7")
    wait_until(lambda: reader.got == ["1", "2", "GAP", "6", "7"])


def test_publications_under_way_are_unconfirmed_and_those_not_sent_yet_are_published(start: Open) -> None:
    service = start()
    one, two = service.workers
    reader = Reader(service, two, ["a"]).join()
    service.turning.kill()
    sent = [gevent.spawn(slug, publish, one, "a", "lost"), gevent.spawn(slug, one.hub.send, ["a"], "message", b"lost", None)]
    gevent.sleep(0.01)
    service.stop()
    assert [greenlet.get(timeout=TIMEOUT) for greenlet in sent] == ["unconfirmed"] * 2
    wait_until(lambda: not one.backplane.ready())
    later = gevent.spawn(publish, one, "a", "1")
    gevent.sleep(0.01)
    service.open()
    later.get(timeout=TIMEOUT)
    service.until_ready()
    wait_until(lambda: reader.at_head())
    assert [body for body in reader.got if body != "GAP"] == ["1"]
    assert reader.got.count("GAP") == 1


def test_very_many_channels_are_whole_again_for_less_work_than_it_took_to_join_them(start: Open) -> None:
    """Two seconds on a machine of its own. What this process has of a core is compared, since others may have the most of it."""
    service = start()
    readers = [Reader(service, worker, [f"c{index}.{number}"]) for index, worker in enumerate(service.workers) for number in range(15_000)]
    joining = time.process_time()
    for start_at in range(0, len(readers), 5000):
        gevent.joinall([gevent.spawn(reader.join, (None,)) for reader in readers[start_at : start_at + 5000]], raise_error=True)
    joining = time.process_time() - joining
    for reader in readers:
        reader.doze()
    took: list[float] = []
    while not took or (took[-1] > joining / 2 and len(took) < 3):  # others use this machine's caches as well
        service.stop()
        wait_until(lambda: not any(worker.backplane.ready() for worker in service.workers))
        began = time.process_time()
        service.open()
        service.until_ready()
        wait_until(lambda: all(reader.got == ["GAP"] * (len(took) + 1) for reader in readers))
        took.append(time.process_time() - began)
    assert min(took) < 0.75 * joining, (took, joining)
    assert publish(service.workers[0], "c1.77", "1") == [1]
    wait_until(lambda: readers[15_077].got == [*["GAP"] * len(took), "1"])


# -- a worker that does not read


@pytest.mark.parametrize("kept", [10_000, 5])
def test_a_worker_that_does_not_read_costs_bounded_memory_and_makes_good_what_it_missed(
    start: Open, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_module, "MAX_WAITING", 20_000)
    service = start(narrow=True, history_size=kept)
    one, two = service.workers
    readers = [Reader(service, two, [channel]).join() for channel in "ab"]
    quick = Reader(service, one, ["a"]).join()
    two.deaf(True)
    most = 0
    for number in range(200):
        publish(one, "a", f"{number} {'x' * 500}")
        if number % 3 == 0:
            one.hub.send("a,b", "message", b"to both", None)
        most = max(most, *(link.waiting for link in service.router.links.values()))
    assert most < 22_000
    two.deaf(False)
    for number in range(50):
        publish(one, "a", f"more {number}")
        gevent.sleep(0)
    wait_until(lambda: all(reader.at_head() for reader in (*readers, quick)))
    assert any(isinstance(told, frames.Missed) for told in two.received)
    gaps = [reader.got.count("GAP") for reader in readers]
    assert (gaps == [0, 0]) if kept > 1000 else (gaps[0] >= 1)
    assert "GAP" not in quick.got
    service.check_counts()


def test_who_joins_after_the_loss_and_before_it_is_told_has_lost_nothing(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "MAX_WAITING", 2000)
    service = start(narrow=True, history_size=5)
    one, two = service.workers
    early = Reader(service, two, ["a"]).join()
    two.deaf(True)
    for number in range(100):
        publish(one, "a", f"{number} {'x' * 500}")
    late = Reader(service, two, ["a"])
    joining = gevent.spawn(late.join, ("oldest",), False)
    gevent.sleep(0.01)
    two.deaf(False)
    joining.get(timeout=TIMEOUT)
    publish(one, "a", "last")
    wait_until(lambda: early.at_head() and late.at_head())
    assert early.got.count("GAP") == 1
    assert "GAP" not in late.got


# -- channels that go


def test_a_channel_that_lapses_under_a_rejoin_is_a_gap_and_counts_right(start: Open) -> None:
    service = start(linger=1.0)
    one, two = service.workers
    reader = Reader(service, one, ["a"]).join()
    publish(two, "a", "1")
    wait_until(lambda: reader.got)
    reader.leave()
    service.check_counts()
    reader.join()  # of which the router does not know yet
    assert reader.subscriber is not None and reader.subscriber.host is reader
    service.clock.now += 2
    service.router.backplane.expire()
    publish(two, "a", "2")
    wait_until(lambda: reader.got[1:] == ["GAP", "2"])
    service.check_counts()
    assert subscribers(two, "a") == 1
    reader.leave()
    service.check_empty()


ORDERS = ["delete", "lapse", "break", "rejoin", "subscribe", "leave", "logout", "miss"]


@pytest.mark.parametrize("seed", range(60))
def test_counts_are_right_whatever_is_under_way_together(start: Open, seed: int) -> None:
    """Things happen at once on both ends of a link before either hears of the other."""
    rng = random.Random(seed)
    service = start(workers=1, linger=1.0)
    (worker,) = service.workers
    readers = [Reader(service, worker, ["a"]) for _ in range(4)]
    for reader in readers[:2]:
        reader.join()
    busy: list[Any] = []
    try:
        for _ in range(30):
            what = rng.choice(ORDERS)
            here = [reader for reader in readers if reader.subscriber is not None]
            away = [reader for reader in readers if reader.subscriber is None and reader not in [who for who, one in busy if not one.dead]]
            if what == "delete":
                service.router.backplane.delete("a")
            elif what == "lapse":
                service.clock.now += 2
                service.router.backplane.expire()
            elif what == "break" and rng.random() < 0.3:
                worker.sever()
            elif what in ("rejoin", "subscribe") and away:
                reader = rng.choice(away)
                since = None if reader.stands else ["oldest"]
                busy.append((reader, gevent.spawn(reader.join, since, what == "rejoin")))
                if rng.random() < 0.5:
                    gevent.sleep(0)
                if rng.random() < 0.2:
                    busy[-1][1].kill(block=False)
            elif what == "leave" and here:
                rng.choice(here).leave()
            elif what == "logout":
                service.clock.now += LINGER + 1
                worker.backplane.expire()
            elif what == "miss":
                for one in service.router.links.values():
                    if "a" in one.channels:
                        one.missed["a"] = None
                        service.router._dirty.add(one)
            if rng.random() < 0.4:
                gevent.sleep(rng.choice((0, 0, 0.001)))
        service.until_ready()
        gevent.joinall([one for _, one in busy], timeout=TIMEOUT, raise_error=True)
        service.check_counts()
        for reader in readers:
            reader.leave()
        service.check_empty()
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise


# -- calls


class Other:
    """The frames of another version of the code."""

    VERSION = "1-0123456789abcdef"

    def __getattr__(self, name: str) -> Any:
        return getattr(frames, name)


def test_a_worker_of_another_version_is_not_ready_until_there_is_a_router_of_its_own(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    service = start(workers=0)
    with monkeypatch.context() as other:
        other.setattr(link_module, "frames", Other())
        worker = Worker(service)
        service.workers.append(worker)
        began = time.monotonic()
        assert not worker.backplane.wait(TIMEOUT)
        assert time.monotonic() - began < TIMEOUT, "it knows before its time is over"
        assert worker.link.foreign.is_set()
    wait_until(worker.backplane.ready)
    assert not worker.link.foreign.is_set()
    publish(worker, "a", "1")


def test_a_router_that_does_not_answer_is_away_and_its_late_answers_leave_nothing(start: Open) -> None:
    service = start(timeout=0.3)
    one, two = service.workers
    service.turning.kill()
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: publish(one, "a", "1"), "unconfirmed"),
        (lambda: one.hub.send("a", "message", b"1", None), "unconfirmed"),
        (lambda: Reader(service, one, ["a", "b"]).join((None, None)), "backplane-away"),
        (lambda: Reader(service, one, ["a"]).join((None,), asleep=True), "backplane-away"),
        (lambda: one.hub.info("a"), "backplane-away"),
        (lambda: one.hub.read("a", "oldest", 1), "backplane-away"),
        (lambda: one.hub.delete("c"), "backplane-away"),
        (lambda: one.hub.totals(), "backplane-away"),
    ]
    for call, reason in calls:
        with pytest.raises(Refusal, match=reason):
            call()
    assert len(one.link._late) == 8
    service.turning = gevent.spawn(service._turn, service.router)
    service.check_counts()
    assert not one.hub._channels
    assert subscribers(two, "a") == subscribers(two, "b") == 0
    service.check_empty()


def test_a_link_that_is_closed_leaves_nobody_waiting(start: Open) -> None:
    service = start(timeout=60.0)
    one, _ = service.workers
    service.turning.kill()
    calls = [
        gevent.spawn(slug, one.hub.info, "a"),
        gevent.spawn(slug, publish, one, "a", "1"),
        gevent.spawn(slug, Reader(service, one, ["a"]).join),
    ]
    gevent.sleep(0.01)
    one.link.close()
    assert [call.get(timeout=TIMEOUT) for call in calls] == ["backplane-away", "unconfirmed", "backplane-away"]
    assert not (one.link._calls or one.link._late or one.link._asked)


def test_what_nobody_waits_for_is_not_asked_again(start: Open) -> None:
    service = start(timeout=0.5)
    one, _ = service.workers
    service.turning.kill()
    for asleep in (True, False):
        with pytest.raises(Refusal, match="backplane-away"):
            Reader(service, one, ["a"]).join((None,), asleep)
    service.restart()
    assert not (one.link._calls or one.link._late)
    assert subscribers(one, "a") is None
    service.stop()
    wait_until(lambda: not one.backplane.ready())
    for call in (lambda: publish(one, "a", "1"), lambda: one.hub.info("a"), lambda: Reader(service, one, ["a"]).join((None,))):
        with pytest.raises(Refusal, match="backplane-away"):  # it was never sent
            call()
    assert not (one.link._calls or one.link._late)
    assert one.link._asked == 0
    service.open()
    service.until_ready()
    assert subscribers(one, "a") is None
    service.check_empty()


def test_beyond_the_bound_calls_are_refused(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_WAITING", 10_000)
    service = start(timeout=0.5)
    one, _ = service.workers
    service.turning.kill()
    calls = [gevent.spawn(slug, publish, one, "a", "x" * 1000) for _ in range(30)]
    assert [call.get(timeout=TIMEOUT) for call in calls] == ["unconfirmed"] * 10 + ["backplane-busy"] * 20
    service.turning = gevent.spawn(service._turn, service.router)
    wait_until(lambda: not (one.link._calls or one.link._late))
    assert publish(one, "a", "1") == [0]
    service.check_empty()


@pytest.mark.parametrize("moment", range(12))
def test_a_greenlet_that_is_killed_while_it_joins_leaves_no_count(start: Open, moment: int) -> None:
    service = start()
    one, two = service.workers
    holder = Reader(service, one, ["b"]).join()
    joining = gevent.spawn(Reader(service, one, ["a", "b"]).join, (None, None))
    for _ in range(moment):
        gevent.sleep(0)
    reader_there = joining.dead
    joining.kill()
    service.check_counts()
    if (not reader_there and joining.value is None) or isinstance(joining.value, gevent.GreenletExit):
        assert not subscribers(two, "a")
        assert subscribers(two, "b") == 1
        holder.leave()
        service.check_empty()


def test_a_router_that_speaks_nonsense_is_left_and_found_again(start: Open, caplog: pytest.LogCaptureFixture) -> None:
    service = start()
    one, two = service.workers
    reader = Reader(service, one, ["a"]).join()
    for nonsense in (b"\x01\x00\x00\x00\xc1", b"\xff" * 8, b"\x00\x00\x00\x00", b"\x02\x00\x00\x00\x92\x63"):
        for sock in [link.sock for link in service.router.links.values()]:
            sock.send(nonsense)
        wait_until(lambda: not one.backplane.ready())
        service.until_ready()
    publish(two, "a", "1")
    wait_until(lambda: reader.got == ["1"])
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 8
    caplog.clear()


def test_a_worker_without_a_descriptor_for_its_link_tries_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = [OSError(24, "Too many open files")] * 3
    make = socket.socket

    def short(*arguments: Any, **more: Any) -> Any:
        if refused:
            raise refused.pop()
        return make(*arguments, **more)

    monkeypatch.setattr(socket, "socket", short)
    listener = make(socket.AF_UNIX)
    listener.bind(str(tmp_path / "router"))
    listener.listen()
    link = link_module.Link(str(tmp_path / "router"), TIMEOUT, Nobody())
    link.start()
    wait_until(lambda: not refused)
    listener.setblocking(False)
    wait_until(lambda: select.select([listener], [], [], 0)[0])
    accepted = listener.accept()[0]
    link.close()
    accepted.close()
    listener.close()
