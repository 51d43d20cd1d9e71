"""Where a service listens: on what a service manager passed on to it (`comet.systemd`), and then on nothing else; or on
an address of its own.

`comet.supervisor` has listeners for its workers, one process alone (`app.py`) has one; `comet.kernel.sockets` makes them.
Standard library only, since `comet.supervisor` is.
"""

import logging
import socket
from collections.abc import Sequence

from comet.kernel import sockets
from comet.settings import Settings

log = logging.getLogger("comet.listeners")


def listen(settings: Settings, passed: Sequence[socket.socket], workers: int) -> list[socket.socket] | None:
    """Those of so many `workers` (0: one process alone), tuned. One a worker where they are our own; fewer may be passed
    on. None, and a sentence in the log, where there can't be any."""
    if len(passed) > max(1, workers):
        whom = f" to {workers} workers" if workers else ", and one process serves one"
        log.error("%d sockets were passed on%s: set --workers to %d or more", len(passed), whom, len(passed))
        return None
    tuning = settings.send_buffer, settings.send_timeout
    for listener in passed:
        sockets.tune(listener, *tuning)
    if passed:
        if workers:
            log.info("%d workers accept on what was passed on: %d socket%s", workers, len(passed), "s" if len(passed) > 1 else "")
        return list(passed)
    try:
        if workers:
            return sockets.listen_together(settings.host, settings.port, workers, *tuning)
        return [sockets.listen(settings.host, settings.port, *tuning)]
    except OSError as error:
        log.error("can't listen on %s port %d: %s. Choose another with --host and --port.", settings.host, settings.port, error)
        return None
