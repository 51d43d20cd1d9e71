"""Standard error, written to without waiting for whoever reads it. Linux only, nothing of ours but the way past gevent's patch.

A pipe, a terminal or a socket takes no more once its reader has stopped, and who then writes as usual stands still: a log collector that
hangs would stop the service. Here what is not taken waits, up to `KEPT` bytes, and beyond that lines are dropped and counted.

No thread does this: a generation forks its workers, and a thread must not be there then. Whoever has an `Output` calls `flush` about once
a second. The descriptor may be shared with other programs, for which it goes on to block: a pipe or a terminal is opened once more by its
name in /proc, which has flags of its own, and a socket is told with each call.
"""

import os
import select
import socket
import stat
import sys
import time
from collections import deque

from comet.kernel.stock import stock

KEPT = 1 << 18
"""Bytes that wait for a reader: some thousand lines, and little beside what a process takes."""


def open_standard() -> None:
    """Open /dev/null as each of standard input, output and error that is closed. Call it before anything else is opened.

    A process that was started without one of them (``>&-``) would have its next file or socket under that number, where what is written
    to standard output and what a child inherits as its input go; and Python has None in the place of `sys.stdout`."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the kernel gives the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))  # noqa: SIM115 - for the whole process


class Output:
    """Lines written to `descriptor`, which stays the caller's. Close it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._socket: socket.socket | None = None
        self._opened: int | None = None
        """The pipe or terminal, opened once more."""
        self._closed = False
        self._lines: deque[bytes] = deque()
        self._size = 0
        self.dropped = 0
        """Lines that were not written, and never will be."""
        self._open()

    @property
    def waiting(self) -> int:
        """Bytes that are to be written."""
        return self._size

    def write(self, line: bytes) -> None:
        """Write a line, or keep it for later, or drop it. Never block, never raise."""
        if self._closed:
            self.dropped += 1
            return
        self.flush()
        rest = line if self._lines else self._try(line)
        if not rest:
            return
        if rest is line and self._size + len(line) > KEPT:  # the first lines of a trouble tell more than its last
            self.dropped += 1
            return
        self._lines.append(rest)
        self._size += len(rest)

    def flush(self) -> None:
        """Write what waits, as far as it is taken now."""
        while self._lines:
            line = self._lines[0]
            rest = self._try(line)
            self._size += len(rest) - len(line)
            if rest:
                self._lines[0] = rest
                return
            self._lines.popleft()

    def drain(self, timeout: float) -> None:
        """Write what waits, and wait for the reader for at most `timeout` seconds. What is left then is dropped."""
        ends = time.monotonic() + timeout
        self.flush()
        while self._lines and (left := ends - time.monotonic()) > 0:
            poll = stock(select, "poll")()
            poll.register(self._descriptor, select.POLLOUT)
            poll.poll(min(left, 0.1) * 1000)
            self.flush()
        self.dropped += len(self._lines)
        self._clear()

    def forget(self) -> None:
        """Forget what waits, and what was dropped: in a process that was forked, since its parent writes and counts it."""
        self._clear()
        self.dropped = 0

    def close(self) -> None:
        """Let go of what was opened beside the descriptor. What waits is dropped, and so is what is written from now on."""
        self.dropped += len(self._lines)
        self._clear()
        self._closed = True
        if self._socket is not None:
            self._socket.close()
        if self._opened is not None:
            os.close(self._opened)
        self._socket = self._opened = None

    def _clear(self) -> None:
        self._lines.clear()
        self._size = 0

    def _open(self) -> None:
        """Find a way to write that raises BlockingIOError rather than wait for a reader."""
        try:
            kind = os.fstat(self._descriptor).st_mode
        except OSError:
            return  # it is closed, and each write will say so
        if stat.S_ISSOCK(kind):
            self._socket = stock(socket, "socket")(fileno=os.dup(self._descriptor))
        elif stat.S_ISFIFO(kind) or (stat.S_ISCHR(kind) and os.isatty(self._descriptor)):
            try:
                self._opened = os.open(f"/proc/self/fd/{self._descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError:  # another user's
                if stat.S_ISFIFO(kind):
                    os.set_blocking(self._descriptor, False)

    def _write(self, data: bytes) -> int:
        if self._socket is not None:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        return os.write(self._descriptor if self._opened is None else self._opened, data)

    def _try(self, line: bytes) -> bytes:
        """Return what of `line` is not taken now. If it can't be written at all (nobody reads, the disk is full), it is dropped."""
        while line:
            try:
                line = line[self._write(line) :]
            except BlockingIOError:
                break
            except OSError:
                self.dropped += 1
                return b""
        return line
