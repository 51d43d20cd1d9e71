"""The supervisor: one address, many processes. `python app.py --workers N` is this.

Standard library only, no greenlets, no threads: it must outlive everything that can go wrong in the
others. It owns what may never be lost, hands it on as descriptors, and decides what is restarted:

- the listeners, one a worker, bound before anything is executed: what waits in the queue of a worker
  that died is served by the next one. Or those that a service manager passed on, and no others;
- the router's Unix socket, the board (`comet.board`), and the *lifeline*, a pipe that nobody writes to:
  it ends when this process does, and then so do all the others;
- the router process (`comet.router`), where no Redis is in its place, and a generation of workers (`comet.generation`).

A new generation (SIGHUP) is the program executed anew: new code. Until it is ready the old one serves;
then the old one drains. Should the process that forks a generation die, the kernel gives its workers
to this process as children, and they go on until the next generation is ready.

All happens in one loop, `Supervisor.run`: signals, what generations say, and what is due. It alone speaks to the
service manager, if there is one (`comet.systemd`).
"""

import heapq
import logging
import math
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from comet import generation, service, systemd
from comet.board import FIRST_WORKER, ROUTER, SUPERVISOR, Board
from comet.kernel import check, limits, sockets
from comet.kernel.processes import adopt_orphans, waitpid
from comet.policy import MOST_DEATHS, CrashLoop, Plan, Restarts, Vigil, describe, plan
from comet.settings import Settings

BANKS = 3
"""Generations that may have processes at a time: one serves or comes up, one drains, and one may have
died. Each has slots of the board of its own."""

MARGIN = 3.0
"""Seconds beyond the grace time before a process that drains is killed; and before whoever should have
reported a death that was ordered is killed too."""

LOOK = 1.0
"""Seconds between two looks at the board."""

Greet = Callable[[Settings, Any, int], None]
"""Says once that the service is ready: its settings, its address, how many clients it is planned for."""

log = logging.getLogger("comet.supervisor")


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    born: float
    pid: int = 0  # until it has said so
    ready: bool = False
    killed: bool = False  # as hung, or because it took too long to drain


@dataclass(slots=True, eq=False)
class _Generation:
    number: int
    bank: int
    born: float
    process: subprocess.Popen[bytes]
    restarts: list[Restarts]
    workers: dict[int, _Worker] = field(default_factory=dict)
    ready: bool = False
    leaving: bool = False
    orphaned: bool = False
    """Its process has died: its workers are children of the supervisor."""

    def __str__(self) -> str:
        return f"generation {self.number}"

    def command(self, text: str) -> None:
        """Tell its process. One that has died is noticed otherwise; one that doesn't read is killed."""
        assert self.process.stdin is not None
        try:
            os.write(self.process.stdin.fileno(), text.encode() + b"\n")
        except BrokenPipeError:
            return
        except BlockingIOError:
            log.error("%s does not read what it is told: killing it", self)
            self.process.kill()


class Supervisor:
    """`program` is how this very program was started: the generations are started the same way.
    `arguments` are its own, for the router. `passed` are listeners that were passed on, if any were."""

    def __init__(
        self,
        settings: Settings,
        program: Sequence[str],
        arguments: Sequence[str],
        greet: Greet,
        passed: Sequence[socket.socket],
        notifier: systemd.Notifier,
    ) -> None:
        self._settings = settings
        self._program = program
        self._arguments = arguments
        self._greet = greet
        self._plan = Plan(0, 0, 0, [])
        self._listeners = list(passed)
        self._notifier = notifier
        self._vigil = Vigil(2 * (settings.hang_limit + MARGIN))
        self._told = False
        """The manager knows that the service is ready."""
        self._generations: list[_Generation] = []
        self._numbers = count(1)
        self._router: subprocess.Popen[bytes] | None = None
        self._router_born = 0.0
        self._router_restarts = Restarts()
        self._generation_restarts = Restarts()
        self._greeted = False
        self._reload_wanted = self._reload_failed = False
        self._stopping = False
        self._finished = False
        self._status = 0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = count()
        self._events = b""
        self._looked = time.monotonic()
        self._amnesty = 0.0
        self._counts = Counter[str]()
        self._ended_counts: dict[str, Any] = {}
        """What workers that have ended had counted."""

    # -- the loop

    def run(self) -> int:
        """Until SIGTERM or SIGINT, or until nothing helps; the exit status."""
        file_limit = limits.raise_file_limit()
        settings = self._settings
        self._plan = plan(
            settings.workers, settings.clients, settings.max_connections, file_limit, limits.system_files(), limits.cores()
        )  # fmt: skip
        port = self._listeners[0].getsockname()[1] if self._listeners else settings.port
        asked = check.Plan(self._plan.clients, port, self._plan.workers, settings.hibernate)
        for warning in (*self._plan.warnings, *check.warnings(asked)):
            log.warning("%s", warning)
        adopt_orphans()
        self._open()  # signals are kept from here on: one that comes early must not leave the folder behind
        if not self._listen():
            return 1
        folder = Path(tempfile.mkdtemp(prefix="comet-", dir=systemd.runtime_folder(os.environ)))
        try:
            path = folder / "router"
            try:
                self._router_listener = sockets.listen_locally(str(path))
            except OSError as error:
                log.error("can't make the router's socket %s: %s. Set TMPDIR to a folder with a shorter name.", path, error)
                return 1
            self._router_path = str(path)
            log.info(
                "%d workers of up to %d connections each (a limit of %d open files): plan for %d clients",
                self._plan.workers, self._plan.each, file_limit, self._plan.clients,
            )  # fmt: skip
            try:
                self._start_router()
                self._start_generation()
                self._later(LOOK, self._look)
                self._sign()
                while not self._finished:
                    self._step()
            finally:
                self._kill_everything()
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # who noticed the end first may have removed it
        return self._status

    def _listen(self) -> bool:
        """On what was passed on, or on an address of our own; whether that can be."""
        settings, count = self._settings, len(self._listeners)
        if count > self._plan.workers:
            log.error("%d sockets were passed on to %d workers: set --workers to %d or more", count, self._plan.workers, count)
            return False
        for listener in self._listeners:
            sockets.tune(listener, settings.send_buffer, settings.send_timeout)
        if count:
            log.info("%d workers accept on what was passed on: %d socket%s", self._plan.workers, count, "s" if count > 1 else "")
            return True
        try:
            self._listeners = sockets.listen_together(
                settings.host, settings.port, self._plan.workers, settings.send_buffer, settings.send_timeout
            )
        except OSError as error:
            log.error("can't listen on %s port %d: %s. Choose another with --host and --port.", settings.host, settings.port, error)
            return False
        return True

    def _open(self) -> None:
        """What the loop waits on, and what the others inherit."""
        self._board = Board.create(2 + BANKS * self._plan.workers)
        self._lifeline, self._lifeline_held = os.pipe()
        self._heard, self._said = os.pipe()
        self._wakeup, wake = os.pipe()
        for descriptor in (self._heard, self._wakeup, wake):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(wake)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda number, frame: None)  # its number arrives at the other end of `wake`
        self._poll = select.poll()
        for descriptor in (self._heard, self._wakeup):
            self._poll.register(descriptor, select.POLLIN)

    def _step(self) -> None:
        now = time.monotonic()
        timeout = max(0.0, self._due[0][0] - now) if self._due else LOOK
        self._poll.poll(math.ceil(timeout * 1000))
        try:
            numbers = os.read(self._wakeup, 4096)
        except BlockingIOError:
            numbers = b""
        self._hear()
        if signal.SIGCHLD in numbers:
            self._reap()
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._on_stop()
            elif number == signal.SIGHUP:
                self._reload_wanted = True
        self._reload_if_wanted()
        while self._due and self._due[0][0] <= time.monotonic():
            heapq.heappop(self._due)[2]()

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        heapq.heappush(self._due, (time.monotonic() + seconds, next(self._sequence), work))

    # -- what generations say

    def _hear(self) -> None:
        while True:
            try:
                data = os.read(self._heard, 65536)
            except BlockingIOError:
                return
            *lines, self._events = (self._events + data).split(b"\n")
            for line in lines:
                self._heard_of(line.decode())

    def _heard_of(self, line: str) -> None:
        what, number, *rest = line.split()
        one = next((one for one in self._generations if one.number == int(number)), None)
        if one is None:
            return  # it was given up, and this is its last word
        match what, [int(text) for text in rest]:
            case "loaded", []:
                if not one.leaving:
                    for worker in range(self._plan.workers):
                        self._fork(one, worker)
            case "born", [worker, pid]:
                self._born(one, worker, pid)
            case "ready", [worker, pid]:
                if worker in one.workers and one.workers[worker].pid == pid:
                    one.workers[worker].ready = True
                    self._is_ready(one)
            case "died", [worker, pid, status]:
                self._worker_died(one, worker, status)
            case _:
                raise ValueError(f"a generation said: {line}")

    def _born(self, one: _Generation, number: int, pid: int) -> None:
        worker = one.workers.setdefault(number, _Worker(number, time.monotonic()))
        worker.pid = pid
        if one.orphaned and not self._ours(worker):
            self._worker_died(one, number, -signal.SIGKILL)
        elif one.leaving:
            self._signal(one, worker, signal.SIGTERM)

    # -- generations

    def _start_generation(self) -> None:
        """Execute the program anew. It forks its workers when it has loaded."""
        if self._stopping:
            return
        banks = set(range(BANKS)) - {one.bank for one in self._generations}
        if not banks:  # crash upon crash: who drains longest makes room
            oldest = self._generations[0]
            log.warning("%s still drains, and is in the way of the next: killing it", oldest)
            self._kill(oldest)
            self._later(0.1, self._start_generation)
            return
        number, bank = next(self._numbers), min(banks)
        orders = generation.Orders(
            number, self._plan.workers, [listener.fileno() for listener in self._listeners], self._board.descriptor,
            2 + bank * self._plan.workers, self._lifeline, self._said, self._router_path,
        )  # fmt: skip
        process = subprocess.Popen(  # noqa: S603 - the very program that runs here
            self._program,
            stdin=subprocess.PIPE,
            pass_fds=orders.descriptors(),
            env={**os.environ, generation.VARIABLE: orders.text()},
            process_group=0,  # a Ctrl-C in a terminal is for this process: it ends the others in order
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        one = _Generation(number, bank, time.monotonic(), process, [Restarts() for _ in range(self._plan.workers)])
        self._generations.append(one)
        self._later(2 * self._settings.hang_limit, lambda: self._check_ready(one))

    def _fork(self, one: _Generation, number: int) -> None:
        if not self._stopping and not one.leaving and not one.orphaned:
            one.workers[number] = _Worker(number, time.monotonic())
            one.command(f"fork {number}")

    def _is_ready(self, one: _Generation) -> None:
        """Once all its workers are."""
        if (
            one.ready
            or one.leaving
            or not (len(one.workers) == self._plan.workers and all(worker.ready for worker in one.workers.values()))
        ):
            return
        one.ready = True
        if not self._greeted:
            self._greeted = True
            self._greet(self._settings, self._listeners[0].getsockname(), self._plan.clients)
        log.info("%s is ready after %.1f s", one, time.monotonic() - one.born)
        if self._told:
            self._notifier.ready(self._said_in_short())  # a reload is over
        for other in list(self._generations):
            if other is not one:
                self._leave(other)

    def _check_ready(self, one: _Generation) -> None:
        if one in self._generations and not one.ready and not one.leaving:
            self._unfit(one, f"was not ready after {2 * self._settings.hang_limit:g} s")

    def _unfit(self, one: _Generation, why: str) -> None:
        """A generation that never got ready."""
        if any(other.ready and not other.leaving and not other.orphaned for other in self._generations):
            self._counts["failed_reloads"] += 1
            log.error("the reload failed: %s %s. The old one goes on; see above for what is wrong with the new.", one, why)
            self._reload_failed = True
            self._notifier.ready(self._said_in_short())
            self._discard(one)
        elif not self._greeted:
            self._give_up(f"{one}, the first, {why}; what is wrong should stand above")
        else:
            self._discard(one)
            self._restart_generation(one, why)

    def _restart_generation(self, one: _Generation, why: str) -> None:
        self._counts["generation_restarts"] += 1
        try:
            delay = self._generation_restarts.after(time.monotonic() - one.born, one.ready)
        except CrashLoop:
            self._give_up(f"{one} {why}, as did {MOST_DEATHS - 1} before it; what is wrong should stand above")
            return
        log.error("%s %s; starting another in %.2g s", one, why, delay)
        self._later(delay, self._start_generation)

    def _reload_if_wanted(self) -> None:
        """A new generation, once nothing else is under way."""
        if self._reload_wanted and not self._stopping and len(self._generations) == 1 and self._generations[0].ready:
            self._reload_wanted = False
            if self._generations[0].orphaned:
                return  # the next generation is on its way, and will be as new
            self._counts["reloads"] += 1
            log.info("reloading: starting a new generation")
            self._reload_failed = False
            self._notifier.reloading()
            self._start_generation()

    def _leave(self, one: _Generation) -> None:
        """Drain it, and kill what is left after the grace time."""
        if one.leaving:
            return
        one.leaving = True
        for worker in one.workers.values():
            self._signal(one, worker, signal.SIGTERM)
        if one.workers:
            self._later(self._settings.grace + MARGIN, lambda: self._kill(one))
        else:
            self._empty(one)

    def _discard(self, one: _Generation) -> None:
        """Nobody is served by it."""
        one.leaving = True
        self._kill(one)
        if not one.workers:
            self._empty(one)

    def _kill(self, one: _Generation) -> None:
        """What is left of it, and its own process if it can't even do that."""
        if one not in self._generations:
            return
        if one.workers:
            log.warning("%s: killing %d workers that have not ended", one, len(one.workers))
        for worker in one.workers.values():
            worker.killed = True
            self._signal(one, worker, signal.SIGKILL)
        self._later(MARGIN, lambda: self._kill_process(one))

    def _kill_process(self, one: _Generation) -> None:
        if one in self._generations and not one.orphaned:
            log.error("the process of %s does not answer: killing it", one)
            one.process.kill()

    def _empty(self, one: _Generation) -> None:
        """The last worker of one that leaves has ended."""
        if not one.orphaned:
            one.command("end")  # and hear of its end in `_generation_died`
            self._later(MARGIN, lambda: self._kill_process(one))
            return
        self._generations.remove(one)
        log.info("%s has ended", one)
        if self._stopping and not self._generations:
            self._stop_router()

    def _generation_died(self, one: _Generation, status: int) -> None:
        one.orphaned = True
        assert one.process.stdin is not None
        one.process.stdin.close()
        for number, worker in list(one.workers.items()):
            if worker.pid == 0 or not self._ours(worker):
                del one.workers[number]
                self._board.clear(self._slot(one, number))
            elif worker.killed:
                os.kill(worker.pid, signal.SIGKILL)
        if one.leaving:
            if not one.workers:
                self._empty(one)
        elif not one.ready:
            self._unfit(one, describe(status))
        else:
            self._restart_generation(one, describe(status))
            if not one.workers:
                one.leaving = True
                self._empty(one)

    # -- workers

    def _slot(self, one: _Generation, number: int) -> int:
        return FIRST_WORKER + one.bank * self._plan.workers + number

    def _signal(self, one: _Generation, worker: _Worker, number: int) -> None:
        if not one.orphaned:
            one.command(f"signal {worker.number} {number}")
        elif worker.pid:
            os.kill(worker.pid, number)  # ours, and not reaped

    def _worker_died(self, one: _Generation, number: int, status: int) -> None:
        worker = one.workers.pop(number, None)
        if worker is None:
            return  # its end was seen before it was told
        self._board.clear(self._slot(one, number))
        if one.leaving:
            if not one.workers:
                self._empty(one)
            return
        if one.orphaned:
            log.error("worker %d of %s (process %d) %s; the next generation will replace it", number, one, worker.pid, describe(status))
            if not one.workers:
                one.leaving = True
                self._empty(one)
            return
        if not one.ready and self._greeted:
            self._unfit(one, f"has a worker that {describe(status)} before all were ready")
            return
        self._counts["worker_restarts"] += 1
        try:
            delay = one.restarts[number].after(time.monotonic() - worker.born, worker.ready)
        except CrashLoop:
            self._give_up(f"worker {number} {describe(status)}, as it did {MOST_DEATHS - 1} times before; what is wrong should stand above")
            return
        log.error("worker %d (process %d) %s; starting another in %.2g s", number, worker.pid, describe(status), delay)
        self._later(delay, lambda: self._fork(one, number))

    # -- the router

    def _start_router(self) -> None:
        """Its socket waits here meanwhile, with the workers that connect to it."""
        if self._stopping or self._settings.backplane:  # Redis orders the messages
            return
        inherited = (self._router_listener.fileno(), self._lifeline, self._board.descriptor)
        self._router = subprocess.Popen(  # noqa: S603 - our own module
            [
                sys.executable, "-m", "comet.router", "--listener-fd", str(inherited[0]), "--lifeline-fd", str(inherited[1]),
                "--board-fd", str(inherited[2]), "--slot", str(ROUTER), "--", *self._arguments,
            ],
            cwd=Path(__file__).parent.parent, stdin=subprocess.DEVNULL, pass_fds=inherited, process_group=0,
        )  # fmt: skip
        self._router_born = time.monotonic()

    def _router_died(self, status: int) -> None:
        assert self._router is not None
        said = self._board.look(ROUTER)
        ready = said is not None and said.pid == self._router.pid
        self._router = None
        self._board.clear(ROUTER)
        if self._stopping:
            if not self._generations:
                self._finished = True
            return
        self._counts["router_restarts"] += 1
        try:
            delay = self._router_restarts.after(time.monotonic() - self._router_born, ready)
        except CrashLoop:
            self._give_up(f"the router {describe(status)}, as it did {MOST_DEATHS - 1} times before; what is wrong should stand above")
            return
        log.error("the router %s; starting another in %.2g s", describe(status), delay)
        self._later(delay, self._start_router)

    def _stop_router(self) -> None:
        """The last thing."""
        if self._router is None:
            self._finished = True
            return
        self._router.terminate()
        router = self._router
        self._later(MARGIN, router.kill)

    # -- the ends of others

    def _reap(self) -> None:
        while True:
            try:
                pid, raw = waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            self._hear()  # what it said before
            self._ended(pid, os.waitstatus_to_exitcode(raw))

    def _ended(self, pid: int, status: int) -> None:
        if self._router is not None and pid == self._router.pid:
            self._router.returncode = status
            self._router_died(status)
            return
        for one in list(self._generations):
            if one.process.pid == pid and not one.orphaned:
                one.process.returncode = status
                self._generation_died(one, status)
                return
            for number, worker in list(one.workers.items()):
                if worker.pid == pid and one.orphaned:
                    self._worker_died(one, number, status)
                    return
        # else an orphan of an orphan: a worker that was born and died while its generation did

    def _ours(self, worker: _Worker) -> bool:
        """Whether a worker whose generation has died lives; then it is a child of this process."""
        try:
            return waitpid(worker.pid, os.WNOHANG)[0] == 0
        except ChildProcessError:  # reaped by the generation, which had no time to say so
            return False

    # -- who hangs

    def _look(self) -> None:
        self._later(LOOK, self._look)
        now = time.monotonic()
        if now - self._looked > 5 * LOOK:  # this process was stopped, perhaps the machine: so the others may have been
            self._amnesty = now
        self._looked = now
        limit = self._settings.hang_limit
        for one in list(self._generations):
            for worker in list(one.workers.values()):
                if worker.killed or now - max(worker.born, self._beat(self._slot(one, worker.number), worker.pid)) <= limit:
                    continue
                worker.killed = True
                self._counts["hung"] += 1
                log.error("worker %d (process %d) showed no sign of life for %g s: killing it", worker.number, worker.pid, limit)
                self._signal(one, worker, signal.SIGKILL)
                self._later(MARGIN, lambda one=one, worker=worker: self._check_killed(one, worker))  # type: ignore[misc]
        if self._router is not None and now - max(self._router_born, self._beat(ROUTER, self._router.pid)) > limit:
            self._counts["hung"] += 1
            log.error("the router showed no sign of life for %g s: killing it", limit)
            self._router.kill()
        self._board.write(SUPERVISOR, self._document())
        if self._told and not self._stopping and all(one.ready for one in self._generations):
            self._notifier.status(self._said_in_short())

    # -- the service manager

    def _sign(self) -> None:
        """Tell it once that the service is ready: its listeners are bound, router and workers are up. And from then on
        that it lives."""
        if not self._told:
            self._later(LOOK / 10, self._sign)
        elif self._notifier.watchdog:
            self._later(min(LOOK, self._notifier.watchdog / 3), self._sign)
        said = self._board.look(ROUTER)
        beats = {} if said is None else {ROUTER: said.beat}
        for one in self._generations:
            for worker in one.workers.values():
                place = FIRST_WORKER + worker.number
                beat = self._beat(self._slot(one, worker.number), worker.pid)
                if beat:
                    beats[place] = max(beats.get(place, 0.0), beat)
        routed = said is not None or bool(self._settings.backplane)  # Redis is not ours to wait for: /readyz tells
        if not self._told and self._greeted and routed and not self._stopping:
            self._told = True
            self._notifier.ready(self._said_in_short())
        if self._vigil.alive(time.monotonic(), beats) or self._stopping:
            self._notifier.beat()

    def _said_in_short(self) -> str:
        """A line for a person."""
        clients = sum(sum(said.document.get("clients", {}).values()) for said in self._board.read() if said.slot >= FIRST_WORKER)
        failed = "; the last reload failed, its log says why" if self._reload_failed else ""
        workers = f"{self._plan.workers} worker{'s' if self._plan.workers > 1 else ''}"
        return f"{workers}, {clients:,} of {self._plan.clients:,} clients{failed}"

    def _beat(self, slot: int, pid: int) -> float:
        """When it was last alive, as far as can be held against it."""
        said = self._board.look(slot)
        return max(self._amnesty, said.beat if said is not None and said.pid == pid else 0.0)

    def _check_killed(self, one: _Generation, worker: _Worker) -> None:
        if one.workers.get(worker.number) is worker:
            self._kill_process(one)

    def _document(self) -> dict[str, Any]:
        return {
            "role": "supervisor",
            "pid": os.getpid(),
            "workers": self._plan.workers,
            "capacity": self._plan.workers * self._plan.each,
            "planned_clients": self._plan.clients,
            "generation": max((one.number for one in self._generations if one.ready and not one.leaving), default=0),
            **{name: self._counts[name] for name in service.RESTARTS},
            "ended": self._ended_counts,
        }

    # -- stopping

    def _on_stop(self) -> None:
        if self._stopping:
            log.warning("a second signal: stopping at once")
            self._status = 1
            self._finished = True
            return
        log.info("stopping: %d workers drain for up to %g s", sum(len(one.workers) for one in self._generations), self._settings.grace)
        self._stop()

    def _give_up(self, why: str) -> None:
        if not self._stopping:
            log.critical("giving up: %s. No restart will help; stopping everything.", why)
            self._status = 1
            self._stop(f"giving up: {why}")

    def _stop(self, status: str = "stopping") -> None:
        self._stopping = True
        # drained, killed where it can't end, its process too, and the router last
        self._notifier.stopping(self._settings.grace + 4 * MARGIN, status)
        for one in list(self._generations):
            if one.ready:
                self._leave(one)
            else:
                self._discard(one)
        if not self._generations:
            self._stop_router()

    def _kill_everything(self) -> None:
        """What is left, if anything is: after a second signal, or a failure of this process."""
        os.close(self._lifeline_held)  # whoever is not known here ends itself
        for one in self._generations:
            if not one.orphaned:
                one.process.kill()
                one.process.returncode = os.waitstatus_to_exitcode(waitpid(one.process.pid, 0)[1])
                one.orphaned = True
            assert one.process.stdin is not None
            one.process.stdin.close()
        self._hear_the_last()
        for one in self._generations:
            for worker in one.workers.values():
                if worker.pid and self._ours(worker):
                    os.kill(worker.pid, signal.SIGKILL)
        if self._router is not None:
            self._router.kill()
            self._router.returncode = -signal.SIGKILL
        while True:
            try:
                waitpid(-1, 0)
            except ChildProcessError:
                return

    def _hear_the_last(self) -> None:
        """Who was born while this process was busy ending."""
        try:
            lines = (self._events + os.read(self._heard, 65536)).decode().splitlines()
        except BlockingIOError:
            return
        for line in lines:
            match line.split():
                case ["born", number, worker, pid]:
                    for one in self._generations:
                        if one.number == int(number):
                            one.workers[int(worker)] = _Worker(int(worker), 0.0, int(pid))
                case _:
                    pass  # who has died is not ours any more, and who is ready is killed too


def run(
    settings: Settings,
    program: Sequence[str],
    arguments: Sequence[str],
    greet: Greet,
    passed: Sequence[socket.socket] = (),
    notifier: systemd.Notifier | None = None,
) -> int:
    """See `Supervisor`."""
    return Supervisor(settings, program, arguments, greet, passed, notifier or systemd.Notifier()).run()
