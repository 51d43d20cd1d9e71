"""What the parts of the bench have in common: a comet under test, and the figures it is judged by.

Neighbours: `loadtest.bench` and `loadtest.bench_workers`, whose rows these are, and `loadtest.process`.
"""

import dataclasses
import http.client
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loadtest.generator import body
from loadtest.process import Worker, memory, server

SETTLE = 5.0
"""Seconds between the last connect and the reading of memory."""


@dataclasses.dataclass
class Figure:
    """One row: `value` is ours; `least` and `aim` are what the plan asks for (None: no bound);
    `low` says that small is good."""

    name: str
    value: float
    unit: str
    least: float | None = None
    aim: float | None = None
    low: bool = False
    beside: str = ""

    @property
    def verdict(self) -> str:
        """``aim``, ``met``, ``missed``, or nothing where nothing is asked."""
        if self.least is None:
            return ""
        sign = -1 if self.low else 1
        if self.aim is not None and sign * self.value >= sign * self.aim:
            return "aim"
        return "met" if sign * self.value >= sign * self.least else "MISSED"


class Service:
    """A comet under test, and the means to publish to it."""

    def __init__(self, pid: int, port: int) -> None:
        self.pid = pid
        self.port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def request(self, method: str, path: str, data: bytes | None = None) -> Any:
        """A request on a kept-alive connection; its JSON."""
        return json.loads(self._exchange(method, path, data).split(b"\n")[0])

    def post(self, path: str, data: bytes) -> None:
        """A POST whose answer does not matter, but for its status."""
        self._exchange("POST", path, data)

    def _exchange(self, method: str, path: str, data: bytes | None) -> bytes:
        self._connection.request(method, path, data)
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {content[:300]!r}")
        return content

    def publish(self, channel: str, times: int = 1) -> None:
        """`times` messages together."""
        if times == 1:
            self.request("POST", f"/publish/{channel}", body())
        else:
            line = json.dumps({"channel": channel, "data": body().decode()}).encode()
            self.request("POST", "/publish", b"\n".join([line] * times))

    def wait_for(self, channel: str, subscribers: int) -> None:
        """Until the channel has so many subscribers."""
        deadline = time.monotonic() + 60
        while self.request("GET", f"/channels/{channel}")["subscribers"] < subscribers:
            if time.monotonic() > deadline:
                raise TimeoutError(channel)
            time.sleep(0.02)


@contextmanager
def comet(*flags: str) -> Iterator[Service]:
    """A comet on a free port, for a bench from one address."""
    command = ["app.py", "--port", "0", "--max-per-address", "1000000", "--linger", "600", *flags]
    with server(command, "http://") as (pid, port):
        yield Service(pid, port)


def held(service: Service, load: Worker, count: int, path: str, first: str) -> tuple[float, float]:
    """Open `count` clients: bytes of server memory each, and clients opened a second."""
    before = memory(service.pid)
    seconds = load.ask(do="open", count=count, path=path, first=first)["seconds"]
    time.sleep(SETTLE)
    return (memory(service.pid) - before) / count, count / seconds
