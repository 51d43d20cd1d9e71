"""python -m comet load-friends --backplane: an edge list into the subscriptions that are kept in Redis.

Neighbours: `comet.loading`, which reads and sorts the lines, and `comet.subscriptions_redis`, whose sets these are. A
user's set is written whole, thousands of them in a round trip: first whom each follows, then who follows each. What was
there stays, doubles count once, and who is interrupted runs it again. A service may run meanwhile.
"""

import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import Progress

from comet.database import Key
from comet.loading import BadLine, stage
from comet.subscriptions_redis import FAILURES, Sets, add, change, connect, pack

ROWS: Final = 20_000
"""Ids in one round trip, at most."""


def load(source: Path, url: str, prefix: str) -> int:
    """Load `source` into the Redis of `url`, with a progress bar; the exit status."""
    console = Console(stderr=True)
    began = time.monotonic()
    try:
        with closing(connect(url, timeout=60.0)) as client, closing(sqlite3.connect("", isolation_level=None)) as staged:
            client.ping()
            with Progress(console=console) as progress:
                lines = stage(source, staged, progress)
                sets = Sets(prefix)
                _store(client, _groups(staged, "follower", "followee"), sets.following, progress, "following")
                added = _store(client, _groups(staged, "followee", "follower"), sets.followers, progress, "followers")
    except (BadLine, ValueError, *FAILURES) as error:
        console.print(f"load-friends: {error}. What was there before is there; run it again.", style="red", markup=False, highlight=False)
        return 1
    seconds = time.monotonic() - began
    sys.stdout.write(f"{lines:,} lines, {added:,} new subscriptions, {seconds:.1f} s: {lines / seconds:,.0f} rows a second\n")
    return 0


def _groups(staged: sqlite3.Connection, user: str, other: str) -> Iterator[tuple[Key, list[Key]]]:
    """Each user with the others, in the order of the file that was staged."""
    rows = staged.execute(f"SELECT DISTINCT {user}, {other} FROM edges ORDER BY {user}, {other}")  # noqa: S608
    for one, those in groupby(rows, itemgetter(0)):
        yield one, [row[1] for row in those]


def _store(client: Any, groups: Iterable[tuple[Key, list[Key]]], name: Any, progress: Progress, what: str) -> int:
    task = progress.add_task(f"storing {what}", total=None)
    added = 0
    for lot in _lots(groups):
        added += change(client, [(name(str(user)), [pack(str(one)) for one in ids]) for user, ids in lot], add)
        progress.update(task, advance=sum(len(ids) for _, ids in lot))
    return added


def _lots(groups: Iterable[tuple[Key, list[Key]]]) -> Iterator[list[tuple[Key, list[Key]]]]:
    """Pieces of about `ROWS` ids."""
    lot: list[tuple[Key, list[Key]]] = []
    size = 0
    for user, ids in groups:
        rest = iter(ids)
        while part := list(islice(rest, ROWS)):
            lot.append((user, part))
            size += len(part)
            if size >= ROWS:
                yield lot
                lot, size = [], 0
    if lot:
        yield lot
