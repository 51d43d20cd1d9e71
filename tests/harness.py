"""What behaviour tests need: a real server in a process of its own, and a client that hides nothing.

Both are made for greenlets (`gevent.socket` by name, nothing is patched here): a test may run
hundreds of clients with `gevent.spawn`. Nothing sleeps in hope: `wait_until` polls a condition and
fails loudly.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import gevent
from gevent import socket
from gevent import subprocess as green

from comet.settings import flag_of, variable_of
from tests.forked import Forked

ROOT = Path(__file__).parent.parent
TIMEOUT = 60.0
"""Seconds after which anything a test waits for has failed."""

AMPLE = 20.0
"""Seconds within which anything short is over, on a machine with other work as well. A test that tells two ends apart by their time
has the wrong one come later than this, or never."""

NOT_FORKED = {"workers", "backplane", "backplane_file"}
"""Settings of a service that is started as users start it, not forked."""

HALF_A_POST = b"POST /publish/a HTTP/1.1\r\nHost: test\r\nContent-Length: 4\r\n\r\nbo"
"""A publication on channel a of which ``dy`` is still to come."""


def _has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


HAS_IPV6 = _has_ipv6()
"""Whether this machine has IPv6 on loopback: some containers do not."""


def copy_code(folder: Path) -> Path:
    """Copy the program, to be changed, and what is compiled of it: else each start of a copy would compile all. Return `folder`."""
    unfinished = shutil.ignore_patterns("*.pyc.*")  # others may be compiling just now
    for name in ("comet", "handlers"):
        shutil.copytree(ROOT / name, folder / name, ignore=unfinished)
    shutil.copy(ROOT / "app.py", folder)
    return folder


def free_port() -> int:
    """Return a port that nobody listens on, and that the kernel gives to no client (`ip_local_port_range`). Any of many: other tests look
    for one at the same time. So is the one 10,000 above, on which a server of a Redis cluster listens too."""
    for port in random.sample(range(10_000, 20_000), 100):
        with socket.socket() as one, socket.socket() as bus:
            try:
                one.bind(("0.0.0.0", port))
                bus.bind(("0.0.0.0", port + 10_000))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def wait_until(condition: Callable[[], Any], timeout: float = TIMEOUT) -> Any:
    """The first true answer of `condition`; AssertionError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not true within {timeout} s: {condition}"
        gevent.sleep(0.005)
    return answer


class Response(NamedTuple):
    """`headers` has lower-case names; `body` is whole, or b"" where the caller reads the pieces."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class Client:
    """One connection. Reads responses strictly: a malformed one is an AssertionError."""

    def __init__(self, port: int, host: str = "127.0.0.1", source: str | None = None) -> None:
        self.sock = socket.create_connection((host, port), TIMEOUT, None if source is None else (source, 0))
        self.buffer = b""
        self._chunked = False
        self._left: int | None = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close as a client does (FIN)."""
        self.sock.close()

    def reset(self) -> None:
        """Close with RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.sock.close()

    def go(self, how: str) -> None:
        """Leave in one of three ways: ``FIN``, ``RST``, ``half-close``."""
        if how == "FIN":
            self.close()
        elif how == "RST":
            self.reset()
        else:
            self.sock.shutdown(socket.SHUT_WR)

    # -- writing

    def send(self, data: bytes) -> None:
        """Raw bytes."""
        self.sock.sendall(data)

    def ask(self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> None:
        """Send a well-formed request, and do not wait for the answer."""
        lines = [f"{method} {target} HTTP/1.1", "Host: test"]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + (body or b""))

    # -- reading

    def more(self) -> bool:
        """Read what comes next into the buffer; False at the end of the connection."""
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            return False
        self.buffer += data
        return bool(data)

    def read_until(self, mark: bytes) -> bytes:
        """Everything up to and including `mark`."""
        while mark not in self.buffer:
            assert self.more(), f"the connection ended before {mark!r}: {self.buffer[:200]!r}"
        end = self.buffer.index(mark) + len(mark)
        data, self.buffer = self.buffer[:end], self.buffer[end:]
        return data

    def read_exactly(self, count: int) -> bytes:
        """So many bytes."""
        while len(self.buffer) < count:
            assert self.more(), f"the connection ended after {len(self.buffer)} of {count} bytes"
        data, self.buffer = self.buffer[:count], self.buffer[count:]
        return data

    def read_head(self) -> Response:
        """Status and headers; then use `read_chunk` or `read_body`. Interim 1xx responses are skipped."""
        while True:
            lines = self.read_until(b"\r\n\r\n").decode("latin-1").split("\r\n")
            version, code, _ = lines[0].split(" ", 2)
            assert version == "HTTP/1.1", lines[0]
            if not 100 <= int(code) < 200:
                break
        headers: dict[str, str] = {}
        for line in lines[1:-2]:
            name, value = line.split(": ", 1)
            assert name.lower() not in headers, f"doubled header {name}"
            headers[name.lower()] = value
        self._chunked = headers.get("transfer-encoding") == "chunked"
        length = headers.get("content-length")
        assert not (self._chunked and length), headers
        self._left = int(length) if length is not None else None
        if int(code) == 204:
            self._left = 0
        return Response(int(code), headers, b"")

    def read_chunk(self) -> bytes:
        """One chunk of a chunked body; b"" is the last one."""
        assert self._chunked, "the answer is not chunked"
        size = int(self.read_until(b"\r\n"), 16)
        data = self.read_exactly(size)
        assert self.read_exactly(2) == b"\r\n"
        return data

    def chunks(self) -> Iterator[bytes]:
        """The chunks, up to a proper last one."""
        while data := self.read_chunk():
            yield data

    def read_body(self) -> bytes:
        """The whole rest of a body."""
        if self._chunked:
            return b"".join(self.chunks())
        if self._left is not None:
            return self.read_exactly(self._left)
        while self.more():
            pass
        data, self.buffer = self.buffer, b""
        return data

    def read(self) -> Response:
        """A whole response."""
        head = self.read_head()
        return head._replace(body=self.read_body())

    def request(self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Response:
        """Ask and read; the connection stays open."""
        self.ask(method, target, body, headers)
        if method == "HEAD":
            return self.read_head()
        return self.read()

    def at_end(self) -> bool:
        """Wait for the server to close; whether nothing else came."""
        while self.more():
            pass
        return not self.buffer


class Event(NamedTuple):
    """One server-sent event, or the opening block (`data` None)."""

    id: str | None
    type: str | None
    data: str | None
    retry: str | None = None


class Events(Client):
    """An EventSource that shows its blocks."""

    def __init__(self, port: int, channels: str, cursor: str | None = None, query: str = "") -> None:
        super().__init__(port)
        self.ask("GET", f"/events/{channels}{query}", headers={} if cursor is None else {"Last-Event-ID": cursor})
        head = self.read_head()
        assert head.status == 200, (head, self.read_body())
        self.text = b""
        self.opening = self.next()
        self.cursor = self.opening.id
        """What a browser would send as Last-Event-ID."""

    def next(self) -> Event:
        """The next block that is no comment alone; raises EOFError at the last chunk."""
        while True:
            while b"\n\n" not in self.text:
                data = self.read_chunk()
                if not data:
                    raise EOFError
                self.text += data
            block, self.text = self.text.split(b"\n\n", 1)
            fields: dict[str, list[str]] = {}
            for line in block.decode().split("\n"):
                name, _, value = line.partition(":")
                fields.setdefault(name, []).append(value.removeprefix(" "))
            fields.pop("", None)
            if not fields:
                continue
            event = Event(
                fields.get("id", [None])[-1],
                fields.get("event", [None])[-1],
                "\n".join(fields["data"]) if "data" in fields else None,
                fields.get("retry", [None])[-1],
            )
            if event.id is not None:
                self.cursor = event.id
            return event


class Server:
    """`python app.py` on a free port, until the block ends. `log` is its standard error, a file.

    A service of one process is forked (`tests.forked`) unless it is another `program` or elsewhere: one of several starts
    itself anew, and what `NOT_FORKED` has is loaded by app.py only when it is asked for.
    """

    program: Sequence[str] = ("app.py",)
    """What Python runs."""
    root = ROOT
    """Where."""

    def __init__(self, log: Path, *flags: str, **environment: str) -> None:
        self.log = log
        arguments, variables = ["--port", "0", *flags], {**os.environ, **environment}
        said = {flag.partition("=")[0] for flag in flags} | variables.keys()
        alone = said.isdisjoint({*map(flag_of, NOT_FORKED), *map(variable_of, NOT_FORKED)})
        self.process: Forked | green.Popen
        with log.open("wb") as errors:
            if self.program == Server.program and self.root == ROOT and alone:
                self.process = Forked(arguments, variables, errors.fileno())
            else:
                self.process = green.Popen(
                    [sys.executable, *self.program, *arguments], cwd=self.root, stdout=subprocess.PIPE, stderr=errors, env=variables
                )  # fmt: skip
        line = self.process.stdout.readline().decode()
        assert "http://" in line, f"the server did not start: {line!r} {log.read_text()}"
        self.url = line.split("http://")[1].split()[0]
        self.port = int(self.url.rsplit(":", 1)[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self, number: int = signal.SIGTERM, timeout: float = TIMEOUT) -> int:
        """End it and answer its exit status; a second call answers the same."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            status: int = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the server did not stop: {self.log.read_text()}") from None
        self.process.stdout.close()
        return status

    def client(self) -> Client:
        """A new connection."""
        return Client(self.port)

    def events(self, channels: str, cursor: str | None = None, query: str = "") -> Events:
        """A new EventSource, its opening block already read."""
        return Events(self.port, channels, cursor, query)

    def request(self, method: str, target: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Response:
        """One request on a connection of its own."""
        with self.client() as client:
            return client.request(method, target, body, headers)

    def publish(self, channel: str, data: str | bytes, type: str | None = None) -> str:
        """Publish one message; its id."""
        body = data if isinstance(data, bytes) else data.encode()
        answer = self.request("POST", f"/publish/{channel}" + (f"?type={type}" if type else ""), body)
        assert answer.status == 201, answer
        return str(answer.json["id"])

    def stats(self) -> dict[str, Any]:
        """The counters."""
        document: dict[str, Any] = self.request("GET", "/stats").json
        return document

    def descriptors(self) -> int:
        """How many files the server has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory(self) -> int:
        """The bytes of memory it holds (resident)."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float:
        """The seconds that it has had a core: what it has done, however long it had to wait for one. In hundredths."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def clients(self) -> int:
        """How many subscribers it counts."""
        return sum(self.stats()["clients"].values())

    def assert_healthy(self) -> None:
        """It runs, and nothing unexpected was logged or counted."""
        assert self.process.poll() is None, self.log.read_text()
        assert self.stats()["errors"] == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text(), self.log.read_text()
