"""Fixtures: a server a test, or one for a whole module."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Server

Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start servers with flags of their own; afterwards each must be healthy and stop cleanly."""
    servers: list[Server] = []

    def begin(*flags: str, **environment: str) -> Server:
        server = Server(tmp_path / f"server-{len(servers)}.log", *flags, **environment)
        servers.append(server)
        return server

    yield begin
    for server in servers:
        assert server.stop() == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text(), server.log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with default settings for the tests of a module; each uses channels of its own."""
    with Server(tmp_path_factory.mktemp("server") / "server.log", "--max-per-address", "15000") as running:
        yield running
        running.assert_healthy()
    assert running.process.returncode == 0
