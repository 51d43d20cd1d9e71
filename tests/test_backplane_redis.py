"""Several workers on a real Redis: order, counts, and what happens when a connection breaks or freezes, messages are
dropped, Redis ends, forgets, is rewound, full, or does not let us in.

`Service` is a redis-server and workers with a real hub each, whose connections go through a `Proxy` each; all but Redis
in this process. Clients are the `Reader` of the router's tests, which checks what it is sent.

More seeds than the usual few: ``COMET_SEEDS=100 pytest tests/test_backplane_redis.py``.
"""

import itertools
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.server import StreamServer
from redis.crc import key_slot

from comet.backplane import redis_calls, redis_following, redis_lease
from comet.backplane.memory import Bounds
from comet.backplane.redis import RedisBackplane
from comet.backplane.redis_dial import Denied, read
from comet.backplane.redis_format import piece
from comet.backplane.redis_malformed import QUIET, Garbage
from comet.backplane.redis_outage import MOST, Outage
from comet.errors import Refusal
from comet.history import Joined
from comet.hub import Hub
from comet.message import Position, Publication, Receipt
from comet.settings import Settings
from comet.stats import Stats
from comet.subscriptions_redis import RedisSubscriptions, connect
from tests.harness import AMPLE, TIMEOUT, Server, free_port, wait_until
from tests.redis_server import RedisServer, needs_redis, redis_cluster, redis_server
from tests.test_backplane_router import Reader

pytestmark = needs_redis

SEEDS = range(int(os.environ.get("COMET_SEEDS", "6")))

SILENCE = 0.6
"""Seconds that Redis may be silent in tests in which it is, so that they do not take long."""


class Proxy:
    """Between a worker and Redis."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._pairs: list[tuple[Any, Any]] = []
        self.frozen = gevent.event.Event()
        self.frozen.set()  # it flows
        self.refusing = False
        self.delay = 0.0
        """Seconds that it takes, each way."""
        self._server = StreamServer(("127.0.0.1", 0), self._serve)
        self._server.start()
        self.port: int = self._server.server_port

    def _serve(self, near: Any, address: Any) -> None:
        try:
            if self.refusing:
                raise ConnectionRefusedError
            far = socket.create_connection(("127.0.0.1", self._port))
        except OSError:
            near.close()
            return
        pair = near, far
        self._pairs.append(pair)
        gevent.joinall([gevent.spawn(self._pump, near, far), gevent.spawn(self._pump, far, near)])
        self._pairs.remove(pair)
        for one in pair:
            one.close()

    def _pump(self, source: Any, target: Any) -> None:
        try:
            while data := source.recv(1 << 16):
                self.frozen.wait()
                if self.delay:
                    gevent.sleep(self.delay)
                target.sendall(data)
        except OSError:
            pass  # it was cut
        for one in (source, target):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other one did

    def cut(self) -> None:
        """Every connection breaks."""
        for pair in list(self._pairs):
            for one in pair:
                try:
                    one.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it is over by itself

    def close(self) -> None:
        self.frozen.set()
        self.cut()
        self._server.stop()


class Worker:
    """A process: its backplane and its hub."""

    def __init__(self, service: "Service", url: str = "", replicas: int = 0, prefix: str = "c:", replicas_timeout: float = SILENCE) -> None:
        self.proxy = Proxy(service.redis.port)
        self.malformed = 0
        self.backplane = RedisBackplane(
            url or f"redis://127.0.0.1:{self.proxy.port}", service.bounds, timeout=service.timeout, silence=service.silence,
            connect_timeout=service.silence, replicas=replicas, replicas_timeout=replicas_timeout, prefix=prefix,
            garbage=Garbage(self._met),
        )  # fmt: skip
        self.following = self.backplane._following
        self.hub = Hub(self.backplane, Stats(), 1 << 26, gevent.get_hub().loop.run_callback)
        self.dropping = 0
        published = self.following.published

        def perhaps(name: bytes, payload: bytes) -> None:
            if self.dropping:
                self.dropping -= 1
            else:
                published(name, payload)

        self.following.published = perhaps  # type: ignore[method-assign]
        self.backplane.start()

    def _met(self, number: int) -> None:
        self.malformed += number

    def close(self) -> None:
        self.backplane.close()
        self.proxy.close()


class Log:
    """A log as its readers see it: a position has one body."""

    def __init__(self) -> None:
        self._bodies: dict[int, str] = {}
        self._asked = -1

    def __getitem__(self, index: int) -> "Body":
        return Body(self._bodies, index)


class Body:
    """Equal to the first that it is compared with."""

    def __init__(self, bodies: dict[int, str], index: int) -> None:
        self._bodies, self._index = bodies, index

    def __eq__(self, other: object) -> bool:
        return self._bodies.setdefault(self._index, str(other)) == other

    def __hash__(self) -> int:
        return self._index


class Service:
    """A Redis and its workers."""

    def __init__(self, redis: RedisServer, workers: int = 2, timeout: float = 5.0, silence: float = 3.0, **bounds: Any) -> None:
        self.redis = redis
        self.timeout = timeout
        self.silence = silence
        self.bounds = Bounds(**bounds)
        self.truth: Any = defaultdict(lambda: defaultdict(Log))
        self.workers = [Worker(self) for _ in range(workers)]
        wait_until(self.ready)

    def ready(self) -> bool:
        return all(worker.backplane.ready() for worker in self.workers)

    def publish(self, worker: Worker, channel: str, *bodies: str) -> list[Position]:
        answers = worker.backplane.publish([Publication(channel, body.encode()) for body in bodies])
        assert all(isinstance(answer, Receipt) for answer in answers), answers
        return [answer.position for answer in answers if isinstance(answer, Receipt)]

    def reader(self, worker: Worker, *channels: str) -> Reader:
        return Reader(_any(self), _any(worker), channels).join()

    def heads(self, reader: Reader) -> bool:
        """It has all that there is."""
        for channel in reader.channels:
            info = self.workers[0].backplane.info(channel)
            if info is None or info.position != reader.stands.get(channel):
                return False
        return True

    def count(self, channel: str) -> int | None:
        info = self.workers[0].backplane.info(channel)
        return None if info is None else info.subscribers

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.workers = []


def _any(one: Any) -> Any:
    """A reader takes a service and a worker that look like the router's."""
    return one


Open = Callable[..., Service]


@pytest.fixture(scope="module")
def shared() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def start(stack: ExitStack, shared: RedisServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[Open]:
    """A service; on the module's Redis, emptied, where there is no other."""
    caught: list[str] = []
    monkeypatch.setattr(
        gevent.get_hub(), "handle_error", lambda context, kind, error, trace: caught.append("".join(traceback.format_exception(error)))
    )

    def begin(redis: RedisServer | None = None, **options: Any) -> Service:
        if redis is None:
            shared.ask("FLUSHALL")
        service = Service(redis or shared, **options)
        stack.callback(service.close)
        return service

    yield begin
    assert not caught, "".join(caught)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text


@pytest.fixture
def service(start: Open) -> Service:
    return start()


# -- anything may happen


class Chaos:
    """A random history. Whatever is acknowledged must come; `forgetting` has logs deleted and Redis emptied as well, and
    then a gap may be told."""

    def __init__(self, service: Service, rng: random.Random) -> None:
        self.service = service
        self.rng = rng
        self.names = [f"c{number}" for number in range(rng.choice((1, 2, 6)))]
        self.readers: list[Reader] = []
        self.acknowledged: list[tuple[str, Position, str]] = []
        self.count = 0
        self.forgetting = rng.random() < 0.4
        self.forgot = False
        self.busy: list[Any] = []
        self.padding = "x" * rng.choice((1, 3000))

    def publish(self) -> None:
        """Under keys, until it is acknowledged."""
        rng = self.rng
        those = []
        for _ in range(rng.choice((1, 1, 5, 40))):
            self.count += 1
            those.append(Publication(rng.choice(self.names), f"{self.count} {self.padding}".encode(), "message", str(self.count)))
        worker = rng.choice(self.service.workers)

        def work() -> None:
            left = those
            while left:
                try:
                    answers = worker.backplane.publish(left)
                except Refusal as refusal:
                    answers = [refusal] * len(left)
                for one, answer in zip(left, answers, strict=True):
                    if isinstance(answer, Receipt):
                        self.acknowledged.append((one.channel, answer.position, one.data.decode()))
                    else:
                        assert answer.slug in ("backplane-away", "unconfirmed"), answer
                left = [one for one, answer in zip(left, answers, strict=True) if isinstance(answer, Refusal)]
                gevent.sleep(0.02)

        self.busy.append(gevent.spawn(work))

    def send(self) -> None:
        self.count += 1
        body, worker = f"{self.count} {self.padding}".encode(), self.rng.choice(self.service.workers)
        key = str(self.count)

        def work() -> None:
            while True:
                try:
                    worker.backplane.send(",".join(self.names), "message", body, key)
                    return
                except Refusal as refusal:
                    assert refusal.slug in ("backplane-away", "unconfirmed"), refusal
                gevent.sleep(0.02)

        self.busy.append(gevent.spawn(work))

    def come(self) -> None:
        names = self.rng.sample(self.names, self.rng.randint(1, min(2, len(self.names))))
        reader = Reader(_any(self.service), _any(self.rng.choice(self.service.workers)), names)
        self.readers.append(reader)
        self.busy.append(gevent.spawn(self._join, reader))

    def _join(self, reader: Reader) -> None:
        while True:
            try:
                reader.join()
                return
            except Refusal as refusal:
                assert refusal.slug in ("backplane-away", "backplane-busy"), refusal
            gevent.sleep(0.02)

    def come_back(self) -> None:
        """With its cursor, perhaps to another worker."""
        there = [reader for reader in self.readers if reader.subscriber is not None]
        if there:
            reader = self.rng.choice(there)
            reader.leave()
            reader.worker = _any(self.rng.choice(self.service.workers))
            self.busy.append(gevent.spawn(self._join, reader))

    def doze(self) -> None:
        for reader in self.readers:
            if self.rng.random() < 0.5:
                reader.doze()

    def cut(self) -> None:
        self.rng.choice(self.service.workers).proxy.cut()

    def freeze(self) -> None:
        """For shorter or longer than the silence that is borne."""
        proxy = self.rng.choice(self.service.workers).proxy
        proxy.frozen.clear()
        gevent.spawn_later(self.rng.choice((0.05, SILENCE + 0.2)), proxy.frozen.set)

    def drop(self) -> None:
        self.rng.choice(self.service.workers).dropping = self.rng.randint(1, 4)

    def kill_clients(self) -> None:
        self.service.redis.ask("CLIENT", "KILL", "TYPE", "pubsub")

    def flush_scripts(self) -> None:
        self.service.redis.ask("SCRIPT", "FLUSH")

    def forget(self) -> None:
        if not self.forgetting:
            return
        self.forgot = True
        if self.rng.random() < 0.5:
            self.service.redis.ask("FLUSHALL")
        else:
            self.busy.append(gevent.spawn(self._delete, self.rng.choice(self.names), self.rng.choice(self.service.workers)))

    def _delete(self, channel: str, worker: Worker) -> None:
        try:
            worker.backplane.delete(channel)
        except Refusal as refusal:
            assert refusal.slug in ("backplane-away", "unconfirmed"), refusal

    def run(self, steps: int) -> None:
        what: list[Callable[[], None]] = [
            *[self.publish] * 8, self.send, *[self.come] * 3, *[self.come_back] * 3, self.doze, self.cut, self.freeze, self.drop,
            self.kill_clients, self.flush_scripts, self.forget,
        ]  # fmt: skip
        for _ in range(steps):
            self.rng.choice(what)()
            gevent.sleep(self.rng.choice((0, 0.001, 0.02)))
        for worker in self.service.workers:
            worker.proxy.frozen.set()
            worker.dropping = 0
        gevent.joinall(self.busy, raise_error=True, timeout=TIMEOUT)
        assert all(greenlet.ready() for greenlet in self.busy)
        wait_until(self.service.ready)
        for name in self.names:  # whoever missed the last message finds it out with the next one
            self.service.publish(self.service.workers[0], name, "the end")

    def check(self) -> None:
        for reader in self.readers:
            if reader.subscriber is None and reader.greenlet is None:  # its channel was deleted
                assert self.forgot, reader.ended
                continue
            try:
                wait_until(lambda reader=reader: self.service.heads(reader))  # type: ignore[misc]
            except AssertionError:
                states = reader.worker.backplane._following._channels  # type: ignore[attr-defined]
                there = {channel: self.service.workers[0].backplane.info(channel) for channel in reader.channels}
                host = reader.subscriber and reader.subscriber.host
                raise AssertionError((reader.stands, there, states, host, reader.greenlet, reader.got[-3:], self.forgot)) from None
            if not self.forgot:
                assert not reader.gaps, reader.gaps
        if not self.forgot:
            for channel, position, body in self.acknowledged:
                assert self.service.truth[channel][position.epoch][position.offset - 1] == body
        held: defaultdict[str, int] = defaultdict(int)
        for reader in self.readers:
            if reader.subscriber is not None or reader.greenlet is not None:
                for channel in reader.channels:
                    held[channel] += 1
        counts = {}

        def counted() -> bool:
            counts.update({name: self.service.count(name) for name in self.names})
            return counts == {name: held[name] for name in self.names}

        try:
            wait_until(counted)
        except AssertionError:
            states = [worker.following._channels for worker in self.service.workers]
            hubs = [
                {name: getattr(present, "alive", 1) for name, present in worker.hub._channels.items()} for worker in self.service.workers
            ]
            readers = [(one.subscriber and one.subscriber.host, one.greenlet, one.ended) for one in self.readers]
            raise AssertionError(
                (counts, held, states, hubs, readers, self.forgot, [worker.following.lease.node for worker in self.service.workers])
            ) from None


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_history(start: Open, seed: int) -> None:
    service = start(workers=3, timeout=2.0, silence=SILENCE)
    chaos = Chaos(service, random.Random(seed))
    try:
        chaos.run(150)
        chaos.check()
    except BaseException as error:
        error.add_note(f"seed {seed}")
        raise
    for reader in chaos.readers:
        reader.leave()
    wait_until(lambda: all(service.count(name) == 0 for name in chaos.names))


# -- what may happen, one by one


def slug(what: Callable[[], Any]) -> str:
    """What it is refused for."""
    with pytest.raises(Refusal) as refusal:
        what()
    return refusal.value.slug


def eventually(what: Callable[[], Any]) -> Any:
    """Its answer, once Redis gives one."""

    def tried() -> Any:
        try:
            return [what()]
        except Refusal:
            return None

    return wait_until(tried)[0]


def test_what_was_published_while_a_connection_was_broken_is_made_good(service: Service) -> None:
    one, two = service.workers
    awake, asleep = service.reader(one, "a"), service.reader(one, "a")
    asleep.doze()
    service.publish(two, "a", "1")
    wait_until(lambda: len(asleep.got) == 1)
    one.proxy.refusing = True
    one.proxy.cut()
    service.publish(two, "a", *map(str, range(2, 500)))
    wait_until(lambda: not one.backplane.ready())
    one.proxy.refusing = False
    wait_until(lambda: len(awake.got) == len(asleep.got) == 499)
    assert awake.gaps == asleep.gaps == []
    assert service.count("a") == 2


def test_a_dropped_message_is_read_when_the_next_one_comes(service: Service) -> None:
    one, two = service.workers
    reader = service.reader(one, "a")
    one.dropping = 2
    service.publish(two, "a", "1")
    service.publish(two, "a", "2", "3")
    assert reader.got == []
    service.publish(two, "a", "4")
    wait_until(lambda: reader.got == ["1", "2", "3", "4"])
    one.dropping = 1
    service.publish(two, "a", "5")
    (late,) = one.backplane.subscribe(["a"], [None])  # a join finds it out as well
    assert late.position.offset == 5
    wait_until(lambda: len(reader.got) == 5)
    one.dropping = 1
    service.publish(two, "a", "6")
    one.following.prolong()  # and so does what is said now and then
    wait_until(lambda: len(reader.got) == 6)
    assert not reader.gaps


def test_a_restart_of_a_redis_that_keeps_everything_loses_nothing(start: Open) -> None:
    with redis_server("--appendonly", "yes", "--appendfsync", "always") as redis:
        service = start(redis, timeout=0.5)
        one, two = service.workers
        readers = [service.reader(worker, "a") for worker in service.workers]
        service.publish(one, "a", "1", "2")
        redis.kill()
        wait_until(lambda: not one.backplane.ready())
        began = time.monotonic()
        assert slug(lambda: service.publish(one, "a", "lost")) == "backplane-away"
        assert slug(lambda: service.count("a")) == "backplane-away"
        assert slug(lambda: one.backplane.send("a", "message", b"x")) == "backplane-away"
        assert slug(lambda: one.backplane.subscribe(["new"], [None])) == "backplane-away"
        assert time.monotonic() - began < AMPLE
        redis.start()
        wait_until(service.ready)
        assert service.count("a") == 2
        service.publish(two, "a", "3")
        wait_until(lambda: all(reader.got == ["1", "2", "3"] for reader in readers))
        assert not readers[0].gaps
        assert service.count("new") is None, "who gave up is not counted"
        service.close()


@pytest.mark.parametrize("published", [0, 1, 5])
def test_a_rewound_redis_is_another_epoch_and_each_is_told_one_gap(start: Open, published: int) -> None:
    with redis_server("--save", "3600 1000000") as redis:
        service = start(redis)
        one, two = service.workers
        readers = [service.reader(worker, "a") for worker in service.workers]
        service.publish(one, "a", "1", "2")
        (quiet, *_) = service.publish(two, "nobody is there", "1")
        redis.ask("SAVE")
        service.publish(one, "a", "3", "4")
        (cursor,) = service.publish(two, "nobody is there", "2")
        wait_until(lambda: all(len(reader.got) == 4 for reader in readers))
        redis.kill()
        wait_until(lambda: not any(worker.backplane.ready() for worker in service.workers))
        redis.start()
        wait_until(service.ready)
        if published:
            service.publish(one, "a", *"56789"[:published])
            service.publish(one, "nobody is there", *"56789"[:published])
        wait_until(lambda: all(service.heads(reader) for reader in readers))
        assert all(reader.got == ["1", "2", "3", "4", "GAP", *"56789"[:published]] for reader in readers)
        (joined,) = one.backplane.subscribe(["nobody is there"], [cursor])
        assert joined.gap
        assert joined.position.epoch != quiet.epoch
        service.close()


@pytest.mark.parametrize("away", [False, True])
def test_a_rewound_redis_that_has_come_further_meanwhile_is_told_and_what_it_acknowledged_comes(start: Open, away: bool) -> None:
    """What waits is published before this worker has looked at the channel again: by itself, or by another while it is `away`."""
    with redis_server("--save", "3600 1000000") as redis:
        service = start(redis)
        one, two = service.workers
        reader = service.reader(one, "a")
        service.publish(one, "a", "1", "2")
        redis.ask("SAVE")
        service.publish(one, "a", "3", "4")
        wait_until(lambda: len(reader.got) == 4)
        redis.kill()
        wait_until(lambda: not any(worker.backplane.ready() for worker in service.workers))
        if away:
            one.proxy.refusing = True
        waiting = [gevent.spawn(service.publish, two if away else one, "a", body) for body in "567"]
        gevent.sleep(0.05)
        redis.start()
        gevent.joinall(waiting, raise_error=True)
        late = service.reader(two, "a") if away else reader
        one.proxy.refusing = False
        wait_until(service.ready)
        wait_until(lambda: service.heads(reader) and service.heads(late))
        assert reader.got[:5] == ["1", "2", "3", "4", "GAP"]
        assert sorted(reader.got[5:]) == ["5", "6", "7"]
        assert late is reader or late.got == ["GAP"], "who came since has nothing twice"
        service.publish(two, "a", "8")
        wait_until(lambda: reader.got[-1] == late.got[-1] == "8")
        service.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_is_lost_and_whatever_comes_since_a_gap_is_told_where_something_was_lost(start: Open, seed: int) -> None:
    """A Redis that is put back by so many messages, gets so many others, and only then is looked at by who knows."""
    rng = random.Random(seed)
    service = start(history_size=rng.choice((20, 1000)))
    one, two = service.workers
    reader = service.reader(one, "a")
    count = 0

    def publish(worker: Worker, number: int) -> list[str]:
        nonlocal count
        bodies = [str(count + each) for each in range(number)]
        count += number
        if bodies:
            service.publish(worker, "a", *bodies)
        return bodies

    publish(one, rng.randint(0, 30))
    for _ in range(6):
        publish(two, rng.randint(0, 3))
        wait_until(lambda: service.heads(reader))
        before = {key: service.redis.ask("DUMP", key) for key in ("c:{a}", "c:{a}:log")}
        lost = publish(one, rng.randint(0, 5))
        wait_until(lambda: service.heads(reader))
        one.proxy.refusing = True
        one.proxy.cut()
        wait_until(lambda: not one.backplane.ready())
        for key, dump in before.items():
            if dump is None:
                service.redis.ask("DEL", key)
            else:
                service.redis.ask("RESTORE", key, 600_000, dump, "REPLACE")
        reader.got.clear()
        since = publish(two, rng.randint(0, 8))
        one.proxy.refusing = False
        wait_until(one.backplane.ready)
        wait_until(lambda since=since: len(reader.got) >= len(since))  # type: ignore[misc]
        assert reader.got == [*(["GAP"] if lost else []), *since], (seed, lost, since)


def test_long_histories_are_made_good_within_what_redis_lets_a_connection_have_waiting(
    start: Open, caplog: pytest.LogCaptureFixture
) -> None:
    service = start()
    one, two = service.workers
    names = [f"c{number}" for number in range(320)]
    got: list[Any] = []
    one.following.attach(got.extend, lambda channel, epoch: None, lambda answers: None)
    for start_ in range(0, len(names), 40):
        one.backplane.subscribe(names[start_ : start_ + 40], [None] * 40)
    one.proxy.refusing = True
    one.proxy.cut()
    wait_until(lambda: not one.backplane.ready())
    for name in names:  # 40 MB
        two.backplane.publish([Publication(name, b"x" * 1000)] * 128)
    caplog.clear()
    one.proxy.refusing = False
    wait_until(one.backplane.ready)
    assert len(got) == 128 * len(names)
    broke = re.findall(r"the connection broke: (.*?)\)", caplog.text)
    assert all(why.startswith("no answer within") for why in broke), "cut off by Redis"  # that one is a machine's that is busy


def test_a_server_that_can_not_be_used_for_long_does_not_fill_memory_with_questions(start: Open) -> None:
    with redis_server() as master, redis_server() as redis:
        service = start(redis)
        one = service.workers[0]
        names = [f"c{number}" for number in range(500)]
        for start_ in range(0, len(names), 50):
            one.backplane.subscribe(names[start_ : start_ + 50], [None] * 50)
            one.backplane.publish([Publication(name, b"x") for name in names[start_ : start_ + 50]])
        redis.ask("REPLICAOF", "127.0.0.1", master.port)
        (link,) = one.backplane._shards.links
        most = 0
        for _ in range(40):
            gevent.sleep(0.1)
            most = max(most, link.waiting)
        assert 0 < most < 3 * len(names)
        redis.ask("REPLICAOF", "NO", "ONE")
        wait_until(service.ready)
        service.close()


def test_what_takes_several_questions_has_one_time_out(start: Open) -> None:
    service = start(timeout=0.8)
    one, _ = service.workers
    one.proxy.delay = 0.2
    began = time.monotonic()
    assert slug(lambda: one.backplane.send("a", "message", b"1", "key")) == "unconfirmed"
    assert time.monotonic() - began < AMPLE


def test_what_is_ready_together_takes_few_round_trips(service: Service) -> None:
    one = service.workers[0]

    def round_trips() -> int:
        stats = service.redis.ask("INFO", "stats").decode()
        return int(stats.split("total_reads_processed:")[1].split("\r")[0])

    names = [f"c{number}" for number in range(1000)]
    for what in (
        lambda name: one.backplane.subscribe([name], [None]),
        lambda name: one.backplane.publish([Publication(name, b"1")]),
        lambda name: one.backplane.unsubscribe([name]),
    ):
        before = round_trips()
        gevent.joinall([gevent.spawn(what, name) for name in names], raise_error=True)
        wait_until(lambda: not one.backplane._shards.links[0].waiting and not one.following._changed)
        assert round_trips() - before < 100
    assert service.count(names[0]) == service.count(names[-1]) == 0


def test_thousands_that_are_thrown_out_are_looked_at_together(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = service.workers
    names = [f"c{number}" for number in range(50)]
    reader = service.reader(one, *names)
    looks = 0
    moved = one.following.moved

    def look() -> None:
        nonlocal looks
        looks += 1
        moved()

    monkeypatch.setattr(one.following._moving, "_work", look)
    for name in names:
        one.following.thrown_out(f"c:{{{name}}}".encode())
    two.backplane.publish([Publication(name, b"1") for name in names])
    wait_until(lambda: looks and service.ready())
    assert looks == 1
    two.backplane.publish([Publication(name, b"2") for name in names])
    wait_until(lambda: len(reader.got) == 100)
    assert not reader.gaps


def test_who_is_not_counted_off_is_not_forgotten(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    one = service.workers[0]
    reader = service.reader(one, "a")
    assert service.count("a") == 1
    with monkeypatch.context() as patch:
        patch.setattr(one.following._scripts, "hold", _Refused())
        reader.leave()
        gevent.sleep(0.1)
        one.following._resting["a"] = 0.0
        one.following.expire()
    wait_until(lambda: service.count("a") == 0)
    one.following.expire()
    assert one.following.followed == 0


def test_who_leaves_between_two_breaks_is_counted_off(service: Service) -> None:
    one = service.workers[0]
    reader = service.reader(one, "a")
    assert service.count("a") == 1
    state = one.following._channels["a"]
    state.stale, state.told = True, -1  # as when it was linked again, and this is broken before the channel has caught up
    reader.leave()
    one.following.tell()
    one.proxy.cut()
    wait_until(lambda: not one.backplane.ready())
    wait_until(service.ready)
    wait_until(lambda: service.count("a") == 0)


def test_what_redis_refuses_for_long_is_asked_again_in_bounds(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_following, "RETRIED", 20)
    service = start()
    one = service.workers[0]
    names = [f"c{number}" for number in range(500)]
    one.backplane.subscribe(names, [None] * len(names))
    asked = 0
    refused = _Refused()

    def command(keys: Any, arguments: Any) -> tuple[Any, ...]:
        nonlocal asked
        asked += 1
        return refused.command(keys, arguments)

    with monkeypatch.context() as patch:
        patch.setattr(one.following._scripts, "hold", type("Hold", (), {"command": staticmethod(command)}))
        one.following.count_again()
        wait_until(lambda: asked >= 500)
        gevent.sleep(3.2)
    assert 500 <= asked < 700
    monkeypatch.setattr(redis_following, "RETRIED", 2000)
    wait_until(lambda: not one.following._refused)
    wait_until(lambda: service.count(names[0]) == service.count(names[-1]) == 1)


class _Refused:
    """In the place of a script: a disk that is full."""

    def command(self, keys: Any, arguments: Any) -> tuple[Any, ...]:
        return b"EVAL", b"return redis.error_reply('MISCONF the disk is full')", 0


def test_an_emptied_redis_is_another_epoch_and_each_is_told_one_gap_soon(service: Service) -> None:
    one, two = service.workers
    readers = [service.reader(worker, "a", "b") for worker in service.workers]
    service.publish(one, "a", "1")
    wait_until(lambda: all(reader.got == ["1"] for reader in readers))
    service.redis.ask("FLUSHALL")
    wait_until(lambda: all(len(reader.gaps) == 2 for reader in readers))  # one a channel, though nobody publishes
    service.publish(two, "a", "2")
    wait_until(lambda: all(reader.got == ["1", "GAP", "GAP", "2"] for reader in readers))
    assert service.count("a") == service.count("b") == 2


@pytest.mark.parametrize("what", ["log", "stream"])
def test_keys_that_redis_evicts_are_a_gap_for_who_needs_them(service: Service, what: str) -> None:
    one, two = service.workers
    reader = service.reader(one, "a")
    (old, *_) = service.publish(one, "a", "1", "2", "3")
    wait_until(lambda: len(reader.got) == 3)
    service.redis.ask("DEL", "c:{a}" if what == "log" else "c:{a}:log")
    (joined,) = two.backplane.subscribe(["a"], [old])
    assert joined.gap
    assert joined.messages == []
    two.backplane.unsubscribe(["a"])
    service.publish(two, "a", "4")
    wait_until(lambda: reader.got[-1] == "4")
    assert reader.got == ["1", "2", "3", *(["GAP"] if what == "log" else []), "4"]


# -- places of no log: who asked for a channel that was not there


def nowhere(service: Service, *channels: str) -> list[Position]:
    """Where somebody stands who looked at channels that are not there."""
    answers = service.workers[0].backplane.peek(channels, [None] * len(channels))
    assert all(answer.position.epoch == 0 and not answer.gap for answer in answers)
    return [answer.position for answer in answers]


def test_who_stands_at_no_log_is_told_nothing_in_the_ordinary_case(service: Service) -> None:
    one, two = service.workers
    (place,) = nowhere(service, "a")
    nowhere(service, "b")  # somebody else's look, later, takes nothing from the first
    assert [answer.gap for answer in two.backplane.peek(["a"], [place])] == [False]
    one.proxy.cut()
    service.publish(two, "a", "1")
    wait_until(service.ready)
    for answer in (*one.backplane.peek(["a"], [place]), *two.backplane.subscribe(["a"], [place]), one.backplane.read("a", place)):
        assert answer is not None
        assert not answer.gap
        assert [message.data for message in answer.messages] == [b"1"]


@pytest.mark.parametrize("since", [False, True], ids=["alone", "others-published"])
@pytest.mark.parametrize("how", ["flushed", "restarted", "rewound"])
def test_what_a_redis_has_lost_is_told_to_who_stood_at_no_log(start: Open, how: str, since: bool) -> None:
    with redis_server() as redis:
        service = start(redis)
        one, two = service.workers
        channels = ["a", "b", "c"]
        places = nowhere(service, *channels)
        if how == "rewound":
            redis.ask("SAVE")  # the channels are not in it, but since when Redis has lost nothing is
        for name in channels:
            service.publish(one, name, "1")
        if how == "flushed":
            redis.ask("FLUSHALL")
        else:
            redis.kill()
            wait_until(lambda: not any(worker.backplane.ready() for worker in service.workers))
            redis.start()
            wait_until(service.ready)
        if since:
            for name in channels:
                service.publish(two, name, "2")
        else:
            later = nowhere(service, *channels)
            assert not any(answer.gap for answer in one.backplane.peek(channels, later))
        assert all(answer.gap for answer in two.backplane.peek(channels, places))
        assert all(answer.gap for answer in one.backplane.subscribe(channels, places))
        service.close()


def test_what_a_redis_has_evicted_is_told_to_who_stood_at_no_log(start: Open) -> None:
    with redis_server("--maxmemory-policy", "volatile-lru", "--maxmemory-samples", "10") as redis:
        service = start(redis)
        one, _ = service.workers
        (place,) = nowhere(service, "a")
        service.publish(one, "a", "1")
        used = int(redis.ask("INFO", "memory").decode().split("used_memory:")[1].split("\r")[0])
        redis.ask("CONFIG", "SET", "maxmemory", str(used + (1 << 20)))
        numbers = itertools.count()
        while redis.ask("EXISTS", "c:{a}"):
            one.backplane.publish([Publication(f"d{next(numbers)}", b"x" * 2000) for _ in range(100)])
        assert one.backplane.peek(["a"], [place])[0].gap
        service.close()


def test_where_it_can_not_be_known_what_a_redis_has_lost_a_gap_is_told(start: Open, caplog: pytest.LogCaptureFixture) -> None:
    with redis_server() as redis:
        redis.ask("ACL", "SETUSER", "default", "-info")
        service = start(redis, workers=1)
        (one,) = service.workers
        (place,) = nowhere(service, "a")
        assert one.backplane.peek(["a"], [place])[0].gap
        one.proxy.cut()
        wait_until(lambda: not one.backplane.ready())
        wait_until(service.ready)
        service.close()
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert "'info'" in line
    assert "rights that README names" in line
    caplog.clear()


# -- a stranger writes to the same Redis


def forge(redis: RedisServer, *entries: bytes | None, time: int = 0) -> None:
    """Order these in channel a as comet would; None is an offset that has no entry."""
    offset = int(redis.ask("HGET", "c:{a}", "o"))
    time = time or int(redis.ask("HGET", "c:{a}", "t"))
    for entry in entries:
        offset += 1
        if entry is not None:
            redis.ask("XADD", "c:{a}:log", f"{offset}-{time}", "m", entry)
    redis.ask("HSET", "c:{a}", "o", offset, "t", time)


def malformed(service: Service) -> int:
    return sum(worker.malformed for worker in service.workers)


def read_on(backplane: RedisBackplane, channel: str, answer: Joined | None) -> list[tuple[bool, list[bytes]]]:
    """An answer and the pages behind it: whether there is a gap, and the bodies."""
    pages = []
    while answer is not None:
        pages.append((answer.gap, [message.data for message in answer.messages]))
        answer = backplane.read(channel, answer.end) if answer.more else None
    return pages


@pytest.mark.parametrize("bad", [b"notmsgpack", b"", None, piece(("message", b"\xff")), piece(("gap", b"x"))])
def test_an_entry_that_can_not_be_read_is_one_gap_and_the_channel_goes_on(
    service: Service, bad: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = service.workers
    readers = [service.reader(worker, "a") for worker in service.workers]
    readers[1].doze()
    (before, *_) = service.publish(one, "a", "1", "2")
    wait_until(lambda: all(reader.got == ["1", "2"] for reader in readers))
    forge(service.redis, piece(("message", b"3")), bad, bad, piece(("message", b"6")))
    service.redis.ask("PUBLISH", "c:{a}", "G")
    wait_until(lambda: all(reader.got == ["1", "2", "3", "GAP", "6"] for reader in readers))
    service.publish(two, "a", "7")
    wait_until(lambda: all(reader.got == ["1", "2", "3", "GAP", "6", "7"] for reader in readers))
    assert all(worker.backplane.ready() for worker in service.workers)
    assert malformed(service) == 4, "two of them, met by two workers"
    # who comes now, or reads, is told one gap
    (joined,) = one.backplane.subscribe(["a"], [before])
    assert read_on(one.backplane, "a", joined) == [(False, [b"2", b"3"]), (True, [b"6", b"7"])]
    one.backplane.unsubscribe(["a"])
    assert read_on(one.backplane, "a", one.backplane.read("a", "oldest")) == [(False, [b"1", b"2", b"3"]), (True, [b"6", b"7"])]
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 2, "one a process"


def test_more_than_a_page_that_can_not_be_read_is_passed_over(service: Service) -> None:
    one, two = service.workers
    reader = service.reader(one, "a")
    service.publish(one, "a", "1")
    forge(service.redis, *[None, b"x"] * 150)
    (joined,) = two.backplane.subscribe(["a"], ["oldest"])
    two.backplane.unsubscribe(["a"])
    for answer in (joined, two.backplane.read("a", "oldest")):
        first, *others = read_on(two.backplane, "a", answer)
        assert first == (False, [b"1"])
        assert others == [(True, [])] * 3  # of at most 128 each
    service.publish(two, "a", "302")
    wait_until(lambda: reader.got[-1] == "302")
    assert set(reader.got) == {"1", "GAP", "302"}


@pytest.mark.parametrize("payload", ["garbage", "", "!", "D x", "1 2 3 4\n\x93", "1 1 1000000000 5\n", "-1 -1 -1 -1\n"])
def test_what_a_stranger_publishes_costs_nobody_anything(service: Service, payload: str, caplog: pytest.LogCaptureFixture) -> None:
    one, two = service.workers
    readers = [service.reader(worker, "a") for worker in service.workers]
    service.publish(one, "a", "1")
    for _ in range(50):
        service.redis.ask("PUBLISH", "c:{a}", payload)
    service.publish(two, "a", "2")
    wait_until(lambda: all(reader.got == ["1", "2"] for reader in readers))
    assert malformed(service) == 100
    assert len([record for record in caplog.records if "cannot be read" in record.message]) == 2
    assert service.ready()


STRANGE: dict[str, list[tuple[Any, ...]]] = {
    "a string in the stream's place": [("SET", "c:{a}:log", "x")],
    "a string in the log's place": [("SET", "c:{a}", "x")],
    "a set in both": [("DEL", "c:{a}", "c:{a}:log"), ("SADD", "c:{a}", "x"), ("SADD", "c:{a}:log", "x")],
    "an entry of the far future": [("XADD", "c:{a}:log", "*", "x", "y")],
    "the last id there is": [("XADD", "c:{a}:log", "18446744073709551615-18446744073709551615", "x", "y")],
    "an epoch that is no number": [("HSET", "c:{a}", "e", "xyz")],
    "an epoch without end": [("HSET", "c:{a}", "e", "9" * 40)],
    "no epoch": [("HSET", "c:{a}", "e", "")],
    "an offset below nothing": [("HSET", "c:{a}", "o", "-5")],
    "an offset without end": [("HSET", "c:{a}", "o", "1e300")],
    "half an offset": [("HSET", "c:{a}", "o", "1.5")],
    "an offset that is no number": [("HSET", "c:{a}", "o", "nan")],
    "a count that is no number": [("HSET", "c:{a}", "s", "many")],
    "a time that is no number": [("HSET", "c:{a}", "t", "inf")],
}


@pytest.mark.parametrize("what", STRANGE)
def test_what_stands_in_the_place_of_a_channel_gives_way_and_who_needs_what_is_gone_is_told(service: Service, what: str) -> None:
    one, two = service.workers
    readers = [service.reader(worker, "a") for worker in service.workers]
    readers[1].doze()
    (old,) = service.publish(one, "a", "1")
    wait_until(lambda: all(reader.got == ["1"] for reader in readers))
    for command in STRANGE[what]:
        service.redis.ask(*command)
    service.redis.ask("PUBLISH", "c:{a}", "G")
    service.publish(two, "a", "2")
    wait_until(lambda: all(reader.got[-1] == "2" for reader in readers))
    assert all(reader.got in (["1", "2"], ["1", "GAP", "2"]) for reader in readers)
    (joined,) = one.backplane.subscribe(["a"], [old])
    assert joined.gap or [message.data for message in joined.messages] == [b"2"]
    one.backplane.unsubscribe(["a"])
    wait_until(lambda: service.count("a") == 2)
    assert one.backplane.read("a", "oldest") is not None
    assert malformed(service) > 0
    assert one.backplane.delete("a") is not None
    assert service.count("a") is None


def test_a_count_that_is_no_number_is_replaced(service: Service) -> None:
    one, _ = service.workers
    reader = service.reader(one, "a")
    wait_until(lambda: service.count("a") == 1)
    service.redis.ask("HSET", "c:{a}", one.following.lease.node, "many")
    reader.leave()
    wait_until(lambda: one.following._channels["a"].told == 0)
    service.publish(one, "a", "1")
    assert service.redis.ask("HEXISTS", "c:{a}", one.following.lease.node) == 0


@pytest.mark.parametrize("held", [False, True])
def test_a_key_of_a_message_that_was_sent_is_a_conflict_for_another_that_is_published(service: Service, held: bool) -> None:
    one, two = service.workers
    if held:
        service.reader(one, "a")
    sent = one.backplane.send("a", "message", b"x", "key")
    assert (sent.position is not None) == held
    (conflict,) = two.backplane.publish([Publication("a", b"other", "message", "key")])
    assert isinstance(conflict, Refusal)
    assert conflict.slug == "key-conflict"
    assert two.backplane.send("a", "message", b"x", "key") == sent


def test_garbage_under_a_key_is_no_answer_and_another_message_is_still_a_conflict(service: Service) -> None:
    one, _ = service.workers
    service.reader(one, "a")
    service.redis.ask("SET", "c:{a}:key:short", "x")
    assert isinstance(one.backplane.publish([Publication("a", b"x", "message", "short")])[0], Receipt)
    for key in ("c:{a}:key:one", "c:{a}:key:two", "c:{a}:key:three"):
        service.redis.ask("SADD", key, "x") if key[-1] == "e" else service.redis.ask("SET", key, "0" * 32 + "1 2 zz")
    first = one.backplane.publish([Publication("a", b"x", "message", "one")])
    assert first == one.backplane.publish([Publication("a", b"x", "message", "one")])
    assert isinstance(first[0], Receipt)
    (conflict,) = one.backplane.publish([Publication("a", b"y", "message", "one")])
    assert isinstance(conflict, Refusal)
    assert conflict.slug == "key-conflict"
    sent = one.backplane.send("a", "message", b"y", "two")
    assert sent == one.backplane.send("a", "message", b"y", "two")
    assert sent.delivered == 1
    service.redis.ask("SET", "c:{a}:sent:a:three", "1 2")
    assert one.backplane.send("a", "message", b"z", "three").position == Position(first[0].position.epoch, 4)


def test_signs_of_life_begin_anew_where_a_stranger_has_overwritten_them(service: Service) -> None:
    one, _ = service.workers
    readers = [service.reader(worker, "a") for worker in service.workers]
    service.redis.ask("SET", "c:nodes", "x")
    for worker in service.workers:
        worker.following.lease.beat()
    wait_until(lambda: service.redis.ask("TYPE", "c:nodes") == b"zset")
    service.publish(one, "a", "1")
    wait_until(lambda: all(reader.got[-1:] == ["1"] for reader in readers))
    wait_until(lambda: service.count("a") == 2)
    assert all(worker.following.lease.valid for worker in service.workers)


def test_one_worker_of_a_service_speaks_of_garbage_once_a_minute(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    now = [0.0]
    with (tmp_path / "board").open("wb+") as board:
        counted: list[int] = []
        garbage = Garbage(counted.append, board.fileno(), 3, clock=lambda: now[0])
        for _ in range(100):
            garbage.met("a", 2, "x")
        assert counted == [2] * 100
        assert len(caplog.records) == 1
        child = os.fork()
        if child == 0:  # another worker: locks are a process's
            Garbage(descriptor=board.fileno(), place=3).met("a", 1, "x")
            os._exit(len(caplog.records) - 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        now[0] = QUIET - 1
        garbage.expire()
        garbage.met("a", 1, "x")
        assert len(caplog.records) == 1
        now[0] = QUIET
        garbage.expire()
        child = os.fork()
        if child == 0:
            Garbage(descriptor=board.fileno(), place=3).met("a", 1, "x")
            os._exit(len(caplog.records) - 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
        garbage.met("a", 1, "x")
        assert len(caplog.records) == 2


def test_a_service_counts_garbage_and_goes_on(tmp_path: Path) -> None:
    with redis_server() as redis, Server(tmp_path / "log", "--workers", "2", "--backplane", redis.url) as server:
        wait_until(lambda: server.request("GET", "/readyz").status == 200)
        with server.events("a") as client:
            server.publish("a", "1")
            assert client.next().data == "1"
            forge(redis, *[b"notmsgpack"] * 100)
            redis.ask("PUBLISH", "c:{a}", "G")
            assert client.next().type == "gap"
            server.publish("a", "2")
            assert client.next().data == "2"
        assert server.request("GET", "/channels/a/history").status == 200
        wait_until(lambda: server.stats()["malformed"] >= 100)
        assert server.log.read_text().count("cannot be read") == 1
        server.assert_healthy()


def test_a_redis_that_sleeps_is_away_and_nothing_hangs(start: Open) -> None:
    service = start(timeout=1.0, silence=SILENCE)
    one, two = service.workers
    readers = [service.reader(worker, "a") for worker in service.workers]
    service.publish(one, "a", "1")
    service.redis.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        assert slug(lambda: service.publish(one, "a", "perhaps")) in ("unconfirmed", "backplane-away")
        assert time.monotonic() - began < AMPLE
        wait_until(lambda: not one.backplane.ready())
    finally:
        service.redis.signal(signal.SIGCONT)
    wait_until(service.ready)
    service.publish(two, "a", "2")
    wait_until(lambda: all(reader.got[-1] == "2" for reader in readers))
    assert not any(reader.gaps for reader in readers)
    assert all([one for one in reader.got if one != "perhaps"] == ["1", "2"] for reader in readers)


def test_a_redis_without_memory_refuses_and_goes_on(start: Open) -> None:
    with redis_server() as redis:
        service = start(redis)
        one, _ = service.workers
        reader = service.reader(one, "a")
        service.publish(one, "a", "1")
        service.publish(one, "nobody is there", "1")
        wait_until(lambda: reader.got == ["1"])
        redis.ask("CONFIG", "SET", "maxmemory", "1")
        assert slug(lambda: service.publish(one, "a", "2")) == "backplane-full"
        assert slug(lambda: service.publish(one, "nobody is there", "2")) == "backplane-full"
        assert slug(lambda: one.backplane.subscribe(["new"], [None])) == "backplane-full"
        redis.ask("CONFIG", "SET", "maxmemory", "0")
        service.publish(one, "a", "3")
        wait_until(lambda: reader.got == ["1", "3"])
        wait_until(lambda: service.count("a") == 1)
        assert service.count("new") is None
        service.close()


def test_who_lives_and_holds_what_can_be_told_to_a_redis_without_memory(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_lease, "LEASE", 5.0)
    with redis_server() as redis:
        service = start(redis)
        one, two = service.workers
        readers = [service.reader(worker, "a") for worker in (one, two, two)]
        service.publish(one, "a", "1")
        wait_until(lambda: service.count("a") == 3)
        redis.ask("CONFIG", "SET", "maxmemory", "1")
        nodes = [worker.following.lease.node for worker in service.workers]
        readers.pop().leave()
        wait_until(lambda: service.count("a") == 2)
        assert two.hub._backplane.rejoin("a", None) is not None
        wait_until(lambda: service.count("a") == 3)
        gevent.sleep(5.5)  # longer than a lease
        wait_until(service.ready)
        assert [worker.following.lease.node for worker in service.workers] == nodes
        one.following.lease._come_back()
        one.proxy.cut()
        wait_until(lambda: not one.backplane.ready())
        wait_until(service.ready)
        service.close()


def test_a_redis_that_evicts_forgets_whole_channels_and_takes_the_next(start: Open) -> None:
    with redis_server("--maxmemory-policy", "volatile-lru") as redis:
        service = start(redis)
        one, _ = service.workers
        used = int(redis.ask("INFO", "memory").decode().split("used_memory:")[1].split("\r")[0])
        redis.ask("CONFIG", "SET", "maxmemory", str(used + (4 << 20)))
        first = [service.publish(one, f"c{number}", "1", "2")[0] for number in range(10)]
        for lot in range(30):  # a stream takes 4 KiB at least
            answers = one.backplane.publish([Publication(f"d{lot}.{number}", b"x") for number in range(100)])
            assert all(isinstance(answer, Receipt) for answer in answers)
        told = [one.backplane.subscribe([f"c{number}"], [position])[0] for number, position in enumerate(first)]
        assert any(joined.gap for joined in told)
        assert all(joined.gap != (len(joined.messages) == 1) for joined in told), "what is not told is there"
        service.close()


def test_a_read_only_replica_is_no_backplane(start: Open) -> None:
    with redis_server() as master, redis_server() as redis:
        service = start(redis, timeout=0.5)
        reader = service.reader(service.workers[0], "a")
        service.publish(service.workers[0], "a", "1")
        redis.ask("REPLICAOF", "127.0.0.1", master.port)
        assert slug(lambda: service.publish(service.workers[1], "a", "2")) in ("backplane-away", "unconfirmed")
        wait_until(lambda: not any(worker.backplane.ready() for worker in service.workers))
        redis.ask("REPLICAOF", "NO", "ONE")
        wait_until(service.ready)
        eventually(lambda: service.publish(service.workers[0], "a", "3"))
        wait_until(lambda: reader.got[-1] == "3")
        service.close()


def test_who_dies_is_not_counted_for_long(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_lease, "LEASE", 2.5)
    service = start()
    one, two = service.workers
    service.reader(one, "a")
    service.reader(two, "a")
    wait_until(lambda: service.count("a") == 2)
    two.proxy.refusing = True
    two.proxy.cut()
    wait_until(lambda: service.count("a") == 1)
    two.proxy.refusing = False
    wait_until(lambda: service.count("a") == 2)  # it comes back under another id


def test_who_seems_dead_since_the_clock_of_redis_was_set_is_counted_again_soon(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = service.workers
    monkeypatch.setattr(one.following, "prolong", lambda: None)  # which would find it out minutes later, where there are many
    monkeypatch.setattr(one.following, "expire", lambda: None)
    service.reader(one, "a")
    assert service.count("a") == 1
    two.following.lease._since -= 60
    seconds, _ = service.redis.ask("TIME")
    service.redis.ask("ZADD", "c:nodes", str(1000 * (int(seconds) - 60)), one.following.lease.node)
    two.following.lease.beat()
    wait_until(lambda: two.following.lease.dead)
    two.backplane.publish([Publication("a", b"1")])  # whoever publishes takes off the dead
    wait_until(lambda: service.count("a") == 1)


def test_who_comes_back_under_another_id_is_not_counted_twice(service: Service) -> None:
    """The clock of Redis' machine was set forward, again and again, or Redis has stood still for longer than a lease."""
    one, two = service.workers
    service.reader(one, "a")
    service.reader(two, "a")
    assert service.count("a") == 2
    for number in range(8):
        lease = service.workers[number % 2].following.lease
        node = lease.node
        seconds, _ = service.redis.ask("TIME")
        service.redis.ask("ZADD", "c:nodes", str(1000 * (int(seconds) - 60)), node)
        lease.beat()
        wait_until(lambda lease=lease, node=node: lease.node != node)  # type: ignore[misc]
        wait_until(lambda lease=lease: lease.valid)  # type: ignore[misc]
        if not number:
            assert service.count("a") == 2, "who has come back knows its former id"
    two.following.lease._since = one.following.lease._since = -60.0
    for worker in service.workers:
        worker.following.lease.beat()
    wait_until(lambda: service.count("a") == 2)  # and the others hear of it with their next sign of life


def test_who_ends_in_order_is_not_counted_any_more(service: Service) -> None:
    service.workers.append(Worker(service))
    wait_until(service.ready)
    service.reader(service.workers[2], "a")
    assert service.count("a") == 1
    service.workers[0].following.lease._since -= 60
    service.workers.pop().close()
    wait_until(lambda: service.count("a") == 0)


def test_an_acknowledgement_may_wait_for_replicas(start: Open) -> None:
    with redis_server() as redis, redis_server("--replicaof", "127.0.0.1", str(redis.port)) as replica:
        wait_until(lambda: replica.ask("ROLE")[3] == b"connected")
        service = start(redis, silence=2.0)
        service.workers.append(Worker(service, replicas=1))
        wait_until(service.ready)
        worker = service.workers[-1]
        reader = service.reader(worker, "a")
        keyed = [Publication("a", b"1", "message", "k")]
        assert isinstance(eventually(lambda: worker.backplane.publish(keyed))[0], Receipt)
        replica.signal(19)
        assert slug(lambda: worker.backplane.publish([Publication("a", b"2", "message", "l")])) == "unconfirmed"
        assert slug(lambda: worker.backplane.send("a", "message", b"3", "m")) == "unconfirmed"
        replica.signal(18)
        (again,) = eventually(lambda: worker.backplane.publish([Publication("a", b"2", "message", "l")]))
        assert again.position.offset == 2
        assert eventually(lambda: worker.backplane.send("a", "message", b"3", "m")).position.offset == 3
        wait_until(lambda: reader.got == ["1", "2", "3"])
        service.close()


def test_replicas_of_a_server_that_was_left_confirm_nothing(start: Open) -> None:
    """The same name leads to another master; the one before is still there, with its replica."""
    with redis_server() as redis, redis_server("--replicaof", "127.0.0.1", str(redis.port)) as replica, redis_server() as other:
        wait_until(lambda: replica.ask("ROLE")[3] == b"connected")
        service = start(redis, workers=0)
        worker = Worker(service, replicas=1)
        service.workers.append(worker)
        wait_until(service.ready)
        service.publish(worker, "a", "1")
        link, _ = worker.proxy._pairs
        worker.proxy._port = other.port
        link[0].shutdown(socket.SHUT_RDWR)
        wait_until(lambda: not service.ready())
        assert slug(lambda: service.publish(worker, "a", "2")) == "unconfirmed"
        service.close()


def settings(url: str) -> Settings:
    return Settings(backplane=url)


def test_who_is_not_let_in_is_told_so() -> None:
    with redis_server("--requirepass", "secret") as redis:
        for url in (redis.url, redis.url.replace("//", "//:wrong@"), redis.url.replace("//", "//nobody:secret@")):
            with pytest.raises(Denied, match="user and password"):
                RedisBackplane.of(settings(url))
        backplane = RedisBackplane.of(settings(redis.url.replace("//", "//default:secret@")))
        backplane.attach(lambda messages: None, lambda channel, epoch: None, lambda answers: None)
        backplane.start()
        wait_until(backplane.ready)
        backplane.close()


def test_a_user_needs_the_rights_that_the_readme_names(caplog: pytest.LogCaptureFixture) -> None:
    with redis_server() as redis:
        redis.ask(
            "ACL",
            "SETUSER",
            "comet",
            "on",
            ">secret",
            "~c:*",
            "resetchannels",
            "&c:*",
            "+@all",
            "-@admin",
            "-@dangerous",
            "+client",
            "+info",
        )
        url = redis.url.replace("//", "//comet:secret@")
        backplane = RedisBackplane.of(settings(url))
        got: list[Any] = []
        backplane.attach(got.extend, lambda channel, epoch: None, lambda answers: None)
        backplane.start()
        wait_until(backplane.ready)
        backplane.subscribe(["a"], [None])
        backplane.publish([Publication("a", b"1", "message", "key")])
        wait_until(lambda: got)
        backplane.delete("a")
        (nowhere_,) = backplane.peek(["b"], [None])
        assert not backplane.peek(["b"], [nowhere_.end])[0].gap
        known = RedisSubscriptions(lambda: connect(url), "c:")
        assert known.add_subscriptions([("x", "y")]) == 1
        assert known.get_subscribers("y") == ["x"]
        known.close()
        backplane.close()
    assert "NOPERM" not in caplog.text


@pytest.mark.parametrize("what", ["scripts", "all"])
def test_a_redis_that_permits_nothing_any_more_is_not_ready_at_once_and_is_told_once(
    start: Open, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    with redis_server() as redis:
        service = start(redis, workers=1, timeout=1.0)
        (one,) = service.workers
        reader = service.reader(one, "a")
        redis.ask("ACL", "SETUSER", "default", *(["-evalsha", "-eval"] if what == "scripts" else ["-@all", "+ping", "+acl"]))
        wait_until(lambda: not one.backplane.ready())
        assert one.following.lease.valid  # for as long as a lease
        for number in range(20):
            with pytest.raises(Refusal):
                one.backplane.publish([Publication("a", b"x")])
            if what == "all" and number == 19:
                with pytest.raises(Refusal):
                    one.backplane.subscribe(["new"], [None])
        (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        assert "refuses what comet asks (NOPERM" in line
        redis.ask("ACL", "SETUSER", "default", "+@all")
        wait_until(service.ready)
        service.publish(one, "a", "last")
        wait_until(lambda: reader.got[-1:] == ["last"])
        assert "Traceback" not in caplog.text
        service.close()
    caplog.clear()


def test_a_redis_that_lets_nobody_publish_is_not_ready(start: Open, caplog: pytest.LogCaptureFixture) -> None:
    with redis_server() as redis:
        service = start(redis)
        redis.ask("ACL", "SETUSER", "default", "resetchannels")
        wait_until(lambda: not any(worker.backplane.ready() for worker in service.workers))
        redis.ask("ACL", "SETUSER", "default", "&*")
        wait_until(service.ready)
        service.close()
    assert "refuses what comet asks" in caplog.text
    caplog.clear()


def test_one_worker_of_a_service_says_an_error_of_redis_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    now = [0.0]
    with (tmp_path / "board").open("wb+") as board:
        outage = Outage(board.fileno(), 3, clock=lambda: now[0])

        def said_by_another() -> bool:
            before = len(caplog.records)
            child = os.fork()
            if child == 0:  # locks are a process's
                Outage(board.fileno(), 3).refuses("Redis", "NOPERM x")
                os._exit(len(caplog.records) - before)
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1

        for now[0] in 0.0, 40.0, 80.0:  # it goes on
            for number in range(100):
                outage.refuses("Redis", f"NOPERM x script: f{number}, on @user_script:{number}.")
            outage.expire()
        assert [record.getMessage() for record in caplog.records] == [
            "Redis refuses what comet asks (NOPERM x); its user needs the rights that README names (Many machines)"
        ]
        for number in range(100):
            outage.refuses("Redis", f"ERR {number}")
        assert len(caplog.records) <= MOST
        assert not said_by_another()
        now[0] = 140.0
        outage.expire()
        assert said_by_another()
        outage.refuses("Redis", "NOPERM x")
        assert caplog.records[-1].getMessage() == caplog.records[0].getMessage()
    caplog.clear()


def test_a_redis_that_has_too_many_clients_may_take_us_later() -> None:
    with redis_server("--maxclients", "1") as redis, socket.create_connection((redis.host, redis.port)):
        RedisBackplane.of(settings(redis.url))


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://x", "begins with one of redis://"),
        ("redis://x?maxmemory=1", "can't be said"),
        ("redis+cluster://x/1", "the database 0 alone"),
        ("unix://", "has a path"),
        ("redis://x:port", "port|Port"),
    ],
)
def test_a_url_that_can_not_be_read_is_a_sentence(url: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        RedisBackplane.of(settings(url))


def test_a_prefix_with_braces_would_hide_the_hash_tag() -> None:
    with pytest.raises(ValueError, match="no braces"):
        RedisBackplane.of(Settings(backplane="redis://127.0.0.1:1", redis_prefix="{x}"))


def test_two_services_on_one_redis_have_a_prefix_each(service: Service) -> None:
    one = service.workers[0]
    other = Worker(service, prefix="ö:")
    service.workers.append(other)
    wait_until(service.ready)
    readers = [service.reader(worker, "a") for worker in (one, other)]
    service.publish(one, "a", "1")
    service.publish(other, "a", "2")
    wait_until(lambda: [reader.got for reader in readers] == [["1"], ["2"]])


def test_too_much_that_waits_is_refused(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_calls, "MAX_WAITING", 1000)
    service = start(timeout=2.0)
    one = service.workers[0]
    one.proxy.frozen.clear()
    first = gevent.spawn(slug, lambda: service.publish(one, "a", "x" * 2000))
    gevent.sleep(0.05)
    assert slug(lambda: service.publish(one, "a", "2")) == "backplane-busy"
    assert slug(lambda: one.backplane.send("a", "message", b"2")) == "backplane-busy"
    assert first.get() == "unconfirmed"
    one.proxy.frozen.set()
    eventually(lambda: service.publish(one, "a", "3"))


def test_what_a_url_says() -> None:
    target = read("rediss://me:p%40ss@example.org:7000/3")
    assert (target.address, target.database, target.username, target.password) == (("example.org", 7000), 3, "me", "p@ss")
    assert target.tls is not None
    assert not target.cluster
    assert read("redis+cluster://h").cluster
    assert read("unix:///run/redis.sock").address == "/run/redis.sock"


def test_a_unix_socket_will_do(start: Open, tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with redis_server("--unixsocket", str(path)):
        backplane = RedisBackplane.of(settings(f"unix://{path}"))
        backplane.attach(lambda messages: None, lambda channel, epoch: None, lambda answers: None)
        backplane.start()
        wait_until(backplane.ready)
        assert backplane.publish([Publication("a", b"1")])
        backplane.close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl here to make a certificate with")
def test_tls_will_do_and_a_stranger_will_not(tmp_path: Path, shared: RedisServer) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    port = free_port()
    options = ("--tls-port", str(port), "--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-auth-clients", "no")
    with redis_server(*options):
        with pytest.raises(Denied, match="certificate"):
            RedisBackplane.of(settings(f"rediss://127.0.0.1:{port}"))
        backplane = RedisBackplane.of(settings(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}"))
        got: list[Any] = []
        backplane.attach(got.extend, lambda channel, epoch: None, lambda answers: None)
        backplane.start()
        wait_until(backplane.ready)
        backplane.subscribe(["a"], [None])
        large = [Publication("a", b"x" * 60_000) for _ in range(100)]  # more than a TLS record, and than a read
        gevent.joinall([gevent.spawn(backplane.publish, large[start : start + 10]) for start in range(0, 100, 10)], raise_error=True)
        wait_until(lambda: len(got) == 100)
        assert sum(len(bodies) for _, bodies in read_on(backplane, "a", backplane.read("a", "oldest"))) == 100
        backplane.close()


# -- a whole server


def test_clients_stay_while_redis_is_away(tmp_path: Path) -> None:
    with redis_server("--appendonly", "yes", "--appendfsync", "always") as redis:
        flags = ("--backplane", redis.url, "--backplane-timeout", "1", "--redis-timeout", "0.8")
        with Server(tmp_path / "one.log", *flags) as one, Server(tmp_path / "two.log", "--workers", "2", *flags) as two:
            wait_until(lambda: all(server.request("GET", "/readyz").status == 200 for server in (one, two)))
            with one.events("news") as near, two.events("news") as far, two.client() as poller:
                poller.ask("GET", "/poll/news")
                wait_until(lambda: one.request("GET", "/channels/news").json["subscribers"] == 3)
                two.publish("news", "1")
                assert near.next().data == far.next().data == "1"
                assert [message["data"] for message in poller.read().json["messages"]] == ["1"]
                one.request("PUT", "/users/alice/following/rj")
                assert two.request("GET", "/users/rj/followers").json["followers"] == ["alice"]
                redis.kill()
                wait_until(lambda: all(server.request("GET", "/readyz").status == 503 for server in (one, two)))
                for method, path in (
                    ("POST", "/publish/news"),
                    ("POST", "/send/rj"),
                    ("GET", "/users/rj/followers"),
                    ("GET", "/channels/news"),
                ):
                    answer = one.request(method, path, b"lost" if method == "POST" else None)
                    assert (answer.status, answer.json["error"]) == (503, "backplane-away"), answer
                    assert int(answer.headers["retry-after"]) > 0
                assert one.stats()["connections"] > 0
                redis.start()
                wait_until(lambda: all(server.request("GET", "/readyz").status == 200 for server in (one, two)))
                one.publish("news", "2")
                assert near.next().data == far.next().data == "2"
                assert two.request("GET", "/users/rj/followers").json["followers"] == ["alice"]
            for server in (one, two):
                server.assert_healthy()


def test_a_server_that_is_not_let_in_says_so_and_ends(tmp_path: Path) -> None:
    with redis_server("--requirepass", "secret") as redis, pytest.raises(AssertionError, match="set its user and password"):
        Server(tmp_path / "log", "--backplane", redis.url)


# -- a cluster


@pytest.mark.parametrize("failover", ["killed", "asked"])
def test_a_cluster_of_six_and_a_failover(start: Open, failover: str) -> None:
    with redis_cluster() as servers:
        service = start(servers[0], workers=0)
        url = servers[0].url.replace("redis://", "redis+cluster://")
        service.workers += [Worker(service, url=url, replicas=1, replicas_timeout=4 * SILENCE) for _ in range(2)]
        one, two = service.workers
        wait_until(service.ready)
        names = [f"c{number}" for number in range(30)]
        readers = [service.reader(worker, *names[start_ : start_ + 10]) for worker in service.workers for start_ in (0, 10, 20)]
        answers = one.backplane.publish([Publication(name, b"1") for name in names])
        assert {isinstance(answer, Receipt) and answer.subscribers for answer in answers} == {2}
        sent = two.backplane.send(",".join(names), "message", b"2", "key")
        assert (sent.targets, sent.delivered) == (30, 60)
        assert two.backplane.send(",".join(names), "message", b"2", "key") == sent
        wait_until(lambda: all(len(reader.got) == 20 for reader in readers))
        if failover == "killed":
            servers[0].kill()  # a master, as redis-cli makes them
            wait_until(lambda: sum(server.ask("ROLE")[0] == b"master" for server in servers[1:]) == 3)
            servers[0].start()  # else there would be no replica to confirm
        else:
            replica = next(server for server in servers if server.ask("ROLE")[0] == b"slave")
            replica.ask("CLUSTER", "FAILOVER")
        deadline = time.monotonic() + TIMEOUT
        for number in range(3, 6):
            left = [Publication(name, str(number).encode(), "message", f"k{number}") for name in names]
            while left:
                assert time.monotonic() < deadline, left
                try:
                    answers = one.backplane.publish(left)
                except Refusal as refusal:
                    answers = [refusal] * len(left)
                left = [publication for publication, answer in zip(left, answers, strict=True) if isinstance(answer, Refusal)]
                gevent.sleep(0.05)
        wait_until(lambda: all(len(reader.got) >= 50 for reader in readers))
        for reader in readers:
            assert not reader.gaps
            assert sorted(reader.got) == sorted(str(number) for number in range(1, 6) for _ in range(10))
        service.close()


@pytest.fixture(scope="module")
def trio() -> Iterator[list[RedisServer]]:
    """A cluster of three masters."""
    with redis_cluster(3, 0, "--cluster-require-full-coverage", "no") as servers:
        yield servers


def cluster_of(servers: list[RedisServer]) -> str:
    """Its URL."""
    return servers[0].url.replace("redis://", "redis+cluster://")


def move(servers: list[RedisServer], slot: int, target: RedisServer) -> None:
    """Have another master take a slot, key by key, as redis-cli does."""
    ids = {server: server.ask("CLUSTER", "MYID").decode() for server in servers}
    source = next(server for server in servers if slot in _slots(server, ids[server]))
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
    while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 10):
        source.ask("MIGRATE", target.host, target.port, "", 0, 5000, "KEYS", *keys)
    for server in (target, source, *servers):
        server.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[target])


def _slots(server: RedisServer, own: str) -> set[int]:
    (line,) = (line for line in server.ask("CLUSTER", "NODES").decode().splitlines() if line.startswith(own))
    ranges = [one.split("-") for one in line.split(" ")[8:] if not one.startswith("[")]
    return {slot for one in ranges for slot in range(int(one[0]), int(one[-1]) + 1)}


def test_a_master_that_lost_all_is_told_to_who_stood_at_no_log_there(start: Open, trio: list[RedisServer]) -> None:
    service = start(trio[0], workers=0)
    service.workers = [Worker(service, url=cluster_of(trio))]
    wait_until(service.ready)
    (one,) = service.workers
    lost = _slots(trio[1], trio[1].ask("CLUSTER", "MYID").decode())
    channels = [f"nowhere{number}" for number in range(30)]
    places = nowhere(service, *channels)
    assert not any(answer.gap for answer in one.backplane.peek(channels, places))
    one.backplane.publish([Publication(channel, b"1") for channel in channels])
    trio[1].ask("FLUSHALL")
    for channel, answer in zip(channels, one.backplane.peek(channels, places), strict=True):
        assert answer.gap == (key_slot(f"c:{{{channel}}}".encode()) in lost)


def test_a_slot_that_goes_to_another_master_and_back_loses_nothing(start: Open, trio: list[RedisServer]) -> None:
    service = start(trio[0], workers=0)
    service.workers += [Worker(service, url=cluster_of(trio)) for _ in range(2)]
    wait_until(service.ready)
    slot = key_slot(b"c")
    names = list(islice((name for name in map(str, itertools.count()) if key_slot(name.encode()) == slot), 3))
    readers = [service.reader(worker, name) for worker in service.workers for name in names]
    sent = 0
    stop = False

    def publishes(worker: Worker) -> None:
        nonlocal sent
        while not stop:
            sent += 1
            left = [Publication(name, str(sent).encode(), "message", str(sent)) for name in names]
            while left:
                try:
                    answers = worker.backplane.publish(left)
                except Refusal as refusal:
                    answers = [refusal] * len(left)
                left = [one for one, answer in zip(left, answers, strict=True) if isinstance(answer, Refusal)]
                gevent.sleep(0.002)

    def comes_and_goes(worker: Worker, name: str) -> None:
        reader = Reader(_any(service), _any(worker), [name])
        while not stop:
            try:
                reader.join(asleep=False)
            except Refusal as refusal:
                assert refusal.slug in ("backplane-away", "backplane-busy"), refusal
            gevent.sleep(0.001)
            reader.leave()
            worker.following._resting = dict.fromkeys(worker.following._resting, 0.0)
            worker.following.expire()
        assert not reader.gaps

    busy = [gevent.spawn(publishes, worker) for worker in service.workers]
    busy += [gevent.spawn(comes_and_goes, worker, name) for worker in service.workers for name in names]
    for target in (trio[0], trio[1], trio[2], trio[0]):
        gevent.get_hub().threadpool.apply(move, (trio, slot, target))
        gevent.sleep(0.3)
    stop = True
    gevent.joinall(busy, raise_error=True)
    try:
        wait_until(lambda: all(len(reader.got) == sent for reader in readers))
    except AssertionError as error:
        heads = [(reader.channels, len(reader.got), reader.stands, reader.ended, reader.gaps, service.heads(reader)) for reader in readers]
        raise AssertionError((sent, heads, [worker.backplane.info(name) for name in names for worker in service.workers])) from error
    assert not any(reader.gaps for reader in readers)
    service.close()


def test_who_joins_between_two_moves_does_not_leave_the_channel_deaf(start: Open, trio: list[RedisServer]) -> None:
    """A channel was to catch up behind a subscription that Redis ended before it could; a newcomer has made another."""
    service = start(trio[0], workers=0)
    service.workers.append(Worker(service, url=cluster_of(trio)))
    wait_until(service.ready)
    (worker,) = service.workers
    reader = service.reader(worker, "a")
    worker.hub.publish([Publication("a", b"1")])
    wait_until(lambda: reader.got == ["1"])
    state = worker.following._channels["a"]
    worker.following._recover(["a"], state.link)
    worker.following.thrown_out(worker.following._names.log("a"))  # before it was asked what was missed
    gevent.sleep(0.01)
    assert (state.stale, state.asked) == (True, None)
    newcomer = Reader(_any(service), _any(worker), ["a"])
    newcomer.join(asleep=False)
    worker.hub.publish([Publication("a", b"2")])
    wait_until(lambda: reader.got == ["1", "2"] and newcomer.got == ["2"])
    newcomer.leave()
    wait_until(lambda: service.count("a") == 1)
    service.close()


def test_what_some_feeds_may_have_is_not_refused_as_if_nobody_had_it(start: Open, trio: list[RedisServer]) -> None:
    service = start(trio[0], workers=0, timeout=1.0)
    service.workers.append(Worker(service, url=cluster_of(trio)))
    (one,) = service.workers
    wait_until(service.ready)
    names = [f"f{number}" for number in range(30)]
    one.backplane.subscribe(names, [None] * len(names))
    gone = next(server for server in trio if key_slot(names[0].encode()) in _slots(server, server.ask("CLUSTER", "MYID").decode()))
    gone.kill()
    wait_until(lambda: not one.backplane.ready())
    assert slug(lambda: one.backplane.send(",".join(names), "message", b"1")) == "unconfirmed"
    assert slug(lambda: one.backplane.send(names[0], "message", b"1")) == "backplane-away"
    gone.start()
    wait_until(one.backplane.ready)
    service.close()
