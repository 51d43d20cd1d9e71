"""Processes as the kernel has them. Linux only, nothing of ours but the way past gevent's patch."""

import ctypes
import os
import resource
import signal
from collections.abc import Callable

from comet.kernel.stock import stock

fork: Callable[[], int] = stock(os, "fork")
"""gevent's would make an event loop in the parent, and two processes must not share one."""

close: Callable[[int], None] = stock(os, "close")
"""gevent's leaves the closing to its event loop, later."""

waitpid: Callable[[int, int], tuple[int, int]] = stock(os, "waitpid")

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PAGE = os.sysconf("SC_PAGE_SIZE")


def adopt_orphans() -> None:
    """Grandchildren whose parent dies become children of this process, rather than of init."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def die_with_parent() -> None:
    """This process is sent SIGTERM when the thread that forked it ends: also when that was killed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")


def write_in_background() -> None:
    """Have this process, and those that it starts, write to their terminal from the background, even if it is set not to let them
    (``stty tostop``): SIGTTOU would stop them at a line of the log. All but the process that the shell started are in the background."""
    stock(signal, "signal")(signal.SIGTTOU, signal.SIG_IGN)


def give_way() -> None:
    """Have this process wait for the end of another's turn when something wakes it (SCHED_BATCH), rather than interrupt it.
    It gets as much of a core as before. Of many processes that are busy at once fewer are torn away from what they
    have in the core's caches, and each finds more to do when its turn comes. Raises OSError."""
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


FIRST = -10
"""Added to the nice value by `go_first`: the weight of nine others (sched(7))."""


def go_first() -> None:
    """Have this process run ahead of others when something wakes it. Raises OSError where it may not: that takes root, or a
    limit that allows it (RLIMIT_NICE, systemd's LimitNICE=)."""
    os.nice(FIRST)


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Return to the kernel the whole pages that the C library's heap keeps for later. glibc returns by itself only what is at
    the heap's end, so with buffers of every size that come and go it grows for long. Elsewhere (musl) this does nothing."""
    if _malloc_trim is not None:
        _malloc_trim(0)


class Kept:
    """A file of /proc that each process opens once, and reads again and again: a process that has no descriptor left can still do so."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._pid = 0
        self._descriptor = -1

    def read(self) -> bytes:
        """Return its first 4 KiB, as they are now. Raises OSError."""
        if self._pid != os.getpid():  # what a forked process has inherited is its parent's file
            if self._descriptor >= 0:
                close(self._descriptor)
                self._descriptor = -1
            self._descriptor = os.open(self._path, os.O_RDONLY)
            self._pid = os.getpid()
        return os.pread(self._descriptor, 4096, 0)


_schedstat = Kept("/proc/thread-self/schedstat")
_statm = Kept("/proc/self/statm")


def waited() -> float:
    """Seconds for which this process's main thread, which calls this, could have run and had no core; 0 where the kernel does not tell."""
    try:
        return int(_schedstat.read().split()[1]) / 1e9
    except OSError:  # it does not count, or a sandbox hides it
        return 0.0


def resident() -> int:
    """Bytes of memory this process has in use, shared pages included; 0 where that can't be read."""
    try:
        return int(_statm.read().split()[1]) * _PAGE
    except OSError:
        return 0


def peak() -> int:
    """The most bytes of memory that this process ever had in use."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
