"""Who follows whom, for a service on greenlets: look-ups on the loop, writes in a thread.

The calls are those of metabrew's subsmanager. Neighbours: `comet.database`, the file; `handlers.users`
and `handlers.metabrew`, who ask.

The loop must not be held up, and two things would do that:

- *A long answer.* Look-ups fetch `STEP` followers at a time, each step a statement of its own, and others
  have a turn between two; so no read transaction stays open either, which would keep the log from being
  written back.
- *The interpreter's lock.* Python's sqlite3 gives it up and takes it again for every row, and each time a
  writing thread may take it. So a step is one row: SQLite joins the ids to one text (no id has a comma).
  A write goes the same way: its rows are one JSON text, which SQLite reads by itself without the lock.

Any worker may write. Within a process one thread does, transaction after transaction; between processes SQLite's lock stands. A write
waits at most `comet.database.PATIENCE` in all, for the writes before it and for that lock. Another program may hold the lock for as long as
it likes (a transaction that is open in a shell). So the number of writes that wait is bounded, and once the lock has been held for `HELD`,
one write goes on trying and others are refused at once. The thread tries for `TRY` at a time, and is free in between.

Messages do not need the file. If it is damaged or gone, from the start or later, calls are refused (``database-away``) until it can be
used again: each second that somebody asks, the file that is there by then is looked at.
"""

import logging
import math
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import gevent
import msgspec
from gevent.lock import Semaphore
from gevent.threadpool import ThreadPool

from comet.database import PATIENCE, TRANSACTION, Key, identity, key, open_reader, open_writer, path_in, transaction, why
from comet.errors import Refusal
from comet.turn import give_way

STEP: Final = 1000
"""Ids that one statement fetches: 0.2 ms, and as much again to take them apart."""

SLICE: Final = 1000
"""Rows of a write that are made ready before others have a turn: about a millisecond."""

TRY: Final = 0.25
"""Seconds that the thread waits for the lock of other processes before it looks whether the write is to wait on."""

HELD: Final = 5.0
"""Seconds without the lock after which the file counts as locked: a transaction of a comet takes two (`comet.database.PATIENCE`)."""

WAITING: Final = 1000
"""Writes that may wait in a process: a disk that syncs in 30 ms does as many in `comet.database.PATIENCE`."""

ENDING: Final = 2.0
"""Seconds that the thread has to end."""

LOOK: Final = 1.0
"""Seconds between two looks whether the file is still the one that is open: a second in which what is answered may be of one that is
gone, and a system call that a look-up does not pay for. And for how long it is known to be locked."""

TOLD: Final = 60.0
"""Seconds between two lines of the log about a file that can't be used: each request would be one."""

FULL: Final = frozenset({"SQLITE_FULL", "SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_TRUNCATE"})
"""What SQLite calls a disk that takes no more: a full one, and one on which this user's quota is."""

_ROWS = "SELECT json_extract(value, '$[0]') AS followee, json_extract(value, '$[1]') AS follower FROM json_each(?)"
_ADD = f"INSERT OR IGNORE INTO follows {_ROWS} ORDER BY followee, follower"
_REMOVE = f"DELETE FROM follows WHERE (followee, follower) IN ({_ROWS})"  # noqa: S608

Pair = tuple[str, str]
"""Follower and followee."""

log = logging.getLogger("comet.subscriptions")


class _Direction:
    """The statements of one way to look: the `column` that is wanted of the rows where `given` is the user, of whom `counted` is how
    many there are."""

    def __init__(self, column: str, given: str, counted: str) -> None:
        self.count = f"SELECT {counted} FROM counts WHERE user = ?"  # noqa: S608
        rows = f"SELECT {column} AS id FROM follows WHERE {given} = ?"  # noqa: S608
        self.joined = [
            f"SELECT group_concat(id), max(id), count(*) FROM ({rows}{beyond} ORDER BY id LIMIT ?)"  # noqa: S608
            for beyond in ("", f" AND {column} > ?")
        ]
        self.page = [f"{rows}{beyond} ORDER BY id LIMIT ?" for beyond in ("", f" AND {column} > ?")]


_FOLLOWERS = _Direction("follower", "followee", "followers")
_FOLLOWING = _Direction("followee", "follower", "following")


class Subscriptions:
    """`folder` has a prepared file, unless that can't be used. Make it after any fork.

    Of the `connections` that this process takes at most a quarter may wait to write, so that messages and health checks find room.

    All calls take and give ids as text. Each raises Refusal ``database-busy`` when others have the file
    locked for too long, and ``database-away`` when it can't be used; those that write ``disk-full`` as well."""

    def __init__(self, folder: Path, connections: int = 4 * WAITING) -> None:
        self._folder = folder
        self._room = max(1, min(WAITING, connections // 4))
        """Writes that may wait at the same time."""
        self._waiting = 0
        """Writes that wait, and the one under way."""
        self._turn = Semaphore(1)
        """Held by the write under way."""
        self._locked_since: float | None = None
        """When a try first found the file locked by others; None if the last one did not."""
        self._found_locked = 0.0
        """When a try last found the file locked by others."""
        self._held = False
        """The file has been locked for `HELD`, and no try has succeeded since."""
        self._until = math.inf
        """When no write waits any longer for others."""
        self._closed = False
        self._reader: sqlite3.Connection | None = None
        self._read: tuple[int, int] | None = None
        """The file that `_reader` has open."""
        self._looks = 0.0
        """When to look at the file again."""
        self._tells = 0.0
        """When the log may tell of it again."""
        self._told = False
        """The log has told that the file can't be used."""
        self._writer: sqlite3.Connection | None = None
        self._written: tuple[int, int] | None = None
        """The file that `_writer` has open."""
        try:
            self._open_reader(PATIENCE)
        except sqlite3.Error as error:
            self._tell(error)
        self._thread = ThreadPool(1)  # of its own: transactions queue there, and nothing else behind them

    def drain(self, seconds: float) -> None:
        """Let no write wait for other processes for longer than `seconds` from now on."""
        self._until = time.monotonic() + seconds

    def close(self) -> None:
        """Let go of the file; a write under way is undone, and those that wait are refused."""
        self._closed = True
        if self._reader is not None:
            self._reader.close()
        writer = self._writer
        if writer is None:
            return
        if writer.in_transaction:  # only then: closing would find itself interrupted, and not tidy up
            writer.interrupt()
        with gevent.Timeout(ENDING, False):
            self._thread.apply(writer.close)
            self._thread.kill()

    # -- looking up

    def get_subscribers(self, user: str) -> list[str]:
        """Everyone who follows the user."""
        return [one for text in self._steps(_FOLLOWERS, user) for one in text.split(",")]

    def joined_subscribers(self, user: str) -> str:
        """As `get_subscribers`, joined by commas: that is how SQLite gives them, and no id has one."""
        return ",".join(text for text in self._steps(_FOLLOWERS, user))

    def following(self, user: str) -> list[str]:
        """Everyone whom the user follows."""
        return [one for text in self._steps(_FOLLOWING, user) for one in text.split(",")]

    def count_subscribers(self, user: str) -> int:
        """How many follow the user."""
        return self._count(_FOLLOWERS, user)

    def count_following(self, user: str) -> int:
        """How many the user follows."""
        return self._count(_FOLLOWING, user)

    def page_of_subscribers(self, user: str, after: str | None, limit: int) -> list[str]:
        """At most `limit`, in order: those behind the id `after`, which need not be one of them. Numbers come
        before text."""
        return self._page(_FOLLOWERS, user, after, limit)

    def page_of_following(self, user: str, after: str | None, limit: int) -> list[str]:
        """As `page_of_subscribers`."""
        return self._page(_FOLLOWING, user, after, limit)

    def _steps(self, direction: _Direction, user: str) -> Iterator[str]:
        """The ids, joined, step by step."""
        given = key(user)
        text, last, count = self._row(direction.joined[0], given, STEP)
        while count:
            yield text
            if count < STEP:
                return
            give_way()
            text, last, count = self._row(direction.joined[1], given, last, STEP)

    def _row(self, statement: str, *values: Key) -> tuple[str, Key, int]:
        row: tuple[str, Key, int] = self._look_up(statement, *values)[0]
        return row

    def _count(self, direction: _Direction, user: str) -> int:
        return sum(count for (count,) in self._look_up(direction.count, key(user)))  # none, or one

    def _page(self, direction: _Direction, user: str, after: str | None, limit: int) -> list[str]:
        beyond = () if after is None else (key(after),)
        return [str(one) for (one,) in self._look_up(direction.page[len(beyond)], key(user), *beyond, limit)]

    def _look_up(self, statement: str, *values: Key) -> list[Any]:
        try:
            return self._reading().execute(statement, values).fetchall()
        except sqlite3.Error as error:
            self._refuse(error)

    def _reading(self) -> sqlite3.Connection:
        """Return the connection for look-ups, of the file that is there by now. Raises Refusal ``database-away``, sqlite3.Error."""
        now = time.monotonic()
        if now >= self._looks:
            self._looks = now + LOOK
            if self._reader is not None and identity(self._folder) != self._read:
                self._close_reader()
            if self._reader is None:
                self._open_reader(0.0)
                if self._told:
                    self._told = False
                    log.info("%s can be used again", path_in(self._folder))
        if self._reader is None:
            raise _away()
        return self._reader

    def _open_reader(self, patience: float) -> None:
        self._read = identity(self._folder)
        self._reader = open_reader(self._folder, patience)

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # -- writing

    def add_subscriptions(self, pairs: Sequence[Pair]) -> int:
        """Have each first follow its second; how many are new. They are safe on the disk then. More than
        `TRANSACTION` go in several transactions, so a refusal may come after some of them."""
        return self._change(_ADD, pairs)

    def remove_subscriptions(self, pairs: Sequence[Pair]) -> int:
        """Have each first follow its second no more; how many there were. As `add_subscriptions`."""
        return self._change(_REMOVE, pairs)

    def _change(self, statement: str, pairs: Sequence[Pair]) -> int:
        changed = 0
        for start in range(0, len(pairs), TRANSACTION):
            rows = self._rows(pairs[start : start + TRANSACTION])
            changed += self._in_turn(statement, rows)
        return changed

    @staticmethod
    def _rows(pairs: Sequence[Pair]) -> str:
        """What the statements take: a JSON list of [followee, follower]."""
        parts = []
        for start in range(0, len(pairs), SLICE):
            if start:
                give_way()
            rows = [(key(followee), key(follower)) for follower, followee in pairs[start : start + SLICE]]
            parts.append(msgspec.json.encode(rows)[1:-1])
        return (b"[" + b",".join(parts) + b"]").decode()

    def _in_turn(self, statement: str, rows: str) -> int:
        """Do a transaction once the writes before it are done. Raises Refusal ``database-busy`` after `PATIENCE`; at once if too many wait,
        or if the file is locked and another write is trying already."""
        now = time.monotonic()
        if self._waiting >= self._room or (self._waiting and self._held and now - self._found_locked < LOOK):
            raise _busy()
        self._waiting += 1
        try:
            if not self._turn.acquire(timeout=PATIENCE):
                raise _busy()
            try:
                return self._try(statement, rows, now + PATIENCE)
            finally:
                self._turn.release()
        finally:
            self._waiting -= 1

    def _try(self, statement: str, rows: str, deadline: float) -> int:
        """Do a transaction, and try again while the file is locked by others, until `deadline`."""
        while not self._closed and (self._locked_since is None or time.monotonic() < min(deadline, self._until)):
            changed = self._in_thread(lambda: self._transact(statement, rows))
            locked = isinstance(changed, sqlite3.Error) and _locked(changed)
            self._note(locked)
            if isinstance(changed, int):
                return changed
            if not locked:
                self._refuse(changed)
        raise _busy()

    def _note(self, locked: bool) -> None:
        """Remember since when the file has been locked, and say in the log when that is `HELD`, and when it is over."""
        now = time.monotonic()
        if not locked:
            self._locked_since = None
            if self._held:
                self._held = False
                log.info("%s can be written to again", path_in(self._folder))
            return
        self._found_locked = now
        if self._locked_since is None:
            self._locked_since = now
        elif not self._held and now - self._locked_since >= HELD:
            self._held = True
            log.warning(
                "another process has had %s locked for %g s; writes are refused (database-busy) until its transaction ends",
                path_in(self._folder),
                HELD,
            )

    def _in_thread(self, work: Callable[[], int | sqlite3.Error]) -> int | sqlite3.Error:
        if not self._thread.size:
            try:
                self._thread.size = 1  # before there is work for it: that would be done later, although it was refused
            except RuntimeError as error:
                log.error("no thread to write subscriptions with: %s", error)
                raise _away() from error
        changed: int | sqlite3.Error = self._thread.apply(work)
        return changed

    def _transact(self, statement: str, rows: str) -> int | sqlite3.Error:
        """In the thread. An error is returned: gevent would write the traceback of one that is raised to the log,
        and a full disk is no bug."""
        try:
            there = identity(self._folder)
            if self._writer is not None and there != self._written:  # what is written to a file that is gone is lost
                self._writer.close()
                self._writer = None
            if self._writer is None:
                self._writer = open_writer(self._folder, TRY)
                self._written = there
            with transaction(self._writer):
                return self._writer.execute(statement, (rows,)).rowcount
        except sqlite3.Error as error:
            if not _passes(error):
                self._written = None  # open it anew
            return error

    # -- what goes wrong

    def _refuse(self, error: sqlite3.Error) -> NoReturn:
        """Raises Refusal, or the error itself if it is a bug."""
        if _name(error) in FULL:
            raise Refusal("disk-full", "The disk of the subscriptions takes no more; make room and send it all again.") from error
        if _passes(error):
            raise _busy() from error
        if isinstance(error, sqlite3.ProgrammingError):
            raise error
        if not _name(error).startswith("SQLITE_CORRUPT"):  # of a damaged file other pages may well be read
            self._close_reader()
        self._tell(error)
        raise _away() from error

    def _tell(self, error: sqlite3.Error) -> None:
        """Say in the log that the file can't be used, once in `TOLD` seconds."""
        now = time.monotonic()
        if now >= self._tells:
            self._tells = now + TOLD
            self._told = True
            log.error("who follows whom can't be told or changed (database-away): %s", why(path_in(self._folder), error))


def _name(error: sqlite3.Error) -> str:
    return getattr(error, "sqlite_errorname", "")


def _passes(error: sqlite3.Error) -> bool:
    """Return whether an error says nothing of the file: its disk is full, or others have it locked."""
    return _name(error) in FULL or _locked(error)


def _locked(error: sqlite3.Error) -> bool:
    return _name(error).startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))


def _busy() -> Refusal:
    return Refusal("database-busy", "Others write subscriptions for too long; send it again, a little later.")


def _away() -> Refusal:
    return Refusal("database-away", "The file of who follows whom can't be used, the log says why; send it again, a little later.")
