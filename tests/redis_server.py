"""Real Redis servers for tests: on free ports, in folders of their own, ended with the test.

Needs the program ``redis-server`` (`.ci/run` installs it); `needs_redis` skips where there is none.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hiredis
import pytest

from tests.harness import free_port

PROGRAM = shutil.which("redis-server")

needs_redis = pytest.mark.skipif(PROGRAM is None, reason="there is no redis-server here: apt-get install redis-server")

PATIENCE = 60.0


class RedisServer:
    """`redis-server` with these `options`, as its command line has them. What it writes stays in `folder`."""

    def __init__(self, folder: Path, *options: str, port: int | None = None, host: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        self.folder = folder
        self.host = host
        self.port = free_port() if port is None else port
        self.url = f"redis://{host}:{self.port}"
        self._options = options
        self._prefix = prefix
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Begin (again), and wait until it answers."""
        assert PROGRAM is not None
        persistent = [] if "--save" in self._options else ["--save", ""]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*self._prefix, PROGRAM, "--port", str(self.port), "--bind", self.host, "--dir", str(self.folder),
                 "--enable-debug-command", "yes", "--protected-mode", "no", *persistent, *self._options],
                stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + PATIENCE
        while True:
            assert self.process.poll() is None, (self.folder / "redis.log").read_text()
            if not self._prefix and self._answers():
                return
            if self._prefix and "Ready to accept connections" in (self.folder / "redis.log").read_text():
                return
            assert time.monotonic() < deadline, (self.folder / "redis.log").read_text()
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            self.ask("PING")
        except (OSError, hiredis.ReplyError) as error:
            return str(error).startswith(("NOAUTH", "NOPERM"))
        return True

    def ask(self, *command: Any) -> Any:
        """What it answers to one command; an error is raised."""
        with socket.create_connection((self.host, self.port), PATIENCE) as sock:
            sock.sendall(hiredis.pack_command(command))
            reader = hiredis.Reader(notEnoughData=...)
            while (reply := reader.gets()) is ...:
                data = sock.recv(1 << 16)
                if not data:
                    raise ConnectionResetError("it closed the connection")
                reader.feed(data)
        if isinstance(reply, hiredis.ReplyError):
            raise reply
        return reply

    def kill(self) -> None:
        """At once, as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def signal(self, number: int) -> None:
        """SIGSTOP and the like."""
        assert self.process is not None
        os.kill(self.process.pid, number)

    def stop(self) -> None:
        """In order; it may have ended before."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def pass_time(self, seconds: float) -> None:
        """Whatever expires does so earlier: as if so much time had passed."""
        script = (
            "for _, key in ipairs(redis.call('KEYS', '*')) do local left = redis.call('PTTL', key) "
            "if left >= 0 then redis.call('PEXPIRE', key, math.max(0, left - ARGV[1])) end end"
        )
        self.ask("EVAL", script, 0, round(1000 * seconds))


@contextmanager
def redis_server(*options: str) -> Iterator[RedisServer]:
    """One for a test."""
    with TemporaryDirectory() as folder:
        server = RedisServer(Path(folder), *options)
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def redis_cluster(masters: int = 3, replicas: int = 1, *options: str) -> Iterator[list[RedisServer]]:
    """A cluster, whole and with its replicas linked."""
    with ExitStack() as stack:
        servers = []
        for _ in range(masters * (1 + replicas)):
            folder = Path(stack.enter_context(TemporaryDirectory()))
            server = RedisServer(folder, "--cluster-enabled", "yes", "--cluster-node-timeout", "1000", *options)
            stack.callback(server.stop)
            servers.append(server)
        create_cluster(servers, replicas)
        yield servers


def create_cluster(servers: Sequence[RedisServer], replicas: int, prefix: Sequence[str] = ()) -> None:
    """Make one of these."""
    addresses = [f"{one.host}:{one.port}" for one in servers]
    done = subprocess.run(
        [*prefix, "redis-cli", "--cluster", "create", *addresses, "--cluster-replicas", str(replicas), "--cluster-yes"],
        capture_output=True, text=True, timeout=3 * PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    deadline = time.monotonic() + 3 * PATIENCE

    def whole(server: RedisServer) -> bool:
        info = server.ask("CLUSTER", "INFO").decode()
        nodes = server.ask("CLUSTER", "NODES").decode()
        role = server.ask("ROLE")
        return (
            "cluster_state:ok" in info
            and nodes.count(" connected") == len(servers)
            and nodes.count("slave ") == len(servers) * replicas // (1 + replicas)
            and (role[0] == b"master" or role[3] == b"connected")
        )

    while not all(map(whole, servers)):
        assert time.monotonic() < deadline, [one.ask("CLUSTER", "NODES") for one in servers]
        time.sleep(0.05)
