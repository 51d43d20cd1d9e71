"""The file of who follows whom: SQLite, made, judged and opened. No greenlets, no threads of its own.

`comet.subscriptions` looks up and writes for a service, `comet.loading` fills the file from the command
line; what both must agree on stands here. A connection must not cross a fork: SQLite's locks belong to
the process that took them. So `prepare` closes what it opens, and each process opens its own.

How it is kept
- One row a subscription, in a table without row ids, so that the row stands once, in the order of its
  key: (followee, follower). The followers of a user are neighbours in the file. The index is the same
  pair the other way round; SQLite would append the rest of the key to an index of the follower alone,
  so naming both costs nothing.
- How many follow a user, and how many it follows, stands beside: to count the rows of a star would take milliseconds each time that
  somebody asks. Triggers keep the counts, in the transaction of whoever writes, an older comet too; a file of an older comet gets them
  when it is prepared.
- The columns have no type: an id that is a number is kept as an integer (`key`), 3 bytes for a million
  users where text would take 6. Numbers sort before text.
- WAL: readers and the one writer do not wait for each other. ``synchronous=FULL``: a commit returns when
  its part of the log is on the disk, so it survives a power cut. (NORMAL would leave the last commits to
  the kernel: safe when the process is killed, not when the machine is.)
"""

import logging
import os
import re
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

NAME: Final = "follows.db"
"""The file, in its folder."""

VERSION: Final = 1
"""Of the schema (``user_version``)."""

APPLICATION: Final = int.from_bytes(b"comt", "big")
"""Says whose file it is (``application_id``): another program's is not written to."""

TRANSACTION: Final = 50_000
"""Rows of a transaction at most: others who write wait for it."""

PATIENCE: Final = 30.0
"""Seconds that a write waits for others who write: a transaction of random rows in a large file takes two."""

_LOG_KEPT: Final = 64 << 20
"""Bytes of the log that stay when it has been written back; a large transaction may have made it larger."""

_READER_CACHE: Final = 256
"""KiB of pages that each worker's reader keeps: the inner ones of the tree. Others the kernel has, once for all workers;
SQLite's own default of 2 MB would be 120 MB with sixty."""

_SCHEMA: Final = (
    "CREATE TABLE follows (followee NOT NULL, follower NOT NULL, PRIMARY KEY (followee, follower)) WITHOUT ROWID",
    "CREATE INDEX following ON follows (follower, followee)",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)
_COUNTED: Final = (
    "CREATE TABLE counts (user NOT NULL PRIMARY KEY, followers NOT NULL, following NOT NULL) WITHOUT ROWID",
    "INSERT INTO counts SELECT followee, count(*), 0 FROM follows GROUP BY followee",
    """
    INSERT INTO counts SELECT follower, 0, count(*) FROM follows WHERE true GROUP BY follower
    ON CONFLICT (user) DO UPDATE SET following = excluded.following
    """,
    """
    CREATE TRIGGER followed AFTER INSERT ON follows BEGIN
      INSERT INTO counts VALUES (new.followee, 1, 0) ON CONFLICT (user) DO UPDATE SET followers = followers + 1;
      INSERT INTO counts VALUES (new.follower, 0, 1) ON CONFLICT (user) DO UPDATE SET following = following + 1;
    END
    """,
    """
    CREATE TRIGGER unfollowed AFTER DELETE ON follows BEGIN
      UPDATE counts SET followers = followers - 1 WHERE user = old.followee;
      UPDATE counts SET following = following - 1 WHERE user = old.follower;
      DELETE FROM counts WHERE user IN (old.followee, old.follower) AND followers = 0 AND following = 0;
    END
    """,
)
"""The counts, of whatever rows there are, and what keeps them."""

BEFORE_LOAD: Final = ("DROP INDEX following", "DROP TABLE counts", "DROP TRIGGER followed", "DROP TRIGGER unfollowed")
"""Statements that a bulk load begins with: they drop what would have each of millions of rows touch a page more."""

AFTER_LOAD: Final = (_SCHEMA[1], *_COUNTED)
"""Makes it again, of all rows at once."""

_BESIDE: Final = (f"{NAME}-wal", f"{NAME}-shm")
"""The log of the file and the index of the log, which SQLite makes beside it and gives the mode of the file."""

_FILES: Final = (NAME, *_BESIDE)

_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,18}", re.ASCII)

log = logging.getLogger("comet.database")

Key = int | str
"""An id as it is stored."""


class Unusable(Exception):
    """The file can't be used; one sentence says why, and what to do. Nothing in it was changed."""


def key(name: str) -> Key:
    """How an id is stored: "7" as a number, "07" and what 64 bits can't hold as text. `str` undoes it."""
    if _NUMBER.fullmatch(name):
        number = int(name)
        if -(1 << 63) <= number < 1 << 63:
            return number
    return name


def path_in(folder: Path) -> Path:
    """The file in a service's data folder."""
    return folder / NAME


def prepare(folder: Path, *, whole: bool) -> None:
    """Make folder and file where they are missing, and see that they can be used: `whole` reads all of it,
    about two seconds for 15 million rows. Nobody but their owner may read them from then on. Raises Unusable."""
    path = path_in(folder)
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
    except FileExistsError as error:
        raise Unusable(f"{folder} is not a folder; name another with --data.") from error
    except OSError as error:
        raise Unusable(f"The data folder {folder} can't be made: {error.strerror}. {_ELSEWHERE}") from error
    try:
        _create(path)
        with closing(_connect(path)) as database:
            _judge(database, path)
            _make(database)
            _make_private(folder)
            if whole:
                _check(database, path)
    except (OSError, sqlite3.Error) as error:
        raise Unusable(_unwritable(folder, path) or why(path, error)) from error


def identity(folder: Path) -> tuple[int, int] | None:
    """Return which file there is, as the kernel knows it; None if there is none."""
    try:
        status = path_in(folder).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def open_reader(folder: Path, patience: float = PATIENCE) -> sqlite3.Connection:
    """For look-ups; none waits for a lock. The opening does, for `patience` seconds: the first of all processes puts the log in order
    and keeps the others out meanwhile. The file must have been prepared. Raises sqlite3.Error."""
    database = _connect(path_in(folder), patience, make=False)
    try:
        _set_up_reader(database)
    except BaseException:
        database.close()
        raise
    return database


def _set_up_reader(database: sqlite3.Connection) -> None:
    database.execute("PRAGMA query_only = ON")
    database.execute(f"PRAGMA cache_size = -{_READER_CACHE}")
    database.execute("SELECT 1 FROM follows LIMIT 1").fetchall()  # opens the log's files now, and not in a request
    database.execute("PRAGMA busy_timeout = 0")


def open_writer(folder: Path, patience: float = PATIENCE) -> sqlite3.Connection:
    """For writes, in whatever thread; it waits `patience` seconds for others who write. The file must have been
    prepared. Raises sqlite3.Error."""
    database = _connect(path_in(folder), patience, make=False)
    database.execute("PRAGMA synchronous = FULL")
    database.execute(f"PRAGMA journal_size_limit = {_LOG_KEPT}")
    database.execute("PRAGMA cache_size = -16384")  # KiB
    return database


@contextmanager
def transaction(database: sqlite3.Connection) -> Iterator[None]:
    """All of the block or nothing. It takes the writer's lock at once: one that reads first and is overtaken
    before it writes could not go on. Safe on the disk when the block has ended."""
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:  # a full disk ends it by itself
            database.execute("ROLLBACK")
        raise


def _connect(path: Path, patience: float = PATIENCE, *, make: bool = True) -> sqlite3.Connection:
    """Unless it is to `make` the file, one that is missing is an error: an empty one in its place would hide that it is gone."""
    name = f"file:{quote(os.fsencode(path.absolute()))}?mode={'rwc' if make else 'rw'}"
    return sqlite3.connect(name, uri=True, timeout=patience, isolation_level=None, check_same_thread=False)


def _create(path: Path) -> None:
    """Make an empty file if there is none: SQLite would let everybody read it. A log that was left there is that of a file that is gone."""
    left = [beside for name in _BESIDE if (beside := path.with_name(name)).exists()]
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        return  # SQLite says what is there
    for beside in left:
        beside.unlink(missing_ok=True)


def _make_private(folder: Path) -> None:
    """Take the rights of all but the owner from the files, and from the folder if nothing else is in it: another one, such as /tmp or a
    home, is not comet's alone. What belongs to another user stays as it is."""
    for name in _FILES:
        _keep_to_owner(folder / name, 0o600)
    if folder.stat().st_uid == os.geteuid() and all(one.name in _FILES for one in folder.iterdir()):
        _keep_to_owner(folder, 0o700)


def _keep_to_owner(path: Path, mode: int) -> None:
    try:
        found = path.stat()
        if found.st_mode & 0o077 and found.st_uid == os.geteuid():
            path.chmod(mode)
    except FileNotFoundError:
        pass  # there is no log, or another process has just put it away
    except OSError as error:  # a file system without modes has other ways
        log.warning("%s may be read by others, and that can't be changed: %s", path, error.strerror)


def _judge(database: sqlite3.Connection, path: Path) -> None:
    """Raises Unusable for a file that is not ours to write to."""
    ((owner,),) = database.execute("PRAGMA application_id")
    ((version,),) = database.execute("PRAGMA user_version")
    ((tables,),) = database.execute("SELECT count(*) FROM sqlite_schema")
    if (owner, version, tables) != (0, 0, 0) and owner != APPLICATION:
        raise Unusable(f"{path} is a database of another program; name another folder with --data.")
    if version > VERSION:
        raise Unusable(
            f"{path} was written by a newer comet (schema {version}, this one knows up to {VERSION}); "
            "run that, or name another folder with --data."
        )


def _make(database: sqlite3.Connection) -> None:
    """The schema, where there is none. Kept in step by its caller: a service prepares its file in one process
    before others open it. If it is all there, take no lock: another program may hold that, and a reload must not wait for it."""
    ((mode,),) = database.execute("PRAGMA journal_mode = WAL")
    if mode != "wal":
        raise sqlite3.OperationalError(f"the file system can't have a shared log (journal mode {mode})")
    if _has_schema(database) and _has_counts(database):
        return
    database.execute("PRAGMA synchronous = FULL")
    with transaction(database):
        if not _has_schema(database):
            for statement in _SCHEMA:
                database.execute(statement)
        if not _has_counts(database):
            began = time.monotonic()
            for statement in _COUNTED:
                database.execute(statement)
            seconds = time.monotonic() - began
            if seconds > 1:
                log.info("the subscriptions of an older comet were counted in %.1f s", seconds)


def _has_schema(database: sqlite3.Connection) -> bool:
    ((version,),) = database.execute("PRAGMA user_version")
    return bool(version)


def _has_counts(database: sqlite3.Connection) -> bool:
    return database.execute("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'counts'").fetchone() is not None


def _check(database: sqlite3.Connection, path: Path) -> None:
    began = time.monotonic()
    ((said,), *_) = database.execute("PRAGMA quick_check(1)")
    if said != "ok":
        raise Unusable(_damaged(path, said))
    seconds = time.monotonic() - began
    if seconds > 1:
        log.info("%s was checked in %.1f s", path, seconds)


_ELSEWHERE: Final = (
    "Make it writable for the user of the service, or name another with --data (under systemd only the service's StateDirectory is)."
)


def _unwritable(folder: Path, path: Path) -> str | None:
    """A sentence where the folder, or the file in it, can't be written to; None where it can. SQLite says of the one "unable to
    open database file" and of the other nothing before the first write."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        if path.is_file():
            with path.open("ab"):
                pass
    except OSError as error:
        return f"The data folder {folder} can't be written to: {error.strerror}. {_ELSEWHERE}"
    return None


_LOG: Final = " and ".join(_BESIDE)


def _damaged(path: Path, said: object) -> str:
    """SQLite would read a log that stays there into the copy. The file goes first: while it is there a new log is made for it."""
    return f"{path} is damaged ({said}); remove it, then {_LOG}, then move a copy in its place, or name another folder with --data."


def why(path: Path, error: OSError | sqlite3.Error) -> str:
    """Return a sentence: why the file can't be used, and what to do."""
    if not path.exists():
        return f"{path} is gone; remove {_LOG}, then move a copy in its place, or reload the service, which makes an empty one."
    if getattr(error, "sqlite_errorname", "").startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return _damaged(path, error)
    return f"{path} can't be used: {error}. Free it or its disk, or name another folder with --data."
