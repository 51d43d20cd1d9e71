"""The loop without greenlets: what it waits for, and in which order it does what is due."""

import signal
import subprocess
import sys

from tests.harness import ROOT, TIMEOUT

SIGNALLED = """
import os, signal
from comet.loop import Loop
reading, writing = os.pipe()
loop = Loop([signal.SIGTERM, signal.SIGHUP], [reading])
for number in (signal.SIGHUP, signal.SIGTERM):
    os.kill(os.getpid(), number)
came = b""
while len(came) < 2:
    came += loop.wait(60)
print(*sorted(came), flush=True)
os.write(writing, b"x")
print(len(loop.wait(60)), flush=True)
"""


def in_a_process_of_its_own(code: str) -> list[str]:
    """What it prints: a loop is one a process, and has its signals."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    return done.stdout.split()


def test_signals_are_kept_and_a_pipe_ends_the_wait() -> None:
    assert in_a_process_of_its_own(SIGNALLED) == [str(int(signal.SIGHUP)), str(int(signal.SIGTERM)), "0"]


def test_what_is_due_is_done_the_earliest_first_and_the_rest_later() -> None:
    code = """
from comet.loop import Loop
loop = Loop([], [])
done = []
loop.later(0.02, lambda: done.append("second"))
loop.later(0.01, lambda: done.append("first"))
loop.later(0.02, lambda: done.append("third"))
loop.later(60, lambda: done.append("never"))
loop.later(0, lambda: loop.later(0, lambda: done.append("at once")))
while len(done) < 4:
    assert loop.wait(60) == b""
    loop.run_due()
print(*done)
"""
    assert in_a_process_of_its_own(code) == ["at", "once", "first", "second", "third"]


def test_what_becomes_due_meanwhile_waits_until_signals_were_looked_at() -> None:
    code = """
import os, signal, time
from comet.loop import Loop
loop = Loop([signal.SIGTERM], [])
rounds = 0
def again():
    global rounds
    rounds += 1
    assert rounds < 100, "it never returns"
    loop.later(0, again)
    time.sleep(0.001)
again()
loop.run_due()
assert rounds == 2, rounds
os.kill(os.getpid(), signal.SIGTERM)
print(*loop.wait(60))
"""
    assert in_a_process_of_its_own(code) == [str(int(signal.SIGTERM))]


def test_nobody_waits_longer_than_asked_where_nothing_is_due() -> None:
    code = """
from comet.loop import Loop
assert Loop([], []).wait(0.05) == b""
"""
    assert in_a_process_of_its_own(code) == []
