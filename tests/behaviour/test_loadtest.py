"""The load test itself, small: `make million` with the shape Smoke, which asserts that nothing is lost; that it ends what it
has started when it is interrupted; and Locust by hand, as the README has it."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from loadtest.process import descendants
from tests.conftest import Start, only_asleep
from tests.harness import ROOT, TIMEOUT, free_port, wait_until

CLIENTS = 2000


def command(out: Path, *flags: str) -> list[str]:
    made = [sys.executable, "-m", "loadtest", "million", "--out", str(out), "--port", str(free_port()), "--shape", "Smoke"]
    return [*made, "--clients", str(CLIENTS), "--senders", "40", "--rate", "100", *flags]


def document(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def test_smoke_nothing_is_lost_and_the_report_says_all_of_it(tmp_path: Path) -> None:
    """One test: it takes half a minute of a core."""
    run = subprocess.run(command(tmp_path, "--duration", "6"), cwd=ROOT, capture_output=True, text=True, timeout=5 * TIMEOUT, check=False)
    (folder,) = tmp_path.glob("run-*")
    said = run.stdout + run.stderr + "".join(log.read_text() for log in folder.glob("*.log"))
    assert (folder / "report.json").exists(), said
    report = document(folder)
    summary, verdict = report["summary"], report["summary"]["verdict"]
    assert verdict is not None, said

    # every client got what it was due, once, and was never closed
    assert verdict["sent"] > 400, said
    assert verdict["received"] == verdict["due"] > verdict["sent"], said
    wrong = {name: verdict[name] for name in ("lost", "doubled", "other", "refused", "unsure")}
    assert wrong == dict.fromkeys(wrong, 0), said
    assert summary["failures"] == {}, said
    objections = [one for one in report["objections"] if "p99" not in one and "asked for" not in one]
    assert not objections  # how fast it was is not the question on a machine that runs other tests
    assert run.returncode == int(bool(report["objections"])), said

    # all kinds of clients were there, and some left and came back
    assert summary["facts"]["open"]["clients"] == CLIENTS + 30, said
    assert summary["facts"]["churn"]["left"] > 5, said

    # Locust's own statistics have the same
    rows = dict(re.findall(r"^(PUSH,feed|OPEN,clients|POST,/send/<id>),(\d+),", (folder / "locust_stats.csv").read_text(), re.MULTILINE))
    assert int(rows["PUSH,feed"]) == verdict["received"], said
    assert int(rows["POST,/send/<id>"]) == verdict["sent"], said
    assert int(rows["OPEN,clients"]) >= CLIENTS + 30, said

    # the page stands alone
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r"(src|href)=.https?:", page)
    assert "mochiweb" in page


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_all_that_was_started_ends_when_it_is_interrupted(tmp_path: Path, number: int) -> None:
    said = tmp_path / "said.log"
    with said.open("wb") as log:
        process = subprocess.Popen(command(tmp_path, "--duration", "60"), cwd=ROOT, stdout=log, stderr=log)
    try:

        def runs() -> bool:  # the service and Locust are there
            assert process.poll() is None, said.read_text()
            return bool(list(tmp_path.glob("run-*/timeline.jsonl")))

        wait_until(runs, 3 * TIMEOUT)
        family = descendants(process.pid)[1:]
        assert len(family) >= 7
        process.send_signal(number)
        # two programs have thirty seconds each to end in order
        assert process.wait(3 * TIMEOUT) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    run = subprocess.run(
        command(tmp_path, "--clients", "100000000"), cwd=ROOT, capture_output=True, text=True, timeout=3 * TIMEOUT, check=False
    )
    assert run.returncode == 2
    assert "refused: " in run.stdout
    assert "clients fit" in run.stdout
    assert not list(tmp_path.glob("run-*"))


BY_HAND = ("StreamUser", "EventsUser", "LongPollUser", "FriendSender")
"""The classes of the README's command."""

SHAPED = {"SwarmUser", "Churn", "EveryoneSender"}
"""Classes of users that are for shapes, as in `loadtest.control`. Importing that would import Locust, which patches the standard library."""


class Page:
    """Locust's web page, as a browser uses it."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self.log = log

    def ask(self, method: str, path: str, form: Mapping[str, Any] | None = None) -> Any:
        """The answer, read as JSON. Locust resets a connection now and then on a machine with other work: a GET is asked again."""
        body = None if form is None else urlencode(form, doseq=True)
        while True:
            connection = HTTPConnection("127.0.0.1", self.port, timeout=2 * TIMEOUT)
            try:
                connection.request(method, path, body, {"Content-Type": "application/x-www-form-urlencoded"})
                return json.loads(connection.getresponse().read())
            except ConnectionResetError:
                if method != "GET":
                    raise
            finally:
                connection.close()

    def start(self, users: int, **form: Any) -> None:
        """Press Start."""
        answer = self.ask("POST", "/swarm", {"user_count": users, "spawn_rate": users, **form})
        assert answer["success"], answer

    def rows(self) -> dict[tuple[str, str], Any]:
        """The table: method and name."""
        return {(row["method"] or "", row["name"]): row for row in self.ask("GET", "/stats/requests")["stats"]}

    def failures(self) -> dict[str, str]:
        """The tab of failures: what was said of each name."""
        return {error["name"]: error["error"] for error in self.ask("GET", "/stats/requests")["errors"]}


@contextmanager
def locust_page(log: Path, *arguments: str) -> Iterator[Page]:
    """Locust with its web page, until the block ends."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "locust",
        "-f",
        "loadtest/locustfile.py",
        "--web-host",
        "127.0.0.1",
        "--web-port",
        str(port),
        "--late",  # a failure, which is nobody's here on a busy machine
        str(TIMEOUT),
        *arguments,
    ]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        page = Page(port, log)
        wait_until(lambda: process.poll() is not None or answers(page))
        assert process.poll() is None, log.read_text()
        yield page
    finally:
        process.terminate()
        process.wait(TIMEOUT)
    assert "Traceback" not in log.read_text(), log.read_text()


def answers(page: Page) -> bool:
    """Whether the page is there."""
    try:
        return bool(page.ask("GET", "/stats/requests"))
    except (OSError, HTTPException):
        return False


def count(page: Page, method: str, name: str) -> Callable[[], int]:
    """How many of this row there are, when asked."""
    return lambda: page.rows().get((method, name), {"num_requests": 0})["num_requests"]


@only_asleep
def test_locust_by_hand_shows_what_is_delivered(start: Start, tmp_path: Path) -> None:
    server = start()
    log = tmp_path / "locust.log"
    with locust_page(log, *BY_HAND, "--host", f"http://{server.url}") as page:
        page.start(40)
        wait_until(lambda: count(page, "PUSH", "feed")() >= 200)
        wait_until(lambda: server.clients() == 30)  # ten of the forty send; who polls is away for a moment, again and again
        rows = page.rows()
        assert rows["OPEN", "clients"]["num_requests"] == 30
        assert rows["PUSH", "feed"]["max_response_time"] > 0
        page.ask("POST", "/stop", {})
        wait_until(lambda: server.clients() == 0)
        # a message went to one who was there: what was sent has arrived, but for what was under way at the end
        wait_until(lambda: count(page, "PUSH", "feed")() >= 0.9 * count(page, "POST", "/send/<id>")() - 10)  # the page is seconds old
        assert page.failures() == {}
    assert "make friends" in log.read_text(), "nobody follows anybody, which is said"


@only_asleep
@pytest.mark.parametrize("picker", [False, True])
def test_locusts_page_with_all_classes_says_why_some_want_a_shape(start: Start, tmp_path: Path, picker: bool) -> None:
    server = start()
    log = tmp_path / "locust.log"
    with locust_page(log, "--host", f"http://{server.url}", *(["--class-picker"] if picker else [])) as page:
        page.start(36)
        wait_until(lambda: count(page, "PUSH", "feed")() >= 20 and count(page, "PUSH", "direct")() >= 20, 3 * TIMEOUT)
        if picker:
            wait_until(lambda: set(page.failures()) >= SHAPED, 3 * TIMEOUT)
            assert set(page.failures()) == SHAPED
            assert all("COMET_SHAPE" in why for why in page.failures().values())
        else:
            assert page.failures() == {}
            assert "Churn, EveryoneSender, SwarmUser left out: " in log.read_text()
        assert 0 < server.clients() <= (12 if picker else 18), "no swarm has opened a thousand"
