"""The log: one line an event, plain or JSON, the same for all processes of a service.

What is logged is what a person has to know: starts, ends, failures; never a message or a request that went well. A
failure says whose request it was (`Origin`: its id, the client's address, what was asked), so that it can be found
again in the logs of the proxy in front. Refusals and the ends of subscribers are counters, and with
``--log-clients`` a line each. A shortage of the machine (`comet.kernel.limits`) is no bug: it is told without a traceback. Standard
library only, since `comet.supervisor` is.
"""

import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping, MutableMapping
from types import TracebackType
from typing import Any, NamedTuple

from comet.kernel.limits import is_shortage
from comet.kernel.output import Output

_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}
"""Of syslog. In front of a line, as <3>, it is for the journal, which takes it off."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

ENDING = 1.0
"""Seconds that the end of a process waits for whoever reads its last lines."""

FIELD = "comet"
"""Under which a record carries its fields (`fields`)."""


class Origin(NamedTuple):
    """Where something that is logged came from."""

    request: str
    """The request's id."""
    address: str
    """The client's."""
    asked: str
    """Method and path."""

    def fields(self, **more: Any) -> dict[str, Any]:
        """For the `extra` of a log call."""
        return fields(request=self.request, address=self.address, asked=self.asked, **more)


def fields(**values: Any) -> dict[str, Any]:
    """For the `extra` of a log call: what a JSON line has as members of their own, and a plain line behind its text."""
    return {FIELD: values}


class Plain(logging.Formatter):
    """For people. In the journal, which has its own, without the time; each line with its priority."""

    def __init__(self, *, journal: bool, pid: bool) -> None:
        who = " [%(process)d]" if pid else ""
        super().__init__("%(levelname)s %(name)s: %(message)s" if journal else f"%(asctime)s{who} %(levelname)s %(name)s: %(message)s")
        self._journal = journal

    def formatMessage(self, record: logging.LogRecord) -> str:
        more: Mapping[str, Any] = getattr(record, FIELD, {})
        text = super().formatMessage(record) + "".join(f" {name}={_CONTROL.sub('?', str(value))}" for name, value in more.items())
        return text if self._journal else text.replace("\n", "\n  ")

    def format(self, record: logging.LogRecord) -> str:
        return _marked(super().format(record), record) if self._journal else super().format(record)


class Json(logging.Formatter):
    """For machines: an object a line, a traceback included."""

    def __init__(self, *, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        said = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
            **getattr(record, FIELD, {}),
        }
        if record.exc_info:
            said["exception"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        text = json.dumps(said, default=str)
        return _marked(text, record) if self._journal else text


def _marked(text: str, record: logging.LogRecord) -> str:
    mark = f"<{_PRIORITIES.get(record.levelno, 6)}>"
    return mark + text.replace("\n", "\n" + mark)


def to_journal(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether standard error is the very stream that systemd has connected to its journal (systemd.exec(5))."""
    try:
        status = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


_clients = logging.getLogger("comet.clients")
"""Refusals, and subscribers that ended, with ``--log-clients``."""


def refused(slug: str, origin: Origin) -> None:
    """A request was turned down."""
    if _clients.isEnabledFor(logging.INFO):
        _clients.info("refused: %s", slug, extra=origin.fields())


class Roll:
    """Who waits, and whose request that was: kept with ``--log-clients`` alone, some 500 bytes a subscriber."""

    def __init__(self) -> None:
        self._origins: dict[Any, tuple[Origin, float]] = {}

    def came(self, subscriber: Any, origin: Origin) -> None:
        """A subscriber's answer begins."""
        self._origins[subscriber] = origin, time.monotonic()

    def left(self, subscriber: Any, reason: str) -> None:
        """It has ended, for a reason of `comet.errors.CLOSINGS`."""
        known = self._origins.pop(subscriber, None)
        if known is not None:
            origin, began = known
            _clients.info("ended: %s", reason, extra=origin.fields(seconds=round(time.monotonic() - began, 3)))


def _without_traceback(record: logging.LogRecord) -> bool:
    """Tell of a shortage of the machine in a sentence, wherever it was met. Filters nothing out."""
    error = record.exc_info[1] if record.exc_info else None
    if error is not None and is_shortage(error):
        record.msg, record.args = f"{record.getMessage()}: {str(error) or type(error).__name__}", ()
        record.exc_info = record.exc_text = None
    return True


class _Handler(logging.Handler):
    """Writes to `output`, which never blocks."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.addFilter(_without_traceback)
        self._output = output
        self._told = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode(errors="backslashreplace") + b"\n"
        except Exception:
            self.handleError(record)
            return
        self._output.write(line)

    def flush(self) -> None:
        """The end of this process."""
        before = self._output.dropped
        self._output.drain(ENDING)
        if self._output.dropped == before:  # somebody reads
            self._tell()

    def close(self) -> None:
        super().close()
        self._output.close()

    def tend(self) -> None:
        """Write what waits. Once there is room again, say how many lines were dropped."""
        self.acquire()
        try:
            self._output.flush()
        finally:
            self.release()
        if not self._output.waiting:
            self._tell()

    def _tell(self) -> None:
        if self._output.dropped > self._told:
            lost, self._told = self._output.dropped - self._told, self._output.dropped
            logging.getLogger("comet").warning("%d lines of the log were dropped: nobody read them", lost)

    @property
    def dropped(self) -> int:
        """Lines that were dropped."""
        return self._output.dropped

    def forked(self) -> None:
        """This process was forked: what waits, or was dropped, is its parent's to write and to tell."""
        self._output.forget()
        self._told = 0


_handler: _Handler | None = None


def tend() -> None:
    """Write what of the log waits for its reader, as far as it is taken. Each process calls it about once a second."""
    if _handler is not None:
        _handler.tend()


def dropped() -> int:
    """Return how many lines of this process's log were dropped, because nobody read them."""
    return 0 if _handler is None else _handler.dropped


def _forked() -> None:
    if _handler is not None:
        _handler.forked()


os.register_at_fork(after_in_child=_forked)


def set_up(form: str, *, pid: bool, clients: bool = False, environ: MutableMapping[str, str] = os.environ) -> None:
    """Log to standard error in `form`: plain or json; `pid`: plain lines tell processes apart; `clients`: also who is
    refused and who ends. What ends this process is logged too. Call `tend` about once a second from then on."""
    global _handler
    journal = to_journal(environ)
    _handler = handler = _Handler(Output(sys.stderr.fileno()))
    handler.setFormatter(Json(journal=journal) if form == "json" else Plain(journal=journal, pid=pid))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    _clients.setLevel(logging.INFO if clients else logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _uncaught


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
    elif is_shortage(error):
        logging.getLogger("comet").critical("the process ends: %s", error)
    else:
        logging.getLogger("comet").critical("the process ends by an exception", exc_info=(kind, error, trace))


def failed_outside(context: Any, kind: Any, error: Any, trace: Any) -> None:
    """For gevent's hub (`print_exception`): an exception that ended a greenlet or a callback."""
    named = "the event loop" if context is None else context if isinstance(context, str) else repr(context)
    if is_shortage(error):
        logging.getLogger("comet").error("%s failed: %s", named, error)
    else:
        logging.getLogger("comet").error("%s failed", named, exc_info=(kind, error, trace))
