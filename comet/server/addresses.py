"""How many connections each address has in all workers of a service, for `--max-per-address`.

A worker counts in a dictionary. While an address has few connections there, nobody else is told. Beyond that the worker writes its count to
memory that all workers share (`comet.counts`), and reads there once in a while what the others have. So most addresses, which have one
connection, cost a look-up and a store in a dictionary.
"""

from collections.abc import Mapping
from typing import Final

from comet.counts import Counts, Spot

SLACK: Final = 10
"""An address may have a tenth more connections than the limit, or one a worker. Each of N workers lets in the limit divided by N and by
this without a word to the others: at first, and between two readings of the shared memory. While a reload runs two generations, the
workers are those of both."""


class _Shared:
    """An address of whose connections the other workers are told. `word` is where they are counted, or None if there is no room; `left` is
    how many connections more are let in before the next reading."""

    __slots__ = ("left", "spot", "word")

    def __init__(self, spot: Spot, word: int | None) -> None:
        self.spot = spot
        self.word = word
        self.left = 0


class Addresses:
    """The connections of one worker by address. Each address may have `most` in all workers together. The worker is one of `workers` and
    has a `column` of the shared `counts`; without these it counts alone."""

    def __init__(self, most: int, counts: Counts | None = None, column: int = 0, workers: int = 1) -> None:
        self._most = most
        self._counts = counts
        self._column = column
        self._own: dict[str, int] = {}
        self._shared: dict[str, _Shared] = {}
        self._step = most if counts is None else max(1, most // (SLACK * workers))

    @property
    def own(self) -> Mapping[str, int]:
        """The connections of this worker."""
        return self._own

    def add(self, address: str) -> bool:
        """Count one connection more and return True, or return False if the address has all that it may have."""
        count = self._own.get(address, 0)
        if count >= self._step and not self._room(address, count):
            return False
        self._own[address] = count + 1
        return True

    def remove(self, address: str) -> None:
        """Count one connection less."""
        count = self._own[address] - 1
        if count:
            self._own[address] = count
        else:
            del self._own[address]
        if count >= self._step and self._counts is not None:
            shared = self._shared[address]
            shared.left = min(self._step, shared.left + 1)
            if count == self._step:
                del self._shared[address]
                count = 0
            if shared.word is not None:
                self._counts.write(shared.word, shared.spot, count)

    def _room(self, address: str, count: int) -> bool:
        """Return whether the address may have more than `count` connections here; if so, tell the others of one more."""
        counts = self._counts
        if counts is None:
            return False
        shared = self._shared.get(address)
        if shared is None or not shared.left:
            spot = counts.spot(address) if shared is None else shared.spot
            most = self._most - (count if shared is None or shared.word is None else 0)  # else they are among those of the others
            room = most - counts.bound(spot)
            if room <= 0:
                room = most - counts.total(spot)
            if room <= 0:
                return False
            if shared is None:
                shared = self._shared[address] = _Shared(spot, counts.free(spot, self._column))
            shared.left = min(self._step, room)
        shared.left -= 1
        if shared.word is not None:
            counts.write(shared.word, shared.spot, count + 1)
        return True
