"""A service on a port that it keeps, and what is done to it."""

import contextlib
import os
import signal
import time
from pathlib import Path

from tests.behaviour.test_supervisor import Service, alive
from tests.harness import wait_until

READY = 60.0
"""Seconds for a worker to be replaced, on a machine with other work."""

AWAY = 2.0
"""Seconds that a service is away between its end and its start: a client that comes back after `--retry` finds nobody, at least once."""


class Restartable:
    """Services one after the other on one port, with the same flags, until `close`."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self._folder = folder
        self._flags = flags
        self._services: list[Service] = []
        self.port = 0
        self._start()

    @property
    def running(self) -> Service:
        """The last one that was started."""
        return self._services[-1]

    def _start(self) -> None:
        log = self._folder / f"service-{len(self._services)}.log"
        flags = ["--port", str(self.port)] if self.port else []  # the last one of a flag counts
        self._services.append(Service(log, "--workers", "2", *self._flags, *flags))
        self.port = self.running.port
        wait_until(lambda: len(self.running.workers()) == 2, READY)

    def kill_worker(self, worker: int) -> None:
        """Kill one with SIGKILL; back when its successor is there."""
        before = self.running.workers()[worker]
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: self.running.workers().get(worker, before) != before, READY)

    def stop_and_start(self) -> None:
        """SIGTERM, the end in order, and a new service."""
        assert self.running.end(signal.SIGTERM, READY) == 0, self.running.log.read_text()
        assert "Traceback" not in self.running.log.read_text(), self.running.log.read_text()
        time.sleep(AWAY)
        self._start()

    def kill_and_start(self) -> None:
        """SIGKILL to each process, and a new service."""
        for pid in alive(self.running.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.running.process.wait()
        wait_until(lambda: not alive(self.running.mark))
        time.sleep(AWAY)
        self._start()

    def close(self) -> None:
        """Whatever happened."""
        for service in self._services:
            service.close()
