"""What a service manager tells a service, and is told by it, in systemd's words, which others speak too.

Only the process that systemd started speaks: the supervisor, or one process alone. So all this is taken *out* of
the environment, and no worker inherits it. Where nobody listens (a terminal, a container), every call does nothing.

- `Notifier`: sd_notify(3). Ready, reloading, stopping, a line of status, and signs of life for the watchdog.
- `take_sockets`: sd_listen_fds(3). Sockets that the manager has bound, and holds while the service is away.
- `runtime_folder`: RuntimeDirectory= of systemd.exec(5).

Standard library only, since `comet.supervisor` is.
"""

import logging
import os
import re
import socket
import time
from collections.abc import MutableMapping
from typing import Self

from comet.kernel.stock import stock

FIRST_SOCKET = 3
"""The descriptor of the first socket that is passed on (sd_listen_fds)."""

LONGEST = 1.0
"""Seconds between two signs of life at most."""

SHORTEST = 0.1
"""Seconds between two signs of life at least, whatever the watchdog asks for: each is a datagram."""

_NUMBER = re.compile(r"[0-9]{1,19}")
"""A number as a manager writes one."""

WHOLE_LINE = 400
"""Characters of a status line that are sent."""

log = logging.getLogger("comet.systemd")


class Unusable(Exception):
    """What was passed on can't be served with; a sentence says why."""


class Notifier:
    """`address` is the manager's socket ("" where there is none); `watchdog` is within how many seconds it wants
    a sign of life, 0 if it does not.

    No call blocks. A manager that does not read for long takes no more datagrams (net.unix.max_dgram_qlen, 10 by default). What such a
    manager must know of the service (ready, reloading, stopping) is told again at each `beat`, until it gets through."""

    def __init__(self, address: str = "", watchdog: float = 0.0) -> None:
        self.active = bool(address)
        self.watchdog = watchdog if address else 0.0
        self.interval = max(SHORTEST, min(LONGEST, watchdog / 3)) if self.watchdog else LONGEST
        """Seconds between two calls of `beat`."""
        self._untold: dict[str, bytes] = {}
        """Datagrams about the service's state that did not get through, in order, each under its first assignment."""
        self._address = "\0" + address[1:] if address.startswith("@") else address  # the abstract namespace
        self._status = ""
        self._failed = False

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Self:
        """The one that the environment names, which names it no more afterwards."""
        address = environ.pop("NOTIFY_SOCKET", "")
        text, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        if address[:1] not in ("", "/", "@"):
            log.warning("NOTIFY_SOCKET is %r, no socket of this machine: nobody is told how the service is", address)
            address = ""
        ours = _NUMBER.fullmatch(text) and pid in ("", str(os.getpid()))
        return cls(address, int(text) / 1e6 if ours else 0.0)

    def ready(self, status: str = "") -> None:
        """The service serves; after `reloading`, the reload is over."""
        self._tell_surely("READY=1", *self._changed(status))

    def reloading(self) -> None:
        """A reload has begun; `ready` ends it."""
        self._tell_surely(
            "RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}", *self._changed("reloading")
        )

    def stopping(self, seconds: float, status: str = "stopping") -> None:
        """It ends, within so many seconds, however much shorter the unit's TimeoutStopSec= is."""
        self._tell_surely("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}", *self._changed(status))

    def status(self, text: str) -> None:
        """A line for a person, in `systemctl status`; told only when it has changed."""
        if text != self._status and not self._tell(*self._changed(text)):
            self._status = ""  # the next call tells it

    def beat(self) -> None:
        """A sign of life, if there is a watchdog; and what did not get through before. Call it every `interval` seconds."""
        self._tell_again()
        if self.watchdog:
            self._tell("WATCHDOG=1")

    def _changed(self, status: str) -> list[str]:
        if not status:
            return []
        self._status = status
        return ["STATUS=" + " ".join(status.split())[:WHOLE_LINE]]

    def _tell_surely(self, *assignments: str) -> None:
        self._untold.pop(assignments[0], None)  # what was said of it before is out of date
        self._untold[assignments[0]] = "\n".join(assignments).encode()
        self._tell_again()

    def _tell_again(self) -> None:
        while self._untold:
            name, datagram = next(iter(self._untold.items()))
            if not self._send(name, datagram):
                return
            del self._untold[name]

    def _tell(self, *assignments: str) -> bool:
        """Return whether it got through."""
        return self._send(assignments[0], "\n".join(assignments).encode())

    def _send(self, name: str, datagram: bytes) -> bool:
        if not self.active:
            return True
        try:
            # gevent's would wait in its loop, and some of what is told is told where there is none
            with stock(socket, "socket")(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
                own.setblocking(False)
                own.sendto(datagram, self._address)
        except OSError as error:  # the manager decides what silence means; the service goes on
            if not self._failed:
                self._failed = True
                log.warning("systemd can't be told %s: %s", name, error)
            return False
        self._failed = False
        return True


def take_sockets(environ: MutableMapping[str, str]) -> list[socket.socket]:
    """The listening sockets that were passed on to this process, which the environment names no more afterwards.
    Raises Unusable for what is no listening TCP socket."""
    count, pid, names = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDNAMES", "")
    if not _NUMBER.fullmatch(count) or pid != str(os.getpid()):
        return []
    named = names.split(":")
    sockets = []
    for number in range(int(count)):
        descriptor = FIRST_SOCKET + number
        name = named[number] if number < len(named) and named[number] else f"number {number + 1}"
        try:
            os.set_inheritable(descriptor, False)
            one = socket.socket(fileno=descriptor)
            listens = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise Unusable(f"the socket {name} that was passed on can't be used: {error}") from None
        if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM or not listens:
            raise Unusable(f"the socket {name} that was passed on is no listening TCP socket: give its unit ListenStream=[address:]port")
        sockets.append(one)
    return sockets


def runtime_folder(environ: MutableMapping[str, str]) -> str | None:
    """The folder that the unit's RuntimeDirectory= has made, the first of several; None where there is none."""
    return environ.get("RUNTIME_DIRECTORY", "").partition(":")[0] or None
