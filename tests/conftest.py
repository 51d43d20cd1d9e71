"""Fixtures: a server a test, or one for a whole module; both once with clients that sleep and once with a greenlet each."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Server

Start = Callable[..., Server]

HIBERNATE = [os.environ["COMET_HIBERNATE"]] if "COMET_HIBERNATE" in os.environ else ["on", "off"]
"""``COMET_HIBERNATE=off pytest`` runs the behaviour tests in that way alone, in half the time."""

only_asleep = pytest.mark.parametrize("hibernate", ["on"], indirect=True)
"""For a test that means something only where clients sleep."""


@pytest.fixture(scope="module", params=HIBERNATE, ids=lambda way: f"hibernate-{way}")
def hibernate(request: pytest.FixtureRequest) -> str:
    """``--hibernate`` of the servers that `start` and `server` start, unless a flag says otherwise."""
    way: str = request.param
    return way


@pytest.fixture
def start(tmp_path: Path, hibernate: str) -> Iterator[Start]:
    """Start servers with flags of their own; afterwards each must be healthy and stop cleanly."""
    servers: list[Server] = []

    def begin(*flags: str, kind: type[Server] = Server, **environment: str) -> Server:
        server = kind(tmp_path / f"server-{len(servers)}.log", *flags, **{"COMET_HIBERNATE": hibernate, **environment})
        servers.append(server)
        return server

    yield begin
    for server in servers:
        assert server.stop() == 0, server.log.read_text()
        assert "Traceback" not in server.log.read_text(), server.log.read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, hibernate: str) -> Iterator[Server]:
    """One server with default settings for the tests of a module; each uses channels of its own."""
    with Server(tmp_path_factory.mktemp("server") / "server.log", "--max-per-address", "15000", COMET_HIBERNATE=hibernate) as running:
        yield running
        running.assert_healthy()
    assert running.process.returncode == 0
