"""The composition root: patch, read settings, build, serve, stop. Nothing imports it.

python app.py --help
"""

from gevent import monkey

monkey.patch_all()

import logging  # noqa: E402 - after the patch, like everything that may make a lock or a socket
import signal  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402

import gevent  # noqa: E402
from bottle import Bottle  # noqa: E402
from gevent import get_hub  # noqa: E402
from gevent.event import Event  # noqa: E402

import handlers  # noqa: E402
from comet import collector  # noqa: E402
from comet import settings as knobs  # noqa: E402
from comet.backplane.memory import Bounds, MemoryBackplane  # noqa: E402
from comet.hub import Hub  # noqa: E402
from comet.kernel import check, limits, sockets  # noqa: E402
from comet.server.wsgi import CometServer  # noqa: E402
from comet.settings import Settings  # noqa: E402
from comet.stats import Stats  # noqa: E402
from handlers.params import Context  # noqa: E402

log = logging.getLogger("comet")

_ANY = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 - where a local client finds a server that listens everywhere


def main(arguments: list[str]) -> int:
    """Run the service until SIGTERM or SIGINT; the exit status."""
    settings = knobs.parse(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if not settings.publish_key and not settings.open and not _is_loopback(settings.host):
        log.error("%s is not loopback: anybody there could publish. Set COMET_PUBLISH_KEY, or say --open.", settings.host)
        return 2
    limits.raise_file_limit()
    capacity = min(limits.capacity(), settings.max_connections or sys.maxsize)
    planned = settings.max_connections or min(capacity, check.UNPLANNED)
    for sentence in check.warnings(check.Plan(planned, settings.port, hibernate=settings.hibernate)):
        log.warning("%s", sentence)
    try:
        listener = sockets.listen(settings.host, settings.port, settings.send_buffer, settings.send_timeout)
    except OSError as error:
        log.error("can't listen on %s port %d: %s. Choose another with --host and --port.", settings.host, settings.port, error)
        return 1

    backplane = MemoryBackplane(Bounds.of(settings))
    stats = Stats()
    soon = get_hub().loop.timer(0)
    hub = Hub(backplane, stats, settings.backlog, soon.start)
    application = Bottle()
    context = Context(hub, settings, stats)
    handlers.mount(application, context)
    server = CometServer(listener, application, handlers.reader(application, context), hub, settings, stats, capacity)
    stopping = Event()

    def on_signal() -> None:
        if stopping.is_set():
            log.warning("a second signal: stopping at once")
            sys.exit(1)
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, on_signal)
    collector.set_up(stats)
    server.start()
    expiry = gevent.spawn(_every_second, backplane.expire)
    _greet(settings, listener.getsockname(), capacity)
    stopping.wait()

    log.info("stopping: %d connections", stats.connections)
    expiry.kill()
    server.drain()
    hub.drain()
    late = server.join(settings.grace)
    log.info("stopped; cut off after %g s: %d", settings.grace, late) if late else log.info("stopped")
    return 0


def _every_second(work: Callable[[], None]) -> None:
    while True:
        gevent.sleep(1)
        try:
            work()
        except Exception:
            log.exception("expiry failed; it goes on")


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _greet(settings: Settings, address: tuple[str, int], capacity: int) -> None:
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    url = f"http://{_ANY.get(host, host)}:{address[1]}"
    key = ' -H "Authorization: Bearer $COMET_PUBLISH_KEY"' if settings.publish_key else ""
    print(
        f"comet listens on {url} for up to {capacity} connections. Try it, in two terminals:\n"
        f"  curl -N {url}/events/news\n"
        f"  curl{key} -d 'hello, world' {url}/publish/news",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
