"""Header blocks, the lines behind a request's first: which of them a short way may know by heart.

Nearly all requests bring a block that has come before, byte for byte, so the short ways (`comet.server.short`,
`comet.server.posts`) have each parsed once, by the strict parser (`judge`). Behind a proxy no two are the same: it writes
into each whose request it is (`comet.server.proxies`). So those two lines are taken out first (`lift`), where they are
as plain as they should be, and a block is judged with others in their place.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from comet.errors import Refusal
from comet.hosts import EVERY, Hosts
from comet.server.http import Head, split_head

MAX_REQUEST = 4096
"""Bytes of a request that can go a short way: what is read of an idle connection at once."""

STAND_INS: Mapping[str, str] = {"x-forwarded-for": "x", "x-request-id": "x"}
"""Headers that are lifted, and the values with which a block is judged without them."""

_FORWARDED = re.compile(rb"(?i:\r\nX-Forwarded-For: )([0-9A-Fa-f.:, \[\]]{2,256})(?=\r\n)")
_ID = re.compile(rb"(?i:\r\nX-Request-ID: )([A-Za-z0-9._:+/=@-]{1,128})(?=\r\n)")


class Lifted(NamedTuple):
    """A request without what a proxy says of it, and that; "" where it says nothing."""

    data: bytes
    forwarded: str
    request_id: str


def lift(data: bytes, limit: int) -> Lifted:
    """Take the first X-Forwarded-For and X-Request-ID off the head of a request. What is not plain, and all of one that has
    over `limit` bytes, stays where it is: a block that still has such a line is not (see `judge`)."""
    forwarded = request_id = ""
    end = data.find(b"\r\n\r\n") + 2  # a body may look like headers
    if end >= 2 and len(data) <= limit:
        found = _FORWARDED.search(data, 0, end)
        if found is not None:
            forwarded = found[1].decode()
            end -= len(found[0])
            data = data[: found.start()] + data[found.end() :]
        found = _ID.search(data, 0, end)
        if found is not None:
            request_id = found[1].decode()
            data = data[: found.start()] + data[found.end() :]
    return Lifted(data, forwarded, request_id)


def judge(method: str, block: bytes, limit: int, stand_ins: Mapping[str, str], hosts: Hosts = EVERY) -> Head | None:
    """The head of which `block`, its blank line included, is all but the request line: that is one of our own, since
    what is remembered must not depend on the line it came with. None if it is not plain: refused, or more than one head,
    a Host that is none of `hosts`, an Origin, an expectation, the connection's end, or a line that was to be lifted."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in stand_ins.items())
    buffer = bytearray(f"{method} / HTTP/1.1\r\n{lines}".encode() + block)
    try:
        head = split_head(buffer, limit)
    except Refusal:
        return None
    if head is None or buffer or head.method != method or head.version != "HTTP/1.1":
        return None
    if not head.keep_alive or head.expects_continue or "origin" in head.headers:
        return None
    if not hosts.allow(head.headers["host"]):
        return None
    if any(head.headers[name] != value for name, value in stand_ins.items()):
        return None
    return head
