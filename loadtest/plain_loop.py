"""The baseline that nobody can beat in Python: `socket.send` in a loop, and no server around it.

`loadtest.bench` orders: ``accept`` (so many connections: each request is read, and answered with
headers and a welcome) and ``send`` (`times` x the same bytes to every one). Answers as
`loadtest.generator` does; ``send`` with ``began``, time.monotonic.
"""

import json
import os
import socket
import sys
import time
from typing import Any

from comet.kernel.limits import raise_file_limit
from comet.kernel.sockets import listen
from loadtest.process import cpu

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nwelcome\n\r\n"


def main() -> None:
    """Obey orders from standard input until it ends."""
    raise_file_limit()
    listener = listen("127.0.0.1", 0)
    listener.setblocking(True)
    sockets: list[socket.socket] = []
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if order["do"] == "accept":
            for _ in range(order["count"]):
                sock, _address = listener.accept()
                sock.recv(4096)
                sock.send(_HEAD)
                sock.setblocking(False)
                sockets.append(sock)
        else:
            data = order["data"].encode()
            before, began = cpu(os.getpid()), time.monotonic()
            for _ in range(order["times"]):
                for sock in sockets:
                    sock.send(data)
            answer = {"began": began, "cpu": cpu(os.getpid()) - before}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
