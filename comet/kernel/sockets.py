"""Sockets as the kernel has them: the listener, and what the monkey patch took away.

Linux only, nothing of ours but the way past the patch. `comet.server` and `comet.supervisor` build on it.
"""

import os
import select
import socket

from comet.kernel.limits import BACKLOG
from comet.kernel.stock import stock

epoll = stock(select, "epoll")
"""The real `select.epoll`; gevent's patch removes it, and our own sleeps in nobody's loop."""


KEEP_IDLE, KEEP_INTERVAL, KEEP_PROBES = 120, 10, 4
"""Seconds of silence before a probe, seconds between two, and how many may go unanswered. TCP_USER_TIMEOUT overrides their
number: Linux resets a connection at the first unanswered probe once the silence is longer than it. One lost packet would
do then, so it is never less than all of them take."""


def listen(host: str, port: int, send_buffer: int = 0, unacknowledged: float = 0.0, reuse_port: bool = False) -> socket.socket:
    """A listening TCP socket on `host` (a name or an address, IPv4 or IPv6) and `port` (0: any).

    `send_buffer` and `unacknowledged`: see `tune`. With `reuse_port` others of this user may listen on the same
    port, and the kernel spreads connections over them. Raises OSError.
    """
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tune(listener, send_buffer, unacknowledged)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def tune(listener: socket.socket, send_buffer: int = 0, unacknowledged: float = 0.0) -> None:
    """Set what accepted sockets inherit, which saves system calls a connection; also on a listener that somebody else
    has bound. TCP_NODELAY; a small send buffer (`send_buffer` bytes, 0: the kernel's), so that a client that reads
    nothing costs little; an end of peers that acknowledge nothing for `unacknowledged` seconds, or for as long as the
    probes take if that is longer; keepalive probes, after two minutes of silence, which find those that died while
    nothing was sent. It does not block from now on, in all processes that have it: one that shares its queue may find
    that another was faster."""
    listener.setblocking(False)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_IDLE)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEP_INTERVAL)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEP_PROBES)
    patience = max(unacknowledged, KEEP_IDLE + KEEP_INTERVAL * KEEP_PROBES)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(patience * 1000))
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)


def listen_together(host: str, port: int, count: int, send_buffer: int = 0, unacknowledged: float = 0.0) -> list[socket.socket]:
    """`count` listeners on one port, each with a queue of its own, over which the kernel spreads
    connections. A port that somebody listens on already is refused, although SO_REUSEPORT would let a
    second service of the same user take half of its connections. Raises OSError."""
    if port:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, proto) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
    listeners: list[socket.socket] = []
    try:
        for _ in range(count):
            listeners.append(listen(host, port, send_buffer, unacknowledged, reuse_port=True))
            port = listeners[0].getsockname()[1]
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def listen_locally(path: str) -> socket.socket:
    """A listening Unix socket at `path` that this user alone may use. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
