"""Publishes batches as fast as they are taken, in a process of its own.

`loadtest.bench_workers` orders ``publish``: `batches` times `lines` messages to `channel`, on each of
`connections` connections to worker `number`. Answers when all are acknowledged.
"""

import http.client
import json
import sys
import threading
from contextlib import closing
from typing import Any

from loadtest.generator import body


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


def main() -> None:
    """Obey orders from standard input until it ends."""
    port = int(sys.argv[1])
    for line in sys.stdin:
        order = json.loads(line)
        assert order.pop("do") == "publish"
        print(json.dumps(publish(port, **order)), flush=True)


if __name__ == "__main__":
    main()
