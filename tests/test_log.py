"""A line an event, for people, for machines and for the journal."""

import json
import logging
import os
import subprocess
import sys

import pytest

from comet.log import Json, Origin, Plain, Roll, failed_outside, fields
from tests.harness import ROOT

ORIGIN = Origin("id-1", "192.0.2.1", "GET /poll/a")


def record(text: str, level: int = logging.INFO, failed: bool = False, **extra: object) -> logging.LogRecord:
    error = None
    if failed:
        try:
            raise ValueError("two\nlines")
        except ValueError:
            error = sys.exc_info()
    made = logging.LogRecord("comet.x", level, __file__, 1, text, (), error)
    vars(made).update(extra)
    return made


def test_json_is_an_object_a_line_whatever_is_said() -> None:
    line = Json(journal=False).format(record('a "b"\nc', logging.ERROR, failed=True, **ORIGIN.fields(reason="lost")))
    assert "\n" not in line
    said = json.loads(line)
    assert (said["level"], said["logger"], said["message"]) == ("error", "comet.x", 'a "b"\nc')
    assert (said["request"], said["address"], said["asked"], said["reason"]) == ("id-1", "192.0.2.1", "GET /poll/a", "lost")
    assert said["exception"].startswith("Traceback") and said["exception"].endswith("ValueError: two\nlines")
    assert said["time"].endswith("Z") and said["process"] == os.getpid()


def test_plain_has_the_fields_behind_its_text_and_no_control_characters_of_a_client() -> None:
    line = Plain(journal=False, pid=True).format(record("failed", **fields(asked="GET /\x1b[31m\n")))
    assert line.endswith(f"[{os.getpid()}] INFO comet.x: failed asked=GET /?[31m?")


def test_in_the_journal_each_line_has_its_priority_and_no_time() -> None:
    lines = Plain(journal=True, pid=True).format(record("failed", logging.ERROR, failed=True)).split("\n")
    assert lines[0] == "<3>ERROR comet.x: failed"
    assert len(lines) > 3 and all(line.startswith("<3>") for line in lines)
    line = Json(journal=True).format(record("failed", logging.WARNING))
    assert line.startswith("<4>{")


def test_the_journal_is_known_by_its_stream() -> None:
    code = "import os, sys, comet.log as l; s = os.fstat(2); e = {'JOURNAL_STREAM': f'{s.st_dev}:{s.st_ino}'}; print(l.to_journal(e), l.to_journal({}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"


def test_what_ends_the_process_is_an_object_too() -> None:
    code = "import comet.log as l, warnings; l.set_up('json', pid=False); warnings.warn('careful'); 1 / 0"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    warned, ended = (json.loads(line) for line in done.stderr.splitlines())
    assert (warned["level"], ended["level"], done.returncode) == ("warning", "critical", 1)
    assert "ZeroDivisionError" in ended["exception"]


def test_the_roll_forgets_who_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "comet.clients")
    roll, subscriber = Roll(), object()
    roll.came(subscriber, ORIGIN)
    roll.left(subscriber, "hang-up")
    roll.left(subscriber, "hang-up")
    assert [one.message for one in caplog.records] == ["ended: hang-up"]
    assert vars(roll) == {"_origins": {}}


def test_a_shortage_that_ends_the_process_is_a_sentence() -> None:
    code = "import comet.log as l; l.set_up('plain', pid=False); raise OSError(24, 'Too many open files')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("CRITICAL comet: the process ends: [Errno 24] Too many open files\n") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("form", ["plain", "json"])
def test_a_shortage_is_a_sentence_wherever_it_is_met(form: str) -> None:
    code = f"""
import logging, comet.log as l
l.set_up({form!r}, pid=False)
for error in (MemoryError(), OSError(24, "Too many open files"), ValueError("a bug")):
    try:
        raise error
    except Exception:
        logging.getLogger("x").exception("number %d %s failed", 7, "%s")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.count("number 7 %s failed") == 3
    assert "number 7 %s failed: MemoryError" in done.stderr and "number 7 %s failed: [Errno 24] Too many open files" in done.stderr
    assert done.stderr.count("Traceback") == 1 and "ValueError: a bug" in done.stderr


def test_a_shortage_outside_a_request_is_a_sentence_and_a_bug_has_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    for error in (OSError(24, "Too many open files"), MemoryError(), ValueError("a bug")):
        failed_outside(None, type(error), error, None)
    assert [one.message for one in caplog.records] == [
        "the event loop failed: [Errno 24] Too many open files", "the event loop failed: ", "the event loop failed",
    ]  # fmt: skip
    assert [bool(one.exc_info) for one in caplog.records] == [False, False, True]
