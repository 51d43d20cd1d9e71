"""What sockets cost the kernel. Linux only."""

import re
import resource

from comet.kernel.processes import Kept

_PAGE = resource.getpagesize()


_sockstat = Kept("/proc/net/sockstat")
_tcp_mem = Kept("/proc/sys/net/ipv4/tcp_mem")


def sockets() -> dict[str, int]:
    """TCP sockets of the whole machine, the bytes that their buffers hold (/proc/net/sockstat), and the bytes
    from which the kernel refuses more (the third of net.ipv4.tcp_mem); 0 for what can't be read."""
    found = re.search(rb"^TCP: inuse (\d+) .*alloc (\d+) mem (\d+)", _read(_sockstat), re.MULTILINE)
    in_use, allocated, pages = map(int, found.groups()) if found else (0, 0, 0)
    limits = _read(_tcp_mem).split()
    most = int(limits[2]) if limits else 0
    return {"in_use": in_use, "allocated": allocated, "memory_bytes": pages * _PAGE, "memory_limit_bytes": most * _PAGE}


def _read(file: Kept) -> bytes:
    try:
        return file.read()
    except OSError:
        return b""
