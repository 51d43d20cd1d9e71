"""What sockets cost the kernel. A leaf, Linux only."""

import re
import resource
from pathlib import Path

_PAGE = resource.getpagesize()


def sockets() -> dict[str, int]:
    """TCP sockets of the whole machine, the bytes that their buffers hold (/proc/net/sockstat), and the bytes
    from which the kernel refuses more (the third of net.ipv4.tcp_mem; 0 where that is not shown)."""
    found = re.search(r"^TCP: inuse (\d+) .*alloc (\d+) mem (\d+)", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    in_use, allocated, pages = map(int, found.groups()) if found else (0, 0, 0)
    limit = Path("/proc/sys/net/ipv4/tcp_mem")
    most = int(limit.read_text().split()[2]) if limit.exists() else 0
    return {"in_use": in_use, "allocated": allocated, "memory_bytes": pages * _PAGE, "memory_limit_bytes": most * _PAGE}
