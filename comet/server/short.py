"""The short way to read a request that only waits: no parser, no environ, no bottle.

Nearly all requests of a push server are the same GET again, with another cursor: same client, same
headers, byte for byte. So a header block that the strict parser has accepted once is remembered, and
a request that brings the same block needs only its request line read. What is not plain (an escape
in the target, a body, an Origin, HTTP/1.0, anything new) takes the long way, which decides.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from comet.errors import Refusal
from comet.server.http import split_head

MAX_REQUEST = 4096
"""Bytes of a request that can go the short way."""
MAX_BLOCKS = 1000
"""Header blocks remembered."""
MAX_WISHES = 2000
"""Whole requests remembered."""

_LINE = re.compile(rb"GET (/[A-Za-z0-9_.:@,/-]*)(?:\?([A-Za-z0-9_.:@,&=-]*))? HTTP/1\.1")


class Shortcut:
    """`wishes` makes a wish of path, query and Last-Event-ID, None where it can't, or raises Refusal; the
    same must always give the same."""

    def __init__(self, wishes: Callable[[str, Mapping[str, str], str | None], Any], limit: int = MAX_REQUEST) -> None:
        self._make = wishes
        self._limit = min(limit, MAX_REQUEST)
        self._blocks: dict[bytes, str | None] = {}
        self._wishes: dict[bytes, Any] = {}

    def read(self, data: bytes) -> Any:
        """The wish of exactly one whole plain GET; None for anything else, or what is refused: the long way
        says why. A request that many send, such as a poll after the message all had, is read once."""
        wish = self._wishes.get(data)
        if wish is None:
            asked = self.parse(data)
            if asked is None:
                return None
            try:
                wish = self._make(*asked)
            except Refusal:
                return None
            if len(self._wishes) >= MAX_WISHES:
                self._wishes.clear()
            self._wishes[data] = wish
        return wish

    def parse(self, data: bytes) -> tuple[str, Mapping[str, str], str | None] | None:
        """Path, query and Last-Event-ID of exactly one whole plain GET; None for anything else."""
        if not data.startswith(b"GET "):  # whose block would be parsed for nothing
            return None
        line, _, block = data.partition(b"\r\n")
        if len(data) > self._limit or (block not in self._blocks and not self._learn(block)):
            return None
        found = _LINE.fullmatch(line)
        if found is None:
            return None
        query = found[2]
        pairs = {} if not query else dict(pair.partition("=")[::2] for pair in query.decode().split("&") if pair)
        return found[1].decode(), pairs, self._blocks[block]

    def _learn(self, block: bytes) -> bool:
        """Have the strict parser read a block for the first time, behind a request line of our own: what is
        remembered must not depend on the line it came with. Whether it is plain."""
        buffer = bytearray(b"GET / HTTP/1.1\r\n" + block)
        try:
            head = split_head(buffer, self._limit)
        except Refusal:
            return False
        if head is None or buffer or head.method != "GET" or head.length != 0 or head.version != "HTTP/1.1":
            return False
        if not head.keep_alive or head.expects_continue or "origin" in head.headers:
            return False
        if len(self._blocks) >= MAX_BLOCKS:
            self._blocks.clear()
        self._blocks[block] = head.headers.get("last-event-id")
        return True
