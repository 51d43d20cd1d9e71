"""Shared memory in which the workers of a service tell each other how many connections each address has.

Neighbours: `comet.server.addresses`, which counts in a worker; `comet.supervisor`, which creates the memory and passes it on as a
descriptor, as it does with the board (`comet.board`). Standard library only, like the supervisor.

The memory is a hash table. An address has a row, and each process that can be a worker has a column: two words of every row, which that
process alone writes. So nothing needs a lock. A word holds the tag of an address (more bits of its hash) and a count. When a worker has
ended, the supervisor clears its column. Pages that nobody has touched take no memory.

A reload runs newer code on this memory. If the layout changes, rename the order (`comet.generation.Orders`): until the service is
started anew each new worker then counts alone.
"""

import errno
import mmap
import os
import sys
from hashlib import blake2b
from typing import Final, NamedTuple, Self

ROWS: Final = 1 << 15
"""Rows of the table. With 16,000 connections a worker and the default limit, at most 1,800 addresses have a word in each column; one in
700 of them then finds both of its words taken, and only its own worker counts it. The table takes up to 1.6 MB a worker."""

_PROBES: Final = 2
_KEY_SIZE: Final = 16
_IN_USE: Final = 1
_HEAD: Final = 2 + _KEY_SIZE // 8
"""Words in front of the rows: the number of columns, how many of them are in use, and the key of the hash."""

_COUNT_BITS: Final = 32
"""Bits of a word that are the count; the 32 above are the tag."""


class Spot(NamedTuple):
    """The place of an address in the table: the first word of its row, and its tag as it stands in a word."""

    start: int
    tag: int


class Counts:
    """The table. Make one with `create`; open it elsewhere by its descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0)
        self._words = memoryview(self._memory).cast("Q")  # a word is stored at once, not byte by byte
        columns = self._words[0]
        self._key = self._memory[16 : 16 + _KEY_SIZE]
        self._width = _PROBES * columns
        self._rows = self._words[_HEAD:]
        halves = memoryview(self._memory).cast("I")
        self._counts = halves[2 * _HEAD + (sys.byteorder == "big") :: 2]
        """The lower halves of the words."""
        halves.release()

    @classmethod
    def create(cls, columns: int) -> Self:
        """Return an empty table for so many processes."""
        descriptor = os.memfd_create("comet-counts")
        os.ftruncate(descriptor, 8 * (_HEAD + ROWS * _PROBES * columns))
        os.pwrite(descriptor, 2 * columns.to_bytes(8, sys.byteorder) + os.urandom(_KEY_SIZE), 0)
        return cls(descriptor)

    def close(self) -> None:
        """Release the memory, and close the descriptor."""
        for view in (self._counts, self._rows, self._words):
            view.release()
        self._memory.close()
        os.close(self.descriptor)

    def use(self, columns: int) -> None:
        """Tell the workers that all of them are among the first `columns`, so that they read no more than these."""
        self._words[_IN_USE] = columns

    def clear(self, column: int) -> None:
        """Forget what the worker of a column had counted; it has ended. Only pages that somebody has touched are looked at."""
        offset, size = 8 * (_HEAD + _PROBES * column), 8 * self._width
        end = 0
        while True:
            try:
                start = os.lseek(self.descriptor, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return  # there is no such page any more
                raise
            end = os.lseek(self.descriptor, start, os.SEEK_HOLE)
            first, last = (max(0, min(ROWS, -((offset - at) // size))) for at in (start, end))  # rows whose words of the column are there
            if first < last:
                nothing = memoryview(bytes(8 * (last - first))).cast("Q")
                for number in range(_PROBES * column, _PROBES * (column + 1)):
                    self._rows[first * self._width + number : last * self._width : self._width] = nothing

    def spot(self, address: str) -> Spot:
        """Return the place of an address. Nobody can choose it, since the hash has a secret key."""
        number = int.from_bytes(blake2b(address.encode(), digest_size=8, key=self._key).digest(), "little")
        return Spot(number % ROWS * self._width, number >> _COUNT_BITS << _COUNT_BITS or 1 << _COUNT_BITS)

    def bound(self, spot: Spot) -> int:
        """Return how many connections all columns have counted of all addresses of the row: never less than `total`, and
        read in a quarter of the time."""
        return sum(self._counts[spot.start : spot.start + _PROBES * self._words[_IN_USE]].tolist())

    def total(self, spot: Spot) -> int:
        """Return how many connections of the address all columns have counted."""
        start, tag = spot
        highest = tag | (1 << _COUNT_BITS) - 1
        words = self._rows[start : start + _PROBES * self._words[_IN_USE]].tolist()
        found = [word for word in words if tag < word <= highest]
        return sum(found) - len(found) * tag

    def free(self, spot: Spot, column: int) -> int | None:
        """Return a word of the row in which the column can count the address; None if other addresses have all of them."""
        first = spot.start + _PROBES * column
        return next((number for number in range(first, first + _PROBES) if not self._rows[number]), None)

    def write(self, number: int, spot: Spot, count: int) -> None:
        """Store in a word how many connections of the address its column has."""
        self._rows[number] = spot.tag | count if count else 0
