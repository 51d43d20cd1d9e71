"""What the kernel does for connections: the listener's options, as accepted ones have them, and probes."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from comet.kernel.sockets import SILENCE, listen, probe, silent
from tests.harness import TIMEOUT, wait_until


@pytest.fixture
def connection() -> Iterator[socket.socket]:
    """The server's side of one whose client is there."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        listener.setblocking(True)
        accepted, _ = listener.accept()
        with accepted:
            yield accepted


@pytest.mark.parametrize("unacknowledged", [0.0, 30.0, 600.0])
def test_a_lost_probe_does_not_end_a_connection(unacknowledged: float) -> None:
    """Linux (tcp_keepalive_timer): with TCP_USER_TIMEOUT set, the first unanswered probe after so long a silence is the last."""
    with listen("127.0.0.1", 0, unacknowledged=unacknowledged) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            idle, interval, patience = (
                accepted.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_USER_TIMEOUT)
            )
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert min(idle, interval) > 3600, "the kernel's own probes come in bursts"
            # the first may be asked so late, and the second one has the same time as any
            assert patience / 1000 > max(unacknowledged, (1 / 3 + 2) * SILENCE) - 0.001


def test_a_probe_is_sent_when_it_is_asked_for_and_answered(connection: socket.socket) -> None:
    wait_until(lambda: silent(connection.fileno()) > 1.2)
    before = silent(connection.fileno())
    probe(connection.fileno())
    wait_until(lambda: silent(connection.fileno()) < before)
    # and that was one: it does not go on by itself
    wait_until(lambda: silent(connection.fileno()) > 1.5)


def test_what_is_no_connection_can_not_be_probed() -> None:
    left, right = os.pipe()
    with pytest.raises(OSError, match="non-socket") as raised:
        probe(left)
    assert raised.value.errno == errno.ENOTSOCK
    with pytest.raises(OSError, match="non-socket"):
        silent(left)
    os.close(left)
    os.close(right)


DEAD = """
import errno, select, socket, subprocess, time
from comet.kernel.sockets import listen, probe
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
listener = listen("127.0.0.1", 0)
client = socket.create_connection(listener.getsockname())
listener.setblocking(True)
connection, _ = listener.accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 2500)
subprocess.run(["ip", "link", "set", "lo", "down"], check=True)  # what is sent now is lost
poll = select.poll()
poll.register(connection, select.POLLIN)
began = time.monotonic()
ended = []
while not ended and time.monotonic() - began < 50:
    probe(connection.fileno())
    ended = poll.poll(1000)
seconds = time.monotonic() - began
assert ended, "nobody noticed"
assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ETIMEDOUT
assert 2 < seconds < 20, seconds
print("ended")
"""


def test_a_peer_that_does_not_answer_is_found() -> None:
    """In a network of its own, which is then cut."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no network namespace can be made here")
    root = Path(__file__).parents[1]
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", DEAD], cwd=root, capture_output=True, text=True, timeout=3 * TIMEOUT, check=False
    )
    assert done.stdout == "ended\n", done.stderr
