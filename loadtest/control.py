"""What the processes of a load test tell each other, over Locust's own connections: so it works over machines as well.

A *worker* (a process with users) reports its counts once a second and puts them into Locust's statistics. The *master*
sums them, writes a line a second to `timeline.jsonl`, passes on what the shape orders (rates), and at the end asks every worker
what each client got, has that audited (`loadtest.audit`) and writes `verdict.json`. Without --master or --processes one process
is both. Neighbours: `loadtest.shapes`, which drives the master; `loadtest.users`, who work for the worker.
"""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import gevent
from locust import runners
from locust.env import Environment
from locust.runners import LocalRunner, MasterRunner, Runner, WorkerRunner

from comet.kernel import limits
from comet.kernel.processes import die_with_parent, give_way
from loadtest import tally
from loadtest.counting import Counts
from loadtest.histogram import Histogram
from loadtest.options import Asked, endpoints, masks, target
from loadtest.swarm import Swarm
from loadtest.verify import KINDS

log = logging.getLogger("comet.loadtest")

REPORT, ORDERS, ACCOUNT = "comet-report", "comet-orders", "comet-account"

# Fifty processes that greet their master each second, and are greeted back, take a good part of a core. Locust counts
# a silence in these intervals: so many of them, and a process is missing, which ends the test. On two cores that are
# busy altogether one may well wait for seconds.
runners.HEARTBEAT_INTERVAL = 5
runners.HEARTBEAT_LIVENESS = 6

EVERY = 1.0
"""Seconds between two reports."""

SENDERS_A_PROCESS = 1 << 16
"""Numbers of senders that a process has to itself."""


class Worker:
    """This process, when it has users."""

    _all: ClassVar[WeakKeyDictionary[Environment, "Worker"]] = WeakKeyDictionary()

    def __init__(self, environment: Environment, runner: Runner) -> None:
        self.environment = environment
        self.runner = runner
        self.patience = 60.0
        """Seconds that a client with a greenlet waits for anything."""
        self._all[environment] = self
        self._reporter: Any = None
        # the master's flags come with the first users, in place of those that a --worker was given for its own machine
        own = isinstance(runner, WorkerRunner)
        self._own = {name: value for name in ("sources", "key") if own and (value := getattr(environment.parsed_options, name))}
        self._clear()
        runner.register_message(ORDERS, self._obey)
        environment.events.test_start.add_listener(self._begin)
        environment.events.test_stop.add_listener(self._end)

    @classmethod
    def of(cls, environment: Environment) -> "Worker":
        """The one of a user."""
        return cls._all[environment]

    def _clear(self) -> None:
        self.asked = replace(Asked.of(self.environment.parsed_options), **self._own)
        self.target = target(self.environment.host, self.asked.sources)
        self.endpoints = endpoints(self.asked.endpoints)
        self.index = max(0, getattr(self.runner, "worker_index", 0))
        self.processes = getattr(self.environment.parsed_options, "expect_workers", 1) if isinstance(self.runner, WorkerRunner) else 1
        clock: Callable[[], int] = time.time_ns if self.asked.wall_clock else time.monotonic_ns
        self.counts = Counts(self.asked.late, self.index * SENDERS_A_PROCESS, clock)
        self.swarm: Swarm | None = None
        self.rate = 0.0 if self.environment.shape_class else self.asked.message_rate  # a shape orders it
        self.senders = self.asked.senders
        self.direct_rate = 0.0
        self.everyone = 0
        self._obeyed = 0
        self._clients = 0

    def _begin(self, **_: Any) -> None:
        """The master's flags are here by now."""
        self._clear()
        self._reporter = gevent.spawn(self._report_on)

    def _end(self, **_: Any) -> None:
        if self._reporter is not None:
            self._reporter.kill()
            self._report()

    def next_client(self) -> int:
        """The number of another client with a greenlet of its own."""
        self._clients += 1
        return (self.index + (self._clients - 1) * self.processes) % self.asked.clients

    def share(self) -> range:
        """The clients that this process holds."""
        each = -(-self.asked.clients // self.processes)
        return range(min(self.asked.clients, self.index * each), min(self.asked.clients, (self.index + 1) * each))

    def _report_on(self) -> None:
        while True:
            gevent.sleep(EVERY)
            self._report()

    def _report(self) -> None:
        report = self.counts.report() | {"obeyed": self._obeyed}
        stats = self.runner.stats
        for kind, counts in zip(KINDS, report["latencies"], strict=True):
            tally.requests(stats, "PUSH", kind, counts)
        tally.requests(stats, "OPEN", "clients", report["opening"])
        for where, what, count in report["failures"]:
            tally.failures(stats, "PUSH", where, what, count)
        self.runner.send_message(REPORT, report)

    def _obey(self, environment: Environment, msg: Any, **_: Any) -> None:
        orders = msg.data
        if orders.get("account"):
            self._report()  # what it says of sends is part of it
            self.runner.send_message(ACCOUNT, self.counts.account())
            return
        self.rate = orders["rate"]
        self.senders = orders["senders"]
        self._obeyed = orders["number"]
        self.counts.judge(self.asked.late if orders["judge"] else math.inf)
        self.direct_rate, self.everyone = orders["direct"], orders["everyone"]
        if self.swarm is not None:
            self.swarm.churning = orders["churn"] * len(self.swarm)


class Section:
    """A part of the run, and what it measured."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.began = time.time()
        self.latencies = [Histogram() for _ in KINDS]
        self.opening = Histogram()

    def document(self) -> dict[str, Any]:
        """For the report."""
        return {
            "name": self.name,
            "began": self.began,
            "opening": self.opening.summary(),
            **{kind: one.summary() for kind, one in zip(KINDS, self.latencies, strict=True)},
        }


class Master:
    """Where all reports come together."""

    _all: ClassVar[WeakKeyDictionary[Runner, "Master"]] = WeakKeyDictionary()

    def __init__(self, environment: Environment, runner: Runner) -> None:
        self.environment = environment
        self.runner = runner
        self._all[runner] = self
        self.running = False
        self._writer: Any = None
        self._clear()
        runner.register_message(REPORT, self._reported)
        runner.register_message(ACCOUNT, self._accounted)
        environment.events.test_start.add_listener(self._begin)
        environment.events.test_stop.add_listener(self._end)

    @classmethod
    def of(cls, runner: Runner) -> "Master":
        """The one of a shape."""
        return cls._all[runner]

    def _clear(self) -> None:
        from loadtest.audit import Outgoing  # numpy: of the master alone

        self.asked = Asked.of(self.environment.parsed_options)
        self.endpoints = endpoints(self.asked.endpoints)
        self.sections = [Section("start")]
        self.facts: dict[str, Any] = {}
        """What the shape has found out, for the report."""
        self.verdict: dict[str, Any] | None = None
        self.failures: Counter[str] = Counter()
        self._now = [Histogram() for _ in KINDS]
        self._totals: dict[str, dict[str, int]] = {}
        self._everyone: dict[str, dict[int, list[int]]] = {}
        self.outgoing = Outgoing(self.asked.clients)
        self._accounts: dict[str, dict[str, bytes]] = {}
        self._orders = {"number": 0, "rate": 0.0, "senders": self.asked.senders, "direct": 0.0, "everyone": 0, "churn": 0.0, "judge": True}

    def _begin(self, **_: Any) -> None:
        if not self.environment.shape_class:
            self.start()

    def start(self) -> None:
        """A run begins. A shape says so before Locust does: it has orders before the first user is there."""
        if self._writer is not None:
            self._writer.kill()
        self._clear()
        self.running = True
        if self.asked.out:
            Path(self.asked.out).mkdir(parents=True, exist_ok=True)
        self._writer = gevent.spawn(self._write_on)

    def _end(self, **_: Any) -> None:
        self.running = False
        if self._writer is not None:
            self._writer.kill()
            self._writer = None
            self._write("summary.json", self.summary())

    # -- what the shape wants

    def total(self, name: str) -> int:
        """A count, of all processes."""
        return sum(one[name] for one in self._totals.values())

    @property
    def processes(self) -> int:
        """Those with users, that give signs of life."""
        if not isinstance(self.runner, MasterRunner):
            return 1
        return len(self.runner.clients) - len(self.runner.clients.missing)

    @property
    def section(self) -> Section:
        """The one that is under way."""
        return self.sections[-1]

    def begin(self, name: str) -> Section:
        """Another section."""
        self.sections.append(Section(name))
        return self.section

    def order(self, **orders: float) -> None:
        """Tell all workers: `rate` (messages a second in all), `senders`, `direct` (messages a second to one
        each), `everyone` (messages to all, so many since the start), `churn` (share of the clients a second), `judge` (whether what is
        late is a failure)."""
        self._orders |= {"number": self._orders["number"] + 1, **orders}
        self.runner.send_message(ORDERS, self._orders)

    @property
    def obeyed(self) -> bool:
        """What all workers have reported is what they did since the last order."""
        return all(one["obeyed"] >= self._orders["number"] for one in self._totals.values())

    @property
    def unanswered(self) -> int:
        """Publications whose outcome nobody knows yet."""
        return self.total("begun") - sum(self.outgoing.outcomes[name] for name in ("sent", "refused", "unsure"))

    def fail(self, what: str, count: int) -> None:
        """Something that all of them together have got wrong; it is among Locust's failures as well."""
        tally.failures(self.environment.stats, "PUSH", "audit", what, count)
        self.failures[f"audit: {what}"] += count

    def ask_accounts(self) -> None:
        """Have all workers tell what each client got."""
        self._accounts.clear()
        self.runner.send_message(ORDERS, {"account": True})

    @property
    def accounts_here(self) -> bool:
        """All have."""
        return len(self._accounts) >= max(1, len(self._totals))

    def judge(self, complete: bool) -> dict[str, Any]:
        """Audit, and put what is wrong among the failures."""
        from loadtest.audit import audit, edges

        own, shared = masks(self.endpoints) if self.facts.get("swarm") else ([True], [False])
        friends = edges(Path(self.asked.friends)) if self.asked.friends else []
        self.verdict = audit(friends, self.outgoing, list(self._accounts.values()), own, shared, complete)
        for what in ("lost", "doubled", "other"):
            if self.verdict[what]:
                self.fail(what, self.verdict[what])
        return self.verdict

    def spread(self) -> dict[int, tuple[int, int]]:
        """Each of the last messages to everyone: how many have it, and when the last of them got it, in nanoseconds."""
        merged: dict[int, tuple[int, int]] = {}
        for seen in self._everyone.values():
            for number, (count, last) in seen.items():
                before = merged.get(number, (0, 0))
                merged[number] = before[0] + count, max(before[1], last)
        return merged

    # -- what comes in, and goes out to files

    def _reported(self, environment: Environment, msg: Any, **_: Any) -> None:
        report = msg.data
        for kind, counts in enumerate(report["latencies"]):
            counts = {int(bucket): count for bucket, count in counts.items()}
            self._now[kind].merge(counts)
            self.section.latencies[kind].merge(counts)
        self.section.opening.merge({int(bucket): count for bucket, count in report["opening"].items()})
        for where, what, count in report["failures"]:
            self.failures[f"{where}: {what}"] += count
        self.outgoing.add(report["sends"])
        self._everyone[msg.node_id] = {number: seen for number, *seen in report["everyone"]}
        self._totals[msg.node_id] = {
            name: report[name] for name in ("open", "opened", "received", "bytes", "begun", "sent", "left", "clients", "obeyed")
        }  # fmt: skip

    def _accounted(self, environment: Environment, msg: Any, **_: Any) -> None:
        self._accounts[msg.node_id] = msg.data

    def _write_on(self) -> None:
        while True:
            gevent.sleep(EVERY)
            line = {
                "time": round(time.time(), 3),
                "section": self.section.name,
                **{name: self.total(name) for name in ("open", "opened", "received", "bytes", "sent", "left")},
                "failures": sum(self.failures.values()),
                "latencies": {kind: one.summary() for kind, one in zip(KINDS, self._now, strict=True) if one.total},
            }
            for one in self._now:
                one.take()
            if self.asked.out:
                with (Path(self.asked.out) / "timeline.jsonl").open("a") as file:
                    file.write(json.dumps(line) + "\n")

    def summary(self) -> dict[str, Any]:
        """All of it, as `summary.json`."""
        return {
            "asked": {name: value for name, value in vars(self.asked).items() if name != "key"},
            "processes": self.processes,
            "sections": [one.document() for one in self.sections],
            "failures": dict(self.failures),
            "facts": self.facts,
            "verdict": self.verdict,
        }

    def _write(self, name: str, document: dict[str, Any]) -> None:
        if self.asked.out:
            (Path(self.asked.out) / name).write_text(json.dumps(document, indent=1) + "\n")


def set_up(environment: Environment, runner: Runner, **_: Any) -> None:
    """Locust's `init`: this process is a worker, the master, or both."""
    if isinstance(runner, WorkerRunner) and (processes := getattr(environment.parsed_options, "processes", None)):
        die_with_parent()  # a master that is killed leaves its workers for a minute otherwise
        if limits.crowding(processes, limits.cores()):
            try:
                give_way()  # or each message would tear a process of the service away from its work
            except OSError as error:  # some sandboxes don't let a process say so
                log.info("a load process can't have SCHED_BATCH: %s", error)
    if not isinstance(runner, WorkerRunner):
        Master(environment, runner)
    if isinstance(runner, LocalRunner):
        try:
            Worker(environment, runner)
        except (ValueError, OSError) as error:  # which Locust would log, and go on without
            raise SystemExit(str(error)) from None
    elif not isinstance(runner, MasterRunner):
        Worker(environment, runner)
