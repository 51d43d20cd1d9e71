"""Who follows whom, in SQLite: what is stored how, and what must not hurt it. The calls: `tests.contracts`."""

import errno
import os
import random
import re
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import gevent
import pytest

from comet import database, subscriptions
from comet.database import Unusable, key, open_reader, open_writer, prepare
from comet.errors import Refusal
from comet.subscriptions import Subscriptions
from tests.harness import AMPLE, ROOT, TIMEOUT, wait_until

LARGEST = (1 << 63) - 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    prepare(tmp_path, whole=True)
    return tmp_path


@pytest.fixture
def known(folder: Path) -> Iterator[Subscriptions]:
    opened = Subscriptions(folder)
    yield opened
    opened.close()


def rows(folder: Path) -> list[tuple[database.Key, database.Key]]:
    """The whole table: followee, follower."""
    reader = open_reader(folder)
    found = reader.execute("SELECT followee, follower FROM follows").fetchall()
    reader.close()
    return found


def assert_counted(folder: Path) -> None:
    """The counts are those of the rows, and of nobody else."""
    truth: dict[database.Key, list[int]] = defaultdict(lambda: [0, 0])
    for followee, follower in rows(folder):
        truth[followee][0] += 1
        truth[follower][1] += 1
    with closing(open_reader(folder)) as reader:
        counts = reader.execute("SELECT user, followers, following FROM counts").fetchall()
    assert {user: [followers, following] for user, followers, following in counts} == truth


def refused(work: object) -> str:
    """The slug with which a call is refused."""
    with pytest.raises(Refusal) as refusal:
        work()  # type: ignore[operator]
    return refusal.value.slug


# -- ids


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("7", 7),
        ("0", 0),
        ("-7", -7),
        ("07", "07"),
        ("-0", "-0"),
        ("+7", "+7"),
        ("7.0", "7.0"),
        ("1e3", "1e3"),
        ("1_0", "1_0"),
        (" 7", " 7"),
        ("\u0667", "\u0667"),
        ("", ""),
        ("rj", "rj"),
        (str(LARGEST), LARGEST),
        (str(LARGEST + 1), str(LARGEST + 1)),
        (str(-LARGEST - 1), -LARGEST - 1),
        (str(-LARGEST - 2), str(-LARGEST - 2)),
        ("9" * 100, "9" * 100),
    ],
)
def test_only_a_number_as_it_is_written_is_stored_as_one(text: str, stored: database.Key, known: Subscriptions, folder: Path) -> None:
    assert key(text) == stored
    assert type(key(text)) is type(stored)
    assert str(key(text)) == text
    assert known.add_subscriptions([(text, "x"), ("y", text)]) == 2
    assert set(rows(folder)) == {("x", stored), (stored, "y")}
    assert known.get_subscribers(text) == ["y"]
    assert known.following(text) == ["x"]


# -- readers and writers


def test_a_write_is_seen_at_once_by_whoever_else_has_the_file_open(known: Subscriptions, folder: Path) -> None:
    other = Subscriptions(folder)
    for number in range(50):
        known.add_subscriptions([(str(number), "rj")])
        assert len(other.get_subscribers("rj")) == number + 1
        other.remove_subscriptions([(str(number), "x"), (str(number), "rj")] if number % 2 else [])
        known.add_subscriptions([(str(number), "rj")])
    other.close()


def test_no_transaction_has_more_rows_than_it_may(known: Subscriptions, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    transact = Subscriptions._transact

    def counted(self: Subscriptions, statement: str, text: str) -> int | sqlite3.Error:
        sizes.append(text.count("],") + 1)
        return transact(self, statement, text)

    monkeypatch.setattr(Subscriptions, "_transact", counted)
    assert known.add_subscriptions([(str(number), "star") for number in range(120_000)]) == 120_000
    assert sizes == [50_000, 50_000, 20_000]


def test_the_loop_goes_on_while_rows_are_written(known: Subscriptions) -> None:
    """Not how long it takes is tested here, on a busy machine, but that others have their turns."""
    turns = 0
    over = False

    def count() -> None:
        nonlocal turns
        while not over:
            turns += 1
            gevent.sleep(0.001)

    counter = gevent.spawn(count)
    numbers = random.Random(1)
    began = time.monotonic()
    known.add_subscriptions([(str(numbers.randrange(10**6)), str(numbers.randrange(10**6))) for _ in range(50_000)])
    seconds = time.monotonic() - began
    over = True
    counter.join()
    assert turns > min(40, seconds * 100), (turns, seconds)


def test_many_greenlets_write_one_after_the_other(known: Subscriptions) -> None:
    writers = [gevent.spawn(known.add_subscriptions, [(str(number), "rj")]) for number in range(100)]
    gevent.joinall(writers, raise_error=True)
    assert sum(writer.value for writer in writers) == 100 == known.count_subscribers("rj")


@pytest.fixture
def other(folder: Path) -> Iterator[sqlite3.Connection]:
    """Another program, as a shell of SQLite, that has begun a transaction and does not end it."""
    with closing(open_writer(folder)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


def follow(known: Subscriptions, count: int) -> "list[gevent.Greenlet[..., str]]":
    """Start so many writes at the same moment; each ends with "" or the slug with which it was refused."""

    def write(number: int) -> str:
        try:
            known.add_subscriptions([(str(number), "rj")])
        except Refusal as refusal:
            return refusal.slug
        return ""

    return [gevent.spawn(write, number) for number in range(count)]


def test_no_write_waits_longer_than_it_may_however_many_wait_for_another_program(
    known: Subscriptions, other: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "PATIENCE", 0.5)
    began = time.monotonic()
    writes = follow(known, 100)
    assert [write.get() for write in writes] == ["database-busy"] * 100
    assert time.monotonic() - began < AMPLE, "one after the other they would wait for 50 s"
    assert known.get_subscribers("rj") == []  # who reads does not wait
    other.execute("ROLLBACK")
    assert known.add_subscriptions([("1", "rj")]) == 1


def test_of_a_file_that_is_known_to_be_locked_one_write_tries_on_and_others_are_refused_at_once(
    known: Subscriptions, other: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(subscriptions, "HELD", 0.0)
    (first,) = follow(known, 1)
    wait_until(lambda: "another process has had" in caplog.text)
    began = time.monotonic()
    assert [write.get() for write in follow(known, 100)] == ["database-busy"] * 100
    assert time.monotonic() - began < AMPLE < database.PATIENCE
    assert not first.ready()
    assert known.get_subscribers("rj") == []
    other.execute("ROLLBACK")
    assert first.get() == ""
    assert [write.get() for write in follow(known, 100)] == [""] * 100
    assert [one.message.partition("follows.db ")[2][:10] for one in caplog.records] == ["locked for", "can be wri"]


def test_that_a_file_was_locked_some_time_ago_refuses_nobody(
    known: Subscriptions, other: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriptions, "PATIENCE", 0.5)
    monkeypatch.setattr(subscriptions, "HELD", 0.0)
    assert [write.get() for write in follow(known, 1)] == ["database-busy"]
    assert known._held
    other.execute("ROLLBACK")
    monkeypatch.undo()
    monkeypatch.setattr(subscriptions, "LOOK", 0.0)
    assert [write.get() for write in follow(known, 100)] == [""] * 100


def test_as_many_writes_wait_as_there_is_room_for(folder: Path, other: sqlite3.Connection) -> None:
    """A quarter of the connections."""
    known = Subscriptions(folder, 40)
    writes = follow(known, 100)
    wait_until(lambda: sum(write.ready() for write in writes) == 90)
    assert {write.get() for write in writes if write.ready()} == {"database-busy"}
    other.execute("ROLLBACK")
    assert sum(write.get() == "" for write in writes) == 10 == known.count_subscribers("rj")
    known.close()


@pytest.mark.parametrize("stop", [lambda known: known.drain(0.0), Subscriptions.close], ids=["drain", "close"])
def test_who_stops_does_not_wait_for_another_program(
    folder: Path, other: sqlite3.Connection, stop: Callable[[Subscriptions], None]
) -> None:
    known = Subscriptions(folder)
    writes = follow(known, 20)
    wait_until(lambda: known._locked_since)
    began = time.monotonic()
    stop(known)
    assert [write.get() for write in writes] == ["database-busy"] * 20
    assert time.monotonic() - began < AMPLE < database.PATIENCE


def test_who_starts_or_reloads_does_not_wait_for_another_program(folder: Path, other: sqlite3.Connection) -> None:
    began = time.monotonic()
    prepare(folder, whole=True)
    assert time.monotonic() - began < AMPLE < database.PATIENCE


def test_a_full_disk_is_said_and_nothing_else_stops(known: Subscriptions) -> None:
    assert known.add_subscriptions([("1", "rj")]) == 1
    assert known._writer is not None
    ((pages,),) = known._writer.execute("PRAGMA page_count")
    known._writer.execute(f"PRAGMA max_page_count = {pages}")
    many = [(str(number), "rj") for number in range(20_000)]
    assert refused(lambda: known.add_subscriptions(many)) == "disk-full"
    assert not known._writer.in_transaction
    assert known.get_subscribers("rj") == ["1"]
    assert known.remove_subscriptions([("1", "rj")]) == 1
    known._writer.execute("PRAGMA max_page_count = 1000000")
    assert known.add_subscriptions(many) == 20_000


# -- the file


def test_closing_leaves_one_file_and_its_rows(folder: Path) -> None:
    known = Subscriptions(folder)
    known.add_subscriptions([("alice", "rj")])
    known.close()
    assert [path.name for path in folder.iterdir()] == [database.NAME]
    prepare(folder, whole=True)
    assert rows(folder) == [("rj", "alice")]


def test_rows_are_on_the_disk_when_a_call_returns(folder: Path) -> None:
    """FULL is 2: the log is synced at each commit. NORMAL (1) would sync it only when it is written back."""
    writer = open_writer(folder)
    assert writer.execute("PRAGMA synchronous").fetchall() == [(2,)]
    assert writer.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
    writer.close()


def test_a_reader_can_not_write(folder: Path) -> None:
    reader = open_reader(folder)
    with pytest.raises(sqlite3.OperationalError):
        reader.execute("INSERT INTO follows VALUES (1, 2)")
    reader.close()


def test_many_processes_may_open_it_at_the_same_moment(tmp_path: Path) -> None:
    """As workers do: the first puts the log in order, and the others wait for it."""
    code = (
        "import os, pathlib, sys\n"
        "from comet.database import open_reader, prepare\n"
        "for turn in range(50):\n"
        "    folder = pathlib.Path(sys.argv[1]) / str(turn)\n"
        "    prepare(folder, whole=False)\n"
        "    children = []\n"
        "    for _ in range(6):\n"
        "        child = os.fork()\n"
        "        if not child:\n"
        "            open_reader(folder)\n"
        "            os._exit(0)\n"
        "        children.append(child)\n"
        "    for child in children:\n"
        "        assert not os.waitpid(child, 0)[1]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=3 * TIMEOUT, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_folder_is_made(tmp_path: Path) -> None:
    prepare(tmp_path / "a" / "b", whole=False)
    assert rows(tmp_path / "a" / "b") == []


def modes(folder: Path) -> dict[str, int]:
    """Of the folder (".") and of what is in it."""
    return {".": stat.S_IMODE(folder.stat().st_mode)} | {one.name: stat.S_IMODE(one.stat().st_mode) for one in folder.iterdir()}


PRIVATE = {".": 0o700, database.NAME: 0o600, f"{database.NAME}-wal": 0o600, f"{database.NAME}-shm": 0o600}


def test_nobody_but_its_owner_may_read_what_is_made(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = tmp_path / "a" / "data"
        prepare(folder, whole=True)
        reader, writer = open_reader(folder), open_writer(folder)
        writer.execute("INSERT INTO follows VALUES (1, 2)")
        assert modes(folder) == PRIVATE
        assert modes(folder.parent)["."] == 0o777, "which may hold something else"
        writer.close()
        reader.close()
    finally:
        os.umask(before)


def test_nor_what_was_there_while_others_have_it_open(folder: Path) -> None:
    """As an earlier comet made it."""
    reader = open_reader(folder)
    for name, mode in modes(folder).items():
        (folder / name).chmod(mode | 0o055)
    prepare(folder, whole=False)
    assert modes(folder) == PRIVATE
    reader.close()


@pytest.mark.parametrize("mode", [0o1777, 0o755])
def test_a_folder_with_something_else_in_it_is_left_as_it_is(folder: Path, mode: int) -> None:
    """As /tmp is, or a home: the file is closed to others, they are not."""
    (folder / "diary").touch(0o644)
    (folder / "diary").chmod(0o644)
    database.path_in(folder).chmod(0o644)
    folder.chmod(mode)
    prepare(folder, whole=False)
    assert modes(folder) == {".": mode, "diary": 0o644, database.NAME: 0o600}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_belongs_to_another_user_is_left_as_it_is(folder: Path) -> None:
    for path in (folder, database.path_in(folder)):
        path.chmod(0o755)
        os.chown(path, 65534, 65534)
    prepare(folder, whole=False)
    assert modes(folder) == {".": 0o755, database.NAME: 0o755}


def test_another_programs_file_keeps_its_mode(folder: Path) -> None:
    foreign(folder)
    database.path_in(folder).chmod(0o644)
    folder.chmod(0o755)
    with pytest.raises(Unusable):
        prepare(folder, whole=False)
    assert modes(folder) == {".": 0o755, database.NAME: 0o644}


def test_a_mode_that_can_not_be_changed_is_told_and_no_reason_to_stop(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    database.path_in(folder).chmod(0o644)
    monkeypatch.setattr(Path, "chmod", refuse)
    prepare(folder, whole=True)
    assert f"{database.path_in(folder)} may be read by others, and that can't be changed: Operation not permitted" in caplog.text


def corrupted(folder: Path) -> None:
    """Overwrite a page in the middle."""
    writer = open_writer(folder)
    writer.executemany("INSERT INTO follows VALUES (?, ?)", ((number % 1000, number) for number in range(20_000)))
    writer.close()
    with database.path_in(folder).open("r+b") as file:
        file.seek(4096 * 30)
        file.write(b"\xff" * 4096)


def truncated(folder: Path) -> None:
    """Cut off the second half."""
    corrupted(folder)
    os.truncate(database.path_in(folder), 4096 * 40)


def foreign(folder: Path) -> None:
    """Somebody else's database."""
    database.path_in(folder).unlink()
    other = sqlite3.connect(database.path_in(folder))
    other.execute("CREATE TABLE bookmarks (url)")
    other.close()


def newer(folder: Path) -> None:
    """What a later comet leaves."""
    writer = open_writer(folder)
    writer.execute(f"PRAGMA user_version = {database.VERSION + 1}")
    writer.close()


def no_database(folder: Path) -> None:
    """A text."""
    database.path_in(folder).write_bytes(b"Dear diary,\n" * 1000)


def a_folder(folder: Path) -> None:
    """Not even a file."""
    database.path_in(folder).unlink()
    database.path_in(folder).mkdir()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (corrupted, "is damaged"),
        (truncated, "is damaged"),
        (no_database, "is damaged"),
        (foreign, "another program"),
        (newer, "newer comet"),
        (a_folder, "can't be used"),
    ],
)
def test_a_file_that_can_not_be_used_is_refused_and_left_alone(folder: Path, spoil: object, said: str) -> None:
    spoil(folder)  # type: ignore[operator]
    path = database.path_in(folder)
    before = path.read_bytes() if path.is_file() else b""
    for _ in range(2):
        with pytest.raises(Unusable, match=said) as why:
            prepare(folder, whole=True)
        assert str(path) in str(why.value)
        assert str(why.value).endswith(".")
    assert (path.read_bytes() if path.is_file() else b"") == before
    started = subprocess.run(
        [sys.executable, "app.py", "--port", "0", "--data", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3 * TIMEOUT,
        check=False,
    )
    assert started.returncode == 1
    assert said in started.stderr
    assert "Traceback" not in started.stderr
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_workers_refuse_to_start_with_it_too(folder: Path) -> None:
    newer(folder)
    started = subprocess.run(
        [sys.executable, "app.py", "--port", "0", "--workers", "2", "--data", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=3 * TIMEOUT, check=False,
    )  # fmt: skip
    assert started.returncode == 1
    assert started.stderr.count("newer comet") == 1
    assert "Traceback" not in started.stderr


def test_a_killed_writer_loses_nothing_that_was_acknowledged(folder: Path) -> None:
    """It says each row that it was told is safe; then it is killed in the middle, ten times."""
    code = (
        "import sys, itertools, pathlib\n"
        "from comet.subscriptions import Subscriptions\n"
        "known = Subscriptions(pathlib.Path(sys.argv[1]))\n"
        "for number in itertools.count(int(sys.argv[2])):\n"
        "    known.add_subscriptions([(str(number * 100 + one), 'rj') for one in range(100)])\n"
        "    print(number, flush=True)\n"
    )
    acknowledged: list[int] = []
    for turn in range(10):
        writer = subprocess.Popen([sys.executable, "-c", code, str(folder), str(turn * 10**6)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        acknowledged.append(int(writer.stdout.readline()))
        threading.Timer(0.02 * turn, writer.send_signal, [signal.SIGKILL]).start()
        acknowledged += map(int, writer.stdout)
        assert writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        prepare(folder, whole=True)
    stored = {int(str(follower)) for _, follower in rows(folder)}
    assert len(acknowledged) > 10
    assert stored.issuperset(number * 100 + one for number in acknowledged for one in range(100))
    assert not len(stored) % 100, "a transaction is whole or not there"
    assert_counted(folder)


# -- how many there are


def test_a_page_of_a_star_and_the_count_cost_no_more_than_another_users(known: Subscriptions, folder: Path) -> None:
    """In steps of SQLite's machine, which does not depend on who else is busy here."""
    known.add_subscriptions([(str(number), "star") for number in range(30_000)] + [("fan", str(number)) for number in range(30_000)])
    known.add_subscriptions([(str(number), "small") for number in range(30)] + [("little", str(number)) for number in range(30)])
    steps = [0]

    def step() -> None:
        steps[0] += 1

    def cost(work: Callable[[], object]) -> int:
        steps[0] = 0
        work()
        return steps[0]

    assert known._reader is not None
    known._reader.set_progress_handler(step, 1)
    few = cost(lambda: known.page_of_subscribers("small", None, 10)) + cost(lambda: known.count_subscribers("small"))
    assert 0 < cost(lambda: known.page_of_subscribers("star", "20000", 10)) + cost(lambda: known.count_subscribers("star")) < 2 * few
    assert 0 < cost(lambda: known.page_of_following("fan", "20000", 10)) + cost(lambda: known.count_following("fan")) < 2 * few
    assert_counted(folder)


def test_a_file_of_an_older_comet_is_counted_and_one_that_writes_to_it_since_keeps_the_counts(folder: Path) -> None:
    numbers = random.Random(5)
    with closing(open_writer(folder)) as older:
        for name in ("TRIGGER followed", "TRIGGER unfollowed", "TABLE counts"):
            older.execute(f"DROP {name}")
        insert = "INSERT OR IGNORE INTO follows (followee, follower) VALUES (?, ?)"
        older.executemany(insert, [(numbers.randrange(300), numbers.choice(("x", 7, 8, 9))) for _ in range(5000)])
        prepare(folder, whole=False)
        assert_counted(folder)
        prepare(folder, whole=True)
        assert_counted(folder)
        older.executemany(insert, [(numbers.randrange(900), numbers.choice(("x", "y", 9))) for _ in range(5000)])
        older.execute("DELETE FROM follows WHERE followee < 50")
    assert_counted(folder)
    opened = Subscriptions(folder)
    assert opened.count_following("y") == len(opened.following("y")) > 500
    assert opened.add_subscriptions([("y", "900"), ("y", "900"), ("z", "900")]) == 2, "what the triggers change is not counted"
    opened.close()
    assert_counted(folder)


# -- python -m comet load-friends


def load(folder: Path, text: str | bytes) -> "subprocess.CompletedProcess[str]":
    """Load an edge list."""
    source = folder / "edges"
    source.write_bytes(text if isinstance(text, bytes) else text.encode())
    return subprocess.run(
        [sys.executable, "-m", "comet", "load-friends", str(source), "--data", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=3 * TIMEOUT, check=False,
    )  # fmt: skip


def test_an_edge_list_is_loaded_once_however_often(folder: Path) -> None:
    for new in (3, 0):
        loaded = load(folder, "1 0\nalice rj\n1 0\n7 07\n")
        assert loaded.returncode == 0, loaded.stderr
        assert loaded.stdout.startswith(f"4 lines, {new} new subscriptions, ")
        assert rows(folder) == [(0, 1), ("07", 7), ("rj", "alice")]
    assert load(folder, "2 0\n1 0").returncode == 0
    assert_counted(folder)
    assert rows(folder) == [(0, 1), (0, 2), ("07", 7), ("rj", "alice")]
    prepare(folder, whole=True)


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    """Also one that is no UTF-8, and what a URI has a meaning for."""
    folder = tmp_path / os.fsdecode(b"\xff?mode=ro#%41")
    folder.mkdir()
    assert load(folder, "alice rj").returncode == 0
    assert rows(folder) == [("rj", "alice")]


def test_a_large_list_is_loaded_into_an_empty_and_into_a_full_database(tmp_path: Path) -> None:
    numbers = random.Random(2)
    pairs = {(a, b) for a, b in ((numbers.randrange(5000), numbers.randrange(5000)) for _ in range(120_000)) if a != b}
    text = "".join(f"{a} {b}\n" for a, b in pairs)
    for name, before in (("empty", []), ("full", [("x", "y")])):
        folder = tmp_path / name
        prepare(folder, whole=False)
        known = Subscriptions(folder)
        known.add_subscriptions(before)
        assert load(folder, text).returncode == 0
        assert {(a, b) for b, a in rows(folder) if isinstance(a, int)} == pairs
        some = str(next(iter(pairs))[0])
        assert known.following(some) == [str(b) for b in sorted(b for a, b in pairs if str(a) == some)]
        known.close()
        prepare(folder, whole=True)
        assert_counted(folder)


@pytest.mark.parametrize(
    ("text", "line"),
    [("1 2\n3 4 5\n", 2), ("1 2\n\n", 2), ("x\n", 1), ("1 2\n5 5\n", 2), ("1 a,b\n", 1), ("1 2\na " + "b" * 200, 2), (b"\xff 1\n", 1)],
)
def test_a_bad_line_is_named_and_nothing_is_loaded(folder: Path, text: str | bytes, line: int) -> None:
    loaded = load(folder, text)
    assert loaded.returncode == 1
    assert f"line {line}: " in loaded.stderr
    assert "Nothing was loaded" in loaded.stderr
    assert rows(folder) == []


def test_a_load_without_its_file_or_into_a_foreign_database_says_so(folder: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "comet", "load-friends", "/no/such/file", "--data", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=3 * TIMEOUT, check=False,
    )  # fmt: skip
    assert (ended.returncode, "No such file" in ended.stderr) == (1, True)
    foreign(folder)
    loaded = load(folder, "1 2\n")
    assert (loaded.returncode, "another program" in " ".join(loaded.stderr.split())) == (1, True)


@pytest.mark.parametrize("filled", [False, True])
def test_a_load_that_was_killed_ends_in_the_same_state_when_it_is_run_again(folder: Path, filled: bool) -> None:
    if filled:
        load(folder, "x y\n")
    before = rows(folder)
    source = folder / "edges"
    source.write_text("".join(f"{number * 7919 % 100_003} {number * 104_729 % 100_019 + 200_000}\n" for number in range(300_000)))
    command = [sys.executable, "-m", "comet", "load-friends", str(source), "--data", str(folder)]
    kills = 0
    for delay in (0.2, 0.4, 0.6, 0.8, 1.0, 1.2):  # whatever it is at
        loading = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            loading.wait(delay)
        except subprocess.TimeoutExpired:
            kills += 1
        loading.kill()
        loading.wait()
        prepare(folder, whole=True)
        assert set(before) <= set(rows(folder))
    assert kills
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=3 * TIMEOUT, check=False).returncode == 0
    assert len(rows(folder)) == 300_000 + len(before)
    assert_counted(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["edges", database.NAME]


# -- a file that is damaged or gone


def damage(folder: Path) -> None:
    """Overwrite all but the first page, as a broken disk does."""
    with open_writer(folder) as writer:
        writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    writer.close()
    damage_pages(folder)


def damage_pages(folder: Path) -> None:
    """As `damage`, whatever is in the log."""
    path = database.path_in(folder)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))


def remove(folder: Path) -> None:
    for path in folder.glob(database.NAME + "*"):
        path.unlink()


def empty(folder: Path) -> None:
    """Another file in its place, that has nothing."""
    remove(folder)
    database.path_in(folder).touch()


CALLS: list[Callable[[Subscriptions], object]] = [
    lambda known: known.get_subscribers("user1"),
    lambda known: known.joined_subscribers("user1"),
    lambda known: known.following("f1"),
    lambda known: known.count_following("f1"),
    lambda known: known.page_of_subscribers("user1", None, 10),
    lambda known: known.page_of_following("f1", "a", 10),
    lambda known: known.add_subscriptions([("new", "user1")]),
    lambda known: known.remove_subscriptions([("f1", "user1")]),
]


@pytest.mark.parametrize("harm", [damage, remove, empty])
@pytest.mark.parametrize("already", [False, True], ids=["before", "while it is open"])
def test_a_file_that_can_not_be_used_refuses_each_call_until_there_is_a_copy_in_its_place(
    folder: Path, tmp_path: Path, harm: Callable[[Path], None], already: bool, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(subscriptions, "LOOK", 0.0)
    first = Subscriptions(folder)
    first.add_subscriptions([(f"f{number}", f"user{number % 5}") for number in range(20_000)])
    first.close()
    copy = database.path_in(folder).read_bytes()
    known = Subscriptions(folder) if already else None
    harm(folder)
    known = known or Subscriptions(folder)
    for call in CALLS:
        assert refused(lambda call=call: call(known)) == "database-away"
    assert sum("database-away" in one.message for one in caplog.records) == 1, "once, however often it is asked"
    remove(folder)
    database.path_in(folder).write_bytes(copy)
    for call in CALLS:
        call(known)
    assert len(known.get_subscribers("user1")) == 4000
    known.close()


@pytest.mark.parametrize("harm", [damage_pages, lambda folder: database.path_in(folder).unlink()], ids=["damaged", "gone"])
def test_who_does_what_the_log_says_has_the_copy_and_nothing_of_the_old_log(
    folder: Path, tmp_path: Path, harm: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The files that it names are removed in that order. Two workers have the old ones open, and one starts meanwhile."""
    monkeypatch.setattr(subscriptions, "LOOK", 0.0)
    known = [Subscriptions(folder), Subscriptions(folder)]
    known[0].add_subscriptions([(f"f{number}", f"user{number % 5}") for number in range(20_000)])
    copy = tmp_path / "copy"
    with closing(open_writer(folder)) as writer, closing(sqlite3.connect(copy)) as backup:
        writer.backup(backup)
        writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for number in range(2):
        known[number].add_subscriptions([(f"g{number}x{one}", f"user{one % 5}") for one in range(5_000)])
    harm(folder)
    for one in known:
        assert refused(lambda one=one: one.following("f1")) == "database-away"
    (said,) = [one.message for one in caplog.records if "database-away" in one.message][:1]
    for name in re.findall(rf"{re.escape(database.NAME)}(?:-\w+)?", said):
        (folder / name).unlink(missing_ok=True)
    copy.rename(database.path_in(folder))
    known.append(Subscriptions(folder))
    for one in known:
        assert len(one.get_subscribers("user1")) == one.count_subscribers("user1") == 4000
    for number, one in enumerate(known):
        assert one.add_subscriptions([(f"h{number}", "user1")]) == 1
    assert {one.count_subscribers("user1") for one in known} == {4003}
    for one in known:
        one.close()
    prepare(folder, whole=True)
    assert_counted(folder)
    assert len(rows(folder)) == 20_003


def test_an_empty_file_in_the_place_of_one_that_is_gone_has_nothing_of_its_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reload makes one while workers have the old one open."""
    monkeypatch.setattr(subscriptions, "LOOK", 0.0)
    known = Subscriptions(folder)
    known.add_subscriptions([(f"f{number}", f"user{number % 5}") for number in range(20_000)])
    database.path_in(folder).unlink()
    code = "import pathlib, sys\nfrom comet.database import prepare\nprepare(pathlib.Path(sys.argv[1]), whole=True)\n"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=ROOT, timeout=3 * TIMEOUT, check=True)
    assert known.get_subscribers("user1") == []
    assert known.add_subscriptions([("a", "user1")]) == 1
    known.close()
    assert rows(folder) == [("user1", "a")]


def test_of_a_damaged_file_what_can_be_read_is_answered(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = Subscriptions(folder)
    known.add_subscriptions([(f"f{number}", f"user{number % 500}") for number in range(20_000)])
    path = database.path_in(folder)
    with open_writer(folder) as writer:
        writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    writer.close()
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * (64 << 10))  # no kind of page: random bytes may look like an empty one
    known.close()
    known = Subscriptions(folder)
    answered = away = 0
    for number in range(500):
        try:
            answered += len(known.get_subscribers(f"user{number}")) == 40
        except Refusal as refusal:
            assert refusal.slug == "database-away"
            away += 1
    assert answered + away == 500 and answered and away, (answered, away)
    assert sum("is damaged" in one.message for one in caplog.records) == 1
    known.close()


def test_a_file_is_looked_at_again_once_a_second_and_what_is_back_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    moved = folder / "moved"
    database.path_in(folder).rename(moved)
    known = Subscriptions(folder)
    assert refused(lambda: known.following("a")) == "database-away"
    moved.rename(database.path_in(folder))
    monkeypatch.setattr(subscriptions, "LOOK", 1e9)
    began = known._looks
    assert refused(lambda: known.following("a")) == "database-away"
    assert known._looks == began
    known._looks = 0.0
    assert known.following("a") == []
    assert [one.message for one in caplog.records][-1].endswith("can be used again")
    known.close()


def test_a_write_that_gets_no_thread_is_refused(known: Subscriptions, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("gevent.threadpool.start_new_thread", no_thread)
    assert refused(lambda: known.add_subscriptions([("a", "b")])) == "database-away"
    monkeypatch.undo()
    assert known.add_subscriptions([("a", "b")]) == 1
