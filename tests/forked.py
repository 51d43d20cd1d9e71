"""Servers that are forked from a process which has loaded app.py, rather than started: a start is mostly imports, and the tests make a
thousand. What starting means is tested where real processes start: test_starting, test_supervisor, test_readme.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import gevent
from gevent.fileobject import FileObjectPosix

ROOT = Path(__file__).parent.parent

_forkserver: tuple[socket.socket, subprocess.Popen[bytes]] | None = None


class Forked:
    """One server, as `subprocess.Popen` has a process. Its standard output is `stdout`, its standard error goes to `errors`."""

    def __init__(self, flags: Sequence[str], environment: Mapping[str, str], errors: int) -> None:
        out, told = os.pipe(), os.pipe()
        request = json.dumps([flags, dict(environment)]).encode()
        socket.send_fds(_started(), [request], [out[1], errors, told[1]])
        os.close(out[1])
        os.close(told[1])
        self.stdout = FileObjectPosix(out[0], "rb")
        self._told = FileObjectPosix(told[0], "rb")
        self.pid = int(self._told.readline())
        self.returncode: int | None = None
        self._watcher = gevent.spawn(self._wait)

    def _wait(self) -> None:
        self.returncode = int(self._told.readline())
        self._told.close()

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        gevent.sleep(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status. Raises subprocess.TimeoutExpired."""
        self._watcher.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("app.py", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal it, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


def _started() -> socket.socket:
    """The end at which this process asks its forkserver, which is started when it is first asked."""
    global _forkserver
    if _forkserver is None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = [sys.executable, "-m", "tests.forkserver", str(theirs.fileno())]
        _forkserver = ours, subprocess.Popen(program, cwd=ROOT, pass_fds=[theirs.fileno()])
        theirs.close()
    return _forkserver[0]
