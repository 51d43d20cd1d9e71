"""Placeholder of the router process: beats on the board, until it is told to end. To be replaced."""

import argparse
import os
import select
import signal

from comet.board import Board


def main() -> None:
    """Beat each second; end at SIGTERM or when the lifeline ends."""
    parser = argparse.ArgumentParser()
    for name in ("--listener-fd", "--lifeline-fd", "--board-fd", "--slot"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("settings", nargs="*")
    given = parser.parse_args()
    wakeup, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    board = Board.open(given.board_fd)
    while True:
        board.write(given.slot, {"role": "router", "pid": os.getpid()})
        if select.select([given.lifeline_fd, wakeup], [], [], 1.0)[0]:
            return


if __name__ == "__main__":
    main()
