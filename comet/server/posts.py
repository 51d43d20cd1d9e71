"""The short way to read a small POST, which publishers send by the thousand: no environ, no bottle.

Neighbour: `comet.server.short`, which does so for requests that wait. As there, a header block that the
strict parser has accepted once is remembered (`comet.server.blocks`), with the length of body that it
announces, and what is not plain takes the long way, which decides: a body that is large, chunked or still to come, an escape or a
query in the target, an Origin, an Idempotency-Key (a block of its own each), a Content-Encoding, anything new.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from comet.hosts import EVERY, Hosts
from comet.server.blocks import MAX_REQUEST, judge

MAX_BLOCKS = 1000
"""Header blocks remembered."""

_NOT_PLAIN = frozenset({"idempotency-key", "content-encoding"})
"""Headers that a handler looks at and that are not remembered."""

_LINE = re.compile(rb"POST (/[A-Za-z0-9_.:@/-]*) HTTP/1\.1")

Reply = tuple[str, Sequence[tuple[str, str]], bytes]
"""Status line, headers but for those that frame it, and body."""

Call = Callable[[], Reply]
"""What a request asks for; it may block, and is called once, in a greenlet."""


class _Block(NamedTuple):
    """What is remembered of a header block."""

    length: int
    authorization: str


class Posts:
    """`calls` makes a `Call` of path, Authorization and body, None where it can't; that has no effect yet. `stand_ins` are
    headers that were taken off before (`comet.server.blocks`); `hosts` are the names for which requests may ask."""

    def __init__(
        self,
        calls: Callable[[str, str, bytes], Call | None],
        limit: int = MAX_REQUEST,
        stand_ins: Mapping[str, str] = MappingProxyType({}),
        hosts: Hosts = EVERY,
    ) -> None:
        self._make = calls
        self._limit = min(limit, MAX_REQUEST)
        self._stand_ins = stand_ins
        self._hosts = hosts
        self._blocks: dict[bytes, _Block] = {}

    def read(self, data: bytes) -> Call | None:
        """What exactly one whole plain POST asks for; None for anything else."""
        asked = self.parse(data)
        return None if asked is None else self._make(*asked)

    def parse(self, data: bytes) -> tuple[str, str, bytes] | None:
        """Path, Authorization and body of exactly one whole plain POST; None for anything else."""
        if len(data) > self._limit or not data.startswith(b"POST "):
            return None
        head, blank, body = data.partition(b"\r\n\r\n")
        line, _, block = head.partition(b"\r\n")
        if not blank:
            return None
        known = self._blocks.get(block) or self._learn(block)
        if known is None or known.length != len(body):
            return None
        found = _LINE.fullmatch(line)
        return None if found is None else (found[1].decode(), known.authorization, body)

    def _learn(self, block: bytes) -> _Block | None:
        """Have a block parsed for the first time; None if it is not plain."""
        head = judge("POST", block + b"\r\n\r\n", self._limit, self._stand_ins, self._hosts)
        if head is None or head.length is None or not _NOT_PLAIN.isdisjoint(head.headers):
            return None
        if len(self._blocks) >= MAX_BLOCKS:
            self._blocks.clear()
        known = self._blocks[block] = _Block(head.length, head.headers.get("authorization", ""))
        return known
