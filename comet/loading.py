"""python -m comet load-friends: an edge list into the file of subscriptions (`comet.database`).

A line is ``follower followee``. Made for millions of them: an edge list comes in the order of the one
who follows, the file is in the order of the one who is followed, and rows that come in another order
touch a page each. So all lines go into a temporary file of SQLite's first, and are taken out sorted.

An empty database gets them in one transaction, without the index and the counts, which are made at its end: all
or nothing, and rows stand in full pages. One that has rows gets them as a service would write them, in
transactions of `TRANSACTION` rows. Either way what was there stays, doubles count once, and who is
interrupted runs it again: it ends in the same state. A service may run on the file meanwhile.
"""

import re
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import IO, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from comet.database import AFTER_LOAD, BEFORE_LOAD, TRANSACTION, Key, Unusable, key, open_writer, prepare, transaction
from comet.errors import Refusal
from comet.message import USER_PREFIX, check_channel

BLOCK: Final = 1 << 20
"""Bytes of lines that are read together."""

CHUNK: Final = 10_000
"""Rows between two looks at the progress bar."""

PATIENCE: Final = 300.0
"""Seconds that the load waits for others who write."""

_NUMBER = rb"(?:0|[1-9][0-9]{0,17})"
_ALL_NUMBERS = re.compile(rb"(?:%b[ \t]%b\n)*+" % (_NUMBER, _NUMBER), re.ASCII)
"""Lines that need no second look: nearly all edge lists are like that."""


class BadLine(Exception):
    """A line of the file is no subscription; its number and what is wrong."""


def load(source: Path, folder: Path) -> int:
    """Load `source` into the data `folder`, with a progress bar; the exit status."""
    console = Console(stderr=True)
    try:
        began = time.monotonic()
        prepare(folder, whole=False)
        with closing(sqlite3.connect("", isolation_level=None)) as staged, closing(open_writer(folder, PATIENCE)) as database:
            lines, added = _load(source, staged, database, console)
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # a service may be reading: then a part stays in the log
        seconds = time.monotonic() - began
    except (Unusable, BadLine, OSError) as error:
        console.print(f"load-friends: {error}", style="red", markup=False, highlight=False)
        return 1
    except sqlite3.Error as error:
        console.print(f"load-friends: {error}. What was there before is there; run it again.", style="red", markup=False, highlight=False)
        return 1
    sys.stdout.write(f"{lines:,} lines, {added:,} new subscriptions, {seconds:.1f} s: {lines / seconds:,.0f} rows a second\n")
    return 0


def _load(source: Path, staged: sqlite3.Connection, database: sqlite3.Connection, console: Console) -> tuple[int, int]:
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        total = stage(source, staged, progress)
        rows = _counted(staged.execute("SELECT DISTINCT followee, follower FROM edges ORDER BY followee, follower"), total, progress)
        added = _store(rows, database, progress)
    return total, added


def stage(source: Path, staged: sqlite3.Connection, progress: Progress) -> int:
    """Put the lines into a table ``edges`` of `staged`; how many they are. Raises BadLine."""
    staged.execute("PRAGMA journal_mode = OFF")
    staged.execute("CREATE TABLE edges (followee, follower)")
    task = progress.add_task("reading", total=source.stat().st_size, speed="")
    with transaction(staged), source.open("rb") as lines:
        total = _stage(lines, staged, progress, task)
    for number, one in staged.execute("SELECT rowid, follower FROM edges WHERE follower = followee LIMIT 1"):
        raise BadLine(f"line {number}: {one} can't follow itself. Nothing was loaded.")
    return total


def _stage(lines: IO[bytes], staged: sqlite3.Connection, progress: Progress, task: TaskID) -> int:
    count = 0
    began = time.monotonic()
    while block := lines.readlines(BLOCK):
        staged.executemany("INSERT INTO edges (follower, followee) VALUES (?, ?)", _pairs(block, count))
        count += len(block)
        progress.update(task, advance=sum(map(len, block)), speed=_speed(count, began))
    return count


def _pairs(block: list[bytes], before: int) -> Iterable[tuple[Key, Key]]:
    text = b"".join(block)
    if _ALL_NUMBERS.fullmatch(text):
        numbers = map(int, text.split())
        return zip(numbers, numbers, strict=True)
    return map(_pair, block, range(before + 1, before + len(block) + 1))


def _pair(line: bytes, number: int) -> tuple[Key, Key]:
    """Raises BadLine."""
    try:
        follower, followee = line.decode().split()
        for one in (follower, followee):
            check_channel(USER_PREFIX + one)
    except (ValueError, Refusal) as error:
        why = error.detail if isinstance(error, Refusal) else "A line is two ids, follower and followee, with a space between."
        raise BadLine(f"line {number}: {why} Nothing was loaded.") from error
    return key(follower), key(followee)


def _counted(rows: Iterator[tuple[Key, Key]], total: int, progress: Progress) -> Iterator[tuple[Key, Key]]:
    """The rows, each chunk told to the progress bar."""
    task = progress.add_task("sorting", total=None, speed="")
    began = time.monotonic()
    done = 0
    while chunk := list(islice(rows, CHUNK)):
        if not done:
            progress.update(task, description="storing", total=total)
            began = time.monotonic()
        yield from chunk
        done += len(chunk)
        progress.update(task, completed=done, speed=_speed(done, began))
    progress.update(task, description="storing", total=done, completed=done)


def _store(rows: Iterator[tuple[Key, Key]], database: sqlite3.Connection, progress: Progress) -> int:
    insert = "INSERT OR IGNORE INTO follows (followee, follower) VALUES (?, ?)"
    with transaction(database):
        empty = database.execute("SELECT 1 FROM follows LIMIT 1").fetchone() is None
        if empty:
            for statement in BEFORE_LOAD:
                database.execute(statement)
            added = database.executemany(insert, rows).rowcount
            task = progress.add_task("indexing", total=None, speed="")
            for statement in AFTER_LOAD:
                database.execute(statement)
            progress.update(task, total=1, completed=1)
    if not empty:
        added = 0
        while chunk := list(islice(rows, TRANSACTION)):
            with transaction(database):
                added += database.executemany(insert, chunk).rowcount
    return added


def _speed(count: int, began: float) -> str:
    return f"{count / max(time.monotonic() - began, 0.001):,.0f} rows/s"
