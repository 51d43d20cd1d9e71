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

REFUSES = 8.0
"""Seconds that a service refuses everybody: each client comes at least once meanwhile."""

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
        self._services.append(Service(log, "--workers", "2", "--backplane-timeout", "1", *self._flags, *flags))
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

    def kill_workers(self) -> None:
        """Kill both at once, and do not wait for their successors."""
        for pid in self.running.workers().values():
            os.kill(pid, signal.SIGKILL)

    def kill_workers_and_refuse(self) -> None:
        """Kill both workers; for a while their successors refuse whoever comes (``backplane-away``), as the router is frozen."""
        router, workers = self.running.router(), self.running.workers()
        os.kill(router, signal.SIGSTOP)
        try:
            self.kill_workers()
            time.sleep(REFUSES)
        finally:
            os.kill(router, signal.SIGCONT)
        wait_until(lambda: not set(self.running.workers().values()) & set(workers.values()), READY)
        assert self.running.stats()["refused"]["backplane-away"] > 0, "nobody came meanwhile"
        assert self.running.router() == router, "it was replaced: what was kept is forgotten"

    def close(self) -> None:
        """Whatever happened."""
        for service in self._services:
            service.close()
