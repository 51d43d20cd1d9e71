"""What a whole service says of itself: the documents of its processes, put together. That is `/stats`.

Each process writes its own (`comet.stats` and what `app.py` adds) on the board (`comet.board`) once a
second, so any worker can answer for all, without asking anybody. One process alone is a service of
one worker. Pure, standard library only.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

Document = Mapping[str, Any]

LASTING = (
    "accepted", "requests", "published", "offered", "closed", "refused", "malformed", "errors", "gc_full_collections", "log_dropped",
)  # fmt: skip
"""Counters that a worker's end must not take with it; the supervisor keeps them."""

PRESENT = (
    "connections",
    "clients",
    "capacity",
    "messages_a_second",
    "deliveries_a_second",
    "resident_bytes",
    "peak_memory_bytes",
    "growth_bytes",
)
"""What workers have now; a sum of them is the service's."""

BY_NAME = frozenset({"closed", "refused", "clients"})
"""Those that are several, by reason, slug and endpoint."""

OF_WORKERS = ("worker", "generation", "pid", "connections", "draining", "ready", "age")
"""What is shown of each. It is ready while it can order messages (`/readyz`)."""

TOTALS = ("channels", "messages_kept", "history_bytes", "idempotency_keys")
"""What the backplane counts, for all."""

TELLING = 1000
"""Connections from which on the memory of one can be told from what a process takes to get going."""

NOBODY_MISSING: Document = {"workers": 0, "seconds": 0, "why": ""}
"""How many workers are missing, for how many seconds the first of them has been, and why it could not be started."""

RESTARTS = ("worker_restarts", "router_restarts", "generation_restarts", "reloads", "failed_reloads", "hung")


def add(total: dict[str, Any], document: Document, names: Iterable[str]) -> None:
    """Add the counters of these names, numbers or counters by name."""
    for name in names:
        value = document.get(name, {} if name in BY_NAME else 0)
        if name in BY_NAME:
            total[name] = Counter(total.get(name, {}))
            total[name].update(value)
        else:
            total[name] = total.get(name, 0) + value


def summary(workers: Iterable[Document], totals: Document, supervisor: Document, kernel: Document) -> dict[str, Any]:
    """The service's document. `totals` are the backplane's; `supervisor` is {} where there is none, and else has
    the `LASTING` counters of workers that have ended under ``ended``."""
    workers = list(workers)
    document: dict[str, Any] = {}
    add(document, supervisor.get("ended", {}), LASTING)
    for worker in workers:
        add(document, worker, (*LASTING, *PRESENT))
    document["gc_longest_seconds"] = max((one.get("gc_longest_seconds", 0.0) for one in (*workers, totals)), default=0.0)
    document |= {name: totals.get(name, 0) for name in TOTALS}
    document["log_dropped"] += totals.get("log_dropped", 0) + supervisor.get("log_dropped", 0)
    connections, growth = document.get("connections", 0), document.pop("growth_bytes", 0)
    document["bytes_a_connection"] = growth // connections if connections >= TELLING else None
    document["sockets"] = kernel
    document["restarts"] = {name: supervisor.get(name, 0) for name in RESTARTS}
    document["missing"] = supervisor.get("missing", NOBODY_MISSING)
    document["workers"] = [{name: worker[name] for name in OF_WORKERS if name in worker} for worker in workers]
    return document
