"""Sockets as the kernel has them: the listener, and what the monkey patch took away.

A leaf, Linux only. `comet.server` builds on it.
"""

import select
import socket

from gevent import monkey

from comet.kernel.limits import BACKLOG

epoll = monkey.get_original("select", "epoll") if monkey.is_module_patched("select") else select.epoll
"""The real `select.epoll`; gevent's patch removes it, and our own sleeps in nobody's loop."""


def listen(host: str, port: int, send_buffer: int = 0, unacknowledged: float = 0.0) -> socket.socket:
    """A listening TCP socket on `host` (a name or an address, IPv4 or IPv6) and `port` (0: any).

    Accepted sockets inherit its options, which saves system calls a connection: TCP_NODELAY; a small
    send buffer (`send_buffer` bytes, 0: the kernel's), so that a client that reads nothing costs little;
    an end of peers that acknowledge nothing for `unacknowledged` seconds; keepalive probes, after two
    minutes of silence, which find those that died while nothing was sent. Raises OSError.
    """
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(family, kind, proto)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 120)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 30)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(unacknowledged * 1000))
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener
