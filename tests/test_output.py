"""Standard error never waits for its reader: what is not taken is kept, then dropped, and nothing is lost that can be written."""

import os
import pty
import socket
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from comet.kernel.output import KEPT, Output
from tests.harness import AMPLE, ROOT

LINE = b"x" * 99 + b"\n"


def pipe() -> tuple[int, int]:
    return os.pipe()


def sockets() -> tuple[int, int]:
    one, other = socket.socketpair()
    return one.detach(), other.detach()


def terminal() -> tuple[int, int]:
    reader, writer = pty.openpty()
    tty.setraw(writer)
    return reader, writer


Make = Callable[[int], Output]


@pytest.fixture
def make() -> Iterator[Make]:
    """Make outputs that are closed afterwards."""
    with ExitStack() as outputs:
        yield lambda descriptor: outputs.enter_context(closing(Output(descriptor)))


@pytest.fixture(params=[pipe, sockets, terminal], ids=["a pipe", "a socket", "a terminal"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """Where it is read, and where it is written."""
    reader, writer = request.param()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def take(reader: int) -> bytes:
    """All that there is to read now."""
    os.set_blocking(reader, False)
    taken = b""
    try:
        while data := os.read(reader, 1 << 20):
            taken += data
    except BlockingIOError:
        pass
    finally:
        os.set_blocking(reader, True)
    return taken


def test_a_stuck_reader_stops_nobody_and_what_is_kept_is_bounded(ends: tuple[int, int], make: Make) -> None:
    reader, writer = ends
    output = make(writer)
    written = 0
    while not output.dropped:
        output.write(b"%099d\n" % written)
        written += 1
    for _ in range(100):
        output.write(LINE)
    assert output.dropped == 101
    assert KEPT - len(LINE) < output.waiting <= KEPT
    got = b""
    while output.waiting:
        got += take(reader)
        output.flush()
    got += take(reader)
    assert [int(line) for line in got.splitlines()] == list(range(written - 1)), "in order, each whole, none lost but those counted"
    output.write(LINE)
    assert take(reader) == LINE
    assert output.dropped == 101


def test_a_line_that_is_longer_than_the_pipe_arrives_whole(ends: tuple[int, int], make: Make) -> None:
    reader, writer = ends
    output = make(writer)
    long = b"0123456789abcdef" * (KEPT // 16 - 100)
    output.write(long)
    output.write(LINE)
    got = b""
    while output.waiting:
        got += take(reader)
        output.flush()
    got += take(reader)
    assert got == long[: len(got) - len(LINE)] + LINE and len(got) == len(long) + len(LINE)


def test_others_who_have_the_same_descriptor_still_wait(ends: tuple[int, int], make: Make) -> None:
    _, writer = ends
    make(writer)
    assert os.get_blocking(writer)


def test_the_end_waits_for_a_reader_that_is_there_and_not_for_one_that_is_not(ends: tuple[int, int], make: Make) -> None:
    reader, writer = ends
    output = make(writer)
    for _ in range(4000):
        output.write(LINE)
    before = output.dropped
    assert output.waiting
    began = time.monotonic()
    output.drain(0.2)
    assert 0.1 < time.monotonic() - began < AMPLE
    assert output.dropped > before and not output.waiting
    take(reader)
    for _ in range(3000):
        output.write(LINE)
    before = output.dropped
    assert output.waiting
    ended = threading.Event()

    def read_slowly() -> None:
        while not ended.wait(0.05):
            take(reader)

    slow = threading.Thread(target=read_slowly)
    slow.start()
    output.drain(AMPLE)
    ended.set()
    slow.join()
    assert output.dropped == before and not output.waiting


def test_what_can_not_be_written_is_counted(make: Make) -> None:
    reader, writer = os.pipe()
    output = make(writer)
    os.close(reader)
    output.write(LINE)
    assert (output.dropped, output.waiting) == (1, 0)
    os.close(writer)
    with open("/dev/full", "wb") as full:
        output = make(full.fileno())
        output.write(LINE)
        assert (output.dropped, output.waiting) == (1, 0)
    output = make(10_000_000)  # nobody has it
    output.write(LINE)
    assert output.dropped == 1


def test_what_is_written_after_the_end_is_counted_and_meets_no_other_descriptor(ends: tuple[int, int], make: Make) -> None:
    reader, writer = ends
    before = set(os.listdir("/proc/self/fd"))
    output = make(writer)
    output.write(LINE)
    output.close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert take(reader) == LINE
    output.write(LINE)
    output.flush()
    output.drain(AMPLE)
    assert (output.dropped, output.waiting, take(reader)) == (1, 0, b"")


def test_a_forked_process_leaves_to_its_parent_what_waits() -> None:
    code = """
import logging, os, sys, threading
import comet.log as logs
logs.set_up("plain", pid=False)
for number in range(1000):
    logging.getLogger("x").info("%0100d", number)
if os.fork() == 0:
    logging.getLogger("x").info("child")
    sys.exit()
os.wait()
print(flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        heard: list[bytes] = []
        reader = threading.Timer(0.5, lambda: heard.append(process.stderr.read()))  # type: ignore[union-attr]
        reader.start()
        reader.join()
    lines = heard[0].splitlines()
    assert len([line for line in lines if b"child" in line]) == 1
    assert [int(line.split()[-1]) for line in lines if b"child" not in line] == list(range(1000))


STANDARD = """
import os, sys
from comet.kernel.output import open_standard
open_standard()
print("out", flush=True)
print("error", file=sys.stderr, flush=True)
names = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
with open(sys.argv[1], "w") as said:
    print([name == os.devnull for name in names], [os.get_inheritable(number) for number in range(3)], sys.stdin.read(), file=said)
"""


@pytest.mark.parametrize("closed", [(), (0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_a_standard_descriptor_that_is_closed_is_opened_and_the_others_stay(closed: tuple[int, ...], tmp_path: Path) -> None:
    said = tmp_path / "said"
    command = ["sh", "-c", 'exec "$@" ' + " ".join(f"{number}>&-" for number in closed), "sh", sys.executable, "-c", STANDARD, str(said)]
    done = subprocess.run(command, cwd=ROOT, input="in", capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("" if 1 in closed else "out\n", "" if 2 in closed else "error\n")
    read = "" if 0 in closed else "in"
    assert said.read_text() == f"{[number in closed for number in range(3)]} [True, True, True] {read}\n"
