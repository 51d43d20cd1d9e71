"""The baseline that everybody has: stock gevent.pywsgi with bottle, a generator and a queue a client.

    python -m loadtest.baseline_pywsgi

Prints ``listening on 127.0.0.1:PORT``. GET /test/<id> streams; POST /all sends the body to everybody.
"""

from gevent import monkey

monkey.patch_all()

from collections.abc import Iterator  # noqa: E402

from bottle import Bottle, request  # noqa: E402
from gevent.pywsgi import WSGIServer  # noqa: E402
from gevent.queue import Queue  # noqa: E402

from comet.kernel.limits import raise_file_limit  # noqa: E402
from comet.kernel.sockets import listen  # noqa: E402

app = Bottle()
clients: set["Queue[bytes]"] = set()


@app.get("/test/<user>")  # type: ignore[untyped-decorator]
def test(user: str) -> Iterator[bytes]:
    """A welcome, then each message and a newline."""
    queue: Queue[bytes] = Queue()
    clients.add(queue)
    try:
        yield f"welcome {user}\n".encode()
        while True:
            yield queue.get() + b"\n"
    finally:
        clients.discard(queue)


@app.post("/all")  # type: ignore[untyped-decorator]
def everybody() -> dict[str, int]:
    """The body to all clients."""
    data = request.body.read()
    for queue in clients:
        queue.put(data)
    return {"clients": len(clients)}


if __name__ == "__main__":
    raise_file_limit()
    listener = listen("127.0.0.1", 0)
    server = WSGIServer(listener, app, log=None)
    server.start()
    print(f"listening on 127.0.0.1:{listener.getsockname()[1]}", flush=True)
    server.serve_forever()
