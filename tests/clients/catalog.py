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
    "abort": "stop and start with `--drain-end abort`",
}


class Known(NamedTuple):
    """What a client of `name` does: who comes back, for each of `FAULTS`, `ITSELF` or `AGAIN`."""

    name: str
    language: str
    worker: str
    stop: str
    kill: str
    abort: str
    note: str
    """For docs/clients.md."""
    endpoint: str = "events"
    sees: bool = False
    """It reports blocks without data as events, so the ones that comet names `comet`."""
    phantoms: bool = False
    """It takes an orderly end for an empty message."""
    page: bool = False
    """It runs in the browser."""


CLIENTS: Sequence[Known] = (
    Known("native-eventsource", "browser", ITSELF, ITSELF, ITSELF, ITSELF, "", page=True),
    Known("eventsource", "Node.js", ITSELF, ITSELF, ITSELF, ITSELF, ""),
    Known("event-source-polyfill", "browser", ITSELF, ITSELF, ITSELF, ITSELF, "", page=True),
    Known("eventsource-client", "Node.js", ITSELF, ITSELF, ITSELF, ITSELF, ""),
    Known("reconnecting-eventsource", "browser", ITSELF, ITSELF, ITSELF, ITSELF, "", page=True),
    Known("fetch-event-source", "browser", ITSELF, ITSELF, ITSELF, ITSELF, "", page=True),
    Known("httpx-sse", "Python", ITSELF, ITSELF, ITSELF, ITSELF, ""),
    Known("sseclient", "Python", ITSELF, ITSELF, ITSELF, ITSELF, ""),
    Known("sseclient-py", "Python", ITSELF, ITSELF, ITSELF, ITSELF, ""),
    Known("requests-sse", "Python", ITSELF, ITSELF, ITSELF, ITSELF, ""),
    Known("go-sse", "Go", ITSELF, ITSELF, ITSELF, ITSELF, ""),
    Known("r3labs-sse", "Go", ITSELF, ITSELF, ITSELF, ITSELF, ""),
    Known("okhttp-eventsource", "Java", ITSELF, ITSELF, ITSELF, ITSELF, ""),
    Known("fetch", "Node.js", ITSELF, ITSELF, ITSELF, ITSELF, "", endpoint="poll"),
    Known("axios", "Node.js", ITSELF, ITSELF, ITSELF, ITSELF, "", endpoint="poll"),
    Known("requests", "Python", ITSELF, ITSELF, ITSELF, ITSELF, "", endpoint="poll"),
    Known("aiohttp", "Python", ITSELF, ITSELF, ITSELF, ITSELF, "", endpoint="poll"),
)


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
