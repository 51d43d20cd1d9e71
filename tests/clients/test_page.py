"""The page at / in a real browser: every type, the channel of each message, gaps, and coming back.

Needs Chromium and its driver (Debian: ``apt-get install chromium chromium-driver``) and selenium, so it is no part of
``make test``: ``python -m pytest tests/clients/test_page.py``.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from gevent.pywsgi import WSGIServer
from gevent.threadpool import ThreadPool
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from handlers import page
from tests.conftest import Start
from tests.harness import Server, wait_until

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1100,900",
)  # fmt: skip
"""As root, and with no word to anybody but the server of the test."""


@pytest.fixture(scope="module")
def hibernate() -> str:
    """The page knows no difference."""
    return "on"


class Browser:
    """A browser on one page. What it does is done in a thread, so that greenlets of the test go on."""

    def __init__(self) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = "/usr/bin/chromium"
        for flag in FLAGS:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self._pool = ThreadPool(1)
        self.driver = self._do(lambda: webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver")))

    def _do(self, work: Callable[[], Any]) -> Any:
        return self._pool.apply(work)

    def close(self) -> None:
        """End it."""
        self._do(self.driver.quit)

    def open(self, url: str) -> None:
        """Load the page."""
        self._do(lambda: self.driver.get(url))

    def fill(self, **fields: str) -> None:
        """Write into fields, by their ids."""
        for name, text in fields.items():
            self._do(partial(self._write, name, text))

    def _write(self, name: str, text: str) -> None:
        field = self.driver.find_element(By.ID, name)
        field.clear()
        field.send_keys(text)

    def press(self, label: str) -> None:
        """Press the button of this label."""
        self._do(lambda: self.driver.find_element(By.XPATH, f"//button[.='{label}']").click())

    def text(self, name: str) -> str:
        """What an element shows, by its id."""
        return str(self._do(lambda: self.driver.find_element(By.ID, name).text))

    def log(self) -> list[str]:
        """What was shown, oldest first, a line a message, without the time: ``channel type id|data``."""
        script = "return [...document.querySelectorAll('#log li')].reverse().map(one => [one.className, one.textContent])"
        shown = []
        for kind, text in self._do(lambda: self.driver.execute_script(script)):
            note, _, data = text.partition("\n")
            of = note.split("  ")[1:-1] if kind == "message" else []
            shown.append("|".join((kind, *of, data)))
        return shown

    def complaints(self) -> list[str]:
        """Errors of the page's script, and what its policy forbade; not the requests that failed on purpose."""
        entries = self._do(lambda: self.driver.get_log("browser"))
        return [entry["message"] for entry in entries if entry["source"] != "network"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    yield chromium
    assert chromium.complaints() == []
    chromium.open("about:blank")  # or it would come back to the next server


def listen(browser: Browser, server: Server, user: str, more: str) -> None:
    browser.open(f"http://{server.url}/")
    browser.fill(user=user, more=more)
    browser.press("Connect")
    wait_until(lambda: browser.text("state").endswith(f"listening to {', '.join(filter(None, (f'user:{user}', *more.split(','))))}"))


def test_every_type_is_shown_with_its_channel(start: Start, browser: Browser) -> None:
    server = start()
    listen(browser, server, "alice", "news,weather")
    server.publish("news", "one")
    server.publish("weather", "<b>two</b>\nlines", "storm-warning")
    server.publish("user:alice", "{\N{SNOWMAN}}", "x")
    server.publish("other", "not for this page")
    server.publish("news", "", "empty")
    wait_until(lambda: len(browser.log()) == 4)
    assert browser.log() == [
        "message|news|message|one",
        "message|weather|storm-warning|<b>two</b>\nlines",
        "message|user:alice|x|{\N{SNOWMAN}}",
        "message|news|empty|",
    ]


def test_it_publishes_a_type_that_it_shows(start: Start, browser: Browser) -> None:
    server = start(COMET_PUBLISH_KEY="s3cret")
    listen(browser, server, "alice", "news")
    browser.fill(channel="news", type="headline", data="extra!")
    browser.press("Publish")
    wait_until(lambda: browser.text("answer").startswith("unauthorized: "))
    browser.fill(key="s3cret")
    browser.press("Publish")
    wait_until(lambda: browser.log() == ["message|news|headline|extra!"])
    wait_until(lambda: browser.text("answer").endswith("to 1 subscriber(s)"))


@pytest.mark.parametrize("more", ["news", ""], ids=["two channels", "one channel"])
def test_it_comes_back_by_its_cursor_and_tells_what_may_be_missing(start: Start, browser: Browser, more: str) -> None:
    server = start("--workers", "1", "--history-size", "3")
    listen(browser, server, "alice", more)
    server.publish("user:alice", "before")
    wait_until(lambda: browser.log() == ["message|user:alice|message|before"])
    (worker,) = server.stats()["workers"]
    server.process.send_signal(signal.SIGHUP)  # its worker drains, and another takes over
    wait_until(lambda: worker["pid"] not in [one["pid"] for one in server.stats()["workers"]])
    server.publish("user:alice", "meanwhile")
    wait_until(lambda: browser.log()[1:] == ["message|user:alice|message|meanwhile"])
    browser.press("Disconnect")
    assert browser.text("state").endswith("not connected")
    server.publish("user:alice", "nobody listens")
    wait_until(lambda: server.clients() == 0)
    assert len(browser.log()) == 2


def test_a_server_that_forgot_is_told_as_a_gap(start: Start, browser: Browser) -> None:
    first = start()
    listen(browser, first, "alice", "news")
    first.publish("news", "old")
    wait_until(lambda: len(browser.log()) == 1)
    first.stop()
    wait_until(lambda: "reconnecting in" in browser.text("state"))
    second = start("--port", str(first.port))
    wait_until(lambda: "listening" in browser.text("state"))
    second.publish("news", "new")
    wait_until(lambda: browser.log()[-1] == "message|news|message|new")
    kind, text = browser.log()[1].split("|")
    assert kind == "gap" and text.startswith("something may be missing")
    assert len(browser.log()) == 3


def test_a_refusal_for_good_is_said_and_not_repeated(start: Start, browser: Browser) -> None:
    server = start()
    browser.open(f"http://{server.url}/")
    browser.fill(user="not a name")
    browser.press("Connect")
    wait_until(lambda: "refused: bad-channel: " in browser.text("state"))
    refused = server.stats()["refused"]["bad-channel"]
    browser.fill(user="alice", more="news")
    browser.press("Connect")
    wait_until(lambda: "listening to user:alice, news" in browser.text("state"))
    assert server.stats()["refused"]["bad-channel"] == refused == 1


def test_a_refusal_that_passes_is_repeated_when_the_server_says(browser: Browser) -> None:
    """With a server that is full twice, and says when to come again."""
    came: list[float] = []

    def full(environ: dict[str, Any], begin: Any) -> list[bytes]:
        if environ["PATH_INFO"] == "/":
            begin("200 OK", [("Content-Type", "text/html; charset=utf-8"), ("Content-Security-Policy", page._POLICY)])
            return [page._PAGE]
        if environ["PATH_INFO"].startswith("/stream/"):
            came.append(time.monotonic())
            if len(came) <= 2:
                begin("503 Service Unavailable", [("Content-Type", "application/json"), ("Retry-After", "3")])
                return [b'{"error": "worker-full", "detail": "Come back later."}']
            begin("200 OK", [("Content-Type", "application/x-ndjson")])
            line = {"channel": "news", "type": "message", "id": "1", "data": "at last", "cursor": "1"}
            return [b"\n", json.dumps(line).encode() + b"\n"]
        begin("404 Not Found", [])
        return []

    server = WSGIServer(("127.0.0.1", 0), full, log=None)
    server.start()
    try:
        browser.open(f"http://127.0.0.1:{server.server_port}/")
        browser.press("Connect")
        wait_until(lambda: "(worker-full: Come back later.)" in browser.text("state"))
        wait_until(lambda: "message|news|message|at last" in browser.log())
    finally:
        server.stop()
    assert min(came[1] - came[0], came[2] - came[1]) >= 3, came
