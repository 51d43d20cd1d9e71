"""What tests/contracts/test_backplane.py needs of a backplane: a factory in `FACTORIES`, nothing more.

The suite knows the `Backplane` protocol alone. Deliveries and answers may arrive later than the call
that caused them, so tests wait with `Harness.until` for what must come, and call `Harness.settle`
before they say that something did not come.
"""

import atexit
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gevent
import pytest

from comet.backplane import Backplane
from comet.backplane.memory import Bounds, MemoryBackplane
from comet.backplane.redis import RedisBackplane
from comet.backplane.redis_following import INTEREST as REDIS_INTEREST
from comet.backplane.redis_scripts import HOLD
from comet.backplane.router import INTEREST, RouterBackplane
from comet.message import Message, Position, Publication, Receipt
from comet.router import Router
from tests.harness import TIMEOUT, wait_until
from tests.redis_server import PROGRAM, RedisServer

FENCE = "contract:fence"


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Harness:
    """One process of a service: its backplane, and what was delivered, dropped and lost there.

    `advance` lets seconds pass and has the backplane forget what is past its time. A factory whose
    clock is real may divide every time of its `Bounds`, and what `advance` is given, by one number.
    """

    def __init__(self, backplane: Backplane, advance: Callable[[float], None]) -> None:
        self.backplane = backplane
        self.advance = advance
        self.delivered: list[Message] = []
        self.dropped: list[str] = []
        self.lost: list[str] = []
        backplane.attach(self.delivered.extend, lambda channel, _: self.dropped.append(channel), self.lost.extend)

    def publish(self, channel: str, *bodies: str) -> list[Position]:
        """Publish each body in one call; their positions."""
        answers = self.backplane.publish([Publication(channel, body.encode()) for body in bodies])
        return [answer.position for answer in answers if isinstance(answer, Receipt)]

    def join(self, *channels: str) -> list[Position]:
        """Subscribe from now on; where that is."""
        return [answer.position for answer in self.backplane.subscribe(channels, [None] * len(channels))]

    def got(self, channel: str) -> list[str]:
        """The bodies delivered on a channel so far, in order."""
        return [message.data.decode() for message in self.delivered if message.channel == channel]

    def until_got(self, channel: str, *bodies: str) -> None:
        """Wait until exactly these bodies were delivered on a channel."""
        wait_until(lambda: len(self.got(channel)) >= len(bodies))
        assert self.got(channel) == list(bodies), (self.got(channel), bodies)

    def kept(self, channel: str) -> list[str] | None:
        """The bodies in a channel's history; None when there is no such channel."""
        joined = self.backplane.read(channel, "oldest")
        return None if joined is None else bodies(joined.messages)

    def totals(self) -> dict[str, int]:
        """What there is in the whole service."""
        return self.backplane.totals()

    def settle(self) -> None:
        """Wait until all that was acknowledged has been delivered: what comes on one link comes in order,
        so a message on a channel of our own is behind it. Leaves that channel to linger."""
        self.backplane.subscribe([FENCE], [None])
        (position,) = self.publish(FENCE, "fence")
        wait_until(lambda: any(message.position == position for message in self.delivered))
        self.backplane.unsubscribe([FENCE])


def bodies(messages: Sequence[Message]) -> list[str]:
    """The bodies of messages, as text."""
    return [message.data.decode() for message in messages]


Factory = Callable[[Bounds], AbstractContextManager[Harness]]


@contextmanager
def _memory(bounds: Bounds) -> Iterator[Harness]:
    clock = Clock()
    backplane = MemoryBackplane(bounds, clock)

    def advance(seconds: float) -> None:
        clock.now += seconds
        backplane.expire()

    yield Harness(backplane, advance)


@contextmanager
def _router(bounds: Bounds) -> Iterator[Harness]:
    """A worker's link to a router, whose loop turns here, over a real socket."""
    clock = Clock()
    with routing(bounds, clock) as (path, router):
        backplane = RouterBackplane(path, timeout=TIMEOUT, clock=clock)

        def advance(seconds: float) -> None:
            gevent.sleep(2 * INTEREST)  # what the worker has to say by itself is said
            clock.now += seconds
            router.backplane.expire()
            gevent.sleep(2 * INTEREST)

        harness = Harness(backplane, advance)
        backplane.start()
        assert backplane.wait(TIMEOUT)
        yield harness
        assert not harness.lost
        backplane.close()


@contextmanager
def routing(bounds: Bounds, clock: Callable[[], float] = time.monotonic) -> Iterator[tuple[str, Router]]:
    """A router on a socket, turned by a greenlet: its path, and itself."""
    with TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/router"
        listener.bind(path)
        listener.listen()
        router = Router(listener, bounds, clock)
        greenlet = gevent.spawn(turn, router)
        try:
            yield path, router
        finally:
            greenlet.kill()
            router.close()


def turn(router: Router) -> None:
    """The router's loop, which leaves time for others."""
    while True:
        router.turn(0)
        gevent.sleep(0.0005)


@contextmanager
def _redis(bounds: Bounds) -> Iterator[Harness]:
    """A worker's connection to a real Redis, whose clock is ours."""
    server = _shared_redis()
    clock = Clock()
    server.ask("FLUSHALL")

    def say() -> None:
        server.ask("SET", "now", str(round(1000 * clock.now)))

    say()
    backplane = RedisBackplane(server.url, bounds, timeout=TIMEOUT, clock=clock, now="return tonumber(redis.call('GET', 'now'))")

    def advance(seconds: float) -> None:
        while seconds > 0:  # they prolong what they hold more often than this
            step = min(seconds, HOLD / 3)
            seconds -= step
            gevent.sleep(2 * REDIS_INTEREST)  # what the worker has to say by itself is said
            clock.now += step
            server.pass_time(step)
            say()
            backplane._following.prolong()
            gevent.sleep(2 * REDIS_INTEREST)

    class Counted(Harness):
        def totals(self) -> dict[str, int]:
            keys = [key.decode() for key in server.ask("KEYS", "c:*") if key != b"c:nodes"]
            streams = [key for key in keys if key.endswith(":log")]
            return {
                "channels": sum(key.endswith("}") for key in keys),
                "messages_kept": sum(min(server.ask("XLEN", key), bounds.history_size) for key in streams),
                "history_bytes": sum(server.ask("XLEN", key) for key in streams),
                "idempotency_keys": sum(":key:" in key for key in keys),
            }

    harness = Counted(backplane, advance)
    backplane.start()
    wait_until(backplane.ready)
    yield harness
    assert not harness.lost
    backplane.close()


@cache
def _shared_redis() -> RedisServer:
    """One for all tests of this process."""
    if PROGRAM is None:
        pytest.skip("there is no redis-server here: apt-get install redis-server")
    folder = TemporaryDirectory()
    server = RedisServer(Path(folder.name))
    atexit.register(folder.cleanup)
    atexit.register(server.stop)
    return server


FACTORIES: Mapping[str, Factory] = {"memory": _memory, "router": _router, "redis": _redis}

OWN_BOUNDS = ("memory", "router")
"""Those that bound by themselves what is kept in all. Redis does that, by its ``maxmemory``: tests/test_backplane_redis.py."""
