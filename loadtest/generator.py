"""The load: thousands of raw connections on one epoll, in a process of its own.

`loadtest.bench` sends it orders, a JSON object a line, and it answers each with one:

- ``open``: open `count` connections with a request each, `{i}` in `path` being the connection's
  number, or of `ids` the one in that place, at most 500 under way; a connection counts as open when its answer has begun with the bytes
  `first` ("" for a poll: when the request is sent). Answers seconds.
- ``count``: read until `total` messages have come. Answers when the last one came (time.monotonic),
  the slowest connection's share being included by waiting for all.
- ``cycle``: as ``count``, and every connection sends its next poll, with the cursor of the answer.
- ``drain``: read for `seconds` and count what comes: messages, or whatever holds `mark` (marks cut in two are not).
- ``close``: close all.

A message is counted when its last bytes, `MARK`, have been read from its socket. Every answer has
`cpu`, the seconds of CPU this process used for the order: where that is close to the wall time, the
generator and not the server was the limit.
"""

import errno
import json
import os
import re
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from loadtest.process import cpu

MARK = b"~#"
"""Ends every message of the bench; nothing else holds it."""

UNDER_WAY = 500
PORTS = 2000
"""Connections from one source address."""
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h; Python has a name for it from 3.12 on
_CURSOR = re.compile(rb'"cursor":"([^"]+)"')


def body(size: int = 100) -> bytes:
    """A message of `size` bytes that `count` recognizes."""
    return b"x" * (size - len(MARK)) + MARK


class Generator:
    """All connections go to one server `port` on loopback."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.sockets: dict[int, socket.socket] = {}
        self.paths: dict[int, str] = {}
        self.epoll = select.epoll()

    def open(self, count: int, path: str, first: str, start: int = 0, ids: Sequence[str] | None = None) -> dict[str, Any]:
        """See the module."""
        began = time.monotonic()
        mark = first.encode()
        waiting: dict[int, bytes] = {}
        done = 0
        next_one = start
        while done < count:
            while next_one < start + count and len(waiting) < UNDER_WAY:
                sock = socket.socket()
                sock.setblocking(False)
                # the kernel looks for a free port one by one: it must not have to look far
                sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
                sock.bind((f"127.1.0.{1 + next_one // PORTS}", 0))
                error = sock.connect_ex(("127.0.0.1", self.port))
                if error not in (0, errno.EINPROGRESS):
                    raise OSError(error, "connect")
                number = sock.fileno()
                self.sockets[number] = sock
                self.paths[number] = path.format(i=next_one if ids is None else ids[next_one])
                waiting[number] = b""
                self.epoll.register(number, select.EPOLLOUT)
                next_one += 1
            for number, event in self.epoll.poll(30):
                if event & select.EPOLLOUT:
                    self.sockets[number].send(f"GET {self.paths[number]} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                    self.epoll.modify(number, select.EPOLLIN)
                    if mark:
                        continue
                else:
                    data = self._receive(number)
                    if number not in waiting:
                        continue  # it is open, and has a heartbeat already
                    waiting[number] += data
                    if mark not in waiting[number]:
                        continue
                del waiting[number]
                done += 1
        return {"seconds": time.monotonic() - began}

    def count(self, total: int, polls: bool = False) -> dict[str, Any]:
        """See the module: `polls` makes it ``cycle``."""
        sockets, poll, split = self.sockets, self.epoll.poll, MARK[:1]
        cut: set[int] = set()
        answers: dict[int, bytes] = {}
        got = 0
        deadline = time.monotonic() + 120
        while got < total:
            ready = poll(5, 512)
            if not ready and time.monotonic() > deadline:
                raise TimeoutError(f"{got} of {total} messages came")
            for number, _ in ready:
                data = self._receive(number)
                if polls:
                    data = answers.pop(number, b"") + data
                    if not data.endswith(b"]}"):
                        answers[number] = data
                        continue
                    found = _CURSOR.search(data)
                    assert found, data
                    got += data.count(MARK)
                    target = f"{self.paths[number]}?since={found[1].decode()}"
                    sockets[number].send(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
                    continue
                if number in cut:
                    cut.discard(number)
                    got += data[:1] == MARK[1:]
                got += data.count(MARK)
                if data.endswith(split):
                    cut.add(number)
        return {"at": time.monotonic(), "count": got}

    def drain(self, seconds: float, mark: str = MARK.decode()) -> dict[str, Any]:
        """See the module."""
        end = time.monotonic() + seconds
        wanted = mark.encode()
        got = 0
        while (left := end - time.monotonic()) > 0:
            for number, _ in self.epoll.poll(left, 512):
                got += self._receive(number).count(wanted)
        return {"count": got}

    def _receive(self, number: int) -> bytes:
        data = self.sockets[number].recv(65536)
        if not data:
            raise EOFError("the server closed a connection")
        return data

    def close(self) -> dict[str, Any]:
        """See the module."""
        for number, sock in self.sockets.items():
            self.epoll.unregister(number)
            sock.close()
        self.sockets.clear()
        self.paths.clear()
        return {}


def main() -> None:
    """Obey orders from standard input until it ends."""
    generator = Generator(int(sys.argv[1]))
    calls: dict[str, Callable[..., dict[str, Any]]] = {
        "open": generator.open,
        "count": generator.count,
        "cycle": lambda total: generator.count(total, polls=True),
        "drain": generator.drain,
        "close": generator.close,
    }
    for line in sys.stdin:
        order = json.loads(line)
        before = cpu(os.getpid())
        answer = calls[order.pop("do")](**order)
        answer["cpu"] = cpu(os.getpid()) - before
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
