"""Several workers on a real Redis: order, counts, and what happens when a connection breaks or freezes, messages are
dropped, Redis ends, forgets, is rewound, full, or does not let us in.

`Service` is a redis-server and workers with a real hub each, whose connections go through a `Proxy` each; all but Redis
in this process. Clients are the `Reader` of the router's tests, which checks what it is sent.

More seeds than the usual few: ``COMET_SEEDS=100 pytest tests/test_backplane_redis.py``.
"""

import logging
import os
import random
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import gevent
import pytest
from gevent import socket
from gevent.server import StreamServer

from comet.backplane.memory import Bounds
from comet.backplane.redis import RedisBackplane
from comet.errors import Refusal
from comet.hub import Hub
from comet.message import OLDEST, Position, Publication, Receipt
from comet.stats import Stats
from tests.harness import wait_until
from tests.redis_server import RedisServer, needs_redis, redis_server
from tests.test_backplane_router import Reader

pytestmark = needs_redis

SEEDS = range(int(os.environ.get("COMET_SEEDS", "6")))

SILENCE = 0.6
"""Seconds that Redis may be silent here."""


class Proxy:
    """Between a worker and Redis."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._pairs: list[tuple[Any, Any]] = []
        self.frozen = gevent.event.Event()
        self.frozen.set()  # it flows
        self.refusing = False
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

    def __init__(self, service: "Service") -> None:
        self.proxy = Proxy(service.redis.port)
        self.backplane = RedisBackplane(
            f"redis://127.0.0.1:{self.proxy.port}", service.bounds, timeout=service.timeout, silence=SILENCE, connect_timeout=SILENCE
        )
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

    def close(self) -> None:
        self.proxy.close()
        self.backplane.close()


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

    def __init__(self, redis: RedisServer, workers: int = 2, timeout: float = 5.0, **bounds: Any) -> None:
        self.redis = redis
        self.timeout = timeout
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
                    worker.backplane.send(self.names, "message", body, key)
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
        gevent.joinall(self.busy, raise_error=True, timeout=20)
        assert all(greenlet.ready() for greenlet in self.busy)
        wait_until(self.service.ready)
        for name in self.names:  # whoever missed the last message finds it out with the next one
            self.service.publish(self.service.workers[0], name, "the end")

    def check(self) -> None:
        for reader in self.readers:
            if reader.subscriber is None and reader.greenlet is None:  # its channel was deleted
                assert self.forgot, reader.ended
                continue
            wait_until(lambda reader=reader: self.service.heads(reader), 10)  # type: ignore[misc]
            if not self.forgot:
                assert not reader.gaps, reader.gaps
        if not self.forgot:
            for channel, position, body in self.acknowledged:
                assert self.service.truth[channel][position.epoch][position.offset - 1] == body
                joined = self.service.workers[0].backplane.read(channel, OLDEST)
                assert joined is not None
        held: defaultdict[str, int] = defaultdict(int)
        for reader in self.readers:
            if reader.subscriber is not None or reader.greenlet is not None:
                for channel in reader.channels:
                    held[channel] += 1
        wait_until(lambda: all(self.service.count(name) == held[name] for name in self.names), 10)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_history(start: Open, seed: int) -> None:
    service = start(workers=3, timeout=2.0)
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
