"""python -m comet top: a service's `/stats`, live in a terminal.

Neighbour: `comet.service`, which says what the document holds.
"""

import http.client
import json
import os
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

TIMEOUT = 5.0
"""Seconds that a service has to answer."""

_UNITS = ("", "K", "M", "G", "T")


class Unreachable(Exception):
    """There is no service, or it does not let us ask; the text says what to do."""


def fetch(url: str, key: str) -> Mapping[str, Any]:
    """The document. Raises Unreachable."""
    try:
        parts = urlsplit(url if "//" in url else f"//{url}")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        with closing(kind(parts.hostname or "127.0.0.1", parts.port, timeout=TIMEOUT)) as connection:
            connection.request("GET", parts.path.rstrip("/") + "/stats", headers={"Authorization": f"Bearer {key}"} if key else {})
            answer = connection.getresponse()
            document = json.loads(answer.read())
    except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
        raise Unreachable(f"{url} can't be read: {error}. Is the service there? --url names it.") from None
    if not isinstance(document, dict):
        raise Unreachable(f"{url} is no service of comet, by its answer: --url names one.")
    if answer.status != 200:
        raise Unreachable(f"{url} answered {answer.status}: {document.get('detail', '')} (--key, or COMET_PUBLISH_KEY)")
    return document


def look(url: str, key: str) -> Group:
    """What is shown of a service at present. Raises Unreachable."""
    document = fetch(url, key)
    try:
        return screen(document, url)
    except (LookupError, TypeError, ValueError, AttributeError):
        raise Unreachable(f"{url} has a /stats of another form than this program knows. --url names a service of comet.") from None


def size(number: float) -> str:
    """Bytes, to three digits: 1.21G."""
    for unit in _UNITS:
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1024
    return f"{number:,.0f}P"


def screen(document: Mapping[str, Any], url: str) -> Group:
    """What is shown."""
    sockets, restarts = document["sockets"], document["restarts"]
    each = document["bytes_a_connection"]
    facts = Table.grid(padding=(0, 3))
    clients = ", ".join(f"{name} {number:,}" for name, number in sorted(document["clients"].items()) if number) or "none"
    rows = [
        ("connections", f"{document['connections']:,} of {document['capacity']:,}", "clients", clients),
        ("messages/s", f"{document['messages_a_second']:,.0f}", "deliveries/s", f"{document['deliveries_a_second']:,.0f}"),
        ("channels", f"{document.get('channels', 0):,}", "history", f"{size(document.get('history_bytes', 0))} in "
            f"{document.get('messages_kept', 0):,} messages"),
        ("memory", size(document["resident_bytes"]) + (f", {each:,} bytes a connection" if each else ""), "kernel's sockets",
            f"{size(sockets['memory_bytes'])} of {size(sockets['memory_limit_bytes'])}, {sockets['in_use']:,} in use"),
        ("closed", _counts(document["closed"]), "refused", _counts(document["refused"])),
        ("restarts", _counts(restarts), "errors", f"{document['errors']:,}"),
    ]  # fmt: skip
    missing = document.get("missing", {"workers": 0})
    if missing["workers"]:
        rows.append(("missing", f"{missing['workers']} workers for {missing['seconds']:,} s", "why", missing["why"]))
    for name, value, other, its in rows:
        facts.add_row(Text(name, style="dim"), Text(value), Text(other, style="dim"), Text(its))
    workers = Table(box=None, header_style="dim", padding=(0, 2))
    for column in ("worker", "generation", "pid", "connections", "beat"):
        workers.add_column(column, justify="right")
    for worker in document["workers"]:
        beat = "draining" if worker.get("draining") else f"{worker.get('age', 0.0):.1f} s ago"
        cells = (*(str(worker.get(name, "")) for name in ("worker", "generation", "pid")), f"{worker['connections']:,}", beat)
        workers.add_row(*map(Text, cells))
    return Group(Text(f"comet at {url}   {time.strftime('%H:%M:%S')}", style="bold"), facts, Text(), workers)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in sorted(counts.items(), key=lambda one: -one[1]) if number) or "none"


def show(url: str, key: str, every: float, once: bool) -> int:
    """Until Ctrl-C, every so many seconds; the exit status, 1 when the service can't be read."""
    console = Console()
    key = key or os.environ.get("COMET_PUBLISH_KEY", "")
    try:
        first = look(url, key)
        if once:
            console.print(first)
            return 0
        with Live(first, console=console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                try:
                    shown = look(url, key)
                except Unreachable as error:  # it may come back: that is when one looks
                    shown = Group(Text(str(error), style="red"))
                live.update(shown, refresh=True)
    except Unreachable as error:
        console.print(Text(str(error), style="red"), soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 0
