"""Every client comes through a worker's kill, a stop and start, and a kill of the service, with nothing lost untold.

All clients run at once against one service while numbered messages are published; a scenario is a fault under them. A client
that ends is started again with the last id that it reported; whether it had to be is part of what is known of it
(`tests.clients.catalog`), and so is asserted.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
from selenium.webdriver import Chrome

from tests.clients.catalog import AGAIN, CLIENTS, FAULTS, ITSELF, Known
from tests.clients.judge import Line, Verdict, judge
from tests.clients.pages import Pages
from tests.clients.publisher import Publisher
from tests.clients.running import Crowd, Page, Program, Running
from tests.clients.service import Restartable

CHANNEL = "numbers"
TIMEOUT = 90.0
"""Seconds that a client has to come back: some wait longer after each try, and the machine may have other work."""

ABORT = ("abort", "refused_abort")
"""Faults of a service with ``--events-end abort``."""

FORGETS = ("stop", "kill", "abort")
"""Faults after which the service knows nothing of what was published before."""

FLAGS = ["--retry", "500", "--grace", "3", "--history-size", "20000"]


class Scenario(NamedTuple):
    """What all clients have reported of one fault; `last` is the last number that was acknowledged."""

    last: int
    lines: Mapping[str, list[Line]]
    verdicts: Mapping[str, Verdict]


def faults_of(service: Restartable) -> Mapping[str, list[Callable[[], None]]]:
    """What is done, one after the other; after each all clients must have come back."""
    return {
        "worker": [partial(service.kill_worker, 0), partial(service.kill_worker, 1)],  # each client is on one of the two
        "stop": [service.stop_and_start],
        "kill": [service.kill_and_start],
        "abort": [service.stop_and_start],
        "refused": [service.kill_workers_and_refuse],
        "refused_abort": [service.kill_workers_and_refuse],
    }


def clients_of(service: Restartable, browser: Chrome, pages: Pages, folder: Path, since: str = "") -> Iterator[Running]:
    """Each client, not started; those that stream begin after the cursor `since`, if it is given."""
    for known in CLIENTS:
        url = f"http://127.0.0.1:{service.port}/{known.endpoint}/{CHANNEL}"
        if since and known.endpoint == "events":
            url += f"?since={since}"
        if known.page:
            yield Page(known, url, browser, pages.origin)
        else:
            yield Program(known, url, folder / f"{known.name}.log")


@pytest.fixture(scope="module", params=list(FAULTS))
def fault(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def scenario(fault: str, browser: Chrome, pages: Pages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scenario]:
    folder = tmp_path_factory.mktemp(fault)
    service = Restartable(folder, *FLAGS, "--origins", pages.origin, *(["--events-end", "abort"] if fault in ABORT else []))
    publisher = Publisher(service.port, CHANNEL)
    crowd = Crowd(list(clients_of(service, browser, pages, folder)))
    try:
        crowd.start()
        publisher.start()
        crowd.until(lambda client: client.count >= 3, TIMEOUT)
        for do in faults_of(service)[fault]:
            do()
            after = publisher.acknowledged + 3
            crowd.until(lambda client, after=after: client.newest >= after, TIMEOUT)  # type: ignore[misc]
        last = publisher.finish()
        crowd.until(lambda client: client.newest >= last, TIMEOUT)
    finally:
        publisher.finish()
        crowd.stop()
        service.close()
        browser.switch_to.window(browser.window_handles[0])
    yield Scenario(
        last,
        {client.known.name: client.lines for client in crowd.clients},
        {client.known.name: judge(client.lines, publisher.doubtful) for client in crowd.clients},
    )


@pytest.mark.parametrize("known", CLIENTS, ids=[known.name for known in CLIENTS])
def test_client(known: Known, fault: str, scenario: Scenario) -> None:
    verdict = scenario.verdicts[known.name]
    said = "\n".join(str(line) for line in scenario.lines[known.name] if line["event"] != "message")
    print(verdict, scenario.last, said, sep="\n")  # noqa: T201 - shown if it fails
    assert verdict.faultless
    assert verdict.last >= scenario.last, "the last ones did not come"
    assert verdict.gaps == (1 if fault in FORGETS else 0), "what the service has forgotten is told once"
    assert verdict.phantoms == ([""] if known.phantom_at_the_end and fault == "stop" else [])
    assert verdict.others == ({"comet"} if known.reports_comet else set())
    assert (ITSELF if verdict.restarts == 0 else AGAIN) == getattr(known, fault)


def test_whoever_starts_with_a_cursor_misses_nothing_before_its_first_message(browser: Chrome, pages: Pages, tmp_path: Path) -> None:
    """Many clients know their place from their first message on: the cursor in the URL is where they start again before that."""
    service = Restartable(tmp_path, *FLAGS, "--origins", pages.origin)
    publisher = Publisher(service.port, CHANNEL)
    cursor = service.running.request("GET", f"/poll/{CHANNEL}?timeout=0").json["cursor"]
    crowd = Crowd(list(clients_of(service, browser, pages, tmp_path, cursor)))
    try:
        crowd.start()
        deadline = time.monotonic() + TIMEOUT
        while service.running.clients() < len(CLIENTS):
            assert time.monotonic() < deadline, service.running.stats()["clients"]
            crowd.until(lambda client: True, TIMEOUT)
        service.kill_workers()
        publisher.start()
        crowd.until(lambda client: client.newest >= 20, TIMEOUT)
        last = publisher.finish()
        crowd.until(lambda client: client.newest >= last, TIMEOUT)
    finally:
        crowd.stop()
        service.close()
        browser.switch_to.window(browser.window_handles[0])
    verdicts = {client.known.name: judge(client.lines, publisher.doubtful) for client in crowd.clients}
    missed = {name: verdict for name, verdict in verdicts.items() if verdict.first != 1 or not verdict.faultless or verdict.last < last}
    assert not missed
