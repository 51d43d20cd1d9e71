"""What a test of so many clients takes on this machine: processes, addresses, memory, kernel settings; and whether it fits.

The figures a client are measured (`loadtest/RESULTS.md`): a plan that would not fit is refused before anything is started.
Neighbours: `comet.kernel.check`, which judges what the kernel allows; `loadtest.million`, which does what is planned.
"""

import math
import shlex
import subprocess
from dataclasses import dataclass

from comet.kernel import check
from comet.kernel.limits import FILL, RESERVE, cores, crowding
from comet.kernel.machine import Machine
from loadtest.swarm import NAP, PER_ADDRESS

SERVICE_CLIENT, SERVICE_PROCESS = 800, 7_000_000
"""Bytes of the service a client, on /test with a feed of its own, and of each of its processes."""

LOAD_CLIENT, LOAD_PROCESS, MASTER = 150, 22_000_000, 400_000_000
"""The same of the load; the master audits."""

KERNEL_CLIENT = 8_500
"""Bytes of the kernel a connection, both ends."""

SPARE = 700_000_000
"""Bytes that stay free: messages on their way, the page cache that the database wants, and whatever else runs."""

FILES = 512
"""Open files of a load process that are neither its clients nor its senders: Locust's own."""

NAP_A_PROCESS, MOST_NAP = 0.002, 0.1
"""Seconds between two looks of a swarm, for each process that is one too many, and at most."""


@dataclass(frozen=True)
class Plan:
    """`workers` of the service (0: it runs elsewhere), `processes` of the load, `each` clients in one of those, from so many
    `addresses`; `memory` is what all of it takes, in bytes, and `available` what there is."""

    clients: int
    port: int
    workers: int
    processes: int
    each: int
    addresses: int
    memory: int
    available: int
    objections: tuple[str, ...] = ()
    """Why it can't be."""

    def text(self) -> str:
        """For people."""
        service = f"service: {self.workers} workers\n" if self.workers else "service: elsewhere\n"
        return (
            f"{self.clients:,} clients on port {self.port}\n{service}"
            f"load: {self.processes} processes, {self.each:,} connections each, from {self.addresses} source addresses\n"
            f"memory: {self.memory / 2**30:.1f} GiB planned of {self.available / 2**30:.1f} GiB available"
        )


def plan(
    clients: int, port: int, here: bool = True, machine: Machine = check.HERE, processors: int | None = None, senders: int = 0
) -> Plan:
    """For so many clients and senders, with the service on this machine or not (`here`). A limit that is unknown is none."""
    files = (machine.open_files() or (0, 1 << 30))[1]
    processors = processors or cores()
    held, holds = max(1, files - RESERVE), max(1, files - FILES)
    workers = max(processors, math.ceil(clients * 100 / (held * FILL))) if here else 0
    processes = max(processors, math.ceil((clients + senders) / holds))
    memory = clients * (LOAD_CLIENT + KERNEL_CLIENT // (1 if here else 2)) + processes * LOAD_PROCESS + MASTER + SPARE
    if here:
        memory += clients * SERVICE_CLIENT + (workers + 3) * SERVICE_PROCESS  # supervisor, router and generation
    available = machine.memory_available() or memory
    objections = []
    if memory > available:
        fixed = SPARE + MASTER
        most = max(0, int(clients * 0.99 * (available - fixed) / (memory - fixed)))
        objections.append(
            f"{memory / 2**30:.1f} GiB would be needed and {available / 2**30:.1f} GiB are available: about {most:,} clients fit"
        )
    each = math.ceil(clients / processes)
    return Plan(clients, port, workers, processes, each, math.ceil(clients / PER_ADDRESS), memory, available, tuple(objections))


def nap(processes: int, processors: int | None = None) -> float:
    """Seconds between two looks of a swarm, where so many processes have one: with many on few cores it costs more to wake one
    than to read what is there, and with fewer looks there is more."""
    return max(NAP, min(MOST_NAP, NAP_A_PROCESS * crowding(processes, processors or cores())))


def unmet(plan: Plan, machine: Machine = check.HERE) -> list[check.Row]:
    """Limits of the kernel that stand in its way. Memory and open files are planned for here, more closely. Where the service
    runs elsewhere, nobody listens here."""
    planned = {"memory available", "open files a process"}
    if plan.workers:
        wanted = check.Plan(plan.clients, plan.port, plan.workers, loopback=True)
    else:
        wanted = check.Plan(plan.clients, 0, plan.processes)
        planned.add("net.core.somaxconn")
    return [row for row in check.rows(wanted, machine) if row.unmet and row.name not in planned]


def settings(rows: list[check.Row]) -> list[list[str]]:
    """The commands that would meet them: of alternatives the one that is a sysctl."""
    lines = [next((line for line in row.set if line.startswith("sysctl")), "") for row in rows]
    return [shlex.split(line) for line in lines if line]


def apply(rows: list[check.Row]) -> list[str]:
    """Set what is unmet, as root; what was done, a line each. Raises CalledProcessError, OSError."""
    done = []
    for command in settings(rows):
        subprocess.run(command, check=True, capture_output=True, text=True)
        done.append(shlex.join(command))
    return done
