"""Sockets as the kernel has them: the listener, and what the monkey patch took away.

Linux only, nothing of ours but the way past the patch. `comet.server` and `comet.supervisor` build on it.
"""

import ctypes
import os
import select
import socket
from typing import Any

from comet.kernel.limits import BACKLOG
from comet.kernel.stock import stock

epoll = stock(select, "epoll")
"""The real `select.epoll`; gevent's patch removes it, and our own sleeps in nobody's loop."""


SILENCE = 120
"""Seconds between two looks whether the peer of a connection that is sent nothing by itself lives: it is asked (`probe`), unless it
has been `silent` for less than a third of that."""

UNACKNOWLEDGED = 2.5 * SILENCE
"""Seconds without a sign of life after which Linux ends a connection at the next probe (TCP_USER_TIMEOUT). One lost packet
must not do, so it is more than a third, and two silences."""

_NEVER = 32767
"""Seconds: the most that TCP_KEEPIDLE and TCP_KEEPINTVL take."""

_libc = ctypes.CDLL(None, use_errno=True)
_one = ctypes.c_int(1)
_info = (ctypes.c_uint32 * 15)()
_info_size = ctypes.c_uint32()


def probe(descriptor: int) -> None:
    """Have the kernel ask the peer of a connection, which has been silent for a second at least, for a sign of life, now.

    The kernel's own timers (SO_KEEPALIVE) fire together: one for two minutes is kept to two seconds or four, so of a million
    connections tens of thousands send their probes in one go, which no queue takes (net.core.netdev_max_backlog is 1,000);
    those that find it full try again in step with each other, and at last the kernel ends their connections, whose clients
    are alive. So `tune` puts these timers off for hours, and whoever watches a connection asks when it suits, a few at a
    time: a shorter TCP_KEEPIDLE counts from the last sign of life, and is over. Raises OSError."""
    if _libc.setsockopt(descriptor, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, ctypes.byref(_one), 4) != 0:
        _raise()


def silent(descriptor: int) -> float:
    """Seconds since the peer of a connection has acknowledged anything, a probe too (tcpi_last_ack_recv of linux/tcp.h). Raises OSError."""
    _info_size.value = ctypes.sizeof(_info)
    if _libc.getsockopt(descriptor, socket.IPPROTO_TCP, socket.TCP_INFO, _info, ctypes.byref(_info_size)) != 0:
        _raise()
    return _info[14] / 1000


def _raise() -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


def _look_up(host: str, port: int) -> tuple[int, int, int, str, tuple[Any, ...]]:
    """The address to listen on, as getaddrinfo has it. Raises OSError, also for what can't be a name: met in gevent's thread pool that
    would be a traceback in the log."""
    try:
        host.encode("idna")
    except UnicodeError as error:
        raise OSError(f"that is no name of a host ({error})") from None
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]


def listen(host: str, port: int, send_buffer: int = 0, unacknowledged: float = 0.0, reuse_port: bool = False) -> socket.socket:
    """A listening TCP socket on `host` (a name or an address, IPv4 or IPv6) and `port` (0: any).

    `send_buffer` and `unacknowledged`: see `tune`. With `reuse_port` others of this user may listen on the same
    port, and the kernel spreads connections over them. Raises OSError.
    """
    family, kind, proto, _, address = _look_up(host, port)
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
    nothing costs little; an end of peers that acknowledge nothing for `unacknowledged` seconds, or for as long as `probe`
    needs if that is longer. It does not block from now on, in all processes that have it: one that shares its queue may find
    that another was faster."""
    listener.setblocking(False)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _NEVER)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _NEVER)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(max(unacknowledged, UNACKNOWLEDGED) * 1000))
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)


def listen_together(host: str, port: int, count: int, send_buffer: int = 0, unacknowledged: float = 0.0) -> list[socket.socket]:
    """`count` listeners on one port, each with a queue of its own, over which the kernel spreads
    connections. A port that somebody listens on already is refused, although SO_REUSEPORT would let a
    second service of the same user take half of its connections. Raises OSError."""
    if port:
        family, kind, proto, _, address = _look_up(host, port)
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


def file_of(path: str) -> int:
    """Return a descriptor of the file of a Unix socket, by which it is connected to (`way_to`) even where the file was removed. Raises
    OSError."""
    return os.open(path, os.O_PATH)


def way_to(path: str, file: int | None) -> str:
    """Return the path by which to connect to the Unix socket that was bound at `path`: that of its `file_of`, whatever was done to the
    folder, or `path` where there is none or /proc does not show it."""
    shown = f"/proc/self/fd/{file}"
    return shown if file is not None and os.path.exists(shown) else path


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
