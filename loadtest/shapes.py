"""What a load test does, step by step: Locust shapes, run by the master. `COMET_SHAPE` names the one of a run.

Each is a generator that yields what Locust's `tick` answers, once a second; between two yields it looks at what the clients
have reported (`loadtest.control`), and orders rates. They are metabrew's three tests, and a short one for CI.
"""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from locust import LoadTestShape, User

from loadtest.control import Master
from loadtest.options import sequels
from loadtest.users import (
    DIRECT_SENDERS,
    DirectSender,
    EventsUser,
    EveryoneSender,
    FriendSender,
    LongPollUser,
    StreamUser,
    SwarmUser,
)

Tick = tuple[int, float, list[type[User]]]

STALLED = 60.0
"""Seconds without another client open after which the opening has failed."""

DRAINED = 75.0
"""Seconds that messages under way have to arrive once nothing is sent: longer than a sender waits for its answer."""

SETTLE = 10.0
"""Seconds between the last client and the first message: memory is read there."""

FEW = 10
"""Users of a kind that are so many to the one."""

STEP = 20
"""Seconds at each rate of the search."""

FASTER = 1.25
PATIENCE = 1000.0
"""Milliseconds that p99 may be: what the search looks for."""

log = logging.getLogger("comet.loadtest")


class Failed(Exception):
    """The test can't go on; the text says why."""


class Phased(LoadTestShape):
    """`script` yields as `tick` answers."""

    abstract = True

    def __init__(self) -> None:
        super().__init__()
        self._script: Iterator[Tick] | None = None
        self._users: list[tuple[type[User], int]] = []
        self._rate = 500.0
        self._processes = 0
        self._opened = 0
        """Clients that are to be there from the opening on."""

    @property
    def master(self) -> Master:
        """Of this run."""
        assert self.runner is not None
        return Master.of(self.runner)

    def script(self) -> Iterator[Tick]:
        """The steps."""
        raise NotImplementedError

    def tick(self) -> Tick | None:
        """Locust's."""
        try:
            if self._script is None or not self.master.running:  # one that was stopped does not go on in the next run
                self._script = self._begin()
            if self.master.processes < self._processes:
                raise Failed("a load process has ended, or gives no sign of life")
            return next(self._script)
        except StopIteration:
            self._script = None
            return None
        except Failed as failed:
            log.error("%s", failed)
            self.master.facts["failed"] = str(failed)
            self.master.environment.process_exit_code = 1  # of Locust, which takes it for a normal end
            self._script = None
            return None

    def _begin(self) -> Iterator[Tick]:
        """Another run. Raises Failed where its end would."""
        self._users = []
        self._opened = 0
        self._processes = self.master.processes
        self.master.start()
        asked = self.master.asked
        if asked.friends and not Path(asked.friends).is_file():
            raise Failed(f"--friends {asked.friends}: there is no such file")
        try:
            sequels(asked.then)
        except ValueError as error:
            raise Failed(str(error)) from None
        return self.script()

    # -- steps

    def users(self, kind: type[User], count: int, first: bool = False) -> None:
        """Have so many of them from the next tick on. Many are to come together, so Locust spreads them by weight; of a few,
        such as swarms, it might have none then, and not as many of those that are there `first`: it does not count them."""
        if count:
            self._users.append((kind, count))
            kind.weight = count
            kind.fixed_count = count if first or kind is SwarmUser or count < FEW else 0
            dispatcher = self.runner._users_dispatcher if self.runner else None
            if dispatcher is not None and kind.fixed_count:
                dispatcher._try_dispatch_fixed = True  # Locust looks for such kinds at its first dispatch alone

    def now(self) -> Tick:
        """What Locust is to run now."""
        return sum(count for _, count in self._users), self._rate, [kind for kind, _ in self._users]

    def wait(self, seconds: float) -> Iterator[Tick]:
        """Go on as it is."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            yield self.now()

    def swarm(self) -> Iterator[Tick]:
        """Have a swarm in each process. They come first and alone, so that each process gets one."""
        self.master.facts["swarm"] = True
        self.master.begin("opening")
        self.users(SwarmUser, self.master.processes)
        yield self.now()

    def until_open(self, clients: int) -> Iterator[Tick]:
        """Until so many are open. Raises Failed."""
        master = self.master
        section = master.section
        moved = time.monotonic()
        best = 0
        while (opened := master.total("open")) < clients:
            if opened > best:
                best, moved = opened, time.monotonic()
            if time.monotonic() - moved > STALLED:
                raise Failed(f"{opened:,} of {clients:,} clients are open, and no more come: {dict(master.failures.most_common(5))}")
            yield self.now()
        seconds = time.time() - section.began
        self._opened = clients
        master.facts["open"] = {"clients": clients, "seconds": seconds, "rate": clients / seconds}
        log.info(
            "%s clients open in %.1f s: %s a second; %s", f"{clients:,}", seconds, f"{clients / seconds:,.0f}", section.opening.summary()
        )

    def settle(self, name: str = "idle") -> Iterator[Tick]:
        """Nothing happens."""
        self.master.begin(name)
        yield from self.wait(SETTLE)

    def messages(self, name: str, rate: float, seconds: float, **orders: float) -> Iterator[Tick]:
        """Messages at a rate, and until they have arrived."""
        master = self.master
        section = master.begin(name)
        sent, received, began = master.total("sent"), master.total("received"), time.monotonic()
        master.order(rate=rate, **orders)
        yield from self.wait(seconds)
        took = time.monotonic() - began
        delivered = (master.total("received") - received) / took  # what was told by now: a little less than arrived
        master.order(rate=0.0, **dict.fromkeys(orders, 0))
        yield from self.drain()
        achieved = (master.total("sent") - sent) / took
        fact = {
            "name": name,
            "asked": rate,
            "seconds": took,
            "achieved": achieved,
            "deliveries": delivered,
            **section.latencies[0].summary(),
        }
        master.facts.setdefault("messages", []).append(fact)
        log.info("%s: %s", name, fact)

    def drain(self) -> Iterator[Tick]:
        """Until nobody sends, all clients are back, what the server said that it delivered is here, and nothing more comes."""
        master = self.master
        until = time.monotonic() + DRAINED
        before = -1
        while time.monotonic() < until:
            received = master.total("received")
            still = master.obeyed and not master.unanswered and master.total("open") >= self._opened
            if still and received == before and received >= master.outgoing.outcomes["delivered"]:
                return
            before = received
            yield self.now()

    def audit(self, complete: bool = True) -> Iterator[Tick]:
        """Ask every client what it got, and judge. Raises Failed."""
        master = self.master
        master.begin("audit")
        if (away := self._opened - master.total("open")) > 0:
            master.fail("away", away)
        master.ask_accounts()
        until = time.monotonic() + DRAINED
        while not master.accounts_here:
            if time.monotonic() > until:
                raise Failed("not all processes told what their clients got")
            yield self.now()
        log.info("verdict: %s", master.judge(complete))


def fast(step: dict[str, Any]) -> bool:
    """What `Phased.messages` has measured is what was asked for."""
    return bool(step["p99"] <= PATIENCE and step["achieved"] >= 0.9 * step["asked"])


class Metabrew10k(Phased):
    """His part 1: clients come at 10 a second, and each is sent a message every 10 seconds."""

    abstract = False

    def script(self) -> Iterator[Tick]:
        """Messages go out while clients come, so only sums can be audited."""
        asked = self.master.asked
        self._rate = min(10.0, asked.open_rate)
        self.users(FriendSender, min(asked.senders, 50), first=True)
        yield self.now()
        self.master.begin("messages")
        self.master.order(rate=asked.clients / 10, senders=min(asked.senders, 50))
        self.users(StreamUser, asked.clients)
        yield from self.wait(asked.seconds)
        self.master.order(rate=0.0)
        yield from self.drain()
        yield from self.audit(complete=False)


class Metabrew10kMessages(Phased):
    """His part 2: all are connected, and 1,000 messages a second go to random ids. For hours it is `make soak`."""

    abstract = False

    def script(self) -> Iterator[Tick]:
        """Clients of a swarm: what is tested is the server."""
        asked = self.master.asked
        yield from self.swarm()
        yield from self.until_open(asked.clients)
        yield from self.settle()
        self.users(FriendSender, asked.senders)
        yield self.now()
        yield from self.settle("senders")
        yield from self.messages("messages", asked.message_rate, asked.seconds)
        yield from self.audit()


class Million(Phased):
    """His part 3: a million clients with their friends, opened as fast as goes, held, and messages to users and followers. What
    --then names comes afterwards, with all still connected."""

    abstract = False

    def script(self) -> Iterator[Tick]:
        """All of it."""
        asked = self.master.asked
        then = sequels(asked.then)
        yield from self.swarm()
        yield from self.until_open(asked.clients)
        yield from self.settle()
        self.users(FriendSender, asked.senders)
        if "broadcast" in then:
            self.users(DirectSender, DIRECT_SENDERS)
            self.users(EveryoneSender, 1)
        yield self.now()
        yield from self.settle("senders")  # a thousand that connect at once are no part of the messages
        if asked.message_rate:
            yield from self.messages("messages", asked.message_rate, asked.seconds)
        for what in then:
            yield from {"churn": self.churn, "search": self.search, "broadcast": self.broadcast}[what]()
        yield from self.audit()

    def churn(self) -> Iterator[Tick]:
        """Clients leave and come back with their cursor, while messages go on."""
        asked, before = self.master.asked, self.master.total("left")
        yield from self.messages("churn", asked.message_rate, min(60.0, asked.seconds), churn=asked.churn)
        left = self.master.total("left") - before
        self.master.facts["churn"] = {"left": left, "rate": left / min(60.0, asked.seconds), "asked": asked.churn * asked.clients}
        log.info("churn: %s", self.master.facts["churn"])

    def search(self) -> Iterator[Tick]:
        """The rate raised until p99 passes a second or no more can be sent; or lowered until it does not. What is late, refused
        or not confirmed at a rate that is too high is what was looked for: it is told, and no failure."""
        before = dict(self.master.outgoing.outcomes)
        yield from self._search()
        self.master.order(judge=True)
        self.master.facts["search"] = {name: self.master.outgoing.outcomes[name] - before[name] for name in ("refused", "unsure")}

    def _search(self) -> Iterator[Tick]:
        facts, rate = self.master.facts, self.master.asked.message_rate
        enough = "messages" in facts and fast(facts["messages"][0])
        while True:
            rate = rate * FASTER if enough else rate / FASTER
            yield from self.messages(f"{rate:,.0f} messages/s", rate, STEP, judge=False)
            step = facts["messages"][-1]
            if fast(step):
                facts["fastest"] = step
            if fast(step) != enough or rate < 1:
                return

    def broadcast(self) -> Iterator[Tick]:
        """Messages to everyone, one after the other, with messages to single users meanwhile."""
        master = self.master
        shared = sum("everyone" in one.path for one in master.endpoints) * master.asked.clients // len(master.endpoints)
        master.begin("direct messages alone")
        master.order(direct=20.0)
        yield from self.wait(5)
        section = master.begin("broadcast")
        figures: list[dict[str, Any]] = []
        for turn in range(1, 6):
            master.order(everyone=turn)
            until = time.monotonic() + 60
            while time.monotonic() < until:
                yield self.now()
                numbers = master.outgoing.everyone
                if len(numbers) == turn and master.spread().get(numbers[-1].number, (0, 0))[0] >= shared:
                    break
            else:
                raise Failed(f"a message to everyone did not reach all: {master.spread()}")
            last = numbers[-1]
            seconds = (master.spread()[last.number][1] - last.sent) / 1e9
            figures.append({"seconds": seconds, "rate": shared / seconds})
            log.info("to everyone: %s", figures[-1])
        direct = section.latencies[1].summary()
        master.order(direct=0.0)
        master.begin("after")
        yield from self.drain()
        rates = sorted(one["rate"] for one in figures)
        master.facts["broadcast"] = {"clients": shared, "rate": rates[len(rates) // 2], "each": figures, "direct": direct}
        master.facts["broadcast"]["direct_alone"] = next(
            one.latencies[1].summary() for one in master.sections if one.name == "direct messages alone"
        )


class Smoke(Million):
    """Everything, shortly, for CI: swarms, and some clients of each other kind."""

    abstract = False
    EACH = 10

    def script(self) -> Iterator[Tick]:
        """All that comes after is `Million`'s."""
        asked = self.master.asked
        yield from self.swarm()
        others = [StreamUser, EventsUser, LongPollUser]
        for kind in others:
            self.users(kind, self.EACH)
        self.users(FriendSender, asked.senders)
        yield self.now()
        yield from self.until_open(asked.clients + self.EACH * len(others))
        yield from self.messages("messages", asked.message_rate, asked.seconds)
        yield from self.churn()
        yield from self.audit()


SHAPES = {one.__name__: one for one in (Metabrew10k, Metabrew10kMessages, Million, Smoke)}
