"""What the kernel holds of data for the TCP connections of a port, as `ss -m` shows it: asked by netlink (sock_diag(7)).

Unlike /proc/net/sockstat, which counts the whole machine, it is not changed by what else runs there.
"""

import socket
import struct

SOCK_DIAG = 4
"""NETLINK_SOCK_DIAG."""

_DIAG_BY_FAMILY, _DONE, _DUMP = 20, 3, 0x301
_SKMEMINFO = 7
_STATES = 0xFFF & ~(1 << 3 | 1 << 6 | 1 << 10)
"""All but SYN_RECV and TIME_WAIT, which hold no data, and LISTEN."""
_HEADER, _MESSAGE = 16, 72
"""Bytes of nlmsghdr and of inet_diag_msg."""


def sizes(port: int) -> list[int]:
    """Return the bytes of each connection whose own port on this machine is `port`: received and not read, or sent and not acknowledged."""
    request = struct.pack("=BBBxI", socket.AF_INET, socket.IPPROTO_TCP, 1 << (_SKMEMINFO - 1), _STATES)
    request += struct.pack("!H", port) + bytes(46)
    found: list[int] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, SOCK_DIAG) as sock:
        sock.send(struct.pack("=IHHII", _HEADER + len(request), _DIAG_BY_FAMILY, _DUMP, 0, 0) + request)
        while True:
            data = sock.recv(1 << 18)
            while data:
                length, kind = struct.unpack_from("=IH", data)
                if kind == _DONE:
                    return found
                assert kind == _DIAG_BY_FAMILY, f"netlink answered with a message of type {kind}"
                found.append(_size(data[_HEADER + _MESSAGE : length]))
                data = data[length:]


def _size(attributes: bytes) -> int:
    """Return what the attributes of one connection say of its memory."""
    while attributes:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind == _SKMEMINFO:
            received, _, _, _, reserved, queued, options, backlog = struct.unpack_from("=8I", attributes, 4)
            return int(received + reserved + queued + options + backlog)
        attributes = attributes[(length + 3) & ~3 :]
    raise AssertionError("the kernel did not say what the connection's memory is")
