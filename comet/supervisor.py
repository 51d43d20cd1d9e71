"""The supervisor: one address, many processes. `python app.py --workers N` is this.

Standard library only, no greenlets, no threads: it must outlive everything that can go wrong in the
others. It owns what may never be lost, hands it on as descriptors, and decides what is restarted:

- the listeners (`comet.listeners`), one a worker, bound before anything is executed: what waits in the queue of a
  worker that died is served by the next one. Or those that a service manager passed on, and no others;
- the router's Unix socket, the board (`comet.board`), the counts of connections by address (`comet.counts`), and the *lifeline*,
  a pipe that nobody writes to: it ends when this process does, and then so do all the others;
- the router process (`comet.router`), where no Redis is in its place, and a generation of workers (`comet.generation`).

A new generation (SIGHUP) is the program executed anew: new code. Until it is ready the old one serves;
then the old one drains. Should the process that forks a generation die, the kernel gives its workers
to this process as children, and they go on until the next generation is ready.

All happens in one loop, `Supervisor.run` (`comet.loop`): signals, what generations report, and what is due. What the
processes are to it, and how it tells them, is `comet.children`; the rules by which it decides are `comet.policy`. It alone
speaks to the service manager, if there is one (`comet.systemd`).
"""

import logging
import os
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from comet import listeners, service, systemd
from comet import log as logs
from comet.board import FIRST_WORKER, ROUTER, SUPERVISOR, Board
from comet.children import Generation, Reports, Router, Worker
from comet.counts import Counts
from comet.generation import FOREIGN, Orders, held
from comet.kernel import check, limits, sockets
from comet.kernel.processes import adopt_orphans, give_back, waitpid
from comet.loop import Loop
from comet.policy import MOST_DEATHS, Plan, Restarts, Vigil, describe, plan, stand_ins
from comet.settings import WRONG, Settings

BANKS = 3
"""Generations that may have processes at a time: one serves or comes up, one drains, and one may have
died. Each has slots of the board of its own."""

MARGIN = 3.0
"""Seconds beyond the grace time before a process that drains is killed; and before whoever should have
reported a death that was ordered is killed too."""

LOOK = 1.0
"""Seconds between two looks at the board."""

Greet = Callable[[Settings, Any, int], Callable[[], None]]
"""Says once where the service listens: its settings, its address, how many clients it is planned for. Returns what invites to try
it, to be called when messages can be ordered."""

log = logging.getLogger("comet.supervisor")


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
        self._passed = passed
        self._notifier = notifier
        self._vigil = Vigil(2 * (settings.hang_limit + MARGIN))
        self._told = False
        """The manager knows that the service is ready."""
        self._generations: list[Generation] = []
        self._last_number = 0
        """The number of the generation that was started last."""
        self._router: Router | None = None
        self._trial: tuple[Router, Generation] | None = None
        """A router of the code on the disk that shows whether it can be started, and the generation that needs it."""
        self._router_restarts = Restarts()
        self._generation_restarts = Restarts()
        self._greeted = False
        self._ordered = False
        """A router has been ready."""
        self._reload_wanted = self._reload_failed = False
        self._stopping = False
        self._finished = False
        self._status = 0
        self._looked = time.monotonic()
        self._turns = count()
        self._unserved: set[int] = set()
        """Listeners that no worker served at the last look."""
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
        port = self._passed[0].getsockname()[1] if self._passed else settings.port
        clients, workers, bodies, per_address = self._plan.clients, self._plan.workers, settings.max_bodies, settings.max_per_address
        asked = check.Plan(clients, port, workers, settings.hibernate, bodies=bodies, per_address=per_address)
        for warning in (*self._plan.warnings, *check.warnings(asked)):
            log.warning("%s", warning)
        adopt_orphans()
        try:
            self._open()  # signals are kept from here on: one that comes early must not leave the folder behind
            listening = listeners.listen(settings, self._passed, self._plan.workers)
            if listening is None:
                return 1
            self._listeners = listening
            folder = Path(tempfile.mkdtemp(prefix="comet-", dir=systemd.runtime_folder(os.environ)))
        except OSError as error:
            log.error("can't start: %s", error)
            return 1
        try:
            path = folder / "router"
            try:
                self._router_listener = sockets.listen_locally(str(path))
                self._router_file = sockets.file_of(str(path))  # a cleaner of /tmp may remove the folder
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
                give_back()  # what it took to get here
                self._loop.later(LOOK, self._look)
                self._sign()
                while not self._finished:
                    self._step()
            finally:
                self._kill_everything()
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # who noticed the end first may have removed it
        return self._status

    def _open(self) -> None:
        """What the loop waits on, and what the others inherit."""
        self._board = Board.create(FIRST_WORKER + BANKS * self._plan.workers)
        self._connections = Counts.create(BANKS * self._plan.workers)
        self._lifeline, self._lifeline_held = os.pipe()
        self._reports = Reports()
        self._loop = Loop((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD), [self._reports.descriptor])

    def _step(self) -> None:
        numbers = self._loop.wait(LOOK)
        self._hear()
        if signal.SIGCHLD in numbers:
            self._reap()
        for number in numbers:
            if number in (signal.SIGTERM, signal.SIGINT):
                self._on_stop()
            elif number == signal.SIGHUP:
                self._reload_wanted = True
        self._reload_if_wanted()
        self._loop.run_due()

    # -- what generations report

    def _hear(self) -> None:
        for what, number, more in self._reports.read():
            one = next((one for one in self._generations if one.number == number), None)
            if one is not None:
                self._heard(one, what, more)
            elif what == "born":  # else it was given up, and this is its last word
                _kill_stray(*more)

    def _heard(self, one: Generation, what: str, more: list[int]) -> None:
        match what, more:
            case "loaded", []:
                if not one.leaving:
                    for worker in range(self._plan.workers):
                        self._fork(one, worker)
            case "born", [worker, pid]:
                self._born(one, worker, pid)
            case "ready", [worker, pid]:
                if worker in one.workers and one.workers[worker].pid == pid:
                    one.workers[worker].ready = True
                    one.missing.pop(worker, None)
                    self._is_ready(one)
            case "died", [worker, 0, number]:
                self._worker_died(one, worker, f"can't be started ({os.strerror(number)})")
            case "died", [worker, _, status]:
                self._worker_died(one, worker, describe(status), foreign=status == FOREIGN)
            case _:
                raise ValueError(f"{one} said: {what} {more}")

    def _born(self, one: Generation, number: int, pid: int) -> None:
        worker = one.workers.setdefault(number, Worker(number, time.monotonic()))
        worker.pid = pid
        if one.orphaned and not worker.lives():
            self._worker_died(one, number, describe(-signal.SIGKILL))
        elif one.leaving:
            one.signal(worker, signal.SIGTERM)

    # -- generations

    def _start_generation(self) -> None:
        """Execute the program anew. It forks its workers when it has loaded."""
        if self._stopping:
            return
        workers = self._plan.workers
        banks = set(range(FIRST_WORKER, FIRST_WORKER + BANKS * workers, workers)) - {one.first_slot for one in self._generations}
        if not banks:  # crash upon crash: who drains longest makes room
            oldest = self._generations[0]
            log.warning("%s still drains, and is in the way of the next: killing it", oldest)
            self._kill(oldest)
            self._loop.later(0.1, self._start_generation)
            return
        self._last_number += 1
        orders = Orders(
            self._last_number, workers, [listener.fileno() for listener in self._listeners], self._board.descriptor,
            min(banks), self._lifeline, self._reports.inherited, self._router_path, self._connections.descriptor,
            self._router_file,
        )  # fmt: skip
        try:
            one = Generation.start(self._program, orders)
        except OSError as error:
            self._generation_failed(f"generation {orders.number}", f"can't be started ({error.strerror})")
            return
        self._generations.append(one)
        self._use_columns()
        self._loop.later(2 * self._settings.hang_limit, lambda: self._check_ready(one))

    def _use_columns(self) -> None:
        """Have workers read the counts of those workers alone that can be there."""
        first = max((one.first_slot for one in self._generations), default=FIRST_WORKER)
        self._connections.use(first - FIRST_WORKER + self._plan.workers)

    def _fork(self, one: Generation, number: int) -> None:
        if not self._stopping and not one.leaving and not one.orphaned:
            one.fork(number)

    def _is_ready(self, one: Generation) -> None:
        """Once all its workers are; or, where nobody else serves, once all are that can be started."""
        waited_for = [
            number
            for number, restarts in enumerate(one.restarts)
            if not (number in one.workers and one.workers[number].ready) and not (self._greeted and restarts.hopeless)
        ]
        if one.ready or one.leaving or waited_for:
            return
        one.ready = True
        if not self._greeted:
            self._greeted = True
            self._invite(self._greet(self._settings, self._listeners[0].getsockname(), self._plan.clients))
        without = f" without {len(one.missing)} of its workers" if one.missing else ""
        log.info("%s is ready%s after %.1f s", one, without, time.monotonic() - one.born)
        if self._told:
            self._notifier.ready(self._said_in_short())  # a reload is over
        for other in list(self._generations):
            if other is not one:
                self._leave(other)

    def _serves(self, besides: Generation | None = None) -> bool:
        """Return whether somebody serves: the service has been ready, and still has a worker, of another generation than `besides`."""
        return self._greeted and any(
            worker.ready for one in self._generations if one is not besides and not one.leaving for worker in one.workers.values()
        )

    def _check_ready(self, one: Generation) -> None:
        if one in self._generations and not one.ready and not one.leaving:
            if self._serves() and not self._serves(besides=one):
                return  # nobody but this one serves
            self._unfit(one, f"was not ready after {2 * self._settings.hang_limit:g} s")

    def _unfit(self, one: Generation, why: str, status: int = 1) -> None:
        """Handle a generation that never got ready; `status` is what its process exited with, if it did."""
        self._generation_failed(str(one), why, time.monotonic() - one.born, status, one.renewed)
        if not self._stopping:
            self._discard(one)

    def _generation_failed(self, name: str, why: str, lived: float = 0.0, status: int = 1, renewed: bool = False) -> None:
        """Handle the failed start of a generation, which may have no process: leave the old one if it serves, else try again. Behind a
        `renewed` router nobody else does."""
        if self._whole and not renewed:
            self._counts["failed_reloads"] += 1
            log.error("the reload failed: %s %s. The old one goes on; see above for what is wrong with the new.", name, why)
            self._reload_failed = True
            self._notifier.ready(self._said_in_short())
        elif not self._greeted:
            self._give_up(f"{name}, the first, {why}; what is wrong should stand above", WRONG if status == WRONG else 1)
        else:
            self._restart_generation(name, why, lived, ready=False)

    @property
    def _whole(self) -> bool:
        """Some generation is ready, and stays, and its workers can order messages."""
        return any(one.ready and not one.leaving and not one.orphaned and not self._foreign(one) for one in self._generations)

    def _foreign(self, one: Generation) -> bool:
        """Return whether the router is known to be of other code than workers of this generation, which then have no link to it."""
        router, said = self._router, self._board.look(ROUTER)
        if router is None or said is None or said.pid != router.pid:
            return False
        slots = map(self._board.look, map(one.slot, one.workers))
        workers = [slot.document for slot in slots if slot is not None and slot.document.get("role") == "worker"]  # else it has failed
        return any(worker.get("speaks") != said.document.get("speaks") for worker in workers)

    def _restart_generation(self, name: str, why: str, lived: float, ready: bool) -> None:
        self._counts["generation_restarts"] += 1
        delay = self._generation_restarts.after(lived, ready)
        if self._generation_restarts.hopeless and not self._serves():
            self._give_up(f"{name} {why}, as did {MOST_DEATHS - 1} before it; what is wrong should stand above")
            return
        log.error("%s %s; starting another in %.2g s", name, why, delay)
        last = self._last_number
        self._loop.later(delay, lambda: self._start_after(last))

    def _start_after(self, last: int) -> None:
        """Start a generation, unless a reload was faster: one since that of number `last`."""
        if self._last_number == last:
            self._start_generation()

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

    def _leave(self, one: Generation) -> None:
        """Drain it, and kill what is left after the grace time."""
        if one.leaving:
            return
        one.leaving = True
        for worker in one.workers.values():
            one.signal(worker, signal.SIGTERM)
        if one.workers:
            self._loop.later(LOOK, lambda: self._check_reads(one))
            self._loop.later(self._settings.grace + MARGIN, lambda: self._kill(one))
        else:
            self._empty(one)

    def _discard(self, one: Generation) -> None:
        """Nobody is served by it."""
        one.leaving = True
        self._kill(one)
        if not one.workers:
            self._empty(one)

    def _kill(self, one: Generation) -> None:
        """What is left of it, and its own process if it can't even do that."""
        if one not in self._generations:
            return
        if one.workers:
            log.warning("%s: killing %d workers that have not ended", one, len(one.workers))
        for worker in one.workers.values():
            worker.killed = True
            one.signal(worker, signal.SIGKILL)
        self._loop.later(MARGIN, lambda: self._kill_process(one))

    def _check_reads(self, one: Generation) -> None:
        """Kill the process of a generation that leaves, if it has not read that: it was stopped, say. Its workers then are children of this
        process, which tells them by itself."""
        if one in self._generations and not one.orphaned and not one.reads:
            self._kill_process(one)

    def _kill_process(self, one: Generation) -> None:
        if one in self._generations and not one.orphaned:
            log.error("the process of %s does not answer: killing it", one)
            one.kill()

    def _empty(self, one: Generation) -> None:
        """The last worker of one that leaves has ended."""
        if not one.orphaned:
            one.end()  # and hear of its end in `_generation_died`
            self._loop.later(MARGIN, lambda: self._kill_process(one))
            return
        self._generations.remove(one)
        self._use_columns()
        log.info("%s has ended", one)
        if self._stopping and not self._generations:
            self._stop_router()

    def _generation_died(self, one: Generation, status: int) -> None:
        one.died(status)
        for number, worker in list(one.workers.items()):
            if worker.pid == 0 or not worker.lives():
                del one.workers[number]
                self._forget(one, number)
                one.lacks(number, f"worker {number} has ended, and so has the process that forks workers")
            elif worker.killed or one.leaving:  # perhaps nobody has told it
                os.kill(worker.pid, signal.SIGKILL if worker.killed else signal.SIGTERM)
        if one.leaving:
            if not one.workers:
                self._empty(one)
        elif not one.ready:
            self._unfit(one, describe(status), status)
        else:
            self._restart_generation(str(one), describe(status), time.monotonic() - one.born, ready=True)
            if not one.workers:
                one.leaving = True
                self._empty(one)

    # -- workers

    def _worker_died(self, one: Generation, number: int, why: str, foreign: bool = False) -> None:
        """Handle the end of a worker, or a fork that was refused; `why` goes on behind its name. `foreign` is one that found the router to
        be of other code."""
        worker = one.workers.pop(number, None)
        if worker is None:
            return  # its end was seen before it was told
        reason = self._forget(one, number)
        if reason:
            why = f"{why} ({reason})"
        if one.leaving:
            if not one.workers:
                self._empty(one)
            return
        if one.orphaned:
            log.error("worker %d of %s (process %d) %s; the next generation will replace it", number, one, worker.pid, why)
            one.lacks(number, f"worker {number} {why}")
            if not one.workers:
                one.leaving = True
                self._empty(one)
            return
        if foreign and not one.ready and (self._settings.renew_router or not self._whole):
            self._renew_router(one, worker)
            self._loop.later(LOOK / 10, lambda: self._fork(one, number))
            return
        if not one.ready and self._serves(besides=one):
            self._unfit(one, f"has a worker that {why} before all were ready")
            return
        self._counts["worker_restarts"] += 1
        restarts = one.restarts[number]
        delay = restarts.after(time.monotonic() - worker.born, worker.ready)
        if restarts.hopeless and not self._serves():
            self._give_up(f"worker {number} {why}, as it did {MOST_DEATHS - 1} times before; what is wrong should stand above")
            return
        process = f" (process {worker.pid})" if worker.pid else ""
        log.error("worker %d%s %s; starting another in %.2g s", number, process, why, delay)
        one.lacks(number, f"worker {number} {why}")
        self._is_ready(one)
        self._loop.later(delay, lambda: self._fork(one, number))

    def _stand_ins(self) -> dict[str, list[int]]:
        """Say which workers accept in the place of those that do not serve, as JSON has it. In the queue of one that can't be started
        connections would wait for ever; one that is started at once needs nobody."""
        serving = {
            one.slot(number): held(number, len(self._listeners))
            for one in self._generations if not one.leaving
            for number, worker in one.workers.items() if worker.ready and not worker.killed
        }  # fmt: skip
        unserved = set(range(len(self._listeners))) - {own for own, *_ in serving.values()}
        lasting, self._unserved = unserved & self._unserved, unserved
        return {str(slot): numbers for slot, numbers in stand_ins(sorted(lasting), serving, next(self._turns)).items()}

    def _forget(self, one: Generation, number: int) -> str:
        """Keep what a worker that has ended had counted; free its slot, and give its connections back to their addresses. Return the reason
        that it left, "" if none."""
        self._connections.clear(one.slot(number) - FIRST_WORKER)
        said = self._board.look(one.slot(number))
        if said is None:
            return ""
        service.add(self._ended_counts, said.document, service.LASTING)
        self._board.clear(one.slot(number))
        return str(said.document.get("why", ""))

    def _missing(self) -> Mapping[str, Any]:
        """How many workers are missing, since when, and why, for /readyz and /stats."""
        missing = sorted((lost.since, lost.why) for one in self._generations if not one.leaving for lost in one.missing.values())
        if not missing:
            return service.NOBODY_MISSING
        since, why = missing[0]
        return {"workers": len(missing), "seconds": int(time.monotonic() - since), "why": why}

    # -- the router

    def _start_router(self) -> None:
        """Its socket waits here meanwhile, with the workers that connect to it."""
        if self._stopping or self._settings.backplane:  # Redis orders the messages
            return
        try:
            self._router = self._new_router()
        except OSError as error:
            self._restart_router(f"can't be started ({error.strerror})", 0.0, ready=False)

    def _new_router(self, *, trial: bool = False) -> Router:
        """Start a router of the code on the disk. Raises OSError."""
        listener, board = self._router_listener.fileno(), self._board.descriptor
        return Router.start(listener, self._lifeline, board, self._plan.workers, self._arguments, trial=trial)

    def _router_died(self, status: int) -> None:
        assert self._router is not None
        self._router.died(status)
        said = self._board.look(ROUTER)
        ready = said is not None and said.pid == self._router.pid
        lived = time.monotonic() - self._router.born
        self._router = None
        self._board.clear(ROUTER)
        if self._stopping:
            if not self._generations:
                self._finished = True
            return
        self._restart_router(describe(status), lived, ready)

    def _restart_router(self, why: str, lived: float, ready: bool) -> None:
        self._counts["router_restarts"] += 1
        self._ordered |= ready
        delay = self._router_restarts.after(lived, ready)
        if self._router_restarts.hopeless and not self._ordered:
            self._give_up(f"the router {why}, as it did {MOST_DEATHS - 1} times before; what is wrong should stand above")
            return
        log.error("the router %s; starting another in %.2g s", why, delay)
        self._loop.later(delay, self._start_router)

    def _renew_router(self, one: Generation, worker: Worker) -> None:
        """Have another router in the place of one that does not speak as the workers of this generation do, of which one has found so."""
        router = self._router
        if router is None or router.born > worker.born:
            return  # it is on its way
        if one.renewed or self._trial is not None:
            return
        try:
            trial = self._new_router(trial=True)
        except OSError as error:
            self._trial_failed(one, f"can't be started ({error.strerror})")
            return
        self._trial = trial, one
        self._loop.later(self._settings.hang_limit, trial.kill)

    def _trial_ended(self, trial: Router, one: Generation, status: int) -> None:
        """End the router if another can be started, for a generation that needs it; otherwise that generation can't serve."""
        trial.died(status)
        self._trial = None
        if self._stopping or one.leaving or one.ready:  # ready: the router has died meanwhile, and another is there
            return
        if status:
            self._trial_failed(one, describe(status))
            return
        log.warning("the router is of other code than %s: starting another; everybody is told a gap", one)
        one.renewed = True
        router = self._router
        if router is not None and router.born < trial.born:
            router.terminate()
            self._loop.later(MARGIN, router.kill)

    def _trial_failed(self, one: Generation, why: str) -> None:
        self._unfit(one, f"needs a router of its own code, which {why} when it was tried")

    def _check_router(self) -> None:
        """Reload once if a router that had to be started anew does not speak as the workers do: the code on the disk is newer."""
        router, said = self._router, self._board.look(ROUTER)
        if router is None or router.checked or said is None or said.pid != router.pid or len(self._generations) > 1:
            return
        router.checked = True
        if any(self._foreign(one) for one in self._generations if one.ready and not one.leaving):
            log.warning("the router that was started is of other code than the workers: reloading")
            self._reload_wanted = True

    def _stop_router(self) -> None:
        """The last thing."""
        if self._router is None:
            self._finished = True
            return
        self._router.terminate()
        self._loop.later(MARGIN, self._router.kill)

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
            self._router_died(status)
            return
        if self._trial is not None and pid == self._trial[0].pid:
            self._trial_ended(*self._trial, status)
            return
        for one in list(self._generations):
            if one.process.pid == pid and not one.orphaned:
                self._generation_died(one, status)
                return
            for number, worker in list(one.workers.items()):
                if worker.pid == pid and one.orphaned:
                    self._worker_died(one, number, describe(status))
                    return
        # else an orphan of an orphan: a worker that was born and died while its generation did

    # -- who hangs

    def _look(self) -> None:
        self._loop.later(LOOK, self._look)
        logs.tend()
        now = time.monotonic()
        if now - self._looked > 5 * LOOK:  # this process was stopped, perhaps the machine: so the others may have been
            self._amnesty = now
        self._looked = now
        limit = self._settings.hang_limit
        for one in list(self._generations):
            for worker in list(one.workers.values()):
                if worker.killed or now - max(worker.born, self._beat(one.slot(worker.number), worker.pid)) <= limit:
                    continue
                worker.killed = True
                self._counts["hung"] += 1
                log.error("worker %d (process %d) showed no sign of life for %g s: killing it", worker.number, worker.pid, limit)
                one.signal(worker, signal.SIGKILL)
                self._loop.later(MARGIN, lambda one=one, worker=worker: self._check_killed(one, worker))  # type: ignore[misc]
        if self._router is not None and now - max(self._router.born, self._beat(ROUTER, self._router.pid)) > limit:
            self._counts["hung"] += 1
            log.error("the router showed no sign of life for %g s: killing it", limit)
            self._router.kill()
        self._check_router()
        self._board.write(SUPERVISOR, self._document())
        if self._told and not self._stopping and all(one.ready for one in self._generations):
            self._notifier.status(self._said_in_short())

    # -- the service manager

    def _sign(self) -> None:
        """Tell it once that the service is ready: its listeners are bound, router and workers are up. And from then on
        that it lives."""
        if not self._told:
            self._loop.later(LOOK / 10, self._sign)
        elif self._notifier.active:
            self._loop.later(self._notifier.interval, self._sign)
        said = self._board.look(ROUTER)
        now = time.monotonic()
        beats = {} if said is None else {ROUTER: said.beat}
        if self._router is None:
            beats[ROUTER] = now  # it is being replaced, or there is none
        for one in self._generations:
            for worker in one.workers.values():
                place = FIRST_WORKER + worker.number
                beat = self._beat(one.slot(worker.number), worker.pid)
                if beat:
                    beats[place] = max(beats.get(place, 0.0), beat)
            beats |= {FIRST_WORKER + number: now for number in one.missing}  # they are being replaced
        routed = said is not None or bool(self._settings.backplane)  # Redis is not ours to wait for: /readyz tells
        if not self._told and self._greeted and routed and not self._stopping:
            self._told = True
            self._notifier.ready(self._said_in_short())
        if self._vigil.alive(now, beats) or self._stopping:
            self._notifier.beat()

    def _invite(self, invite: Callable[[], None]) -> None:
        """Invite to try it once all workers can order messages."""
        said = [self._board.look(one.slot(number)) for one in self._generations if one.ready for number in one.workers]
        if said and all(slot is not None and slot.document.get("ready") for slot in said):
            invite()
        elif not self._stopping:
            self._loop.later(LOOK / 10, lambda: self._invite(invite))

    def _said_in_short(self) -> str:
        """A line for a person."""
        clients = sum(sum(said.document.get("clients", {}).values()) for said in self._board.read() if said.slot >= FIRST_WORKER)
        failed = "; the last reload failed, its log says why" if self._reload_failed else ""
        workers = f"{self._plan.workers} worker{'s' if self._plan.workers > 1 else ''}"
        missing = self._missing()
        lacking = f" ({missing['workers']} missing: {missing['why']})" if missing["workers"] else ""
        return f"{workers}{lacking}, {clients:,} of {self._plan.clients:,} clients{failed}"

    def _beat(self, slot: int, pid: int) -> float:
        """When it was last alive, as far as can be held against it."""
        said = self._board.look(slot)
        return max(self._amnesty, said.beat if said is not None and said.pid == pid else 0.0)

    def _check_killed(self, one: Generation, worker: Worker) -> None:
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
            "missing": self._missing(),
            "stand_ins": self._stand_ins(),
            "log_dropped": logs.dropped(),
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

    def _give_up(self, why: str, status: int = 1) -> None:
        if not self._stopping:
            log.critical("giving up: %s. No restart will help; stopping everything.", why)
            self._status = status
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
            one.kill_and_reap()
        self._hear_the_last()
        for one in self._generations:
            for worker in one.workers.values():
                if worker.pid and worker.lives():
                    os.kill(worker.pid, signal.SIGKILL)
        for router in (self._router, self._trial and self._trial[0]):
            if router is not None:
                router.kill()
                router.died(-signal.SIGKILL)
        while True:
            try:
                waitpid(-1, 0)
            except ChildProcessError:
                return

    def _hear_the_last(self) -> None:
        """Who was born while this process was busy ending. Who has died is not ours any more, and who is ready is killed too."""
        known = {one.number: one for one in self._generations}
        for what, number, more in self._reports.read():
            if what == "born":
                worker, pid = more
                if number in known:
                    known[number].workers[worker] = Worker(worker, 0.0, pid)
                else:
                    _kill_stray(worker, pid)


def _kill_stray(number: int, pid: int) -> None:
    """Kill a worker that nobody counts: it was forked, and had not said so, when the process of its generation was killed. That process was
    reaped, so the worker is a child of this one."""
    stray = Worker(number, 0.0, pid)
    if stray.lives():
        log.warning("worker %d (process %d) was born behind the end of its generation: killing it", number, pid)
        os.kill(pid, signal.SIGKILL)


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
