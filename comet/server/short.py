"""The short way to read a request that only waits: no parser, no environ, no bottle.

Nearly all requests of a push server are the same GET again, with another cursor: same client, same
headers, byte for byte. So a header block that the strict parser has accepted once is remembered
(`comet.server.blocks`), and a request that brings the same block needs only its request line read. What
is not plain (an escape in the target, a body, an Origin, HTTP/1.0, anything new) takes the long way,
which decides.
"""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from comet.errors import Refusal
from comet.hosts import EVERY, Hosts
from comet.server.blocks import MAX_REQUEST, judge

MAX_BLOCKS = 1000
"""Header blocks remembered."""
MAX_WISHES = 2000
"""Whole requests remembered."""

MAX_PARAMETERS = 20
"""Query parameters of a request that goes the short way: an EventSource or a poll has one or two."""

_LINE = re.compile(rb"GET (/[A-Za-z0-9_.:@,/-]*)(?:\?([A-Za-z0-9_.:@,&=-]*))? HTTP/1\.1")


class Shortcut:
    """`wishes` makes a wish of path, query and Last-Event-ID, None where it can't, or raises Refusal; the
    same must always give the same. `stand_ins` are headers that were taken off before (`comet.server.blocks`); `hosts` are
    the names for which requests may ask."""

    def __init__(
        self,
        wishes: Callable[[str, Mapping[str, str], str | None], Any],
        limit: int = MAX_REQUEST,
        stand_ins: Mapping[str, str] = MappingProxyType({}),
        hosts: Hosts = EVERY,
    ) -> None:
        self._make = wishes
        self._limit = min(limit, MAX_REQUEST)
        self._stand_ins = stand_ins
        self._hosts = hosts
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
        if query and query.count(b"&") >= MAX_PARAMETERS:
            return None
        pairs = {} if not query else dict(pair.partition("=")[::2] for pair in query.decode().split("&") if pair)
        return found[1].decode(), pairs, self._blocks[block]

    def _learn(self, block: bytes) -> bool:
        """Have a block parsed for the first time; whether it is plain."""
        head = judge("GET", block, self._limit, self._stand_ins, self._hosts)
        if head is None or head.length != 0:
            return False
        if len(self._blocks) >= MAX_BLOCKS:
            self._blocks.clear()
        self._blocks[block] = head.headers.get("last-event-id")
        return True


class LongWay:
    """Where every request takes the long way."""

    def read(self, data: bytes) -> None:
        """Nothing goes the short way."""
