"""The processes of a service as their supervisor knows them: how each is started, told, signalled, and found to live.

It decides nothing: who is started or ended, and when, is `comet.supervisor`'s. A generation's own process
(`comet.generation`) forks its workers, signals and reaps them as it is told, and reports what happens on a pipe that all
generations share (`Reports`). Once that process has died its workers are the supervisor's children, to be signalled and
reaped by it: only a parent that has not reaped a process signals it, so a number is never a stranger's.

Standard library only, since `comet.supervisor` is.
"""

import fcntl
import logging
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from comet import generation
from comet.board import ROUTER
from comet.kernel.processes import waitpid
from comet.policy import Restarts

log = logging.getLogger("comet.supervisor")


@dataclass(slots=True, eq=False)
class Worker:
    number: int
    born: float
    pid: int = 0  # until it has said so
    ready: bool = False
    killed: bool = False  # as hung, or because it took too long to drain

    def lives(self) -> bool:
        """Of one whose generation has died: then it is a child of this process."""
        try:
            return waitpid(self.pid, os.WNOHANG)[0] == 0
        except ChildProcessError:  # reaped by the generation, which had no time to say so
            return False


@dataclass(slots=True)
class Missing:
    """A worker that has ended, or could not be started, and has no successor yet: `since` when, by `time.monotonic`, and why the
    last try failed."""

    since: float
    why: str


@dataclass(slots=True, eq=False)
class Generation:
    """The process that forks, and its workers, whose slots of the board begin at `first_slot`."""

    number: int
    first_slot: int
    born: float
    process: "subprocess.Popen[bytes]"
    restarts: list[Restarts]
    workers: dict[int, Worker] = field(default_factory=dict)
    missing: dict[int, Missing] = field(default_factory=dict)
    ready: bool = False
    leaving: bool = False
    orphaned: bool = False
    """Its process has died: its workers are children of the supervisor."""
    renewed: bool = False
    """A new router was started for it: workers of other code have no link any more."""

    def __str__(self) -> str:
        return f"generation {self.number}"

    @classmethod
    def start(cls, program: Sequence[str], orders: generation.Orders) -> Self:
        """Execute the program anew. It says when it has loaded, and can fork its workers. Raises OSError if the kernel refuses."""
        process = subprocess.Popen(  # noqa: S603 - the very program that runs here
            program,
            stdin=subprocess.PIPE,
            pass_fds=orders.descriptors(),
            env={**os.environ, generation.VARIABLE: orders.text()},
            process_group=0,  # a Ctrl-C in a terminal is for the supervisor: it ends the others in order
        )
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        return cls(orders.number, orders.first_slot, time.monotonic(), process, [Restarts() for _ in range(orders.workers)])

    def lacks(self, worker: int, why: str) -> None:
        """Note that a worker of this number is missing, until it is ready again."""
        self.missing.setdefault(worker, Missing(time.monotonic(), why)).why = why

    def slot(self, worker: int) -> int:
        """A worker's, of the board."""
        return self.first_slot + worker

    def fork(self, number: int) -> None:
        """Have a worker of this number; it says when it is born."""
        self.workers[number] = Worker(number, time.monotonic())
        self._command(f"fork {number}")

    def signal(self, worker: Worker, number: int) -> None:
        if not self.orphaned:
            self._command(f"signal {worker.number} {number}")
        elif worker.pid:
            os.kill(worker.pid, number)  # ours, and not reaped

    def end(self) -> None:
        """Its process may exit once it has no workers."""
        self._command("end")

    @property
    def reads(self) -> bool:
        """True if its process has read all that it was told."""
        assert self.process.stdin is not None
        unread: bytes = fcntl.ioctl(self.process.stdin.fileno(), termios.FIONREAD, bytes(4))
        return not any(unread)

    def _command(self, text: str) -> None:
        """Tell its process. One that has died is noticed otherwise; one that doesn't read is killed."""
        assert self.process.stdin is not None
        try:
            os.write(self.process.stdin.fileno(), text.encode() + b"\n")
        except BrokenPipeError:
            return
        except BlockingIOError:
            log.error("%s does not read what it is told: killing it", self)
            self.kill()

    def died(self, status: int) -> None:
        """Its process has, and was reaped."""
        self.process.returncode = status
        self.orphaned = True
        assert self.process.stdin is not None
        self.process.stdin.close()

    def kill(self) -> None:
        """Its process; its workers go on."""
        _signal(self.process, signal.SIGKILL)

    def kill_and_reap(self) -> None:
        """As `kill`, at once."""
        if not self.orphaned:
            self.kill()
            self.died(os.waitstatus_to_exitcode(waitpid(self.process.pid, 0)[1]))


@dataclass(slots=True, eq=False)
class Router:
    """The process in which all workers meet."""

    process: "subprocess.Popen[bytes]"
    born: float
    checked: bool = False
    """True once it was looked whether it speaks as the workers do."""

    @classmethod
    def start(cls, listener: int, lifeline: int, board: int, workers: int, arguments: Sequence[str], *, trial: bool = False) -> Self:
        """Start it on descriptors that it inherits, for so many workers, with the supervisor's own `arguments`. A `trial` ends with
        status 0 where another would begin to serve. Raises OSError if the kernel refuses."""
        process = subprocess.Popen(  # noqa: S603 - our own module
            [
                sys.executable, "-m", "comet.router", "--listener-fd", str(listener), "--lifeline-fd", str(lifeline),
                "--board-fd", str(board), "--slot", str(ROUTER), "--workers", str(workers),
                *(["--trial"] if trial else []), "--", *arguments,
            ],
            cwd=Path(__file__).parent.parent, stdin=subprocess.DEVNULL, pass_fds=(listener, lifeline, board), process_group=0,
        )  # fmt: skip
        return cls(process, time.monotonic())

    @property
    def pid(self) -> int:
        return self.process.pid

    def terminate(self) -> None:
        _signal(self.process, signal.SIGTERM)

    def kill(self) -> None:
        _signal(self.process, signal.SIGKILL)

    def died(self, status: int) -> None:
        """It has, and was reaped."""
        self.process.returncode = status


def _signal(process: "subprocess.Popen[bytes]", number: int) -> None:
    """Until `died`. `Popen` would look first, and so reap a process that has just died: the supervisor would wait for its end
    for ever."""
    if process.returncode is None:
        os.kill(process.pid, number)


class Reports:
    """What generations report (`comet.generation` says what). They write to `inherited`, and this process reads from
    `descriptor`, which does not block."""

    def __init__(self) -> None:
        self.descriptor, self.inherited = os.pipe()
        os.set_blocking(self.descriptor, False)
        self._data = b""

    def read(self) -> Iterator[tuple[str, int, list[int]]]:
        """What has come since: what happened, to which generation, and the numbers that say more."""
        while True:
            try:
                data = os.read(self.descriptor, 65536)
            except BlockingIOError:
                return
            *lines, self._data = (self._data + data).split(b"\n")
            for line in lines:
                what, number, *more = line.decode().split()
                yield what, int(number), [int(text) for text in more]
