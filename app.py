"""The composition root: read settings; then supervise, or patch, build, serve, stop. Nothing imports it.

python app.py --help

It runs as three things: as one process alone (`main`); with --workers as their supervisor, which has no
greenlets, so that is decided before the patch; and as a generation (`comet.generation`), which loads all
this once and forks the workers. A worker does what one process alone does: `serve`.
"""

import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from comet import database, generation, listeners, systemd
from comet import log as logs
from comet import settings as knobs
from comet.kernel.output import Output, open_standard
from comet.kernel.processes import write_in_background
from comet.settings import Settings

STOPPING = 5.0
"""Seconds beyond the grace time that an end takes at most."""

SILENCE = 2.0
"""Seconds without a sign of life of the router, which gives one a second, after which this process is not ready (`/readyz`)."""

SPREAD = 0.8
"""Of the grace time over which a drain ends the streams; the rest is for what is still to be written to them."""

LOCKED = 0.2
"""Part of the grace time for which a write of subscriptions may wait for another program that has their file locked."""

log = logging.getLogger("comet")


def prepare(arguments: list[str], listeners: Sequence[socket.socket] = ()) -> Settings:
    """Settings that may be served with, on these listeners where some were passed on, and a log. Exits with status 2
    and a sentence otherwise."""
    settings = knobs.parse(arguments)
    logs.set_up(settings.log, pid=settings.workers != 0, clients=settings.log_clients)
    try:
        settings = knobs.with_secrets(settings)
        objection = knobs.objection(settings, [listener.getsockname()[0] for listener in listeners])
    except knobs.Unreadable as error:
        objection = str(error)
    if objection is not None:
        log.error("%s", objection)
        sys.exit(knobs.WRONG)
    if settings.data:
        prepare_data(Path(settings.data), whole=orders is None)
    return settings


def take_orders() -> generation.Orders | None:
    """Return the orders of the supervisor that has started this process, None if none has. If they can't be read, exit with status 2 and a
    sentence."""
    try:
        return generation.Orders.take(os.environ)
    except generation.Unfit as error:
        print(f"comet: {error}", file=sys.stderr)
        sys.exit(knobs.WRONG)


def take_over() -> tuple[list[socket.socket], systemd.Notifier]:
    """What a service manager has given to this process alone. Exits with status 2 and a sentence if it can't be used."""
    try:
        return systemd.take_sockets(os.environ), systemd.Notifier.take(os.environ)
    except systemd.Unusable as error:
        print(f"comet: {error}", file=sys.stderr)
        sys.exit(knobs.WRONG)


def prepare_data(folder: Path, *, whole: bool) -> None:
    """Have a file of subscriptions that can be used, before any fork and before anybody opens it. Exits with
    status 1 and a sentence where there can't be one; a generation goes on, since messages do not need it (`database-away`)."""
    try:
        database.prepare(folder, whole=whole)
    except database.Unusable as error:
        log.error("%s", error)
        if orders is None:
            sys.exit(1)


def say(text: str) -> None:
    """Write a line to standard output, and wait for whoever reads it for a second at most."""
    with closing(Output(sys.stdout.fileno())) as output:
        output.write(f"{text}\n".encode())
        output.drain(logs.ENDING)


def greet(settings: Settings, address: tuple[str, int], clients: int) -> Callable[[], None]:
    """Say where the service listens, on standard output: whoever started this may wait for the line. In the journal, or where
    the log is JSON and to be nothing else, it is a line of the log. Return what invites to try it, once it is usable."""
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    local = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)  # noqa: S104 - who listens everywhere is also here
    url = f"http://{local}:{address[1]}"
    if settings.log == "json" or logs.to_journal():
        log.info("comet listens on %s for up to %d connections", url, clients)
        return lambda: None
    say(f"comet listens on {url} for up to {clients} connections.")
    key = ' -H "Authorization: Bearer $COMET_PUBLISH_KEY"' if settings.publish_key else ""
    return lambda: say(f"Try it, in two terminals:\n  curl -N {url}/events/news\n  curl{key} -d 'hello, world' {url}/publish/news")


if __name__ == "__main__":
    open_standard()
    write_in_background()
orders = take_orders() if __name__ == "__main__" else None
asked = knobs.parse(sys.argv[1:]) if __name__ == "__main__" else Settings()
if asked.workers and orders is None:
    from comet import supervisor

    passed, notifier = take_over()
    settings = prepare(sys.argv[1:], passed)
    sys.exit(supervisor.run(settings, [sys.executable, *sys.orig_argv[1:]], sys.argv[1:], greet, passed, notifier))

from comet.kernel.patch import patch_all  # noqa: E402

patch_all()

import signal  # noqa: E402 - after the patch, like everything else that may make a lock or a socket
import time  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import gevent  # noqa: E402
from bottle import Bottle  # noqa: E402
from gevent import get_hub  # noqa: E402
from gevent._hub_local import get_hub_if_exists  # noqa: E402 - there is no public way to ask
from gevent.event import Event  # noqa: E402

import handlers  # noqa: E402
from comet import collector, policy, service  # noqa: E402
from comet.backplane import frames  # noqa: E402
from comet.backplane.memory import Bounds, MemoryBackplane  # noqa: E402
from comet.backplane.router import RouterBackplane  # noqa: E402
from comet.board import ROUTER, SUPERVISOR, Board  # noqa: E402
from comet.counts import Counts  # noqa: E402
from comet.generation import FOREIGN, ORPHANED_GRACE, Place, Unfit  # noqa: E402
from comet.hub import Hub  # noqa: E402
from comet.kernel import check, limits, memory, processes  # noqa: E402
from comet.kernel.stock import stock  # noqa: E402
from comet.permit import Permit  # noqa: E402
from comet.rest import Rest  # noqa: E402
from comet.server.addresses import Addresses  # noqa: E402
from comet.server.wsgi import CometServer  # noqa: E402
from comet.stats import Stats  # noqa: E402
from comet.subscriptions import Subscriptions  # noqa: E402
from comet.turn import Soon  # noqa: E402
from handlers.params import Context  # noqa: E402

if asked.backplane or asked.backplane_file:  # only then: Redis' client is much of what a worker has for itself. And here, before any fork
    from comet.backplane.redis import RedisBackplane
    from comet.backplane.redis_dial import Denied
    from comet.backplane.redis_malformed import Garbage
    from comet.backplane.redis_outage import Outage
    from comet.subscriptions_redis import RedisSubscriptions, connect


def main(arguments: list[str]) -> int:
    """Run the service in this process alone, until SIGTERM or SIGINT; the exit status."""
    passed, notifier = take_over()
    settings = prepare(arguments, passed)
    check_backplane(settings)
    limits.raise_file_limit()
    listening = listeners.listen(settings, passed, workers=0)
    if listening is None:
        return 1
    capacity = capacity_of(settings)
    planned = min(settings.clients, capacity) or settings.max_connections or min(capacity, check.UNPLANNED)
    port = passed[0].getsockname()[1] if passed else settings.port
    asked_for = policy.alone(settings.clients, settings.max_connections, limits.capacity())
    asked = check.Plan(planned, port, 1, settings.hibernate, bodies=settings.max_bodies, per_address=settings.max_per_address)
    for sentence in (*asked_for, *check.warnings(asked)):
        log.warning("%s", sentence)
    with tempfile.TemporaryDirectory(prefix="comet-", ignore_cleanup_errors=True) as temporary:
        if not settings.data:
            prepare_data(Path(temporary), whole=False)
        try:
            return serve(settings, listening[0], Path(settings.data or temporary), None, notifier)
        except Unfit as error:
            log.error("%s", error)
            return 1


def check_backplane(settings: Settings) -> None:
    """Exit with status 2 and a sentence if the URL of Redis can't be understood. The supervisor can't tell: Redis' client is not of the
    standard library. A generation does, before it forks workers that would all die of it."""
    if settings.backplane:
        try:
            RedisBackplane.target(settings.backplane)
        except ValueError as error:
            log.error("%s", error)
            sys.exit(knobs.WRONG)


def capacity_of(settings: Settings) -> int:
    """Connections that this process takes."""
    return min(limits.capacity(), settings.max_connections or sys.maxsize)


def serve(settings: Settings, listener: socket.socket, data: Path, place: Place | None, notifier: systemd.Notifier) -> int:
    """Build the server on a bound listener and run it until it is told to stop. `data` is a prepared folder
    (`prepare_data`); `place` is a worker's in its service, None where there is one process alone, which speaks to the
    service manager by itself. The exit status. Raises Unfit."""
    get_hub().print_exception = logs.failed_outside
    capacity = capacity_of(settings)
    stats = Stats()
    backplane = _backplane(settings, place, stats)
    hub = Hub(backplane, stats, settings.backlog, Soon(), _permit(place), settings.busy_backlog, settings.replay_bytes)
    own = _own(place, stats, hub, capacity)
    said = _alone(own, hub) if place is None else partial(_together, place, own, hub if settings.backplane else None)
    subscriptions = _subscriptions(settings, data, capacity)
    context = Context(hub, subscriptions, settings, stats, said, place.worker if place else 0, partial(_missing, place))
    server = _server(listener, context, capacity, place)
    stopping = _Stopping(settings.grace, place)
    collector.set_up(stats)
    if isinstance(backplane, MemoryBackplane):
        gevent.spawn(_every, 1.0, backplane.expire)
    else:
        backplane.start()
    if isinstance(backplane, RouterBackplane) and not backplane.wait(settings.backplane_timeout) and backplane.foreign:
        return FOREIGN  # before it takes a connection: others serve
    server.start()

    rest = Rest() if place is not None and limits.crowding(place.workers, limits.cores()) else None

    def beat() -> None:
        logs.tend()
        stats.sample(time.monotonic())
        if place is not None:
            place.board.write(place.slot, own())  # from the loop, so that one that is stuck is noticed
            server.stand_in(place.stands_in())
        if rest is not None:
            rest.look()

    beat()
    gevent.spawn(_every, 1.0, beat)
    gevent.spawn(_every, collector.TIDYING, processes.give_back)
    if place is None:
        gevent.spawn(_invite, hub, greet(settings, listener.getsockname(), capacity))
        _speak(notifier, stats, capacity)
    else:
        place.heed()
        gevent.spawn(_tell, place, backplane)
    stopping.wait()

    log.info("stopping: %d connections", stats.connections)
    notifier.stopping(stopping.grace + STOPPING)
    server.stand_in([])
    if place is not None:
        place.let_go()
    server.drain()
    hub.drain(SPREAD * stopping.grace)
    subscriptions.drain(LOCKED * stopping.grace)
    late = server.join(stopping.grace)
    subscriptions.close()
    backplane.close()
    if place is not None:
        place.board.write(place.slot, own())  # the supervisor keeps what was counted
    log.info("stopped; cut off after %g s: %d", stopping.grace, late) if late else log.info("stopped")
    return 0


def _tell(place: Place, backplane: "MemoryBackplane | RouterBackplane | RedisBackplane") -> None:
    """Tell the supervisor that this worker serves: once it is linked to the router. Redis is waited for by nobody: /readyz tells."""
    if not isinstance(backplane, RouterBackplane) or backplane.wait(None):
        place.ready()


def _invite(hub: Hub, invite: Callable[[], None]) -> None:
    """Invite to try it once messages can be ordered: with Redis away that is not yet."""
    while not hub.ready():
        gevent.sleep(0.1)
    invite()


def _permit(place: Place | None) -> Permit | None:
    """Whose turn it is to send to very many is of interest where there are more workers than cores."""
    if place is None or place.workers <= limits.cores():
        return None
    return Permit(place.board.descriptor, place.worker % limits.cores())


class _Stopping:
    """The word to stop, from now on: a signal, or that a worker's supervisor is gone. `grace` is how many seconds it may take."""

    def __init__(self, grace: float, place: Place | None) -> None:
        self.grace = grace
        self._place = place
        self._told = Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            gevent.signal_handler(number, self._on_signal)
        if place is not None:
            self._lifeline = get_hub().loop.io(place.lifeline, 1)
            self._lifeline.start(self._abandoned, place)

    def wait(self) -> None:
        """Until it comes."""
        self._told.wait()

    def _on_signal(self) -> None:
        if self._told.is_set() and self._place is None:
            log.warning("a second signal: stopping at once")
            sys.exit(1)
        self._told.set()  # a worker may well be told twice, and its supervisor is who loses patience

    def _abandoned(self, place: Place) -> None:
        self._lifeline.stop()
        log.warning("the supervisor is gone: stopping")
        generation.clean_up(place.router)
        self.grace = min(self.grace, ORPHANED_GRACE)
        self._told.set()


def _server(listener: socket.socket, context: Context, capacity: int, place: Place | None) -> CometServer:
    """The endpoints, on the listener."""
    application = Bottle()
    handlers.mount(application, context)
    reader, caller = handlers.reader(application, context), handlers.caller(application, context)
    roll = logs.Roll() if context.settings.log_clients else None
    if roll is not None:
        context.hub.left = roll.left
    most = context.settings.max_per_address
    addresses = None
    if place is not None:
        addresses = Addresses(most, None if place.counts is None else Counts(place.counts), place.column, place.workers)
    return CometServer(listener, application, reader, caller, context.hub, context.settings, context.stats, capacity, addresses, roll)


def _speak(notifier: systemd.Notifier, stats: Stats, capacity: int) -> None:
    """Tell the service manager, if there is one, that this process alone is ready, and how it is."""
    if not notifier.active:
        return

    def status() -> str:
        return f"one process, {sum(stats.clients.values()):,} of {capacity:,} clients"

    def live() -> None:
        while True:
            gevent.sleep(notifier.interval)
            notifier.beat()
            notifier.status(status())

    def on_reload() -> None:
        notifier.reloading()
        log.warning("nothing to reload: one process alone is restarted; with --workers it would be reloaded")
        notifier.ready(status())

    gevent.signal_handler(signal.SIGHUP, on_reload)
    notifier.ready(status())
    gevent.spawn(live)


def _backplane(settings: Settings, place: Place | None, stats: Stats) -> "MemoryBackplane | RouterBackplane | RedisBackplane":
    """Raises Unfit where there can't be one."""
    if settings.backplane:

        def malformed(number: int) -> None:
            stats.malformed += number

        try:
            if place is None:
                return RedisBackplane.of(settings, Outage(), Garbage(malformed))
            board, free = place.board.descriptor, limits.cores()  # bytes of the board that no permit has
            return RedisBackplane.of(settings, Outage(board, free), Garbage(malformed, board, free + 1))
        except (Denied, ValueError) as error:
            raise Unfit(str(error)) from error
    if place is None:
        return MemoryBackplane(Bounds.of(settings))
    return RouterBackplane(place.way, settings.backplane_timeout, lives=partial(_router_lives, place.board))


def _router_lives(board: Board) -> bool:
    """Return whether the router has lately shown that it lives. One that is just being started has said nothing yet: its link tells."""
    said = board.look(ROUTER)
    return said is None or said.age <= SILENCE


def _subscriptions(settings: Settings, data: Path, capacity: int) -> "Subscriptions | RedisSubscriptions":
    """Where the messages are ordered for many machines, there they are too."""
    if not settings.backplane:
        return Subscriptions(data, capacity)
    return RedisSubscriptions(
        partial(connect, settings.backplane, settings.redis_timeout, settings.redis_connect_timeout, settings.redis_pool),
        settings.redis_prefix,
    )


def _own(place: Place | None, stats: Stats, hub: Hub, capacity: int) -> Callable[[], dict[str, Any]]:
    """What this process says of itself (`comet.service`)."""
    before = processes.resident()
    number, age = (place.worker, place.generation) if place else (0, 1)
    fixed = {"role": "worker", "pid": os.getpid(), "capacity": capacity, "worker": number, "generation": age, "speaks": frames.VERSION}

    def own() -> dict[str, Any]:
        now = processes.resident()
        return {
            **fixed, **stats.document(), "draining": hub.draining, "ready": hub.ready(),
            "log_dropped": logs.dropped(),
            "resident_bytes": now, "growth_bytes": max(0, now - before), "peak_memory_bytes": processes.peak(),
        }  # fmt: skip

    return own


def _alone(own: Callable[[], dict[str, Any]], hub: Hub) -> Callable[[], dict[str, Any]]:
    return lambda: service.summary([own()], hub.totals(), {}, memory.sockets())


def _together(place: Place, own: Callable[[], dict[str, Any]], hub: Hub | None) -> dict[str, Any]:
    """The whole service, as its processes have said on the board; the `hub` is asked where there is no router."""
    said = {slot.slot: {**slot.document, "age": round(slot.age, 2)} for slot in place.board.read()}
    supervisor, router = said.pop(SUPERVISOR, {}), hub.totals() if hub else said.pop(ROUTER, {})
    said[place.slot] = own()
    workers = [said[slot] for slot in sorted(said) if said[slot]["role"] == "worker"]
    return service.summary(workers, router, supervisor, memory.sockets())


def _missing(place: Place | None) -> Mapping[str, Any]:
    """Return how many workers are missing, as the supervisor has said it."""
    said = None if place is None else place.board.look(SUPERVISOR)
    document = {} if said is None else said.document
    missing: Mapping[str, Any] = document.get("missing", service.NOBODY_MISSING)  # a supervisor that is older than this code has none
    return missing


def _every(seconds: float, work: Callable[[], None]) -> None:
    while True:
        gevent.sleep(seconds)
        try:
            work()
        except Exception:
            log.exception("what is done every %g s failed; it goes on", seconds)


if __name__ == "__main__":
    if orders is None:
        sys.exit(main(sys.argv[1:]))
    inherited = [stock(socket, "socket")(fileno=os.dup(descriptor)) for descriptor in orders.listeners]
    settings = prepare(sys.argv[1:], inherited)
    check_backplane(settings)
    for one in inherited:
        one.close()
    _ = gevent.config.loop, gevent.config.resolver, gevent.config.threadpool  # these import what each worker would import for itself
    assert get_hub_if_exists() is None, "processes can't share an event loop"
    folder = Path(settings.data) if settings.data else Path(orders.router).parent  # the supervisor removes that one
    if not settings.data:
        prepare_data(folder, whole=False)
    sys.exit(generation.run(orders, lambda place: serve(settings, place.listener, folder, place, systemd.Notifier())))
