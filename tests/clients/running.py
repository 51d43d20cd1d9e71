"""Clients that run: each is started, listened to, and started again with its last id if it ends."""

import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from selenium.webdriver import Chrome

from tests.clients.catalog import Known, command
from tests.clients.install import SSECLIENT
from tests.clients.judge import Line

AGAIN = 0.5
"""Seconds before a client that has ended is started again."""


class Running:
    """One client, until `stop`. `lines` is what it has reported, and where it was started again."""

    def __init__(self, known: Known, url: str) -> None:
        self.known = known
        self.url = url
        self.lines: list[Line] = []
        self._ended_at: float | None = None

    @property
    def last_id(self) -> str | None:
        """The last id that it has reported."""
        return next((line["id"] for line in reversed(self.lines) if line.get("id")), None)

    @property
    def newest(self) -> int:
        """The number of the last message that it has reported, 0 if there is none."""
        return next(
            (int(line["data"] or 0) for line in reversed(self.lines) if line["event"] == "message" and (line.get("data") or "").isdigit()),
            0,
        )

    @property
    def count(self) -> int:
        """Messages that it has reported."""
        return sum(line["event"] == "message" for line in self.lines)

    def start(self) -> None:
        """Start it, with its last id if it has reported one."""
        raise NotImplementedError

    def stop(self) -> None:
        """End it for good."""
        raise NotImplementedError

    def ended(self) -> bool:
        """Take in what it has reported; whether it has given up or exited."""
        raise NotImplementedError

    def tend(self) -> None:
        """Take in what it has reported, and start it again if it has ended a while ago."""
        if not self.ended():
            return
        if self._ended_at is None:
            self._ended_at = time.monotonic()
        elif time.monotonic() - self._ended_at >= AGAIN:
            self._ended_at = None
            self.lines.append({"event": "restart"})
            self.start()


class Program(Running):
    """A client that is a process; its standard error is `log`."""

    def __init__(self, known: Known, url: str, log: Path) -> None:
        super().__init__(known, url)
        self._log = log
        self._said: queue.SimpleQueue[Line] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: threading.Thread | None = None

    def start(self) -> None:
        last = self.last_id
        path = {"PYTHONPATH": str(SSECLIENT)} if self.known.name == "sseclient" else {}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command(self.known), self.url, *([last] if last else [])],
                stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **path},
            )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, args=[self._process], daemon=True)
        self._listener.start()

    def _listen(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        with process.stdout:
            for text in process.stdout:
                self._said.put(json.loads(text))

    def ended(self) -> bool:
        assert self._process is not None and self._listener is not None
        over = self._process.poll() is not None
        if over:
            self._listener.join()  # all that it has said comes before its end
        while not self._said.empty():
            self.lines.append(self._said.get())
        return over

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self.ended()


class Page(Running):
    """A client that is a page, in a window of its own."""

    def __init__(self, known: Known, url: str, browser: Chrome, origin: str) -> None:
        super().__init__(known, url)
        self._browser = browser
        browser.switch_to.new_window("window")
        self._window = browser.current_window_handle
        browser.get(f"{origin}/drivers/{known.name}/page.html")

    def start(self) -> None:
        self._browser.switch_to.window(self._window)
        self._browser.execute_script("window.start(arguments[0], arguments[1])", self.url, self.last_id)

    def ended(self) -> bool:
        self._browser.switch_to.window(self._window)
        self.lines += self._browser.execute_script("return window.lines.splice(0)")
        over = next((line["event"] for line in reversed(self.lines) if line["event"] in ("end", "restart")), "")
        return over == "end"

    def stop(self) -> None:
        self.ended()
        self._browser.close()


class Crowd:
    """All the clients of a scenario, until the block ends."""

    def __init__(self, clients: Sequence[Running]) -> None:
        self.clients = clients

    def start(self) -> None:
        """Start each."""
        for client in self.clients:
            client.start()

    def until(self, condition: Callable[[Running], bool], timeout: float) -> None:
        """Wait until this holds of each, starting again those that end; go on without those of whom it does not hold in time:
        the judge will see what they lack."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            for client in self.clients:
                client.tend()
            if all(map(condition, self.clients)):
                return
            time.sleep(0.05)

    def stop(self) -> None:
        """End each for good."""
        for client in self.clients:
            client.stop()
