"""What the machine says while a test runs, a line a second in `samples.jsonl`.

Of the service and of the load apart, all their processes: memory (proportional set size, so what is shared counts once),
CPU seconds. Of the machine: CPU seconds in all, TCP sockets and the bytes in their buffers, the kernel's slabs (the sockets themselves are
there), free memory. To add up a process's set the kernel walks all its pages; with a hundred processes that is not free,
so it is done as often as takes `SHARE` of a core, and the last sum is repeated between.
"""

import json
import math
import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comet.kernel.machine import Machine
from comet.kernel.memory import sockets
from loadtest.process import cpu, descendants, memory

SHARE = 0.01
TREE = 5.0
"""Seconds between two looks at which processes there are."""

_TICKS = os.sysconf("SC_CLK_TCK")
_FIELDS = re.compile(r"^(MemAvailable|Slab|KernelStack|PageTables|Cached|Percpu): +(\d+) kB", re.MULTILINE)


class Sampler:
    """`roots` are the processes whose descendants belong together, by name; more may be added."""

    def __init__(self, out: Path) -> None:
        self.roots: dict[str, int] = {}
        self.last: Mapping[str, Any] = {}
        self._out = out
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler")
        self._pids: dict[str, list[int]] = {}
        self._looked = self._summed = 0.0
        self._sums: dict[str, int] = {}
        self._cost = 0.0
        self._spent: dict[int, float] = {}
        self.failure: Exception | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End. Raises what kept it from sampling."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if self.failure:
            raise self.failure

    def _run(self) -> None:
        following = time.monotonic()
        try:
            with self._out.open("w") as file:
                while not self._over.is_set():
                    self.last = self.sample()
                    file.write(json.dumps(self.last) + "\n")
                    file.flush()
                    following = max(following + 1, time.monotonic())
                    self._over.wait(following - time.monotonic())
        except Exception as error:  # told when it is stopped: the test goes on
            self.failure = error

    def sample(self) -> dict[str, Any]:
        """One line."""
        now = time.monotonic()
        if now - self._looked > TREE or self.roots.keys() - self._pids.keys():
            self._looked, before = now, self._pids
            self._pids = {name: descendants(pid) for name, pid in self.roots.items()}
            self._pids["load"] = [*self._pids.get("load", ()), os.getpid()]  # what this takes is the test's
            if self._pids != before:
                self._summed = -math.inf
        if now - self._summed >= self._cost / SHARE:
            began = time.thread_time()
            self._sums = {name: sum(map(_memory, pids)) for name, pids in self._pids.items()}
            self._cost, self._summed = time.thread_time() - began, now
        line: dict[str, Any] = {"time": round(time.time(), 3)}
        for name, pids in self._pids.items():
            line[name] = {"processes": len(pids), "memory": self._sums.get(name, 0), "cpu": round(sum(map(self._cpu, pids)), 3)}
        line["busy"] = _busy()
        line["sockets"] = sockets()
        line["kernel"] = {name: int(kilobytes) * 1024 for name, kilobytes in _FIELDS.findall(Machine().text("/proc/meminfo"))}
        return line

    def _cpu(self, pid: int) -> float:
        """Of one that has ended, what it had taken when last seen."""
        try:
            self._spent[pid] = cpu(pid)
        except OSError:
            pass
        return self._spent.get(pid, 0.0)


def _busy() -> float:
    """Seconds that the machine's cores were not idle, whoever it was."""
    user, nice, system, _idle, _waiting, *rest = map(int, Machine().text("/proc/stat").split("\n", 1)[0].split()[1:])
    return (user + nice + system + sum(rest[:2])) / _TICKS


def _memory(pid: int) -> int:
    try:
        return memory(pid)
    except (OSError, ValueError):  # it has ended meanwhile
        return 0
