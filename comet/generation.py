"""A generation of workers: the process that loads the code once and forks them.

The supervisor executes the program anew for each generation, with `Orders` in its environment. That
process imports everything, freezes the heap, so that its workers share it, and then does what it is
told on its standard input, a line each:

    fork <worker>               a new process runs `work` as worker number so-and-so
    signal <worker> <number>    pass on a signal
    end                         exit as soon as there are no workers

and says what happens on a pipe that all generations share, a line each, short enough to be written at
once:

    loaded <generation>
    born <generation> <worker> <pid>            by the worker, before anything else
    ready <generation> <worker> <pid>           by the worker, when it serves
    died <generation> <worker> <pid> <status>
    died <generation> <worker> 0 <errno>        the kernel refused the fork (a word of its own would end an older supervisor)

It decides nothing: what is restarted, and when, is the supervisor's (`comet.supervisor`). It is the
parent of its workers and nobody else reaps them; so a process id that it signals is theirs.

There must be no event loop, greenlet or thread before a fork, since two processes can't share one. So
this module uses the standard library past gevent's patch, and waits with an epoll of its own.

When the supervisor is gone its standard input ends: the workers see the same on the *lifeline* and end
themselves; it waits for them, kills who can't, and removes what the supervisor would have removed.
"""

import gc
import json
import logging
import os
import select
import shutil
import signal
import socket
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from comet import log as logs
from comet.board import FIRST_WORKER, SUPERVISOR, Board
from comet.kernel import limits
from comet.kernel.processes import close, fork, give_back, give_way, waitpid
from comet.kernel.sockets import epoll, way_to
from comet.kernel.stock import stock

VARIABLE = "COMET_GENERATION"
"""The environment variable that holds the orders."""

FOREIGN = 4
"""A worker's exit status, if the router is of another version of the code (`comet.backplane.frames.VERSION`)."""

ORPHANED_GRACE = 2.0
"""Seconds that a worker whose supervisor is gone has to end itself. Nobody would restart it, so its
clients are better off elsewhere soon."""

TEND = 5.0
"""Seconds between two looks whether what this process has logged is written."""

WHY = 300
"""Characters of the reason for which a worker ends that are kept."""

HELD = 100
"""Listeners that a worker has open, its own and the next by number, so that it can accept in the place of their workers. Beside as many
connections that are being refused they fit into the descriptors that are kept back from clients (`limits.RESERVE`)."""

log = logging.getLogger("comet.generation")


class Unfit(Exception):
    """This process can't serve; one sentence says why."""


class Orders(NamedTuple):
    """What the supervisor tells a generation. All but `number`, `workers` (how many), `first_slot` (the board's, of
    worker 0) and `router`, the path of the router's socket, are descriptors that it inherits. Where there are fewer `listeners`
    than workers, some workers share one, with its queue. A supervisor of an older comet has no `counts`, and no `router_file`."""

    number: int
    workers: int
    listeners: list[int]
    board: int
    first_slot: int
    lifeline: int
    events: int
    router: str
    counts: int | None = None
    router_file: int | None = None

    def descriptors(self) -> list[int]:
        """Those that it inherits."""
        lately = (self.counts, self.router_file)
        return [*self.listeners, self.board, self.lifeline, self.events, *(one for one in lately if one is not None)]

    def text(self) -> str:
        """For the environment."""
        return json.dumps(self._asdict())

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Self | None:
        """Return the orders in the environment, which make this process a generation; None if there are none. Raises Unfit if no
        supervisor has set them."""
        text = environ.pop(VARIABLE, None)
        if text is None:
            return None
        try:
            orders = cls(**json.loads(text))
            for descriptor in orders.descriptors():
                os.fstat(descriptor)
        except (ValueError, TypeError, OSError):
            raise Unfit(f"the variable {VARIABLE} is for the processes that a supervisor starts, and holds no orders: unset it.") from None
        return orders


def held(worker: int, listeners: int) -> Sequence[int]:
    """Return the numbers of the listeners, of so many, that a worker has open; the first is its own."""
    return [(worker + step) % listeners for step in range(min(HELD, listeners))]


@dataclass(frozen=True, slots=True)
class Place:
    """The part of a service that one worker has: its number (`worker`, from 0) among how many (`workers`), its listener, those of
    `others` by number, its slot of the board, the descriptor of the counts of connections by address (None if each worker counts for
    itself) and its column there, the path of the router's socket and the one to connect by (`way`), and the end of the lifeline that
    ends when the supervisor does."""

    generation: int
    worker: int
    workers: int
    listener: socket.socket
    others: dict[int, socket.socket]
    board: Board
    slot: int
    counts: int | None
    column: int
    lifeline: int
    router: str
    way: str
    events: int

    def heed(self) -> None:
        """Take signals from now on."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def ready(self) -> None:
        """Tell the supervisor that this worker serves."""
        _say(self.events, f"ready {self.generation} {self.worker} {os.getpid()}")

    def stands_in(self) -> list[socket.socket]:
        """Return the listeners of others that this worker is to accept from at present, since their workers do not serve; none after
        `let_go`."""
        said = self.board.look(SUPERVISOR)
        slots: dict[str, list[int]] = {} if said is None else said.document.get("stand_ins", {})  # an older supervisor names none
        return [self.others[number] for number in slots.get(str(self.slot), ()) if number in self.others]

    def let_go(self) -> None:
        """Close the listeners of others."""
        while self.others:
            _, listener = self.others.popitem()
            close(listener.detach())

    def failed(self, why: str) -> None:
        """Leave word on the board why this worker ends: the supervisor tells it in the log and in /stats."""
        said = self.board.look(self.slot)
        counted = said.document if said is not None and said.pid == os.getpid() else {}
        self.board.write(self.slot, {**counted, "role": "failed", "why": " ".join(why.split())[:WHY]})


Work = Callable[[Place], int]
"""What a worker does; answers its exit status."""

STOPPING = (signal.SIGTERM, signal.SIGINT)
"""A generation doesn't listen to these, and a worker only once it can: only the supervisor ends them,
in order. Whoever signals the whole group of processes, as service managers do, means it."""


def run(orders: Orders, work: Work) -> int:
    """Be a generation, until told to end. Call it with everything imported."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    stock(signal, "signal")(signal.SIGHUP, signal.SIG_IGN)
    # what is garbage now would be collected later, in each worker, and tear shared pages apart
    gc.collect()
    gc.freeze()
    give_back()
    return _Generation(orders, work).run()


class _Generation:
    def __init__(self, orders: Orders, work: Work) -> None:
        self._orders = orders
        self._work = work
        self._workers: dict[int, int] = {}  # worker -> pid
        self._ending = False
        self._abandoned: float | None = None
        self._commands = b""
        self._wakeup, self._wake = os.pipe()
        for descriptor in (self._wakeup, self._wake):
            os.set_blocking(descriptor, False)
        self._epoll = epoll()

    def run(self) -> int:
        signal.set_wakeup_fd(self._wake)
        stock(signal, "signal")(signal.SIGCHLD, lambda number, frame: None)  # it wakes the epoll
        self._epoll.register(self._wakeup, select.EPOLLIN)
        self._epoll.register(0, select.EPOLLIN)
        _say(self._orders.events, f"loaded {self._orders.number}")
        while self._workers or not self._ending:
            logs.tend()
            for descriptor, _ in self._epoll.poll(TEND if self._abandoned is None else 0.2):
                if descriptor == 0:
                    self._obey()
                else:
                    os.read(self._wakeup, 4096)
            self._reap()
            if self._abandoned is not None and time.monotonic() > self._abandoned:
                for pid in self._workers.values():
                    os.kill(pid, signal.SIGKILL)
        if self._abandoned is not None:
            clean_up(self._orders.router)
        return 0

    def _obey(self) -> None:
        data = os.read(0, 65536)
        if not data:
            log.warning("the supervisor is gone: ending")
            self._epoll.unregister(0)
            self._ending = True
            self._abandoned = time.monotonic() + 2 * ORPHANED_GRACE
            return
        *lines, self._commands = (self._commands + data).split(b"\n")
        for line in lines:
            match line.decode().split():
                case ["fork", worker]:
                    self._fork(int(worker))
                case ["signal", worker, number]:
                    if int(worker) in self._workers:
                        os.kill(self._workers[int(worker)], int(number))
                case ["end"]:
                    self._ending = True
                case unknown:
                    raise ValueError(f"not a command: {unknown}")

    def _fork(self, worker: int) -> None:
        try:
            pid = fork()
        except OSError as error:  # no process is left, or no memory: the supervisor decides when to try again
            _say(self._orders.events, f"died {self._orders.number} {worker} 0 {error.errno}")
            return
        if pid:
            self._workers[worker] = pid
            return
        status = 1
        try:
            status = self._be(worker)
        finally:
            logging.shutdown()
            os._exit(status)  # nothing here may run the end of the parent's program

    def _be(self, worker: int) -> int:
        """Be a worker, in the new process; its exit status."""
        place = None
        try:
            place = self._place(worker)
            return self._work(place)
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else 1
        except BaseException as error:
            if isinstance(error, Unfit) or limits.is_shortage(error):
                log.error("worker %d can't serve: %s", worker, error)
            else:
                log.exception("worker %d failed", worker)
            if place is not None:
                place.failed(str(error) or type(error).__name__)
            return 1

    def _place(self, worker: int) -> Place:
        """In the new process: let go of what is the parent's and the other workers'."""
        orders = self._orders
        _say(orders.events, f"born {orders.number} {worker} {os.getpid()}")
        signal.set_wakeup_fd(-1)
        stock(signal, "signal")(signal.SIGCHLD, signal.SIG_DFL)
        self._epoll.close()
        close(self._wakeup)
        close(self._wake)
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        close(nothing)
        if limits.crowding(orders.workers, limits.cores()):
            try:
                give_way()
            except OSError as error:  # some sandboxes don't let a process say so; then it is as every other
                log.info("worker %d can't have SCHED_BATCH: %s", worker, error)
        own, *others = held(worker, len(orders.listeners))
        for number, descriptor in enumerate(orders.listeners):
            if number != own and number not in others:
                close(descriptor)
        listener = socket.socket(fileno=orders.listeners[own])
        board = Board.open(orders.board)
        slot = orders.first_slot + worker
        return Place(
            orders.number, worker, orders.workers, listener,
            {number: stock(socket, "socket")(fileno=orders.listeners[number]) for number in others},
            board, slot, orders.counts, slot - FIRST_WORKER, orders.lifeline, orders.router,
            way_to(orders.router, orders.router_file), orders.events,
        )  # fmt: skip

    def _reap(self) -> None:
        for worker, pid in list(self._workers.items()):
            # each by its number: it must be known which they are, and there is no other child
            reaped, status = waitpid(pid, os.WNOHANG)
            if reaped:
                del self._workers[worker]
                _say(self._orders.events, f"died {self._orders.number} {worker} {pid} {os.waitstatus_to_exitcode(status)}")


def clean_up(router: str) -> None:
    """Remove what the supervisor would have removed; each that survives it does, so some find it done."""
    shutil.rmtree(Path(router).parent, ignore_errors=True)


def _say(events: int, text: str) -> None:
    """Nobody hears it when the supervisor is gone; that is seen elsewhere."""
    try:
        os.write(events, text.encode() + b"\n")
    except BrokenPipeError:
        pass
