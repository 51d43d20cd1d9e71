"""Publishes as fast as it is taken, in a process of its own.

- ``publish``, which `loadtest.bench_workers` orders: `batches` times `lines` messages to `channel`, on each of
  `connections` connections to worker `number`.
- ``send``, which `loadtest.bench_friends` orders: a message to each of `users` and their followers, one
  request under way on each of `connections` kept-alive connections, which the kernel spreads over the
  workers. Answers the sums of `targets` and `delivered`.

Each answers when all are acknowledged, with `cpu`, the seconds of CPU this process used for the order.
"""

import http.client
import json
import os
import re
import select
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from loadtest.generator import body
from loadtest.process import cpu

_SENT = re.compile(rb'HTTP/1\.1 200 .*"targets":(\d+),"delivered":(\d+)}\n', re.DOTALL)


def worker_of(connection: http.client.HTTPConnection) -> int:
    """The worker that a kept-alive connection has come to."""
    connection.request("GET", "/healthz")
    number: int = json.loads(connection.getresponse().read())["worker"]
    return number


def connect(port: int, number: int) -> http.client.HTTPConnection:
    """A connection to this worker: the kernel spreads them. Raises RuntimeError after many tries."""
    for _ in range(200):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        if worker_of(connection) == number:
            return connection
        connection.close()
    raise RuntimeError(f"no connection comes to worker {number}")


def publish(port: int, number: int, channel: str, lines: int, batches: int, connections: int) -> dict[str, Any]:
    """See the module."""
    line = json.dumps({"channel": channel, "data": body().decode()}).encode()
    data = b"\n".join([line] * lines)
    failures: list[bytes] = []

    def work(connection: http.client.HTTPConnection) -> None:
        with closing(connection):
            for _ in range(batches):
                connection.request("POST", "/publish", data)
                answer = connection.getresponse()
                content = answer.read()
                if answer.status != 200 or b'"error"' in content:
                    failures.append(content[:300])
                    return

    threads = [threading.Thread(target=work, args=(connect(port, number),)) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RuntimeError(failures)
    return {}


def send(port: int, users: Sequence[str], connections: int) -> dict[str, Any]:
    """See the module. Raw sockets: an HTTP library would take more of a CPU than the service."""
    head = f" HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body())}\r\n\r\n".encode() + body()
    requests = iter([b"POST /send/" + user.encode() + head for user in users])
    targets = delivered = 0
    under_way: dict[int, socket.socket] = {}
    with closing(select.epoll()) as epoll:
        for _, request in zip(range(connections), requests, strict=False):  # in this order: zip takes of the first first
            sock = socket.create_connection(("127.0.0.1", port))
            under_way[sock.fileno()] = sock
            epoll.register(sock.fileno(), select.EPOLLIN)
            sock.sendall(request)
        while under_way:
            for number, _ in epoll.poll(60):
                content = under_way[number].recv(65536)
                answer = _SENT.fullmatch(content)
                if answer is None:
                    raise RuntimeError(content[:300])
                targets += int(answer[1])
                delivered += int(answer[2])
                following = next(requests, None)
                if following is not None:
                    under_way[number].sendall(following)
                else:
                    epoll.unregister(number)
                    under_way.pop(number).close()
    return {"targets": targets, "delivered": delivered}


def main() -> None:
    """Obey orders from standard input until it ends."""
    port = int(sys.argv[1])
    calls: dict[str, Callable[..., dict[str, Any]]] = {"publish": publish, "send": send}
    for line in sys.stdin:
        order = json.loads(line)
        before = cpu(os.getpid())
        answer = calls[order.pop("do")](port, **order)
        print(json.dumps({**answer, "cpu": cpu(os.getpid()) - before}), flush=True)


if __name__ == "__main__":
    main()
