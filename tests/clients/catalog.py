"""The clients: how each is run, and what it is known to do."""

from collections.abc import Sequence
from typing import NamedTuple

from tests.clients.install import DRIVERS, GO, JAVA, NODE, PYTHON

ITSELF = "by itself"
AGAIN = "started again"

FAULTS = {
    "worker": "a worker is killed",
    "stop": "stop and start",
    "kill": "the service is killed",
    "refused": "workers are killed, their successors refuse",
    "abort": "stop and start with `--events-end abort`",
    "refused_abort": "refused with `--events-end abort`",
}


class Known(NamedTuple):
    """What a client of `name` does: how it comes back from each of `FAULTS`, `ITSELF` or `AGAIN`."""

    name: str
    where: str
    worker: str
    stop: str
    kill: str
    refused: str
    abort: str
    refused_abort: str
    cursor: str
    """How it says where it was."""
    note: str
    endpoint: str = "events"
    reports_comet: bool = False
    """It reports blocks without data, which comet names `comet`, as events."""
    phantom_at_the_end: bool = False
    """It takes the last chunk for an empty message."""
    page: bool = False
    """It runs in the browser."""


POLL = "Waits and asks again with the same cursor: the loop is yours (tests/clients/drivers)."

CLIENTS: Sequence[Known] = (
    Known(
        "native-eventsource", "browser", ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, ITSELF,
        "Last-Event-ID", "Resumes before its first message too.", page=True,
    ),
    Known(
        "eventsource", "Node.js", ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, ITSELF,
        "Last-Event-ID", "Knows its place from its first message on.",
    ),
    Known(
        "event-source-polyfill", "browser", ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, ITSELF,
        "`?lastEventId=`", "Knows its place from its first message on. Drops a stream that is silent for 45 s: keep `--heartbeat` below.", page=True,
    ),
    Known(
        "eventsource-client", "Node.js", ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, ITSELF,
        "Last-Event-ID", "Knows its place from its first message on.",
    ),
    Known(
        "reconnecting-eventsource", "browser", ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, ITSELF,
        "Last-Event-ID; `?lastEventId=`", "Use `addEventListener(\"message\", …)`: of what comes to `onmessage` alone it keeps no id "
        "for a new EventSource.", page=True,
    ),
    Known(
        "fetch-event-source", "browser", ITSELF, AGAIN, ITSELF, AGAIN, ITSELF, ITSELF,
        "Last-Event-ID", "Stops at an orderly end, of a refusal too, unless `onclose` throws (the second example of its README) or `--events-end abort` is set.",
        reports_comet=True, page=True,
    ),
    Known(
        "httpx-sse", "Python", AGAIN, AGAIN, AGAIN, AGAIN, AGAIN, AGAIN,
        "Last-Event-ID", "Does not reconnect: a loop of yours passes `sse.id` in the header. Catch `httpx.TransportError`, not `ReadError` alone.",
        reports_comet=True,
    ),
    Known(
        "sseclient", "Python", ITSELF, AGAIN, AGAIN, ITSELF, AGAIN, ITSELF,
        "Last-Event-ID", "Tries once, after `retry:`: an exception if nobody is there then. A loop of yours passes `last_id`. It reads the chunks' "
        "framing as text, and so takes the last chunk for an empty message.", reports_comet=True, phantom_at_the_end=True,
    ),
    Known(
        "sseclient-py", "Python", AGAIN, AGAIN, AGAIN, AGAIN, AGAIN, AGAIN,
        "Last-Event-ID", "Does not reconnect: a loop of yours passes `event.id` in the header. Knows its place from its first message on.",
    ),
    Known(
        "requests-sse", "Python", ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, ITSELF,
        "Last-Event-ID", "Waits twice as long before each of five tries (`max_connect_retry`), beginning with twice `retry:`; then an exception.",
    ),
    Known(
        "go-sse", "Go", ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, ITSELF,
        "Last-Event-ID", "Its README's `SubscribeMessages` is for events without a name: comet's have one, so `SubscribeEvent(\"message\", …)` and "
        "`(\"gap\", …)`, or `SubscribeToAll`.", reports_comet=True,
    ),
    Known(
        "r3labs-sse", "Go", ITSELF, AGAIN, ITSELF, AGAIN, ITSELF, ITSELF,
        "Last-Event-ID", "Stops at an orderly end, of a refusal too, without an error, unless `--events-end abort` is set. Gives up when a connection breaks that is older than "
        "15 minutes, unless `ReconnectStrategy` is a `backoff.ExponentialBackOff` with `MaxElapsedTime: 0`.", reports_comet=True,
    ),
    Known(
        "okhttp-eventsource", "Java", ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, ITSELF,
        "Last-Event-ID", "Knows its place from its first message on. Use `BackgroundEventSource`: an `EventSource` alone throws unless its error strategy says to go on.",
    ),
    Known("fetch", "Node.js", ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, "`?since=`", POLL, "poll"),
    Known("axios", "Node.js", ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, "`?since=`", POLL, "poll"),
    Known("requests", "Python", ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, "`?since=`", POLL, "poll"),
    Known("aiohttp", "Python", ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, ITSELF, "`?since=`", POLL, "poll"),
)  # fmt: skip
"""Thirteen of server-sent events and four that poll, of npm, PyPI, Go and Maven; versions are in drivers/."""


def command(known: Known) -> list[str]:
    """What runs the driver of a client that needs no browser; the URL and perhaps the last id follow."""
    folder = DRIVERS / known.name
    if (folder / "main.py").exists():
        return [str(PYTHON), str(folder / "main.py")]
    if (folder / "main.mjs").exists():
        return ["node", str(NODE / known.name / "main.mjs")]
    if (folder / "main.go").exists():
        return [str(GO / known.name)]
    return ["java", "-Xmx64m", "-XX:+UseSerialGC", "-cp", f"{JAVA}/classes:{JAVA}/dependency/*", "Main"]
