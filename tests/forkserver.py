"""The process that `tests.forked` has fork servers: it has loaded app.py, as a generation has (`comet.generation`).

A request is a datagram of JSON, ``[flags, environment]``, with three descriptors: the server's standard output, its standard error, and
where its process id and then its exit status are written, a line each. There must be no event loop here before a fork.
"""

import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Sequence
from typing import NoReturn

from comet.kernel.processes import close, fork, waitpid
from comet.kernel.stock import stock

LONGEST = 1 << 17
"""Bytes of a request."""


def run(asked: socket.socket) -> None:
    """Fork what is asked for until the other end is closed."""
    app = importlib.import_module("app")
    set_signal = stock(signal, "signal")
    set_signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which closes its end
    set_signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, descriptors, _, _ = socket.recv_fds(asked, LONGEST, 3)
        if not request:
            return
        if fork() == 0:
            asked.close()
            set_signal(signal.SIGCHLD, signal.SIG_DFL)
            set_signal(signal.SIGINT, signal.default_int_handler)
            watch(app, *json.loads(request), *descriptors)
        for descriptor in descriptors:
            close(descriptor)


def watch(app: object, flags: Sequence[str], environment: dict[str, str], out: int, errors: int, told: int) -> NoReturn:
    """Fork the server, and tell its process id and its exit status."""
    server = fork()
    if server == 0:
        close(told)
        os.dup2(out, 1)
        os.dup2(errors, 2)
        close(out)
        close(errors)
        os.environ.clear()
        os.environ.update(environment)
        sys.exit(app.main(list(flags)))  # type: ignore[attr-defined]
    close(out)
    close(errors)
    os.write(told, b"%d\n" % server)
    _, status = waitpid(server, 0)
    os.write(told, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


if __name__ == "__main__":
    run(socket.socket(fileno=int(sys.argv[1])))
