"""What the kernel allows this process. A leaf, Linux only."""

import errno
import os
import resource
from pathlib import Path

RESERVE = 256
"""File descriptors kept back from clients: listeners, epolls, database, logs, and connections that
are being refused."""

FILL = 85
"""Per cent of its connections that a worker among several is planned for: the kernel spreads them by hash."""

BACKLOG = 4096
"""Connections that wait for an accept. The kernel cuts it to net.core.somaxconn, 4096 by default."""


SHORTAGES = frozenset({
    errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.ENOSPC, errno.EDQUOT,
})  # fmt: skip
"""What the kernel answers if it has no process, descriptor, memory or room on the disk left: it may have some again a little later."""


def is_shortage(error: BaseException) -> bool:
    """Return whether an error is a shortage of this machine, and so no bug: its traceback tells nobody anything."""
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SHORTAGES)


def raise_file_limit() -> int:
    """Lift the soft limit on open files to the hard one and answer it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def capacity() -> int:
    """Connections this process can hold, by its limit on open files."""
    return max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVE)


def cores() -> int:
    """Processor cores this process may run on."""
    return len(os.sched_getaffinity(0))


def crowding(processes: int, cores: int) -> int:
    """How many of so many busy processes are too many: beyond two a core their caches are never warm."""
    return max(0, processes - 2 * cores)


def system_files() -> int:
    """Files that all processes together may have open (fs.file-max)."""
    return int(Path("/proc/sys/fs/file-max").read_text())
