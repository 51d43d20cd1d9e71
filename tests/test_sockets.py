"""The listener's options, as accepted connections have them."""

import socket

import pytest

from comet.kernel.sockets import listen


@pytest.mark.parametrize("unacknowledged", [0.0, 30.0, 600.0])
def test_a_lost_keepalive_probe_does_not_end_a_connection(unacknowledged: float) -> None:
    """Linux (tcp_keepalive_timer): with TCP_USER_TIMEOUT set, the first unanswered probe after so long a silence is the last."""
    with listen("127.0.0.1", 0, unacknowledged=unacknowledged) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            idle, interval, probes, patience = (
                accepted.getsockopt(socket.IPPROTO_TCP, option)
                for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
            )
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert probes >= 3
            assert patience / 1000 >= idle + interval * probes
            assert patience / 1000 >= unacknowledged
