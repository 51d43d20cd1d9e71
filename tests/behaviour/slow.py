"""A slow way to a server: what goes through comes so many seconds later, in order, each way. For machines whose kernel
has no netem; ``python -m tests.behaviour.slow <from host:port> <to host:port> <seconds>``, until it is ended.
"""

import sys
from typing import Any

import gevent
from gevent import socket
from gevent.queue import Queue
from gevent.server import StreamServer


def main(here: str, there: str, delay: float) -> None:
    """Serve."""
    host, port = there.rsplit(":", 1)

    def serve(near: Any, address: Any) -> None:
        try:
            far = socket.create_connection((host, int(port)))
        except OSError:
            near.close()
            return
        gevent.joinall([gevent.spawn(carry, near, far, delay), gevent.spawn(carry, far, near, delay)])
        near.close()
        far.close()

    StreamServer(here, serve).serve_forever()


def carry(source: Any, target: Any, delay: float) -> None:
    """One way."""
    loop = gevent.get_hub().loop
    queue: Any = Queue()

    def write() -> None:
        while True:
            due, data = queue.get()
            gevent.sleep(max(0.0, due - loop.now()))
            try:
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(data)
            except OSError:  # it is over; the other way ends by itself
                return

    writer = gevent.spawn(write)
    data = b" "
    while data:
        try:
            data = source.recv(1 << 16)
        except OSError:
            data = b""
        loop.update_now()
        queue.put((loop.now() + delay, data))
    writer.join()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
