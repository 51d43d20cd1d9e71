"""The board: a reader sees whole documents, whatever happens to the writer."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from comet.board import HALF, Board
from tests.harness import ROOT, TIMEOUT

WRITER = """
import os, sys
from comet.board import Board
board = Board.open(int(sys.argv[1]))
print("writing", flush=True)
number = 0
while True:
    number += 1
    board.write(1, {"number": number, "text": str(number % 10) * (number * 37 % 9000), "again": number})
"""


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board.create(4)
    yield made
    made.close()


@pytest.fixture
def writer(board: Board) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(board.descriptor)], cwd=ROOT, pass_fds=[board.descriptor], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def whole(board: Board) -> int:
    """The number of the document in slot 1, of which every part must be of one write."""
    said = board.look(1)
    assert said is not None
    number = said.document["number"]
    assert said.document["again"] == number
    assert said.document["text"] == str(number % 10) * (number * 37 % 9000)
    assert isinstance(number, int)
    return number


def test_what_was_said_is_read(board: Board) -> None:
    assert board.read() == []
    assert board.look(3) is None
    board.write(3, {"a": [1, "ü", None]})
    (said,) = board.read()
    assert (said.slot, said.pid, said.document) == (3, os.getpid(), {"a": [1, "ü", None]})
    assert 0 <= said.age < 5
    assert abs(time.monotonic() - said.beat) < 5
    board.write(3, {})
    assert [said.document for said in board.read()] == [{}]


def test_a_slot_can_be_cleared_and_used_again(board: Board) -> None:
    for text in ("a", "b", "c"):
        board.write(0, {"text": text})
        board.write(1, {"other": text})
        board.clear(0)
        assert [said.document for said in board.read()] == [{"other": text}]


def test_one_that_is_opened_elsewhere_is_the_same(board: Board) -> None:
    descriptor = os.dup(board.descriptor)
    other = Board.open(descriptor)
    assert other.slots == board.slots == 4
    other.write(2, {"from": "elsewhere"})
    assert [said.document for said in board.read()] == [{"from": "elsewhere"}]
    other.close()


def test_what_does_not_fit_is_refused_and_leaves_what_was_there(board: Board) -> None:
    largest = {"a": "x" * (HALF - 24 - len('{"a":""}'))}
    board.write(0, largest)
    with pytest.raises(ValueError, match="room for"):
        board.write(0, {"a": largest["a"] + "x"})
    with pytest.raises(IndexError):
        board.write(4, {})
    with pytest.raises(IndexError):
        board.look(-1)
    assert [said.document for said in board.read()] == [largest]


def test_a_reader_never_sees_half_a_document(board: Board, writer: subprocess.Popen[bytes]) -> None:
    first = last = whole(board) if board.look(1) else 0
    began = time.monotonic()
    while time.monotonic() - began < 1.0 or last <= first + 100:
        assert time.monotonic() - began < TIMEOUT, (first, last)
        if board.look(1):
            number = whole(board)
            assert number >= last
            last = number


def test_a_writer_that_is_stopped_or_killed_anywhere_keeps_nobody_waiting(board: Board, writer: subprocess.Popen[bytes]) -> None:
    while board.look(1) is None:
        pass
    for _ in range(200):
        writer.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, writer.pid, os.WSTOPPED)
        stopped = whole(board)
        assert whole(board) == stopped
        writer.send_signal(signal.SIGCONT)
        while whole(board) == stopped:
            pass
    writer.kill()
    writer.wait()
    assert whole(board) > 200
