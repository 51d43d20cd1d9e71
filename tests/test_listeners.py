"""Where a service listens: what was passed on, or an address of its own, and a sentence where it can't."""

import contextlib
import logging
import socket
from collections.abc import Iterator

import pytest

from comet.kernel import sockets
from comet.listeners import listen
from comet.settings import Settings

HERE = "127.0.0.1"


@pytest.fixture
def open_sockets() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def bound(stack: contextlib.ExitStack, count: int) -> list[socket.socket]:
    """Sockets as a service manager passes them on."""
    return [stack.enter_context(sock) for sock in sockets.listen_together(HERE, 0, count)]


def test_one_process_alone_has_one_and_workers_have_one_each_on_one_port(open_sockets: contextlib.ExitStack) -> None:
    for workers in (0, 1, 3):
        made = listen(Settings(host=HERE, port=0), [], workers)
        assert made is not None
        for listener in made:
            open_sockets.enter_context(listener)
        assert len(made) == max(1, workers)
        assert len({listener.getsockname() for listener in made}) == 1


@pytest.mark.parametrize(("passed", "workers"), [(1, 0), (1, 1), (1, 4), (2, 4), (4, 4)])
def test_what_was_passed_on_is_tuned_and_nothing_else_is_bound(open_sockets: contextlib.ExitStack, passed: int, workers: int) -> None:
    those = bound(open_sockets, passed)
    for listener in those:
        listener.setblocking(True)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)
    assert listen(Settings(host="192.0.2.1"), those, workers) == those
    for listener in those:
        assert not listener.getblocking()
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(("workers", "sentence"), [(0, "and one process serves one"), (1, "to 1 workers"), (2, "to 2 workers")])
def test_more_than_are_served_are_refused(
    open_sockets: contextlib.ExitStack, caplog: pytest.LogCaptureFixture, workers: int, sentence: str
) -> None:
    with caplog.at_level(logging.ERROR):
        assert listen(Settings(), bound(open_sockets, 3), workers) is None
    assert "3 sockets were passed on" in caplog.text
    assert sentence in caplog.text
    assert "set --workers to 3 or more" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_an_address_that_is_taken_is_told_with_what_to_do(
    open_sockets: contextlib.ExitStack, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    port = bound(open_sockets, 1)[0].getsockname()[1]
    with caplog.at_level(logging.ERROR):
        assert listen(Settings(host=HERE, port=port), [], workers) is None
    assert f"can't listen on {HERE} port {port}" in caplog.text
    assert "--port" in caplog.text
