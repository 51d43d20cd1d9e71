"""What Linux tells of a process: memory, CPU. And how measurements start and end one.

Used by the bench and the reports; neighbours are `loadtest.bench` and `loadtest.generator`.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from comet.kernel.processes import die_with_parent

ROOT = Path(__file__).parent.parent


def memory(pid: int) -> int:
    """Proportional set size of a process, in bytes (/proc/PID/smaps_rollup)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no Pss in smaps_rollup of {pid}")


def cpu(pid: int) -> float:
    """Seconds a process has run on a CPU, all its threads (/proc/PID/task/*/schedstat)."""
    return sum(int(one.read_text().split()[0]) for one in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def descendants(pid: int) -> list[int]:
    """A process and all that it started, and what those started; without those that end meanwhile."""
    found = [pid]
    for one in found:
        with contextlib.suppress(OSError):  # the glob itself may find that it has ended
            for children in Path(f"/proc/{one}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    found += map(int, children.read_text().split())
    return found


class Worker:
    """A Python module of ours as a child that answers a JSON line for each it is sent."""

    def __init__(self, module: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.pid = self.process.pid

    def tell(self, **order: Any) -> None:
        """Send an order and do not wait."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        """The next answer. Raises RuntimeError when the child has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args!r} ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, **order: Any) -> Any:
        """Send an order and wait for its answer."""
        self.tell(**order)
        return self.answer()

    def stop(self) -> None:
        """End the child."""
        stop(self.process)


def stop(process: "subprocess.Popen[str]") -> None:
    """SIGTERM, and SIGKILL where that is not enough; waits for the end."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@contextlib.contextmanager
def program(command: Sequence[str], log: Path, patience: float = 30.0, **environment: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A Python program of ours in a session of its own, so that Ctrl-C is this process's to handle. It ends with this process,
    whatever happens to that. SIGTERM ends it afterwards, and SIGKILL, with all it started, where `patience` seconds pass."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            pass  # it is killed with the others
        finally:  # also where this is interrupted again
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own session: whatever of it is left
            process.wait()


@contextlib.contextmanager
def server(command: Sequence[str], mark: str) -> Iterator[tuple[int, int]]:
    """A server that prints its address behind `mark` once it listens: (pid, port), ended afterwards."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if mark in line:
                yield process.pid, int(line.split(mark)[1].split()[0].rsplit(":", 1)[1])
                return
        raise RuntimeError(f"{command} did not start: status {process.wait()}")
    finally:
        stop(process)


@contextlib.contextmanager
def worker(module: str, *arguments: str) -> Iterator[Worker]:
    """A `Worker`, ended afterwards."""
    child = Worker(module, *arguments)
    try:
        yield child
    finally:
        child.stop()
